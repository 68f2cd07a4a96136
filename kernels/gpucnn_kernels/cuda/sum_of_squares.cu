// The sum of all squares, for the norm of a gradient, and what is done with it. Limit: memory, every element
// read once.
//
// The sum is taken in double, element by element: a square of two float32 is exact there and can neither overflow
// nor vanish, and a norm is wanted most when gradients explode. GPUs for data centers have the rate to spare;
// those with 1/64 of it may be held up by it in 16-bit arrays. Two passes: each thread sums its elements and each
// block its threads, in a tree of fixed shape; then one block sums the blocks. How many blocks there are depends
// on the number of elements alone, so the bits of the sum do not depend on the GPU or on the run.
#include "squares.cuh"

extern "C" __global__ void __launch_bounds__(256) squares_by_block(
    const scalar_t *__restrict__ x, double *__restrict__ partial, long long count
) {
    __shared__ double warps[8];
    const double total = squares_of_block(x, count, warps);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(256) sum_of_blocks(
    const double *__restrict__ partial, double *__restrict__ sum, int count
) {
    __shared__ double warps[8];
    const double total = sum_of_parts(partial, count, warps);
    if (threadIdx.x == 0) *sum = total;
}

// ``scheduled``, where it is not null, points to the factor.
extern "C" __global__ void __launch_bounds__(256) scale_elements(
    scalar_t *x, long long count, accumulate_t factor, const double *scheduled
) {
    if (scheduled) factor = (accumulate_t)*scheduled;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        x[i] = store(load(x[i]) * factor);
    }
}

// Scales by min(1, max_norm / (norm + epsilon)), where the sum of squares is still on the GPU: nothing waits for
// it. An infinite or undefined norm leaves x as it is.
extern "C" __global__ void __launch_bounds__(256) clip_elements(
    scalar_t *x, const double *__restrict__ sum, long long count, double max_norm, double epsilon
) {
    const double norm = sqrt(*sum), ratio = max_norm / (norm + epsilon);
    if (!(ratio < 1) || ratio == 0) return;  // ratio is 0 for an infinite norm
    const accumulate_t factor = (accumulate_t)ratio;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        x[i] = store(load(x[i]) * factor);
    }
}
