"""Runs the parts of a validation in a process that may break or hang, and starts another one where it does."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.gpu_validation.bench import Outcome
from scripts.gpu_validation.parts import FAMILY, ContextLostError, Part, Runner, Settings, as_text

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = {"family": 90.0, "training": 150.0, "captured": 150.0}
"""For a single check, or for a whole training run: after it a process is taken for one that hangs."""

_GRACE_SECONDS = 30.0  # for a check that has begun when the time is over
_MOST_BREAKS = 6  # of a part: then what is left of it is given up

Key = tuple[str, str, str, str]
Record = dict[str, Any]


class Found:
    """What the parts have found so far: records of outcomes by key, and results of runs by part."""

    def __init__(self) -> None:
        self.operations: dict[Key, Record] = {}
        self.results: dict[Part, Record] = {}
        self.late: list[Part] = []

    def note(self, record: Record) -> None:
        """A record is there, or has grown."""
        self.operations[record["family"], record["operation"], record["dtype"], record["algorithm"]] = record

    def fail(self, key: Key, message: str) -> None:
        """A failure of an outcome, which may have no record yet."""
        record = self.operations.setdefault(key, Outcome(*key).record())
        record["failed"] += 1
        record["failures"] = [*record["failures"], message]

    def said(self, part: Part) -> str:
        """What became of a part, in a line."""
        if part.kind != FAMILY:
            result = self.results.get(part)
            return "not run" if result is None else "passed" if result["passed"] else "FAILED"
        rows = [record for key, record in self.operations.items() if key[0] == part.name]
        failed, runs = sum(row["failed"] for row in rows), sum(row["runs"] for row in rows)
        if failed:
            return f"{failed} of {runs} FAILED"
        return f"{runs} runs passed" if runs else "nothing to check on this runtime"

    def ends(self, part: Part, answer: Record) -> None:
        """A part is over."""
        if "late" in answer:
            self.late.append(part)
        if "result" in answer:
            self.results[part] = answer["result"]
        if "error" in answer:
            self.breaks(part, answer["error"])

    def breaks(self, part: Part, message: str) -> None:
        """A part broke off outside of a check."""
        if part.kind == FAMILY:
            self.fail((part.name, part.name, "", ""), message)
        else:
            name = {"training": "network", "captured": "recipe"}[part.kind]
            self.results[part] = {name: part.name, "passed": False, "failures": [message]}


def run_here(settings: Settings, found: Found) -> Any:
    """A function (part, seconds) that runs in this process, which then shares its fate: for compute-sanitizer."""

    def tell(what: Record) -> None:
        if "record" in what:
            found.note(what["record"])

    runner = Runner(settings, tell)

    def run(part: Part, seconds: float) -> None:
        try:
            found.ends(part, runner.run(part, seconds, []))
        except ContextLostError:
            raise SystemExit(f"validate_gpu.py: after {part.title} no call of CUDA works any more") from None

    return run


class Supervisor:
    """A process that runs parts, and its successors.

    ``command`` starts one; it speaks the language of parts.py.
    """

    def __init__(self, settings: Settings, found: Found, command: Sequence[str] | None = None) -> None:
        program = str(ROOT / "scripts" / "validate_gpu.py")
        self._command = list(command or [sys.executable, program, "--parts", as_text(settings)])
        self._found = found
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self, part: Part, seconds: float) -> None:
        """Run a part, ``seconds`` at most; what it finds goes to ``found``, its breaking, too."""
        deadline = time.monotonic() + seconds
        without: list[Key] = []
        for _ in range(_MOST_BREAKS):
            broke_at, why = self._try(part, deadline, without)
            if why is None:
                return
            if broke_at is None:
                self._found.breaks(part, why)
                return
            if why:
                self._found.fail(broke_at, why)
            without.append(broke_at)
        self._found.breaks(part, f"broke off {_MOST_BREAKS} times: the rest of it is not run")

    def _try(self, part: Part, deadline: float, without: list[Key]) -> tuple[Key | None, str | None]:
        """(the check that broke the process, why): (None, None) where the part came to its end.

        No reason, an empty one, is where the process has told it itself, as a failure of that check.
        """
        self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        request = {"part": [part.kind, part.name], "seconds": deadline - time.monotonic(), "without": without}
        with contextlib.suppress(OSError):  # it has ended, and says so below
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        at: Key | None = None
        broken: Key | None = None
        problem = error = ""
        while True:
            patience = min(PATIENCE_SECONDS[part.kind], max(deadline - time.monotonic(), 0.0) + _GRACE_SECONDS)
            try:
                line = self._lines.get(timeout=patience)
            except queue.Empty:
                self.close(at_once=True)
                return at, f"{problem}: no answer after {patience:.0f} s; its process was ended".removeprefix(": ")
            if not line:
                status = self._process.wait()
                self.close()
                return at, f"{problem}: its process ended with status {status}".removeprefix(": ")
            said = json.loads(line)
            if "at" in said:
                *key, problem = said["at"]
                at = key[0], key[1], key[2], key[3]
            elif "record" in said:
                self._found.note(said["record"])
                broken, at, problem = at, None, ""
            elif "error" in said:
                error = said["error"]
            elif "lost" in said:
                self.close()
                return (broken, "") if broken and not error else (None, error or "no call of CUDA works any more")
            else:
                self._found.ends(part, said["done"])
                return None, None

    def _start(self) -> None:
        if self._process is not None:
            return
        path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        process = self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        )
        lines = self._lines = queue.SimpleQueue()

        def read() -> None:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    lines.put(line)
            lines.put("")

        threading.Thread(target=read, daemon=True).start()

    def close(self, at_once: bool = False) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        if at_once:
            process.kill()
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()  # and not waited for: the driver may hold on to it
