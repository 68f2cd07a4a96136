"""A run that is killed and resumed, however often and at whatever moment, ends where the undisturbed run ends."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from resume_worker import make_trainer

from gpucnn.errors import ArgumentError, CheckpointError
from gpucnn.training import Callback, Checkpoint, RunFolder, TrainingInterrupted, read_checkpoint

REPOSITORY = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("resume_worker.py")
TIMING = ("seconds", "images_per_second", "train_seconds")
KILLS = 20


def start_worker(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    paths = [str(REPOSITORY), str(REPOSITORY / "kernels")]
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(WORKER), str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def contents(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint that does not depend on the clock, tensors as their exact bytes."""
    checkpoint = read_checkpoint(path)
    found: dict[str, Any] = {}
    for part in ("model", "ema", "optimizer"):
        for name, value in getattr(checkpoint, part).items():
            found[f"{part}.{name}"] = (str(value.dtype), value.shape, value.tobytes()) if hasattr(value, "dtype") else value
    found |= {f"position.{k}": v for k, v in dataclasses.asdict(checkpoint.position).items() if k not in TIMING}
    found |= {"history": untimed(checkpoint), "generators": checkpoint.generators, "options": checkpoint.options}
    return found


def untimed(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    rows = [dataclasses.asdict(record) for record in checkpoint.history]
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def assert_same_end(left: RunFolder, right: RunFolder) -> None:
    for one, other in ((left.last_path, right.last_path), (left.best_path, right.best_path)):
        expected, found = contents(one), contents(other)
        assert expected.keys() == found.keys()
        assert [name for name in expected if expected[name] != found[name]] == []
    for one in (left, right):
        assert [dataclasses.asdict(r) for r in one.read_history()] == [
            dataclasses.asdict(r) for r in one.read_last().history
        ]
        assert sorted(path.name for path in one.path.iterdir()) == [
            "best.safetensors",
            "config.json",
            "history.jsonl",
            "last.safetensors",
        ]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_and_four_within_a_write_change_nothing(tmp_path: Path) -> None:
    undisturbed = start_worker(tmp_path / "undisturbed")
    moments = random.Random(time.time_ns())
    # Each place of a checkpoint write at which dying could hurt, then twenty moments by the clock.
    for number, place in enumerate(("half-written", "unsynced", "unnamed", "unnoticed"), start=3):
        worker = start_worker(tmp_path / "killed", place, KILL_AT=str(number))
        _, errors = worker.communicate(timeout=60)
        assert worker.returncode == -signal.SIGKILL, errors
    kills = 0
    while kills < KILLS:
        worker = start_worker(tmp_path / "killed")
        assert worker.stdout is not None
        worker.stdout.readline()
        time.sleep(moments.uniform(0, 0.12))
        assert worker.poll() is None, f"the run ended after {kills} kills; make it longer"
        worker.kill()
        worker.communicate(timeout=60)
        kills += 1
    final = start_worker(tmp_path / "killed")
    for worker in (final, undisturbed):
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    assert_same_end(RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "killed"))
