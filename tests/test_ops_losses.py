"""Losses and their gradients against loops that follow the definitions."""

import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from tests.accuracy import awkward, error_bound, max_error
from tests.backends import BACKENDS, CPU, CUDA
from tests.oracles import losses as oracle

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def classification(dtype, kind, weighted, count=7, classes=5, seed=0):
    random = numpy.random.default_rng(seed)
    logits = (3 * random.standard_normal((count, classes))).astype(dtype)
    weight = (0.1 + random.random(classes)).astype(dtype) if weighted else None
    if kind == "labels":
        return logits, random.integers(0, classes, count), weight
    targets = random.random((count, classes))
    return logits, (targets / targets.sum(1, keepdims=True)).astype(dtype), weight


# ---------------------------------------------------------------- softmax cross-entropy


@BACKENDS
@REDUCTIONS
@DTYPES
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(backend, reduction, dtype, kind, weighted, smoothing):
    logits, targets, weight = classification(dtype, kind, weighted)
    expected = oracle.cross_entropy(logits, targets, weight, smoothing, reduction)
    for layout in (numpy.ascontiguousarray, awkward):
        loss, probabilities = backend.softmax_cross_entropy_forward(
            layout(logits), targets, weight=weight, label_smoothing=smoothing, reduction=reduction
        )
        assert loss.dtype == probabilities.dtype == logits.dtype
        assert loss.shape == ((7,) if reduction == "none" else ())
        assert max_error(loss, expected) <= 8 * numpy.finfo(dtype).eps * numpy.abs(expected).max()
        assert max_error(probabilities.sum(1), 1.0) <= 4 * numpy.finfo(dtype).eps


@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_gradient(backend, reduction, kind, weighted, smoothing):
    logits, targets, weight = classification("float64", kind, weighted, seed=1)
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    _, probabilities = backend.softmax_cross_entropy_forward(logits, targets, **options)
    gradient = backend.softmax_cross_entropy_backward(awkward(probabilities), targets, **options)
    step = 1e-5
    for index in numpy.ndindex(*logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += step
        down[index] -= step
        numeric = (
            oracle.cross_entropy(up, targets, weight, smoothing, reduction)
            - oracle.cross_entropy(down, targets, weight, smoothing, reduction)
        ) / (2 * step)
        assert abs(gradient[index] - numeric) <= 1e-8
    out = probabilities.copy()
    assert backend.softmax_cross_entropy_backward(out, targets, **options, out=out) is out
    assert max_error(out, gradient) <= 1e-15


@BACKENDS
@REDUCTIONS
@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [-100, 2, 255])
def test_cross_entropy_ignores_samples(backend, reduction, dtype, weighted, smoothing, ignored):
    """Of an ignored class number neither loss nor gradient, and "mean" is over the others, whatever the logits."""
    logits, targets, weight = classification(dtype, "labels", weighted, count=23, seed=3)
    targets[::4] = ignored
    targets = targets.astype("uint8" if ignored == 255 else "int64")
    left_out = targets == ignored
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    expected = oracle.cross_entropy(logits, targets, weight, smoothing, reduction, ignored)
    whole = oracle.cross_entropy(logits[~left_out], targets[~left_out], weight, smoothing, reduction)
    numpy.testing.assert_allclose(expected[~left_out] if reduction == "none" else expected, whole, rtol=1e-14)
    logits[0], logits[4] = numpy.nan, numpy.inf
    loss, probabilities = backend.softmax_cross_entropy_forward(logits, targets, **options, ignore_index=ignored)
    assert max_error(loss, expected) <= 8 * numpy.finfo(dtype).eps * numpy.abs(expected).max()
    gradient = backend.softmax_cross_entropy_backward(probabilities, targets, **options, ignore_index=ignored)
    kept = numpy.ascontiguousarray(probabilities[~left_out])
    others = backend.softmax_cross_entropy_backward(kept, targets[~left_out], **options)
    numpy.testing.assert_array_equal(gradient[left_out], 0)
    assert max_error(gradient[~left_out], others) <= 2 * numpy.finfo(dtype).eps * numpy.abs(others).max()


@BACKENDS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_ignored_samples_alone(backend, smoothing):
    logits, labels = numpy.ones((3, 4), numpy.float32), numpy.full(3, -1)
    options = {"label_smoothing": smoothing, "ignore_index": -1}
    loss, probabilities = backend.softmax_cross_entropy_forward(logits, labels, **options)
    assert numpy.isnan(loss), "the mean of nothing, as PyTorch's"
    assert backend.softmax_cross_entropy_forward(logits, labels, **options, reduction="sum")[0] == 0
    gradient = backend.softmax_cross_entropy_backward(probabilities, labels, **options)
    numpy.testing.assert_array_equal(gradient, numpy.zeros((3, 4)))


@BACKENDS
def test_what_is_not_ignored_is_still_checked(backend):
    logits, labels = numpy.zeros((4, 3), numpy.float32), numpy.array([-100, 0, -1, 3])
    forward = backend.softmax_cross_entropy_forward
    with pytest.raises(ArgumentError, match=r"label -1 at position 2 is out of range"):
        forward(logits, labels, ignore_index=-100)
    with pytest.raises(ArgumentError, match=r"label 3 at position 3 is out of range"):
        forward(logits, numpy.array([-1, 0, -1, 3]), ignore_index=-1)
    # What the labels' dtype has no number for is no label: 156 is what -100 would be in eight bits.
    with pytest.raises(ArgumentError, match=r"label 156 at position 1 is out of range"):
        forward(logits[:2], numpy.array([1, 156], numpy.uint8), ignore_index=-100)
    for wrong in (True, 1.5, "no"):
        with pytest.raises(ArgumentError, match="ignore_index must be an integer or None"):
            forward(logits, labels, ignore_index=wrong)
    soft = numpy.full((4, 3), 1 / 3, numpy.float32)
    with pytest.raises(ArgumentError, match=r"ignore_index=1 is a class number, and targets of shape \(4, 3\)"):
        forward(logits, soft, ignore_index=1)
    assert max_error(forward(logits, soft, ignore_index=-100)[0], math.log(3)) <= 1e-6


@BACKENDS
def test_cross_entropy_gradient_keeps_its_digits_in_single_precision(backend):
    logits = numpy.random.default_rng(4).uniform(-30, 0, (40, 5)).astype(numpy.float32)
    labels = numpy.arange(40) % 5
    _, probabilities = backend.softmax_cross_entropy_forward(logits, labels)
    gradient = backend.softmax_cross_entropy_backward(probabilities, labels, reduction="sum")
    for n, k in numpy.ndindex(*logits.shape):
        # p_k = 1 / sum of exp(x_j - x_k), and for the label p_k - 1, which a single number near 1 may round.
        rest = math.fsum(math.exp(float(logits[n, j]) - float(logits[n, k])) for j in range(5) if j != k)
        expected, slack = (-rest / (1 + rest), 2.0**-22) if k == labels[n] else (1 / (1 + rest), 0.0)
        assert abs(float(gradient[n, k]) - expected) <= 2e-6 * abs(expected) + slack


@BACKENDS
def test_cross_entropy_gradient_of_the_unreduced_loss_is_that_of_the_sum(backend):
    logits, targets, weight = classification("float32", "labels", True)
    _, probabilities = backend.softmax_cross_entropy_forward(logits, targets, weight=weight, reduction="none")
    results = [
        backend.softmax_cross_entropy_backward(probabilities, targets, weight=weight, reduction=reduction)
        for reduction in ("none", "sum")
    ]
    numpy.testing.assert_array_equal(*results)


@BACKENDS
@settings(max_examples=50, deadline=None)
@given(st.data())
def test_cross_entropy_of_random_problems(backend, data):
    count, classes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    kind, weighted = data.draw(st.sampled_from(["labels", "probabilities"])), data.draw(st.booleans())
    smoothing, reduction = data.draw(st.floats(0, 1)), data.draw(st.sampled_from(["mean", "sum", "none"]))
    logits, targets, weight = classification(
        "float64", kind, weighted, count, classes, data.draw(st.integers(0, 99))
    )
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    loss, probabilities = backend.softmax_cross_entropy_forward(logits, targets, **options)
    expected = oracle.cross_entropy(logits, targets, weight, smoothing, reduction)
    assert max_error(loss, expected) <= 1e-13 * (1 + numpy.abs(expected).max())
    # Adding a constant to a row of logits changes nothing, so each row of the gradient adds up to zero.
    gradient = backend.softmax_cross_entropy_backward(probabilities, targets, **options)
    assert numpy.all(abs(gradient.sum(1)) <= 1e-14 * (1 + abs(gradient).sum()))


@BACKENDS
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_label_dtypes(backend, dtype):
    logits, targets, _ = classification("float32", "labels", False)
    loss, _ = backend.softmax_cross_entropy_forward(logits, targets.astype(dtype))
    assert max_error(loss, oracle.cross_entropy(logits, targets)) <= 1e-6


@BACKENDS
def test_cross_entropy_of_extreme_logits(backend):
    logits = numpy.array([[1e30, -1e30, 0], [-1e4, 1e4, 0], [-numpy.inf, 0, 0]], numpy.float32)
    loss, probabilities = backend.softmax_cross_entropy_forward(logits, numpy.array([0, 0, 1]), reduction="none")
    numpy.testing.assert_allclose(loss, [0, 2e4, math.log(2)], rtol=1e-6)
    numpy.testing.assert_array_equal(probabilities, [[1, 0, 0], [0, 1, 0], [0, 0.5, 0.5]])
    lost, _ = backend.softmax_cross_entropy_forward(logits, numpy.array([0, 0, 0]), reduction="none")
    assert lost[2] == numpy.inf
    nan, _ = backend.softmax_cross_entropy_forward(numpy.full((1, 3), numpy.nan, numpy.float32), numpy.array([1]))
    assert numpy.isnan(nan)


@BACKENDS
def test_cross_entropy_of_nothing(backend):
    empty, labels = numpy.zeros((0, 3), numpy.float32), numpy.zeros(0, numpy.int64)
    assert backend.softmax_cross_entropy_forward(empty, labels, reduction="sum")[0] == 0
    assert numpy.isnan(backend.softmax_cross_entropy_forward(empty, labels)[0])
    assert backend.softmax_cross_entropy_forward(empty, labels, reduction="none")[0].shape == (0,)
    assert backend.softmax_cross_entropy_backward(empty, labels).shape == (0, 3)


@BACKENDS
def test_cross_entropy_in_half_precision(backend):
    logits, targets, weight = classification("float16", "labels", True)
    loss, probabilities = backend.softmax_cross_entropy_forward(logits, targets, weight=weight)
    assert loss.dtype == probabilities.dtype == numpy.float16
    assert max_error(loss, oracle.cross_entropy(logits, targets, weight)) <= 2e-3
    assert backend.softmax_cross_entropy_backward(probabilities, targets, weight=weight).dtype == numpy.float16


@BACKENDS
def test_labels_out_of_range(backend):
    logits = numpy.zeros((4, 3), numpy.float32)
    for bad, position in (([0, 1, 3, -1], 2), ([0, -100, 7, 1], 1)):
        labels = numpy.array(bad)
        pattern = (
            rf"label {bad[position]} at position {position} is out of range: .*3 classes, labels are 0 \.\. 2"
        )
        with pytest.raises(ArgumentError, match=pattern):
            backend.softmax_cross_entropy_forward(logits, labels)
        if backend.device == "cpu":
            with pytest.raises(ArgumentError, match=pattern):
                backend.softmax_cross_entropy_backward(logits, labels)
        else:  # which does not wait for the GPU to look at them again
            gradient = backend.softmax_cross_entropy_backward(logits, labels)
            outside = (labels < 0) | (labels >= 3)
            assert numpy.isnan(gradient[outside]).all()
            assert numpy.isfinite(gradient[~outside]).all()


@BACKENDS
def test_wrong_targets(backend):
    logits = numpy.zeros((4, 3), numpy.float32)
    forward = backend.softmax_cross_entropy_forward
    with pytest.raises(DtypeError, match="must be integers, got dtype float64"):
        forward(logits, numpy.zeros(4))
    with pytest.raises(DtypeError, match="must be integers, got dtype bool"):
        forward(logits, numpy.zeros(4, bool))
    with pytest.raises(
        DtypeError, match=r"must be floating point, got dtype int64; class numbers have shape \(4,\)"
    ):
        forward(logits, numpy.zeros((4, 3), int))
    with pytest.raises(DtypeError, match=r"targets must be a numpy\.ndarray .*got list"):
        forward(logits, [0, 1, 2, 0])
    with pytest.raises(ShapeError, match=r"targets must have shape \(4,\), got \(3,\)"):
        forward(logits, numpy.zeros(3, int))
    with pytest.raises(ShapeError, match=r"targets must have shape \(4, 3\), got \(4, 2\)"):
        forward(logits, numpy.zeros((4, 2)))
    with pytest.raises(ShapeError, match=r"class weights must have shape \(3,\), got \(4,\)"):
        forward(logits, numpy.zeros(4, int), weight=numpy.ones(4))
    with pytest.raises(ShapeError, match="logits must have 2 dimensions"):
        forward(logits[0], numpy.zeros(3, int))
    with pytest.raises(ShapeError, match="at least one class"):
        forward(logits[:, :0], numpy.zeros((4, 0)))
    with pytest.raises(DtypeError, match="logits must hold floating-point"):
        forward(numpy.zeros((4, 3), int), numpy.zeros(4, int))
    with pytest.raises(ArgumentError, match=r"label_smoothing must lie between 0 and 1, got 1\.5"):
        forward(logits, numpy.zeros(4, int), label_smoothing=1.5)
    with pytest.raises(ArgumentError, match="reduction must be one of 'mean', 'sum', 'none', got 'average'"):
        forward(logits, numpy.zeros(4, int), reduction="average")


# ---------------------------------------------------------------- binary cross-entropy


def binary(dtype, seed=2, shape=(6, 4)):
    random = numpy.random.default_rng(seed)
    logits = (4 * random.standard_normal(shape)).astype(dtype)
    targets = random.random(shape).astype(dtype)
    targets[0] = 0
    targets[1] = 1
    return (
        logits,
        targets,
        (0.1 + random.random(shape)).astype(dtype),
        (0.1 + 3 * random.random(shape)).astype(dtype),
    )


@BACKENDS
@REDUCTIONS
@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("positive", [False, True])
def test_binary_cross_entropy(backend, reduction, dtype, weighted, positive):
    logits, targets, weight, positive_weight = binary(dtype)
    weight, positive_weight = weight if weighted else None, positive_weight if positive else None
    expected = oracle.binary_cross_entropy_with_logits(logits, targets, weight, positive_weight, reduction)
    options = {"weight": weight, "positive_weight": positive_weight, "reduction": reduction}
    for layout in (numpy.ascontiguousarray, awkward):
        loss = backend.binary_cross_entropy_with_logits_forward(layout(logits), layout(targets), **options)
        assert loss.dtype == logits.dtype
        assert max_error(loss, expected) <= 8 * numpy.finfo(dtype).eps * numpy.abs(expected).max()
    if dtype == "float64" and reduction != "none":
        gradient = backend.binary_cross_entropy_with_logits_backward(awkward(logits), targets, **options)
        for index in numpy.ndindex(*logits.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = logits.copy()
                moved[index] += step
                values.append(
                    oracle.binary_cross_entropy_with_logits(moved, targets, weight, positive_weight, reduction)
                )
            assert abs(gradient[index] - (values[0] - values[1]) / 2e-5) <= 1e-7


@BACKENDS
def test_binary_cross_entropy_broadcasts_its_weights(backend):
    logits, targets, weight, positive_weight = binary("float64")
    wide = numpy.broadcast_to(positive_weight[:1], logits.shape), numpy.broadcast_to(weight[:, :1], logits.shape)
    expected = oracle.binary_cross_entropy_with_logits(logits, targets, wide[1], wide[0])
    options = {"weight": weight[:, :1], "positive_weight": positive_weight[0]}
    loss = backend.binary_cross_entropy_with_logits_forward(logits, targets, **options)
    assert abs(float(loss) - expected) <= 1e-14
    out = numpy.zeros_like(logits)
    assert backend.binary_cross_entropy_with_logits_backward(logits, targets, **options, out=out) is out
    full = backend.binary_cross_entropy_with_logits_backward(
        logits, targets, weight=wide[1], positive_weight=wide[0]
    )
    numpy.testing.assert_array_equal(out, full)


@BACKENDS
def test_binary_cross_entropy_of_extreme_logits(backend):
    largest = float(numpy.finfo(numpy.float32).max)
    logits = numpy.array([-largest, -200, 200, largest], numpy.float32)
    ones, zeros = numpy.ones(4, numpy.float32), numpy.zeros(4, numpy.float32)
    forward, backward = (
        backend.binary_cross_entropy_with_logits_forward,
        backend.binary_cross_entropy_with_logits_backward,
    )
    numpy.testing.assert_array_equal(forward(logits, ones, reduction="none"), [largest, 200, 0, 0])
    numpy.testing.assert_array_equal(forward(logits, zeros, reduction="none"), [0, 0, 200, largest])
    numpy.testing.assert_array_equal(backward(logits, ones, reduction="sum"), [-1, -1, 0, 0])
    numpy.testing.assert_array_equal(backward(logits, zeros, reduction="none"), [0, 0, 1, 1])


@BACKENDS
def test_binary_cross_entropy_keeps_its_digits_in_single_precision(backend):
    logits = numpy.linspace(-30, 30, 61, dtype=numpy.float32)
    for target in (0.0, 0.25, 1.0):
        for positive in (1.0, 2.5):
            targets = numpy.full_like(logits, target)
            options = {"positive_weight": numpy.full_like(logits, positive), "reduction": "none"}
            loss = backend.binary_cross_entropy_with_logits_forward(logits, targets, **options)
            expected = oracle.binary_cross_entropy_with_logits(
                logits, targets, None, options["positive_weight"], "none"
            )
            assert numpy.all(abs(loss - expected) <= 1e-6 * expected)
            gradient = backend.binary_cross_entropy_with_logits_backward(logits, targets, **options)
            for x, value in zip(logits.tolist(), gradient.tolist(), strict=True):
                towards_zero, towards_one = (
                    (1 - target) / (1 + math.exp(-x)),
                    positive * target / (1 + math.exp(x)),
                )
                assert abs(value - (towards_zero - towards_one)) <= 1e-6 * (towards_zero + towards_one)


# ---------------------------------------------------------------- mean squared error


@BACKENDS
@REDUCTIONS
@DTYPES
def test_mean_squared_error(backend, reduction, dtype):
    random = numpy.random.default_rng(3)
    prediction, target = random.standard_normal((2, 5, 7)).astype(dtype)
    expected = oracle.mean_squared_error(prediction, target, reduction)
    difference = prediction - target
    plain = {"mean": (difference**2).mean(), "sum": (difference**2).sum(), "none": difference**2}[reduction]
    for layout in (numpy.ascontiguousarray, awkward):
        loss = backend.mean_squared_error_forward(layout(prediction), target, reduction=reduction)
        assert loss.dtype == prediction.dtype
        assert max_error(loss, expected) <= error_bound(plain, expected)
        out = awkward(numpy.zeros_like(prediction))
        gradient = backend.mean_squared_error_backward(layout(prediction), target, reduction=reduction, out=out)
        assert gradient is out
        exact = 2 * (prediction.astype("f8") - target) / (35 if reduction == "mean" else 1)
        assert max_error(gradient, exact) <= 4 * numpy.finfo(dtype).eps * abs(exact).max()


@BACKENDS
def test_losses_of_nothing(backend):
    empty = numpy.zeros((0, 2), numpy.float32)
    for forward in (backend.mean_squared_error_forward, backend.binary_cross_entropy_with_logits_forward):
        assert numpy.isnan(forward(empty, empty))
        assert forward(empty, empty, reduction="sum") == 0
    for backward in (backend.mean_squared_error_backward, backend.binary_cross_entropy_with_logits_backward):
        assert backward(empty, empty).shape == (0, 2)


@BACKENDS
def test_half_precision(backend):
    a, b = numpy.array([[1.0, 2.0]], numpy.float16), numpy.array([[0.5, 4.0]], numpy.float16)
    assert backend.mean_squared_error_forward(a, b).dtype == numpy.float16
    assert float(backend.mean_squared_error_forward(a, b)) == 2.125
    numpy.testing.assert_array_equal(backend.mean_squared_error_backward(a, b), [[0.5, -2]])
    assert backend.binary_cross_entropy_with_logits_forward(a, b).dtype == numpy.float16
    assert backend.binary_cross_entropy_with_logits_backward(a, b).dtype == numpy.float16


@BACKENDS
def test_errors(backend):
    x = numpy.zeros((2, 3))
    with pytest.raises(ShapeError, match=r"the target must have shape \(2, 3\), got \(3, 2\)"):
        backend.mean_squared_error_forward(x, x.T)
    with pytest.raises(DtypeError, match="the targets must hold floating-point"):
        backend.binary_cross_entropy_with_logits_forward(x, x.astype(int))
    with pytest.raises(ShapeError, match=r"positive_weight of shape \(2,\) does not broadcast"):
        backend.binary_cross_entropy_with_logits_backward(x, x, positive_weight=numpy.ones(2))
    with pytest.raises(ArgumentError, match="reduction"):
        backend.mean_squared_error_backward(x, x, reduction="batchmean")


def test_a_gpu_does_not_look_at_labels_that_were_looked_at():
    logits, labels, weight = classification("float32", "labels", weighted=True)
    expected, _ = CUDA.softmax_cross_entropy_forward(logits, labels, weight=weight)
    found, _ = CUDA.softmax_cross_entropy_forward(logits, labels, weight=weight, check_targets=False)
    assert float(found) == float(expected)
    labels[3] = 5
    with pytest.raises(ArgumentError, match="label 5 at position 3"):
        CUDA.softmax_cross_entropy_forward(logits, labels)
    assert math.isnan(CUDA.softmax_cross_entropy_forward(logits, labels, check_targets=False)[0])
    with pytest.raises(ArgumentError, match="5"):
        CPU.softmax_cross_entropy_forward(logits, labels, check_targets=False)
