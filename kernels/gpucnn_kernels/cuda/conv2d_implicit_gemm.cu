// Convolution as a matrix product whose second matrix, im2col's, is never made: "implicit GEMM". Forward, and as
// stride phases in one launch the input gradient (conv2d.cuh says how they are the same sum).
//
//   output[channel, position] = sum over (source channel, tap) of filter[channel, (source channel, tap)]
//                                                                * input[(source channel, tap), position]
//
// Positions are the output's pixels of all images. A block makes a tile of channels x positions of one group and
// one phase: 64 x 128 (256 threads, 4 x 8 numbers each in registers) or 32 x 64 (128 threads, 4 x 4). It goes
// through the sum in steps of 8 source channels of one tap: both factors' parts are fetched from memory into
// registers while the step before is multiplied, then put into shared memory, of which there are two stages, so
// that one barrier a step is enough. All taps of 8 channels come before the next 8: taps read almost the same
// pixels, and the same lines of the filter, which by then are in the L1 cache.
//
// Limit: 2 * N * K * P * Q * (C / groups) * R * S operations at the rate of FFMA, or input, filter and output once
// through memory. A step of the large tile takes 2 * 64 * 128 * 8 operations on (64 + 128) * 8 fetched numbers: 85
// operations a number, in float32 21 a byte (32 x 64: 43, 11), so with the caches' help the arithmetic is the
// limit. From shared memory a thread reads 12 numbers for 32 multiply-adds (8 for 16).
// Channels are rounded up to 8 a step and to the tile: see conv2d_direct.cu for few of them.
#include "conv2d.cuh"

constexpr int DEPTH = 8;   // source channels a step
constexpr int ACROSS = 16;  // threads along a tile's positions; each takes 4 neighbours of every 64
constexpr int PART = 32;   // positions that are written at a time
// In float64 the registers are enough for 4 x 4 numbers only.
constexpr int WIDE = sizeof(accumulate_t) == 8 ? 64 : 128;

// A position of the tile: where it lies in the image that is read (row and column of the first tap, and the
// image's first element) and in the one that is written (-1: beyond the last position).
struct Place { long long source, output; int row, column; };

constexpr int NOWHERE = -(1 << 30);  // outside at every tap

// Rows of a tile in shared memory are 4 numbers longer than it is wide: stores of neighbouring channels then fall
// into different banks, and rows still begin at multiples of 16 bytes.
__host__ __device__ constexpr int pitch(int width) { return width + 4; }
__host__ __device__ constexpr int stage_size(int rows, int columns) {
    return DEPTH * (pitch(rows) + pitch(columns));
}

template <int ROWS, int COLUMNS>
__device__ __forceinline__ void convolve(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    Terms terms, scalar_t *output, Strides output_strides, Channels channels, Axis vertical, Axis horizontal,
    int transposed, Epilogue epilogue, int unit, accumulate_t *stages, Place *places
) {
    constexpr int THREADS = ROWS / 4 * ACROSS;
    constexpr int WIDTH = COLUMNS / ACROSS;  // positions a thread
    constexpr int STAGE = stage_size(ROWS, COLUMNS);
    constexpr int FILTER_LOADS = DEPTH * ROWS / THREADS;
    constexpr int SOURCE_LOADS = DEPTH * COLUMNS / THREADS;

    // The unit: a group of a phase. Some phases have fewer positions than blocks were started for.
    const int group = unit % channels.groups, phase = unit / channels.groups;
    const int phases_across = transposed ? min(horizontal.stride, horizontal.output) : 1;
    const int first_row = phase / phases_across, first_column = phase % phases_across;
    const Line down = line_of(vertical, transposed, first_row);
    const Line across = line_of(horizontal, transposed, first_column);
    const int height = (vertical.output - first_row + down.phases - 1) / down.phases;
    const int width = (horizontal.output - first_column + across.phases - 1) / across.phases;
    const long long plane = (long long)height * width;
    const long long first_position = (long long)blockIdx.x * COLUMNS;
    const long long positions = plane * channels.images;
    if (first_position >= positions) return;

    __syncthreads();  // the unit before may still be reading
    for (int column = threadIdx.x; column < COLUMNS; column += THREADS) {
        const long long position = first_position + column;
        Place place = {0, -1, NOWHERE, NOWHERE};
        if (position < positions) {
            const long long image = position / plane;
            const int i = (int)((position - image * plane) / width);
            const int j = (int)((position - image * plane) % width);
            place.source = image * input_strides.n + (long long)group * channels.source * input_strides.c;
            place.output = image * output_strides.n + (first_row + (long long)i * down.phases) * output_strides.h +
                           (first_column + (long long)j * across.phases) * output_strides.w;
            place.row = down.start + i * down.advance;
            place.column = across.start + j * across.advance;
        }
        places[column] = place;
    }
    __syncthreads();

    // Neighbouring threads fetch what lies side by side: channels or positions, whichever has the smaller stride.
    const bool source_by_channel = input_strides.c < input_strides.w;
    const bool filter_by_channel = filter_strides.source < filter_strides.output;
    const bool output_by_channel = output_strides.c < output_strides.w;
    const int first_channel = blockIdx.y * ROWS;
    const int left = threadIdx.x % ACROSS * 4, top = threadIdx.x / ACROSS * 4;
    filter += group * filter_strides.group;

    accumulate_t sums[4][WIDTH];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) sums[i][j] = NUMBER(0);
    }
    accumulate_t from_filter[FILTER_LOADS], from_source[SOURCE_LOADS];
    const int steps = (channels.source + DEPTH - 1) / DEPTH * down.taps * across.taps;
    int chunk = 0, tap_down = 0, tap_across = 0;

    for (int step = 0; step <= steps; ++step) {
        if (step < steps) {
            const scalar_t *weights = filter + (down.first + tap_down * down.tap_step) * filter_strides.r +
                                      (across.first + tap_across * across.tap_step) * filter_strides.s;
#pragma unroll
            for (int i = 0; i < FILTER_LOADS; ++i) {
                const int element = threadIdx.x + i * THREADS;
                const int row = first_channel + (filter_by_channel ? element / DEPTH : element % ROWS);
                const int channel = chunk + (filter_by_channel ? element % DEPTH : element / ROWS);
                from_filter[i] = channel < channels.source && row < channels.output
                                     ? load(weights[row * filter_strides.output + channel * filter_strides.source])
                                     : NUMBER(0);
            }
#pragma unroll
            for (int i = 0; i < SOURCE_LOADS; ++i) {
                const int element = threadIdx.x + i * THREADS;
                const Place place = places[source_by_channel ? element / DEPTH : element % COLUMNS];
                const int channel = chunk + (source_by_channel ? element % DEPTH : element / COLUMNS);
                const int row = place.row + tap_down * down.step;
                const int column = place.column + tap_across * across.step;
                const bool there =
                    channel < channels.source && inside(row, vertical.source) && inside(column, horizontal.source);
                from_source[i] = there ? load(input[place.source + channel * input_strides.c +
                                                     row * input_strides.h + column * input_strides.w])
                                       : NUMBER(0);
            }
            if (++tap_across == across.taps) {
                tap_across = 0;
                if (++tap_down == down.taps) {
                    tap_down = 0;
                    chunk += DEPTH;
                }
            }
        }
        if (step > 0) {
            const accumulate_t *weights = stages + (step - 1) % 2 * STAGE + top;
            const accumulate_t *pixels = stages + (step - 1) % 2 * STAGE + DEPTH * pitch(ROWS) + left;
#pragma unroll
            for (int depth = 0; depth < DEPTH; ++depth) {
                accumulate_t weight[4], pixel[WIDTH];
#pragma unroll
                for (int i = 0; i < 4; ++i) weight[i] = weights[depth * pitch(ROWS) + i];
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) pixel[j] = pixels[depth * pitch(COLUMNS) + j / 4 * 64 + j % 4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int j = 0; j < WIDTH; ++j) sums[i][j] += weight[i] * pixel[j];
                }
            }
        }
        if (step < steps) {
            accumulate_t *weights = stages + step % 2 * STAGE, *pixels = weights + DEPTH * pitch(ROWS);
#pragma unroll
            for (int i = 0; i < FILTER_LOADS; ++i) {
                const int element = threadIdx.x + i * THREADS;
                const int row = filter_by_channel ? element / DEPTH : element % ROWS;
                const int depth = filter_by_channel ? element % DEPTH : element / ROWS;
                weights[depth * pitch(ROWS) + row] = from_filter[i];
            }
#pragma unroll
            for (int i = 0; i < SOURCE_LOADS; ++i) {
                const int element = threadIdx.x + i * THREADS;
                const int column = source_by_channel ? element / DEPTH : element % COLUMNS;
                const int depth = source_by_channel ? element % DEPTH : element / COLUMNS;
                pixels[depth * pitch(COLUMNS) + column] = from_source[i];
            }
        }
        __syncthreads();
    }

    // The sums go through shared memory, 32 positions at a time, so that they too are written side by side.
#pragma unroll
    for (int part = 0; part < COLUMNS / PART; ++part) {
        if (left % 64 / PART == part % 2) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    stages[(top + i) * (PART + 1) + left % PART + j] = sums[i][part / 2 * 4 + j];
                }
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int element = threadIdx.x; element < ROWS * PART; element += THREADS) {
            const int row = output_by_channel ? element % ROWS : element / PART;
            const int column = output_by_channel ? element / ROWS : element % PART;
            const long long pixel = places[part * PART + column].output;
            if (first_channel + row < channels.output && pixel >= 0) {
                const int channel = group * channels.output + first_channel + row;
                const long long place = pixel + channel * output_strides.c;
                output[place] = finished(stages[row * (PART + 1) + column], terms, channel, place, epilogue);
            }
        }
        __syncthreads();
    }
}

// Grid: x the positions' tiles, y the channels', z the units (as many as there may be blocks; then the next ones).
extern "C" __global__ void __launch_bounds__(256, 2) conv2d_implicit_gemm_large(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int units
) {
    __shared__ __align__(16) accumulate_t stages[2 * stage_size(64, WIDE)];
    __shared__ Place places[WIDE];
    for (int unit = blockIdx.z; unit < units; unit += gridDim.z) {
        convolve<64, WIDE>(
            input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
            channels, vertical, horizontal, transposed, epilogue, unit, stages, places
        );
    }
}

extern "C" __global__ void __launch_bounds__(128, 3) conv2d_implicit_gemm_small(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int units
) {
    __shared__ __align__(16) accumulate_t stages[2 * stage_size(32, 64)];
    __shared__ Place places[64];
    for (int unit = blockIdx.z; unit < units; unit += gridDim.z) {
        convolve<32, 64>(
            input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides,
            channels, vertical, horizontal, transposed, epilogue, unit, stages, places
        );
    }
}
