"""``scripts/run.py``: what it picks and promises; environments are made of stand-ins, nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, ModuleType]:
    """The modules gpu_detection, environment and run of a checkout of its own, whose path has a space."""
    checkout = tmp_path / "a checkout"
    (checkout / "scripts").mkdir(parents=True)
    for name in ("gpu_detection", "environment", "run"):
        (checkout / "scripts" / f"{name}.py").write_bytes((SCRIPTS / f"{name}.py").read_bytes())
    (checkout / "pyproject.toml").write_text("[project]\n")
    modules: dict[str, ModuleType] = {}
    for name in ("gpu_detection", "environment", "run"):
        spec = importlib.util.spec_from_file_location(name, checkout / "scripts" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, modules[name])
        spec.loader.exec_module(modules[name])
    monkeypatch.setattr(modules["gpu_detection"], "detect", lambda: None)
    return modules


class Tools:
    """Stands in for every program that a set-up starts: makes an empty environment, installs nothing, can fail."""

    def __init__(self, environment: ModuleType) -> None:
        self.environment = environment
        self.calls: list[list[str]] = []
        self.fails: Callable[[list[str]], bool] = lambda command: False
        self.works: Callable[[tuple[str, ...]], bool] = lambda command: True

    def call(self, command: list[str], purpose: str) -> None:
        self.calls.append(command)
        if self.fails(command):
            raise self.environment.SetupError(f"{purpose} failed")
        if "venv" in command:
            python = self.environment.environment_python()
            python.parent.mkdir(parents=True, exist_ok=True)
            python.write_text("")
            (self.environment.ENVIRONMENT / "pyvenv.cfg").write_text("")

    def installs(self) -> list[str]:
        """What was installed, as "images,plot"."""
        return [command[-1].partition("[")[2].rstrip("]") for command in self.calls if "install" in command]


@pytest.fixture
def tools(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Tools:
    environment = scripts["environment"]
    made = Tools(environment)
    monkeypatch.setattr(environment, "call", made.call)
    monkeypatch.setattr(environment, "works", lambda *command: made.works(command))
    return made


# ---------------------------------------------------------------- which CuPy


@pytest.mark.parametrize(
    ("driver", "capability", "extra"),
    [
        (580, (9, 0), "cuda13"),
        (600, (12, 0), "cuda13"),
        (580, (7, 5), "cuda13"),
        (580, (7, 0), "cuda12"),  # CUDA 13 has no code for Volta
        (580, (6, 1), "cuda12"),
        (580, None, "cuda13"),
        (579, (9, 0), "cuda12"),
        (525, (8, 6), "cuda12"),
        (525, None, "cuda12"),
        (524, (8, 6), "none"),
        (580, (3, 5), "none"),
    ],
)
def test_driver_and_gpu_decide_the_extra(
    scripts: dict[str, ModuleType], driver: int, capability: tuple[int, int] | None, extra: str
) -> None:
    gpu_detection = scripts["gpu_detection"]
    chosen, reason = gpu_detection.choose_extra(gpu_detection.Found(driver, capability))
    assert chosen == extra
    assert f"NVIDIA driver {driver}" in reason
    assert gpu_detection.choose_extra(None) == ("none", "no NVIDIA driver found")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("580.65.06, 9.0\n", (580, (9, 0))),
        ("535.183.01, 8.6\n535.183.01, 7.5\n", (535, (7, 5))),  # what the older one can
        ("470.256.02\n", (470, None)),
        ("580.1, [N/A]\n", (580, None)),
        ("No devices were found\n", None),
        ("", None),
    ],
)
def test_nvidia_smi_is_understood(scripts: dict[str, ModuleType], text: str, found: Any) -> None:
    assert scripts["gpu_detection"].parse_nvidia_smi(text) == found


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_nvidia_smi_is_asked(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tool.write_text('#!/bin/sh\ncase "$1" in *compute_cap*) exit 2;; esac\necho 470.1\n')  # as old ones answer
    tool.chmod(0o755)
    assert scripts["gpu_detection"].ask_nvidia_smi() == (470, None)
    tool.write_text("#!/bin/sh\necho 581.2, 8.9\n")
    assert scripts["gpu_detection"].ask_nvidia_smi() == (581, (8, 9))
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert scripts["gpu_detection"].ask_nvidia_smi() is None


class DriverLibrary:
    """libcuda with two GPUs, the lesser one of capability 7.5; ``failing`` names calls that return an error."""

    def __init__(self, version: int, failing: str = "", count: int = 2) -> None:
        self.version, self.failing, self.count = version, failing, count

    def __getattr__(self, name: str) -> Callable[..., int]:
        def function(*arguments: Any) -> int:
            if name == self.failing:
                return 100
            if name == "cuDriverGetVersion":
                arguments[0]._obj.value = self.version
            elif name == "cuDeviceGetCount":
                arguments[0]._obj.value = self.count
            elif name == "cuDeviceGet":
                arguments[0]._obj.value = arguments[1]
            elif name == "cuDeviceGetAttribute":
                capability = ((9, 0), (7, 5))[arguments[2].value]
                arguments[0]._obj.value = capability[arguments[1] - 75]
            return 0

        return function


@pytest.mark.parametrize(
    ("library", "found"),
    [
        (DriverLibrary(13_000), (580, (7, 5))),
        (DriverLibrary(13_010), (580, (7, 5))),
        (DriverLibrary(12_040), (525, (7, 5))),
        (DriverLibrary(11_080), (1, (7, 5))),
        (DriverLibrary(13_000, failing="cuInit"), None),
        (DriverLibrary(13_000, failing="cuDeviceGetCount"), None),
        (DriverLibrary(13_000, count=0), None),
        (None, None),
    ],
)
def test_the_drivers_library_is_asked(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, library: DriverLibrary | None, found: Any
) -> None:
    monkeypatch.setattr(scripts["gpu_detection"], "load_driver_library", lambda: library)
    assert scripts["gpu_detection"].ask_driver_library() == found


# ---------------------------------------------------------------- setting up


def test_a_second_set_up_does_nothing(scripts: dict[str, ModuleType], tools: Tools) -> None:
    environment = scripts["environment"]
    environment.set_up(("images", "plot"), None)
    assert tools.installs() == ["images,plot"]
    done = len(tools.calls)
    environment.set_up(("images", "plot"), None)
    environment.set_up(("plot",), None)
    assert len(tools.calls) == done


def test_more_extras_are_added_to_what_is_there(
    scripts: dict[str, ModuleType], tools: Tools, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = scripts["environment"]
    environment.set_up(("images",), None)
    assert "Installing NumPy, safetensors, threadpoolctl, tqdm, Pillow into " in capsys.readouterr().err
    environment.set_up(("images", "test"), None)
    said = capsys.readouterr().err
    assert "Installing pytest" in said
    assert f"about {environment.MEGABYTES['test']} MB to download" in said
    assert tools.installs() == ["images", "images,test"]
    assert sum("venv" in command for command in tools.calls) == 1


@pytest.mark.parametrize("change", ["pyproject", "python", "place", "interrupted", "unreadable", "gone"])
def test_what_is_not_right_any_more_is_made_again(
    scripts: dict[str, ModuleType], tools: Tools, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    environment = scripts["environment"]
    environment.set_up(("images",), None)
    stamp = json.loads(environment.STAMP.read_text())
    if change == "pyproject":
        (environment.ROOT / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    elif change == "python":
        monkeypatch.setattr(sys, "version_info", (3, 99, 0, "final", 0))
    elif change == "place":
        environment.STAMP.write_text(json.dumps({**stamp, "checkout": "/elsewhere"}))
    elif change == "interrupted":
        environment.STAMP.write_text(json.dumps({**stamp, "state": "started"}))
    elif change == "unreadable":
        environment.STAMP.write_text("{")
    else:
        environment.environment_python().unlink()
    environment.set_up(("images",), None)
    assert sum("venv" in command for command in tools.calls) == 2
    assert json.loads(environment.STAMP.read_text())["state"] == "complete"


@pytest.mark.parametrize("stage", ["venv", "install"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, None])
def test_a_set_up_that_did_not_end_is_not_trusted(
    scripts: dict[str, ModuleType], tools: Tools, stage: str, kind: type[BaseException] | None
) -> None:
    environment = scripts["environment"]

    def fails(command: list[str]) -> bool:
        if stage in command and kind is not None:
            raise kind
        return stage in command

    tools.fails = fails
    with pytest.raises(kind or environment.SetupError):
        environment.set_up(("images",), None)
    assert json.loads(environment.STAMP.read_text())["state"] == "started"
    tools.fails = lambda command: False
    environment.set_up(("images",), None)
    assert sum("venv" in command for command in tools.calls) == 2


def test_a_failed_addition_leaves_what_works(scripts: dict[str, ModuleType], tools: Tools) -> None:
    environment = scripts["environment"]
    environment.set_up(("images",), None)
    tools.fails = lambda command: "install" in command
    with pytest.raises(environment.SetupError):
        environment.set_up(("test",), None)
    done = len(tools.calls)
    environment.set_up(("images",), None)  # still trusted
    assert len(tools.calls) == done
    tools.works = lambda command: "-c" not in command or "import gpucnn" not in command[-1]
    with pytest.raises(environment.SetupError):
        environment.set_up(("test",), None)
    assert environment.read_stamp()["state"] == "started"  # it was not whole any more


def test_an_environment_of_another_tool_is_used_and_not_deleted(
    scripts: dict[str, ModuleType], tools: Tools
) -> None:
    environment = scripts["environment"]
    environment.environment_python().parent.mkdir(parents=True)
    environment.environment_python().write_text("")
    (environment.ENVIRONMENT / "pyvenv.cfg").write_text("uv = 0.9\n")
    (environment.ENVIRONMENT / "precious").write_text("")
    environment.set_up(("images",), None)
    assert (environment.ENVIRONMENT / "precious").exists()
    (environment.ROOT / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    environment.set_up(("images",), None)
    assert tools.installs() == ["images", "images"]
    assert [command for command in tools.calls if "venv" in command] == []
    assert (environment.ENVIRONMENT / "precious").exists()
    environment.STAMP.unlink()
    tools.works = lambda command: False
    with pytest.raises(environment.SetupError, match=r"was not made by this script .* move it away"):
        environment.set_up(("images",), None)


def test_what_is_no_folder_is_left_alone(scripts: dict[str, ModuleType], tools: Tools) -> None:
    environment = scripts["environment"]
    environment.ENVIRONMENT.write_text("")
    with pytest.raises(environment.SetupError, match="is a link or a file, not a folder: move it away"):
        environment.set_up(("images",), None)


def test_without_ensurepip_uv_or_pip_makes_the_environment(
    scripts: dict[str, ModuleType], tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = scripts["environment"]
    places: dict[str, str] = {"uv": "/opt/uv"}
    monkeypatch.setattr(environment.shutil, "which", lambda name, **options: places.get(name))
    own = str(environment.environment_python())

    def works(command: tuple[str, ...]) -> bool:
        return "ensurepip" not in command[-1] and command[:3] != (own, "-m", "pip")

    tools.works = works
    environment.set_up(("images",), None)
    assert tools.calls[0][:2] == ["/opt/uv", "venv"]
    assert tools.calls[1][:3] == ["/opt/uv", "pip", "install"]
    places.clear()
    environment.create_environment()
    assert tools.calls[2][1:4] == ["-m", "venv", "--without-pip"]
    assert environment.install_command(["images"])[1:5] == ["-m", "pip", "--python", own]
    tools.works = lambda command: False
    with pytest.raises(environment.SetupError, match=r"On Debian and Ubuntu: apt install python3\.\d+-venv"):
        environment.create_environment()
    with pytest.raises(environment.SetupError, match="has no pip, and neither uv nor another pip is there"):
        environment.install_command([])


def test_the_gpu_extra_is_picked_said_and_remembered(
    scripts: dict[str, ModuleType],
    tools: Tools,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment, gpu_detection = scripts["environment"], scripts["gpu_detection"]
    monkeypatch.setattr(gpu_detection, "detect", lambda: gpu_detection.Found(580, (9, 0)))
    environment.set_up(("images",), "none")
    environment.set_up(("images",), None)  # remembered
    assert tools.installs() == ["images"]
    environment.set_up(("images",), "auto")
    assert tools.installs() == ["images", "cuda13,images"]
    said = capsys.readouterr().err
    assert "GPU: NVIDIA driver 580 and a GPU of compute capability 9.0 found." in said
    assert "CuPy with CUDA 13's libraries" in said
    assert "about 1.2 GB to download" in said
    environment.set_up(("images",), None)
    assert len(tools.installs()) == 2
    with pytest.raises(environment.SetupError, match="two CuPys do not work side by side"):
        environment.set_up(("images",), "cuda12")


def test_a_failed_gpu_extra_says_how_to_go_on(scripts: dict[str, ModuleType], tools: Tools) -> None:
    environment = scripts["environment"]
    tools.fails = lambda command: "install" in command and "cuda12" in command[-1]
    with pytest.raises(environment.SetupError, match="add --gpu none to go on without it"):
        environment.set_up(("images",), "cuda12")
    assert environment.read_stamp()["state"] == "complete"
    tools.fails = lambda command: False
    done = len(tools.calls)
    environment.set_up(("images",), "none")
    assert len(tools.calls) == done


# ---------------------------------------------------------------- tools and commands


def test_a_failing_tools_last_words_are_shown(scripts: dict[str, ModuleType]) -> None:
    environment = scripts["environment"]
    command = [sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"]
    with pytest.raises(environment.SetupError, match=r"it failed with exit status 3:\n  \| the reason"):
        environment.call(command, "it")
    with pytest.raises(environment.SetupError, match="it failed: "):
        environment.call([str(ROOT / "no such program")], "it")
    assert environment.works(sys.executable, "-c", "") is True
    assert environment.works(sys.executable, "-c", "raise SystemExit(1)") is False
    assert environment.works(str(ROOT / "no such program")) is False


def test_variables_that_lead_an_install_elsewhere_are_left_out(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_USER", "PIP_TARGET", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("PIP_CACHE_DIR", "kept")
    variables = scripts["environment"].tool_environment()
    assert {"PIP_USER", "PIP_TARGET", "PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"} & set(variables) == set()
    assert variables["PIP_CACHE_DIR"] == "kept"


def test_a_terminal_sees_that_something_happens(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    scripts["environment"].call([sys.executable, "-c", "import time; time.sleep(1.3)"], "installing")
    assert "\r  installing: 1 s " in capsys.readouterr().err


def test_the_option_gpu_is_taken_out_wherever_it_stands(scripts: dict[str, ModuleType]) -> None:
    take = scripts["run"].take_gpu_option
    assert take(["train", "--epochs", "3"]) == (None, ["train", "--epochs", "3"])
    assert take(["--gpu", "none", "train", "--lr", "1"]) == ("none", ["train", "--lr", "1"])
    assert take(["train", "--gpu=cuda12", "-x"]) == ("cuda12", ["train", "-x"])
    assert take(["test", "--", "--gpu", "x"]) == (None, ["test", "--", "--gpu", "x"])
    for bad in (["train", "--gpu"], ["train", "--gpu", "amd"]):
        with pytest.raises(
            scripts["environment"].SetupError, match="--gpu takes one of auto, cuda12, cuda13, none"
        ):
            take(bad)


def test_commands_become_calls_of_the_environments_python(
    scripts: dict[str, ModuleType], tools: Tools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = scripts["run"]
    python = str(scripts["environment"].environment_python())
    calls: list[list[str]] = []
    status = 0

    class Replaced(Exception):
        """execv does not return."""

    def execute(program: str, arguments: list[str]) -> None:
        calls.append(arguments)
        raise Replaced

    def subprocess_call(arguments: list[str], **options: Any) -> int:
        calls.append(arguments)
        return status

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run.os, "name", "posix")
    monkeypatch.setattr(run.os, "execv", execute)
    monkeypatch.setattr(run.subprocess, "call", subprocess_call)
    with pytest.raises(Replaced):
        run.main(["train", "--epochs", "3"])
    assert calls.pop() == [python, "-P", "-m", "gpucnn", "train", "--epochs", "3"]
    assert run.main(["lint"]) == 0
    assert [call[1:3] for call in calls] == [["-m", "ruff"], ["-m", "ruff"]]
    calls.clear()
    assert run.main(["types", "--gpu", "none"]) == 0
    assert run.main(["test", "--coverage", "-x"]) == 0
    assert [call[2:] for call in calls] == [
        ["mypy"], ["coverage", "erase"], ["coverage", "run", "-m", "pytest", "-x"],
        ["coverage", "combine", "--quiet"], ["coverage", "report"],
    ]  # fmt: skip
    status = 5
    calls.clear()
    assert run.main(["test", "--coverage"]) == 5
    assert ["coverage", "report"] not in [call[2:] for call in calls]
    assert run.main(["setup"]) == 0


def test_what_cannot_be_done_is_one_line_and_status_2(
    scripts: dict[str, ModuleType], tools: Tools, capsys: pytest.CaptureFixture[str]
) -> None:
    run = scripts["run"]
    assert run.main(["tran"]) == 2
    assert "run.py: unknown command 'tran'; choose one of train, " in capsys.readouterr().err
    assert run.main([]) == 2
    assert run.main(["--help"]) == 0
    tools.fails = lambda command: True
    assert run.main(["train"]) == 2
    assert "run.py: making the virtual environment failed" in capsys.readouterr().err

    def interrupt(command: list[str]) -> bool:
        raise KeyboardInterrupt

    tools.fails = interrupt
    assert run.main(["train"]) == 130


def test_an_older_python_gets_a_plain_message(tmp_path: Path) -> None:
    """The script is read by the running Python with the version of an older one."""
    code = (
        "import sys, runpy; sys.version_info = (3, 10, 1, 'final', 0); sys.path.insert(0, sys.argv[1]); "
        "runpy.run_path(sys.argv[1] + '/run.py', run_name='__main__')"
    )
    answer = subprocess.run([sys.executable, "-c", code, str(SCRIPTS)], capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stderr.startswith("gpucnn needs Python 3.11 or newer; this is 3.10.1, ")


def test_the_start_is_written_so_that_an_older_python_can_read_it() -> None:
    """Up to the check of the version only what Python 3.6 can parse; the rest is in modules imported after it."""
    import ast

    ast.parse((SCRIPTS / "run.py").read_text(encoding="utf-8"), feature_version=(3, 7))
