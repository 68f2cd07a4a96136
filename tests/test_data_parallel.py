"""One function for many items in a few threads: the order, the errors, and no threads inside threads."""

from __future__ import annotations

import threading

import pytest

from gpucnn.data import parallel
from gpucnn.data.parallel import in_parallel


@pytest.fixture(autouse=True)
def four_processors(monkeypatch):
    monkeypatch.setattr(parallel, "cpu_count", lambda: 4)
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before, "threads end with their work"


def test_results_come_in_order():
    assert in_parallel(lambda item: item * item, range(100)) == [item * item for item in range(100)]
    assert in_parallel(str, []) == []


def test_as_many_threads_as_processors_and_the_callers_is_one():
    together = threading.Barrier(4, timeout=30)  # lets four through at once, or none
    found = in_parallel(lambda _: (together.wait(), threading.current_thread())[1], range(4))
    assert len(set(found)) == 4
    assert threading.current_thread() in found


def test_no_more_threads_than_items():
    together = threading.Barrier(2, timeout=30)
    assert sorted(in_parallel(lambda _: together.wait(), range(2))) == [0, 1]


def test_inside_it_there_are_no_more_threads():
    def inner(_):
        return set(in_parallel(lambda _: threading.current_thread(), range(8)))

    assert [len(threads) for threads in in_parallel(inner, range(8))] == [1] * 8
    together = threading.Barrier(4, timeout=30)
    in_parallel(lambda _: together.wait(), range(4))  # outside there are again


def test_the_first_items_error_is_raised_and_ends_the_work():
    later = threading.Event()
    done = []

    def fail(item: int) -> None:
        if item == 0:  # fails after item 1 has
            assert later.wait(30)
            raise ValueError("the first")
        if item == 1:
            later.set()
            raise KeyError("a later one")
        done.append(item)
        assert later.wait(30)

    with pytest.raises(ValueError, match="the first"):
        in_parallel(fail, range(1000))
    assert len(done) < 100, "no item is begun after one has failed"
    assert in_parallel(str, range(5)) == ["0", "1", "2", "3", "4"]


def test_an_interrupt_ends_the_work():
    def interrupted(item: int) -> None:
        if item == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_parallel(interrupted, range(1000))
