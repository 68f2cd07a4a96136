"""One library in a process of its own, told on its standard input what to time on the GPU: JSON lines both ways.

Of a row it keeps the work of every variant ready (memory formats, algorithms), so that the parent can ask for
them, and for those of the other libraries, in turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

LIBRARY_NAMES = ("gpucnn", "torch", "torch compile", "cupy im2col", "jax")
_ROUND_SECONDS = 0.03  # of a round's measurement of one variant
_MOST_REPEATS = 50
_CEILING_REPEATS = 20


def make(library: str, runtime: str) -> Any:
    """The library's side. Raises what importing it does where it is not installed."""
    if library in ("gpucnn", "cupy im2col"):
        from benchmarking.gpu_others import CupyColumns
        from benchmarking.gpu_ours import OursOnGpu

        return OursOnGpu() if library == "gpucnn" else CupyColumns()
    if library == "jax":
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the others need memory, too
        from benchmarking.gpu_others import Jax

        made = Jax()
        if runtime == "cuda" and made.versions()["jax's backend"] != "gpu":
            raise RuntimeError("JAX finds no GPU")
        return made
    import torch

    from benchmarking.gpu_torch import TorchOnGpu

    if runtime == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU")
    return TorchOnGpu("cpu" if runtime == "host" else "cuda", compiled=library == "torch compile")


class LostError(Exception):
    """A variant failed, and after it every call of CUDA does: this process is of no more use."""

    def __init__(self, variant: str, why: str) -> None:
        super().__init__(why)
        self.variant = variant


class Worker:
    """Answers the parent's requests; each method is one. ``tell`` hears which variant is begun."""

    def __init__(
        self,
        peer: Any,
        clock: Any = None,
        rehearsing: bool = False,
        tell: Callable[[dict[str, Any]], None] = lambda what: None,
    ) -> None:
        self._peer, self._tell = peer, tell
        self._clock = peer.clock if clock is None else clock
        self._warming_up = 1 if rehearsing else 2
        self._round_seconds = 0.0 if rehearsing else _ROUND_SECONDS
        self._works: dict[str, tuple[Callable[[], Any], int, bool]] = {}

    def prepare(self, row: dict[str, Any], precision: str, without: Sequence[str] = ()) -> dict[str, Any]:
        """Build and warm up every variant of the row: which there are, and the reasons of those that fail.

        Raises LostError.
        """
        self._works.clear()
        self._peer.forget()
        failed: dict[str, str] = {}
        settings: dict[str, Any] = {}
        whole = row["kind"] in (
            "step",
            "inference",
            "time_to_accuracy",
        )  # gpu_rows.NETWORKS, which imports our kernels
        for variant in self._peer.variants:
            if variant in without:
                continue
            self._tell({"at": variant})
            try:
                work = self._peer.prepare_in(row, precision, variant)
                if work is None:
                    continue
                for _ in range(self._warming_up):
                    self._clock.together(work, 1)  # compiles, chooses algorithms, makes graphs
                once = max(self._clock.together(work, 1), 1e-7)
            except Exception as error:  # one that cannot be done here is a blank, with the reason
                failed[variant] = reason(error)
                self._require_cuda(variant, failed[variant])
                continue
            self._works[variant] = work, max(1, min(_MOST_REPEATS, int(self._round_seconds / once))), whole
            settings[variant] = dict(getattr(self._peer, "settings", {}))
        return {"variants": list(self._works), "failed": failed, "settings": settings}

    def measure(self, variant: str) -> dict[str, Any]:
        """Seconds of each call of a round; of steps their mean."""
        if variant not in self._works:
            raise RuntimeError("its process was ended by another variant")
        work, repeats, whole = self._works[variant]
        self._tell({"at": variant})
        try:
            if whole:
                return {"seconds": [self._clock.together(work, repeats)]}
            return {"seconds": self._clock.samples(work, repeats)}
        except Exception as error:
            self._require_cuda(variant, reason(error))
            raise

    def _require_cuda(self, variant: str, why: str) -> None:
        """Raise LostError where even waiting for the GPU fails: after a bad access all calls do."""
        try:
            self._peer.synchronize()
        except Exception:
            raise LostError(variant, why) from None

    def ceiling(self, name: str, size: int) -> dict[str, Any]:
        """Seconds of calls of a copy or of a large matrix product."""
        work = self._peer.ceiling(name, size)
        self._clock.together(work, 3)
        found = self._clock.samples(work, _CEILING_REPEATS)
        del work
        self._peer.forget()
        return {"seconds": found}

    def proof(self, precision: str) -> dict[str, Any]:
        """The relative error of a convolution against float64, which shows what precision was really at work."""
        import numpy

        random = numpy.random.default_rng(5)
        x, weight = (
            random.standard_normal(shape).astype(numpy.float32) for shape in ((2, 64, 12, 12), (64, 64, 3, 3))
        )
        if precision in ("bfloat16", "float16"):  # numbers that both have: what differs is the arithmetic
            x, weight = (numpy.round(values * 8) / 8 for values in (x, weight))
        result = self._peer.proof(x, weight, precision)
        if result is None:
            return {"error_ratio": None}
        padded = numpy.pad(x.astype(numpy.float64), ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = numpy.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        exact = numpy.einsum("nchwrs,kcrs->nkhw", windows, weight.astype(numpy.float64), optimize=True)
        return {"error_ratio": float(numpy.sqrt(((result - exact) ** 2).mean() / (exact**2).mean()))}


def reason(error: Exception) -> str:
    """An error as one short line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def main(library: str, runtime: str) -> int:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    began = time.perf_counter()
    try:
        made = make(library, runtime)
        worker = Worker(
            made, rehearsing=runtime == "host", tell=lambda what: print(json.dumps(what), file=answers)
        )
        facts = made.facts() if hasattr(made, "facts") else {}
        hello = {"versions": made.versions(), "facts": facts, "seconds": time.perf_counter() - began}
    except Exception as error:  # a library that is not installed or does not work is a blank, not a failure
        print(json.dumps({"error": reason(error)}), file=answers)
        return 1
    print(json.dumps(hello), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except LostError as error:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps({"error": str(error), "lost": error.variant}), file=answers)
            return 1
        except Exception as error:
            answer = {"error": reason(error)}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
