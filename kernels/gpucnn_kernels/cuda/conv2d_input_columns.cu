// The input gradient of a convolution with few input channels a group and small images, by columns that never leave
// shared memory. dx as a convolution of dy (conv2d_direct.cu) multiplies the zeros around dy: for 14 x 14 pixels from
// 10 x 10 positions with 5 x 5 twice as much as there is. Here a block makes the columns of some input channels,
// column[c, r, s][position] = sum over k of weight[k, c, r, s] * dy[k][position], which are a dense product without
// any zeros, and every pixel of dx then adds up those of its columns that meet it, r by r and s by s.
//
// A block has ``images`` images whole and ``channels`` of a group's input channels. dy and the filters come in slices
// of output channels; a thread has 8 columns at 8 positions (float64: 4) in registers, which are then written where
// the slices lay. All sums are in an order of the shape alone.
//
// Limit: arithmetic, 2 * R * S * C operations for each number of dy, where channels are few. By the code compiled for
// sm_90 (counted, not measured) 128 of 149 instructions of the product's loop are multiply-adds. A thread adds up
// four pixels at a time: 23 instructions for each place of the filter, 25 more for each row of it, and 350 beside. A
// line of a slice takes 140 and 9 for each output channel. For LeNet's second layer (6 <- 16 channels, 5 x 5, 14 x 14)
// the product is half of the whole.
#include "conv2d.cuh"

constexpr int QUAD = 4;
constexpr int HIGH = 8;                                        // columns of a thread
constexpr int QUADS = sizeof(accumulate_t) == 8 ? 1 : 2;       // of positions of a thread

struct ColumnPatch {
    int images, channels;    // of a block
    int channel_blocks;      // that share the input channels of a group
    int units_across;        // threads for the positions of HIGH columns
    int pitch, columns;      // numbers of a row of dy and of columns; columns with what fills up their last unit
    int slice;               // output channels at a time
    int P, Q;
    int row_quads;           // that threads make of a row of dx
    unsigned by_stride_h, by_stride_w;  // 2^32 divided by it, rounded up; 0 for 1
};

// Exact where value * divisor < 2^32.
__device__ __forceinline__ int divided(int value, unsigned reciprocal) {
    return reciprocal ? (int)__umulhi((unsigned)value, reciprocal) : value;
}

struct __align__(4 * sizeof(accumulate_t)) Four {
    accumulate_t v[QUAD];
};

// A thread's line of a slice: from output channel to output channel; zeros where there is none.
__device__ __forceinline__ void stage_line(
    accumulate_t *to, int pitch, const scalar_t *from, long long step, int count, bool there
) {
    #pragma unroll 4
    for (int k = 0; k < count; ++k) {
        *to = there ? load(*from) : NUMBER(0);
        to += pitch;
        from += step;
    }
}

// A slice of dy as [output channel][position], and behind it one of the filters as [output channel][column], columns
// by input channel, row and column of the filter. Threads take a position or a column each.
__device__ __forceinline__ void stage(
    accumulate_t *numbers, const scalar_t *dy, Strides strides, const scalar_t *filter, FilterStrides filter_strides,
    int images, int columns, int count, int rows, int width, const ColumnPatch &patch
) {
    for (int number = threadIdx.x; number < patch.pitch + patch.columns; number += blockDim.x) {
        if (number < patch.pitch) {
            const int plane = patch.P * patch.Q, n = number / plane, pixel = number - n * plane, p = pixel / patch.Q;
            const bool there = n < images;
            const scalar_t *from = dy;
            if (there) from += n * strides.n + p * strides.h + (pixel - p * patch.Q) * strides.w;
            stage_line(numbers + number, patch.pitch, from, strides.c, count, there);
        } else {
            const int column = number - patch.pitch, line = column / width, c = line / rows;
            const bool there = column < columns;
            const scalar_t *from = filter;
            if (there) {
                from += c * filter_strides.output + (line - c * rows) * filter_strides.r +
                        (column - line * width) * filter_strides.s;
            }
            accumulate_t *to = numbers + patch.slice * patch.pitch + column;
            stage_line(to, patch.columns, from, filter_strides.source, count, there);
        }
    }
}

// The first place of the filter by which a pixel meets a position, behind the filter where there is none, and that
// position, which may be outside of dy. ``padded`` is the pixel's place with the padding before it.
__device__ __forceinline__ int first_tap(int padded, Axis axis, unsigned by_stride, int tap_step, int *position) {
    padded += axis.dilation * axis.stride;  // so that it stays positive
    int tap = 0, place = divided(padded, by_stride);
    while (place * axis.stride != padded) {
        if (++tap == tap_step) return axis.kernel;
        padded -= axis.dilation;
        place = divided(padded, by_stride);
    }
    *position = place - axis.dilation;
    return tap;
}

extern "C" __global__ void __launch_bounds__(256, 2) conv2d_input_columns(
    const scalar_t *dy, Strides dy_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output, Strides output_strides,
    Channels channels, Axis vertical, Axis horizontal, Epilogue epilogue, ColumnPatch patch
) {
    extern __shared__ __align__(16) accumulate_t numbers[];
    unsigned block = blockIdx.x;
    const int first_channel = block % patch.channel_blocks * patch.channels;
    block /= patch.channel_blocks;
    const int group = block % channels.groups;
    const int first_image = block / channels.groups * patch.images;
    const int images = min(patch.images, channels.images - first_image);
    const int made = min(patch.channels, channels.output - first_channel);
    const int places = vertical.kernel * horizontal.kernel;

    dy += first_image * dy_strides.n + (long long)group * channels.source * dy_strides.c;
    filter += group * filter_strides.group + first_channel * filter_strides.output;

    const int unit = threadIdx.x / patch.units_across, across = threadIdx.x - unit * patch.units_across;
    const bool busy = unit * HIGH < patch.columns;
    accumulate_t *filters = numbers + patch.slice * patch.pitch;
    accumulate_t sums[HIGH][QUADS][QUAD];
    #pragma unroll
    for (int i = 0; i < HIGH; ++i) {
        #pragma unroll
        for (int q = 0; q < QUADS; ++q) {
            #pragma unroll
            for (int j = 0; j < QUAD; ++j) sums[i][q][j] = NUMBER(0);
        }
    }
    for (int first = 0; first < channels.source; first += patch.slice) {
        const int count = min(patch.slice, channels.source - first);
        __syncthreads();  // the slice before has been read
        stage(
            numbers, dy + first * dy_strides.c, dy_strides, filter + first * filter_strides.source, filter_strides,
            images, made * places, count, vertical.kernel, horizontal.kernel, patch
        );
        __syncthreads();
        if (!busy) continue;
        const accumulate_t *left = filters + unit * HIGH, *right = numbers + across * QUAD;
        #pragma unroll 2
        for (int k = 0; k < count; ++k) {
            Four weights[HIGH / QUAD], slopes[QUADS];
            #pragma unroll
            for (int i = 0; i < HIGH / QUAD; ++i) weights[i] = reinterpret_cast<const Four *>(left)[i];
            #pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                slopes[q] = *reinterpret_cast<const Four *>(right + q * patch.units_across * QUAD);
            }
            #pragma unroll
            for (int i = 0; i < HIGH; ++i) {
                #pragma unroll
                for (int q = 0; q < QUADS; ++q) {
                    #pragma unroll
                    for (int j = 0; j < QUAD; ++j) sums[i][q][j] += weights[i / QUAD].v[i % QUAD] * slopes[q].v[j];
                }
            }
            left += patch.columns;
            right += patch.pitch;
        }
    }
    __syncthreads();
    if (busy) {
        #pragma unroll
        for (int i = 0; i < HIGH; ++i) {
            #pragma unroll
            for (int q = 0; q < QUADS; ++q) {
                Four four;
                #pragma unroll
                for (int j = 0; j < QUAD; ++j) four.v[j] = sums[i][q][j];
                accumulate_t *to = numbers + (unit * HIGH + i) * patch.pitch;
                *reinterpret_cast<Four *>(to + (q * patch.units_across + across) * QUAD) = four;
            }
        }
    }
    __syncthreads();

    const int down_step = vertical.stride / vertical.common, across_step = horizontal.stride / horizontal.common;
    const int down_back = vertical.dilation / vertical.common, across_back = horizontal.dilation / horizontal.common;
    const int next_tap = across_step * patch.pitch, plane = patch.P * patch.Q;
    // A thread makes four pixels of a row that are a stride apart: they meet neighbouring positions by the same taps.
    const int quads = images * made * vertical.output * patch.row_quads;
    for (int number = threadIdx.x; number < quads; number += blockDim.x) {
        const int line = number / patch.row_quads, quad = number - line * patch.row_quads;
        const int image = line / vertical.output, h = line - image * vertical.output;
        const int n = image / made, c = image - n * made;
        const int turn = divided(quad, patch.by_stride_w);
        const int w = quad - turn * horizontal.stride + turn * QUAD * horizontal.stride;
        if (w >= horizontal.output) continue;
        int p = 0, q = 0;
        int r = first_tap(h + vertical.pad, vertical, patch.by_stride_h, down_step, &p);
        const int s = first_tap(w + horizontal.pad, horizontal, patch.by_stride_w, across_step, &q);
        while (p >= vertical.source) {
            p -= down_back;
            r += down_step;
        }
        accumulate_t four[QUAD];
        #pragma unroll
        for (int j = 0; j < QUAD; ++j) four[j] = NUMBER(0);
        for (; r < vertical.kernel && p >= 0; r += down_step, p -= down_back) {
            const int column = c * places + r * horizontal.kernel + s;
            const accumulate_t *row = numbers + column * patch.pitch + n * plane + p * patch.Q;
            int place = q;
            for (int tap = s; tap < horizontal.kernel; tap += across_step) {
                #pragma unroll
                for (int j = 0; j < QUAD; ++j) {
                    if (inside(place + j, horizontal.source)) four[j] += row[place + j];
                }
                row += next_tap;
                place -= across_back;
            }
        }
        const int channel = group * channels.output + first_channel + c;
        long long at = (first_image + n) * output_strides.n + channel * output_strides.c + h * output_strides.h +
                       w * output_strides.w;
        #pragma unroll 1
        for (int j = 0; j < QUAD && w + j * horizontal.stride < horizontal.output; ++j) {
            output[at] = finished(four[0], {scale, bias, residual}, channel, at, epilogue);
            at += horizontal.stride * output_strides.w;
            #pragma unroll
            for (int next = 1; next < QUAD; ++next) four[next - 1] = four[next];
        }
    }
}
