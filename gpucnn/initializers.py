"""Initial weights: the common random initializers, drawn from a Philox stream and so the same on every device.

Each fills an array in place and returns it, as PyTorch's ``nn.init`` functions do. The numbers are drawn on the
CPU and copied where the array is elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gpucnn.device import copy_into
from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.random import Generator, default_generator

_GAINS = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5.0 / 3.0, "relu": math.sqrt(2.0)}


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """(fan-in, fan-out) of a weight: the values that feed one output, and that one input feeds.

    Linear weights are (out, in), convolution weights (out, in / groups, kH, kW).
    """
    if len(shape) < 2:
        raise ShapeError(f"fan-in and fan-out need a weight of at least 2 dimensions, got shape {tuple(shape)}")
    receptive_field = math.prod(shape[2:])
    return shape[1] * receptive_field, shape[0] * receptive_field


def calculate_gain(nonlinearity: str, negative_slope: float = 0.01) -> float:
    """The factor that keeps the variance through ``nonlinearity`` (He et al. 2015 for ReLU and leaky ReLU)."""
    if nonlinearity == "leaky_relu":
        return math.sqrt(2.0 / (1.0 + negative_slope**2))
    if nonlinearity not in _GAINS:
        known = ", ".join([*_GAINS, "leaky_relu"])
        raise ArgumentError(f"unknown nonlinearity '{nonlinearity}'; choose one of {known}")
    return _GAINS[nonlinearity]


_draws_skipped = False


@contextmanager
def skipped() -> Iterator[None]:
    """Inside the block the random initializers fill with zeros: for models whose weights are loaded next.

    Drawing the 25 million weights of a ResNet-50 takes seconds, reading them from a file a fraction of one.
    """
    global _draws_skipped
    before, _draws_skipped = _draws_skipped, True
    try:
        yield
    finally:
        _draws_skipped = before


def uniform(weight: Any, low: float = 0.0, high: float = 1.0, generator: Generator | None = None) -> Any:
    """Fill with uniform numbers in (low, high)."""
    if _draws_skipped:
        return constant(weight, 0)
    copy_into(weight, (generator or default_generator).uniform(weight.shape, low, high, weight.dtype))
    return weight


def normal(weight: Any, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None) -> Any:
    """Fill with normal numbers of that mean and standard deviation."""
    if _draws_skipped:
        return constant(weight, 0)
    copy_into(weight, (generator or default_generator).normal(weight.shape, mean, std, weight.dtype))
    return weight


def constant(weight: Any, value: float) -> Any:
    """Fill with one value."""
    weight[...] = value
    return weight


def xavier_uniform(weight: Any, gain: float = 1.0, generator: Generator | None = None) -> Any:
    """Uniform in +-gain * sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010, formula 16)."""
    bound = gain * math.sqrt(6.0 / sum(fans(weight.shape)))
    return uniform(weight, -bound, bound, generator)


def xavier_normal(weight: Any, gain: float = 1.0, generator: Generator | None = None) -> Any:
    """Normal of standard deviation gain * sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    return normal(weight, 0.0, gain * math.sqrt(2.0 / sum(fans(weight.shape))), generator)


def _kaiming_std(weight: Any, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ArgumentError(f"mode must be 'fan_in' or 'fan_out', got '{mode}'")
    fan = fans(weight.shape)[0 if mode == "fan_in" else 1]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan)


def kaiming_uniform(
    weight: Any,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Any:
    """Uniform in +-gain * sqrt(3 / fan) (He et al. 2015); ``a`` is the leaky ReLU's slope."""
    bound = math.sqrt(3.0) * _kaiming_std(weight, a, mode, nonlinearity)
    return uniform(weight, -bound, bound, generator)


def kaiming_normal(
    weight: Any,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Any:
    """Normal of standard deviation gain / sqrt(fan) (He et al. 2015); ``a`` is the leaky ReLU's slope."""
    return normal(weight, 0.0, _kaiming_std(weight, a, mode, nonlinearity), generator)


def default_weight_and_bias(weight: Any, bias: Any | None, generator: Generator | None = None) -> None:
    """PyTorch's defaults for linear and convolution layers: both uniform in +-1 / sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fans(weight.shape)[0])
    uniform(weight, -bound, bound, generator)
    if bias is not None:
        uniform(bias, -bound, bound, generator)
