"""MobileNetV2 (Sandler et al., "Inverted residuals and linear bottlenecks", 2018), with torchvision's names."""

from __future__ import annotations

from gpucnn import initializers
from gpucnn.errors import ArgumentError
from gpucnn.layers import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    ReLU6,
    Sequential,
)
from gpucnn.layers.fusion import backward_through, forward_sum, forward_through
from gpucnn.layers.layer import ShortcutSum
from gpucnn.models.images import check_at_least, check_image_size
from gpucnn.models.model import Model
from gpucnn.models.resnet import STEMS, choose_stem
from gpucnn.ops import Array

SETTINGS = (  # the paper's table 2: expansion, channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def rounded_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, at least one of it, and never below 90 % of them."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def _convolution(inputs: int, outputs: int, kernel_size: int, stride: int = 1, groups: int = 1) -> Conv2d:
    layer = Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    initializers.kaiming_normal(layer.weight.data, mode="fan_out")
    return layer


def _convolution_norm_relu6(
    inputs: int, outputs: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> Sequential:
    return Sequential(
        _convolution(inputs, outputs, kernel_size, stride, groups), BatchNorm2d(outputs), ReLU6(inplace=True)
    )


class InvertedResidual(Layer):
    """1x1 expansion, 3x3 depthwise, 1x1 projection without activation; plus the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        hidden = inputs * expansion
        layers: list[Layer] = [] if expansion == 1 else [_convolution_norm_relu6(inputs, hidden, 1)]
        layers += [
            _convolution_norm_relu6(hidden, hidden, 3, stride, groups=hidden),
            _convolution(hidden, outputs, 1),
            BatchNorm2d(outputs),
        ]
        self.conv = Sequential(*layers)
        self.has_shortcut = stride == 1 and inputs == outputs

    def shortcut_sum(self) -> ShortcutSum | None:
        """All of it, where the input is added."""
        return ShortcutSum(("conv",)) if self.has_shortcut else None

    def forward(self, x: Array) -> Array:
        """The block's output for x (N, inputs, H, W)."""
        if not self.has_shortcut:
            return self.conv(x)
        *before, last = self.conv.steps()
        y = forward_through(self, before, x)
        total = forward_sum(self, last, y, x, None)
        if total is None:
            total = last(y)
            total += x  # in place: the batch norm before keeps its input, not its result
        return total

    def backward(self, dy: Array) -> Array:
        """The gradient for x."""
        return backward_through(self, [self.conv], dy, dy if self.has_shortcut else None)


class MobileNetV2(Model):
    """A 3x3 convolution, 17 inverted residuals, a 1x1 convolution to 1280 channels, a mean, a linear layer.

    Args:
        num_classes: width of the output.
        in_channels: channels of the input.
        image_size: rows and columns of the images it is meant for; at least 32, or 8 with the small stem.
        stem: "imagenet"; "small" takes stride 1 in the first convolution and the second stage, for images of 28
            or 32 pixels; "auto" is "small" up to 64 pixels.
        width: factor on all channels, rounded to multiples of 8.
        dropout: probability of dropping a feature before the linear layer.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        image_size: int = 224,
        *,
        stem: str = "imagenet",
        width: float = 1.0,
        dropout: float = 0.2,
    ) -> None:
        if not width > 0:
            raise ArgumentError(f"mobilenet_v2's width is a factor above 0, got {width!r}")
        stem = choose_stem(stem, image_size)
        self.smallest_image = STEMS[stem]
        check_image_size(f"mobilenet_v2 with the {stem} stem", image_size, self.smallest_image)
        super().__init__(
            name="mobilenet_v2",
            input_shape=(in_channels, image_size, image_size),
            num_classes=num_classes,
            options={"stem": stem, "width": width, "dropout": dropout},
        )
        inputs = rounded_channels(32 * width)
        layers: list[Layer] = [_convolution_norm_relu6(in_channels, inputs, 3, 1 if stem == "small" else 2)]
        for stage, (expansion, channels, count, stride) in enumerate(SETTINGS):
            outputs = rounded_channels(channels * width)
            first_stride = 1 if stem == "small" and stage == 1 else stride
            for index in range(count):
                layers.append(InvertedResidual(inputs, outputs, first_stride if index == 0 else 1, expansion))
                inputs = outputs
        last = rounded_channels(1280 * max(1.0, width))
        layers.append(_convolution_norm_relu6(inputs, last, 1))
        self.features = Sequential(*layers)
        self.pool = Sequential(AdaptiveAvgPool2d(1), Flatten())
        self.classifier = Sequential(Dropout(dropout), _classifier(last, num_classes))

    def forward(self, x: Array) -> Array:
        """Logits (N, num_classes) of x (N, in_channels, H, W)."""
        check_at_least(x, self.smallest_image)
        return self.classifier(self.pool(self.features(x)))

    def backward(self, dy: Array) -> Array:
        """The gradient for x."""
        return self.features.backward(self.pool.backward(self.classifier.backward(dy)))

    def skip_input_gradient(self, skip: bool = True) -> None:
        """Leave the gradient for x out of backward."""
        self.features.skip_input_gradient(skip)


def _classifier(inputs: int, num_classes: int) -> Linear:
    layer = Linear(inputs, num_classes)
    initializers.normal(layer.weight.data, 0.0, 0.01)
    if layer.bias is not None:
        initializers.constant(layer.bias.data, 0.0)
    return layer
