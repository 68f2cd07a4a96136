"""Loss kernels on the host runtime against loops that follow the definitions.

Softmax cross-entropy has tests of its own, in test_kernels_cross_entropy.py.
"""

from __future__ import annotations

import math
from itertools import product

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels import runtime
from gpucnn_kernels.errors import ArgumentError, DtypeError, LayoutError
from gpucnn_kernels.runtime import host
from gpucnn_kernels.runtime.host_array import HostArray
from tests.accuracy import awkward, channels_last, max_error
from tests.kernel_arrays import DTYPES, EPSILON, accumulated, cast, wide
from tests.oracles import losses as oracle

REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture(autouse=True)
def host_runtime():
    with runtime.using("host"):
        yield


def exact(random, shape, low, high):
    """Random numbers in float64 that all four dtypes have."""
    return wide(cast(random.uniform(low, high, shape), "bfloat16"))


def divided(total, reduction, divisor):
    return total / divisor if reduction == "mean" else total


# ---------------------------------------------------------------- binary cross-entropy


def binary(shape=(6, 4), seed=2):
    random = numpy.random.default_rng(seed)
    logits, targets = exact(random, shape, -12, 12), exact(random, shape, 0, 1)
    targets.reshape(-1)[: targets.size // 3] = 0
    targets.reshape(-1)[-(targets.size // 3) :] = 1
    return logits, targets, exact(random, shape, 0.1, 1.1), exact(random, shape, 0.1, 3)


def binary_slopes(logits, targets, weight, positive_weight):
    """((1 - t) * s - p * t * (1 - s)) * w, a number at a time."""
    result = numpy.zeros(logits.shape)
    for index in numpy.ndindex(*logits.shape):
        x, t = float(logits[index]), float(targets[index])
        p = 1.0 if positive_weight is None else float(positive_weight[index])
        w = 1.0 if weight is None else float(weight[index])
        result[index] = ((1 - t) / (1 + math.exp(-x)) - p * t / (1 + math.exp(x))) * w
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_binary_cross_entropy(dtype):
    acc = accumulated(dtype)
    for shape, weighted, positive in product([(1,), (6, 4), (2, 3, 4, 5)], (False, True), (False, True)):
        logits, targets, weight, positive_weight = binary(shape)
        weight, positive_weight = weight if weighted else None, positive_weight if positive else None
        slopes = binary_slopes(logits, targets, weight, positive_weight)
        for layout, reduction in product(
            (numpy.ascontiguousarray, channels_last) if len(shape) == 4 else (numpy.ascontiguousarray,), REDUCTIONS
        ):
            where = f"{shape} weight {weighted} positive {positive} {layout.__name__} {reduction}"
            given = layout(cast(logits, dtype)), layout(cast(targets, dtype))
            options = {
                "weight": None if weight is None else weight.astype(acc),
                "positive_weight": None if positive_weight is None else positive_weight.astype(acc),
                "reduction": reduction,
            }
            loss = kernels.binary_cross_entropy_with_logits_forward(*given, **options)
            expected = numpy.asarray(
                oracle.binary_cross_entropy_with_logits(logits, targets, weight, positive_weight, reduction)
            )
            assert loss.dtype == given[0].dtype, where
            assert loss.shape == expected.shape, where
            assert reduction != "none" or loss.strides == given[0].strides, where
            bound = (EPSILON[dtype] / 2 + 8 * EPSILON[acc]) * abs(expected).max()
            assert max_error(wide(loss), expected) <= bound, where
            gradient = kernels.binary_cross_entropy_with_logits_backward(*given, **options)
            assert gradient.dtype == given[0].dtype, where
            assert gradient.strides == given[0].strides, where
            wanted = divided(slopes, reduction, logits.size)
            bound = (EPSILON[dtype] / 2 + 8 * EPSILON[acc]) * abs(wanted).max()
            assert max_error(wide(gradient), wanted) <= bound, where
            for index in (0, 1):  # in place of either input
                arguments = [array.copy(order="K") for array in given]
                out = arguments[index]
                same = kernels.binary_cross_entropy_with_logits_backward(*arguments, **options, out=out)
                assert same is out, where
                numpy.testing.assert_array_equal(out, gradient, err_msg=where)


BROADCASTS = [
    # logits' shape, weight's, positive_weight's
    ((6, 4), (), (4,)),
    ((6, 4), (6, 1), (1,)),
    ((6, 4), (1, 4), (6, 1)),
    ((2, 3, 4, 5), (3, 1, 1), (2, 1, 1, 1)),
    ((2, 3, 4, 5), (4, 5), (2, 3, 1, 1)),
    ((2, 3, 4, 5), (2, 1, 4, 1), (3, 1, 5)),
    ((2, 3, 1, 5), (2, 3, 1, 1), (1, 1, 1, 5)),
    ((2, 3, 4, 2, 3), (3, 4, 1, 1), (2, 3)),
    ((2, 2, 2, 2, 3, 2), (2, 2, 2, 1, 1, 1), None),
]


@pytest.mark.parametrize(("shape", "weight_shape", "positive_shape"), BROADCASTS, ids=str)
def test_weights_broadcast(shape, weight_shape, positive_shape):
    random = numpy.random.default_rng(8)
    logits, targets, *_ = binary(shape)
    weight = exact(random, weight_shape, 0.1, 1.1)
    positive = None if positive_shape is None else exact(random, positive_shape, 0.1, 3)
    full = [None if array is None else numpy.broadcast_to(array, shape) for array in (weight, positive)]
    expected = oracle.binary_cross_entropy_with_logits(logits, targets, *full, "none")
    slopes = binary_slopes(logits, targets, *full)
    for layout in (numpy.ascontiguousarray, channels_last) if len(shape) == 4 else (numpy.ascontiguousarray,):
        given = layout(logits), layout(targets)
        for options in (
            {"weight": weight, "positive_weight": positive},
            {"weight": full[0], "positive_weight": full[1]},  # strides of 0
        ):
            loss = kernels.binary_cross_entropy_with_logits_forward(*given, **options, reduction="none")
            assert max_error(loss, expected) <= 1e-14
            total = kernels.binary_cross_entropy_with_logits_forward(*given, **options)
            assert abs(float(total) - expected.mean()) <= 1e-14
            gradient = kernels.binary_cross_entropy_with_logits_backward(*given, **options, reduction="sum")
            assert max_error(gradient, slopes) <= 1e-14


def test_weights_that_do_not_broadcast():
    logits = numpy.zeros((2, 3, 2, 3, 2))
    forward = kernels.binary_cross_entropy_with_logits_forward
    for wrong in ((2, 3), (3, 3), (1, 2, 3, 2, 3, 2)):
        with pytest.raises(
            ArgumentError, match=r"positive_weight of shape \(.*\) does not broadcast to logits of"
        ):
            forward(logits, logits, positive_weight=numpy.ones(wrong))
    with pytest.raises(ArgumentError, match=r"more than 4 groups of axes.*broadcast them first"):
        forward(logits, logits, weight=numpy.ones((2, 1, 2, 1, 2)))
    alternating = numpy.broadcast_to(numpy.full((2, 1, 2, 1, 2), 2.0), logits.shape)
    loss = forward(logits, logits, weight=numpy.ascontiguousarray(alternating))  # as the message says
    assert abs(float(loss) - 2 * math.log(2)) <= 1e-15


def test_binary_cross_entropy_of_extreme_logits():
    largest = float(numpy.finfo(numpy.float32).max)
    logits = numpy.array([-largest, -200, 200, largest], numpy.float32)
    ones, zeros = numpy.ones(4, numpy.float32), numpy.zeros(4, numpy.float32)
    forward = kernels.binary_cross_entropy_with_logits_forward
    backward = kernels.binary_cross_entropy_with_logits_backward
    numpy.testing.assert_array_equal(forward(logits, ones, reduction="none"), [largest, 200, 0, 0])
    numpy.testing.assert_array_equal(forward(logits, zeros, reduction="none"), [0, 0, 200, largest])
    numpy.testing.assert_array_equal(backward(logits, ones, reduction="sum"), [-1, -1, 0, 0])
    numpy.testing.assert_array_equal(backward(logits, zeros, reduction="none"), [0, 0, 1, 1])
    nan = numpy.full(1, numpy.nan, numpy.float32)
    assert numpy.isnan(forward(nan, nan[:0].sum(keepdims=True)))
    assert numpy.isnan(forward(zeros[:1], nan))


def test_binary_cross_entropy_keeps_its_digits():
    logits = numpy.linspace(-30, 30, 61, dtype=numpy.float32)
    for target, positive in product((0.0, 0.25, 1.0), (1.0, 2.5)):
        targets = numpy.full_like(logits, target)
        options = {"positive_weight": numpy.full_like(logits, positive), "reduction": "none"}
        loss = kernels.binary_cross_entropy_with_logits_forward(logits, targets, **options)
        expected = oracle.binary_cross_entropy_with_logits(
            logits, targets, None, options["positive_weight"], "none"
        )
        assert numpy.all(abs(loss - expected) <= 1e-6 * expected)
        gradient = kernels.binary_cross_entropy_with_logits_backward(logits, targets, **options)
        for x, value in zip(logits.tolist(), gradient.tolist(), strict=True):
            towards_zero = (1 - target) / (1 + math.exp(-x))
            towards_one = positive * target / (1 + math.exp(x))
            assert abs(value - (towards_zero - towards_one)) <= 1e-6 * (towards_zero + towards_one)


# ---------------------------------------------------------------- mean squared error


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_squared_error(dtype):
    random = numpy.random.default_rng(3)
    acc = accumulated(dtype)
    for shape in [(1,), (5, 7), (2, 3, 4, 5), (300,)]:
        prediction, target = exact(random, shape, -3, 3), exact(random, shape, -3, 3)
        for layout, reduction in product(
            (numpy.ascontiguousarray, channels_last) if len(shape) == 4 else (numpy.ascontiguousarray,), REDUCTIONS
        ):
            where = f"{shape} {layout.__name__} {reduction}"
            given = layout(cast(prediction, dtype)), layout(cast(target, dtype))
            loss = kernels.mean_squared_error_forward(*given, reduction=reduction)
            expected = numpy.asarray(oracle.mean_squared_error(prediction, target, reduction))
            assert loss.dtype == given[0].dtype, where
            assert loss.shape == expected.shape, where
            bound = (EPSILON[dtype] / 2 + 2 * EPSILON[acc]) * abs(expected).max()
            assert max_error(wide(loss), expected) <= bound, where
            gradient = kernels.mean_squared_error_backward(*given, reduction=reduction)
            wanted = divided(2 * (prediction - target), reduction, prediction.size)
            assert gradient.strides == given[0].strides, where
            bound = (EPSILON[dtype] / 2 + 2 * EPSILON[acc]) * abs(wanted).max()
            assert max_error(wide(gradient), wanted) <= bound, where
            for index in (0, 1):  # in place of either input
                arguments = [array.copy(order="K") for array in given]
                out = arguments[index]
                assert kernels.mean_squared_error_backward(*arguments, reduction=reduction, out=out) is out, where
                numpy.testing.assert_array_equal(out, gradient, err_msg=where)


def test_sums_of_many_terms():
    # More elements than there are threads, terms of very different size, in a sum that float32 would not carry.
    random = numpy.random.default_rng(9)
    prediction = (random.standard_normal(300_000) * 10 ** random.uniform(-3, 1, 300_000)).astype(numpy.float32)
    zeros = numpy.zeros_like(prediction)
    terms = wide(prediction * prediction)
    total = math.fsum(terms)
    loss = kernels.mean_squared_error_forward(prediction, zeros, reduction="sum")
    assert abs(float(loss) - total) <= EPSILON["float32"] * total
    terms = kernels.binary_cross_entropy_with_logits_forward(prediction, zeros, reduction="none")
    total = math.fsum(wide(terms))
    loss = kernels.binary_cross_entropy_with_logits_forward(prediction, zeros, reduction="sum")
    assert abs(float(loss) - total) <= EPSILON["float32"] * total


# ---------------------------------------------------------------- all


def test_losses_of_nothing():
    empty = numpy.zeros((0, 2), numpy.float32)
    for forward in (kernels.mean_squared_error_forward, kernels.binary_cross_entropy_with_logits_forward):
        assert numpy.isnan(forward(empty, empty))
        assert forward(empty, empty, reduction="sum") == 0
        assert forward(empty, empty, reduction="none").shape == (0, 2)
    for backward in (kernels.mean_squared_error_backward, kernels.binary_cross_entropy_with_logits_backward):
        assert backward(empty, empty).shape == (0, 2)


def test_the_order_of_threads_changes_nothing():
    logits, targets, weight, positive_weight = (array.astype(numpy.float32) for array in binary((70, 10)))

    def run():
        options = {"weight": weight, "positive_weight": positive_weight}
        return [
            kernels.binary_cross_entropy_with_logits_forward(logits, targets, **options),
            kernels.binary_cross_entropy_with_logits_backward(logits, targets, **options),
            kernels.mean_squared_error_forward(logits, targets),
            kernels.mean_squared_error_backward(logits, targets),
        ]

    assert host.order_independent(run)


def test_losses_are_arrays_on_the_device():
    x = numpy.ones((2, 4), numpy.float32).view(HostArray)
    for result in (
        kernels.mean_squared_error_forward(x, x),
        kernels.binary_cross_entropy_with_logits_forward(x, x),
    ):
        assert type(result) is HostArray
        assert result.shape == ()


def test_errors():
    x = numpy.zeros((2, 3), numpy.float32)
    with pytest.raises(ArgumentError, match=r"target has shape \(3, 2\), but prediction has shape \(2, 3\)"):
        kernels.mean_squared_error_forward(x, numpy.zeros((3, 2), numpy.float32))
    with pytest.raises(DtypeError, match="targets must be one of float32"):
        kernels.binary_cross_entropy_with_logits_forward(x, x.astype("int32"))
    with pytest.raises(DtypeError, match="target is float64, but prediction is float32"):
        kernels.mean_squared_error_forward(x, x.astype("float64"))
    with pytest.raises(DtypeError, match=r"weight must be float32 .*got float64"):
        kernels.binary_cross_entropy_with_logits_forward(x, x, weight=numpy.ones(3))
    with pytest.raises(LayoutError, match="prediction of shape"):
        kernels.mean_squared_error_backward(awkward(x), x)
    with pytest.raises(LayoutError, match="targets has strides"):
        kernels.binary_cross_entropy_with_logits_backward(x, numpy.zeros((3, 2), numpy.float32).T)
    with pytest.raises(ArgumentError, match="out has shape"):
        kernels.binary_cross_entropy_with_logits_backward(x, x, out=x[:1])
    for function in (
        kernels.mean_squared_error_forward,
        kernels.mean_squared_error_backward,
        kernels.binary_cross_entropy_with_logits_forward,
        kernels.binary_cross_entropy_with_logits_backward,
    ):
        with pytest.raises(ArgumentError, match="reduction must be one of"):
            function(x, x, reduction="batchmean")
