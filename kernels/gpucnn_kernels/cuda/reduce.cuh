// Sums and maxima over the threads of a warp, of a row of threads and of a block. Every thread gets the result.
//
// The order of the additions is fixed: a butterfly in each warp, in which a + b and b + a are the same number,
// then the warps one after the other. So a result depends on the block's shape alone and repeats bit for bit.

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
    for (int distance = 16; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
}

// A NaN may or may not win: where it must show, let it show in the sum that follows.
template <typename T>
__device__ __forceinline__ T warp_maximum(T value) {
    for (int distance = 16; distance > 0; distance /= 2) {
        const T other = __shfl_xor_sync(0xffffffffu, value, distance);
        value = other > value ? other : value;
    }
    return value;
}

template <typename T>
__device__ __forceinline__ T warp_minimum(T value) {
    for (int distance = 16; distance > 0; distance /= 2) {
        const T other = __shfl_xor_sync(0xffffffffu, value, distance);
        value = other < value ? other : value;
    }
    return value;
}

// The functions of a block take ``shared``, room for a value a warp (32 at most), and must be reached by all its
// threads. Blocks hold whole warps. The last barrier lets ``shared`` be used again at once.

__device__ __forceinline__ int thread_of_block() { return threadIdx.y * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int warps_of_block() { return blockDim.x * blockDim.y / 32; }

template <typename T>
__device__ __forceinline__ T block_sum(T value, T *shared) {
    value = warp_sum(value);
    const int thread = thread_of_block();
    if (thread % 32 == 0) shared[thread / 32] = value;
    __syncthreads();
    T total = shared[0];
#pragma unroll 4
    for (int warp = 1; warp < warps_of_block(); ++warp) total += shared[warp];
    __syncthreads();
    return total;
}

template <typename T>
__device__ __forceinline__ T block_minimum(T value, T *shared) {
    value = warp_minimum(value);
    const int thread = thread_of_block();
    if (thread % 32 == 0) shared[thread / 32] = value;
    __syncthreads();
    T smallest = shared[0];
#pragma unroll 4
    for (int warp = 1; warp < warps_of_block(); ++warp) {
        smallest = shared[warp] < smallest ? shared[warp] : smallest;
    }
    __syncthreads();
    return smallest;
}

// A row of threads is either one warp (blockDim.x == 32, and as many rows as blockDim.y) or the whole block
// (blockDim.y == 1). Warps need no barrier, so rows of 32 may each go through a different number of calls.

template <typename T>
__device__ __forceinline__ T row_sum(T value, T *shared) {
    return blockDim.x == 32 ? warp_sum(value) : block_sum(value, shared);
}

template <typename T>
__device__ __forceinline__ T row_maximum(T value, T *shared) {
    value = warp_maximum(value);
    if (blockDim.x == 32) return value;
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    T largest = shared[0];
#pragma unroll 4
    for (int warp = 1; warp < warps_of_block(); ++warp) {
        largest = shared[warp] > largest ? shared[warp] : largest;
    }
    __syncthreads();
    return largest;
}
