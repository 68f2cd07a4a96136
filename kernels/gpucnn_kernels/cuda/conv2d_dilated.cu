// The input gradient as it is usually written: a stride-1 convolution of the gradient, dilated (stride - 1 zeros
// between its rows and columns) and padded with dilation * (R - 1) - pad zeros, with the filter rotated by 180
// degrees and its channels exchanged. These two kernels make the two arrays; the forward kernel does the rest.
//
// The zeros cost: with stride 2 three of four products are with one of them. conv2d_implicit_gemm's phases leave
// them out. Limit of both kernels: memory, what they write.
#include "conv2d.cuh"

// Row i of ``padded`` is row (i - before) / stride of dy, where that is one. ``before`` is negative where the
// forward convolution's padding is wider than its window reaches: those rows of dy met padding only.
extern "C" __global__ void __launch_bounds__(256) conv2d_dilate_and_pad(
    const scalar_t *dy, Strides dy_strides, int P, int Q, scalar_t *padded, Strides padded_strides, int channels,
    int height, int width, int before_h, int before_w, int stride_h, int stride_w, long long count
) {
    const bool by_channel = padded_strides.c < padded_strides.w;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        long long rest = i;
        int channel = 0;
        if (by_channel) {
            channel = (int)(rest % channels);
            rest /= channels;
        }
        const int column = (int)(rest % width);
        rest /= width;
        const int row = (int)(rest % height);
        rest /= height;
        if (!by_channel) {
            channel = (int)(rest % channels);
            rest /= channels;
        }
        const int h = row - before_h, w = column - before_w;
        const bool there =
            h >= 0 && w >= 0 && h % stride_h == 0 && w % stride_w == 0 && h / stride_h < P && w / stride_w < Q;
        padded[rest * padded_strides.n + channel * padded_strides.c + row * padded_strides.h +
               column * padded_strides.w] =
            there ? dy[rest * dy_strides.n + channel * dy_strides.c + h / stride_h * dy_strides.h +
                       w / stride_w * dy_strides.w]
                  : store(NUMBER(0));
    }
}

// rotated[group * depth + c, k, r, s] = filter[group * outputs + k, c, R - 1 - r, S - 1 - s], with ``depth`` input
// and ``outputs`` output channels a group; rotated is contiguous.
extern "C" __global__ void __launch_bounds__(256) conv2d_rotate_filter(
    const scalar_t *filter, Strides filter_strides, scalar_t *rotated, int depth, int outputs, int R, int S,
    long long count
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const int s = (int)(i % S), r = (int)(i / S % R), k = (int)(i / S / R % outputs);
        const long long channel = i / S / R / outputs;
        const long long group = channel / depth, c = channel % depth;
        rotated[i] = filter[(group * outputs + k) * filter_strides.n + c * filter_strides.c +
                            (R - 1 - r) * filter_strides.h + (S - 1 - s) * filter_strides.w];
    }
}
