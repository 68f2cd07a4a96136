"""What the tests of fusion share: networks of neighbours that train as one, and what their passes leave."""

from __future__ import annotations

import numpy
import pytest

from gpucnn import device, layers
from gpucnn.layers.precision import set_precision
from gpucnn.models.mobilenet import InvertedResidual
from gpucnn.models.resnet import BasicBlock, Bottleneck
from gpucnn.random import manual_seed
from gpucnn_kernels.launch import Call


@pytest.fixture
def started(monkeypatch):
    """The kernels that were started, by name."""
    found = []
    launch = Call.launch

    def launched(self, source, kernel, *rest, **more):
        found.append(kernel)
        return launch(self, source, kernel, *rest, **more)

    monkeypatch.setattr(Call, "launch", launched)
    return found


def norms():
    return layers.Sequential(
        layers.Conv2d(3, 8, 3, padding=1, bias=False),
        layers.BatchNorm2d(8),
        layers.ReLU(inplace=True),
        layers.MaxPool2d(2),
        layers.Conv2d(8, 8, 3, padding=1, bias=False),
        layers.BatchNorm2d(8),
        layers.LeakyReLU(0.2),
        layers.Flatten(),
        layers.Linear(8 * 36, 6),
        layers.BatchNorm1d(6),
        layers.ReLU(),
    )


def residuals():
    body = layers.Sequential(layers.Conv2d(3, 8, 3, padding=1), layers.BatchNorm2d(8))
    shortcut = layers.Sequential(layers.Conv2d(3, 8, 1, bias=False), layers.BatchNorm2d(8))
    straight = layers.Sequential(layers.Conv2d(8, 8, 1), layers.BatchNorm2d(8))
    return layers.Sequential(
        layers.Residual(body, shortcut, layers.ReLU()),
        layers.Residual(straight, activation=layers.LeakyReLU(0.1)),
        layers.Residual(layers.BatchNorm2d(8)),
        layers.Residual(layers.Conv2d(8, 8, 1), activation=layers.ReLU()),
    )


def basic():
    down = layers.Sequential(layers.Conv2d(3, 8, 1, stride=2, bias=False), layers.BatchNorm2d(8))
    return layers.Sequential(BasicBlock(3, 8, 2, down), BasicBlock(8, 8, 1, None))


def bottleneck():
    down = layers.Sequential(layers.Conv2d(3, 16, 1, bias=False), layers.BatchNorm2d(16))
    return layers.Sequential(Bottleneck(3, 4, 1, down), Bottleneck(16, 4, 1, None))


def inverted():
    return layers.Sequential(InvertedResidual(3, 8, 2, 2), InvertedResidual(8, 8, 1, 2))


def activated():
    return layers.Sequential(
        layers.Conv2d(3, 8, 3, padding=1),
        layers.Tanh(),
        layers.Conv2d(8, 8, 3, stride=2, bias=False),
        layers.LeakyReLU(0.3),
        layers.Conv2d(8, 40, 1, algorithm={"forward": "implicit_gemm"}),  # by name: it does not pool
        layers.Sigmoid(),
        layers.MaxPool2d(2),
        layers.Conv2d(40, 4, 1),
        layers.ReLU(inplace=True),
        layers.Conv2d(4, 4, 1),
        layers.GELU(),
        layers.Flatten(),
        layers.Linear(16, 12),
        layers.ReLU(),
        layers.Linear(12, 12),
        layers.LeakyReLU(0.1),
        layers.Linear(12, 8),
        layers.Tanh(),
        layers.Linear(8, 7),
        layers.Sigmoid(),
        layers.SiLU(),
    )


def pooled(activation=layers.ReLU):
    return layers.Sequential(
        layers.Conv2d(3, 6, 3, padding=1),
        activation(),
        layers.MaxPool2d(2),
        layers.Conv2d(6, 8, 3),
        layers.MaxPool2d(2, ceil_mode=True),
        layers.Flatten(),
    )


def rows():
    return layers.Sequential(
        layers.Conv2d(3, 8, 3, padding=1),
        layers.Linear(12, 9),
        layers.ReLU(),
        layers.Linear(9, 8),
        layers.LeakyReLU(0.1),
        layers.Linear(8, 5),
        layers.Sigmoid(),
        layers.Flatten(2),
        layers.Linear(60, 6),
        layers.Tanh(),
        layers.Flatten(),
    )


def branches():
    """Branches that begin with a convolution, inside of containers, too, and such that do not."""
    deep = layers.Sequential(
        layers.Sequential(layers.Sequential(layers.Conv2d(3, 4, 3, padding=1)), layers.ReLU()),
        layers.Conv2d(4, 5, 1),
    )
    joined = layers.Concatenate(
        layers.Sequential(layers.BatchNorm2d(3), layers.ReLU()),
        deep,
        layers.Conv2d(3, 2, 3, padding=1, bias=False),
        layers.Identity(),
        layers.Residual(layers.Conv2d(3, 3, 1)),
    )
    depthwise = layers.Sequential(
        layers.Sequential(layers.Conv2d(16, 16, 3, padding=1, groups=16), layers.ReLU()), layers.BatchNorm2d(16)
    )
    strided = layers.Sequential(layers.Conv2d(16, 8, 1, stride=2), layers.BatchNorm2d(8))
    return layers.Sequential(
        joined,
        layers.Residual(depthwise),
        layers.Residual(strided, layers.Sequential(layers.Conv2d(16, 8, 3, stride=2, padding=1)), layers.ReLU()),
        layers.Residual(layers.Identity()),
    )


NETWORKS = [rows, norms, residuals, basic, bottleneck, inverted, activated, pooled, branches]


def made(network, fused=True, precision="float32", channels_last=None):
    manual_seed(3)
    model = network().to("cuda").fuse(fused)
    set_precision(model, precision, channels_last=channels_last)
    return model.train()


def images(precision="float32", seed=0, n=5):
    x = numpy.random.default_rng(seed).standard_normal((n, 3, 12, 12)).astype("float32")
    return device.to_device(x, "cuda").astype(precision if precision != "tf32" else "float32")


def gradient_for(y, seed=1):
    dy = numpy.random.default_rng(seed).standard_normal(y.shape).astype("float32")
    return device.to_device(dy, "cuda").astype(y.dtype)


def passes(model, precision="float32", steps=2):
    """All that ``steps`` batches leave behind: results, gradients for inputs and parameters, statistics."""
    found = []
    for step in range(steps):
        y = model(images(precision, seed=step))
        found.append(y)
        found.append(model.backward(gradient_for(y)))
    found += [parameter.gradient for parameter in model.parameters()]
    found += [buffer for _, buffer in model.named_buffers()]
    return [numpy.asarray(device.to_cpu(array)).astype("float64") for array in found]
