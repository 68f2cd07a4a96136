"""Softmax cross-entropy kernels on the host runtime against loops that follow the definition."""

from __future__ import annotations

import math
from itertools import product

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels import runtime
from gpucnn_kernels.cross_entropy import softmax_cross_entropy_step
from gpucnn_kernels.errors import ArgumentError, DtypeError, LayoutError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import ProblemError
from gpucnn_kernels.runtime import host
from gpucnn_kernels.runtime.host_array import HostArray
from tests.accuracy import awkward, max_error
from tests.kernel_arrays import DTYPES, EPSILON, accumulated, cast, error_bound, wide
from tests.oracles import activations as activation_oracle
from tests.oracles import losses as oracle

REDUCTIONS = ("mean", "sum", "none")
LABELS = ("uint8", "int32", "int64")


@pytest.fixture(autouse=True)
def host_runtime():
    with runtime.using("host"):
        yield


def exact(random, shape, low, high):
    """Random numbers in float64 that all four dtypes have."""
    return wide(cast(random.uniform(low, high, shape), "bfloat16"))


def divided(total, reduction, divisor):
    return total / divisor if reduction == "mean" else total


SIZES = [(1, 1), (7, 5), (3, 40), (70, 10), (2, 1100)]  # rows for warps; for blocks


def classification(kind, weighted, count=7, classes=5, seed=0):
    random = numpy.random.default_rng(seed + count)
    logits = exact(random, (count, classes), -6, 6)
    weight = exact(random, (classes,), 0.1, 1.1) if weighted else None
    if kind == "labels":
        return logits, random.integers(0, min(classes, 256), count), weight
    return logits, exact(random, (count, classes), 0, 2 / classes), weight


def weighted_targets(logits, targets, weight, smoothing, dtype=numpy.float64):
    """The targets (N, C) as the definition has them, and the divisor of "mean"."""
    count, classes = logits.shape
    weight = numpy.ones(classes, dtype) if weight is None else weight.astype(dtype)
    one_hot = numpy.eye(classes, dtype=dtype)[targets] if targets.ndim == 1 else targets.astype(dtype)
    divisor = float(wide(weight)[targets].sum()) if targets.ndim == 1 else count
    return (one_hot * dtype(1 - smoothing) + dtype(smoothing / classes)) * weight, divisor


def plain_loss(logits, targets, weight, smoothing, reduction, dtype):
    """The loss in the accumulating dtype, its terms added in float64 as on the CPU."""
    acc = numpy.dtype(accumulated(dtype)).type
    goal, divisor = weighted_targets(logits, targets, weight, smoothing, acc)
    shifted = logits.astype(acc) - logits.astype(acc).max(axis=1, keepdims=True)
    terms = -(goal * (shifted - numpy.log(numpy.exp(shifted).sum(axis=1, keepdims=True)))).sum(axis=1)
    if reduction == "none":
        return terms
    return numpy.asarray(divided(terms.sum(dtype=numpy.float64), reduction, divisor)).astype(acc)


def in_dtypes(dtype, logits, targets, weight, labels="int64"):
    """Arrays as the kernels take them."""
    return (
        cast(logits, dtype),
        targets.astype(labels) if targets.ndim == 1 else cast(targets, dtype),
        None if weight is None else weight.astype(accumulated(dtype)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_cross_entropy(dtype, kind):
    for size, weighted, smoothing in product(SIZES, (False, True), (0.0, 0.1, 1.0)):
        logits, targets, weight = classification(kind, weighted, *size)
        given = in_dtypes(dtype, logits, targets, weight)
        softmax = activation_oracle.softmax(logits, 1)
        for reduction in REDUCTIONS:
            where = f"{size} weighted {weighted} smoothing {smoothing} {reduction}"
            loss, probabilities = kernels.softmax_cross_entropy_forward(
                *given[:2], weight=given[2], label_smoothing=smoothing, reduction=reduction
            )
            assert loss.dtype == probabilities.dtype == given[0].dtype, where
            assert loss.shape == ((size[0],) if reduction == "none" else ()), where
            assert isinstance(loss, numpy.ndarray), where
            expected = numpy.asarray(oracle.cross_entropy(logits, targets, weight, smoothing, reduction))
            plain = plain_loss(logits, targets, weight, smoothing, reduction, dtype)
            # A loss near 0 is a difference of numbers of the size of the logits.
            slack = 12 * EPSILON[accumulated(dtype)]
            assert max_error(wide(loss), expected) <= error_bound(plain, expected, dtype) + slack, where
            bound = EPSILON[dtype] / 2 + 8 * EPSILON[accumulated(dtype)]
            assert max_error(wide(probabilities), softmax) <= bound, where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_cross_entropy_gradient(dtype, kind):
    for size, weighted, smoothing in product(SIZES, (False, True), (0.0, 0.2)):
        logits, targets, weight = classification(kind, weighted, *size, seed=1)
        given = in_dtypes(dtype, logits, targets, weight)
        probabilities = cast(activation_oracle.softmax(logits, 1), dtype)
        goal, divisor = weighted_targets(logits, targets, weight, smoothing)
        sums = numpy.array([math.fsum(row) for row in goal])[:, None]
        for reduction in REDUCTIONS:
            where = f"{size} weighted {weighted} smoothing {smoothing} {reduction}"
            expected = divided(wide(probabilities) * sums - goal, reduction, divisor)
            options = {"weight": given[2], "label_smoothing": smoothing, "reduction": reduction}
            gradient = kernels.softmax_cross_entropy_backward(probabilities, given[1], **options)
            assert gradient.dtype == probabilities.dtype, where
            scale = divided(1.0, reduction, divisor) * abs(goal).max()  # of the terms that cancel
            bound = EPSILON[dtype] / 2 * abs(expected).max() + 6 * EPSILON[accumulated(dtype)] * (
                abs(expected).max() + scale + divided(sums.max(), reduction, divisor)
            )
            assert max_error(wide(gradient), expected) <= bound, where
            out = probabilities.copy()
            assert kernels.softmax_cross_entropy_backward(out, given[1], **options, out=out) is out, where
            numpy.testing.assert_array_equal(out, gradient, err_msg=where)


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_gradient_is_the_slope_of_the_loss(kind, reduction):
    logits, targets, weight = classification(kind, True, 3, 4, seed=5)
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": reduction}
    _, probabilities = kernels.softmax_cross_entropy_forward(logits, targets, **options)
    gradient = kernels.softmax_cross_entropy_backward(probabilities, targets, **options)
    for index in numpy.ndindex(*logits.shape):
        values = []
        for step in (1e-5, -1e-5):
            moved = logits.copy()
            moved[index] += step
            values.append(oracle.cross_entropy(moved, targets, weight, 0.1, reduction))
        assert abs(gradient[index] - (values[0] - values[1]) / 2e-5) <= 1e-8


def test_many_samples():
    # More than the blocks that leave a sum, so that blocks go round; and more weights than one block adds up.
    logits, targets, weight = classification("labels", True, 9000, 3)
    logits, targets, weight = in_dtypes("float32", logits, targets, weight, "uint8")
    for reduction in ("mean", "none"):
        options = {"weight": weight, "label_smoothing": 0.1, "reduction": reduction}
        expected = numpy.asarray(oracle.cross_entropy(logits, targets, weight, 0.1, reduction))
        loss, probabilities = kernels.softmax_cross_entropy_forward(logits, targets, **options)
        assert max_error(loss, expected) <= 2e-7 * abs(expected).max() + 12 * EPSILON["float32"]
        gradient = kernels.softmax_cross_entropy_backward(probabilities, targets, **options)
        goal, divisor = weighted_targets(logits, targets, weight, 0.1)
        exact_gradient = wide(probabilities) * goal.sum(1, keepdims=True) - goal
        bound = divided(8 * EPSILON["float32"], reduction, divisor)
        assert max_error(gradient, divided(exact_gradient, reduction, divisor)) <= bound
    bad = targets.copy()
    bad[[8999, 8500]] = 3, 200
    with pytest.raises(ArgumentError, match=r"label 200 at position 8500 is out of range: with 3 classes"):
        kernels.softmax_cross_entropy_forward(logits, bad)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_label_dtypes(dtype, labels):
    logits, targets, weight = classification("labels", True)
    wanted = in_dtypes(dtype, logits, targets, weight)
    given = in_dtypes(dtype, logits, targets, weight, labels)
    expected = kernels.softmax_cross_entropy_forward(*wanted[:2], weight=wanted[2])
    result = kernels.softmax_cross_entropy_forward(*given[:2], weight=given[2])
    for one, other in zip(result, expected, strict=True):
        numpy.testing.assert_array_equal(one, other)
    numpy.testing.assert_array_equal(
        kernels.softmax_cross_entropy_backward(result[1], given[1], weight=given[2]),
        kernels.softmax_cross_entropy_backward(result[1], wanted[1], weight=wanted[2]),
    )


def test_cross_entropy_of_extreme_logits():
    logits = numpy.array([[1e30, -1e30, 0], [-1e4, 1e4, 0], [-numpy.inf, 0, 0]], numpy.float32)
    loss, probabilities = kernels.softmax_cross_entropy_forward(logits, numpy.array([0, 0, 1]), reduction="none")
    numpy.testing.assert_allclose(loss, [0, 2e4, math.log(2)], rtol=1e-6)
    numpy.testing.assert_array_equal(probabilities, [[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5]])
    lost, _ = kernels.softmax_cross_entropy_forward(logits, numpy.array([0, 0, 0]), reduction="none")
    assert lost[2] == numpy.inf
    nan = numpy.full((1, 3), numpy.nan, numpy.float32)
    assert numpy.isnan(kernels.softmax_cross_entropy_forward(nan, numpy.array([1]))[0])


def test_cross_entropy_gradient_keeps_its_digits():
    logits = numpy.random.default_rng(4).uniform(-30, 0, (40, 5)).astype(numpy.float32)
    labels = numpy.arange(40) % 5
    _, probabilities = kernels.softmax_cross_entropy_forward(logits, labels)
    gradient = kernels.softmax_cross_entropy_backward(probabilities, labels, reduction="sum")
    for n, k in numpy.ndindex(*logits.shape):
        rest = math.fsum(math.exp(float(logits[n, j]) - float(logits[n, k])) for j in range(5) if j != k)
        expected, slack = (-rest / (1 + rest), 2.0**-22) if k == labels[n] else (1 / (1 + rest), 0.0)
        assert abs(float(gradient[n, k]) - expected) <= 2e-6 * abs(expected) + slack


@pytest.mark.parametrize("labels", ["int32", "int64"])
@pytest.mark.parametrize("classes", [3, 1100])
def test_labels_out_of_range(labels, classes):
    logits = numpy.zeros((4, classes), numpy.float32)
    weight = numpy.ones(classes, numpy.float32)
    largest = numpy.iinfo(labels).max
    for bad, position in (([0, 1, classes, -1], 2), ([0, -100, largest, 1], 1), ([0, 1, 2, -largest - 1], 3)):
        targets = numpy.array(bad, labels)
        pattern = (
            rf"label {bad[position]} at position {position} is out of range: with {classes} classes, labels are 0 "
        )
        for reduction, given in product(REDUCTIONS, (None, weight)):
            options = {"weight": given, "reduction": reduction}
            with pytest.raises(ArgumentError, match=pattern):
                kernels.softmax_cross_entropy_forward(logits, targets, **options)
            # Unchecked, it is NaN wherever such a label has a part, and nothing beyond the arrays is touched.
            loss, probabilities = kernels.softmax_cross_entropy_forward(
                logits, targets, **options, check_targets=False
            )
            wrong = (targets < 0) | (targets >= classes)
            numpy.testing.assert_array_equal(
                numpy.isnan(loss), wrong if reduction == "none" else True, err_msg=f"{bad}"
            )
            assert max_error(probabilities, 1 / classes) <= 1e-7
            gradient = kernels.softmax_cross_entropy_backward(probabilities, targets, **options)
            numpy.testing.assert_array_equal(numpy.isnan(gradient).all(axis=1), wrong)
            assert numpy.isfinite(gradient[~wrong]).all()


def test_unchecked_labels_in_range_give_the_same():
    logits, targets, _ = classification("labels", False)
    for reduction in REDUCTIONS:
        checked = kernels.softmax_cross_entropy_forward(logits, targets, reduction=reduction)
        unchecked = kernels.softmax_cross_entropy_forward(
            logits, targets, reduction=reduction, check_targets=False
        )
        for one, other in zip(checked, unchecked, strict=True):
            numpy.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- samples that are ignored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("labels", "ignored"), [("uint8", 255), ("int32", -100), ("int64", 2), ("int64", -(2**63))]
)
def test_samples_that_are_ignored_are_as_if_they_were_not_there(dtype, labels, ignored):
    for size, weighted, smoothing in product([(23, 5), (5, 1100), (4500, 3)], (False, True), (0.0, 0.1)):
        logits, targets, weight = classification("labels", weighted, *size, seed=2)
        logits, targets, weight = in_dtypes(dtype, logits, targets, weight, labels)
        targets[::4] = ignored
        kept = numpy.flatnonzero(targets != ignored)
        others = (logits[kept], targets[kept])
        logits[0] = numpy.nan
        for reduction in REDUCTIONS:
            where = f"{size} weighted {weighted} smoothing {smoothing} {reduction}"
            options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
            expected, probabilities = kernels.softmax_cross_entropy_forward(*others, **options)
            slopes = kernels.softmax_cross_entropy_backward(probabilities, others[1], **options)
            options["ignore_index"] = ignored
            loss, probabilities = kernels.softmax_cross_entropy_forward(logits, targets, **options)
            gradient = kernels.softmax_cross_entropy_backward(probabilities, targets, **options)
            if reduction == "none":
                numpy.testing.assert_array_equal(numpy.delete(loss, kept), 0, err_msg=where)
                loss = loss[kept]
            # The others are in other blocks, whose sums, in float64, are then other ones in the last digits.
            near = EPSILON[dtype] * (64 if dtype == "float64" else 1)
            assert max_error(wide(loss), wide(expected)) <= near * abs(wide(expected)).max(), where
            numpy.testing.assert_array_equal(numpy.delete(gradient, kept, axis=0), 0, err_msg=where)
            assert max_error(wide(gradient[kept]), wide(slopes)) <= near * abs(wide(slopes)).max(), where


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_that_ignores_samples_has_the_same_bits(dtype):
    for size, weighted, smoothing in product([(23, 5), (2, 1100), (4500, 3)], (False, True), (0.0, 0.1)):
        logits, targets, weight = in_dtypes(dtype, *classification("labels", weighted, *size), "int64")
        targets[::4] = -100
        for reduction in ("mean", "sum"):
            where = f"{size} weighted {weighted} smoothing {smoothing} {reduction}"
            options = {
                "weight": weight,
                "label_smoothing": smoothing,
                "reduction": reduction,
                "ignore_index": -100,
            }
            expected_loss, probabilities = kernels.softmax_cross_entropy_forward(logits, targets, **options)
            expected = kernels.softmax_cross_entropy_backward(probabilities, targets, **options)
            loss, gradient, correct = step(logits, targets, **options)
            assert loss.tobytes() == expected_loss.tobytes(), where
            assert gradient.tobytes() == expected.tobytes(), where
            assert correct == (wide(logits).argmax(axis=1) == targets).sum(), where
    scaled = step(logits, targets, ignore_index=-100, scaling=numpy.array([numpy.inf]))[1]
    numpy.testing.assert_array_equal(scaled[::4], 0)


def test_ignoring_takes_a_launch_where_the_labels_can_be_ignored(monkeypatch):
    names, launch = [], Call.launch

    def noted(self, source, kernel, *arguments, **options):
        names.append(kernel)
        launch(self, source, kernel, *arguments, **options)

    monkeypatch.setattr(Call, "launch", noted)
    logits, targets, _ = in_dtypes("float32", *classification("labels", False, 70, 10))
    step(logits, targets.astype("uint8"), ignore_index=-100)
    step(logits, targets, ignore_index=-100, reduction="sum")
    step(logits, targets)
    assert names == ["cross_entropy_step"] * 3
    names.clear()
    step(logits, targets, ignore_index=-100)
    assert names == ["cross_entropy_divisor", "cross_entropy_step"]
    for ignored in (-100, 3):
        assert host.order_independent(lambda ignored=ignored: list(step(logits, targets, ignore_index=ignored)))


def test_what_cannot_be_ignored():
    logits, targets, _ = in_dtypes("float32", *classification("labels", False))
    for wrong in (True, 1.0, "none"):
        with pytest.raises(ArgumentError, match="ignore_index must be an integer or None, got"):
            kernels.softmax_cross_entropy_forward(logits, targets, ignore_index=wrong)
    with pytest.raises(ArgumentError, match=r"ignore_index=2 is a class number, and targets of shape \(7, 5\)"):
        kernels.softmax_cross_entropy_forward(logits, logits, ignore_index=2)
    targets[3] = -1
    with pytest.raises(ArgumentError, match="label -1 at position 3 is out of range"):
        kernels.softmax_cross_entropy_forward(logits, targets, ignore_index=-100)


# ---------------------------------------------------------------- all of a training step


def step(*arguments, **options):
    """(loss, gradient, correct), and the counter of blocks is as it was."""
    done = numpy.zeros(1, numpy.int32)
    results = softmax_cross_entropy_step(*arguments, **options, done=done)
    assert done.tolist() == [0]
    return results


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_steps_numbers_have_the_bits_of_those_made_one_by_one(dtype, labels):
    for size, weighted, smoothing in product([*SIZES, (2100, 3)], (False, True), (0.0, 0.1)):
        logits, targets, weight = in_dtypes(dtype, *classification("labels", weighted, *size), labels)
        for reduction in ("mean", "sum"):
            where = f"{size} weighted {weighted} smoothing {smoothing} {reduction}"
            options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
            expected_loss, probabilities = kernels.softmax_cross_entropy_forward(logits, targets, **options)
            expected = kernels.softmax_cross_entropy_backward(probabilities, targets, **options)
            loss, gradient, correct = step(logits, targets, **options)
            assert (loss.shape, loss.dtype, correct.shape, correct.dtype) == ((), logits.dtype, (), numpy.int64)
            assert loss.tobytes() == expected_loss.tobytes(), where
            assert gradient.tobytes() == expected.tobytes(), where
            assert correct == (wide(logits).argmax(axis=1) == targets).sum(), where


def shifted(array):
    """The same numbers behind a first one that is left out: on no boundary but that of their own size."""
    place = numpy.empty(array.size + 1, array.dtype)[1:].reshape(array.shape)
    place[...] = array
    return place


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [20, 516, 1096])  # a part of a warp's piece, two pieces, rows for blocks
def test_where_arrays_begin_changes_no_bit(dtype, classes):
    assert classes % 4 == 0  # these are moved by fours where they can be
    for kind, weighted in product(("labels", "probabilities"), (False, True)):
        given = in_dtypes(dtype, *classification(kind, weighted, 10, classes))
        logits, targets, weight = given
        options = {"weight": weight, "label_smoothing": 0.1}
        loss, probabilities = kernels.softmax_cross_entropy_forward(logits, targets, **options)
        apart = shifted(logits), targets if kind == "labels" else shifted(targets)
        moved_loss, moved = kernels.softmax_cross_entropy_forward(*apart, **options)
        assert (moved_loss.tobytes(), moved.tobytes()) == (loss.tobytes(), probabilities.tobytes())
        assert max_error(wide(probabilities), activation_oracle.softmax(wide(logits), 1)) <= EPSILON[dtype]
        gradient = kernels.softmax_cross_entropy_backward(probabilities, targets, **options)
        out = shifted(probabilities)
        kernels.softmax_cross_entropy_backward(shifted(probabilities), apart[1], **options, out=out)
        assert out.tobytes() == gradient.tobytes()
        if kind == "labels":
            out = shifted(logits)
            results = step(apart[0], targets, **options, out=out)
            assert [one.tobytes() for one in results[:2]] == [loss.tobytes(), gradient.tobytes()]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_steps_gradient_is_scaled_as_by_itself(dtype):
    logits, targets, _ = in_dtypes(dtype, *classification("labels", False, 70, 10))
    scaling = numpy.array([1024.7])
    expected = step(logits, targets)[1]
    kernels.scale(expected, scaling)
    out = numpy.full_like(logits, 7)
    assert step(logits, targets, scaling=scaling, out=out)[1] is out
    assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_step_of_16_bit_logits_has_the_bits_of_float32_ones_between_two_conversions(dtype):
    scaling = numpy.array([1024.7])
    for size, weighted in product([(7, 5), (70, 10), (2, 1100)], (False, True)):
        logits, targets, weight = in_dtypes(dtype, *classification("labels", weighted, *size))
        for options in ({"weight": weight}, {"weight": weight, "reduction": "sum", "scaling": scaling}):
            loss, gradient, correct = step(logits.astype(numpy.float32), targets, **options)
            narrow = step(logits, targets, **options, wide=True)
            assert narrow[0].dtype == numpy.float32
            for one, other in zip(narrow, (loss, gradient.astype(logits.dtype), correct), strict=True):
                assert one.tobytes() == other.tobytes()
    assert step(logits.astype(numpy.float64), targets, wide=True)[0].dtype == numpy.float64


@pytest.mark.parametrize("classes", [5, 1100])
def test_which_labels_count_as_right(classes):
    rows = numpy.zeros((9, classes), numpy.float32)
    rows[:, 4] = -1
    rows[2, [1, 3]] = 2  # equals: the first
    rows[3, [1, 3]] = 2
    rows[4, 2] = numpy.nan  # larger than any number
    rows[5, [0, 2, 3]] = numpy.inf, numpy.nan, numpy.nan  # and the first of them
    rows[6, [0, 2, 3]] = numpy.inf, numpy.nan, numpy.nan
    rows[7:, 2] = numpy.inf
    labels = numpy.array([0, 1, 1, 3, 2, 2, 3, 2, 0])
    right = rows.argmax(axis=1) == labels
    assert right.tolist() == [True, False, True, False, True, True, False, True, False]
    for number in range(9):
        assert step(rows[number : number + 1], labels[number : number + 1])[2] == right[number], number
    assert step(rows, labels)[2] == 5
    assert step(numpy.repeat(rows, 300, axis=0), numpy.repeat(labels, 300))[2] == 1500


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_steps_labels_out_of_range_are_wrong_and_make_nan(reduction):
    logits = numpy.random.default_rng(0).standard_normal((20, 3)).astype(numpy.float32)
    targets = logits.argmax(axis=1)
    targets[[3, 17]] = -1, 3
    loss, gradient, correct = step(logits, targets, reduction=reduction)
    assert numpy.isnan(loss)
    assert correct == 18
    assert numpy.isnan(gradient).all(axis=1).tolist() == [number in (3, 17) for number in range(20)]


def test_a_step_is_one_launch_in_any_order(monkeypatch):
    names, launch = [], Call.launch

    def noted(self, source, kernel, *arguments, **options):
        names.append(kernel)
        launch(self, source, kernel, *arguments, **options)

    monkeypatch.setattr(Call, "launch", noted)
    logits, targets, weight = in_dtypes("float32", *classification("labels", True, 70, 10))
    step(logits, targets)
    step(logits, targets, weight=weight, reduction="sum")
    assert names == ["cross_entropy_step"] * 2
    assert host.order_independent(lambda: list(step(logits, targets)))
    nothing = step(logits[:0], targets[:0])
    assert numpy.isnan(nothing[0])
    assert (nothing[1].shape, nothing[2]) == ((0, 10), 0)


def test_what_a_step_does_not_take():
    logits, targets, _ = in_dtypes("float32", *classification("labels", False))
    with pytest.raises(ArgumentError, match="reduction must be 'mean' or 'sum', got 'none'"):
        step(logits, targets, reduction="none")
    with pytest.raises(ArgumentError, match=r"targets must be class numbers \(N,\), got shape \(7, 5\)"):
        step(logits, logits)
    with pytest.raises(ArgumentError, match="shares memory with logits"):
        step(logits, targets, out=logits)
    room = numpy.zeros(35, numpy.float32)
    with pytest.raises(ArgumentError, match="shares memory with weight"):
        step(logits, targets, weight=room[:5], out=room.reshape(7, 5))
    with pytest.raises(DtypeError, match="done must be int32"):
        softmax_cross_entropy_step(logits, targets, done=numpy.zeros(1))
    with pytest.raises(ArgumentError, match=r"scaling must have shape \(1,\)"):
        step(logits, targets, scaling=numpy.ones(2))


def test_cross_entropy_of_nothing():
    empty, labels = numpy.zeros((0, 3), numpy.float32), numpy.zeros(0, numpy.int64)
    weight = numpy.ones(3, numpy.float32)
    for given in (None, weight):
        forward = kernels.softmax_cross_entropy_forward
        assert forward(empty, labels, weight=given, reduction="sum")[0] == 0
        assert numpy.isnan(forward(empty, labels, weight=given)[0])
        assert forward(empty, labels, weight=given, reduction="none")[0].shape == (0,)
        assert kernels.softmax_cross_entropy_backward(empty, labels, weight=given).shape == (0, 3)
    assert numpy.isnan(kernels.softmax_cross_entropy_forward(empty, empty)[0])


def test_wrong_targets():
    logits = numpy.zeros((4, 3), numpy.float32)
    labels = numpy.zeros(4, numpy.int64)
    forward = kernels.softmax_cross_entropy_forward
    with pytest.raises(DtypeError, match=r"class numbers, uint8, int32, int64, got float64"):
        forward(logits, numpy.zeros(4))
    with pytest.raises(DtypeError, match=r"class numbers, .*, got uint32"):
        forward(logits, numpy.zeros(4, numpy.uint32))
    with pytest.raises(
        DtypeError, match=r"must be float32, as logits, got int64; class numbers have shape \(4,\)"
    ):
        forward(logits, numpy.zeros((4, 3), numpy.int64))
    with pytest.raises(DtypeError, match="targets is float64, but logits is float32"):
        forward(logits, numpy.zeros((4, 3)))
    with pytest.raises(DtypeError, match=r"targets must be a numpy\.ndarray"):
        forward(logits, [0, 1, 2, 0])
    with pytest.raises(ArgumentError, match=r"targets must have shape \(4,\), got \(3,\)"):
        forward(logits, labels[:3])
    with pytest.raises(ArgumentError, match=r"targets must have shape \(4, 3\), got \(4, 2\)"):
        forward(logits, numpy.zeros((4, 2), numpy.float32))
    with pytest.raises(ArgumentError, match=r"weight must have shape \(3,\), got \(4,\)"):
        forward(logits, labels, weight=numpy.ones(4, numpy.float32))
    with pytest.raises(DtypeError, match=r"weight must be float32 .*float16 input; got float16, convert it"):
        forward(logits.astype("f2"), labels, weight=numpy.ones(3, numpy.float16))
    with pytest.raises(ProblemError, match="logits must have 2 dimensions"):
        forward(logits[0], labels[:3])
    with pytest.raises(ProblemError, match="at least one class"):
        forward(numpy.zeros((4, 0), numpy.float32), labels)
    with pytest.raises(DtypeError, match="logits must be one of float32"):
        forward(logits.astype("int32"), labels)
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(ArgumentError, match="label_smoothing must lie between 0 and 1, got"):
            forward(logits, labels, label_smoothing=wrong)
    with pytest.raises(ArgumentError, match="reduction must be one of 'mean', 'sum', 'none', got 'average'"):
        forward(logits, labels, reduction="average")
    with pytest.raises(LayoutError, match="logits of shape"):
        forward(awkward(logits), labels)
    with pytest.raises(LayoutError, match="targets of shape"):
        forward(logits, numpy.zeros(8, numpy.int64)[::2])
    backward = kernels.softmax_cross_entropy_backward
    with pytest.raises(LayoutError, match="out of shape"):
        backward(logits, labels, out=numpy.zeros((3, 4), numpy.float32).T)
    with pytest.raises(ArgumentError, match=r"out must have shape \(4, 3\), got \(3, 4\)"):
        backward(logits, labels, out=numpy.zeros((3, 4), numpy.float32))
    with pytest.raises(DtypeError, match="out is float64, but probabilities is float32"):
        backward(logits, labels, out=numpy.zeros((4, 3)))


def test_the_order_of_threads_changes_nothing():
    for size in ((70, 10), (3, 1100)):
        logits, labels, weight = in_dtypes("float32", *classification("labels", True, *size))
        soft = kernels.softmax_forward(logits)

        def run(logits=logits, labels=labels, weight=weight, soft=soft):
            results = []
            for targets in (labels, soft):
                options = {"weight": weight, "label_smoothing": 0.1}
                results += kernels.softmax_cross_entropy_forward(logits, targets, **options)
                results.append(kernels.softmax_cross_entropy_backward(soft, targets, **options))
            return results

        assert host.order_independent(run), size


def test_the_loss_is_an_array_on_the_device():
    x = numpy.ones((2, 4), numpy.float32).view(HostArray)
    labels = numpy.array([0, 3]).view(HostArray)
    loss, probabilities = kernels.softmax_cross_entropy_forward(x, labels)
    assert type(loss) is type(probabilities) is HostArray
    assert loss.shape == ()
    with pytest.raises(ArgumentError, match="label 4 at position 1"):
        kernels.softmax_cross_entropy_forward(x, labels + 1)
