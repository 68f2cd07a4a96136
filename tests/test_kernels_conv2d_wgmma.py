"""Convolutions by products of warpgroups, on the host runtime, against float64: values, tiles, refusals."""

from __future__ import annotations

import numpy
import pytest

from gpucnn_kernels import (
    DeviceError,
    DtypeError,
    conv2d_algorithms,
    conv2d_backward_data,
    conv2d_backward_filter,
    conv2d_choose,
    conv2d_forward,
    conv2d_tiles,
    runtime,
)
from gpucnn_kernels.catalog import capabilities
from gpucnn_kernels.conv2d_cost import estimate
from gpucnn_kernels.conv2d_tiles import WGMMA_TILES, wgmma_tile
from gpucnn_kernels.errors import ArgumentError
from gpucnn_kernels.gpu import H200
from gpucnn_kernels.launch import Call
from gpucnn_kernels.runtime import nvrtc
from gpucnn_kernels.runtime.host import order_independent
from gpucnn_kernels.source import variant
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import LAYOUTS, cast, error_bound, wide
from tests.problems import ALL, LARGE
from tests.test_kernels_conv2d_tensor import WIDE, assert_right, inputs, run, shaped, truth_and_plain

__all__ = ["on_the_host"]

DTYPES = ("float16", "bfloat16")
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
EVERY_TILE = pytest.mark.parametrize("tile", [tile.name for tile in WGMMA_TILES])
DIRECTIONS = ("forward", "backward_data")


def by_warpgroups(problem, dtype, direction, arrange=LAYOUTS["channels_last"], **more):
    return run(problem, dtype, direction, arrange, algorithm="wgmma", **more)


@pytest.mark.parametrize("direction", DIRECTIONS)
@EVERY_DTYPE
def test_every_problem(dtype, direction):
    for name, problem in ALL.items():
        if name in LARGE and name not in ("resnet-block", "bottleneck", "resnext-block"):
            continue
        layouts = ["channels_last"] if name in LARGE or dtype == "float16" else list(LAYOUTS)
        for layout in layouts:
            result = by_warpgroups(problem, dtype, direction, LAYOUTS[layout])
            assert_right(result, problem, dtype, direction, f"{name}, {layout}")


@EVERY_TILE
@EVERY_DTYPE
def test_every_tile(dtype, tile):
    """Full tiles and others, sums over several taps of 34 to 500 channels, groups, stride phases."""
    with conv2d_tiles.forced(tile):
        for name, problem in WIDE.items():
            for layout, arrange in LAYOUTS.items():
                for direction in DIRECTIONS:
                    result = by_warpgroups(problem, dtype, direction, arrange)
                    assert_right(result, problem, dtype, direction, f"{name}, {layout}, {tile}")


@EVERY_TILE
def test_many_channels_and_positions_and_hardly_any(tile):
    """More channels than the widest tile has, a sum that is one chunk, and a batch of no images."""
    many = shaped((3, 16, 9, 8), (520, 16, 1, 1))
    few = shaped((1, 1, 3, 3), (1, 1, 1, 1))
    with conv2d_tiles.forced(tile):
        for problem in (many, few):
            for direction in DIRECTIONS:
                assert_right(by_warpgroups(problem, "bfloat16", direction), problem, "bfloat16", direction, tile)
    x, weight = cast(numpy.zeros((0, 8, 5, 5)), "float16"), cast(numpy.zeros((4, 8, 3, 3)), "float16")
    assert conv2d_forward(x, weight, algorithm="wgmma").shape == (0, 4, 3, 3)


ENDS = {"identity": lambda x: x, "relu": lambda x: numpy.maximum(x, 0), "silu": lambda x: x / (1 + numpy.exp(-x))}


@pytest.mark.parametrize("function", ENDS)
@EVERY_TILE
def test_the_end_of_a_sum(tile, function):
    """Scale, bias, residual and activation in pieces of 16 bytes and one by one, with one rounding."""
    for name in ("outputs-70", "outputs-136-k1"):
        problem = WIDE[name]
        bias, dy = inputs(problem, "float16")[2:]
        scale = cast(numpy.linspace(0.5, 2, problem.K), "float16")
        ends = {"scale": scale, "residual": LAYOUTS["channels_last"](dy), "activation": function}
        with conv2d_tiles.forced(tile):
            y = by_warpgroups(problem, "float16", "forward", **ends)
        offset, factor, other = wide(bias)[:, None, None], wide(scale)[:, None, None], wide(dy)
        truth, plain = (
            ENDS[function]((sums - offset) * factor + offset + other)
            for sums in truth_and_plain(problem, "float16", "forward")
        )
        assert numpy.abs(wide(y) - truth).max() <= 2 * error_bound(plain, truth, "float16"), name


@EVERY_TILE
def test_any_order_of_threads_gives_the_same_bits(tile):
    problem = WIDE["groups-2-of-24"]
    with conv2d_tiles.forced(tile):
        for direction in DIRECTIONS:
            assert order_independent(lambda direction=direction: by_warpgroups(problem, "bfloat16", direction))


def test_bits_are_those_of_mma_where_sums_are_exact():
    """Small whole numbers: any order of adding gives the same sums."""
    generator = numpy.random.default_rng(4)
    x, weight = (cast(generator.integers(-4, 5, shape), "float16") for shape in ((2, 24, 9, 9), (72, 24, 3, 3)))
    results = [conv2d_forward(x, weight, padding=1, algorithm=name) for name in ("wgmma", "tensor")]
    assert numpy.array_equal(*results)


@pytest.mark.nvrtc
@EVERY_DTYPE
def test_products_are_at_work_while_the_next_are_begun(dtype):
    """The compiler says so where it has to put a wait behind each."""
    _, log = nvrtc.compile_source(variant("conv2d_wgmma", dtype, {"ARCHITECTURE": "sm_90a"}), "sm_90")
    assert "conv2d_wgmma_wide" in log
    assert "serialized" not in log


# ---------------------------------------------------------------- who takes it


def test_it_is_for_one_compute_capability_and_two_dtypes(monkeypatch):
    x, weight = numpy.zeros((1, 4, 5, 5), numpy.float32), numpy.zeros((2, 4, 3, 3), numpy.float32)
    with pytest.raises(DtypeError, match="algorithm 'wgmma' takes arrays of float16, bfloat16, got float32"):
        conv2d_forward(x, weight, algorithm="wgmma")
    narrow = x.astype("float16"), weight.astype("float16")
    with pytest.raises(ArgumentError, match=r"filter gradient must be auto, .*, got 'wgmma'"):
        conv2d_backward_filter(numpy.zeros((1, 2, 3, 3), "float16"), narrow[0], kernel_size=3, algorithm="wgmma")
    for capability in ((8, 9), (10, 0)):
        monkeypatch.setattr(Call, "capability", capability)
        with pytest.raises(DeviceError, match=r"needs a GPU of compute capability 9\.0.*choose auto or tensor"):
            conv2d_forward(*narrow, algorithm="wgmma")
        with pytest.raises(DeviceError, match=r"this one's is (8\.9|10\.0)"):
            conv2d_backward_data(
                numpy.zeros((1, 2, 3, 3), "float16"), narrow[1], input_size=(5, 5), algorithm="wgmma"
            )


def test_it_is_not_chosen_by_itself():
    problem = shaped((256, 256, 14, 14), (256, 256, 3, 3), padding=1)
    for direction in DIRECTIONS:
        assert "wgmma" not in conv2d_algorithms(direction)
        options = {"precision": "bfloat16", "channels_last": True}
        assert conv2d_choose(direction, problem, "bfloat16", **options) == "tensor"
        assert estimate("wgmma", direction, problem, "bfloat16", H200, **options).tile == "conv2d_wgmma_wide"
    assert wgmma_tile(H200, "bfloat16", 64, 256 * 56 * 56, 1, 576.0).name == "conv2d_wgmma_narrow"


def test_its_sources_are_compiled_for_their_gpus_alone(monkeypatch):
    forms = [source for source in capabilities(DTYPES) if source.name == "conv2d_wgmma"]
    assert [source.architecture for source in forms] == ["sm_90a", "sm_90a"]
    from gpucnn_kernels import catalog

    for has, expected in (((8, 9), set()), ((9, 0), {"conv2d_wgmma"}), ((10, 0), set())):
        loaded = []

        class Runtime:
            name = "host"

            def current_device(self):
                return 0

            def capability(self, device, has=has):
                return has

            def module(self, source, device, loaded=loaded):
                loaded.append(source.name)

        monkeypatch.setattr(catalog, "current", Runtime)
        catalog.warm_up("bfloat16")
        assert {name for name in loaded if "wgmma" in name} == expected
        assert "conv2d_tensor" in loaded


def test_the_host_stands_for_a_gpu_that_has_it():
    assert runtime.current().capability(0) == (9, 0)
