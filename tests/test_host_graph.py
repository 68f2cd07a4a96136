"""Graphs on the host runtime: recorded work is done by a launch alone, and what a GPU could not capture raises."""

from __future__ import annotations

import threading
from typing import Any

import numpy
import pytest

import gpucnn_kernels as kernels
from gpucnn_kernels.matmul import matmul
from gpucnn_kernels.runtime import host_graph, using
from gpucnn_kernels.runtime.host_array import host_arrays


@pytest.fixture(autouse=True)
def host_runtime():
    with using("host"):
        yield


def device(*values: float, dtype: str = "float32") -> Any:
    return host_arrays.asarray(numpy.array(values, dtype))


def test_kernels_run_at_the_launch_on_what_the_memory_then_holds() -> None:
    x = device(-1, 2, -3)
    kernels.relu_forward(x)  # compiled
    graph, y = host_graph.capture(lambda: kernels.relu_forward(x), [x])
    assert len(graph) == 1
    assert numpy.isnan(y.get()).all(), "nothing was computed"
    graph.launch()
    assert y.get().tolist() == [0, 2, 0]
    x.set(numpy.array([5, -6, 7], "float32"))
    graph.launch()
    assert y.get().tolist() == [5, 0, 7]


def test_numbers_are_those_of_the_capture() -> None:
    x, factor = device(1, 2), [2.0]
    kernels.scale(x.copy(), 1.0)
    graph, _ = host_graph.capture(lambda: kernels.scale(x, factor[0]), [x])
    factor[0] = 10.0
    graph.launch()
    graph.launch()
    assert x.get().tolist() == [4, 8]


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x, out: out.__setitem__(..., x + 1), [2, 3]),
        (lambda x, out: out.__setitem__(slice(0, 1), x[1:]), [2, 9]),
        (lambda x, out: out.fill(4), [4, 4]),
        (lambda x, out: out.__iadd__(x), [10, 11]),
        (lambda x, out: numpy.multiply(x, 3, out=out), [3, 6]),
        (lambda x, out: out.__setitem__(..., x.copy()[::-1]), [2, 1]),
        (lambda x, out: out.__setitem__(..., x.astype("float64").sum()), [3, 3]),
        (lambda x, out: out.__setitem__(..., x.argmax()), [1, 1]),
        (lambda x, out: out.__setitem__(..., (x.argmax(axis=0) == 1).sum()), [1, 1]),
        (lambda x, out: out.__setitem__(..., host_arrays.zeros(2, "float32") + x.reshape(1, 2)[0]), [1, 2]),
        (lambda x, out: out.__setitem__(..., host_arrays.concatenate([x, x])[1:3]), [2, 1]),
        (lambda x, out: out.__setitem__(..., x[host_arrays.argsort(-x)]), [2, 1]),
        (lambda x, out: out.__setitem__(..., host_arrays.ascontiguousarray(x[::-1])), [2, 1]),
        (lambda x, out: matmul(x.reshape(1, 2), x.reshape(2, 1), out=out[:1].reshape(1, 1)), [5, 9]),
        (lambda x, out: numpy.add.at(out, numpy.s_[:1], 1), [10, 9]),
        (lambda x, out: out.__setitem__(..., x.view("int32").view("float32")), [1, 2]),
    ],
)
def test_arrays_operations_are_work_too(work: Any, expected: list[float]) -> None:
    x, out = device(0, 0), device(9, 9)
    graph, _ = host_graph.capture(lambda: work(x, out), [x, out])
    assert out.get().tolist() == [9, 9]
    x.set(numpy.array([1, 2], "float32"))
    graph.launch()
    assert out.get().tolist() == expected


def test_views_are_no_work() -> None:
    x = device(1, 2, 3, 4)
    graph, view = host_graph.capture(lambda: x.reshape(2, 2).transpose()[1:], [x])
    assert len(graph) == 0
    assert view.get().tolist() == [[2, 4]]


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (lambda x: float(x.sum()), "look at an array's values"),
        (lambda x: bool((x > 0).all()), "look at an array's values"),
        (lambda x: int(x.argmax()), "look at an array's values"),
        (lambda x: x.get(), "copy an array to the host"),
        (lambda x: x[0].item(), "look at an array's values"),
        (lambda x: x.tolist(), "look at an array's values"),
        (lambda x: host_arrays.asnumpy(x), "copy an array to the host"),
        (lambda x: host_arrays.asarray([1.0]), "copy an array from the host"),
        (lambda x: x.set(numpy.zeros(2, "float32")), "copy an array from the host"),
        (lambda x: x[x > 1], "count the places of a mask"),
        (lambda x: kernels.sum_of_squares(x), "look at an array's values"),
        (lambda x: kernels.gelu_forward(x.astype("float16")), "compile activations"),
        (lambda x: host_graph.capture(lambda: None), "begin another capture"),
        (lambda x: host_graph.HostGraph([], []).launch(), "launch a graph"),
    ],
)
def test_what_a_gpu_cannot_capture(work: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpucnn_kernels.runtime import current

    x = device(1, 2)
    kernels.sum_of_squares(x)
    if "compile" in what:
        monkeypatch.setattr(current(), "_modules", {})
    with pytest.raises(RuntimeError, match=f"cannot {what}.* while work is captured"):
        host_graph.capture(lambda: work(x), [x])
    assert x.get().tolist() == [1, 2]
    assert host_graph.recording() is None


@pytest.mark.parametrize(
    "work",
    [
        lambda known, other: kernels.relu_forward(other),
        lambda known, other: kernels.relu_forward(known, out=other),
        lambda known, other: known + other,
        lambda known, other: other.fill(0),
        lambda known, other: known.__setitem__(0, other[0]),
        lambda known, other: matmul(known.reshape(2, 1), other.reshape(1, 2)),
    ],
)
def test_memory_that_nothing_keeps(work: Any) -> None:
    known, other = device(1, 2), device(3, 4)
    kernels.relu_forward(known)
    host_graph.capture(lambda: work(known, other), [known, other])
    with pytest.raises(RuntimeError, match=r"uses [48] bytes of memory that were neither made in it nor given"):
        host_graph.capture(lambda: work(known, other), [known])


def test_a_view_that_is_kept_keeps_the_whole() -> None:
    whole = device(1, 2, 3)
    graph, _ = host_graph.capture(lambda: whole.fill(0), [whole[1:2]])
    graph.launch()
    assert whole.get().tolist() == [0, 0, 0]


def test_other_threads_are_not_captured() -> None:
    x, seen = device(1, 2), []

    def other() -> None:
        y = x + 1
        seen.append(y.get().tolist())

    def run() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    graph, _ = host_graph.capture(run, [])
    assert seen == [[2, 3]]
    assert len(graph) == 0
