"""Initializers: bounds, spread and errors."""

import math

import numpy
import pytest

from gpucnn import initializers
from gpucnn.errors import ArgumentError, ShapeError
from gpucnn.random import Generator

SHAPE = (64, 32, 3, 5)  # fan-in 32 * 15 = 480, fan-out 64 * 15 = 960
COUNT = math.prod(SHAPE)


def fresh(function, *arguments, **options):
    weight = numpy.full(SHAPE, numpy.nan, numpy.float32)
    assert function(weight, *arguments, generator=Generator(3), **options) is weight
    return weight.astype(numpy.float64)


@pytest.mark.parametrize(
    ("function", "options", "bound"),
    [
        (initializers.xavier_uniform, {}, math.sqrt(6 / 1440)),
        (initializers.xavier_uniform, {"gain": 2.0}, 2 * math.sqrt(6 / 1440)),
        (initializers.kaiming_uniform, {}, math.sqrt(6 / 480)),
        (initializers.kaiming_uniform, {"a": math.sqrt(5)}, 1 / math.sqrt(480)),
        (initializers.kaiming_uniform, {"mode": "fan_out", "nonlinearity": "relu"}, math.sqrt(6 / 960)),
        (initializers.kaiming_uniform, {"nonlinearity": "linear"}, math.sqrt(3 / 480)),
    ],
)
def test_uniform_initializers_fill_their_interval(function, options, bound):
    weight = fresh(function, **options)
    assert 0.999 * bound < numpy.abs(weight).max() <= bound * (1 + 1e-6)
    assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.02
    assert abs(weight.mean()) < 4 * bound / math.sqrt(3 * COUNT)


@pytest.mark.parametrize(
    ("function", "options", "std"),
    [
        (initializers.normal, {"std": 0.02}, 0.02),
        (initializers.xavier_normal, {}, math.sqrt(2 / 1440)),
        (initializers.kaiming_normal, {}, math.sqrt(2 / 480)),
        (initializers.kaiming_normal, {"mode": "fan_out", "nonlinearity": "relu"}, math.sqrt(2 / 960)),
        (initializers.kaiming_normal, {"nonlinearity": "tanh"}, 5 / 3 / math.sqrt(480)),
    ],
)
def test_normal_initializers_have_their_spread(function, options, std):
    weight = fresh(function, **options)
    assert abs(weight.std() / std - 1) < 0.02
    assert numpy.abs(weight).max() > 3 * std  # a uniform of this spread ends at 1.73


def test_normal_mean_and_uniform_interval():
    assert abs(fresh(initializers.normal, 5.0, 0.1).mean() - 5) < 0.01
    weight = fresh(initializers.uniform, 2.0, 3.0)
    assert 2 <= weight.min() < 2.001 < 2.999 < weight.max() <= 3


def test_constant():
    assert set(initializers.constant(numpy.empty((2, 2)), 0.25).ravel()) == {0.25}


def test_defaults_of_linear_and_convolution():
    weight, bias = numpy.empty((50, 400), numpy.float32), numpy.empty(50, numpy.float32)
    initializers.default_weight_and_bias(weight, bias, Generator(1))
    assert 0.99 / 20 < numpy.abs(weight).max() <= 1 / 20
    assert 0.8 / 20 < numpy.abs(bias).max() <= 1 / 20
    initializers.default_weight_and_bias(weight, None, Generator(1))


def test_draws_can_be_skipped_for_weights_that_are_loaded_next():
    weight = numpy.ones(SHAPE)
    with initializers.skipped():
        assert not initializers.kaiming_normal(weight).any()
        assert not initializers.xavier_uniform(weight + 1).any()
    assert initializers.kaiming_normal(weight).any()


def test_the_same_seed_gives_the_same_weights():
    assert numpy.array_equal(fresh(initializers.kaiming_normal), fresh(initializers.kaiming_normal))


def test_errors_name_what_came():
    with pytest.raises(ShapeError, match=r"at least 2 dimensions, got shape \(3,\)"):
        initializers.xavier_uniform(numpy.empty(3))
    with pytest.raises(ArgumentError, match="unknown nonlinearity 'swoosh'; choose one of linear"):
        initializers.calculate_gain("swoosh")
    with pytest.raises(ArgumentError, match="'fan_in' or 'fan_out', got 'fan'"):
        initializers.kaiming_normal(numpy.empty((2, 2)), mode="fan")
