"""How the time of an operation grows with batch, channels and image size, beside what the machine could do.

    python3 scripts/plot_growth.py docs/benchmarks/growth.png

Needs Matplotlib. Each point is the median of several calls; the sizes take turns, so that a busy moment does not
bend one curve. The limit is the larger of two times: the operations at the rate of a large matrix product, and the
bytes of all inputs and outputs, each once, at the speed of a copy, both measured in the same run. Winograd's
algorithm makes fewer multiplications than the operations that are counted, and can pass below that line. The
numbers are written beside the picture, as JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

import numpy  # noqa: E402
from benchmark import processor  # noqa: E402

from gpucnn.errors import GpucnnError  # noqa: E402
from gpucnn.ops import cpu  # noqa: E402
from gpucnn.ops.cpu import compiled  # noqa: E402
from gpucnn.ops.cpu.threads import parallel_for, thread_count  # noqa: E402

ROUNDS = 7
MINIMUM_SECONDS = 0.02  # a point's calls are repeated until they take so long
PASSES = ("forward", "input gradient", "filter gradient")


@dataclass
class Point:
    """One size: ``functions`` by pass, the least work of each pass, and the seconds measured."""

    size: int
    functions: dict[str, Callable[[], Any]]
    flops: float
    moved: float
    seconds: dict[str, list[float]] = field(default_factory=dict)


def convolution(size: int, n: int, c: int, k: int, image: int) -> Point:
    """A 3x3 convolution of stride 1 and padding 1, in its three directions."""
    generator = numpy.random.default_rng(0)
    x = generator.standard_normal((n, c, image, image), numpy.float32)
    weight = generator.standard_normal((k, c, 3, 3), numpy.float32) * numpy.float32(0.1)
    dy = generator.standard_normal((n, k, image, image), numpy.float32)
    functions = {
        "forward": lambda: cpu.conv2d_forward(x, weight, padding=1),
        "input gradient": lambda: cpu.conv2d_backward_data(dy, weight, input_size=(image, image), padding=1),
        "filter gradient": lambda: cpu.conv2d_backward_filter(dy, x, kernel_size=3, padding=1),
    }
    return Point(size, functions, 2.0 * 9 * c * k * n * image**2, 4.0 * (x.size + dy.size + weight.size))


def batch_norm(size: int, n: int, c: int, image: int) -> Point:
    """Batch norm of images, forward and backward: bound by memory."""
    generator = numpy.random.default_rng(0)
    x, dy = (generator.standard_normal((n, c, image, image), numpy.float32) for _ in range(2))
    weight, bias = numpy.ones(c, numpy.float32), numpy.zeros(c, numpy.float32)
    _, mean, inverse_std = cpu.batch_norm_forward(x, weight, bias)
    functions = {
        "forward": lambda: cpu.batch_norm_forward(x, weight, bias),
        "input gradient": lambda: cpu.batch_norm_backward(dy, x, weight, mean, inverse_std),
    }
    return Point(size, functions, 0.0, 4.0 * 2 * x.size)


PANELS: dict[str, tuple[str, Callable[[], list[Point]]]] = {
    "3x3, 64 to 64 channels, 28x28": (
        "images in the batch",
        lambda: [convolution(n, n, 64, 64, 28) for n in (1, 2, 4, 8, 16, 32, 64)],
    ),
    "3x3, batch 8, 14x14": (
        "channels, in and out",
        lambda: [convolution(c, 8, c, c, 14) for c in (4, 8, 16, 32, 64, 128, 256, 512)],
    ),
    "3x3, batch 4, 32 to 32 channels": (
        "rows and columns of the image",
        lambda: [convolution(size, 4, 32, 32, size) for size in (7, 14, 28, 56, 112, 224)],
    ),
    "batch norm, batch 8, 64 channels": (
        "rows and columns of the image",
        lambda: [batch_norm(size, 8, 64, size) for size in (7, 14, 28, 56, 112, 224)],
    ),
}


def once(function: Callable[[], Any]) -> float:
    """Seconds of one call, the mean over as many as it takes to measure it."""
    calls, began = 0, time.perf_counter()
    while True:
        function()
        calls += 1
        passed = time.perf_counter() - began
        if passed >= MINIMUM_SECONDS:
            return passed / calls


def measure_limits() -> tuple[float, float]:
    """(operations a second of a large matrix product, bytes a second of a copy), on all threads."""
    a, b = (numpy.random.default_rng(i).standard_normal((2048, 2048), numpy.float32) for i in range(2))
    source = numpy.ones(1 << 25, numpy.float32)
    target = source.copy()
    parts = [slice(source.size * i // 16, source.size * (i + 1) // 16) for i in range(16)]

    def copy() -> None:
        parallel_for(16, lambda i: target.__setitem__(parts[i], source[parts[i]]))

    product = min(once(lambda: a @ b) for _ in range(ROUNDS))
    return 2.0 * 2048**3 / product, 8.0 * source.size / min(once(copy) for _ in range(ROUNDS))


def measure(rate: float, bandwidth: float) -> dict[str, Any]:
    """The seconds of every point, and its limit."""
    measured = {}
    for title, (axis, make) in PANELS.items():
        points = make()
        for _ in range(ROUNDS):
            for point in points:
                for name, function in point.functions.items():
                    point.seconds.setdefault(name, []).append(once(function))
        measured[title] = {
            "axis": axis,
            "sizes": [point.size for point in points],
            "limit": [max(point.flops / rate, point.moved / bandwidth) for point in points],
            "seconds": {
                name: [statistics.median(point.seconds[name]) for point in points] for name in points[0].functions
            },
        }
        print(f"measured: {title}", file=sys.stderr, flush=True)
    return measured


def draw(found: dict[str, Any], path: Path) -> None:
    """The panels, both axes logarithmic, so that proportional growth is a straight line of slope 1."""
    from gpucnn.visualize.figure import new_figure, save_figure

    figure = new_figure(12, 9)
    for axes, (title, panel) in zip(figure.subplots(2, 2).flat, found["panels"].items(), strict=True):
        for name, marker in zip(PASSES, "os^", strict=True):
            if name in panel["seconds"]:
                label = "backward" if "batch norm" in title and name != "forward" else name
                milliseconds = [1e3 * value for value in panel["seconds"][name]]
                axes.plot(panel["sizes"], milliseconds, marker=marker, ms=4, label=label)
        limit = [1e3 * value for value in panel["limit"]]
        label = "limit, forward" if "batch norm" in title else "limit of a plain sum"
        axes.plot(panel["sizes"], limit, color="black", ls="--", label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(panel["sizes"], [str(size) for size in panel["sizes"]])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(panel["axis"])
        axes.set_ylabel("milliseconds")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(
        f"{found['date']}, {found['processor']}, {found['threads']} threads: "
        f"{found['rate'] * 1e-9:.0f} GFLOP/s, {found['bandwidth'] * 1e-9:.0f} GB/s",
        fontsize=10,
    )
    save_figure(figure, path)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the picture and the numbers; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path, help="the PNG to write; its numbers go beside it, as .json")
    picture: Path = parser.parse_args(arguments).picture
    if not picture.parent.is_dir():
        parser.error(f"there is no folder {picture.parent}")
    rate, bandwidth = measure_limits()
    found = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": thread_count(),
        "loops": "compiled" if compiled.available() else "NumPy",
        "rate": rate,
        "bandwidth": bandwidth,
        "panels": measure(rate, bandwidth),
    }
    try:
        draw(found, picture)
        picture.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except (GpucnnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
