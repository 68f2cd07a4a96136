"""``import gpucnn`` loads NumPy alone, quickly: whoever only wants a layer waits for nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gpucnn

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"numpy", "gpucnn", "gpucnn_kernels"}
HEAVY = {
    "argparse",
    "concurrent.futures",
    "email",
    "http.client",
    "multiprocessing",
    "tomllib",
    "unittest",
    "urllib.request",
}


def measure(code: str) -> dict:
    """What a new Python prints as JSON; its path is that of a bare checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    return json.loads(answer.stdout)


def modules_loaded_by(statement: str) -> set[str]:
    return set(measure(f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))")) - BARE


BARE = set(measure("import json, sys; print(json.dumps(sorted(sys.modules)))"))  # what every Python loads here


CORE = "from gpucnn import initializers, layers, losses, ops, random"


@pytest.mark.parametrize("statement", ["import gpucnn", CORE, "import gpucnn_kernels"])
def test_import_loads_numpy_alone(statement: str) -> None:
    foreign = {name.partition(".")[0] for name in modules_loaded_by(statement)} - set(sys.stdlib_module_names)
    assert foreign - ALLOWED == set()
    assert foreign & {"gpucnn", "gpucnn_kernels"}


def test_import_loads_no_heavy_module_beyond_numpys_own() -> None:
    assert (modules_loaded_by(CORE) - modules_loaded_by("import numpy")) & HEAVY == set()


@pytest.mark.parametrize("statement", ["import gpucnn", CORE])
def test_import_is_quick(statement: str) -> None:
    # Processor time: what the machine does meanwhile for others is not the import's.
    code = f"from time import process_time as now; start = now(); {statement}; print(now() - start)"
    times: list[float] = []
    while len(times) < 15 and (len(times) < 3 or min(times) >= 0.3):  # a busy machine gets more tries
        times.append(measure(code))
    assert min(times) < 0.3


def test_names_load_on_first_use_and_unknown_ones_are_refused() -> None:
    assert gpucnn.Sequential is gpucnn.models.model.Sequential
    assert set(gpucnn.__all__) <= set(dir(gpucnn))
    assert all(getattr(gpucnn, name) is not None for name in gpucnn.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tensors'"):
        gpucnn.tensors  # noqa: B018
