// Max pooling with windows of 2 x 2 and 3 x 3, where all arrays have one layout.
//
// What depends on the place in a plane alone is worked out once for several planes of contiguous images, or once for
// 16 bytes of neighbouring channels of channels-last ones, and the loads of a window are all under way together. By
// the compiled code for sm_90, not measured, instructions in the main loops:
//
//                          2 x 2: float32  bfloat16     3 x 3: float32  bfloat16     time for, with a stride of 2
//   planes, an output                  49        50                 80        95         160 and 85
//   packs, an output                   47        40                 92        87         160 and 85
//   planes, a pixel                    16        20                 39        44          41 and 20
//   packs, a pixel                     12         9                 22        18          41 and 20
//
// "Time for" is how many an H200 can start while its memory moves the element's bytes. The kernels for windows of any
// size have loops of some 400 (an output) and 600 (a pixel), parts of which are gone through several times.
#include "activation.cuh"
#include "packs.cuh"
#include "pooling.cuh"

// Where the places of a window are read. Those in the padding are moved into the image, each row and column to the
// nearest that is inside: the window then sees some places twice, in the order of the first, so neither its maximum
// nor who has it changes, and nothing is asked while loading.
template <int size>
struct SmallWindow {
    int top, left;
    int rows[size], columns[size];

    __device__ __forceinline__ SmallWindow(const Pooling &pooling, int p, int q) {
        top = p * pooling.stride_h - pooling.padding_h;
        left = q * pooling.stride_w - pooling.padding_w;
#pragma unroll
        for (int k = 0; k < size; ++k) {
            rows[k] = moved_inside(top + k, pooling.H);
            columns[k] = moved_inside(left + k, pooling.W);
        }
    }

    static __device__ __forceinline__ int moved_inside(int place, int length) {
        return place < 0 ? 0 : place < length ? place : length - 1;
    }

    __device__ __forceinline__ bool whole(const Pooling &pooling) const {
        return top >= 0 && left >= 0 && top + size <= pooling.H && left + size <= pooling.W;
    }

    // Four bits for each place: which place of the window it was moved to.
    __device__ __forceinline__ unsigned long long true_places() const {
        unsigned long long places = 0;
#pragma unroll
        for (int k = 0; k < size * size; ++k) {
            const int place = (rows[k / size] - top) * size + columns[k % size] - left;
            places |= (unsigned long long)place << 4 * k;
        }
        return places;
    }
};

// From the last place to the first: so the first of the largest wins, and the first NaN over all.
__device__ __forceinline__ void take_as_large(accumulate_t value, int place, accumulate_t &best, int &best_place) {
    if (value >= best || value != value) {
        best = value;
        best_place = place;
    }
}

template <int size>
__device__ __forceinline__ void largest_of_planes(
    const scalar_t *x, scalar_t *y, unsigned char *argmax, const Pooling &pooling
) {
    const int pixels = pooling.H * pooling.W, outputs = pooling.P * pooling.Q;
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= outputs) return;
    const int p = position / pooling.Q, q = position - p * pooling.Q;
    const SmallWindow<size> window(pooling, p, q);
    const unsigned long long places = window.true_places();
    int offsets[size * size];
#pragma unroll
    for (int k = 0; k < size * size; ++k) {
        offsets[k] = window.rows[k / size] * pooling.W + window.columns[k % size];
    }
    const int step = gridDim.y * blockDim.y;
    long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y;
    const scalar_t *plane = x + row * pixels;
    long long output = row * outputs + position;
#pragma unroll 1
    for (; row < pooling.rows; row += step, plane += (long long)step * pixels, output += (long long)step * outputs) {
        scalar_t values[size * size];
#pragma unroll
        for (int k = 0; k < size * size; ++k) values[k] = plane[offsets[k]];
        int best_place = size * size - 1;
        accumulate_t best = load(values[best_place]);
#pragma unroll
        for (int k = size * size - 2; k >= 0; --k) take_as_large(load(values[k]), k, best, best_place);
        y[output] = store(best);
        argmax[output] = (unsigned char)(places >> 4 * best_place & 15);
    }
}

template <int size>
__device__ __forceinline__ void largest_of_packs(
    const scalar_t *x, scalar_t *y, unsigned char *argmax, const Pooling &pooling
) {
    const int packs = pooling.C / PACK;
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= (unsigned)pooling.Q * packs) return;
    const int q = position / packs, channel = (position - q * packs) * PACK;
    const unsigned step = gridDim.y * blockDim.y, rows = (unsigned)pooling.rows;
    for (unsigned row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += step) {
        const int n = row / pooling.P, p = row - n * pooling.P;
        const SmallWindow<size> window(pooling, p, q);
        const scalar_t *image = x + (long long)n * pooling.H * pooling.W * pooling.C + channel;
        Pack<scalar_t, PACK> values[size * size];
#pragma unroll
        for (int k = 0; k < size * size; ++k) {
            const int pixel = window.rows[k / size] * pooling.W + window.columns[k % size];
            values[k] = load_pack<PACK>(image + (long long)pixel * pooling.C);
        }
        accumulate_t best[PACK];
        int best_place[PACK];
#pragma unroll
        for (int number = 0; number < PACK; ++number) {
            best_place[number] = size * size - 1;
            best[number] = load(values[size * size - 1].number[number]);
#pragma unroll
            for (int k = size * size - 2; k >= 0; --k) {
                take_as_large(load(values[k].number[number]), k, best[number], best_place[number]);
            }
        }
        if (!window.whole(pooling)) {
            const unsigned long long places = window.true_places();
#pragma unroll
            for (int number = 0; number < PACK; ++number) {
                best_place[number] = (int)(places >> 4 * best_place[number] & 15);
            }
        }
        Pack<scalar_t, PACK> largest;
        Pack<unsigned char, PACK> chosen;
#pragma unroll
        for (int number = 0; number < PACK; ++number) {
            largest.number[number] = store(best[number]);
            chosen.number[number] = (unsigned char)best_place[number];
        }
        const long long output = ((long long)row * pooling.Q + q) * pooling.C + channel;
        store_pack<PACK>(y + output, largest);
        store_pack<PACK>(argmax + output, chosen);
    }
}

// The windows around two pixels, one below the other, where the stride is 2: rows 2 * pair and 2 * pair + 1 of the
// padded image, and one column of it. Along each axis they are ``reach`` at most.
template <int size>
struct PairOfPixels {
    static constexpr int reach = (size + 1) / 2, windows = reach * reach;
    int top;              // the upper pixel's row of the image: below 0 in the padding
    int offsets[windows];  // p * Q + q, or below 0 where there is no such window
    int columns[reach];    // which column of the window the pixels are in

    __device__ __forceinline__ PairOfPixels(const Pooling &pooling, int pair, int w) {
        const int padded = w + pooling.padding_w, parity = padded & 1;
        top = 2 * pair - pooling.padding_h;
#pragma unroll
        for (int b = 0; b < reach; ++b) columns[b] = parity + 2 * (reach - 1 - b);
#pragma unroll
        for (int k = 0; k < windows; ++k) {
            const int p = pair - (reach - 1) + k / reach, q = padded / 2 - (reach - 1) + k % reach;
            const bool there = p >= 0 && p < pooling.P && q >= 0 && q < pooling.Q && columns[k % reach] < size;
            offsets[k] = there ? p * pooling.Q + q : -1;
        }
    }

    // Adds the gradient of window k to the upper and the lower pixel, if it chose them.
    __device__ __forceinline__ void add(
        int k, int place, accumulate_t gradient, accumulate_t &upper, accumulate_t &lower
    ) const {
        const int row = 2 * (reach - 1 - k / reach);  // of the window, where the upper pixel is
        const int wanted = row * size + columns[k % reach];
        if (place == wanted) upper += gradient;
        if (row + 1 < size && place == wanted + size) lower += gradient;
    }
};

__device__ __forceinline__ int pairs_of_rows(const Pooling &pooling) { return (pooling.H + pooling.padding_h + 1) / 2; }

// The activation before the pooling, of which y is the pooled result; without one, y is null.
struct Before {
    const scalar_t *y;
    int function;
    accumulate_t negative_slope;

    // A gradient for the result, as activation_backward has it before the activation.
    __device__ __forceinline__ scalar_t through(scalar_t gradient, scalar_t result) const {
        const accumulate_t value = load(result), given = load(gradient);
        switch (function) {
            case RELU: return value > NUMBER(0) ? gradient : store(NUMBER(0));
            case LEAKY_RELU: return value > NUMBER(0) ? gradient : store(given * negative_slope);
            case SIGMOID: return store(given * (value * (NUMBER(1) - value)));
            default: return store(given * ((NUMBER(1) - value) * (NUMBER(1) + value)));
        }
    }
};

constexpr unsigned char NO_PLACE = 255;  // of no window of up to 3 x 3

template <int size>
__device__ __forceinline__ void gradients_of_planes(
    const scalar_t *dy, const unsigned char *argmax, scalar_t *dx, const Pooling &pooling, const Before &before
) {
    const int pixels = pooling.H * pooling.W, outputs = pooling.P * pooling.Q;
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    const int pair = position / pooling.W, w = position - pair * pooling.W;
    if (pair >= pairs_of_rows(pooling)) return;
    const PairOfPixels<size> pixel(pooling, pair, w);
    constexpr int windows = PairOfPixels<size>::windows;
    const bool upper_inside = pixel.top >= 0, lower_inside = pixel.top + 1 < pooling.H;
    const int step = gridDim.y * blockDim.y;
    long long row = (long long)blockIdx.y * blockDim.y + threadIdx.y;
    const unsigned char *chosen = argmax + row * outputs;
    const scalar_t *given = dy + row * outputs;
    scalar_t *target = dx + row * pixels + (long long)pixel.top * pooling.W + w;
#pragma unroll 1
    for (; row < pooling.rows; row += step) {
        unsigned char places[windows];
        scalar_t gradients[windows];
#pragma unroll
        for (int k = 0; k < windows; ++k) {
            places[k] = pixel.offsets[k] >= 0 ? chosen[pixel.offsets[k]] : NO_PLACE;
            gradients[k] = pixel.offsets[k] >= 0 ? given[pixel.offsets[k]] : store(NUMBER(0));
        }
        if (size == 2 && before.y) {
            const scalar_t *results = before.y + (given - dy);
#pragma unroll
            for (int k = 0; k < windows; ++k) {
                if (pixel.offsets[k] >= 0) gradients[k] = before.through(gradients[k], results[pixel.offsets[k]]);
            }
        }
        accumulate_t upper = NUMBER(0), lower = NUMBER(0);
#pragma unroll
        for (int k = 0; k < windows; ++k) pixel.add(k, places[k], load(gradients[k]), upper, lower);
        if (upper_inside) target[0] = store(upper);
        if (lower_inside) target[pooling.W] = store(lower);
        chosen += (long long)step * outputs;
        given += (long long)step * outputs;
        target += (long long)step * pixels;
    }
}

// Four pixels a thread, two pairs side by side, which share their windows: in which column of a window a pixel is,
// the compiler then knows.
template <int size>
__device__ __forceinline__ void gradients_of_packs(
    const scalar_t *dy, const unsigned char *argmax, scalar_t *dx, const Pooling &pooling, const Before &before
) {
    constexpr int reach = (size + 1) / 2, windows = reach * reach;
    const int packs = pooling.C / PACK, pairs = pairs_of_rows(pooling);
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    const int across = position / packs, channel = (position - across * packs) * PACK;
    if (across >= (pooling.W + pooling.padding_w + 1) / 2) return;
    const int left = 2 * across - pooling.padding_w;
    const unsigned step = gridDim.y * blockDim.y, rows = (unsigned)pooling.rows;
#pragma unroll 1
    for (unsigned row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += step) {
        const int n = row / pairs, pair = row - n * pairs, top = 2 * pair - pooling.padding_h;
        const long long first = (long long)n * pooling.P * pooling.Q * pooling.C + channel;
        Pack<unsigned char, PACK> places[windows];
        Pack<scalar_t, PACK> gradients[windows];
#pragma unroll
        for (int k = 0; k < windows; ++k) {
            const int p = pair - (reach - 1) + k / reach, q = across - (reach - 1) + k % reach;
            const bool there = p >= 0 && p < pooling.P && q >= 0 && q < pooling.Q;
            const long long at = first + (there ? (long long)(p * pooling.Q + q) * pooling.C : 0);
            places[k] = load_pack<PACK>(argmax + at);
            gradients[k] = load_pack<PACK>(dy + at);
            if (size == 2 && before.y) {  // windows that overlap have no registers for it
                const Pack<scalar_t, PACK> results = load_pack<PACK>(before.y + at);
#pragma unroll
                for (int number = 0; number < PACK; ++number) {
                    gradients[k].number[number] =
                        before.through(gradients[k].number[number], results.number[number]);
                }
            }
            if (!there) {
#pragma unroll
                for (int number = 0; number < PACK; ++number) places[k].number[number] = NO_PLACE;
            }
        }
        const long long line = (long long)pooling.W * pooling.C;
        scalar_t *target = dx + ((long long)n * pooling.H + top) * line + (long long)left * pooling.C + channel;
#pragma unroll
        for (int pixel = 0; pixel < 4; ++pixel) {
            const int below = pixel / 2, right = pixel % 2;
            Pack<scalar_t, PACK> sums;
#pragma unroll
            for (int number = 0; number < PACK; ++number) {
                accumulate_t sum = NUMBER(0);
#pragma unroll
                for (int k = 0; k < windows; ++k) {
                    const int r = below + 2 * (reach - 1 - k / reach), s = right + 2 * (reach - 1 - k % reach);
                    if (r < size && s < size && places[k].number[number] == r * size + s) {
                        sum += load(gradients[k].number[number]);
                    }
                }
                sums.number[number] = store(sum);
            }
            const int h = top + below, w = left + right;
            if (h >= 0 && h < pooling.H && w >= 0 && w < pooling.W) {
                store_pack<PACK>(target + below * line + right * pooling.C, sums);
            }
        }
    }
}
