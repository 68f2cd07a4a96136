// The gradient of a convolution's weight on tensor cores: for each group and part of the N * P * Q positions
// the matrix product of dy (output channels x positions) with the windows of x (positions x (tap, input
// channel)), as in conv2d_filter_gradient.cu, whose filter_gradient_finish adds the parts up in a fixed order.
//
// A block of four warps, two by two, makes 128 x 128 (large, of three products 128 x 64), 64 x 192 (broad, of three
// products 64 x 96), 64 x 128 (medium) or 64 x 64 (small) sums. Both factors are read where they lie, channels side by side in chunks of 16 bytes
// (conv2d_tensor_pack.cu), by cp.async into a ring of four stages of 64 bytes' worth of positions: 32 in 16 bits,
// 16 in float32. A thread fetches every fourth (eighth) chunk of one position, so that it keeps up with one window
// a step, by additions. Here the positions are summed over, so a stage's rows are transposed on the way to the
// tensor core: in 16 bits by ldmatrix; float32 has no such load, and its words are read one by one, or two
// neighbouring channels that are made two rows of the product. Rows of a stage are longer than their chunks, by
// 16 bytes (ldmatrix then meets all 32 banks) or by 32 (four rows of eight words do).
//
// Limit: 2 * N * K * P * Q * (C / groups) * R * S operations at the tensor cores' rate, or x and dy once through
// memory, and each part's sums, in float32, written and read. What follows is counted in the code compiled for
// sm_90, not measured: a step of the large tile takes 163 instructions by the warp for 64 products of 16 x 8 in
// 16 bits, 264 in tf32 (of them 64 rounding and 48 loading fragments), and of three products 466 for 96. For
// each byte that comes through L2 it does 64 operations in 16 bits, 32 in tf32 (broad 48 and 24, medium 43 and 21,
// small 32 and 16); by an L2 of 5.5 TB/s, an estimate for the H200, that is 350 and 175 TFLOP/s. The broad one, 161
// instructions for 48 products in 16 bits, is for 64 output channels: 3 x 3 taps of 64 input channels are 576
// columns, three of its tiles, where the medium one's five take a quarter more from L2.
//
// Compiled for sm_90, large, broad, medium and small: registers 236, 222, 166 and 78 (16 bits), 222, 190, 152 and 94
// (tf32), 202, 184, 226 and 96 (three products), shared memory 70, 70, 53 and 37 KiB.
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

// Where the window of a position begins: its first row and column, inside of the image or not, and its bytes.
struct Corner { int h, w; long long at; };

__device__ __forceinline__ Corner corner_of(const Place &place, const TensorFilterGradient &gradient) {
    const int h = place.p * gradient.stride_h - gradient.top, w = place.q * gradient.stride_w - gradient.left;
    return {h, w, (place.n * gradient.x_n + h * gradient.x_h + w * gradient.x_w) * (int)sizeof(scalar_t)};
}

// How a corner moves on from step to step, and what it goes back by at the ends of a row and of an image:
// additions instead of divisions.
struct Advance {
    Corner step, row, image;
    int h_end, w_end;
};

__device__ __forceinline__ Advance advance_of(int positions, const TensorFilterGradient &gradient) {
    const Place by = place_of(positions, gradient);
    const int item = sizeof(scalar_t);
    const int down = gradient.stride_h, across = gradient.Q * gradient.stride_w, whole = gradient.P * down;
    return {
        {by.p * down, by.q * gradient.stride_w,
         (by.n * gradient.x_n + (long long)by.p * down * gradient.x_h +
          (long long)by.q * gradient.stride_w * gradient.x_w) * item},
        {down, across, (down * gradient.x_h - across * gradient.x_w) * item},
        {whole, 0, (gradient.x_n - whole * gradient.x_h) * item},
        whole - gradient.top, across - gradient.left
    };
}

__device__ __forceinline__ void advance(Corner &corner, const Advance &by) {
    corner.h += by.step.h;
    corner.w += by.step.w;
    corner.at += by.step.at;
    if (corner.w >= by.w_end) {
        corner.w -= by.row.w;
        corner.h += by.row.h;
        corner.at += by.row.at;
    }
    if (corner.h >= by.h_end) {
        corner.h -= by.image.h;
        corner.at += by.image.at;
    }
}

constexpr int DEPTH = 64 / (int)sizeof(scalar_t);  // positions a step
constexpr int THREADS = 128;                       // four warps, two by two
constexpr int LANES = THREADS / DEPTH;             // threads that fill a row of a stage

// Columns of a warp's tile of the large and of the broad kernel: the parts of split numbers take the registers that
// more would.
constexpr int WARP_COLUMNS = PRODUCTS == 3 ? 32 : 64, BROAD_COLUMNS = PRODUCTS == 3 ? 48 : 96;

// As in conv2d_tensor.cu.
constexpr int HALVES = PRODUCTS == 3 ? 1 : 2;

constexpr bool FLOAT32 = sizeof(scalar_t) == 4;

constexpr int NOWHERE = -(1 << 30);  // outside at every position

// The row of a stage that a thread fills. Of four threads a row, neighbouring fours take rows that are four
// apart: eight threads then write to all 32 banks.
__device__ __forceinline__ int row_of_thread() {
    const int four = threadIdx.x / LANES;
    return LANES == 4 ? (four & ~7) | (four & 1) << 2 | (four >> 1 & 3) : four;
}

struct Pair { int row, tap, channel; };

#if PRODUCTS == 3
// A sum without tensor cores, as in conv2d_tensor.cu.
__device__ __forceinline__ float plain_sum(
    const scalar_t *x, const scalar_t *dy, int tap, long long first, long long end,
    const TensorFilterGradient &gradient
) {
    const int down = tap / gradient.S * gradient.dilation_h, across = tap % gradient.S * gradient.dilation_w;
    float sum = 0.0f;
#pragma unroll 1
    for (long long position = first; position < end && sum == sum; ++position) {
        const Corner corner = corner_of(place_of(position, gradient), gradient);
        const int h = corner.h + down, w = corner.w + across;
        if (!inside(h, gradient.H) || !inside(w, gradient.W)) continue;
        const long long at = corner.at / (int)sizeof(scalar_t) + down * gradient.x_h + across * gradient.x_w;
        sum = fmaf(dy[position * gradient.dy_pixel], x[at], sum);
    }
    return sum;
}
#endif

template <int WARP_HEIGHT, int WARP_WIDTH>
__device__ __forceinline__ void multiply_positions(
    const scalar_t *x, const scalar_t *dy, float *partial, const TensorFilterGradient &gradient,
    unsigned char *stages
) {
    constexpr int ROW_CHUNKS = 2 * WARP_HEIGHT / CHUNK, COLUMN_CHUNKS = 2 * WARP_WIDTH / CHUNK;  // of the block
    constexpr int MORE = sizeof(scalar_t) == 2 ? 16 : 32;
    constexpr int DY_LINE = ROW_CHUNKS * 16 + MORE, X_LINE = COLUMN_CHUNKS * 16 + MORE;
    constexpr int STAGE = DEPTH * (DY_LINE + X_LINE);
    constexpr int DOWN = WARP_HEIGHT / 16, ACROSS = WARP_WIDTH / 8;
    constexpr int DY_LOADS = ROW_CHUNKS / LANES, X_LOADS = COLUMN_CHUNKS / LANES;

    const int x_chunks = gradient.R * gradient.S * gradient.x_chunks;
    const int column_tiles = (x_chunks + COLUMN_CHUNKS - 1) / COLUMN_CHUNKS;
    const int row_tiles = (gradient.dy_chunks + ROW_CHUNKS - 1) / ROW_CHUNKS;
    unsigned block = blockIdx.x;
    const int first_column = block % column_tiles * COLUMN_CHUNKS;  // in chunks
    block /= column_tiles;
    const int first_row = block % row_tiles * ROW_CHUNKS;
    block /= row_tiles;
    const int group = block % gradient.groups;
    const long long part = block / gradient.groups;
    const long long first = part * gradient.part, end = min(first + gradient.part, gradient.positions);
    const int steps = (int)((end - first + DEPTH - 1) / DEPTH);

    // This thread fetches every LANES-th chunk of one row of a stage: of dy and of the window of one position.
    const int slot = row_of_thread(), mine = threadIdx.x % LANES;
    const int my_steps = steps - (first + (long long)(steps - 1) * DEPTH + slot >= end);
    const long long dy_at = (first + slot) * gradient.dy_pixel +
                            ((long long)group * gradient.dy_chunks + first_row + mine) * CHUNK;
    const char *slope = reinterpret_cast<const char *>(dy + dy_at);
    const long long slope_step = DEPTH * gradient.dy_pixel * (int)sizeof(scalar_t);
    unsigned rows = 0;  // bits of the chunks of dy that there are
#pragma unroll
    for (int i = 0; i < DY_LOADS; ++i) rows |= (unsigned)(first_row + mine + i * LANES < gradient.dy_chunks) << i;
    const char *taps[X_LOADS];  // of each chunk of a window its place in that of the image's first pixel
    int down[X_LOADS], across[X_LOADS];
#pragma unroll
    for (int i = 0; i < X_LOADS; ++i) {
        const int column = first_column + mine + i * LANES, tap = column / gradient.x_chunks;
        const int r = tap / gradient.S, s = tap - r * gradient.S;
        down[i] = column < x_chunks ? r * gradient.dilation_h : NOWHERE;
        across[i] = s * gradient.dilation_w;
        taps[i] = reinterpret_cast<const char *>(
            x + r * gradient.dilation_h * gradient.x_h + across[i] * gradient.x_w +
            ((long long)group * gradient.x_chunks + column - tap * gradient.x_chunks) * CHUNK
        );
        keep(taps[i]);
    }
    Corner corner = corner_of(place_of(first + slot, gradient), gradient);
    const Advance by = advance_of(DEPTH, gradient);
    const SharedPlace fetched = shared_place(stages) + slot * DY_LINE + mine * 16;
    const SharedPlace fetched_x = shared_place(stages) + DEPTH * DY_LINE + slot * X_LINE + mine * 16;
    const auto fetch = [&](int coming, int stage) {
        const bool here = coming < my_steps;
        const unsigned rows_here = here ? rows : 0u;
#pragma unroll
        for (int i = 0; i < DY_LOADS; ++i) {
            copy_async_or_zero(fetched + stage + i * LANES * 16, slope + i * LANES * 16, rows_here & 1u << i);
        }
#pragma unroll
        for (int i = 0; i < X_LOADS; ++i) {
            const bool seen =
                here && inside(corner.h + down[i], gradient.H) && inside(corner.w + across[i], gradient.W);
            copy_async_or_zero(fetched_x + stage + i * LANES * 16, taps[i] + corner.at, seen);
        }
        slope += slope_step;
        advance(corner, by);
    };

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
    const int warp_row = warp / 2 * WARP_HEIGHT, warp_column = warp % 2 * WARP_WIDTH;
#if defined(SCALAR_FLOAT32)
    const float *slopes = reinterpret_cast<const float *>(stages + lane % 4 * DY_LINE) + warp_row + lane / 4 * 2;
    const float *windows =
        reinterpret_cast<const float *>(stages + DEPTH * DY_LINE + lane % 4 * X_LINE) + warp_column + lane / 4;
#else
    SharedPlace slopes =
        shared_place(stages) + (lane % 8 + lane / 16 * 8) * DY_LINE + warp_row * 2 + lane / 8 % 2 * 16;
    SharedPlace windows = shared_place(stages) + DEPTH * DY_LINE + (lane % 8 + lane / 8 % 2 * 8) * X_LINE +
                          warp_column * 2 + lane / 16 * 16;
    keep(slopes);
    keep(windows);
#endif

#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) {
        if (step < steps) fetch(step, step * STAGE);
        copy_async_commit();  // an empty group too, so that the number that may be left stays the same
    }
    int reading = 0, writing = (STAGES - 1) * STAGE;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // this step has arrived for all, and the step before has been read by all
        if (step + STAGES - 1 < steps) fetch(step + STAGES - 1, writing);
        copy_async_commit();
#pragma unroll(HALVES)
        for (int half = 0; half < 2; ++half) {
            Right right[ACROSS];
#if defined(SCALAR_FLOAT32)
            const float *left_words = slopes + reading / 4 + half * 2 * DY_LINE;
            const float *right_words = windows + reading / 4 + half * 2 * X_LINE;
#pragma unroll
            for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
                for (int k = 0; k < 2; ++k) right[j].word[k] = __float_as_uint(right_words[k * X_LINE + j * 8]);
            }
#else
#pragma unroll
            for (int j = 0; j < ACROSS; j += 2) {
                unsigned words[4];
                load_matrix_transposed(words, windows + reading + half * 16 * X_LINE + j * 16);
                right[j].word[0] = words[0], right[j].word[1] = words[1];
                right[j + 1].word[0] = words[2], right[j + 1].word[1] = words[3];
            }
#endif
            prepare_all(right);
#pragma unroll
            for (int i = 0; i < DOWN; ++i) {
                Left left;
#if defined(SCALAR_FLOAT32)
#pragma unroll
                for (int k = 0; k < 2; ++k) {  // rows g and g + 8 are neighbouring channels: pair_of
                    const float2 two = *reinterpret_cast<const float2 *>(left_words + k * DY_LINE + i * 16);
                    left.word[2 * k] = __float_as_uint(two.x), left.word[2 * k + 1] = __float_as_uint(two.y);
                }
#else
                load_matrix_transposed(left.word, slopes + reading + half * 16 * DY_LINE + i * 32);
#endif
                multiply_row(sums[i], left, right);
            }
        }
        writing = reading;
        reading = reading == (STAGES - 1) * STAGE ? 0 : reading + STAGE;
    }
    copy_async_wait_all();

    // Where the lane's sums go, in the order K, R, S, C / groups, two neighbouring channels of a row at a time.
    const int columns = gradient.R * gradient.S * gradient.C;
    const int depth = gradient.x_chunks * CHUNK;  // a tap's channels, filled up
    partial += (part * gradient.groups + group) * gradient.K * columns;
    const auto pair_of = [&](int i, int j, int lower) {
        const int row_of_tile = FLOAT32 ? lane / 4 * 2 + lower : lane / 4 + lower * 8;
        const int row = first_row * CHUNK + warp_row + i * 16 + row_of_tile;
        const int column = first_column * CHUNK + warp_column + j * 8 + lane % 4 * 2, tap = column / depth;
        return Pair{row < gradient.K && tap < gradient.R * gradient.S ? row : -1, tap, column - tap * depth};
    };
    int lost = 0;  // whether a sum of three products is
#pragma unroll
    for (int j = 0; j < ACROSS; ++j) {
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Pair pair = pair_of(i, j, k / 2);
                if (pair.row >= 0 && pair.channel + k % 2 < gradient.C) {
                    lost |= !finite(sums[i][j][k]);
                    partial[(long long)pair.row * columns + pair.tap * gradient.C + pair.channel + k % 2] =
                        sums[i][j][k];
                }
            }
        }
    }
#if PRODUCTS == 3
    if (!lost) return;
#pragma unroll 1
    for (int number = 0; number < DOWN * ACROSS * 4; ++number) {
        const Pair pair = pair_of(number / (ACROSS * 4), number / 4 % ACROSS, number / 2 % 2);
        const int channel = pair.channel + number % 2;
        if (pair.row < 0 || channel >= gradient.C) continue;
        float &made = partial[(long long)pair.row * columns + pair.tap * gradient.C + channel];
        if (finite(made)) continue;
        made = plain_sum(
            x + (long long)group * depth + channel, dy + (long long)group * gradient.dy_chunks * CHUNK + pair.row,
            pair.tap, first, end, gradient
        );
    }
#endif
}

// Grid: the tiles of columns, of rows, the groups and the parts, one within the other. x, dy: channels side by
// side, beginning at multiples of 16 bytes. partial: for every part the weight's sums, ordered (K, R, S, C /
// groups).
extern "C" __global__ void __launch_bounds__(128, 2) filter_gradient_tensor_large(
    const scalar_t *x, const scalar_t *dy, float *partial, TensorFilterGradient gradient
) {
    extern __shared__ __align__(128) unsigned char stages[];
    multiply_positions<64, WARP_COLUMNS>(x, dy, partial, gradient, stages);
}

extern "C" __global__ void __launch_bounds__(128, 2) filter_gradient_tensor_broad(
    const scalar_t *x, const scalar_t *dy, float *partial, TensorFilterGradient gradient
) {
    extern __shared__ __align__(128) unsigned char stages[];
    multiply_positions<32, BROAD_COLUMNS>(x, dy, partial, gradient, stages);
}

extern "C" __global__ void __launch_bounds__(128, 2) filter_gradient_tensor_medium(
    const scalar_t *x, const scalar_t *dy, float *partial, TensorFilterGradient gradient
) {
    extern __shared__ __align__(128) unsigned char stages[];
    multiply_positions<32, 64>(x, dy, partial, gradient, stages);
}

extern "C" __global__ void __launch_bounds__(128) filter_gradient_tensor_small(
    const scalar_t *x, const scalar_t *dy, float *partial, TensorFilterGradient gradient
) {
    extern __shared__ __align__(128) unsigned char stages[];
    multiply_positions<32, 32>(x, dy, partial, gradient, stages);
}
