"""A training step's decisions on the device, for a step that is captured as a graph: nothing here waits.

float32 and float64.
"""

from __future__ import annotations

from typing import Any

from gpucnn_kernels.errors import ArgumentError, DtypeError
from gpucnn_kernels.launch import Call, blocks_for
from gpucnn_kernels.optimizer_step import CLIP_EPSILON, SUM_SOURCE, blocks_of_squares

SOURCE = "training_step"
DTYPES = ("float32", "float64")
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: tuple({"SCALAR": dtype} for dtype in DTYPES)}

VERDICT = ("proceed", "loss", "norm", "correct", "total")
"""What :func:`judge_step` writes, in this order."""


def judge_step(squares: Any, loss: Any, correct: Any, *, verdict: Any, stream: Any = None) -> Any:
    """Whether the optimizer shall go on, from the loss and the gradient's norm; gives ``verdict``.

    ``squares`` (parts,) are the sums of squares of the gradient's parts, float64; ``loss`` and ``correct`` (int64)
    are 0-d. ``verdict`` (5,), float64, becomes: 1 where loss and norm are finite, otherwise 0; the loss; the norm;
    how many were classified rightly; the norm's square. The parts are summed exactly and rounded once, as by
    Python's math.fsum.
    """
    with Call(stream, squares=squares, loss=loss, correct=correct, verdict=verdict) as call:
        dtype = _dtype(call, "loss")
        call.require("squares", "float64")
        if len(call["squares"].shape) != 1:
            raise ArgumentError(f"squares must have 1 dimension, got shape {call['squares'].shape}")
        call.require("loss", shape=())
        call.require("correct", "int64", ())
        call.require("verdict", "float64", (len(VERDICT),))
        call.contiguous("squares", "verdict")
        call.launch(
            SOURCE,
            "judge_step",
            1,
            32,
            scalar=dtype,
            squares=call["squares"],
            count=call["squares"].size,
            loss=call["loss"],
            correct=call["correct"],
            verdict=call["verdict"],
        )
        return verdict


def judge_gradient(
    gradient: Any,
    squares: Any,
    place: int,
    *,
    done: Any,
    loss: Any = None,
    correct: Any = None,
    verdict: Any = None,
    stream: Any = None,
) -> None:
    """The sum of squares of one part of a gradient, a dense array, into ``squares[place]``: one launch.

    With ``verdict``, ``loss`` (of the gradient's dtype) and ``correct``, for the last of the parts, it then is
    what :func:`judge_step` makes of all ``squares``, in the same launch. The bits are those of
    :func:`gpucnn_kernels.sum_of_squares` and :func:`judge_step`. ``done`` (1,), int32, is zero, and zero again
    afterwards: one array for launches that do not overlap. Raises ArgumentError for a place that there is not.
    """
    arrays = {"loss": loss, "correct": correct, "verdict": verdict, "done": done}
    with Call(stream, gradient=gradient, squares=squares, **arrays) as call:
        dtype = _dtype(call, "gradient", "loss")
        call.elementwise("gradient")
        call.require("squares", "float64")
        parts = call["squares"].size
        if len(call["squares"].shape) != 1 or not 0 <= place < parts:
            raise ArgumentError(f"squares of shape {call['squares'].shape} have no place {place}")
        call.require("loss", shape=())
        call.require("correct", "int64", ())
        call.require("verdict", "float64", (len(VERDICT),))
        if len({array is None for array in (loss, correct, verdict)}) != 1:
            raise ArgumentError("a verdict takes the loss and how many were classified rightly: give all or none")
        call.require("done", "int32", (1,))
        call.contiguous("squares", "verdict")
        blocks = blocks_of_squares(call["gradient"].size)
        call.launch(
            SOURCE,
            "judge_gradient",
            blocks,
            scalar=dtype,
            gradient=call["gradient"],
            count=call["gradient"].size,
            partial=call.scratch(blocks, "float64"),
            done=call["done"],
            squares=call["squares"],
            place=place,
            parts=parts,
            loss=call.get("loss"),
            correct=call.get("correct"),
            verdict=call.get("verdict"),
        )


def clip_by_total(x: Any, total: Any, *, max_norm: float, stream: Any = None) -> None:
    """Scale a dense array in place by min(1, max_norm / (norm + 1e-6)), the norm's square being in ``total``.

    As :func:`~gpucnn_kernels.clip_by_norm`, but ``total`` (1,), float64, may be of more arrays than this one.
    float32, float16, bfloat16 and float64. Raises ArgumentError for a ``max_norm`` that is not above 0.
    """
    if not max_norm > 0:
        raise ArgumentError(f"max_norm must be above 0, got {max_norm!r}")
    with Call(stream, x=x, total=total) as call:
        dtype = call.floating("x")
        call.elementwise("x")
        call.require("total", "float64", (1,))
        array = call["x"]
        call.launch(
            SUM_SOURCE,
            "clip_elements",
            blocks_for(array.size),
            scalar=dtype,
            x=array,
            sum=call["total"],
            count=array.size,
            max_norm=max_norm,
            epsilon=CLIP_EPSILON,
        )


def average_step(live: Any, average: Any, *, share: Any, proceed: Any = None, stream: Any = None) -> None:
    """Average += share * (live - average), in place, each operation rounded by itself.

    Dense arrays of one dtype and layout; ``share`` is an array of one float64, and so is ``proceed``, where 0
    leaves the average as it is.
    """
    with Call(stream, live=live, average=average, share=share, proceed=proceed) as call:
        dtype = _dtype(call, "live", "average")
        call.elementwise("live", "average")
        call.require("share", "float64", (1,))
        call.require("proceed", "float64", (1,))
        call.launch(
            SOURCE,
            "average_elements",
            blocks_for(call["live"].size),
            scalar=dtype,
            live=call["live"],
            average=call["average"],
            count=call["live"].size,
            share=call["share"],
            proceed=call.get("proceed"),
        )


def _dtype(call: Call, *names: str) -> str:
    dtype = call.floating(*names)
    if dtype not in DTYPES:
        raise DtypeError(f"{names[0]} must be {' or '.join(DTYPES)}, got {dtype}")
    return dtype
