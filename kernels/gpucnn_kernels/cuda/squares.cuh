// The two halves of a sum of squares: a block's of its elements, and one block's of the blocks' sums. What sums in
// this way, in one launch or in two, has the same bits. Blocks have 256 threads.
#include "scalar.cuh"

// The sum over the block, in thread 0. ``warps`` is shared memory of 8 elements; 256 threads.
__device__ __forceinline__ double squares_sum(double value, double *warps) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x < 32) {
        value = threadIdx.x < 8 ? warps[threadIdx.x] : 0;
        for (int distance = 4; distance > 0; distance /= 2) {
            value += __shfl_down_sync(0xffffffffu, value, distance);
        }
    }
    return value;
}

// This block's share of the ``count`` elements of x, in thread 0.
__device__ __forceinline__ double squares_of_block(const scalar_t *x, long long count, double *warps) {
    const long long step = (long long)gridDim.x * blockDim.x;
    double total = 0;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const double value = load(x[i]);
        total += value * value;
    }
    return squares_sum(total, warps);
}

// The sum of the blocks' sums, in thread 0.
__device__ __forceinline__ double sum_of_parts(const double *partial, int count, double *warps) {
    double total = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) total += __ldcg(partial + i);
    return squares_sum(total, warps);
}
