"""Networks in 16 bits beside float32 weights, by the real kernels on the host runtime."""

from __future__ import annotations

import numpy
import pytest
from cli_cases import call
from resume_worker import make_data, make_model
from test_resume import StopAt, assert_same_end, crash

import gpucnn
from gpucnn import layers
from gpucnn.data import load
from gpucnn.device import to_device
from gpucnn.errors import ArgumentError, CheckpointError, DtypeError, NonFiniteError
from gpucnn.layers.precision import backward_pass, forward_pass, precision_of, set_precision
from gpucnn.losses import CrossEntropyLoss
from gpucnn.models.model import Sequential
from gpucnn.optimizers import SGD
from gpucnn.parameters import Parameter
from gpucnn.training import Callback, RunFolder, Trainer, TrainingOptions, read_checkpoint, read_tensors
from gpucnn.training.loss_scaling import LossScaler

EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
NARROW = list(EPSILON)


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    monkeypatch.setenv("GPUCNN_KERNELS_RUNTIME", "host")


def small_model(seed=0):
    """Smooth all the way: a ReLU or a max-pool that decides otherwise is no matter of a rounding's size."""
    gpucnn.manual_seed(seed)
    return Sequential(
        layers.Conv2d(2, 8, 3, padding=1),
        layers.BatchNorm2d(8),
        layers.SiLU(),
        layers.ConvTranspose2d(8, 4, 2, stride=2),
        layers.AvgPool2d(2),
        layers.Dropout(0.0),
        layers.Flatten(),
        layers.Linear(4 * 36, 5),
    ).to("cuda")


def small_batch(images=12):
    generator = numpy.random.default_rng(1)
    x = generator.standard_normal((images, 2, 6, 6)).astype("float32")
    return to_device(x, "cuda"), to_device(generator.integers(0, 5, images), "cuda")


def gradients(model, scale=1.0):
    """The logits and every parameter's gradient of the small batch, as float64 NumPy arrays."""
    x, labels = small_batch()
    loss = CrossEntropyLoss()
    logits = forward_pass(model, x)
    loss(logits, labels)
    backward_pass(model, loss.backward() * scale)
    found = {name: parameter.gradient.get().astype("f8") for name, parameter in model.named_parameters()}
    return logits.get().astype("f8"), found


# ---------------------------------------------------------------- a step


@pytest.mark.parametrize("precision", NARROW)
def test_logits_and_gradients_are_those_of_float32_within_rounding(precision):
    logits, expected = gradients(small_model())
    narrow = small_model().compute_in(precision)
    narrow_logits, found = gradients(narrow)
    # Five layers, each of which rounds what it stores: a handful of roundings, not of digits lost.
    bound = 8 * EPSILON[precision]
    assert numpy.linalg.norm(narrow_logits - logits) <= bound * numpy.linalg.norm(logits)
    assert numpy.abs(narrow_logits - logits).max() > 0, "nothing was rounded: it was computed in float32"
    largest = max(numpy.linalg.norm(gradient) for gradient in expected.values())
    for name, gradient in expected.items():
        # The gradient of a bias before batch norm is zero but for rounding: the largest is the measure there.
        error = numpy.linalg.norm(found[name] - gradient)
        assert error <= bound * max(numpy.linalg.norm(gradient), 0.1 * largest), name


@pytest.mark.parametrize("precision", NARROW)
def test_what_is_stored_in_16_bits_and_what_in_float32(precision, monkeypatch):
    model = small_model().compute_in(precision)
    seen = {}
    for path, layer in model.named_layers():
        if path:
            forward, backward = layer.forward, layer.backward
            monkeypatch.setitem(
                vars(layer), "forward", lambda x, p=path, f=forward: seen.setdefault(f"{p} forward", f(x))
            )
            monkeypatch.setitem(
                vars(layer), "backward", lambda d, p=path, b=backward: seen.setdefault(f"{p} backward", b(d))
            )
    added, add = {}, Parameter.add_gradient

    def watched(parameter, gradient):
        added[parameter.path] = str(gradient.dtype)
        add(parameter, gradient)

    monkeypatch.setattr(Parameter, "add_gradient", watched)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, labels = small_batch()
    loss = CrossEntropyLoss()
    logits = forward_pass(model, x)
    loss(logits, labels)
    gradient = loss.backward()
    assert {str(logits.dtype), str(gradient.dtype)} == {"float32"}
    backward_pass(model, gradient)
    assert len(seen) == 16
    assert {str(array.dtype) for array in seen.values()} == {precision}
    sums = {"1.weight", "1.bias", "7.weight", "7.bias"}  # of the batch norm and of the linear layer
    assert {path for path, dtype in added.items() if dtype == "float32"} == sums
    assert {dtype for path, dtype in added.items() if path not in sums} == {precision}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert str(parameter.data.dtype) == str(parameter.gradient.dtype) == "float32", name
        assert str(parameter.narrow_copy.dtype) == precision
    assert all(str(array.dtype) in ("float32", "int64") for array in model.state_dict().values())
    assert all(value.dtype != precision for value in optimizer.state_dict().values())


def test_the_copies_follow_the_weights_in_one_conversion():
    model = small_model().compute_in("bfloat16")
    optimizer = SGD(model.parameters(), lr=0.5)
    (buffer,) = {parameter.buffer for parameter in model.parameters()}

    def assert_fresh():
        forward_pass(model, small_batch()[0])
        for name, parameter in model.named_parameters():
            assert parameter.narrow_copy.base is buffer.narrow, name
            assert numpy.array_equal(
                parameter.narrow_copy.get().view("u2"), parameter.data.astype("bfloat16").get().view("u2")
            ), name

    assert_fresh()
    before = model[0].weight.narrow_copy.get().view("u2").copy()
    gradients(model)
    optimizer.step()
    assert_fresh()
    assert (model[0].weight.narrow_copy.get().view("u2") != before).any()
    model.load_state_dict(small_model(seed=8).state_dict())
    assert_fresh()
    model[0].weight.data[...] = 0.5
    assert_fresh()
    model.to("cpu").to("cuda")  # out of the buffers
    forward_pass(model, small_batch()[0])
    assert all(parameter.narrow_copy.dtype == "bfloat16" for parameter in model.parameters())
    set_precision(model, "float32")
    assert all(parameter.working is parameter.data for parameter in model.parameters())


def test_loss_scaling_keeps_gradients_that_float16_cannot_hold():
    tiny = 2.0**-22  # beside the logits' gradients of about 0.05, far below float16's smallest number, 6e-8
    _, expected = gradients(small_model(), tiny)
    name = "0.weight"
    assert numpy.abs(expected[name]).max() > 0
    _, lost = gradients(small_model().compute_in("float16"), tiny)
    assert numpy.linalg.norm(lost[name] - expected[name]) > 0.5 * numpy.linalg.norm(expected[name])
    model = small_model().compute_in("float16")
    optimizer, scaler = SGD(model.parameters(), lr=0.1), LossScaler()
    gradients(model, tiny * scaler.scale)
    scaler.scale_down(optimizer)
    kept = model[0].weight.gradient.get()
    assert numpy.linalg.norm(kept - expected[name]) <= 0.02 * numpy.linalg.norm(expected[name])


def test_tf32_rounds_the_factors_of_convolutions_of_one_group():
    gpucnn.manual_seed(0)
    model = Sequential(
        layers.Conv2d(2, 8, 3, algorithm={"backward_data": "phases"}),
        layers.Tanh(),
        layers.Conv2d(8, 8, 3, groups=8),
        layers.Flatten(),
        layers.Linear(8 * 4, 5),
    ).to("cuda")
    logits, expected = gradients(model)
    model.zero_grad()
    assert precision_of(model.compute_in("tf32")) == "tf32"
    assert list(model[0].algorithm.values()) == ["tensor_tf32", "phases", "tensor_tf32"]
    assert set(model[2].algorithm.values()) == {"auto"}
    found_logits, found = gradients(model)
    bound = 4 * 2.0**-11
    assert 2.0**-15 * numpy.linalg.norm(logits) < numpy.linalg.norm(found_logits - logits)
    assert numpy.linalg.norm(found_logits - logits) <= bound * numpy.linalg.norm(logits)
    for name, gradient in expected.items():
        assert numpy.linalg.norm(found[name] - gradient) <= bound * numpy.linalg.norm(gradient), name
    compiled = model.compile_for_inference()
    x = small_batch()[0]
    assert numpy.array_equal(compiled(x).get(), forward_pass(model, x).get())
    assert precision_of(compiled) == "tf32"
    on_gpu = compiled.predict(x.get())
    assert 0 < numpy.abs(compiled.cpu().predict(x.get()) - on_gpu).max() <= 1e-5, "the CPU rounds otherwise"
    model.zero_grad()
    assert precision_of(model.compute_in("float32")) == "float32"
    assert list(model[0].algorithm.values()) == ["auto", "phases", "auto"]
    back, again = gradients(model)
    assert numpy.array_equal(back, logits)
    assert all(numpy.array_equal(again[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- the scale


def test_the_scale_doubles_after_2000_good_steps_and_halves_after_a_bad_one():
    scaler = LossScaler()
    assert scaler.scale == 65536
    for _ in range(1999):
        scaler.update(finite=True)
    assert scaler.scale == 65536
    scaler.update(finite=True)
    assert (scaler.scale, scaler.good_steps) == (131072, 0)
    for _ in range(5):
        scaler.update(finite=True)
    scaler.update(finite=False)
    assert (scaler.scale, scaler.good_steps) == (65536, 0)
    scaler.update(finite=True)
    other = LossScaler()
    other.load_state_dict(scaler.state_dict())
    assert (other.scale, other.good_steps) == (65536, 1)
    with pytest.raises(CheckpointError, match="no state of the loss scaling"):
        other.load_state_dict({})


def make_trainer(run=None, callbacks=(), precision="float16", **changes):
    train, validation = make_data()
    options = {"epochs": 2, "batch_size": 27, "checkpoint_steps": 3, "ema_decay": 0.9, "clip_norm": 1.0}
    return Trainer(
        make_model(),
        train,
        validation,
        options=TrainingOptions(**options | {"workers": 0, **changes}),
        run=run,
        callbacks=callbacks,
        device="cuda",
        precision=precision,
    )


class Weights(Callback):
    """Keeps the weights after every step, and the scale."""

    def __init__(self):
        self.after = []

    def on_fit_start(self, trainer):
        self.after.append(trainer.model.state_dict()["0.weight"])

    def on_step_end(self, trainer, loss):
        self.after.append(trainer.model.state_dict()["0.weight"])


def test_steps_with_too_large_a_scale_change_no_weight_and_are_counted(monkeypatch):
    monkeypatch.setattr(LossScaler, "INITIAL_SCALE", 2.0**40)
    weights = Weights()
    history = make_trainer(callbacks=(weights,), epochs=6).fit()
    skipped = sum(record.skipped_steps for record in history)
    pairs = zip(weights.after, weights.after[1:], strict=False)
    changed = [not numpy.array_equal(one, other) for one, other in pairs]
    assert changed[:16] == [False] * 16, "float16 ends at 2**16, and the logits' gradients here begin at 2**-8"
    assert 16 <= changed.count(False) == skipped <= 26
    assert history[-1].loss_scale == 2.0 ** (40 - skipped)
    assert history[0].skipped_steps == 6
    assert history[-1].step == len(changed) == 36


def test_a_gradient_that_no_scale_helps_stops_the_run(monkeypatch):
    monkeypatch.setattr(LossScaler, "INITIAL_SCALE", 2.0)
    trainer = make_trainer()

    def poison(gradient):
        gradient[...] = numpy.inf

    monkeypatch.setattr(LossScaler, "scale_up", lambda self, gradient: poison(gradient))
    with pytest.raises(NonFiniteError, match=r"gradient's norm became nan at step 2"):
        trainer.fit()


@pytest.mark.parametrize("precision", NARROW)
def test_a_crashed_run_resumes_bit_for_bit(tmp_path, monkeypatch, precision):
    monkeypatch.setattr(LossScaler, "INITIAL_SCALE", 2.0**28)
    monkeypatch.setattr(LossScaler, "GROWTH_STEPS", 3)
    undisturbed = RunFolder(tmp_path / "undisturbed")
    history = make_trainer(undisturbed, precision=precision).fit()
    if precision == "float16":
        assert sum(record.skipped_steps for record in history) > 2
        assert read_checkpoint(undisturbed.last_path).loss_scaling["scale"] == history[-1].loss_scale
    else:
        assert {(record.skipped_steps, record.loss_scale) for record in history} == {(0, 1.0)}
    crashed = RunFolder(tmp_path / "crashed")
    with pytest.raises(MemoryError):
        make_trainer(crashed, (StopAt(7, crash),), precision=precision).fit()
    make_trainer(crashed, precision=precision).fit(resume=True)
    assert_same_end(undisturbed, crashed)
    with pytest.raises(CheckpointError, match=rf"precision \(was '{precision}', now None\)"):
        make_trainer(crashed, precision="float32").fit(resume=True)


# ---------------------------------------------------------------- whole runs


def digits():
    """The digits, 8x8, each pixel four times: a size that LeNet-5 takes."""
    splits = load("digits")

    def enlarged(*parts):
        images = numpy.concatenate([part.images(numpy.arange(len(part))) for part in parts])
        labels = numpy.concatenate([part.labels for part in parts])
        return numpy.repeat(numpy.repeat(images[..., 0], 2, axis=1), 2, axis=2), labels

    return enlarged(splits.train), enlarged(splits.validation, splits.test)


def trained_lenet(train, **options):
    gpucnn.manual_seed(0)
    model = gpucnn.models.create("lenet5", image_size=16)
    model.fit(train, epochs=5, batch_size=32, lr=6e-3, verbose=False, workers=0, **options)
    return model


@pytest.fixture(scope="module")
def accuracy_in_float32():
    """By NumPy's operations, which are faster here than kernels on the host runtime."""
    train, held_out = digits()
    accuracy = trained_lenet(train, device="cpu").evaluate(held_out).accuracy
    assert accuracy > 0.93, "the network has not learned, so accuracies say nothing"
    return accuracy


@pytest.mark.parametrize("precision", NARROW)
def test_lenet5_on_digits_is_as_accurate_as_in_float32(precision, accuracy_in_float32, tmp_path):
    train, held_out = digits()
    model = trained_lenet(train, device="cuda", precision=precision)
    assert model.evaluate(held_out).accuracy >= accuracy_in_float32 - 0.005
    probabilities = model.predict(held_out[0][:50])
    assert probabilities.dtype == numpy.float32
    model.save(tmp_path / "model.safetensors")
    loaded = gpucnn.models.load(tmp_path / "model.safetensors")
    assert precision_of(loaded) == "float32"
    error = numpy.abs(loaded.predict(held_out[0][:50]) - probabilities).max()
    assert 0 < error <= 16 * EPSILON[precision]


def test_the_command_line_trains_in_float16(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--data", "digits", "--model", "vgg-small", "--image-size", "8", "--width", "2", "--epochs", "1"]
    answer = call(capsys, "train", *small, "--device", "cuda", "--precision", "float16", "--output", "run")
    assert answer.status == 0, answer.errors
    assert "precision float16" in answer.errors
    tensors, _ = read_tensors(tmp_path / "run" / "best.safetensors")
    assert {str(array.dtype) for array in tensors.values()} == {"float32", "int64"}
    (record,) = RunFolder(tmp_path / "run").read_history()
    assert record.loss_scale > 1
    assert call(capsys, "evaluate", "run", "--device", "cuda").status == 0


# ---------------------------------------------------------------- what is refused


def test_what_no_device_computes_in():
    model = make_model().to("cuda")
    with pytest.raises(ArgumentError, match="unknown precision 'bf16'; did you mean 'bfloat16'"):
        set_precision(model, "bf16")
    assert precision_of(model) == "float32"
    set_precision(model, "float64")
    assert precision_of(model) == str(model.parameters()[0].dtype) == "float64"


def test_layers_take_no_other_dtype_unasked():
    model = small_model().compute_in("bfloat16")
    x, _ = small_batch()
    with pytest.raises(DtypeError, match="the input is float32 but the parameters are bfloat16"):
        model(x)
    assert model.cpu().predict(x.get()).dtype == numpy.float32
    assert set_precision(model, "float32") is None
    assert model.predict(x.get()).dtype == numpy.float32
    with pytest.raises(DtypeError, match="expected floating-point numbers, got dtype int16"):
        layers.BatchNorm2d(2)(x.get().astype("int16"))
