"""Training steps by a CUDA graph: when to capture, when to go kernel by kernel, when to give up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy

from gpucnn.errors import ArgumentError
from gpucnn.ops import Array
from gpucnn.optimizers.scheduled import layout_of
from gpucnn.training.replay import Replay, reason_against, signature
from gpucnn.training.scheduled_step import ScheduledTrainingStep
from gpucnn.training.steps import PlainStep, StepParts, StepResult

MOST_CAPTURES = 20
"""How often a run may capture; then something changes all the time, and capturing costs more than it gains."""

CAPTURED = "each step of {count} images is launched as one CUDA graph"
GIVEN_UP = "the steps are not captured as a CUDA graph, and go on kernel by kernel: {reason}"


def make_step(parts: StepParts, capture: str, full: int, say: Callable[[str], None]) -> PlainStep | CapturedStep:
    """The way that a run takes its steps: by a graph where ``capture``, one of CAPTURE, asks for it and it can.

    ``full`` is how many images a full batch has; ``say`` shows a line to the user. Raises ArgumentError, with the
    reason, where capture is "on" and cannot be.
    """
    reason = reason_against(parts.model, capture, training=True)
    if reason is None:
        return CapturedStep(parts, full, say)
    if reason and capture == "on":
        raise ArgumentError(f"capture='on': {reason}")
    if reason:
        say(GIVEN_UP.format(reason=reason))
    return PlainStep(parts)


class CapturedStep:
    """Steps with the bits of :class:`PlainStep`'s, those of full batches by one launch each.

    The first full batch goes kernel by kernel, so that all of them are compiled; the second is captured, and it
    and all others are launched. Batches of another size, the last of an epoch, go kernel by kernel. Where a layer,
    the optimizer or the loss has changed, it begins anew. A capture that fails changes nothing: the reason is
    said, and from that batch on all go kernel by kernel.

    Args:
        parts: what the steps work on.
        full: images in a full batch.
        say: shows a line to the user.
    """

    def __init__(self, parts: StepParts, full: int, say: Callable[[str], None]) -> None:
        self._parts, self._full, self._say = parts, full, say
        self._plain = PlainStep(parts)
        self._given_up = self._may_have_changed = False
        self._captures = 0
        self._words: list[int] = []  # that a graph's launch draws from each generator
        self._counted: list[Any] = []  # and adds to each array of counters on the host
        self._begin()

    def _begin(self) -> None:
        self._signature = self._signed()
        self._step = ScheduledTrainingStep(self._parts)
        self._replay = Replay(self._step.start, self._step.arrays)

    def _signed(self) -> Any:
        parts = self._parts
        groups = [group.options for group in parts.optimizer.groups]
        update = groups, layout_of(parts.optimizer), parts.clip_norm, parts.average, parts.scaler
        # The generators by themselves, too: a dropout without one of its own draws from the default one.
        return signature(parts.model, parts.loss, update, parts.random.generators)

    def look_again(self) -> None:
        """Before the next step, see whether something has changed: a callback may have been at it."""
        self._may_have_changed = True

    def take(self, images: Array, labels: Array, number: int) -> StepResult:
        """Step ``number``, from 1, whose learning rate the optimizer has; nothing moves unless all is finite."""
        if self._given_up:
            return self._plain.take(images, labels, number)
        if self._may_have_changed:
            self._may_have_changed = False
            if self._signed() != self._signature:
                self._begin()
        if not self._replay.is_captured(images, labels):
            if len(labels) != self._full or not self._replay.has_run(images, labels):
                self._step.prepare(number)
                self._replay.run(images, labels)
                return self._step.finish()
            if not self._capture(images, labels):
                return self._plain.take(images, labels, number)
        self._step.prepare(number)
        self._parts.buffers.take_on_host()
        self._replay.launch(images, labels)
        for generator, words in zip(self._step.generators, self._words, strict=True):
            generator.reserve(words)
        self._parts.buffers.add_on_host(self._counted)
        return self._step.finish()

    def _capture(self, images: Array, labels: Array) -> bool:
        """Make the graph, computing nothing; False, with the reason said, where that is not possible."""
        try:
            if self._captures == MOST_CAPTURES:
                raise RuntimeError(f"what a step does has changed {MOST_CAPTURES} times")
            self._captures += 1
            with self._unchanged_host():
                self._replay.capture(images, labels)
        except Exception as error:  # CUDA, CuPy and a layer's own code raise many kinds; the run goes on
            self._given_up = True
            self._replay.forget()
            self._say(GIVEN_UP.format(reason=(str(error).strip().splitlines() or [type(error).__name__])[0]))
            return False
        if self._captures == 1:
            self._say(CAPTURED.format(count=self._full))
        return True

    @contextlib.contextmanager
    def _unchanged_host(self) -> Iterator[None]:
        """What a capture does on the host is noted, and undone: each launch does it again."""
        states = self._parts.random.capture()
        before = self._parts.buffers.on_host()
        try:
            yield
        finally:
            after = self._parts.buffers.on_host()
            self._words = [
                generator.offset - state["offset"]
                for generator, state in zip(self._step.generators, states.values(), strict=True)
            ]
            self._counted = [numpy.subtract(new, old) for new, old in zip(after, before, strict=True)]
            self._parts.random.restore(states)
            self._parts.buffers.add_on_host([-difference for difference in self._counted])
