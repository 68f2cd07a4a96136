"""Numbers, structs and grids at a launch: what does not fit is a clear error, what fits arrives exactly."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels import runtime
from gpucnn_kernels.errors import ArgumentError, DtypeError
from gpucnn_kernels.launch import Call, blocks_for, pack
from gpucnn_kernels.source import source_from_text
from tests.kernel_stand_ins import RecordedArray, RecordingRuntime, recording

__all__ = ["recording"]

ECHO = source_from_text(
    """
    struct Pair { int first; long long second; };
    struct Values { float real; bool flag; Pair pair; };
    extern "C" __global__ void __launch_bounds__(64) echo(
        const float *x, float *y, float real, double wide, int small, long long large, unsigned char byte,
        bool flag, Values values, double *reals, long long *integers
    ) {
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            reals[0] = real;
            reals[1] = wide;
            reals[2] = values.real;
            integers[0] = small;
            integers[1] = large;
            integers[2] = byte;
            integers[3] = flag;
            integers[4] = values.flag;
            integers[5] = values.pair.first;
            integers[6] = values.pair.second;
        }
        y[threadIdx.x] = x[threadIdx.x];
    }
    """,
    "echo",
)


def arguments(**others: Any) -> dict[str, Any]:
    return {
        "real": 0.1,
        "wide": 0.1,
        "small": -5,
        "large": 2**40 + 3,
        "byte": 200,
        "flag": True,
        "values": {"real": 2.5, "flag": False, "pair": {"first": 7, "second": -(2**50)}},
        **others,
    }


def echo(threads: Any = 1, blocks: Any = 1, **others: Any) -> tuple[list[float], list[int]]:
    """(the real numbers, the integers) as a kernel on the host runtime has got them."""
    x, y = numpy.ones(1, numpy.float32), numpy.zeros(1, numpy.float32)
    reals, integers = numpy.zeros(3), numpy.zeros(7, numpy.int64)
    arrays: dict[str, Any] = {"x": x, "y": y, "reals": reals, "integers": integers}
    with runtime.using("host"), Call(None, **arrays) as call:
        named = {name: call[name] for name in arrays}
        call.launch(ECHO, "echo", blocks, threads, **{**named, **arguments(**others)})
    return reals.tolist(), integers.tolist()


def test_numbers_arrive_exactly() -> None:
    reals, integers = echo()
    assert reals == [float(numpy.float32(0.1)), 0.1, 2.5]  # a Python float for a float parameter: rounded, not cut
    assert integers == [-5, 2**40 + 3, 200, 1, 0, 7, -(2**50)]


def test_numpy_numbers_arrive_exactly() -> None:
    reals, integers = echo(
        real=numpy.float64(1 / 3),
        wide=numpy.float32(1 / 3),
        small=numpy.int64(17),
        large=numpy.int32(-1),
        byte=numpy.uint8(255),
        flag=numpy.bool_(False),
        values={"real": numpy.float16(0.5), "flag": numpy.bool_(True), "pair": {"first": True, "second": 0}},
    )
    assert reals == [float(numpy.float32(1 / 3)), float(numpy.float32(1 / 3)), 0.5]
    assert integers == [17, -1, 255, 0, 1, 1, 0]


def test_an_integer_and_an_infinity_for_a_float_parameter() -> None:
    assert echo(real=3)[0][0] == 3
    assert echo(real=float("-inf"))[0][0] == float("-inf")
    assert numpy.isnan(echo(real=float("nan"))[0][0])
    assert echo(real=numpy.array(0.25))[0][0] == 0.25  # of no dimension: a number


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("small", 2**31, "echo: small = 2147483648 does not fit int (32 bits)"),
        ("small", 1.0, "echo: small must be an integer, got 1.0"),
        ("small", None, "echo: small must be an integer, got None"),
        ("large", 2**63, "echo: large = 9223372036854775808 does not fit long (64 bits)"),
        ("byte", 256, "echo: byte = 256 does not fit ubyte (8 bits)"),
        ("byte", -1, "echo: byte = -1 does not fit ubyte (8 bits)"),
        ("flag", 2, "echo: flag = 2 does not fit bool (8 bits)"),
        ("small", numpy.array([3]), "echo: small must be an integer, got array([3])"),
        ("real", "0.5", "echo: real must be a number, got '0.5'"),
        ("real", None, "echo: real must be a number, got None"),
        ("real", 1j, "echo: real must be a number, got 1j"),
        ("real", numpy.complex64(1), "echo: real must be a number, got np.complex64(1+0j)"),
        ("real", numpy.array([0.5]), "echo: real must be a number, got array([0.5])"),
        ("real", 1e39, "echo: real = 1e+39 does not fit a float"),
        pytest.param("wide", 10**400, "does not fit a double", id="huge"),
    ],
)
def test_numbers_that_do_not_fit(name: str, value: Any, words: str) -> None:
    with pytest.raises((ArgumentError, DtypeError)) as caught:
        echo(**{name: value})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (3, "echo: values is a struct of (real, flag, pair), got (int)"),
        ({"real": 1.0, "flag": True}, "echo: values is a struct of (real, flag, pair), got (real, flag)"),
        ({"real": 1.0, "flag": True, "pair": 1}, "echo: values.pair is a struct of (first, second), got (int)"),
        (
            {"real": 1.0, "flag": True, "pair": {"first": 2**40, "second": 0}},
            "echo: values.pair.first = 1099511627776 does not fit int (32 bits)",
        ),
        (
            {"real": 1.0, "flag": True, "pair": {"first": 1, "second": 0, "third": 0}},
            "echo: values.pair is a struct of (first, second), got (first, second, third)",
        ),
    ],
)
def test_structs_that_do_not_fit(values: Any, words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        echo(values=values)
    assert words in str(caught.value)


def test_a_kernel_or_a_source_that_there_is_not() -> None:
    x = numpy.ones(3, numpy.float32)
    with runtime.using("host"), Call(None, x=x) as call:
        with pytest.raises(ArgumentError, match=r"echo has no kernel 'ecko'; it has echo"):
            call.launch(ECHO, "ecko", 1, x=call["x"])
        with pytest.raises(ArgumentError, match="there is no CUDA source 'echos'"):
            call.launch("echos", "echo", 1, x=call["x"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"count": 3}, "large, byte, flag, values, count)"),
        ({"real": ...}, "got (x, y, reals, integers, wide, small"),
    ],
)
def test_wrong_names(change: dict[str, Any], words: str) -> None:
    given = {name: value for name, value in {**arguments(), **change}.items() if value is not ...}
    x = numpy.ones(1, numpy.float32)
    with runtime.using("host"), Call(None, x=x) as call, pytest.raises(ArgumentError) as caught:
        call.launch(ECHO, "echo", 1, 1, x=call["x"], y=call["x"], reals=call["x"], integers=call["x"], **given)
    assert str(caught.value).startswith("echo takes (x, y, real, wide, small, large, byte, flag, values, reals")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"threads": 65}, "a block of (65, 1, 1) threads; it takes 1 to 64"),
        ({"threads": (8, 9)}, "a block of (8, 9, 1) threads; it takes 1 to 64"),
        ({"threads": 0}, "a block of (0, 1, 1) threads; it takes 1 to 64"),
        ({"threads": -1}, "a block of (-1, 1, 1) threads"),
        ({"threads": 1.0}, "threads must be an integer or up to three, got 1.0"),
        ({"threads": (1, 1, 1, 1)}, "threads must be an integer or up to three, got (1, 1, 1, 1)"),
        ({"blocks": ()}, "blocks must be an integer or up to three, got ()"),
        ({"blocks": 2**31}, "a grid of (2147483648, 1, 1) blocks; a GPU takes 0 (nothing) to (2147483647, 65535"),
        ({"blocks": (1, 65536)}, "a grid of (1, 65536, 1) blocks"),
        ({"blocks": (1, 1, 65536)}, "a grid of (1, 1, 65536) blocks"),
        ({"blocks": -1}, "a grid of (-1, 1, 1) blocks"),
    ],
)
def test_grids_and_blocks_that_do_not_fit(sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        echo(**sizes)
    assert words in str(caught.value)


def test_a_block_too_deep_and_shared_memory_beyond_any_gpu(recording: RecordingRuntime) -> None:
    text = 'extern "C" __global__ void deep(float *x) { }'
    with Call(None, x=RecordedArray((3,))) as call:
        with pytest.raises(ArgumentError, match=r"\(1, 1, 65\) threads; a GPU takes 64 along z at most"):
            call.launch(source_from_text(text), "deep", 1, (1, 1, 65), x=call["x"])
        for size in (-1, (227 << 10) + 1):
            with pytest.raises(
                ArgumentError, match=f"deep: {size} bytes of shared memory a block; a GPU takes 0 to"
            ):
                call.launch(source_from_text(text), "deep", 1, 1, x=call["x"], shared_bytes=size)
        call.launch(source_from_text(text), "deep", numpy.int64(3), (numpy.int32(2), 1), x=call["x"])
    (made,) = recording.launches
    assert (made.grid, made.block) == ((3, 1, 1), (2, 1, 1))


def test_no_blocks_start_nothing_but_are_checked() -> None:
    reals, integers = echo(blocks=0)
    assert reals == [0, 0, 0]
    assert integers == [0] * 7
    with pytest.raises(ArgumentError, match="small = 2147483648 does not fit"):
        echo(blocks=0, small=2**31)


def test_blocks_for() -> None:
    assert [blocks_for(count) for count in (0, 1, 256, 257, 10**12)] == [0, 1, 1, 2, 65536]
    assert blocks_for(1000, 128, per_thread=4) == 2


def test_a_python_float_reaches_the_activation_as_float32(recording: RecordingRuntime) -> None:
    gpucnn_kernels.leaky_relu_forward(RecordedArray((5,)), negative_slope=0.1)
    (made,) = recording.launches
    slope = made.arguments["negative_slope"]
    assert isinstance(slope, ctypes.c_float)
    assert bytes(slope) == struct.pack("f", 0.1)


def test_a_source_that_does_not_compile_for_the_host() -> None:
    source = source_from_text('extern "C" __global__ void broken(float *x) { x[0] = nothing; }', "broken")
    with (
        runtime.using("host"),
        Call(None, x=numpy.ones(3, numpy.float32)) as call,
        pytest.raises(gpucnn_kernels.CompileError, match=r"(?s)broken.*nothing"),
    ):
        call.launch(source, "broken", 1, x=call["x"])


def test_a_count_that_a_32_bit_field_cannot_hold_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"count = 2147483648 does not fit int \(32 bits\)"):
        pack(ctypes.c_int32, 2**31, "count")
    with pytest.raises(ArgumentError, match=r"count = 4294967296 does not fit uint \(32 bits\)"):
        pack(ctypes.c_uint32, 2**32, "count")
    assert pack(ctypes.c_uint32, 2**32 - 1, "count").value == 2**32 - 1
