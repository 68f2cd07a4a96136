// Windows of an image as the columns of a matrix (N, C * R * S, P * Q), and back: the adjoint, which adds up what
// overlaps. Limit: memory. im2col reads N*C*H*W elements once (windows overlap in the caches) and writes N*C*R*S*P*Q;
// col2im the other way round.
//
// Neighbouring threads take neighbouring positions of one channel, so that the columns are always read and written
// in order, and a contiguous image too. Of a channels-last image with many channels each access would touch another
// 32-byte sector: there the *_channels_last kernels turn tiles of 32 channels x 32 positions in shared memory.
//
// The grid has a thread (or a tile's line) for every position p * Q + q of a plane along x, and walks through the
// planes (n, c) along y. A plane has fewer than 2^31 positions, an array may have more elements.
//
// Windows of 3 x 3 on contiguous images, whose columns of a plane are fewer than 2^31 too, have kernels (``planes``)
// in which a thread works out once, for several planes, where its window's places or its pixel's columns are; their
// loads are then under way together. By the compiled code for sm_90, not measured, a plane of 3 x 3 takes
// 65 instructions a position in float32 and 79 in bfloat16 (nine numbers are written; the general loop has 22 for
// each), and a pixel's nine columns take 57 and 79 (the general loop has some 50 for each). An H200's memory leaves
// time for some 310 and 155.
#include "packs.cuh"

struct Window {
    long long planes;      // N * C
    long long n, c, h, w;  // strides of the image, in elements
    int C, H, W, R, S, P, Q;
    int stride_h, stride_w, top, left, dilation_h, dilation_w;
};

extern "C" __global__ void __launch_bounds__(256) im2col(const scalar_t *x, scalar_t *columns, Window window) {
    const int positions = window.P * window.Q;
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= positions) return;
    const int p = position / window.Q, q = position - p * window.Q;
    for (long long plane = (long long)blockIdx.y * blockDim.y + threadIdx.y; plane < window.planes;
         plane += (long long)gridDim.y * blockDim.y) {
        const long long n = plane / window.C;
        const scalar_t *image = x + n * window.n + (plane - n * window.C) * window.c;
        scalar_t *column = columns + plane * window.R * window.S * positions + position;
        for (int r = 0; r < window.R; ++r) {
            const int h = p * window.stride_h - window.top + r * window.dilation_h;
            for (int s = 0; s < window.S; ++s) {
                const int w = q * window.stride_w - window.left + s * window.dilation_w;
                const bool inside = h >= 0 && h < window.H && w >= 0 && w < window.W;
                *column = inside ? image[h * window.h + w * window.w] : store(NUMBER(0));
                column += positions;
            }
        }
    }
}

// A block turns a tile for every kernel position: 32 positions, and 32 channels of an image (a row of tiles).
extern "C" __global__ void __launch_bounds__(256) im2col_channels_last(
    const scalar_t *x, scalar_t *columns, Window window
) {
    __shared__ accumulate_t tile[32][33];
    const int positions = window.P * window.Q, places = window.R * window.S;
    const int tiles = (window.C + 31) / 32;
    const long long rows = window.planes / window.C * tiles;
    const unsigned first = blockIdx.x * 32;
    for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
        const long long n = row / tiles;
        const int channel = (int)(row - n * tiles) * 32;
        const scalar_t *image = x + n * window.n + (channel + threadIdx.x) * window.c;
        for (int place = 0; place < places; ++place) {
            const int r = place / window.S, s = place - r * window.S;
            #pragma unroll 1
            for (int line = threadIdx.y; line < 32; line += 8) {
                const int p = (first + line) / window.Q, q = first + line - p * window.Q;
                const int h = p * window.stride_h - window.top + r * window.dilation_h;
                const int w = q * window.stride_w - window.left + s * window.dilation_w;
                const bool inside = p < window.P && h >= 0 && h < window.H && w >= 0 && w < window.W &&
                                    channel + threadIdx.x < window.C;
                tile[line][threadIdx.x] = inside ? load(image[h * window.h + w * window.w]) : NUMBER(0);
            }
            __syncthreads();
            if (first + threadIdx.x < positions) {
                for (int line = threadIdx.y; line < 32 && channel + line < window.C; line += 8) {
                    const long long at = ((n * window.C + channel + line) * places + place) * positions;
                    columns[at + first + threadIdx.x] = store(tile[threadIdx.x][line]);
                }
            }
            __syncthreads();
        }
    }
}

// The sum, in a fixed order, of all columns that hold the image's element (h, w) of a plane. The columns are in one
// of two precisions: where a matrix product made them in the accumulating type, the image is rounded once.
__device__ __forceinline__ accumulate_t gathered(
    const scalar_t *columns, const accumulate_t *wide, const Window &window, long long plane, int h, int w
) {
    accumulate_t sum = NUMBER(0);
    for (int r = 0; r < window.R; ++r) {
        const int below = h + window.top - r * window.dilation_h;  // the window's first row, from the padding's top
        const int p = below / window.stride_h;
        if (below < 0 || p * window.stride_h != below || p >= window.P) continue;
        const long long row = (plane * window.R + r) * window.S;
        #pragma unroll 1
        for (int s = 0; s < window.S; ++s) {
            const int right = w + window.left - s * window.dilation_w;
            const int q = right / window.stride_w;
            if (right < 0 || q * window.stride_w != right || q >= window.Q) continue;
            const long long at = ((row + s) * window.P + p) * window.Q + q;
            sum += wide ? wide[at] : load(columns[at]);
        }
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(256) col2im_gather(
    const scalar_t *columns, const accumulate_t *wide, scalar_t *x, Window window
) {
    const unsigned pixel = blockIdx.x * blockDim.x + threadIdx.x;
    const int h = pixel / window.W, w = pixel - h * window.W;
    if (h >= window.H) return;
    for (long long plane = (long long)blockIdx.y * blockDim.y + threadIdx.y; plane < window.planes;
         plane += (long long)gridDim.y * blockDim.y) {
        const long long n = plane / window.C;
        scalar_t *image = x + n * window.n + (plane - n * window.C) * window.c;
        image[h * window.h + w * window.w] = store(gathered(columns, wide, window, plane, h, w));
    }
}

extern "C" __global__ void __launch_bounds__(256, 6) col2im_gather_channels_last(
    const scalar_t *columns, const accumulate_t *wide, scalar_t *x, Window window
) {
    __shared__ accumulate_t tile[32][33];
    const int tiles = (window.C + 31) / 32;
    const long long rows = window.planes / window.C * tiles;
    const unsigned first = blockIdx.x * 32;
    for (long long row = blockIdx.y; row < rows; row += gridDim.y) {
        const long long n = row / tiles;
        const int channel = (int)(row - n * tiles) * 32;
        const int h = (first + threadIdx.x) / window.W, w = first + threadIdx.x - h * window.W;
        if (h < window.H) {
            #pragma unroll 1
            for (int line = threadIdx.y; line < 32 && channel + line < window.C; line += 8) {
                tile[line][threadIdx.x] =
                    gathered(columns, wide, window, n * window.C + channel + line, h, w);
            }
        }
        __syncthreads();
        if (channel + threadIdx.x < window.C) {
            // Of a channels-last image the pixels lie one after the other, so one stride serves rows and columns.
            const long long pixels = (long long)window.H * window.W;
            scalar_t *image = x + n * window.n + (channel + threadIdx.x) * window.c;
            #pragma unroll 1
            for (int line = threadIdx.y; line < 32 && first + line < pixels; line += 8) {
                image[(long long)(first + line) * window.C] = store(tile[threadIdx.x][line]);
            }
        }
        __syncthreads();
    }
}

// ---------------------------------------------------------------- windows of 3 x 3, contiguous images

constexpr int SIZE = 3, PLACES = SIZE * SIZE;

__device__ __forceinline__ void columns_of_planes(const scalar_t *x, scalar_t *columns, const Window &window) {
    const int positions = window.P * window.Q, pixels = window.H * window.W;
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= positions) return;
    const int p = position / window.Q, q = position - p * window.Q;
    int places[PLACES];  // below 0 in the padding
#pragma unroll
    for (int k = 0; k < PLACES; ++k) {
        const int h = p * window.stride_h - window.top + k / SIZE * window.dilation_h;
        const int w = q * window.stride_w - window.left + k % SIZE * window.dilation_w;
        places[k] = h >= 0 && h < window.H && w >= 0 && w < window.W ? h * window.W + w : -1;
    }
    const int step = gridDim.y * blockDim.y;
    long long plane = (long long)blockIdx.y * blockDim.y + threadIdx.y;
    const scalar_t *image = x + plane * pixels;
    scalar_t *column = columns + plane * PLACES * positions + position;
#pragma unroll 1
    for (; plane < window.planes; plane += step) {
        scalar_t values[PLACES];
#pragma unroll
        for (int k = 0; k < PLACES; ++k) values[k] = places[k] >= 0 ? image[places[k]] : store(NUMBER(0));
#pragma unroll
        for (int k = 0; k < PLACES; ++k) column[k * positions] = values[k];
        image += (long long)step * pixels;
        column += (long long)step * PLACES * positions;
    }
}

// In the order of ``gathered``.
template <typename T>
__device__ __forceinline__ void images_of_planes(const T *columns, scalar_t *x, const Window &window) {
    const int positions = window.P * window.Q, pixels = window.H * window.W;
    const unsigned pixel = blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel >= pixels) return;
    const int h = pixel / window.W, w = pixel - h * window.W;
    int places[PLACES];  // below 0 where no column holds the pixel at this place of its window
#pragma unroll
    for (int k = 0; k < PLACES; ++k) {
        const int below = h + window.top - k / SIZE * window.dilation_h;
        const int right = w + window.left - k % SIZE * window.dilation_w;
        const int p = below / window.stride_h, q = right / window.stride_w;
        const bool holds = below >= 0 && p * window.stride_h == below && p < window.P && right >= 0 &&
                           q * window.stride_w == right && q < window.Q;
        places[k] = holds ? k * positions + p * window.Q + q : -1;
    }
    const int step = gridDim.y * blockDim.y;
    long long plane = (long long)blockIdx.y * blockDim.y + threadIdx.y;
    const T *source = columns + plane * PLACES * positions;
    scalar_t *target = x + plane * pixels + pixel;
#pragma unroll 1
    for (; plane < window.planes; plane += step) {
        T values[PLACES];
#pragma unroll
        for (int k = 0; k < PLACES; ++k) values[k] = places[k] >= 0 ? source[places[k]] : stored_as<T>(NUMBER(0));
        accumulate_t sum = NUMBER(0);
#pragma unroll
        for (int k = 0; k < PLACES; ++k) sum += load(values[k]);
        *target = store(sum);
        source += (long long)step * PLACES * positions;
        target += (long long)step * pixels;
    }
}

extern "C" __global__ void __launch_bounds__(256, 3) im2col_planes(
    const scalar_t *x, scalar_t *columns, Window window
) {
    columns_of_planes(x, columns, window);
}

extern "C" __global__ void __launch_bounds__(256, 4) col2im_gather_planes(
    const scalar_t *columns, const accumulate_t *wide, scalar_t *x, Window window
) {
    if (wide) {
        images_of_planes(wide, x, window);
    } else {
        images_of_planes(columns, x, window);
    }
}

// Every column adds to its pixels, in whatever order the threads come: the last bits differ from run to run. The
// image has been cleared.
extern "C" __global__ void __launch_bounds__(256) col2im_scatter(
    const scalar_t *columns, const accumulate_t *wide, accumulate_t *image, Window window
) {
    const int positions = window.P * window.Q;
    const unsigned position = blockIdx.x * blockDim.x + threadIdx.x;
    if (position >= positions) return;
    const int p = position / window.Q, q = position - p * window.Q;
    for (long long plane = (long long)blockIdx.y * blockDim.y + threadIdx.y; plane < window.planes;
         plane += (long long)gridDim.y * blockDim.y) {
        const long long n = plane / window.C;
        accumulate_t *target = image + n * window.n + (plane - n * window.C) * window.c;
        long long at = plane * window.R * window.S * positions + position;
        for (int r = 0; r < window.R; ++r) {
            const int h = p * window.stride_h - window.top + r * window.dilation_h;
            for (int s = 0; s < window.S; ++s) {
                const int w = q * window.stride_w - window.left + s * window.dilation_w;
                if (h >= 0 && h < window.H && w >= 0 && w < window.W) {
                    atomicAdd(&target[h * window.h + w * window.w], wide ? wide[at] : load(columns[at]));
                }
                at += positions;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) col2im_clear(accumulate_t *image, long long count) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) image[i] = NUMBER(0);
}

// From the workspace of a scatter in half precision, which lies in memory as x does.
extern "C" __global__ void __launch_bounds__(256) col2im_round(
    const accumulate_t *image, scalar_t *x, long long count
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) x[i] = store(image[i]);
}
