"""Layers, losses, optimizers and metrics with arrays of a device: they move, follow, and refuse to mix."""

from __future__ import annotations

import copy
import pickle

import host_backend
import numpy
import pytest

from gpucnn import device, initializers, layers, losses, metrics, optimizers
from gpucnn.errors import ArgumentError, DeviceError, DtypeError, StateError
from gpucnn.gradient_check import check_gradients
from gpucnn.parameters import Parameter
from gpucnn.random import Generator, manual_seed
from gpucnn_kernels.runtime.host_array import HostArray, host_arrays


@pytest.fixture(autouse=True)
def host_runtime(monkeypatch):
    host_backend.use(monkeypatch)


def network():
    manual_seed(1)
    return layers.Sequential(
        layers.Conv2d(2, 4, 3, padding=1),
        layers.BatchNorm2d(4),
        layers.ReLU6(inplace=True),
        layers.Residual(layers.Conv2d(4, 4, 1), activation=layers.LeakyReLU()),
        layers.Concatenate(layers.MaxPool2d(2), layers.AvgPool2d(2)),
        layers.ConvTranspose2d(8, 3, 2, stride=2),
        layers.SiLU(),
        layers.Dropout2d(0.2, generator=Generator(4)),
        layers.GELU(),
        layers.AdaptiveAvgPool2d(2),
        layers.Flatten(),
        layers.Dropout(0.2, generator=Generator(5)),
        layers.Linear(12, 6),
        layers.BatchNorm1d(6),
        layers.Tanh(),
        layers.Linear(6, 3),
    )


def batch(seed=0):
    random = numpy.random.default_rng(seed)
    return random.standard_normal((5, 2, 8, 8), numpy.float32), random.integers(0, 3, 5)


def arrays_of(model):
    for parameter in model.parameters():
        yield parameter.data
        yield parameter.gradient
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            yield buffer


def step(model, loss, optimizer, place):
    images, labels = (device.to_device(array, place) for array in batch())
    optimizer.zero_grad()
    value = loss(model(images), labels)
    dx = model.backward(loss.backward())
    optimizer.step()
    return value, dx


def test_a_layer_moves_and_computes_the_same_there():
    here, there = network(), network()
    assert there.to("cuda") is there
    assert (here.device, there.device) == ("cpu", "cuda:0")
    assert all(type(array) is HostArray for array in arrays_of(there))
    found = []
    for model, place in ((here, "cpu"), (there, "cuda")):
        optimizer = optimizers.SGD(model.parameters(), lr=0.1, momentum=0.9)
        loss = losses.CrossEntropyLoss([1.0, 2.0, 3.0], label_smoothing=0.1)
        found.append([step(model, loss, optimizer, place) for _ in range(3)])
    for (value_here, dx_here), (value_there, dx_there) in zip(*found, strict=True):
        assert type(value_there) is float
        assert value_here == value_there
        assert type(dx_there) is HostArray
        assert numpy.array_equal(dx_here, dx_there.get())
    state = there.state_dict()
    assert all(type(array) is numpy.ndarray for array in state.values())
    assert all(numpy.array_equal(array, state[key]) for key, array in here.state_dict().items())
    back = there.cpu()
    assert all(type(array) is numpy.ndarray for array in arrays_of(back))
    assert all(numpy.array_equal(a, b) for a, b in zip(arrays_of(here), arrays_of(back), strict=True))
    assert back.cuda().device == "cuda:0"


def test_what_is_there_already_stays():
    model = network().cuda()
    optimizer = optimizers.SGD(model.parameters(), lr=0.1)
    before = [parameter.data for parameter in model.parameters()]
    model.to("cuda", dtype=numpy.float32).to("cuda:0").to(device.Device("cuda", ""))
    assert all(parameter.data is data for parameter, data in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    model.to("cuda", dtype=numpy.float64)
    assert all(array.dtype == numpy.float64 for array in arrays_of(model))
    assert all(type(array) is HostArray for array in arrays_of(model))


def test_moving_takes_gradients_along_and_drops_what_was_saved():
    model = layers.Linear(3, 2)
    model(numpy.ones((1, 3), numpy.float32))
    model.weight.add_gradient(numpy.ones((2, 3), numpy.float32))
    model.cuda()
    assert device.to_cpu(model.weight.gradient).tolist() == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(StateError, match="backward needs a forward before it"):
        model.backward(host_arrays.ones((1, 2), numpy.float32))


def test_a_shared_parameter_stays_shared():
    first, second = layers.Linear(3, 3), layers.Linear(3, 3)
    second.weight = first.weight
    model = layers.Sequential(first, second).cuda()
    assert first.weight is second.weight
    assert type(first.weight.data) is HostArray
    assert len(model.parameters()) == 3


def test_devices_that_cannot_be_are_named(monkeypatch):
    model = network()
    with pytest.raises(ArgumentError, match="unknown device 'gpu'"):
        model.to("gpu")
    with pytest.raises(ArgumentError, match="'auto' is no place"):
        model.to("auto")
    with pytest.raises(DtypeError, match=r"for a dtype write to\(dtype='float64'\)"):
        model.to(numpy.float64)
    with pytest.raises(DtypeError, match=r"write to\(dtype='float16'\)"):
        model.to("float16")
    with pytest.raises(DeviceError, match="'cuda:3' cannot be used"):
        model.cuda(3)
    monkeypatch.setattr(device, "cuda_status", lambda index=0: (False, "no GPU today"))
    with pytest.raises(DeviceError, match="'cuda:0' cannot be used: no GPU today"):
        model.to("cuda")
    assert model.device == "cpu"


@pytest.mark.parametrize("position", [0, 1, 5, 12, 13])
def test_a_layer_names_itself_and_both_devices(position):
    model = network()
    layer = model[position]
    images = {0: (5, 2, 8, 8), 1: (5, 4, 8, 8), 5: (5, 8, 4, 4), 12: (5, 12), 13: (5, 6)}[position]
    x = numpy.zeros(images, numpy.float32)
    with pytest.raises(
        DeviceError,
        match=rf"layer '{position}' .*the input is on cuda:0 but the layer on cpu; .*to_device\(x, 'cpu'\)",
    ):
        layer(host_arrays.asarray(x))
    model.cuda()
    with pytest.raises(
        DeviceError, match=rf"layer '{position}' .*the input is on cpu but the layer on cuda:0; .*"
    ):
        layer(x)
    y = layer(host_arrays.asarray(x))
    with pytest.raises(DeviceError, match="the gradient is on cpu but the forward was on cuda:0"):
        layer.backward(numpy.zeros(y.shape, numpy.float32))


@pytest.mark.parametrize(
    "layer",
    [
        layers.BatchNorm2d(2, affine=False),
        layers.ReLU(),
        layers.Sigmoid(),
        layers.Softmax(dim=1),
        layers.MaxPool2d(2),
        layers.Dropout(0.5),
    ],
)
def test_backward_refuses_the_other_devices_gradient(layer):
    layer.cuda()
    y = layer(host_arrays.asarray(batch()[0]))
    with pytest.raises(DeviceError, match=r"the gradient is on cpu .*to_device\(dy, 'cuda:0'\)"):
        layer.backward(numpy.ones(y.shape, numpy.float32))


def test_a_batch_norm_without_parameters_is_somewhere():
    layer = layers.BatchNorm2d(2, affine=False).cuda()
    assert layer.device == "cuda:0"
    with pytest.raises(DeviceError, match="the input is on cpu but the layer on cuda:0"):
        layer(batch()[0])
    assert layers.ReLU().cuda().device == "cpu", "nothing in it could be elsewhere"


def test_gradients_agree_with_differences_on_the_device():
    layer = layers.Sequential(
        layers.Conv2d(2, 3, 3), layers.Tanh(), layers.Flatten(), layers.Linear(108, 2)
    ).cuda()
    check_gradients(layer, host_arrays.asarray(batch()[0]))


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_state_loads_on_any_device(source, target):
    saved = network().to(source)
    state = {key: device.to_device(array, source) for key, array in saved.state_dict().items()}
    other = network().to(target)
    for parameter in other.parameters():
        parameter.data[...] = 7
    optimizers.SGD(other.parameters(), lr=0.1)  # the parameters are views now, and must stay views
    views = [parameter.data for parameter in other.parameters()]
    assert other.load_state_dict(state) == ([], [])
    assert all(parameter.data is view for parameter, view in zip(other.parameters(), views, strict=True))
    assert other.device == saved.device.replace(saved.device, "cuda:0" if target == "cuda" else "cpu")
    expected = saved.state_dict()
    assert all(numpy.array_equal(array, expected[key]) for key, array in other.state_dict().items())


def test_a_parameter_takes_values_from_anywhere_and_gives_none_unasked():
    parameter = Parameter(host_arrays.zeros((2, 2), numpy.float32))
    parameter.path = "fc.weight"
    assert parameter.device == "cuda:0"
    parameter.copy_from([[1, 2], [3, 4]])
    assert parameter.data.tolist() == [[1, 2], [3, 4]]
    parameter.copy_from(host_arrays.ones((2, 2)))
    assert parameter.data.tolist() == [[1, 1], [1, 1]]
    with pytest.raises(DeviceError, match=r"'fc.weight' is on cuda:0.*to_cpu\(parameter\.data\)"):
        numpy.asarray(parameter)
    parameter.move("cpu")
    assert numpy.asarray(parameter).tolist() == [[1, 1], [1, 1]]
    parameter.copy_from(host_arrays.zeros((2, 2)))
    assert not numpy.asarray(parameter).any()


def test_initializers_draw_the_same_numbers_for_a_device():
    here, there = numpy.empty((4, 3), numpy.float32), host_arrays.empty((4, 3), numpy.float32)
    for fill in (
        initializers.uniform,
        initializers.normal,
        initializers.kaiming_uniform,
        initializers.xavier_normal,
    ):
        fill(here, generator=Generator(3))
        assert fill(there, generator=Generator(3)) is there
        assert numpy.array_equal(here, there.get())


# ---------------------------------------------------------------- optimizers

OPTIMIZERS = [
    ("sgd", {"momentum": 0.9}),
    ("adam", {}),
    ("adamw", {}),
    ("rmsprop", {"momentum": 0.9, "centered": True}),
]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS)
def test_an_optimizer_follows_its_model_and_nothing_is_lost(name, options):
    stays, moves = network(), network()
    ends = []
    for model, places in ((stays, ["cpu"] * 6), (moves, ["cpu", "cuda", "cuda", "cpu", "cuda", "cuda"])):
        groups = optimizers.parameter_groups(model, 0.01)
        optimizer = optimizers.make_optimizer(name, groups, 0.01, **options)
        loss = losses.CrossEntropyLoss()
        for place in places:
            model.to(place)
            step(model, loss, optimizer, place)
        ends.append((model.state_dict(), optimizer.state_dict(), optimizer.gradient_norm()))
    assert ends[0][2] == ends[1][2]
    for left, right in zip(ends[0][:2], ends[1][:2], strict=True):
        assert list(left) == list(right)
        assert all(type(array) is numpy.ndarray for array in right.values())
        assert all(numpy.array_equal(left[key], right[key]) for key in left)
    moves.zero_grad()
    optimizer.clip_gradient_norm(1.0)
    assert all(array.base is not None for array in (parameter.data for parameter in moves.parameters()))


def test_an_optimizer_whose_parameters_are_in_two_places_says_so():
    model = network()
    optimizer = optimizers.Adam(model.parameters())
    model[0].cuda()
    with pytest.raises(StateError, match=r"on several devices \(cpu, cuda:0\); move the whole model to one"):
        optimizer.step()
    model[0].cpu()
    optimizer.step()
    optimizers.SGD(model.parameters(), lr=0.1)
    with pytest.raises(StateError, match="another optimizer took them"):
        optimizer.zero_grad()
    model.cuda()
    optimizer.step()  # nobody's since they were moved: the first to come takes them


@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_optimizers_state_loads_on_any_device(source, target):
    model, other = network().to(source), network().to(target)
    optimizer = optimizers.Adam(model.parameters(), lr=0.03)
    step(model, losses.CrossEntropyLoss(), optimizer, source)
    state = {
        key: device.to_device(array, source) if array.ndim else array
        for key, array in optimizer.state_dict().items()
    }
    continued = optimizers.Adam(other.parameters())
    continued.load_state_dict(state)
    assert continued.lr == 0.03
    found, expected = continued.state_dict(), optimizer.state_dict()
    assert all(numpy.array_equal(array, expected[key]) for key, array in found.items())


def test_copies_of_a_model_on_a_device_are_models_of_their_own():
    model = network().cuda()
    optimizers.SGD(model.parameters(), lr=0.1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.device == "cuda:0"
        optimizer = optimizers.SGD(other.parameters(), lr=0.1)
        before = model.state_dict()
        step(other, losses.CrossEntropyLoss(), optimizer, "cuda")
        assert all(numpy.array_equal(array, before[key]) for key, array in model.state_dict().items())


# ---------------------------------------------------------------- losses and metrics


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (losses.CrossEntropyLoss([1.0, 2.0, 0.5]), numpy.array([0, 2, 1, 1])),
        (losses.CrossEntropyLoss(host_arrays.asarray([1.0, 2.0, 0.5])), numpy.array([0, 2, 1, 1])),
        (losses.BCEWithLogitsLoss([1.0, 2.0, 3.0], pos_weight=[2.0, 1.0, 1.0]), numpy.eye(4, 3)),
        (losses.MSELoss(), numpy.eye(4, 3)),
    ],
)
def test_a_loss_works_where_the_prediction_is(loss, target):
    prediction = numpy.random.default_rng(2).standard_normal((4, 3))
    expected, gradient = loss(prediction, target), loss.backward()
    for _ in range(2):
        found = loss(host_arrays.asarray(prediction), host_arrays.asarray(target))
        assert found == expected
        assert numpy.array_equal(loss.backward().get(), gradient)
    assert loss(prediction, target) == expected, "the weights come back"
    with pytest.raises(DeviceError, match="the target is on cpu but the prediction on cuda:0; move the target"):
        loss(host_arrays.asarray(prediction), target)
    with pytest.raises(DeviceError, match="the target is on cuda:0 but the prediction on cpu"):
        loss(prediction, host_arrays.asarray(target))
    assert loss.to("cuda") is loss
    assert loss(host_arrays.asarray(prediction), host_arrays.asarray(target)) == expected
    single = prediction.astype(numpy.float32)
    where = host_arrays.asarray(single), host_arrays.asarray(target if target.ndim == 1 else target.astype("f4"))
    assert abs(loss(*where) - expected) <= 1e-5 * abs(expected)


def test_metrics_take_device_arrays_and_give_numbers():
    logits = numpy.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    labels = numpy.array([1, 0, 0])
    assert metrics.accuracy(host_arrays.asarray(logits), host_arrays.asarray(labels)) == 2 / 3
    assert metrics.top_k_accuracy(host_arrays.asarray(logits), labels, 2) == 1.0
    matrix = metrics.confusion_matrix(host_arrays.asarray(labels), host_arrays.asarray([1, 0, 1]), 2)
    assert type(matrix) is numpy.ndarray
    assert matrix.tolist() == [[1, 1], [0, 1]]
    assert type(metrics.f1(host_arrays.asarray(matrix))) is numpy.ndarray
