// The gradient of a depthwise convolution's weight (one input and one output channel a group) for the usual filters,
// 3 x 3 and 5 x 5 at stride 1 and 2: a channel has only 9 or 25 sums, over all positions of the batch.
//
// Limit: memory. 3 x 3 is 18 operations for 4 bytes of x and 4 of dy (float32). A memory of 4.3 TB/s leaves an H200's
// schedulers 62 instructions for each position in float32 and 31 in 16 bits, and needs some 25 KB on their way to each
// of its multiprocessors.
//
// So a thread keeps all sums of its channels in registers and goes down the image: it reads a row of x and of dy once,
// each in packs where they lie so, and the rows of its windows stay in registers; the next rows are on their way while
// these are multiplied. Counted in the code for sm_90, 3 x 3 at stride 1 (stride 2), a position of dy takes so many
// instructions of the loop, 9 of them multiply-adds, and a multiprocessor's threads (as many as registers leave room
// for) have so many KB on their way:
//
//   form              float32               bfloat16
//   columns, packed   21 (31), 40 KB (50)   20 (33), 30 KB (25)
//   channels, packed  26 (42), 32 KB (40)   26 (43), 24 KB (20)
//   neither           36 (61), 24 KB (30)   45 (77), 15 KB (15)
//
// With what a run of 28 rows begins with (some 2) and the sum over a block's threads (less than 1) memory limits all
// but the last at stride 2. Counted and computed, not measured.
//
// Every part of the units is a block's, whose sums are a row of a workspace; filter_gradient_finish of
// conv2d_filter_gradient.cu adds the rows up. Nothing depends on the order of blocks or threads.
#include "depthwise_window.cuh"

struct DepthwiseFilter {
    Strides x, dy;                 // in elements
    int channels, H, W, P, Q, top, left;
    int strips, runs, run;         // strips as wide as a form has columns, runs of ``run`` rows
    int units, part;               // of a channel, N * runs * strips, and what a block takes of them
};

constexpr int THREADS = 128, AT_ONCE = 9;

// Adds up what the lines of the block have, in a fixed order; line 0 has the sums then.
template <int COUNT>
__device__ __forceinline__ void add_lines(accumulate_t (&sums)[COUNT]) {
    __shared__ accumulate_t lines[AT_ONCE][THREADS];
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
    for (int first = 0; first < COUNT; first += AT_ONCE) {
        __syncthreads();  // line 0 has read what the sums before left
#pragma unroll
        for (int k = first; k < first + AT_ONCE && k < COUNT; ++k) lines[k - first][thread] = sums[k];
        for (int left = blockDim.y; left > 1;) {
            const int half = (left + 1) / 2;
            __syncthreads();
            if (threadIdx.y < left / 2) {
#pragma unroll
                for (int k = 0; k < AT_ONCE; ++k) {
                    if (first + k < COUNT) lines[k][thread] += lines[k][thread + half * blockDim.x];
                }
            }
            left = half;
        }
#pragma unroll
        for (int k = first; k < first + AT_ONCE && k < COUNT; ++k) sums[k] = lines[k - first][thread];
    }
}

// A unit is a run of rows of a strip of columns of an image; a thread takes one after the other. Of each row of dy it
// has its outputs, of x the rows of their windows; the next BATCH rows are on their way while these are multiplied.
// What there is none of in dy is not multiplied: its product with an infinite x would be NaN.
template <typename F, int BATCH>
__device__ __forceinline__ void filter_gradient(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, const DepthwiseFilter &gradient
) {
    constexpr int NEW = BATCH * F::STRIDE, CHANNELS = F::CHANNELS, TAPS = F::KERNEL * F::KERNEL;
    const int channel = (int)(blockIdx.x * blockDim.x + threadIdx.x) * CHANNELS;
    const int first = blockIdx.y * gradient.part, last = min(first + gradient.part, gradient.units);
    accumulate_t sums[CHANNELS * TAPS];
#pragma unroll
    for (int k = 0; k < CHANNELS * TAPS; ++k) sums[k] = NUMBER(0);
    const bool there = channel < gradient.channels;

#pragma unroll 1
    for (int unit = there ? first + threadIdx.y : last; unit < last; unit += blockDim.y) {
        const int column = unit / gradient.strips, image = column / gradient.runs;
        const int q = (unit - column * gradient.strips) * F::COLUMNS;
        const int p = (column - image * gradient.runs) * gradient.run;
        Rows<F> source(
            x + image * gradient.x.n + channel * gradient.x.c, gradient.x.h, gradient.x.w,
            p * F::STRIDE - gradient.top, q * F::STRIDE - gradient.left, gradient.H, gradient.W
        );
        const scalar_t *slope =
            dy + image * gradient.dy.n + channel * gradient.dy.c + p * gradient.dy.h + q * gradient.dy.w;
        bool here[F::COLUMNS];
#pragma unroll
        for (int i = 0; i < F::COLUMNS; ++i) here[i] = F::PACKED || i == 0 || q + i < gradient.Q;

        accumulate_t window[F::KEPT + NEW][F::SPAN];
        typename Rows<F>::Raw next[NEW];
        Outputs<F> next_slopes[BATCH];
#pragma unroll
        for (int row = 0; row < F::KEPT; ++row) {
            source.read(next[0]);
            Rows<F>::spread(next[0], window[row]);
        }
        auto read = [&](int rows) {
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                next_slopes[i].read(i < rows, here, slope, gradient.dy.w);
                slope += gradient.dy.h;
            }
#pragma unroll
            for (int row = 0; row < NEW; ++row) source.read(next[row]);
        };
        int rows = min(gradient.run, gradient.P - p);
        read(rows);
#pragma unroll 1
        for (; rows > 0; rows -= BATCH) {
            accumulate_t slopes[BATCH][F::OUTPUTS];
#pragma unroll
            for (int row = 0; row < NEW; ++row) Rows<F>::spread(next[row], window[F::KEPT + row]);
#pragma unroll
            for (int i = 0; i < BATCH; ++i) next_slopes[i].spread(slopes[i]);
            if (rows > BATCH) read(rows - BATCH);
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (i >= rows) break;
#pragma unroll
                for (int k = 0; k < F::COLUMNS; ++k) {
                    if (!here[k]) break;
#pragma unroll
                    for (int tap = 0; tap < TAPS; ++tap) {
                        const int across = k * F::STRIDE + tap % F::KERNEL;
#pragma unroll
                        for (int c = 0; c < CHANNELS; ++c) {
                            sums[tap * CHANNELS + c] +=
                                slopes[i][k * CHANNELS + c] *
                                window[i * F::STRIDE + tap / F::KERNEL][across * CHANNELS + c];
                        }
                    }
                }
            }
#pragma unroll
            for (int row = 0; row < F::KEPT; ++row) {
#pragma unroll
                for (int k = 0; k < F::SPAN; ++k) window[row][k] = window[NEW + row][k];
            }
        }
    }
    add_lines(sums);
    if (threadIdx.y > 0 || !there) return;
    accumulate_t *to = partial + ((long long)blockIdx.y * gradient.channels + channel) * TAPS;
#pragma unroll
    for (int k = 0; k < CHANNELS; ++k) {
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) to[k * TAPS + tap] = sums[tap * CHANNELS + k];
    }
}

// Rows on their way: as many as registers leave room for, more of numbers that take less.
constexpr int ROWS_AHEAD = sizeof(scalar_t) == 2 ? 3 : sizeof(scalar_t) == 4 ? 2 : 1;

// Columns side by side in memory.
extern "C" __global__ void __launch_bounds__(128, 1) filter_gradient_depthwise_3x3_stride_1_columns(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, DepthwiseFilter gradient
) {
    filter_gradient<Form<3, 1, PACKED_COLUMNS, 1, true>, ROWS_AHEAD>(x, dy, partial, gradient);
}

extern "C" __global__ void __launch_bounds__(128, 1) filter_gradient_depthwise_3x3_stride_2_columns(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, DepthwiseFilter gradient
) {
    filter_gradient<Form<3, 2, PACKED_COLUMNS, 1, true>, 1>(x, dy, partial, gradient);
}

extern "C" __global__ void __launch_bounds__(128, 1) filter_gradient_depthwise_5x5_stride_1_columns(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, DepthwiseFilter gradient
) {
    filter_gradient<Form<5, 1, PACKED_COLUMNS, 1, true>, 1>(x, dy, partial, gradient);
}

extern "C" __global__ void __launch_bounds__(128, 1) filter_gradient_depthwise_5x5_stride_2_columns(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, DepthwiseFilter gradient
) {
    filter_gradient<Form<5, 2, PACKED_COLUMNS, 1, true>, 1>(x, dy, partial, gradient);
}

// Channels side by side in memory, in pairs.
extern "C" __global__ void __launch_bounds__(128, 1) filter_gradient_depthwise_3x3_stride_1_channels(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, DepthwiseFilter gradient
) {
    filter_gradient<Form<3, 1, 2, 2, false>, ROWS_AHEAD>(x, dy, partial, gradient);
}

extern "C" __global__ void __launch_bounds__(128, 1) filter_gradient_depthwise_3x3_stride_2_channels(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, DepthwiseFilter gradient
) {
    filter_gradient<Form<3, 2, 2, 2, false>, 1>(x, dy, partial, gradient);
}

// Images of any strides.
extern "C" __global__ void __launch_bounds__(128, 1) filter_gradient_depthwise_3x3_stride_1(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, DepthwiseFilter gradient
) {
    filter_gradient<Form<3, 1, 2, 1, false>, ROWS_AHEAD>(x, dy, partial, gradient);
}

extern "C" __global__ void __launch_bounds__(128, 1) filter_gradient_depthwise_3x3_stride_2(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, DepthwiseFilter gradient
) {
    filter_gradient<Form<3, 2, 2, 1, false>, 1>(x, dy, partial, gradient);
}

extern "C" __global__ void __launch_bounds__(128, 1) filter_gradient_depthwise_5x5_stride_1(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, DepthwiseFilter gradient
) {
    filter_gradient<Form<5, 1, 4, 1, false>, 1>(x, dy, partial, gradient);
}

extern "C" __global__ void __launch_bounds__(128, 1) filter_gradient_depthwise_5x5_stride_2(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, DepthwiseFilter gradient
) {
    filter_gradient<Form<5, 2, 2, 1, false>, 1>(x, dy, partial, gradient);
}
