"""scripts/benchmark.py: it measures what it says, leaves absent peers blank, and its arithmetic is right."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarking import report
from scripts.benchmarking.rows import convolution_rows, end_to_end_rows, other_rows, step_rows

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "benchmark.py"


def start(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_rows_are_measured_and_written(tmp_path):
    page = tmp_path / "cpu.json"
    answer = start(
        "--rows", "lenet c", "--suite", "operations", "--peers", "none", "--rounds", "3", "--json", page
    )
    assert answer.returncode == 0, answer.stderr
    results = json.loads(page.read_text())
    assert [row["direction"] for row in results["rows"]] == 2 * ["forward", "input gradient", "filter gradient"]
    for row in results["rows"]:
        assert len(row["seconds"]["gpucnn"]) == 3
        assert 0 < row["median"]["gpucnn"] < 10
        assert "ratio" not in row  # there was nobody to compare with
    assert results["limits"]["flops"] > 1e8
    assert results["limits"]["bytes"] > 1e7
    table = page.with_suffix(".md").read_text()
    assert table in answer.stdout
    assert table.count("| lenet c1 1->6 k5 28 N128 |") == 3


def test_a_step_and_its_memory(tmp_path):
    page = tmp_path / "cpu.json"
    answer = start("--rows", "lenet5 28", "--suite", "all", "--peers", "none", "--rounds", "1", "--json", page)
    assert answer.returncode == 0, answer.stderr
    step, memory = json.loads(page.read_text())["rows"]
    assert step["seconds"]["gpucnn"][0] > 0
    assert memory["memory"]["gpucnn"]["bytes"] < memory["memory"]["gpucnn"]["whole_bytes"]


def test_an_unknown_peer_is_an_error():
    answer = start("--peers", "torch,keras")
    assert answer.returncode == 2
    assert "unknown peers ['keras']; there are torch" in answer.stderr


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_row_has_a_name_of_its_own(device):
    rows = [*convolution_rows(device), *other_rows(device), *step_rows(device), *end_to_end_rows()]
    assert len({row.key for row in rows}) == len(rows)


def test_the_least_work_of_a_convolution():
    (row,) = [row for row in convolution_rows("cpu") if row.key == "resnet 64->128 k3 s2 56 N16 forward"]
    assert row.flops == 2 * 16 * 128 * 28 * 28 * 64 * 9
    assert row.bytes == 4 * (16 * 64 * 56 * 56 + 128 * 64 * 9 + 16 * 128 * 28 * 28)


def test_ratio_and_share_of_the_limit():
    entry = {
        "flops": 1e9,
        "bytes": 4e6,
        "seconds": {"gpucnn": [0.02, 0.03, 0.04], "torch": [0.05, 0.01, 0.06], "torch channels-last": [0.015] * 3},
    }
    report.summarize(entry, {"flops": 1e11, "bytes": 1e9})
    assert entry["best_peer"] == "torch channels-last"
    assert math.isclose(entry["ratio"], 2.0)
    assert math.isclose(entry["limit_share"], 0.01 / 0.03)
    assert report.geometric_mean([0.5, 2.0, 8.0]) == pytest.approx(2.0)
    assert math.isnan(report.geometric_mean([]))
    assert [report.shown(value) for value in (None, 2.5, 0.0034, 0.0000021)] == ["-", "2.5 s", "3.4 ms", "2.1 us"]
