// The gradient of a convolution's weight on tensor cores: for each group and part of the N * P * Q positions
// the matrix product of dy (output channels x positions) with the windows of x (positions x (tap, input
// channel)), as in conv2d_filter_gradient.cu, whose filter_gradient_finish adds the parts up in a fixed order.
//
// A block makes 128 x 128 (256 threads) or 64 x 64 (128 threads) sums, a warp 64 x 32 or 32 x 32. Both factors
// are read where they lie, channels side by side in chunks of 16 bytes (conv2d_tensor_pack.cu), by cp.async
// into a ring of four stages of 64 bytes' worth of positions: 32 in 16 bits, 16 in float32. Here the positions
// are summed over, so a stage's rows are transposed on the way to the tensor core: in 16 bits by ldmatrix;
// float32 has no such load, and its words are read one by one. Rows of a stage are longer than their chunks, by
// 16 bytes (ldmatrix then meets all 32 banks) or by 32 (four rows of eight words do).
//
// Limit: 2 * N * K * P * Q * (C / groups) * R * S operations at the tensor cores' rate, or x and dy once
// through memory, and each part's sums, in float32, written and read. Prediction, not measured: a step of the
// large tile does 64 operations in 16 bits, 32 in tf32, for each byte that comes through L2 (small 32 and 16),
// as in conv2d_tensor.cu. In float32 the fragments take 24 loads of a word for 16 products, four times as many
// instructions as ldmatrix.
//
// Compiled for sm_90, large and small: registers 124 and 80 (16 bits), 126 and 90 (tf32), 177 and 129 (three
// products), shared memory 68 and 36 KiB; of 64 warps 16 and 24, 16 and 20, 8 and 12 are resident.
#include "conv2d_tensor.cuh"

struct TensorFilterGradient {
    long long positions, part;          // N * P * Q, and of a part
    long long x_n, x_h, x_w, dy_pixel;  // strides, in elements, of the factors as they are read
    int groups, K, C;                   // of a group, and not filled up
    int x_chunks, dy_chunks;            // of a group's channels
    int H, W, R, S, P, Q;
    int stride_h, stride_w, top, left, dilation_h, dilation_w;
};

struct Place { int n, p, q; };

__device__ __forceinline__ Place place_of(long long position, const TensorFilterGradient &gradient) {
    const long long row = position / gradient.Q, n = row / gradient.P;
    return {(int)n, (int)(row - n * gradient.P), (int)(position - row * gradient.Q)};
}

// Moves on by as many positions as ``step`` says, which is a place itself: a division once instead of at every
// step.
__device__ __forceinline__ void advance(Place &place, const Place &step, const TensorFilterGradient &gradient) {
    place.q += step.q;
    const int rows = place.q >= gradient.Q;
    place.q -= rows ? gradient.Q : 0;
    place.p += step.p + rows;
    const int images = place.p >= gradient.P;
    place.p -= images ? gradient.P : 0;
    place.n += step.n + images;
}

constexpr int DEPTH = 64 / (int)sizeof(scalar_t);  // positions a step

template <int TILE, int WARP_ROWS, int WARP_COLUMNS>
__device__ __forceinline__ void multiply_positions(
    const scalar_t *x, const scalar_t *dy, float *partial, const TensorFilterGradient &gradient,
    unsigned char *stages
) {
    constexpr int WARPS_ACROSS = TILE / WARP_COLUMNS;
    constexpr int CHUNKS = TILE / CHUNK;  // of a row of a stage
    constexpr int LINE = CHUNKS * 16 + (sizeof(scalar_t) == 2 ? 16 : 32);
    constexpr int STAGE = 2 * DEPTH * LINE;
    constexpr int DOWN = WARP_ROWS / 16, ACROSS = WARP_COLUMNS / 8;
    static_assert(TILE / WARP_ROWS * WARPS_ACROSS * 32 / CHUNKS == DEPTH / 2, "a thread fills two rows");

    const int x_chunks = gradient.R * gradient.S * gradient.x_chunks;
    const int column_tiles = (x_chunks + CHUNKS - 1) / CHUNKS;
    const int row_tiles = (gradient.dy_chunks + CHUNKS - 1) / CHUNKS;
    unsigned block = blockIdx.x;
    const int first_column = block % column_tiles * CHUNKS;  // in chunks
    block /= column_tiles;
    const int first_row = block % row_tiles * CHUNKS;
    block /= row_tiles;
    const int group = block % gradient.groups;
    const long long part = block / gradient.groups;
    const long long first = part * gradient.part, end = min(first + gradient.part, gradient.positions);

    // This thread fetches one chunk of dy and one of a window, of two positions a step.
    const int slot = threadIdx.x / CHUNKS, mine = threadIdx.x % CHUNKS;
    const bool dy_there = first_row + mine < gradient.dy_chunks, x_there = first_column + mine < x_chunks;
    const int tap = (first_column + mine) / gradient.x_chunks;
    const int down = tap / gradient.S * gradient.dilation_h - gradient.top;
    const int across = tap % gradient.S * gradient.dilation_w - gradient.left;
    x += ((long long)group * gradient.x_chunks + (first_column + mine) % gradient.x_chunks) * CHUNK;
    const long long dy_chunk = ((long long)group * gradient.dy_chunks + first_row + mine) * CHUNK;
    const Place advance_by = place_of(DEPTH, gradient);
    Place places[2] = {place_of(first + slot, gradient), place_of(first + slot + DEPTH / 2, gradient)};

    float sums[DOWN][ACROSS][4];
#pragma unroll
    for (int i = 0; i < DOWN; ++i) {
#pragma unroll
        for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[i][j][k] = 0.0f;
        }
    }

    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_row = warp / WARPS_ACROSS * WARP_ROWS, warp_column = warp % WARPS_ACROSS * WARP_COLUMNS;
    const int steps = (int)((end - first + DEPTH - 1) / DEPTH);

    for (int step = 1 - STAGES; step < steps; ++step) {
        const int coming = step + STAGES - 1;
        if (step >= 0) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();  // this step has arrived for all, and the step before has been read by all
        }
        if (coming < steps) {
            unsigned char *to = stages + coming % STAGES * STAGE + slot * LINE + mine * 16;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const long long position = first + (long long)coming * DEPTH + slot + i * (DEPTH / 2);
                const int h = places[i].p * gradient.stride_h + down, w = places[i].q * gradient.stride_w + across;
                const bool here = position < end;
                const bool seen = here && x_there && inside(h, gradient.H) && inside(w, gradient.W);
                const long long from = places[i].n * gradient.x_n + h * gradient.x_h + w * gradient.x_w;
                copy_async<16>(
                    to + i * (DEPTH / 2) * LINE,
                    dy + (here && dy_there ? position * gradient.dy_pixel + dy_chunk : 0),
                    here && dy_there ? 16 : 0
                );
                copy_async<16>(to + (DEPTH + i * (DEPTH / 2)) * LINE, x + (seen ? from : 0), seen ? 16 : 0);
                advance(places[i], advance_by, gradient);
            }
        }
        copy_async_commit();  // an empty group too, so that the number that may be left stays the same
        if (step >= 0) {
            const unsigned char *slopes = stages + step % STAGES * STAGE + warp_row * (int)sizeof(scalar_t);
            const unsigned char *windows =
                stages + step % STAGES * STAGE + DEPTH * LINE + warp_column * (int)sizeof(scalar_t);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                Left left[DOWN];
                Right right[ACROSS];
#if defined(SCALAR_FLOAT32)
                const int line = half * 8 + lane % 4, word = lane / 4;
#pragma unroll
                for (int i = 0; i < DOWN; ++i) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        left[i].word[k] = *reinterpret_cast<const unsigned *>(
                            slopes + (line + k / 2 * 4) * LINE + (i * 16 + k % 2 * 8 + word) * 4
                        );
                    }
                }
#pragma unroll
                for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        right[j].word[k] = *reinterpret_cast<const unsigned *>(
                            windows + (line + k * 4) * LINE + (j * 8 + word) * 4
                        );
                    }
                }
#else
                const int line = half * 16 + lane % 8;
#pragma unroll
                for (int i = 0; i < DOWN; ++i) {
                    load_matrix_transposed(
                        left[i].word, slopes + (line + lane / 16 * 8) * LINE + (i * 2 + lane / 8 % 2) * 16
                    );
                }
#pragma unroll
                for (int j = 0; j < ACROSS; j += 2) {
                    unsigned words[4];
                    load_matrix_transposed(
                        words, windows + (line + lane / 8 % 2 * 8) * LINE + (j + lane / 16) * 16
                    );
                    right[j].word[0] = words[0], right[j].word[1] = words[1];
                    right[j + 1].word[0] = words[2], right[j + 1].word[1] = words[3];
                }
#endif
                multiply_tiles(sums, left, right);
            }
        }
    }
    copy_async_wait_all();

    const int columns = gradient.R * gradient.S * gradient.C;
    const int depth = gradient.x_chunks * CHUNK;  // a tap's channels, filled up
#pragma unroll
    for (int j = 0; j < ACROSS; ++j) {
        const int column = first_column * CHUNK + warp_column + j * 8 + lane % 4 * 2;
        const int column_tap = column / depth, channel = column - column_tap * depth;
        if (column_tap >= gradient.R * gradient.S) continue;
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int row = first_row * CHUNK + warp_row + i * 16 + k / 2 * 8 + lane / 4;
                if (row < gradient.K && channel + k % 2 < gradient.C) {
                    partial[((part * gradient.groups + group) * gradient.K + row) * columns +
                            column_tap * gradient.C + channel + k % 2] = sums[i][j][k];
                }
            }
        }
    }
}

// Grid: the tiles of columns, of rows, the groups and the parts, one within the other. x, dy: channels side by
// side, beginning at multiples of 16 bytes. partial: for every part the weight's sums, ordered (K, R, S, C /
// groups).
extern "C" __global__ void __launch_bounds__(256) filter_gradient_tensor_large(
    const scalar_t *x, const scalar_t *dy, float *partial, TensorFilterGradient gradient
) {
    extern __shared__ __align__(128) unsigned char stages[];
    multiply_positions<128, 64, 32>(x, dy, partial, gradient, stages);
}

extern "C" __global__ void __launch_bounds__(128) filter_gradient_tensor_small(
    const scalar_t *x, const scalar_t *dy, float *partial, TensorFilterGradient gradient
) {
    extern __shared__ __align__(128) unsigned char stages[];
    multiply_positions<64, 32, 32>(x, dy, partial, gradient, stages);
}
