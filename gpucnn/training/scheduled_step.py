"""A training step for a graph: its changing numbers in device memory, its decisions made there."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy

from gpucnn.device import on_device, to_cpu
from gpucnn.layers.precision import backward_pass, narrow_forward_pass
from gpucnn.losses import CrossEntropyLoss
from gpucnn.ops import Array, array_module
from gpucnn.optimizers.scheduled import ScheduledStep
from gpucnn.training.replay import model_arrays
from gpucnn.training.steps import StepParts, StepResult

_SCALE_UP, _SCALE_DOWN, _SHARE, _SCHEDULE = range(4)  # places among the numbers


class ScheduledTrainingStep:
    """The step of :class:`PlainStep`, in two parts: what Python knows before it, and what the GPU does.

    :meth:`prepare` works out the numbers of a step, by the code that a plain step works them out by, and copies
    them to the device: the loss's scale, the average's share, the optimizer's schedule, and where each random
    generator is. :meth:`start` then launches the same kernels with the same arguments in every step; whether the
    weights move is decided by one of them. :meth:`finish` waits, and says what came of it. So what ``start`` does
    can be captured once and launched ever after, and the weights get the bits of a plain step.
    """

    def __init__(self, parts: StepParts) -> None:
        self._parts = parts
        self._update = ScheduledStep(parts.optimizer)
        self.generators = list(parts.random.generators.values())
        reals = _SCHEDULE + self._update.size
        self._host = numpy.zeros(reals + len(self.generators), numpy.uint64)
        self._host_numbers, self._host_offsets = self._host[:reals].view(numpy.float64), self._host[reals:]
        with on_device(parts.model.device):
            module = array_module(parts.optimizer.slabs[0].buffer.data)
            self._device = module.zeros(len(self._host), "uint64")
            self._numbers = self._device[:reals].view("float64")
            self._squares = module.zeros(len(self._update.gradients()), "float64")
            self._verdict = module.zeros(5, "float64")
            self._done = module.zeros(1, "int32")  # the blocks of a launch that have ended, as it counts them
        self._starts = [self._device[reals + place : reals + place + 1] for place in range(len(self.generators))]

    def prepare(self, number: int) -> None:
        """Tell the device what changes with step ``number``, from 1."""
        parts, numbers = self._parts, self._host_numbers
        if parts.scaler is not None:
            numbers[_SCALE_UP], numbers[_SCALE_DOWN] = parts.scaler.scale, 1.0 / parts.scaler.scale
        if parts.average is not None:
            numbers[_SHARE] = parts.average.share(number)
        numbers[_SCHEDULE:] = self._update.numbers()
        self._host_offsets[:] = [generator.offset for generator in self.generators]
        self._device.set(self._host)

    def start(self, images: Array, labels: Array) -> None:
        """Launch everything. On the host only counters move: those of batch norms, and of generators."""
        from gpucnn.ops.cuda import scheduled

        parts = self._parts
        with contextlib.ExitStack() as stack:
            for generator, start in zip(self.generators, self._starts, strict=True):
                stack.enter_context(generator.counted_from(start))
            parts.buffers.take()
            parts.optimizer.zero_grad()
            loss, gradient, correct = self._loss(narrow_forward_pass(parts.model, images), labels)
            backward_pass(parts.model, gradient)
        gradients = self._update.gradients()  # after the pass: those that it gave nothing to are now zero
        if parts.scaler is not None:
            for part in gradients:
                scheduled.scale(part, self._number(_SCALE_DOWN))
        self._judge(gradients, loss, correct)
        proceed, total = self._found("proceed"), self._found("total")
        if parts.clip_norm is not None:
            for part in gradients:
                scheduled.clip(part, total, parts.clip_norm)
        self._update.start(self._numbers[_SCHEDULE:], proceed)
        if parts.average is not None:
            parts.average.start(self._number(_SHARE), proceed)

    def _loss(self, logits: Array, labels: Array) -> tuple[Array, Array, Array]:
        """(loss, its gradient, scaled, how many are classified rightly), in one launch where it can be.

        Logits in 16 bits are converted by that launch, or to float32 before any other.
        """
        from gpucnn.ops.cuda import scheduled

        loss = self._parts.loss
        scaling = None if self._parts.scaler is None else self._number(_SCALE_UP)
        # Whether labels are in range is not looked at, and a loss of one's own may be anything.
        if type(loss) is CrossEntropyLoss and not loss.check_targets and loss.reduction != "none":
            options: dict[str, Any] = {"label_smoothing": loss.label_smoothing, "reduction": loss.reduction}
            options["ignore_index"] = loss.ignore_index
            weight = loss.weight_like(self._parts.optimizer.slabs[0].buffer.data)  # which are never in 16 bits
            return scheduled.cross_entropy_step(
                logits, labels, weight=weight, scaling=scaling, done=self._done, **options
            )
        if self._parts.model.narrow_dtype is not None:
            logits = logits.astype("float32")
        value = loss.forward(logits, labels)
        correct = (logits.argmax(axis=1) == labels).sum()
        gradient = loss.backward()
        if scaling is not None:
            scheduled.scale(gradient, scaling)
        return value, gradient, correct

    def _judge(self, gradients: list[Array], loss: Array, correct: Array) -> None:
        """Have the verdict written, from the gradients' norm and the loss."""
        from gpucnn.ops.cuda import scheduled

        verdict = {"loss": loss, "correct": correct, "verdict": self._verdict}
        together = bool(gradients) and gradients[-1].dtype == loss.dtype
        for place, part in enumerate(gradients):
            last = place == len(gradients) - 1
            judged = verdict if together and last else {}
            scheduled.judge_gradient(part, self._squares, place, self._done, **judged)
        if not together:
            scheduled.judge_step(self._squares, **verdict)

    def finish(self) -> StepResult:
        """Wait for the step, and count it where the weights have moved."""
        proceed, loss, norm, correct, _ = to_cpu(self._verdict).tolist()
        if proceed:
            self._update.count()
            if self._parts.average is not None:
                self._parts.average.update_on_host()
        return StepResult(loss, norm, int(correct))

    def arrays(self) -> list[Array]:
        """All arrays that it reads and writes and does not make."""
        parts = self._parts
        found = [*model_arrays(parts.model), *self._update.arrays(), *parts.buffers.arrays(), *parts.loss.arrays()]
        if parts.average is not None:
            found += parts.average.arrays()
        return [*found, self._device, self._squares, self._verdict, self._done]

    def _number(self, place: int) -> Array:
        return self._numbers[place : place + 1]

    def _found(self, name: str) -> Array:
        from gpucnn.ops.cuda.scheduled import VERDICT

        place = VERDICT.index(name)
        return self._verdict[place : place + 1]
