"""Measuring instead of reckoning: the ways and tiles of a convolution are tried once, the fastest is remembered.

    with gpucnn_kernels.autotune():      # or GPUCNN_KERNELS_AUTOTUNE=1
        y = gpucnn_kernels.conv2d_forward(x, weight, padding=1)

The first call of a problem (its shape, dtype, precision and memory format) runs every candidate of
:mod:`gpucnn_kernels.conv2d_choice` some times on the call's own arrays, between events, and keeps the one with the
least median. It is remembered on disk, by GPU, driver, CUDA and the text of the kernels, so other processes and
later runs do not measure again; what is damaged or of another GPU is not believed.

All candidates give the same bits every time, but not the same as each other: two machines, or two runs that both
measured for themselves, may choose differently where ways are equally fast. A process never changes a choice that
it has used. Inside of a graph's capture or an arena nothing is measured: what is remembered is used, or what is
reckoned.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from statistics import median

from gpucnn_kernels import conv2d_choice, conv2d_tiles
from gpucnn_kernels.errors import ArgumentError, KernelError
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.recording import is_recording
from gpucnn_kernels.runtime import current_name
from gpucnn_kernels.tuning_clock import Clock, make_clock
from gpucnn_kernels.tuning_memory import Choice, memory_of

VARIABLE = "GPUCNN_KERNELS_AUTOTUNE"
_ROUNDS = 5
_ROUND_SECONDS = 1e-3  # of a round: a quick way is repeated within it
_MOST_REPEATS = 20
_HOPELESS = 4.0  # times the best so far: such a way is not measured further

_TILES = {  # by way, and whether it is a filter's gradient
    ("implicit_gemm", False): conv2d_tiles.IMPLICIT_TILES,
    ("phases", False): conv2d_tiles.IMPLICIT_TILES,
    ("tensor", False): conv2d_tiles.TENSOR_TILES,  # by name: those of three products are called alike
    ("wgmma", False): conv2d_tiles.WGMMA_TILES,
    ("implicit_gemm", True): conv2d_tiles.FILTER_TILES,
    ("tensor", True): conv2d_tiles.TENSOR_FILTER_TILES,
}

Run = Callable[[str], None]
"""Does the work by the way of this name."""


_on: ContextVar[bool | None] = ContextVar("autotune", default=None)


def enabled() -> bool:
    """Whether this block of code, or else the environment, asks for it. Raises ArgumentError for another value."""
    chosen = _on.get()
    if chosen is not None:
        return chosen
    value = os.environ.get(VARIABLE) or "0"
    if value not in ("0", "1"):
        raise ArgumentError(f"{VARIABLE} must be 0 or 1, got '{value}'")
    return value == "1"


@contextlib.contextmanager
def autotune(on: bool = True) -> Iterator[None]:
    """Measure, or do not, in a block of code, whatever the environment says."""
    before = _on.set(on)
    try:
        yield
    finally:
        _on.reset(before)


# ---------------------------------------------------------------- choosing


_used: dict[tuple[str, int, str], Choice] = {}
_lock = threading.Lock()


def used() -> dict[str, Choice]:
    """What this process has chosen, by problem, the latest last."""
    with _lock:
        return {key: choice for (_, _, key), choice in _used.items()}


def start(
    call: Call,
    direction: str,
    problem: Conv2dProblem,
    dtype: str,
    run: Run,
    *,
    precision: str | None = None,
    channels_last: bool = False,
) -> None:
    """Do the work of ``run`` by the fastest way, once that is known; measuring does it many times."""
    key = (
        f"{direction} {dtype} {precision} {'channels-last' if channels_last else 'contiguous'} {_numbers(problem)}"
    )
    place = current_name(), call.device, key
    with _lock:
        choice = _used.get(place)
    if choice is None:
        choice = _find(call, direction, problem, dtype, run, key, precision, channels_last)
        with _lock:
            choice = _used.setdefault(place, choice)
    with conv2d_tiles.forced(choice.tile):
        run(choice.path)


def _find(
    call: Call,
    direction: str,
    problem: Conv2dProblem,
    dtype: str,
    run: Run,
    key: str,
    precision: str | None,
    channels_last: bool,
) -> Choice:
    choices = candidates(call, direction, problem, dtype, precision)
    memory = memory_of(current_name(), call.device)
    remembered = memory.get(key)
    if remembered in choices:
        return remembered
    if is_recording() or problem.N == 0:
        return Choice(
            conv2d_choice.chosen(
                direction, problem, dtype, precision=precision, channels_last=channels_last, gpu=call.gpu
            )
        )
    failures: list[Exception] = []
    seconds = measure(choices, run, make_clock(), failures)
    if not seconds:
        why = f": {failures[-1]}" if failures else ""
        raise KernelError(f"none of {', '.join(choice.path for choice in choices)} runs for {key}{why}")
    best = min(seconds, key=lambda choice: seconds[choice])
    return memory.put(key, best, seconds)


def candidates(
    call: Call, direction: str, problem: Conv2dProblem, dtype: str, precision: str | None
) -> list[Choice]:
    """Every way that may be chosen, with each of its tiles, the usual way first."""
    names = conv2d_choice.candidates(direction, problem, dtype, precision, call.gpu)
    first = conv2d_choice.usual(direction, problem, dtype, precision, call.gpu)
    found = []
    for name in sorted(names, key=lambda name: name != first):
        tiles = _TILES.get((name, direction == "backward_filter"), ())
        found += [Choice(name, tile.name) for tile in tiles] or [Choice(name)]
    return found


def measure(
    choices: list[Choice], run: Run, clock: Clock, failures: list[Exception] | None = None
) -> dict[Choice, float]:
    """The median seconds of each choice that runs; of hopeless ones a first impression.

    Why others do not run is added to ``failures``.
    """
    found: dict[Choice, float] = {}
    # No cuBLAS, too little memory, what the driver refuses: others do it. The host runtime's faults are told.
    skipped = (KernelError, MemoryError, *([RuntimeError] if current_name() == "cuda" else []))
    for choice in choices:
        with conv2d_tiles.forced(choice.tile):

            def work(path: str = choice.path) -> None:
                run(path)

            try:
                clock.seconds(work, 1)  # compiles, and makes room
                first = clock.seconds(work, 1)
                if found and first > _HOPELESS * min(found.values()):
                    found[choice] = first
                    continue
                repeats = max(1, min(_MOST_REPEATS, int(_ROUND_SECONDS / max(first, 1e-9))))
                found[choice] = median(clock.seconds(work, repeats) for _ in range(_ROUNDS))
            except skipped as error:
                if failures is not None:
                    failures.append(error)
    return found


def _numbers(problem: Conv2dProblem) -> str:
    parts = [
        f"n{problem.N}c{problem.C}h{problem.H}w{problem.W}",
        f"k{problem.K}r{problem.R}s{problem.S}",
        *("x".join(map(str, each)) for each in (problem.stride, problem.padding, problem.dilation)),
        str(problem.groups),
    ]
    return " ".join(parts)
