"""Layers: structure, modes, state, errors. What they compute is in test_layer_gradients.py and the ops' tests."""

import numpy
import pytest

from gpucnn import layers
from gpucnn.errors import ArgumentError, CheckpointError, DtypeError, ShapeError, StateError
from gpucnn.parameters import Parameter
from gpucnn.random import Generator


def small_network():
    return layers.Sequential(
        {
            "features": layers.Sequential(
                layers.Conv2d(2, 4, 3, padding=1), layers.BatchNorm2d(4), layers.ReLU(), layers.MaxPool2d(2)
            ),
            "flatten": layers.Flatten(),
            "classifier": layers.Linear(4 * 3 * 3, 5),
        }
    )


def images(n=3, c=2, h=6, w=6, seed=0):
    return numpy.random.default_rng(seed).standard_normal((n, c, h, w)).astype(numpy.float32)


def test_state_dict_has_pytorchs_keys_in_pytorchs_order():
    assert list(small_network().state_dict()) == [
        "features.0.weight",
        "features.0.bias",
        "features.1.weight",
        "features.1.bias",
        "features.1.running_mean",
        "features.1.running_var",
        "features.1.num_batches_tracked",
        "classifier.weight",
        "classifier.bias",
    ]


def test_state_round_trip_gives_the_same_outputs():
    first, second = small_network(), small_network()
    first(images())
    missing, unexpected = second.load_state_dict(first.state_dict())
    assert (missing, unexpected) == ([], [])
    x = images(seed=1)
    assert numpy.array_equal(first.eval()(x), second.eval()(x))
    assert int(second.features[1].num_batches_tracked) == 1


def test_state_dict_is_a_copy():
    network = small_network()
    state = network.state_dict()
    network.classifier.bias.data[...] = 7
    assert not (state["classifier.bias"] == 7).any()


def test_strict_loading_lists_what_is_missing_and_left_over_and_changes_nothing():
    network = small_network()
    before = network.state_dict()
    state = {key: value + 1 for key, value in before.items()}
    del state["features.0.bias"], state["classifier.bias"]
    state["head.weight"] = numpy.zeros(3)
    with pytest.raises(CheckpointError) as caught:
        network.load_state_dict(state)
    assert "missing: features.0.bias, classifier.bias" in str(caught.value)
    assert "left over: head.weight" in str(caught.value)
    after = network.state_dict()
    assert all(numpy.array_equal(before[key], after[key]) for key in before)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert missing == ["features.0.bias", "classifier.bias"]
    assert unexpected == ["head.weight"]
    assert numpy.array_equal(network.classifier.weight.data, before["classifier.weight"] + 1)


def test_a_state_of_another_shape_is_refused_even_when_not_strict():
    network = small_network()
    state = network.state_dict()
    state["classifier.weight"] = numpy.zeros((5, 7), numpy.float32)
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"classifier.weight: \(5, 7\), expected \(5, 36\)"):
            network.load_state_dict(state, strict=strict)


def test_tensors_with_detach_load():
    class Tensor:
        def __init__(self, array):
            self.array = array

        def detach(self):
            return self

        def cpu(self):
            return self.array

    network = layers.Linear(2, 2)
    network.load_state_dict({"weight": Tensor(numpy.eye(2)), "bias": Tensor(numpy.ones(2))})
    assert network.weight.data.tolist() == [[1, 0], [0, 1]]


def test_paths_follow_the_tree():
    network = small_network()
    assert [path for path, _ in network.named_layers()] == [
        "",
        "features",
        "features.0",
        "features.1",
        "features.2",
        "features.3",
        "flatten",
        "classifier",
    ]
    assert all(layer.path == path for path, layer in network.named_layers())
    assert all(parameter.path == path for path, parameter in network.named_parameters())
    assert network.parameter_count == 2 * 4 * 9 + 4 + 4 + 4 + 36 * 5 + 5
    assert [path for path, _ in network.named_buffers()] == [
        "features.1.running_mean",
        "features.1.running_var",
        "features.1.num_batches_tracked",
    ]


def test_a_shared_parameter_is_given_once():
    network = layers.Sequential(layers.Linear(3, 3), layers.Linear(3, 3))
    network[1].weight = network[0].weight
    assert len(network.parameters()) == 3


def test_errors_name_the_layer_by_its_path():
    network = small_network()
    with pytest.raises(ShapeError, match=r"layer 'features.0' \(Conv2d\(2, 4.*expected 2 input channels, got 3"):
        network(images(c=3))
    with pytest.raises(ShapeError, match=r"layer 'classifier' \(Linear.*expected 36 input features, got 64"):
        network(images(h=8, w=8))
    with pytest.raises(ShapeError, match=r"layer 'features.3' .*pooling window of 2x2"):
        network(images(h=1, w=1))
    with pytest.raises(DtypeError, match=r"layer 'features.0'.*input is float64 but the parameters are float32"):
        network(images().astype(numpy.float64))
    with pytest.raises(DtypeError, match="expected floating-point numbers, got dtype uint8"):
        network(images().astype(numpy.uint8))
    with pytest.raises(DtypeError, match="got list"):
        network([[1.0]])
    with pytest.raises(ShapeError, match=r"expected 4 dimensions \(N, 2, H, W\), got shape \(2, 6, 6\)"):
        network(images()[0])


def test_kernel_larger_than_the_padded_image_is_explained():
    network = layers.Sequential(layers.Conv2d(2, 4, 5, padding=1))
    with pytest.raises(ShapeError, match=r"layer '0'.*kernel of 5x5.*larger than the padded input of 4x4"):
        network(images(h=2, w=2))


def test_backward_needs_a_forward_in_training():
    layer = layers.Conv2d(2, 4, 3)
    with pytest.raises(StateError, match="backward needs a forward"):
        layer.backward(numpy.zeros((1, 4, 4, 4), numpy.float32))
    y = layer(images())
    layer.backward(y)
    with pytest.raises(StateError, match="each forward serves one backward"):
        layer.backward(y)
    layer.eval()
    y = layer(images())
    with pytest.raises(StateError, match="in training mode"):
        layer.backward(y)


def test_evaluation_saves_nothing_and_forgets():
    network = small_network()
    network(images())
    assert network.features[0]._saved is not None
    network.eval()
    assert all(layer._saved is None for _, layer in network.named_layers())
    network(images())
    assert all(layer._saved is None for _, layer in network.named_layers())
    assert not network.training
    assert network.train().features[0].training


def test_a_part_in_evaluation_is_trained_through():
    network = small_network()
    network.features.eval()
    assert [network.training, network.features.training, network.features[0].training] == [True, False, False]
    dx = network.backward(network(images()))
    assert dx.shape == images().shape
    assert all(parameter.gradient.any() for parameter in network.parameters())
    network.eval()
    network.features.eval()  # of a network in evaluation: nothing is to be kept
    network(images())
    assert all(layer._saved is None for _, layer in network.named_layers())
    with pytest.raises(StateError, match="in training mode"):
        network.backward(numpy.zeros((3, 5), numpy.float32))
    network.train()
    assert all(layer.training for _, layer in network.named_layers())
    network.backward(network(images()))


def test_dropout_in_evaluation_passes_gradients_on():
    network = layers.Sequential(layers.Linear(4, 4), layers.Dropout(0.9))
    network[1].eval()
    y = network(numpy.ones((2, 4), numpy.float32))
    numpy.testing.assert_array_equal(network[1].backward(y), y)


@pytest.mark.parametrize("trains", [True, False])
def test_a_batch_norm_in_evaluation_inside_training_keeps_its_statistics(trains):
    network = layers.Sequential(layers.Conv2d(2, 4, 3), layers.BatchNorm2d(4), layers.ReLU())
    network(images())
    norm = network[1].eval()
    norm.requires_grad_(trains)
    before = {name: array.copy() for name, array in network.named_buffers()}
    network.zero_grad()
    y = network(images(seed=1))
    assert (norm._saved[0] is not None) is trains, "what no gradient is made of is not kept"
    network.backward(numpy.ones_like(y))
    for name, array in network.named_buffers():
        numpy.testing.assert_array_equal(array, before[name], err_msg=name)
    assert network[0].weight.gradient.any()
    assert bool(norm.weight.gradient.any()) is bool(norm.bias.gradient.any()) is trains
    numpy.testing.assert_array_equal(y, network.eval()(images(seed=1)))


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv2d(2, 4, 3),
        layers.ConvTranspose2d(2, 4, 3),
        layers.MaxPool2d(2),
        layers.AvgPool2d(2),
        layers.AdaptiveAvgPool2d(2),
        layers.BatchNorm2d(2),
        layers.ReLU(),
        layers.ReLU6(),
        layers.LeakyReLU(),
        layers.Sigmoid(),
        layers.Tanh(),
        layers.GELU(),
        layers.SiLU(),
        layers.Softmax(1),
        layers.Dropout(),
        layers.Dropout2d(),
        layers.Concatenate(layers.Identity(), layers.Identity()),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_gradient_of_another_shape_is_refused(layer):
    y = layer(images())
    with pytest.raises(ShapeError, match=r"the gradient has shape \(1, 1, 1, 1\), but the output had"):
        layer.backward(numpy.zeros((1, 1, 1, 1), y.dtype))


def test_dropout_modes():
    x = images(n=10)
    layer = layers.Dropout(0.25, generator=Generator(5))
    y = layer(x)
    kept = y != 0
    assert 0.65 < kept.mean() < 0.85
    assert numpy.allclose(y[kept], x[kept] / 0.75, rtol=1e-6)
    dx = layer.backward(numpy.ones_like(y))
    assert numpy.array_equal(dx != 0, kept)
    assert not numpy.array_equal(layer(x) != 0, kept), "the second batch must draw another mask"
    assert layer.eval()(x) is x
    identity = layers.Dropout(0)
    assert identity(x) is x
    assert identity.backward(x) is x
    assert not layers.Dropout(1.0)(x).any()


def test_dropout2d_drops_whole_channels():
    x = numpy.ones((40, 10, 3, 3), numpy.float32)
    layer = layers.Dropout2d(0.5, generator=Generator(6))
    y = layer(x)
    per_channel = y.reshape(400, 9)
    assert (per_channel.min(1) == per_channel.max(1)).all()
    assert 0.4 < (per_channel[:, 0] != 0).mean() < 0.6
    assert numpy.array_equal(layer.backward(x) != 0, y != 0)
    with pytest.raises(ShapeError, match="4 dimensions"):
        layer(x[0])


def test_batch_norm_running_statistics_work_at_evaluation():
    random = numpy.random.default_rng(0)
    layer = layers.BatchNorm2d(3, momentum=None)
    batches = [random.normal(2, 3, (8, 3, 5, 5)).astype(numpy.float32) for _ in range(4)]
    for batch in batches:
        layer(batch)
    means = numpy.mean([batch.astype(float).mean((0, 2, 3)) for batch in batches], axis=0)
    variances = numpy.mean([batch.astype(float).var((0, 2, 3), ddof=1) for batch in batches], axis=0)
    assert numpy.abs(layer.running_mean - means).max() < 1e-5
    assert numpy.abs(layer.running_var - variances).max() < 1e-4
    one = batches[0][:1]
    expected = (one - means[:, None, None]) / numpy.sqrt(variances[:, None, None] + 1e-5)
    assert numpy.abs(layer.eval()(one) - expected).max() < 1e-5, "one image at evaluation"
    assert int(layer.num_batches_tracked) == 4


def test_batch_norm_without_running_statistics_normalizes_by_the_batch_at_evaluation():
    layer = layers.BatchNorm1d(2, affine=False, track_running_stats=False).eval()
    x = numpy.array([[1.0, 10.0], [3.0, 30.0]], numpy.float32)
    assert numpy.abs(layer(x) - [[-1, -1], [1, 1]]).max() < 1e-4
    assert layer.parameters() == []
    assert layer.state_dict() == {}
    layer.train()
    layer(x)
    assert layer.backward(numpy.ones_like(x)).shape == x.shape


def test_batch_norm_of_one_value_a_channel_is_explained():
    network = layers.Sequential(layers.Flatten(), layers.BatchNorm1d(4))
    with pytest.raises(ShapeError, match=r"layer '1' \(BatchNorm1d\(4\)\)"):
        network(numpy.ones((1, 4, 1, 1), numpy.float32))


def test_conversion_of_dtype():
    network = small_network().to(dtype=numpy.float64)
    assert all(parameter.dtype == numpy.float64 for parameter in network.parameters())
    assert network.features[1].running_mean.dtype == numpy.float64
    assert network.features[1].num_batches_tracked.dtype == numpy.int64
    assert network(images().astype(numpy.float64)).dtype == numpy.float64
    assert network.to() is network
    with pytest.raises(DtypeError, match="must be floating point, got int32"):
        network.to(dtype=numpy.int32)


def test_freezing():
    network = small_network().requires_grad_(False)
    y = network(images())
    dx = network.backward(numpy.ones_like(y))
    assert dx.shape == (3, 2, 6, 6)
    assert not any(parameter.gradient.any() for parameter in network.parameters())
    network.requires_grad_()
    network.backward(numpy.ones_like(network(images())))
    assert all(parameter.gradient.any() for parameter in network.parameters() if parameter.shape != (4,))
    network.zero_grad()
    assert not any(parameter.gradient.any() for parameter in network.parameters())


def test_skip_input_gradient_reaches_the_first_layer():
    for first, x in [
        (layers.Conv2d(2, 3, 3), images()),
        (layers.ConvTranspose2d(2, 3, 3), images()),
        (layers.Linear(6, 4), numpy.ones((3, 6), numpy.float32)),
    ]:
        network = layers.Sequential(layers.Sequential(first), layers.ReLU())
        full, skipped = network(x), None
        assert network.backward(numpy.ones_like(full)) is not None
        gradients = [parameter.gradient.copy() for parameter in network.parameters()]
        network.zero_grad()
        network.skip_input_gradient()
        skipped = network.backward(numpy.ones_like(network(x)))
        assert skipped is None
        again = [parameter.gradient for parameter in network.parameters()]
        assert all(numpy.array_equal(a, b) for a, b in zip(gradients, again, strict=True))
        network.skip_input_gradient(False)
        assert network.backward(numpy.ones_like(network(x))) is not None


def test_sequential_is_a_list_of_layers():
    network = layers.Sequential(layers.ReLU(), layers.Tanh())
    assert len(network) == 2
    assert isinstance(network[1], layers.Tanh)
    assert isinstance(network["0"], layers.ReLU)
    assert network.append(layers.Sigmoid()) is network
    assert [type(layer).__name__ for layer in network] == ["ReLU", "Tanh", "Sigmoid"]
    assert network[2].path == "2"
    empty = layers.Sequential()
    assert empty(images()).shape == (3, 2, 6, 6)
    empty.skip_input_gradient()
    with pytest.raises(DtypeError, match="Sequential takes layers, got int for '0'"):
        layers.Sequential(3)
    with pytest.raises(ArgumentError, match=r"'a\.b' cannot be the name"):
        layers.Sequential({"a.b": layers.ReLU()})
    with pytest.raises(ArgumentError, match="'forward' cannot be the name"):
        layers.Sequential({"forward": layers.ReLU()})


def test_residual_and_branches_check_shapes():
    with pytest.raises(
        ShapeError, match=r"Residual.*body gives shape \(3, 4, 6, 6\), the shortcut \(3, 2, 6, 6\)"
    ):
        layers.Residual(layers.Conv2d(2, 4, 3, padding=1))(images())
    with pytest.raises(ShapeError, match="agree in all but the channels"):
        layers.Concatenate(layers.Identity(), layers.MaxPool2d(2))(images())
    with pytest.raises(ArgumentError, match="at least one branch"):
        layers.Concatenate()


def test_inplace_relu_overwrites_its_input():
    for kind in (layers.ReLU, layers.ReLU6):
        x = images() * 10
        expected = numpy.maximum(x, 0) if kind is layers.ReLU else numpy.clip(x, 0, 6)
        y = kind(inplace=True)(x)
        assert y is x
        assert numpy.array_equal(x, expected)
        untouched = images()
        kind()(untouched)
        assert numpy.array_equal(untouched, images())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.Conv2d(0, 1, 3), "in_channels must be a positive integer, got 0"),
        (lambda: layers.Conv2d(3, 4, 3, groups=2), "groups=2 must divide in_channels=3"),
        (lambda: layers.Conv2d(3, 4, 3, algorithm="fft"), "algorithm must be 'auto' or a dict"),
        (lambda: layers.Conv2d(3, 4, 3, algorithm={"sideways": "im2col"}), "unknown direction"),
        (lambda: layers.Linear(3, -1), "out_features must be a positive integer, got -1"),
        (lambda: layers.BatchNorm2d(3, eps=0), "eps must be positive"),
        (lambda: layers.BatchNorm2d(3, momentum=2), "momentum must be between 0 and 1"),
        (lambda: layers.Dropout(1.5), "between 0 and 1, got 1.5"),
        (lambda: layers.Flatten(0), "start_dim must be at least 1"),
        (lambda: layers.GELU("erf"), "approximate must be 'none' or 'tanh'"),
        (lambda: layers.Conv2d(3, 4, 0), "kernel_size must be at least 1"),
        (lambda: layers.Conv2d(3, 4, 3, stride=2, padding="same"), "padding='same' needs stride 1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_algorithms_can_be_set_and_agree():
    x, results = images(n=2, h=7, w=7), []
    for names in ({}, {"backward_data": "dilated", "backward_filter": "tensordot"}, {"backward_data": "scatter"}):
        layer = layers.Conv2d(2, 3, 3, stride=2, padding=1, algorithm=names)
        layer.weight.data[...] = numpy.linspace(-1, 1, 54).reshape(3, 2, 3, 3)
        layer.bias.data[...] = 0
        y = layer(x)
        results.append((y, layer.backward(numpy.cos(y)), layer.weight.gradient.copy()))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert numpy.abs(a - b).max() < 1e-4


def test_a_layer_must_define_forward_and_backward():
    class Nothing(layers.Layer):
        pass

    with pytest.raises(TypeError, match="Nothing does not define forward"):
        Nothing()(images())
    with pytest.raises(TypeError, match="Nothing does not define backward"):
        Nothing().backward(images())


def test_own_layers_with_parameters_are_found():
    class Scale(layers.Layer):
        def __init__(self):
            self.factor = Parameter(numpy.ones(1, numpy.float32))

        def forward(self, x):
            self._save(x)
            return x * self.factor.data

        def backward(self, dy):
            (x,) = self._take_saved()
            self.factor.add_gradient((dy * x).sum(keepdims=True).reshape(1))
            return dy * self.factor.data

    network = layers.Sequential(Scale())
    assert list(network.state_dict()) == ["0.factor"]


def test_representations_show_what_matters():
    text = repr(
        layers.Sequential(
            layers.Conv2d(4, 8, 3, padding=1, dilation=2, groups=2, bias=False),
            layers.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, bias=False),
            layers.ConvTranspose2d(4, 2, 3),
            layers.MaxPool2d(3, 2, padding=1, ceil_mode=True),
            layers.AvgPool2d(2, count_include_pad=False),
            layers.AdaptiveAvgPool2d(1),
            layers.BatchNorm1d(4, momentum=0.2),
            layers.ReLU(inplace=True),
            layers.ReLU6(inplace=True),
            layers.LeakyReLU(0.2),
            layers.GELU("tanh"),
            layers.Softmax(1),
            layers.Dropout2d(0.1),
            layers.Linear(3, 4, bias=False),
            layers.Flatten(2),
            layers.Residual(layers.Identity()),
            layers.Concatenate(layers.Tanh()),
            layers.Sequential(),
        )
    )
    for part in (
        "(0): Conv2d(4, 8, kernel_size=(3, 3), stride=(1, 1), padding=1, dilation=(2, 2), groups=2, bias=False)",
        "ConvTranspose2d(4, 2, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), output_padding=(1, 1), "
        "bias=False)",
        "ConvTranspose2d(4, 2, kernel_size=(3, 3), stride=(1, 1))",
        "MaxPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), ceil_mode=True)",
        "AvgPool2d(kernel_size=(2, 2), stride=(2, 2), count_include_pad=False)",
        "AdaptiveAvgPool2d((1, 1))",
        "BatchNorm1d(4, momentum=0.2)",
        "ReLU(inplace=True)",
        "ReLU6(inplace=True)",
        "LeakyReLU(negative_slope=0.2)",
        "GELU(approximate='tanh')",
        "Softmax(dim=1)",
        "Dropout2d(p=0.1)",
        "Linear(in_features=3, out_features=4, bias=False)",
        "Flatten(start_dim=2)",
        "Residual(\n    (body): Identity()",
        "Concatenate(\n    (0): Tanh()",
        "Sequential()",
    ):
        assert part in text, part


def test_a_parameter_cannot_be_replaced_by_an_array():
    layer = layers.Linear(3, 3)
    with pytest.raises(DtypeError, match=r"'weight' of Linear is a parameter and cannot become ndarray"):
        layer.weight = numpy.ones((3, 3))
    layer.weight = Parameter(numpy.ones((3, 3), numpy.float32))
    assert numpy.asarray(layer.weight).tolist() == [[1, 1, 1]] * 3
    assert numpy.allclose(layer.weight, 1)
    assert numpy.array(layer.weight, numpy.float64).dtype == numpy.float64


def test_load_state_dict_wants_a_mapping():
    for state in (None, "weights.pt"):
        with pytest.raises(DtypeError, match="takes a mapping of names to arrays"):
            small_network().load_state_dict(state)


def test_one_layer_cannot_stand_in_two_places():
    relu = layers.ReLU()
    with pytest.raises(ArgumentError, match="the same ReLU object stands twice"):
        layers.Sequential(layers.Tanh(), relu, relu)


@pytest.mark.parametrize("inside", [False, True])
def test_a_branch_must_not_overwrite_the_input_of_the_others(inside):
    branch = layers.ReLU(inplace=True)
    if inside:
        branch = layers.Sequential(layers.Sequential(branch), layers.Conv2d(2, 2, 1))
    with pytest.raises(ArgumentError, match="a branch begins with ReLU"):
        layers.Residual(branch)
    with pytest.raises(ArgumentError, match="a branch begins with ReLU"):
        layers.Concatenate(layers.Conv2d(2, 2, 1), branch)
    layers.Residual(layers.Sequential(layers.Conv2d(2, 2, 1), layers.ReLU(inplace=True)))


def test_a_layer_of_a_sequential_is_replaced_in_its_place():
    network = small_network()
    network.features[0] = layers.Conv2d(2, 4, 5)
    assert network.features[0].kernel_size == (5, 5)
    assert network.features[0].weight.path == "features.0.weight"
    network.classifier = layers.Linear(16, 3)
    model = layers.Sequential({"body": layers.Linear(4, 3), "act": layers.ReLU(), "head": layers.Linear(3, 2)})
    model["body"], model[-1] = layers.Linear(4, 6), layers.Linear(6, 5)
    assert [name for name, _ in model.children()] == ["body", "act", "head"]
    assert model(numpy.ones((2, 4), numpy.float32)).shape == (2, 5)
    for index in ("tail", 3, -4):
        with pytest.raises((KeyError, IndexError)):
            model[index] = layers.ReLU()
    with pytest.raises(DtypeError, match="Sequential takes layers, got ndarray for 'head'"):
        model[2] = numpy.ones(3)
    with pytest.raises(ArgumentError, match="stands twice"):
        model[2] = model[0]


def test_a_sequential_has_no_slices():
    with pytest.raises(DtypeError, match="indexed by a number or a name"):
        small_network().features[:2]
