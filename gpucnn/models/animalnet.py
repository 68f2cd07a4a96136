"""AnimalNet: the small classifier of photographs (dog, panda, bird) that the project grew from."""

from __future__ import annotations

from gpucnn import initializers
from gpucnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Layer, Linear, MaxPool2d, ReLU, Sequential
from gpucnn.models.images import check_exactly, check_image_size
from gpucnn.models.model import Model
from gpucnn.ops import Array

CHANNELS = (16, 32, 64, 128)
SMALLEST_IMAGE = 63


def feature_size(image_size: int) -> int:
    """Rows of the last feature map: a 3x3 convolution of stride 2, a pool by 2, three such convolutions more."""
    size = (image_size - 3) // 2 + 1
    size //= 2
    for _ in CHANNELS[1:]:
        size = (size - 3) // 2 + 1
    return size


class AnimalNet(Model):
    """Four 3x3 convolutions of stride 2 (16, 32, 64, 128 channels), ReLU, max-pool after the first, one linear.

    At 224x224 the maps have 111, 55 (pooled), 27, 13 and 6 rows, so the linear layer reads 128 * 6 * 6 = 4608.

    Args:
        num_classes: width of the output.
        in_channels: channels of the input.
        image_size: rows and columns of the input, at least 63.
        batch_norm: normalize after each convolution, which then has no bias; False is the articles' network.
        dropout: probability of dropping a feature before the linear layer.
    """

    def __init__(
        self,
        num_classes: int = 3,
        in_channels: int = 3,
        image_size: int = 224,
        *,
        batch_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        check_image_size("animalnet", image_size, SMALLEST_IMAGE)
        super().__init__(
            name="animalnet",
            input_shape=(in_channels, image_size, image_size),
            num_classes=num_classes,
            options={"batch_norm": batch_norm, "dropout": dropout},
        )
        self.image_size = image_size
        layers: list[Layer] = []
        for index, (inputs, outputs) in enumerate(zip((in_channels, *CHANNELS), CHANNELS, strict=False)):
            convolution = Conv2d(inputs, outputs, 3, stride=2, bias=not batch_norm)
            initializers.kaiming_normal(convolution.weight.data, nonlinearity="relu")
            layers.append(convolution)
            if batch_norm:
                layers.append(BatchNorm2d(outputs))
            layers.append(ReLU(inplace=True))
            if index == 0:
                layers.append(MaxPool2d(2))
        self.features = Sequential(*layers, Flatten())
        self.dropout = Dropout(dropout)
        self.classifier = Linear(CHANNELS[-1] * feature_size(image_size) ** 2, num_classes)

    def forward(self, x: Array) -> Array:
        """Logits (N, num_classes) of x (N, in_channels, image_size, image_size)."""
        check_exactly(x, self.image_size)
        return self.classifier(self.dropout(self.features(x)))

    def backward(self, dy: Array) -> Array:
        """The gradient for x."""
        return self.features.backward(self.dropout.backward(self.classifier.backward(dy)))

    def skip_input_gradient(self, skip: bool = True) -> None:
        """Leave the gradient for x out of backward."""
        self.features.skip_input_gradient(skip)
