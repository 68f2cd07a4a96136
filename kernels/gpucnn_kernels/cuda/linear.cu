// The fully connected layer where it is small: y = activation(x w' + bias) in one launch, and from the gradient dy
// of y the three gradients dy' x, the sums of dy and dy w in one more. Larger products are cuBLAS's: linear_choice.py
// says where one ends and the other begins.
//
//   result[row, column] = sum over depth of left[row, depth] * right[column, depth]
//
// A block makes a tile of 16 x 16 (256 threads) or 32 x 32 (128) of the result. It goes through the sum in stages of
// 128 or 64 numbers: both factors' parts are fetched into registers, in which they wait while the stage before is
// multiplied, then put into shared memory in the accumulating type, the numbers of a sum side by side. Every warp
// makes the whole tile for its share of the sum, lanes 4 x 8, a lane 4 x 2 or 8 x 4 numbers; at the end the warps'
// sums are added in their order. So a short sum is one stage, whose fetches are all on their way at once, and a
// tile is spread over all schedulers of a multiprocessor however small the layer is.
//
// The order of the additions is that of the shape alone. dy may be multiplied, as it is fetched, by the slope of
// the activation that followed the layer, and the bias gradient is one more column of the weight's, of ones.
//
// Limit: latencies, and instructions. By the compiled code for sm_90, not measured: of a stage's some 300
// instructions 128 are multiply-adds (16 x 16), of 800 512 (32 x 32; backward, with an activation, of 1200). All
// tiles together fetch (1 / 16 + 1 / 16) * result * depth numbers, or half as many, through the second-level cache.
// Reckoned for an H200, launch included: LeNet's 400 -> 120 with a batch of 128 takes 4.4 us, its gradients 4.2.
#include "activation.cuh"
#include "fused.cuh"

constexpr int VECTOR = 16 / sizeof(accumulate_t);  // numbers of a sum that are read from shared memory at once

template <int HEIGHT, int WIDTH, int WARP_COUNT>
struct Tile {
    static constexpr int ROWS = 4 * HEIGHT, COLUMNS = 8 * WIDTH;  // of a lane: HEIGHT x WIDTH
    static constexpr int WARPS = WARP_COUNT, THREADS = 32 * WARPS;
    static constexpr int DEPTH = 16 * WARPS;  // of a stage
    // Rows of a stage lie an odd number of vectors apart: neighbouring rows begin in different banks.
    static constexpr int PITCH = DEPTH + VECTOR;
    static constexpr int SUM_PITCH = COLUMNS + 8;  // the same for the four rows that a warp stores at once
    static constexpr int STAGE = (ROWS + COLUMNS) * PITCH, SUMS = WARPS * ROWS * SUM_PITCH;
    static constexpr int SHARED = STAGE > SUMS ? STAGE : SUMS;
    static_assert(ROWS == COLUMNS, "one way of fetching for both factors");
    static constexpr int LOADS = ROWS * DEPTH / THREADS;
};
typedef Tile<4, 2, 8> Small;
typedef Tile<8, 4, 4> Large;

// Strides in elements. What one of these kernels takes has less than 2^31.
struct Steps {
    int row, depth;
};

// A factor of a product: ``rows`` x ``depth`` numbers, and beyond its rows, where ``ones``, a row of ones.
struct Factor {
    const scalar_t *numbers;
    int rows, depth;
    Steps steps;
    bool ones;
};

// An activation that gradients go back through as they are fetched: its outputs, which lie as the gradients do.
struct Gate {
    const scalar_t *outputs;
    int function;
    accumulate_t negative_slope;

    // activation_gradient of those functions whose slope the output gives, without the others' code.
    __device__ __forceinline__ accumulate_t through(accumulate_t gradient, accumulate_t output) const {
        if (function == SIGMOID) return gradient * (output * (NUMBER(1) - output));
        if (function == TANH) return gradient * ((NUMBER(1) - output) * (NUMBER(1) + output));
        if (output > NUMBER(0)) return gradient;
        return function == RELU ? NUMBER(0) : gradient * negative_slope;
    }
};

// Which numbers of a stage a thread brings: the first, and how far it is to the next. Neighbouring threads take
// neighbouring numbers of memory: along the sum, or 8 rows by 4 numbers of a sum, which fall into different banks.
template <typename T>
struct Share {
    static constexpr int GROUPS = T::ROWS / 8;
    static constexpr int ROWS_ON = T::THREADS / T::DEPTH, PLACES_ON = 4 * T::WARPS / GROUPS;
    bool along;
    int row, place;
    int bytes_on;  // in memory

    __device__ __forceinline__ explicit Share(const Factor &factor) {
        const int thread = threadIdx.x, warp = thread / 32;
        along = factor.steps.depth == 1;
        row = along ? thread / T::DEPTH : thread % 8 + 8 * (warp % GROUPS);
        place = along ? thread % T::DEPTH : thread / 8 % 4 + 4 * (warp / GROUPS);
        bytes_on = (int)sizeof(scalar_t) * (along ? ROWS_ON * factor.steps.row : PLACES_ON * factor.steps.depth);
    }

    // How many of the thread's numbers there are: those beyond the factor's end are zeros.
    __device__ __forceinline__ int count(const Factor &factor, int first_row, int first_place) const {
        const int rows = factor.rows - first_row - row, places = factor.depth - first_place - place;
        if (rows <= 0 || places <= 0) return 0;
        return along ? (rows + ROWS_ON - 1) / ROWS_ON : (places + PLACES_ON - 1) / PLACES_ON;
    }
};

// ``from`` is the factor's numbers, or what lies as they do.
template <typename T>
__device__ __forceinline__ void fetch(
    accumulate_t (&values)[T::LOADS], const Factor &factor, const Share<T> &share, const scalar_t *from,
    int first_row, int first_place
) {
    const int count = share.count(factor, first_row, first_place);
    const int offset = (first_row + share.row) * factor.steps.row + (first_place + share.place) * factor.steps.depth;
    const char *first = reinterpret_cast<const char *>(from + (count > 0 ? offset : 0));
#pragma unroll
    for (int i = 0; i < T::LOADS; ++i) {
        values[i] = NUMBER(0);
        if (i < count) values[i] = load(*reinterpret_cast<const scalar_t *>(first + (long long)share.bytes_on * i));
    }
}

// The row of ones, among numbers that have been fetched: it is in one tile of a product.
template <typename T>
__device__ __forceinline__ void fetch_ones(
    accumulate_t (&values)[T::LOADS], const Factor &factor, const Share<T> &share, int first_row, int first_place
) {
#pragma unroll
    for (int i = 0; i < T::LOADS; ++i) {
        const int row = first_row + share.row + (share.along ? i * Share<T>::ROWS_ON : 0);
        const int place = first_place + share.place + (share.along ? 0 : i * Share<T>::PLACES_ON);
        if (row == factor.rows && place < factor.depth) values[i] = NUMBER(1);
    }
}

template <typename T>
__device__ __forceinline__ void put(
    const accumulate_t (&values)[T::LOADS], accumulate_t *stage, const Share<T> &share
) {
    accumulate_t *first = stage + share.row * T::PITCH + share.place;
    if (share.along) {
#pragma unroll
        for (int i = 0; i < T::LOADS; ++i) first[i * Share<T>::ROWS_ON * T::PITCH] = values[i];
    } else {
#pragma unroll
        for (int i = 0; i < T::LOADS; ++i) first[i * Share<T>::PLACES_ON] = values[i];
    }
}

struct alignas(16) Vector {
    accumulate_t part[VECTOR];
};

// A stage's share of this warp: every WARPS-th vector of the ``left`` numbers of each sum that there are.
template <typename T, int HEIGHT, int WIDTH>
__device__ __forceinline__ void multiply(
    accumulate_t (&sums)[HEIGHT][WIDTH], const accumulate_t *left_stage, const accumulate_t *right_stage, int left
) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const accumulate_t *left_line = left_stage + (lane / 8) * T::PITCH;
    const accumulate_t *right_line = right_stage + (lane % 8) * T::PITCH;
#pragma unroll
    for (int place = 0; place < T::DEPTH; place += T::WARPS * VECTOR) {
        const int own = place + warp * VECTOR;
        if (own >= left) break;
        Vector a[HEIGHT], b[WIDTH];
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i) {
            a[i] = *reinterpret_cast<const Vector *>(left_line + 4 * i * T::PITCH + own);
        }
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            b[j] = *reinterpret_cast<const Vector *>(right_line + 8 * j * T::PITCH + own);
        }
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) {
#pragma unroll
            for (int i = 0; i < HEIGHT; ++i) {
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) sums[i][j] = fused(a[i].part[v], b[j].part[v], sums[i][j]);
            }
        }
    }
}

// The tile that begins at this row and column, given number by number to ``store_at(row, column, sum)``. Where
// GATED, the left factor is gradients and ``gate`` may have outputs.
template <typename T, int HEIGHT, int WIDTH, bool GATED, typename Store>
__device__ __forceinline__ void make_tile(
    const Factor &left, const Gate &gate, const Factor &right, int first_row, int first_column,
    accumulate_t *shared, Store store_at
) {
    accumulate_t sums[HEIGHT][WIDTH];
#pragma unroll
    for (int i = 0; i < HEIGHT; ++i) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) sums[i][j] = NUMBER(0);
    }
    accumulate_t *left_stage = shared, *right_stage = shared + T::ROWS * T::PITCH;
    const Share<T> left_share(left), right_share(right);
    const bool gated = GATED && gate.outputs, ones = right.ones && first_column + T::COLUMNS > right.rows;
    accumulate_t left_values[T::LOADS], outputs[T::LOADS], right_values[T::LOADS];
    const auto fetch_all = [&](int place) {
        fetch<T>(left_values, left, left_share, left.numbers, first_row, place);
        if (gated) fetch<T>(outputs, left, left_share, gate.outputs, first_row, place);
        fetch<T>(right_values, right, right_share, right.numbers, first_column, place);
        if (ones) fetch_ones<T>(right_values, right, right_share, first_column, place);
    };
    fetch_all(0);
#pragma unroll 1
    for (int place = 0; place < left.depth; place += T::DEPTH) {
        if (gated) {
#pragma unroll
            for (int i = 0; i < T::LOADS; ++i) left_values[i] = gate.through(left_values[i], outputs[i]);
        }
        put<T>(left_values, left_stage, left_share);
        put<T>(right_values, right_stage, right_share);
        __syncthreads();
        if (place + T::DEPTH < left.depth) fetch_all(place + T::DEPTH);
        multiply<T>(sums, left_stage, right_stage, left.depth - place);
        __syncthreads();
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < HEIGHT; ++i) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            shared[(warp * T::ROWS + lane / 8 + 4 * i) * T::SUM_PITCH + lane % 8 + 8 * j] = sums[i][j];
        }
    }
    __syncthreads();
#pragma unroll 1
    for (int number = threadIdx.x; number < T::ROWS * T::COLUMNS; number += T::THREADS) {
        const int row = number / T::COLUMNS, column = number % T::COLUMNS;
        accumulate_t sum = shared[row * T::SUM_PITCH + column];
#pragma unroll
        for (int other = 1; other < T::WARPS; ++other) {
            sum += shared[(other * T::ROWS + row) * T::SUM_PITCH + column];
        }
        store_at(first_row + row, first_column + column, sum);
    }
}

struct Layer {
    int batch, inputs, outputs;
    Steps x, weight, y;  // rows, and along the features; y's are dy's, too
    int function;
    accumulate_t negative_slope;
};

template <typename T, int HEIGHT, int WIDTH>
__device__ __forceinline__ void forward(
    const scalar_t *x, const scalar_t *weight, const scalar_t *bias, scalar_t *y, const Layer &layer,
    accumulate_t *shared
) {
    const int across = (layer.outputs + T::COLUMNS - 1) / T::COLUMNS;
    const int first_row = blockIdx.x / across * T::ROWS, first_column = blockIdx.x % across * T::COLUMNS;
    const Factor left = {x, layer.batch, layer.inputs, layer.x, false};
    const Factor right = {weight, layer.outputs, layer.inputs, layer.weight, false};
    const Gate none = {nullptr, IDENTITY, NUMBER(0)};
    const auto store_at = [&](int n, int k, accumulate_t sum) {
        if (n >= layer.batch || k >= layer.outputs) return;
        if (bias) sum += load(bias[k]);
        y[n * layer.y.row + k * layer.y.depth] = store(activate(layer.function, sum, layer.negative_slope));
    };
    make_tile<T, HEIGHT, WIDTH, false>(left, none, right, first_row, first_column, shared, store_at);
}

extern "C" __global__ void __launch_bounds__(256, 2) linear_forward_small(
    const scalar_t *x, const scalar_t *weight, const scalar_t *bias, scalar_t *y, Layer layer
) {
    __shared__ __align__(16) accumulate_t shared[Small::SHARED];
    forward<Small, 4, 2>(x, weight, bias, y, layer, shared);
}

extern "C" __global__ void __launch_bounds__(128, 2) linear_forward_large(
    const scalar_t *x, const scalar_t *weight, const scalar_t *bias, scalar_t *y, Layer layer
) {
    __shared__ __align__(16) accumulate_t shared[Large::SHARED];
    forward<Large, 8, 4>(x, weight, bias, y, layer, shared);
}

// The gradients' strides, and the blocks that make the weight's and the bias's; the others make the input's.
struct Gradients {
    Steps weight, x;
    int weight_blocks;
};

// Of the gradient for the weight there is one of two pointers, that in the arrays' precision or that in the
// accumulating one; of the bias's perhaps neither.
struct Sums {
    scalar_t *narrow;
    accumulate_t *wide;

    __device__ __forceinline__ void set(int place, accumulate_t sum) const {
        if (wide) {
            wide[place] = sum;
        } else {
            narrow[place] = store(sum);
        }
    }
};

template <typename T, int HEIGHT, int WIDTH>
__device__ __forceinline__ void backward(
    const scalar_t *dy, const scalar_t *y, const scalar_t *x, const scalar_t *weight, Sums dweight, Sums dbias,
    scalar_t *dx, const Layer &layer, const Gradients &gradients, accumulate_t *shared
) {
    const int block = blockIdx.x;
    const bool for_input = block >= gradients.weight_blocks, bias = dbias.narrow || dbias.wide;
    const int tile = for_input ? block - gradients.weight_blocks : block;
    const int columns = for_input ? layer.inputs : layer.inputs + bias;
    const int across = (columns + T::COLUMNS - 1) / T::COLUMNS;
    const int first_row = tile / across * T::ROWS, first_column = tile % across * T::COLUMNS;
    // dx[n, i] = sum over k of dy[n, k] weight[k, i]; dweight[k, i] = sum over n of dy[n, k] x[n, i].
    Factor left = {dy, layer.outputs, layer.batch, {layer.y.depth, layer.y.row}, false};
    Factor right = {x, layer.inputs, layer.batch, {layer.x.depth, layer.x.row}, bias};
    if (for_input) {
        left = {dy, layer.batch, layer.outputs, layer.y, false};
        right = {weight, layer.inputs, layer.outputs, {layer.weight.depth, layer.weight.row}, false};
    }
    const Gate gate = {y, layer.function, layer.negative_slope};
    const auto store_at = [&](int row, int i, accumulate_t sum) {
        if (row >= left.rows || i >= columns) return;
        if (for_input) {
            dx[row * gradients.x.row + i * gradients.x.depth] = store(sum);
        } else if (i == layer.inputs) {
            dbias.set(row, sum);
        } else {
            dweight.set(row * gradients.weight.row + i * gradients.weight.depth, sum);
        }
    };
    make_tile<T, HEIGHT, WIDTH, true>(left, gate, right, first_row, first_column, shared, store_at);
}

extern "C" __global__ void __launch_bounds__(256, 2) linear_backward_small(
    const scalar_t *dy, const scalar_t *y, const scalar_t *x, const scalar_t *weight, scalar_t *dweight,
    accumulate_t *wide_dweight, scalar_t *dbias, accumulate_t *wide_dbias, scalar_t *dx, Layer layer,
    Gradients gradients
) {
    __shared__ __align__(16) accumulate_t shared[Small::SHARED];
    const Sums weights = {dweight, wide_dweight}, biases = {dbias, wide_dbias};
    backward<Small, 4, 2>(dy, y, x, weight, weights, biases, dx, layer, gradients, shared);
}

extern "C" __global__ void __launch_bounds__(128, 2) linear_backward_large(
    const scalar_t *dy, const scalar_t *y, const scalar_t *x, const scalar_t *weight, scalar_t *dweight,
    accumulate_t *wide_dweight, scalar_t *dbias, accumulate_t *wide_dbias, scalar_t *dx, Layer layer,
    Gradients gradients
) {
    __shared__ __align__(16) accumulate_t shared[Large::SHARED];
    const Sums weights = {dweight, wide_dweight}, biases = {dbias, wide_dbias};
    backward<Large, 8, 4>(dy, y, x, weight, weights, biases, dx, layer, gradients, shared);
}
