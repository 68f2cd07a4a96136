"""The checker is itself checked: kernels with one fault each, and the same without it, which must pass."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from gpucnn_kernels.runtime.host import KernelFault, order, order_independent
from gpucnn_kernels.source import source_from_text
from tests.host_modules import launch, module, nothing_from_outside, poisoned, reads, writes  # noqa: F401

TEXT = r"""
#include "ptx.cuh"

extern "C" __global__ void copy_shifted(const float *x, float *y, int n, int read, int written) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i + written] = x[i + read];
}

extern "C" __global__ void copy_bytes(const unsigned char *x, unsigned char *y, int n) {
    if (threadIdx.x < n) y[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void neighbours(const float *x, float *y, int wait) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    if (wait) __syncthreads();
    y[threadIdx.x] = tile[(threadIdx.x + 1) % 64] + tile[(threadIdx.x + 63) % 64];
}

// The second barrier keeps the next round from writing where this one still reads.
extern "C" __global__ void rounds(const float *x, float *y, int wait) {
    __shared__ float tile[64];
    float sum = 0.0f;
    for (int round = 0; round < 3; ++round) {
        tile[threadIdx.x] = x[64 * round + threadIdx.x];
        __syncthreads();
        sum += tile[63 - threadIdx.x];
        if (wait) __syncthreads();
    }
    y[threadIdx.x] = sum;
}

extern "C" __global__ void winner(int *y, int race) {
    __shared__ int last;
    if (!race && threadIdx.x == 0) last = 0;
    if (race) last = threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = last;
}

extern "C" __global__ void half_of_a_warp(const float *x, float *y, int wait) {
    __shared__ float tile[32];
    tile[threadIdx.x] = x[threadIdx.x];
    if (wait) __syncwarp();
    y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Every thread has bytes of its own in words that it shares with others; then whole words are read.
extern "C" __global__ void bytes_of_words(const unsigned char *x, unsigned *y, int wait) {
    __shared__ __align__(4) unsigned char tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    tile[threadIdx.x] += 1;
    if (wait) __syncthreads();
    if (threadIdx.x < 16) y[threadIdx.x] = *(const unsigned *)(tile + 4 * threadIdx.x);
}

extern "C" __global__ void words_of_bytes(const unsigned *x, unsigned char *y, int wait) {
    __shared__ unsigned tile[16];
    if (threadIdx.x < 16) tile[threadIdx.x] = x[threadIdx.x];
    if (wait) __syncthreads();
    y[threadIdx.x] = ((const unsigned char *)tile)[threadIdx.x];
}

extern "C" __global__ void counted(int *y) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    atomicAdd(&count, 1);
    atomicMax(&count, 1);
    __syncthreads();
    y[threadIdx.x] = count;
}

extern "C" __global__ void divergent(int *y, int n) {
    if (threadIdx.x < n) __syncthreads();
    y[threadIdx.x] = 1;
}

extern "C" __global__ void two_barriers(int *y, int n) {
    if (threadIdx.x < n) {
        __syncthreads();
        y[threadIdx.x] = 1;
    } else {
        __syncthreads();
        y[threadIdx.x] = 2;
    }
}

extern "C" __global__ void different_votes(int *y, int n) {
    if (threadIdx.x < n) { y[threadIdx.x] = __syncthreads_count(1); } else { __syncthreads(); }
}

extern "C" __global__ void shuffle_with_mask(int *y, unsigned mask, int ended) {
    if (threadIdx.x < ended) return;
    y[threadIdx.x] = __shfl_xor_sync(mask, (int)threadIdx.x, 1);
}

extern "C" __global__ void shuffle_in_branches(int *y, int n) {
    if (threadIdx.x < n) {
        y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, (int)threadIdx.x, 1);
    } else {
        y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, (int)threadIdx.x, 1);
    }
}

extern "C" __global__ void shuffle_against_barrier(int *y, int n) {
    if (threadIdx.x < n) { y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1); } else { __syncthreads(); }
}

extern "C" __global__ void bad_width(int *y, int width) {
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1, width);
}

extern "C" __global__ void window(const float *x, float *y, int n, int fill) {
    __shared__ float tile[66];
    const int i = blockIdx.x * 64 + threadIdx.x - 1;
    if (i >= 0 && i < n) {
        tile[threadIdx.x] = x[i];
    } else if (fill) {
        tile[threadIdx.x] = 0.0f;
    }
    __syncthreads();
    const int j = blockIdx.x * 64 + threadIdx.x;
    if (threadIdx.x < 64 && j < n) y[j] = tile[threadIdx.x] + tile[threadIdx.x + 1] + tile[threadIdx.x + 2];
}

__device__ float from(const float *array, int index) { return array[index]; }

// The index comes through a pointer, so nothing but the memory itself can tell that it is outside.
extern "C" __global__ void past_shared(float *y, int index) {
    __shared__ float tile[20];
    tile[threadIdx.x % 20] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = from(tile, index);
}

extern "C" __global__ void past_row(float *y, int column) {
    __shared__ float tile[4][5];
    if (threadIdx.x < 20) tile[threadIdx.x / 5][threadIdx.x % 5] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = tile[1][column];
}

extern "C" __global__ void past_dynamic(float *y, int index) {
    extern __shared__ float tile[];
    tile[index + threadIdx.x] = 1.0f;
    y[threadIdx.x] = tile[index + threadIdx.x];
}

extern "C" __global__ void past_local(float *y, int index) {
    float held[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    held[index] = y[threadIdx.x];
    y[threadIdx.x] = held[0] + held[3];
}

__constant__ float table[4] = {1.0f, 2.0f, 3.0f, 4.0f};
extern "C" __global__ void past_constant(float *y, int index) { y[threadIdx.x] = from(table, index); }

extern "C" __global__ void unwaited(const float *x, float *y, int wait) {
    __shared__ float tile[32];
    copy_async<4>(tile + threadIdx.x, x + threadIdx.x);
    copy_async_commit();
    if (wait) copy_async_wait<0>();
    __syncthreads();
    y[threadIdx.x] = tile[31 - threadIdx.x];
}

extern "C" __global__ void misaligned_copy(const float *x, float *y, int offset) {
    __shared__ __align__(16) float tile[32];
    copy_async<16>(tile + offset, x);
    copy_async_wait_all();
    y[0] = tile[offset];
}

extern "C" __global__ void copy_to_global(const float *x, float *y) {
    copy_async<4>(y, x);
    copy_async_wait_all();
}

extern "C" __global__ void misaligned_rows(unsigned *y, int offset) {
    __shared__ __align__(16) unsigned short rows[32][8];
    for (int i = 0; i < 8; ++i) rows[threadIdx.x][i] = i;
    __syncthreads();
    unsigned fragment[1];
    load_matrix(fragment, &rows[threadIdx.x % 8][0] + offset);
    y[threadIdx.x] = fragment[0];
}

// C = A B of 16 x 8 by 8 x 8 numbers of tf32; the faulty one has two of A's fragment elements interchanged.
extern "C" __global__ void tensor_product(const float *a, const float *b, float *c, int swapped) {
    const int group = threadIdx.x / 4, in_group = threadIdx.x % 4;
    unsigned a_words[4], b_words[2];
    for (int i = 0; i < 4; ++i) {
        const int element = swapped && (i == 1 || i == 2) ? 3 - i : i;
        a_words[element] = round_to_tf32(a[(group + i % 2 * 8) * 8 + in_group + i / 2 * 4]);
    }
    for (int i = 0; i < 2; ++i) b_words[i] = round_to_tf32(b[(in_group + 4 * i) * 8 + group]);
    float accumulator[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    multiply_m16n8k8_tf32(accumulator, a_words, b_words);
    for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + in_group * 2 + i % 2] = accumulator[i];
}

extern "C" __global__ void part_of_a_warp_multiplies(float *y, int n) {
    unsigned a[2] = {0, 0}, b[1] = {0};
    float accumulator[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (threadIdx.x < n) multiply_m16n8k8_half(accumulator, a, b);
    y[threadIdx.x] = accumulator[0];
}

extern "C" __global__ void add(int *y, int x) { y[threadIdx.x] = y[threadIdx.x] + x; }
extern "C" __global__ void shift(int *y, int by) { y[threadIdx.x] = y[threadIdx.x] << by; }
extern "C" __global__ void divide(int *y, int by) { y[threadIdx.x] = y[threadIdx.x] / by; }
extern "C" __global__ void wide(const float *x, float4 *y, int offset) { y[0] = *(const float4 *)(x + offset); }
extern "C" __global__ void writes_to_const(const float *x, float *y) { ((float *)x)[3] = 1.0f; y[0] = x[3]; }
extern "C" __global__ void wild(float *y, unsigned long long address) { y[0] = *(const float *)address; }
extern "C" __global__ void recurse(int *y, int depth);
__device__ __noinline__ int deeper(volatile int *y, int depth) {
    volatile int room[1000];
    room[depth % 1000] = depth;
    return depth == 0 ? *y : deeper(y, depth - 1) + room[depth % 1000];
}
extern "C" __global__ void recurse(int *y, int depth) { y[0] = deeper(y, depth); }
extern "C" __global__ void asserts(int *y, int n) { assert(n == 3); y[0] = n; }
extern "C" __global__ void traps(int *y, int n) { if (n != 3) __trap(); y[0] = n; }
extern "C" __global__ void too_much_shared(float *y) {
    __shared__ float tile[12289];
    tile[threadIdx.x] = 1.0f;
    y[threadIdx.x] = tile[threadIdx.x];
}
"""

PLAIN, SANITIZED = False, True


def compiled(sanitize):
    return module(TEXT, sanitize)


def fault(sanitize, name, block, *arguments, grid=1, **options):
    """The KernelFault that a launch raises."""
    with pytest.raises(KernelFault) as caught:
        launch(compiled(sanitize), name, grid, block, *arguments, **options)
    assert caught.value.kernel == name
    return caught.value


def floats(size):
    return numpy.random.default_rng(size).random(size, "float32")


def line_of(words):
    """The number of the text's line that has these words, headers included."""
    lines = source_from_text(TEXT).text.splitlines()
    found = [number for number, line in enumerate(lines, 1) if words in line]
    assert len(found) == 1
    return found[0]


# ---- memory ----


@pytest.mark.parametrize(
    ("read", "written", "says"),
    [
        (1, 0, "read of 4 bytes at byte 400 of argument 0, which has 400 bytes"),
        (-1, 0, "read of 4 bytes at 4 bytes before argument 0 (of 400 bytes)"),
        (0, 1, "write of 4 bytes at byte 400 of argument 1, which has 400 bytes"),
        (0, -1, "write of 4 bytes at 4 bytes before argument 1 (of 400 bytes)"),
        (40, 0, "read of 4 bytes at byte 400 of argument 0"),
    ],
)
def test_an_index_outside_of_an_argument(read, written, says):
    x, y = floats(100), poisoned(100, "float32")
    before = y.copy()
    found = fault(SANITIZED, "copy_shifted", 32, reads(x), writes(y), 100, read, written, grid=4)
    assert says in str(found)
    assert found.line == line_of("y[i + written] = x[i + read]")
    if read > 0 or written > 0:
        first = 100 - max(read, written)
        assert found.block == (first // 32, 0, 0)
        assert found.thread == (first % 32, 0, 0)
    assert numpy.array_equal(y.view("uint8"), before.view("uint8"))  # nothing comes back from a faulty launch
    launch(compiled(SANITIZED), "copy_shifted", 4, 32, reads(x), writes(y), 100, 0, 0)
    assert numpy.array_equal(y, x)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_arguments_end_at_the_byte(size, offset):
    room = numpy.arange(64, dtype="uint8")
    x, y = room[offset : offset + size], poisoned(size, "uint8")
    launch(compiled(SANITIZED), "copy_bytes", 1, 32, reads(x), writes(y), size)
    assert numpy.array_equal(y, x)
    assert f"byte {size} of argument 0" in str(fault(SANITIZED, "copy_bytes", 32, reads(x), writes(y), size + 1))
    longer = room[offset : offset + size + 1]
    assert f"byte {size} of argument 1" in str(
        fault(SANITIZED, "copy_bytes", 32, reads(longer), writes(y), size + 1)
    )


def test_a_write_to_a_read_only_argument():
    x, y = floats(8), poisoned(8, "float32")
    found = fault(SANITIZED, "writes_to_const", 1, reads(x), writes(y))
    assert "write of 4 bytes at byte 12 of argument 0, which is read-only" in str(found)
    found = fault(PLAIN, "writes_to_const", 1, reads(x), writes(y))
    assert "argument 0 is read-only, and the kernel has written to it" in str(found)
    # Where the same memory is also a writable argument it is the kernel's to write.
    for sanitize in (PLAIN, SANITIZED):
        launch(compiled(sanitize), "writes_to_const", 1, 1, reads(x), writes(x))
        assert x[0] == 1.0


def test_null_and_wild_pointers_end_the_launch_and_not_the_process():
    y = poisoned(4, "float32")
    for sanitize in (PLAIN, SANITIZED):
        found = fault(sanitize, "copy_shifted", 1, None, writes(y), 1, 0, 0)
        assert "null pointer" in str(found)
        assert found.line == line_of("y[i + written] = x[i + read]")
        found = fault(sanitize, "wild", 1, writes(y), ctypes.c_ulonglong(0x123456789000))
        assert "the address 0x123456789000" in str(found)
        # The right address is an argument's, which a sanitized launch does not leave where it was.
        two = numpy.float32([2])
        if sanitize is PLAIN:
            launch(compiled(sanitize), "wild", 1, 1, writes(y), ctypes.c_ulonglong(reads(two).address))
            assert y[0] == 2


def test_a_shared_array_has_an_end():
    y = poisoned(32, "float32")
    launch(compiled(SANITIZED), "past_shared", 1, 32, writes(y), 19)
    assert (y == 1).all()
    found = fault(SANITIZED, "past_shared", 32, writes(y), 20)
    assert "read of 4 bytes at byte 80 of the variable" in str(found)
    assert "tile" in str(found)
    assert "which has 80 bytes" in str(found)
    assert found.line == line_of("float from(")


def test_a_row_of_a_shared_array_has_an_end():
    y = poisoned(32, "float32")
    launch(compiled(SANITIZED), "past_row", 1, 32, writes(y), 4)
    assert (y == 1).all()
    found = fault(SANITIZED, "past_row", 32, writes(y), 5)  # inside the array, in the next row
    assert "an index is outside of its array" in str(found)
    assert found.line == line_of("tile[1][column]")


def test_dynamic_shared_memory_has_an_end():
    y = poisoned(32, "float32")
    launch(compiled(SANITIZED), "past_dynamic", 1, 32, writes(y), 1, shared_bytes=132)
    assert (y == 1).all()
    found = fault(SANITIZED, "past_dynamic", 32, writes(y), 1, shared_bytes=131)
    assert "write of 4 bytes at byte 128 of the dynamic shared memory, which has 131 bytes" in str(found)
    assert "dynamic shared memory" in str(fault(SANITIZED, "past_dynamic", 32, writes(y), 0))


def test_local_and_constant_arrays_have_an_end():
    y = numpy.zeros(2, "float32")
    assert "outside of its array" in str(fault(SANITIZED, "past_local", 1, writes(y), 4))
    assert "byte 16 of the variable" in str(fault(SANITIZED, "past_constant", 1, writes(y), 4))


@pytest.mark.parametrize("sanitize", [PLAIN, SANITIZED], ids=["plain", "sanitized"])
def test_stacks_and_static_shared_memory_are_bounded(sanitize):
    y = numpy.zeros(1, "int32")
    launch(compiled(sanitize), "recurse", 1, 1, writes(y), 10)
    assert y[0] == 55
    found = fault(sanitize, "recurse", 1, writes(y), 1000)
    assert "bytes overflows" in str(found)
    launch(compiled(sanitize), "recurse", 1, 1, writes(y), 2)  # and the next launch has fresh stacks
    assert y[0] == 55 + 3
    wanted = fault(sanitize, "too_much_shared", 1, writes(numpy.zeros(1, "float32")))
    assert "take 49156 bytes; static ones can have 49152" in str(wanted)


# ---- barriers and warps ----


@pytest.mark.parametrize("sanitize", [PLAIN, SANITIZED], ids=["plain", "sanitized"])
@pytest.mark.parametrize("seed", [0, -1, 5])
def test_a_barrier_that_some_threads_never_reach(sanitize, seed):
    y = poisoned(96, "int32")
    with order(seed):
        launch(compiled(sanitize), "divergent", 1, 96, writes(y), 96)
        launch(compiled(sanitize), "divergent", 1, 96, writes(y), 0)
        found = fault(sanitize, "divergent", 96, writes(y), 40)
        assert f"threads 0-39 wait in __syncthreads at line {found.line}; threads 40-95 have ended" in str(found)
        assert found.line == line_of("if (threadIdx.x < n) __syncthreads();")
        launch(compiled(sanitize), "divergent", 1, 96, writes(y), 96)


@pytest.mark.parametrize("name", ["two_barriers", "different_votes"])
def test_threads_at_different_barriers(name):
    y = poisoned(64, "int32")
    launch(compiled(PLAIN), name, 1, 64, writes(y), 64)
    launch(compiled(PLAIN), name, 1, 64, writes(y), 0)
    found = str(fault(PLAIN, name, 64, writes(y), 32))
    assert "the block stands still: threads 0-31 wait in __syncthreads" in found
    assert "; threads 32-63 wait in __syncthreads at line" in found


@pytest.mark.parametrize(
    ("threads", "mask", "ended", "says"),
    [
        (32, 0xFFFFFFFF, 2, "names lanes 0x00000003, whose threads have ended"),
        (20, 0xFFFFFFFF, 0, "names lanes 0xfff00000, but the block ends at lane 19 of this warp"),
        (32, 0x0000FFFF, 0, "the mask 0x0000ffff leaves out lane 16"),
    ],
)
def test_masks_name_the_lanes_that_are_there(threads, mask, ended, says):
    y = poisoned(32, "int32")
    found = fault(PLAIN, "shuffle_with_mask", threads, writes(y), ctypes.c_uint(mask), ended)
    assert says in str(found)
    assert found.line == line_of("__shfl_xor_sync(mask, (int)threadIdx.x, 1)")


def test_a_lane_that_ends_while_others_wait_for_it():
    y = poisoned(32, "int32")
    with order(-1):  # the highest lanes wait first, and the lowest then end
        found = fault(PLAIN, "shuffle_with_mask", 32, writes(y), ctypes.c_uint(0xFFFFFFFF), 2)
    assert "threads 2-31 wait in __shfl_xor_sync" in str(found)
    assert "for all lanes of the mask 0xffffffff; threads 0-1 have ended" in str(found)


def test_lanes_of_one_operation_at_different_places():
    y = poisoned(32, "int32")
    launch(compiled(PLAIN), "shuffle_in_branches", 1, 32, writes(y), 32)
    assert numpy.array_equal(y, numpy.arange(32) ^ 1)
    found = str(fault(PLAIN, "shuffle_in_branches", 32, writes(y), 16))
    assert "lane 31 waits in __shfl_xor_sync" in found
    assert "lane 0 of the same warp waits in __shfl_xor_sync" in found
    found = str(fault(PLAIN, "shuffle_against_barrier", 32, writes(y), 16))
    assert "threads 0-15 wait in __shfl_xor_sync" in found
    assert "threads 16-31 wait in __syncthreads" in found


def test_a_tensor_core_takes_the_whole_warp():
    y = poisoned(32, "float32")
    launch(compiled(PLAIN), "part_of_a_warp_multiplies", 1, 32, writes(y), 32)
    assert "threads 0-15 wait in mma.m16n8k8.f16" in str(
        fault(PLAIN, "part_of_a_warp_multiplies", 32, writes(y), 16)
    )
    assert "the block ends at lane 15" in str(fault(PLAIN, "part_of_a_warp_multiplies", 16, writes(y), 16))


def test_widths_are_powers_of_two():
    y = poisoned(32, "int32")
    assert "width must be a power of two from 1 to 32, got 12" in str(fault(PLAIN, "bad_width", 32, writes(y), 12))


# ---- races, and what was never written ----


def run(sanitize, name, inputs, shape, *arguments, block, grid=1):
    """A function that launches once and returns the result."""

    def once():
        y = poisoned(shape, "float32")
        launch(compiled(sanitize), name, grid, block, *(reads(x) for x in inputs), writes(y), *arguments)
        return y

    return once


@pytest.mark.parametrize(("name", "size"), [("neighbours", 64), ("rounds", 192)])
def test_a_barrier_left_out(name, size):
    x = floats(size)
    assert order_independent(run(PLAIN, name, [x], 64, 1, block=64))
    assert not order_independent(run(PLAIN, name, [x], 64, 0, block=64))
    # Sanitized, the race itself is found, in any order.
    assert order_independent(run(SANITIZED, name, [x], 64, 1, block=64))
    for seed in (0, -1, 3):
        with order(seed):
            found = fault(SANITIZED, name, 64, reads(x), writes(poisoned(64, "float32")), 0)
            assert "race in shared memory: the thread" in str(found)
            assert "with no barrier in between" in str(found)


def test_a_missing_wait_within_a_warp():
    x = floats(32)
    assert order_independent(run(SANITIZED, "half_of_a_warp", [x], 32, 1, block=32))
    assert not order_independent(run(PLAIN, "half_of_a_warp", [x], 32, 0, block=32))
    found = fault(SANITIZED, "half_of_a_warp", 32, reads(x), writes(poisoned(32, "float32")), 0)
    assert "race in shared memory" in str(found)


def test_races_are_told_by_the_byte():
    x = numpy.arange(64, dtype="uint8")
    y, z = poisoned(16, "uint32"), poisoned(64, "uint8")
    for seed in (0, -1, 4):
        with order(seed):
            launch(compiled(SANITIZED), "bytes_of_words", 1, 64, reads(x), writes(y), 1)
            assert numpy.array_equal(y.view("uint8"), x + 1)
            launch(compiled(SANITIZED), "words_of_bytes", 1, 64, reads(x), writes(z), 1)
            assert numpy.array_equal(z, x)
            for name, result in (("bytes_of_words", y), ("words_of_bytes", z)):
                found = str(fault(SANITIZED, name, 64, reads(x), writes(result), 0))
                assert "race in shared memory: the thread" in found
                assert "of the variable" in found


def test_atomic_operations_do_not_race_with_each_other():
    y = poisoned(64, "int32")
    launch(compiled(SANITIZED), "counted", 1, 64, writes(y))
    assert (y == 64).all()


def test_a_race_between_writers_shows_in_the_order():
    def once(race):
        y = poisoned(64, "int32")
        launch(compiled(SANITIZED), "winner", 1, 64, writes(y), race)
        return y

    assert order_independent(lambda: once(0))
    assert not order_independent(lambda: once(1))


@pytest.mark.parametrize("sanitize", [PLAIN, SANITIZED], ids=["plain", "sanitized"])
def test_a_missing_zero_fill(sanitize):
    x = floats(100)
    padded = numpy.concatenate([[0], x, [0]]).astype("float32")
    expected = padded[:-2] + padded[1:-1] + padded[2:]
    right = run(sanitize, "window", [x], 100, 100, 1, block=66, grid=2)()
    assert numpy.array_equal(right, expected)
    wrong = run(sanitize, "window", [x], 100, 100, 0, block=66, grid=2)()
    assert numpy.isnan(wrong[[0, 99]]).all()
    assert numpy.array_equal(wrong[1:99], expected[1:99])


@pytest.mark.parametrize("sanitize", [PLAIN, SANITIZED], ids=["plain", "sanitized"])
def test_an_asynchronous_copy_without_its_wait(sanitize):
    x = floats(32)
    assert numpy.array_equal(run(sanitize, "unwaited", [x], 32, 1, block=32)(), x[::-1])
    assert numpy.isnan(run(sanitize, "unwaited", [x], 32, 0, block=32)()).all()


def test_a_wrong_fragment_layout():
    random = numpy.random.default_rng(8)
    a, b = (random.integers(-4, 5, shape).astype("float32") for shape in ((16, 8), (8, 8)))
    right = run(PLAIN, "tensor_product", [a, b], (16, 8), 0, block=32)()
    assert numpy.array_equal(right, a @ b)
    wrong = run(PLAIN, "tensor_product", [a, b], (16, 8), 1, block=32)()
    assert numpy.abs(wrong - a @ b).max() >= 1


# ---- undefined behaviour and alignment ----


@pytest.mark.parametrize(
    ("name", "value", "argument", "says"),
    [
        ("add", 2**31 - 1, 1, "an addition of signed integers overflows"),
        ("shift", 1, 32, "a shift by"),
        ("divide", 1, 0, "a division by zero"),
        ("divide", -(2**31), -1, "of the lowest integer by -1"),
    ],
)
def test_undefined_arithmetic(name, value, argument, says):
    y = numpy.array([value], "int32")
    found = fault(SANITIZED, name, 1, writes(y), argument)
    assert says in str(found)
    assert found.line == line_of(f"void {name}(int *y")
    if name == "divide":  # the processor itself raises this one
        assert "division by zero" in str(fault(PLAIN, name, 1, writes(y), argument))


def aligned_floats(size):
    room = numpy.zeros(size + 16, "float32")
    place = (-room.ctypes.data // 4) % 16
    return room[place : place + size]


@pytest.mark.skipif(
    "clang" in os.environ.get("CXX", ""),
    reason="clang watches the alignment of a vector's parts, not of the vector",
)
def test_misaligned_vectors():
    x, y = aligned_floats(16), aligned_floats(4)
    x[:] = numpy.arange(16)
    launch(compiled(SANITIZED), "wide", 1, 1, reads(x), writes(y), 4)
    assert y.tolist() == [4, 5, 6, 7]
    found = fault(SANITIZED, "wide", 1, reads(x), writes(y), 3)
    assert "misaligned access: the address ends in 0x" in str(found)
    assert "its type needs a multiple of 16" in str(found)
    # An argument keeps its own alignment, so one that the caller has misaligned is found too.
    assert "misaligned" in str(fault(SANITIZED, "wide", 1, reads(x[1:]), writes(y), 0))


def test_misaligned_ptx():
    x, y = aligned_floats(16), poisoned(32, "float32")
    launch(compiled(PLAIN), "misaligned_copy", 1, 1, reads(x), writes(y), 4)
    found = str(fault(PLAIN, "misaligned_copy", 1, reads(x), writes(y), 2))
    assert "both addresses must be multiples of that, the shared one ends in 0x" in found
    assert "both addresses" in str(fault(PLAIN, "misaligned_copy", 1, reads(x[1:]), writes(y), 4))
    found = str(fault(PLAIN, "misaligned_copy", 1, reads(x), writes(y), 32))
    assert "the destination's 16 bytes are not all in the block's shared memory" in found
    found = str(fault(PLAIN, "copy_to_global", 1, reads(x), writes(y)))
    assert "not all in the block's shared memory" in found
    found = str(fault(PLAIN, "misaligned_rows", 32, writes(poisoned(32, "uint32")), 4))
    assert "ldmatrix: a row's address must be a multiple of 16, lane 0's ends in 0x" in found
    launch(compiled(PLAIN), "misaligned_rows", 1, 32, writes(poisoned(32, "uint32")), 8)


@pytest.mark.parametrize(
    ("name", "says"), [("asserts", "the assertion n == 3 does not hold"), ("traps", "__trap()")]
)
def test_assertions_and_traps(name, says):
    y = numpy.zeros(1, "int32")
    launch(compiled(PLAIN), name, 1, 1, writes(y), 3)
    found = fault(PLAIN, name, 1, writes(y), 4)
    assert says in str(found)
    assert found.line == line_of(f"void {name}(int *y")


# ---- a whole command ----


@pytest.mark.compiler
def test_a_command_runs_sanitized(tmp_path):
    kernels = str(Path(__file__).resolve().parent.parent / "kernels")
    program = (
        "import numpy, ctypes\nfrom gpucnn_kernels.runtime.host import *\n"
        "text = 'extern \"C\" __global__ void f(const float *x, float *y) { *y = x[threadIdx.x + 1]; }'\n"
        "x, y = numpy.zeros(8, 'f'), numpy.zeros(8, 'f')\n"
        "memory = [Memory(x.ctypes.data, 32, False), Memory(y.ctypes.data, 32, True)]\n"
        "try:\n    HostModule(text, ['f']).launch('f', (1, 1, 1), (8, 1, 1), memory)\n"
        "except KernelFault as fault:\n    print(fault)\n    raise SystemExit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "gpucnn_kernels.runtime.host", sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": kernels},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert "kernel f, block (0, 0, 0), thread (7, 0, 0), line 1: read of 4 bytes at byte 32" in done.stdout


def test_the_command_line_says_how_it_is_used(tmp_path):
    kernels = str(Path(__file__).resolve().parent.parent / "kernels")
    for arguments, status, says in (([], 2, "usage: python -m"), (["no-such-command"], 127, "cannot run no-such")):
        done = subprocess.run(
            [sys.executable, "-m", "gpucnn_kernels.runtime.host", *arguments],
            env={**os.environ, "PYTHONPATH": kernels},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, says in done.stderr) == (status, True)
