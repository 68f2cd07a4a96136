"""Products of warpgroups on the host runtime, against NumPy, and what the instructions do not forgive.

Rows are laid out and sums are taken apart here by the PTX ISA manual's formulas, written out for themselves.
"""

from __future__ import annotations

import ml_dtypes
import numpy
import pytest

from gpucnn_kernels.errors import CompileError
from gpucnn_kernels.runtime import nvrtc
from gpucnn_kernels.runtime.host import KernelFault
from gpucnn_kernels.source import Source, source_from_text
from tests.host_modules import launch, module, of_ptx, poisoned, reads, writes

# A warpgroup, or two, each with 64 rows of A; rows of 64 numbers come as they lie in memory and are put where they
# belong. FAULT says what is done wrong.
TEXT = r"""
#include "ptx.cuh"
#include "ptx_warpgroup.cuh"

#define KERNEL(NAME, MULTIPLY, COLUMNS, COUNT, FAULT) \
    extern "C" __global__ void NAME(const unsigned char *a, const unsigned char *b, float *c, int depth) { \
        extern __shared__ __align__(1024) unsigned char shared[]; \
        product<COLUMNS, COUNT, FAULT>(a, b, c, depth, shared, \
            [](float (&sums)[COUNT], unsigned long long x, unsigned long long y) { MULTIPLY(sums, x, y); }); \
    }

enum Fault { NONE, NOT_SHOWN, NOT_BEGUN, NOT_WAITED, OVERWRITTEN, DISAGREEING, MISALIGNED, ODD_DEPTH };

template <int COLUMNS, int COUNT, int FAULT, class Multiply>
__device__ void product(
    const unsigned char *a, const unsigned char *b, float *c, int depth, unsigned char *shared, Multiply multiply
) {
    const int rows = blockDim.x / 2, warpgroup = threadIdx.x / 128;
    unsigned char *right = shared + rows * 128;
    for (int chunk = threadIdx.x; chunk < (rows + COLUMNS) * 8; chunk += blockDim.x) {
        const unsigned char *from = chunk < rows * 8 ? a + chunk * 16 : b + (chunk - rows * 8) * 16;
        copy_async<16>(shared + chunk / 8 * 128 + (chunk % 8 ^ chunk / 8 % 8) * 16, from);
    }
    copy_async_wait_all();
    if (FAULT != NOT_SHOWN) show_to_products();
    __syncthreads();
    float sums[COUNT];
    for (int i = 0; i < COUNT; ++i) sums[i] = 1.0f;
    if (FAULT != NOT_BEGUN) begin_products();
    const unsigned char *left = shared + warpgroup * 64 * 128;
    for (int k = 0; k < depth; k += 16) {
        const int disagreement = FAULT == DISAGREEING && threadIdx.x % 32 == 7 ? 16 : 0;
        multiply(
            sums, factor_at(left + (FAULT == MISALIGNED ? 128 : 0), k + disagreement),
            factor_at(right, k + (FAULT == ODD_DEPTH ? 8 : 0))
        );
    }
    commit_products();
    if (FAULT == OVERWRITTEN) {
        __syncthreads();
        for (int i = threadIdx.x; i < rows * 128; i += blockDim.x) shared[i] = 0;
        __syncthreads();
    }
    if (FAULT == NOT_WAITED) wait_for_products<1>(); else wait_for_products<0>();
    for (int i = 0; i < COUNT; ++i) c[threadIdx.x * COUNT + i] = sums[i];
}

KERNEL(half_64, multiply_warpgroup_half, 64, 32, NONE)
KERNEL(half_128, multiply_warpgroup_half, 128, 64, NONE)
KERNEL(half_256, multiply_warpgroup_half, 256, 128, NONE)
KERNEL(bfloat16_64, multiply_warpgroup_bfloat16, 64, 32, NONE)
KERNEL(bfloat16_128, multiply_warpgroup_bfloat16, 128, 64, NONE)
KERNEL(bfloat16_256, multiply_warpgroup_bfloat16, 256, 128, NONE)
KERNEL(not_shown, multiply_warpgroup_half, 64, 32, NOT_SHOWN)
KERNEL(not_begun, multiply_warpgroup_half, 64, 32, NOT_BEGUN)
KERNEL(not_waited, multiply_warpgroup_half, 64, 32, NOT_WAITED)
KERNEL(overwritten, multiply_warpgroup_half, 64, 32, OVERWRITTEN)
KERNEL(disagreeing, multiply_warpgroup_half, 64, 32, DISAGREEING)
KERNEL(misaligned, multiply_warpgroup_half, 64, 32, MISALIGNED)
KERNEL(odd_depth, multiply_warpgroup_half, 64, 32, ODD_DEPTH)
"""

TYPES = {"half": numpy.dtype("float16"), "bfloat16": numpy.dtype(ml_dtypes.bfloat16)}
RIGHT = [f"{name}_{columns}" for name in TYPES for columns in (64, 128, 256)]
WRONG = ["not_shown", "not_begun", "not_waited", "overwritten", "disagreeing", "misaligned", "odd_depth"]
CODE = pytest.mark.parametrize(
    ("sanitize", "ptx"),
    [
        pytest.param(False, None, id="plain"),
        pytest.param(True, None, id="sanitized"),
        of_ptx(False, "sm_90a", name="ptx"),
        of_ptx(True, "sm_90a", name="ptx-sanitized"),
    ],
)


def run(kernel, columns=64, dtype=TYPES["half"], depth=64, warpgroups=1, sanitize=False, ptx=None):
    """(A @ B.T + 1 as the kernel makes it, the same by NumPy)."""
    generator = numpy.random.default_rng(columns + depth)
    rows = 64 * warpgroups
    a, b = (generator.standard_normal((count, 64)).astype(dtype) for count in (rows, columns))
    made = poisoned((128 * warpgroups, columns // 2), "float32")
    arguments = reads(a.view("u1")), reads(b.view("u1")), writes(made), depth
    code = module(TEXT, sanitize, ptx, (*RIGHT, *WRONG))
    launch(code, kernel, 1, 128 * warpgroups, *arguments, shared_bytes=(rows + columns) * 128)
    result = numpy.empty((rows, columns))
    for thread in range(128 * warpgroups):
        warp, lane = thread // 32, thread % 32
        for i in range(columns // 2):
            # The manual's figure of the accumulator: of every eight columns, four numbers of two rows.
            row = warp * 16 + lane // 4 + (8 if i % 4 >= 2 else 0)
            result[row, i // 4 * 8 + lane % 4 * 2 + i % 2] = made[thread, i]
    return result, a[:, :depth].astype("f8") @ b[:, :depth].astype("f8").T + 1


@CODE
@pytest.mark.parametrize("kernel", RIGHT)
def test_products(kernel, sanitize, ptx):
    name, _, columns = kernel.rpartition("_")
    for depth, warpgroups in ((16, 1), (64, 1), (48, 2)):
        result, expected = run(kernel, int(columns), TYPES[name], depth, warpgroups, sanitize, ptx)
        assert numpy.abs(result - expected).max() <= 2.0**-20 * numpy.abs(expected).max()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("not_shown", r"row 0 of a factor was copied by a thread that has not shown it"),
        ("not_begun", r"products were not begun \(wgmma.fence\)"),
        ("disagreeing", r"lanes 0 and 7 of a warp name different factors"),
        ("misaligned", r"begin at multiples of 1024 bytes, these 0x080 behind"),
        ("odd_depth", r"a product takes numbers 0, 16, 32 or 48 of a row"),
    ],
)
def test_what_is_a_fault(kernel, message):
    with pytest.raises(KernelFault, match=message):
        run(kernel, depth=32)


@pytest.mark.parametrize("kernel", ["not_waited", "overwritten"])
def test_what_comes_too_early_is_wrong(kernel):
    """The sums before their products are done, and a factor that is gone by the time that it is read."""
    result, expected = run(kernel)
    assert numpy.abs(result - expected).mean() > 1


@pytest.mark.nvrtc
def test_the_header_compiles_for_its_architecture():
    made = source_from_text(TEXT)
    exact = Source(made.name, (("ARCHITECTURE", "sm_90a"),), made.text)
    cubin, _ = nvrtc.compile_source(exact, "sm_90")
    assert len(cubin) > 0
    for architecture in ("sm_90", "sm_100"):  # without the letter, and a later one
        with pytest.raises(CompileError, match="wgmma"):
            nvrtc.compile_source(made, architecture)
