"""The fully connected layer and the matrix products beneath it, on the host runtime; cuBLAS's arguments played."""

import dataclasses
import itertools
import math
import sys
import types

import numpy
import pytest

import gpucnn_kernels
from gpucnn_kernels import (
    ArgumentError,
    DeviceError,
    DtypeError,
    LayoutError,
    ProblemError,
    linear_backward,
    linear_backward_bias,
    linear_backward_data,
    linear_backward_weight,
    linear_forward,
    runtime,
)
from gpucnn_kernels.arrays import device_array, numpy_dtype
from gpucnn_kernels.gpu import H200
from gpucnn_kernels.launch import Call
from gpucnn_kernels.linear_choice import DEPTHS, TILES, Product, choose
from gpucnn_kernels.matmul import matmul, multiply_by_cublas
from gpucnn_kernels.runtime.host import order_independent
from gpucnn_kernels.runtime.host_launch import HostRuntime
from tests.accuracy import awkward, max_error
from tests.kernel_arrays import DTYPES, EPSILON, accumulated, cast, error_bound, wide
from tests.oracles import activations as activation_oracle
from tests.oracles import linear as oracle
from tests.played_cublas import PlayedCublas

HALVES = ("float16", "bfloat16")
SIZES = [(6, 11, 4), (1, 1, 1), (1, 300, 3), (7, 1, 2), (70, 9, 33), (0, 5, 2)]  # batch, inputs, outputs


@pytest.fixture(autouse=True)
def host():
    with runtime.using("host"):
        yield


def problem(dtype, count=6, inputs=11, outputs=4, seed=0):
    """(x, weight, bias, dy)."""
    random = numpy.random.default_rng(seed)
    shapes = (count, inputs), (outputs, inputs), (outputs,), (count, outputs)
    return [cast(random.standard_normal(shape), dtype) for shape in shapes]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched, and "matmul" for a product of cuBLAS's."""
    names, launch = [], Call.launch
    module = sys.modules["gpucnn_kernels.linear"]

    def noted(self, source, kernel, *arguments, **options):
        names.append(kernel)
        launch(self, source, kernel, *arguments, **options)

    monkeypatch.setattr(Call, "launch", noted)
    monkeypatch.setattr(module, "matmul", lambda *a, **options: names.append("matmul") or matmul(*a, **options))
    return names


def part_of_a_larger(matrix):
    """The same numbers as part of the rows of a matrix that has more columns."""
    larger = numpy.full((matrix.shape[0], matrix.shape[1] + 3), numpy.nan).astype(matrix.dtype)
    larger[:, 1:-2] = matrix
    return larger[:, 1:-2]


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear(dtype, sizes):
    x, weight, bias, dy = problem(dtype, *sizes)
    exact = [wide(array) for array in (x, weight, bias, dy)]
    expected = (oracle.forward(*exact[:3]), *oracle.backward(exact[3], *exact[:2]))
    a, w, b, g = (array.astype(accumulated(dtype)) for array in (x, weight, bias, dy))
    plain = (
        numpy.einsum("ni,ki->nk", a, w) + b,
        numpy.einsum("nk,ki->ni", g, w),
        numpy.einsum("nk,ni->ki", g, a),
        g.sum(0),
    )
    for arranged in (numpy.ascontiguousarray, numpy.asfortranarray, part_of_a_larger):
        x_there, weight_there, dy_there = (arranged(array) for array in (x, weight, dy))
        results = (
            linear_forward(x_there, weight_there, bias),
            linear_backward_data(dy_there, weight_there),
            linear_backward_weight(dy_there, x_there),
            linear_backward_bias(dy_there),
        )
        for result, reference, other in zip(results, expected, plain, strict=True):
            assert result.dtype == x.dtype
            assert result.shape == reference.shape
            assert max_error(wide(result), reference) <= 2 * error_bound(other, reference, dtype)


WAYS = ("small", "large", "cublas")
# Both tiles' stages once, twice and in part; tiles that end within a row of numbers, and one that is whole.
SHAPES = [(5, 3, 2), (1, 300, 1), (33, 17, 40), (140, 70, 9), (16, 128, 16), (0, 3, 4), (4, 0, 3), (64, 32, 15)]
ACTIVATIONS = ("identity", "relu", "leaky_relu", "sigmoid", "tanh")


def activated(name, x):
    function = {"identity": float, "tanh": math.tanh}.get(name) or getattr(activation_oracle, name)
    return activation_oracle.elementwise(function, x)


def gone_back(name, dy, x):
    if name == "identity":
        return dy
    return dy * activation_oracle.elementwise(getattr(activation_oracle, f"{name}_derivative"), x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_way_of_a_layer(dtype, way):
    for sizes, activation in zip(SHAPES, itertools.cycle(ACTIVATIONS), strict=False):
        x, weight, bias, dy = problem(dtype, *sizes)
        sums = oracle.forward(wide(x), wide(weight), wide(bias))
        expected = activated(activation, sums)
        y_there = cast(expected, dtype)
        gradient = gone_back(activation, wide(dy), sums)
        wanted = oracle.backward(gradient, wide(x), wide(weight))
        a, w, b = (array.astype(accumulated(dtype)) for array in (x, weight, bias))
        g = gradient.astype(accumulated(dtype))
        plain = (
            activated(activation, (numpy.einsum("ni,ki->nk", a, w) + b).astype(numpy.float64)),
            numpy.einsum("nk,ki->ni", g, w),
            numpy.einsum("nk,ni->ki", g, a),
            g.sum(0),
        )
        for arranged in (numpy.ascontiguousarray, numpy.asfortranarray):
            where = f"{sizes} {activation} {arranged.__name__}"
            given = [arranged(array) for array in (x, weight)]
            y = linear_forward(*given, bias, activation=activation, algorithm=way)
            results = linear_backward(
                arranged(dy), *given, y=arranged(y_there), activation=activation, algorithm=way
            )
            dtypes = (dtype, dtype, *[accumulated(dtype)] * 2)
            pairs = zip((y, *results), (expected, *wanted), plain, dtypes, strict=True)
            for result, reference, other, own in pairs:
                assert result.dtype == numpy_dtype(own), where
                assert result.shape == reference.shape, where
                # Where the slope is of the output rounded to 16 bits, or cuBLAS's sums are rounded before it.
                more = 4 * EPSILON[dtype] * (1 + abs(reference).max(initial=0)) if dtype in HALVES else 0
                assert max_error(wide(result), reference) <= 2 * error_bound(other, reference, own) + more, where


@pytest.mark.parametrize("way", WAYS)
def test_only_the_gradients_that_are_wanted_and_where_they_are_wanted(way):
    for dtype in DTYPES:
        x, weight, _, dy = problem(dtype, 20, 37, 18)
        whole = linear_backward(dy, x, weight, algorithm=way)
        for with_input, with_bias in itertools.product((False, True), repeat=2):
            some = linear_backward(dy, x, weight, with_input=with_input, with_bias=with_bias, algorithm=way)
            assert (some[0] is None, some[2] is None) == (not with_input, not with_bias)
            for one, other in zip(some, whole, strict=True):
                assert one is None or one.tobytes() == other.tobytes()
        width = accumulated(dtype)
        places = {
            "out": numpy.full(x.shape, numpy.nan).astype(x.dtype),
            "weight_gradient": numpy.full(weight.shape, numpy.nan, width, order="F"),
            "bias_gradient": numpy.full(18, numpy.nan, width),
        }
        results = linear_backward(dy, x, weight, **places, algorithm=way)
        for result, place, other in zip(results, places.values(), whole, strict=True):
            assert result is place
            assert result.tobytes() == other.tobytes()
        narrow = {name: place.astype(x.dtype) for name, place in places.items() if name != "out"}
        for result, other in zip(linear_backward(dy, x, weight, **narrow, algorithm=way), whole, strict=True):
            assert result.tobytes() == cast(other, dtype).tobytes()  # rounded once


@pytest.mark.parametrize("way", ["small", "large"])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_a_fused_activation_has_the_bits_of_one_by_itself(way, activation):
    x, weight, bias, dy = problem("float32", 20, 37, 18)
    sums = linear_forward(x, weight, bias, algorithm=way)
    slope = {"negative_slope": 0.3} if activation == "leaky_relu" else {}
    y = getattr(gpucnn_kernels, f"{activation}_forward")(sums, **slope)
    assert linear_forward(x, weight, bias, activation=activation, **slope, algorithm=way).tobytes() == y.tobytes()
    gradient = getattr(gpucnn_kernels, f"{activation}_backward")(dy, y, **slope)
    fused = linear_backward(dy, x, weight, y=y, activation=activation, **slope, algorithm=way)
    for one, other in zip(fused, linear_backward(gradient, x, weight, algorithm=way), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_finite_stays_where_it_is(way):
    x, weight, bias, dy = problem("float32", 20, 37, 18)
    x[3, 5], weight[4, 6] = numpy.inf, numpy.nan
    y = linear_forward(x, weight, bias, activation="relu", algorithm=way)
    lost = numpy.zeros(y.shape, bool)
    lost[:, 4] = True
    assert numpy.array_equal(numpy.isnan(y), lost)
    assert numpy.array_equal(numpy.isinf(y), (weight[:, 5] > 0) & ~lost & (numpy.arange(20) == 3)[:, None])
    dy[2, 7] = numpy.inf
    shut = numpy.ones(dy.shape, numpy.float32)
    shut[2, 7] = 0  # ReLU lets nothing through, not even infinity
    results = linear_backward(dy, x, weight, y=shut, activation="relu", algorithm=way)
    assert numpy.isfinite(results[2]).all()
    assert numpy.isfinite(numpy.delete(results[1], 5, 1)).all()


def test_a_small_layer_is_one_launch_each_way(launched):
    x, weight, bias, dy = problem("float32", 64, 84, 10)
    for function, arguments, kernel in [
        (linear_forward, {"bias": bias, "activation": "tanh"}, "linear_forward_small"),
        (linear_backward, {"dy": dy, "y": dy, "activation": "relu"}, "linear_backward_small"),
    ]:
        launched.clear()
        function(x=x, weight=weight, **arguments)
        assert launched == [kernel]
    launched.clear()
    linear_forward(x, weight, bias, activation="tanh", algorithm="cublas")
    assert launched == ["matmul", "conv2d_finish"]
    launched.clear()
    linear_backward(dy, x, weight, y=dy, activation="relu", algorithm="cublas")
    assert launched == ["activation_backward", "channel_sums", "matmul", "matmul"]
    launched.clear()
    linear_forward(x, weight)  # nothing but a product
    assert launched in (["matmul"], ["linear_forward_small"])


def test_which_layers_are_one_launch():
    def forward(count, inputs, outputs, dtype="float32"):
        return choose(H200, dtype, (Product(count, outputs, inputs),), 2)

    def backward(count, inputs, outputs, dtype="float32"):
        return choose(H200, dtype, (Product(outputs, inputs + 1, count), Product(count, inputs, outputs)), 3)

    for dtype in DTYPES:
        for count in (32, 128, 512):
            for sizes in ((400, 120), (120, 84), (84, 10)):
                assert forward(count, *sizes, dtype) != "cublas"
                assert backward(count, *sizes, dtype) != "cublas"
        assert forward(4096, 4096, 4096, dtype) == backward(4096, 4096, 4096, dtype) == "cublas"
        assert forward(2, 0, 0, dtype) != "cublas"
    assert backward(512, 400, 120) == "large"
    assert forward(64, 25088, 10) == "cublas"  # one tile would go through all of the sum
    assert {tile.name for tile in TILES} == set(DEPTHS)


def test_arrays_too_large_for_32_bits(monkeypatch, launched):
    x, weight, bias, dy = problem("float32")
    far = device_array(runtime.current(), numpy.ones((1, 1), numpy.float32), "x")
    module = sys.modules["gpucnn_kernels.linear"]
    for shape, strides in [((2, 2), (2**30, 1)), ((2**23, 128), (128, 1)), ((2, 2**22), (1, 2**8))]:
        assert module._span(dataclasses.replace(far, shape=shape, strides=strides)) > module._MOST
    assert module._span(dataclasses.replace(far, shape=(1, 8), strides=(2**40, 1))) < 1000
    monkeypatch.setattr(module, "_MOST", 1000)
    for arguments in ({"x": x, "weight": weight, "bias": bias}, {"dy": dy, "x": x, "weight": weight}):
        function = linear_backward if "dy" in arguments else linear_forward
        with pytest.raises(ArgumentError, match="'small' takes arrays of less than 2"):
            function(**arguments, algorithm="small")
        launched.clear()
        function(**arguments)
        assert "matmul" in launched


def test_what_backward_does_not_take():
    x, weight, _, dy = problem("float32")
    with pytest.raises(ArgumentError, match=r"activation must be one of identity, relu.*got 'gelu'"):
        linear_backward(dy, x, weight, y=dy, activation="gelu")
    with pytest.raises(ArgumentError, match="going back through relu takes its output y"):
        linear_backward(dy, x, weight, activation="relu")
    with pytest.raises(ArgumentError, match="negative_slope > 0, got 0"):
        linear_backward(dy, x, weight, y=dy, activation="leaky_relu", negative_slope=0)
    with pytest.raises(ArgumentError, match="algorithm must be one of auto, small"):
        linear_forward(x, weight, algorithm="fast")
    with pytest.raises(ArgumentError, match=r"activation must be one of identity.*relu6, got 'elu'"):
        linear_forward(x, weight, activation="elu")
    with pytest.raises(ProblemError, match="must lie as dy does"):
        linear_backward(dy, x, weight, y=numpy.asfortranarray(dy), activation="relu")
    with pytest.raises(ProblemError, match=r"it must have \(4, 11\)"):
        linear_backward(dy, x, weight.T)
    with pytest.raises(ProblemError, match="dy is of a batch of 6"):
        linear_backward(dy, x[:3], weight)
    with pytest.raises(DtypeError, match="weight_gradient must be float32, got float16"):
        linear_backward(dy, x, weight, weight_gradient=numpy.zeros((4, 11), numpy.float16))
    memory = numpy.zeros(300, numpy.float32)
    with pytest.raises(ArgumentError, match="weight_gradient shares memory with out"):
        linear_backward(
            dy, x, weight, out=memory[:66].reshape(6, 11), weight_gradient=memory[60:104].reshape(4, 11)
        )
    with pytest.raises(ArgumentError, match="bias_gradient shares memory with dy"):
        linear_backward(dy, x, weight, bias_gradient=dy[0])


def test_without_bias_and_into_out():
    for dtype in DTYPES:
        x, weight, bias, dy = problem(dtype)
        for call in (
            lambda out, x=x, weight=weight: linear_forward(x, weight, out=out),
            lambda out, x=x, weight=weight, bias=bias: linear_forward(x, weight, bias, out=out),
            lambda out, dy=dy, weight=weight: linear_backward_data(dy, weight, out=out),
            lambda out, dy=dy, x=x: linear_backward_weight(dy, x, out=out),
            lambda out, dy=dy: linear_backward_bias(dy, out=out),
        ):
            expected = call(None)
            for order in "CF":
                out = numpy.full(expected.shape, numpy.nan, order=order).astype(expected.dtype, order="K")
                assert call(out) is out
                assert max_error(wide(out), wide(expected)) <= 1e-2 * (dtype == "bfloat16") + 1e-3
        without = linear_forward(x, weight)
        assert max_error(wide(without) + wide(bias), wide(linear_forward(x, weight, bias))) <= 0.05


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_summed_in_single_and_rounded_once(dtype):
    x = cast(numpy.full((1, 4096), 0.01), dtype)
    bias = cast(numpy.full(1, 100.0), dtype)
    y = linear_forward(x, x, bias)
    exact = 100 + 4096 * float(wide(x)[0, 0]) ** 2
    # The product alone is rounded to 0.4..., and adding that to the bias would round it again.
    assert y.tobytes() == cast(numpy.array([[exact]]), dtype).tobytes()
    tall = cast(numpy.full((4096, 3), 0.01), dtype)
    total = cast(numpy.full(3, 4096 * float(wide(tall)[0, 0])), dtype)
    assert linear_backward_bias(tall).tobytes() == total.tobytes()


def test_the_order_of_threads_changes_nothing():
    x, weight, bias, dy = problem("float32", 300, 20, 70)
    assert order_independent(lambda: [linear_forward(x, weight, bias), linear_backward_bias(dy)])
    for way in ("small", "large"):
        assert order_independent(
            lambda way=way: [
                linear_forward(x, weight, bias, activation="relu", algorithm=way),
                *linear_backward(dy, x, weight, y=dy, activation="sigmoid", algorithm=way),
            ]
        )


def test_what_does_not_fit():
    x, weight, bias, dy = problem("float32")
    with pytest.raises(ProblemError, match=r"x has 10 features \(shape \(6, 10\)\) .* \(4, 11\) expects 11"):
        linear_forward(x[:, :10], weight)
    with pytest.raises(ProblemError, match=r"x must have 2 dimensions \(N, in features\), got shape \(6, 11, 1\)"):
        linear_forward(x[..., None], weight)
    with pytest.raises(ProblemError, match="weight must have 2 dimensions"):
        linear_forward(x, weight[0])
    with pytest.raises(ProblemError, match=r"bias must have shape \(4,\), got \(3,\)"):
        linear_forward(x, weight, bias[:3])
    with pytest.raises(ProblemError, match="dy has 3 features"):
        linear_backward_data(dy[:, :3], weight)
    with pytest.raises(ProblemError, match="dy is of a batch of 3"):
        linear_backward_weight(dy[:3], x)
    with pytest.raises(ProblemError, match="dy must have 2 dimensions"):
        linear_backward_bias(dy[0])
    with pytest.raises(DtypeError, match="x must be one of float32"):
        linear_forward(x.astype(int), weight.astype(int))
    with pytest.raises(DtypeError, match="bias is float64, but x is float32"):
        linear_forward(x, weight, bias.astype(numpy.float64))
    with pytest.raises(ArgumentError, match=r"out must have shape \(4,\)"):
        linear_backward_bias(dy, out=numpy.zeros(3, numpy.float32))
    with pytest.raises(LayoutError, match=r"negative stride|rows or columns without gaps"):
        linear_forward(awkward(x), weight)
    with pytest.raises(LayoutError, match="bias of shape"):
        linear_forward(x, weight, numpy.zeros(8, numpy.float32)[::2])
    memory = numpy.zeros((7, 11), numpy.float32)
    square = numpy.eye(11, dtype=numpy.float32)
    for call in (
        lambda: linear_forward(memory[:6], square, out=memory[1:]),
        lambda: linear_forward(x, square, memory[6], out=memory[1:]),
        lambda: linear_backward_data(memory[:6], square, out=memory[1:]),
        lambda: linear_backward_weight(memory, memory[:, :7], out=memory.ravel()[: 11 * 7].reshape(11, 7)),
        lambda: linear_backward_bias(memory, out=memory[0]),
    ):
        with pytest.raises(ArgumentError, match="out shares memory with"):
            call()


# ---------------------------------------------------------------- the products


def stored(numbers, by_columns, gap):
    """``numbers`` (..., rows, columns) stored by rows or by columns, with NaN in the gaps between those."""
    kept = numbers.swapaxes(-1, -2) if by_columns else numbers
    memory = numpy.full((*kept.shape[:-1], kept.shape[-1] + gap), numpy.nan).astype(numbers.dtype)
    memory[..., : kept.shape[-1]] = kept
    kept = memory[..., : kept.shape[-1]]
    return kept.swapaxes(-1, -2) if by_columns else kept


def products():
    """(batches of the factors, (M, I, N), how a, b and out are stored), one after the other."""
    shapes = [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 4), (4, 1, 1), (1, 1, 1)]
    storage = list(itertools.product((False, True), (0, 2)))
    for batches, shape in itertools.product([(), (1, 1), (3, 3), (3, 1), (1, 3)], shapes):
        for a, b, out in itertools.product(storage, storage, storage):
            if batches in ((), (3, 3)) or (a == b and out[0] != a[0]):
                yield batches, shape, (a, b, out)


def by_numpy(a, b, out, accumulate):
    matmul(a, b, out=out, accumulate=accumulate)


def by_cublas(a, b, out, accumulate):
    library = PlayedCublas()
    library.mode = 3  # CUBLAS_TF32_TENSOR_OP_MATH, that somebody had set
    arrays = [device_array(runtime.current(), array, name) for array, name in ((a, "a"), (b, "b"), (out, "out"))]
    multiply_by_cublas(library, 77, *arrays, accumulate)
    assert library.modes == [16]  # no TF32, no sums in half precision
    assert library.mode == 3
    assert library.called == ["gemmEx" if out.ndim == 2 or len(out) == 1 else "gemmStridedBatchedEx"]


@pytest.mark.parametrize("multiply", [by_numpy, by_cublas])
def test_every_storage_of_every_matrix(multiply):
    random = numpy.random.default_rng(0)
    for batches, (m, i, n), (a_stored, b_stored, out_stored) in products():
        a = random.integers(-9, 10, (*batches[:1], m, i)).astype(numpy.float32)
        b = random.integers(-9, 10, (*batches[1:], i, n)).astype(numpy.float32)
        expected = numpy.einsum("...mi,...in->...mn", a, b)
        for accumulate in (False, True):
            out = stored(numpy.full(expected.shape, 7 if accumulate else numpy.nan, numpy.float32), *out_stored)
            around = out.base.copy() if out.base is not None else None
            multiply(stored(a, *a_stored), stored(b, *b_stored), out, accumulate)
            what = f"{batches} {(m, i, n)} {a_stored} {b_stored} {out_stored} {accumulate}"
            assert numpy.array_equal(out, expected + (7 if accumulate else 0)), what
            if out_stored[1]:
                assert numpy.isnan(around).sum() >= numpy.isnan(out.base).sum() > 0, what  # the gaps were left


@pytest.mark.parametrize("multiply", [by_numpy, by_cublas])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_products(dtype, multiply):
    random = numpy.random.default_rng(1)
    a, b = (cast(random.standard_normal(shape), dtype) for shape in ((5, 40), (40, 6)))
    exact = numpy.einsum("mi,in->mn", wide(a), wide(b))
    for out_dtype in {dtype, accumulated(dtype)}:
        plain = numpy.einsum("mi,in->mn", *(array.astype(accumulated(dtype)) for array in (a, b)))
        for accumulate in (False, True):
            out = numpy.full((5, 6), 1 if accumulate else numpy.nan).astype(numpy_dtype(out_dtype))
            multiply(a, b, out, accumulate)
            bound = error_bound(plain + accumulate, exact + accumulate, out_dtype)
            assert max_error(wide(out), exact + accumulate) <= bound


def test_products_make_their_own_result():
    a, b = numpy.ones((2, 3), numpy.float32), numpy.ones((3, 4), numpy.float32)
    assert matmul(a, b).tolist() == [[3.0] * 4] * 2
    assert matmul(cast(a, "bfloat16"), cast(b, "bfloat16")).dtype == numpy_dtype("bfloat16")
    assert matmul(a[:, :0], b[:0]).tolist() == [[0.0] * 4] * 2
    kept = numpy.full((2, 4), 5, numpy.float16)
    matmul(cast(a, "float16")[:, :0], cast(b, "float16")[:0], out=kept, accumulate=True)
    assert kept.tolist() == [[5.0] * 4] * 2
    assert matmul(a[:0], b).shape == (0, 4)


def test_products_that_do_not_fit():
    a, b = numpy.ones((2, 3), numpy.float32), numpy.ones((3, 4), numpy.float32)
    for left, right in [(a, a), (a[0], b), (a, b[None]), (numpy.ones((2, 2, 3)), numpy.ones((3, 3, 4)))]:
        with pytest.raises(ArgumentError, match=r"\(M, I\) @ \(I, N\)"):
            matmul(left, right)
    with pytest.raises(ArgumentError, match=r"out must have shape \(2, 4\)"):
        matmul(a, b, out=numpy.ones((4, 2), numpy.float32))
    with pytest.raises(ArgumentError, match="there is no out"):
        matmul(a, b, accumulate=True)
    with pytest.raises(DtypeError, match="got float32 and float64"):
        matmul(a, b.astype(numpy.float64))
    with pytest.raises(DtypeError, match="out is float64"):
        matmul(a, b, out=numpy.ones((2, 4)))
    with pytest.raises(LayoutError, match="b of shape"):
        matmul(a, numpy.ones((6, 8), numpy.float32)[::2, ::2])
    with pytest.raises(LayoutError, match="a of shape"):
        matmul(numpy.broadcast_to(a[:1], (2, 3)), b)
    with pytest.raises(ArgumentError, match="out shares memory with a"):
        matmul(a, numpy.ones((3, 3), numpy.float32), out=a)


def test_no_cublas(monkeypatch):
    class Cuda(types.ModuleType):
        def __getattr__(self, name):
            raise ImportError("libcublas.so.12: cannot open shared object file")

    class Played(HostRuntime):
        name = "cuda"

    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", Cuda("cupy.cuda"))
    monkeypatch.setattr(sys.modules["gpucnn_kernels.matmul"], "current", Played)
    a = numpy.ones((2, 2), numpy.float32)
    with pytest.raises(DeviceError, match=r"cuBLAS.*cannot be loaded \(libcublas.*gpucnn\[cuda12\]"):
        matmul(a, a, out=a.copy())


def test_a_product_too_large_for_cublas():
    # Nothing of this size is touched: strides alone say how far apart the rows are.
    array = device_array(runtime.current(), numpy.ones((1, 1), numpy.float32), "a")
    far = type(array)(array.name, array.array, array.given, array.address, (2, 2), (2**31, 1), "float32", 0)
    near = type(array)(array.name, array.array, array.given, array.address, (2, 2), (2, 1), "float32", 0)
    library = PlayedCublas()
    with pytest.raises(ArgumentError, match="too large: 2147483648"):
        multiply_by_cublas(library, 77, far, near, near, False)
    assert library.called == []


def test_what_a_gpu_can_multiply(monkeypatch):
    # The way to cuBLAS, with CuPy's modules and the device played on the host's memory.
    class Played(HostRuntime):
        name = "cuda"

    library, device = PlayedCublas(), types.SimpleNamespace(get_cublas_handle=lambda: 77)
    monkeypatch.setitem(sys.modules, "cupy", types.ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.SimpleNamespace(cublas=library, device=device))
    monkeypatch.setattr(sys.modules["gpucnn_kernels.matmul"], "current", Played)
    for capability, dtype in itertools.product(["75", "80", "120"], DTYPES):
        device.get_compute_capability = lambda capability=capability: capability
        a, b = (cast(numpy.full(shape, 2.0), dtype) for shape in ((2, 3), (3, 5)))
        if (capability, dtype) == ("75", "bfloat16"):
            with pytest.raises(DeviceError, match=r"8\.0 or newer, this one's is 7\.5; use float16"):
                matmul(a, b)
        else:
            assert (wide(matmul(a, b)) == 12).all()
    assert library.called == ["gemmEx"] * 11


def test_the_numbers_are_those_of_cuda():
    cupy = pytest.importorskip("cupy")
    from cupy.cuda import cublas
    from cupy.cuda import runtime as cuda

    from gpucnn_kernels import matmul as module

    assert cupy.__version__
    letters = {"float32": "32F", "float64": "64F", "float16": "16F", "bfloat16": "16BF"}
    for name, kind in letters.items():
        assert getattr(cuda, f"CUDA_R_{kind}") == module._DATA_TYPES[name]
    for name, number in module._COMPUTE_TYPES.items():
        assert getattr(cublas, f"CUBLAS_COMPUTE_{letters[name]}") == number
    assert module._DEFAULT_ALGORITHM == cublas.CUBLAS_GEMM_DEFAULT
    assert module._MATH_MODE & ~16 == cublas.CUBLAS_DEFAULT_MATH
