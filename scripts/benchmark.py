"""Measures gpucnn beside its peers, on a CPU or a GPU, and writes the table.

    python3 scripts/benchmark.py --device cpu --suite operations
    python3 scripts/benchmark.py --device cuda --minutes 8 --json docs/benchmarks/NAME.json   until it exits with 0
    python3 scripts/benchmark.py --device cuda --runtime host --json rehearsal.json           without a GPU

Peers are PyTorch (eager, channels-last, compiled) and, on a GPU, CuPy by itself and JAX, where they are installed.
Each library works in a process of its own, and all take turns on each row, so that a busy machine is busy for all
of them. It runs from a checkout; docs/benchmarks/README.md says how things are measured on a GPU.

Exit status: 0 done; 2 it cannot be done, for the reason given; 3 the minutes were over, and what is left is said.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

from benchmarking import report  # noqa: E402 (the line above makes it importable from a checkout)
from benchmarking.rows import (  # noqa: E402
    Row,
    convolution_rows,
    end_to_end_rows,
    limit_rows,
    other_rows,
    step_rows,
)
from benchmarking.worker import PEERS  # noqa: E402

SUITES = ("operations", "steps", "end-to-end")


class Peer:
    """A worker process and the conversation with it."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        self.name = name
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]),
            "GPUCNN_NUM_THREADS": str(threads),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "OPENBLAS_NUM_THREADS": str(threads),
        }
        command = [sys.executable, "-m", "benchmarking.worker", name, device]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.hello = self._read()

    def ask(self, do: str, row: Row | None = None) -> dict[str, Any]:
        """The worker's answer to a request."""
        assert self._process.stdin is not None
        request = {"do": do} if row is None else {"do": do, "row": row.as_json()}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"error": f"the process ended with status {self._process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()


def timed(row: Row, suite: str, peers: list[Peer], rounds: int) -> dict[str, Any]:
    """All peers' samples of one row, taken in turns whose order changes."""
    entry: dict[str, Any] = {**row.as_json(), "suite": suite, "seconds": {}, "results": {}, "blank": {}}
    ready = []
    for peer in peers:
        answer = peer.ask("prepare", row)
        if "error" in answer:
            entry["blank"][peer.name] = answer["error"]
        else:
            ready.append(peer)
            entry["seconds"][peer.name] = []
    order = random.Random(row.key)
    for _ in range(rounds):
        for peer in order.sample(ready, len(ready)):
            answer = peer.ask("measure")
            if "error" in answer:
                entry["blank"][peer.name] = answer["error"]
                continue
            count = answer["result"] if row.kind == "jpeg_epoch" else 1
            entry["seconds"][peer.name].append(answer["seconds"] / count)
            entry["results"][peer.name] = answer["result"]
    return entry


def import_seconds(name: str, threads: int, rounds: int) -> list[float]:
    """Wall-clock seconds of a new process that imports what a training program does."""
    library = "import gpucnn.layers, gpucnn.losses, gpucnn.optimizers" if name == report.OURS else "import torch"
    samples = []
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parent / "kernels")]),
        "OMP_NUM_THREADS": str(threads),
    }
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", library], check=True, env=environment)
        samples.append(time.perf_counter() - began)
    return samples


def memory(row: Row, names: list[str], device: str, threads: int) -> dict[str, Any]:
    """Peak memory of a training step, in a new process for each peer."""
    entry: dict[str, Any] = {**row.as_json(), "suite": "end-to-end", "memory": {}, "blank": {}}
    for name in names:
        peer = Peer(name, device, threads)
        answer = peer.ask("memory", row) if "error" not in peer.hello else peer.hello
        peer.close()
        if "error" in answer:
            entry["blank"][name] = answer["error"]
        else:
            entry["memory"][name] = answer
    return entry


def processor() -> str:
    """The processor's name, as Linux gives it, or what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="all")
    parser.add_argument("--peers", help="comma-separated; 'none' for none; by default all on a GPU")
    parser.add_argument("--rows", default="", help="only rows whose name contains this")
    parser.add_argument("--rounds", type=int, help="measurements a row and peer (default 9, on a GPU 5)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--images", type=Path, help="a folder of JPEG files, a subfolder a class, for end-to-end")
    parser.add_argument("--json", type=Path, help="write the results here, and the table beside it as .md")
    gpu = parser.add_argument_group("with --device cuda")
    gpu.add_argument("--runtime", choices=("cuda", "host"), default="cuda", help="host: rehearse without a GPU")
    gpu.add_argument("--minutes", type=float, default=8.0, help="stop after this time (default 8)")
    gpu.add_argument("--retry-blanks", action="store_true", help="measure rows again of which a peer stayed blank")
    gpu.add_argument("--precisions", help="some of float32,tf32,bfloat16,float16 (default: all)")
    return parser.parse_args()


def on_gpu(options: argparse.Namespace) -> int:
    """The same on a GPU, which goes on with the file that --json names; the exit status."""
    if options.suite == "end-to-end":
        print("benchmark: the suite end-to-end is the CPU's; choose operations, steps or all", file=sys.stderr)
        return 2
    sys.path[1:1] = [str(HERE.parent), str(HERE.parent / "kernels")]
    from benchmarking import gpu_run
    from benchmarking.gpu_worker import LIBRARY_NAMES

    options.rounds = options.rounds or 5
    peers = ",".join(LIBRARY_NAMES[1:]) if options.peers is None else options.peers
    return gpu_run.main(options, [] if peers == "none" else [name.strip() for name in peers.split(",")])


def main() -> int:
    """Measure, print, write; the exit status."""
    options = arguments()
    if options.device == "cuda":
        return on_gpu(options)
    options.rounds = options.rounds or 9
    peers_wanted = "torch,torch channels-last" if options.peers is None else options.peers
    wanted = [] if peers_wanted == "none" else [name.strip() for name in peers_wanted.split(",")]
    unknown = set(wanted) - set(PEERS)
    if unknown:
        print(f"benchmark: unknown peers {sorted(unknown)}; there are {', '.join(PEERS[1:])}", file=sys.stderr)
        return 2
    suites = SUITES if options.suite == "all" else (options.suite,)
    started = [Peer(name, options.device, options.threads) for name in (report.OURS, *wanted)]
    missing = {peer.name: peer.hello["error"] for peer in started if "error" in peer.hello}
    peers = [peer for peer in started if peer.name not in missing]
    if report.OURS in missing:
        print(f"benchmark: gpucnn cannot run here: {missing[report.OURS]}", file=sys.stderr)
        return 2
    for name, reason in missing.items():
        print(f"left blank: {name}: {reason}", file=sys.stderr)
    versions = {name: version for peer in peers for name, version in peer.hello["versions"].items()}
    results: dict[str, Any] = {
        "device": options.device,
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "threads": options.threads,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": versions,
        "peers": [peer.name for peer in peers],
        "missing": missing,
        "rounds": options.rounds,
        "rows": [],
    }
    limits = {}
    for row in limit_rows(options.device):
        entry = timed(row, "limits", peers[:1], options.rounds)
        rate = "flops" if row.flops else "bytes"
        limits[rate] = entry[rate] / sorted(entry["seconds"][report.OURS])[options.rounds // 2]
    results["limits"] = limits
    rows: list[tuple[str, Row]] = []
    if "operations" in suites:
        rows += [("operations", row) for row in convolution_rows(options.device)]
        rows += [("operations", row) for row in other_rows(options.device)]
    if "steps" in suites:
        rows += [("steps", row) for row in step_rows(options.device)]
    if "end-to-end" in suites:
        rows += [("end-to-end", row) for row in end_to_end_rows()]
    for suite, row in rows:
        if options.rows not in row.key:
            continue
        if row.kind == "memory":
            results["rows"].append(memory(row, results["peers"], options.device, options.threads))
            continue
        if row.kind == "jpeg_epoch":
            if options.images is None:
                print("left out: JPEG files need --images FOLDER", file=sys.stderr)
                continue
            row.sizes["folder"] = str(options.images)
        if row.kind == "import":
            names = [name for name in results["peers"] if " " not in name]
            seconds = {name: import_seconds(name, options.threads, options.rounds) for name in names}
            entry = {**row.as_json(), "suite": suite, "seconds": seconds, "results": {}, "blank": {}}
        else:
            entry = timed(row, suite, peers, 3 if suite == "end-to-end" else options.rounds)
        row.sizes.pop("folder", None)
        entry["sizes"].pop("folder", None)
        report.summarize(entry, limits)
        results["rows"].append(entry)
        ratio = entry.get("ratio")
        times = ", ".join(f"{name} {report.shown(value)}" for name, value in entry["median"].items())
        print(f"{row.key}: {times}" + ("" if ratio is None else f", ratio {ratio:.2f}"), flush=True)
    for peer in started:
        peer.close()
    text = report.page(results)
    print(text)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        options.json.with_suffix(".md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
