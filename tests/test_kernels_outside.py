"""gpucnn_kernels as another project has it: from the wheel, beside the PyPI package ``kernels``, no checkout.

tests/outside_project is that project. It is copied away, and its own tests run in a virtual environment with the
wheel. The package ``kernels`` is played by one of the same name and layout, so that nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "tests" / "outside_project"

OTHER = {
    "pyproject.toml": """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "kernels"
version = "0.17.2"

[project.scripts]
kernels = "kernels.cli:main"

[tool.hatch.build.targets.wheel]
packages = ["kernels"]
""",
    "kernels/__init__.py": "from kernels.utils import get_kernel\n",
    "kernels/utils.py": "def get_kernel(name):\n    return name\n",
    "kernels/cli.py": "def main():\n    pass\n",
    "kernels/layer/__init__.py": "",
}


def run(*command: str, folder: Path, environment: dict[str, str] | None = None) -> str:
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def build(project: Path, into: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(into), folder=project)
    (wheel,) = into.glob("*.whl")
    return wheel


def contents(folder: Path) -> dict[str, str]:
    """By path, the hash of every installed file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


class Environment:
    """A fresh virtual environment, with what else the tests' own one has (NumPy, pytest), save this project."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("pip", reason="pip, which installs the wheels, is not in this environment")
        venv.create(folder, symlinks=os.name != "nt")
        scripts = {"base": str(folder), "platbase": str(folder)}
        scheme = sysconfig.get_preferred_scheme("prefix")
        self.folder, self.site = folder, Path(sysconfig.get_path("purelib", scheme, scripts))
        self.python = min(Path(sysconfig.get_path("scripts", scheme, scripts)).glob("python*"))
        shared = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        # Folders named in a .pth file are searched last, and the .pth files in them, such as an editable install's
        # of this checkout, are not read.
        (self.site / "shared.pth").write_text("".join(f"{place}\n" for place in shared))

    def install(self, wheel: Path) -> dict[str, str]:
        """Install a wheel beside what is there; the files that came."""
        before = contents(self.folder)
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check"]
        run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel), folder=self.folder)
        after = contents(self.folder)
        changed = [name for name, digest in before.items() if after.get(name) != digest]
        assert changed == [], "installing one package changed files of the other"
        return {name: digest for name, digest in after.items() if name not in before}


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(ours, the other package's)."""
    other = tmp_path_factory.mktemp("kernels")
    for name, text in OTHER.items():
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text(text)
    return build(ROOT, tmp_path_factory.mktemp("ours")), build(other, tmp_path_factory.mktemp("others"))


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours second"])
def test_beside_the_package_called_kernels_neither_is_disturbed(
    wheels: tuple[Path, Path], tmp_path: Path, ours_first: bool
) -> None:
    ours, other = wheels
    environment = Environment(tmp_path / "environment")
    installed = {wheel: environment.install(wheel) for wheel in ((ours, other) if ours_first else (other, ours))}
    site = environment.site.relative_to(environment.folder).as_posix()
    folders = {
        wheel: {name.removeprefix(f"{site}/").partition("/")[0].partition("-")[0] for name in files}
        for wheel, files in installed.items()
    }
    assert folders[ours] - {"bin", "Scripts"} == {"gpucnn", "gpucnn_kernels"}
    assert folders[other] - {"bin", "Scripts"} == {"kernels"}
    code = (
        "import kernels, kernels.layer, gpucnn_kernels, gpucnn\n"
        "print(kernels.__file__, gpucnn_kernels.__file__, gpucnn.__file__, kernels.get_kernel('mine'))"
    )
    *files, name = run(str(environment.python), "-I", "-c", code, folder=tmp_path).split()
    assert [Path(file).parent for file in files] == [
        environment.site / name for name in ("kernels", "gpucnn_kernels", "gpucnn")
    ]
    assert name == "mine"


@pytest.mark.compiler
def test_another_project_runs_its_tests_on_the_wheel(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    environment, project = Environment(tmp_path / "environment"), tmp_path / "project"
    for wheel in wheels:
        environment.install(wheel)
    shutil.copytree(PROJECT, project, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
    (project / "where.py").write_text(
        "import atexit, sys\n\n\ndef say():\n"
        "    for name, module in sorted(sys.modules.items()):\n"
        "        if name.partition('.')[0] in ('gpucnn', 'gpucnn_kernels', 'kernels', 'edges'):\n"
        "            print('from', getattr(module, '__file__', None) or list(module.__path__)[0])\n\n\n"
        "atexit.register(say)\n"
    )
    away = ("GPUCNN_KERNELS_RUNTIME", "PYTEST_", "PYTHONPATH", "COVERAGE_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(away)}
    tests = [str(environment.python), "-m", "pytest", "-q", "-p", "where", "-p", "no:cacheprovider"]
    variables["GPUCNN_KERNELS_RUNTIME"] = "host"
    said = run(*tests, "-c", "pyproject.toml", folder=project, environment=variables)
    assert "5 passed" in said
    places = [Path(line.removeprefix("from ")) for line in said.splitlines() if line.startswith("from ")]
    assert len(places) > 5
    for place in places:
        assert place.is_relative_to(environment.site) or place.is_relative_to(project)
    assert any("gpucnn_kernels" in place.parts for place in places)
