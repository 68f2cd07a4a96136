"""PTX on the host runtime: instructions by their definitions in whole numbers and fractions, faults, refusals.

The texts here are CUDA with inline PTX, which NVRTC passes on as it is. What the wrapped instructions and the
ordinary language of kernels become is tested where they are tested from their text: test_host_runtime*.py.
"""

from __future__ import annotations

import ctypes
from fractions import Fraction

import numpy
import pytest

from gpucnn_kernels import conv2d_forward, runtime
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.runtime.host import HostModule, KernelFault
from gpucnn_kernels.runtime.ptx import PtxError, translate
from tests.host_modules import kernel_names, launch, module, nothing_from_outside, poisoned, reads, writes

__all__ = ["nothing_from_outside"]
pytestmark = pytest.mark.nvrtc

WORDS = {
    # name: (instruction, its result by definition)
    "prmt": ("prmt.b32 %0, %1, %2, %3;", lambda a, b, c: permuted(a, b, c)),
    "bfi": ("bfi.b32 %0, %1, %2, %3, 11;", lambda a, b, c: inserted(a, b, c & 255, 11)),
    "bfe_u32": ("bfe.u32 %0, %1, %2, %3;", lambda a, b, c: extracted(a, b & 255, c & 255, signed=False)),
    "bfe_s32": ("bfe.s32 %0, %1, %2, %3;", lambda a, b, c: extracted(a, b & 255, c & 255, signed=True)),
    "shl": ("shl.b32 %0, %1, %2;", lambda a, b, c: a << min(b, 32)),
    "shr_u32": ("shr.u32 %0, %1, %2;", lambda a, b, c: a >> min(b, 32)),
    "shr_s32": ("shr.s32 %0, %1, %2;", lambda a, b, c: signed(a) >> min(b, 32)),
    "shf_l": ("shf.l.wrap.b32 %0, %1, %2, %3;", lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    "shf_r": ("shf.r.wrap.b32 %0, %1, %2, %3;", lambda a, b, c: (b << 32 | a) >> (c & 31)),
    "shf_l_clamp": ("shf.l.clamp.b32 %0, %1, %2, %3;", lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32),
    "shf_r_clamp": ("shf.r.clamp.b32 %0, %1, %2, %3;", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    "lop3": ("lop3.b32 %0, %1, %2, %3, 0xCA;", lambda a, b, c: a & b | ~a & c),
    "mul_hi_s32": ("mul.hi.s32 %0, %1, %2;", lambda a, b, c: signed(a) * signed(b) >> 32),
    "mul_hi_u32": ("mul.hi.u32 %0, %1, %2;", lambda a, b, c: a * b >> 32),
    "mad_lo": ("mad.lo.s32 %0, %1, %2, %3;", lambda a, b, c: a * b + c),
    "div_s32": ("div.s32 %0, %1, %2;", lambda a, b, c: toward_zero(signed(a), signed(b))),
    "rem_s32": ("rem.s32 %0, %1, %2;", lambda a, b, c: signed(a) - signed(b) * toward_zero(signed(a), signed(b))),
    "rem_u32": ("rem.u32 %0, %1, %2;", lambda a, b, c: a % b),
    "min_s32": ("min.s32 %0, %1, %2;", lambda a, b, c: min(signed(a), signed(b))),
    "max_u32": ("max.u32 %0, %1, %2;", lambda a, b, c: max(a, b)),
    "popc": ("popc.b32 %0, %1;", lambda a, b, c: a.bit_count()),
    "clz": ("clz.b32 %0, %1;", lambda a, b, c: 32 - a.bit_length()),
    "brev": ("brev.b32 %0, %1;", lambda a, b, c: int(f"{a:032b}"[::-1], 2)),
    "bfind": ("bfind.u32 %0, %1;", lambda a, b, c: a.bit_length() - 1),
    "wide": (
        "{ .reg .b64 both; mul.wide.s32 both, %1, %2; mov.b64 {_, %0}, both; }",
        lambda a, b, c: signed(a) * signed(b) >> 32,
    ),
    "halves": (
        "{ .reg .b16 low, high; mov.b32 {low, high}, %1; mov.b32 %0, {high, low}; }",
        lambda a, b, c: a >> 16 | a << 16,
    ),
    "extended": ("{ .reg .b16 low; cvt.u16.u32 low, %1; cvt.s32.s16 %0, low; }", lambda a, b, c: signed(a, 16)),
    "guarded": (
        "{ .reg .pred p; setp.lt.s32 p, %1, %2; mov.b32 %0, %3; @p mov.b32 %0, %1; @!p add.s32 %0, %0, 1; }",
        lambda a, b, c: a if signed(a) < signed(b) else c + 1,
    ),
    "both": (
        "{ .reg .pred p, q; setp.ge.u32 p, %1, %2; setp.ne.or.s32 q, %2, %3, p; selp.b32 %0, %1, %3, q; }",
        lambda a, b, c: a if b != c or a >= b else c,
    ),
}
NUMBERS = {
    # name: (instruction, exact result of fractions, whether it is rounded "near", "down", "up", "zero")
    "add": ("add.rn.f32 %0, %1, %2;", lambda a, b, c: a + b, "near"),
    "add_down": ("add.rm.f32 %0, %1, %2;", lambda a, b, c: a + b, "down"),
    "add_up": ("add.rp.f32 %0, %1, %2;", lambda a, b, c: a + b, "up"),
    "add_to_zero": ("add.rz.f32 %0, %1, %2;", lambda a, b, c: a + b, "zero"),
    "fma": ("fma.rn.f32 %0, %1, %2, %3;", lambda a, b, c: a * b + c, "near"),
    "fma_down": ("fma.rm.f32 %0, %1, %2, %3;", lambda a, b, c: a * b + c, "down"),
    "fma_up": ("fma.rp.f32 %0, %1, %2, %3;", lambda a, b, c: a * b + c, "up"),
    "fma_to_zero": ("fma.rz.f32 %0, %1, %2, %3;", lambda a, b, c: a * b + c, "zero"),
    "mul": ("mul.rn.f32 %0, %1, %2;", lambda a, b, c: a * b, "near"),
    "div": ("div.rn.f32 %0, %1, %2;", lambda a, b, c: a / b, "near"),
    "rcp": ("rcp.rn.f32 %0, %1;", lambda a, b, c: 1 / a, "near"),
    "saturated": ("add.sat.f32 %0, %1, %2;", lambda a, b, c: min(max(a + b, Fraction(0)), Fraction(1)), "near"),
    "whole": ("cvt.rni.f32.f32 %0, %1;", lambda a, b, c: Fraction(round(a)), "near"),
    "copysign": ("copysign.f32 %0, %1, %2;", lambda a, b, c: abs(b) * (1 if a >= 0 else -1), "near"),
    "half": ("{ .reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.f32.f16 %0, h; }", lambda a, b, c: of_bits(a, 11), "near"),
    "bfloat16": (
        "{ .reg .b16 h; cvt.rn.bf16.f32 h, %1; cvt.f32.bf16 %0, h; }",
        lambda a, b, c: of_bits(a, 8),
        "near",
    ),
    "tf32": (
        "{ .reg .b32 t; cvt.rna.tf32.f32 t, %1; mov.b32 %0, t; }",
        lambda a, b, c: of_bits(a, 11, away=True),
        "near",
    ),
    "tf32_even": (
        "{ .reg .b32 t; cvt.rn.tf32.f32 t, %1; mov.b32 %0, t; }",
        lambda a, b, c: of_bits(a, 11),
        "near",
    ),
    "through_double": (
        "{ .reg .f64 x, y; cvt.f64.f32 x, %1; cvt.f64.f32 y, %2; fma.rn.f64 x, x, y, x; cvt.rn.f32.f64 %0, x; }",
        lambda a, b, c: Fraction(float(a * b + a)),
        "near",
    ),
}  # fmt: skip


def kernel(name, instruction, letter, kind):
    given = ", ".join(f'"{letter}"(given[{index}])' for index in range(3))
    return f"""
extern "C" __global__ void {name}(const {kind} *x, {kind} *y) {{
    const {kind} *given = x + 3 * threadIdx.x;
    {kind} result;
    asm volatile("{instruction}" : "=&{letter}"(result) : {given});
    y[threadIdx.x] = result;
}}
"""


TEXT = "".join(
    [
        *(kernel(f"word_{name}", text, "r", "unsigned") for name, (text, _) in WORDS.items()),
        *(kernel(f"number_{name}", text, "f", "float") for name, (text, _, _) in NUMBERS.items()),
    ]
)


def signed(word, bits=32):
    word &= (1 << bits) - 1
    return word - (1 << bits) if word >> (bits - 1) else word


def toward_zero(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def permuted(low, high, selection):
    octets = (low | high << 32).to_bytes(8, "little")
    result = 0
    for place in range(4):
        chosen = selection >> 4 * place & 15
        octet = octets[chosen & 7]
        result |= (0xFF * (octet >> 7) if chosen & 8 else octet) << 8 * place
    return result


def inserted(field, into, position, length):
    for bit in range(length):
        if position + bit < 32:
            into = into & ~(1 << position + bit) | (field >> bit & 1) << position + bit
    return into


def extracted(value, position, length, *, signed):
    if length == 0:
        return 0
    sign = value >> min(position + length - 1, 31) & 1 if signed else 0
    return sum(
        (value >> position + bit & 1 if bit < length and position + bit < 32 else sign) << bit for bit in range(32)
    )


def of_bits(number, bits, *, away=False):
    """Rounded to so many bits, of two the even one, or the one away from zero."""
    if number == 0:
        return number
    place = Fraction(2) ** (int(numpy.frexp(float(number))[1]) - bits)
    whole = abs(number) / place
    rounded = int(whole + Fraction(1, 2)) if away else round(whole)
    return rounded * place * (1 if number > 0 else -1)


def as_float32(exact, way):
    """The float32 number that an exact one becomes: one of its two neighbours."""
    near = numpy.float32(float(exact))
    around = [
        numpy.nextafter(near, numpy.float32(-numpy.inf)),
        near,
        numpy.nextafter(near, numpy.float32(numpy.inf)),
    ]
    below = max(number for number in around if Fraction(float(number)) <= exact)
    above = min(number for number in around if Fraction(float(number)) >= exact)
    if way == "near":
        distances = exact - Fraction(float(below)), Fraction(float(above)) - exact
        if distances[0] == distances[1]:
            return below if int(below.view(numpy.uint32)) % 2 == 0 else above
        return below if distances[0] < distances[1] else above
    if way == "zero":
        way = "down" if exact > 0 else "up"
    return below if way == "down" else above


@pytest.mark.parametrize("name", WORDS)
def test_words(name):
    random = numpy.random.default_rng(3)
    x = random.integers(0, 2**32, (1024, 3), "uint32")
    x[:, 1:][random.random((1024, 2)) < 0.5] %= 40  # shifts, positions, small divisors
    x[:, 1] |= 1  # what is divided by
    x[:8, 0] = 0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x80000001, 31, 32
    y = poisoned(1024, "uint32")
    launch(module(TEXT, False, "sm_80"), f"word_{name}", 1, 1024, reads(x), writes(y))
    expected = [WORDS[name][1](*(int(word) for word in row)) & 0xFFFFFFFF for row in x]
    assert y.tolist() == expected


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name):
    random = numpy.random.default_rng(4)
    x = (random.standard_normal((1000, 3)) * 2.0 ** random.integers(-9, 9, (1000, 3))).astype("float32")
    x[::3] = numpy.round(x[::3])  # ties, and sums that are exact
    x[x == 0] = 1
    x[::5, 2] = -(x[::5, 0] * x[::5, 1])  # what is left of a product that is rounded once
    x[::7, 0] = (random.integers(1, 99, 143) * 2 + 1) * 2.0**-13 * 1024  # between two numbers of fewer bits
    y = poisoned(1000, "float32")
    launch(module(TEXT, False, "sm_90"), f"number_{name}", 1, 1000, reads(x), writes(y))
    _, exact, way = NUMBERS[name]
    for row, result in zip(x, y, strict=True):
        expected = exact(*(Fraction(float(number)) for number in row))
        assert result == as_float32(expected, way), row


FLUSHED = r"""
extern "C" __global__ void flushed(const float *x, float *y) {
    y[0] = x[0] * 3.0f;
    y[1] = x[0] + x[0];
    y[2] = fmaf(x[1], x[2], x[0]);
    y[3] = x[1] * x[2];
    y[4] = x[0] > 0.0f ? 1.0f : 0.0f;
    y[5] = x[0];
}
"""


def test_subnormal_numbers_become_zero_in_arithmetic_and_stay_where_they_are_moved():
    x = numpy.array([1e-40, 2.0**-70, 2.0**-70], "float32")
    y = poisoned(6, "float32")
    launch(module(FLUSHED, False, "sm_80"), "flushed", 1, 1, reads(x), writes(y))
    assert y.tolist() == [0, 0, 0, 0, 0, x[0]]
    launch(module(FLUSHED, False), "flushed", 1, 1, reads(x), writes(y))
    assert y[0] == 3 * x[0]


CONTRACTED = 'extern "C" __global__ void contracted(float *x) { x[3] = x[0] * x[1] + x[2]; }'


def test_products_and_sums_are_fused_as_nvrtc_fuses_them():
    for ptx, expected in ((None, 0), ("sm_80", 2.0**-24)):
        x = numpy.array([1 + 2.0**-12, 1 + 2.0**-12, -1 - 2.0**-11, 0], "float32")
        launch(module(CONTRACTED, False, ptx), "contracted", 1, 1, writes(x))
        assert x[3] == expected


FAULTY = r"""
struct Numbers { int count; double factor; unsigned char tail[5]; };
extern "C" __global__ void misaligned(const char *x, float4 *y, int offset) {
    y[0] = *reinterpret_cast<const float4 *>(x + offset);
}
extern "C" __global__ void constant_that_changes(const float *__restrict__ x, float *y) {
    y[threadIdx.x] = __ldg(x + threadIdx.x) + 1.0f;
}
extern "C" __global__ void past_the_end(const float *x, float *y, int n) {
    y[threadIdx.x] = x[threadIdx.x + n];
}
extern "C" __global__ void divided(int *x) {
    x[0] = x[1] / x[2];
}
extern "C" __global__ void structure(Numbers numbers, double *y) {
    y[threadIdx.x] = numbers.count * numbers.factor + numbers.tail[threadIdx.x];
}
extern "C" __global__ void not_reached(float *x) {
    if (threadIdx.x < 7) __syncthreads();
    x[threadIdx.x] = 1.0f;
}
"""


def faulty(sanitize=False):
    return module(FAULTY, sanitize, "sm_80")


def line_of(text):
    return next(number for number, line in enumerate(FAULTY.splitlines(), 1) if text in line)


def test_misaligned_vectors():
    x, y = numpy.zeros(80, "u1"), numpy.zeros(4, "float32")
    begin = -x.ctypes.data % 16
    launch(faulty(), "misaligned", 1, 1, reads(x[begin : begin + 32]), writes(y), 16)
    with pytest.raises(KernelFault, match=r"an access of 16 bytes .* it ends in 0x.8") as caught:
        launch(faulty(), "misaligned", 1, 1, reads(x[begin : begin + 32]), writes(y), 8)
    assert caught.value.line == line_of("reinterpret_cast<const float4")


@pytest.mark.parametrize("sanitize", [False, True])
def test_constants_that_the_kernel_may_write_to(sanitize):
    x, y = numpy.arange(8, dtype="float32"), numpy.zeros(8, "float32")
    launch(faulty(sanitize), "constant_that_changes", 1, 8, reads(x), writes(y))
    assert y.tolist() == (x + 1).tolist()
    with pytest.raises(
        KernelFault, match=r"ld.global.nc.* from argument 1, which the kernel may write to"
    ) as caught:
        launch(faulty(sanitize), "constant_that_changes", 1, 8, reads(x), writes(x))
    assert caught.value.line == line_of("__ldg")


def test_sanitized_accesses_are_looked_at_with_their_lines():
    x, y = numpy.zeros(8, "float32"), numpy.zeros(8, "float32")
    launch(faulty(True), "past_the_end", 1, 8, reads(x), writes(y), 0)
    with pytest.raises(KernelFault, match="read of 4 bytes") as caught:
        launch(faulty(True), "past_the_end", 1, 8, reads(x), writes(y), 1)
    assert caught.value.line == line_of("x[threadIdx.x + n]")
    assert caught.value.thread == (7, 0, 0)


def test_other_faults():
    with pytest.raises(KernelFault, match="divided by zero"):
        launch(faulty(), "divided", 1, 1, writes(numpy.zeros(3, "int32")))
    with pytest.raises(KernelFault, match=r"never|ended") as caught:
        launch(faulty(), "not_reached", 1, 32, writes(numpy.zeros(32, "float32")))
    assert caught.value.line == line_of("__syncthreads")


class Numbers(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int), ("factor", ctypes.c_double), ("tail", ctypes.c_ubyte * 5))


class Packed(ctypes.Structure):
    _pack_ = 1
    _fields_ = Numbers._fields_


def test_parameters_lie_where_the_compiler_says():
    y = poisoned(5, "float64")
    numbers = Numbers(3, 0.5, (ctypes.c_ubyte * 5)(1, 2, 3, 4, 250))
    launch(faulty(), "structure", 1, 5, numbers, writes(y))
    assert y.tolist() == [2.5, 3.5, 4.5, 5.5, 251.5]
    with pytest.raises(TypeError, match="must have the 24 bytes of its parameter, got 17"):
        launch(faulty(), "structure", 1, 5, Packed(3, 0.5), writes(y))
    for wrong in (ctypes.c_double(1), numbers):
        with pytest.raises(TypeError, match="must be a pointer or an integer of 8 bytes"):
            launch(faulty(), "divided", 1, 1, wrong)


def test_what_is_not_known_is_refused_with_its_place():
    text = (
        'extern "C" __global__ void k(unsigned *x) { asm volatile("dp4a.u32.u32 %0, %0, %0, %0;" : "+r"(x[0])); }'
    )
    with pytest.raises(PtxError, match=r"k, line \d+: this instruction is not known: dp4a.u32.u32"):
        HostModule(text, ["k"], ptx="sm_80")
    text = text.replace("dp4a.u32.u32 %0, %0, %0, %0", "min.xorsign.abs.f32 %0, %0, %0").replace(
        "unsigned", "float"
    )
    with pytest.raises(PtxError, match=r"this form of the instruction is not known: min\.xorsign\.abs\.f32"):
        HostModule(text.replace('"+r"', '"+f"'), ["k"], ptx="sm_90")
    with pytest.raises(PtxError, match=r"the PTX has no kernel other; it has k"):
        translate(".version 8.0\n.visible .entry k(\n)\n{\n\tret;\n}\n", ["other"], "k.cu")


def test_every_kernel_of_this_file_is_run():
    names = {*(f"word_{name}" for name in WORDS), *(f"number_{name}" for name in NUMBERS)}
    assert set(kernel_names(TEXT)) == names


def test_the_environment_chooses_an_architecture(monkeypatch):
    x, weight = numpy.ones((1, 8, 4, 4), "float16"), numpy.ones((8, 8, 1, 1), "float16")
    with runtime.using("host") as host:
        for architecture, capability in (("sm_75", (7, 5)), ("sm_120", (12, 0)), ("", (9, 0))):
            monkeypatch.setenv("GPUCNN_KERNELS_HOST_PTX", architecture)
            assert host.capability(0) == capability
        monkeypatch.setenv("GPUCNN_KERNELS_HOST_PTX", "sm_80")
        assert (conv2d_forward(x, weight, algorithm="tensor") == 8).all()
        monkeypatch.setenv("GPUCNN_KERNELS_HOST_PTX", "sm_81")
        with pytest.raises(ArgumentError, match=r"must be one of sm_75, sm_80.*, got 'sm_81'"):
            host.capability(0)
