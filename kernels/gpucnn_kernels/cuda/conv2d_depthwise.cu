// Depthwise convolution (C / groups = 1; K is a multiple of C), forward and input gradient: no sum over channels,
// so nothing that a matrix product could share. A thread makes one number and reads its window; neighbouring
// threads make numbers that lie side by side, in either layout, and find most of their windows in the L1 cache.
//
// Limit: memory. 3 x 3 is 18 operations for 4 bytes read and 4 written (float32): 2 a byte, where a GPU has 10 and
// more.
#include "conv2d.cuh"

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
