"""A worker process as its parent sees it: requests with a time limit, and a new process after one that hangs."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent


class TooLateError(Exception):
    """The answer did not come in time; the process was ended."""


class Library:
    """A library's worker, started when it is first asked something and again after it was ended."""

    def __init__(self, name: str, runtime: str) -> None:
        self.name, self.runtime = name, runtime
        self.hello: dict[str, Any] = {}
        self.at: str | None = None
        """The variant that the process was at, by what it said last."""
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def start(self, deadline: float) -> None:
        """Start the process and read who it is; ``hello`` says "error" where it does not work."""
        self.launch()
        self.hello = self._read(deadline)

    def launch(self) -> None:
        """Start the process, if it is not: importing takes seconds, and several may do that at a time."""
        if self._process is not None:
            return
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), str(SCRIPTS.parent / "kernels")]),
            "GPUCNN_KERNELS_RUNTIME": self.runtime,
        }
        command = [sys.executable, "-m", "benchmarking.gpu_worker", self.name, self.runtime]
        self._buffer = b""
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )

    @property
    def works(self) -> bool:
        """Whether the library is there."""
        return bool(self.hello) and "error" not in self.hello

    def ask(self, deadline: float, do: str, **what: Any) -> dict[str, Any]:
        """The answer to a request. Raises TooLateError where it has not come by ``deadline`` (time.monotonic).

        "lost" in it names the variant that ended the process, or after which CUDA fails in it for ever; the next
        request starts another.
        """
        self.at = None
        if self._process is None:
            self.start(deadline)
        if not self.works:
            return self.hello
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
        except BrokenPipeError:
            return self._ended()
        return self._read(deadline)

    def _read(self, deadline: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while True:
                while b"\n" not in self._buffer:
                    if not selector.select(max(0.0, deadline - time.monotonic())):
                        self.close(at_once=True)
                        raise TooLateError
                    part = os.read(self._process.stdout.fileno(), 1 << 16)
                    if not part:
                        return self._ended()
                    self._buffer += part
                line, _, self._buffer = self._buffer.partition(b"\n")
                answer: dict[str, Any] = json.loads(line)
                if "at" not in answer:
                    break
                self.at = answer["at"]
        if "lost" in answer:
            self.close()
        return answer

    def _ended(self) -> dict[str, Any]:
        """What to say of a process that ended by itself; the next request starts another."""
        assert self._process is not None
        status = self._process.wait()
        self._close_pipes()
        why = {"error": f"the process ended with status {status}"}
        return why if self.at is None else why | {"lost": self.at}

    def close(self, at_once: bool = False) -> None:
        """End the process."""
        if self._process is None:
            return
        process = self._process
        if at_once:
            process.kill()
        elif process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()  # and not waited for: the driver may hold on to it
        self._close_pipes()

    def _close_pipes(self) -> None:
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None
