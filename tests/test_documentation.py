"""What the documentation says is so: its example runs, its links lead somewhere, its tables are complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpucnn import layers, models

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def test_the_example_in_the_readme_learns(tmp_path: Path) -> None:
    example, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "-W", "error", "example.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    found = re.fullmatch(r"test accuracy (\d\.\d{3})\n", answer.stdout)
    assert found is not None
    assert float(found[1]) >= 0.95


def test_the_example_of_fine_tuning_keeps_the_statistics(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    before = models.create("resnet18", num_classes=3, in_channels=1, image_size=8, width=8)
    before.bn1.running_mean[...] = 0.25
    before.save(tmp_path / "pretrained.safetensors")
    after = "assert (model.bn1.running_mean == 0.25).all() and (model.bn1.weight.data == 1).all()\n"
    (tmp_path / "example.py").write_text(example + after, encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "-W", "error", "example.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in index] == [
        "README.md"
    ]


@pytest.mark.compiler
def test_the_readmes_kernels_run(tmp_path: Path) -> None:
    """On the host runtime, where NumPy stands in for the two names that the example takes of CuPy."""
    _, example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    stand_in = "import numpy\nfrom numpy import float32\nrandom = numpy.random.default_rng(0)\n"
    (tmp_path / "cupy.py").write_text(stand_in, encoding="utf-8")
    (tmp_path / "example.py").write_text(example + "print(y.shape, argmax.dtype)\n", encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "-W", "error", "example.py"],
        cwd=tmp_path,
        env=environment() | {"GPUCNN_KERNELS_RUNTIME": "host"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "(8, 64, 56, 56) uint8\n"


def test_the_readme_names_every_layer() -> None:
    missing = [name for name in layers.__all__ if name != "Layer" and f"`{name}`" not in README]
    assert missing == []


def test_the_readme_tells_the_models_sizes() -> None:
    for name in models.available():
        info = models.describe(name)
        shape = "x".join(str(size) for size in info.input_shape)
        assert f"| `{name}` | {shape} | {info.parameter_count:,} |" in README


def test_the_commands_page_is_what_the_options_give() -> None:
    script = ROOT / "scripts" / "document_options.py"
    answer = subprocess.run([sys.executable, script, "--check"], env=environment(), capture_output=True, text=True)
    assert answer.returncode == 0, f"run {script} again\n{answer.stderr}"
