"""What every forward convolution ends with, scale, bias, residual and activation, against float64."""

from __future__ import annotations

from functools import cache

import numpy
import pytest

from gpucnn_kernels import ArgumentError, Conv2dProblem, DtypeError, LayoutError, conv2d_forward
from gpucnn_kernels import conv2d_forward_paths as forward_paths
from gpucnn_kernels.conv2d_tiles import forced
from gpucnn_kernels.runtime.host import order_independent
from tests.accuracy import channels_last, max_error
from tests.kernel_accuracy import on_the_host
from tests.kernel_arrays import DTYPES, LAYOUTS, accumulated, cast, error_bound, wide
from tests.oracles import activations, convolution
from tests.problems import ALL, LARGE, SMALL, arrays, geometry, options

__all__ = ["on_the_host"]

ALGORITHMS = ("implicit_gemm", "direct", "depthwise", "im2col", "tensor")
WAYS = [
    (dtype, algorithm)
    for dtype in DTYPES
    for algorithm in ALGORITHMS
    if (dtype, algorithm) != ("float64", "tensor")  # which there are no tensor cores for
]
EVERY_WAY = pytest.mark.parametrize(("dtype", "algorithm"), WAYS)
FUNCTIONS = {
    "identity": lambda x: x,
    "relu": activations.relu,
    "relu6": activations.relu6,
    "silu": activations.silu,
}
TERMS = ("bias", "scale", "residual")


def runs(algorithm, problem):
    depth = problem.C // problem.groups
    return depth <= {"direct": 8, "depthwise": 1}.get(algorithm, depth)


@cache
def inputs(problem, dtype):
    """(x, weight, the terms by name), of this dtype."""
    x, weight, bias, dy = arrays(problem)
    scale = numpy.random.default_rng(7).uniform(-1.5, 1.5, problem.K)
    terms = {"bias": bias, "scale": scale, "residual": dy}  # any numbers of the result's shape
    return cast(x, dtype), cast(weight, dtype), {name: cast(array, dtype) for name, array in terms.items()}


@cache
def sums(problem, dtype):
    """Of the given (rounded) numbers: in a longer type, and plainly in the accumulating one."""
    x, weight, _ = inputs(problem, dtype)
    longer = numpy.longdouble if dtype == "float64" else numpy.float64
    return tuple(
        convolution.plain_forward(wide(x), wide(weight), geometry(problem), None, kind)
        for kind in (longer, accumulated(dtype))
    )


def ended(total, terms, function, kind):
    """The definition, each step rounded to ``kind``."""
    total = total.astype(kind)
    if "scale" in terms:
        total = total * wide(terms["scale"]).astype(kind)[:, None, None]
    if "bias" in terms:
        total = total + wide(terms["bias"]).astype(kind)[:, None, None]
    if "residual" in terms:
        total = total + wide(terms["residual"]).astype(kind)
    return activations.elementwise(FUNCTIONS[function], total)


def run(problem, dtype, algorithm, terms, function="identity", arrange=numpy.ascontiguousarray, **more):
    x, weight, _ = inputs(problem, dtype)
    more = {**terms, "algorithm": algorithm, "activation": function, **options(problem), **more}
    if "residual" in more:
        more["residual"] = arrange(more["residual"])
    return conv2d_forward(arrange(x), arrange(weight), **more)


def assert_right(y, problem, dtype, terms, function, label):
    longer, plain = sums(problem, dtype)
    truth = ended(longer, terms, function, longer.dtype)
    assert y.shape == truth.shape, label
    bound = error_bound(ended(plain, terms, function, accumulated(dtype)), truth, dtype)
    error = max_error(wide(y), truth)
    assert error <= bound, f"{label}: {error:.3g} > {bound:.3g}"


@EVERY_WAY
def test_every_problem(dtype, algorithm):
    problems = ALL if dtype == "float32" else {**SMALL, "resnet-down": LARGE["resnet-down"]}
    for name, problem in problems.items():
        if not runs(algorithm, problem):
            continue
        terms = inputs(problem, dtype)[2]
        for layout, arrange in LAYOUTS.items():
            if problem.C == 1 or problem.H * problem.W == 1:
                arrange = numpy.ascontiguousarray  # as the result then is
            y = run(problem, dtype, algorithm, terms, "relu", arrange)
            assert_right(y, problem, dtype, terms, "relu", f"{name}, {layout}")


@EVERY_WAY
def test_every_combination_of_terms(dtype, algorithm):
    for name in ("resnet-down", "depthwise-s2", "k1"):  # 24 channels: written in pieces of 16 bytes
        problem = ALL[name]
        if not runs(algorithm, problem):
            continue
        everything = inputs(problem, dtype)[2]
        for chosen in range(8):
            terms = {term: everything[term] for bit, term in enumerate(TERMS) if chosen >> bit & 1}
            for function in FUNCTIONS:
                for layout, arrange in LAYOUTS.items():
                    y = run(problem, dtype, algorithm, terms, function, arrange)
                    assert_right(
                        y, problem, dtype, terms, function, f"{name}, {sorted(terms)}, {function}, {layout}"
                    )


def test_one_product_of_tf32_ends_alike():
    """Against the same sums without an end: it begins where they are stored, in float32."""
    problem = ALL["resnet-down"]
    terms = inputs(problem, "float32")[2]
    for arrange in LAYOUTS.values():
        bare = run(problem, "float32", "tensor", {}, arrange=arrange, precision="tf32")
        y = run(problem, "float32", "tensor", terms, "relu", arrange, precision="tf32")
        expected = ended(wide(bare), terms, "relu", numpy.float64)
        assert max_error(y, expected) <= 4 * 2.0**-24 * numpy.abs(expected).max()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_out_is_filled_in_its_own_layout_and_the_residual_left(algorithm):
    problem = ALL["depthwise" if algorithm == "depthwise" else "k3-s2"]
    terms = inputs(problem, "float32")[2]
    for source in LAYOUTS.values():
        for target in LAYOUTS.values():
            out = target(numpy.full(problem.output_shape, numpy.nan, numpy.float32))
            residual = target(terms["residual"])
            before = residual.tobytes()
            x, weight, _ = inputs(problem, "float32")
            y = conv2d_forward(
                source(x), weight, algorithm=algorithm, residual=residual, out=out, **options(problem)
            )
            assert y is out
            assert residual.tobytes() == before
            assert_right(out, problem, "float32", {"residual": residual}, "identity", algorithm)


def test_columns_that_are_made_for_some_images_at_a_time(monkeypatch):
    """Each part of the batch meets its own part of the residual."""
    problem = ALL["k3-same"]
    monkeypatch.setattr(forward_paths, "WORKSPACE_BYTES", 1)
    for dtype in DTYPES:
        terms = inputs(problem, dtype)[2]
        for arrange in LAYOUTS.values():
            y = run(problem, dtype, "im2col", terms, "relu", arrange)
            assert_right(y, problem, dtype, terms, "relu", dtype)


def test_the_order_of_threads_does_not_matter():
    for algorithm in ALGORITHMS:
        problem = ALL["depthwise-s2" if algorithm == "depthwise" else "k3-s2"]
        terms = inputs(problem, "float32")[2]
        for arrange in LAYOUTS.values():
            assert order_independent(lambda: run(problem, "float32", algorithm, terms, "relu", arrange)), algorithm  # noqa: B023


def test_a_residual_that_does_not_begin_at_16_bytes():
    problem = ALL["resnet-down"]
    x, weight, terms = inputs(problem, "float16")
    dense = numpy.ascontiguousarray(terms["residual"].transpose(0, 2, 3, 1))
    memory = numpy.empty(dense.size + 16, dense.dtype)
    first = (-memory.ctypes.data // 2 + 1) % 8
    shifted = memory[first : first + dense.size].reshape(dense.shape)
    shifted[...] = dense
    assert shifted.ctypes.data % 16 == 2
    results = [
        conv2d_forward(channels_last(x), weight, algorithm="tensor", residual=residual, **options(problem))
        for residual in (shifted.transpose(0, 3, 1, 2), channels_last(terms["residual"]))
    ]
    numpy.testing.assert_array_equal(*results)


def shifted(array):
    """The same numbers in the same strides, one element behind a boundary of 16 bytes."""
    order = numpy.argsort([-stride for stride in array.strides], kind="stable")
    dense = array.transpose(order)
    memory = numpy.empty(array.size + 32, array.dtype)
    first = (-memory.ctypes.data % 16) // array.itemsize + 1
    view = memory[first : first + array.size].reshape(dense.shape)
    view[...] = dense
    assert view.ctypes.data % 16 == array.itemsize
    return view.transpose(numpy.argsort(order))


@EVERY_WAY
def test_nothing_begins_at_16_bytes(dtype, algorithm):
    """The same bits as where all arrays do."""
    for name in ("resnet-down", "depthwise-s2", "k1"):
        problem = ALL[name]
        if not runs(algorithm, problem):
            continue
        x, weight, terms = inputs(problem, dtype)
        for function in FUNCTIONS:
            for arrange in LAYOUTS.values():
                y = run(problem, dtype, algorithm, terms, function, arrange)
                out = shifted(numpy.full_like(y, numpy.nan))
                more = {**terms, "residual": shifted(arrange(terms["residual"])), "out": out}
                more.update(algorithm=algorithm, activation=function, **options(problem))
                conv2d_forward(shifted(arrange(x)), shifted(arrange(weight)), **more)
                numpy.testing.assert_array_equal(out, y, f"{name}, {function}")


@pytest.mark.parametrize("tile", ["small", "medium", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_of_the_implicit_product(dtype, tile):
    """Where fragments of 16 bytes fit into rows of channels and of positions, and where they do not."""
    for shape, outputs in (((2, 12, 9, 8), 132), ((3, 5, 7, 9), 70)):
        problem = Conv2dProblem.from_shapes(shape, (outputs, shape[1], 3, 3), padding=1)
        terms = inputs(problem, dtype)[2]
        for chosen in (terms, {"bias": terms["bias"]}):
            for function in FUNCTIONS:
                for layout, arrange in LAYOUTS.items():
                    with forced(f"conv2d_implicit_gemm_{tile}"):
                        y = run(problem, dtype, "implicit_gemm", chosen, function, arrange)
                    assert_right(y, problem, dtype, chosen, function, f"{shape}, {function}, {layout}")


def test_what_does_not_fit():
    problem = ALL["k3-s2"]
    x, weight, terms = inputs(problem, "float32")
    residual, where = terms["residual"], options(problem)
    with pytest.raises(ArgumentError, match=r"residual must have shape \(2, 4, 4, 4\), got \(2, 4, 4, 3\)"):
        conv2d_forward(x, weight, residual=numpy.ascontiguousarray(residual[..., :3]), **where)
    with pytest.raises(LayoutError, match=r"residual has strides .* but the result has .* the same memory format"):
        conv2d_forward(x, weight, residual=channels_last(residual), **where)
    with pytest.raises(DtypeError, match="residual is float16, but x is float32"):
        conv2d_forward(x, weight, residual=residual.astype("f2"), **where)
    with pytest.raises(ArgumentError, match="out shares memory with residual"):
        conv2d_forward(x, weight, residual=residual, out=residual, **where)
    with pytest.raises(ArgumentError, match=r"scale must have shape \(4,\), got \(3,\)"):
        conv2d_forward(x, weight, scale=terms["scale"][:3].copy(), **where)
    with pytest.raises(LayoutError, match="scale"):
        conv2d_forward(x, weight, scale=numpy.repeat(terms["scale"], 2)[::2], **where)
    one, shared = numpy.ones((1, 1, 1, 1), "f4"), numpy.ones(1, "f4")
    with pytest.raises(ArgumentError, match="out shares memory with scale"):
        conv2d_forward(one, one, scale=shared, out=shared.reshape(1, 1, 1, 1))
