"""Batch norm kernels on the host runtime against exactly rounded sums; a large mean over a small variance too."""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels.errors import ArgumentError, DtypeError, LayoutError
from gpucnn_kernels.problem import ProblemError
from gpucnn_kernels.runtime import host
from tests.accuracy import channels_last, max_error
from tests.batch_norm_inputs import inputs, layouts
from tests.kernel_accuracy import on_the_host, placed
from tests.kernel_arrays import DTYPES, EPSILON, accumulated, cast, error_bound, wide
from tests.oracles import normalization as oracle

__all__ = ["on_the_host"]

TINY = 1e-5  # the default epsilon
SHAPES = [
    (2, 1),
    (5, 3),
    (300, 7),
    (9000, 3),  # channels apart from each other, in several parts
    (2, 3, 1, 1),
    (1, 2, 1, 2),
    (4, 3, 5, 7),
    (3, 2, 16, 16),
    (17, 5, 9, 8),
    (2, 40, 3, 3),  # more channels than a tile of 32
    (16, 2, 20, 20),  # almost as many numbers a channel as one launch makes
    (31, 2, 20, 20),  # channels together, in several parts
    (150, 40, 3, 3),  # more channels than a tile of 32, channels-last in several parts
    (46, 136, 5, 5),  # more packs of channels than a tile of 32; planes that packs do not fill
]
MANY_PARTS = [(1, 1, 370, 370), (4300, 17)]  # more parts than a warp has lanes


@cache
def exact_forward(shape):
    x, weight, bias, _ = inputs(shape)
    return oracle.batch_norm(x, weight, bias, TINY)


@cache
def exact_backward(shape):
    x, weight, _, dy = inputs(shape)
    return oracle.batch_norm_backward(dy, x, weight, TINY)


def per_channel(values, x):
    return values.reshape((1, -1) + (1,) * (x.ndim - 2))


def plain_forward(x, weight, bias):
    """The textbook two-pass computation in the dtype of its arguments."""
    axes = (0, *range(2, x.ndim))
    mean, variance = x.mean(axes), x.var(axes)
    inverse_std = 1 / numpy.sqrt(variance + x.dtype.type(TINY))
    y = (x - per_channel(mean, x)) * per_channel(inverse_std, x) * per_channel(weight, x) + per_channel(bias, x)
    return y, mean, inverse_std


def plain_backward(dy, x, weight):
    axes = (0, *range(2, x.ndim))
    _, mean, inverse_std = plain_forward(x, weight, weight)
    normal = (x - per_channel(mean, x)) * per_channel(inverse_std, x)
    count = x.dtype.type(x.size // x.shape[1])
    dbias, dweight = dy.sum(axes), (dy * normal).sum(axes)
    rest = dy - per_channel(dbias / count, x) - normal * per_channel(dweight / count, x)
    return rest * per_channel(weight * inverse_std, x), dweight, dbias


def steps(array):
    """Its strides, but of axes of length 1, which say nothing."""
    return [stride for stride, length in zip(array.strides, array.shape, strict=True) if length > 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype):
    acc = accumulated(dtype)
    for shape in [*SHAPES, *(MANY_PARTS if dtype == "float32" else ())]:
        numbers = inputs(shape)[:3]
        x, (weight, bias) = cast(numbers[0], dtype), (array.astype(acc) for array in numbers[1:])
        expected, plain = exact_forward(shape), plain_forward(*(array.astype(acc) for array in numbers))
        for layout in layouts(x):
            given = layout(x)
            where = f"{shape} {layout.__name__}"
            results = kernels.batch_norm_forward(given, weight, bias)
            assert steps(results[0]) == steps(given), where
            for result, wanted, simple, kept in zip(results, expected, plain, (dtype, acc, acc), strict=True):
                assert str(result.dtype) == kept, where
                # y is a sum that cancels, of terms of some 10.
                bound = error_bound(simple, wanted, kept) + 10 * EPSILON[acc]
                assert max_error(wide(result), wanted) <= bound, where
            out = numpy.full_like(given, numpy.nan)
            assert kernels.batch_norm_forward(given, weight, bias, out=out)[0] is out, where
            numpy.testing.assert_array_equal(out, results[0], err_msg=where)
            out = given.copy(order="K")
            assert kernels.batch_norm_forward(out, weight, bias, out=out)[0] is out, where
            numpy.testing.assert_array_equal(out, results[0], err_msg=where)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_without_parameters(dtype):
    acc = accumulated(dtype)
    for shape in [(5, 3), (4, 3, 5, 7)]:
        x = cast(inputs(shape)[0], dtype)
        ones, zeros = numpy.ones(shape[1], acc), numpy.zeros(shape[1], acc)
        for arguments in ((None, None), (ones, None), (None, zeros)):
            y, mean, inverse_std = kernels.batch_norm_forward(x, *arguments)
            for result, wanted in zip(
                (y, mean, inverse_std), kernels.batch_norm_forward(x, ones, zeros), strict=True
            ):
                numpy.testing.assert_array_equal(result, wanted, err_msg=f"{shape}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(dtype):
    acc = accumulated(dtype)
    for shape in [*SHAPES, *(MANY_PARTS if dtype == "float32" else ())]:
        numbers, expected = inputs(shape), exact_backward(shape)
        weight = numbers[1].astype(acc)
        mean, inverse_std = (array.astype(acc) for array in exact_forward(shape)[1:])
        plain = plain_backward(*(numbers[i].astype(acc) for i in (3, 0, 1)))
        # dx is a difference of terms of the size of dy * weight / std; the sums have terms of the size of dy.
        scale = float(abs(numbers[3]).max() * abs(weight).max() * inverse_std.max())
        sums = float(abs(numbers[3]).sum()) / shape[1]
        for layout in layouts(numbers[0]):
            dy, x = layout(cast(numbers[3], dtype)), layout(cast(numbers[0], dtype))
            where = f"{shape} {layout.__name__}"
            results = kernels.batch_norm_backward(dy, x, weight, mean, inverse_std)
            assert steps(results[0]) == steps(x), where
            for result, wanted, simple, kept, terms in zip(
                results, expected, plain, (dtype, acc, acc), (scale, sums, sums), strict=True
            ):
                assert str(result.dtype) == kept, where
                bound = error_bound(simple, wanted, kept) + 4 * EPSILON[acc] * terms
                assert max_error(wide(result), wanted) <= bound, where
            for index in (0, 1):  # in place of either input
                arguments = [dy.copy(order="K"), x.copy(order="K")]
                out = arguments[index]
                again = kernels.batch_norm_backward(*arguments, weight, mean, inverse_std, out=out)
                assert again[0] is out, where
                for result, wanted in zip(again, results, strict=True):
                    numpy.testing.assert_array_equal(result, wanted, err_msg=where)
            bare = kernels.batch_norm_backward(dy, x, None, mean, inverse_std)
            ones = kernels.batch_norm_backward(dy, x, numpy.ones_like(weight), mean, inverse_std)
            for result, wanted in zip(bare, ones, strict=True):
                numpy.testing.assert_array_equal(result, wanted, err_msg=where)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_for_given_statistics(dtype):
    acc = accumulated(dtype)
    for shape in [*SHAPES, *(MANY_PARTS if dtype == "float32" else ())]:
        numbers, random = inputs(shape), numpy.random.default_rng(7)
        weight, mean = (array.astype(acc) for array in (numbers[1], random.uniform(-1, 1, shape[1])))
        variance = random.uniform(0.1, 3, shape[1]).astype(acc)
        expected = oracle.batch_norm_inference_backward(numbers[3], numbers[0], weight, mean, variance, TINY)
        axes = (0, *range(2, len(shape)))
        sums = abs(numbers[3]).sum(axes), (abs(numbers[3]) * (abs(numbers[0]) + 1)).sum(axes) * 4
        bounds = (
            abs(expected[0]) * (EPSILON[dtype] / 2 + 4 * EPSILON[acc]) + 2.0**-25 * (dtype == "float16"),
            *(8 * EPSILON[acc] * terms for terms in reversed(sums)),
        )
        for layout, offset in product(layouts(numbers[0]), (0, 1)):
            dy, x = (placed(layout(cast(numbers[place], dtype)), offset) for place in (3, 0))
            where = f"{shape} {layout.__name__} {offset}"
            results = kernels.batch_norm_inference_backward(dy, x, weight, mean, variance)
            assert steps(results[0]) == steps(x), where
            for result, wanted, kept, bound in zip(results, expected, (dtype, acc, acc), bounds, strict=True):
                assert str(result.dtype) == kept, where
                assert numpy.all(abs(wide(result) - wanted) <= bound), where
            alone = kernels.batch_norm_inference_backward(dy, None, weight, mean, variance)
            numpy.testing.assert_array_equal(alone[0], results[0], err_msg=where)
            assert alone[1:] == (None, None), where
            places = numpy.full((2, shape[1]), numpy.nan, acc)
            again = kernels.batch_norm_inference_backward(
                dy, x, weight, mean, variance, out=x, out_weight=places[0], out_bias=places[1]
            )
            assert again[0] is x, where
            for result, wanted in zip((x, *places), results, strict=True):
                numpy.testing.assert_array_equal(result, wanted, err_msg=where)
            bare = kernels.batch_norm_inference_backward(dy, None, None, mean, variance)
            ones = kernels.batch_norm_inference_backward(dy, None, numpy.ones_like(weight), mean, variance)
            numpy.testing.assert_array_equal(bare[0], ones[0], err_msg=where)


def test_the_gradient_for_given_statistics_in_any_order_and_of_nothing():
    dy, x = (inputs((31, 2, 20, 20))[place].astype(numpy.float32) for place in (3, 0))
    row = numpy.ones(2, numpy.float32)
    assert host.order_independent(lambda: list(kernels.batch_norm_inference_backward(dy, x, row, row, row)))
    x[0, 0] = numpy.inf  # says nothing about dx, which is made of dy alone
    assert numpy.isfinite(kernels.batch_norm_inference_backward(dy, x, row, row, row)[0]).all()
    dx, dweight, dbias = kernels.batch_norm_inference_backward(dy[:0], x[:0], row, row, row)
    assert (dx.shape, dweight.tolist(), dbias.tolist()) == ((0, 2, 20, 20), [0, 0], [0, 0])
    with pytest.raises(LayoutError, match=r"x has strides .*, but dy has"):
        kernels.batch_norm_inference_backward(dy, channels_last(x), row, row, row)
    with pytest.raises(DtypeError, match="running_var must be float32 where dy is float32"):
        kernels.batch_norm_inference_backward(dy, x, row, row, row.astype(float))
    for name in ("out_weight", "out_bias"):
        with pytest.raises(ArgumentError, match=f"{name} shares memory with weight"):
            kernels.batch_norm_inference_backward(dy, x, row, row + 0, row + 0, **{name: row})
    both = row.copy()
    with pytest.raises(ArgumentError, match="out_bias shares memory with out_weight"):
        kernels.batch_norm_inference_backward(dy, x, row, row, row, out_weight=both, out_bias=both)
    with pytest.raises(ProblemError, match="got dy of shape"):
        kernels.batch_norm_inference_backward(dy[0], None, row, row, row)


@pytest.mark.parametrize(("mean", "spread"), [(1e4, 1.0), (-3e5, 1.0), (1e3, 1e-3), (0.0, 1e-20), (1e15, 1e16)])
def test_large_means_and_extreme_spreads(mean, spread):
    random = numpy.random.default_rng(2)
    x = (mean + spread * random.standard_normal((16, 2, 17, 17))).astype(numpy.float32)
    weight, bias = (1 + 0.5 * random.standard_normal((2, 2))).astype(numpy.float32)
    dy = random.standard_normal(x.shape).astype(numpy.float32)
    expected = oracle.batch_norm(x, weight, bias, TINY)
    wanted = oracle.batch_norm_backward(dy, x, weight, TINY)
    for layout in layouts(x):
        y, found_mean, inverse_std = kernels.batch_norm_forward(layout(x), weight, bias)
        assert max_error(y, expected[0]) <= 2e-6
        assert numpy.all(abs(found_mean - expected[1]) <= 1e-7 * (abs(expected[1]) + spread))
        assert numpy.all(abs(inverse_std - expected[2]) <= 1e-6 * expected[2])
        results = kernels.batch_norm_backward(layout(dy), layout(x), weight, found_mean, inverse_std)
        for result, reference in zip(results, wanted, strict=True):
            assert max_error(result, reference) <= 1e-5 * (float(abs(reference).max()) + 1e-30)


@pytest.mark.parametrize("outlier", [1e2, 1e6])
def test_a_first_number_far_from_the_others(outlier):
    x = inputs((16, 2, 20, 20))[0].astype(numpy.float32)
    x[0, :, 0, 0] = outlier
    ones, zeros = numpy.ones(2, numpy.float32), numpy.zeros(2, numpy.float32)
    expected, plain = oracle.batch_norm(x, ones, zeros, TINY), plain_forward(x, ones, zeros)
    for layout in layouts(x):
        results = kernels.batch_norm_forward(layout(x))
        for result, wanted, simple in zip(results, expected, plain, strict=True):
            assert max_error(result, wanted) <= error_bound(simple, wanted, "float32")


def test_constant_channels():
    x = numpy.full((4, 2, 3, 3), 123456.78, numpy.float32)
    y, mean, inverse_std = kernels.batch_norm_forward(x)
    assert numpy.all(y == 0)
    assert numpy.all(mean == x[0, 0, 0, 0])
    assert numpy.all(abs(inverse_std - 1 / numpy.sqrt(TINY)) <= 1e-4)
    dx, _, _ = kernels.batch_norm_backward(numpy.ones_like(x), x, None, mean, inverse_std)
    assert numpy.all(dx == 0)


def test_a_nan_stays_in_its_channel():
    for shape in ((3, 3, 4, 4), (20, 3)):
        clean = inputs(shape)[0].astype(numpy.float32)
        for layout in layouts(clean):
            x = layout(clean).copy(order="K")
            expected = kernels.batch_norm_forward(x)[0]
            x[(1, 1) + (2,) * (x.ndim - 2)] = numpy.nan
            y = kernels.batch_norm_forward(x)[0]
            assert numpy.isnan(y[:, 1]).all()
            numpy.testing.assert_array_equal(y[:, ::2], expected[:, ::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics(dtype, momentum):
    acc = accumulated(dtype)
    x = cast(inputs((6, 4, 3, 5))[0], dtype)
    running_mean, running_var = numpy.full(4, 0.5, acc), numpy.full(4, 2.0, acc)
    kernels.batch_norm_forward(x, None, None, running_mean, running_var, momentum=momentum)
    mean, variance = oracle.statistics(wide(x))
    count = x.size // 4
    expected_mean = (1 - momentum) * 0.5 + momentum * mean
    expected_var = (1 - momentum) * 2 + momentum * variance * count / (count - 1)
    assert max_error(running_mean, expected_mean) <= 4 * EPSILON[acc] * abs(expected_mean).max()
    assert max_error(running_var, expected_var) <= 4 * EPSILON[acc] * abs(expected_var).max()
    only_mean, only_var = numpy.zeros(4, acc), numpy.zeros(4, acc)
    kernels.batch_norm_forward(x, running_mean=only_mean, momentum=momentum)
    kernels.batch_norm_forward(x, running_var=only_var, momentum=momentum)
    assert max_error(only_mean, momentum * mean) <= 4 * EPSILON[acc] * abs(mean).max()
    assert max_error(only_var, momentum * variance * count / (count - 1)) <= 4 * EPSILON[acc] * variance.max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(dtype):
    acc = accumulated(dtype)
    for shape in [(1, 3), (6, 3), (1, 3, 1, 1), (4, 3, 5, 7), (2, 40, 3, 3), (1, 1, 40, 130)]:
        numbers, weight, bias, _ = inputs(shape)
        random = numpy.random.default_rng(4)
        running_mean = wide(cast(random.standard_normal(shape[1]), "bfloat16"))
        running_var = wide(cast(random.uniform(1e-3, 50, shape[1]), "bfloat16"))
        vectors = [array.astype(acc) for array in (weight, bias, running_mean, running_var)]
        expected = oracle.batch_norm_inference(numbers, weight, bias, running_mean, running_var, TINY)
        x = numbers.astype(acc)
        w, b, m, v = (per_channel(array, x) for array in vectors)
        plain = (x - m) / numpy.sqrt(v + x.dtype.type(TINY)) * w + b
        for layout in layouts(x):
            given = layout(cast(numbers, dtype))
            where = f"{shape} {layout.__name__}"
            y = kernels.batch_norm_inference(given, *vectors)
            assert y.dtype == given.dtype, where
            assert steps(y) == steps(given), where
            bound = error_bound(plain, expected, dtype)
            assert max_error(wide(y), expected) <= bound, where
            assert kernels.batch_norm_inference(given, *vectors, out=given) is given, where
            numpy.testing.assert_array_equal(given, y, err_msg=where)
        bare = kernels.batch_norm_inference(cast(numbers, dtype), None, None, *vectors[2:])
        ones, zeros = numpy.ones(shape[1]), numpy.zeros(shape[1])
        wanted = oracle.batch_norm_inference(numbers, ones, zeros, running_mean, running_var, TINY)
        plain = (x - m) / numpy.sqrt(v + x.dtype.type(TINY))
        assert max_error(wide(bare), wanted) <= error_bound(plain, wanted, dtype), shape
