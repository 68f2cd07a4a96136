"""Loss scaling, which keeps small gradients from vanishing in float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpucnn.errors import CheckpointError
from gpucnn.ops import Array
from gpucnn.optimizers import Optimizer


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al., "Mixed precision training", 2018, section 3.2).

    float16 has no numbers between 0 and 6e-8, and many gradients are smaller. So the gradient for the logits is
    multiplied by ``scale`` before it goes back through the network, which multiplies every gradient, and the
    gradients for the weights, in float32, are divided by it before anything looks at them. Where one is infinite
    or NaN then, the scale was too large for float16: the step is left out and the scale halved. After
    ``GROWTH_STEPS`` good steps in a row it doubles. Scales are powers of two, so scaling rounds nothing.

    Attributes:
        scale: the present factor, 2**16 at first.
        good_steps: how many steps in a row were good since the scale last moved.
    """

    INITIAL_SCALE = 2.0**16
    SMALLEST_SCALE = 1.0
    GROWTH_STEPS = 2000

    def __init__(self) -> None:
        self.scale = self.INITIAL_SCALE
        self.good_steps = 0

    def scale_up(self, gradient: Array) -> None:
        """Multiply the gradient for the logits, in place."""
        gradient *= self.scale

    def scale_down(self, optimizer: Optimizer) -> None:
        """Divide the gradients of all parameters by the scale, in place."""
        optimizer.scale_gradients(1.0 / self.scale)

    @property
    def can_shrink(self) -> bool:
        """Whether a step that was not finite may be the scale's fault; at scale 1 it is the network's."""
        return self.scale > self.SMALLEST_SCALE

    def update(self, *, finite: bool) -> None:
        """Move the scale by whether the step's gradients were finite."""
        if not finite:
            self.scale, self.good_steps = self.scale / 2, 0
            return
        self.good_steps += 1
        if self.good_steps == self.GROWTH_STEPS:
            self.scale, self.good_steps = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """What continuing needs, fit for JSON."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`. Raises CheckpointError where it is none."""
        try:
            self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint has no state of the loss scaling: {error!r}") from error
