"""Layers made of layers. Each calls its children in forward, and their backward in reverse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from gpucnn.errors import ArgumentError, DtypeError, ShapeError
from gpucnn.layers.fusion import backward_sum, backward_through, forward_sum, forward_through
from gpucnn.layers.layer import Layer, ShortcutSum, check_gradient
from gpucnn.ops import Array, array_module
from gpucnn.ops.memory_format import add, empty_image, is_channels_last


class Identity(Layer):
    """Passes its input on."""

    def forward(self, x: Array) -> Array:
        """x."""
        return x

    def backward(self, dy: Array) -> Array:
        """dy."""
        return dy


class Sequential(Layer):
    """Layers one after another, as ``torch.nn.Sequential``.

    Args:
        layers: the layers, named "0", "1", ...; or one dict of names to layers.
    """

    def __init__(self, *layers: Layer | Mapping[str, Layer]) -> None:
        if len(layers) == 1 and isinstance(layers[0], Mapping):
            named = dict(layers[0])
        else:
            named = {str(index): layer for index, layer in enumerate(layers)}  # type: ignore[misc]  # checked below
        for name, layer in named.items():
            self._add(name, layer)

    def _add(self, name: str, layer: Layer) -> None:
        if not isinstance(layer, Layer):
            raise DtypeError(f"Sequential takes layers, got {type(layer).__name__} for '{name}'")
        if any(other is layer for other in self):
            raise ArgumentError(
                f"the same {type(layer).__name__} object stands twice in a Sequential; a layer keeps what its "
                f"backward needs, so each place needs one of its own: write {type(layer).__name__}(...) again"
            )
        if not name or "." in name or (hasattr(self, name) and name not in dict(self.children())):
            raise ArgumentError(f"'{name}' cannot be the name of a layer: it is taken or contains a dot")
        setattr(self, name, layer)

    def append(self, layer: Layer) -> Sequential:
        """Add a layer at the end and return self."""
        self._add(str(len(self)), layer)
        return self

    def __len__(self) -> int:
        return sum(1 for _ in self.children())

    def __iter__(self) -> Iterator[Layer]:
        return (layer for _, layer in self.children())

    def __getitem__(self, index: int | str) -> Layer:
        named = dict(self.children())
        return named[self._name_of(index)]

    def __setitem__(self, index: int | str, layer: Layer) -> None:
        """Put ``layer`` in the place of the one there, such as a last layer for other classes."""
        self._add(self._name_of(index), layer)

    def _name_of(self, index: int | str) -> str:
        """The name of the layer that ``index``, a number or its name, means. Raises as lists and dicts do."""
        names = [name for name, _ in self.children()]
        if not isinstance(index, (int, str)):
            raise DtypeError(f"a Sequential is indexed by a number or a name, got {index!r}")
        if isinstance(index, str) and index not in names:
            raise KeyError(index)
        return index if isinstance(index, str) else names[index]

    def forward(self, x: Array) -> Array:
        """x through every layer in turn."""
        return forward_through(self, self._layers(), x)

    def backward(self, dy: Array) -> Array:
        """dy through every layer's backward, last to first."""
        return backward_through(self, self._layers(), dy)

    def _layers(self) -> list[Layer]:
        """What iterating gives, at once: two generators inside one another take longer than a small layer."""
        return [value for value in vars(self).values() if isinstance(value, Layer)]

    def steps(self) -> list[Layer]:
        """All layers in their order."""
        own = type(self) is Sequential and not {"forward", "backward"} & vars(self).keys()
        return self._layers() or [self] if own else [self]

    def chains(self) -> tuple[tuple[str, ...], ...]:
        """All layers in their order."""
        return (tuple(name for name, _ in self.children()),)

    def skip_input_gradient(self, skip: bool = True) -> None:
        """Hand the call to the first layer."""
        for layer in self:
            layer.skip_input_gradient(skip)
            return

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_indented(self)})"


class Residual(Layer):
    """activation(body(x) + shortcut(x)) (He et al. 2016).

    Args:
        body: the learned part.
        shortcut: what brings x to the body's shape, such as a strided 1x1 convolution; nothing unless given.
        activation: applied to the sum, if any.
    """

    def __init__(self, body: Layer, shortcut: Layer | None = None, activation: Layer | None = None) -> None:
        _check_reads_only(body, shortcut)
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Array) -> Array:
        """Add what the body and the shortcut make of x."""
        *before, last = self.body.steps()
        y = forward_through(self, before, x)
        other = x if self.shortcut is None else self.shortcut(x)
        total = forward_sum(self, last, y, other, self.activation)
        if total is not None:
            return total
        y = last(y)
        if y.shape != other.shape:
            raise ShapeError(
                f"the body gives shape {tuple(y.shape)}, the shortcut {tuple(other.shape)}; give a shortcut that "
                "makes them equal"
            )
        y = add(y, other)
        return y if self.activation is None else self.activation(y)

    def backward(self, dy: Array) -> Array:
        """The sum of the gradients that come back through the body and the shortcut."""
        through = self.body.steps()
        both = backward_sum(self, through[-1], self.activation, dy)
        if both is not None:
            through, (dx, dy) = through[:-1], both
        else:
            dx = dy = dy if self.activation is None else self.activation.backward(dy)
        residual = dy if self.shortcut is None else self.shortcut.backward(dy)
        return backward_through(self, through, dx, residual)

    def shortcut_sum(self) -> ShortcutSum:
        """All of it."""
        return ShortcutSum(
            ("body",), "shortcut" if self.shortcut is not None else None, "activation" if self.activation else None
        )

    def __repr__(self) -> str:
        return f"Residual({_indented(self)})"


class Concatenate(Layer):
    """Branches that read the same input, their outputs joined along the channels.

    Args:
        branches: layers whose outputs (N, C_i, H, W) agree in all but C_i; named "0", "1", ...
    """

    def __init__(self, *branches: Layer) -> None:
        if not branches:
            raise ArgumentError("Concatenate needs at least one branch")
        _check_reads_only(*branches)
        for index, branch in enumerate(branches):
            setattr(self, str(index), branch)

    def forward(self, x: Array) -> Array:
        """(N, sum of C_i, H, W)."""
        outputs = [branch(x) for _, branch in self.children()]
        shapes = [tuple(output.shape) for output in outputs]
        if len({shape[:1] + shape[2:] for shape in shapes}) != 1:
            raise ShapeError(f"the branches' outputs must agree in all but the channels, got shapes {shapes}")
        y = _joined(outputs)
        self._save(y.shape, [shape[1] for shape in shapes])
        return y

    def backward(self, dy: Array) -> Array:
        """The sum of the branches' gradients."""
        output_shape, widths = self._take_saved()
        check_gradient(dy, output_shape)
        dx, start = None, 0
        for (_, branch), width in zip(self.children(), widths, strict=True):
            dx = backward_through(self, [branch], _channels_of(dy, start, start + width), dx)
            start += width
        return dx

    def __repr__(self) -> str:
        return f"Concatenate({_indented(self)})"


def _joined(images: list[Array]) -> Array:
    """The images side by side along the channels; on a GPU channels-last where any of them is."""
    first, channels = images[0], sum(image.shape[1] for image in images)
    if not any(map(is_channels_last, images)):
        return array_module(first).concatenate(images, axis=1)
    joined, start = empty_image((first.shape[0], channels, *first.shape[2:]), first, True), 0
    for image in images:
        joined[:, start : start + image.shape[1]] = image
        start += image.shape[1]
    return joined


def _channels_of(images: Array, start: int, stop: int) -> Array:
    """Some channels: a view, or of channels-last images, which kernels would take a contiguous copy of, a copy."""
    part = images[:, start:stop]
    if not is_channels_last(images):
        return part
    copy = empty_image(part.shape, images, True)
    copy[...] = part
    return copy


def _check_reads_only(*branches: Layer | None) -> None:
    """Raise ArgumentError where a branch would overwrite the input that it shares with the others."""
    for branch in branches:
        first = branch
        while isinstance(first, Sequential) and len(first):
            first = first[0]
        if getattr(first, "inplace", False):
            raise ArgumentError(
                f"a branch begins with {first}, which overwrites the input that the other branches read; leave "
                "inplace=True away there"
            )


def _indented(layer: Layer) -> str:
    lines = [f"({name}): {child!r}" for name, child in layer.children()]
    return "".join("\n  " + line.replace("\n", "\n  ") for line in lines) + "\n" if lines else ""
