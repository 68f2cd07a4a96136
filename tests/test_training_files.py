"""Files of a run: written whole or not at all, read with clear errors."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy

from gpucnn.errors import ArgumentError, CheckpointError, StorageError
from gpucnn.training import (
    Checkpoint,
    EpochRecord,
    History,
    Position,
    RunFolder,
    read_checkpoint,
    read_tensors,
    write_checkpoint,
    write_tensors,
)
from gpucnn.training.storage import atomic_file, make_folder, read_json, sync_folder, write_json


def record(epoch: int, loss: float | None = 0.5, accuracy: float | None = 0.75) -> EpochRecord:
    return EpochRecord(epoch, 10 * epoch, 1e-3, 0.4, 0.8, loss, accuracy, 1.5, 100.0)


# ---------------------------------------------------------------- storage


def test_a_file_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_while_writing_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")

    def write_half() -> None:
        with atomic_file(path) as file:
            file.write(b"after")
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_half()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def disk_is_full(path: Path) -> None:
    """Let the next write to ``path`` find no space: its temporary name leads to the device that is always full."""
    path.with_name(f".{path.name}.part").symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_a_full_disk_is_a_storage_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    disk_is_full(path)
    with (
        pytest.raises(
            StorageError, match=r"cannot write .*a\.bin: No space left on device: the disk is full"
        ) as caught,
        atomic_file(path) as file,
    ):
        file.write(b"x" * 100_000)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_in_its_middle_removes_the_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": numpy.arange(3)})
    before = path.read_bytes()
    resource = pytest.importorskip("resource", reason="limits the size of files, on POSIX systems")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*w\.safetensors: File too large"):
            write_tensors(path, {"a": numpy.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_and_a_file_in_a_folders_place(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the folder does not exist; create it first"):
        write_json(tmp_path / "no" / "a.json", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file has that name"):
        make_folder(tmp_path / "file")
    with pytest.raises(StorageError, match="part of the path is a file"):
        make_folder(tmp_path / "file" / "below")
    sync_folder(tmp_path / "missing")  # nothing to sync is no error


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2.5, None]})
    assert read_json(path) == {"a": [1, 2.5, None]}
    with pytest.raises(CheckpointError, match=r"cannot read .*missing\.json"):
        read_json(tmp_path / "missing.json")
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(path)


# ---------------------------------------------------------------- tensors and checkpoints

TENSORS = {
    "float16": numpy.array([[1.5, -2.0]], numpy.float16),
    "float32": numpy.linspace(-1, 1, 7, dtype=numpy.float32),
    "float64": numpy.array(3.25),
    "strided": numpy.arange(24.0).reshape(4, 6)[::2, ::-3],
    "big endian": numpy.array([1.0, 2.0], ">f4"),
    "empty": numpy.zeros((0, 3), numpy.float32),
    "bool": numpy.array([True, False, True]),
    **{name: numpy.array([0, 1, 100], name) for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32")},
    "int64": numpy.array([-(2**63), 2**63 - 1]),
    "uint64": numpy.array([2**64 - 1], numpy.uint64),
}


def test_tensors_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, TENSORS, {"kind": "test"})
    ours, metadata = read_tensors(path)
    assert metadata == {"kind": "test"}
    for tensors in (ours, safetensors.numpy.load_file(path)):
        assert tensors.keys() == TENSORS.keys()
        for name, expected in TENSORS.items():
            assert tensors[name].shape == expected.shape
            assert tensors[name].dtype == expected.dtype.newbyteorder("=")
            assert numpy.array_equal(tensors[name], expected)


def test_tensors_that_the_library_wrote_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    safetensors.numpy.save_file({"a": numpy.arange(5.0)}, path)
    tensors, metadata = read_tensors(path)
    assert numpy.array_equal(tensors["a"], [0, 1, 2, 3, 4])
    assert metadata == {}


def test_a_dtype_that_no_checkpoint_holds_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'z' has dtype complex128"):
        write_tensors(tmp_path / "t.safetensors", {"z": numpy.zeros(2, complex)})


def a_checkpoint() -> Checkpoint:
    return Checkpoint(
        model={"conv.weight": numpy.arange(4, dtype=numpy.float32), "bn.count": numpy.array(7)},
        architecture={"name": "lenet5", "num_classes": 3},
        ema={"conv.weight": numpy.ones(4, numpy.float32)},
        optimizer={"momentum.0": numpy.array([0.1, 0.2]), "lr": numpy.array(0.1), "step": 12},
        options={"epochs": 3},
        data={"classes": ["a", "b", "c"]},
        position=Position(epoch=1, batch=2, step=12, loss_sum=1 / 3, correct=5, images=9, seconds=0.1),
        generators={"default": {"seed": 2**64 - 1, "offset": 2**40}},
        history=[record(1)],
        stopped_early=True,
    )


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path, written = tmp_path / "c.safetensors", a_checkpoint()
    write_checkpoint(path, written)
    found = read_checkpoint(path)
    for name in ("architecture", "options", "data", "position", "generators", "history", "stopped_early"):
        assert getattr(found, name) == getattr(written, name)
    assert numpy.array_equal(found.model["conv.weight"], [0, 1, 2, 3])
    assert found.model["bn.count"].shape == ()
    assert found.model["bn.count"] == 7
    assert numpy.array_equal(found.optimizer["momentum.0"], [0.1, 0.2])
    assert found.optimizer["lr"] == 0.1
    assert found.optimizer["step"] == 12
    assert numpy.array_equal(found.evaluation_state["conv.weight"], [1, 1, 1, 1])
    assert found.evaluation_state["bn.count"] == 7
    assert found.classes == ["a", "b", "c"]


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_checkpoint(tmp_path: Path, size: int) -> None:
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, a_checkpoint())
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"c\.safetensors is not a checkpoint, or it is truncated"):
        read_checkpoint(path)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*c\.safetensors; check the path"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="it is a folder"):
        read_checkpoint(tmp_path)
    path.write_bytes(b"PNG or something else entirely")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        read_checkpoint(path)
    safetensors.numpy.save_file({"a": numpy.arange(5.0)}, path)
    with pytest.raises(CheckpointError, match="a safetensors file but not a gpucnn checkpoint"):
        read_checkpoint(path)
    write_tensors(path, {}, {"format": "gpucnn-checkpoint", "version": "99"})
    with pytest.raises(CheckpointError, match="format version 99, this gpucnn reads version 1"):
        read_checkpoint(path)
    write_tensors(path, {}, {"format": "gpucnn-checkpoint", "version": "1", "gpucnn": "{}"})
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)


def test_a_checkpoint_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    write_checkpoint(path, a_checkpoint())

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")  # as for anyone but root

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*c\.safetensors: Permission denied"):
        read_checkpoint(path)


# ---------------------------------------------------------------- history


def test_the_best_epoch() -> None:
    history = History([record(1, 0.5, 0.7), record(2, 0.4, 0.8), record(3, 0.3, 0.8), record(4, 0.9, 0.8)])
    assert history.best is history[2]  # the accuracy of three, the smallest loss among them
    assert history.epochs_since_best == 1
    history.monitor = "loss"
    assert history.best is history[2]
    history.records[3] = record(4, 0.3, 0.1)
    assert history.best is history[2]  # the first of equals
    assert History([record(1, None, None), record(2, None, None)]).best == record(2, None, None)
    assert History().best is None
    assert History().epochs_since_best == 0


def test_a_history_is_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History([record(1), record(2, None, None)], "loss")
    history.write(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["validation_loss"] == 0.5
    assert rows[1]["validation_loss"] is None
    assert History.read(path, "loss") == history
    assert len(history) == 2
    with pytest.raises(CheckpointError, match="cannot read the history"):
        History.read(tmp_path / "missing")
    for text in ("{", '{"epoch": 1}', "[1]"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="is not a training history"):
            History.read(path)


# ---------------------------------------------------------------- run folder


def test_a_run_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "one")
    assert not run.path.exists()
    assert run.create({"a": 1}) is run
    assert run.read_config() == {"a": 1}
    assert not run.holds_run()
    run.create({"a": 2})  # a run that never began is no loss
    run.write_summary({"accuracy": 0.5})
    assert run.read_summary() == {"accuracy": 0.5}
    (run.path / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="already holds a run; resume it"):
        run.create({})
    run.create({}, overwrite=True)
    assert sorted(os.listdir(run.path)) == ["config.json", "notes.txt"]
    assert "one" in repr(run)


def test_what_a_run_folder_lacks_is_said(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json.*is this a run folder"):
        run.read_config()
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*last\.safetensors"):
        run.read_best()
    for path, read in ((run.config_path, run.read_config), (run.summary_path, run.read_summary)):
        path.write_text("[]")
        with pytest.raises(CheckpointError, match="holds list, expected a JSON object"):
            read()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).create()
    left = tmp_path / ".last.safetensors.part"
    left.write_text("half")
    run.remove_temporary_files()
    assert not left.exists()
    left.mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        run.remove_temporary_files()


def test_the_best_checkpoint_is_the_last_before_the_first_epoch_has_ended(tmp_path: Path) -> None:
    run = RunFolder(tmp_path).create()
    write_checkpoint(run.last_path, Checkpoint({"a": numpy.zeros(1)}))
    assert run.read_best().model["a"] == 0
    write_checkpoint(run.best_path, Checkpoint({"a": numpy.ones(1)}))
    assert run.read_best().model["a"] == 1
    assert run.read_last().model["a"] == 0
    History([record(1)]).write(run.history_path)
    assert run.read_history().records == [record(1)]
    assert (run.curves_path.name, run.confusion_path.name) == ("curves.png", "confusion.png")
