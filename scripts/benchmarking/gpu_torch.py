"""PyTorch's side of each row on a GPU: eager, channels-last or compiled, at the same precision as ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarking.gpu_clock import FLUSH_BYTES, Clock, EventClock, WallClock
from benchmarking.torch_peer import MODELS, TorchPeer

CAPTURED = "none, captured whole"
"""A step that is not compiled, all of it one CUDA graph: the counterpart of ours that is captured."""

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchOnGpu(TorchPeer):
    """PyTorch, whose best is taken: both memory formats, cuDNN choosing its algorithms by measuring.

    By measuring always: the plan that its heuristics once chose for a problem would be taken again, whatever the
    switch says then. On a CPU, rehearsing, it is the same program without CUDA's events.
    """

    def __init__(self, device: str, compiled: bool = False) -> None:
        super().__init__(device, "compile" if compiled else "eager")
        self.variants = ("max-autotune", CAPTURED) if compiled else ("", "channels-last")
        self._precision = "float32"
        self._graphs = False
        torch.backends.cudnn.benchmark = device == "cuda"

    def versions(self) -> dict[str, str]:
        """What ran."""
        found = {"torch": str(torch.__version__)}
        if self._device.type == "cuda":
            found |= {"torch's CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
        return found

    @property
    def clock(self) -> Clock:
        """Events on a GPU."""
        if self._device.type != "cuda":
            return WallClock()
        area = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self._device)
        return EventClock(
            lambda: torch.cuda.Event(enable_timing=True),
            lambda before, after: float(before.elapsed_time(after)),
            area.zero_,
            torch.cuda.synchronize,
        )

    def forget(self) -> None:
        """Give the memory of the last rows back."""
        if self._compiled:
            torch.compiler.reset()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the GPU. Raises where it can do no more work for this process."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    # ------------------------------------------------------------ precision

    def _use(self, precision: str) -> None:
        """Round products as ``precision`` says: TF32 for "tf32" alone, and no 16-bit sums."""
        self._precision = precision
        tf32 = precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def _normal(self, *shape: int) -> torch.Tensor:
        tensor = super()._normal(*shape)
        return tensor.to(_DTYPES.get(self._precision, torch.float32))

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # Graphs are for steps, which many short kernels make up. An operation's would copy its inputs to places of
        # their own each time, and a backward that is called again and again never replays one.
        mode = "max-autotune" if self._graphs else "max-autotune-no-cudagraphs"
        return torch.compile(function, dynamic=False, mode=mode) if self._compiled else function

    # ------------------------------------------------------------ rows

    def prepare_in(self, row: dict[str, Any], precision: str, variant: str) -> Callable[[], Any] | None:
        """The work of ``row`` as a function; None where there is no such variant of it."""
        if variant == "channels-last" and (row["kind"] == "cross_entropy" or "count" in row["sizes"]):
            return None  # no images
        self._use(precision)
        self._format = torch.channels_last if variant == "channels-last" else torch.contiguous_format
        self._graphs = row["kind"] in ("step", "inference")
        if variant != CAPTURED:
            work = self.prepare(row)
            return self._waited_for(work) if row["kind"] == "inference" else work
        if not self._graphs or self._device.type != "cuda" or (row["kind"], precision) == ("step", "float16"):
            return None  # a scaler looks at its gradients, which a graph cannot
        self._compiled, self._format = False, torch.channels_last
        try:
            work = _captured(self.prepare(row))
        finally:
            self._compiled = True
        return self._waited_for(work) if row["kind"] == "inference" else work

    def _waited_for(self, work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            result = work()
            self.synchronize()
            return result

        return run

    def _chain(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        del direction
        x, weight, bias = (
            self._normal(s["n"], s["c"], s["size"], s["size"]),
            self._normal(s["k"], s["c"], s["kernel"], s["kernel"]),
            self._normal(s["k"]),
        )
        stride, padding = s["stride"], s["padding"]
        chain = self._compile(lambda x: F.max_pool2d(F.relu(F.conv2d(x, weight, bias, stride, padding)), 2))

        def run() -> Any:
            with torch.no_grad():
                return chain(x)

        return run

    def _columns(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        x = self._image(s)
        columns = F.unfold(x, s["kernel"], padding=s["padding"])
        if direction == "im2col":
            return lambda: F.unfold(x, s["kernel"], padding=s["padding"])
        return lambda: F.fold(columns, x.shape[2:], s["kernel"], padding=s["padding"])

    def _optimizer(self, name: str, count: int) -> Callable[[], Any]:
        self._use("float32")
        return super()._optimizer(name, count)

    def _cross_entropy(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        self._use("float32")
        return super()._cross_entropy(direction, s)

    def _step(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        """A training step; 16 bits by automatic mixed precision, in float16 with loss scaling."""
        del direction
        precision = self._precision
        model = MODELS[s["model"]](s["classes"], s["c"], s["size"]).to(self._device, memory_format=self._format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        self._use("tf32" if precision == "tf32" else "float32")  # AMP is given float32 images
        x = self._image(s)
        self._use(precision)
        targets = torch.randint(s["classes"], (s["n"],), device=self._device)
        narrow = _DTYPES.get(precision)
        scaler = torch.amp.GradScaler(self._device.type, enabled=precision == "float16")

        def forward(x: torch.Tensor) -> torch.Tensor:
            context: Any = contextlib.nullcontext()
            if narrow is not None:
                context = torch.autocast(self._device.type, dtype=narrow)
            with context:
                return F.cross_entropy(model(x), targets)

        forward = self._compile(forward)

        def step() -> Any:
            optimizer.zero_grad(set_to_none=True)
            loss = forward(x)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return loss

        return step

    def _inference(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        """A pass of a network whose weights are of the precision's dtype."""
        del direction
        model = MODELS[s["model"]](s["classes"], s["c"], s["size"]).eval()
        dtype = _DTYPES.get(self._precision, torch.float32)
        model = model.to(self._device, dtype).to(memory_format=self._format)
        x = self._image(s)
        forward = self._compile(model)

        def run() -> Any:
            with torch.inference_mode():
                return forward(x)

        return run

    def _time_to_accuracy(self, direction: str, s: dict[str, Any]) -> Callable[[], Any]:
        """The same recipe as ours, with all images on the device; the function returns the epochs it took."""
        del direction
        (x, labels), (test_x, test_labels) = self._labelled(s["data"], s.get("images"))
        narrow = _DTYPES.get(self._precision)

        def context() -> Any:
            return contextlib.nullcontext() if narrow is None else torch.autocast(self._device.type, dtype=narrow)

        def rightly(model: torch.nn.Module) -> float:
            model.eval()
            found = torch.zeros((), device=self._device)
            with torch.no_grad(), context():
                for images, wanted in zip(test_x.split(1000), test_labels.split(1000), strict=True):
                    found += (model(images.to(memory_format=self._format)).argmax(1) == wanted).sum()
            return found.item() / len(test_x)

        def run() -> int:
            torch.manual_seed(0)
            model = MODELS[s["model"]](s["classes"], s["c"], s["size"]).to(
                self._device, memory_format=self._format
            )
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
            for epoch in range(1, 31):
                model.train()
                for rows in torch.randperm(len(x), device=self._device).split(s["n"]):
                    optimizer.zero_grad(set_to_none=True)
                    with context():
                        loss = F.cross_entropy(model(x[rows].to(memory_format=self._format)), labels[rows])
                    loss.backward()
                    optimizer.step()
                if rightly(model) >= s["accuracy"]:
                    return epoch
            raise RuntimeError("30 epochs were not enough")

        return run

    # ------------------------------------------------------------ proofs

    def proof(self, x: Any, weight: Any, precision: str) -> Any:
        """A convolution of given numbers with padding 1, for the error of this precision."""
        self._use(precision)
        dtype = _DTYPES.get(precision, torch.float32)
        given = [torch.from_numpy(values).to(self._device, dtype) for values in (x, weight)]
        return F.conv2d(*given, padding=1).double().cpu().numpy()


def _captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """A step's graph, as PyTorch's manual has one made: warmed up on a stream beside the one in use."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
