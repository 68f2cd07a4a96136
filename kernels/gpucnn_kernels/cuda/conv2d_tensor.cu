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
// A warp makes 64 positions x 64 channels (32 of three products), a block 4 x 2 (wide), 2 x 2 (large) or 4 x 1
// (medium) such tiles; small makes 64 x 32 by four warps. cp.async fills a ring of four stages in shared memory,
// three steps ahead, with zeros where a window leaves the image; so there is one barrier a step. Rows of a stage
// are 64 bytes, their chunks exchanged by the row's number, which lets eight rows of one chunk, as ldmatrix reads
// them, and two whole rows, as cp.async writes them, each fall into all 32 banks. Whether a row's window has a tap
// is looked at when a thread comes to the tap and kept as a bit a row; until then a step moves two offsets on,
// which are 64 bits wide, as images may be larger than 2^31 bytes. The sums go back through shared memory, turned
// to the output's layout, and leave in pieces of 16 bytes with the epilogue on the way, or one by one.
//
// Limit: 2 * N * K * P * Q * (C / groups) * R * S operations at the tensor cores' rate, or input, filter and
// output once through memory. What follows is counted in the code compiled for sm_90, not measured.
//
//   Instructions of a step, by the warp, for 64 products of 16 x 8 (96 of three products): wide 132, large 140,
//   medium 148 in 16 bits; 196, 204 and 212 in tf32, where each number is rounded; 394, 398 and 410 of three
//   products; small 54, 78 and 166 for 8 (24). A new tap takes 45 to 65 more. mma.sync is known to reach 63 % of
//   the datasheet's rate, 6.3 clocks a product for each of the four schedulers, which issue one instruction a
//   clock: but for the small tile, two to five instructions a product are not what limits.
//
//   Shared memory: a step of a large block's four warps reads 16 KiB for each two chunks, and 8 KiB are written,
//   at 128 bytes a clock: 67 % of the peak at most (wide 73, medium 62, small 22).
//
//   L2: a step does 85 (wide), 64 (large), 51 (medium) and 21 (small) operations in 16 bits for each byte that it
//   fetches, half of that in tf32; with 5.5 TB/s, an estimate for the H200, 470, 350, 280 and 120 TFLOP/s. Three
//   products do the fetching of one: 105 TFLOP/s by mma.sync are less than any tile but the small one fetches for.
//
// Registers, wide, large, medium and small: 236, 236, 240 and 82 in 16 bits, 216, 220, 232 and 82 in tf32, 224,
// 226, 240 and 110 of three products; shared memory 98, 65, 82 and 25 KiB; of 64 warps 8, 8, 8 and 20 (16 of three
// products) are resident. Wide and medium blocks fit every GPU from sm_80 on. Others: docs/kernels.md.
#include "conv2d_tensor.cuh"
#include "conv2d_tensor_output.cuh"

constexpr int LINE = 64;  // bytes of a row of a stage: four chunks

// Channels of a warp's tile: the parts of split numbers take the registers that more would.
constexpr int WARP_OUTPUTS = PRODUCTS == 3 ? 32 : 64;

// Halves of a step that the compiler may mix: of three products one, as it runs out of registers otherwise.
constexpr int HALVES = PRODUCTS == 3 ? 1 : 2;

constexpr int NOWHERE = -(1 << 30);  // outside at every tap

// Blocks of small tiles that a multiprocessor's registers are to hold: left to itself the compiler goes for more,
// and puts numbers that it needs into memory.
constexpr int SMALL_BLOCKS = PRODUCTS == 3 ? 4 : 5;

__device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * LINE + ((chunk ^ (row >> 1 & 3)) << 4);
}

// Where a position's window begins: its first element, and that one's row and column, inside of the image or not.
struct Window { long long source; int row, column; };

// A position of the output, or of a stride phase of it.
struct Pixel { int image, row, column; };

#if PRODUCTS == 3
// The sum of one position and channel without tensor cores. Once it is no number it stays so, which ends the loop.
__device__ __forceinline__ float plain_sum(
    const scalar_t *pixels, Strides strides, const scalar_t *weights, FilterStrides filter_strides, Window window,
    Line down, Line across, int height, int width, int depth
) {
    float sum = 0.0f;
    weights += down.first * filter_strides.r + across.first * filter_strides.s;
#pragma unroll 1
    for (int r = 0; r < down.taps && sum == sum; ++r) {
        if (!inside(window.row + r * down.step, height)) continue;
#pragma unroll 1
        for (int s = 0; s < across.taps && sum == sum; ++s) {
            if (!inside(window.column + s * across.step, width)) continue;
            const scalar_t *pixel = pixels + r * down.step * strides.h + s * across.step * strides.w;
            const scalar_t *weight =
                weights + r * down.tap_step * filter_strides.r + s * across.tap_step * filter_strides.s;
#pragma unroll 1
            for (int c = 0; c < depth && sum == sum; ++c) sum = fmaf(pixel[c], weight[c], sum);
        }
    }
    return sum;
}
#endif

// Bytes from a tap to the next across, and what they differ by where that is the first of the next row.
struct TapStep { long long across, down; };

__device__ __forceinline__ TapStep steps_of(long long down, long long across, int taps) {
    const int item = sizeof(scalar_t);
    return {across * item, (down - taps * across) * item};
}

// A block of WARPS_DOWN x WARPS_ACROSS warps.
template <int WARPS_DOWN, int WARPS_ACROSS, int WARP_POSITIONS, int WARP_CHANNELS>
__device__ __forceinline__ void convolve(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    Terms terms, scalar_t *output, Strides output_strides, Channels channels, Axis vertical, Axis horizontal,
    int transposed, Epilogue epilogue, int vectors, int tiles, unsigned char *stages, long long *places
) {
    constexpr int POSITIONS = WARPS_DOWN * WARP_POSITIONS, OUTPUTS = WARPS_ACROSS * WARP_CHANNELS;
    constexpr int THREADS = WARPS_DOWN * WARPS_ACROSS * 32;
    constexpr int STAGE = (POSITIONS + OUTPUTS) * LINE;
    constexpr int ROWS = THREADS / 4;  // rows of a stage that the threads fill at once
    constexpr int SOURCE_LOADS = POSITIONS / ROWS, FILTER_LOADS = OUTPUTS / ROWS;
    constexpr int DOWN = WARP_POSITIONS / 16, ACROSS = WARP_CHANNELS / 8;
    static_assert(
        Written<POSITIONS, OUTPUTS, THREADS>::NUMBERS * 4 <= STAGES * STAGE, "the sums go where the stages were"
    );

    // The block's channels, positions and unit, a group of a phase. Some phases have fewer positions than blocks
    // were started for.
    const int channel_tiles = (channels.output + OUTPUTS - 1) / OUTPUTS;
    const int first_channel = blockIdx.x % channel_tiles * OUTPUTS;
    const int tile = blockIdx.x / channel_tiles % tiles, unit = blockIdx.x / channel_tiles / tiles;
    const int group = unit % channels.groups, phase = unit / channels.groups;
    const int phases_across = transposed ? min(horizontal.stride, horizontal.output) : 1;
    const int first_row = phase / phases_across, first_column = phase % phases_across;
    const Line down = line_of(vertical, transposed, first_row);
    const Line across = line_of(horizontal, transposed, first_column);
    const int height = (vertical.output - first_row + down.phases - 1) / down.phases;
    const int width = (horizontal.output - first_column + across.phases - 1) / across.phases;
    const long long plane = (long long)height * width;
    const long long first_position = (long long)tile * POSITIONS;
    const long long positions = plane * channels.images;
    if (first_position >= positions) return;

    input += (long long)group * channels.source;
    filter += group * filter_strides.group;

    // Where the window of each of the block's positions begins, and where its results go.
    const auto pixel_of = [&](long long position) {
        const long long image = position / plane, pixel = position - image * plane;
        const int row = (int)(pixel / width);
        return Pixel{(int)image, row, (int)(pixel - (long long)row * width)};
    };
    const auto window_of = [&](Pixel pixel) {
        const int row = down.start + pixel.row * down.advance;
        const int column = across.start + pixel.column * across.advance;
        return Window{
            pixel.image * input_strides.n + row * input_strides.h + column * input_strides.w, row, column
        };
    };
    Window *windows = reinterpret_cast<Window *>(stages);
    for (int local = threadIdx.x; local < POSITIONS; local += THREADS) {
        Window window = {0, NOWHERE, NOWHERE};
        long long place = -1;
        if (first_position + local < positions) {
            const Pixel pixel = pixel_of(first_position + local);
            window = window_of(pixel);
            place = pixel.image * output_strides.n +
                    (first_row + (long long)pixel.row * down.phases) * output_strides.h +
                    (first_column + (long long)pixel.column * across.phases) * output_strides.w;
        }
        windows[local] = window;
        places[local] = place;
    }
    __syncthreads();

    // The rows that this thread fills, one chunk of each a step: all the same channels of the same tap.
    const int line = threadIdx.x / 4;
    const char *pixels[SOURCE_LOADS], *weights[FILTER_LOADS];
    int rows[SOURCE_LOADS], columns[SOURCE_LOADS];
    unsigned outputs = 0;  // bits of the filter's rows that there are
#pragma unroll
    for (int i = 0; i < SOURCE_LOADS; ++i) {
        const Window window = windows[line + i * ROWS];
        pixels[i] = reinterpret_cast<const char *>(input + window.source);
        rows[i] = window.row, columns[i] = window.column;
        keep(pixels[i]);
    }
#pragma unroll
    for (int i = 0; i < FILTER_LOADS; ++i) {
        const int channel = first_channel + line + i * ROWS;
        weights[i] = reinterpret_cast<const char *>(filter + channel * filter_strides.output);
        if (channel < channels.output) outputs |= 1u << (SOURCE_LOADS + i);
        keep(weights[i]);
    }
    keep(outputs);
    __syncthreads();  // the stages are where the windows were

    // The chunk to fetch next, how many bytes from the windows' and the filter's first numbers it lies, and the
    // rows that have it: of which little changes from step to step, and more from tap to tap.
    const int chunks = channels.source / CHUNK;
    const int steps = (int)(((long long)chunks * down.taps * across.taps + 3) / 4);
    const TapStep source_step = steps_of(down.step * input_strides.h, across.step * input_strides.w, across.taps);
    const TapStep filter_step =
        steps_of(down.tap_step * filter_strides.r, across.tap_step * filter_strides.s, across.taps);
    int chunk = threadIdx.x % 4, tap_down = 0, tap_across = 0;
    long long source_at = chunk * 16;
    long long filter_at =
        (down.first * filter_strides.r + across.first * filter_strides.s) * (int)sizeof(scalar_t) + chunk * 16;
    unsigned there = 0;
    const auto reach = [&]() {
#pragma unroll 1
        while (chunk >= chunks) {
            chunk -= chunks;
            source_at += source_step.across - chunks * 16;
            filter_at += filter_step.across - chunks * 16;
            if (++tap_across == across.taps) {
                tap_across = 0;
                ++tap_down;
                source_at += source_step.down;
                filter_at += filter_step.down;
            }
        }
        there = 0;
        if (tap_down >= down.taps) return;  // the last step may reach beyond the last tap
        there = outputs;
        const int down_by = tap_down * down.step, across_by = tap_across * across.step;
#pragma unroll
        for (int i = 0; i < SOURCE_LOADS; ++i) {
            const bool seen = inside(rows[i] + down_by, vertical.source) &&
                              inside(columns[i] + across_by, horizontal.source);
            there |= (unsigned)seen << i;
        }
    };
    SharedPlace fetched = shared_place(stages) + swizzled(line, threadIdx.x % 4);
    keep(fetched);
    const auto fetch = [&](int stage) {
        const SharedPlace to = fetched + stage;
#pragma unroll
        for (int i = 0; i < SOURCE_LOADS; ++i) {
            copy_async_or_zero(to + i * ROWS * LINE, pixels[i] + source_at, there & 1u << i);
        }
#pragma unroll
        for (int i = 0; i < FILTER_LOADS; ++i) {
            copy_async_or_zero(
                to + (POSITIONS + i * ROWS) * LINE, weights[i] + filter_at, there & 1u << (SOURCE_LOADS + i)
            );
        }
        chunk += 4;
        source_at += 4 * 16;
        filter_at += 4 * 16;
        if (chunk >= chunks) reach();
    };

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
    const int warp_output = warp % WARPS_ACROSS * WARP_CHANNELS;
    // The lane's rows of a stage, of the two chunks of either half.
    SharedPlace lefts[2], rights[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        lefts[half] = shared_place(stages) + warp_position * LINE + swizzled(lane % 16, 2 * half + lane / 16);
        rights[half] = shared_place(stages) + (POSITIONS + warp_output) * LINE +
                       swizzled(lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2);
        keep(lefts[half]);
        keep(rights[half]);
    }

    reach();
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) fetch(step * STAGE);
        copy_async_commit();  // an empty group too, so that the number that may be left stays the same
    }
    int reading = 0, writing = (STAGES - 1) * STAGE;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // this step has arrived for all, and the step before has been read by all
        if (step + STAGES - 1 < steps) fetch(writing);
        copy_async_commit();
#pragma unroll(HALVES)
        for (int half = 0; half < 2; ++half) {  // two chunks a product
            Right right[ACROSS];
#pragma unroll
            for (int j = 0; j < ACROSS; j += 2) {
                unsigned words[4];
                load_matrix(words, (half == 0 ? rights[0] : rights[1]) + reading + j * 8 * LINE);
                right[j].word[0] = words[0], right[j].word[1] = words[1];
                right[j + 1].word[0] = words[2], right[j + 1].word[1] = words[3];
            }
            prepare_all(right);
#pragma unroll
            for (int i = 0; i < DOWN; ++i) {
                Left left;
                load_matrix(left.word, (half == 0 ? lefts[0] : lefts[1]) + reading + i * 16 * LINE);
                multiply_row(sums[i], left, right);
            }
        }
        writing = reading;
        reading = reading == (STAGES - 1) * STAGE ? 0 : reading + STAGE;
    }
    copy_async_wait_all();

#if PRODUCTS == 3
    int lost = 0;  // whether a sum is
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) lost |= !finite(sums[i][j][k]);
        }
    }
    lost = __syncthreads_or(lost);
#endif
    const int left_channels = channels.output - first_channel;
    const int channel_of_output = group * channels.output + first_channel;
    const Written<POSITIONS, OUTPUTS, THREADS> written = {
        output, output_strides, terms, epilogue, places, channel_of_output, left_channels
    };
    written.write(sums, warp_position, warp_output, reinterpret_cast<float *>(stages), vectors);
#if PRODUCTS == 3
    if (!lost) return;
    __syncthreads();  // what the others have written is there
#pragma unroll 1
    for (int element = threadIdx.x; element < POSITIONS * OUTPUTS; element += THREADS) {
        const int row = element / OUTPUTS, channel = element % OUTPUTS;
        if (channel >= left_channels || places[row] < 0) continue;
        const long long place = places[row] + (channel_of_output + channel) * output_strides.c;
        const scalar_t made = output[place];
        if (finite(made)) continue;
        const Window window = window_of(pixel_of(first_position + row));
        const float sum = plain_sum(
            input + window.source, input_strides, filter + (first_channel + channel) * filter_strides.output,
            filter_strides, window, down, across, vertical.source, horizontal.source, channels.source
        );
        output[place] = finished(sum, terms, channel_of_output + channel, place, epilogue);
    }
#endif
}

// Grid: the tiles of channels, of positions (``tiles`` a unit), and the units, one within the other: blocks that
// read the same pixels run together. Strides are in elements; input_strides.c and filter_strides.source are 1
// and not looked at, and what is read begins at multiples of 16 bytes. With ``vectors`` so do output and
// residual, and the neighbours in them, channels or one image's positions, are whole chunks.
extern "C" __global__ void __launch_bounds__(256, 1) conv2d_tensor_wide(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int vectors, int tiles
) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ long long places[256];
    convolve<4, 2, 64, WARP_OUTPUTS>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, vectors, tiles, stages, places
    );
}

extern "C" __global__ void __launch_bounds__(128, 2) conv2d_tensor_large(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int vectors, int tiles
) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ long long places[128];
    convolve<2, 2, 64, WARP_OUTPUTS>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, vectors, tiles, stages, places
    );
}

extern "C" __global__ void __launch_bounds__(128, 2) conv2d_tensor_medium(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int vectors, int tiles
) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ long long places[256];
    convolve<4, 1, 64, WARP_OUTPUTS>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, vectors, tiles, stages, places
    );
}

extern "C" __global__ void __launch_bounds__(128, SMALL_BLOCKS) conv2d_tensor_small(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int vectors, int tiles
) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ long long places[64];
    convolve<2, 2, 32, 16>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, vectors, tiles, stages, places
    );
}
