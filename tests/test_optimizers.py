"""Optimizers against loops over single numbers in float64, written from PyTorch's documented formulas."""

from __future__ import annotations

import math

import numpy
import pytest

from gpucnn.errors import ArgumentError, CheckpointError, StateError
from gpucnn.layers import BatchNorm2d, Conv2d, Linear, Sequential
from gpucnn.optimizers import OPTIMIZERS, SGD, Adam, AdamW, RMSprop, make_optimizer, parameter_groups
from gpucnn.parameters import Parameter

SHAPES = ((4, 3), (5,), (2, 1, 3, 2), (1,))
STEPS = 40
EPSILON = {"float32": 1.2e-7, "float64": 2.3e-16}


def sgd_oracle(values, gradients, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    result = []
    for value, history in zip(values, gradients, strict=True):
        p, buffer = float(value), None
        for gradient in history:
            if gradient is None:
                continue
            g = float(gradient) + weight_decay * p
            if momentum:
                buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
                g = g + momentum * buffer if nesterov else buffer
            p -= lr * g
        result.append(p)
    return result


def adam_oracle(values, gradients, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False):
    result = []
    for value, history in zip(values, gradients, strict=True):
        p, m, v, t = float(value), 0.0, 0.0, 0
        for gradient in history:
            if gradient is None:
                continue
            t += 1
            g = float(gradient)
            if decoupled:
                p -= lr * weight_decay * p
            else:
                g += weight_decay * p
            m = betas[0] * m + (1 - betas[0]) * g
            v = betas[1] * v + (1 - betas[1]) * g * g
            p -= lr * (m / (1 - betas[0] ** t)) / (math.sqrt(v / (1 - betas[1] ** t)) + eps)
        result.append(p)
    return result


def rmsprop_oracle(values, gradients, lr, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False):
    result = []
    for value, history in zip(values, gradients, strict=True):
        p, v, mean, buffer = float(value), 0.0, 0.0, 0.0
        for gradient in history:
            if gradient is None:
                continue
            g = float(gradient) + weight_decay * p
            v = alpha * v + (1 - alpha) * g * g
            average = v
            if centered:
                mean = alpha * mean + (1 - alpha) * g
                average = v - mean * mean
            update = g / (math.sqrt(average) + eps)
            if momentum:
                buffer = momentum * buffer + update
                update = buffer
            p -= lr * update
        result.append(p)
    return result


def adamw_oracle(values, gradients, lr, **options):
    return adam_oracle(values, gradients, lr, decoupled=True, **({"weight_decay": 1e-2} | options))


ORACLES = {"sgd": sgd_oracle, "adam": adam_oracle, "adamw": adamw_oracle, "rmsprop": rmsprop_oracle}

CASES = [
    ("sgd", {}),
    ("sgd", {"weight_decay": 0.1}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02}),
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.02}),
    ("adam", {}),
    ("adam", {"betas": (0.5, 0.8), "eps": 1e-3, "weight_decay": 0.1}),
    ("adamw", {}),
    ("adamw", {"betas": [0.8, 0.99], "weight_decay": 0.3}),
    ("rmsprop", {}),
    ("rmsprop", {"alpha": 0.9, "momentum": 0.7, "weight_decay": 0.05}),
    ("rmsprop", {"alpha": 0.95, "centered": True, "momentum": 0.5, "eps": 1e-3}),
    ("rmsprop", {"alpha": 0.95, "centered": True, "eps": 1e-3}),
]


def make_parameters(dtype="float64", seed=0):
    random = numpy.random.default_rng(seed)
    return [Parameter(random.standard_normal(shape).astype(dtype)) for shape in SHAPES]


def make_gradients(steps=STEPS, seed=1, dtype="float64"):
    random = numpy.random.default_rng(seed)
    # Rounded to the dtype first, so that the oracle works on the very same numbers.
    return [
        [(random.standard_normal(shape) * (3.0 if step % 4 else 0.1)).astype(dtype) for shape in SHAPES]
        for step in range(steps)
    ]


def run(optimizer, parameters, gradients, first=0):
    for step in range(first, len(gradients)):
        optimizer.zero_grad()
        for parameter, gradient in zip(parameters, gradients[step], strict=True):
            parameter.add_gradient(gradient)
        optimizer.step()


def flat_histories(gradients, index, used=lambda step: True):
    per_step = [gradients[step][index].reshape(-1) for step in range(len(gradients))]
    return [
        [per_step[step][place] if used(step) else None for step in range(len(gradients))]
        for place in range(per_step[0].size)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_many_steps_follow_the_formulas(name, options, dtype):
    parameters, gradients = make_parameters(dtype), make_gradients(dtype=dtype)
    starts = [parameter.data.copy() for parameter in parameters]
    optimizer = make_optimizer(name, parameters, 0.05, **options)
    run(optimizer, parameters, gradients)
    for index, (parameter, start) in enumerate(zip(parameters, starts, strict=True)):
        expected = ORACLES[name](start.reshape(-1), flat_histories(gradients, index), 0.05, **options)
        assert parameter.data.dtype == dtype
        error = numpy.max(numpy.abs(parameter.data.reshape(-1) - expected))
        # One rounding a step of numbers whose size is that of the whole path; more makes a formula wrong.
        path = numpy.max(numpy.abs(expected)) + numpy.max(numpy.abs(start)) + 1
        assert error <= 4 * STEPS * EPSILON[dtype] * path


@pytest.mark.parametrize(("name", "options"), [CASES[3], CASES[6], CASES[10]])
def test_frozen_parameters_rest_and_thawed_ones_join_with_their_own_statistics(name, options):
    parameters, gradients = make_parameters(), make_gradients()
    starts = [parameter.data.copy() for parameter in parameters]
    optimizer = make_optimizer(name, parameters, 0.05, **options)

    def used(index, step):
        return not (index == 1 and step < 7) and not (index == 2 and 5 <= step < 9)

    for step, step_gradients in enumerate(gradients):
        optimizer.zero_grad()
        for index, (parameter, gradient) in enumerate(zip(parameters, step_gradients, strict=True)):
            parameter.requires_grad = used(index, step)
            parameter.add_gradient(gradient)
        before = parameters[1].data.copy()
        optimizer.step()
        if step < 7:
            assert numpy.array_equal(parameters[1].data, before)
    for index, (parameter, start) in enumerate(zip(parameters, starts, strict=True)):
        histories = flat_histories(gradients, index, lambda step, index=index: used(index, step))
        expected = ORACLES[name](start.reshape(-1), histories, 0.05, **options)
        assert numpy.max(numpy.abs(parameter.data.reshape(-1) - expected)) <= 1e-12


def test_groups_have_their_own_hyperparameters_and_one_rate_drives_them():
    parameters, gradients = make_parameters(), make_gradients(steps=1)
    starts = [parameter.data.copy() for parameter in parameters]
    optimizer = SGD(
        [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.3, "weight_decay": 0.5}],
        lr=0.1,
        weight_decay=0.01,
    )
    assert optimizer.lr == 0.1
    optimizer.lr = 0.2
    assert optimizer.lr == 0.2
    run(optimizer, parameters, gradients)
    for index, (parameter, start) in enumerate(zip(parameters, starts, strict=True)):
        lr, decay = (0.2, 0.01) if index < 2 else (0.6, 0.5)
        expected = start - lr * (gradients[0][index] + decay * start)
        assert numpy.max(numpy.abs(parameter.data - expected)) <= 1e-14


def test_parameters_become_views_of_one_buffer_and_keep_their_values():
    parameters = make_parameters("float32")
    starts = [parameter.data.copy() for parameter in parameters]
    SGD(parameters, 0.1)
    assert all(parameter.data.base is parameters[0].data.base for parameter in parameters)
    assert all(parameter.gradient.base is parameters[0].gradient.base for parameter in parameters)
    for parameter, start in zip(parameters, starts, strict=True):
        assert numpy.array_equal(parameter.data, start)


def test_parameters_of_two_dtypes_are_stepped_each_in_its_own():
    parameters = [Parameter(numpy.ones(3, numpy.float32)), Parameter(numpy.ones(2, numpy.float64))]
    optimizer = Adam(parameters, 0.1)
    for parameter in parameters:
        parameter.add_gradient(numpy.full(parameter.shape, 2.0, parameter.dtype))
    optimizer.step()
    assert [parameter.dtype for parameter in parameters] == ["float32", "float64"]
    for parameter in parameters:
        assert (
            numpy.max(numpy.abs(parameter.data - 0.9)) <= 1e-6
        )  # Adam's first step is lr in the sign's direction
    assert {"first_moment.0", "first_moment.1"} <= set(optimizer.state_dict())


def test_zero_grad_clears_every_gradient():
    parameters = make_parameters()
    optimizer = SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], 0.1)
    for parameter in parameters:
        parameter.add_gradient(numpy.ones(parameter.shape))
    optimizer.zero_grad()
    assert all(not parameter.gradient.any() for parameter in parameters)


def gradient_norm_oracle(gradients):
    return math.sqrt(sum(float(value) ** 2 for gradient in gradients for value in gradient.reshape(-1)))


def test_gradient_norm_and_clipping_follow_the_formula():
    parameters, gradients = make_parameters(), make_gradients(steps=2)[1]
    optimizer = SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], 0.1)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.add_gradient(gradient)
    norm = gradient_norm_oracle(gradients)
    assert abs(optimizer.gradient_norm() - norm) <= 1e-12 * norm
    assert abs(optimizer.clip_gradient_norm(1.5) - norm) <= 1e-12 * norm
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert numpy.max(numpy.abs(parameter.gradient - gradient * 1.5 / (norm + 1e-6))) <= 1e-14
    clipped = [parameter.gradient.copy() for parameter in parameters]
    assert abs(optimizer.clip_gradient_norm(2.0) - 1.5) <= 1e-5  # below the limit: nothing happens
    for parameter, gradient in zip(parameters, clipped, strict=True):
        assert numpy.array_equal(parameter.gradient, gradient)


def test_norm_leaves_frozen_parameters_out():
    parameters = make_parameters()
    optimizer = SGD(parameters, 0.1)
    for parameter in parameters:
        parameter.add_gradient(numpy.ones(parameter.shape))
    parameters[0].requires_grad = False
    count = sum(parameter.size for parameter in parameters[1:])
    assert abs(optimizer.gradient_norm() - math.sqrt(count)) <= 1e-12


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clipping_returns_a_norm_that_is_not_finite_and_keeps_the_gradients(bad):
    parameters = make_parameters()
    optimizer = SGD(parameters, 0.1)
    parameters[0].gradient[0, 0] = bad
    parameters[1].gradient[...] = 5.0
    assert not math.isfinite(optimizer.clip_gradient_norm(1.0))
    assert numpy.array_equal(parameters[1].gradient, numpy.full(SHAPES[1], 5.0))


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_clipping_limit_must_be_positive(limit):
    with pytest.raises(ArgumentError, match="max_norm must be above 0"):
        SGD(make_parameters(), 0.1).clip_gradient_norm(limit)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_saved_state_continues_bit_for_bit(name, options):
    gradients = make_gradients(dtype="float32")
    whole = make_parameters("float32")
    whole[1].requires_grad = False
    optimizer = make_optimizer(name, whole, 0.05, **options)
    run(optimizer, whole, gradients[:10])
    whole[1].requires_grad = True
    run(optimizer, whole, gradients, first=10)

    first = make_parameters("float32")
    first[1].requires_grad = False
    early = make_optimizer(name, first, 0.05, **options)
    run(early, first, gradients[:10])
    first[1].requires_grad = True
    run(early, first, gradients[:17], first=10)
    state = early.state_dict()
    assert all(isinstance(value, numpy.ndarray) for value in state.values())
    second = [Parameter(parameter.data.copy()) for parameter in first]
    late = make_optimizer(name, second, 0.9, **options)
    late.load_state_dict(state)
    assert late.lr == 0.05
    run(late, second, gradients, first=17)
    for one, other in zip(whole, second, strict=True):
        assert numpy.array_equal(one.data, other.data)


def test_state_is_a_copy():
    parameters = make_parameters()
    optimizer = Adam(parameters, 0.1)
    state = optimizer.state_dict()
    run(optimizer, parameters, make_gradients(steps=1))
    assert not state["first_moment.0"].any()
    assert not state["step.0"].any()
    assert set(state) == {"lr", "step.0", "first_moment.0", "second_moment.0"}


def test_state_of_another_optimizer_is_refused_and_changes_nothing():
    parameters = make_parameters()
    optimizer = SGD(parameters, 0.1, momentum=0.9)
    run(optimizer, parameters, make_gradients(steps=2))
    before = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"missing: momentum\.0.*left over: first_moment\.0, second_moment"):
        optimizer.load_state_dict(Adam(make_parameters(), 0.7).state_dict())
    smaller = SGD(make_parameters()[:2], 0.7, momentum=0.9).state_dict()
    with pytest.raises(CheckpointError, match=r"momentum\.0 has shape \(24,\), expected \(48,\)"):
        optimizer.load_state_dict(smaller)
    after = optimizer.state_dict()
    assert all(numpy.array_equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("use", [SGD.step, SGD.zero_grad, SGD.gradient_norm])
def test_parameters_that_moved_away_are_noticed(use):
    layer = Linear(3, 2)
    optimizer = SGD(layer.parameters(), 0.1)
    layer.to(dtype=numpy.float64)
    with pytest.raises(StateError, match="have moved out of this SGD's buffers"):
        use(optimizer)


def test_second_optimizer_takes_the_parameters_over():
    layer = Linear(3, 2)
    first = SGD(layer.parameters(), 0.1)
    AdamW(layer.parameters(), 0.1)
    with pytest.raises(StateError, match="another optimizer"):
        first.step()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SGD(p, -0.1), "lr must be a number, 0 or more and finite, got -0.1"),
        (lambda p: SGD(p, math.nan), "lr must be a number"),
        (lambda p: SGD(p, "fast"), "lr must be a number"),
        (lambda p: SGD(p, math.inf), "lr must be a number"),
        (lambda p: SGD(p, 0.1, momentum=-1), "momentum must be a number, 0 or more"),
        (lambda p: SGD(p, 0.1, dampening=math.nan), "dampening must be a number, finite"),
        (lambda p: SGD(p, 0.1, weight_decay=-1), "weight_decay"),
        (lambda p: SGD(p, 0.1, nesterov=True), "nesterov needs a momentum above 0"),
        (lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.1, nesterov=True), "no dampening"),
        (lambda p: Adam(p, betas=(0.9, 1.0)), "beta2 must be a number, 0 or more and below 1, got 1.0"),
        (lambda p: Adam(p, betas=(-0.1, 0.9)), "beta1"),
        (lambda p: Adam(p, betas=0.9), "betas must be two numbers"),
        (lambda p: Adam(p, eps=-1), "eps"),
        (lambda p: AdamW(p, weight_decay=-1), "weight_decay"),
        (lambda p: RMSprop(p, alpha=-1), "alpha"),
        (lambda p: RMSprop(p, momentum=-1), "momentum"),
        (lambda p: SGD([], 0.1), "SGD got no parameters; pass model.parameters"),
        (lambda p: SGD([{"params": []}], 0.1), "got no parameters"),
        (lambda p: SGD(3, 0.1), "expected parameters, got int"),
        (lambda p: SGD([Linear(2, 2)], 0.1), "expected parameters, got Linear"),
        (lambda p: SGD([p[0], p[0]], 0.1), "is given twice"),
        (lambda p: SGD([{"params": p[:2]}, {"params": p[1:]}], 0.1), "is given twice"),
        (lambda p: SGD([{"params": p}, p[0]], 0.1), "got Parameter"),
        (lambda p: SGD([{"parameters": p}], 0.1), r"got the keys \['parameters'\]"),
        (lambda p: SGD([{"params": p, "weight_decai": 1}], 0.1), "did you mean 'weight_decay'"),
        (lambda p: SGD([{"params": p, "lr": -1}], 0.1), "lr must be"),
        (lambda p: SGD([{"params": p, "lr": 1}], 0.0), "lr above 0"),
        (lambda p: make_optimizer("adamv", p), "unknown optimizer 'adamv'; did you mean 'adam"),
        (lambda p: make_optimizer(None, p), "unknown optimizer None"),
        (lambda p: make_optimizer("sgd", p, momentun=1), "did you mean 'momentum'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ArgumentError, match=message):
        make(make_parameters())


def test_rate_can_not_be_set_to_nonsense():
    optimizer = SGD(make_parameters(), 0.1)
    with pytest.raises(ArgumentError, match="lr must be"):
        optimizer.lr = -1.0
    assert optimizer.lr == 0.1


def test_defaults_are_pytorchs():
    defaults = {"sgd": 1e-3, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-2}
    assert set(OPTIMIZERS) == set(defaults)
    for name, lr in defaults.items():
        assert make_optimizer(name, make_parameters()).lr == lr
    assert AdamW(make_parameters()).groups[0].options["weight_decay"] == 1e-2
    assert repr(SGD(make_parameters(), 0.1)) == "SGD(lr=0.1, groups=1, values=30)"


def test_parameter_groups_exempt_biases_and_batch_norm_from_decay():
    model = Sequential(Conv2d(1, 2, 3), BatchNorm2d(2), Linear(3, 4))
    decayed, exempt = parameter_groups(model, 0.05)
    assert [parameter.path for parameter in decayed["params"]] == ["0.weight", "2.weight"]
    assert [parameter.path for parameter in exempt["params"]] == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    assert len(parameter_groups(Linear(2, 2, bias=False), 0.1)) == 1
    assert len(AdamW(parameter_groups(model, 0.05)).groups) == 2
