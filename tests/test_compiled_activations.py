"""Activations as compiled loops: their digits over all of float32, ends of arrays, threads."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn.ops import cpu
from gpucnn.ops.cpu import compiled
from tests.accuracy import awkward
from tests.guarded import guarded, guarded_empty
from tests.oracles import activations as oracle

pytestmark = pytest.mark.compiler

# name: (function, derivative, whether backward takes the output)
FUNCTIONS: dict[str, tuple[Any, Any, bool]] = {
    "relu": (oracle.relu, oracle.relu_derivative, True),
    "leaky_relu": (oracle.leaky_relu, oracle.leaky_relu_derivative, False),
    "sigmoid": (oracle.sigmoid, oracle.sigmoid_derivative, True),
    "tanh": (math.tanh, oracle.tanh_derivative, True),
    "silu": (oracle.silu, oracle.silu_derivative, False),
    "gelu": (oracle.gelu, oracle.gelu_derivative, False),
    "gelu_tanh": (oracle.gelu_tanh, oracle.gelu_tanh_derivative, False),
}
NAMES = pytest.mark.parametrize("name", FUNCTIONS)
EPSILON = float(numpy.finfo(numpy.float32).eps)
# Around the widths of vectors, and around what one task takes.
SIZES = [*range(1, 37), 63, 64, 65, 32767, 32768, 32769, 65552]


def both(name: str) -> tuple[Any, Any]:
    if name == "gelu_tanh":
        tanh = {"approximate": "tanh"}
        return functools.partial(cpu.gelu_forward, **tanh), functools.partial(cpu.gelu_backward, **tanh)
    return getattr(cpu, f"{name}_forward"), getattr(cpu, f"{name}_backward")


def saved(name: str, x: Any) -> Any:
    return both(name)[0](x) if FUNCTIONS[name][2] else x


def numbers(size: int, seed: int = 0) -> Any:
    return numpy.random.default_rng(seed).standard_normal(size, numpy.float32) * numpy.float32(3)


@pytest.fixture(autouse=True)
def _loops() -> None:
    assert compiled.available(), compiled.why_not()


def test_the_loops_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are not, every other test here compares NumPy with itself."""
    x = numbers(40)
    with compiled.switched(False):
        plain = [both(name)[0](x) for name in FUNCTIONS]
    ours = [both(name)[0](x) for name in FUNCTIONS]
    differing = [name for name, a, b in zip(FUNCTIONS, plain, ours, strict=True) if not numpy.array_equal(a, b)]
    assert {"sigmoid", "tanh", "silu", "gelu", "gelu_tanh"} & set(differing)  # they round otherwise somewhere


@NAMES
def test_a_sweep_of_magnitudes(name: str) -> None:
    """Some numbers in each binade, from the smallest to where the function is constant, of both signs."""
    random = numpy.random.default_rng(1)
    size = numpy.float32(2.0) ** numpy.arange(-140, 9, dtype=numpy.float32)
    x = numpy.concatenate([size * numpy.float32(u) for u in 1 + random.random(24)]).astype(numpy.float32)
    x = numpy.concatenate([x, -x, numpy.linspace(-20, 20, 4001, dtype=numpy.float32)])
    function, derivative, _ = FUNCTIONS[name]
    expected, slope = oracle.elementwise(function, x), oracle.elementwise(derivative, x)
    y = both(name)[0](x)
    # Two roundings of the value, two of the input as the derivative shows them. Where exp(-x) leaves float32, at
    # 2^-126 or below, its product with x is 0, as the NumPy way's is.
    bound = 2 * EPSILON * (abs(expected) + abs(x.astype("f8") * slope)) + numpy.maximum(1, abs(x)) * 2.0**-126
    assert numpy.all(abs(y - expected) <= bound)
    dx = both(name)[1](numpy.ones_like(x), saved(name, x))
    assert numpy.all(abs(dx - slope) <= 2 * EPSILON)


@NAMES
def test_the_error_is_that_of_numpys_way(name: str) -> None:
    x = numbers(20000, 2)
    expected = oracle.elementwise(FUNCTIONS[name][0], x)
    ours = abs(both(name)[0](x) - expected)
    with compiled.switched(False):
        theirs = abs(both(name)[0](x) - expected)
    assert math.sqrt((ours**2).mean()) <= 1.5 * math.sqrt((theirs**2).mean()) + 1e-12


@NAMES
@pytest.mark.parametrize("size", SIZES)
def test_no_byte_beyond_the_ends(name: str, size: int) -> None:
    x, dy = numbers(size, 3), numbers(size, 4)
    forward, backward = both(name)
    y, kept = forward(x), saved(name, x)
    dx = backward(dy, kept)
    for end in (True, False):
        out = guarded_empty(size, end=end)
        assert forward(guarded(x, end), out=out) is out
        numpy.testing.assert_array_equal(out, y)
        backward(guarded(dy, end), guarded(kept, end), out=out)
        numpy.testing.assert_array_equal(out, dx)


@NAMES
def test_a_number_gives_the_same_bits_wherever_it_stands(name: str) -> None:
    """In a full vector and in the last one, in any layout and on any task."""
    x = numbers(1000, 5)
    forward = both(name)[0]
    y = forward(x)
    for size in (1, 5, 15, 17, 33, 999):
        numpy.testing.assert_array_equal(forward(x[:size]), y[:size])
        numpy.testing.assert_array_equal(forward(x[-size:]), y[-size:])
    square = x.reshape(20, 50)
    numpy.testing.assert_array_equal(forward(awkward(square)), y.reshape(20, 50))
    numpy.testing.assert_array_equal(forward(square.T), y.reshape(20, 50).T)


@NAMES
def test_the_number_of_threads_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = numbers(200003, 6), numbers(200003, 7)
    forward, backward = both(name)
    kept, results = saved(name, x), []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("GPUCNN_NUM_THREADS", threads)
        results.append((forward(x), backward(dy, kept)))
    for y, dx in results[1:]:
        numpy.testing.assert_array_equal(y, results[0][0])
        numpy.testing.assert_array_equal(dx, results[0][1])


@NAMES
@pytest.mark.parametrize("place", [0, 7, 16, 18])
def test_not_a_number_stays_where_it_is(name: str, place: int) -> None:
    x = numbers(19, 8)
    y = both(name)[0](x)
    x[place] = numpy.nan
    found = both(name)[0](x)
    assert numpy.isnan(found[place])
    others = numpy.arange(19) != place
    numpy.testing.assert_array_equal(found[others], y[others])
    dy = numpy.ones(19, numpy.float32)
    dy[place] = numpy.nan
    x[place] = 1
    assert numpy.isnan(both(name)[1](dy, saved(name, x))[place])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FUNCTIONS)), st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_any_number(name: str, values: list[float]) -> None:
    x = numpy.array(values, numpy.float32)
    y = both(name)[0](x)
    with compiled.switched(False):
        plain = both(name)[0](x)
    assert numpy.array_equal(numpy.isinf(y), numpy.isinf(plain))
    assert not numpy.isnan(y).any()
    finite = numpy.isfinite(plain)
    near = numpy.minimum(abs(x[finite]), 200)
    scale = numpy.maximum(abs(plain[finite]), 2.0**-120)
    # Where they are small, results differ by the rounding of the power's exponent, |x| or x^2 units.
    assert numpy.all(abs(y[finite] - plain[finite]) <= 16 * EPSILON * scale * (1 + near * near))
