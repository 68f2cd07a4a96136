"""Every backend has each operation of the contract, with equal parameters, kinds and defaults, and no other."""

import importlib
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest

from gpucnn import ops
from gpucnn.errors import DtypeError
from gpucnn.ops import cuda
from gpucnn.ops.contract import Operations
from gpucnn_kernels.runtime.host_array import host_arrays

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ["gpucnn.ops.cpu", "gpucnn.ops.cuda"]
NARROW = "gpucnn.ops.cpu.narrow"
NAMES = [
    name for name, value in vars(Operations).items() if inspect.isfunction(value) and not name.startswith("_")
]


def parameters(function, skip=0):
    signature = inspect.signature(function)
    return [(p.name, p.kind, p.default) for p in list(signature.parameters.values())[skip:]]


def test_the_contract_is_read():
    assert len(NAMES) >= 52
    assert {"conv2d_forward", "batch_norm_forward", "adam_step", "images_to_float"} <= set(NAMES)


@pytest.mark.parametrize("backend", [*BACKENDS, NARROW])
@pytest.mark.parametrize("name", NAMES)
def test_signature(backend, name):
    function = getattr(importlib.import_module(backend), name)
    assert inspect.isfunction(function)
    assert parameters(function) == parameters(getattr(Operations, name), skip=1)
    assert inspect.getdoc(function)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_beyond_the_contract(backend):
    module = importlib.import_module(backend)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    }
    assert public == set(NAMES)
    assert sorted(module.__all__) == sorted(NAMES)


def test_the_array_chooses_the_backend():
    assert ops.backend_of(numpy.zeros(3)) is ops.cpu
    assert ops.array_module(numpy.zeros(3)) is numpy
    assert ops.backend_of(host_arrays.zeros(3)) is cuda
    assert ops.array_module(host_arrays.zeros(3)) is host_arrays
    with pytest.raises(DtypeError, match=r"expected a numpy\.ndarray, got builtins\.list"):
        ops.backend_of([1.0])


FIRST_USE_BY_TWO_THREADS = """
import importlib.abc, sys, threading
from gpucnn import ops
from gpucnn_kernels.runtime.host_array import host_arrays

begun, found = threading.Event(), []

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "gpucnn.ops.cuda.pooling":
            begun.set()
            other.join(0.5)  # it waits for this import, or has taken half a module

def use():
    begun.wait()
    found.append(ops.backend_of(host_arrays.zeros(3)).max_pool2d_forward)

sys.meta_path.insert(0, Slow())
other = threading.Thread(target=use)
other.start()
ops.backend_of(host_arrays.zeros(3))
other.join()
assert len(found) == 1
"""


def test_a_thread_waits_for_a_backend_that_another_is_importing():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    subprocess.run([sys.executable, "-c", FIRST_USE_BY_TWO_THREADS], check=True, env=environment, timeout=60)
