"""LeNet-5: two convolutions and three fully connected layers, enough for digits and clothes."""

from __future__ import annotations

from gpucnn.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential
from gpucnn.models.images import check_exactly, check_image_size
from gpucnn.models.model import Model
from gpucnn.ops import Array

SMALLEST_IMAGE = 12


class LeNet5(Model):
    """LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998.

    With ReLU and max pooling, as it is trained today: convolution 5x5 to 6 channels, pool, convolution 5x5 to
    16, pool, fully connected 120, 84, ``num_classes``. Images below 32x32 are padded by 2 (28x28 then has the
    paper's feature sizes, 28, 14, 10, 5).

    Args:
        num_classes: width of the output.
        in_channels: channels of the input.
        image_size: rows and columns of the input, at least 12.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> None:
        check_image_size("lenet5", image_size, SMALLEST_IMAGE)
        super().__init__(name="lenet5", input_shape=(in_channels, image_size, image_size), num_classes=num_classes)
        padding = 2 if image_size < 32 else 0
        first = (image_size + 2 * padding - 4) // 2
        second = (first - 4) // 2
        self.image_size = image_size
        self.features = Sequential(
            Conv2d(in_channels, 6, 5, padding=padding),
            ReLU(inplace=True),
            MaxPool2d(2),
            Conv2d(6, 16, 5),
            ReLU(inplace=True),
            MaxPool2d(2),
            Flatten(),
        )
        self.classifier = Sequential(
            Linear(16 * second * second, 120),
            ReLU(inplace=True),
            Linear(120, 84),
            ReLU(inplace=True),
            Linear(84, num_classes),
        )

    def forward(self, x: Array) -> Array:
        """Logits (N, num_classes) of x (N, in_channels, image_size, image_size)."""
        check_exactly(x, self.image_size)
        return self.classifier(self.features(x))

    def backward(self, dy: Array) -> Array:
        """The gradient for x."""
        return self.features.backward(self.classifier.backward(dy))

    def skip_input_gradient(self, skip: bool = True) -> None:
        """Leave the gradient for x out of backward."""
        self.features.skip_input_gradient(skip)
