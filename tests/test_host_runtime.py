"""The host runtime's execution model: every result against plain NumPy, plain and sanitized, in several orders."""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from gpucnn_kernels.runtime import host_build, nvrtc
from gpucnn_kernels.runtime.host import HostCompileError, HostModule, KernelFault, Memory, order, order_independent
from gpucnn_kernels.source import source_from_text
from tests.host_modules import launch, module, nothing_from_outside, of_ptx, poisoned, reads, writes  # noqa: F401

TEXT = r"""
// The comment mentions __shared__ int nothing[3]; and must not count.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#define SQUARE(x) ((x) * (x))

struct Affine {
    float scale;
    int offset;
    long long count;
};

__constant__ float weights[4] = {1.0f, 2.0f, 4.0f, 8.0f};
__device__ int launches;
__shared__ int outside[32];

// Overloads of the user's beside CUDA's of the same name.
__device__ __forceinline__ float max(float x, float y, float z) { return max(max(x, y), z); }

template <class T, int WIDTH> __device__ T neighbour(T value) {
    __shared__ T held[WIDTH];
    held[threadIdx.x] = value;
    __syncthreads();
    return held[(threadIdx.x + 1) % WIDTH];
}

extern "C" __global__ void indices(int *out, int width, int height) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    const int z = blockIdx.z * blockDim.z + threadIdx.z;
    int *place = out + 4 * ((z * height + y) * width + x);
    place[0] = x; place[1] = y; place[2] = z;
    place[3] = gridDim.x * 10000 + gridDim.y * 1000 + gridDim.z * 100 + warpSize;
}

extern "C" __global__ void reverse(const float *x, float *y, int n) {
    __shared__ float tile[128], spare;
    if (threadIdx.x == 0) spare = 1.0f;
    tile[threadIdx.x] = x[blockIdx.x * n + threadIdx.x];
    __syncthreads();
    y[blockIdx.x * n + threadIdx.x] = tile[n - 1 - threadIdx.x] + spare;
}

extern "C" __global__ void __launch_bounds__(256) total(const float *x, float *out, int n) {
    extern __shared__ __align__(16) float part[];
    float sum = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    part[threadIdx.x] = sum;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *out = part[0];
}

extern "C" __global__ void shapes(const float *x, float *y) {
    extern __shared__ float rows[][8];
    rows[threadIdx.y][threadIdx.x] = x[threadIdx.y * 8 + threadIdx.x];
    __syncthreads();
    y[threadIdx.x * 4 + threadIdx.y] = rows[threadIdx.y][threadIdx.x];
}

extern "C" __global__ void templates(const float *x, float *y) {
    const float next = neighbour<float, 32>(x[threadIdx.x]);
    y[threadIdx.x] = next + 100.0f * neighbour<int, 32>((int)x[threadIdx.x ^ 1]);
}

extern "C" __global__ void unset_shared(unsigned *out) {
    __shared__ unsigned inside[32];
    extern __shared__ unsigned dynamic[];
    out[blockIdx.x * 96 + threadIdx.x] = inside[threadIdx.x];
    out[blockIdx.x * 96 + 32 + threadIdx.x] = dynamic[threadIdx.x];
    out[blockIdx.x * 96 + 64 + threadIdx.x] = outside[threadIdx.x];
    __syncthreads();
    inside[threadIdx.x] = dynamic[threadIdx.x] = outside[threadIdx.x] = 1;
}

extern "C" __global__ void shuffles(const int *x, int *y, int width) {
    const int value = x[threadIdx.x];
    int *place = y + 6 * threadIdx.x;
    place[0] = __shfl_sync(0xffffffffu, value, 5, width);
    place[1] = __shfl_sync(0xffffffffu, value, threadIdx.x + 3, width);
    place[2] = __shfl_up_sync(0xffffffffu, value, 3, width);
    place[3] = __shfl_down_sync(0xffffffffu, value, 3, width);
    place[4] = __shfl_xor_sync(0xffffffffu, value, 6, width);
    if (threadIdx.x % 32 < 8) {
        place[5] = __shfl_xor_sync(0x000000ffu, value, 1);
    } else {
        place[5] = __shfl_xor_sync(0xffffff00u, value, 2);
    }
}

extern "C" __global__ void shuffled_types(double *out) {
    const int lane = threadIdx.x;
    double *place = out + 7 * lane;
    place[0] = __shfl_down_sync(0xffffffffu, 1.5f * lane, 1);
    place[1] = __shfl_down_sync(0xffffffffu, 1e300 * lane, 1);
    place[2] = __shfl_down_sync(0xffffffffu, 3000000000u + lane, 1);
    place[3] = __shfl_down_sync(0xffffffffu, -5000000000ll * lane, 1);
    place[4] = __shfl_down_sync(0xffffffffu, 5000000000ull * lane, 1);
    place[5] = __half2float(__shfl_down_sync(0xffffffffu, __float2half(0.25f * lane), 1));
    place[6] = __bfloat162float(__shfl_down_sync(0xffffffffu, __float2bfloat16(0.5f * lane), 1));
}

extern "C" __global__ void votes(const int *x, unsigned *y) {
    const int value = x[threadIdx.x];
    unsigned *place = y + 9 * threadIdx.x;
    place[0] = __ballot_sync(0xffffffffu, value);
    place[1] = __any_sync(0xffffffffu, value > 90);
    place[2] = __all_sync(0xffffffffu, value >= 0);
    place[3] = (unsigned)__reduce_add_sync(0xffffffffu, value);
    place[4] = (unsigned)__reduce_min_sync(0xffffffffu, value - 50);
    place[5] = (unsigned)__reduce_max_sync(0xffffffffu, value - 50);
    place[6] = __syncthreads_count(value > 50);
    place[7] = __syncthreads_and(value >= 0) != 0;
    place[8] = __syncthreads_or(value > 1000) != 0;
    __syncwarp();
}

extern "C" __global__ void atomics(
    int *i, unsigned *u, unsigned long long *w, float *f, double *d, __half *h, __nv_bfloat16 *b
) {
    const int n = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(i, n); atomicMax(i + 1, n); atomicMin(i + 2, -n); atomicXor(i + 3, n); atomicSub(i + 4, 1);
    atomicAnd(u, ~(1u << n % 32)); atomicOr(u + 1, 1u << n % 32); atomicInc(u + 2, 9u); atomicAdd(u + 3, 2u);
    atomicDec(u + 4, 9u);
    atomicAdd(w, 1ull << 33); atomicMax(w + 1, (unsigned long long)n << 40);
    atomicAdd(f, 0.5f); atomicAdd(d, 0.25); atomicAdd(h, __float2half(1.0f)); atomicAdd(b, __float2bfloat16(1.0f));
    if (n == 7) atomicExch(f + 1, 7.0f);
    // A maximum of floats through compare-and-swap, as code for older GPUs writes it.
    int *bits = (int *)(f + 2), seen = *bits, assumed;
    do {
        assumed = seen;
        seen = atomicCAS(bits, assumed, __float_as_int(fmaxf((float)n, __int_as_float(assumed))));
    } while (assumed != seen);
}

extern "C" __global__ void vectors(const float4 *x, float4 *y, const uchar4 *bytes, int2 *pairs, Affine affine) {
    const long long i = threadIdx.x;
    if (i >= affine.count) return;
    const float4 value = x[i];
    y[i] = make_float4(
        affine.scale * value.x + affine.offset, affine.scale * value.y, SQUARE(value.z), max(value.w, 1.0f, 0.5f)
    );
    const uchar4 byte = bytes[i];
    pairs[i] = make_int2(byte.x + byte.y, byte.z * byte.w + __float2int_rn(weights[i % 4]));
    if (i == 0) atomicAdd(&launches, 1);
    pairs[0].y = i == 0 ? launches : pairs[0].y;
}

extern "C" __global__ void bits(const unsigned *x, unsigned *y, float *f) {
    const unsigned value = x[threadIdx.x], other = x[threadIdx.x ^ 1];
    unsigned *place = y + 10 * threadIdx.x;
    place[0] = __popc(value); place[1] = __clz((int)value); place[2] = __ffs((int)value); place[3] = __brev(value);
    place[4] = __umulhi(value, other);
    place[5] = (unsigned)(__umul64hi((unsigned long long)value << 32, (unsigned long long)other << 32));
    place[6] = __funnelshift_l(value, other, 7); place[7] = __byte_perm(value, other, 0x6240);
    place[8] = __float_as_uint(__uint_as_float(value)); place[9] = min(value, 77u) + max(value, other);
    f[4 * threadIdx.x] = __fmaf_rn(1.0f + 0x1p-20f, 1.0f - 0x1p-20f, -1.0f);
    f[4 * threadIdx.x + 1] = rsqrtf((float)(threadIdx.x + 1));
    f[4 * threadIdx.x + 2] = __expf(-0.5f * threadIdx.x) + erff(0.1f * threadIdx.x);
    f[4 * threadIdx.x + 3] = __fdividef(1.0f, __fadd_rn(threadIdx.x, 1.0f)) + tanhf(0.2f * threadIdx.x);
}
"""

ORDERS = (0, -1, 1, 20)


@pytest.fixture(params=["plain", "sanitized", of_ptx("ptx", name="ptx")])
def compiled(request):
    return module(TEXT, request.param == "sanitized", "sm_90" if request.param == "ptx" else None)


@pytest.fixture(params=ORDERS)
def any_order(request):
    with order(request.param):
        yield request.param


@pytest.mark.nvrtc
def test_the_text_is_cuda():
    cubin, _ = nvrtc.compile_source(source_from_text(TEXT), "sm_80")
    assert len(cubin) > 0


def test_indices(compiled, any_order):
    width, height, depth = 6, 6, 4
    out = poisoned((depth, height, width, 4), "int32")
    launch(compiled, "indices", (3, 2, 2), (2, 3, 2), writes(out), width, height)
    z, y, x = numpy.indices((depth, height, width))
    expected = numpy.stack([x, y, z, numpy.full_like(x, 32232)], axis=-1)
    assert numpy.array_equal(out, expected)


@pytest.mark.parametrize("threads", [1, 31, 32, 128])
def test_shared_memory_and_a_barrier(compiled, any_order, threads):
    x = numpy.random.default_rng(1).random((5, threads), "float32")
    y = poisoned(x.shape, "float32")
    launch(compiled, "reverse", 5, threads, reads(x), writes(y), threads)
    assert numpy.array_equal(y, x[:, ::-1] + 1)


def test_dynamic_shared_memory(compiled, any_order):
    x = numpy.random.default_rng(2).integers(-50, 50, 1000).astype("float32")
    out = poisoned(1, "float32")
    launch(compiled, "total", 1, 256, reads(x), writes(out), 1000, shared_bytes=1024)
    assert out[0] == x.sum()  # integers: exact in any order
    rows = numpy.random.default_rng(3).random((4, 8), "float32")
    columns = poisoned((8, 4), "float32")
    launch(compiled, "shapes", 1, (8, 4), reads(rows), writes(columns), shared_bytes=128)
    assert numpy.array_equal(columns, rows.T)


def test_shared_memory_of_templates(compiled, any_order):
    x = numpy.random.default_rng(4).integers(0, 9, 32).astype("float32")
    y = poisoned(32, "float32")
    launch(compiled, "templates", 1, 32, reads(x), writes(y))
    assert numpy.array_equal(y, numpy.roll(x, -1) + 100 * numpy.roll(x[numpy.arange(32) ^ 1], -1))


def test_shared_memory_begins_as_ones_in_every_block(compiled):
    out = poisoned((3, 96), "uint32")
    launch(compiled, "unset_shared", 3, 32, writes(out), shared_bytes=128)
    assert (out == 0xFFFFFFFF).all()


@pytest.mark.parametrize("width", [32, 16, 8, 2])
def test_shuffles(compiled, any_order, width):
    x = numpy.random.default_rng(5).integers(0, 1000, 64).astype("int32")
    y = poisoned((64, 6), "int32")
    launch(compiled, "shuffles", 1, 64, reads(x), writes(y), width)
    for thread in range(64):
        warp, lane = thread // 32 * 32, thread % 32
        segment, within = lane // width * width, lane % width
        assert y[thread, 0] == x[warp + segment + 5 % width]
        assert y[thread, 1] == x[warp + segment + (lane + 3) % width]
        assert y[thread, 2] == x[warp + (lane - 3 if within >= 3 else lane)]
        assert y[thread, 3] == x[warp + (lane + 3 if within + 3 < width else lane)]
        # The PTX manual bounds the butterfly's source from above only.
        assert y[thread, 4] == x[warp + (lane ^ 6 if (lane ^ 6) < segment + width else lane)]
        assert y[thread, 5] == x[warp + (lane ^ (1 if lane < 8 else 2))]


def test_shuffles_of_every_type(compiled, any_order):
    out = poisoned((32, 7), "float64")
    launch(compiled, "shuffled_types", 1, 32, writes(out))
    source = numpy.minimum(numpy.arange(32) + 1, 31).astype("float64")
    steps = [1.5, 1e300, 1.0, -5e9, 5e9, 0.25, 0.5]
    expected = source[:, None] * numpy.array(steps)
    expected[:, 2] += 3000000000
    assert numpy.array_equal(out, expected)


def test_votes_and_reductions(compiled, any_order):
    x = numpy.random.default_rng(6).integers(0, 100, 96).astype("int32") * (numpy.arange(96) % 3 > 0)
    x = x.astype("int32")
    y = poisoned((96, 9), "uint32")
    launch(compiled, "votes", 1, 96, reads(x), writes(y))
    for warp in range(3):
        lanes = x[32 * warp : 32 * warp + 32].astype("int64")
        ballot = sum(1 << lane for lane in range(32) if lanes[lane])
        expected = [ballot, (lanes > 90).any(), 1, lanes.sum(), lanes.min() - 50, lanes.max() - 50]
        expected += [(x > 50).sum(), 1, 0]
        for lane in range(32):
            assert y[32 * warp + lane].tolist() == [int(value) & 0xFFFFFFFF for value in expected]


def test_atomics(compiled, any_order):
    import ml_dtypes

    count = 200
    n = numpy.arange(count)
    i = numpy.zeros(5, "int32")
    u = numpy.array([0xFFFFFFFF, 0, 0, 0, 0], "uint32")
    w, f, d = numpy.zeros(2, "uint64"), numpy.zeros(3, "float32"), numpy.zeros(1, "float64")
    h, b = numpy.zeros(1, "float16"), numpy.zeros(1, ml_dtypes.bfloat16)
    launch(compiled, "atomics", 4, 50, *(writes(array) for array in (i, u, w, f, d, h, b)))
    assert i.tolist() == [n.sum(), count - 1, -(count - 1), int(numpy.bitwise_xor.reduce(n)), -count]
    assert u.tolist() == [0, 0xFFFFFFFF, count % 10, 2 * count, (10 - count % 10) % 10]
    assert w.tolist() == [count << 33, (count - 1) << 40]
    assert f.tolist() == [count / 2, 7.0, count - 1]
    assert d[0] == count / 4
    assert float(h[0]) == count
    assert float(b[0]) == count


class Affine(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_float), ("offset", ctypes.c_int), ("count", ctypes.c_longlong))


def test_vectors_structs_constants_and_device_variables():
    compiled = HostModule(TEXT, ["vectors"], sanitize=False)
    before = None
    for _ in range(2):
        random = numpy.random.default_rng(7)
        x = random.random((20, 4), "float32")
        octets = random.integers(0, 256, (20, 4), "uint8")
        y, pairs = poisoned((20, 4), "float32"), poisoned((20, 2), "int32")
        launch(compiled, "vectors", 1, 32, reads(x), writes(y), reads(octets), writes(pairs), Affine(3.0, -2, 20))
        three = numpy.float32(3)
        expected = [three * x[:, 0] - 2, three * x[:, 1], x[:, 2] * x[:, 2], numpy.maximum(x[:, 3], 1)]
        assert numpy.array_equal(y, numpy.stack(expected, axis=1))
        wide = octets.astype("int64")
        first, second = wide[:, 0] + wide[:, 1], wide[:, 2] * wide[:, 3] + 2 ** (numpy.arange(20) % 4)
        assert numpy.array_equal(pairs[:, 0], first)
        assert numpy.array_equal(pairs[1:, 1], second[1:])
        # A __device__ variable keeps its value from launch to launch.
        assert before is None or pairs[0, 1] == before + 1
        before = pairs[0, 1]


def test_bits_and_mathematics(compiled):
    x = numpy.array([0, 1, 0xFFFFFFFF, 0x80000000, 12345, 0x00F0F000, 77, 0x7FC00000], "uint32")
    y, f = poisoned((8, 10), "uint32"), poisoned((8, 4), "float32")
    launch(compiled, "bits", 1, 8, reads(x), writes(y), writes(f))
    for lane in range(8):
        value, other = int(x[lane]), int(x[lane ^ 1])
        text = f"{value:032b}"
        both = value | other << 32
        octets = both.to_bytes(8, "little")
        lowest = (value & -value).bit_length()
        assert y[lane].tolist() == [
            text.count("1"),
            32 - value.bit_length(),
            lowest,
            int(text[::-1], 2),
            value * other >> 32,
            (value * other) & 0xFFFFFFFF,
            (both << 7 >> 32) & 0xFFFFFFFF,
            int.from_bytes(bytes(octets[index] for index in (0, 4, 2, 6)), "little"),
            value,
            (min(value, 77) + max(value, other)) & 0xFFFFFFFF,
        ]
        assert f[lane, 0] == -(2.0**-40)  # one rounding: a product of its own would give 0
        for got, expected in (
            (f[lane, 1], 1 / math.sqrt(lane + 1)),
            (f[lane, 2], math.exp(-0.5 * lane) + math.erf(0.1 * lane)),
            (f[lane, 3], 1 / (lane + 1) + math.tanh(0.2 * lane)),
        ):
            assert abs(float(got) - expected) <= 4 * 2.0**-24 * max(abs(expected), 1)


def test_overlapping_arguments_stay_one_memory():
    for sanitize in (False, True):
        compiled = module(TEXT, sanitize)
        both = numpy.arange(40, dtype="float32")
        x, y = both[:32], both[8:]
        launch(compiled, "reverse", 1, 32, Memory(x.ctypes.data, x.nbytes, False), writes(y), 32)
        assert both.tolist() == [*range(8), *range(32, 0, -1)]


def test_orders_are_different_and_repeatable():
    text = r"""
extern "C" __global__ void arrivals(int *next, int *place) {
    place[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
    __syncthreads();
    place[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}
"""
    compiled = module(text, False)

    def arrivals():
        counter, place = numpy.zeros(1, "int32"), poisoned((3, 2, 40), "int32")
        launch(compiled, "arrivals", 3, 40, writes(counter), writes(place))
        return place

    by_index = arrivals()
    ascending = numpy.arange(120).reshape(3, 40)
    assert numpy.array_equal(by_index, numpy.stack([ascending, ascending], axis=1))
    with order(-1):
        assert numpy.array_equal(arrivals(), by_index[::-1, :, ::-1])
    with order(7):
        shuffled = arrivals()
        assert numpy.array_equal(arrivals(), shuffled)
    with order(8):
        assert not numpy.array_equal(arrivals(), shuffled)
    assert numpy.array_equal(numpy.sort(shuffled, axis=None), numpy.sort(by_index, axis=None))
    assert not numpy.array_equal(shuffled[0, 0], shuffled[0, 1])  # drawn anew after the barrier
    assert not order_independent(arrivals)
    assert order_independent(lambda: numpy.sort(arrivals(), axis=None))
    with pytest.raises(ValueError, match="at least two"):
        order_independent(arrivals, [1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([3], "has 3 parameters, got 1 arguments"),
        (["x", "y", 3.0], "argument 2 must be an integer of 4 bytes, got a floating-point number"),
        (["x", "y", ctypes.c_longlong(3)], "argument 2 must have the 4 bytes of its parameter, got 8"),
        (["x", ctypes.c_int(3), 3], "argument 1 must be a pointer of 8 bytes, got an integer"),
        (["x", "y", "y"], "argument 2 must be an integer of 4 bytes, got a pointer"),
        (["x", "y", numpy.int32(3)], "got int32; a Python number has no width"),
        (["x", "y", Affine()], "argument 2 must be an integer of 4 bytes, got a struct"),
    ],
)
def test_arguments_are_checked(arguments, says):
    arrays = {"x": reads(numpy.zeros(4, "float32")), "y": writes(numpy.zeros(4, "float32"))}
    values = [arrays.get(value, value) if isinstance(value, str) else value for value in arguments]
    with pytest.raises(TypeError) as caught:
        launch(module(TEXT, False), "reverse", 1, 1, *values)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "says"),
    [
        ((0, 1, 1), (1, 1, 1), 0, "grid must be three numbers"),
        ((1, 70000, 1), (1, 1, 1), 0, "got (1, 70000, 1)"),
        ((1, 1, 1), (1, 1, 65), 0, "block must be three numbers"),
        ((1, 1, 1), (64, 17, 1), 0, "at most 1024 threads"),
        ((1, 1, 1), (1, 1, 1), 300000, "shared_bytes must be from 0 to 232448, got 300000"),
    ],
)
def test_dimensions_are_checked(grid, block, shared_bytes, says):
    array = writes(numpy.zeros(4, "float32"))
    with pytest.raises(ValueError) as caught:
        module(TEXT, False).launch(
            "reverse", grid, block, [array, array, ctypes.c_int(1)], shared_bytes=shared_bytes
        )
    assert says in str(caught.value)


def test_fibers_of_the_c_library(monkeypatch):
    """Where there is no switch in assembly; here it is only asked for."""
    monkeypatch.setattr(host_build, "COMMON_FLAGS", (*host_build.COMMON_FLAGS, "-DGPUCNN_HOST_UCONTEXT=1"))
    text = TEXT + "// with the C library's contexts\n"
    for sanitize in (False, True):
        compiled = HostModule(text, ["reverse", "shuffles"], sanitize=sanitize)
        x, y = numpy.arange(128, dtype="float32"), poisoned(128, "float32")
        for seed in (0, 5):
            launch(compiled, "reverse", 1, 128, reads(x), writes(y), 128, order=seed)
            assert numpy.array_equal(y, x[::-1] + 1)
            launch(compiled, "reverse", 2, 64, reads(x), writes(y), 64, order=seed)
            assert numpy.array_equal(y, x.reshape(2, 64)[:, ::-1].reshape(-1) + 1)
        with pytest.raises(KernelFault, match="null pointer"):
            launch(compiled, "reverse", 1, 64, reads(x), None, 64)
        launch(compiled, "reverse", 1, 128, reads(x), writes(y), 128)
        assert numpy.array_equal(y, x[::-1] + 1)


def test_unknown_kernels_and_bad_orders():
    with pytest.raises(ValueError, match="no kernel 'nothing'; it was made for indices, reverse"):
        launch(module(TEXT, False), "nothing", 1, 1)
    with pytest.raises(ValueError, match="at least one kernel"):
        HostModule(TEXT, [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('extern "C" __global__ void k(int *x) {\n    x[0] = undeclared;\n}', "k.cu:2:12: error"),
        (
            'extern "C" __global__ void k(unsigned *x) { *x = __activemask(); }',
            "pass the mask of the lanes you mean",
        ),
        ('extern "C" __global__ void k() { __shared__ int x = 3; }', "k.cu:1: a __shared__ variable cannot have"),
        (
            'extern "C" __global__ void k() { extern __shared__ int x; }',
            "declared as 'extern __shared__ type name[];'",
        ),
        (
            '#define S __shared__ int x;\nextern "C" __global__ void k() { S }',
            "k.cu:1: the host runtime reads no __sh",
        ),
        ('#include <vector>\nextern "C" __global__ void k() {}', "k.cu:1:10: fatal error: "),
        ('extern "C" __global__ void k() { asm volatile("bar.sync 0;"); }', "inline PTX is for NVRTC alone"),
    ],
)
@pytest.mark.compiler
def test_compile_errors_say_where_and_what_to_do(text, says):
    with pytest.raises(HostCompileError) as caught:
        HostModule(text, ["k"], sanitize=False)
    assert says in str(caught.value)


SMALL = 'extern "C" __global__ void small(int *x) { *x = 3; }'


def run_small(environment, folder):
    """Compile and launch SMALL in a process of its own; (stdout, stderr)."""
    program = (
        "import numpy\nfrom gpucnn_kernels.runtime.host import HostModule, Memory\n"
        f"module = HostModule({SMALL!r}, ['small'])\n"
        "x = numpy.zeros(1, 'int32')\n"
        "module.launch('small', (1, 1, 1), (1, 1, 1), [Memory(x.ctypes.data, 4, True)])\n"
        "print(x[0], module.sanitize)"
    )
    kernels = str(Path(__file__).resolve().parent.parent / "kernels")
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": kernels, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.compiler
def test_libraries_are_kept_on_disk(tmp_path):
    cache = {"GPUCNN_KERNELS_CACHE": str(tmp_path / "cache")}
    out, _ = run_small(cache, tmp_path)
    assert out == "3 False"
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "host").iterdir()}
    assert sorted(path.name.split("-")[0] for path in kept) == ["runtime", "small"]
    # Without a compiler to ask for, so nothing can be compiled the second time: only its version is asked.
    out, errors = run_small(cache, tmp_path)
    assert (out, errors) == ("3 False", "")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "host").iterdir()} == kept
    out, _ = run_small({**cache, "GPUCNN_KERNELS_HOST_SANITIZE": "1"}, tmp_path)
    assert out == "3 True"
    assert len(list((tmp_path / "cache" / "host").glob("small-*.so"))) == 2


@pytest.mark.compiler
def test_a_cache_that_cannot_be_written_is_replaced_with_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    out, errors = run_small({"GPUCNN_KERNELS_CACHE": str(tmp_path / "file")}, tmp_path)
    assert out == "3 False"
    lines = [line for line in errors.splitlines() if "cannot keep compiled kernels" in line]
    assert len(lines) == 1


def test_a_missing_compiler_is_explained(tmp_path):
    _, errors = run_small({"CXX": "no-such-compiler"}, tmp_path)
    assert "the C++ compiler that CXX names is not there: 'no-such-compiler'" in errors
    _, errors = run_small({"PATH": str(tmp_path), "CXX": ""}, tmp_path)
    assert "install g++" in errors


@pytest.mark.compiler
def test_the_order_comes_from_the_environment(tmp_path):
    _, errors = run_small({"GPUCNN_KERNELS_HOST_ORDER": "many"}, tmp_path)
    assert "GPUCNN_KERNELS_HOST_ORDER must be a whole number, got 'many'" in errors


def test_the_manual_s_example_runs():
    page = Path(__file__).resolve().parent.parent / "docs" / "host-runtime.md"
    (example,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(compile(example, str(page), "exec"), names)
    assert names["reverse"](5).tolist() == [4, 3, 2, 1, 0]
