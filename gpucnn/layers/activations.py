"""Activation layers; their formulas are in :mod:`gpucnn.ops.contract`."""

from __future__ import annotations

from gpucnn.errors import ArgumentError
from gpucnn.layers.layer import Layer, check_gradient
from gpucnn.ops import Array, backend_of


class ReLU(Layer):
    """max(x, 0). ``inplace`` overwrites the input, which must be nobody else's."""

    def __init__(self, inplace: bool = False) -> None:
        self.inplace = inplace

    def forward(self, x: Array) -> Array:
        """Zero the negative values of x."""
        y = backend_of(x).relu_forward(x, out=x if self.inplace else None)
        self._save(y)
        return y

    def backward(self, dy: Array) -> Array:
        """dy where the output was positive."""
        (y,) = self._take_saved()
        check_gradient(dy, y.shape, y)
        return backend_of(dy).relu_backward(dy, y)

    def extra_repr(self) -> str:
        """Whether in place."""
        return "inplace=True" if self.inplace else ""


class ReLU6(Layer):
    """min(max(x, 0), 6), as mobile networks use it."""

    def __init__(self, inplace: bool = False) -> None:
        self.inplace = inplace

    def forward(self, x: Array) -> Array:
        """Clip x to 0 .. 6."""
        y = backend_of(x).relu6_forward(x, out=x if self.inplace else None)
        self._save(y)
        return y

    def backward(self, dy: Array) -> Array:
        """dy where the output was strictly between 0 and 6."""
        (y,) = self._take_saved()
        check_gradient(dy, y.shape, y)
        return backend_of(dy).relu6_backward(dy, y)

    def extra_repr(self) -> str:
        """Whether in place."""
        return "inplace=True" if self.inplace else ""


class LeakyReLU(Layer):
    """x where positive, else negative_slope * x."""

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.negative_slope = negative_slope

    def forward(self, x: Array) -> Array:
        """Scale the negative values of x."""
        self._save(x)
        return backend_of(x).leaky_relu_forward(x, negative_slope=self.negative_slope)

    def backward(self, dy: Array) -> Array:
        """dy, scaled where x was negative."""
        (x,) = self._take_saved()
        check_gradient(dy, x.shape, x)
        return backend_of(dy).leaky_relu_backward(dy, x, negative_slope=self.negative_slope)

    def extra_repr(self) -> str:
        """The slope."""
        return f"negative_slope={self.negative_slope}"


class Sigmoid(Layer):
    """1 / (1 + exp(-x)), stable at any input."""

    def forward(self, x: Array) -> Array:
        """The logistic function of x."""
        y = backend_of(x).sigmoid_forward(x)
        self._save(y)
        return y

    def backward(self, dy: Array) -> Array:
        """dy * y * (1 - y)."""
        (y,) = self._take_saved()
        check_gradient(dy, y.shape, y)
        return backend_of(dy).sigmoid_backward(dy, y)


class Tanh(Layer):
    """The hyperbolic tangent."""

    def forward(self, x: Array) -> Array:
        """tanh(x)."""
        y = backend_of(x).tanh_forward(x)
        self._save(y)
        return y

    def backward(self, dy: Array) -> Array:
        """dy * (1 - y * y)."""
        (y,) = self._take_saved()
        check_gradient(dy, y.shape, y)
        return backend_of(dy).tanh_backward(dy, y)


class GELU(Layer):
    """x * Phi(x) (Hendrycks and Gimpel 2016); ``approximate`` is "none" or "tanh", as in PyTorch."""

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ArgumentError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
        self.approximate = approximate

    def forward(self, x: Array) -> Array:
        """Weigh x by the normal distribution function."""
        self._save(x)
        return backend_of(x).gelu_forward(x, approximate=self.approximate)

    def backward(self, dy: Array) -> Array:
        """The gradient for x."""
        (x,) = self._take_saved()
        check_gradient(dy, x.shape, x)
        return backend_of(dy).gelu_backward(dy, x, approximate=self.approximate)

    def extra_repr(self) -> str:
        """The form."""
        return f"approximate={self.approximate!r}"


class SiLU(Layer):
    """x * sigmoid(x)."""

    def forward(self, x: Array) -> Array:
        """Weigh x by its sigmoid."""
        self._save(x)
        return backend_of(x).silu_forward(x)

    def backward(self, dy: Array) -> Array:
        """The gradient for x."""
        (x,) = self._take_saved()
        check_gradient(dy, x.shape, x)
        return backend_of(dy).silu_backward(dy, x)


class Softmax(Layer):
    """exp(x) / sum(exp(x)) along ``dim``. For training use CrossEntropyLoss on the logits instead."""

    def __init__(self, dim: int = -1) -> None:
        self.dim = dim

    def forward(self, x: Array) -> Array:
        """Probabilities along ``dim``."""
        y = backend_of(x).softmax_forward(x, axis=self.dim)
        self._save(y)
        return y

    def backward(self, dy: Array) -> Array:
        """y * (dy - sum(dy * y))."""
        (y,) = self._take_saved()
        check_gradient(dy, y.shape, y)
        return backend_of(dy).softmax_backward(dy, y, axis=self.dim)

    def extra_repr(self) -> str:
        """The dimension."""
        return f"dim={self.dim}"
