"""Two processes and one run folder: the second is refused, whatever became of the first's lock file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_cases import call

from gpucnn.errors import ArgumentError
from gpucnn.training import RunFolder, run_lock

fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")

HOLD = """
import sys
from gpucnn.training import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""
SMALL = ("train", "--data", "digits", "--epochs", "1", "--device", "cpu", "--quiet")


@pytest.fixture
def other(tmp_path: Path) -> Any:
    """Another process that has the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.communicate()


def lock(path: Path) -> None:
    with RunFolder(path).locked():
        pass


def test_a_second_process_is_refused_and_told_who_has_it(
    other: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = (
        rf"run is in use: process {other.pid} on '.+', since 20.+, trains in it; wait for that process or end it"
    )
    with pytest.raises(ArgumentError, match=words):
        lock(folder)
    for more in ((), ("--overwrite",), ("--resume",)):
        answer = call(capsys, *SMALL, "--output", str(folder), *more)
        assert answer.status == 2
        assert f"{folder} is in use: process {other.pid}" in answer.errors
    assert [path.name for path in folder.iterdir()] == [run_lock.NAME], "nothing is written or removed"
    other.communicate()
    assert list(folder.iterdir()) == []
    lock(folder)


def test_a_process_that_was_killed_locks_nothing(other: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    other.kill()
    other.wait()
    assert (folder / run_lock.NAME).exists(), "the file is left"
    lock(folder)
    assert not (folder / run_lock.NAME).exists()


def test_a_lock_holds_for_its_block_in_one_object_alone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new" / "run")
    with run.locked():
        with run.locked():
            pass
        with pytest.raises(ArgumentError, match=f"in use: process {os.getpid()} on"):
            lock(run.path)
        (run.path / "config.json").write_text("{}")
    assert [path.name for path in run.path.iterdir()] == ["config.json"]
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    lock(run.path)


def test_a_lock_file_that_was_just_removed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        plain(descriptor, how)
        calls.append(how)
        if len(calls) == 1:  # the one that had it leaves, and another one comes before us
            (tmp_path / run_lock.NAME).unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunFolder(tmp_path).locked():
        assert len(calls) == 2
        with pytest.raises(ArgumentError):
            lock(tmp_path)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_training_goes_on(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", flock)
    entered = []
    with RunFolder(tmp_path).locked(), RunFolder(tmp_path).locked():
        entered.append(sorted(path.name for path in tmp_path.iterdir()))
    assert len(entered) == 1, "neither the first nor the second was let in"


def test_what_cannot_be_locked_is_left_to_who_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(run_lock.os, "open", refuse)
    with RunFolder(tmp_path).locked():
        assert list(tmp_path.iterdir()) == []


def test_an_owner_that_has_not_written_yet(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked():
        (tmp_path / run_lock.NAME).write_text("")
        with pytest.raises(ArgumentError, match="is in use: another process, trains in it"):
            lock(tmp_path)
