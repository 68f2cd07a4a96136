"""What a network that only predicts is made of, on every backend, against float64."""

from __future__ import annotations

import numpy
import pytest

from gpucnn.errors import ArgumentError, ShapeError
from tests.accuracy import awkward, channels_last, error_bound, max_error
from tests.backends import BACKENDS, CUDA
from tests.oracles import activations, convolution, pooling
from tests.problems import ALL, SMALL, arrays, geometry, options

FUNCTIONS = {
    "identity": lambda x: x,
    "relu": activations.relu,
    "leaky_relu": lambda x: activations.leaky_relu(x, 0.2),
    "sigmoid": activations.sigmoid,
    "tanh": numpy.tanh,
    "gelu": activations.gelu,
    "gelu_tanh": activations.gelu_tanh,
    "silu": activations.silu,
}
HALVES = {"size": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "ceil_mode": False}
POOLINGS = {
    "lenet-2": HALVES,
    "animalnet-1": HALVES,
    "k3-same": {**HALVES, "ceil_mode": True},
    "resnet-stem": {**HALVES, "size": (3, 3), "padding": (1, 1)},
    "animalnet-2": {**HALVES, "size": (3, 3), "padding": (1, 1)},  # two launches on a GPU
    "k3-d2": {**HALVES, "padding": (1, 1), "dilation": (2, 2)},
}


def sums(problem, dtype="float32"):
    """(x, weight, bias, residual, exact sums, plain sums)."""
    x, weight, bias, residual = arrays(problem, dtype)
    given = [array.astype("f8") for array in (x, weight)]
    exact, plain = (
        convolution.plain_forward(*given, geometry(problem), bias.astype("f8"), kind)
        for kind in ("longdouble" if dtype == "float64" else "float64", dtype)
    )
    return x, weight, bias, residual, exact.astype("f8"), plain


def assert_close(y, plain, exact, label):
    assert y.shape == exact.shape, label
    error, bound = max_error(y, exact), error_bound(plain.astype(y.dtype), exact)
    assert error <= bound, f"{label}: {error:.3g} > {bound:.3g}"


@BACKENDS
def test_convolution_residual_activation(backend):
    for name in ("k3-s2", "depthwise-s2", "k1", "resnet-down", "groups-2"):
        problem = ALL[name]
        x, weight, bias, residual, exact, plain = sums(problem)
        for function, oracle in FUNCTIONS.items():
            for added in (None, residual):
                wanted, close = (
                    activations.elementwise(oracle, total if added is None else total + added)
                    for total in (exact, plain)
                )
                for arrange in (numpy.ascontiguousarray, channels_last, awkward):
                    more = {"activation": function, "negative_slope": 0.2, **options(problem)}
                    other = None if added is None else arrange(added)
                    y = backend.conv2d_inference(arrange(x), weight, bias, other, **more)
                    assert_close(y, close, wanted, f"{name}, {function}")


@BACKENDS
def test_a_residual_of_another_layout_and_out(backend):
    problem = ALL["resnet-down"]
    x, weight, bias, residual, exact, plain = sums(problem)
    truth = exact + residual
    for source in (numpy.ascontiguousarray, channels_last):
        for added in (numpy.ascontiguousarray, channels_last, awkward):
            other = added(residual)
            y = backend.conv2d_inference(source(x), weight, bias, other, **options(problem))
            assert_close(y, plain + residual, truth, "a new result")
            for target in (numpy.ascontiguousarray, channels_last, awkward):
                out = target(numpy.full(problem.output_shape, numpy.nan, "f4"))
                assert backend.conv2d_inference(source(x), weight, bias, other, out=out, **options(problem)) is out
                assert_close(out, plain + residual, truth, "out")
    into = residual.copy()
    assert backend.conv2d_inference(x, weight, bias, into, out=into, **options(problem)) is into
    assert_close(into, plain + residual, truth, "the residual itself")


@BACKENDS
def test_convolution_activation_pooling(backend):
    for name, window in POOLINGS.items():
        problem = ALL[name]
        x, weight, bias, _, exact, plain = sums(problem)
        given = {("ceil_mode" if key == "ceil_mode" else f"pool_{key}"): value for key, value in window.items()}
        for function in ("identity", "relu", "leaky_relu", "gelu"):
            truth, close = (
                pooling.max_pool(activations.elementwise(FUNCTIONS[function], total), *window.values())[0]
                for total in (exact, plain)
            )
            for arrange in (numpy.ascontiguousarray, channels_last, awkward):
                more = {**given, **options(problem), "activation": function, "negative_slope": 0.2}
                y = backend.conv2d_max_pool2d_inference(arrange(x), weight, bias, **more)
                assert_close(y, close, truth, f"{name}, {function}")
                out = arrange(numpy.full(y.shape, numpy.nan, "f4"))
                assert backend.conv2d_max_pool2d_inference(arrange(x), weight, bias, out=out, **more) is out
                assert_close(out, close, truth, f"{name}, {function}, out")
                both = backend.conv2d_max_pool2d_forward(arrange(x), weight, bias, **more)
                assert_close(both[0], close, truth, f"{name}, {function}, with places")
                places = pooling.max_pool(activations.elementwise(FUNCTIONS[function], exact), *window.values())[1]
                assert function == "gelu" or numpy.mean(both[1] == places) > 0.99, "rounded, a few are ties"


@BACKENDS
def test_a_leaky_slope_below_zero_does_not_rise(backend):
    """Then the largest result is not that of the largest sum."""
    x = numpy.array([[-3, 1], [2, -1]], "f4").reshape(1, 1, 2, 2)
    one = numpy.ones((1, 1, 1, 1), "f4")
    more = {"pool_size": 2, "activation": "leaky_relu", "negative_slope": -2.0}
    assert backend.conv2d_max_pool2d_inference(x, one, **more).item() == 6


@BACKENDS
def test_what_does_not_fit(backend):
    problem = SMALL["k3"]
    x, weight, bias, residual = arrays(problem, "float32")
    with pytest.raises(ShapeError, match="residual"):
        backend.conv2d_inference(x, weight, bias, residual[..., :1])
    with pytest.raises(ShapeError, match="out must have"):
        backend.conv2d_inference(x, weight, bias, residual, out=x)
    with pytest.raises(ArgumentError, match=r"activation must be one of 'identity', 'relu', .*got 'swish'"):
        backend.conv2d_inference(x, weight, activation="swish")
    with pytest.raises(ArgumentError, match="activation must be one of"):
        backend.conv2d_max_pool2d_inference(x, weight, pool_size=2, activation="swish")
    with pytest.raises(ArgumentError, match="unknown algorithm 'magic'"):
        backend.conv2d_inference(x, weight, algorithm="magic")


def test_one_launch_on_a_gpu(monkeypatch):
    """But where sums of many terms would be made several times, as windows overlap."""
    from gpucnn_kernels.launch import Call

    launched = []
    launch = Call.launch
    monkeypatch.setattr(
        Call,
        "launch",
        lambda self, source, *rest, **more: (launched.append(source), launch(self, source, *rest, **more)),
    )
    for name, expected in (("k3-s2", ["conv2d_direct"]), ("resnet-down", ["conv2d_implicit_gemm"])):
        x, weight, bias, residual = arrays(ALL[name], "float32")
        CUDA.conv2d_inference(x, weight, bias, residual, activation="gelu", **options(ALL[name]))
        assert launched == expected
        launched.clear()
    for name, expected in (
        ("lenet-2", ["conv2d_max_pool"]),
        ("animalnet-1", ["conv2d_max_pool"]),
        ("resnet-stem", ["conv2d_max_pool"]),
        ("animalnet-2", ["conv2d_implicit_gemm", "max_pooling"]),
    ):
        window = POOLINGS[name]
        given = {("ceil_mode" if key == "ceil_mode" else f"pool_{key}"): value for key, value in window.items()}
        x, weight, bias, _ = arrays(ALL[name], "float32")
        CUDA.conv2d_max_pool2d_inference(x, weight, bias, activation="relu", **given, **options(ALL[name]))
        assert launched == expected
        launched.clear()
