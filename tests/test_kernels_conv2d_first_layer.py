"""First layers on tensor cores, on the host runtime, against float64: kernels, epilogues, what is planned."""

from __future__ import annotations

import numpy
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpucnn_kernels import (
    Conv2dProblem,
    conv2d_backward_filter,
    conv2d_cost,
    conv2d_first_layer,
    conv2d_first_layer_filter,
    conv2d_forward,
    launch,
)
from gpucnn_kernels.gpu import H200, Gpu
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import max_error
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import LAYOUTS, cast, error_bound, wide
from tests.oracles import activations, convolution, tf32
from tests.problems import ALL, arrays, geometry, options
from tests.test_kernels_conv2d_tensor import ties_to_even

__all__ = ["on_the_host"]

FORMS = {"tf32": ("float32", "tf32"), "float16": ("float16", None), "bfloat16": ("bfloat16", "bfloat16")}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
KERNELS = {kernel.name: kernel for kernel in conv2d_first_layer.KERNELS}
ADA = Gpu("4090", 128, (8, 9), 2.52e9, 1008e9)


def shaped(input_shape, weight_shape, **parameters):
    return Conv2dProblem.from_shapes(input_shape, weight_shape, **parameters)


# Several tiles of channels and of positions, whole and not; rows written in pieces of 16 bytes and not.
WIDE = {
    "stem": shaped((1, 3, 38, 70), (70, 3, 7, 7), stride=2, padding=3),
    "alexnet": shaped((1, 3, 41, 95), (33, 3, 11, 11), stride=4, padding=2),
    "four-channels": shaped((3, 4, 17, 16), (24, 4, 3, 3), padding=1),
    "two-channels": shaped((2, 2, 20, 33), (65, 2, 2, 4), stride=(3, 1), dilation=(2, 1), padding=(0, 3, 1, 2)),
    "k1": shaped((2, 3, 9, 40), (20, 3, 1, 1), dilation=3),
}


def sums(problem, form, kind):
    dtype, precision = FORMS[form]
    x, weight, bias, _ = (wide(cast(array, dtype)) for array in arrays(problem))
    if precision == "tf32":
        x, weight = (tf32.rounded(array, ties_to_even()) for array in (x, weight))
    return convolution.plain_forward(x, weight, geometry(problem), bias, kind)


def run(problem, form, arrange=numpy.ascontiguousarray, **more):
    dtype, precision = FORMS[form]
    x, weight, bias, _ = (cast(array, dtype) for array in arrays(problem))
    more = {"algorithm": "tensor", "precision": precision, **options(problem), **more}
    return conv2d_forward(arrange(x), arrange(weight), bias, **more)


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels that are started."""
    names, plain = [], launch.Call.launch

    def noted(self, source, kernel, *others, **given):
        names.append(kernel)
        plain(self, source, kernel, *others, **given)

    monkeypatch.setattr(launch.Call, "launch", noted)
    return names


@pytest.mark.parametrize("kernel", KERNELS)
@EVERY_FORM
def test_every_kernel(form, kernel, started, monkeypatch):
    """Also where a block goes through several tiles, which only large problems have enough of."""
    dtype, precision = FORMS[form]
    forced, plan = (KERNELS[kernel],), conv2d_first_layer.plan
    monkeypatch.setattr(conv2d_first_layer, "plan", lambda *given: plan(*given, forced))
    for name, problem in WIDE.items():
        if (name, form) == ("alexnet", "tf32"):
            continue  # its filter is too large for float32's wide blocks
        assert conv2d_first_layer.takes(problem, dtype, precision)
        truth, plain = (sums(problem, form, kind) for kind in ("float64", "float32"))
        for layout, arrange in LAYOUTS.items():
            for blocks in (10**6, 2):
                monkeypatch.setattr(
                    conv2d_first_layer.Plan, "blocks", lambda self, gpu, most=blocks: min(most, self.tiles)
                )
                error = max_error(wide(run(problem, form, arrange)), truth)
                assert error <= error_bound(plain, truth, dtype), f"{name}, {layout}, {blocks}"
    assert set(started) == {kernel}


@EVERY_FORM
def test_what_a_sum_ends_with(form):
    problem, dtype = WIDE["four-channels"], FORMS[form][0]
    generator = numpy.random.default_rng(5)
    scale, residual = generator.standard_normal(problem.K), generator.standard_normal(problem.output_shape)
    scale, residual = cast(scale, dtype), cast(residual, dtype)
    bias = wide(cast(arrays(problem)[2], dtype))[:, None, None]
    for function, oracle in {
        "identity": lambda x: x,
        "relu": activations.relu,
        "leaky_relu": lambda x: activations.leaky_relu(x, 0.2),
        "gelu": activations.gelu,
    }.items():
        truth, plain = (
            activations.elementwise(
                oracle, (sums(problem, form, kind) - bias) * wide(scale)[:, None, None] + bias + wide(residual)
            )
            for kind in ("float64", "float32")
        )
        for arrange in LAYOUTS.values():
            more = {"scale": scale, "residual": arrange(residual), "activation": function, "negative_slope": 0.2}
            error = max_error(wide(run(problem, form, arrange, **more)), truth)
            assert error <= 2 * error_bound(plain, truth, dtype), function


@pytest.mark.parametrize("value", [numpy.inf, numpy.nan])
@EVERY_FORM
def test_pixels_beside_a_window_are_not_met(form, value):
    """A step of the sum reaches beyond a row of the window, where zeros of the filter would make NaN of them."""
    dtype, precision = FORMS[form]
    problem = shaped((1, 3, 9, 24), (5, 3, 3, 3), padding=1)
    x, weight = (cast(array, dtype) for array in arrays(problem)[:2])
    x = x.copy()
    x[0, 2, 4, 11] = value
    for arrange in LAYOUTS.values():
        y = wide(conv2d_forward(arrange(x), weight, padding=1, algorithm="tensor", precision=precision))
        met = numpy.zeros(y.shape, bool)
        met[:, :, 3:6, 10:13] = True
        assert not numpy.isfinite(y[met]).any()
        assert numpy.isfinite(y[~met]).all()


# ---------------------------------------------------------------- the filter's gradient

FILTER_KERNELS = {kernel.name: kernel for kernel in conv2d_first_layer_filter.KERNELS}
SIXTEEN_BITS = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def run_filter(problem, dtype, arrange=numpy.ascontiguousarray, **more):
    x, _, _, dy = (cast(array, dtype) for array in arrays(problem))
    more = {"kernel_size": (problem.R, problem.S), "algorithm": "tensor", **options(problem), **more}
    return conv2d_backward_filter(arrange(dy), arrange(x), **more)


@pytest.mark.parametrize("kernel", FILTER_KERNELS)
@SIXTEEN_BITS
def test_every_kernel_of_the_filters_gradient(dtype, kernel, started, monkeypatch):
    forced, plan = (FILTER_KERNELS[kernel],), conv2d_first_layer_filter.plan
    monkeypatch.setattr(conv2d_first_layer_filter, "plan", lambda *given: plan(*given, forced))
    for name, problem in WIDE.items():
        assert conv2d_first_layer_filter.takes(problem, dtype)
        x, _, _, dy = (wide(cast(array, dtype)) for array in arrays(problem))
        truth, plain = (
            convolution.plain_backward_filter(dy, x, problem.weight_shape, geometry(problem), kind)
            for kind in ("float64", "float32")
        )
        for layout, arrange in LAYOUTS.items():
            for blocks in (10**6, 2):
                monkeypatch.setattr(
                    conv2d_first_layer_filter.Plan, "blocks", lambda self, gpu, most=blocks: min(most, self.tiles)
                )
                error = max_error(wide(run_filter(problem, dtype, arrange)), truth)
                assert error <= error_bound(plain, truth, dtype), f"{name}, {layout}, {blocks}"
    assert {name for name in started if name.startswith("first")} == {kernel}


@pytest.mark.parametrize("value", [numpy.inf, numpy.nan])
@SIXTEEN_BITS
def test_positions_that_there_are_not_meet_nothing(dtype, value):
    """A run reaches beyond a row's end, to windows whose pixels other taps of the last position meet."""
    problem = shaped((1, 3, 5, 20), (5, 3, 3, 3), stride=(1, 2))  # nine positions a row
    x, _, _, dy = (cast(array, dtype) for array in arrays(problem))
    x = x.copy()
    x[0, 1, 2, 18] = value  # met by the last position's last tap alone; a tenth would meet it by its first
    for arrange in LAYOUTS.values():
        dw = conv2d_backward_filter(arrange(dy), arrange(x), kernel_size=3, stride=(1, 2), algorithm="tensor")
        dw = wide(dw)
        met = numpy.zeros(dw.shape, bool)
        met[:, 1, :, 2] = True
        assert not numpy.isfinite(dw[met]).any()
        assert numpy.isfinite(dw[~met]).all()


def test_the_filters_gradient_of_no_images_and_of_views_at_odd_places():
    problem, dtype = WIDE["four-channels"], "float16"
    x, _, _, dy = (cast(array, dtype) for array in arrays(problem))
    expected = run_filter(problem, dtype)
    shifted = numpy.empty(dy.size + 1, dy.dtype)[1:].reshape(dy.shape)
    shifted[...] = dy
    more = {"kernel_size": (3, 3), "algorithm": "tensor", **options(problem)}
    numpy.testing.assert_array_equal(conv2d_backward_filter(shifted, x, **more), expected)
    assert not conv2d_backward_filter(dy[:0], x[:0], **more).any()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 300), st.integers(1, 300), st.integers(1, 200), st.integers(1, 12),
    st.integers(1, 12), st.integers(1, 5), st.sampled_from([H200, ADA]),
)  # fmt: skip
def test_a_plan_of_the_filters_gradient_covers_everything_and_fits(
    channels, height, width, outputs, down, across, stride, gpu
):
    assume(down <= height)
    assume(across <= width)
    problem = shaped((3, channels, height, width), (outputs, channels, down, across), stride=stride)
    assume(conv2d_first_layer_filter.takes(problem, "float16"))
    made = conv2d_first_layer_filter.plan(problem, "float16", gpu)
    patch = made.patch
    assert patch["rows"] * patch["runs"] <= 16
    assert patch["rows"] * patch["down"] >= problem.P
    assert patch["runs"] * 16 * patch["across"] >= problem.Q
    assert patch["width"] % 2 == 0
    assert patch["width"] >= (patch["runs"] * 16 - 1) * stride + patch["steps"] * 4
    assert patch["steps"] * 4 >= across
    assert made.here in (1, 2, 4)
    assert made.here * made.groups * 4 >= down * patch["steps"]  # four columns a warp
    assert made.channel_tiles * made.kernel.outputs >= outputs
    assert made.shared_bytes <= conv2d_first_layer.MOST_BYTES
    assert made.parts(gpu) * made.here == 4 * made.blocks(gpu)
    assert 4 * made.parts(gpu) * outputs * channels * down * across <= max(64 << 20, 16 * made.most_parts)
    assert 0 < made.seconds(gpu, "float16") < 1


# ---------------------------------------------------------------- both


def test_the_order_of_threads_changes_nothing():
    for form in FORMS:
        for name in ("stem", "two-channels"):
            assert order_independent(lambda form=form, name=name: run(WIDE[name], form))
            if form != "tf32":
                assert order_independent(lambda form=form, name=name: run_filter(WIDE[name], form))


def test_views_at_odd_places_and_empty_batches():
    """Neither input nor output needs to begin at a multiple of 16 bytes."""
    problem = WIDE["four-channels"]
    dtype = FORMS["float16"][0]
    x = cast(arrays(problem)[0], dtype)
    expected = run(problem, "float16")
    shifted = numpy.empty(x.size + 1, dtype)[1:].reshape(x.shape)
    shifted[...] = x
    out = numpy.empty(expected.size + 1, dtype)[1:].reshape(expected.shape)
    weight, bias = (cast(array, dtype) for array in arrays(problem)[1:3])
    given = conv2d_forward(shifted, weight, bias, algorithm="tensor", out=out, **options(problem))
    assert given is out
    numpy.testing.assert_array_equal(out, expected)
    assert conv2d_forward(x[:0], weight, bias, algorithm="tensor", **options(problem)).shape[0] == 0


def test_what_it_takes(started):
    stem = ALL["resnet-stem"]
    assert conv2d_first_layer.takes(stem, "bfloat16", None)
    assert conv2d_first_layer.takes(stem, "float32", "tf32")
    assert not conv2d_first_layer.takes(stem, "float32", None)  # three products are conv2d_tensor's
    assert not conv2d_first_layer.takes(ALL["resnet-block"], "float16", None)
    assert not conv2d_first_layer.takes(ALL["groups-2"], "float16", None)
    assert not conv2d_first_layer.takes(ALL["k3-d2"], "float16", None)
    assert not conv2d_first_layer.takes(shaped((1, 4, 90, 90), (9, 4, 40, 40)), "float32", "tf32")  # too large
    run(ALL["k3-d2"], "float16")
    assert "conv2d_first_layer_narrow" not in started
    run(stem, "float16")
    assert started[-1] == "conv2d_first_layer_narrow"


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 300), st.integers(1, 300), st.integers(1, 200), st.integers(1, 12),
    st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.sampled_from(["float32", "float16"]),
    st.sampled_from([H200, ADA]),
)  # fmt: skip
def test_a_plan_covers_everything_and_fits(
    channels, height, width, outputs, down, across, stride, dilation, dtype, gpu
):
    assume((down - 1) * dilation < height)
    assume(across <= width)
    problem = shaped(
        (3, channels, height, width), (outputs, channels, down, across), stride=stride, dilation=(dilation, 1)
    )
    assume(conv2d_first_layer.takes(problem, dtype, "tf32" if dtype == "float32" else None))
    made = conv2d_first_layer.plan(problem, dtype, gpu)
    patch, item = made.patch, 4 if dtype == "float32" else 2
    assert patch["rows"] * patch["runs"] <= 16
    assert patch["rows"] * patch["down"] >= problem.P
    assert patch["runs"] * 16 * patch["across"] >= problem.Q
    assert made.tiles == 3 * patch["down"] * patch["across"]
    assert made.channel_tiles * made.kernel.outputs >= problem.K
    # The last window of the last position and the step that reaches beyond it.
    assert patch["height"] >= (patch["rows"] - 1) * stride + (down - 1) * dilation + 1
    assert patch["steps"] * 32 >= across * 4 * item
    assert patch["width"] >= (patch["runs"] * 16 - 1) * stride + patch["steps"] * 32 // (4 * item)
    weights = down * patch["steps"] * made.kernel.outputs * 32
    assert weights + patch["height"] * patch["width"] * 4 * item <= made.shared_bytes
    assert made.shared_bytes <= conv2d_first_layer.MOST_BYTES
    assert 1 <= made.blocks(gpu) <= made.tiles
    assert 0 < made.seconds(gpu, dtype) < 1


def test_it_is_what_tensor_cores_are_reckoned_by():
    """Of a ResNet's stem: a third of what the copy of the image and the fetching of every tap would take."""
    stem = shaped((256, 3, 224, 224), (64, 3, 7, 7), stride=2, padding=3)
    made = conv2d_cost.estimate("tensor", "forward", stem, "bfloat16", H200)
    assert made.tile == "conv2d_first_layer_wide"
    assert made.launches == 1
    assert 113e-6 < made.seconds < 250e-6
    made = conv2d_cost.estimate("tensor", "backward_filter", stem, "bfloat16", H200)
    assert made.tile == "first_layer_filter_wide"
    assert 113e-6 < made.seconds < 300e-6
