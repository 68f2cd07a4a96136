"""The wheel and the sdist hold what they should, and the wheel runs without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import gpucnn
from gpucnn_kernels import catalog

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "gpucnn").rglob("*.py")}
KERNEL_SOURCES = {path.relative_to(ROOT / "kernels").as_posix() for path in (ROOT / "kernels").rglob("*.py")}
CUDA_SOURCES = {
    path.relative_to(ROOT / "kernels").as_posix()
    for folder in ("cuda", "runtime/host_include")
    for path in (ROOT / "kernels" / "gpucnn_kernels" / folder).rglob("*")
    if path.is_file()
}
DATA = {
    "gpucnn/py.typed",
    "gpucnn/data/digits.npz",
    "gpucnn/data/DIGITS.md",
    "gpucnn_kernels/py.typed",
    *CUDA_SOURCES,
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("built")
    answer = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_there_are_cuda_sources_and_headers_for_the_host() -> None:
    assert {Path(name).suffix for name in CUDA_SOURCES if "/cuda/" in name} == {".cu", ".cuh"}
    assert any(name.endswith("host_include/cuda_fp16.h") for name in CUDA_SOURCES)
    assert len(CUDA_SOURCES) > 30


def test_the_wheel_holds_both_packages_and_their_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert (SOURCES | KERNEL_SOURCES | DATA) - names == set()
    assert {name.partition("/")[0] for name in names} == {
        "gpucnn",
        "gpucnn_kernels",
        f"gpucnn-{gpucnn.__version__}.dist-info",
    }
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_sdist_holds_all_that_a_build_and_a_test_need(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {f"kernels/{name}" for name in KERNEL_SOURCES}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    others = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "scripts/run.py",
        ".ci/run",
    }
    data = {f"kernels/{name}" if name.startswith("gpucnn_kernels") else name for name in DATA}
    assert (SOURCES | kernels | tests | others | data) - names == set()


def test_the_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import gpucnn, gpucnn_kernels, gpucnn.data\n"
        "from gpucnn_kernels import catalog\n"
        "print(gpucnn.__file__, gpucnn_kernels.__file__, len(gpucnn.data.load('digits').train))\n"
        "print(len(catalog.variants()))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    package, kernels, count, forms = answer.stdout.split()
    assert Path(package).is_relative_to(tmp_path)
    assert Path(kernels).is_relative_to(tmp_path)
    assert int(count) > 1000
    assert int(forms) == len(catalog.variants())


def test_the_project_says_the_version_of_the_package_and_its_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == gpucnn.__version__
    assert project["scripts"] == {"gpucnn": "gpucnn.cli:main"}
    assert project["requires-python"] == ">=3.11"


def test_the_compiler_for_the_kernels_is_asked_for_only_where_there_is_one() -> None:
    """NVRTC comes for Linux on two processors; elsewhere the tests that need it say why they are skipped."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    nvidia = [Requirement(line) for line in project["optional-dependencies"]["test"] if line.startswith("nvidia-")]
    assert {found.name for found in nvidia} == {"nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"}
    for found in nvidia:
        assert found.marker is not None
        assert not found.specifier.contains("12.6")  # it does not know sm_120
        for system, processor, wanted in (
            ("linux", "x86_64", True),
            ("linux", "aarch64", True),
            ("linux", "ppc64le", False),
            ("darwin", "arm64", False),
            ("win32", "AMD64", False),
        ):
            assert found.marker.evaluate({"sys_platform": system, "platform_machine": processor}) == wanted


def test_the_uv_lock_is_possible() -> None:
    """CuPy for CUDA 12 and for CUDA 13 ask for different versions of one package, so no lock can hold both."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert tools["uv"]["conflicts"] == [[{"extra": "cuda12"}, {"extra": "cuda13"}]]
