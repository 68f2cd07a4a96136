"""One training step, kernel by kernel: forward, loss, back, norm, clipping, update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from gpucnn.layers import Layer
from gpucnn.layers.precision import backward_pass, forward_pass
from gpucnn.losses import CrossEntropyLoss
from gpucnn.ops import Array
from gpucnn.optimizers import Optimizer
from gpucnn.training.averaging import WeightAverage
from gpucnn.training.buffers import BufferCopy
from gpucnn.training.loss_scaling import LossScaler
from gpucnn.training.random_state import RandomState


class StepResult(NamedTuple):
    """What a step found.

    Attributes:
        loss: of the batch, before the step.
        norm: of all gradients together, before clipping; the weights have moved if it and the loss are finite.
        correct: how many images were classified rightly.
    """

    loss: float
    norm: float
    correct: int


@dataclass(slots=True)
class StepParts:
    """What a step works on.

    Attributes:
        model, loss, optimizer: of the run.
        buffers: where the model's buffers are copied to before they change.
        random: the generators that the model draws from.
        average: the average of the weights, where there is one.
        scaler: the scaling of the loss, in float16.
        clip_norm: the largest norm of the gradients, where they are clipped.
    """

    model: Layer
    loss: CrossEntropyLoss
    optimizer: Optimizer
    buffers: BufferCopy
    random: RandomState
    average: WeightAverage | None
    scaler: LossScaler | None
    clip_norm: float | None


class PlainStep:
    """Steps on any device. On a GPU Python waits for it once a step, for the gradient's norm."""

    def __init__(self, parts: StepParts) -> None:
        self._parts = parts

    def look_again(self) -> None:
        """Something may have changed: a plain step looks at everything anyway."""

    def take(self, images: Array, labels: Array, number: int) -> StepResult:
        """Step ``number``, from 1, whose learning rate the optimizer has; nothing moves unless all is finite.

        The numbers stay arrays until the gradient's norm is known: reading each at once would make Python wait
        for the GPU, and the GPU for Python, three times.
        """
        parts, optimizer, scaler = self._parts, self._parts.optimizer, self._parts.scaler
        parts.buffers.take()  # batch norm's forward changes its statistics before the loss can be looked at
        optimizer.zero_grad()
        logits = forward_pass(parts.model, images)
        loss_array = parts.loss.forward(logits, labels)
        correct = (logits.argmax(axis=1) == labels).sum()
        gradient = parts.loss.backward()
        if scaler is not None:
            scaler.scale_up(gradient)
        backward_pass(parts.model, gradient)
        if scaler is not None:
            scaler.scale_down(optimizer)
        clip = parts.clip_norm
        norm = optimizer.gradient_norm() if clip is None else optimizer.clip_gradient_norm(clip)
        loss = float(loss_array)
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            if parts.average is not None:
                parts.average.update(number)
        return StepResult(loss, norm, int(correct))
