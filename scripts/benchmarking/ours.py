"""gpucnn's side of each row: a function to call over and over, on fixed random data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy


class Ours:
    """gpucnn on the CPU, or on a GPU through CuPy."""

    def __init__(self, device: str) -> None:
        import gpucnn.ops
        from gpucnn.device import to_device

        self._device = device
        self._ops: Any = gpucnn.ops
        self._to_device = to_device
        self._random = numpy.random.default_rng(0)

    def versions(self) -> dict[str, str]:
        """What ran."""
        import gpucnn

        found = {"gpucnn": gpucnn.__version__, "numpy": numpy.__version__}
        if self._device == "cuda":
            import cupy

            found["cupy"] = cupy.__version__
        return found

    def synchronize(self) -> None:
        """Wait until the GPU is done."""
        if self._device == "cuda":
            import cupy

            cupy.cuda.get_current_stream().synchronize()

    def _normal(self, *shape: int, scale: float = 1.0) -> Any:
        values = self._random.standard_normal(shape, numpy.float32) * numpy.float32(scale)
        return self._to_device(values, self._device)

    def prepare(self, row: dict[str, Any]) -> Callable[[], Any]:
        """The work of ``row`` as a function; raises where it cannot be done."""
        sizes, kind, direction = row["sizes"], row["kind"], row["direction"]
        if "count" in sizes:
            return self._optimizer(kind, sizes["count"])
        builder = getattr(self, f"_{kind}", None)
        if builder is not None:
            return builder(direction, sizes)  # type: ignore[no-any-return]
        return self._activation(kind, direction, sizes)

    def _convolution(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        x = self._normal(s["n"], s["c"], s["size"], s["size"])
        weight = self._normal(s["k"], s["c"] // s["groups"], s["kernel"], s["kernel"], scale=0.1)
        ops = self._ops.backend_of(x)
        settings = {"stride": s["stride"], "padding": s["padding"], "groups": s["groups"]}
        if direction == "forward":
            return lambda: ops.conv2d_forward(x, weight, **settings)
        dy = self._normal(*ops.conv2d_forward(x, weight, **settings).shape)
        if direction == "input gradient":
            return lambda: ops.conv2d_backward_data(dy, weight, input_size=x.shape[2:], **settings)
        return lambda: ops.conv2d_backward_filter(dy, x, kernel_size=s["kernel"], **settings)

    def _limit(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        """What the machine can do: a large matrix product on all cores, and a copy of a large array."""
        if direction == "matrix product":
            a, b = self._normal(s["size"], s["size"]), self._normal(s["size"], s["size"])
            return lambda: a @ b
        source = self._normal(s["elements"])
        target = source.copy()
        if self._device == "cuda":
            return lambda: target.__setitem__(..., source)
        from gpucnn.ops.cpu.threads import parallel_for

        parts = [slice(source.size * i // 16, source.size * (i + 1) // 16) for i in range(16)]
        return lambda: parallel_for(16, lambda i: target.__setitem__(parts[i], source[parts[i]]))

    def _image(self, s: dict[str, Any]) -> Any:
        return self._normal(s["n"], s["c"], s["size"], s["size"])

    def _max_pool(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        x = self._image(s)
        ops = self._ops.backend_of(x)
        window = {"kernel_size": s["kernel"], "stride": s["stride"]}
        if direction == "forward":
            return lambda: ops.max_pool2d_forward(x, **window)
        y, argmax = ops.max_pool2d_forward(x, **window)
        return lambda: ops.max_pool2d_backward(y, argmax, input_size=x.shape[2:], **window)

    def _avg_pool(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        x = self._image(s)
        ops = self._ops.backend_of(x)
        window = {"kernel_size": s["kernel"], "stride": s["stride"]}
        if direction == "forward":
            return lambda: ops.avg_pool2d_forward(x, **window)
        y = ops.avg_pool2d_forward(x, **window)
        return lambda: ops.avg_pool2d_backward(y, input_size=x.shape[2:], **window)

    def _batch_norm(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        x, weight, bias = self._image(s), self._normal(s["c"]), self._normal(s["c"])
        ops = self._ops.backend_of(x)
        if direction == "forward":
            mean, variance = self._normal(s["c"]), abs(self._normal(s["c"]))
            return lambda: ops.batch_norm_forward(x, weight, bias, mean, variance)
        _, mean, inverse_std = ops.batch_norm_forward(x, weight, bias)
        dy = self._image(s)
        return lambda: ops.batch_norm_backward(dy, x, weight, mean, inverse_std)

    def _activation(self, kind: str, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        x, dy = self._image(s), self._image(s)
        ops = self._ops.backend_of(x)
        forward, backward = getattr(ops, f"{kind}_forward"), getattr(ops, f"{kind}_backward")
        if direction == "forward":
            return lambda: forward(x)
        value = forward(x) if kind in ("relu", "sigmoid", "tanh") else x
        return lambda: backward(dy, value)

    def _cross_entropy(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        del direction
        logits = self._normal(s["n"], s["classes"])
        targets = self._to_device(self._random.integers(0, s["classes"], s["n"]), self._device)
        ops = self._ops.backend_of(logits)

        def both() -> Any:
            _, probabilities = ops.softmax_cross_entropy_forward(logits, targets)
            return ops.softmax_cross_entropy_backward(probabilities, targets)

        return both

    def _optimizer(self, name: str, count: int) -> Callable[[], Any]:
        from gpucnn.optimizers import SGD, Adam
        from gpucnn.parameters import Parameter

        parameter = Parameter(self._normal(count))
        sgd = name == "sgd momentum"
        optimizer: Any = SGD([parameter], lr=1e-3, momentum=0.9) if sgd else Adam([parameter], lr=1e-3)
        parameter.gradient[...] = self._normal(count)
        return lambda: optimizer.step()

    def _step(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        del direction
        from gpucnn import losses, models, optimizers

        size, options = s["size"], s.get("options", {})
        model = models.create(s["model"], num_classes=s["classes"], in_channels=s["c"], image_size=size, **options)
        if self._device == "cuda":
            model.to("cuda")
        model.train()
        model.skip_input_gradient()  # as PyTorch, which computes no gradient for an input that asks for none
        loss = losses.CrossEntropyLoss()
        optimizer = optimizers.SGD(model.parameters(), lr=0.01, momentum=0.9)
        x = self._image(s)
        targets = self._to_device(self._random.integers(0, s["classes"], s["n"]), self._device)

        def step() -> Any:
            optimizer.zero_grad()
            value = loss.forward(model(x), targets)
            model.backward(loss.backward())
            optimizer.step()
            return value

        return step

    def _jpeg_epoch(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        """An epoch from JPEG files to updated weights, decoding included; the function returns its images."""
        del direction
        from gpucnn import data, models

        def epoch() -> int:
            splits = data.load(s["folder"], image_size=s["size"], validation_fraction=0.0)
            model = models.create("animalnet", num_classes=len(splits.train.classes), image_size=s["size"])
            options = {"optimizer": "sgd", "lr": 0.01, "schedule": "constant"}
            model.fit(splits.train, epochs=1, batch_size=s["n"], augmentation="flip", verbose=False, **options)
            return len(splits.train)

        return epoch

    def _digits(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        """LeNet-5 on the digits until the test accuracy is reached; the function returns the epochs it took."""
        del direction
        from gpucnn import data, models

        splits = data.load("digits", validation_fraction=0.0)

        def train() -> int:
            import gpucnn.random

            gpucnn.random.manual_seed(0)
            model = models.create("lenet5", num_classes=10, in_channels=1, image_size=28)

            for epochs in range(1, 31):
                model.fit(splits.train, epochs=1, batch_size=32, optimizer="adam", lr=2e-3, verbose=False)
                if model.evaluate(splits.test).accuracy >= s["accuracy"]:
                    return epochs
            raise RuntimeError("30 epochs were not enough")

        return train
