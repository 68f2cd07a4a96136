"""PyTorch's side of each row, in its own idiom: eager, channels-last, or compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class TorchPeer:
    """PyTorch with float32 that is float32: TF32 is switched off."""

    def __init__(self, device: str, variant: str) -> None:
        self._device = torch.device(device)
        self._format = torch.channels_last if variant == "channels-last" else torch.contiguous_format
        self._compiled = variant == "compile"
        torch.manual_seed(0)
        if device == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cudnn.benchmark = variant != "eager"

    def versions(self) -> dict[str, str]:
        """What ran."""
        return {"torch": torch.__version__}

    def synchronize(self) -> None:
        """Wait until the GPU is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _normal(self, *shape: int) -> torch.Tensor:
        tensor = torch.randn(*shape, device=self._device)
        return tensor.to(memory_format=self._format) if len(shape) == 4 else tensor

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False) if self._compiled else function

    def prepare(self, row: dict[str, Any]) -> Callable[[], Any]:
        """The work of ``row`` as a function; raises where it cannot be done."""
        sizes, kind, direction = row["sizes"], row["kind"], row["direction"]
        if "count" in sizes:
            return self._optimizer(kind, sizes["count"])
        builder = getattr(self, f"_{kind}", None)
        if builder is not None:
            return builder(direction, sizes)  # type: ignore[no-any-return]
        return self._elementwise(kind, direction, sizes)

    def _convolution(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        x = self._normal(s["n"], s["c"], s["size"], s["size"])
        weight = self._normal(s["k"], s["c"] // s["groups"], s["kernel"], s["kernel"])
        stride, padding = [s["stride"]] * 2, [s["padding"]] * 2
        if direction == "forward":
            forward = self._compile(lambda x, w: F.conv2d(x, w, None, stride, padding, 1, s["groups"]))

            def run() -> Any:
                with torch.no_grad():
                    return forward(x, weight)

            return run
        dy = self._normal(*F.conv2d(x, weight, None, stride, padding, 1, s["groups"]).shape)
        mask = [True, False, False] if direction == "input gradient" else [False, True, False]

        def backward() -> Any:
            return torch.ops.aten.convolution_backward(
                dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], s["groups"], mask
            )

        return backward

    def _image(self, s: dict[str, Any]) -> torch.Tensor:
        return self._normal(s["n"], s["c"], s["size"], s["size"])

    def _forward_or_backward(
        self, function: Callable[[torch.Tensor], torch.Tensor], direction: str, s: dict[str, Any]
    ) -> Callable[[], Any]:
        x = self._image(s)
        function = self._compile(function)
        if direction == "forward":

            def run() -> Any:
                with torch.no_grad():
                    return function(x)

            return run
        x.requires_grad_()
        y = function(x)
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)

    def _max_pool(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        def pool(x: torch.Tensor) -> torch.Tensor:
            # With the indices, which training needs and our forward always makes.
            return F.max_pool2d(x, s["kernel"], s["stride"], return_indices=True)[0]

        return self._forward_or_backward(pool, direction, s)

    def _avg_pool(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        return self._forward_or_backward(lambda x: F.avg_pool2d(x, s["kernel"], s["stride"]), direction, s)

    def _batch_norm(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        layer = nn.BatchNorm2d(s["c"]).to(self._device)
        if direction == "forward":
            return self._forward_or_backward(layer, direction, s)
        x = self._image(s).requires_grad_()
        y = self._compile(layer)(x)
        dy = torch.randn_like(y)
        inputs = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)

    def _elementwise(self, kind: str, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        return self._forward_or_backward(getattr(F, kind), direction, s)

    def _cross_entropy(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        del direction
        logits = self._normal(s["n"], s["classes"]).requires_grad_()
        targets = torch.randint(s["classes"], (s["n"],), device=self._device)
        function = self._compile(F.cross_entropy)
        return lambda: torch.autograd.grad(function(logits, targets), logits)

    def _optimizer(self, name: str, count: int) -> Callable[[], Any]:
        parameter = nn.Parameter(self._normal(count))
        parameter.grad = self._normal(count)
        optimizer: Any
        if name == "sgd momentum":
            optimizer = torch.optim.SGD([parameter], lr=1e-3, momentum=0.9, fused=True)
        else:
            optimizer = torch.optim.Adam([parameter], lr=1e-3, fused=True)
        return optimizer.step  # type: ignore[no-any-return]

    def _step(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        del direction
        model = MODELS[s["model"]](s["classes"], s["c"], s["size"]).to(self._device, memory_format=self._format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        x = self._image(s)
        targets = torch.randint(s["classes"], (s["n"],), device=self._device)
        forward = self._compile(lambda x: F.cross_entropy(model(x), targets))

        def step() -> Any:
            optimizer.zero_grad(set_to_none=True)
            loss = forward(x)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    def _jpeg_epoch(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        del direction
        from pathlib import Path

        import numpy
        from PIL import Image

        classes = sorted(path for path in Path(s["folder"]).iterdir() if path.is_dir())
        files = [(file, label) for label, folder in enumerate(classes) for file in sorted(folder.iterdir())]
        size = s["size"]

        class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
            def __len__(self) -> int:
                return len(files)

            def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
                path, label = files[index]
                image: Any = Image.open(path)
                image.draft("RGB", (size, size))
                width, height = image.size
                scale = size / min(width, height)
                image = image.convert("RGB").resize((round(width * scale), round(height * scale)))
                left, top = (image.width - size) // 2, (image.height - size) // 2
                pixels = numpy.asarray(image.crop((left, top, left + size, top + size)))
                if torch.rand(()) < 0.5:
                    pixels = pixels[:, ::-1]
                return torch.from_numpy(pixels.transpose(2, 0, 1).astype(numpy.float32) / 127.5 - 1), label

        def epoch() -> int:
            model = MODELS["animalnet"](len(classes), 3, size).to(self._device, memory_format=self._format)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
            workers = torch.get_num_threads()
            for x, targets in torch.utils.data.DataLoader(Images(), s["n"], shuffle=True, num_workers=workers):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(x.to(self._device)), targets.to(self._device)).backward()
                optimizer.step()
            return len(files)

        return epoch

    def _labelled(self, name: str, most: int | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The images and labels of a data set's two parts, normalized, on the device; of each ``most`` at most."""
        from gpucnn import data
        from gpucnn.data import Preprocessing

        splits = data.load(name, validation_fraction=0.0)
        prepared = Preprocessing.for_dataset(splits.train, (28, 28), "float32")
        parts = []
        for part in (splits.train, splits.test):
            images = prepared.apply(part.images(range(most or len(part))))
            labels = torch.as_tensor(part.labels[:most])
            parts.append((torch.from_numpy(images).to(self._device), labels.to(self._device)))
        return parts

    def _digits(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        del direction
        (x, labels), (test_x, test_labels) = self._labelled("digits")

        def train() -> int:
            torch.manual_seed(0)
            model = MODELS["lenet5"](10, 1, 28).to(self._device)
            optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
            for epoch in range(1, 31):
                for rows in torch.randperm(len(x), device=self._device).split(32):
                    optimizer.zero_grad(set_to_none=True)
                    F.cross_entropy(model(x[rows]), labels[rows]).backward()
                    optimizer.step()
                with torch.no_grad():
                    accuracy = (model(test_x).argmax(1) == test_labels).float().mean().item()
                if accuracy >= s["accuracy"]:
                    return epoch
            raise RuntimeError("30 epochs were not enough")

        return train


# ---------------------------------------------------------------- the same networks


def _lenet5(classes: int, channels: int, size: int) -> nn.Module:
    del size
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(True), nn.Linear(120, 84), nn.ReLU(True), nn.Linear(84, classes)),
    )


def _animalnet(classes: int, channels: int, size: int) -> nn.Module:
    layers: list[nn.Module] = []
    side = size
    for index, (inputs, outputs) in enumerate(((channels, 16), (16, 32), (32, 64), (64, 128))):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)]
        side = (side - 3) // 2 + 1
        if index == 0:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * side * side, classes))


def _vgg_small(classes: int, channels: int, size: int) -> nn.Module:
    del size
    layers: list[nn.Module] = []
    inputs, outputs = channels, 32
    for _ in range(3):
        for a, b in ((inputs, outputs), (outputs, outputs)):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
        layers.append(nn.MaxPool2d(2))
        inputs, outputs = outputs, 2 * outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class _Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)),
            *(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)),
        )
        self.shortcut = _shortcut(inputs, width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(True)),
            *(nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)),
        )
        self.shortcut = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _resnet(block: Any, depths: tuple[int, ...]) -> Callable[[int, int, int], nn.Module]:
    def make(classes: int, channels: int, size: int) -> nn.Module:
        del size
        layers: list[nn.Module] = [
            *(nn.Conv2d(channels, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True)),
            nn.MaxPool2d(3, 2, 1),
        ]
        inputs = 64
        for stage, depth in enumerate(depths):
            for index in range(depth):
                width = 64 << stage
                layers.append(block(inputs, width, 2 if stage and index == 0 else 1))
                inputs = width * block.expansion
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))

    return make


MODELS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lenet5": _lenet5,
    "animalnet": _animalnet,
    "vgg-small": _vgg_small,
    "resnet18": _resnet(_Basic, (2, 2, 2, 2)),
    "resnet50": _resnet(_Bottleneck, (3, 4, 6, 3)),
}
