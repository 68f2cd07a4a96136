// What the first layer's kernels share: the rows of an image that a tile of positions meets, brought to shared
// memory pixel by pixel with four channels each, from wherever they lie.
#include "conv2d_tensor.cuh"

#if PRODUCTS != 1
#error "products of numbers split in two are conv2d_tensor.cu's"
#endif

constexpr int WARPS = 4, THREADS = 32 * WARPS, POSITIONS = 64 * WARPS;
constexpr int RUN = 16;                               // positions in a row, of a tensor core's tile
constexpr int DEPTH = 4;                              // channels of a pixel in shared memory
constexpr int PIXEL = DEPTH * (int)sizeof(scalar_t);  // bytes
constexpr int STEP = 32, STEP_PIXELS = STEP / PIXEL;  // bytes and pixels of a product's sum

// Where a block's positions lie in an image, and what of it they meet: ``rows`` rows of ``runs`` runs, for which
// ``height`` rows of ``width`` pixels are brought to shared memory; from one pixel of a thread to its next are
// ``down_by`` rows and ``across_by`` columns. An image has down * across such tiles, a row of the filter ``steps``
// steps.
struct Patch { int rows, runs, height, width, down_by, across_by, down, across, steps; };

constexpr int TOGETHER = 8;  // pixels of a thread that are on their way at a time

// The image's row and column at a patch's upper left corner, but the row of the thread's first pixel, and that
// one's column in the patch.
struct Corner { int row, left, across; };

// Fills a patch, of ``area`` pixels, with zeros where there is no image and no channel; and where ``second`` is
// not 0 also one that begins so many pixels behind it.
template <int MOST_CHANNELS>
__device__ __forceinline__ void bring(
    const scalar_t *source, Strides strides, int channels, int height, int width, Patch patch, Corner at, int area,
    unsigned char *pixels, int second
) {
    const scalar_t *planes[MOST_CHANNELS];
#pragma unroll
    for (int c = 0; c < MOST_CHANNELS; ++c) planes[c] = source + (c < channels ? c : 0) * strides.c;
    int row_step = (int)strides.h, column_step = (int)strides.w;
    int down_by = patch.down_by, across_by = patch.across_by;
    int patch_width = patch.width, left = at.left, row = at.row, across = at.across;
    keep(row_step), keep(column_step), keep(down_by), keep(across_by);
    keep(patch_width), keep(height), keep(width);
    Pack<scalar_t, DEPTH> *to = reinterpret_cast<Pack<scalar_t, DEPTH> *>(pixels) + threadIdx.x;
#pragma unroll 1
    for (int over = area - (int)threadIdx.x; over > 0; over -= TOGETHER * THREADS) {
        Pack<scalar_t, DEPTH> fetched[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {  // beyond the patch's end, too, where the image goes on
            const int column = left + across;
            const int place = (int)((unsigned)row * row_step + (unsigned)column * column_step);
            const bool there = inside(row, height) && inside(column, width);
#pragma unroll
            for (int c = 0; c < DEPTH; ++c) {
                fetched[i].number[c] = store(0.0f);
                if (c < MOST_CHANNELS && there && c < channels) fetched[i].number[c] = planes[c][place];
            }
            row += down_by;
            across += across_by;
            if (across >= patch_width) across -= patch_width, ++row;
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            if (over <= i * THREADS) continue;
            to[i * THREADS] = fetched[i];
            if (second != 0) to[second + i * THREADS] = fetched[i];
        }
        to += TOGETHER * THREADS;
    }
}

// The same for any number of channels up to four: three are what images have.
__device__ __forceinline__ void bring_image(
    const scalar_t *source, Strides strides, int channels, int height, int width, Patch patch, Corner at, int area,
    unsigned char *pixels, int second
) {
    if (channels == 3) {
        bring<3>(source, strides, 3, height, width, patch, at, area, pixels, second);
    } else {
        bring<DEPTH>(source, strides, channels, height, width, patch, at, area, pixels, second);
    }
}
