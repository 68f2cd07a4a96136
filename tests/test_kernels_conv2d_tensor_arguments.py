"""What convolutions on tensor cores refuse, when "auto" takes them, what they copy: by what would be started."""

from __future__ import annotations

import numpy
import pytest

from gpucnn_kernels import (
    catalog,
    conv2d_backward_data,
    conv2d_backward_filter,
    conv2d_choice,
    conv2d_forward,
    conv2d_pieces,
    conv_transpose2d_forward,
    runtime,
)
from gpucnn_kernels.errors import ArgumentError, DeviceError, DtypeError, LayoutError
from tests.kernel_arrays import LAYOUTS, cast
from tests.kernel_stand_ins import RecordedArray, RecordingRuntime, StandInCupy, recording, stand_in_cupy

__all__ = ["recording", "stand_in_cupy"]

OLD, NEW = 3, 4  # devices of compute capability 7.5 and 8.0


def image(n, c, h, w, dtype, layout="channels_last", **more):
    steps = (h * w * c, 1, w * c, c) if layout == "channels_last" else None
    return RecordedArray((n, c, h, w), dtype, steps=steps, **more)


def every_direction(dtype, device=NEW, channels=64, groups=1, **more):
    """Calls of the three functions, for 3x3 kernels from ``channels`` to 64 channels."""
    x, dy = (image(2, c, 9, 9, dtype, device=device) for c in (channels, 64))
    weight = image(64, channels // groups, 3, 3, dtype, device=device)
    more = {"padding": 1, "groups": groups, **more}
    return {
        "forward": lambda: conv2d_forward(x, weight, **more),
        "backward_data": lambda: conv2d_backward_data(dy, weight, input_size=9, **more),
        "backward_filter": lambda: conv2d_backward_filter(dy, x, kernel_size=3, **more),
    }


@pytest.fixture
def devices(recording: RecordingRuntime, monkeypatch: pytest.MonkeyPatch) -> RecordingRuntime:
    recording.capabilities |= {OLD: (7, 5), NEW: (8, 0)}

    def apart(shape, dtype, like):
        return RecordedArray(tuple(shape), dtype, like.device, address=1 << 44)

    monkeypatch.setattr(recording, "empty", apart)
    return recording


def started(devices):
    """The sources of what was started since the last time, in order."""
    names = [launch.source.title for launch in devices.launches]
    devices.launches.clear()
    return names


# ---------------------------------------------------------------- refusals


def test_older_gpus_are_refused_in_words(devices: RecordingRuntime) -> None:
    words = r"'tensor' needs a GPU of compute capability 8\.0 or newer, this one's is 7\.5; choose auto"
    for dtype in conv2d_pieces.DTYPES:
        for run in every_direction(dtype, OLD, algorithm="tensor").values():
            with pytest.raises(DeviceError, match=words):
                run()
    assert devices.launches == []


def test_what_is_refused(devices: RecordingRuntime) -> None:
    for run in every_direction("float64", algorithm="tensor").values():
        with pytest.raises(DtypeError, match="arrays of float32, float16, bfloat16, got float64; choose auto"):
            run()
    for run in every_direction("float32", precision="int8").values():
        with pytest.raises(ArgumentError, match="one of float32, tf32, bfloat16, float16 or None, got 'int8'"):
            run()
    for dtype, precision, words in (
        ("float32", "bfloat16", "not for arrays of float32; theirs is float32 or tf32"),
        ("float16", "bfloat16", "not for arrays of float16; theirs is float16"),
        ("bfloat16", "tf32", "not for arrays of bfloat16; theirs is bfloat16"),
        ("float64", "tf32", "not for arrays of float64; they have no other"),
    ):
        for algorithm in ("auto", "tensor", "depthwise"):
            for run in every_direction(dtype, precision=precision, algorithm=algorithm).values():
                with pytest.raises(ArgumentError, match=words):
                    run()
    x, weight = (image(2, 8, 9, 9, "float16"), image(8, 8, 3, 3, "float16"))
    strided = RecordedArray((2, 8, 9, 9), "float16", steps=(2000, 200, 20, 2))
    with pytest.raises(LayoutError, match=r"x of shape .* neither contiguous nor channels-last"):
        conv2d_forward(strided, weight, algorithm="tensor")
    with pytest.raises(ArgumentError, match="unknown algorithm 'tensors'"):
        conv2d_forward(x, weight, algorithm="tensors")
    assert devices.launches == []


# ---------------------------------------------------------------- the choice


def test_auto_takes_tensor_cores_where_a_precision_asks_for_them(
    devices: RecordingRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What so small a problem is reckoned to take is of no concern here.
    monkeypatch.setattr(conv2d_choice, "_chosen", lambda *given: conv2d_choice.usual(*given[:4], given[5]))
    for dtype, precision, expected in (
        ("float32", None, False),
        ("float32", "float32", False),
        ("float32", "tf32", True),
        ("float16", None, False),
        ("float16", "float16", True),
        ("bfloat16", "bfloat16", True),
    ):
        for device in (OLD, NEW):
            for direction, run in every_direction(dtype, device, precision=precision).items():
                run()
                taken = any("conv2d_tensor" in name for name in started(devices))
                assert taken == (expected and device == NEW), f"{dtype}, {precision}, {direction}"


def test_auto_stays_with_what_few_channels_and_depthwise_have(devices: RecordingRuntime) -> None:
    every_direction("float32", channels=3, precision="tf32")["forward"]()
    assert started(devices) == ["conv2d_direct (SCALAR float32)"]
    for run in every_direction("float32", channels=64, groups=64, precision="tf32").values():
        run()
    assert not any("tensor" in name for name in started(devices))


def test_a_precision_leaves_other_algorithms_as_they_are(devices: RecordingRuntime) -> None:
    every_direction("float32", precision="tf32", algorithm="implicit_gemm")["forward"]()
    assert started(devices) == ["conv2d_implicit_gemm (SCALAR float32)"]


@pytest.mark.parametrize(
    ("dtype", "precision", "products"),
    [("float32", None, 3), ("float32", "float32", 3), ("float32", "tf32", 1), ("float16", "float16", 1)],
)
def test_how_many_products(devices: RecordingRuntime, dtype: str, precision: str | None, products: int) -> None:
    every_direction(dtype, algorithm="tensor", precision=precision)["forward"]()
    assert started(devices) == [f"conv2d_tensor (SCALAR {dtype}) (PRODUCTS {products})"]


# ---------------------------------------------------------------- what is copied


def test_arrays_that_lie_in_pieces_of_16_bytes_are_read_where_they_lie(devices: RecordingRuntime) -> None:
    runs = every_direction("float16", algorithm="tensor")
    for direction, copies in (("forward", 0), ("backward_data", 1), ("backward_filter", 0)):  # the turned weight
        runs[direction]()
        names = started(devices)
        assert sum("pack" in name for name in names) == copies, direction
        assert sum("pack" not in name for name in names) == (2 if direction == "backward_filter" else 1)


def test_others_are_copied_once_each(devices: RecordingRuntime) -> None:
    for x, weight, copies in (
        (image(2, 64, 9, 9, "float16", "contiguous"), image(64, 64, 3, 3, "float16"), 1),
        (image(2, 64, 9, 9, "float16", address=(1 << 40) + 8), image(64, 64, 3, 3, "float16"), 1),
        (image(2, 64, 9, 9, "float16"), image(64, 64, 3, 3, "float16", "contiguous"), 1),
        (image(2, 60, 9, 9, "float16"), image(64, 60, 3, 3, "float16"), 2),
        (image(2, 60, 9, 9, "float32"), image(64, 60, 3, 3, "float32"), 0),
    ):
        conv2d_forward(x, weight, algorithm="tensor")
        assert sum("pack" in name for name in started(devices)) == copies


def test_results_are_written_in_pieces_only_where_they_lie_so(devices: RecordingRuntime) -> None:
    x = image(2, 64, 9, 9, "float16")
    for outputs, out, vectors in (
        (64, None, 1),
        (60, None, 0),
        (64, image(2, 64, 7, 7, "float16", "contiguous", address=1 << 41), 0),
        (64, image(2, 64, 7, 7, "float16", address=(1 << 41) + 8), 0),
    ):
        conv2d_forward(x, image(outputs, 64, 3, 3, "float16"), algorithm="tensor", out=out)
        assert devices.launches.pop().arguments["vectors"].value == vectors


def test_large_layers_take_large_tiles_and_their_shared_memory(devices: RecordingRuntime) -> None:
    x, weight = image(64, 128, 28, 28, "bfloat16"), image(128, 128, 3, 3, "bfloat16")
    conv2d_forward(x, weight, padding=1, algorithm="tensor")
    launch = devices.launches.pop()
    assert (launch.kernel, launch.grid, launch.block) == ("conv2d_tensor_wide", (196, 1, 1), (256, 1, 1))
    assert launch.shared_bytes == 4 * (256 + 128) * 64
    conv2d_backward_filter(image(64, 128, 28, 28, "bfloat16"), x, kernel_size=3, padding=1, algorithm="tensor")
    launch = devices.launches[-2]
    assert launch.kernel == "filter_gradient_tensor_large"
    assert launch.shared_bytes == 4 * 64 * (256 + 16)


# ---------------------------------------------------------------- catalog and runtimes


def test_the_catalog_knows_what_they_need(devices: RecordingRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = catalog.capabilities(["float16"])
    by_name = {source.name: capability for source, capability in needed.items()}
    for name in ("conv2d_tensor", "conv2d_tensor_filter", "conv2d_first_layer", "conv2d_first_layer_filter"):
        assert by_name[name] == (8, 0)
    assert by_name["conv2d_tensor_pack"] == by_name["layout"] == (0, 0)
    assert {dict(source.definitions)["SCALAR"] for source in needed if source.name == "conv2d_tensor"} == {
        "float16"
    }
    assert not any(source.name == "conv2d_tensor" for source in catalog.variants(["float64"]))
    monkeypatch.setattr(catalog, "current", lambda: devices)
    assert catalog.warm_up("float16") == len(needed)
    devices.capabilities[0] = (7, 5)
    assert catalog.warm_up("float16") == len(needed) - 5  # these four and the one for sm_90


def test_cupy_is_asked_for_the_compute_capability(stand_in_cupy: StandInCupy) -> None:
    with runtime.using("cuda") as cuda:
        assert cuda.capability(1) == (9, 0)
    with runtime.using("host") as host:
        assert host.capability(0) == (9, 0)


# ---------------------------------------------------------------- through the functions above


def test_transposed_convolutions_take_a_precision() -> None:
    generator = numpy.random.default_rng(3)
    x, weight = (cast(generator.standard_normal(shape), "float32") for shape in ((1, 8, 5, 5), (8, 8, 3, 3)))
    with runtime.using("host"):
        for arrange in LAYOUTS.values():
            exact = conv_transpose2d_forward(arrange(x), weight, algorithm="tensor")
            rounded = conv_transpose2d_forward(arrange(x), weight, precision="tf32")
            error = float(numpy.abs(rounded - exact).max())
            assert 0 < error <= 2.0**-10 * float(numpy.abs(exact).max()) * 4
