"""Arrays at a launch: those of a wrong dtype, shape, layout or device are clear errors, the others arrive whole.

What a machine without a GPU cannot show, two devices and more than 2^31 elements, is on a runtime that records.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels import runtime
from gpucnn_kernels.errors import ArgumentError, DeviceError, DtypeError, LayoutError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.source import source_from_text
from tests.kernel_stand_ins import Flags, RecordedArray, RecordingRuntime, StandInArray, recording

__all__ = ["recording"]


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
