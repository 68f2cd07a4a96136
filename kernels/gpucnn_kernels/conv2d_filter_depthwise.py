"""The filter gradient of depthwise convolutions with the usual filters: cuda/conv2d_depthwise_filter.cu.

Other depthwise convolutions have the kernel for any of them, in conv2d_filter.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpucnn_kernels.arrays import DeviceArray, image_layout
from gpucnn_kernels.conv2d_forward_paths import depthwise_slides, strides
from gpucnn_kernels.depthwise_forms import Form, form_of, usual_suffix
from gpucnn_kernels.launch import Call
from gpucnn_kernels.problem import Conv2dProblem
from gpucnn_kernels.source import SCALARS

SOURCE = "conv2d_depthwise_filter"
SOURCES: dict[str, tuple[dict[str, str], ...]] = {SOURCE: ({},)}

_THREADS = 128
_BLOCKS = 2048  # that the units are split for: a few for each place that any GPU has for one
_RUN, _SHORT_RUN = 28, 7  # rows of a unit
_ENOUGH_THREADS = 1 << 17  # of long runs, to keep a GPU of some hundred multiprocessors busy
_MOST_BLOCKS = 65535  # along y

_INSTRUCTIONS = {
    (3, 1): {"_columns": 21, "_channels": 26, "": 45},
    (3, 2): {"_columns": 33, "_channels": 43, "": 77},
    (5, 1): {"_columns": 48, "": 64},
    (5, 2): {"_columns": 62, "": 135},
}
"""Of a loop for each position of dy, as compiled for sm_90, by kernel size and stride: the more of float32's and
bfloat16's."""
_START = 300  # instructions that a thread's unit begins with


def instructions(problem: Conv2dProblem, channels_last: bool) -> float:
    """For each position of dy, where images begin on boundaries of packs."""
    suffix = usual_suffix(problem, problem.padding[2], channels_last)
    return _INSTRUCTIONS[problem.S, problem.stride[0]][suffix] + _START / (4 * min(problem.P, _RUN))


@dataclass(frozen=True, slots=True)
class Plan:
    """How the positions of a channel are split: units, runs of rows of a strip of columns, and parts of them."""

    width: int  # of a block: channels, or packs of them
    lines: int
    blocks: int  # that the channels take
    strips: int
    runs: int
    run: int
    units: int
    part: int

    @property
    def parts(self) -> int:
        """Rows of sums."""
        return -(-self.units // self.part)


def plan(problem: Conv2dProblem, form: Form, across: bool) -> Plan:
    """The plan of a problem; ``across`` where neighbouring threads are neighbouring channels."""
    packs, strips = problem.C // form.channels, -(-problem.Q // form.columns)
    blocks = -(-packs // 32) if across else packs
    width = -(-packs // blocks)
    lines = _THREADS // width
    threads = packs * strips * problem.N
    most = _RUN if threads * problem.P >= _RUN * _ENOUGH_THREADS else _SHORT_RUN
    run = -(-problem.P // -(-problem.P // most))
    runs = -(-problem.P // run)
    units = problem.N * runs * strips
    turns = -(-units // lines)  # that a block would take for all units
    least = -(-_RUN // run)  # of a part: below, adding up a block's threads costs more than the parts save
    parts = max(1, min(-(-_BLOCKS // blocks), turns // least, _MOST_BLOCKS))
    return Plan(width, lines, blocks, strips, runs, run, units, lines * -(-turns // parts))


def takes(problem: Conv2dProblem) -> bool:
    """Whether there is a kernel for the problem, which counts units in 32 bits."""
    return depthwise_slides(problem, False) and problem.N * problem.P * problem.Q < 1 << 30


def filter_sums(call: Call, problem: Conv2dProblem, dy: DeviceArray, x: DeviceArray) -> tuple[DeviceArray, int]:
    """(a row of sums for every part of the positions, their number)."""
    form = form_of(problem, problem.padding[2], dy, x)
    made = plan(problem, form, image_layout(dy) == "channels_last")
    partial = call.scratch(made.parts * problem.C * problem.R * problem.S, SCALARS[x.dtype][1])
    call.launch(
        SOURCE,
        f"filter_gradient_depthwise_{problem.R}x{problem.S}_stride_{problem.stride[0]}{form.suffix}",
        (made.blocks, made.parts),
        (made.width, made.lines),
        scalar=x.dtype,
        x=x,
        dy=dy,
        partial=partial,
        gradient={
            "x": strides(x),
            "dy": strides(dy),
            "channels": problem.C,
            **{letter: getattr(problem, letter) for letter in "HWPQ"},
            "top": problem.padding[0],
            "left": problem.padding[2],
            **{name: getattr(made, name) for name in ("strips", "runs", "run", "units", "part")},
        },
    )
    return partial, made.parts
