"""How a convolution is cut into tasks: blocks of images and output rows whose working set fits the cache.

The cut depends on the problem alone, never on the number of threads, so that results do not either.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpucnn_kernels.problem import Conv2dProblem

SMALL_FLOPS = 1 << 21  # a problem below this is done before another thread would have woken up

_PARTIAL_BYTES = 64 << 20  # memory for all partial filter gradients of an operation
_PARTIAL_COUNT = 8
_LEAST_PIXELS = 256  # outputs in a block, as far as there are images
_TASKS = 4  # that there should be at least, as far as there are images


@dataclass(frozen=True, slots=True)
class Block:
    """Part of the work: images ``first`` to ``last`` and output rows ``top`` to ``bottom``, ends exclusive."""

    first: int
    last: int
    top: int
    bottom: int

    @property
    def images(self) -> slice:
        """The block's images, to index the first axis."""
        return slice(self.first, self.last)

    @property
    def rows(self) -> tuple[int, int]:
        """(top, bottom)."""
        return self.top, self.bottom


def blocks(problem: Conv2dProblem, row_bytes: int, block_bytes: int, pixels: int) -> list[Block]:
    """The whole problem cut into blocks of about ``block_bytes``, at ``row_bytes`` an output row.

    A block is some rows of one image or, where images are small, as many whole ones as give ``pixels`` outputs. A
    matrix product should have some hundred columns even if the block is then larger than asked for, because its
    left factor is packed anew each time.
    """
    area, image_bytes = problem.P * problem.Q, row_bytes * problem.P
    if area < _LEAST_PIXELS or 2 * image_bytes <= block_bytes:
        count = max(min(pixels // area, block_bytes // image_bytes), -(-_LEAST_PIXELS // area))
        count = min(count, max(1, problem.N // _TASKS))
        return [Block(n, min(n + count, problem.N), 0, problem.P) for n in range(0, problem.N, count)]
    rows = min(max(block_bytes // row_bytes, -(-_LEAST_PIXELS // problem.Q)), problem.P)
    rows = -(-problem.P // -(-problem.P // rows))  # of equal height
    return [
        Block(n, n + 1, top, min(top + rows, problem.P))
        for n in range(problem.N)
        for top in range(0, problem.P, rows)
    ]


def runs(count: int, partial_bytes: int) -> list[range]:
    """0 .. count - 1 as consecutive runs, each with a partial sum of ``partial_bytes`` of its own."""
    number = max(1, min(count, _PARTIAL_COUNT, _PARTIAL_BYTES // max(partial_bytes, 1)))
    return [range(count * i // number, count * (i + 1) // number) for i in range(number)]
