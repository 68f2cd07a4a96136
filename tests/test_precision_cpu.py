"""Precisions of a GPU on the CPU: the same roundings as the kernels', which share no code with them."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  # it registers the name bfloat16
import numpy
import pytest
from resume_worker import make_data, make_model
from test_precision import EPSILON, NARROW, digits, small_batch, small_model, trained_lenet
from test_resume import StopAt, assert_same_end, crash

from gpucnn import ops
from gpucnn.device import to_cpu, to_device
from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.layers.precision import backward_pass, forward_pass, precision_of, usable_precisions
from gpucnn.losses import CrossEntropyLoss
from gpucnn.ops import cpu
from gpucnn.ops.cpu import narrow, tf32
from gpucnn.training import RunFolder, Trainer, TrainingOptions


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")


# ---------------------------------------------------------------- operations


def image(*shape, seed=0):
    return numpy.random.default_rng(seed).standard_normal(shape).astype("float32")


X, DY, WEIGHT, ROW = image(2, 4, 9, 7), image(2, 6, 9, 7, seed=1), image(6, 4, 3, 3, seed=2), image(6, seed=3)
POOL = {"kernel_size": 3, "stride": 2, "padding": 1}
WIDE_ROWS = [
    numpy.abs(image(4, seed=seed)) + 0.5 for seed in (4, 5, 6, 7)
]  # scales, and variances, of batch norms

CASES = {
    "conv2d_forward": ((X, WEIGHT, ROW), {"padding": 1}),
    "conv2d_backward_data": ((DY, WEIGHT), {"padding": 1, "input_size": (9, 7)}),
    "conv2d_backward_filter": ((DY, X), {"padding": 1, "kernel_size": 3}),
    "conv2d_backward_bias": ((DY,), {}),
    "conv2d_inference": ((X, WEIGHT, ROW, DY), {"padding": 1, "activation": "silu"}),
    "conv2d_max_pool2d_inference": ((X, WEIGHT, ROW), {"padding": 1, "pool_size": 2, "activation": "relu"}),
    "conv_transpose2d_forward": ((DY, WEIGHT, image(4)), {"stride": 2}),
    "im2col": ((X,), {"kernel_size": 3, "padding": 1}),
    "col2im": ((image(2, 36, 63),), {"kernel_size": 3, "padding": 1, "input_size": (9, 7)}),
    "max_pool2d_forward": ((X,), POOL),
    "avg_pool2d_forward": ((X,), POOL),
    "adaptive_avg_pool2d_forward": ((X,), {"output_size": (3, 2)}),
    "batch_norm_inference": ((X, *WIDE_ROWS), {}),
    "batch_norm_inference_backward": ((image(2, 4, 9, 7, seed=8), X, *WIDE_ROWS[:3]), {}),
    "batch_norm_forward": ((X, *WIDE_ROWS), {}),
    "relu_backward": ((DY, DY[::-1]), {}),
    "leaky_relu_forward": ((X,), {"negative_slope": 0.2}),
    "sigmoid_forward": ((X,), {}),
    "tanh_forward": ((X,), {}),
    "gelu_forward": ((X,), {}),
    "gelu_backward": ((DY, DY[::-1]), {}),
    "silu_backward": ((DY, DY[::-1]), {}),
    "softmax_forward": ((X,), {"axis": 1}),
    "dropout_forward": ((X,), {"probability": 0.3, "seed": 3, "offset": 5}),
    "linear_forward": ((image(5, 8), image(3, 8, seed=1), image(3, seed=2)), {}),
    "linear_backward": ((image(5, 3), image(5, 8, seed=1), image(3, 8, seed=2)), {}),
    "linear_backward_weight": ((image(5, 3), image(5, 8, seed=1)), {}),
}


def results(name, arrays, options, dtype, device):
    """The operation's results as float64 arrays, and the dtype of the first."""
    images = 2 if name == "batch_norm_inference_backward" else 1
    stays = images if name.startswith("batch_norm") else len(arrays)  # parameters and statistics stay float32
    given = [array.astype(dtype) if place < stays else array.copy() for place, array in enumerate(arrays)]
    given = [to_device(numpy.ascontiguousarray(array), device) for array in given]
    found = getattr(ops.backend_of(given[0]), name)(*given, **options)
    found = found if isinstance(found, tuple) else (found,)
    if name == "batch_norm_forward":
        found = (*found, *given[3:])  # the running statistics, which move
    return [to_cpu(array).astype("f8") for array in found], str(found[0].dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", CASES)
def test_operations_round_as_kernels_do(name, dtype):
    """Both round a float32 sum: they differ by more than its rounding only where that decides the 16-bit one."""
    arrays, options = CASES[name]
    assert name in narrow._COMPUTED_IN_FLOAT32 or name == "batch_norm_forward"
    expected, _ = results(name, arrays, options, dtype, "cuda")
    found, stored = results(name, arrays, options, dtype, "cpu")
    assert stored == dtype
    first, second = found[0], expected[0]
    spacing = 2 * EPSILON[dtype] * numpy.maximum(numpy.abs(second), 2.0**-14)
    assert (numpy.abs(first - second) <= spacing).all()
    assert (first != second).mean() < 0.02
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert numpy.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_out_may_be_the_input_and_has_to_fit():
    x = image(3, 4).astype("bfloat16")
    expected = narrow.relu_forward(x)
    assert narrow.relu_forward(x, out=x) is x
    assert (x == expected).all()
    with pytest.raises(ShapeError):
        narrow.relu_forward(x, out=image(3, 3).astype("bfloat16"))


def test_what_is_too_large_is_infinite_and_channels_last_stays():
    x = image(2, 5, 4, 3).transpose(0, 3, 1, 2).astype("float16")
    assert narrow.leaky_relu_forward(x).strides == x.strides
    assert numpy.isinf(narrow.conv2d_forward(x * 300, (image(1, 3, 1, 1) * 0 + 60000).astype("float16"))).any()


def test_running_statistics_of_float16_networks_move():
    x, mean, variance = image(2, 3, 4, 4).astype("float16"), numpy.zeros(3, "float16"), numpy.ones(3, "float16")
    ops.backend_of(x).batch_norm_forward(x, None, None, mean, variance)
    assert numpy.allclose(mean, 0.1 * x.astype("f8").mean((0, 2, 3)), atol=1e-3)
    assert (mean != 0).all()


# ---------------------------------------------------------------- tf32


def test_tf32_keeps_ten_fraction_bits_and_rounds_ties_away():
    fractions, exponents = numpy.frexp(image(4000) * 2.0 ** numpy.random.default_rng(1).integers(-30, 30, 4000))
    values = numpy.ldexp(fractions.astype("f4"), exponents)
    scaled = numpy.abs(fractions.astype("f8")) * 2**11  # fractions are in 0.5 .. 1: 11 bits with the leading one
    expected = numpy.ldexp(numpy.sign(fractions) * numpy.floor(scaled + 0.5) / 2**11, exponents)
    assert numpy.array_equal(tf32.rounded(values), expected)
    ties = numpy.array([1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11], "f4")
    assert tf32.rounded(ties).tolist() == [1 + 2.0**-10, -1 - 2.0**-10, 1 + 2 * 2.0**-10]
    odd = numpy.array([numpy.inf, -numpy.inf, 0.0, -0.0], "f4")
    assert numpy.array_equal(tf32.rounded(odd).view("u4"), odd.view("u4"))
    nans = numpy.array([0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF], "u4").view("f4")
    assert numpy.isnan(tf32.rounded(nans)).all()
    assert numpy.isinf(tf32.rounded(numpy.array([3.4028235e38], "f4"))).all(), "as the instruction rounds"
    with pytest.raises(ArgumentError, match="takes float32 arrays, got float64"):
        tf32.rounded(numpy.zeros(3))


@pytest.mark.parametrize("direction", ["conv2d_forward", "conv2d_backward_data", "conv2d_backward_filter"])
def test_tf32_products_are_those_of_tensor_cores(direction):
    arrays, options = CASES[direction]
    options = {**options, "algorithm": "tensor_tf32"}
    expected, _ = results(direction, arrays, options, "float32", "cuda")
    found, _ = results(direction, arrays, options, "float32", "cpu")
    exact, _ = results(direction, arrays, {**options, "algorithm": "auto"}, "float64", "cpu")
    size = numpy.linalg.norm(exact[0])
    assert numpy.linalg.norm(found[0] - expected[0]) <= 2e-6 * size
    assert numpy.linalg.norm(found[0] - exact[0]) >= 1e-5 * size, "nothing was rounded"


# ---------------------------------------------------------------- networks


def gradients(device, precision):
    """The logits and all gradients of the small batch, float64."""
    model = small_model().to(device).compute_in(precision)
    x, labels = (to_device(to_cpu(array), device) for array in small_batch())
    loss = CrossEntropyLoss()
    logits = forward_pass(model, x.astype(model.parameters()[0].dtype))
    loss(logits, labels)
    backward_pass(model, loss.backward())
    found = {name: to_cpu(parameter.gradient).astype("f8") for name, parameter in model.named_parameters()}
    return to_cpu(logits).astype("f8"), found


@pytest.mark.parametrize("precision", ["tf32", *NARROW])
def test_a_pass_is_that_of_the_kernels(precision):
    logits, expected = gradients("cuda", precision)
    found_logits, found = gradients("cpu", precision)
    exact_logits, exact = gradients("cpu", "float64")
    # Nearer to each other than to float64, by far: single numbers round otherwise, which later layers then spread.
    assert numpy.linalg.norm(found_logits - logits) <= 0.3 * numpy.linalg.norm(logits - exact_logits)
    largest = max(numpy.linalg.norm(gradient) for gradient in exact.values())
    for name, gradient in exact.items():
        error, between = (numpy.linalg.norm(expected[name] - other) for other in (gradient, found[name]))
        assert between <= 0.7 * error + 1e-7 * largest, name


@pytest.mark.parametrize("precision", ["tf32", *NARROW])
def test_lenet5_on_digits_is_as_accurate_as_in_float32(precision):
    train, held_out = digits()
    accuracy = trained_lenet(train, device="cpu").evaluate(held_out).accuracy
    model = trained_lenet(train, device="cpu", precision=precision)
    assert precision_of(model) == precision
    assert accuracy > 0.93, "the network has not learned, so accuracies say nothing"
    assert abs(model.evaluate(held_out).accuracy - accuracy) <= 0.005
    predicted = model.compile_for_inference().predict(held_out[0][:40])
    assert numpy.abs(predicted - model.predict(held_out[0][:40])).max() <= 16 * EPSILON["bfloat16"]


def trainer(run, precision, callbacks=()):
    train, validation = make_data()
    options = TrainingOptions(epochs=2, batch_size=27, checkpoint_steps=3, ema_decay=0.9, workers=0)
    return Trainer(
        make_model(), train, validation, options=options, run=run, callbacks=callbacks, precision=precision
    )


@pytest.mark.parametrize("precision", ["tf32", *NARROW])
def test_a_crashed_run_resumes_bit_for_bit(tmp_path, precision):
    undisturbed, crashed = RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "crashed")
    trainer(undisturbed, precision).fit()
    with pytest.raises(MemoryError):
        trainer(crashed, precision, (StopAt(7, crash),)).fit()
    trainer(crashed, precision).fit(resume=True)
    assert_same_end(undisturbed, crashed)


def test_a_model_moves_between_devices_in_its_precision():
    model = small_model().to("cpu").compute_in("bfloat16")
    x = to_cpu(small_batch()[0])
    on_cpu = model.predict(x)
    on_gpu = model.to("cuda").predict(x)
    assert precision_of(model) == "bfloat16"
    assert 0 < numpy.abs(on_gpu - on_cpu).max() <= 4 * EPSILON["bfloat16"]
    assert numpy.array_equal(model.to("cpu").predict(x), on_cpu)


def test_precisions_that_can_be_used(monkeypatch):
    assert usable_precisions() == ("float32", "float64", "tf32", "bfloat16", "float16")
    monkeypatch.setitem(__import__("sys").modules, "ml_dtypes", None)
    assert usable_precisions() == ("float32", "float64", "tf32", "float16")


def test_batch_norm_with_a_residual_and_an_activation():
    """Rounded once, forward; back, the residual's gradient is dy where the result was positive."""
    random = numpy.random.default_rng(0)
    x, residual, dy = (random.standard_normal((4, 3, 5, 5)).astype("float16") for _ in range(3))
    wide = [array.astype("float32") for array in (x, residual, dy)]
    y, mean, inverse_std = narrow.batch_norm_forward(x, residual=residual, activation="relu")
    plain = cpu.batch_norm_forward(wide[0], residual=wide[1], activation="relu")[0]
    numpy.testing.assert_array_equal(y, plain.astype("float16"))
    passed, dbias = numpy.full_like(dy, numpy.nan), numpy.empty(3, "float32")
    more = {"y": y, "activation": "relu", "out_residual": passed, "out_bias": dbias}
    dx, _, _ = narrow.batch_norm_backward(dy, x, None, mean, inverse_std, **more)
    before = numpy.where(y > 0, dy, 0)
    numpy.testing.assert_array_equal(passed, before)
    wanted = cpu.batch_norm_backward(before.astype("float32"), wide[0], None, mean, inverse_std)
    numpy.testing.assert_array_equal(dx, wanted[0].astype("float16"))
    numpy.testing.assert_array_equal(dbias, wanted[2])


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_of_parameters_stay_float32_unless_they_have_16_bits(dtype):
    dy, x, weight = (array.astype(dtype) for array in CASES["linear_backward"][0])
    dx, dweight, dbias = ops.backend_of(dy).linear_backward(dy, x, weight)
    assert (dx.dtype, dweight.dtype, dbias.dtype) == (dy.dtype, numpy.float32, numpy.float32)
    assert ops.backend_of(dy).linear_backward(dy, x, weight, with_input=False)[0] is None
    places = {"weight_gradient": numpy.zeros_like(weight), "bias_gradient": numpy.zeros(3, dtype)}
    given = ops.backend_of(dy).linear_backward(dy, x, weight, **places)
    for result, place, wide in zip(given[1:], places.values(), (dweight, dbias), strict=True):
        assert result is place
        assert numpy.array_equal(place, wide.astype(dtype))
