"""The input gradient of a convolution plus another gradient, on every backend, against float64."""

from __future__ import annotations

import numpy
import pytest

from gpucnn.errors import DeviceError, DtypeError, ShapeError
from gpucnn.ops import cpu, cuda
from tests.accuracy import awkward, channels_last, error_bound, max_error
from tests.backends import BACKENDS, CUDA
from tests.kernel_arrays import EPSILON, cast, wide
from tests.oracles import convolution
from tests.problems import ALL, arrays, geometry, options

NAMES = ("k3-s2", "k2-s3-gaps", "depthwise-s2", "k1", "resnet-down", "groups-2")


def given(problem, dtype="float32"):
    """(dy, weight, residual, where), the last the operation's options."""
    x, weight, _, dy = arrays(problem, dtype)
    return dy, weight, x, {"input_size": (problem.H, problem.W), **options(problem)}


def sums(problem, dtype="float32"):
    """(exact, plain) sums with the residual."""
    dy, weight, residual, _ = given(problem, dtype)
    arguments = dy.astype("f8"), weight.astype("f8"), problem.input_shape, geometry(problem)
    exact, plain = (
        convolution.plain_backward_data(*arguments, kind)
        for kind in ("longdouble" if dtype == "float64" else "float64", dtype)
    )
    return (exact + residual).astype("f8"), plain + residual


def assert_close(dx, problem, label):
    exact, plain = sums(problem, str(dx.dtype))
    error, bound = max_error(dx, exact), error_bound(plain.astype(dx.dtype), exact)
    assert error <= bound, f"{label}: {error:.3g} > {bound:.3g}"


@BACKENDS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_gradients(backend, dtype):
    for name in NAMES:
        problem = ALL[name]
        dy, weight, residual, where = given(problem, dtype)
        for arrange in (numpy.ascontiguousarray, channels_last, awkward):
            for added in (numpy.ascontiguousarray, channels_last, awkward):
                other = added(residual)
                dx = backend.conv2d_backward_data(arrange(dy), weight, residual=other, **where)
                assert dx.shape == problem.input_shape
                assert_close(dx, problem, name)
                numpy.testing.assert_array_equal(other, residual, "it is left as it was")
                alone = backend.conv2d_backward_data(arrange(dy), weight, **where)
                numpy.testing.assert_array_equal(dx, alone + residual, "the bits of the sum of both")


@BACKENDS
def test_into_out(backend):
    for name in ("resnet-down", "k1"):
        problem = ALL[name]
        dy, weight, residual, where = given(problem)
        for arrange in (numpy.ascontiguousarray, channels_last, awkward):
            for target in (numpy.ascontiguousarray, channels_last, awkward):
                out = target(numpy.full(problem.input_shape, numpy.nan, "f4"))
                assert (
                    backend.conv2d_backward_data(arrange(dy), weight, residual=residual, out=out, **where) is out
                )
                assert_close(out, problem, "out")
                out = target(residual).copy("K")
                assert backend.conv2d_backward_data(arrange(dy), weight, residual=out, out=out, **where) is out
                assert_close(out, problem, "the residual itself")
        memory = numpy.zeros(residual.size + 1, "f4")
        shifted = memory[1:].reshape(residual.shape)
        shifted[...] = residual
        out = memory[:-1].reshape(residual.shape)
        backend.conv2d_backward_data(dy, weight, residual=shifted, out=out, **where)
        assert_close(out, problem, "memory of the residual, shifted")


@BACKENDS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_rounded_once(backend, dtype):
    """Of whole numbers, whose sums are exact in float32."""
    problem = ALL["resnet-down"]
    random = numpy.random.default_rng(4)
    dy, weight, residual = (
        cast(random.integers(-50, 51, shape), dtype)
        for shape in (problem.output_shape, problem.weight_shape, problem.input_shape)
    )
    exact = convolution.plain_backward_data(
        wide(dy), wide(weight), problem.input_shape, geometry(problem), "f8"
    ) + wide(residual)
    where = {"input_size": (problem.H, problem.W), **options(problem)}
    if backend.ops is cpu:
        from gpucnn.ops.cpu import narrow

        dx = narrow.conv2d_backward_data(dy, weight, residual=residual, **where)
    else:
        dx = backend.conv2d_backward_data(dy, weight, residual=residual, **where)
    assert str(dx.dtype) == dtype
    assert numpy.abs(exact).max() > 1 / EPSILON[dtype], "which 16 bits do not hold"
    numpy.testing.assert_array_equal(dx, cast(exact, dtype))


@BACKENDS
def test_no_images(backend):
    dy, weight = numpy.empty((0, 3, 4, 4), "f4"), numpy.ones((3, 2, 2, 2), "f4")
    residual = numpy.empty((0, 2, 5, 5), "f4")
    assert backend.conv2d_backward_data(dy, weight, input_size=5, residual=residual).shape == (0, 2, 5, 5)


@BACKENDS
def test_what_does_not_fit(backend):
    dy, weight, residual, where = given(ALL["k3-s2"])
    with pytest.raises(ShapeError, match=r"residual must have shape \(2, 3, 9, 9\), got \(2, 3, 9, 8\)"):
        backend.conv2d_backward_data(dy, weight, residual=residual[..., :8], **where)
    with pytest.raises(DtypeError, match="residual must hold floating-point numbers, got dtype int64"):
        backend.conv2d_backward_data(dy, weight, residual=residual.astype("i8"), **where)
    with pytest.raises(DtypeError, match=r"residual must be a numpy\.ndarray"):
        backend.conv2d_backward_data(dy, weight, residual=1.0, **where)


def test_a_residual_of_another_device():
    dy, weight, residual, where = given(ALL["k3-s2"])
    with CUDA.running(), pytest.raises(DeviceError, match=r"residual is a numpy\.ndarray, on the CPU"):
        cuda.conv2d_backward_data(CUDA.asarray(dy), CUDA.asarray(weight), residual=residual, **where)
