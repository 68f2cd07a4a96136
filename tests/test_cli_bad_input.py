"""Whatever is wrong with what the command line is given: one line that says it, exit status 2, no traceback."""

from __future__ import annotations

import errno
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from PIL import Image

import gpucnn.cli
from gpucnn import training
from gpucnn.cli import main
from gpucnn.cli.report import note
from gpucnn.cli.streams import LastingErrors
from tests.cli_cases import SMALL, call, call_process, idx_bytes, striped, write_idx, write_images

PETS = ("--data", "pets", "--model", "lenet5", "--image-size", "12", "--epochs", "1", "--output", "run")


@pytest.fixture(autouse=True)
def _work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("GPUCNN_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPUCNN_DATA", str(write_idx(tmp_path / "data")))


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail as every bad input does; returns its one line."""

    def run(*arguments: object) -> str:
        answer = call(capsys, *arguments)
        last = answer.errors.splitlines()[-1]
        assert answer.status == 2, answer.errors
        assert last.startswith("gpucnn: error: ")
        assert "Traceback" not in answer.errors
        assert answer.output == ""
        return last

    return run


def refuse_pets(refuse: Callable[..., str], *more: object) -> str:
    message = refuse("train", *PETS, *more)
    assert not Path("run").exists()  # a run that cannot start leaves nothing behind
    return message


# ---------------------------------------------------------------- folders of images


def test_missing_folder(refuse: Callable[..., str]) -> None:
    assert "image folder pets/none does not exist" in refuse("train", *PETS, "--data", "pets/none")
    assert f"image folder {Path.cwd() / 'gone'} does not exist" in refuse(
        "train", *PETS, "--data", "folder", "--data-dir", "gone"
    )


def test_empty_folder(refuse: Callable[..., str]) -> None:
    Path("pets").mkdir()
    assert "pets is empty; put each class's images into a subfolder" in refuse_pets(refuse)


def test_class_without_images(refuse: Callable[..., str]) -> None:
    write_images(Path("pets"))
    Path("pets/cat").mkdir()
    assert "class 'cat' has no images: " in refuse_pets(refuse)


def test_truncated_jpeg(refuse: Callable[..., str]) -> None:
    write_images(Path("pets"))
    pixels = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save("whole.jpg")
    content = Path("whole.jpg").read_bytes()
    Path("pets/above/cut.jpg").write_bytes(content[: len(content) // 2])
    Path("pets/below/cut.jpg").write_bytes(content[:700])
    message = refuse_pets(refuse)
    assert "2 of 22 images in " in message  # both are named, before anything is trained
    assert "above/cut.jpg is damaged or cut short" in message
    assert "below/cut.jpg is damaged or cut short" in message


def test_text_named_png(refuse: Callable[..., str]) -> None:
    write_images(Path("pets"))
    Path("pets/below/notes.png").write_text("buy milk\n")
    assert "below/notes.png is a text file, not an image" in refuse_pets(refuse)


def test_grey_image_in_a_colour_set(refuse: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    write_images(Path("pets"))
    Image.fromarray(striped(1, 40, 0)[0][0]).save("pets/above/grey.png")
    message = refuse_pets(refuse)
    assert "above/grey.png is a grey image in a set of colour ones (1 of 21 are grey)" in message
    assert "--convert-grey" in message
    assert call(capsys, "train", *PETS, "--convert-grey").status == 0


# ---------------------------------------------------------------- IDX files


def test_idx_with_the_wrong_magic(refuse: Callable[..., str]) -> None:
    file = Path("data/train-images-idx3-ubyte")
    file.write_bytes(b"\x00\x00\x0d\x03" + file.read_bytes()[4:])
    message = refuse("train", *SMALL)
    assert "train-images-idx3-ubyte is no IDX file" in message
    assert "it begins with 0x00000d03, expected the magic number 0x00000803" in message


def test_idx_with_the_wrong_length(refuse: Callable[..., str]) -> None:
    file = Path("data/t10k-labels-idx1-ubyte")
    file.write_bytes(file.read_bytes()[:-1])
    message = refuse("train", *SMALL)
    assert (
        "t10k-labels-idx1-ubyte has the wrong length: 23 bytes, but its header announces (16,), 24 bytes"
        in message
    )


def test_labels_out_of_range(refuse: Callable[..., str]) -> None:
    labels = numpy.full(16, 7, numpy.uint8)
    Path("data/t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    assert "label 7 of image 0 is out of range: with 2 classes labels go from 0 to 1" in refuse("train", *SMALL)


# ---------------------------------------------------------------- names


def test_unknown_model(refuse: Callable[..., str]) -> None:
    assert "unknown model 'lenet4'; did you mean 'lenet5'?" in refuse("train", *SMALL, "--model", "lenet4")


def test_unknown_data(refuse: Callable[..., str]) -> None:
    assert "unknown data set 'mnits'; did you mean 'mnist'?" in refuse("train", *SMALL, "--data", "mnits")


def test_unknown_augmentation(refuse: Callable[..., str]) -> None:
    assert "did you mean 'flip'?" in refuse("train", *SMALL, "--augment", "flap")


def test_unknown_option_command_and_key(refuse: Callable[..., str]) -> None:
    assert "did you mean '--epochs'?" in refuse("train", "--epoch", "3")
    assert "did you mean 'train'?" in refuse("tarin")
    Path("c.toml").write_text("learning-rate = 3")
    assert "c.toml: unknown option 'learning-rate'" in refuse("train", "--config", "c.toml")
    Path("c.toml").write_text("lr = ")
    assert "c.toml is not valid TOML" in refuse("train", "--config", "c.toml")
    Path("c.toml").write_text('epochs = "many"')
    expected = "c.toml: epochs: expected a whole number of at least 1, got 'many'"
    assert expected in refuse("train", "--config", "c.toml")


def test_bad_numbers(refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--batch-size: expected a whole number of at least 1, got '-3'" in refuse("train", "--batch-size", "-3")
    assert "--lr: expected a number above 0, got 'inf'" in refuse("train", "--lr", "inf")
    assert "leave nothing to train on" in refuse("train", "--validation-fraction", "0.5", "--test-fraction", "0.5")
    monkeypatch.setenv("GPUCNN_SEED", "x")
    assert "GPUCNN_SEED: expected a whole number" in refuse("train")


# ---------------------------------------------------------------- networks that do not fit


def test_kernel_larger_than_the_padded_image(refuse: Callable[..., str]) -> None:
    write_images(Path("pets"))
    message = refuse_pets(refuse, "--model", "animalnet", "--image-size", "16")
    assert "images of 16x16 are too small for animalnet, which needs at least" in message


def test_batch_of_one_through_batch_norm(refuse: Callable[..., str]) -> None:
    write_images(Path("pets"))
    message = refuse("train", *PETS, "--model", "animalnet", "--image-size", "63", "--batch-size", "1")
    assert "batch" in message
    assert "one" in message or "1" in message
    assert "layer '" in message


def test_device_without_a_gpu(refuse: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refuse("train", *SMALL, "--device", "cuda")
    assert "device 'cuda' cannot be used: " in message
    assert "this version of gpucnn has no CUDA operations yet" in message or "CuPy" in message
    assert call(capsys, "train", *SMALL).status == 0
    assert "device 'cuda' cannot be used: " in refuse("evaluate", "run", "--device", "cuda")
    assert "device 'cuda' cannot be used: " in refuse("predict", "run", "x.png", "--device", "cuda")


def test_loss_that_is_not_finite(refuse: Callable[..., str]) -> None:
    message = refuse("train", *SMALL, "--lr", "1e30", "--optimizer", "sgd", "--schedule", "constant")
    assert "became" in message
    assert "the checkpoint of step" in message
    assert Path("run/last.safetensors").exists()


# ---------------------------------------------------------------- checkpoints


def test_no_run(refuse: Callable[..., str]) -> None:
    assert "there is no checkpoint nowhere" in refuse("evaluate", "nowhere")
    Path("empty").mkdir()
    assert "empty is a folder without a checkpoint" in refuse("predict", "empty", "x.png")


def test_checkpoint_of_another_model(refuse: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "train", *SMALL).status == 0
    best = training.read_checkpoint(Path("run/best.safetensors"))
    best.architecture = {"name": "vgg-small", "num_classes": 2, "in_channels": 1, "image_size": 28}
    training.write_checkpoint(Path("run/best.safetensors"), best)
    message = refuse("evaluate", "run")
    assert "is of another model: the state does not fit VGGSmall; missing: " in message
    # and a run of another model in the place of the one to resume
    other = [*SMALL, "--model", "vgg-small", "--width", "4", "--image-size", "16", "--output", "other"]
    assert call(capsys, "train", *other).status == 0
    Path("run/last.safetensors").write_bytes(Path("other/last.safetensors").read_bytes())
    message = refuse("train", "--resume", "run")
    assert "is a checkpoint of 'vgg-small'" in message
    assert "the model is 'lenet5'" in message


def test_truncated_checkpoint(refuse: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "train", *SMALL).status == 0
    for name in ("best", "last"):
        file = Path(f"run/{name}.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
    assert "best.safetensors is not a checkpoint, or it is truncated" in refuse("evaluate", "run")
    assert "last.safetensors is not a checkpoint, or it is truncated" in refuse("train", "--resume", "run")


def test_images_to_predict_that_are_none(refuse: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "train", *SMALL).status == 0
    assert "gone.png cannot be read: " in refuse("predict", "run", "gone.png")
    Path("text.png").write_text("hello\n")
    assert "text.png is a text file, not an image" in refuse("predict", "run", "text.png")


# ---------------------------------------------------------------- disks


def test_output_that_cannot_be_written(refuse: Callable[..., str]) -> None:
    Path("file").write_text("")
    message = refuse("train", *SMALL, "--output", "file/run")
    assert "cannot write file/run: " in message
    assert "part of the path is a file" in message
    message = refuse("train", *SMALL, "--output", "file")
    assert "file" in message


@pytest.mark.parametrize("writes", [0, 1, 2, 4, 7])
def test_full_disk(refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """The disk fills up as the first, the second, ... file of the run is written."""
    fsync, done = os.fsync, []

    def full(descriptor: int) -> None:
        if len(done) >= writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = refuse("train", *SMALL, "--checkpoint-steps", "1")
    assert "cannot write run" in message
    assert "No space left on device: the disk is full; free some space or choose another folder" in message
    assert list(Path().glob("run/.*")) == []
    assert Path("run").exists() == (writes > 0)  # a folder that nothing was written to goes again


def test_other_trouble_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, words in (
        (PermissionError(errno.EACCES, "Permission denied", "secret.bin"), "secret.bin: Permission denied"),
        (OSError("odd"), "odd"),
        (MemoryError("1 TiB"), "not enough memory (1 TiB); take a smaller --batch-size or --image-size"),
    ):

        def fail(*arguments: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("gpucnn.cli.info.run", fail)
        answer = call(capsys, "info")
        assert answer.status == 2
        assert answer.errors == f"gpucnn: error: {words}\n"

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gpucnn.cli.info.run", interrupt)
    answer = call(capsys, "info")
    assert (answer.status, answer.errors) == (130, "\ninterrupted\n")


def test_a_closed_output_ends_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def close(*arguments: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("gpucnn.cli.info.run", close)
    with (tmp_path / "output").open("w") as output:
        monkeypatch.setattr(gpucnn.cli.sys, "stdout", output)
        assert main(["info"]) == 1


def test_the_module_is_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpucnn", "tarin"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("gpucnn", run_name="__main__")
    assert caught.value.code == 2
    assert "unknown command 'tarin'" in capsys.readouterr().err


def test_the_process_ends_with_the_status(tmp_path: Path) -> None:
    process = call_process(tmp_path, "train", "--data", "mnits")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors.startswith("gpucnn: error: unknown data set 'mnits'")
    assert len(errors.splitlines()) == 1


def test_decode_size_below_the_image_size(refuse: Callable[..., str]) -> None:
    write_images(Path("pets"))
    message = refuse_pets(refuse, "--decode-size", "8")
    assert "--decode-size: expected at least the image size, 12, got 8" in message


def test_a_run_inside_its_images(
    refuse: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pets = write_images(Path("pets")).resolve()
    unnamed = [argument for argument in PETS if argument not in ("--output", "run")]
    for arguments in (["--output", "pets/run"], ["--data", "folder", "--data-dir", "pets", "--output", "pets"]):
        message = refuse("train", *PETS, *arguments)
        assert f"would lie inside the data folder {pets}" in message
        assert "choose a folder elsewhere with --output" in message
    monkeypatch.chdir(pets)
    message = refuse("train", *unnamed, "--data", ".")
    assert f"the run's folder {Path('runs/pets-lenet5')} would lie inside the data folder {pets}" in message
    assert sorted(path.name for path in pets.iterdir()) == ["above", "below"]
    assert call(capsys, "train", *unnamed, "--data", ".", "--output", "../run").status == 0


def test_a_closed_standard_error_changes_no_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in ``gpucnn train 2>&1 | tee`` ends the reader first; 2>&- leaves no stream at all."""

    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            raise OSError("a stand-in")

    def interrupt(*arguments: object) -> None:
        note("before")
        assert LastingErrors().write("progress\n") == 9
        raise KeyboardInterrupt

    monkeypatch.setattr("gpucnn.cli.info.run", interrupt)
    for stream in (Closed(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["info"]) == 130
        assert main(["tarin"]) == 2


def test_interrupted_with_both_outputs_in_a_closed_pipe(tmp_path: Path) -> None:
    process = call_process(tmp_path, "train", *SMALL, "--epochs", "100000", GPUCNN_DATA=str(tmp_path / "data"))
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch "):
            break
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "run/last.safetensors").exists()


def test_without_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as >&- leaves it
    assert main(["info"]) == 0


def test_results_are_written_before_they_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*arguments: object, **options: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("gpucnn.cli.results.print", closed, raising=False)
    assert main(["train", *SMALL]) == 1
    for name in ("summary.json", "curves.png", "confusion.png"):
        assert Path("run", name).exists()
