// One launch where a sum over the grid is wanted: the block that is the last to end adds up what all have left.
//
// Which one that is changes from run to run, what it adds up and in which order does not. ``done`` counts the blocks
// in memory: it is zero before a launch, and zero again after it, so that a graph may be started many times. Launches
// that may run side by side each need one of their own.

// Whether this block is the last, for all of its threads alike. Its thread 0 has written what the block leaves for
// the others; the last block reads that past the first-level cache, by __ldcg. ``shared`` is one number.
__device__ __forceinline__ bool is_last_block(int *done, int *shared) {
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        __threadfence();
        *shared = atomicAdd(done, 1) == (int)gridDim.x - 1;
        if (*shared) *done = 0;
    }
    __syncthreads();
    const bool last = *shared;
    if (last) __threadfence();
    return last;
}
