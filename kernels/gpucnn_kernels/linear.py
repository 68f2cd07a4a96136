"""The fully connected layer: one launch each way where it is small, otherwise cuBLAS's products.

Matrices may be stored by rows or by columns, and be part of a larger matrix. Shapes that do not fit raise
ProblemError, other strides LayoutError, an ``out`` that shares memory with an argument ArgumentError.

``algorithm`` is "auto", which :mod:`gpucnn_kernels.linear_choice` chooses by size and GPU, or what it chooses
from: "small" and "large", the tiles of one launch, and "cublas".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpucnn_kernels.activations import FUNCTIONS
from gpucnn_kernels.activations import SOURCE as ACTIVATIONS
from gpucnn_kernels.arrays import DeviceArray
from gpucnn_kernels.channel_sums import launch_channel_sums
from gpucnn_kernels.errors import ArgumentError, DtypeError
from gpucnn_kernels.launch import Call, blocks_for
from gpucnn_kernels.linear_choice import TILES, Product, choose
from gpucnn_kernels.matmul import matmul, require_matrix
from gpucnn_kernels.overlap import require_apart
from gpucnn_kernels.problem import ProblemError
from gpucnn_kernels.runtime import ITEM_SIZES
from gpucnn_kernels.source import SCALARS

SOURCE = "linear"
FINISH = "conv2d_epilogue"  # adds a bias and activates, behind any product
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}

ALGORITHMS = ("auto", "small", "large", "cublas")
OUTPUT_ACTIVATIONS = ("identity", "relu", "leaky_relu", "sigmoid", "tanh")
"""The activations whose slope their output gives: what :func:`linear_backward` goes back through."""

_TILES = {tile.name: tile for tile in TILES}
_MOST = 2**30  # elements of an array: the kernels count in 32 bits, and a few stages beyond the end
_BEYOND = 128  # rows or terms that a tile may reach beyond a matrix


def linear_forward(
    x: Any,
    weight: Any,
    bias: Any = None,
    *,
    activation: str = "identity",
    negative_slope: float = 0.01,
    algorithm: str = "auto",
    out: Any = None,
    stream: Any = None,
) -> Any:
    """activation(x (N, in) @ weight.T (weight is (out, in)) + bias (out,)): (N, out), rounded once.

    ``activation`` is a name of :data:`gpucnn_kernels.activations.FUNCTIONS`; ``negative_slope`` is leaky_relu's.
    """
    _check(algorithm, activation, tuple(FUNCTIONS))
    with Call(stream, x=x, weight=weight, bias=bias, out=out) as call:
        dtype = call.floating("x", "weight", "bias", "out")
        count, inputs = _matrix(call["x"], "(N, in features)")
        outputs, expected = _matrix(call["weight"], "(out features, in features)")
        if inputs != expected:
            raise ProblemError(
                f"x has {inputs} features (shape {call['x'].shape}) but the weight of shape "
                f"{call['weight'].shape} expects {expected}"
            )
        row = call.get("bias")
        y = call.output((count, outputs), dtype)
        if row is not None:
            if row.shape != (outputs,):
                raise ProblemError(f"bias must have shape {(outputs,)}, got {row.shape}")
            call.contiguous("bias")
        require_apart(y, row, call["x"], call["weight"])
        finish = row is not None or activation != "identity"
        factors = call["x"], call["weight"]
        way = _way(call, algorithm, (Product(count, outputs, inputs),), 1 + finish, *factors, y)
        if way == "cublas":
            _forward_by_cublas(call, *factors, row, y, activation, negative_slope)
        else:
            layer = _layer(*factors, y, activation, negative_slope)
            blocks, threads = _blocks(way, count, outputs), _threads(way)
            arrays: dict[str, Any] = {"x": factors[0], "weight": factors[1], "bias": row, "y": y}
            call.launch(SOURCE, f"linear_forward_{way}", blocks, threads, scalar=dtype, **arrays, layer=layer)
        return call.give(y)


def _forward_by_cublas(
    call: Call,
    x: DeviceArray,
    weight: DeviceArray,
    bias: DeviceArray | None,
    y: DeviceArray,
    activation: str,
    negative_slope: float,
) -> None:
    """The product, and in a second launch, where there is anything to do, bias and activation."""
    if bias is None and activation == "identity":
        matmul(x.array, weight.array.T, out=y.array)
        return
    wide = SCALARS[y.dtype][1]
    sums = None if y.dtype == wide else call.empty(y.shape, wide, like=y)
    matmul(x.array, weight.array.T, out=(y if sums is None else sums).array)
    call.launch(
        FINISH,
        "conv2d_finish",
        blocks_for(y.size, per_thread=16 // ITEM_SIZES[y.dtype]),
        scalar=y.dtype,
        wide=sums,
        y=y,
        scale=None,
        bias=bias,
        residual=None,
        channels=y.shape[1],
        run=1 if y.contiguous else y.shape[0],
        count=y.size,
        epilogue={"function": FUNCTIONS[activation], "negative_slope": negative_slope},
    )


def linear_backward(
    dy: Any,
    x: Any,
    weight: Any,
    *,
    y: Any = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    with_input: bool = True,
    with_bias: bool = True,
    algorithm: str = "auto",
    out: Any = None,
    weight_gradient: Any = None,
    bias_gradient: Any = None,
    stream: Any = None,
) -> tuple[Any, Any, Any]:
    """The gradients of y = activation(x @ weight.T + bias), (dx, dweight, dbias), from dy (N, out).

    dx is None unless ``with_input``, dbias unless ``with_bias``. ``y``, which lies in memory as dy does, is needed
    where there is an ``activation``, one of OUTPUT_ACTIVATIONS (leaky_relu's slope is above 0). dweight and dbias
    have the dtype of their sums, float32 for 16-bit arrays, or that of ``weight_gradient`` and ``bias_gradient``,
    which may be dy's too; these and ``out`` take the results. An empty batch gives zeros.
    """
    _check(algorithm, activation, OUTPUT_ACTIVATIONS)
    if activation != "identity" and y is None:
        raise ArgumentError(f"going back through {activation} takes its output y, got None")
    if activation == "leaky_relu" and not negative_slope > 0:
        raise ArgumentError(
            f"the output of leaky_relu tells its slope for negative_slope > 0, got {negative_slope}"
        )
    given = {"weight_gradient": weight_gradient, "bias_gradient": bias_gradient}
    with Call(stream, dy=dy, x=x, weight=weight, y=y, out=out, **given) as call:
        dtype = call.floating("dy", "x", "weight", "y", "out")
        count, outputs, inputs = _backward_sizes(call)
        if y is not None and not call["y"].same_layout(call["dy"]):
            raise ProblemError(f"y of {_form(call['y'])} must lie as dy does, of {_form(call['dy'])}")
        dx = call.output((count, inputs), dtype) if with_input else None
        dweight = call.output(
            (outputs, inputs), _gradient_dtype(call, "weight_gradient", dtype), name="weight_gradient"
        )
        dbias = None
        if with_bias:
            dbias = call.output((outputs,), _gradient_dtype(call, "bias_gradient", dtype), name="bias_gradient")
        results = [array for array in (dx, dweight, dbias) if array is not None]
        reads = [call["dy"], call["x"], call["weight"], call.get("y")]
        for place, result in enumerate(results):
            require_apart(result, *reads, *results[:place])
        gate = None if activation == "identity" else call.get("y")
        products = [Product(outputs, inputs + with_bias, count)] + [Product(count, inputs, outputs)] * with_input
        launches = 1 + with_bias + with_input + (gate is not None)
        arrays: dict[str, Any] = {"dy": call["dy"], "x": call["x"], "weight": call["weight"]}
        matrices = [array for array in (dx, dweight) if array is not None]
        way = _way(call, algorithm, tuple(products), launches, *arrays.values(), *matrices)
        if way == "cublas":
            _backward_by_cublas(call, gate, dx, dweight, dbias, activation, negative_slope)
        else:
            weight_blocks = _blocks(way, outputs, inputs + with_bias)
            blocks = weight_blocks + (_blocks(way, count, inputs) if with_input else 0)
            call.launch(
                SOURCE,
                f"linear_backward_{way}",
                blocks,
                _threads(way),
                scalar=dtype,
                **arrays,
                y=gate,
                **_of_either_width("dweight", dweight, dtype),
                **_of_either_width("dbias", dbias, dtype),
                dx=dx,
                layer=_layer(call["x"], call["weight"], call["dy"], activation, negative_slope),
                gradients={
                    "weight": _steps(dweight),
                    "x": _steps(dx or dweight),
                    "weight_blocks": weight_blocks,
                },
            )
        gradients = (None if array is None else call.give(array) for array in (dx, dweight, dbias))
        return tuple(gradients)  # type: ignore[return-value]


def _backward_by_cublas(
    call: Call,
    gate: DeviceArray | None,
    dx: DeviceArray | None,
    dweight: DeviceArray,
    dbias: DeviceArray | None,
    activation: str,
    negative_slope: float,
) -> None:
    """A product for each gradient, the columns' sums, and before them the activation's gradient."""
    gradient = call["dy"]
    if gate is not None:
        if not gradient.dense:
            raise ProblemError(
                f"dy of {_form(gradient)} must have no gaps where it goes back through an activation"
            )
        gradient = call.empty(gradient.shape, gradient.dtype, like=gradient)
        call.launch(
            ACTIVATIONS,
            "activation_backward",
            blocks_for(gradient.size),
            scalar=gradient.dtype,
            dy=call["dy"],
            value=gate,
            dx=gradient,
            count=gradient.size,
            function=FUNCTIONS[activation],
            negative_slope=negative_slope,
        )
    if dbias is not None:
        _sum_rows(call, gradient, dbias)
    matmul(gradient.array.T, call["x"].array, out=dweight.array)
    if dx is not None:
        matmul(gradient.array, call["weight"].array, out=dx.array)


def linear_backward_data(dy: Any, weight: Any, *, out: Any = None, stream: Any = None) -> Any:
    """Dy (N, out) @ weight: (N, in)."""
    with Call(stream, dy=dy, weight=weight, out=out) as call:
        dtype = call.floating("dy", "weight", "out")
        count, outputs = _matrix(call["dy"], "(N, out features)")
        expected, inputs = _matrix(call["weight"], "(out features, in features)")
        if outputs != expected:
            raise ProblemError(
                f"dy has {outputs} features (shape {call['dy'].shape}) but the weight of shape "
                f"{call['weight'].shape} makes {expected}"
            )
        dx = call.output((count, inputs), dtype)
        matmul(call["dy"].array, call["weight"].array, out=dx.array)
        return call.give(dx)


def linear_backward_weight(dy: Any, x: Any, *, out: Any = None, stream: Any = None) -> Any:
    """dy.T @ x: (out, in). An empty batch gives zeros."""
    with Call(stream, dy=dy, x=x, out=out) as call:
        dtype = call.floating("dy", "x", "out")
        count, outputs = _matrix(call["dy"], "(N, out features)")
        expected, inputs = _matrix(call["x"], "(N, in features)")
        if count != expected:
            raise ProblemError(f"dy is of a batch of {count} (shape {call['dy'].shape}), x of {expected}")
        dweight = call.output((outputs, inputs), dtype)
        matmul(call["dy"].array.T, call["x"].array, out=dweight.array)
        return call.give(dweight)


def linear_backward_bias(dy: Any, *, out: Any = None, stream: Any = None) -> Any:
    """The sum of dy (N, out) over the batch: (out,). An empty batch gives zeros."""
    with Call(stream, dy=dy, out=out) as call:
        dtype = call.floating("dy", "out")
        gradient = call["dy"]
        _, outputs = _matrix(gradient, "(N, out features)")
        sums = call.output((outputs,), dtype)
        require_apart(sums, gradient)
        _sum_rows(call, gradient, sums)
        return call.give(sums)


def _matrix(array: DeviceArray, axes: str) -> tuple[int, int]:
    if len(array.shape) != 2:
        raise ProblemError(f"{array.name} must have 2 dimensions {axes}, got shape {array.shape}")
    return array.shape[0], array.shape[1]


def _sum_rows(call: Call, matrix: DeviceArray, sums: DeviceArray) -> None:
    (count, outputs), (down, across) = matrix.shape, matrix.strides
    launch_channel_sums(call, matrix, sums, images=(1, 0), pixels=(count, down), channels=(outputs, across))


# ---------------------------------------------------------------- checks


def _check(algorithm: str, activation: str, activations: tuple[str, ...]) -> None:
    for name, value, known in (("algorithm", algorithm, ALGORITHMS), ("activation", activation, activations)):
        if value not in known:
            raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _backward_sizes(call: Call) -> tuple[int, int, int]:
    """(N, out features, in features)."""
    count, outputs = _matrix(call["dy"], "(N, out features)")
    batch, inputs = _matrix(call["x"], "(N, in features)")
    if count != batch:
        raise ProblemError(f"dy is of a batch of {count} (shape {call['dy'].shape}), x of {batch}")
    if _matrix(call["weight"], "(out features, in features)") != (outputs, inputs):
        raise ProblemError(
            f"the weight has shape {call['weight'].shape}, but with dy {call['dy'].shape} and x {call['x'].shape} "
            f"it must have {(outputs, inputs)}"
        )
    return count, outputs, inputs


def _gradient_dtype(call: Call, name: str, dtype: str) -> str:
    """The dtype of a parameter's gradient: of the array that was given for it, or that of its sums."""
    given, wide = call.get(name), SCALARS[dtype][1]
    if given is None:
        return wide
    if given.dtype not in (dtype, wide):
        raise DtypeError(f"{name} must be {dtype}{'' if wide == dtype else f' or {wide}'}, got {given.dtype}")
    return given.dtype


def _form(array: DeviceArray) -> str:
    return f"shape {array.shape} and strides {array.strides}"


# ---------------------------------------------------------------- one launch


def _way(call: Call, algorithm: str, products: tuple[Product, ...], launches: int, *arrays: DeviceArray) -> str:
    """The algorithm, chosen where it is "auto": ``launches`` are those of cuBLAS's way."""
    for array in arrays:
        require_matrix(array)
    if algorithm == "cublas":
        return algorithm
    fits = all(_span(array) <= _MOST for array in arrays)
    if algorithm == "auto":
        return choose(call.gpu, arrays[0].dtype, products, launches) if fits else "cublas"
    if not fits:
        raise ArgumentError(f"algorithm '{algorithm}' takes arrays of less than 2^30 elements; take 'cublas'")
    return algorithm


def _span(array: DeviceArray) -> int:
    """Elements from the first to the farthest that a kernel reckons with."""
    row, depth = _steps(array).values()
    return (array.shape[0] + _BEYOND) * row + (array.shape[1] + _BEYOND) * depth


def _blocks(way: str, rows: int, columns: int) -> int:
    return _TILES[way].blocks(rows, columns, 1)


def _threads(way: str) -> int:
    return 32 * _TILES[way].warps


def _steps(matrix: DeviceArray) -> dict[str, int]:
    # The stride of an axis of length 1 says nothing, and may be anything.
    row, depth = (stride if length > 1 else 1 for length, stride in zip(matrix.shape, matrix.strides, strict=True))
    return {"row": row, "depth": depth}


def _layer(
    x: DeviceArray, weight: DeviceArray, y: DeviceArray, activation: str, negative_slope: float
) -> Mapping[str, Any]:
    """The kernels' struct Layer; of ``y`` only where its numbers lie."""
    return {
        "batch": x.shape[0],
        "inputs": x.shape[1],
        "outputs": weight.shape[0],
        "x": _steps(x),
        "weight": _steps(weight),
        "y": _steps(y),
        "function": FUNCTIONS[activation],
        "negative_slope": negative_slope,
    }


def _of_either_width(name: str, array: DeviceArray | None, dtype: str) -> dict[str, Any]:
    """A result as the kernels' two pointers take it."""
    narrow = array is not None and array.dtype == dtype
    return {name: array if narrow else None, f"wide_{name}": None if narrow else array}
