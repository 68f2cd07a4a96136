"""gpucnn's side of each row on a GPU, or, rehearsing, on the host runtime: precisions, layouts, ceilings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy

from benchmarking.gpu_clock import FLUSH_BYTES, Clock, EventClock, WallClock
from benchmarking.ours import Ours

_DIRECTIONS = {"forward": "forward", "input gradient": "backward_data", "filter gradient": "backward_filter"}
_NUMBERS = 1 << 20
_NARROW = ("bfloat16", "float16")
_TF32_COMPUTE = 77  # CUBLAS_COMPUTE_32F_FAST_TF32
_FLOAT32_COMPUTE = 68  # CUBLAS_COMPUTE_32F
_CUBLAS_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # of cudaDataType


class OursOnGpu(Ours):
    """gpucnn on device "cuda": what a user of its operations and layers gets, in the precision asked for."""

    variants = ("", "channels-last", "tensor", "wgmma", "autotuned", "captured")
    """The algorithm that is chosen by itself, on contiguous arrays and on channels-last ones; tensor cores for
    float32-accurate convolutions, also where they are not chosen, and products of warpgroups on channels-last
    16-bit ones, which never are; what was measured to be the fastest; and training steps as ``fit`` takes them on
    a GPU, by one CUDA graph."""

    def __init__(self) -> None:
        super().__init__("cuda")
        from gpucnn.device import is_host_runtime

        self._host = is_host_runtime()
        self._precision, self._variant = "float32", ""
        self._way_taken: Callable[[], str] | None = None
        self._numbers: Any = None

    def versions(self) -> dict[str, str]:
        """What ran."""
        import gpucnn

        found = {"gpucnn": gpucnn.__version__, "numpy": numpy.__version__}
        return found if self._host else found | {"cupy": self._cupy.__version__}

    @property
    def _cupy(self) -> Any:
        import cupy

        return cupy

    @property
    def clock(self) -> Clock:
        """Events on a GPU."""
        if self._host:
            return WallClock()
        cupy = self._cupy
        area = cupy.empty(FLUSH_BYTES, numpy.uint8)
        return EventClock(
            cupy.cuda.Event,
            cupy.cuda.get_elapsed_time,
            lambda: area.data.memset_async(0, FLUSH_BYTES),
            cupy.cuda.get_current_stream().synchronize,
        )

    def forget(self) -> None:
        """Give the memory of the last rows back."""
        if not self._host:
            self._cupy.get_default_memory_pool().free_all_blocks()

    def synchronize(self) -> None:
        """Wait for the GPU. Raises where it can do no more work for this process."""
        if not self._host:
            self._cupy.cuda.runtime.deviceSynchronize()

    # ------------------------------------------------------------ arrays

    def _normal(self, *shape: int, scale: float = 1.0) -> Any:
        """Normal numbers in the row's precision and layout: a million of them, over and over."""
        last = len(shape) == 4 and self._variant in ("channels-last", "wgmma")
        order = (shape[0], shape[2], shape[3], shape[1]) if last else shape
        count = math.prod(order)
        if self._numbers is None:
            self._numbers = self._to_device(self._random.standard_normal(_NUMBERS, numpy.float32), "cuda")
        turns = -(-count // _NUMBERS)
        numbers: Any = self._numbers
        if turns > 1:  # never in a rehearsal, whose sizes are tiny
            numbers = self._cupy.tile(numbers, turns)
        values = numbers[:count].reshape(order) * numpy.float32(scale)
        if self._precision in _NARROW:
            values = values.astype(_dtype(self._precision))
        return values.transpose(0, 3, 1, 2) if last else values

    def _master(self, *shape: int) -> Any:
        """The same in float32, which parameters, statistics, gradients for them and losses have."""
        precision, self._precision = self._precision, "float32"
        try:
            return self._normal(*shape)
        finally:
            self._precision = precision

    # ------------------------------------------------------------ rows

    def prepare_in(self, row: dict[str, Any], precision: str, variant: str) -> Callable[[], Any] | None:
        """The work of ``row`` as a function; None where there is no such variant of it."""
        if variant == "tensor" and (
            row["kind"] != "convolution" or precision != "float32" or row["sizes"]["groups"] > 1
        ):
            return None
        if variant == "wgmma" and (
            row["kind"] != "convolution" or precision not in _NARROW or row["direction"] == "filter gradient"
        ):
            return None
        if variant == "autotuned" and row["kind"] != "convolution":
            return None
        if variant == "captured" and row["kind"] not in ("step", "inference"):
            return None
        if variant == "channels-last" and (row["kind"] == "cross_entropy" or "count" in row["sizes"]):
            return None  # no images
        if variant == "channels-last" and row["kind"] in ("step", "inference", "time_to_accuracy"):
            return None  # a model chooses for its images by itself
        self._precision, self._variant, self._way_taken = precision, variant, None
        return self.prepare(row)

    @property
    def settings(self) -> dict[str, Any]:
        """The way that the convolution of the last row took, once it has run."""
        return {} if self._way_taken is None else {"way": self._way_taken()}

    def _way(self) -> dict[str, Any]:
        """What a convolution is told of the precision."""
        if self._variant in ("tensor", "wgmma"):
            return {"algorithm": self._variant}
        return {} if self._precision == "float32" else {"precision": self._precision}

    def _convolution(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        import gpucnn_kernels
        from gpucnn_kernels import tuning

        options = {"stride": s["stride"], "padding": s["padding"], "groups": s["groups"], **self._way()}
        x = self._normal(s["n"], s["c"], s["size"], s["size"])
        weight = self._normal(s["k"], s["c"] // s["groups"], s["kernel"], s["kernel"], scale=0.1)
        run = self._directed(direction, s, x, weight, options)
        if self._variant == "autotuned":

            def tuned() -> Any:
                with gpucnn_kernels.autotune():
                    return run()

            self._way_taken = lambda: " ".join(list(tuning.used().values())[-1]).strip()
            return tuned
        if self._variant not in ("tensor", "wgmma"):
            self._way_taken = lambda: self._chosen(direction, x, weight, options)
        return run

    def _chosen(self, direction: str, x: Any, weight: Any, options: dict[str, Any]) -> str:
        """What "auto" is for these arrays."""
        from gpucnn_kernels import conv2d_choose
        from gpucnn_kernels.launch import Call
        from gpucnn_kernels.problem import Conv2dProblem

        geometry = {name: options[name] for name in ("stride", "padding", "groups")}
        problem = Conv2dProblem.from_shapes(x.shape, weight.shape, **geometry)
        with Call(None, x=x) as call:
            images = call["x"]
            return conv2d_choose(
                _DIRECTIONS[direction],
                problem,
                images.dtype,
                precision=options.get("precision"),
                channels_last=images.channels_last,
                gpu=call.gpu,
            )

    def _directed(
        self, direction: str, s: dict[str, Any], x: Any, weight: Any, options: dict[str, Any]
    ) -> Callable[[], Any]:
        import gpucnn_kernels

        out = (s["size"] + 2 * s["padding"] - s["kernel"]) // s["stride"] + 1
        if direction == "forward":
            return lambda: gpucnn_kernels.conv2d_forward(x, weight, **options)
        dy = self._normal(s["n"], s["k"], out, out)
        if direction == "input gradient":
            size = x.shape[2:]
            return lambda: gpucnn_kernels.conv2d_backward_data(dy, weight, input_size=size, **options)
        return lambda: gpucnn_kernels.conv2d_backward_filter(dy, x, kernel_size=s["kernel"], **options)

    def _chain(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        del direction
        import gpucnn_kernels

        x, weight = (
            self._normal(s["n"], s["c"], s["size"], s["size"]),
            self._normal(s["k"], s["c"], s["kernel"], s["kernel"]),
        )
        bias = self._normal(s["k"])
        options = {"stride": s["stride"], "padding": s["padding"], "activation": "relu", **self._way()}

        def chain() -> Any:
            y = gpucnn_kernels.conv2d_forward(x, weight, bias, **options)
            return gpucnn_kernels.max_pool2d_forward(y, kernel_size=2, stride=2)

        return chain

    def _columns(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        import gpucnn_kernels

        x = self._normal(s["n"], s["c"], s["size"], s["size"])
        options = {"kernel_size": s["kernel"], "padding": s["padding"]}
        if direction == "im2col":
            return lambda: gpucnn_kernels.im2col(x, **options)
        columns = gpucnn_kernels.im2col(x, **options)
        return lambda: gpucnn_kernels.col2im(columns, input_size=x.shape[2:], **options)

    def _batch_norm(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        x, weight, bias = self._image(s), self._master(s["c"]), self._master(s["c"])
        ops = self._ops.backend_of(x)
        if direction == "forward":
            mean, variance = self._master(s["c"]), abs(self._master(s["c"]))
            return lambda: ops.batch_norm_forward(x, weight, bias, mean, variance)
        _, mean, inverse_std = ops.batch_norm_forward(x, weight, bias)
        dy = self._image(s)
        return lambda: ops.batch_norm_backward(dy, x, weight, mean, inverse_std)

    def _cross_entropy(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        del direction
        logits = self._master(s["n"], s["classes"])
        targets = self._to_device(self._random.integers(0, s["classes"], s["n"]), "cuda")
        ops = self._ops.backend_of(logits)

        def both() -> Any:
            _, probabilities = ops.softmax_cross_entropy_forward(logits, targets, check_targets=False)
            return ops.softmax_cross_entropy_backward(probabilities, targets)

        return both

    def _step(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        """A training step in the row's precision; with loss scaling in float16, as the trainer does it."""
        del direction
        from gpucnn import losses, models, optimizers
        from gpucnn.layers.precision import backward_pass, forward_pass
        from gpucnn.training.loss_scaling import LossScaler

        size, extra = s["size"], s.get("options", {})
        model = models.create(s["model"], num_classes=s["classes"], in_channels=s["c"], image_size=size, **extra)
        model.to("cuda")
        model.compute_in(self._precision)
        model.train()
        model.skip_input_gradient()  # as PyTorch, which computes no gradient for an input that asks for none
        loss = losses.CrossEntropyLoss(ignore_index=None)  # as the trainer, whose labels are all classes
        loss.check_targets = False
        optimizer = optimizers.SGD(model.parameters(), lr=0.01, momentum=0.9)
        x = self._master(s["n"], s["c"], size, size)
        targets = self._to_device(self._random.integers(0, s["classes"], s["n"]), "cuda")
        scaler = LossScaler() if self._precision == "float16" else None
        if self._variant == "captured":
            return self._captured(model, loss, optimizer, scaler, x, targets)

        def step() -> Any:
            optimizer.zero_grad()
            value = loss.forward(forward_pass(model, x), targets)
            gradient = loss.backward()
            if scaler is None:
                backward_pass(model, gradient)
                optimizer.step()
                return value
            scaler.scale_up(gradient)
            backward_pass(model, gradient)
            scaler.scale_down(optimizer)
            finite = bool(numpy.isfinite(optimizer.gradient_norm()))
            if finite:
                optimizer.step()
            scaler.update(finite=finite)
            return value

        return step

    def _captured(
        self, model: Any, loss: Any, optimizer: Any, scaler: Any, x: Any, targets: Any
    ) -> Callable[[], Any]:
        """The trainer's own step, captured; it reads the loss and counts what was classified rightly, too."""
        from gpucnn.training.buffers import BufferCopy
        from gpucnn.training.captured_step import make_step
        from gpucnn.training.random_state import RandomState
        from gpucnn.training.steps import StepParts

        def refuse(words: str) -> None:
            if "kernel by kernel" in words:
                raise RuntimeError(words)

        parts = StepParts(model, loss, optimizer, BufferCopy(model), RandomState(model), None, scaler, None)
        steps = make_step(parts, "on", len(targets), refuse)
        numbers = itertools.count(1)
        step = lambda: steps.take(x, targets, next(numbers))  # noqa: E731 (what is timed)
        for _ in range(3):  # plain, captured, launched
            step()
        return step

    def _inference(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        """A pass of the compiled network in its planned memory, waited for; captured: by one launch."""
        del direction
        from gpucnn import models
        from gpucnn_kernels.runtime import current

        options = s.get("options", {})
        model = models.create(
            s["model"], num_classes=s["classes"], in_channels=s["c"], image_size=s["size"], **options
        )
        compiled = model.to("cuda").eval().compute_in(self._precision).compile_for_inference()
        x = self._master(s["n"], s["c"], s["size"], s["size"])
        plan = compiled.plan(x.shape)
        start = plan.run
        if self._variant == "captured":
            plan.run()  # what is captured must have run
            graph, _ = current().capture(plan.run, plan.arrays(), 0)
            start = graph.launch

        def run() -> Any:
            plan.input[...] = x
            start()
            self.synchronize()
            return plan.output

        return run

    def _time_to_accuracy(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        """``fit``, as a user calls it, until the accuracy is reached; the function returns the epochs it took."""
        del direction
        from gpucnn import data, models
        from gpucnn.random import manual_seed
        from gpucnn.training import Callback

        class ReachedError(Exception):
            """Ends the run."""

        class Watch(Callback):
            def on_epoch_end(self, trainer: Any, record: Any) -> None:
                if record.validation_accuracy >= s["accuracy"]:
                    raise ReachedError(record.epoch)

        splits = data.load(s["data"], validation_fraction=0.0)
        train, test = (
            (part.images(range(count)), part.labels[:count])
            for part in (splits.train, splits.test)
            for count in [s.get("images", len(part))]
        )
        recipe = {"optimizer": "adam", "lr": 1e-3, "schedule": "constant", "weight_decay": 0.0}

        def run() -> int:
            manual_seed(0)
            model = models.create(s["model"], num_classes=s["classes"], in_channels=s["c"], image_size=s["size"])
            try:
                model.fit(
                    train, test, epochs=30, batch_size=s["n"], device="cuda", precision=self._precision,
                    evaluation_batch_size=1000, verbose=False, callbacks=[Watch()], **recipe,
                )  # fmt: skip
            except ReachedError as reached:
                return int(reached.args[0])
            raise RuntimeError("30 epochs were not enough")

        return run

    # ------------------------------------------------------------ ceilings and proofs

    def ceiling(self, name: str, size: int) -> Callable[[], Any]:
        """What the machine can do at all: "copy" of ``size`` bytes, or cuBLAS's square product in a precision."""
        if name == "copy":
            self._precision = "float32"
            source = self._normal(size // 4)
            target = source.copy()
            if self._host:
                return lambda: target.__setitem__(..., source)
            return lambda: target.data.copy_from_device_async(source.data, source.nbytes)
        self._precision, self._variant = name, ""
        a, b = self._normal(size, size, scale=0.01), self._normal(size, size, scale=0.01)
        if self._host:
            from gpucnn_kernels.matmul import matmul

            return lambda: matmul(a, b)
        from cupy.cuda import cublas, device

        out = self._cupy.empty((size, size), a.dtype)
        kind = _CUBLAS_TYPES["float32" if name == "tf32" else name]
        compute = _TF32_COMPUTE if name == "tf32" else _FLOAT32_COMPUTE
        scales = numpy.array([1, 0], numpy.float32)
        factors = (b.data.ptr, kind, size, a.data.ptr, kind, size)

        def product() -> Any:
            one = scales.ctypes.data
            result = (one + scales.itemsize, out.data.ptr, kind, size)
            shape = (0, 0, size, size, size)
            cublas.gemmEx(device.get_cublas_handle(), *shape, one, *factors, *result, compute, -1)
            return a, b, out  # so that they live as long as this function

        return product

    def proof(self, x: Any, weight: Any, precision: str) -> Any:
        """A convolution of given numbers with padding 1, for the error of this precision."""
        import gpucnn_kernels

        self._precision, self._variant = precision, ""
        dtype = _dtype(precision) if precision in _NARROW else numpy.dtype("float32")
        given = [self._to_device(values.astype(dtype), "cuda") for values in (x, weight)]
        y = gpucnn_kernels.conv2d_forward(*given, padding=1, **self._way())
        return y.get().astype(numpy.float64)

    def facts(self) -> dict[str, Any]:
        """The GPU, its driver and CUDA's parts."""
        if self._host:
            return {"gpu": "none: the host runtime", "driver": "none"}
        from gpu_validation.machine import facts  # beside this folder, on whose path the worker is started

        return facts("cuda")


def _dtype(name: str) -> Any:
    """A dtype by name; bfloat16 is the package ml_dtypes'."""
    from gpucnn_kernels.arrays import numpy_dtype

    return numpy_dtype(name)
