// Softmax along one axis of a dense array, and its gradient.
//
// In memory a dense array is [outer][length][inner], with ``inner`` the axis's stride. Where inner is 1, a row of
// threads (a warp, or a block for long rows) takes a row and neighbouring threads neighbouring numbers; otherwise
// a thread takes a row, so that neighbouring threads take neighbouring rows. Short rows (8 numbers and fewer) go
// to one thread each in either case: a warp would be mostly idle.
//
// Memory is the limit: forward reads and writes every element once, backward reads two and writes one; the second
// and third look at a row come from the cache.
//
// Rows' loops are not unrolled: a warp has few rounds to make, and ptxas spills what it unrolls.
//
// No __restrict__: the output may be an input. A row is read by those threads only that write it, and a number
// only by the thread that writes it once the row's sums are known.
#include "activation.cuh"
#include "reduce.cuh"

struct SoftmaxRows {
    long long rows, length, inner;
};

extern "C" __global__ void __launch_bounds__(256, 4) softmax_forward_rows(
    const scalar_t *x, scalar_t *y, SoftmaxRows shape
) {
    __shared__ accumulate_t shared[32];
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y; row < shape.rows; row += step) {
        const long long start = row * shape.length;
        accumulate_t largest = load(x[start]);
#pragma unroll 1
        for (long long i = threadIdx.x; i < shape.length; i += blockDim.x) {
            const accumulate_t value = load(x[start + i]);
            largest = value > largest ? value : largest;
        }
        largest = row_maximum(largest, shared);
        accumulate_t total = NUMBER(0);
#pragma unroll 1
        for (long long i = threadIdx.x; i < shape.length; i += blockDim.x) {
            total += exponential(load(x[start + i]) - largest);
        }
        total = row_sum(total, shared);
#pragma unroll 1
        for (long long i = threadIdx.x; i < shape.length; i += blockDim.x) {
            y[start + i] = store(exponential(load(x[start + i]) - largest) / total);
        }
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
        for (long long i = first; i < last; i += shape.inner) {
            y[i] = store(exponential(load(x[i]) - largest) / total);
        }
    }
}

// dx = y * (dy - sum(dy * y)).
extern "C" __global__ void __launch_bounds__(256) softmax_backward_rows(
    const scalar_t *dy, const scalar_t *y, scalar_t *dx, SoftmaxRows shape
) {
    __shared__ accumulate_t shared[32];
    const long long step = (long long)gridDim.x * blockDim.y;
    for (long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y; row < shape.rows; row += step) {
        const long long start = row * shape.length;
        accumulate_t mean = NUMBER(0);
#pragma unroll 1
        for (long long i = threadIdx.x; i < shape.length; i += blockDim.x) {
            mean += load(dy[start + i]) * load(y[start + i]);
        }
        mean = row_sum(mean, shared);
#pragma unroll 1
        for (long long i = threadIdx.x; i < shape.length; i += blockDim.x) {
            dx[start + i] = store(load(y[start + i]) * (load(dy[start + i]) - mean));
        }
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
