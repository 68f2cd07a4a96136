"""``gpucnn train``: from nothing to a run folder, interrupted and resumed, repeated, and in float64."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest

import gpucnn
from gpucnn import training
from gpucnn.cli import results
from gpucnn.errors import MissingDependencyError
from gpucnn.training import LineProgress, read_tensors
from tests.cli_cases import SMALL, call, call_process, write_idx, write_images

FILES = {
    "config.json", "history.jsonl", "last.safetensors", "best.safetensors", "summary.json", "curves.png",
    "confusion.png",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder of its own with a small data set in it, and none of the user's settings."""
    for name in [name for name in os.environ if name.startswith("GPUCNN_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUCNN_DATA", str(write_idx(tmp_path / "data")))


def read(path: str) -> Any:
    return json.loads(Path(path).read_text())


def same_weights(first: str, second: str) -> bool:
    one, other = read_tensors(Path(first))[0], read_tensors(Path(second))[0]
    return one.keys() == other.keys() and all(numpy.array_equal(one[key], other[key]) for key in one)


def test_a_run_leaves_everything_in_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, "train", *SMALL)
    assert answer.status == 0
    assert {path.name for path in Path("run").iterdir()} == FILES
    assert "device: cpu (auto: " in answer.errors
    assert "data: mnist: 36 train, 12 validation, 16 test images of 14x14x1, 2 classes" in answer.errors
    assert "model: lenet5, " in answer.errors
    assert "epoch 2/2 " in answer.errors
    assert answer.output.startswith("test accuracy ")
    assert "written to run: summary.json" in answer.errors
    summary = read("run/summary.json")
    assert summary["split"] == "test"
    assert summary["epochs"] == 2
    confusion = numpy.array(summary["evaluation"]["confusion"])
    assert confusion.sum() == summary["evaluation"]["images"] == 16
    assert abs(confusion.trace() / 16 - summary["evaluation"]["accuracy"]) <= 1e-12
    assert f"{summary['evaluation']['accuracy']:.4f}" in answer.output
    config = read("run/config.json")
    assert config["settings"]["lr"] == 0.01
    assert config["sources"]["lr"] == "--lr"
    assert config["model"]["name"] == "lenet5"
    for picture in ("curves.png", "confusion.png"):
        assert Path("run", picture).read_bytes().startswith(b"\x89PNG")


def test_the_network_learns(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "train", *SMALL, "--epochs", "8").status == 0
    assert read("run/summary.json")["evaluation"]["accuracy"] >= 0.9


def test_quiet_prints_the_result_alone(capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, "train", *SMALL, "--quiet")
    assert answer.errors == ""
    assert answer.output.startswith("test accuracy ")


def test_runs_without_a_name_are_numbered_and_the_last_one_is_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    unnamed = SMALL[: SMALL.index("--output")]
    for _ in range(2):
        assert call(capsys, "train", *unnamed).status == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["mnist-lenet5", "mnist-lenet5-2"]
    answer = call(capsys, "train", *unnamed, "--resume")
    assert answer.status == 0
    assert f"run: {Path('runs/mnist-lenet5-2')} (resumed)" in answer.errors
    pictures = write_images(Path("pets"))
    for arguments in (("--data", pictures), ("--data", "folder", "--data-dir", pictures)):
        answer = call(capsys, "train", *arguments, "--model", "lenet5", "--image-size", "12", "--epochs", "1")
        assert answer.status == 0, answer.errors
    assert {path.name for path in Path("runs").iterdir()} >= {"pets-lenet5", "pets-lenet5-2"}


def test_a_run_is_neither_overwritten_nor_mixed_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "train", *SMALL).status == 0
    before = Path("run/best.safetensors").read_bytes()
    answer = call(capsys, "train", *SMALL, "--seed", "1")
    assert answer.status == 2
    assert "run already holds a run; add --resume" in answer.errors
    assert Path("run/best.safetensors").read_bytes() == before
    assert call(capsys, "train", *SMALL, "--seed", "1", "--overwrite").status == 0
    assert Path("run/best.safetensors").read_bytes() != before


def test_a_run_can_be_repeated_from_its_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "train", *SMALL, "--clip-norm", "1").status == 0
    assert call(capsys, "train", "--config", "run/config.json", "--output", "again").status == 0
    assert same_weights("run/last.safetensors", "again/last.safetensors")
    assert read("again/config.json")["settings"] == read("run/config.json")["settings"] | {
        "config": "run/config.json"
    }


def stop_at_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int, number: int = signal.SIGINT) -> None:
    """Have the process send itself a signal when ``epoch`` begins, once."""
    begin, sent = LineProgress.begin_epoch, []

    def begin_epoch(self: LineProgress, now: int, *rest: int) -> None:
        begin(self, now, *rest)
        if now == epoch and not sent:
            sent.append(now)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(LineProgress, "begin_epoch", begin_epoch)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_to_the_same_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    arguments = [*SMALL, "--epochs", "3", "--ema", "0.9"]
    assert call(capsys, "train", *arguments, "--output", "undisturbed").status == 0
    stop_at_epoch(monkeypatch, 2, number)
    stopped = call(capsys, "train", *arguments)
    assert stopped.status == status
    assert "go on with: gpucnn train --resume run" in stopped.errors
    assert "saved in run" in stopped.errors
    assert "Traceback" not in stopped.errors
    assert not Path("run/summary.json").exists()
    resumed = call(capsys, "train", "--resume", "run")
    assert resumed.status == 0
    assert "run: run (resumed)" in resumed.errors
    for name in ("last", "best"):
        assert same_weights(f"undisturbed/{name}.safetensors", f"run/{name}.safetensors")
    assert read("run/summary.json")["evaluation"] == read("undisturbed/summary.json")["evaluation"]


def test_ctrl_c_in_a_terminal_ends_the_process_cleanly(tmp_path: Path) -> None:
    process = call_process(tmp_path, "train", *SMALL, "--epochs", "100000", GPUCNN_DATA=str(tmp_path / "data"))
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch "):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with: gpucnn train --resume run" in errors
    assert "Traceback" not in errors
    assert output == ""
    assert Path("run/last.safetensors").exists()


def test_resume_starts_where_nothing_is_yet(capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, "train", *SMALL, "--resume")
    assert answer.status == 0
    assert "nothing to resume in run: starting there" in answer.errors


def test_resume_takes_flags_of_the_machine_and_refuses_those_of_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert call(capsys, "train", *SMALL).status == 0
    assert call(capsys, "train", "--resume", "run", "--workers", "1", "--lr", "0.01").status == 0
    refused = call(capsys, "train", "--resume", "run", "--lr", "0.02")
    assert refused.status == 2
    assert "started with lr = 0.01, and --lr says 0.02" in refused.errors
    refused = call(capsys, "train", "--resume", "run", "--model", "vgg-small")
    assert refused.status == 2
    assert "started with model = lenet5, and --model says vgg-small" in refused.errors
    refused = call(capsys, "train", "--resume", "run", "--clip-norm", "3")
    assert "started with clip-norm = none, and --clip-norm says 3.0" in refused.errors
    refused = call(
        capsys, "train", "--resume", "run", "--epochs", "3"
    )  # one-cycle depends on it: the trainer says so
    assert refused.status == 2
    assert "epochs" in refused.errors
    refused = call(capsys, "train", "--resume", "run", "--output", "elsewhere")
    assert "--resume run and --output elsewhere are different folders" in refused.errors
    monkeypatch.setenv("GPUCNN_LR", "0.5")  # of the surroundings, not of the run
    assert call(capsys, "train", "--resume", "run").status == 0
    monkeypatch.delenv("GPUCNN_DATA")
    assert call(capsys, "train", "--resume", "run").status == 0  # the config knows the folder
    assert call(capsys, "train", "--resume", "run", "--data-dir", tmp_path / "data").status == 0


def test_more_epochs_where_the_schedule_allows(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--schedule", "constant"]
    assert call(capsys, "train", *arguments, "--epochs", "3", "--output", "long").status == 0
    assert call(capsys, "train", *arguments).status == 0
    assert call(capsys, "train", "--resume", "run", "--epochs", "3").status == 0
    assert same_weights("run/last.safetensors", "long/last.safetensors")


def test_resume_needs_a_run_that_the_command_started(capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, "train", "--resume", "nowhere")
    assert answer.status == 2
    assert "nowhere holds no run to resume" in answer.errors
    Path("made").mkdir()
    Path("made/config.json").write_text('{"options": {}}')
    answer = call(capsys, "train", "--resume", "made")
    assert answer.status == 2
    assert "gpucnn train did not start it" in answer.errors


def test_float64_trains_and_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "train", *SMALL, "--precision", "float64").status == 0
    tensors = read_tensors(Path("run/best.safetensors"))[0]
    assert {array.dtype for name, array in tensors.items() if name.startswith("model.")} == {
        numpy.dtype("float64")
    }
    assert call(capsys, "evaluate", "run").status == 0


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
def test_precisions_of_a_gpu_are_rounded_to_on_the_cpu(capsys: pytest.CaptureFixture[str], precision: str) -> None:
    answer = call(capsys, "train", *SMALL, "--precision", precision)
    assert answer.status == 0
    words = f"precision {precision} (rounded as on a GPU; slower than float32 on the CPU)"
    assert words in answer.errors
    tensors = read_tensors(Path("run/best.safetensors"))[0]
    assert {str(array.dtype) for array in tensors.values()} <= {"float32", "int64"}
    assert call(capsys, "evaluate", "run").status == 0


def test_a_precision_without_its_package_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    answer = call(capsys, "train", *SMALL, "--precision", "bfloat16")
    assert answer.status == 2
    assert "precision 'bfloat16' needs the package ml_dtypes: pip install ml_dtypes" in answer.errors
    assert not Path("run").exists()


def test_model_options_reach_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--model", "vgg-small", "--image-size", "16", "--epochs", "1"]
    answer = call(capsys, "train", *arguments, "--width", "4", "--model-option", "stages=2")
    assert answer.status == 0, answer.errors
    assert read("run/config.json")["model"] | {"width": 4, "stages": 2} == read("run/config.json")["model"]
    answer = call(capsys, "train", *arguments, "--output", "other", "--model-option", "num_classes=3")
    assert answer.status == 2
    assert "--model-option num_classes is decided by" in answer.errors
    answer = call(capsys, "train", *arguments, "--output", "other", "--model-option", "widht=3")
    assert "did you mean 'width'?" in answer.errors


def test_without_images_held_out_there_is_no_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    pictures = write_images(Path("pets"))
    answer = call(
        capsys, "train", "--data", pictures, "--model", "lenet5", "--image-size", "12", "--epochs", "1",
        "--validation-fraction", "0", "--output", "run",
    )  # fmt: skip
    assert answer.status == 0, answer.errors
    assert "no images were held out to test on" in answer.output
    assert "evaluation" not in read("run/summary.json")


def test_without_matplotlib_the_pictures_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise MissingDependencyError("no Matplotlib")

    monkeypatch.setattr(results, "draw_curves", refuse)
    answer = call(capsys, "train", *SMALL)
    assert answer.status == 0
    assert "need Matplotlib: pip install 'gpucnn[plot]'" in answer.errors
    assert "curves.png" not in answer.errors
    assert {path.name for path in Path("run").iterdir()} == FILES - {"curves.png", "confusion.png"}


def test_curves_are_drawn_while_it_trains(tmp_path: Path) -> None:
    pictures: list[bool] = []
    run = training.RunFolder(tmp_path / "run")

    class Look(training.Callback):
        def on_epoch_end(self, trainer: training.Trainer, record: training.EpochRecord) -> None:
            pictures.append(run.curves_path.exists())

    splits = gpucnn.data.load("mnist")
    model = gpucnn.models.create("lenet5", image_size=12, num_classes=2)
    options = training.TrainingOptions(epochs=2, workers=0)
    for seconds in (3600.0, 0.0):
        run = training.RunFolder(tmp_path / f"run {seconds}")
        callbacks = [results.CurvesCallback(run, seconds), Look()]
        training.Trainer(model, splits.train, options=options, run=run, callbacks=callbacks).fit()
    assert pictures == [False, False, True, True]


def test_a_closed_pipe_is_not_an_error_to_shout_about(tmp_path: Path) -> None:
    process = call_process(tmp_path, "info", GPUCNN_DATA=str(tmp_path / "data"))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()  # whoever reads is gone before the first line
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert errors == ""


def test_the_device_comes_from_flag_environment_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "device: cpu (auto: " in call(capsys, "train", *SMALL, "--overwrite").errors
    monkeypatch.setenv("GPUCNN_DEVICE", "cpu")
    assert "device: cpu (set by GPUCNN_DEVICE)" in call(capsys, "train", *SMALL, "--overwrite").errors
    assert "device: cpu (asked for)" in call(capsys, "train", *SMALL, "--overwrite", "--device", "cpu").errors
    Path("c.toml").write_text('device = "cuda"')
    assert call(capsys, "train", *SMALL, "--overwrite", "--config", "c.toml").status == 0  # the variable beats it
    monkeypatch.delenv("GPUCNN_DEVICE")
    assert call(capsys, "train", *SMALL, "--overwrite", "--config", "c.toml").status == 2


def test_a_run_with_more_epochs_keeps_them_when_it_is_stopped_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*SMALL, "--schedule", "constant"]
    assert call(capsys, "train", *arguments, "--epochs", "4", "--output", "long").status == 0
    assert call(capsys, "train", *arguments).status == 0
    stop_at_epoch(monkeypatch, 3)
    assert call(capsys, "train", "--resume", "run", "--epochs", "4").status == 130
    config = read("run/config.json")
    assert (config["settings"]["epochs"], config["sources"]["epochs"]) == (4, "--epochs")
    assert call(capsys, "train", "--resume", "run").status == 0
    assert read("run/summary.json")["epochs"] == 4
    assert same_weights("run/last.safetensors", "long/last.safetensors")


def test_a_refused_number_of_epochs_leaves_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "train", *SMALL).status == 0
    before = Path("run/config.json").read_bytes()
    assert call(capsys, "train", "--resume", "run", "--epochs", "3").status == 2
    assert Path("run/config.json").read_bytes() == before


def test_the_same_command_resumes_where_the_recipe_has_model_options(capsys: pytest.CaptureFixture[str]) -> None:
    pictures = write_images(Path("pets"))
    arguments = [
        "train", "--data", pictures, "--model", "vgg-small", "--image-size", "16", "--width", "4", "--epochs", "1",
        "--augment", "none", "--model-option", "dropout=0.1", "--model-option", "stages=2", "--output", "run",
        "--resume",
    ]  # fmt: skip
    assert call(capsys, *arguments).status == 0
    stored = read("run/config.json")["settings"]["model-option"]
    assert stored["stem"] == "strided"  # the recipe's
    answer = call(capsys, *arguments)
    assert answer.status == 0, answer.errors
    assert "run: run (resumed)" in answer.errors
    answer = call(capsys, *arguments, "--model-option", "dropout=0.3")
    assert answer.status == 2
    assert "was started with model-option = " in answer.errors
    assert call(capsys, *arguments, "--model-option", "batch_norm=true").status == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nesterov"], "--nesterov has no effect with the optimizer adamw, only with sgd"),
        (["--momentum", "0.8"], "--momentum has no effect with the optimizer adamw, only with sgd and rmsprop"),
        (["--nesterov", "--optimizer", "rmsprop"], "--nesterov has no effect with the optimizer rmsprop"),
        (["--gamma", "0.5"], "--gamma has no effect with the schedule one-cycle, only with step"),
        (["--step-size", "1"], "--step-size has no effect with the schedule one-cycle, only with step"),
    ],
)
def test_a_flag_without_effect_gets_a_note(
    capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    answer = call(capsys, "train", *SMALL, "--epochs", "1", *flags)
    assert answer.status == 0
    assert next(line for line in answer.errors.splitlines() if line.startswith("note: ")).startswith(
        f"note: {words}"
    )


def test_flags_with_effect_get_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    used = ["--optimizer", "sgd", "--momentum", "0.8", "--nesterov", "--schedule", "step", "--gamma", "0.5"]
    assert "no effect" not in call(capsys, "train", *SMALL, *used, "--step-size", "1").errors
    assert "no effect" not in call(capsys, "train", *SMALL, "--overwrite", "--no-nesterov").errors
