"""What is measured: every row of the tables, with the sizes for each device.

A row is a name and plain numbers, so that each worker, whatever its library, builds the same work from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measurement: ``kind`` says what to build, ``sizes`` how large, ``direction`` which pass is timed.

    ``flops`` and ``bytes`` are the least that the work takes: a multiply-add is two operations, and each input and
    output passes through memory once.
    """

    name: str
    kind: str
    direction: str
    sizes: dict[str, Any] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def key(self) -> str:
        """The name and the direction, which are a row's identity."""
        return f"{self.name} {self.direction}".strip()

    def as_json(self) -> dict[str, Any]:
        """Plain data, to be sent to a worker."""
        return asdict(self)


DIRECTIONS = ("forward", "input gradient", "filter gradient")

# name: C, H, K, kernel, stride, padding, groups, batch on a CPU, batch on a GPU
_CONVOLUTIONS: dict[str, tuple[int, int, int, int, int, int, int, int, int]] = {
    "seed c1 3->16 k3 s2 224": (3, 224, 16, 3, 2, 0, 1, 32, 64),
    "seed c2 16->32 k3 s2 55": (16, 55, 32, 3, 2, 0, 1, 32, 64),
    "seed c3 32->64 k3 s2 27": (32, 27, 64, 3, 2, 0, 1, 32, 64),
    "seed c4 64->128 k3 s2 13": (64, 13, 128, 3, 2, 0, 1, 32, 64),
    "lenet c1 1->6 k5 28": (1, 28, 6, 5, 1, 2, 1, 128, 512),
    "lenet c2 6->16 k5 14": (6, 14, 16, 5, 1, 0, 1, 128, 512),
    "alexnet c1 3->64 k11 s4 224": (3, 224, 64, 11, 4, 2, 1, 16, 256),
    "alexnet c2 64->192 k5 27": (64, 27, 192, 5, 1, 2, 1, 16, 256),
    "vgg 3->64 k3 224": (3, 224, 64, 3, 1, 1, 1, 4, 64),
    "vgg 64->64 k3 224": (64, 224, 64, 3, 1, 1, 1, 2, 64),
    "vgg 512->512 k3 14": (512, 14, 512, 3, 1, 1, 1, 8, 64),
    "resnet stem 3->64 k7 s2 224": (3, 224, 64, 7, 2, 3, 1, 8, 256),
    "resnet 64->64 k3 56": (64, 56, 64, 3, 1, 1, 1, 16, 256),
    "resnet 128->128 k3 28": (128, 28, 128, 3, 1, 1, 1, 16, 256),
    "resnet 256->256 k3 14": (256, 14, 256, 3, 1, 1, 1, 16, 256),
    "resnet 512->512 k3 7": (512, 7, 512, 3, 1, 1, 1, 16, 256),
    "resnet 64->128 k3 s2 56": (64, 56, 128, 3, 2, 1, 1, 16, 256),
    "1x1 64->256 56": (64, 56, 256, 1, 1, 0, 1, 16, 256),
    "1x1 1024->256 14": (1024, 14, 256, 1, 1, 0, 1, 16, 256),
    "depthwise k3 64 56": (64, 56, 64, 3, 1, 1, 64, 16, 256),
    "depthwise k3 256 28": (256, 28, 256, 3, 1, 1, 256, 16, 256),
}


def convolution_rows(device: str) -> Iterable[Row]:
    """Forward, input gradient and filter gradient of each convolution."""
    for name, (c, size, k, kernel, stride, padding, groups, cpu, cuda) in _CONVOLUTIONS.items():
        n = cpu if device == "cpu" else cuda
        out = (size + 2 * padding - kernel) // stride + 1
        flops = 2.0 * n * k * out * out * (c // groups) * kernel * kernel
        moved = 4.0 * (n * c * size * size + k * (c // groups) * kernel * kernel + n * k * out * out)
        sizes = {
            "n": n,
            "c": c,
            "size": size,
            "k": k,
            "kernel": kernel,
            "stride": stride,
            "padding": padding,
            "groups": groups,
        }
        for direction in DIRECTIONS:
            yield Row(f"{name} N{n}", "convolution", direction, sizes, flops, moved)


def other_rows(device: str) -> Iterable[Row]:
    """Pooling, normalization, activations, loss and optimizers: bound by memory."""
    n = 16 if device == "cpu" else 256
    x = 4.0 * n * 64 * 56 * 56
    y = x / 4
    image = {"n": n, "c": 64, "size": 56}
    yield Row(f"max-pool k2 64x56 N{n}", "max_pool", "forward", {**image, "kernel": 2, "stride": 2}, 0, x + y)
    yield Row(f"max-pool k2 64x56 N{n}", "max_pool", "backward", {**image, "kernel": 2, "stride": 2}, 0, x + y)
    overlapping = {**image, "kernel": 3, "stride": 2}
    yield Row(f"max-pool k3 s2 64x56 N{n}", "max_pool", "forward", overlapping, 0, x + y)
    yield Row(f"max-pool k3 s2 64x56 N{n}", "max_pool", "backward", overlapping, 0, x + y)
    yield Row(f"average pool k2 64x56 N{n}", "avg_pool", "forward", {**image, "kernel": 2, "stride": 2}, 0, x + y)
    yield Row(f"average pool k2 64x56 N{n}", "avg_pool", "backward", {**image, "kernel": 2, "stride": 2}, 0, x + y)
    yield Row(f"batch norm 64x56 N{n}", "batch_norm", "forward", image, 0, 2 * x)
    yield Row(f"batch norm 64x56 N{n}", "batch_norm", "backward", image, 0, 3 * x)
    for function in ("relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu"):
        yield Row(f"{function} 64x56 N{n}", function, "forward", image, 0, 2 * x)
        yield Row(f"{function} 64x56 N{n}", function, "backward", image, 0, 3 * x)
    classes = {"n": 4096 if device == "cpu" else 65536, "classes": 1000}
    logits = 4.0 * classes["n"] * 1000
    name = f"softmax cross-entropy {classes['n']}x1000"
    yield Row(name, "cross_entropy", "forward and backward", classes, 0, 3 * logits)
    count = 11_200_000 if device == "cpu" else 25_600_000
    for optimizer, arrays in (("sgd momentum", 5), ("adam", 7)):
        yield Row(f"{optimizer} {count:,}", optimizer, "step", {"count": count}, 0, 4.0 * count * arrays)


_RESNET = {"c": 3, "classes": 1000, "options": {"stem": "imagenet"}}
_STEPS: dict[str, dict[str, Any]] = {
    "lenet5 28 N128": {"model": "lenet5", "n": 128, "c": 1, "size": 28, "classes": 10},
    "animalnet 224 N4": {"model": "animalnet", "n": 4, "c": 3, "size": 224, "classes": 3},
    "animalnet 224 N32": {"model": "animalnet", "n": 32, "c": 3, "size": 224, "classes": 3},
    "vgg-small 28 N128": {"model": "vgg-small", "n": 128, "c": 1, "size": 28, "classes": 10},
    "resnet18 64 N16": {**_RESNET, "model": "resnet18", "n": 16, "size": 64},
}
_LARGE_STEPS: dict[str, dict[str, Any]] = {
    "resnet18 224 N256": {**_RESNET, "model": "resnet18", "n": 256, "size": 224},
    "resnet50 224 N128": {**_RESNET, "model": "resnet50", "n": 128, "size": 224},
}


def step_rows(device: str) -> Iterable[Row]:
    """Whole training steps: forward, loss, backward, SGD with momentum."""
    steps = _STEPS if device == "cpu" else {**_STEPS, **_LARGE_STEPS}
    for name, sizes in steps.items():
        yield Row(name, "step", "training step", sizes)


def end_to_end_rows() -> Iterable[Row]:
    """From files to updated weights, to an accuracy, and from nothing to an imported library."""
    yield Row("animalnet from JPEG files N32", "jpeg_epoch", "an image", {"n": 32, "size": 224})
    yield Row("lenet5 on digits to 0.97", "digits", "seconds", {"accuracy": 0.97})
    yield Row("import", "import", "seconds", {})
    for name, sizes in _STEPS.items():
        yield Row(name, "memory", "peak memory of a step", sizes)


def limit_rows(device: str) -> Iterable[Row]:
    """The measured limits: operations a second of a matrix product, bytes a second of a copy."""
    size, count = (2048, 1 << 25) if device == "cpu" else (8192, 1 << 28)
    yield Row("limit", "limit", "matrix product", {"size": size}, 2.0 * size**3, 12.0 * size**2)
    yield Row("limit", "limit", "copy", {"elements": count}, 0, 8.0 * count)
