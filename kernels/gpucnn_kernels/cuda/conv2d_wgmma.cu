// Convolution on the tensor cores of compute capability 9.0, forward and, as stride phases in one launch, the input
// gradient: the implicit matrix product of conv2d_tensor.cu, with products of a warpgroup (ptx_warpgroup.cuh) for its
// inner product. 16-bit arrays, summed in float32.
//
//   output[position, channel] = sum over (tap, source channel) of input[position, (tap, source channel)]
//                                                               * filter[channel, (tap, source channel)]
//
// Both factors are read where they lie, source channels side by side, in chunks of 16 bytes; the sum runs tap by tap
// and within a tap through its chunks, eight chunks a step whatever tap they belong to.
//
// A block makes 128 positions x 256, 128 or 64 channels: two warpgroups of 64 positions each, whose sums are 128, 64
// or 32 registers a thread. The tensor cores read both factors from shared memory by themselves, so a step is four
// instructions of each warp, and the threads have the time of these products for addresses. cp.async fills a ring of
// stages two steps ahead; the stage that it fills is the one of the step before the last, whose products every warp
// has waited for before the barrier. So there is one barrier a step, and always a step's products at work.
//
// Limit: 2 * N * K * P * Q * (C / groups) * R * S operations at the tensor cores' rate, or input, filter and output
// once through memory. Prediction, not measured: a step of the widest tile does 2 * 128 * 256 operations for each
// number of the 128 + 256 rows that it fetches, 85 a byte, so an L2 cache of 5.5 TB/s, an estimate for the H200, holds
// it to 470 TFLOP/s, that of 128 channels to 350 and of 64 to 230. Shared memory is read at 80, 96 and 128 bytes a
// clock, which has 128.
#include "activation_packs.cuh"
#include "conv2d.cuh"
#include "packs.cuh"
#include "ptx.cuh"
#include "ptx_warpgroup.cuh"

constexpr int CHUNK = 16 / sizeof(scalar_t);  // numbers
constexpr int CHUNKS = 8;                     // of a step
constexpr int LINE = 16 * CHUNKS;             // bytes of a row of a stage
constexpr int POSITIONS = 128;
constexpr int THREADS = 256;
constexpr int AHEAD = 2;  // steps that are fetched before they are multiplied

constexpr int NOWHERE = -(1 << 30);  // outside at every tap

template <int COUNT>
__device__ __forceinline__ void multiply(float (&sums)[COUNT], unsigned long long left, unsigned long long right) {
#if defined(SCALAR_FLOAT16)
    multiply_warpgroup_half(sums, left, right);
#else
    multiply_warpgroup_bfloat16(sums, left, right);
#endif
}

template <int OUTPUTS, int STAGES>
__device__ __forceinline__ void convolve(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    Terms terms, scalar_t *output, Strides output_strides, Channels channels, Axis vertical, Axis horizontal,
    int transposed, Epilogue epilogue, int vectors, int unit, unsigned char *stages
) {
    constexpr int STAGE = (POSITIONS + OUTPUTS) * LINE;
    constexpr int ROWS = THREADS / CHUNKS;  // of a stage that the threads fill at once
    constexpr int SOURCE_LOADS = POSITIONS / ROWS, FILTER_LOADS = OUTPUTS / ROWS;
    constexpr int PITCH = OUTPUTS + 8;  // numbers a row of sums: pairs of four rows meet different banks
    static_assert(STAGES > AHEAD + 1, "a stage is filled while the steps before and behind it are multiplied");
    static_assert(POSITIONS * PITCH * 4 <= STAGES * STAGE, "the sums go where the stages were");

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
    const int line = threadIdx.x / CHUNKS;
    input += (long long)group * channels.source;
    filter += group * filter_strides.group;

    // The rows that this thread fills: of positions where they begin, of channels whether there is one.
    long long sources[SOURCE_LOADS];
    int rows[SOURCE_LOADS], columns[SOURCE_LOADS];
#pragma unroll
    for (int i = 0; i < SOURCE_LOADS; ++i) {
        const long long position = first_position + line + i * ROWS;
        sources[i] = 0;
        rows[i] = columns[i] = NOWHERE;
        if (position < positions) {
            const long long image = position / plane;
            const int place = (int)(position - image * plane);
            rows[i] = down.start + place / width * down.advance;
            columns[i] = across.start + place % width * across.advance;
            sources[i] = image * input_strides.n;
        }
    }
    // A row's chunks are exchanged by its number, and those of this thread differ by multiples of eight.
    const int place_in_row = ((threadIdx.x % CHUNKS) ^ (line % 8)) * 16;

    // The chunk that this thread fetches next, of every row: the same channels of the same tap.
    const int chunks = channels.source / CHUNK;
    const int steps = (int)(((long long)chunks * down.taps * across.taps + CHUNKS - 1) / CHUNKS);
    int chunk = threadIdx.x % CHUNKS, tap_down = 0, tap_across = 0;

    auto fetch = [&](int step) {
        unsigned char *row_of_stage = stages + step % STAGES * STAGE + line * LINE + place_in_row;
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
            const long long from = sources[i] + row * input_strides.h + column * input_strides.w + chunk * CHUNK;
            copy_async<16>(row_of_stage + i * ROWS * LINE, input + (there ? from : 0), there ? 16 : 0);
        }
        const long long weights = (down.first + tap_down * down.tap_step) * filter_strides.r +
                                  (across.first + tap_across * across.tap_step) * filter_strides.s + chunk * CHUNK;
#pragma unroll
        for (int i = 0; i < FILTER_LOADS; ++i) {
            const int channel = first_channel + line + i * ROWS;
            const bool there = tap && channel < channels.output;
            copy_async<16>(
                row_of_stage + (POSITIONS + i * ROWS) * LINE,
                filter + (there ? weights + channel * filter_strides.output : 0), there ? 16 : 0
            );
        }
        chunk += CHUNKS;
    };

    float sums[OUTPUTS / 2];
#pragma unroll
    for (int i = 0; i < OUTPUTS / 2; ++i) sums[i] = 0.0f;
    const int warpgroup = threadIdx.x / 128;

    __syncthreads();  // the unit before may still be reading
#pragma unroll
    for (int step = 0; step < AHEAD; ++step) {
        if (step < steps) fetch(step);
        copy_async_commit();  // an empty group too, so that the number that may be left stays the same
    }
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<AHEAD - 1>();
        show_to_products();
        __syncthreads();  // this step has arrived for all, and the step before the last has been read by all
        const unsigned char *stage = stages + step % STAGES * STAGE;
        begin_products();
#pragma unroll
        for (int depth = 0; depth < CHUNKS * CHUNK; depth += 16) {
            multiply(
                sums, factor_at(stage + warpgroup * 64 * LINE, depth), factor_at(stage + POSITIONS * LINE, depth)
            );
        }
        commit_products();
        if (step + AHEAD < steps) fetch(step + AHEAD);
        copy_async_commit();
        wait_for_products<1>();
    }
    wait_for_products<0>();
    copy_async_wait_all();
    __syncthreads();  // all stages have been read: the sums go there, and leave in an order of their own

    float *shared_sums = reinterpret_cast<float *>(stages);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < OUTPUTS / 2; i += 2) {
        const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
        *reinterpret_cast<float2 *>(shared_sums + row * PITCH + column) = make_float2(sums[i], sums[i + 1]);
    }
    __syncthreads();

    const bool by_channel = output_strides.c < output_strides.w;
    const int left_channels = min(OUTPUTS, channels.output - first_channel);
    const int channel_of_output = group * channels.output + first_channel;
    auto pixel_of = [&](int row) -> long long {
        const long long position = first_position + row;
        if (position >= positions) return -1;
        const long long image = position / plane;
        const int place = (int)(position - image * plane);
        return image * output_strides.n + (first_row + (long long)(place / width) * down.phases) * output_strides.h +
               (first_column + (long long)(place % width) * across.phases) * output_strides.w;
    };
    if (vectors) {
        // A thread keeps its channels, whose terms it loads once, and goes from row to row.
        const int channel = threadIdx.x % (OUTPUTS / CHUNK) * CHUNK;
        if (channel >= left_channels) return;
        ChannelTerms of[CHUNK];
#pragma unroll
        for (int k = 0; k < CHUNK; ++k) of[k] = terms_of(terms, channel_of_output + channel + k);
#pragma unroll 1
        for (int row = threadIdx.x / (OUTPUTS / CHUNK); row < POSITIONS; row += THREADS / (OUTPUTS / CHUNK)) {
            const long long pixel = pixel_of(row);
            if (pixel < 0) break;
            const long long place = pixel + channel_of_output + channel;
            accumulate_t numbers[CHUNK];
#pragma unroll
            for (int k = 0; k < CHUNK; ++k) numbers[k] = scaled(shared_sums[row * PITCH + channel + k], of[k]);
            Pack<scalar_t, CHUNK> pack;
            if (terms.residual != nullptr) {
                pack = load_pack<CHUNK>(terms.residual + place);
#pragma unroll
                for (int k = 0; k < CHUNK; ++k) numbers[k] += load(pack.number[k]);
            }
            activate_all(epilogue.function, numbers, epilogue.negative_slope);
#pragma unroll
            for (int k = 0; k < CHUNK; ++k) pack.number[k] = store(numbers[k]);
            store_pack(output + place, pack);
        }
    } else {
#pragma unroll 1
        for (int element = threadIdx.x; element < POSITIONS * OUTPUTS; element += THREADS) {
            const int row = by_channel ? element / OUTPUTS : element % POSITIONS;
            const int channel = by_channel ? element % OUTPUTS : element / POSITIONS;
            const long long pixel = pixel_of(row);
            if (channel < left_channels && pixel >= 0) {
                const long long place = pixel + (channel_of_output + channel) * output_strides.c;
                output[place] = finished(
                    shared_sums[row * PITCH + channel], terms, channel_of_output + channel, place, epilogue
                );
            }
        }
    }
}

// Grid: x the positions' tiles, y the channels', z the units (as many as there may be blocks; then the next
// ones). Strides are in elements; input_strides.c and filter_strides.source are 1 and not looked at, and what
// is read begins at multiples of 16 bytes. With ``vectors`` that holds for the output too, and so do its
// channels, and for the residual.
extern "C" __global__ void __launch_bounds__(256, 1) conv2d_wgmma_wide(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int vectors, int units
) {
    extern __shared__ __align__(1024) unsigned char stages[];
    for (int unit = blockIdx.z; unit < units; unit += gridDim.z) {
        convolve<256, 4>(
            input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
            channels, vertical, horizontal, transposed, epilogue, vectors, unit, stages
        );
    }
}

extern "C" __global__ void __launch_bounds__(256, 1) conv2d_wgmma_medium(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int vectors, int units
) {
    extern __shared__ __align__(1024) unsigned char stages[];
    for (int unit = blockIdx.z; unit < units; unit += gridDim.z) {
        convolve<128, 4>(
            input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
            channels, vertical, horizontal, transposed, epilogue, vectors, unit, stages
        );
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) conv2d_wgmma_narrow(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int vectors, int units
) {
    extern __shared__ __align__(1024) unsigned char stages[];
    for (int unit = blockIdx.z; unit < units; unit += gridDim.z) {
        convolve<64, 4>(
            input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
            channels, vertical, horizontal, transposed, epilogue, vectors, unit, stages
        );
    }
}
