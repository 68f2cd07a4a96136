"""One peer in a process of its own, told over its standard input what to time: JSON lines in, JSON lines out.

A process each, because thread pools that spin and allocators that keep memory would otherwise be measured through
one another; and the parent asks them in turn, so that all see the same machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

PEERS = ("gpucnn", "torch", "torch channels-last", "torch compile")
_LEAST_SECONDS = 0.03  # of a measurement; quicker work is repeated within it


def _make(peer: str, device: str) -> Any:
    if peer == "gpucnn":
        from benchmarking.ours import Ours

        return Ours(device)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from benchmarking.torch_peer import TorchPeer

    return TorchPeer(device, {"torch": "eager", "torch channels-last": "channels-last"}.get(peer, "compile"))


class _Worker:
    def __init__(self, peer: Any) -> None:
        self._peer = peer
        self._work: Callable[[], Any] | None = None
        self._repeats = 1

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Build the row's work, warm it up, and find how often a measurement repeats it."""
        self._work = None
        self._work = self._peer.prepare(row)
        once = row["kind"] in ("jpeg_epoch", "digits")
        if not once:
            for _ in range(2):
                self._time(1)
        self._repeats = 1 if once else max(1, min(1000, int(_LEAST_SECONDS / max(self._time(1), 1e-7))))
        return {"repeats": self._repeats}

    def measure(self) -> dict[str, Any]:
        """Seconds a call, the mean over one measurement."""
        return {"seconds": self._time(self._repeats), "result": self._result}

    def _time(self, repeats: int) -> float:
        assert self._work is not None
        self._peer.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            result = self._work()
        self._peer.synchronize()
        seconds = (time.perf_counter() - began) / repeats
        self._result = result if isinstance(result, int) else None
        return seconds

    def memory(self, row: dict[str, Any]) -> dict[str, Any]:
        """Peak resident memory over five steps, beyond what the process held before the model was made."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work = self._peer.prepare({**row, "kind": "step"})
        for _ in range(5):
            work()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"bytes": (peak - before) * 1024, "whole_bytes": peak * 1024}


def main(peer: str, device: str) -> int:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    try:
        began = time.perf_counter()
        made = _make(peer, device)
        hello = {"versions": made.versions(), "seconds": time.perf_counter() - began}
    except Exception as error:  # a peer that is not installed or does not work is a blank, not a failure
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)
        return 1
    print(json.dumps(hello), file=answers)
    worker = _Worker(made)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            function = getattr(worker, request["do"])
            answer = function(request["row"]) if "row" in request else function()
        except Exception as error:  # the row stays blank for this peer, with the reason
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(answer), file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
