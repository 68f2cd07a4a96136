"""The fully connected layer against sums of products."""

import itertools

import numpy
import pytest

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.ops import cpu
from tests.accuracy import awkward, error_bound, max_error
from tests.backends import BACKENDS
from tests.oracles import linear as oracle


def problem(dtype, count=6, inputs=11, outputs=4, seed=0):
    random = numpy.random.default_rng(seed)
    shapes = (count, inputs), (outputs, inputs), (outputs,), (count, outputs)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


@BACKENDS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [(6, 11, 4), (1, 1, 1), (1, 300, 3), (0, 5, 2)], ids=str)
def test_linear(backend, dtype, sizes):
    x, weight, bias, dy = problem(dtype, *sizes)
    expected, wanted = oracle.forward(x, weight, bias), oracle.backward(dy, x, weight)
    plain = numpy.einsum("ni,ki->nk", x, weight) + bias
    simple = numpy.einsum("nk,ki->ni", dy, weight), numpy.einsum("nk,ni->ki", dy, x), dy.sum(0)
    for layout in (numpy.ascontiguousarray, numpy.asfortranarray, awkward):
        a, w, g = layout(x), layout(weight), layout(dy)
        y = backend.linear_forward(a, w, bias)
        assert y.dtype == x.dtype
        assert max_error(y, expected) <= error_bound(plain, expected, scale=4)
        results = (
            backend.linear_backward_data(g, w),
            backend.linear_backward_weight(g, a),
            backend.linear_backward_bias(g),
        )
        for result, reference, other in zip(results, wanted, simple, strict=True):
            assert result.dtype == x.dtype
            assert max_error(result, reference) <= error_bound(other, reference, scale=4)


@BACKENDS
def test_without_bias_and_into_out(backend):
    x, weight, bias, dy = problem("float32")
    y = backend.linear_forward(x, weight)
    assert max_error(y, oracle.forward(x, weight, 0 * bias)) <= 1e-5
    for call, shape in [
        (lambda out: backend.linear_forward(x, weight, out=out), y.shape),
        (lambda out: backend.linear_backward_data(dy, weight, out=out), x.shape),
        (lambda out: backend.linear_backward_weight(dy, x, out=out), weight.shape),
        (lambda out: backend.linear_backward_bias(dy, out=out), bias.shape),
    ]:
        out = awkward(numpy.zeros(shape, numpy.float32))
        assert call(out) is out
        assert max_error(out, call(None)) <= 1e-6


@BACKENDS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_gradients_together(backend, dtype):
    x, weight, bias, dy = problem(dtype, 6, 11, 4)
    sums = oracle.forward(x, weight, bias)
    functions = {"identity": (None, 1), "relu": (numpy.maximum(sums, 0), sums > 0)}
    functions["leaky_relu"] = numpy.where(sums > 0, sums, 0.3 * sums), numpy.where(sums > 0, 1, 0.3)
    functions["tanh"] = numpy.tanh(sums), 1 / numpy.cosh(sums) ** 2
    functions["sigmoid"] = 1 / (1 + numpy.exp(-sums)), 1 / (2 + 2 * numpy.cosh(sums))
    for layout in (numpy.ascontiguousarray, numpy.asfortranarray, awkward):
        for activation, (y, slope) in functions.items():
            options = {"activation": activation, "negative_slope": 0.3}
            made = backend.linear_forward(layout(x), layout(weight), bias, **options)
            assert max_error(made, sums if y is None else y) <= 1e-5
            given = [layout(array) for array in (dy, x, weight)]
            y_there = None if y is None else layout(y.astype(dtype))
            expected = oracle.backward(dy * slope, x, weight)
            results = backend.linear_backward(*given, y=y_there, **options)
            for result, reference in zip(results, expected, strict=True):
                assert result.dtype == x.dtype
                assert max_error(result, reference) <= (1e-5 if dtype == "float32" else 1e-13)
            places = [awkward(numpy.full(array.shape, numpy.nan, dtype)) for array in (weight, bias)]
            into = backend.linear_backward(
                *given, y=y_there, **options, with_input=False, weight_gradient=places[0], bias_gradient=places[1]
            )
            assert into[0] is None
            for place, whole in zip(places, results[1:], strict=True):
                assert max_error(place, whole) <= 1e-6
            assert backend.linear_backward(*given, y=y_there, **options, with_bias=False)[2] is None
            assert given[0] is not dy or numpy.array_equal(dy, problem(dtype, 6, 11, 4)[3])  # left as it was


@BACKENDS
def test_what_gradients_together_refuse(backend):
    x, weight, _, dy = problem("float32")
    with pytest.raises(ArgumentError, match=r"activation must be one of .*tanh.*'gelu'"):
        backend.linear_backward(dy, x, weight, y=dy, activation="gelu")
    with pytest.raises(ArgumentError, match="give it as y"):
        backend.linear_backward(dy, x, weight, activation="relu")
    with pytest.raises(ArgumentError, match="negative_slope is above 0"):
        backend.linear_backward(dy, x, weight, y=dy, activation="leaky_relu", negative_slope=-1.0)
    with pytest.raises(ShapeError, match="the result y"):
        backend.linear_backward(dy, x, weight, y=dy[:, :2], activation="relu")
    with pytest.raises(ArgumentError, match="activation must be one of"):
        backend.linear_forward(x, weight, activation="elu")


# Large enough that the work is split into parts: of rows in some products, of columns in others.
SPLIT_SIZES = list(itertools.permutations((40, 300, 512)))


@pytest.mark.parametrize("sizes", SPLIT_SIZES, ids=str)
def test_large_products_in_parts(monkeypatch, sizes):
    x, weight, bias, dy = problem("float32", *sizes)
    results = []
    for threads in ("1", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        results.append(
            (
                cpu.linear_forward(x, weight, bias),
                cpu.linear_backward_data(dy, weight),
                cpu.linear_backward_weight(dy, x),
            )
        )
    wide_x, wide_weight, wide_bias, wide_dy = (array.astype(numpy.float64) for array in (x, weight, bias, dy))
    expected = (
        numpy.einsum("ni,ki->nk", wide_x, wide_weight, optimize=True) + wide_bias,
        numpy.einsum("nk,ki->ni", wide_dy, wide_weight, optimize=True),
        numpy.einsum("nk,ni->ki", wide_dy, wide_x, optimize=True),
    )
    for one, three, reference in zip(*results, expected, strict=True):
        assert one.tobytes() == three.tobytes()
        assert max_error(one, reference) <= 2e-4


@BACKENDS
@pytest.mark.parametrize("count", [200, 256, 300])
def test_out_may_be_an_input(backend, count):
    # With as many features in as out, x and dy have the result's shape, and with as many rows the weight does.
    x, weight, _, dy = problem("float64", count, 256, 256)
    products = {
        backend.linear_forward: ((x, weight), numpy.einsum("ni,ki->nk", x, weight, optimize=True)),
        backend.linear_backward_data: ((dy, weight), numpy.einsum("nk,ki->ni", dy, weight, optimize=True)),
        backend.linear_backward_weight: ((dy, x), numpy.einsum("nk,ni->ki", dy, x, optimize=True)),
    }
    for operation, (factors, expected) in products.items():
        for position, factor in enumerate(factors):
            if factor.shape == expected.shape:
                given = [array.copy() for array in factors]
                assert operation(*given, out=given[position]) is given[position]
                assert max_error(given[position], expected) <= 1e-11
    # out one row further than x, and the bias in its last row
    memory = numpy.zeros((count + 1, 256))
    memory[:-1] = x
    expected = products[backend.linear_forward][1] + x[count - 1]
    assert max_error(backend.linear_forward(memory[:-1], weight, memory[-2], out=memory[1:]), expected) <= 1e-11


@BACKENDS
def test_half_precision_is_summed_in_single(backend):
    x = numpy.full((1, 4096), 0.01, numpy.float16)
    y = backend.linear_forward(x, x, numpy.ones(1, numpy.float16))
    assert y.dtype == numpy.float16
    assert abs(float(y.item()) - (1 + 4096 * float(x[0, 0]) ** 2)) <= 1e-3
    assert backend.linear_backward_bias(x).dtype == numpy.float16


@BACKENDS
def test_errors(backend):
    x, weight, bias, dy = problem("float32")
    with pytest.raises(ShapeError, match=r"input has 10 features \(shape \(6, 10\)\) .* \(4, 11\) expects 11"):
        backend.linear_forward(x[:, :10], weight)
    with pytest.raises(ShapeError, match=r"2 dimensions \(N, in features\), got shape \(6, 11, 1\)"):
        backend.linear_forward(x[..., None], weight)
    with pytest.raises(ShapeError, match="weight must have 2 dimensions"):
        backend.linear_forward(x, weight[0])
    with pytest.raises(ShapeError, match=r"bias must have shape \(4,\)"):
        backend.linear_forward(x, weight, bias[:3])
    with pytest.raises(DtypeError, match="floating-point"):
        backend.linear_forward(x.astype(int), weight)
    with pytest.raises(ShapeError, match="output gradient"):
        backend.linear_backward_data(dy[:, :3], weight)
    with pytest.raises(ShapeError, match="output gradient"):
        backend.linear_backward_weight(dy[:3], x)
    with pytest.raises(ShapeError, match="out must have"):
        backend.linear_backward_bias(dy, out=numpy.zeros(3, numpy.float32))
