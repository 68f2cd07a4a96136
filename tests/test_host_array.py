"""HostArray behaves as a CuPy array does: nothing mixes with NumPy, and its type outlives every operation."""

import copy
import subprocess
import sys

import numpy
import pytest

from gpucnn_kernels.runtime.host_array import HostArray, host_arrays


@pytest.fixture
def host():
    return host_arrays.asarray(numpy.arange(6, dtype=numpy.float32).reshape(2, 3))


PLAIN = numpy.ones((2, 3), numpy.float32)


@pytest.mark.parametrize(
    ("operation", "shape"),
    [
        (lambda a: a[0], (3,)),
        (lambda a: a[0, 1], ()),
        (lambda a: a[..., None, 1:], (2, 1, 2)),
        (lambda a: a[a > 2], (3,)),
        (lambda a: a[host_arrays.asarray([0, 0, 1])], (3, 3)),
        (lambda a: next(iter(a[0])), ()),
        (lambda a: a.reshape(3, 2), (3, 2)),
        (lambda a: a.T, (3, 2)),
        (lambda a: a.copy(), (2, 3)),
        (lambda a: a.astype(numpy.float64), (2, 3)),
        (lambda a: copy.deepcopy(a), (2, 3)),
        (lambda a: a + 1, (2, 3)),
        (lambda a: numpy.float32(2) * a, (2, 3)),
        (lambda a: -a / a.max(), (2, 3)),
        (lambda a: a == 1, (2, 3)),
        (lambda a: abs(a), (2, 3)),
        (lambda a: divmod(a, 2)[1], (2, 3)),
        (lambda a: a @ a.T, (2, 2)),
        (lambda a: a.clip(None, 3), (2, 3)),
        (lambda a: numpy.sqrt(a), (2, 3)),
        (lambda a: numpy.where(a > 1, a, 0), (2, 3)),
        (lambda a: numpy.concatenate([a, a], axis=1), (2, 6)),
        (lambda a: numpy.zeros_like(a), (2, 3)),
        (lambda a: numpy.add.reduce(a), (3,)),
        (lambda a: numpy.count_nonzero(a), ()),
        (lambda a: numpy.linalg.norm(a), ()),
        (lambda a: a.sum(), ()),
        (lambda a: a.mean(axis=0), (3,)),
        (lambda a: a.std(), ()),
        (lambda a: a.argmax(), ()),
        (lambda a: a.argmax(axis=1), (2,)),
        (lambda a: a.all(), ()),
        (lambda a: a.nonzero()[0], (5,)),
        (lambda a: a.dot(a.T), (2, 2)),
        (lambda a: host_arrays.exp(a), (2, 3)),
        (lambda a: host_arrays.maximum(a, 0), (2, 3)),
        (lambda a: host_arrays.maximum.reduce(a), (3,)),
        (lambda a: host_arrays.where(a > 1, a, 0), (2, 3)),
        (lambda a: host_arrays.stack([a, a]), (2, 2, 3)),
        (lambda a: host_arrays.empty_like(a), (2, 3)),
        (lambda a: host_arrays.empty((4, 5), a.dtype), (4, 5)),
        (lambda a: host_arrays.full(3, 2.0), (3,)),
        (lambda a: host_arrays.arange(4), (4,)),
        (lambda a: host_arrays.linspace(0, 1, 7), (7,)),
        (lambda a: host_arrays.linalg.norm(a), ()),
        (lambda a: host_arrays.ascontiguousarray(a.T), (3, 2)),
        (lambda a: host_arrays.unique_counts(a).counts, (6,)),
    ],
)
def test_the_result_is_a_host_array(host, operation, shape):
    result = operation(host)
    assert type(result) is HostArray
    assert result.shape == shape


@pytest.mark.parametrize(
    "operation",
    [
        lambda a: a + PLAIN,
        lambda a: PLAIN + a,
        lambda a: a * numpy.array(2.0),
        lambda a: a * [1, 2, 3],
        lambda a: a == PLAIN,
        lambda a: PLAIN.T @ a,
        lambda a: numpy.add(a, 1, out=PLAIN.copy()),
        lambda a: numpy.add(PLAIN, 1, out=a),
        lambda a: numpy.add(a, 1, where=PLAIN > 0),
        lambda a: numpy.concatenate([a, PLAIN]),
        lambda a: numpy.where(PLAIN > 0, a, 0),
        lambda a: numpy.dot(PLAIN.T, a),
        lambda a: a.dot(PLAIN.T),
        lambda a: a[PLAIN > 0],
        lambda a: a[:, numpy.array([0])],
        lambda a: a.__setitem__(..., PLAIN),
        lambda a: a.__setitem__(0, [1, 2, 3]),
        lambda a: a.__setitem__(PLAIN > 0, 0),
        lambda a: a.__iadd__(PLAIN),
        lambda a: host_arrays.exp(PLAIN),
        lambda a: host_arrays.stack([PLAIN, a]),
        lambda a: host_arrays.zeros_like(PLAIN),
        lambda a: host_arrays.linalg.norm(PLAIN),
        lambda a: a.set(a),
        lambda a: a.set(PLAIN.astype(numpy.float64)),
    ],
)
def test_nothing_mixes_with_plain_arrays(host, operation):
    before = host.get()
    with pytest.raises(TypeError, match=r"to_device\(...\)|device arrays and numbers|set takes"):
        operation(host)
    assert numpy.array_equal(host.get(), before)
    assert numpy.array_equal(PLAIN, numpy.ones((2, 3)))


def test_a_plain_array_on_the_left_of_an_assignment_is_refused(host):
    plain = PLAIN.copy()
    with pytest.raises(TypeError, match="to_device"):
        plain += host


def test_transfers_copy(host):
    plain = numpy.arange(3.0)
    moved = host_arrays.asarray(plain)
    plain[0] = 7
    assert moved.get().tolist() == [0, 1, 2]
    taken = host.get()
    assert type(taken) is numpy.ndarray
    host[...] = 0
    assert taken[1, 2] == 5
    host.set(PLAIN)
    assert host_arrays.asnumpy(host).tolist() == PLAIN.tolist()
    with pytest.raises(ValueError, match="own shape"):
        host.set(numpy.zeros(3, numpy.float32))
    assert host_arrays.asarray(host) is host
    assert host_arrays.array(host) is not host
    assert host_arrays.asarray(host, numpy.float64).dtype == numpy.float64
    assert host_arrays.asarray([host, host]).shape == (2, 2, 3)
    assert host_arrays.asnumpy([1, 2]).tolist() == [1, 2]


def test_in_place_and_out_keep_the_object(host):
    same = host
    host += 1
    host *= 2
    assert host is same
    assert numpy.maximum(host, 5, out=host) is host
    assert host.clip(None, 6, out=host) is host
    assert host_arrays.negative(host, out=host) is host
    assert host.get().tolist() == [[-5, -5, -6], [-6, -6, -6]]
    total = host_arrays.empty(3, numpy.float32)
    assert host.sum(axis=0, out=total) is total
    assert host_arrays.sum(host, axis=0, out=total) is total
    assert total.get().tolist() == [-11, -11, -12]
    host[0] = host[1]
    host[1, 2] = 3
    assert host.get().tolist() == [[-6, -6, -6], [-6, -6, 3]]


def test_single_values_come_out_as_numbers(host):
    assert float(host.sum()) == 15
    assert int(host.argmax()) == 5
    assert host[1, 1].item() == 4
    assert bool((host >= 0).all())
    assert f"{float(host.mean()):.1f}" == "2.5"
    assert host.tolist() == [[0, 1, 2], [3, 4, 5]]
    element = host[0, 0]
    element += 8
    assert host[0, 0].item() == 8, "an element is a view, as CuPy's"


@pytest.mark.parametrize("name", ["argmax", "argmin", "clip"])
def test_what_cupy_lacks_in_bfloat16(name):
    import ml_dtypes

    array = host_arrays.asarray(numpy.array([1.0, 3.0], ml_dtypes.bfloat16))
    arguments = (None, 2) if name == "clip" else ()
    with pytest.raises(TypeError, match=rf"{name} of bfloat16: CuPy 14 has none; convert"):
        getattr(array, name)(*arguments)
    assert type(getattr(array.astype("float32"), name)(*arguments)) is HostArray


def test_views_know_their_owner():
    for owner in (host_arrays.empty(10), host_arrays.asarray(numpy.zeros(10))):
        assert owner[2:8].reshape(2, 3).base is owner
        assert owner[0:10].base is owner


def test_new_results_of_arithmetic_are_contiguous_as_cupys_are(host):
    """Whatever the order of the operands: CuPy gives the results of ufuncs in C order, NumPy in theirs."""
    turned = host.T
    for made in (turned + turned, -turned, turned > 1, host_arrays.multiply(turned, 2), *numpy.modf(turned)):
        assert made.flags.c_contiguous
        assert type(made) is HostArray
    assert (turned + turned).get().tolist() == [[0, 6], [2, 8], [4, 10]]
    assert turned.get().flags.c_contiguous
    kept = host_arrays.add(turned, turned, out=host_arrays.empty_like(turned))
    assert kept.flags.f_contiguous
    turned += 1
    assert turned.flags.f_contiguous
    assert float((host[0, 0] + 1) * 2) == 4


def test_importing_it_loads_no_compiler_and_no_gpucnn():
    code = (
        "import sys, gpucnn_kernels.runtime.host_array; "
        "print(sorted({'gpucnn', 'cupy', 'subprocess', 'ctypes.util'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert found.stdout.strip() == "[]"


def environment():
    import os
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
