"""Sources compiled ahead by several processes at a time, into the cache on disk that all processes share.

NVRTC compiles one program at a time in a process, whatever the threads. The processes are asked over pipes, one
source after the other, so that none waits for another; each is this module's own program::

    python -m gpucnn_kernels.runtime.ahead RUNTIME DEVICE
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence

from gpucnn_kernels.runtime import VARIABLE, current, using
from gpucnn_kernels.source import Source, load

PATIENCE_SECONDS = 120.0
"""Without an answer from any of them the processes are taken for ones that hang."""

MOST_PROCESSES = 16
"""More compile little faster, and on a GPU each has a context, of some 0.5 GB of its memory."""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_in_processes(
    runtime: str, device: int, sources: Sequence[Source], processes: int, begin: Callable[[Source], object]
) -> list[Source]:
    """Compile ``sources``, of this package's files, for a device of a runtime; gives those that are left.

    ``begin`` is called before each, in some thread, one call at a time. What a process says of a failure is not
    kept: the caller compiles these itself, and has the error. Processes that end, hang or cannot start leave their
    work to the others, or to the caller.
    """
    waiting, done, lock = deque(sources), list[Source](), threading.Lock()
    ends: queue.SimpleQueue[int] = queue.SimpleQueue()  # 1 of a thread that ends, 0 of an answer
    started: list[subprocess.Popen[str]] = []

    def next_source() -> Source | None:
        with lock:
            if not waiting:
                return None
            source = waiting.popleft()
            begin(source)
            return source

    def serve(process: subprocess.Popen[str]) -> None:
        try:
            while (source := next_source()) is not None:
                answer = _ask(process, source)
                if answer == "done":
                    done.append(source)
                elif not answer:  # it has ended
                    return
                ends.put(0)
        finally:
            ends.put(1)

    try:
        for _ in range(min(processes, MOST_PROCESSES, len(sources))):
            started.append(_start(runtime, device))  # noqa: PERF401 (those that started are ended)
        for process in started:
            threading.Thread(target=serve, args=(process,), daemon=True).start()
        _wait(ends, started)
    finally:
        for process in started:
            _end(process)
    return [source for source in sources if source not in done]


def _wait(ends: queue.SimpleQueue[int], started: Sequence[subprocess.Popen[str]]) -> None:
    """Until all threads have ended; where nothing is heard of them, end the processes, and wait once more."""
    ended, patient = 0, True
    while ended < len(started):
        try:
            ended += ends.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            if not patient:
                return
            patient = False
            for process in started:
                process.kill()


def _start(runtime: str, device: int) -> subprocess.Popen[str]:
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)
    return subprocess.Popen(
        [sys.executable, "-m", __name__, runtime, str(device)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # who asked compiles what failed once more, and hears of it then
        text=True,
        env=os.environ | {"PYTHONPATH": path, VARIABLE: runtime},
    )


def _ask(process: subprocess.Popen[str], source: Source) -> str:
    """The process's answer to a source: "done", "failed", or nothing where it has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps([source.name, source.definitions]) + "\n")
        process.stdin.flush()
    except OSError:
        return ""
    return process.stdout.readline().strip()


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(10)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()  # and not waited for: a driver may hold on to it
    if process.stdout is not None:
        process.stdout.close()


def main(runtime: str, device: int) -> None:
    """Compile what is asked for on the standard input, a line each, until it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes another way
    with using(runtime):
        for line in sys.stdin:
            name, definitions = json.loads(line)
            try:
                current().module(load(name, tuple((macro, value) for macro, value in definitions)), device)
            except Exception:  # of any kind: the caller finds out
                print("failed", file=answers)
            else:
                print("done", file=answers)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
