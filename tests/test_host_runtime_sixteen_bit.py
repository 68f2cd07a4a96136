"""Half and bfloat16 on the host runtime: every number, against NumPy's float16 and ml_dtypes' bfloat16."""

from __future__ import annotations

import bisect
from fractions import Fraction

import ml_dtypes
import numpy
import pytest

from gpucnn_kernels.runtime import nvrtc
from gpucnn_kernels.runtime.host import HostModule
from gpucnn_kernels.source import source_from_text
from tests.host_modules import launch, poisoned, reads, writes

TEXT = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>

#define KERNELS(TYPE, PAIR, WORD) \
    extern "C" __global__ void WORD##_widen(const TYPE *x, float *y, int n) { \
        const int i = blockIdx.x * blockDim.x + threadIdx.x; \
        if (i < n) y[i] = __##WORD##2float(x[i]); \
    } \
    extern "C" __global__ void WORD##_narrow( \
        const float *x, TYPE *nearest, TYPE *toward_zero, TYPE *up, TYPE *down, int n \
    ) { \
        const int i = blockIdx.x * blockDim.x + threadIdx.x; \
        if (i >= n) return; \
        nearest[i] = __float2##WORD##_rn(x[i]); \
        toward_zero[i] = __float2##WORD##_rz(x[i]); \
        up[i] = __float2##WORD##_ru(x[i]); \
        down[i] = __float2##WORD##_rd(x[i]); \
    } \
    extern "C" __global__ void WORD##_narrow_double(const double *x, TYPE *y, int n) { \
        const int i = blockIdx.x * blockDim.x + threadIdx.x; \
        if (i < n) y[i] = __double2##WORD(x[i]); \
    } \
    extern "C" __global__ void WORD##_arithmetic(const TYPE *x, const TYPE *y, TYPE *z, int n) { \
        const int i = blockIdx.x * blockDim.x + threadIdx.x; \
        if (i >= n) return; \
        TYPE *place = z + 8 * i; \
        place[0] = x[i] + y[i]; place[1] = __hsub(x[i], y[i]); place[2] = x[i] * y[i]; \
        place[3] = __hdiv(x[i], y[i]); \
        place[4] = __hfma(x[i], y[i], x[i]); place[5] = -x[i]; place[6] = __hmax(x[i], y[i]); \
        place[7] = __hmin(x[i], y[i]); \
    } \
    extern "C" __global__ void WORD##_pairs(const float2 *x, PAIR *y, float *z, int n) { \
        const int i = blockIdx.x * blockDim.x + threadIdx.x; \
        if (i >= n) return; \
        const PAIR pair = __float22##WORD##2_rn(x[i]); \
        const PAIR lows = __##WORD##2##WORD##2(__low2##WORD(pair)); \
        y[i] = __hfma2(pair, __float2##WORD##2_rn(2.0f), __hadd2(pair, lows)); \
        z[2 * i] = __low2float(pair); z[2 * i + 1] = __high2float(pair); \
    }
KERNELS(__half, __half2, half)
KERNELS(__nv_bfloat16, __nv_bfloat162, bfloat16)
"""

KINDS = {"half": numpy.dtype("float16"), "bfloat16": numpy.dtype(ml_dtypes.bfloat16)}
NAMES = [
    f"{word}_{what}" for word in KINDS for what in ("widen", "narrow", "narrow_double", "arithmetic", "pairs")
]
BLOCK = 256


@pytest.fixture(scope="module")
def compiled():
    return HostModule(TEXT, NAMES, sanitize=False)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param, KINDS[request.param]


def everything(dtype):
    """All 65536 numbers of a 16-bit type."""
    return numpy.arange(65536, dtype="uint16").view(dtype)


def run(compiled, name, *arguments):
    """Launch over as many threads as the last argument says."""
    launch(compiled, name, (arguments[-1] + BLOCK - 1) // BLOCK, BLOCK, *arguments)


def wide(x):
    """The same numbers in float64; a signaling NaN among them is no error."""
    with numpy.errstate(invalid="ignore"):
        return x.astype("float64")


def same(got, expected):
    """Whether every number has the same bits, and every NaN is a NaN."""
    nan = numpy.isnan(wide(expected))
    assert numpy.array_equal(numpy.isnan(wide(got)), nan)
    return numpy.array_equal(got.view("uint16")[~nan], expected.view("uint16")[~nan])


@pytest.mark.nvrtc
def test_the_text_is_cuda():
    cubin, _ = nvrtc.compile_source(source_from_text(TEXT), "sm_80")
    assert len(cubin) > 0


def test_every_number_widens_exactly(compiled, kind):
    word, dtype = kind
    x = everything(dtype)
    y = poisoned(x.shape, "float32")
    run(compiled, f"{word}_widen", reads(x), writes(y), x.size)
    expected = x.astype("float32")
    nan = numpy.isnan(expected)
    assert numpy.array_equal(numpy.isnan(y), nan)
    assert numpy.array_equal(y.view("uint32")[~nan], expected.view("uint32")[~nan])


def interesting_floats(dtype):
    """Every number of the type, the points halfway to the next, the float32 numbers beside these, and others."""
    numbers = everything(dtype).astype("float32")
    numbers = numpy.sort(numbers[numpy.isfinite(numbers)])
    middles = ((numbers[:-1].astype("float64") + numbers[1:].astype("float64")) / 2).astype("float32")
    random = numpy.random.default_rng(1).integers(0, 2**32, 200000, "uint32").view("float32")
    special = numpy.array([numpy.inf, -numpy.inf, numpy.nan, 65504, 65519.996, 65520, 3.4e38, -3.4e38, 1e-45], "f")
    near = [numpy.nextafter(middles, numpy.float32(sign)) for sign in (-numpy.inf, numpy.inf)]
    return numpy.concatenate([numbers, middles, *near, random, special])


def rounded(x, dtype):
    """float32 numbers rounded (to nearest, toward zero, up, down): the nearest by NumPy, the others from it."""
    with numpy.errstate(over="ignore", invalid="ignore"):
        nearest = x.astype(dtype)
    bits = nearest.view("uint16").astype("int64")
    magnitude, negative = bits & 0x7FFF, numpy.signbit(x)
    stored, exact = wide(nearest), wide(x)
    grown = numpy.abs(stored) > numpy.abs(exact)  # the nearest lies away from zero
    inexact = (stored != exact) & ~numpy.isnan(x)
    below = magnitude - (grown & inexact)
    above = below + inexact
    signs = negative.astype("int64") << 15
    results = [below, numpy.where(negative, below, above), numpy.where(negative, above, below)]
    return [nearest, *((signs | result).astype("uint16").view(dtype) for result in results)]


def test_floats_are_rounded_in_each_direction(compiled, kind):
    word, dtype = kind
    x = interesting_floats(dtype)
    got = [poisoned(x.shape, dtype) for _ in range(4)]
    run(compiled, f"{word}_narrow", reads(x), *(writes(array) for array in got), x.size)
    expected = rounded(x, dtype)
    usable = ~numpy.isnan(x)
    for result, right in zip(got, expected, strict=True):
        assert same(result[usable], right[usable])
        assert (result.view("uint16")[~usable] == 0x7FFF).all()  # CUDA's canonical NaN


def test_doubles_are_rounded_once(compiled, kind):
    word, dtype = kind
    numbers = wide(everything(dtype))
    numbers = numpy.unique(numbers[numpy.isfinite(numbers)])
    middles = (numbers[:-1] + numbers[1:]) / 2
    # So near a middle that a float32 in between would be the middle itself and round the wrong way.
    x = numpy.concatenate([numbers, middles * (1 + 2.0**-50), middles * (1 - 2.0**-50), middles])
    y = poisoned(x.shape, dtype)
    run(compiled, f"{word}_narrow_double", reads(x), writes(y), x.size)
    place = numpy.searchsorted(numbers, x)
    low, high = numbers[numpy.maximum(place - 1, 0)], numbers[numpy.minimum(place, numbers.size - 1)]
    down, up = x - low, high - x
    even = low.astype(dtype).view("uint16") % 2 == 0
    expected = numpy.where((down < up) | ((down == up) & even), low, high)
    assert numpy.array_equal(wide(y), expected)
    assert numpy.array_equal(numpy.signbit(wide(y)), numpy.signbit(x))


def test_arithmetic_is_rounded_once(compiled, kind):
    word, dtype = kind
    random = numpy.random.default_rng(2)
    x, y = (random.integers(0, 65536, 40000, "uint16").view(dtype) for _ in range(2))
    z = poisoned((x.size, 8), dtype)
    run(compiled, f"{word}_arithmetic", reads(x), reads(y), writes(z), x.size)
    a, b = wide(x), wide(y)
    with numpy.errstate(all="ignore"):
        # float32 has more than twice the digits of either type: rounding there first does no harm.
        results = {0: a + b, 1: a - b, 2: a * b, 3: a / b, 5: -a, 6: numpy.fmax(a, b), 7: numpy.fmin(a, b)}
        expected = {place: result.astype("float32").astype(dtype) for place, result in results.items()}
    for place, right in expected.items():
        assert same(numpy.ascontiguousarray(z[:, place]), right), place


def test_fused_multiplication_and_addition_is_rounded_once(compiled, kind):
    word, dtype = kind
    random = numpy.random.default_rng(4)
    x, y = random.integers(3 << 12, 5 << 12, (2, 4000), "uint16").view(dtype)  # around 1: nothing overflows
    x = x * random.choice([-1, 1], x.size).astype(dtype)
    z = poisoned((x.size, 8), dtype)
    run(compiled, f"{word}_arithmetic", reads(x), reads(y), writes(z), x.size)
    numbers = wide(everything(dtype))
    numbers = [Fraction(number) for number in numpy.unique(numbers[numpy.isfinite(numbers)]).tolist()]
    for first, second, got in zip(wide(x).tolist(), wide(y).tolist(), wide(z[:, 4]).tolist(), strict=True):
        exact = Fraction(first) * Fraction(second) + Fraction(first)
        place = bisect.bisect_left(numbers, exact)
        low, high = numbers[place - 1], numbers[place]
        even = numpy.array(float(low)).astype(dtype).view("uint16") % 2 == 0
        lower = exact - low < high - exact or (exact - low == high - exact and even)
        assert got == (low if lower else high)


def test_pairs(compiled, kind):
    word, dtype = kind
    x = numpy.random.default_rng(3).integers(-8, 9, (300, 2)).astype("float32") / 4
    y, z = poisoned((300, 2), dtype), poisoned((300, 2), "float32")
    run(compiled, f"{word}_pairs", reads(x), writes(y), writes(z), 300)
    assert numpy.array_equal(z, x)
    assert numpy.array_equal(y.astype("float32"), 2 * x + (x + x[:, :1]))  # few digits: exact
