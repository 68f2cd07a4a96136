"""A small VGG with batch norm, for 28x28 and 32x32 images and larger ones."""

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
    MaxPool2d,
    ReLU,
    Sequential,
)
from gpucnn.models.images import check_at_least, check_image_size
from gpucnn.models.model import Model
from gpucnn.names import look_up
from gpucnn.ops import Array

STEMS = ("small", "strided")


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[Layer]:
    """A convolution that keeps the size (but for the stride), batch norm and ReLU."""
    convolution = Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    initializers.kaiming_normal(convolution.weight.data, nonlinearity="relu")
    return [convolution, BatchNorm2d(outputs), ReLU(inplace=True)]


class VGGSmall(Model):
    """Stages of two 3x3 convolutions (batch norm, ReLU) and a max-pool by 2; each stage doubles the channels.

    After Simonyan and Zisserman, "Very deep convolutional networks", 2015, with batch norm and, in place of the
    large fully connected layers, a mean over the last maps and one linear layer. Any image size from
    ``2 ** stages`` on.

    For photographs a stem comes first, as residual networks have it: a 5x5 convolution of stride 2 to ``width``
    channels (batch norm, ReLU) and a max-pool by 2, so that the stages, now from ``2 * width`` channels on, work
    on a sixteenth of the pixels.

    Args:
        num_classes: width of the output.
        in_channels: channels of the input.
        image_size: rows and columns of the images it is meant for.
        width: channels of the first stage.
        stages: how many stages.
        dropout: probability of dropping a feature before the linear layer.
        stem: "small" (none) or "strided" (as above).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        *,
        width: int = 32,
        stages: int = 3,
        dropout: float = 0.0,
        stem: str = "small",
    ) -> None:
        look_up("stem", stem, dict.fromkeys(STEMS))
        if not 1 <= stages <= 6:
            raise ArgumentError(f"vgg-small has 1 to 6 stages, got {stages}")
        self.smallest_image = 2 ** (stages + 2 * (stem == "strided"))
        check_image_size("vgg-small", image_size, self.smallest_image)
        super().__init__(
            name="vgg-small",
            input_shape=(in_channels, image_size, image_size),
            num_classes=num_classes,
            options={"width": width, "stages": stages, "dropout": dropout, "stem": stem},
        )
        layers: list[Layer] = []
        inputs, outputs = in_channels, width
        if stem == "strided":
            layers += [*_convolution(inputs, width, 5, stride=2), MaxPool2d(2)]
            inputs, outputs = width, 2 * width
        for _ in range(stages):
            layers += [*_convolution(inputs, outputs, 3), *_convolution(outputs, outputs, 3), MaxPool2d(2)]
            inputs, outputs = outputs, 2 * outputs
        self.features = Sequential(*layers)
        self.pool = Sequential(AdaptiveAvgPool2d(1), Flatten())
        self.dropout = Dropout(dropout)
        self.classifier = Linear(inputs, num_classes)

    def forward(self, x: Array) -> Array:
        """Logits (N, num_classes) of x (N, in_channels, H, W)."""
        check_at_least(x, self.smallest_image)
        return self.classifier(self.dropout(self.pool(self.features(x))))

    def backward(self, dy: Array) -> Array:
        """The gradient for x."""
        return self.features.backward(self.pool.backward(self.dropout.backward(self.classifier.backward(dy))))

    def skip_input_gradient(self, skip: bool = True) -> None:
        """Leave the gradient for x out of backward."""
        self.features.skip_input_gradient(skip)
