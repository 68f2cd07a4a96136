"""The wrapped PTX on the host runtime, against matrices in NumPy.

Fragments are packed and unpacked here by the PTX ISA manual's formulas, written out for themselves.
"""

from __future__ import annotations

import ml_dtypes
import numpy
import pytest

from gpucnn_kernels.errors import CompileError
from gpucnn_kernels.runtime import nvrtc
from gpucnn_kernels.source import source_from_text
from tests.host_modules import launch, module, of_ptx, poisoned, reads, writes

TEXT = r"""
#include "ptx.cuh"

#define MULTIPLY(NAME, A_WORDS, B_WORDS) \
    extern "C" __global__ void NAME##_kernel(const unsigned *a, const unsigned *b, float *c) { \
        unsigned a_words[A_WORDS], b_words[B_WORDS]; \
        float accumulator[4]; \
        for (int i = 0; i < A_WORDS; ++i) a_words[i] = a[threadIdx.x * A_WORDS + i]; \
        for (int i = 0; i < B_WORDS; ++i) b_words[i] = b[threadIdx.x * B_WORDS + i]; \
        for (int i = 0; i < 4; ++i) accumulator[i] = c[threadIdx.x * 4 + i]; \
        NAME(accumulator, a_words, b_words); \
        for (int i = 0; i < 4; ++i) c[threadIdx.x * 4 + i] = accumulator[i]; \
    }
MULTIPLY(multiply_m16n8k8_half, 2, 1)
#if __CUDA_ARCH__ >= 800
MULTIPLY(multiply_m16n8k4_tf32, 2, 1)
MULTIPLY(multiply_m16n8k8_tf32, 4, 2)
MULTIPLY(multiply_m16n8k16_half, 4, 2)
MULTIPLY(multiply_m16n8k8_bfloat16, 2, 1)
MULTIPLY(multiply_m16n8k16_bfloat16, 4, 2)
#endif

template <int COUNT, bool TRANSPOSED> __device__ void load(const unsigned short *x, unsigned *y) {
    __shared__ __align__(16) unsigned short rows[32 * 8];
    for (int i = 0; i < 8; ++i) rows[threadIdx.x * 8 + i] = x[threadIdx.x * 8 + i];
    __syncthreads();
    unsigned fragment[COUNT];
    if (TRANSPOSED) {
        load_matrix_transposed(fragment, rows + threadIdx.x * 8);
    } else {
        load_matrix(fragment, rows + threadIdx.x * 8);
    }
    for (int i = 0; i < COUNT; ++i) y[threadIdx.x * COUNT + i] = fragment[i];
}
extern "C" __global__ void load_1(const unsigned short *x, unsigned *y) { load<1, false>(x, y); }
extern "C" __global__ void load_2(const unsigned short *x, unsigned *y) { load<2, false>(x, y); }
extern "C" __global__ void load_4(const unsigned short *x, unsigned *y) { load<4, false>(x, y); }
extern "C" __global__ void load_1_transposed(const unsigned short *x, unsigned *y) { load<1, true>(x, y); }
extern "C" __global__ void load_2_transposed(const unsigned short *x, unsigned *y) { load<2, true>(x, y); }
extern "C" __global__ void load_4_transposed(const unsigned short *x, unsigned *y) { load<4, true>(x, y); }

#if __CUDA_ARCH__ >= 800
// Thread t copies ``step`` bytes, of which it reads t * step / 32; each stage is a group of its own.
template <int BYTES> __device__ void copy(const unsigned char *x, unsigned char *y) {
    __shared__ __align__(16) unsigned char stage[2][32 * BYTES];
    const int read = threadIdx.x * BYTES / 31;
    copy_async<BYTES>(&stage[0][threadIdx.x * BYTES], x + threadIdx.x * BYTES, read);
    copy_async_commit();
    copy_async<BYTES>(&stage[1][threadIdx.x * BYTES], x + threadIdx.x * BYTES);
    copy_async_commit();
    copy_async_wait<1>();
    for (int i = 0; i < BYTES; ++i) {
        y[threadIdx.x * BYTES + i] = stage[0][threadIdx.x * BYTES + i];
    }
    copy_async_wait<0>();
    for (int i = 0; i < BYTES; ++i) y[(32 + threadIdx.x) * BYTES + i] = stage[1][threadIdx.x * BYTES + i];
}
extern "C" __global__ void copy_4(const unsigned char *x, unsigned char *y) { copy<4>(x, y); }
extern "C" __global__ void copy_8(const unsigned char *x, unsigned char *y) { copy<8>(x, y); }
extern "C" __global__ void copy_16(const unsigned char *x, unsigned char *y) { copy<16>(x, y); }

extern "C" __global__ void copy_all(const float *x, float *y) {
    __shared__ float stage[32];
    copy_async<4>(stage + threadIdx.x, x + threadIdx.x);
    copy_async_wait_all();
    y[threadIdx.x] = stage[threadIdx.x];
}

// Group 1 is waited for, group 2 is not: its bytes must not be there yet.
extern "C" __global__ void copy_too_early(const unsigned *x, unsigned *y) {
    __shared__ unsigned stage[2][32];
    copy_async<4>(&stage[0][threadIdx.x], x + threadIdx.x);
    copy_async_commit();
    copy_async<4>(&stage[1][threadIdx.x], x + threadIdx.x);
    copy_async_commit();
    copy_async_wait<1>();
    y[threadIdx.x] = stage[0][threadIdx.x];
    y[32 + threadIdx.x] = stage[1][threadIdx.x];
}

extern "C" __global__ void round_all(const float *x, unsigned *y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = round_to_tf32(x[i]);
}

// One 16 x 8 tile of a product over ``depth`` in shared memory, through every wrapped instruction that it takes on
// real hardware: copies in two stages, ldmatrix for A and (transposed) B, mma.
extern "C" __global__ void tile_of_product(const unsigned short *a, const unsigned short *b, float *c, int depth) {
    __shared__ __align__(16) unsigned short a_tile[2][16][16], b_tile[2][16][8];
    const int lane = threadIdx.x;
    float accumulator[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int k = -16; k < depth; k += 16) {
        const int next = k + 16, stage = next / 16 % 2;
        if (next < depth) {
            copy_async<16>(&a_tile[stage][lane / 2][lane % 2 * 8], a + lane / 2 * depth + next + lane % 2 * 8);
            if (lane < 16) copy_async<16>(b_tile[stage][lane], b + (next + lane) * 8);
        }
        copy_async_commit();
        if (k < 0) continue;
        copy_async_wait<1>();
        __syncthreads();
        unsigned a_words[4], b_words[2];
        load_matrix(a_words, &a_tile[stage ^ 1][lane % 16][lane / 16 * 8]);
        load_matrix_transposed(b_words, b_tile[stage ^ 1][lane % 16]);
        multiply_m16n8k16_half(accumulator, a_words, b_words);
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = accumulator[i];
}
#endif
"""

BFLOAT16 = numpy.dtype(ml_dtypes.bfloat16)
# name: (k, element type of the words). The kernels are macros' products, so their names are listed.
PRODUCTS = {
    "multiply_m16n8k8_half": (8, numpy.dtype("float16")),
    "multiply_m16n8k16_half": (16, numpy.dtype("float16")),
    "multiply_m16n8k8_bfloat16": (8, BFLOAT16),
    "multiply_m16n8k16_bfloat16": (16, BFLOAT16),
    "multiply_m16n8k4_tf32": (4, numpy.dtype("float32")),
    "multiply_m16n8k8_tf32": (8, numpy.dtype("float32")),
}
OTHERS = [f"load_{count}{how}" for count in (1, 2, 4) for how in ("", "_transposed")]
OTHERS += ["copy_4", "copy_8", "copy_16", "copy_all", "copy_too_early", "round_all", "tile_of_product"]


@pytest.fixture(
    params=["plain", "sanitized", of_ptx("ptx", name="ptx"), of_ptx("ptx sanitized", name="ptx-sanitized")]
)
def compiled(request):
    names = (*(f"{name}_kernel" for name in PRODUCTS), *OTHERS)
    return module(TEXT, "sanitized" in request.param, "sm_90" if "ptx" in request.param else None, names)


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.nvrtc
def test_the_header_compiles_for_every_architecture(architecture):
    cubin, log = nvrtc.compile_source(source_from_text(TEXT), architecture)
    assert len(cubin) > 0
    assert "spill" not in log.replace("0 bytes spill stores, 0 bytes spill loads", "")


@pytest.mark.nvrtc
def test_what_an_architecture_lacks_is_not_declared():
    text = '#include "ptx.cuh"\nextern "C" __global__ void k() { copy_async_commit(); }'
    with pytest.raises(CompileError, match="copy_async_commit"):
        nvrtc.compile_source(source_from_text(text), "sm_75")


def accumulator_place(lane, i):
    """(row, column) of c_i: row = groupID for i < 2, else groupID + 8; col = threadID * 2 + (i & 1)."""
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def a_place(lane, i, k, dtype):
    """(row, column) of element a_i of the m16n8k``k`` fragment."""
    group, thread = lane // 4, lane % 4
    if dtype.itemsize == 4:
        if k == 4:  # a0: row groupID, a1: row groupID + 8; col = threadID
            return group + 8 * i, thread
        # row = groupID for a0 and a2, groupID + 8 for a1 and a3; col = threadID for a0 and a1, + 4 for a2 and a3
        return group + (8 if i in (1, 3) else 0), thread + (4 if i >= 2 else 0)
    if k == 8:  # row = groupID for a0 and a1, groupID + 8 for a2 and a3; col = threadID * 2 + (i & 1)
        return group + (8 if i >= 2 else 0), thread * 2 + (i & 1)
    # row = groupID for 0 <= i < 2 || 4 <= i < 6, else groupID + 8; col = threadID * 2 + (i & 1), + 8 for i >= 4
    return group + (0 if i < 2 or 4 <= i < 6 else 8), thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(lane, i, k, dtype):
    """(row, column) of element b_i; col = groupID."""
    group, thread = lane // 4, lane % 4
    if dtype.itemsize == 4:  # row = threadID, + 4 for b1
        return thread + 4 * i, group
    # row = threadID * 2 + (i & 1), + 8 for i >= 2
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def packed(matrix, place, k, dtype):
    """The lanes' words, from a matrix."""
    count = matrix.size // 32
    return numpy.array(
        [[matrix[place(lane, i, k, dtype)] for i in range(count)] for lane in range(32)], dtype
    ).view("uint32")


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_fragments(compiled, name):
    k, dtype = PRODUCTS[name]
    random = numpy.random.default_rng(k)
    a, b = random.standard_normal((16, k)).astype(dtype), random.standard_normal((k, 8)).astype(dtype)
    c = random.standard_normal((16, 8)).astype("float32")
    words = [packed(a, a_place, k, dtype), packed(b, b_place, k, dtype)]
    if dtype.itemsize == 4:  # the tensor core reads the upper 19 bits: the rest may hold anything
        a, b = ((matrix.view("uint32") & 0xFFFFE000).view("float32") for matrix in (a, b))
    accumulator = numpy.array(
        [[c[accumulator_place(lane, i)] for i in range(4)] for lane in range(32)], dtype="float32"
    )
    launch(compiled, f"{name}_kernel", 1, 32, reads(words[0]), reads(words[1]), writes(accumulator))
    exact = a.astype("float64") @ b.astype("float64") + c
    got = numpy.full((16, 8), numpy.nan)
    for lane in range(32):
        for i in range(4):
            got[accumulator_place(lane, i)] = accumulator[lane, i]
    assert numpy.abs(got - exact).max() <= 2.0**-23 * numpy.abs(exact).max()


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_from_shared_memory(compiled, count, transposed):
    x = numpy.arange(256, dtype="uint16") * 3
    y = poisoned((32, count), "uint32")
    launch(compiled, f"load_{count}{'_transposed' if transposed else ''}", 1, 32, reads(x), writes(y))
    matrices = x.reshape(4, 8, 8)
    for lane in range(32):
        for index in range(count):
            matrix = matrices[index].T if transposed else matrices[index]
            # Thread l holds elements 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4.
            first, second = matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].tolist()
            assert y[lane, index] == first | second << 16


@pytest.mark.parametrize("size", [4, 8, 16])
def test_asynchronous_copies_fill_with_zeros(compiled, size):
    x = aligned_copy(numpy.random.default_rng(size).integers(1, 256, 32 * size, "uint8"))
    y = poisoned((2, 32, size), "uint8")
    launch(compiled, f"copy_{size}", 1, 32, reads(x), writes(y))
    source = x.reshape(32, size)
    kept = numpy.arange(size) < (numpy.arange(32) * size // 31)[:, None]
    assert numpy.array_equal(y[0], numpy.where(kept, source, 0))
    assert numpy.array_equal(y[1], source)


def aligned_copy(array):
    """The same numbers at a multiple of 64 bytes."""
    room = numpy.empty(array.nbytes + 64, "uint8")
    place = (-room.ctypes.data) % 64
    copy = room[place : place + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_waiting_for_all_copies_takes_uncommitted_ones_too(compiled):
    x, y = numpy.arange(32, dtype="float32"), poisoned(32, "float32")
    launch(compiled, "copy_all", 1, 32, reads(x), writes(y))
    assert numpy.array_equal(y, x)


def test_a_copy_that_is_not_waited_for_is_not_there(compiled):
    x, y = numpy.arange(32, dtype="uint32"), poisoned(64, "uint32")
    launch(compiled, "copy_too_early", 1, 32, reads(x), writes(y))
    assert numpy.array_equal(y[:32], x)
    assert (y[32:] == 0xFFFFFFFF).all()


def test_rounding_to_tf32(compiled):
    random = numpy.random.default_rng(1).integers(0, 2**32, 20000, "uint32")
    ties = (random & 0xFFFFE000) | 0x1000
    x = numpy.concatenate([random, ties, ties - 1, numpy.array([0, 1 << 31, 0x7F800000, 0xFF800000], "uint32")])
    x = x.view("float32")
    y = poisoned(x.shape, "uint32")
    launch(compiled, "round_all", (x.size + 255) // 256, 256, reads(x), writes(y), x.size)
    nan = numpy.isnan(x)
    assert (y[nan] == 0x7FFFFFFF).all()
    finite = numpy.isfinite(x)
    # The definition: the nearest multiple of the last place, 10 bits below the leading one, of two the even one.
    exact = numpy.abs(x[finite].astype("float64"))
    exponent = numpy.maximum(numpy.frexp(exact)[1] - 1, -126)
    place = numpy.ldexp(1.0, exponent - 10)
    nearest = numpy.rint(exact / place) * place
    with numpy.errstate(over="ignore"):
        expected = numpy.copysign(nearest, x[finite]).astype("float32")
    assert numpy.array_equal(y[finite].view("float32"), expected)
    infinite = numpy.isinf(x)
    assert numpy.array_equal(y[infinite].view("float32"), x[infinite])


def test_a_tile_through_all_of_them(compiled):
    random = numpy.random.default_rng(9)
    a = aligned_copy(random.integers(-4, 5, (16, 80)).astype("float16"))
    b = aligned_copy(random.integers(-4, 5, (80, 8)).astype("float16"))
    c = poisoned((16, 8), "float32")
    launch(compiled, "tile_of_product", 1, 32, reads(a), reads(b), writes(c), 80)
    assert numpy.array_equal(c, a.astype("float32") @ b.astype("float32"))  # small integers: exact
