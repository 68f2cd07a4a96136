"""Work captured as a CUDA graph, by CuPy: one call starts what took a call for each kernel.

CuPy's graph keeps no array alive, and its memory pool hands freed memory out again. So what is captured allocates
from a pool of its own, whose memory lives as long as the graph. The capture runs on a stream of its own, in CuPy's
default mode "relaxed", for other threads go on copying batches meanwhile; a launch goes to the current stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

from gpucnn_kernels.runtime import Result


class CudaGraph:
    """A captured graph, and all the memory that it uses."""

    def __init__(self, graph: Any, memory: list[Any]) -> None:
        self._graph, self._memory = graph, memory

    def launch(self) -> None:
        """Start it on the current stream."""
        self._graph.launch()


def capture(cupy: Any, run: Callable[[], Result], keep: Iterable[Any], device: int) -> tuple[CudaGraph, Result]:
    """(the graph of what ``run`` starts on ``device``, what it returns), without doing any of it.

    Raises what ``run`` raises, and RuntimeError where CUDA refuses: all arrays are then as they were.
    """
    blocks: list[Any] = []

    def allocate(size: int) -> Any:
        # Held here too, for a pool that runs out of memory gives back blocks that captured kernels will use.
        pointer = cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
        blocks.append(pointer)
        return pointer

    with cupy.cuda.Device(device):
        cupy.get_default_memory_pool().free_all_blocks()  # what the warm-up used is needed once more, in this pool
        pool, stream = cupy.cuda.MemoryPool(allocate), cupy.cuda.Stream(non_blocking=True)
        with cupy.cuda.using_allocator(pool.malloc), stream:
            stream.begin_capture()
            try:
                result = run()
            except BaseException:
                with contextlib.suppress(Exception):  # it only says again that the capture went wrong
                    stream.end_capture()
                raise
            graph = stream.end_capture()
    return CudaGraph(graph, [*keep, blocks, pool, stream]), result
