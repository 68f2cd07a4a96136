"""The launch check: what does not fit is a clear error, what fits arrives exactly.

Most tests run on the host runtime; what a machine without a GPU cannot show (two devices, arrays past 2^31
elements, CuPy) runs on stand-ins that record what the driver would have got.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels import launch, runtime
from gpucnn_kernels.errors import ArgumentError, DeviceError, DtypeError, LayoutError
from gpucnn_kernels.launch import Call, blocks_for, pack
from gpucnn_kernels.source import FOLDER, load, source_from_text
from tests.kernel_stand_ins import (  # the fixtures are used by name
    Flags,
    RecordedArray,
    RecordingRuntime,
    StandInArray,
    StandInCupy,
    StandInKernel,
    StandInStream,
    recording,
    stand_in_cupy,
)

__all__ = ["recording", "stand_in_cupy"]

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


# ------------------------------------------------------------ numbers


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


# ------------------------------------------------------------ kernels, grids, names


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


# ------------------------------------------------------------ arrays, on the host runtime


@pytest.fixture
def host() -> Any:
    with runtime.using("host") as made:
        yield made


@pytest.mark.usefixtures("host")
class TestArrays:
    """What the public functions say to arrays that do not fit."""

    def test_wrong_dtypes(self) -> None:
        x = numpy.ones((2, 3), numpy.int32)
        with pytest.raises(DtypeError, match="x must be one of float32, float16, bfloat16, float64, got int32"):
            gpucnn_kernels.relu_forward(x)
        for dtype in (numpy.complex64, numpy.int16, ">f4", numpy.longdouble):
            with pytest.raises(DtypeError, match=r"x has dtype .*; kernels take bool, uint8, int32"):
                gpucnn_kernels.relu_forward(numpy.ones(3, dtype))
        dy, y = numpy.ones(3, numpy.float32), numpy.ones(3, numpy.float64)
        with pytest.raises(DtypeError, match=r"y is float64, but dy is float32; convert one with \.astype"):
            gpucnn_kernels.relu_backward(dy, y)
        with pytest.raises(DtypeError, match="out is float16, but x is float32"):
            gpucnn_kernels.relu_forward(dy, out=numpy.ones(3, numpy.float16))

    def test_an_array_of_the_wrong_dtype_at_the_kernel(self) -> None:
        x = numpy.ones(4)
        with Call(None, x=x) as call:
            for value, words in (
                (call["x"], r"activation_forward: x must be float32, got float64 \(x\)"),
                (x, r"activation_forward: x must be a device array, got ndarray"),
                (4, r"activation_forward: x must be a device array, got int"),
            ):
                with pytest.raises(DtypeError, match=words):
                    call.launch(
                        "activations",
                        "activation_forward",
                        1,
                        scalar="float32",
                        x=value,
                        y=value,
                        count=4,
                        function=1,
                        negative_slope=0.0,
                    )

    def test_wrong_shapes(self) -> None:
        x, y = numpy.ones((2, 3), numpy.float32), numpy.ones((3, 2), numpy.float32)
        with pytest.raises(ArgumentError, match=r"y has shape \(3, 2\), but dy has shape \(2, 3\)"):
            gpucnn_kernels.relu_backward(x, y)
        with pytest.raises(ArgumentError, match=r"out has shape \(3, 2\), but x has shape \(2, 3\)"):
            gpucnn_kernels.relu_forward(x, out=y)
        with (
            Call(None, x=x) as call,
            pytest.raises(ArgumentError, match=r"x must have shape \(2, 4\), got \(2, 3\)"),
        ):
            call.require("x", "float32", (2, 4))
        with (
            Call(None, x=x) as call,
            pytest.raises(DtypeError, match=r"x must be uint8, got float32; convert it with \.astype\('uint8'\)"),
        ):
            call.require("x", "uint8")

    def test_wrong_layouts(self) -> None:
        base = numpy.ones((4, 6), numpy.float32)
        for view in (base[:, ::2], base[::-1], base[:, ::-1], numpy.broadcast_to(base[0], (4, 6))):
            with pytest.raises(
                LayoutError, match=r"x of shape .* has strides .*copy it first with ascontiguousarray"
            ):
                gpucnn_kernels.relu_forward(view)
        with pytest.raises(
            LayoutError, match=r"y has strides \(1, 4\), but dy has \(6, 1\) \(in elements\); bring"
        ):
            gpucnn_kernels.relu_backward(base, numpy.asfortranarray(base))
        with Call(None, x=base.T) as call, pytest.raises(LayoutError, match="not contiguous; copy it first"):
            call.contiguous("x")
        with Call(None, x=base) as call:
            call.contiguous("x")

    def test_a_transposed_array_is_dense_and_comes_back_so(self) -> None:
        x = numpy.linspace(-1, 1, 24, dtype=numpy.float32).reshape(2, 3, 4).transpose(2, 0, 1)
        y = gpucnn_kernels.relu_forward(x)
        assert y.strides == x.strides
        assert numpy.array_equal(y, numpy.maximum(x, 0))

    def test_a_negative_stride_at_the_kernel(self) -> None:
        source = source_from_text('extern "C" __global__ void read(const float *x) { }')
        with (
            Call(None, x=numpy.ones(4, numpy.float32)[::-1]) as call,
            pytest.raises(LayoutError, match="x has a negative stride"),
        ):
            call.launch(source, "read", 1, x=call["x"])

    def test_unaligned_arrays(self) -> None:
        memory = numpy.zeros(17, numpy.uint8)
        x = memory[1:].view(numpy.float32)
        with pytest.raises(LayoutError, match="x is not aligned to its 4-byte elements"):
            gpucnn_kernels.relu_forward(x)
        record = numpy.zeros(4, numpy.dtype([("a", numpy.float32), ("b", numpy.uint8)]))
        with pytest.raises(
            LayoutError, match=r"x has strides of \(5,\) bytes, no multiples of its 4-byte elements"
        ):
            gpucnn_kernels.relu_forward(record["a"])

    def test_read_only_arrays_are_read_and_never_written(self) -> None:
        x = numpy.linspace(-1, 1, 5, dtype=numpy.float32)
        x.flags.writeable = False
        assert numpy.array_equal(gpucnn_kernels.relu_forward(x), numpy.maximum(x, 0))
        with pytest.raises(DtypeError, match="out is read-only; pass a writable array"):
            gpucnn_kernels.relu_forward(numpy.ones(5, numpy.float32), out=x)

    def test_what_is_no_array(self) -> None:
        for value, kind in (([1.0, 2.0], "builtins.list"), (3.0, "builtins.float"), ("x", "builtins.str")):
            with pytest.raises(DtypeError, match=f"x must be a numpy.ndarray or .*, got {kind}"):
                gpucnn_kernels.relu_forward(value)
        with pytest.raises(DtypeError, match="at least one of x, out must be an array"):
            gpucnn_kernels.relu_forward(None)
        with pytest.raises(DtypeError, match="x must be an array, got None"):
            gpucnn_kernels.relu_forward(None, out=numpy.ones(3, numpy.float32))

    def test_gpu_arrays_on_the_host_runtime(self) -> None:
        with pytest.raises(DeviceError, match=r"x is a GPU array \(cupy.ndarray\), but kernels run on the host"):
            gpucnn_kernels.relu_forward(StandInArray(numpy.ones(3, numpy.float32)))

    @pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 5), (2, 0)])
    def test_empty_batches(self, shape: tuple[int, ...]) -> None:
        x = numpy.ones(shape, numpy.float32)
        y = gpucnn_kernels.relu_forward(x)
        assert (y.shape, y.dtype) == (shape, x.dtype)
        assert gpucnn_kernels.relu_backward(x, y).shape == shape
        out = numpy.ones(shape, numpy.float32)
        assert gpucnn_kernels.relu_forward(x, out=out) is out

    def test_no_dimension_and_no_gap(self) -> None:
        y = gpucnn_kernels.relu_forward(numpy.array(-2.0, numpy.float32))
        assert y.shape == ()
        assert y[()] == 0


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


# ------------------------------------------------------------ devices and sizes, on a runtime that records


def test_arrays_on_two_devices(recording: RecordingRuntime) -> None:
    with pytest.raises(DeviceError, match="dy is on device 0, but y is on device 1"):
        gpucnn_kernels.relu_backward(RecordedArray((3,)), RecordedArray((3,), device=1))
    with pytest.raises(DeviceError, match="x is on device 1, but out is on device 0"):
        gpucnn_kernels.relu_forward(RecordedArray((3,), device=1), out=RecordedArray((3,)))
    assert recording.launches == []


def test_an_array_of_another_device_at_the_kernel(recording: RecordingRuntime) -> None:
    source = source_from_text('extern "C" __global__ void read(const float *x) { }')
    with Call(None, a=RecordedArray((3,), device=1)) as other:
        foreign = other["a"]
    with (
        Call(None, x=RecordedArray((3,))) as call,
        pytest.raises(DeviceError, match="read: x is on device 1, not on 0"),
    ):
        call.launch(source, "read", 1, x=foreign)


def test_device_and_stream_are_those_of_the_arrays(recording: RecordingRuntime) -> None:
    stream = object()
    gpucnn_kernels.relu_forward(RecordedArray((3,), device=1), stream=stream)
    (made,) = recording.launches
    assert (made.device, made.stream) == (1, stream)
    assert recording.entered == [(1, stream)]


def test_more_than_2_to_the_31_elements_arrive_whole(recording: RecordingRuntime) -> None:
    shape = (2**20, 2**12 + 1)  # 4,296,015,872 elements, 16 GiB
    y = gpucnn_kernels.relu_forward(RecordedArray(shape))
    (made,) = recording.launches
    count = shape[0] * shape[1]
    assert count > 2**32
    assert y.shape == shape
    assert made.arguments["count"].value == count
    assert isinstance(made.arguments["count"], ctypes.c_int64)
    assert made.arguments["x"].size == 4 * count
    assert made.grid == (65536, 1, 1)


def test_a_count_that_a_32_bit_field_cannot_hold_is_an_error() -> None:
    with pytest.raises(ArgumentError, match=r"count = 2147483648 does not fit int \(32 bits\)"):
        pack(ctypes.c_int32, 2**31, "count")
    with pytest.raises(ArgumentError, match=r"count = 4294967296 does not fit uint \(32 bits\)"):
        pack(ctypes.c_uint32, 2**32, "count")
    assert pack(ctypes.c_uint32, 2**32 - 1, "count").value == 2**32 - 1


def test_an_output_that_cannot_be_written(recording: RecordingRuntime) -> None:
    with pytest.raises(DtypeError, match="out is read-only"):
        gpucnn_kernels.relu_forward(RecordedArray((3,)), out=RecordedArray((3,), flags=Flags(writeable=False)))
    assert recording.launches == []


def test_channels_last_gives_channels_last(recording: RecordingRuntime) -> None:
    last = RecordedArray((2, 3, 4, 5), steps=(60, 1, 15, 3))
    assert gpucnn_kernels.relu_forward(last).strides == last.strides
    with Call(None, x=last) as call:
        assert call["x"].channels_last
        assert call.empty((2, 7, 2, 2), "float32", like=call["x"]).channels_last
        assert call.empty((2, 7), "float32", like=call["x"]).contiguous
        gaps = RecordedArray((2, 3, 4, 5), steps=(120, 40, 10, 1))
    with Call(None, x=last, out=gaps) as call, pytest.raises(LayoutError, match=r"out has strides .*, with gaps"):
        call.output((2, 3, 4, 5), "float32")


# ------------------------------------------------------------ CUDA through a stand-in for CuPy


def gpu(values: Any, device: int = 0) -> Any:
    return StandInArray(numpy.asarray(values), device)


def test_what_the_driver_gets(stand_in_cupy: StandInCupy) -> None:
    stand_in_cupy.sizes = [8, 8, 8, 4, 4]
    x = gpu(numpy.ones((2, 3, 4, 5), numpy.float32), device=1)
    y = gpucnn_kernels.leaky_relu_forward(x, negative_slope=0.1)
    ((code, options, backend),) = stand_in_cupy.compiled
    assert code == load("activations", (("SCALAR", "float32"),)).text
    assert (options, backend) == (("-std=c++17",), "nvrtc")
    (made,) = stand_in_cupy.launches
    assert made.function == stand_in_cupy.kernels["activation_forward"].kernel.ptr
    assert (made.grid, made.block, made.shared_bytes, made.stream) == ((1, 1, 1), (256, 1, 1), 0, 0)
    assert made.values == [
        struct.pack("P", x.data.ptr),
        struct.pack("P", y.data.ptr),
        struct.pack("q", 120),
        struct.pack("i", 2),
        struct.pack("f", 0.1),
    ]
    assert y.device.id == 1
    assert set(stand_in_cupy.devices) == {1}


def test_a_module_is_compiled_once_a_device(stand_in_cupy: StandInCupy) -> None:
    for device in (0, 1, 0, 1):
        gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32), device))
    assert len(stand_in_cupy.compiled) == 2
    gpucnn_kernels.relu_forward(gpu(numpy.ones(4)))
    assert len(stand_in_cupy.compiled) == 3


def test_a_compile_that_fails_says_what_and_shows_the_lines(stand_in_cupy: StandInCupy) -> None:
    stand_in_cupy.fails = "activations.cu(3): error: expected a ';'"
    with pytest.raises(gpucnn_kernels.CompileError) as caught:
        gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32)))
    assert "activations (SCALAR float32) does not compile for this GPU" in str(caught.value)
    assert "expected a ';'" in str(caught.value)


@pytest.mark.usefixtures("stand_in_cupy")
def test_numpy_arrays_on_the_cuda_runtime() -> None:
    words = r"x is in the host's memory \(numpy.ndarray\); move it to the GPU first \(cupy.asarray"
    with pytest.raises(DeviceError, match=words):
        gpucnn_kernels.relu_forward(numpy.ones(3, numpy.float32))
    from gpucnn_kernels.runtime.host_array import host_arrays

    with pytest.raises(DeviceError, match=r"x is in the host's memory .*HostArray"):
        gpucnn_kernels.relu_forward(host_arrays.ones(3, "float32"))
    with pytest.raises(
        DtypeError, match=r"x must be a cupy.ndarray or another array on the GPU .* got builtins.list"
    ):
        gpucnn_kernels.relu_forward([1.0])
    with pytest.raises(DeviceError, match="out is in the host's memory"):
        gpucnn_kernels.relu_forward(gpu(numpy.ones(3, numpy.float32)), out=numpy.ones(3, numpy.float32))


@pytest.mark.usefixtures("stand_in_cupy")
def test_arrays_of_other_libraries_on_the_cuda_runtime() -> None:
    numba = SimpleNamespace(__cuda_array_interface__={"shape": (0,), "typestr": "<f4", "data": (0, False)})
    assert gpucnn_kernels.relu_forward(numba).shape == (0,)
    on_gpu = SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (2, 1), shape=(3,))
    assert gpucnn_kernels.relu_forward(on_gpu).device.id == 1
    on_cpu = SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (1, 0), shape=(3,))
    with pytest.raises(DeviceError, match="x is in the host's memory"):
        gpucnn_kernels.relu_forward(on_cpu)
    elsewhere = SimpleNamespace(__dlpack__=None, __dlpack_device__=lambda: (7, 0), shape=(3,))
    with pytest.raises(DtypeError, match=r"cannot share its memory with CuPy: CuPy is built against CUDA"):
        gpucnn_kernels.relu_forward(elsewhere)


class Handle:
    """A stream's handle as NVIDIA's Python bindings have it."""

    def __int__(self) -> int:
        return 77


def test_streams(stand_in_cupy: StandInCupy) -> None:
    x = gpu(numpy.ones(4, numpy.float32), 1)
    handle = ctypes.c_void_p
    for stream in (
        StandInStream(77),
        SimpleNamespace(cuda_stream=77),
        SimpleNamespace(handle=handle(77)),
        SimpleNamespace(handle=Handle()),
        SimpleNamespace(__cuda_stream__=lambda: (0, 77)),
        77,
        SimpleNamespace(handle=handle(0)),
        None,
    ):
        gpucnn_kernels.relu_forward(x, stream=stream)
    assert [made.stream for made in stand_in_cupy.launches] == [77, 77, 77, 77, 77, 77, 0, 0]
    for stream in ("77", True, object()):
        with pytest.raises(
            DtypeError, match="stream must be a CuPy, PyTorch or Numba stream or the address of one"
        ):
            gpucnn_kernels.relu_forward(x, stream=stream)


def test_dynamic_shared_memory(stand_in_cupy: StandInCupy) -> None:
    """Up to 48 KB, static and dynamic, nothing is asked for; beyond, once a larger size; too much is an error."""
    source = source_from_text('extern "C" __global__ void wide(float *x) { }', "wide")
    most = StandInKernel.most - StandInKernel.shared_size_bytes
    with Call(None, x=gpu(numpy.ones(4, numpy.float32))) as call:
        for size in (0, 40_000, 48_152, 48_153, 60_000, 50_000, most):
            call.launch(source, "wide", 1, x=call["x"], shared_bytes=size)
        with pytest.raises(ArgumentError) as caught:
            call.launch(source, "wide", 1, x=call["x"], shared_bytes=most + 1)
    assert "wide: 99001 bytes of shared memory a block beside its own 1000; this GPU has 100000" in str(
        caught.value
    )
    assert stand_in_cupy.kernels["wide"].allowed == [48_153, 60_000, most]
    assert [made.shared_bytes for made in stand_in_cupy.launches] == [
        0,
        40_000,
        48_152,
        48_153,
        60_000,
        50_000,
        most,
    ]


def test_a_slow_first_compile_says_so(
    stand_in_cupy: StandInCupy, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import time

    from gpucnn_kernels.runtime import cuda

    monkeypatch.setattr(cuda, "_SAY_AFTER_SECONDS", 0.05)
    module = stand_in_cupy.RawModule

    def slow(**options: Any) -> Any:
        made = module(**options)
        quick = made.get_function

        def get_function(name: str) -> Any:
            time.sleep(0.2)
            return quick(name)

        made.get_function = get_function
        return made

    monkeypatch.setattr(stand_in_cupy, "RawModule", slow)
    gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32)))
    gpucnn_kernels.relu_forward(gpu(numpy.ones(4, numpy.float32)))
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["gpucnn_kernels: compiling activations (SCALAR float32) for this GPU, once ..."]


# ------------------------------------------------------------ no GPU, no CuPy


def refusal() -> str:
    with pytest.raises(DeviceError) as caught:
        gpucnn_kernels.relu_forward(numpy.ones(3, numpy.float32))
    return str(caught.value)


def test_no_cupy_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cupy" else find(name))
    monkeypatch.setattr(runtime, "_runtimes", {})
    monkeypatch.setattr(runtime, "_chosen", ["cuda"])
    message = refusal()
    assert "no GPU can be used: CuPy is not installed" in message
    assert "pip install 'gpucnn[cuda12]'" in message
    assert "'gpucnn[cuda13]'" in message
    assert "GPUCNN_KERNELS_RUNTIME=host" in message


def test_a_cupy_array_without_a_gpu(stand_in_cupy: StandInCupy) -> None:
    def fail() -> int:
        raise RuntimeError(
            "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
        )

    stand_in_cupy.cuda.runtime.getDeviceCount = fail
    with pytest.raises(DeviceError) as caught:
        gpucnn_kernels.relu_forward(gpu(numpy.ones(3, numpy.float32)))
    message = str(caught.value)
    assert "CuPy 14.2 finds no usable NVIDIA driver or GPU: cudaErrorInsufficientDriver" in message
    assert "there is no driver, or it is older than CuPy's CUDA: update it, or install 'gpucnn[cuda12]'" in message


def test_cupy_with_no_gpu_in_the_machine_and_with_no_nvrtc(stand_in_cupy: StandInCupy) -> None:
    stand_in_cupy.cuda.runtime.getDeviceCount = lambda: 0
    assert "CuPy 14.2 works, but there is no NVIDIA GPU" in refusal()
    stand_in_cupy.cuda.runtime.getDeviceCount = lambda: 1

    def fail() -> tuple[int, int]:
        raise OSError("libnvrtc.so.12: cannot open shared object file")

    stand_in_cupy.cuda.nvrtc.getVersion = fail
    message = refusal()
    assert "NVRTC, which compiles the kernels, cannot be loaded: libnvrtc.so.12" in message
    assert "pip install 'gpucnn[cuda12]'" in message


def test_a_cupy_that_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libcublas.so.12: no such file\\nmore lines')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(runtime, "_runtimes", {})
    monkeypatch.setattr(runtime, "_chosen", ["cuda"])
    message = refusal()
    assert "CuPy does not import: libcublas.so.12: no such file; reinstall one of" in message
    (tmp_path / "cupy.py").write_text("open('/no/such/folder/.cupy')\n")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    message = refusal()
    assert "No such file or directory: '/no/such/folder/.cupy'; it keeps what it compiles in ~/.cupy" in message
    assert "set CUPY_CACHE_DIR" in message
    assert "reinstall" not in message


def test_the_runtime_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_chosen", [])
    monkeypatch.setenv(runtime.VARIABLE, "host")
    assert runtime.current().name == "host"
    monkeypatch.setenv(runtime.VARIABLE, "gpu")
    with pytest.raises(ArgumentError, match="GPUCNN_KERNELS_RUNTIME must be one of cuda, host, got 'gpu'"):
        runtime.current_name()
    with pytest.raises(ArgumentError, match="a runtime is one of cuda, host, got 'gpu'"), runtime.using("gpu"):
        pass
    monkeypatch.delenv(runtime.VARIABLE)
    assert runtime.current_name() == "cuda"


def test_importing_loads_no_gpu_no_compiler_and_no_numpy() -> None:
    code = (
        "import sys, gpucnn_kernels\n"
        "heavy = {'cupy', 'numpy', 'torch', 'gpucnn_kernels.runtime.cuda', 'gpucnn_kernels.runtime.host'}\n"
        "print(sorted(heavy & {*sys.modules}), sorted(set(gpucnn_kernels.__all__) - set(dir(gpucnn_kernels))))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == "[] []"


def test_an_unknown_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match="module 'gpucnn_kernels' has no attribute 'conv3d'"):
        _ = gpucnn_kernels.conv3d


def test_the_launcher_uses_the_runtime_in_use(recording: RecordingRuntime) -> None:
    assert launch.current() is recording
