"""Residual networks (He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2016).

Structure, names and initial weights are torchvision's (its "version 1.5": a bottleneck's stride is on the 3x3
convolution), so its weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from gpucnn import initializers
from gpucnn.errors import ArgumentError
from gpucnn.layers import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Identity,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
)
from gpucnn.layers.fusion import backward_sum, backward_through, forward_sum, forward_through
from gpucnn.layers.layer import ShortcutSum
from gpucnn.models.images import check_at_least, check_image_size
from gpucnn.models.model import Model
from gpucnn.names import unknown
from gpucnn.ops import Array

STEMS = {"imagenet": 32, "small": 8}
"""The stems, and the smallest image that each leaves a pixel of at the last stage: its total stride."""


def choose_stem(stem: str, image_size: int) -> str:
    """``stem``, where "auto" stands for "small" up to 64 pixels and for "imagenet" above.

    Raises ArgumentError for another name.
    """
    if stem == "auto":
        return "small" if image_size <= 64 else "imagenet"
    if stem not in STEMS:
        raise ArgumentError(unknown("stem", stem, ["auto", *STEMS]))
    return stem


def _convolution(inputs: int, outputs: int, kernel_size: int, stride: int = 1) -> Conv2d:
    layer = Conv2d(inputs, outputs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False)
    initializers.kaiming_normal(layer.weight.data, mode="fan_out", nonlinearity="relu")
    return layer


class BasicBlock(Layer):
    """Two 3x3 convolutions and a shortcut: (N, inputs, H, W) -> (N, planes, H / stride, W / stride)."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: Sequential | None) -> None:
        self.conv1 = _convolution(inputs, planes, 3, stride)
        self.bn1 = BatchNorm2d(planes)
        self.relu1 = ReLU(inplace=True)
        self.conv2 = _convolution(planes, planes, 3)
        self.bn2 = BatchNorm2d(planes)
        self.downsample = downsample
        self.relu2 = ReLU(inplace=True)

    @property
    def last_norm(self) -> BatchNorm2d:
        """The batch norm before the sum."""
        return self.bn2

    def chains(self) -> tuple[tuple[str, ...], ...]:
        """Up to the sum with the shortcut."""
        return ("conv1", "bn1", "relu1"), ("conv2", "bn2")

    def shortcut_sum(self) -> ShortcutSum:
        """All of it."""
        shortcut = None if self.downsample is None else "downsample"
        return ShortcutSum(("conv1", "bn1", "relu1", "conv2", "bn2"), shortcut, "relu2")

    def forward(self, x: Array) -> Array:
        """relu(body(x) + shortcut(x))."""
        y = forward_through(self, (self.conv1, self.bn1, self.relu1, self.conv2), x)
        return _forward_sum(self, self.bn2, y, x if self.downsample is None else self.downsample(x), self.relu2)

    def backward(self, dy: Array) -> Array:
        """The sum of the gradients through the body and the shortcut."""
        dx, dy = _backward_sum(self, self.bn2, self.relu2, dy)
        residual = dy if self.downsample is None else self.downsample.backward(dy)
        return backward_through(self, (self.conv1, self.bn1, self.relu1, self.conv2), dx, residual)


class Bottleneck(Layer):
    """1x1 down, 3x3, 1x1 up, and a shortcut: (N, inputs, H, W) -> (N, 4 * planes, H / stride, W / stride)."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: Sequential | None) -> None:
        outputs = planes * self.expansion
        self.conv1 = _convolution(inputs, planes, 1)
        self.bn1 = BatchNorm2d(planes)
        self.relu1 = ReLU(inplace=True)
        self.conv2 = _convolution(planes, planes, 3, stride)
        self.bn2 = BatchNorm2d(planes)
        self.relu2 = ReLU(inplace=True)
        self.conv3 = _convolution(planes, outputs, 1)
        self.bn3 = BatchNorm2d(outputs)
        self.downsample = downsample
        self.relu3 = ReLU(inplace=True)

    @property
    def last_norm(self) -> BatchNorm2d:
        """The batch norm before the sum."""
        return self.bn3

    def chains(self) -> tuple[tuple[str, ...], ...]:
        """Up to the sum with the shortcut."""
        return ("conv1", "bn1", "relu1"), ("conv2", "bn2", "relu2"), ("conv3", "bn3")

    def shortcut_sum(self) -> ShortcutSum:
        """All of it."""
        body = ("conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "conv3", "bn3")
        return ShortcutSum(body, None if self.downsample is None else "downsample", "relu3")

    def forward(self, x: Array) -> Array:
        """relu(body(x) + shortcut(x))."""
        y = forward_through(self, self._before_sum(), x)
        return _forward_sum(self, self.bn3, y, x if self.downsample is None else self.downsample(x), self.relu3)

    def backward(self, dy: Array) -> Array:
        """The sum of the gradients through the body and the shortcut."""
        dx, dy = _backward_sum(self, self.bn3, self.relu3, dy)
        residual = dy if self.downsample is None else self.downsample.backward(dy)
        return backward_through(self, self._before_sum(), dx, residual)

    def _before_sum(self) -> tuple[Layer, ...]:
        """What comes before the last batch norm."""
        return self.conv1, self.bn1, self.relu1, self.conv2, self.bn2, self.relu2, self.conv3


def _forward_sum(block: Layer, norm: BatchNorm2d, y: Array, shortcut: Array, activation: ReLU) -> Array:
    """activation(norm(y) + shortcut)."""
    total = forward_sum(block, norm, y, shortcut, activation)
    if total is not None:
        return total
    y = norm(y)
    y += shortcut  # in place: the norm keeps its input, not y
    return activation(y)


def _backward_sum(block: Layer, norm: BatchNorm2d, activation: ReLU, dy: Array) -> tuple[Array, Array]:
    """The gradients for what the norm read, and for the shortcut."""
    both = backward_sum(block, norm, activation, dy)
    if both is not None:
        return both
    dy = activation.backward(dy)
    return norm.backward(dy), dy


class ResNet(Model):
    """A stem, four stages of residual blocks, a mean over the image and a linear layer.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        blocks: how many blocks each of the four stages has.
        name: its name in the registry.
        num_classes: width of the output.
        in_channels: channels of the input.
        image_size: rows and columns of the images it is meant for; at least 32, or 8 with the small stem.
        stem: "imagenet" (7x7, stride 2, max-pool by 2), "small" (3x3, stride 1, no pool: for images of 28 or 32
            pixels) or "auto" ("small" up to 64 pixels).
        zero_init_residual: start each block as its shortcut alone (Goyal et al. 2017, section 5.1).
        width: channels of the first stage; 64 is the paper's.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        *,
        name: str,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int = 224,
        stem: str = "imagenet",
        zero_init_residual: bool = False,
        width: int = 64,
    ) -> None:
        stem = choose_stem(stem, image_size)
        self.smallest_image = STEMS[stem]
        check_image_size(f"{name} with the {stem} stem", image_size, self.smallest_image)
        super().__init__(
            name=name,
            input_shape=(in_channels, image_size, image_size),
            num_classes=num_classes,
            options={"stem": stem, "zero_init_residual": zero_init_residual, "width": width},
        )
        imagenet = stem == "imagenet"
        self.conv1 = _convolution(in_channels, width, 7, 2) if imagenet else _convolution(in_channels, width, 3)
        self.bn1 = BatchNorm2d(width)
        self.relu = ReLU(inplace=True)
        self.maxpool: Layer = MaxPool2d(3, stride=2, padding=1) if imagenet else Identity()
        inputs = width
        for stage, count in enumerate(blocks):
            planes, stride = width * 2**stage, 1 if stage == 0 else 2
            setattr(self, f"layer{stage + 1}", _stage(block, inputs, planes, count, stride))
            inputs = planes * block.expansion
        self.stage_names = [f"layer{stage + 1}" for stage in range(len(blocks))]
        self.avgpool = AdaptiveAvgPool2d(1)
        self.flatten = Flatten()
        self.fc = Linear(inputs, num_classes)
        if zero_init_residual:
            for _, layer in self.named_layers():
                if isinstance(layer, (BasicBlock, Bottleneck)) and layer.last_norm.weight is not None:
                    layer.last_norm.weight.data.fill(0)

    def chains(self) -> tuple[tuple[str, ...], ...]:
        """The stem."""
        return (("conv1", "bn1", "relu", "maxpool"),)

    def forward(self, x: Array) -> Array:
        """Logits (N, num_classes) of x (N, in_channels, H, W)."""
        check_at_least(x, self.smallest_image)
        x = forward_through(self, self._stem(), x)
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return self.fc(self.flatten(self.avgpool(x)))

    def backward(self, dy: Array) -> Array:
        """The gradient for x."""
        dy = self.avgpool.backward(self.flatten.backward(self.fc.backward(dy)))
        for name in reversed(self.stage_names):
            dy = getattr(self, name).backward(dy)
        return backward_through(self, self._stem(), dy)

    def _stem(self) -> tuple[Layer, ...]:
        return self.conv1, self.bn1, self.relu, self.maxpool

    def skip_input_gradient(self, skip: bool = True) -> None:
        """Leave the gradient for x out of backward."""
        self.conv1.skip_input_gradient(skip)


def _stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, count: int, stride: int
) -> Sequential:
    outputs = planes * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = Sequential(_convolution(inputs, outputs, 1, stride), BatchNorm2d(outputs))
    first = block(inputs, planes, stride, downsample)
    return Sequential(first, *(block(outputs, planes, 1, None) for _ in range(count - 1)))


def resnet18(
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    *,
    stem: str = "imagenet",
    zero_init_residual: bool = False,
    width: int = 64,
) -> ResNet:
    """ResNet-18: basic blocks, 2 a stage; arguments as :class:`ResNet`."""
    return ResNet(
        BasicBlock,
        (2, 2, 2, 2),
        name="resnet18",
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
        zero_init_residual=zero_init_residual,
        width=width,
    )


def resnet50(
    num_classes: int = 1000,
    in_channels: int = 3,
    image_size: int = 224,
    *,
    stem: str = "imagenet",
    zero_init_residual: bool = False,
    width: int = 64,
) -> ResNet:
    """ResNet-50: bottlenecks, 3, 4, 6 and 3 a stage; arguments as :class:`ResNet`."""
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        name="resnet50",
        num_classes=num_classes,
        in_channels=in_channels,
        image_size=image_size,
        stem=stem,
        zero_init_residual=zero_init_residual,
        width=width,
    )
