"""What lies around the kernels on a GPU: threads, streams, batches on their way, CuPy's bfloat16, other libraries.

No host runtime has these, so they are what a machine without a GPU can only read about: a first launch in a thread
that has no context, launches on streams that do not wait for one another, copies that run beside the kernels.
"""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy

import gpucnn_kernels as kernels
from scripts.gpu_validation.bench import Bench
from scripts.gpu_validation.tuning import check_tuning

Array = numpy.ndarray[Any, Any]
_LAUNCHES = 40  # on a stream, each waiting for the one before
_BATCHES, _BATCH = 12, (32, 3, 96, 96)


def _numbers(bench: Bench, *shape: int) -> Array:
    return numpy.random.default_rng([bench.seed, *shape]).standard_normal(shape).astype(numpy.float32)


def check_threads(bench: Bench) -> None:
    """A launch in a new thread, of a kernel that another thread has compiled: nothing made it a context yet."""
    x = _numbers(bench, 1000)
    bench.check(
        "launch", "the first thread", "float32", lambda: kernels.relu_forward(bench.put(x)), [_relu(x)], [0.0]
    )

    def run() -> Any:
        given = bench.put(x)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(kernels.relu_forward, given).result()

    bench.check("launch", "a new thread", "float32", run, [_relu(x)], [0.0])


def _relu(x: Array) -> Array:
    return numpy.maximum(x, 0)


def check_streams(bench: Bench) -> None:
    """Chains of kernels and of matrix products on streams that wait for no other, given in every way."""
    import cupy

    class Foreign:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, self.stream.ptr

    x, square = _numbers(bench, 1 << 20), _numbers(bench, 256, 256)
    halved = numpy.where(x > 0, x, x * numpy.float32(2.0**-_LAUNCHES))
    ways: dict[str, Callable[[Any], Any]] = {
        "CuPy's": lambda stream: stream, "an address": lambda stream: stream.ptr, "__cuda_stream__": Foreign,
    }  # fmt: skip
    for title, way in ways.items():

        def run(way: Callable[[Any], Any] = way) -> Any:
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                y, z, identity = bench.put(x), bench.put(square), bench.put(numpy.eye(256, dtype=numpy.float32))
            for _ in range(_LAUNCHES):
                y = kernels.leaky_relu_forward(y, negative_slope=0.5, stream=way(stream))
                z = kernels.linear_forward(z, identity, stream=way(stream))
            stream.synchronize()
            return y, z

        bench.check("streams", title, "float32", run, [halved, square], [0.0, 0.0])


def check_batches(bench: Bench, memory: Any) -> None:
    """Batches through page-locked buffers, sent by threads while the batch before is computed with."""
    from gpucnn.data.transfer import Transfer

    batches = [_numbers(bench, number + 1, *_BATCH[1:]).repeat(2, axis=0) for number in range(_BATCHES)]
    sources = [numpy.resize(batch, _BATCH) for batch in batches]

    def run() -> Any:
        transfer, kept = Transfer(memory, 2), []
        with ThreadPoolExecutor(2) as pool:
            waiting: deque[Future[Any]] = deque()
            for number in range(_BATCHES + 3):
                if number < _BATCHES:
                    waiting.append(pool.submit(transfer.start, [sources[number]]))
                if number < 3:
                    continue
                (images,) = transfer.arrive(waiting.popleft().result())
                y = images
                for _ in range(4):
                    y = kernels.leaky_relu_forward(y, negative_slope=0.5)
                kept.append(y)
                del images, y
        transfer.close()
        return tuple(kept)

    expected = [numpy.where(source > 0, source, source / 16) for source in sources]
    bench.check("batches", "two buffers, two threads", "float32", run, expected, [0.0] * _BATCHES)


def check_loader(bench: Bench) -> None:
    """A loader's batches, made on the GPU of bytes beside other work, have the bits of those made on the CPU."""
    from gpucnn.data import ArrayDataset, Augmentation, Loader, Preprocessing

    random = numpy.random.default_rng([bench.seed, 150])
    images, labels = random.integers(0, 256, (150, 40, 36, 3), numpy.uint8), numpy.arange(150) % 3
    data, preprocessing = ArrayDataset(images, labels), Preprocessing((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    augmentations = {
        "no changes": None,
        "moved": Augmentation(horizontal_flip=True, shift=4, cutout=8),
        "moved, kept on the GPU": Augmentation(horizontal_flip=True, shift=4, cutout=8),
        "cropped and turned": Augmentation(horizontal_flip=True, resized_crop=0.3, rotation=20.0, shift=2),
    }
    for title, augmentation in augmentations.items():

        def batches(
            device: str, augmentation: Augmentation | None = augmentation, keep: bool = "kept" in title
        ) -> list[Any]:
            loader = Loader(
                data, 8, preprocessing=preprocessing, augmentation=augmentation, shuffle=True, device=device,
                keep_on_device=keep,
            )  # fmt: skip
            kept = []
            with loader.epoch(1) as prepared:
                for batch in prepared:
                    kept.append(batch.images)
                    if device != "cpu":  # work on the stream of the steps, on memory that batches will use
                        kernels.leaky_relu_forward(batch.images, negative_slope=0.5)
            return kept

        expected = batches("cpu")
        bench.check(
            "loader",
            title,
            "float32",
            lambda batches=batches: tuple(batches("cuda")),
            expected,
            [0.0] * len(expected),
        )


def check_bfloat16(bench: Bench, arrays: Any) -> None:
    """What layers and training do with arrays of bfloat16 themselves, beside the same by NumPy and ml_dtypes."""
    try:
        import ml_dtypes
    except ImportError:
        return
    plain = _numbers(bench, 4, 6, 5)
    x, y = plain.astype(ml_dtypes.bfloat16), (8 * plain[::-1]).astype(ml_dtypes.bfloat16)

    def both(module: Any, x: Any, y: Any) -> tuple[Any, ...]:
        wide = x.astype("float32")
        wide += y
        six = module.minimum(y, 6)
        return (
            x + y, wide, six, (y < 6) & (x > 0), module.concatenate([x, y[:, :2]], axis=1), abs(y).max(),
            module.isfinite(x), wide.astype("bfloat16"), y.transpose(2, 0, 1).astype("float32"),
        )  # fmt: skip

    def run() -> Any:
        results = both(arrays, arrays.asarray(x), arrays.asarray(y))
        return tuple(result.astype("float32") for result in results)

    expected = [numpy.asarray(result).astype(numpy.float64) for result in both(numpy, x, y)]
    bench.check("CuPy's bfloat16", "arithmetic", "bfloat16", run, expected, [0.0] * len(expected))


def _imported(name: str) -> Any:
    """The library, or None where it is not there or does not import, which is not for this package to answer."""
    try:
        return importlib.import_module(name)
    except Exception:
        return None


def check_libraries(bench: Bench) -> None:
    """Arrays of PyTorch, JAX and Numba, where these are installed: their memory, their streams, their kind."""
    x = _numbers(bench, 4, 8, 5, 6)
    expected = [_relu(x)]

    def check(library: str, title: str, run: Callable[[], Any]) -> None:
        bench.check(library, title, "float32", run, expected, [0.0])

    # JAX would take three quarters of the GPU's memory for itself, for as long as this process lives.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    torch, jax, numba = map(_imported, ("torch", "jax", "numba"))
    if torch is not None:

        def by_torch(change: Callable[[Any], Any], stream: Any = None) -> Any:
            with torch.cuda.stream(stream):
                tensor = change(torch.from_numpy(x).cuda())
                out = torch.empty_like(tensor)
                y = kernels.relu_forward(tensor)
                assert kernels.relu_forward(tensor, out=out) is out
                assert isinstance(y, torch.Tensor)
                assert torch.equal(y, out)
                assert y.stride() == tensor.stride()
                return y.float().cpu().numpy()

        if torch.cuda.is_available():
            last = torch.channels_last
            check("PyTorch", "contiguous", lambda: by_torch(lambda tensor: tensor))
            check("PyTorch", "channels last", lambda: by_torch(lambda tensor: tensor.to(memory_format=last)))
            check("PyTorch", "with a gradient", lambda: by_torch(lambda tensor: tensor.requires_grad_()))
            check("PyTorch", "own stream", lambda: by_torch(lambda tensor: tensor * 1, torch.cuda.Stream()))
    if jax is not None:

        def by_jax() -> Any:
            y = kernels.relu_forward(jax.numpy.asarray(x) * 1)
            assert isinstance(y, jax.Array)
            return numpy.asarray(y)

        if jax.default_backend() == "gpu":
            check("JAX", "just being computed", by_jax)
    if numba is not None and (cuda := _imported("numba.cuda")) is not None:

        def by_numba() -> Any:
            stream = cuda.stream()
            y = kernels.relu_forward(cuda.to_device(x), stream=stream)
            stream.synchronize()
            return y.copy_to_host()

        if cuda.is_available():
            check("Numba", "its stream", by_numba)


def check_surroundings(bench: Bench) -> None:
    """All of them, on a GPU."""
    if bench.name != "cuda":
        return
    import cupy

    from gpucnn.data.transfer import CudaMemory

    check_threads(bench)
    check_streams(bench)
    check_batches(bench, CudaMemory(cupy, cupy.cuda.runtime.getDevice()))
    check_loader(bench)
    check_bfloat16(bench, cupy)
    check_tuning(bench)
    check_libraries(bench)  # last: what they do in this process is theirs


CHECKS = {"surroundings": check_surroundings}
