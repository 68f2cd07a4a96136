"""The cost model: its parts by hand, what it must never choose, and what everybody would choose."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpucnn_kernels import (
    Conv2dProblem,
    conv2d_algorithms,
    conv2d_choose,
    conv2d_cost,
    conv2d_direct,
    conv2d_input_columns,
    conv2d_tiles,
    gpu,
)
from gpucnn_kernels.conv2d_choice import candidates, usual
from gpucnn_kernels.conv2d_forward_paths import terms
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.gpu import H200, Gpu
from tests.problems import ALL

ROOT = Path(__file__).resolve().parent.parent
DIRECTIONS = ("forward", "backward_data", "backward_filter")
T4 = Gpu("T4", 40, (7, 5), 1.59e9, 320e9)
A100 = Gpu("A100", 108, (8, 0), 1.41e9, 1555e9)
RTX4090 = Gpu("4090", 128, (8, 9), 2.52e9, 1008e9)


def shaped(n: int, c: int, size: int, k: int, kernel: int, **options: Any) -> Conv2dProblem:
    groups = options.get("groups", 1)
    return Conv2dProblem.from_shapes((n, c, size, size), (k, c // groups, kernel, kernel), **options)


# ---------------------------------------------------------------- the GPU


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        (H200, "float32", 66.9), (H200, "float64", 33.5), (H200, "16-bit", 1070), (H200, "tf32", 535),
        (A100, "float32", 19.5), (A100, "float64", 9.7), (A100, "16-bit", 312), (A100, "tf32", 156),
        (T4, "float32", 8.1), (T4, "16-bit", 65), (T4, "tf32", 0.0),
        (RTX4090, "float32", 82.6), (RTX4090, "float64", 1.3),
    ],
)  # fmt: skip
def test_peak_rates_are_the_datasheets(device: Gpu, precision: str, tera: float) -> None:
    assert device.rate(precision) == pytest.approx(tera * 1e12, rel=0.02)


def test_what_a_driver_says_and_what_it_does_not() -> None:
    said = {
        "MultiProcessorCount": 108, "ClockRate": 1_410_000, "MemoryClockRate": 1_215_000,
        "GlobalMemoryBusWidth": 5120,
    }  # fmt: skip
    made = gpu.from_attributes("A100", (8, 0), said)
    assert (made.multiprocessors, made.clock, made.capability) == (108, 1.41e9, (8, 0))
    assert made.bandwidth == pytest.approx(1555.2e9)
    silent = gpu.from_attributes("vGPU", (8, 0), {"MultiProcessorCount": 20, "ClockRate": 0})
    assert (silent.multiprocessors, silent.clock, silent.bandwidth) == (20, H200.clock, H200.bandwidth)


# ---------------------------------------------------------------- the parts, by hand


def test_a_grid_of_tiles_by_hand() -> None:
    device = Gpu("ten", 10, (9, 0), 1e9, 1e12)
    tile = conv2d_tiles.Tile("t", 64, 128, warps=4, resident=2, share=0.5)
    # 100 x 1000 in tiles of 64 x 128 is 2 x 8 blocks a unit, 48 of three units: five on the busiest of ten. Two of
    # these at a time are eight warps, all that is asked for; half of 2e10 is 1e9 for each multiprocessor.
    arithmetic, cache = conv2d_tiles.tiled(device, tile, 100, 1000, 3, 50.0, 2e10, 4)
    assert arithmetic == pytest.approx(5 * 2 * 64 * 128 * 50 / 1e9)
    assert cache == pytest.approx(48 * (64 + 128) * 50 * 4 / (21 * 10 * 1e9))
    # One block on each: half the warps, half the rate.
    (alone, _) = conv2d_tiles.tiled(device, tile, 64, 128 * 10, 1, 50.0, 2e10, 4)
    assert alone == pytest.approx(2 * 64 * 128 * 50 / 0.5e9)
    assert tile.operations_a_byte(4) == pytest.approx(2 * 64 * 128 / (192 * 4))


def test_what_blocks_do_beside_their_loops_by_hand() -> None:
    """The first two of a multiprocessor's blocks begin while the launch does; all make 64 results a thread."""
    device = Gpu("ten", 10, (9, 0), 1e9, 1e12)
    tile = conv2d_tiles.Tile("t", 64, 128, warps=4, resident=2, share=0.5, beginning=700, result=3)
    instructions = 4 * (3 * 700 + 5 * 3 * 64)  # of the busiest, which has five blocks of four warps
    assert conv2d_tiles.around(device, tile, 48) == pytest.approx(instructions / (0.9 * 4 * 1e9))
    # One block on each is half of the warps that a multiprocessor wants, and has nothing to begin again.
    assert conv2d_tiles.around(device, tile, 10) == pytest.approx(4 * 3 * 64 / (0.9 * 4 * 0.5e9))
    assert conv2d_tiles.around(device, tile, 0) == 0


def test_a_first_layer_is_reckoned_by_whole_blocks() -> None:
    """27 terms a sum: a quarter of the time and more is not the loops', by each product of tiles."""
    first, later = shaped(64, 3, 224, 64, 3, padding=1), shaped(64, 64, 224, 64, 3, padding=1)
    for path in ("implicit_gemm", "tensor"):
        tile = conv2d_tiles.IMPLICIT_TILES[1] if path == "implicit_gemm" else conv2d_tiles.THREE_PRODUCT_TILES[1]
        beside = conv2d_tiles.around(H200, tile, tile.blocks(64, 64 * 224 * 224, 1))
        short, long = (
            conv2d_cost.estimate(path, "forward", problem, "float32", H200) for problem in (first, later)
        )
        assert short.tile == tile.name
        assert beside > 0.25 * short.arithmetic
        assert 0 < beside < 0.1 * long.arithmetic


def test_a_grid_that_is_one_block_too_large_takes_a_round_more() -> None:
    tile = conv2d_tiles.IMPLICIT_TILES[0]

    def seconds(blocks: int) -> float:
        return conv2d_tiles.tiled(H200, tile, 64, 128 * blocks, 1, 72.0, 1e12, 4)[0]

    assert seconds(132 * 4) == seconds(132 * 3 + 1) == pytest.approx(seconds(132) * 4)
    assert seconds(132 * 4 + 1) == pytest.approx(seconds(132 * 4) * 5 / 4)


def test_an_implicit_product_by_hand() -> None:
    problem = shaped(256, 64, 56, 64, 3, padding=1)
    made = conv2d_cost.estimate("implicit_gemm", "forward", problem, "float32", H200)
    positions = 256 * 56 * 56
    assert made.tile == "conv2d_implicit_gemm_medium"
    blocks = positions // 128
    assert blocks == 6272
    peak = 256 * 132 * 1.98e9
    # The busiest multiprocessor has 48 blocks, of which it begins 44 while others are at work.
    beside = (44 * 900 + 48 * 64 * 4) / (0.9 * 1.98e9)
    assert made.arithmetic == pytest.approx(48 * 132 * 2 * 64 * 128 * 576 / (0.62 * peak) + beside)
    assert made.memory == pytest.approx(4 * (2 * positions * 64 + 64 * 576) / (0.9 * 4.8e12))
    assert made.cache == pytest.approx(blocks * 192 * 576 * 4 / (21 * 132 * 1.98e9))
    assert (made.launches, made.passes) == (1, 0.0)
    assert made.seconds == pytest.approx(made.arithmetic + 3e-6)
    assert made.limit == "arithmetic"


def test_columns_by_hand() -> None:
    problem = shaped(32, 64, 56, 64, 3, padding=1)
    made = conv2d_cost.estimate("im2col", "forward", problem, "float32", H200)
    image, columns = 4 * 32 * 64 * 3136, 4 * 32 * 576 * 3136
    assert made.passes == pytest.approx((image + columns) / 4.32e12)
    assert made.memory == pytest.approx((columns + image) / 4.32e12)  # as many output channels as input channels
    # 64 x 3136 are 25 tiles of 64 x 128, the last one half filled; 32 images' are 7 on the busiest of 132.
    beside = 8 * (5 * 500 + 7 * 32 * 4) / (0.9 * 4 * 1.98e9)
    assert made.arithmetic == pytest.approx(7 * 2 * 64 * 128 * 576 / (0.75 * 256 * 1.98e9) + beside)
    assert made.launches == 2  # 231 MB of columns go into the workspace at once
    pointwise = conv2d_cost.estimate("im2col", "forward", shaped(32, 64, 56, 64, 1), "float32", H200)
    assert (pointwise.passes, pointwise.launches) == (0.0, 1)


def test_stride_phases_multiply_no_zeros_and_the_dilated_path_does() -> None:
    problem = shaped(64, 64, 56, 128, 3, stride=2, padding=1)
    phases = conv2d_cost.Sizes.of(problem, "backward_data")
    depth = terms(problem, True)
    assert phases.covered == (64, 64 * 28 * 28, 4)
    assert depth == pytest.approx(128 * 9 / 4)
    assert 2 * phases.units * phases.positions * phases.channels * depth == problem.flops
    quick, literal = (
        conv2d_cost.estimate(path, "backward_data", problem, "float32", H200) for path in ("phases", "dilated")
    )
    assert literal.arithmetic == pytest.approx(4 * quick.arithmetic, rel=0.05)
    assert literal.passes > 0
    assert literal.launches == 3


def test_what_lies_in_pieces_of_16_bytes_is_not_packed() -> None:
    problem = shaped(8, 64, 28, 64, 3, padding=1)
    options: dict[str, Any] = {"precision": "float16"}
    plain, last = (
        conv2d_cost.estimate("tensor", "forward", problem, "float16", H200, channels_last=way, **options)
        for way in (False, True)
    )
    assert (plain.launches, last.launches) == (3, 1)  # the image's and the filter's copies, and the product
    assert plain.passes == pytest.approx(2 * 2 * 8 * 64 * 28 * 28 / 4.32e12)
    assert last.passes == 0
    odd = shaped(8, 5, 28, 64, 3, padding=1)  # five channels fill up to eight
    filled = conv2d_cost.estimate("tensor", "forward", odd, "float16", H200, channels_last=True, **options)
    assert filled.passes == pytest.approx(2 * 8 * 28 * 28 * (5 + 8) / 4.32e12)
    assert filled.launches == 3


# ---------------------------------------------------------------- the table of what the kernels take


def test_resident_blocks_are_those_of_the_compiled_kernels() -> None:
    """Of all forms the fewest, on an H100 or H200, as docs/kernels/registers.json and CUDA's limits give them."""
    spec = importlib.util.spec_from_file_location("document_kernels", ROOT / "scripts" / "document_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    document = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(document)
    table = json.loads((ROOT / "docs" / "kernels" / "registers.json").read_text())
    place = table["architectures"].index("sm_90")

    def resident(tile: conv2d_tiles.Tile, wanted: Any) -> int:
        found = []
        for title, source in table["sources"].items():
            numbers = source["kernels"].get(tile.name)
            if numbers is not None and wanted(title):
                shared = numbers["shared_bytes"][place] + numbers.get("dynamic_bytes", 0)
                share = document.occupancy("sm_90", numbers["threads"], numbers["registers"][place], shared)
                assert numbers["threads"] == 32 * tile.warps, title
                found.append(round(share * 64 / tile.warps))
        assert found, tile.name
        return min(found)

    advice = "the compiled kernel takes other registers now: correct what is resident in conv2d_tiles.py"
    single = conv2d_tiles.IMPLICIT_TILES + conv2d_tiles.FILTER_TILES
    for tile in single:
        assert resident(tile, lambda title: "float64" not in title) == tile.resident, f"{tile.name}: {advice}"
    for tile in conv2d_tiles.IMPLICIT_TILES_FLOAT64 + conv2d_tiles.FILTER_TILES_FLOAT64:
        assert resident(tile, lambda title: "float64" in title) == tile.resident, f"{tile.name}: {advice}"
    for tile in conv2d_tiles.TENSOR_TILES + conv2d_tiles.TENSOR_FILTER_TILES:
        assert resident(tile, lambda title: "PRODUCTS 1" in title) == tile.resident, f"{tile.name}: {advice}"
    for tile in conv2d_tiles.THREE_PRODUCT_TILES + conv2d_tiles.THREE_PRODUCT_FILTER_TILES:
        assert resident(tile, lambda title: "PRODUCTS 3" in title) == tile.resident, f"{tile.name}: {advice}"


# ---------------------------------------------------------------- choosing


problems = st.builds(
    lambda n, c, groups, k, size, kernel, stride, pad: shaped(
        n, c * groups, max(size, kernel), k * groups, kernel, stride=stride, padding=pad, groups=groups
    ),
    st.integers(0, 300), st.integers(1, 70), st.sampled_from([1, 1, 2, 16]), st.integers(1, 70),
    st.integers(1, 60), st.sampled_from([1, 2, 3, 5, 7]), st.integers(1, 3), st.integers(0, 3),
)  # fmt: skip
forms = st.sampled_from([
    ("float32", None), ("float32", "float32"), ("float32", "tf32"), ("float16", None), ("float16", "float16"),
    ("bfloat16", None), ("bfloat16", "bfloat16"), ("float64", None),
])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(problems, forms, st.sampled_from([H200, A100, T4]), st.booleans(), st.sampled_from(DIRECTIONS))
def test_only_what_can_be_done_is_chosen(
    problem: Conv2dProblem, form: tuple[str, str | None], device: Gpu, last: bool, direction: str
) -> None:
    dtype, precision = form
    names = candidates(direction, problem, dtype, precision, device)
    first = usual(direction, problem, dtype, precision, device)
    options: dict[str, Any] = {"precision": precision, "channels_last": last}
    name = conv2d_cost.choose(first, names, direction, problem, dtype, device, **options)
    depth = problem.C // problem.groups
    assert name in (*conv2d_algorithms(direction), "tensor")
    assert name not in ("scatter", "dilated")
    assert name != "direct" or depth <= 8
    assert name != "depthwise" or depth == 1
    if name == "tensor":
        assert device.capability >= (8, 0)
        assert precision in ("tf32", "float16", "bfloat16") or form == ("float32", None)
    if (dtype, device) == ("bfloat16", T4):
        assert name not in ("im2col", "col2im")
    estimates = {way: conv2d_cost.estimate(way, direction, problem, dtype, device, **options) for way in names}
    assert all(0 < made.seconds < float("inf") for made in estimates.values())
    if name != first:
        assert estimates[name].seconds * 1.25 < estimates[first].seconds
        assert estimates[name].seconds == min(made.seconds for made in estimates.values())


@settings(max_examples=200, deadline=None)
@given(problems, forms, st.sampled_from(DIRECTIONS), st.sampled_from(["N", "K", "C"]))
def test_a_larger_problem_takes_no_less_time(
    problem: Conv2dProblem, form: tuple[str, str | None], direction: str, letter: str
) -> None:
    """By every way, whatever of it doubles; but for the rounding of how a filter's sum is split into parts.

    And but for direct blocks of so few warps that these cannot hide each other's latencies: a larger problem has
    more of them, and can be done sooner.
    """
    dtype, precision = form
    larger = dataclasses.replace(problem, **{letter: 2 * getattr(problem, letter) or 1})
    for way in candidates(direction, problem, dtype, precision, H200):
        if way in ("direct", "depthwise") and letter == "C":
            continue
        options: dict[str, Any] = {"precision": precision}
        small, large = (
            conv2d_cost.estimate(way, direction, each, dtype, H200, **options) for each in (problem, larger)
        )
        slack = 0.8 if direction == "backward_filter" and way in ("implicit_gemm", "direct", "tensor") else 1.0
        if way == "direct" and direction != "backward_filter":
            plan = conv2d_direct.plan(problem, False, dtype, H200)
            if direction == "backward_data":
                plan = conv2d_input_columns.faster(problem, dtype, H200)
            if not plan.hides_latencies(H200):
                continue
            slack = 0.9
        assert large.seconds >= slack * small.seconds - 1e-12, way


def test_what_is_clear_is_chosen() -> None:
    """What no one would have otherwise, whatever the estimates are worth."""
    stem, block = shaped(256, 3, 224, 64, 7, stride=2, padding=3), shaped(256, 64, 56, 64, 3, padding=1)
    pointwise, deep = shaped(256, 64, 56, 256, 1), shaped(256, 256, 28, 256, 3, padding=1, groups=256)
    for dtype, precision in (("float32", "float32"), ("float64", None)):
        assert conv2d_choose("forward", stem, dtype, precision=precision) == "direct"
        assert conv2d_choose("forward", block, dtype, precision=precision) == "implicit_gemm"
        assert conv2d_choose("backward_data", block, dtype, precision=precision) == "phases"
        assert conv2d_choose("forward", pointwise, dtype, precision=precision) == "im2col"
        assert conv2d_choose("backward_data", pointwise, dtype, precision=precision) == "col2im"
        for direction in DIRECTIONS:
            assert conv2d_choose(direction, deep, dtype, precision=precision) == "depthwise"
        assert conv2d_choose("backward_filter", block, dtype, precision=precision) == "implicit_gemm"
    for dtype, precision in (("float32", "tf32"), ("float16", "float16"), ("bfloat16", "bfloat16")):
        for direction in DIRECTIONS:
            assert conv2d_choose(direction, block, dtype, precision=precision) == "tensor"
            assert conv2d_choose(direction, deep, dtype, precision=precision) == "depthwise"
    # Three input channels are three of 32 that a tile makes of an input gradient: their columns are far less work.
    assert conv2d_choose("backward_data", stem, "float32") == "col2im"
    # But cuBLAS has them for 16-bit arrays in any case, and their float32 sums, which columns are worth.
    assert conv2d_choose("forward", block, "bfloat16") == "im2col"


def test_float32_takes_three_products_where_they_are_faster_and_nobody_minds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block, tiny = shaped(256, 64, 56, 64, 3, padding=1), shaped(2, 12, 9, 8, 3)
    for direction, without in zip(DIRECTIONS, ("implicit_gemm", "phases", "implicit_gemm"), strict=True):
        for last in (False, True):
            assert conv2d_choose(direction, block, "float32", channels_last=last) == "tensor"
            assert conv2d_choose(direction, block, "float32", channels_last=last, gpu=A100) == "tensor"
        assert conv2d_choose(direction, block, "float32", precision="float32") == without
        assert conv2d_choose(direction, block, "float32", gpu=T4) == without
        # Where launches are what counts, two packs are not worth it.
        assert conv2d_choose(direction, tiny, "float32") == without
        monkeypatch.setenv("GPUCNN_KERNELS_THREE_PRODUCTS", "0")
        assert conv2d_choose(direction, block, "float32") == without
        assert conv2d_choose(direction, block, "float32", precision="tf32") == "tensor"
        monkeypatch.setenv("GPUCNN_KERNELS_THREE_PRODUCTS", "1")
        assert conv2d_choose(direction, block, "float32") == "tensor"
        monkeypatch.setenv("GPUCNN_KERNELS_THREE_PRODUCTS", "no")
        with pytest.raises(ArgumentError, match="GPUCNN_KERNELS_THREE_PRODUCTS must be 0 or 1, got 'no'"):
            conv2d_choose(direction, block, "float32")
        monkeypatch.delenv("GPUCNN_KERNELS_THREE_PRODUCTS")


def test_every_problem_of_the_tests_keeps_a_way_of_its_kind() -> None:
    """Small ones, too: where a launch is what counts, none is taken that needs three."""
    for name, problem in ALL.items():
        for direction in DIRECTIONS:
            way = conv2d_choose(direction, problem, "float32")
            made = conv2d_cost.estimate(way, direction, problem, "float32", H200)
            first = usual(direction, problem, "float32", None, H200)
            least = conv2d_cost.estimate(first, direction, problem, "float32", H200)
            assert made.seconds <= least.seconds, (name, direction, way)


def test_channels_that_are_filled_up_are_multiplied_like_others() -> None:
    """Of a filter's gradient, too: five input channels are eight of 16 bits, and three are four of float32."""
    for dtype, precision, some, filled in (("bfloat16", "bfloat16", 5, 8), ("float32", "tf32", 3, 4)):
        less, whole = (
            conv2d_cost.estimate(
                "tensor",
                "backward_filter",
                shaped(256, channels, 224, 64, 7, stride=2, padding=3),
                dtype,
                H200,
                precision=precision,
                channels_last=True,
            )
            for channels in (some, filled)
        )
        assert (less.tile, less.arithmetic, less.cache) == (whole.tile, whole.arithmetic, whole.cache)


def test_an_unknown_way() -> None:
    for direction in DIRECTIONS:
        with pytest.raises(ValueError, match="no estimate of a path 'magic'"):
            conv2d_cost.estimate("magic", direction, ALL["resnet-block"], "float32", H200)


def test_a_filters_gradient_by_hand() -> None:
    problem = shaped(256, 64, 56, 64, 3, padding=1)
    made = conv2d_cost.estimate("implicit_gemm", "backward_filter", problem, "float32", H200)
    assert made.tile == "filter_gradient_wide"
    # 64 x 576 sums are five tiles of 64 x 128. Five for each of 132 multiprocessors are 132 parts, 660 blocks.
    depth = 256 * 56 * 56 / 132
    beside = (2 * 900 + 5 * 64 * 6) / (0.9 * 1.98e9)
    assert made.arithmetic == pytest.approx(5 * 2 * 64 * 128 * depth / (0.63 * 256 * 1.98e9) + beside)
    assert made.passes == pytest.approx(4 * 132 * 64 * 576 / 4.32e12)
    assert made.launches == 2
    columns = conv2d_cost.estimate("im2col", "backward_filter", problem, "float32", H200)
    # An image at a time: nine tiles of 128 x 64, or five of 64 x 128, one on a multiprocessor, 256 times.
    beside = 8 * 32 * 4 / (0.9 * 4 * 1.98e9)
    assert columns.arithmetic == pytest.approx(256 * (2 * 64 * 128 * 3136 / (0.75 * 256 * 1.98e9) + beside))
    assert columns.launches > 256
