"""Captured steps, on the host runtime's graphs: the bits of plain steps, and what cannot be captured goes plainly.

A graph of the host runtime starts what was started while it was recorded, with the numbers of that time. So a
number that should change from step to step and does not gives other weights than the plain run's, the oracle.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy
import pytest
from resume_worker import make_data, make_model

from gpucnn import layers
from gpucnn.device import to_device
from gpucnn.errors import ArgumentError, NonFiniteError, StateError
from gpucnn.losses import CrossEntropyLoss
from gpucnn.random import manual_seed
from gpucnn.training import Callback, Progress, RunFolder, Trainer, TrainingOptions
from gpucnn.training import captured_step as module
from gpucnn.training import trainer as trainer_module
from gpucnn.training.loss_scaling import LossScaler
from gpucnn.training.replay import reason_against
from gpucnn.training.scheduled_step import ScheduledTrainingStep
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime import using
from gpucnn_kernels.runtime.host_graph import HostGraph

BATCH, IMAGES = 25, 163  # six full batches an epoch, and one of 13 images
SAID = "each step of 25 images is launched as one CUDA graph"


@pytest.fixture(autouse=True)
def host_runtime():
    with using("host"):
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of each graph that is launched."""
    found: list[int] = []
    plain = HostGraph.launch

    def launch(graph: HostGraph) -> None:
        found.append(len(graph))
        plain(graph)

    monkeypatch.setattr(HostGraph, "launch", launch)
    return found


class Lines(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def trainer(
    capture: str, callbacks: Any = (), model: Any = None, validation: bool = False, **options: Any
) -> Trainer:
    train, valid = make_data()
    precision, run = options.pop("precision", None), options.pop("run", None)
    given = {"epochs": 2, "batch_size": BATCH, "workers": 1, "lr": 0.01, **options}
    return Trainer(
        make_model() if model is None else model,
        train,
        valid if validation else None,
        options=TrainingOptions(**given, capture=capture),
        device="cuda",
        precision=precision,
        callbacks=callbacks,
        run=run,
        progress=Lines(),
    )


def end(made: Trainer) -> dict[str, Any]:
    """Everything that a run leaves behind, in bytes."""
    state = {f"model.{key}": value for key, value in made.model.state_dict().items()}
    state |= {f"optimizer.{key}": value for key, value in made.optimizer.state_dict().items()}
    if made._average is not None:
        state |= {f"ema.{key}": numpy.asarray(value) for key, value in made._average.average.items()}
    if made._scaler is not None:
        state |= {f"scale.{key}": numpy.array(value) for key, value in made._scaler.state_dict().items()}
    found: dict[str, Any] = {key: value.tobytes() for key, value in state.items()}
    found["random"] = made._random.capture()
    found["history"] = [
        (record.train_loss, record.train_accuracy, record.validation_loss, record.skipped_steps)
        for record in made.history
    ]
    return found


def assert_same(ours: Trainer, theirs: Trainer) -> None:
    first, second = end(ours), end(theirs)
    assert [key for key in second if first[key] != second[key]] == []
    assert first.keys() == second.keys()


def both(**options: Any) -> tuple[Trainer, Trainer]:
    """(the captured run, the plain one), finished."""
    runs = []
    for capture in ("on", "off"):
        made = trainer(capture, **options)
        made.fit()
        runs.append(made)
    return runs[0], runs[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "sgd", "nesterov": True, "ema_decay": 0.9, "clip_norm": 0.5},
        {"optimizer": "adam", "clip_norm": 1.0, "label_smoothing": 0.1, "class_weights": "balanced"},
        {"optimizer": "rmsprop", "ema_decay": 0.98, "schedule": "cosine", "warmup_epochs": 0.5},
        {"precision": "float64", "clip_norm": 0.5, "ema_decay": 0.9},
        {"precision": "float16", "clip_norm": 0.5, "ema_decay": 0.9},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_captured_and_plain_runs_end_with_the_same_bits(options: dict[str, Any], launches: list[int]) -> None:
    captured, plain = both(validation=True, **options)
    assert_same(captured, plain)
    assert captured.progress.said == [SAID]
    assert plain.progress.said == []
    # Of each epoch's six full batches all but the very first; the validation's 40 images are less than a batch.
    assert len(launches) == 11
    assert len(set(launches)) == 1


def test_a_skipped_step_is_skipped_on_the_device(monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    monkeypatch.setattr(LossScaler, "INITIAL_SCALE", 2.0**24)
    monkeypatch.setattr(LossScaler, "GROWTH_STEPS", 3)
    captured, plain = both(precision="float16", ema_decay=0.9, optimizer="adam")
    assert_same(captured, plain)
    skipped = sum(record.skipped_steps for record in captured.history)
    assert 2 <= skipped < len(launches), "the first of them goes kernel by kernel"
    assert captured.optimizer.state_dict()["step.0"].tolist() == [14 - skipped] * 2


@pytest.mark.parametrize("stale", ["learning rate", "average", "random state", "everything"])
def test_a_number_that_stays_behind_shows(stale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That these tests can fail: the captured run is not the plain one where Python's numbers stay behind."""
    plain_prepare = ScheduledTrainingStep.prepare

    def prepare(step: ScheduledTrainingStep, number: int) -> None:
        before = step._host.copy()
        plain_prepare(step, number)
        if before.any():
            reals = len(step._host_numbers)
            places = {
                "learning rate": slice(3, reals),
                "average": slice(2, 3),
                "random state": slice(reals, None),
                "everything": slice(None),
            }[stale]
            step._host[places] = before[places]
            step._device.set(step._host)

    monkeypatch.setattr(ScheduledTrainingStep, "prepare", prepare)
    captured, plain = both(ema_decay=0.9)
    with pytest.raises(AssertionError):
        assert_same(captured, plain)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_of_branches_that_convolutions_add(precision: str, launches: list[int]) -> None:
    def block(outputs: int) -> layers.Residual:
        body = layers.Sequential(layers.Conv2d(8, outputs, 3, padding=1), layers.BatchNorm2d(outputs))
        shortcut = None if outputs == 8 else layers.Sequential(layers.Conv2d(8, outputs, 1))
        return layers.Residual(body, shortcut, layers.ReLU())

    runs = []
    for capture in ("on", "off"):
        manual_seed(3)
        stem, head = layers.Conv2d(1, 8, 3), (layers.Flatten(), layers.Linear(16 * 16, 3))
        model = layers.Sequential(stem, block(8), block(16), *head)
        made = trainer(capture, model=model, precision=precision, epochs=1)
        made.fit()
        runs.append(made)
    assert_same(*runs)
    assert len(launches) > 1


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_class_that_is_ignored(precision: str, launches: list[int]) -> None:
    runs = []
    for capture, ignored in (("on", 1), ("off", 1), ("off", None)):
        made = trainer(capture, precision=precision, epochs=1)
        made.loss.ignore_index = ignored
        made.fit()
        runs.append(made)
    assert_same(*runs[:2])
    assert len(launches) > 1
    assert end(runs[1])["history"] != end(runs[2])["history"]


def test_batch_norms_whose_statistics_stay(launches: list[int]) -> None:
    runs = []
    for capture in ("on", "off"):
        model = make_model()
        model[1].momentum = None  # a factor that changes from step to step, where the statistics move
        model[1].eval()
        made = trainer(capture, model=model, validation=True)
        made.fit()
        assert [layer.training for layer in model] == [True, False] + [True] * 5
        assert model[1].running_mean.tolist() == [0, 0, 0]
        assert model[1].weight.data.tolist() != [1, 1, 1]
        runs.append(made)
    assert_same(*runs)
    assert len(launches) > 6
    assert runs[0].progress.said == [SAID]


@pytest.mark.parametrize("capture", ["on", "off"])
@pytest.mark.parametrize("hook", ["on_step_end", "on_epoch_end"])
def test_weights_that_move_are_not_averaged_where_they_were(capture: str, hook: str) -> None:
    class Moving(Callback):
        pass

    setattr(Moving, hook, lambda self, trainer, _: trainer.model.to("cpu").to("cuda") and None)
    trainer(capture, callbacks=[Moving()]).fit()  # the optimizer follows
    with pytest.raises(StateError, match=r"'0\.weight' was moved while its average is taken"):
        trainer(capture, callbacks=[Moving()], ema_decay=0.9).fit()


class OwnLoss(CrossEntropyLoss):
    """A loss of one's own: it may be anything, so it is computed by its own operations."""


def test_a_loss_of_ones_own_goes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    launch = Call.launch

    def noted(call: Call, source: Any, kernel: str, *arguments: Any, **options: Any) -> None:
        names.append(kernel)
        launch(call, source, kernel, *arguments, **options)

    monkeypatch.setattr(Call, "launch", noted)
    ends = []
    for own in (False, True):
        if own:
            monkeypatch.setattr(trainer_module, "CrossEntropyLoss", OwnLoss)
        names.clear()
        captured = trainer("on")
        captured.fit()
        assert captured.progress.said == [SAID]
        assert ("cross_entropy_step" in names, "cross_entropy_backward" in names) == (not own, own)
        # Weights that decay and others are two parts; each is one launch.
        assert names.count("judge_gradient") == names.count("sgd_step") + names.count("adam_step") > 0
        assert not {"judge_step", "squares_by_block", "sum_of_blocks"} & set(names)
        ends.append(captured)
    assert_same(*ends)


def test_an_array_that_nothing_keeps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ScheduledTrainingStep.arrays
    monkeypatch.setattr(ScheduledTrainingStep, "arrays", lambda step: kept(step)[:-1])
    captured, plain = both()
    assert_same(captured, plain)
    assert len(captured.progress.said) == 1
    assert "go on kernel by kernel: the captured work uses" in captured.progress.said[0]


def test_a_set_smaller_than_a_batch_is_one_full_batch(launches: list[int]) -> None:
    captured, plain = both(batch_size=200, epochs=4)
    assert_same(captured, plain)
    assert captured.progress.said == ["each step of 163 images is launched as one CUDA graph"]
    assert len(launches) == 3


def test_graphs_and_their_memory_go_with_the_end_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []
    launch = HostGraph.launch

    def noted(graph: HostGraph) -> None:
        if not any(known() is graph for known in graphs):
            graphs.append(weakref.ref(graph))
        launch(graph)

    monkeypatch.setattr(HostGraph, "launch", noted)
    gc.collect()
    gc.disable()  # a GPU's memory must not wait for the collector
    try:
        made = trainer("on", validation=True, evaluation_batch_size=10)
        made.fit()
        assert len(graphs) == 2, "a step, and the validation's pass"
        assert [graph() for graph in graphs] == [None, None]
    finally:
        gc.enable()


# ------------------------------------------------------------ what cannot be captured


class OwnLayer(layers.Layer):
    """Something that a graph cannot hold, from its ``first`` step on."""

    def __init__(self, trouble: Any) -> None:
        self._trouble = trouble

    def forward(self, x: Any) -> Any:
        self._trouble(x)
        return x

    def backward(self, dy: Any) -> Any:
        return dy


def with_own(trouble: Any) -> Any:
    model = make_model()
    children = [child for _, child in model.children()]
    return layers.Sequential(*children[:-1], OwnLayer(trouble), children[-1])


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (lambda x: float(x.sum()), "cannot look at an array's values while work is captured"),
        (lambda x: bool((x == 0).any()), "cannot look at an array's values while work is captured"),
        (lambda x: x.get(), "cannot copy an array to the host while work is captured"),
        (lambda x: x + to_device(numpy.ones(1, "float32"), "cuda"), "cannot copy an array from the host while"),
    ],
)
def test_a_layer_that_waits_goes_on_plainly(trouble: Any, reason: str, launches: list[int]) -> None:
    plain = trainer("off", model=with_own(lambda x: None))
    captured = trainer("on", model=with_own(trouble))
    plain.fit()
    captured.fit()
    assert_same(captured, plain)
    assert launches == []
    assert len(captured.progress.said) == 1
    said = captured.progress.said[0]
    assert said.startswith("the steps are not captured as a CUDA graph, and go on kernel by kernel: " + reason)


def test_a_capture_that_breaks_off_leaves_no_trace(launches: list[int]) -> None:
    calls: list[int] = []

    def third_call(x: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # one image beforehand, the first batch, the capture
            raise MemoryError("no room for the graph")

    captured, plain = trainer("on", model=with_own(third_call)), trainer("off", model=with_own(lambda x: None))
    captured.fit()
    plain.fit()
    assert_same(captured, plain)
    assert "kernel by kernel: no room for the graph" in captured.progress.said[0]
    assert launches == []


def test_ctrl_c_during_a_capture_is_not_swallowed() -> None:
    calls: list[int] = []

    def third_call(x: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer("on", model=with_own(third_call)).fit()


def test_what_is_not_captured_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    assert reason_against(model, "auto", training=True) == ""
    assert reason_against(model, "off", training=True) == ""
    assert "the model is on the CPU" in str(reason_against(model, "on", training=True))
    model.to("cuda")
    assert reason_against(model, "on", training=True) is None
    assert reason_against(model, "off", training=True) == ""
    assert reason_against(model, "auto", training=True) == "", "the host runtime gains nothing"
    monkeypatch.setattr("gpucnn.training.replay.is_host_runtime", lambda: False)
    assert reason_against(model, "auto", training=True) is None
    own = with_own(lambda x: None).to("cuda")
    assert "OwnLayer ('6') is not gpucnn's own" in str(reason_against(own, "auto", training=True))
    assert reason_against(own, "on", training=True) is None
    model = layers.Sequential(layers.BatchNorm2d(3, momentum=None)).to("cuda")
    assert "batch norm '0' averages" in str(reason_against(model, "on", training=True))
    assert reason_against(model, "on", training=False) is None


def test_auto_captures_on_a_gpu_what_is_gpucnns_own(monkeypatch: pytest.MonkeyPatch, launches: list[int]) -> None:
    monkeypatch.setattr("gpucnn.training.replay.is_host_runtime", lambda: False)
    made = trainer("auto", epochs=1)
    made.fit()
    assert made.progress.said == [SAID]
    assert len(launches) == 5
    launches.clear()
    made = trainer("auto", epochs=1, model=with_own(lambda x: None))
    made.fit()
    assert launches == []
    assert len(made.progress.said) == 1
    assert "go on kernel by kernel: OwnLayer ('6') is not gpucnn's own" in made.progress.said[0]


def test_what_is_asked_for_and_cannot_be_is_an_error() -> None:
    train, _ = make_data()
    with pytest.raises(ArgumentError, match="capture='on': graphs are a GPU's, and the model is on the CPU"):
        Trainer(make_model(), train, options=TrainingOptions(capture="on"), device="cpu").fit()
    with pytest.raises(ArgumentError, match=r"unknown capture 'of'.*off"):
        TrainingOptions(capture="of")


# ------------------------------------------------------------ what changes on the way


class At(Callback):
    """Does something to the trainer after some steps."""

    def __init__(self, **changes: Any) -> None:
        self._changes = {int(step.removeprefix("step_")): change for step, change in changes.items()}
        self._step = 0

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        self._step += 1
        if self._step in self._changes:
            self._changes[self._step](trainer)


def first_convolution(made: Trainer) -> Any:
    return next(layer for _, layer in made.model.named_layers() if isinstance(layer, layers.Conv2d))


def freeze(made: Trainer) -> None:
    first_convolution(made).requires_grad_(False)


def thaw(made: Trainer) -> None:
    first_convolution(made).requires_grad_(True)


def freeze_all(made: Trainer) -> None:
    made.model.requires_grad_(False)


def drop_more(made: Trainer) -> None:
    for _, layer in made.model.named_layers():
        if isinstance(layer, layers.Dropout):
            layer.p = 0.5


def forget_sooner(made: Trainer) -> None:
    for _, layer in made.model.named_layers():
        if isinstance(layer, layers.BatchNorm2d):
            layer.momentum = 0.7


def clip(made: Trainer) -> None:
    made.options = TrainingOptions.from_dict(made.options.to_dict() | {"clip_norm": 0.01})


def decay_more(made: Trainer) -> None:
    made.optimizer.groups[0].options["weight_decay"] = 0.3


def smooth(made: Trainer) -> None:
    made.loss.label_smoothing = 0.3


def reseed(made: Trainer) -> None:
    manual_seed(99)


def load_weights(made: Trainer) -> None:
    made.model.load_state_dict({key: value * 0.5 for key, value in made.model.state_dict().items()})


@pytest.mark.parametrize(
    ("change", "captures"),
    [
        ((freeze, thaw), 3),
        ((freeze_all,), 2),
        ((drop_more,), 2),
        ((forget_sooner,), 2),
        ((clip,), 2),
        ((decay_more,), 2),
        ((smooth,), 2),
        ((reseed,), 2),
        ((load_weights,), 1),
    ],
    ids=lambda value: "+".join(change.__name__ for change in value) if isinstance(value, tuple) else str(value),
)
def test_what_changes_on_the_way_is_captured_again(change: Any, captures: int, launches: list[int]) -> None:
    steps = {f"step_{3 * number}": made for number, made in enumerate(change, 1)}
    runs = []
    for capture in ("on", "off"):
        made = trainer(capture, [At(**steps)], clip_norm=1.0, optimizer="sgd", schedule="constant")
        made.fit()
        runs.append(made)
    assert_same(*runs)
    undisturbed = trainer("off", clip_norm=1.0, optimizer="sgd", schedule="constant")
    undisturbed.fit()
    with pytest.raises(AssertionError):
        assert_same(runs[1], undisturbed)  # the change makes a difference, so missing it would show
    assert runs[0].progress.said == [SAID]
    assert len(launches) == 12 - captures, "each capture comes after a batch that goes kernel by kernel"


def test_it_gives_up_where_everything_changes_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CAPTURES", 2)

    def changed(made: Trainer) -> None:
        made.loss.label_smoothing += 0.01

    steps = {f"step_{number}": changed for number in (2, 4, 9, 11)}
    runs = []
    for capture in ("on", "off"):
        made = trainer(capture, [At(**steps)])
        made.fit()
        runs.append(made)
    assert_same(*runs)
    assert runs[0].progress.said[0] == SAID
    assert runs[0].progress.said[1].endswith("what a step does has changed 2 times")


# ------------------------------------------------------------ trouble


@pytest.mark.parametrize("step", [3, 7, 12])
def test_a_loss_that_is_not_finite_is_told_as_a_plain_step_tells_it(step: int) -> None:
    """In a launched step (3, 12) and in one kernel by kernel (7, the epoch's last)."""

    def poison(made: Trainer) -> None:
        made.model.parameters()[-1].data[...] = numpy.inf

    ends, errors = [], []
    for capture in ("on", "off"):
        made = trainer(capture, [At(**{f"step_{step - 1}": poison})], ema_decay=0.9)
        with pytest.raises(NonFiniteError) as caught:
            made.fit()
        ends.append(made)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert f"the loss became nan at step {step} " in errors[0] or f"became inf at step {step} " in errors[0]
    assert "layer '6' (Linear" in errors[0]
    assert_same(*ends)


@pytest.mark.parametrize("first", ["on", "off"])
@pytest.mark.parametrize("second", ["on", "off"])
def test_a_run_is_resumed_with_the_same_bits(first: str, second: str, tmp_path: Any) -> None:
    def crash(made: Trainer) -> None:
        raise MemoryError

    options = {"ema_decay": 0.9, "checkpoint_steps": 4, "optimizer": "adam"}
    undisturbed = trainer("off", run=RunFolder(tmp_path / "undisturbed"), **options)
    undisturbed.fit()
    folder = tmp_path / "crashed"
    with pytest.raises(MemoryError):
        trainer(first, [At(step_10=crash)], run=RunFolder(folder), **options).fit()
    resumed = trainer(second, run=RunFolder(folder), **options)
    resumed.fit(resume=True)
    ours, theirs = end(resumed), end(undisturbed)
    assert [key for key in theirs if ours[key] != theirs[key]] == []


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Any) -> None:
    train, _ = make_data()
    options = TrainingOptions(capture="on", batch_size=BATCH)
    with pytest.raises(ArgumentError, match="capture='on'"):
        Trainer(make_model(), train, options=options, device="cpu", run=RunFolder(tmp_path / "run")).fit()
    assert not (tmp_path / "run").exists()
