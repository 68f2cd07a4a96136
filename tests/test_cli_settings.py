"""Options: what each takes, and who wins where flag, environment and config file differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpucnn.cli.options import OPTIONS, TRAIN_OPTIONS, Option, convert, known_names
from gpucnn.cli.parser import build_parser, parse
from gpucnn.cli.recipes import PAIRS, RECIPES, with_recipe
from gpucnn.cli.settings import Settings, resolve
from gpucnn.errors import ArgumentError


def settings_for(
    *argv: str, environment: dict[str, str] | None = None, file: str = "", folder: Path | None = None
) -> Settings:
    arguments = ["train", *argv]
    if folder is not None:
        (folder / "c.toml").write_text(file, encoding="utf-8")
        arguments += ["--config", str(folder / "c.toml")]
    _, options, flags, _ = parse(arguments)
    return resolve(options, flags, environment or {})


def option(name: str) -> Option:
    return next(candidate for candidate in TRAIN_OPTIONS if candidate.name == name)


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file, variables = "epochs = 3\n", {"GPUCNN_EPOCHS": "4"}
    by_all = settings_for("--epochs", "5", environment=variables, file=file, folder=tmp_path)
    assert (by_all["epochs"], by_all.source("epochs")) == (5, "--epochs")
    by_two = settings_for(environment=variables, file=file, folder=tmp_path)
    assert (by_two["epochs"], by_two.source("epochs")) == (4, "GPUCNN_EPOCHS")
    by_file = settings_for(file=file, folder=tmp_path)
    assert by_file["epochs"] == 3
    assert by_file.source("epochs").endswith("c.toml: epochs")
    assert settings_for()["epochs"] is None
    assert settings_for()["batch-size"] == 64
    assert settings_for(environment={"GPUCNN_EPOCHS": ""})["epochs"] is None


def test_the_environment_names_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("lr = 0.5")
    assert settings_for(environment={"GPUCNN_CONFIG": str(tmp_path / "c.toml")})["lr"] == 0.5


def test_data_has_variables_of_its_own() -> None:
    found = settings_for(environment={"GPUCNN_DATA": "/some/where", "GPUCNN_DATASET": "mnist", "GPUCNN_LR": "0.1"})
    assert (found["data-dir"], found["data"], found["lr"]) == ("/some/where", "mnist", 0.1)


def test_every_option_can_come_from_every_source(tmp_path: Path) -> None:
    """Each option by flag, variable and file with the same text or value, for the same result."""
    examples: dict[str, tuple[list[str], Any]] = {
        "data": (["mnist"], "mnist"), "data-dir": (["/d"], "/d"), "validation-fraction": (["0.3"], 0.3),
        "test-fraction": (["0.2"], 0.2), "augment": (["flip"], "flip"), "model": (["vgg-small"], "vgg-small"),
        "model-option": (["stages=2"], {"stages": 2}), "width": (["8"], 8), "image-size": (["32"], 32),
        "decode-size": (["40"], 40),
        "epochs": (["7"], 7), "batch-size": (["16"], 16), "optimizer": (["sgd"], "sgd"), "lr": (["1e-3"], 1e-3),
        "momentum": (["0.5"], 0.5), "weight-decay": (["0.1"], 0.1), "schedule": (["cosine"], "cosine"),
        "warmup-epochs": (["0.5"], 0.5), "step-size": (["2.5"], 2.5), "gamma": (["0.2"], 0.2),
        "label-smoothing": (["0.1"], 0.1), "class-weights": (["1,2.5"], [1.0, 2.5]), "clip-norm": (["2"], 2.0),
        "ema": (["0.99"], 0.99), "early-stopping": (["3"], 3), "monitor": (["loss"], "loss"), "seed": (["9"], 9),
        "precision": (["float64"], "float64"), "capture": (["off"], "off"),
        "output": (["/o"], "/o"), "resume": (["/r"], "/r"),
        "checkpoint-seconds": (["5"], 5.0), "checkpoint-steps": (["50"], 50), "device": (["cpu"], "cpu"),
        "workers": (["3"], 3),
    }  # fmt: skip
    for switch in (entry for entry in TRAIN_OPTIONS if entry.is_switch):
        assert settings_for(f"--{switch.name}")[switch.name] is True
        assert settings_for(f"--no-{switch.name}")[switch.name] is False
        assert settings_for(environment={switch.environment: "yes"})[switch.name] is True
        assert settings_for(file=f"{switch.key} = true", folder=tmp_path)[switch.name] is True
    assert set(examples) == {entry.name for entry in TRAIN_OPTIONS if not entry.is_switch} - {"config"}
    for name, (texts, expected) in examples.items():
        assert settings_for(f"--{name}", *texts)[name] == expected
        assert settings_for(environment={option(name).environment: texts[0]})[name] == expected
        written = "{ stages = 2 }" if isinstance(expected, dict) else json.dumps(expected)
        assert settings_for(file=f"{name} = {written}", folder=tmp_path)[name] == expected


def test_model_options_add_up_and_keep_their_types() -> None:
    found = settings_for("--model-option", "stem=small", "--model-option", "width=16,dropout=0.5,zero-init=true")
    assert found["model-option"] == {"stem": "small", "width": 16, "dropout": 0.5, "zero_init": True}


def test_none_switches_off_what_a_file_switched_on(tmp_path: Path) -> None:
    found = settings_for("--clip-norm", "none", file="clip-norm = 1.0", folder=tmp_path)
    assert found["clip-norm"] is None
    assert found.source("clip-norm") == "--clip-norm"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", "0", "whole number of at least 1, got '0'"),
        ("epochs", "two", "whole number of at least 1, got 'two'"),
        ("epochs", "1.5", "whole number of at least 1, got '1.5'"),
        ("epochs", True, "whole number of at least 1, got True"),
        ("epochs", 2.0, "whole number of at least 1, got 2.0"),
        ("seed", str(2**64), "at most 18446744073709551615"),
        ("lr", "nan", "a number above 0, got 'nan'"),
        ("lr", "0", "a number above 0, got '0'"),
        ("lr", "fast", "a number above 0, got 'fast'"),
        ("lr", False, "a number above 0, got False"),
        ("lr", [1], "a number above 0, got [1]"),
        ("lr", 10**400, "a number above 0, got 1000"),
        ("momentum", "1", "at least 0 and below 1, got '1'"),
        ("weight-decay", "-1", "a number at least 0, or none, got '-1'"),
        ("optimizer", "adamm", "unknown optimizer 'adamm'; did you mean 'adam'?"),
        ("schedule", 3, "unknown schedule 3"),
        ("device", "gpu", "unknown device 'gpu'; did you mean 'cpu'?"),
        ("nesterov", "maybe", "expected true or false, got 'maybe'"),
        ("data", "", "expected a text, got ''"),
        ("data", 5, "expected a text, got 5"),
        ("class-weights", "1,x", "'balanced', or one number a class with commas between them, or none, got '1,x'"),
        ("class-weights", 4, "'balanced', or one number a class"),
        ("class-weights", "-1,2", "'balanced', or one number a class"),
        ("model-option", "width", "expected KEY=VALUE, got 'width'"),
        ("model-option", [3], "expected KEY=VALUE, got [3]"),
    ],
)
def test_a_bad_value_names_its_source_and_what_was_expected(name: str, value: object, words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        convert(option(name), value, "the source")
    assert str(caught.value).startswith("the source: ")
    assert words in str(caught.value)


def test_a_path_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(option("output"), "~/x", "--output") == str(tmp_path / "x")
    with pytest.raises(ArgumentError, match=r"--output: expected a path \("):
        convert(option("output"), "~nobody-of-this-name/x", "--output")


def test_an_unknown_key_in_the_file_gets_its_nearest_match(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"c\.toml: unknown option 'epoch'; did you mean 'epochs'\?"):
        settings_for(file="epoch = 3", folder=tmp_path)


def test_a_file_of_another_command_is_fine(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("epochs = 3\nbatch_size = 5\ntop = 2\n")
    _, options, flags, _ = parse(["predict", "run", "image.png", "--config", str(tmp_path / "c.toml")])
    found = resolve(options, flags, {})
    assert (found["batch-size"], found["top"]) == (5, 2)
    assert "epochs" not in found.names()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.toml", b"epochs = = 3", "is not valid TOML: "),
        ("c.toml", b"\xff\xfe", "is not UTF-8 text"),
        ("c.json", b"{}", "is not the config.json of a run"),
        ("c.json", b"[", "is not the config.json of a run"),
        ("c.json", b"[]", "is not the config.json of a run"),
    ],
)
def test_an_unreadable_file_is_said_to_be_one(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError, match=words):
        resolve(TRAIN_OPTIONS, {"config": str(tmp_path / name)}, {})
    with pytest.raises(ArgumentError, match="cannot read the config file"):
        resolve(TRAIN_OPTIONS, {"config": str(tmp_path / "absent.toml")}, {})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tain"], "unknown command 'tain'; did you mean 'train'?"),
        (["train", "--epoch", "3"], "unknown option of gpucnn train '--epoch'; did you mean '--epochs'?"),
        (["train", "--batchsize=3"], "unknown option of gpucnn train '--batchsize'; did you mean '--batch-size'?"),
        (["train", "digits"], "unexpected argument 'digits'; see gpucnn train --help"),
        (["train", "--epochs"], "argument --epochs: expected one argument"),
        (["predict", "run"], "the following arguments are required: IMAGE"),
        ([], "required"),
    ],
)
def test_what_the_parser_does_not_know_is_one_error(argv: list[str], words: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(argv)
    assert words in str(caught.value)


def test_help_and_version_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for command, options in OPTIONS.items():
        with pytest.raises(SystemExit) as caught:
            parse([command, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert [entry.name for entry in options if f"--{entry.name}" not in text] == []
    with pytest.raises(SystemExit):
        parse(["--version"])
    assert capsys.readouterr().out.startswith("gpucnn ")


def test_defaults_of_the_table_are_values_that_the_option_takes() -> None:
    for entry in TRAIN_OPTIONS:
        if entry.default not in (None, {}):
            assert convert(entry, entry.default, "default") == entry.default
    for recipe in RECIPES.values():
        assert {name: convert(option(name), value, "recipe") for name, value in recipe.items()} == recipe
    assert "json" not in known_names()


def test_a_recipe_gives_way_to_whatever_was_asked_for() -> None:
    found = with_recipe(settings_for("--lr", "0.3"))
    assert (found["data"], found["model"], found["lr"]) == ("digits", "lenet5", 0.3)
    assert found["epochs"] == RECIPES["digits"]["epochs"]
    assert found.source("epochs") == "default for digits"
    folder = with_recipe(settings_for("--data", "some/pictures"))
    assert (folder["model"], folder["data"]) == (RECIPES["folder"]["model"], "some/pictures")
    pair = with_recipe(settings_for("--data", "fashion-mnist", "--model", "vgg-small"))
    assert pair["label-smoothing"] == PAIRS["fashion-mnist", "vgg-small"]["label-smoothing"]
    folder = with_recipe(settings_for("--data", "p", "--model", "vgg-small", "--model-option", "dropout=0.5"))
    assert folder["model-option"] == {"stem": "strided", "dropout": 0.5}


def test_every_command_has_a_parser() -> None:
    assert set(build_parser()[1]) == set(OPTIONS)


def test_a_variable_that_nothing_reads_gets_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    variables = {"GPUCNN_EPOCH": "3", "GPUCNN_NUM_THREADS": "2", "GPUCNN_TOP": "2", "GPUCNN_KERNELS_RUNTIME": "x"}
    settings_for(environment=variables | {"GPUCNNX": "1"})
    captured = capsys.readouterr()
    assert captured.err == "gpucnn: note: the variable GPUCNN_EPOCH has no effect; did you mean GPUCNN_EPOCHS?\n"
    settings_for(environment={"GPUCNN_ZZZZZZZZZZZZZZZZZZZZ": "1"})
    assert capsys.readouterr().err == "gpucnn: note: the variable GPUCNN_ZZZZZZZZZZZZZZZZZZZZ has no effect\n"
    settings_for("--quiet", environment=variables)
    assert capsys.readouterr().err == ""


def test_a_recipes_decode_size_gives_way_to_a_larger_image_size() -> None:
    pictures = ("--data", "p", "--model", "vgg-small", "--image-size")
    assert with_recipe(settings_for(*pictures, "96"))["decode-size"] == 128
    assert with_recipe(settings_for(*pictures, "160"))["decode-size"] is None
    assert with_recipe(settings_for(*pictures, "160", "--decode-size", "100"))["decode-size"] == 100
