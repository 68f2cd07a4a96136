// Depthwise convolution (C / groups = 1; K is a multiple of C), forward and input gradient: no sum over channels,
// so nothing that a matrix product could share.
//
// Limit: memory. 3 x 3 is 18 operations for 4 bytes read and 4 written (float32): 2 a byte, where a GPU has 10 and
// more. What is left to do is to issue few instructions and to have enough on its way: a memory of 4.3 TB/s leaves an
// H200's schedulers 62 for each number of float32, 31 for one of 16 bits.
//
// So for the usual filters (3 x 3 and 5 x 5, stride 1 and 2, as many outputs as inputs) a thread goes down an image
// with its filter and the rows of its windows in registers, as depthwise_window.cuh says: each row is read once for
// all outputs that see it, in packs where it lies so, and the next rows are on their way while these are multiplied.
// The input gradient at stride 1 is the same with the filter turned round. Counted in the code for sm_90 without what
// a sum ends with, 3 x 3 at stride 1 (stride 2), an output takes so many instructions, 9 of them multiply-adds, and
// with what a run of 28 rows begins with some 4 more:
//
//   form              float32   bfloat16
//   columns, packed   20 (26)   21 (31)
//   channels, packed  25 (39)   25 (39)
//   neither           35 (55)   39 (71)
//
// Any other problem has one thread a number, which reads its window tap by tap, from the L1 cache mostly.
#include "activation_packs.cuh"
#include "depthwise_window.cuh"

// Grid: x the strips of columns and the channels, y runs of ``run`` rows, z the images.
template <typename F, int BATCH>
__device__ __forceinline__ void slide(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides, Terms terms,
    scalar_t *output, Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed,
    Epilogue epilogue, int run
) {
    constexpr int KERNEL = F::KERNEL, CHANNELS = F::CHANNELS, NEW = BATCH * F::STRIDE;
    const unsigned place = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned strips = (horizontal.output + F::COLUMNS - 1) / F::COLUMNS, packs = channels.groups / CHANNELS;
    if (place >= strips * packs) return;
    const bool by_channel = output_strides.c < output_strides.w;
    const int channel = (int)(by_channel ? place % packs : place / strips) * CHANNELS;
    const int q = (int)(by_channel ? place / packs : place % strips) * F::COLUMNS;
    const int first = blockIdx.y * run;
    bool here[F::COLUMNS];
#pragma unroll
    for (int i = 0; i < F::COLUMNS; ++i) here[i] = F::PACKED || i == 0 || q + i < horizontal.output;

    accumulate_t weights[KERNEL * KERNEL][CHANNELS];
    ChannelTerms of[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
        const scalar_t *taps = filter + (channel + c) * filter_strides.group;
#pragma unroll
        for (int tap = 0; tap < KERNEL * KERNEL; ++tap) {
            const int turned = transposed ? KERNEL * KERNEL - 1 - tap : tap;
            weights[tap][c] = load(taps[turned / KERNEL * filter_strides.r + turned % KERNEL * filter_strides.s]);
        }
        of[c] = terms_of(terms, channel + c);
    }
    const int top = first * F::STRIDE - (transposed ? KERNEL - 1 - vertical.pad : vertical.pad);
    const int left = q * F::STRIDE - (transposed ? KERNEL - 1 - horizontal.pad : horizontal.pad);

#pragma unroll 1
    for (int image = blockIdx.z; image < channels.images; image += gridDim.z) {
        Rows<F> source(
            input + image * input_strides.n + channel * input_strides.c, input_strides.h, input_strides.w, top, left,
            vertical.source, horizontal.source
        );
        accumulate_t window[F::KEPT + NEW][F::SPAN];
        typename Rows<F>::Raw next[NEW];
#pragma unroll
        for (int row = 0; row < F::KEPT; ++row) {
            source.read(next[0]);
            Rows<F>::spread(next[0], window[row]);
        }
#pragma unroll
        for (int row = 0; row < NEW; ++row) source.read(next[row]);
        long long to = image * output_strides.n + channel * output_strides.c + first * output_strides.h +
                       q * output_strides.w;
#pragma unroll 1
        for (int rows = min(run, vertical.output - first); rows > 0; rows -= BATCH) {
#pragma unroll
            for (int row = 0; row < NEW; ++row) Rows<F>::spread(next[row], window[F::KEPT + row]);
            if (rows > BATCH) {
#pragma unroll
                for (int row = 0; row < NEW; ++row) source.read(next[row]);
            }
            accumulate_t sums[BATCH * F::OUTPUTS];
#pragma unroll
            for (int k = 0; k < BATCH * F::OUTPUTS; ++k) {
                const int i = k / F::OUTPUTS, column = k % F::OUTPUTS / CHANNELS, c = k % CHANNELS;
                sums[k] = NUMBER(0);
#pragma unroll
                for (int tap = 0; tap < KERNEL * KERNEL; ++tap) {
                    const int across = column * F::STRIDE + tap % KERNEL;
                    sums[k] += window[i * F::STRIDE + tap / KERNEL][across * CHANNELS + c] * weights[tap][c];
                }
                sums[k] = scaled(sums[k], of[c]);
            }
            if (terms.residual != nullptr) {
#pragma unroll
                for (int i = 0; i < BATCH; ++i) {
                    Outputs<F> residual;
                    accumulate_t numbers[F::OUTPUTS];
                    residual.read(i < rows, here, terms.residual + to + i * output_strides.h, output_strides.w);
                    residual.spread(numbers);
#pragma unroll
                    for (int k = 0; k < F::OUTPUTS; ++k) sums[i * F::OUTPUTS + k] += numbers[k];
                }
            }
            if (epilogue.function != IDENTITY) activate_all(epilogue.function, sums, epilogue.negative_slope);
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                if (i < rows) Outputs<F>::write(sums + i * F::OUTPUTS, here, output + to, output_strides.w);
                to += output_strides.h;
            }
#pragma unroll
            for (int row = 0; row < F::KEPT; ++row) {
#pragma unroll
                for (int k = 0; k < F::SPAN; ++k) window[row][k] = window[NEW + row][k];
            }
        }
    }
}

// Rows that are made at a time, while as many are on their way.
constexpr int ROWS = sizeof(scalar_t) == 8 ? 1 : 2;

// Columns side by side in memory.
extern "C" __global__ void __launch_bounds__(128, 1) conv2d_depthwise_3x3_stride_1_columns(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<Form<3, 1, PACKED_COLUMNS, 1, true>, ROWS>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

extern "C" __global__ void __launch_bounds__(128, 1) conv2d_depthwise_3x3_stride_2_columns(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<Form<3, 2, PACKED_COLUMNS, 1, true>, 1>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

extern "C" __global__ void __launch_bounds__(128, 1) conv2d_depthwise_5x5_stride_1_columns(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<Form<5, 1, PACKED_COLUMNS, 1, true>, 1>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

extern "C" __global__ void __launch_bounds__(128, 1) conv2d_depthwise_5x5_stride_2_columns(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<Form<5, 2, PACKED_COLUMNS, 1, true>, 1>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

// Channels side by side in memory, in pairs.
extern "C" __global__ void __launch_bounds__(128, 1) conv2d_depthwise_3x3_stride_1_channels(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<Form<3, 1, 2, 2, false>, ROWS>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

extern "C" __global__ void __launch_bounds__(128, 1) conv2d_depthwise_3x3_stride_2_channels(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<Form<3, 2, 2, 2, false>, 1>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

// Images of any strides.
extern "C" __global__ void __launch_bounds__(128, 1) conv2d_depthwise_3x3_stride_1(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<Form<3, 1, 2, 1, false>, ROWS>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

extern "C" __global__ void __launch_bounds__(128, 1) conv2d_depthwise_3x3_stride_2(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<Form<3, 2, 2, 1, false>, 1>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

extern "C" __global__ void __launch_bounds__(128, 1) conv2d_depthwise_5x5_stride_1(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<Form<5, 1, 4, 1, false>, 1>(
        input, input_strides, filter, filter_strides, {scale, bias, residual}, output, output_strides, channels,
        vertical, horizontal, transposed, epilogue, run
    );
}

extern "C" __global__ void __launch_bounds__(128, 1) conv2d_depthwise_5x5_stride_2(
    const scalar_t *input, Strides input_strides, const scalar_t *filter, FilterStrides filter_strides,
    const scalar_t *scale, const scalar_t *bias, const scalar_t *residual, scalar_t *output,
    Strides output_strides, Channels channels, Axis vertical, Axis horizontal, int transposed, Epilogue epilogue,
    int run
) {
    slide<Form<5, 2, 2, 1, false>, 1>(
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
