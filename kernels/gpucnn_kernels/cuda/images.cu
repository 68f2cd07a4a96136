// Pictures as a network wants them: bytes N, H, W, C to normalized floats, flipped and cropped on the way. Limit:
// memory, a byte read and an element written.
//
// A launch takes up to four channels, whose factors and shifts come by value: no table has to be copied to the GPU
// first, which would wait for it. An image with more channels takes a launch for every four.
#include "scalar.cuh"

struct Crop {
    int height, width, channels;  // of the images
    int h, w;                     // of the result
};

struct OutputStrides {
    long long n, c, h, w;
};

// For channels first_channel to first_channel + count - 1: pixel * factor + shift.
struct Normalization {
    int first_channel, count;
    accumulate_t factor_0, factor_1, factor_2, factor_3;
    accumulate_t shift_0, shift_1, shift_2, shift_3;
};

__device__ __forceinline__ accumulate_t factor_of(const Normalization &normalization, int number) {
    return number == 0   ? normalization.factor_0
           : number == 1 ? normalization.factor_1
           : number == 2 ? normalization.factor_2
                         : normalization.factor_3;
}

__device__ __forceinline__ accumulate_t shift_of(const Normalization &normalization, int number) {
    return number == 0   ? normalization.shift_0
           : number == 1 ? normalization.shift_1
           : number == 2 ? normalization.shift_2
                         : normalization.shift_3;
}

// A thread for a pixel of the result and all channels of the launch; or, where the channels of the result are
// neighbours in memory, for one channel of it. Offsets (N, 2) come in one of two widths, or not at all.
extern "C" __global__ void __launch_bounds__(256, 1) images_to_float(
    const unsigned char *__restrict__ images, const bool *__restrict__ flip, const int *__restrict__ offset_32,
    const long long *__restrict__ offset_64, scalar_t *__restrict__ y, long long count, int channels_a_thread,
    Crop crop, Normalization normalization, OutputStrides strides
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    const int threads_a_pixel = channels_a_thread == 1 ? normalization.count : 1;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const long long pixel = i / threads_a_pixel, line = pixel / crop.w, n = line / crop.h;
        const int first = (int)(i - pixel * threads_a_pixel);
        const int row = (int)(line - n * crop.h), column = (int)(pixel - line * crop.w);
        const long long top = offset_32 ? offset_32[2 * n] : offset_64 ? offset_64[2 * n] : 0;
        const long long left = offset_32 ? offset_32[2 * n + 1] : offset_64 ? offset_64[2 * n + 1] : 0;
        const int column_in_crop = flip && flip[n] ? crop.w - 1 - column : column;
        // Compared without adding, which would overflow for an offset near the largest integer.
        const bool inside = top >= -row && top < crop.height - row && left >= -column_in_crop &&
                            left < crop.width - column_in_crop;
        const long long place =
            inside ? ((n * crop.height + row + top) * crop.width + column_in_crop + left) * crop.channels : 0;
        for (int number = first; number < first + channels_a_thread; ++number) {
            const int channel = normalization.first_channel + number;
            const accumulate_t value = inside ? (accumulate_t)images[place + channel] *
                                                        factor_of(normalization, number) +
                                                    shift_of(normalization, number)
                                              : NUMBER(0);
            y[n * strides.n + channel * strides.c + row * strides.h + column * strides.w] = store(value);
        }
    }
}
