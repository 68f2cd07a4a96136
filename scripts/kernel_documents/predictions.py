"""docs/kernels/predictions.md and .json: how long each row of the GPU benchmark is reckoned to take on an H200."""

from __future__ import annotations

import json
from typing import Any

from benchmarking.gpu_rows import LIBRARIES, NETWORKS, Measurement, measurements

from gpucnn_kernels import conv2d_choose, conv2d_tiles
from gpucnn_kernels.conv2d_cost import estimate
from gpucnn_kernels.gpu import H200
from gpucnn_kernels.problem import Conv2dProblem

PRECISIONS = ("float32", "tf32", "bfloat16")
_DIRECTIONS = {"forward": "forward", "input gradient": "backward_data", "filter gradient": "backward_filter"}

# FLOP/s by precision and bytes a second of an H200: the datasheet's, and the best that cuBLAS and a copy reach.
DATASHEET = {"float32": 67e12, "tf32": 495e12, "bfloat16": 989e12, "bytes": 4.8e12}
REACHED = {"float32": 52e12, "tf32": 418e12, "bfloat16": 798e12, "bytes": 4.3e12}

INTRODUCTION = """# Predictions for an H200

**Nothing on this page was measured.** It is the arithmetic of `gpucnn_kernels/conv2d_cost.py` and
`conv2d_tiles.py`, whose constants are published figures or estimates, marked there as such. It is what
`scripts/benchmark.py --device cuda` will be held against, under the same names of rows
([../benchmarks/README.md](../benchmarks/README.md)), and what "auto" chooses by until then.

## Tiles

What a block makes of the product, and the operations that a step of it does for each byte that it fetches through
the second-level cache: to be limited by arithmetic a tile needs as many as the unit's rate has for each byte a
second of that cache, which for an H200 is reckoned with {cache:.1f} TB/s. Share is what the inner product is
reckoned to reach of its unit's peak, resident how many blocks a multiprocessor holds.

| kernel | channels x positions | warps | resident | share | FLOP/byte, 4-byte elements | 2-byte | 8-byte |
|---|---|---|---|---|---|---|---|
{tiles}
## Rows

Limit is max(operations / rate, bytes / bandwidth), each array once, with the datasheet's figures (67, 495 and 989
TFLOP/s in float32, tf32 and bfloat16, 4.8 TB/s) and with those that cuBLAS and a copy are published to reach of
them (52, 418, 798, 4.3). Predicted is the time of what "auto" takes, for the better of the two memory formats,
with what of it takes the longest; share is that of the second limit. Where it is more than 100 %, float32 goes the
way "tensor": three tf32 products for each, at a third of their rate, more than twice that of float32's own unit.
"""


def problem_of(sizes: dict[str, int]) -> Conv2dProblem:
    """A convolution row's problem."""
    return Conv2dProblem.from_shapes(
        (sizes["n"], sizes["c"], sizes["size"], sizes["size"]),
        (sizes["k"], sizes["c"] // sizes["groups"], sizes["kernel"], sizes["kernel"]),
        stride=sizes["stride"],
        padding=sizes["padding"],
        groups=sizes["groups"],
    )


def limit(measurement: Measurement, figures: dict[str, float]) -> float:
    """The least seconds of a row."""
    row = measurement.row
    return max(row.flops / figures[measurement.precision], row.bytes / figures["bytes"])


def predicted(measurement: Measurement) -> dict[str, Any]:
    """A row's limits in seconds and, of a convolution, what is chosen and the parts of its time."""
    entry: dict[str, Any] = {
        "limit_datasheet": limit(measurement, DATASHEET),
        "limit_reached": limit(measurement, REACHED),
    }
    if measurement.row.kind == "convolution":
        problem = problem_of(measurement.row.sizes)
        direction = _DIRECTIONS[measurement.row.direction]
        dtype = "float32" if measurement.precision == "tf32" else measurement.precision
        precision = None if measurement.precision == "float32" else measurement.precision
        found = []
        for last in (False, True):
            options: dict[str, Any] = {"precision": precision, "channels_last": last}
            path = conv2d_choose(direction, problem, dtype, **options)
            found.append((estimate(path, direction, problem, dtype, H200, **options), last))
        made, last = min(found, key=lambda pair: pair[0].seconds)
        entry |= {
            "path": made.path, "tile": made.tile, "layout": "channels-last" if last else "contiguous",
            "seconds": made.seconds, "by": made.limit, "arithmetic": made.arithmetic, "cache": made.cache,
            "memory": made.memory, "passes": made.passes, "launches": made.launches,
        }  # fmt: skip
    return entry


def table() -> dict[str, dict[str, Any]]:
    """By the benchmark's keys, every row but whole networks and chains; seconds to four digits."""
    found = {}
    for each in measurements():
        if (
            each.against == LIBRARIES
            and each.precision in PRECISIONS
            and each.row.kind not in (*NETWORKS, "chain")
        ):
            numbers = predicted(each)
            found[each.key] = {
                name: float(f"{value:.4g}") if isinstance(value, float) else value
                for name, value in numbers.items()
            }
    return found


def written(rows: dict[str, dict[str, Any]]) -> str:
    """As JSON, a row a line."""
    lines = [f" {json.dumps(key)}: {json.dumps(entry)}" for key, entry in rows.items()]
    return '{"gpu": "H200, predicted", "rows": {\n' + ",\n".join(lines) + "\n}}\n"


def shown(seconds: float) -> str:
    """Microseconds, to three digits."""
    return f"{float(f'{seconds * 1e6:.3g}'):g}"


def render(rows: dict[str, dict[str, Any]]) -> str:
    """The page."""
    every = (
        *conv2d_tiles.IMPLICIT_TILES, *conv2d_tiles.FILTER_TILES,
        *conv2d_tiles.TENSOR_TILES, *conv2d_tiles.TENSOR_FILTER_TILES, *conv2d_tiles.WGMMA_TILES,
    )  # fmt: skip
    tiles = "".join(
        f"| `{tile.name}` | {tile.channels} x {tile.positions} | {tile.warps} | {tile.resident} | "
        f"{tile.share:.0%} | " + " | ".join(f"{tile.operations_a_byte(item):.0f}" for item in (4, 2, 8)) + " |\n"
        for tile in every
    )
    parts = [INTRODUCTION.format(cache=conv2d_tiles.cache_bandwidth(H200) / 1e12, tiles=tiles)]
    for precision in PRECISIONS:
        parts.append(
            f"\n### {precision}\n\n| row | limit, datasheet, us | limit, reached, us | predicted, us | share | "
            "way | tile | longest |\n|---|---|---|---|---|---|---|---|\n"
        )
        for key, entry in rows.items():
            name, of, _ = key.rsplit(", ", 2)
            if of == precision:
                cells = [name, shown(entry["limit_datasheet"]), shown(entry["limit_reached"])]
                if "seconds" in entry:
                    share = entry["limit_reached"] / entry["seconds"]
                    way = f"{entry['path']}, {entry['layout']}"
                    cells += [shown(entry["seconds"]), f"{share:.0%}", way, entry["tile"], entry["by"]]
                else:
                    cells += ["-"] * 5
                parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)
