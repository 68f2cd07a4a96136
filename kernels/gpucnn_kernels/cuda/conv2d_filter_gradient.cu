// The gradient of a convolution's weight. For every group it is a matrix product over the batch's N * P * Q
// positions, of dy (output channels x positions) with the windows of x (positions x columns, a column being a kernel
// position of an input channel). It does 2*N*K*P*Q*C/groups*R*S operations on N*K*P*Q + N*C*H*W elements: arithmetic
// limits it but for few channels, where memory does.
//
// The result is small and the sum long, so the positions are split into parts, which blocks sum side by side into
// rows of a workspace in the accumulating type; filter_gradient_finish adds the parts up in a fixed order. Nothing
// depends on the order of blocks or threads.
//
// Columns run c, r, s for a contiguous result and r, s, c for a channels-last one, so that neighbouring threads
// meet neighbouring memory where they write and, where x has the same layout, where they read.
#include "scalar.cuh"

struct FilterGradient {
    long long positions;               // N * P * Q
    long long part;                    // positions of a part
    long long x_n, x_c, x_h, x_w;      // strides, in elements
    long long dy_n, dy_k, dy_p, dy_q;
    int groups, K, C, columns;         // of a group: output channels, input channels, C * R * S
    int H, W, R, S, P, Q;
    int stride_h, stride_w, top, left, dilation_h, dilation_w;
    bool channels_fastest;             // columns run r, s, c
    bool x_across, dy_across;          // neighbours in memory are channels and not positions
};

struct Place {
    int n, p, q;
};

__device__ __forceinline__ Place place_of(long long position, const FilterGradient &gradient) {
    const long long row = position / gradient.Q, n = row / gradient.P;
    return {(int)n, (int)(row - n * gradient.P), (int)(position - row * gradient.Q)};
}

// Moves on by as many positions as ``step`` says, which is a place itself: a division once instead of at every step.
__device__ __forceinline__ void advance(Place &place, const Place &step, const FilterGradient &gradient) {
    place.q += step.q;
    const int rows = place.q >= gradient.Q;
    place.q -= rows ? gradient.Q : 0;
    place.p += step.p + rows;
    const int images = place.p >= gradient.P;
    place.p -= images ? gradient.P : 0;
    place.n += step.n + images;
}

// Where column ``j`` of a group looks, relative to a window's first pixel.
struct Column {
    int c, down, right;
};

__device__ __forceinline__ Column column_of(int j, const FilterGradient &gradient) {
    const int places = gradient.R * gradient.S;
    const int c = gradient.channels_fastest ? j % gradient.C : j / places;
    const int place = gradient.channels_fastest ? j / gradient.C : j - c * places;
    const int r = place / gradient.S;
    return {c, r * gradient.dilation_h, (place - r * gradient.S) * gradient.dilation_w};
}

// ---------------------------------------------------------------- the matrix product

// A block makes a tile of 16 * MICRO output channels by as many columns, 256 threads MICRO x MICRO numbers each. In
// steps of 16 positions it loads both factors to shared memory, and while it multiplies one step it already waits
// for the next one's numbers in registers. A thread loads one position of MICRO rows that are 16 apart: the 16
// neighbouring threads are positions where those are neighbours in memory, otherwise rows.
template <int MICRO>
__device__ __forceinline__ void multiply_tile(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, const FilterGradient &gradient,
    accumulate_t *dy_tile, accumulate_t *x_tile
) {
    constexpr int TILE = 16 * MICRO;
    constexpr int LINE = TILE + 4;  // keeps 16-byte alignment, and spreads the stores over the banks
    const int outer = threadIdx.x / 16, inner = threadIdx.x % 16;

    const unsigned column_tiles = (gradient.columns + TILE - 1) / TILE, row_tiles = (gradient.K + TILE - 1) / TILE;
    unsigned block = blockIdx.x;
    const int first_column = block % column_tiles * TILE;
    block /= column_tiles;
    const int first_row = block % row_tiles * TILE;
    block /= row_tiles;
    const int group = block % gradient.groups;
    const long long part = block / gradient.groups;
    const long long first = part * gradient.part;
    const long long end = min(first + gradient.part, gradient.positions);

    const int dy_slot = gradient.dy_across ? outer : inner, dy_row = gradient.dy_across ? inner : outer;
    const int x_slot = gradient.x_across ? outer : inner, x_column = gradient.x_across ? inner : outer;
    const Place step = place_of(16, gradient);
    Place dy_place = place_of(first + dy_slot, gradient), x_place = place_of(first + x_slot, gradient);
    int down[MICRO], right[MICRO];
    long long offset[MICRO];
    #pragma unroll
    for (int i = 0; i < MICRO; ++i) {
        const int j = first_column + x_column + 16 * i;
        const Column column = column_of(j, gradient);
        down[i] = j < gradient.columns ? column.down : -(1 << 30);  // outside of every image
        right[i] = column.right;
        offset[i] = ((long long)group * gradient.C + column.c) * gradient.x_c + column.down * gradient.x_h +
                    column.right * gradient.x_w;
    }
    accumulate_t next_dy[MICRO], next_x[MICRO], sums[MICRO][MICRO];
    #pragma unroll
    for (int i = 0; i < MICRO; ++i) {
        #pragma unroll
        for (int j = 0; j < MICRO; ++j) sums[i][j] = NUMBER(0);
    }

    for (long long done = first; done < end + 16; done += 16) {
        if (done > first) {
            __syncthreads();  // the tiles of the step before have been read
            #pragma unroll
            for (int i = 0; i < MICRO; ++i) {
                dy_tile[dy_slot * LINE + dy_row + 16 * i] = next_dy[i];
                x_tile[x_slot * LINE + x_column + 16 * i] = next_x[i];
            }
            __syncthreads();
        }
        if (done < end) {
            const long long dy_at = dy_place.n * gradient.dy_n + dy_place.p * gradient.dy_p +
                                    dy_place.q * gradient.dy_q +
                                    ((long long)group * gradient.K + first_row + dy_row) * gradient.dy_k;
            const int h = x_place.p * gradient.stride_h - gradient.top;
            const int w = x_place.q * gradient.stride_w - gradient.left;
            const long long x_at = x_place.n * gradient.x_n + h * gradient.x_h + w * gradient.x_w;
            const bool dy_there = done + dy_slot < end, x_there = done + x_slot < end;
            #pragma unroll
            for (int i = 0; i < MICRO; ++i) {
                next_dy[i] = dy_there && first_row + dy_row + 16 * i < gradient.K
                                 ? load(dy[dy_at + 16 * i * gradient.dy_k])
                                 : NUMBER(0);
                const bool inside = x_there && h + down[i] >= 0 && h + down[i] < gradient.H && w + right[i] >= 0 &&
                                    w + right[i] < gradient.W;
                next_x[i] = inside ? load(x[x_at + offset[i]]) : NUMBER(0);
            }
            advance(dy_place, step, gradient);
            advance(x_place, step, gradient);
        }
        if (done > first) {
            #pragma unroll
            for (int slot = 0; slot < 16; ++slot) {
                accumulate_t rows[MICRO], columns[MICRO];
                #pragma unroll
                for (int i = 0; i < MICRO; ++i) {
                    rows[i] = dy_tile[slot * LINE + outer * MICRO + i];
                    columns[i] = x_tile[slot * LINE + inner * MICRO + i];
                }
                #pragma unroll
                for (int i = 0; i < MICRO; ++i) {
                    #pragma unroll
                    for (int j = 0; j < MICRO; ++j) sums[i][j] += rows[i] * columns[j];
                }
            }
        }
    }

    #pragma unroll
    for (int i = 0; i < MICRO; ++i) {
        const int k = first_row + outer * MICRO + i;
        if (k >= gradient.K) break;
        const long long row = (part * gradient.groups + group) * gradient.K + k;
        #pragma unroll
        for (int j = 0; j < MICRO; ++j) {
            const int column = first_column + inner * MICRO + j;
            if (column < gradient.columns) partial[row * gradient.columns + column] = sums[i][j];
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) filter_gradient_wide(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, FilterGradient gradient
) {
    __shared__ __align__(16) accumulate_t dy_tile[16 * 68];
    __shared__ __align__(16) accumulate_t x_tile[16 * 68];
    multiply_tile<4>(x, dy, partial, gradient, dy_tile, x_tile);
}

extern "C" __global__ void __launch_bounds__(256, 4) filter_gradient_narrow(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, FilterGradient gradient
) {
    __shared__ __align__(16) accumulate_t dy_tile[16 * 36];
    __shared__ __align__(16) accumulate_t x_tile[16 * 36];
    multiply_tile<2>(x, dy, partial, gradient, dy_tile, x_tile);
}

// ---------------------------------------------------------------- one input channel a group

// An output channel meets one input channel, so a sum of products is all there is: a block takes some channels (one,
// or neighbours in memory) and nine kernel positions, its lines share out the positions of a part.
extern "C" __global__ void __launch_bounds__(256) filter_gradient_depthwise(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, FilterGradient gradient
) {
    constexpr int PLACES = 9;
    __shared__ accumulate_t lines[256];
    const int places = gradient.columns, outputs = gradient.groups * gradient.K;
    const int chunks = (places + PLACES - 1) / PLACES;
    const int first_place = blockIdx.x % chunks * PLACES;
    const int k = blockIdx.x / chunks * blockDim.x + threadIdx.x;
    const long long first = blockIdx.y * gradient.part;
    const long long end = min(first + gradient.part, gradient.positions);

    int down[PLACES], right[PLACES];
    accumulate_t sums[PLACES];
    #pragma unroll
    for (int i = 0; i < PLACES; ++i) {
        const int r = (first_place + i) / gradient.S;
        down[i] = first_place + i < places ? r * gradient.dilation_h : -(1 << 30);  // outside of every image
        right[i] = (first_place + i - r * gradient.S) * gradient.dilation_w;
        sums[i] = NUMBER(0);
    }
    if (k < outputs) {
        const scalar_t *image = x + k / gradient.K * gradient.x_c;
        const scalar_t *slope = dy + k * gradient.dy_k;
        const Place step = place_of(blockDim.y, gradient);
        Place place = place_of(first + threadIdx.y, gradient);
        for (long long position = first + threadIdx.y; position < end; position += blockDim.y) {
            const accumulate_t factor =
                load(slope[place.n * gradient.dy_n + place.p * gradient.dy_p + place.q * gradient.dy_q]);
            const int h = place.p * gradient.stride_h - gradient.top;
            const int w = place.q * gradient.stride_w - gradient.left;
            const scalar_t *window = image + place.n * gradient.x_n;
            #pragma unroll
            for (int i = 0; i < PLACES; ++i) {
                const int row = h + down[i], column = w + right[i];
                if (row >= 0 && row < gradient.H && column >= 0 && column < gradient.W) {
                    sums[i] += factor * load(window[row * gradient.x_h + column * gradient.x_w]);
                }
            }
            advance(place, step, gradient);
        }
    }
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    #pragma unroll
    for (int i = 0; i < PLACES; ++i) {
        __syncthreads();  // thread 0 of the line has read what the place before left
        lines[thread] = sums[i];
        for (int half = blockDim.y / 2; half > 0; half /= 2) {
            __syncthreads();
            if (threadIdx.y < half) lines[thread] += lines[thread + half * blockDim.x];
        }
        if (threadIdx.y == 0 && k < outputs && first_place + i < places) {
            partial[((long long)blockIdx.y * outputs + k) * places + first_place + i] = lines[thread];
        }
    }
}

// ---------------------------------------------------------------- the sum of the parts

struct Finish {
    long long elements;          // K * C / groups * R * S
    long long k, c, r, s;        // strides of dw, in elements
    long long bias_step;         // that of db
    int parts, outputs;          // of a bias's gradient, 0 where there is none
    int columns, C, R, S;        // C is a group's
    bool channels_fastest;
};

// A block is X elements by Y lines of parts; no parts at all give zeros. The elements of the bias's gradient follow
// those of the weight's.
extern "C" __global__ void __launch_bounds__(256) filter_gradient_finish(
    const accumulate_t *partial, const accumulate_t *bias_partial, scalar_t *dw, scalar_t *db, Finish finish
) {
    __shared__ accumulate_t lines[256];
    const long long element = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const bool of_weight = element < finish.elements, there = element < finish.elements + finish.outputs;
    const long long at = of_weight ? element : element - finish.elements;
    accumulate_t sum = NUMBER(0);
    if (there) {
        const accumulate_t *from = of_weight ? partial : bias_partial;
        const long long step = of_weight ? finish.elements : finish.outputs;
        #pragma unroll 4
        for (int part = threadIdx.y; part < finish.parts; part += blockDim.y) sum += from[part * step + at];
    }
    const int thread = threadIdx.y * blockDim.x + threadIdx.x;
    lines[thread] = sum;
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) lines[thread] += lines[thread + half * blockDim.x];
    }
    if (threadIdx.y > 0 || !there) return;
    if (!of_weight) {
        db[at * finish.bias_step] = store(lines[thread]);
        return;
    }
    const long long k = element / finish.columns;
    const int j = (int)(element - k * finish.columns), places = finish.R * finish.S;
    const int c = finish.channels_fastest ? j % finish.C : j / places;
    const int place = finish.channels_fastest ? j / finish.C : j - c * places;
    const int r = place / finish.S;
    dw[k * finish.k + c * finish.c + r * finish.r + (place - r * finish.S) * finish.s] = store(lines[thread]);
}
