"""Shows where the time of a training step goes on a GPU: each kernel's share, and its bytes a second.

    python3 scripts/profile_step.py "resnet18 224 N256" --precision bfloat16
    python3 scripts/profile_step.py "lenet5 28 N128" --json profile.json
    python3 scripts/profile_step.py "lenet5 28 N128" --runtime host        a rehearsal without a GPU, tiny

The names are those of the benchmark's training steps; without one they are listed. Steps are taken kernel by
kernel, not captured, with the GPU kept busy until each is queued. Bytes are those of a launch's arrays, each once:
what the kernel cannot do without, not what the hardware moved.

Exit status: 0 done, 2 it cannot be done, for the reason given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

from benchmarking.gpu_rows import PRECISIONS, Measurement, tiny  # noqa: E402 (made importable by the line above)
from benchmarking.rows import step_rows  # noqa: E402


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("step", nargs="?", help="a training step of the benchmark, by its name")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--steps", type=int, default=10, help="that the median is taken of (default 10)")
    parser.add_argument("--runtime", choices=("cuda", "host"), default="cuda", help="host: rehearse without a GPU")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    return parser.parse_args(given)


def profiler(ours: Any, host: bool) -> Any:
    """What times launches: events on a GPU, the wall clock on the host runtime."""
    from benchmarking.gpu_profile import Profiler, WallEvent

    if host:
        return Profiler(WallEvent, WallEvent.elapsed, lambda seconds: None, lambda: None)
    import cupy
    from benchmarking.gpu_clock import FLUSH_BYTES

    area = cupy.empty(FLUSH_BYTES, "uint8")
    stream = cupy.cuda.get_current_stream()
    first, last = cupy.cuda.Event(), cupy.cuda.Event()
    area.data.memset_async(0, FLUSH_BYTES)
    first.record()
    area.data.memset_async(0, FLUSH_BYTES)
    last.record()
    stream.synchronize()
    once = max(cupy.cuda.get_elapsed_time(first, last) / 1e3, 1e-6)

    def busy(seconds: float) -> None:
        for _ in range(1 + int(seconds / once)):
            area.data.memset_async(0, FLUSH_BYTES)

    return Profiler(cupy.cuda.Event, cupy.cuda.get_elapsed_time, busy, stream.synchronize)


def main(given: list[str] | None = None) -> int:
    """Profile, print, write; the exit status."""
    options = arguments(given)
    rows = {row.name: row for row in step_rows("cuda")}
    if options.step not in rows:
        print(f"profile_step.py: name one of these steps: {', '.join(rows)}", file=sys.stderr)
        return 2
    if options.steps < 1:
        print(f"profile_step.py: --steps must be at least 1, got {options.steps}", file=sys.stderr)
        return 2
    host = options.runtime == "host"
    if host:
        os.environ["GPUCNN_KERNELS_RUNTIME"] = "host"
    from benchmarking.gpu_ours import OursOnGpu
    from benchmarking.gpu_profile import table

    from gpucnn.errors import DeviceError

    row = rows[options.step]
    if host:
        row = tiny(Measurement(row, options.precision)).row
    ours = OursOnGpu()
    if not host:
        from benchmarking.gpu_run import compile_ahead

        compile_ahead(argparse.Namespace(runtime="cuda", precisions=options.precision))
    try:
        step = ours.prepare_in(dataclasses.asdict(row), options.precision, "")
    except DeviceError as error:
        print(f"profile_step.py: {error}", file=sys.stderr)
        return 2
    assert step is not None
    entries, whole = profiler(ours, host).profile(step, options.steps)
    print(f"{options.step}, {options.precision}" + (", a rehearsal: these times mean nothing" if host else ""))
    print(table(entries, whole), end="")
    if options.json is not None:
        found = {
            "step": options.step,
            "precision": options.precision,
            "runtime": options.runtime,
            "seconds": whole,
            "kernels": [dataclasses.asdict(entry) | {"seconds": entry.seconds} for entry in entries],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
