"""``gpucnn evaluate``, ``predict`` and ``info``, on runs that the tests have trained."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

import gpucnn
from gpucnn import models, training
from gpucnn.cli.predict import most_probable
from tests.cli_cases import SMALL, call, striped, write_idx, write_images

PETS = (
    "--data", "pets", "--model", "lenet5", "--image-size", "16", "--epochs", "6", "--batch-size", "4",
    "--lr", "0.003", "--augment", "none", "--workers", "0", "--output", "pets-run",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two data sets and a run on each: "run" on grey IDX files, "pets-run" on colour pictures."""
    folder = tmp_path_factory.mktemp("trained")
    write_idx(folder / "data")
    write_images(folder / "pets", count=12)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("GPUCNN_")]:
            patch.delenv(name)
        patch.chdir(folder)
        assert gpucnn.cli.main(["train", *SMALL, "--epochs", "8", "--data-dir", "data", "--quiet"]) == 0
        assert gpucnn.cli.main(["train", *PETS, "--quiet"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _work(monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    for name in [name for name in os.environ if name.startswith("GPUCNN_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(trained)


def summary(run: str) -> Any:
    return json.loads(Path(run, "summary.json").read_text())


def test_evaluate_finds_the_runs_own_data_and_the_same_result(capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, "evaluate", "run")
    assert answer.status == 0
    assert f"test accuracy {summary('run')['evaluation']['accuracy']:.4f}" in answer.output
    assert "data: mnist: 36 train, 12 validation, 16 test" in answer.errors
    assert "device: cpu" in answer.errors
    found = json.loads(call(capsys, "evaluate", "run", "--json").output)
    expected = summary("run")["evaluation"]
    assert found["confusion"] == expected["confusion"]
    assert abs(found["loss"] - expected["loss"]) <= 1e-6
    assert (found["split"], found["model"]) == ("test", "lenet5")


def test_evaluate_other_parts_and_other_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = json.loads(call(capsys, "evaluate", "run", "--json", "--split", "validation").output)
    assert found["images"] == 12
    found = json.loads(call(capsys, "evaluate", "pets-run", "--json").output)
    assert found["split"] == "validation"  # there is no test part
    answer = call(capsys, "evaluate", "pets-run", "--split", "test")
    assert answer.status == 2
    assert "'pets' has no test part; choose one of train, validation" in answer.errors
    other = write_idx(tmp_path / "other", test=20)
    found = json.loads(call(capsys, "evaluate", "run", "--json", "--data-dir", other).output)
    assert found["images"] == 20
    others = write_images(tmp_path / "others", count=6)
    found = json.loads(call(capsys, "evaluate", "pets-run", "--data", others, "--split", "train", "--json").output)
    assert found["data"] == "others"
    assert found["accuracy"] >= 0.9


def test_evaluate_refuses_data_that_do_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = call(capsys, "evaluate", "run", "--data", "digits")
    assert answer.status == 2
    assert "knows the classes 0, 1 (2), but 'digits' has 0, 1, 2, 3, 4, 5, ... (10)" in answer.errors
    images, _ = striped(8, 16, 0)
    for number, image in enumerate(images):
        place = tmp_path / "grey" / ("above", "below")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    answer = call(capsys, "evaluate", "pets-run", "--data", tmp_path / "grey")
    assert answer.status == 2
    assert "takes images of 3 channels, but those of 'grey' have 1" in answer.errors


def test_a_checkpoint_file_is_as_good_as_its_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole = json.loads(call(capsys, "evaluate", "run", "--json").output)
    file = json.loads(call(capsys, "evaluate", "run/best.safetensors", "--json").output)
    assert file == whole
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(Path("run/best.safetensors").read_bytes())
    answer = call(capsys, "evaluate", moved)
    assert answer.status == 2
    assert "does not say which data it was trained on; name the data set with --data" in answer.errors
    answer = call(capsys, "evaluate", moved, "--data", "mnist", "--data-dir", "data", "--json")
    assert json.loads(answer.output)["confusion"] == whole["confusion"]


def test_predict_tells_what_is_on_images(capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(str(path) for path in Path("pets").rglob("*.png"))
    answer = call(capsys, "predict", "pets-run", *files, "--json", "--batch-size", "5", "--top", "9")
    found = json.loads(answer.output)
    assert answer.errors == ""
    assert [entry["file"] for entry in found["predictions"]] == files
    right = 0
    for entry in found["predictions"]:
        names = [choice["class"] for choice in entry["classes"]]
        shares = [choice["probability"] for choice in entry["classes"]]
        assert sorted(names) == ["above", "below"]
        assert shares == sorted(shares, reverse=True)
        assert abs(sum(shares) - 1) <= 1e-5
        right += names[0] == Path(entry["file"]).parent.name
    assert right >= 0.9 * len(files)
    text = call(capsys, "predict", "pets-run", files[0], "--top", "1")
    best = found["predictions"][0]["classes"][0]
    assert text.output.splitlines() == [files[0], f"  {best['class']}  {best['probability']:7.2%}"]


def test_predict_agrees_with_the_python_interface(capsys: pytest.CaptureFixture[str]) -> None:
    file = sorted(Path("pets").rglob("*.png"))[0]
    found = json.loads(call(capsys, "predict", "pets-run", file, "--json").output)
    model = models.load("pets-run")
    image = numpy.asarray(Image.open(file).resize((16, 16), Image.Resampling.BILINEAR))
    probabilities = dict(zip(model.classes, model.predict(image)[0].tolist(), strict=True))
    for entry in found["predictions"][0]["classes"]:
        assert abs(probabilities[entry["class"]] - entry["probability"]) <= 1e-5


def test_predict_wants_colour_where_it_was_trained_on_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    grey = tmp_path / "grey.png"
    Image.fromarray(striped(1, 20, 0)[0][0]).save(grey)
    answer = call(capsys, "predict", "pets-run", grey)
    assert answer.status == 2
    assert f"{grey} is a grey image, and the network was trained on colour; --convert-grey" in answer.errors
    assert call(capsys, "predict", "pets-run", grey, "--convert-grey").status == 0
    assert call(capsys, "predict", "run", grey).status == 0
    colour = next(Path("pets").rglob("*.png"))
    assert call(capsys, "predict", "run", colour).status == 0  # a grey network sees colour as grey


@pytest.mark.parametrize(("source_size", "read_at"), [([24, 24], (24, 24)), ([8, 20], (8, 20)), (None, (16, 16))])
def test_images_are_read_at_the_size_of_the_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, source_size: list[int] | None, read_at: tuple[int, int]
) -> None:
    """By predict and by evaluate, from a bare file and from a run's folder; old files do not say the size."""
    best = training.read_checkpoint(Path("pets-run/best.safetensors"))
    best.data = {name: value for name, value in best.data.items() if name != "source_size"}
    if source_size is not None:
        best.data["source_size"] = source_size
    run, file = tmp_path / "run", tmp_path / "bare.safetensors"
    run.mkdir()
    (run / "config.json").write_bytes(Path("pets-run/config.json").read_bytes())
    training.write_checkpoint(run / "best.safetensors", best)
    training.write_checkpoint(file, best)
    pictures = sorted(Path("pets").rglob("*.png"))[:3]
    model = models.load(file)
    expected = []
    for picture in pictures:  # the square pictures' middle in the box of that shape, as the data page says
        image, (height, width) = Image.open(picture), read_at
        share = min(width, height) / max(width, height) * 40
        box = (0, (40 - share) / 2, 40, (40 + share) / 2) if width > height else (0, 0, 40, 40)
        small = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        expected.append(dict(zip(model.classes, model.predict(numpy.asarray(small))[0].tolist(), strict=True)))
    for source in (run, file):
        found = json.loads(call(capsys, "predict", source, *pictures, "--json").output)["predictions"]
        for entry, shares in zip(found, expected, strict=True):
            for choice in entry["classes"]:
                assert abs(shares[choice["class"]] - choice["probability"]) <= 1e-5
    shown = call(capsys, "evaluate", run, "--data", "pets")
    assert f"images of {read_at[0]}x{read_at[1]}x3" in shown.errors
    if source_size is not None:
        shown = call(capsys, "evaluate", file, "--data", "pets")
        assert f"images of {read_at[0]}x{read_at[1]}x3" in shown.errors


def test_most_probable_keeps_the_order_of_equals() -> None:
    shares = numpy.array([0.25, 0.5, 0.25])
    assert most_probable(shares, ["a", "b", "c"], 3) == [("b", 0.5), ("a", 0.25), ("c", 0.25)]
    assert most_probable(shares, ["a", "b", "c"], 1) == [("b", 0.5)]


def test_what_the_registry_does_not_know_is_left_to_python(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    best = training.read_checkpoint(Path("run/best.safetensors"))
    file = tmp_path / "x.safetensors"
    best.architecture = {"name": "lenet6"}
    training.write_checkpoint(file, best)
    answer = call(capsys, "evaluate", file)
    assert answer.status == 2
    assert "of a model that gpucnn has not: unknown model 'lenet6'; did you mean 'lenet5'?" in answer.errors
    best.architecture = None
    training.write_checkpoint(file, best)
    assert "does not say how to build its model" in call(capsys, "evaluate", file).errors


def test_info_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, "info", "--data-dir", "data")
    assert answer.status == 0
    for words in ("device    cpu (auto: ", "CUDA      not usable: ", "resnet50", "23,528,522", "NumPy", "BLAS"):
        assert words in answer.output
    found = json.loads(call(capsys, "info", "--json", "--data-dir", "data").output)
    assert found["gpucnn"] == gpucnn.__version__
    assert found["device"]["name"] == "cpu"
    assert found["cuda"]["usable"] is False
    assert found["data"]["mnist"] == {"found": True, "detail": "found: 44 train, 4 validation, 16 test"}
    assert found["data"]["cifar10"]["found"] is False
    assert found["data"]["cifar10"]["detail"].endswith("or give its folder as --data-dir")
    assert [entry["name"] for entry in found["models"]] == list(models.available())
    assert found["threads"] >= 1


def test_info_says_what_would_be_downloaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = json.loads(call(capsys, "info", "--json").output)["data"]
    assert found["mnist"] == {"found": False, "detail": "not here; `gpucnn train --data mnist` downloads it"}
    file = tmp_path / "gpucnn" / "train-images-idx3-ubyte"
    file.parent.mkdir()
    file.write_bytes(b"")
    found = json.loads(call(capsys, "info", "--json").output)["data"]
    assert "lacks" in found["mnist"]["detail"]  # a download would not mend it


def test_info_tells_why_a_device_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    answer = call(capsys, "info", "--device", "cuda")
    assert answer.status == 0
    assert "device    none (device 'cuda' cannot be used: " in answer.output
