"""Where a training step's time goes: every launch of it between two events, added up by kernel and size.

The GPU is kept busy before each step for longer than Python takes to queue it, so that what lies between two
events is the kernel's time and not the wait for Python. What is no kernel of gpucnn_kernels and no matrix product
of its calls, as CuPy's own elementwise operations, is what is left of the whole.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gpucnn_kernels import launch, matmul
from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.runtime import itemsize

_AHEAD = 2.0  # how many times as long as Python takes for a step the GPU is kept busy before it


@dataclass
class Entry:
    """A kernel on arrays of one size, in a step."""

    name: str
    shape: tuple[int, ...]  # of the largest array
    bytes: float = 0.0  # of a step: each launch's arrays, each once
    launches: int = 0
    samples: list[float] = field(default_factory=list)  # seconds of each step

    @property
    def seconds(self) -> float:
        """The median over the steps."""
        return statistics.median(self.samples)


class Profiler:
    """Puts events around launches.

    ``make_event`` gives an object with ``record()``, ``elapsed`` the milliseconds between two of them; ``busy``
    keeps the GPU at work for so many seconds, and ``wait`` waits for all that was queued.
    """

    def __init__(
        self,
        make_event: Callable[[], Any],
        elapsed: Callable[[Any, Any], float],
        busy: Callable[[float], Any],
        wait: Callable[[], Any],
    ) -> None:
        self._make_event, self._elapsed, self._busy, self._wait = make_event, elapsed, busy, wait
        self._spans: list[tuple[str, tuple[int, ...], float, Any, Any]] = []

    def profile(self, step: Callable[[], Any], steps: int) -> tuple[list[Entry], float]:
        """(the step's kernels, the longest first, the median seconds of a whole step), of ``steps`` steps."""
        step()  # compiles
        self._wait()
        began = time.perf_counter()
        with self._watching():
            step()
        queued = time.perf_counter() - began
        self._wait()
        entries: dict[tuple[str, tuple[int, ...]], Entry] = {}
        whole = []
        for number in range(steps):
            self._spans.clear()
            self._busy(_AHEAD * queued)
            first, last = self._make_event(), self._make_event()
            with self._watching():
                first.record()
                step()
                last.record()
            self._wait()
            whole.append(self._elapsed(first, last) / 1e3)
            sums: dict[tuple[str, tuple[int, ...]], float] = {}
            for name, shape, moved, before, after in self._spans:
                entry = entries.setdefault((name, shape), Entry(name, shape))
                if number == 0:
                    entry.launches += 1
                    entry.bytes += moved
                sums[name, shape] = sums.get((name, shape), 0.0) + self._elapsed(before, after) / 1e3
            for key, seconds in sums.items():
                entries[key].samples.append(seconds)
        return sorted(entries.values(), key=lambda entry: -entry.seconds), statistics.median(whole)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Inside, launches and matrix products are between events."""
        start, multiply = launch.Call.launch, matmul.matmul
        holders = [
            module
            for name, module in list(sys.modules.items())
            if name.startswith("gpucnn_kernels.") and getattr(module, "matmul", None) is multiply
        ]

        def launched(call: Any, source: Any, kernel: str, *others: Any, **given: Any) -> None:
            with self._span(kernel, given.values()):
                start(call, source, kernel, *others, **given)

        def multiplied(a: Any, b: Any, *, out: Any = None, **given: Any) -> Any:
            with self._span("matrix product", (a, b, out)):
                return multiply(a, b, out=out, **given)

        launch.Call.launch = launched  # type: ignore[assignment, method-assign]
        for module in holders:
            module.matmul = multiplied  # type: ignore[attr-defined]
        try:
            yield
        finally:
            launch.Call.launch = start  # type: ignore[method-assign]
            for module in holders:
                module.matmul = multiply  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _span(self, name: str, values: Any) -> Iterator[None]:
        sizes: dict[int, tuple[float, tuple[int, ...]]] = {}
        for value in values:
            if isinstance(value, DeviceArray):
                sizes[value.address] = (math.prod(value.shape) * itemsize(value.dtype), value.shape)
            elif hasattr(value, "nbytes"):
                sizes[id(value)] = (value.nbytes, tuple(value.shape))
        shape = max(sizes.values(), default=(0.0, ()))[1]
        before, after = self._make_event(), self._make_event()
        before.record()
        yield
        after.record()
        self._spans.append((name, shape, sum(size for size, _ in sizes.values()), before, after))


class WallEvent:
    """Stands for an event where work is done when it returns."""

    def record(self) -> None:
        """Now."""
        self.at = time.perf_counter()

    @staticmethod
    def elapsed(first: WallEvent, last: WallEvent) -> float:
        """Milliseconds."""
        return (last.at - first.at) * 1e3


def table(entries: list[Entry], whole: float) -> str:
    """As Markdown, the longest first."""
    lines = ["| kernel | largest array | launches | us | share | MB | TB/s |", "|---|---|---|---|---|---|---|"]
    for entry in entries:
        shape = "x".join(map(str, entry.shape))
        lines.append(
            f"| `{entry.name}` | {shape} | {entry.launches} | {entry.seconds * 1e6:.1f} | "
            f"{entry.seconds / whole:.1%} | {entry.bytes / 1e6:.1f} | {entry.bytes / entry.seconds / 1e12:.2f} |"
        )
    rest = whole - sum(entry.seconds for entry in entries)
    lines.append(f"| everything else, and between | | | {rest * 1e6:.1f} | {rest / whole:.1%} | | |")
    launches = sum(entry.launches for entry in entries)
    lines.append(f"| the step | | {launches} | {whole * 1e6:.1f} | 100% | | |")
    return "\n".join(lines) + "\n"
