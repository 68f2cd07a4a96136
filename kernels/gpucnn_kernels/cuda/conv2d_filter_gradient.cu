// The gradient of a convolution's weight. For every group it is a matrix product over the batch's N * P * Q
// positions, of dy (output channels x positions) with the windows of x (positions x columns, a column being a kernel
// position of an input channel). It does 2*N*K*P*Q*C/groups*R*S operations on N*K*P*Q + N*C*H*W elements: arithmetic
// limits it but for few channels, where memory does.
//
// The result is small and the sum long, so the positions are split into parts, which blocks sum side by side into
// rows of a workspace in the accumulating type; filter_gradient_finish adds the parts up in a fixed order. Nothing
// depends on the order of blocks or threads.
//
// The product's loops, compiled for sm_90, have 512 multiply-adds among 732 instructions (128 x 128, eight positions a
// step), 1024 among 1450 (64 x 128, sixteen) and 512 among 850 (32 x 64): 70, 71 and 60 of 100, which is the most
// that they can reach of the peak. Of the rest a third loads from shared memory, the others look up and stage. For
// one input channel a group a product needs a load of its own: 9 multiply-adds of 132 instructions, about 2.5 times
// what reading dy and x once takes; conv2d_depthwise_filter.cu has the usual filters of these. Counted and computed,
// not measured.
//
// Columns run c, r, s for a contiguous result and r, s, c for a channels-last one, so that neighbouring threads
// meet neighbouring memory where they write and, where x has the same layout, where they read.
#include "scalar.cuh"

struct FilterGradient {
    long long positions;               // N * P * Q
    long long part;                    // positions of a part, less than 2^31
    long long x_n, x_c, x_h, x_w;      // strides, in elements
    long long dy_n, dy_k, dy_p, dy_q;
    // How far a step moves in x and in dy, in elements, and what to add where that leads beyond a row or an image.
    long long x_step, x_next_row, x_next_image, dy_step, dy_next_row, dy_next_image;
    int step_p, step_q;                // the rows and columns of a step
    int groups, K, C, columns;         // of a group: output channels, input channels, C * R * S
    int H, W, R, S, P, Q;
    int stride_h, stride_w, top, left, dilation_h, dilation_w;
    bool channels_fastest;             // columns run r, s, c
    bool x_across, dy_across;          // neighbours in memory are channels and not positions
};

// An output pixel, and where what belongs to it lies: of x that is its window's first pixel, in the image or not.
struct Place {
    const scalar_t *at;
    int p, q;
};

__device__ __forceinline__ Place place_of(
    long long position, const scalar_t *image, long long n, long long p, long long q, const FilterGradient &gradient
) {
    const long long row = position / gradient.Q, number = row / gradient.P;
    const int down = (int)(row - number * gradient.P), right = (int)(position - row * gradient.Q);
    return {image + (number * n + down * p + right * q), down, right};
}

__device__ __forceinline__ Place place_in_x(long long position, const scalar_t *x, const FilterGradient &gradient) {
    const scalar_t *first = x - gradient.top * gradient.x_h - gradient.left * gradient.x_w;
    const long long row = gradient.stride_h * gradient.x_h, column = gradient.stride_w * gradient.x_w;
    return place_of(position, first, gradient.x_n, row, column, gradient);
}

__device__ __forceinline__ Place place_in_dy(long long position, const scalar_t *dy, const FilterGradient &gradient) {
    return place_of(position, dy, gradient.dy_n, gradient.dy_p, gradient.dy_q, gradient);
}

// A step on, which needs no division.
__device__ __forceinline__ void advance(
    Place &place, long long step, long long next_row, long long next_image, const FilterGradient &gradient
) {
    place.q += gradient.step_q;
    place.p += gradient.step_p;
    place.at += step;
    if (place.q >= gradient.Q) {
        place.q -= gradient.Q;
        place.p += 1;
        place.at += next_row;
    }
    if (place.p >= gradient.P) {
        place.p -= gradient.P;
        place.at += next_image;
    }
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

struct __align__(4 * sizeof(accumulate_t)) Quad {
    accumulate_t v[4];
};

// What every thread looks up of a column as it goes along: where it looks, and how far that is in memory, in bytes.
struct __align__(16) Look {
    long long offset;
    int down, right;
};

__device__ __forceinline__ accumulate_t load_at(const scalar_t *from, long long bytes) {
    return load(*reinterpret_cast<const scalar_t *>(reinterpret_cast<const char *>(from) + bytes));
}

// A block makes a tile of ROWS * ROW_THREADS output channels by COLUMNS * COLUMN_THREADS columns, a thread ROWS x
// COLUMNS numbers in quads that lie 4 * ROW_THREADS and 4 * COLUMN_THREADS apart: of a warp's 4 x 8 threads all quads
// that are read at a time are then neighbours, in different banks.
//
// In steps of SLOTS positions both factors are loaded to shared memory, and while one step is multiplied the next
// one's numbers are on their way to registers. A thread loads for one position, rows and columns that are a sixteenth
// of the threads apart: neighbouring threads are positions where those are neighbours in memory, otherwise rows. Rows
// and columns beyond the last ones are the last ones again, and are not stored.
template <int SLOTS, int ROWS, int COLUMNS, int ROW_THREADS, int COLUMN_THREADS>
struct Product {
    static constexpr int THREADS = ROW_THREADS * COLUMN_THREADS, APART = THREADS / SLOTS;
    static constexpr int HIGH = ROWS * ROW_THREADS, WIDE = COLUMNS * COLUMN_THREADS;
    static constexpr int DY_LOADS = HIGH / APART, X_LOADS = WIDE / APART;

    struct Shared {
        Quad dy[SLOTS][HIGH / 4 + 1], x[SLOTS][WIDE / 4 + 1];  // one more: spreads the stores over the banks
        Look columns[WIDE];
        long long rows[HIGH];
    };

    static __device__ __forceinline__ void prepare(
        Shared &shared, const FilterGradient &gradient, int group, int first_row, int first_column
    ) {
        for (int i = threadIdx.x; i < HIGH; i += THREADS) {
            const long long k = group * (long long)gradient.K + min(first_row + i, gradient.K - 1);
            shared.rows[i] = k * gradient.dy_k * (long long)sizeof(scalar_t);
        }
        for (int i = threadIdx.x; i < WIDE; i += THREADS) {
            const Column column = column_of(min(first_column + i, gradient.columns - 1), gradient);
            const long long c = group * (long long)gradient.C + column.c;
            const long long offset = c * gradient.x_c + column.down * gradient.x_h + column.right * gradient.x_w;
            shared.columns[i] = {offset * (long long)sizeof(scalar_t), column.down, column.right};
        }
    }

    static __device__ __forceinline__ void multiply(
        const Shared &shared, int outer, int inner, accumulate_t (&sums)[ROWS][COLUMNS]
    ) {
        #pragma unroll 8
        for (int slot = 0; slot < SLOTS; ++slot) {
            Quad rows[ROWS / 4], columns[COLUMNS / 4];
            #pragma unroll
            for (int i = 0; i < ROWS / 4; ++i) rows[i] = shared.dy[slot][i * ROW_THREADS + outer];
            #pragma unroll
            for (int j = 0; j < COLUMNS / 4; ++j) columns[j] = shared.x[slot][j * COLUMN_THREADS + inner];
            #pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                #pragma unroll
                for (int j = 0; j < COLUMNS; ++j) sums[i][j] += rows[i / 4].v[i % 4] * columns[j / 4].v[j % 4];
            }
        }
    }

    static __device__ __forceinline__ void run(
        const scalar_t *x, const scalar_t *dy, accumulate_t *partial, accumulate_t *bias_partial,
        const FilterGradient &gradient, Shared &shared
    ) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int outer = warp / (COLUMN_THREADS / 8) * 4 + lane / 8;
        const int inner = warp % (COLUMN_THREADS / 8) * 8 + lane % 8;

        const unsigned column_tiles = (gradient.columns + WIDE - 1) / WIDE, row_tiles = (gradient.K + HIGH - 1) / HIGH;
        unsigned block = blockIdx.x;
        const int first_column = block % column_tiles * WIDE;
        block /= column_tiles;
        const int first_row = block % row_tiles * HIGH;
        block /= row_tiles;
        const int group = block % gradient.groups;
        const long long part = block / gradient.groups;
        const long long first = part * gradient.part;
        const int count = (int)min(gradient.part, gradient.positions - first);
        const bool with_bias = bias_partial && first_column == 0 && threadIdx.x < HIGH;

        const int dy_slot = gradient.dy_across ? threadIdx.x / APART : threadIdx.x % SLOTS;
        const int dy_row = gradient.dy_across ? threadIdx.x % APART : threadIdx.x / SLOTS;
        const int x_slot = gradient.x_across ? threadIdx.x / APART : threadIdx.x % SLOTS;
        const int x_column = gradient.x_across ? threadIdx.x % APART : threadIdx.x / SLOTS;
        Place slope = place_in_dy(first + dy_slot, dy, gradient), window = place_in_x(first + x_slot, x, gradient);
        accumulate_t *dy_to = &shared.dy[dy_slot][0].v[0] + dy_row, *x_to = &shared.x[x_slot][0].v[0] + x_column;

        accumulate_t next_dy[DY_LOADS], next_x[X_LOADS], sums[ROWS][COLUMNS], bias = NUMBER(0);
        #pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            #pragma unroll
            for (int j = 0; j < COLUMNS; ++j) sums[i][j] = NUMBER(0);
        }
        prepare(shared, gradient, group, first_row, first_column);
        __syncthreads();

        for (int done = 0; done < count + SLOTS; done += SLOTS) {
            if (done > 0) {
                __syncthreads();  // the step before has been multiplied
                #pragma unroll
                for (int i = 0; i < DY_LOADS; ++i) dy_to[i * APART] = next_dy[i];
                #pragma unroll
                for (int i = 0; i < X_LOADS; ++i) x_to[i * APART] = next_x[i];
                __syncthreads();
            }
            if (done < count) {
                const int h = window.p * gradient.stride_h - gradient.top;
                const int w = window.q * gradient.stride_w - gradient.left;
                const bool dy_there = done + dy_slot < count;
                const unsigned height = done + x_slot < count ? gradient.H : 0;  // nothing is inside of no image
                #pragma unroll
                for (int i = 0; i < DY_LOADS; ++i) {
                    next_dy[i] = dy_there ? load_at(slope.at, shared.rows[dy_row + i * APART]) : NUMBER(0);
                }
                #pragma unroll
                for (int i = 0; i < X_LOADS; ++i) {
                    const Look look = shared.columns[x_column + i * APART];
                    const bool inside =
                        (unsigned)(h + look.down) < height && (unsigned)(w + look.right) < (unsigned)gradient.W;
                    next_x[i] = inside ? load_at(window.at, look.offset) : NUMBER(0);
                }
                advance(slope, gradient.dy_step, gradient.dy_next_row, gradient.dy_next_image, gradient);
                advance(window, gradient.x_step, gradient.x_next_row, gradient.x_next_image, gradient);
            }
            if (done > 0) multiply(shared, outer, inner, sums);
            if (done > 0 && with_bias) {  // a thread for each row
                #pragma unroll
                for (int slot = 0; slot < SLOTS; ++slot) bias += (&shared.dy[slot][0].v[0])[threadIdx.x];
            }
        }

        const long long first_sum = (part * gradient.groups + group) * gradient.K;
        #pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int k = first_row + i / 4 * (4 * ROW_THREADS) + outer * 4 + i % 4;
            if (k < gradient.K) {
                accumulate_t *row = partial + (first_sum + k) * gradient.columns;
                #pragma unroll
                for (int j = 0; j < COLUMNS; ++j) {
                    const int column = first_column + j / 4 * (4 * COLUMN_THREADS) + inner * 4 + j % 4;
                    if (column < gradient.columns) row[column] = sums[i][j];
                }
            }
        }
        if (with_bias && first_row + (int)threadIdx.x < gradient.K) bias_partial[first_sum + first_row + threadIdx.x] = bias;
    }
};

#if defined(SCALAR_FLOAT64)
typedef Product<8, 4, 4, 16, 16> Large;
typedef Product<16, 4, 4, 8, 16> Wide;
typedef Product<16, 4, 4, 8, 8> Narrow;
#else
typedef Product<8, 8, 8, 16, 16> Large;  // with sixteen positions a thread's registers would leave room for one block
typedef Product<16, 8, 8, 8, 16> Wide;
typedef Product<16, 4, 8, 8, 8> Narrow;
#endif

extern "C" __global__ void __launch_bounds__(256, 2) filter_gradient_large(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, accumulate_t *bias_partial, FilterGradient gradient
) {
    __shared__ Large::Shared shared;
    Large::run(x, dy, partial, bias_partial, gradient, shared);
}

extern "C" __global__ void __launch_bounds__(128, 3) filter_gradient_wide(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, accumulate_t *bias_partial, FilterGradient gradient
) {
    __shared__ Wide::Shared shared;
    Wide::run(x, dy, partial, bias_partial, gradient, shared);
}

extern "C" __global__ void __launch_bounds__(64) filter_gradient_narrow(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, accumulate_t *bias_partial, FilterGradient gradient
) {
    __shared__ Narrow::Shared shared;
    Narrow::run(x, dy, partial, bias_partial, gradient, shared);
}

// ---------------------------------------------------------------- one input channel a group

// An output channel meets one input channel, so a sum of products is all there is: a block takes some channels (one,
// or neighbours in memory) and nine kernel positions, its lines share out the positions of a part.
constexpr int PLACES = 9;

// A line's sums of nine kernel positions from ``first_place`` on, whose products are made of ``dy`` and ``x``, the
// pixels of one channel. THREE is for kernels three wide: then nine positions are three rows of three, and each row
// and each column is held against the image once and not three times.
template <bool THREE>
__device__ __forceinline__ void add_line(
    accumulate_t (&sums)[PLACES], const scalar_t *x, const scalar_t *dy, int first_place, long long first, int count,
    const FilterGradient &gradient
) {
    int down[THREE ? 1 : PLACES], right[THREE ? 1 : PLACES];
    if (!THREE) {
        #pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            const int r = (first_place + i) / gradient.S;
            down[i] = first_place + i < gradient.columns ? r * gradient.dilation_h : -(1 << 30);  // in no image
            right[i] = (first_place + i - r * gradient.S) * gradient.dilation_w;
        }
    }
    const int first_down = THREE ? first_place / 3 * gradient.dilation_h : 0;
    const int rows = THREE ? gradient.R - first_place / 3 : 0;
    Place slope = place_in_dy(first + threadIdx.y, dy, gradient);
    Place window = place_in_x(first + threadIdx.y, x + first_down * gradient.x_h, gradient);
    for (int done = threadIdx.y; done < count; done += blockDim.y) {
        const accumulate_t factor = load(*slope.at);
        const int h = window.p * gradient.stride_h - gradient.top + first_down;
        const int w = window.q * gradient.stride_w - gradient.left;
        accumulate_t pixels[PLACES];
        #pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            const int below = THREE ? i / 3 * gradient.dilation_h : down[i];
            const int beside = THREE ? i % 3 * gradient.dilation_w : right[i];
            const bool inside = (!THREE || i / 3 < rows) && (unsigned)(h + below) < (unsigned)gradient.H &&
                                (unsigned)(w + beside) < (unsigned)gradient.W;
            pixels[i] = NUMBER(0);
            if (inside) pixels[i] = load(window.at[below * gradient.x_h + beside * gradient.x_w]);
        }
        #pragma unroll
        for (int i = 0; i < PLACES; ++i) sums[i] += factor * pixels[i];
        advance(slope, gradient.dy_step, gradient.dy_next_row, gradient.dy_next_image, gradient);
        advance(window, gradient.x_step, gradient.x_next_row, gradient.x_next_image, gradient);
    }
}

extern "C" __global__ void __launch_bounds__(256) filter_gradient_depthwise(
    const scalar_t *x, const scalar_t *dy, accumulate_t *partial, FilterGradient gradient
) {
    __shared__ accumulate_t lines[256];
    const int places = gradient.columns, outputs = gradient.groups * gradient.K;
    const int chunks = (places + PLACES - 1) / PLACES;
    const int first_place = blockIdx.x % chunks * PLACES;
    const int k = blockIdx.x / chunks * blockDim.x + threadIdx.x;
    const long long first = blockIdx.y * gradient.part;
    const int count = (int)min(gradient.part, gradient.positions - first);

    accumulate_t sums[PLACES];
    #pragma unroll
    for (int i = 0; i < PLACES; ++i) sums[i] = NUMBER(0);
    if (k < outputs) {
        const scalar_t *image = x + k / gradient.K * gradient.x_c, *slopes = dy + k * gradient.dy_k;
        if (gradient.S == 3) {
            add_line<true>(sums, image, slopes, first_place, first, count, gradient);
        } else {
            add_line<false>(sums, image, slopes, first_place, first, count, gradient);
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
