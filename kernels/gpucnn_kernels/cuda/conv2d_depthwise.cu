// Depthwise convolution (C / groups = 1; K is a multiple of C), forward and input gradient: no sum over channels,
// so nothing that a matrix product could share.
//
// Limit: memory. 3 x 3 is 18 operations for 4 bytes read and 4 written (float32): 2 a byte, where a GPU has 10 and
// more. What is left to do is to issue few instructions: a memory of 4.3 TB/s leaves an H200's schedulers 60 for each
// number of float32, 30 for one of 16 bits.
//
// So for the usual filters (3 x 3 and 5 x 5, stride 1 and 2, as many outputs as inputs) a thread makes a run of
// numbers below each other, with its filter and the rows of its window in registers: each row is read once for all
// outputs that see it, the rows of the next four (5 x 5: two) outputs while these are made. The input gradient at
// stride 1 is the same with the filter turned round. Neighbouring threads have neighbouring columns, or in a
// channels-last image neighbouring channels. Counted in the code for sm_90, 3 x 3 at stride 1 takes some 56
// instructions an output (9 of them multiply-adds), and with what a run of 28 begins with 67: in float32 about what
// the memory leaves, in 16 bits twice that.
//
// Any other problem has one thread a number, which reads its window tap by tap, from the L1 cache mostly.
#include "activation_packs.cuh"
#include "conv2d.cuh"

// Grid: x the columns and channels, y runs of ``run`` rows, z the images.
template <int KERNEL, int STRIDE>
__device__ __forceinline__ void slide(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides, Terms terms,
    scalar_t *output, Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed,
    Epilogue epilogue, int run
) {
    constexpr int BATCH = KERNEL == 3 ? 4 : 2;  // outputs below each other that are made at a time
    constexpr int NEW = BATCH * STRIDE, KEPT = KERNEL - STRIDE;  // rows of a window
    const unsigned place = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned columns = horizontal.output, all_channels = channels.groups;
    if (place >= columns * all_channels) return;
    const bool by_channel = output_strides.c < output_strides.w;
    const int channel = (int)(by_channel ? place % all_channels : place / columns);
    const int q = (int)(by_channel ? place / all_channels : place % columns);
    const int first = blockIdx.y * run, rows = min(run, vertical.output - first);

    accumulate_t weights[KERNEL][KERNEL];
    filter += channel * filter_strides.group;
#pragma unroll
    for (int r = 0; r < KERNEL; ++r) {
#pragma unroll
        for (int s = 0; s < KERNEL; ++s) {
            const int row = transposed ? KERNEL - 1 - r : r, column = transposed ? KERNEL - 1 - s : s;
            weights[r][s] = load(filter[row * filter_strides.r + column * filter_strides.s]);
        }
    }
    const ChannelTerms of = terms_of(terms, channel);
    const int top = first * STRIDE - (transposed ? KERNEL - 1 - vertical.pad : vertical.pad);
    const int left = q * STRIDE - (transposed ? KERNEL - 1 - horizontal.pad : horizontal.pad);
    bool seen[KERNEL];
#pragma unroll
    for (int s = 0; s < KERNEL; ++s) seen[s] = inside(left + s, horizontal.source);

#pragma unroll 1
    for (int image = blockIdx.z; image < channels.images; image += gridDim.z) {
        const scalar_t *from = input + image * input_strides.n + channel * input_strides.c +
                               top * input_strides.h + left * input_strides.w;
        int row = top;
        // The next row of the source.
        auto read = [&](accumulate_t(&to)[KERNEL]) {
            const bool there = inside(row, vertical.source);
#pragma unroll
            for (int s = 0; s < KERNEL; ++s) {
                to[s] = there && seen[s] ? load(from[s * input_strides.w]) : NUMBER(0);
            }
            from += input_strides.h;
            ++row;
        };
        accumulate_t window[KEPT + NEW][KERNEL], next[NEW][KERNEL];
#pragma unroll
        for (int number = 0; number < KEPT; ++number) read(window[number]);
#pragma unroll
        for (int number = 0; number < NEW; ++number) read(next[number]);
        long long to = image * output_strides.n + channel * output_strides.c + first * output_strides.h +
                       q * output_strides.w;
#pragma unroll 1
        for (int p = 0; p < rows; p += BATCH) {
#pragma unroll
            for (int number = 0; number < NEW; ++number) {
#pragma unroll
                for (int s = 0; s < KERNEL; ++s) window[KEPT + number][s] = next[number][s];
            }
            if (p + BATCH < rows) {
#pragma unroll
                for (int number = 0; number < NEW; ++number) read(next[number]);
            }
            accumulate_t sums[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                sums[i] = NUMBER(0);
#pragma unroll
                for (int r = 0; r < KERNEL; ++r) {
#pragma unroll
                    for (int s = 0; s < KERNEL; ++s) sums[i] += window[i * STRIDE + r][s] * weights[r][s];
                }
                sums[i] = scaled(sums[i], of);
                if (terms.residual != nullptr && p + i < rows) {
                    sums[i] += load(terms.residual[to + i * output_strides.h]);
                }
            }
            if (epilogue.function != IDENTITY) activate_all(epilogue.function, sums, epilogue.negative_slope);
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (p + i < rows) output[to] = store(sums[i]);
                to += output_strides.h;
            }
#pragma unroll
            for (int number = 0; number < KEPT; ++number) {
#pragma unroll
                for (int s = 0; s < KERNEL; ++s) window[number][s] = window[NEW + number][s];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256, 1) conv2d_depthwise_3x3_stride_1(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<3, 1>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

extern "C" __global__ void __launch_bounds__(256, 1) conv2d_depthwise_3x3_stride_2(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<3, 2>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

extern "C" __global__ void __launch_bounds__(256, 1) conv2d_depthwise_5x5_stride_1(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<5, 1>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

extern "C" __global__ void __launch_bounds__(256, 1) conv2d_depthwise_5x5_stride_2(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<5, 2>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

// In the input gradient every channel is made from the ``channels.source`` channels of dy that its group has.
extern "C" __global__ void __launch_bounds__(256, 2) conv2d_depthwise(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    long long count
) {
    const int all_channels = channels.groups * channels.output;
    const bool by_channel = output_strides.c < output_strides.w;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        long long rest = i;
        int channel = 0;
        if (by_channel) {
            channel = (int)(rest % all_channels);
            rest /= all_channels;
        }
        const int place_across = (int)(rest % horizontal.output);
        rest /= horizontal.output;
        const int place_down = (int)(rest % vertical.output);
        rest /= vertical.output;
        if (!by_channel) {
            channel = (int)(rest % all_channels);
            rest /= all_channels;
        }
        const int group = channel / channels.output;
        const Line down = line_of(vertical, transposed, place_down);
        const Line across = line_of(horizontal, transposed, place_across);
        const scalar_t *image = input + rest * input_strides.n;
        const scalar_t *weights = filter + group * filter_strides.group +
                                  channel % channels.output * filter_strides.output +
                                  down.first * filter_strides.r + across.first * filter_strides.s;
        accumulate_t sum = NUMBER(0);
        for (int from = 0; from < channels.source; ++from) {
            const scalar_t *pixels = image + ((long long)group * channels.source + from) * input_strides.c;
            for (int r = 0; r < down.taps; ++r) {
                const int row = down.start + r * down.step;
                if (!inside(row, vertical.source)) continue;
                for (int s = 0; s < across.taps; ++s) {
                    const int column = across.start + s * across.step;
                    if (!inside(column, horizontal.source)) continue;
                    sum += load(pixels[row * input_strides.h + column * input_strides.w]) *
                           load(weights[from * filter_strides.source + r * down.tap_step * filter_strides.r +
                                        s * across.tap_step * filter_strides.s]);
                }
            }
        }
        const long long place = rest * output_strides.n + channel * output_strides.c +
                                place_down * output_strides.h + place_across * output_strides.w;
        output[place] = finished(sum, {scale, bias, residual}, channel, place, epilogue);
    }
}
