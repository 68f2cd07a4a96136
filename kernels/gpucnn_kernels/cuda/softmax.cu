// Softmax along one axis of a dense array, and its gradient.
//
// In memory a dense array is [outer][length][inner], with ``inner`` the axis's stride. Where inner is 1, a row of
// threads (a warp, or a block for long rows) takes a row and neighbouring threads neighbouring numbers; otherwise
// a thread takes a row, so that neighbouring threads take neighbouring rows. Short rows (8 numbers and fewer) go
// to one thread each in either case: a warp would be mostly idle.
//
// Memory is the limit: forward reads and writes every element once, backward reads two and writes one; the second
// and third look at a row come from the cache. By the compiled code for sm_90, not measured, an element of a row of
// whole fours takes about 31 instructions forward in float32 and 12 backward, where it took 70 and 44 one at a time;
// an H200's memory leaves time for 62 and 93.
//
// No __restrict__: the output may be an input. A row is read by those threads only that write it, and a number
// only by the thread that writes it once the row's sums are known.
#include "rows.cuh"

struct SoftmaxRows {
    long long rows, length, inner;
};

template <int width>
__device__ __forceinline__ void forward_rows(
    const scalar_t *x, scalar_t *y, const SoftmaxRows &shape, accumulate_t *shared
) {
    const bool aligned = on_pack_boundary<width>(x) && on_pack_boundary<width>(y);
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y; row < shape.rows; row += step) {
        const scalar_t *given = x + row * shape.length;
        scalar_t *made = y + row * shape.length;
        const Powers powers = powers_of_row<width>(given, shape.length, aligned, shared);
        const accumulate_t share = NUMBER(1) / powers.total;
        over_row<width>(given, shape.length, aligned, [&](long long place, const accumulate_t (&values)[width]) {
            accumulate_t shares[width];
#pragma unroll
            for (int k = 0; k < width; ++k) shares[k] = exponential(values[k] - powers.largest) * share;
            put_in_row<width>(made, place, aligned, shares);
        });
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) softmax_forward_rows(
    const scalar_t *x, scalar_t *y, SoftmaxRows shape
) {
    __shared__ accumulate_t shared[32];
    if (shape.length % FOUR == 0) {
        forward_rows<FOUR>(x, y, shape, shared);
    } else {
        forward_rows<1>(x, y, shape, shared);
    }
}

extern "C" __global__ void __launch_bounds__(256) softmax_forward_threads(
    const scalar_t *x, scalar_t *y, SoftmaxRows shape
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x; row < shape.rows; row += step) {
        const long long first = row / shape.inner * shape.length * shape.inner + row % shape.inner;
        const long long last = first + shape.length * shape.inner;
        accumulate_t largest = load(x[first]);
        for (long long i = first + shape.inner; i < last; i += shape.inner) {
            const accumulate_t value = load(x[i]);
            largest = value > largest ? value : largest;
        }
        accumulate_t total = NUMBER(0);
        for (long long i = first; i < last; i += shape.inner) total += exponential(load(x[i]) - largest);
        const accumulate_t share = NUMBER(1) / total;
        for (long long i = first; i < last; i += shape.inner) {
            y[i] = store(exponential(load(x[i]) - largest) * share);
        }
    }
}

// dx = y * (dy - sum(dy * y)).
template <int width>
__device__ __forceinline__ void backward_rows(
    const scalar_t *dy, const scalar_t *y, scalar_t *dx, const SoftmaxRows &shape, accumulate_t *shared
) {
    const bool aligned = on_pack_boundary<width>(dy) && on_pack_boundary<width>(y) && on_pack_boundary<width>(dx);
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y; row < shape.rows; row += step) {
        const scalar_t *gradients = dy + row * shape.length, *results = y + row * shape.length;
        scalar_t *made = dx + row * shape.length;
        accumulate_t mean = NUMBER(0);
        over_rows<width>(
            gradients, results, shape.length, aligned,
            [&](long long, const accumulate_t (&slopes)[width], const accumulate_t (&shares)[width]) {
#pragma unroll
                for (int k = 0; k < width; ++k) mean += slopes[k] * shares[k];
            }
        );
        mean = row_sum(mean, shared);
        over_rows<width>(
            gradients, results, shape.length, aligned,
            [&](long long place, const accumulate_t (&slopes)[width], const accumulate_t (&shares)[width]) {
                accumulate_t values[width];
#pragma unroll
                for (int k = 0; k < width; ++k) values[k] = shares[k] * (slopes[k] - mean);
                put_in_row<width>(made, place, aligned, values);
            }
        );
    }
}

extern "C" __global__ void __launch_bounds__(256, 2) softmax_backward_rows(
    const scalar_t *dy, const scalar_t *y, scalar_t *dx, SoftmaxRows shape
) {
    __shared__ accumulate_t shared[32];
    if (shape.length % FOUR == 0) {
        backward_rows<FOUR>(dy, y, dx, shape, shared);
    } else {
        backward_rows<1>(dy, y, dx, shape, shared);
    }
}

extern "C" __global__ void __launch_bounds__(256) softmax_backward_threads(
    const scalar_t *dy, const scalar_t *y, scalar_t *dx, SoftmaxRows shape
) {
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x; row < shape.rows; row += step) {
        const long long first = row / shape.inner * shape.length * shape.inner + row % shape.inner;
        const long long last = first + shape.length * shape.inner;
        accumulate_t mean = NUMBER(0);
        for (long long i = first; i < last; i += shape.inner) mean += load(dy[i]) * load(y[i]);
        for (long long i = first; i < last; i += shape.inner) {
            dx[i] = store(load(y[i]) * (load(dy[i]) - mean));
        }
    }
}
