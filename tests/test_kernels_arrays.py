"""Arrays as kernels see them: whose they are, how they lie in memory, and in whose kind results come back."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels import arrays, runtime
from gpucnn_kernels.arrays import DeviceArray, device_array, image_layout, in_kind, numpy_dtype, shape_of
from gpucnn_kernels.errors import ArgumentError, DeviceError, DtypeError, LayoutError
from gpucnn_kernels.runtime.host_array import HostArray, host_arrays
from tests.kernel_stand_ins import StandInArray


@pytest.fixture(autouse=True)
def host() -> Any:
    with runtime.using("host") as made:
        yield made


def seen(array: Any, name: str = "x") -> DeviceArray:
    return device_array(runtime.current(), array, name)


IMAGE = numpy.zeros((2, 3, 4, 5), numpy.float32)


def channels_last(array: Any) -> Any:
    return numpy.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


# ------------------------------------------------------------ layout


def test_what_is_known_of_an_array() -> None:
    x = numpy.zeros((2, 3), numpy.float64)
    made = seen(x)
    assert made.given is x
    assert (made.name, made.shape, made.strides, made.dtype, made.device) == ("x", (2, 3), (3, 1), "float64", 0)
    assert made.address == x.ctypes.data
    assert made.size == 6
    pointer = made.pointer(writable=True)
    assert (pointer.address, pointer.size, pointer.writable) == (x.ctypes.data, 48, True)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "uint32", "int64", "uint64", "float16", "bfloat16"])
def test_dtypes_by_name(dtype: str) -> None:
    assert seen(numpy.zeros(3, numpy_dtype(dtype))).dtype == dtype
    made = runtime.current().empty((3,), dtype, None)
    assert str(made.dtype) == dtype
    assert made.view(numpy.uint8).tolist() == [255] * made.nbytes  # what is never written shows


def test_layouts_of_images() -> None:
    assert image_layout(seen(IMAGE)) == "contiguous"
    last = seen(channels_last(IMAGE))
    assert image_layout(last) == "channels_last"
    assert last.channels_last
    assert last.dense
    assert not last.contiguous
    with pytest.raises(LayoutError, match="neither contiguous nor channels-last"):
        image_layout(seen(IMAGE[:, :1]))  # there is a gap between the images
    assert image_layout(seen(numpy.ascontiguousarray(IMAGE[:, :1]))) == "contiguous"  # both fit
    assert image_layout(seen(numpy.zeros((3, 4, 1, 1)))) == "contiguous"
    with pytest.raises(LayoutError, match="neither contiguous nor channels-last; copy it first"):
        image_layout(seen(IMAGE[..., ::2]))
    with pytest.raises(ArgumentError, match=r"x must have 4 dimensions \(N, C, H, W\), got shape \(3, 4\)"):
        image_layout(seen(numpy.zeros((3, 4))))


@pytest.mark.parametrize(
    ("array", "contiguous", "dense"),
    [
        (numpy.zeros((2, 3, 4)), True, True),
        (numpy.zeros((2, 3, 4)).transpose(1, 2, 0), False, True),
        (numpy.asfortranarray(numpy.zeros((2, 3))), False, True),
        (numpy.zeros((4, 6))[::2], False, False),
        (numpy.zeros((4, 6))[:, :3], False, False),
        (numpy.zeros((4, 6))[:1], True, True),
        (numpy.zeros((4, 6))[:, :1], False, False),
        (numpy.broadcast_to(numpy.zeros(3), (2, 3)), False, False),
        (numpy.broadcast_to(numpy.zeros(3), (1, 3)), True, True),
        (numpy.zeros(5)[::-1], False, False),
        (numpy.zeros(5)[::-1][:1], True, True),
        (numpy.zeros((3, 0, 2))[::-1], True, True),
        (numpy.zeros(()), True, True),
    ],
)
def test_without_gaps(array: Any, contiguous: bool, dense: bool) -> None:
    made = seen(array)
    assert (made.contiguous, made.dense) == (contiguous, dense)
    if 0 < array.size < 1000 and min(array.strides, default=1) >= 0:
        low, high = numpy.lib.array_utils.byte_bounds(array)
        assert made.pointer(writable=False).size == high - low


def test_layouts_agree() -> None:
    assert seen(IMAGE).same_layout(seen(IMAGE.copy()))
    assert not seen(IMAGE).same_layout(seen(channels_last(IMAGE)))
    assert seen(IMAGE[:, :1].copy()).same_layout(seen(channels_last(IMAGE[:, :1])))
    assert seen(numpy.zeros((0, 3, 4))).same_layout(seen(numpy.zeros((3, 0, 4)).transpose(1, 0, 2)))
    assert not seen(numpy.zeros((2, 3))).same_layout(seen(numpy.zeros((3, 2))))


def test_an_empty_array_points_to_nothing() -> None:
    assert seen(numpy.zeros((0, 3))).pointer(writable=True).size == 0


def test_shapes_of_any_array() -> None:
    assert shape_of(IMAGE, "x") == (2, 3, 4, 5)
    assert shape_of(SimpleNamespace(shape=[numpy.int64(3), 4]), "x") == (3, 4)
    with pytest.raises(DtypeError, match=r"x must be an array, got builtins\.list"):
        shape_of([1, 2], "x")


def test_bfloat16_without_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(DtypeError, match="bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes"):
        numpy_dtype("bfloat16")
    assert numpy_dtype("float16") == numpy.float16


# ------------------------------------------------------------ arrays of other libraries, on the host runtime


class Interface:
    """Speaks ``__array_interface__`` and nothing else."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__


class Exchange:
    """Speaks DLPack and nothing else."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory

    def __dlpack__(self, **options: Any) -> Any:
        return self.memory.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


@pytest.mark.parametrize("kind", [Interface, Exchange])
def test_arrays_that_share_their_memory(kind: Any) -> None:
    memory = numpy.linspace(-1, 1, 6, dtype=numpy.float32).reshape(2, 3)
    assert seen(kind(memory)).address == memory.ctypes.data
    y = gpucnn_kernels.relu_forward(kind(memory))
    assert type(y) is numpy.ndarray
    assert numpy.array_equal(y, numpy.maximum(memory, 0))
    target = kind(numpy.full((2, 3), 7, numpy.float32))
    assert gpucnn_kernels.relu_forward(memory, out=target) is target
    assert numpy.array_equal(target.memory, y)


def test_an_array_that_refuses_to_share_its_memory() -> None:
    class Refuses:
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("it is on the moon")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (1, 0)

    with pytest.raises(DtypeError, match=r"x, a .*Refuses, cannot share its memory: it is on the moon"):
        gpucnn_kernels.relu_forward(Refuses())


def test_arrays_on_a_gpu_are_not_for_the_host_runtime() -> None:
    for array in (
        StandInArray(numpy.zeros(3, numpy.float32)),
        SimpleNamespace(__cuda_array_interface__={"shape": (3,)}),
    ):
        with pytest.raises(DeviceError, match=r"x is a GPU array .*pass NumPy arrays, or unset the variable"):
            gpucnn_kernels.relu_forward(array)


def test_a_subclass_comes_back_as_itself() -> None:
    x = host_arrays.asarray(numpy.linspace(-1, 1, 6, dtype=numpy.float32))
    y = gpucnn_kernels.relu_forward(x)
    assert type(y) is HostArray
    assert numpy.array_equal(y.get(), numpy.maximum(x.get(), 0))


# ------------------------------------------------------------ in kind


def test_numpy_arrays_come_back_as_they_are() -> None:
    y = numpy.zeros(3)
    assert in_kind(y, numpy.ones(3)) is y
    assert in_kind(y, Interface(y)) is y


def test_other_libraries_answer_in_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX's and Numba's own functions take the array over; a stand-in shows that they are asked."""

    def pretend(name: str, **contents: Any) -> Any:
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        return type("Array", (), {"__module__": f"{name}.numpy"})()

    y = numpy.zeros(3)
    dlpack = SimpleNamespace(from_dlpack=lambda array: ("jax", array))
    assert in_kind(y, pretend("jax", dlpack=dlpack)) == ("jax", y)
    assert in_kind(y, pretend("jaxlib")) == ("jax", y)
    cuda = SimpleNamespace(as_cuda_array=lambda array: ("numba", array))
    assert in_kind(y, pretend("numba", cuda=cuda)) == ("numba", y)


def test_pytorch_tensors() -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        x = torch.linspace(-2, 2, 24, dtype=dtype).reshape(2, 3, 4).requires_grad_()
        y = gpucnn_kernels.relu_forward(x)
        assert isinstance(y, torch.Tensor)
        assert y.dtype == dtype
        assert torch.equal(y, x.detach().clamp(min=0))
        out = torch.empty_like(y)
        assert gpucnn_kernels.relu_forward(x, out=out) is out
        assert torch.equal(out, y)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert gpucnn_kernels.relu_forward(image).is_contiguous(memory_format=torch.channels_last)


def test_pytorchs_stream_is_taken_from_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpucnn_kernels.launch import _torch_stream

    class Tensor:
        is_cuda = True
        device = "cuda:1"

    torch = ModuleType("torch")
    torch.Tensor = Tensor  # type: ignore[attr-defined]
    torch.cuda = SimpleNamespace(current_stream=lambda device: f"stream of {device}")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert _torch_stream(Tensor()) == "stream of cuda:1"
    Tensor.is_cuda = False
    assert _torch_stream(Tensor()) is None
    assert _torch_stream(numpy.zeros(3)) is None


def test_the_sizes_of_elements() -> None:
    for name, size in runtime.ITEM_SIZES.items():
        assert numpy_dtype(name).itemsize == size == runtime.itemsize(name)
    assert arrays.ITEM_SIZES is runtime.ITEM_SIZES
