"""What a validation consists of, a part at a time, and the process that runs the parts.

A kernel that writes where it must not takes its whole process along: from then on every call of CUDA fails. So the
parts run in a process of their own, which says where it is and what it has found, a line of JSON each; see
supervisor.py, which starts another one after it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from scripts.gpu_validation.bench import Bench, ContextLostError, OutOfTimeError, poison_all

FAMILY, TRAINING, CAPTURED = "family", "training", "captured"


@dataclass(frozen=True)
class Part:
    """A family of checks, a training run, or one that is captured."""

    kind: str
    name: str

    @property
    def title(self) -> str:
        """As it is said."""
        return self.name if self.kind == FAMILY else f"{self.kind} {self.name}"

    @property
    def verb(self) -> str:
        """What is done with it."""
        return {FAMILY: "checking", TRAINING: "training, on the CPU too,"}.get(
            self.kind, "training, by graphs too,"
        )


@dataclass(frozen=True)
class Settings:
    """What all parts of a validation have in common."""

    runtime: str
    seed: int
    dtypes: tuple[str, ...]
    whole: bool
    exact_allocations: bool = False

    @property
    def whole_runs(self) -> bool:
        """Whether training runs have their whole length: nowhere but on a GPU."""
        return self.whole and self.runtime == "cuda"


def families() -> dict[str, Any]:
    """The checks by name, in their order."""
    from scripts.gpu_validation import (
        augmentation,
        captured,
        convolution,
        convolution_ends,
        layers,
        memory_format,
        planned,
        steps,
        surroundings,
    )

    checks = (
        layers, steps, augmentation, captured, convolution, convolution_ends, memory_format, planned, surroundings
    )  # fmt: skip
    return {name: check for module in checks for name, check in module.CHECKS.items()}


def runs(settings: Settings) -> Iterator[Part]:
    """The training runs, and those that are captured."""
    from scripts.gpu_validation import captured, training

    for run in training.WHOLE if settings.whole_runs else training.REHEARSED:
        yield Part(TRAINING, run.name)
    for recipe in captured.RECIPES if settings.whole_runs else captured.REHEARSED:
        yield Part(CAPTURED, recipe.title)


class Runner:
    """Runs parts in this process. ``tell`` gets what is found, as soon as it is."""

    def __init__(self, settings: Settings, tell: Callable[[dict[str, Any]], None]) -> None:
        from gpucnn_kernels import runtime

        if settings.exact_allocations and settings.runtime == "cuda":
            import cupy

            cupy.cuda.set_allocator(None)
        self._settings, self._tell = settings, tell
        self._bench = Bench(settings.runtime, settings.seed, settings.dtypes, settings.whole, 0.0)
        poison_all(runtime.current())

    def run(self, part: Part, seconds: float, without: list[list[str]]) -> dict[str, Any]:
        """What became of it: "result" of a run; "late" where the time was over; "error" where it broke off.

        ``without`` are the keys of outcomes that are left out. Raises ContextLostError.
        """
        answer: dict[str, Any] = {}
        try:
            if part.kind == FAMILY:
                answer = self._family(part.name, seconds, without)
            else:
                answer = {"result": self._compared(part)}
        except ContextLostError:
            raise
        except Exception as error:  # whatever goes wrong with one part, the others are run
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        if "error" in answer and not self._bench.works():
            self._tell({"error": answer["error"]})
            raise ContextLostError
        return answer

    def _family(self, name: str, seconds: float, without: list[list[str]]) -> dict[str, Any]:
        bench = self._bench
        bench.family, bench.deadline = name, time.monotonic() + seconds
        bench.tell, bench.without = self._tell, {tuple(key) for key in without}
        bench.outcomes.clear()
        try:
            families()[name](bench)
        except OutOfTimeError:
            return {"late": True}
        return {}

    def _compared(self, part: Part) -> dict[str, Any]:
        from scripts.gpu_validation import captured, training

        settings = self._settings
        if part.kind == TRAINING:
            known = training.WHOLE if settings.whole_runs else training.REHEARSED
            return training.compare(next(run for run in known if run.name == part.name), settings.seed)
        recipe = next(recipe for recipe in captured.RECIPES if recipe.title == part.name)
        return captured.compare(recipe, settings.seed, settings.whole_runs)


def main(text: str) -> int:
    """Run the parts that are asked for on the standard input, a line each, until it ends; the exit status."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error

    def tell(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers)

    given = json.loads(text)
    settings = Settings(**given | {"dtypes": tuple(given["dtypes"])})
    runner = Runner(settings, tell)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = runner.run(Part(*request["part"]), request["seconds"], request["without"])
        except ContextLostError:
            tell({"lost": True})
            return 1
        tell({"done": answer})
    return 0


def as_text(settings: Settings) -> str:
    """For the command line of such a process."""
    return json.dumps(dataclasses.asdict(settings))
