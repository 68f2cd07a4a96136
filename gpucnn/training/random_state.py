"""Where every random generator of a run stands: the default one, and those that layers have for themselves."""

from __future__ import annotations

from collections.abc import Mapping

from gpucnn.errors import CheckpointError
from gpucnn.layers import Layer
from gpucnn.random import Generator, default_generator

DEFAULT = "default"


class RandomState:
    """The generators that a training step of ``model`` may draw from.

    They are named "default", and by the path of the first layer that has one of its own.

    Attributes:
        generators: they themselves, by name.
    """

    def __init__(self, model: Layer) -> None:
        self.generators: dict[str, Generator] = {DEFAULT: default_generator}
        for path, layer in model.named_layers():
            generator = getattr(layer, "generator", None)
            known = any(generator is other for other in self.generators.values())
            if isinstance(generator, Generator) and not known:
                self.generators[path] = generator

    def capture(self) -> dict[str, dict[str, int]]:
        """Where each generator is."""
        return {name: generator.state for name, generator in self.generators.items()}

    def restore(self, states: Mapping[str, dict[str, int]]) -> None:
        """Put each generator back. Raises CheckpointError where ``states`` are of other generators."""
        if states.keys() != self.generators.keys():
            raise CheckpointError(
                f"the checkpoint knows the random generators {', '.join(states) or '(none)'}, the model has "
                f"{', '.join(self.generators)}; give the same layers generators of their own as when it was saved"
            )
        for name, generator in self.generators.items():
            generator.restore(states[name])
