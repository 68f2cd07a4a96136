// Pictures as a network wants them: bytes N, H, W, C to normalized floats, flipped and cropped on the way. Limit:
// memory, a byte read and an element written.
//
// A launch takes up to four channels, whose factors and shifts come by value: no table has to be copied to the GPU
// first, which would wait for it. An image with more channels takes a launch for every four.
//
// By the compiled code for sm_90, not measured, a pixel takes some 75 instructions, and a thread 130 before the first of
// up to four. A thread for each pixel, which divided by the width and the height, took some 370; for three channels of
// float32 an H200's memory leaves time for 117.
#include "scalar.cuh"

#define MOST_CHANNELS 4  // of a launch

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

// A thread for a pixel of the result and all channels of the launch: the picture and the column are looked up once for
// all rows that it has. Offsets (N, 2) come in one of two widths, or not at all. ``count`` is how many pictures.
extern "C" __global__ void __launch_bounds__(256, 1) images_to_float(
    const unsigned char *__restrict__ images, const bool *__restrict__ flip, const int *__restrict__ offset_32,
    const long long *__restrict__ offset_64, scalar_t *__restrict__ y, long long count, Crop crop,
    Normalization normalization, OutputStrides strides
) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= crop.w) return;
    const accumulate_t factors[MOST_CHANNELS] = {
        normalization.factor_0, normalization.factor_1, normalization.factor_2, normalization.factor_3
    };
    const accumulate_t shifts[MOST_CHANNELS] = {
        normalization.shift_0, normalization.shift_1, normalization.shift_2, normalization.shift_3
    };
    for (long long n = blockIdx.z; n < count; n += gridDim.z) {
        const long long top = offset_32 ? offset_32[2 * n] : offset_64 ? offset_64[2 * n] : 0;
        const long long left = offset_32 ? offset_32[2 * n + 1] : offset_64 ? offset_64[2 * n + 1] : 0;
        const int column_in_crop = flip && flip[n] ? crop.w - 1 - column : column;
        // Compared without adding, which would overflow for an offset near the largest integer.
        const bool across = left >= -column_in_crop && left < crop.width - column_in_crop;
        const unsigned char *picture = images + n * crop.height * crop.width * crop.channels +
                                       (across ? (column_in_crop + left) * crop.channels : 0) +
                                       normalization.first_channel;
        scalar_t *made = y + n * strides.n + column * strides.w + normalization.first_channel * strides.c;
        for (int row = blockIdx.y * blockDim.y + threadIdx.y; row < crop.h; row += gridDim.y * blockDim.y) {
            const bool inside = across && top >= -row && top < crop.height - row;
            const unsigned char *place = picture + (inside ? (row + top) * crop.width * crop.channels : 0);
            scalar_t *target = made + row * strides.h;
#pragma unroll
            for (int number = 0; number < MOST_CHANNELS; ++number) {
                if (number >= normalization.count) continue;
                target[number * strides.c] = store(
                    inside ? (accumulate_t)place[number] * factors[number] + shifts[number] : NUMBER(0)
                );
            }
        }
    }
}
