"""Races in global memory and numbers that were never made: kernels with one such fault each, and without it."""

from __future__ import annotations

import numpy
import pytest

from gpucnn_kernels.runtime.host import KernelFault, order
from tests.host_modules import launch, module, nothing_from_outside, poisoned, reads, writes  # noqa: F401

TEXT = r"""
#include "last_block.cuh"

// The blocks' sums, added up by the last block to end. ``released`` is how the writer shows its sum, ``acquired``
// how the last block comes to see the others'.
extern "C" __global__ void sum_of_blocks(
    const float *x, float *sums, int *done, float *y, int released, int acquired
) {
    __shared__ int last;
    if (threadIdx.x == 0) {
        float sum = 0.0f;
        for (int i = 0; i < 32; ++i) sum += x[32 * blockIdx.x + i];
        sums[blockIdx.x] = sum;
        if (released) __threadfence();
        last = atomicAdd(done, 1) == (int)gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    if (acquired) __threadfence();
    if (threadIdx.x == 31) {
        float sum = 0.0f;
        for (int i = 0; i < gridDim.x; ++i) sum += sums[i];
        y[0] = sum;
    }
}

// The same by the project's own function; every thread leaves a number, and a barrier is between it and the fence.
extern "C" __global__ void sum_of_threads(const float *x, float *sums, int *done, float *y, int wait) {
    __shared__ int shared;
    sums[blockIdx.x * blockDim.x + threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    if (wait) __syncthreads();
    if (!is_last_block(done, &shared)) return;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < gridDim.x * blockDim.x; i += blockDim.x) sum += sums[i];
    y[threadIdx.x] = sum;
}

// The last block takes for granted that the others have ended.
extern "C" __global__ void without_counting(float *sums, float *y) {
    sums[blockIdx.x] = 1.0f;
    __threadfence();
    if (blockIdx.x == gridDim.x - 1) {
        y[0] = 0.0f;
        for (int i = 0; i < gridDim.x; ++i) y[0] += sums[i];
    }
}

// A block reads what another one overwrites.
extern "C" __global__ void moved_in_place(float *x, int by) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < gridDim.x * blockDim.x - by) x[i] = x[i + by] + 1.0f;
}

extern "C" __global__ void neighbours(const float *x, float *memory, float *y, int wait) {
    memory[threadIdx.x] = x[threadIdx.x];
    if (wait) __syncthreads();
    y[threadIdx.x] = memory[(threadIdx.x + 1) % blockDim.x];
}

extern "C" __global__ void rounds(float *memory, float *y, int wait) {
    float sum = 0.0f;
    for (int round = 0; round < 3; ++round) {
        memory[threadIdx.x] = round;
        __syncthreads();
        sum += memory[blockDim.x - 1 - threadIdx.x];
        if (wait) __syncthreads();
    }
    y[threadIdx.x] = sum;
}

extern "C" __global__ void pairs_of_a_warp(
    const unsigned short *x, unsigned short *memory, unsigned *y, int wait
) {
    memory[threadIdx.x] = x[threadIdx.x];
    if (wait) __syncwarp();
    if (threadIdx.x < 16) y[threadIdx.x] = ((const unsigned *)memory)[threadIdx.x];
}

extern "C" __global__ void adds(float *sum, float *y) {
    atomicAdd(sum, 1.0f);
    __syncthreads();
    y[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
}

extern "C" __global__ void cleared_and_added(float *sum) {
    if (blockIdx.x == 0 && threadIdx.x == 0) sum[0] = 0.0f;
    atomicAdd(sum, 1.0f);
}

extern "C" __global__ void row_sums(const float *x, float *y, int begun) {
    float sums[2];
    if (begun) sums[0] = sums[1] = 0.0f;
    for (int i = 0; i < 4; ++i) sums[i % 2] += x[4 * threadIdx.x + i];
    y[threadIdx.x] = sums[0] + sums[1];
}

extern "C" __global__ void both_memories(float *y) {
    __shared__ float fixed[2048];
    extern __shared__ float given[];
    fixed[threadIdx.x] = given[threadIdx.x] = 1.0f;
    y[threadIdx.x] = fixed[threadIdx.x];
}
"""

ORDERS = (0, -1, 5)


@pytest.fixture(scope="module")
def compiled():
    return module(TEXT, True)


def fault(compiled, name, grid, block, *arguments):
    """What the launch finds, the same in any order of threads and blocks."""
    for seed in ORDERS:
        with order(seed), pytest.raises(KernelFault) as found:
            launch(compiled, name, grid, block, *arguments)
    return str(found.value)


def counted(seed, compiled, released, acquired):
    x, sums = numpy.arange(256, dtype="float32"), poisoned(8, "float32")
    done, y = numpy.zeros(1, "int32"), poisoned(1, "float32")
    with order(seed):
        arguments = reads(x), writes(sums), writes(done), writes(y)
        launch(compiled, "sum_of_blocks", 8, 32, *arguments, released, acquired)
    return y


def test_what_other_blocks_have_left_needs_fences_on_both_sides(compiled):
    for seed in ORDERS:
        assert counted(seed, compiled, 1, 1) == 255 * 128
        for released, acquired in ((0, 1), (1, 0), (0, 0)):
            with pytest.raises(KernelFault, match="another block has written it, and no fences") as found:
                counted(seed, compiled, released, acquired)
            assert "of argument 1; another block" in str(found.value)
            assert "sum += sums[i]" in str(found.value)


def test_the_last_block_sees_what_was_written_before_a_barrier(compiled):
    x, sums = numpy.arange(256, dtype="float32"), poisoned(256, "float32")
    done, y = numpy.zeros(1, "int32"), poisoned(64, "float32")
    arguments = reads(x), writes(sums), writes(done), writes(y)
    for seed in ORDERS:
        y.fill(0)
        with order(seed):
            launch(compiled, "sum_of_threads", 4, 64, *arguments, 1)
        assert numpy.array_equal(y, x.reshape(4, 64).sum(0))
    found = fault(compiled, "sum_of_threads", 4, 64, *arguments, 0)
    assert "another block has written it" in found


def test_blocks_do_not_wait_for_each_other(compiled):
    sums, y = poisoned(4, "float32"), poisoned(1, "float32")
    launch(module(TEXT, False), "without_counting", 4, 1, writes(sums), writes(y), order=0)
    assert y == 4  # as the last block happens to run last
    with pytest.raises(KernelFault, match=r"race in global memory: the thread reads byte 0 of argument 0"):
        launch(compiled, "without_counting", 4, 1, writes(sums), writes(y), order=0)


def test_blocks_that_read_what_others_overwrite(compiled):
    x = numpy.arange(128, dtype="float32")
    launch(compiled, "moved_in_place", 4, 32, writes(x), 0)
    assert numpy.array_equal(x, numpy.arange(128) + 1)
    assert "another block has" in fault(compiled, "moved_in_place", 4, 32, writes(x), 32)
    assert "and no barrier orders the two" in fault(compiled, "moved_in_place", 1, 128, writes(x), 32)


@pytest.mark.parametrize("name", ["neighbours", "rounds"])
def test_a_barrier_left_out(compiled, name):
    x, memory, y = numpy.arange(64, dtype="float32"), poisoned(64, "float32"), poisoned(64, "float32")
    arguments = *([reads(x)] if name == "neighbours" else []), writes(memory), writes(y)
    for seed in ORDERS:
        with order(seed):
            launch(compiled, name, 1, 64, *arguments, 1)
    found = fault(compiled, name, 1, 64, *arguments, 0)
    assert "race in global memory: the thread" in found
    assert "and no barrier orders the two" in found


def test_a_missing_wait_within_a_warp(compiled):
    x = numpy.arange(32, dtype="uint16")
    memory, y = poisoned(32, "uint16"), poisoned(16, "uint32")
    launch(compiled, "pairs_of_a_warp", 1, 32, reads(x), writes(memory), writes(y), 1)
    assert numpy.array_equal(y.view("uint16"), x)
    found = fault(compiled, "pairs_of_a_warp", 1, 32, reads(x), writes(memory), writes(y), 0)
    assert "race in global memory: the thread reads" in found


def test_atomic_operations_of_all_blocks_on_one_number(compiled):
    total, y = numpy.zeros(1, "float32"), poisoned(128, "float32")
    for _ in range(2):  # what an earlier launch has done is done
        launch(compiled, "adds", 2, 64, writes(total), writes(y))
    assert total == 256
    with pytest.raises(KernelFault, match="race in global memory: the thread reads byte 0 of argument 0; thread"):
        launch(compiled, "cleared_and_added", 1, 32, writes(total), order=0)


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
def test_a_sum_that_does_not_begin_at_zero(sanitize):
    x, y = numpy.ones(128, "float32"), poisoned(32, "float32")
    launch(module(TEXT, sanitize), "row_sums", 1, 32, reads(x), writes(y), 1)
    assert (y == 4).all()
    launch(module(TEXT, sanitize), "row_sums", 1, 32, reads(x), writes(y), 0)
    assert not (numpy.abs(y) < 1e30).any()


@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
def test_static_and_dynamic_shared_memory_share_their_limit(sanitize):
    y = poisoned(32, "float32")
    launch(module(TEXT, sanitize), "both_memories", 1, 32, writes(y), shared_bytes=219 << 10)
    assert (y == 1).all()
    with pytest.raises(KernelFault, match="take 8192 bytes beside 225280 dynamic ones; a block can have 232448"):
        launch(module(TEXT, sanitize), "both_memories", 1, 32, writes(y), shared_bytes=220 << 10)
