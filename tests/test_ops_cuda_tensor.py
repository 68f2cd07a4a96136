"""The CUDA backend's names for tensor cores, on the host runtime: every direction, and what they refuse."""

from __future__ import annotations

import numpy
import pytest

from gpucnn.errors import ArgumentError, DtypeError
from gpucnn.ops import cuda
from gpucnn_kernels import conv2d_choice
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime import using
from gpucnn_kernels.runtime.host_array import host_arrays
from tests.kernel_arrays import cast, wide
from tests.oracles import convolution
from tests.problems import ALL, arrays, geometry, options

PROBLEM = ALL["resnet-down"]


@pytest.fixture(autouse=True)
def on_the_host():
    with using("host"):
        yield


def results(algorithm, dtype):
    x, weight, bias, dy = (host_arrays.asarray(cast(array, dtype)) for array in arrays(PROBLEM))
    more = {"algorithm": algorithm, **options(PROBLEM)}
    return (
        cuda.conv2d_forward(x, weight, bias, **more),
        cuda.conv2d_backward_data(dy, weight, input_size=(PROBLEM.H, PROBLEM.W), **more),
        cuda.conv2d_backward_filter(dy, x, kernel_size=(PROBLEM.R, PROBLEM.S), **more),
    )


def relative_errors(found, dtype):
    x, weight, bias, dy = (wide(cast(array, dtype)) for array in arrays(PROBLEM))
    where = geometry(PROBLEM)
    truths = (
        convolution.plain_forward(x, weight, where, bias),
        convolution.plain_backward_data(dy, weight, PROBLEM.input_shape, where),
        convolution.plain_backward_filter(dy, x, PROBLEM.weight_shape, where),
    )
    return [
        float(numpy.abs(wide(result.get()) - truth).max() / numpy.abs(truth).max())
        for result, truth in zip(found, truths, strict=True)
    ]


@pytest.mark.parametrize(
    ("algorithm", "dtype", "least", "most"),
    [
        ("tensor", "float32", 0, 2.0**-20),
        ("tensor_tf32", "float32", 2.0**-14, 2.0**-9),  # 10 fraction bits, of which it makes use
        ("tensor", "float16", 2.0**-14, 2.0**-10),
        ("tensor", "bfloat16", 2.0**-11, 2.0**-7),
    ],
)
def test_every_direction_in_its_precision(algorithm, dtype, least, most):
    for error in relative_errors(results(algorithm, dtype), dtype):
        assert least <= error <= most


def test_transposed_convolution():
    _, weight, _, dy = (host_arrays.asarray(cast(array, "float32")) for array in arrays(PROBLEM))
    where = {"stride": PROBLEM.stride, "padding": 1}
    bias = host_arrays.asarray(numpy.linspace(-1, 1, PROBLEM.C, dtype=numpy.float32))
    expected = cuda.conv_transpose2d_forward(dy, weight, bias, **where).get()
    for algorithm, most in (("tensor", 2.0**-20), ("tensor_tf32", 2.0**-9)):
        found = cuda.conv_transpose2d_forward(dy, weight, bias, algorithm=algorithm, **where).get()
        assert float(numpy.abs(found - expected).max()) <= most * float(numpy.abs(expected).max())


@pytest.mark.parametrize(
    ("dtype", "capability", "tensor"),
    [
        ("float16", (8, 0), True),
        ("bfloat16", (9, 0), True),
        ("float16", (7, 5), False),  # no asynchronous copies
        ("float32", (9, 0), False),  # they would round, or take three products for one
    ],
)
def test_auto_takes_tensor_cores_where_products_are_exact(dtype, capability, tensor, monkeypatch):
    launched = []
    launch = Call.launch
    monkeypatch.setattr(
        Call,
        "launch",
        lambda self, source, *rest, **more: (launched.append(source), launch(self, source, *rest, **more)),
    )
    monkeypatch.setattr(Call, "capability", capability)
    # What so small a problem is reckoned to take is of no concern here.
    monkeypatch.setattr(conv2d_choice, "_chosen", lambda *given: conv2d_choice.usual(*given[:4], given[5]))
    found = results("auto", dtype)
    for error in relative_errors(found, dtype):
        assert error <= {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-20}[dtype]
    assert ({"conv2d_tensor", "conv2d_tensor_filter"} <= set(launched)) == tensor
    assert any(source.startswith("conv2d_tensor") for source in launched) == tensor


def test_what_is_refused():
    with pytest.raises(DtypeError, match="arrays of float32, float16, bfloat16, got float64"):
        results("tensor", "float64")
    with pytest.raises(ArgumentError, match="tf32"):
        results("tensor_tf32", "float16")
    assert not {"tensor", "tensor_tf32"} & set(cuda.conv2d_algorithms("forward"))  # of every dtype
