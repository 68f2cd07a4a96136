"""The thread pool under the operations: order, errors, nesting, BLAS, scratch memory, settings."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import numpy
import pytest
import threadpoolctl

from gpucnn.errors import ArgumentError
from gpucnn.ops.cpu import threads
from gpucnn.ops.cpu.threads import parallel_for, scratch, single_threaded_blas, thread_count


def blas_threads() -> list[int]:
    return [entry["num_threads"] for entry in threadpoolctl.threadpool_info() if entry["user_api"] == "blas"]


@pytest.fixture
def two_blas_threads() -> Iterator[None]:
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        yield


@pytest.fixture(params=["1", "2", "3"])
def any_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", request.param)
    return int(request.param)


# ---------------------------------------------------------------- how many


def test_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "7")
    assert thread_count() == 7
    monkeypatch.delenv("GPUCNN_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert thread_count() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert thread_count() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert thread_count() == 1


@pytest.mark.parametrize("text", ["0", "-2", "two", "1.5", " 2", "²"])
def test_thread_count_must_be_a_positive_integer(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", text)
    with pytest.raises(ArgumentError, match="GPUCNN_NUM_THREADS must be a positive integer"):
        thread_count()
    with pytest.raises(ArgumentError, match="GPUCNN_NUM_THREADS"):
        parallel_for(3, lambda _: None)


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_task_runs_once(count: int, any_threads: int) -> None:
    runs = [0] * count

    def task(number: int) -> None:
        runs[number] += 1

    parallel_for(count, task)
    assert runs == [1] * count


def test_tasks_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "3")
    meeting = threading.Barrier(3, timeout=20)  # passes only when three threads have arrived
    places: list[int] = []
    parallel_for(3, lambda _: places.append(meeting.wait()))
    assert sorted(places) == [0, 1, 2]


def test_small_work_stays_in_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "3")
    order: list[tuple[int, int]] = []
    parallel_for(5, lambda number: order.append((number, threading.get_ident())), small=True)
    assert order == [(number, threading.get_ident()) for number in range(5)]


def test_nested_work_stays_in_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "2")
    pairs: list[tuple[int, int]] = []

    def outer(_: int) -> None:
        here = threading.get_ident()
        parallel_for(4, lambda _: pairs.append((here, threading.get_ident())))

    parallel_for(4, outer)
    assert len(pairs) == 16
    assert all(outside == inside for outside, inside in pairs)


def test_several_threads_may_call_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "2")
    totals = numpy.zeros((6, 200), int)

    def call(row: int) -> None:
        def task(number: int) -> None:
            totals[row, number] += number

        parallel_for(200, task)

    callers = [threading.Thread(target=call, args=(row,)) for row in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert numpy.array_equal(totals, numpy.tile(numpy.arange(200), (6, 1)))


# ---------------------------------------------------------------- errors


def test_the_first_exception_is_raised_and_the_rest_left_undone(any_threads: int) -> None:
    begun: list[int] = []

    def task(number: int) -> None:
        begun.append(number)
        time.sleep(0.001)
        if number >= 2:
            raise ValueError(f"task {number}")

    with pytest.raises(ValueError, match="task 2"):
        parallel_for(1000, task)
    assert len(begun) < 20
    parallel_for(3, begun.append)  # the pool works on
    assert begun[-3:].count(2) == 1


def test_nothing_runs_any_more_once_the_exception_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "2")
    started, ended = threading.Event(), threading.Event()

    def task(number: int) -> None:
        if number == 0:
            started.wait(20)
            raise KeyboardInterrupt
        started.set()
        time.sleep(0.05)
        ended.set()

    with pytest.raises(KeyboardInterrupt):
        parallel_for(2, task)
    assert ended.is_set()


def test_tasks_give_no_floating_point_warnings(any_threads: int) -> None:
    values = numpy.array([0.0, numpy.inf, 1e308])

    def task(_: int) -> None:
        assert not numpy.isfinite((values * 10 - values * 10) / 0.0).any()

    parallel_for(4, task)
    with pytest.warns(RuntimeWarning):
        values / 0.0  # outside, NumPy warns as before


# ---------------------------------------------------------------- BLAS


@pytest.mark.usefixtures("two_blas_threads")
def test_blas_has_one_thread_inside_and_its_own_number_after(any_threads: int) -> None:
    before = blas_threads()
    inside: list[int] = []
    parallel_for(4, lambda _: inside.extend(blas_threads()))
    assert inside
    assert set(inside) == {1}
    assert blas_threads() == before
    with single_threaded_blas():
        with single_threaded_blas():
            assert set(blas_threads()) == {1}
        assert set(blas_threads()) == {1}
    assert blas_threads() == before


@pytest.mark.usefixtures("two_blas_threads")
def test_blas_is_restored_after_an_exception() -> None:
    before = blas_threads()
    with pytest.raises(ZeroDivisionError):
        parallel_for(2, lambda number: 1 // number)
    assert blas_threads() == before


# ---------------------------------------------------------------- scratch


def test_scratch_is_used_again_a_name_and_thread() -> None:
    first = scratch("test", (3, 5), "float32")
    assert first.shape == (3, 5)
    assert first.dtype == numpy.float32
    assert numpy.shares_memory(first, scratch("test", (15,), "int32"))
    assert numpy.shares_memory(scratch("test", (100,), "float64"), scratch("test", (2,), "float64"))
    assert not numpy.shares_memory(scratch("test", (3,), "uint8"), scratch("other", (3,), "uint8"))
    elsewhere: list[numpy.ndarray] = []
    thread = threading.Thread(target=lambda: elsewhere.append(scratch("test", (3,), "uint8")))
    thread.start()
    thread.join()
    assert not numpy.shares_memory(elsewhere[0], scratch("test", (3,), "uint8"))


def test_large_scratch_is_not_kept() -> None:
    size = threads._KEPT_SCRATCH_BYTES + 1
    large = scratch("large", (size,), "uint8")
    assert large.nbytes == size
    assert not numpy.shares_memory(large, scratch("large", (size,), "uint8"))
    assert scratch("nothing", (0, 4), "float32").shape == (0, 4)


# ---------------------------------------------------------------- fork


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_pool_works_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPUCNN_NUM_THREADS", "2")
    parallel_for(2, lambda _: None)
    child = os.fork()
    if child == 0:
        # Whatever happens, the child must not go on with the test run.
        status = 1
        try:
            meeting = threading.Barrier(2, timeout=20)
            parallel_for(2, lambda _: meeting.wait() and None)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
