// Convolution on tensor cores: the implicit matrix product of conv2d_implicit_gemm.cu, forward and, as stride
// phases in one launch, the input gradient (conv2d.cuh), with mma.sync for its inner product.
//
//   output[position, channel] = sum over (tap, source channel) of input[position, (tap, source channel)]
//                                                               * filter[channel, (tap, source channel)]
//
// Both factors are read where they lie, source channels side by side: channels-last, in chunks of 16 bytes.
// conv2d_tensor_pack.cu brings them there where they are not. The sum runs tap by tap, within a tap through its
// chunks, four chunks a step whatever tap they belong to: 8 channels with nine taps fill the steps as 72 would.
//
// A block makes positions x channels: 128 x 128 (256 threads), 128 x 64 or 64 x 32 (128 threads); a warp 64 x
// 32 or 32 x 16 of them. cp.async fills a ring of four stages in shared memory, three steps ahead, with zeros
// where a window leaves the image; so there is one barrier a step. Rows of a stage are 64 bytes, their chunks
// exchanged by the row's number, which lets eight rows of one chunk, as ldmatrix reads them, and two whole
// rows, as cp.async writes them, each fall into all 32 banks. The sums go back through shared memory, the
// epilogue on the way, and leave in pieces of 16 bytes, or one by one along whichever of channels and
// positions are neighbours.
//
// Limit: 2 * N * K * P * Q * (C / groups) * R * S operations at the tensor cores' rate, or input, filter and
// output once through memory. Prediction, not measured: a step of the large tile does 2 * 128 * 128 operations
// for each number of the 128 + 128 rows that it fetches, 64 a byte in 16 bits and 32 in tf32 (medium 43 and 21,
// small 21 and 11), so an L2 cache of 5.5 TB/s, an estimate for the H200, holds 16 bits to 350 TFLOP/s and tf32
// to 175, before the 63 % of its peak that mma.sync is known to reach does. From shared memory a warp reads 3
// KiB for 16 products, 21 operations a byte in 16 bits, 128 bytes a clock: about that 63 % again. Three
// products do the fetching of one, and their conversions and additions take about as many instructions as the
// products: 105 TFLOP/s at best.
//
// Compiled for sm_90, large, medium and small: registers 128, 124 and 71 (16 bits), 123, 125 and 69 (tf32), 192,
// 198 and 93 (three products); shared memory 65, 49 and 25 KiB; of 64 warps 16, 16 and 28 are resident (three
// products 8, 8 and 20). Other architectures: docs/kernels.md.
#include "conv2d_tensor.cuh"

constexpr int LINE = 64;  // bytes of a row of a stage: four chunks
constexpr int PART = 64;  // positions that are written at a time

constexpr int NOWHERE = -(1 << 30);  // outside at every tap

// Blocks of small tiles that a multiprocessor's registers are to hold: left to itself the compiler goes for more,
// and puts numbers that it needs into memory.
constexpr int SMALL_BLOCKS = PRODUCTS == 3 ? 5 : 7;

__device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * LINE + ((chunk ^ (row >> 1 & 3)) << 4);
}

struct alignas(16) Vector { scalar_t number[CHUNK]; };

template <int POSITIONS, int OUTPUTS, int WARP_POSITIONS, int WARP_OUTPUTS>
__device__ __forceinline__ void convolve(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    Terms terms, scalar_t *output, Strides output_strides, Channels channels, Axis vertical, Axis horizontal,
    int transposed, Epilogue epilogue, int vectors, int unit, unsigned char *stages, long long *places
) {
    constexpr int WARPS_ACROSS = OUTPUTS / WARP_OUTPUTS;
    constexpr int THREADS = POSITIONS / WARP_POSITIONS * WARPS_ACROSS * 32;
    constexpr int STAGE = (POSITIONS + OUTPUTS) * LINE;
    constexpr int ROWS = THREADS / 4;  // rows of a stage that the threads fill at once
    constexpr int SOURCE_LOADS = POSITIONS / ROWS, FILTER_LOADS = OUTPUTS / ROWS;
    constexpr int DOWN = WARP_POSITIONS / 16, ACROSS = WARP_OUTPUTS / 8;
    constexpr int PITCH = OUTPUTS + 8;  // numbers a row of sums: pairs of four rows meet different banks
    static_assert(PART * PITCH * 4 <= STAGES * STAGE, "the sums go where the stages were");

    // The unit: a group of a phase. Some phases have fewer positions than blocks were started for.
    const int group = unit % channels.groups, phase = unit / channels.groups;
    const int phases_across = transposed ? min(horizontal.stride, horizontal.output) : 1;
    const int first_row = phase / phases_across, first_column = phase % phases_across;
    const Line down = line_of(vertical, transposed, first_row);
    const Line across = line_of(horizontal, transposed, first_column);
    const int height = (vertical.output - first_row + down.phases - 1) / down.phases;
    const int width = (horizontal.output - first_column + across.phases - 1) / across.phases;
    const long long plane = (long long)height * width;
    const long long first_position = (long long)blockIdx.x * POSITIONS;
    const long long positions = plane * channels.images;
    if (first_position >= positions) return;

    const int first_channel = blockIdx.y * OUTPUTS;
    const int line = threadIdx.x / 4;
    input += (long long)group * channels.source;
    filter += group * filter_strides.group;

    // The positions whose rows this thread fills.
    long long sources[SOURCE_LOADS];
    int rows[SOURCE_LOADS], columns[SOURCE_LOADS];
    __syncthreads();  // the unit before may still be reading
#pragma unroll
    for (int i = 0; i < SOURCE_LOADS; ++i) {
        const long long position = first_position + line + i * ROWS;
        long long place = -1;
        sources[i] = 0;
        rows[i] = columns[i] = NOWHERE;
        if (position < positions) {
            const long long image = position / plane;
            const int down_here = (int)((position - image * plane) / width);
            const int across_here = (int)((position - image * plane) % width);
            rows[i] = down.start + down_here * down.advance;
            columns[i] = across.start + across_here * across.advance;
            sources[i] = image * input_strides.n;
            place = image * output_strides.n +
                    (first_row + (long long)down_here * down.phases) * output_strides.h +
                    (first_column + (long long)across_here * across.phases) * output_strides.w;
        }
        if (threadIdx.x % 4 == 0) places[line + i * ROWS] = place;
    }

    // The chunk that this thread fetches next, of every row: the same channels of the same tap.
    const int chunks = channels.source / CHUNK;
    const int steps = (int)(((long long)chunks * down.taps * across.taps + 3) / 4);
    int chunk = threadIdx.x % 4, tap_down = 0, tap_across = 0;

    float sums[DOWN][ACROSS][4];
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[i][j][k] = 0.0f;
        }
    }

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_position = warp / WARPS_ACROSS * WARP_POSITIONS;
    const int warp_output = warp % WARPS_ACROSS * WARP_OUTPUTS;

    for (int step = 1 - STAGES; step < steps; ++step) {
        const int coming = step + STAGES - 1;
        if (step >= 0) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();  // this step has arrived for all, and the step before has been read by all
        }
        if (coming < steps) {
            unsigned char *stage = stages + coming % STAGES * STAGE;
            while (chunk >= chunks) {
                chunk -= chunks;
                if (++tap_across == across.taps) {
                    tap_across = 0;
                    ++tap_down;
                }
            }
            const bool tap = tap_down < down.taps;  // the last step may reach beyond the last tap
            const int down_by = tap_down * down.step, across_by = tap_across * across.step;
#pragma unroll
            for (int i = 0; i < SOURCE_LOADS; ++i) {
                const int row = rows[i] + down_by, column = columns[i] + across_by;
                const bool there = tap && inside(row, vertical.source) && inside(column, horizontal.source);
                const long long from =
                    sources[i] + row * input_strides.h + column * input_strides.w + chunk * CHUNK;
                copy_async<16>(
                    stage + swizzled(line + i * ROWS, threadIdx.x % 4), input + (there ? from : 0), there ? 16 : 0
                );
            }
            const long long weights = (down.first + tap_down * down.tap_step) * filter_strides.r +
                                      (across.first + tap_across * across.tap_step) * filter_strides.s +
                                      chunk * CHUNK;
#pragma unroll
            for (int i = 0; i < FILTER_LOADS; ++i) {
                const int channel = first_channel + line + i * ROWS;
                const bool there = tap && channel < channels.output;
                copy_async<16>(
                    stage + POSITIONS * LINE + swizzled(line + i * ROWS, threadIdx.x % 4),
                    filter + (there ? weights + channel * filter_strides.output : 0), there ? 16 : 0
                );
            }
            chunk += 4;
        }
        copy_async_commit();  // an empty group too, so that the number that may be left stays the same
        if (step >= 0) {
            const unsigned char *pixels = stages + step % STAGES * STAGE + warp_position * LINE;
            const unsigned char *weights = stages + step % STAGES * STAGE + (POSITIONS + warp_output) * LINE;
#pragma unroll
            for (int half = 0; half < 2; ++half) {  // two chunks a product
                Left left[DOWN];
                Right right[ACROSS];
#pragma unroll
                for (int i = 0; i < DOWN; ++i) {
                    load_matrix(left[i].word, pixels + i * 16 * LINE + swizzled(lane % 16, 2 * half + lane / 16));
                }
#pragma unroll
                for (int j = 0; j < ACROSS; j += 2) {
                    unsigned words[4];
                    load_matrix(
                        words,
                        weights + j * 8 * LINE + swizzled(lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2)
                    );
                    right[j].word[0] = words[0], right[j].word[1] = words[1];
                    right[j + 1].word[0] = words[2], right[j + 1].word[1] = words[3];
                }
                multiply_tiles(sums, left, right);
            }
        }
    }
    copy_async_wait_all();

    float *shared_sums = reinterpret_cast<float *>(stages);
    const bool by_channel = output_strides.c < output_strides.w;
    const int left_channels = channels.output - first_channel;
    const int channel_of_output = group * channels.output + first_channel;
#pragma unroll
    for (int part = 0; part < POSITIONS / PART; ++part) {
        __syncthreads();  // the stages, or the part before, have been read
        if (warp_position / PART == part) {
#pragma unroll
            for (int i = 0; i < DOWN; ++i) {
#pragma unroll
                for (int j = 0; j < ACROSS; ++j) {
                    float *pair = shared_sums + (warp_position % PART + i * 16 + lane / 4) * PITCH + warp_output +
                                  j * 8 + lane % 4 * 2;
                    *reinterpret_cast<float2 *>(pair) = make_float2(sums[i][j][0], sums[i][j][1]);
                    *reinterpret_cast<float2 *>(pair + 8 * PITCH) = make_float2(sums[i][j][2], sums[i][j][3]);
                }
            }
        }
        __syncthreads();
        if (vectors) {
#pragma unroll 1
            for (int element = threadIdx.x; element < PART * (OUTPUTS / CHUNK); element += THREADS) {
                const int row = element / (OUTPUTS / CHUNK), channel = element % (OUTPUTS / CHUNK) * CHUNK;
                const long long pixel = places[part * PART + row];
                if (channel < left_channels && pixel >= 0) {
                    // What is computed goes back to shared memory: there is no register to spare.
                    const long long place = pixel + channel_of_output + channel;
                    float *numbers = shared_sums + row * PITCH + channel;
                    Vector vector;
#pragma unroll
                    for (int k = 0; k < CHUNK; ++k) {
                        numbers[k] = scaled(numbers[k], terms, channel_of_output + channel + k);
                    }
                    if (terms.residual != nullptr) {
                        vector = *reinterpret_cast<const Vector *>(terms.residual + place);
#pragma unroll
                        for (int k = 0; k < CHUNK; ++k) numbers[k] += load(vector.number[k]);
                    }
#pragma unroll
                    for (int k = 0; k < CHUNK; ++k) {
                        vector.number[k] = store(activate(epilogue.function, numbers[k], epilogue.negative_slope));
                    }
                    *reinterpret_cast<Vector *>(output + place) = vector;
                }
            }
        } else {
#pragma unroll 1
            for (int element = threadIdx.x; element < PART * OUTPUTS; element += THREADS) {
                const int row = by_channel ? element / OUTPUTS : element % PART;
                const int channel = by_channel ? element % OUTPUTS : element / PART;
                const long long pixel = places[part * PART + row];
                if (channel < left_channels && pixel >= 0) {
                    const long long place = pixel + (channel_of_output + channel) * output_strides.c;
                    output[place] = finished(
                        shared_sums[row * PITCH + channel], terms, channel_of_output + channel, place, epilogue
                    );
                }
            }
        }
    }
}

// Grid: x the positions' tiles, y the channels', z the units (as many as there may be blocks; then the next
// ones). Strides are in elements; input_strides.c and filter_strides.source are 1 and not looked at, and what
// is read begins at multiples of 16 bytes. With ``vectors`` that holds for the output too, and so do its
// channels, and for the residual.
extern "C" __global__ void __launch_bounds__(256) conv2d_tensor_large(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int vectors, int units
) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ long long places[128];
    for (int unit = blockIdx.z; unit < units; unit += gridDim.z) {
        convolve<128, 128, 64, 32>(
            input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
            channels, vertical, horizontal, transposed, epilogue, vectors, unit, stages, places
        );
    }
}

extern "C" __global__ void __launch_bounds__(128) conv2d_tensor_medium(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int vectors, int units
) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ long long places[128];
    for (int unit = blockIdx.z; unit < units; unit += gridDim.z) {
        convolve<128, 64, 64, 32>(
            input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
            channels, vertical, horizontal, transposed, epilogue, vectors, unit, stages, places
        );
    }
}

extern "C" __global__ void __launch_bounds__(128, SMALL_BLOCKS) conv2d_tensor_small(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int vectors, int units
) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ long long places[64];
    for (int unit = blockIdx.z; unit < units; unit += gridDim.z) {
        convolve<64, 32, 32, 16>(
            input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
            channels, vertical, horizontal, transposed, epilogue, vectors, unit, stages, places
        );
    }
}
