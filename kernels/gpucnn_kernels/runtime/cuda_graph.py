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
    """A captured graph, and all the memory that it uses, which goes after it."""

    def __init__(self, graph: Any, memory: list[Any]) -> None:
        self._graph, self._memory = graph, memory

    def launch(self) -> None:
        """Start it on the current stream."""
        self._graph.launch()


class _Memory:
    """A memory pool of a graph's own, which gives all back when it is dropped.

    CuPy's pool holds what was freed in a circle that neither it nor Python's collector breaks: dropped alone, it
    would keep the memory for as long as the process lives.
    """

    def __init__(self, cupy: Any, device: int) -> None:
        self._cupy, self._device = cupy, device
        blocks = self._blocks = []  # type: list[Any]

        def allocate(size: int) -> Any:
            # Held here too, for a pool that runs out of memory gives back blocks that captured kernels will use.
            pointer = cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
            blocks.append(pointer)
            return pointer

        self.pool = cupy.cuda.MemoryPool(allocate)

    def __del__(self) -> None:
        with contextlib.suppress(Exception), self._cupy.cuda.Device(self._device):  # there may be no CUDA any more
            self.pool.free_all_blocks()


def capture(cupy: Any, run: Callable[[], Result], keep: Iterable[Any], device: int) -> tuple[CudaGraph, Result]:
    """(the graph of what ``run`` starts on ``device``, what it returns), without doing any of it.

    Raises what ``run`` raises, and RuntimeError where CUDA refuses: all arrays are then as they were.
    """
    with cupy.cuda.Device(device):
        cupy.get_default_memory_pool().free_all_blocks()  # what the warm-up used is needed once more, in this pool
        memory, stream = _Memory(cupy, device), cupy.cuda.Stream(non_blocking=True)
        with cupy.cuda.using_allocator(memory.pool.malloc), stream:
            stream.begin_capture()
            try:
                result = run()
            except BaseException:
                with contextlib.suppress(Exception):  # it only says again that the capture went wrong
                    stream.end_capture()
                raise
            graph = stream.end_capture()
    return CudaGraph(graph, [*keep, memory, stream]), result
