"""Calling one function for many items in a few threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cpu_count() -> int:
    """How many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """``function`` of each item, in order; the first item's error, if any, ends it. No thread stays behind.

    The caller's thread does its share. Inside ``function`` there are threads enough: there it calls one by one.
    """
    threads = 1 if _place.inside else min(cpu_count(), len(items))
    if threads <= 1:
        return [function(item) for item in items]
    work = _Work(function, items)
    helpers = [
        threading.Thread(target=work.run, name=f"gpucnn-decode-{number}", daemon=True)
        for number in range(1, threads)
    ]
    try:
        for helper in helpers:
            helper.start()
        work.run()
    finally:
        work.stop()  # an interrupt may have come between two items
        for helper in helpers:
            if helper.ident is not None:
                helper.join()
    return work.results()


class _Place(threading.local):
    inside: bool = False  # whether this thread is in a function that in_parallel calls


_place = _Place()


class _Work(Generic[Item, Result]):
    """Items taken in order, one at a time, by whichever thread is free: a future for each costs too much."""

    def __init__(self, function: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self._function, self._items = function, items
        self._results: dict[int, Result] = {}
        self._errors: dict[int, BaseException] = {}
        self._next = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        """Do items until none is left, or one has failed."""
        _place.inside = True
        try:
            while (number := self._take()) is not None:
                try:
                    self._results[number] = self._function(self._items[number])
                except BaseException as error:
                    self._errors[number] = error
                    self.stop()
        finally:
            _place.inside = False

    def _take(self) -> int | None:
        with self._lock:
            if self._next >= len(self._items):
                return None
            self._next += 1
            return self._next - 1

    def stop(self) -> None:
        """Let no more items be taken."""
        with self._lock:
            self._next = len(self._items)

    def results(self) -> list[Result]:
        """The results in order; raises the error of the first item that failed."""
        if self._errors:
            try:
                raise self._errors[min(self._errors)]
            finally:
                self._errors.clear()  # the error's traceback holds this frame, which must not hold the error
        return [self._results[number] for number in range(len(self._items))]
