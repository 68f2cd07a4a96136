// Pictures for training, from bytes to normalized floats in one pass: mirrored, resampled by a filter, turned, moved
// over black, recoloured, normalized, cut out. Limit: memory, a byte read and an element written. Changes of colour
// read the bytes once more before, for each picture's mean grey.
//
// Every product and sum is rounded by itself, in the order in which the CPU takes them, so that the numbers are the
// CPU's bit for bit; only a mean over resampled or turned pixels, a sum of doubles, may differ in its last bit.
//
// A pixel is found backwards, from its place in the result to the bytes that it is made of, so that nothing lies in
// between in memory. A turned pixel is made of four resampled ones, and a resampled one of rows * columns bytes:
// neighbours read the same bytes again, from the cache. INTERPOLATED is 0 where pictures are neither resampled nor
// turned, for then a pixel is a byte, and a thread needs half of the registers.
//
// By the compiled code for sm_90, not measured, a pixel that is not interpolated takes some 130 instructions without
// changes of colour, and a thread 160 before the first of up to four; for three channels of float32 an H200's memory
// leaves time for 117. A thread for each pixel took all of them.
#include "reduce.cuh"
#include "scalar.cuh"

#define MOST_CHANNELS 4  // of a launch

struct Pictures {
    long long count;
    int height, width, channels;
    int first_channel, channels_here;  // those of this launch
    long long stride_n, stride_h, stride_w, stride_c;
};

struct Taps {
    int rows, columns;              // bytes that a pixel is made of, down and across
    int row_tables, column_tables;  // 1 for all pictures, or as many as there are pictures
};

struct Result {
    int h, w, cutout;
    long long stride_n, stride_c, stride_h, stride_w;
};

struct Normalization {
    float factor_0, factor_1, factor_2, factor_3;
    float shift_0, shift_1, shift_2, shift_3;
};

// Never fused: see above.
__device__ __forceinline__ float product(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ float sum(float x, float y) { return __fadd_rn(x, y); }
__device__ __forceinline__ float between(float near_one, float far_one, float share) {
    return sum(near_one, product(sum(far_one, -near_one), share));
}

// One picture, and what is to become of its geometry.
struct Picture {
    const unsigned char *bytes;
    const int *row_first, *column_first;  // null where the picture is taken pixel by pixel
    const float *row_weights, *column_weights;
    float cosine, sine;
    int down, right;
    bool mirrored, turned;
};

__device__ __forceinline__ Picture picture_at(
    long long n, const Pictures &pictures, const Taps &taps, const Result &result, const unsigned char *images,
    const long long *index, const bool *flip, const int *row_first, const float *row_weights, const int *column_first,
    const float *column_weights, const float *rotation, const int *shift
) {
    Picture picture;
    picture.bytes =
        images + (index ? index[n] : n) * pictures.stride_n + pictures.first_channel * pictures.stride_c;
    const long long row_table = taps.row_tables == 1 ? 0 : n, column_table = taps.column_tables == 1 ? 0 : n;
    picture.row_first = row_first ? row_first + row_table * result.h : nullptr;
    picture.row_weights = row_first ? row_weights + row_table * taps.rows * result.h : nullptr;
    picture.column_first = column_first ? column_first + column_table * result.w : nullptr;
    picture.column_weights = column_first ? column_weights + column_table * taps.columns * result.w : nullptr;
    picture.turned = rotation != nullptr;
    picture.cosine = rotation ? rotation[2 * n] : 1.0f;
    picture.sine = rotation ? rotation[2 * n + 1] : 0.0f;
    picture.down = shift ? shift[2 * n] : 0;
    picture.right = shift ? shift[2 * n + 1] : 0;
    picture.mirrored = flip && flip[n];
    return picture;
}

// The channels of the launch at a place of the picture that is resampled, then mirrored.
__device__ __forceinline__ void resampled(
    const Picture &picture, const Pictures &pictures, const Taps &taps, const Result &result, int row, int column,
    float (&values)[MOST_CHANNELS]
) {
    if (picture.mirrored) column = result.w - 1 - column;
#if !INTERPOLATED
    const unsigned char *place = picture.bytes + row * pictures.stride_h + column * pictures.stride_w;
#pragma unroll
    for (int number = 0; number < MOST_CHANNELS; ++number) {
        if (number < pictures.channels_here) values[number] = (float)place[number * pictures.stride_c];
    }
#else
    const int top = picture.row_first ? picture.row_first[row] : row;
    const int left = picture.column_first ? picture.column_first[column] : column;
    const int rows = picture.row_first ? taps.rows : 1, columns = picture.column_first ? taps.columns : 1;
#pragma unroll 1
    for (int i = 0; i < rows; ++i) {
        // Tables of one launch are filled up with weights of zero to one length: those must not be read outside.
        const long long y = min(top + i, pictures.height - 1);
        float line[MOST_CHANNELS];
#pragma unroll 1
        for (int j = 0; j < columns; ++j) {
            const long long x = min(left + j, pictures.width - 1);
            const unsigned char *place = picture.bytes + y * pictures.stride_h + x * pictures.stride_w;
            const float weight =
                picture.column_first ? picture.column_weights[(long long)j * result.w + column] : 1.0f;
#pragma unroll
            for (int number = 0; number < MOST_CHANNELS; ++number) {
                if (number >= pictures.channels_here) continue;
                const float term = product((float)place[number * pictures.stride_c], weight);
                line[number] = j == 0 ? term : sum(line[number], term);
            }
        }
        const float weight = picture.row_first ? picture.row_weights[(long long)i * result.h + row] : 1.0f;
#pragma unroll
        for (int number = 0; number < MOST_CHANNELS; ++number) {
            if (number >= pictures.channels_here) continue;
            const float term = product(line[number], weight);
            values[number] = i == 0 ? term : sum(values[number], term);
        }
    }
#endif
}

#if INTERPOLATED
// The channels of the launch at a place of the picture that is turned about its middle, bilinear; or left as it is.
__device__ __forceinline__ void turned(
    const Picture &picture, const Pictures &pictures, const Taps &taps, const Result &result, int row, int column,
    float (&values)[MOST_CHANNELS]
) {
    int top = row, left = column, corners = 1;
    float share_down = 0.0f, share_right = 0.0f;
    if (picture.turned) {
        const float middle_row = 0.5f * (float)(result.h - 1), middle_column = 0.5f * (float)(result.w - 1);
        const float y = sum((float)row, -middle_row), x = sum((float)column, -middle_column);
        float down = sum(sum(product(picture.cosine, y), middle_row), product(picture.sine, x));
        float right = sum(sum(product(picture.cosine, x), middle_column), product(-picture.sine, y));
        down = fminf(fmaxf(down, 0.0f), (float)(result.h - 1));
        right = fminf(fmaxf(right, 0.0f), (float)(result.w - 1));
        // The upper left of four, never in the last row or column: all four exist.
        top = min((int)down, result.h - 2), left = min((int)right, result.w - 2), corners = 2;
        share_down = sum(down, -(float)top), share_right = sum(right, -(float)left);
    }
#pragma unroll 1
    for (int line = 0; line < corners; ++line) {
        float side[MOST_CHANNELS], corner[MOST_CHANNELS];
#pragma unroll 1
        for (int place = 0; place < corners; ++place) {
            resampled(picture, pictures, taps, result, top + line, left + place, corner);
#pragma unroll
            for (int number = 0; number < MOST_CHANNELS; ++number) {
                if (number >= pictures.channels_here) continue;
                side[number] = place == 0 ? corner[number] : between(side[number], corner[number], share_right);
            }
        }
#pragma unroll
        for (int number = 0; number < MOST_CHANNELS; ++number) {
            if (number >= pictures.channels_here) continue;
            values[number] = line == 0 ? side[number] : between(values[number], side[number], share_down);
        }
    }
}
#endif

// The channels of the launch at a place of the result, before any change of colour.
__device__ __forceinline__ void pixel_at(
    const Picture &picture, const Pictures &pictures, const Taps &taps, const Result &result, int row, int column,
    float (&values)[MOST_CHANNELS]
) {
#pragma unroll
    for (int number = 0; number < MOST_CHANNELS; ++number) values[number] = 0.0f;
    // Compared without subtracting, which would overflow for a shift near the smallest integer.
    const long long moved_row = (long long)row - picture.down, moved_column = (long long)column - picture.right;
    if (moved_row < 0 || moved_row >= result.h || moved_column < 0 || moved_column >= result.w) return;
    row = (int)moved_row, column = (int)moved_column;
#if INTERPOLATED
    turned(picture, pictures, taps, result, row, column, values);
#else
    resampled(picture, pictures, taps, result, row, column, values);
#endif
}

// The luma of ITU-R BT.601; of pictures that are not of three channels, the first one.
__device__ __forceinline__ float grey_of(const Pictures &pictures, const float (&values)[MOST_CHANNELS]) {
    if (pictures.channels != 3) return values[0];
    return sum(sum(product(values[0], 0.299f), product(values[1], 0.587f)), product(values[2], 0.114f));
}

// For each picture, of its brightness b, contrast c and saturation s (N, 3): b c s, b (1 - c) m and b c (1 - s),
// where m is its mean grey. A block a picture, which adds in a fixed order. The launch has all channels of three,
// or the first of others.
extern "C" __global__ void __launch_bounds__(512, 1) colour_coefficients(
    const unsigned char *__restrict__ images, const long long *__restrict__ index, const bool *__restrict__ flip,
    const int *__restrict__ row_first, const float *__restrict__ row_weights, const int *__restrict__ column_first,
    const float *__restrict__ column_weights, const float *__restrict__ rotation, const int *__restrict__ shift,
    const double *__restrict__ colour, float *__restrict__ coefficients, Pictures pictures, Taps taps, Result result
) {
    __shared__ double shared[32];
    for (long long n = blockIdx.x; n < pictures.count; n += gridDim.x) {
        const Picture picture = picture_at(
            n, pictures, taps, result, images, index, flip, row_first, row_weights, column_first, column_weights,
            rotation, shift
        );
        double total = 0;
        for (int row = threadIdx.y; row < result.h; row += blockDim.y) {
            for (int column = threadIdx.x; column < result.w; column += blockDim.x) {
                float values[MOST_CHANNELS];
                pixel_at(picture, pictures, taps, result, row, column, values);
                total += (double)grey_of(pictures, values);
            }
        }
        total = block_sum(total, shared);
        if (threadIdx.x == 0 && threadIdx.y == 0) {
            const double middle = total / ((double)result.h * (double)result.w);
            const double brightness = colour[3 * n], contrast = colour[3 * n + 1];
            const double saturation = pictures.channels == 3 ? colour[3 * n + 2] : 1;
            coefficients[3 * n] = (float)(brightness * contrast * saturation);
            coefficients[3 * n + 1] = (float)(brightness * (1 - contrast) * middle);
            coefficients[3 * n + 2] = (float)(brightness * contrast * (1 - saturation));
        }
    }
}

// A thread for a pixel of the result and all channels of the launch.
extern "C" __global__ void __launch_bounds__(256, 1) augment_images(
    const unsigned char *__restrict__ images, const long long *__restrict__ index, const bool *__restrict__ flip,
    const int *__restrict__ row_first, const float *__restrict__ row_weights, const int *__restrict__ column_first,
    const float *__restrict__ column_weights, const float *__restrict__ rotation, const int *__restrict__ shift,
    const float *__restrict__ coefficients, const int *__restrict__ cutout, scalar_t *__restrict__ y,
    Pictures pictures, Taps taps, Result result, Normalization normalization
) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= result.w) return;
    const float factors[MOST_CHANNELS] = {
        normalization.factor_0, normalization.factor_1, normalization.factor_2, normalization.factor_3
    };
    const float shifts[MOST_CHANNELS] = {
        normalization.shift_0, normalization.shift_1, normalization.shift_2, normalization.shift_3
    };
    for (long long n = blockIdx.z; n < pictures.count; n += gridDim.z) {
        const Picture picture = picture_at(
            n, pictures, taps, result, images, index, flip, row_first, row_weights, column_first, column_weights,
            rotation, shift
        );
        const float own = coefficients ? coefficients[3 * n] : 1.0f;
        const float added = coefficients ? coefficients[3 * n + 1] : 0.0f;
        const float greyed = coefficients ? coefficients[3 * n + 2] : 0.0f;
        const int cut_top = cutout ? cutout[2 * n] : 0, cut_left = cutout ? cutout[2 * n + 1] : 0;
        for (int row = blockIdx.y * blockDim.y + threadIdx.y; row < result.h; row += gridDim.y * blockDim.y) {
            float values[MOST_CHANNELS];
            pixel_at(picture, pictures, taps, result, row, column, values);
            const float grey = coefficients ? grey_of(pictures, values) : 0.0f;
            const long long from_top = (long long)row - cut_top, from_left = (long long)column - cut_left;
            const bool cut = cutout && from_top >= 0 && from_top < result.cutout && from_left >= 0 &&
                             from_left < result.cutout;
            scalar_t *target = y + n * result.stride_n + row * result.stride_h + column * result.stride_w +
                               pictures.first_channel * result.stride_c;
#pragma unroll
            for (int number = 0; number < MOST_CHANNELS; ++number) {
                if (number >= pictures.channels_here) continue;
                const float factor = factors[number];
                float value;
                if (coefficients) {
                    value = sum(product(values[number], product(factor, own)),
                                sum(shifts[number], product(factor, added)));
                    if (pictures.channels == 3) value = sum(value, product(product(grey, greyed), factor));
                } else {
                    value = sum(product(values[number], factor), shifts[number]);
                }
                target[number * result.stride_c] = store((accumulate_t)(cut ? 0.0f : value));
            }
        }
    }
}
