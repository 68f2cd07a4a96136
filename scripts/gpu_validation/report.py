"""What a validation found: as a table to read, as JSON to keep, and as the page docs/gpu/README.md."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Report = dict[str, Any]

PAGE_HEAD = """# On which GPUs the kernels ran

`python3 scripts/validate_gpu.py` runs every kernel on your GPU and says what it found:

- every family of kernels, in all four dtypes, both memory formats and by every algorithm, over the whole shared
  list of problems, against loops in float64, on random numbers that are new each time, with every output and
  workspace filled with NaN before a kernel sees it; twice, which must give the same bits (but for sums by atomics)
- a training run of lenet5 and of animalnet, their loss at every step beside the CPU's
- runs of both whose steps are captured as CUDA graphs, every bit of them beside the same runs' kernel by kernel
- NVIDIA's compute-sanitizer, memcheck and racecheck, on a few problems of each family, where it is installed

First all kernels are compiled, as many at a time as there are cores. The rest runs in a process of its own. A
kernel that breaks the process, or never ends, is a failure like any other, and what is left runs in another
process; the file of `--output` is written anew after every part.

It takes some minutes (8 at the most, or as `--minutes` says) and needs a checkout of this repository, Python 3.11
or newer, NumPy and CuPy; without them:

```
python3 scripts/run.py setup
.venv/bin/python scripts/validate_gpu.py --output docs/gpu/NAME.json
```

With `--output` in this folder this page is written anew, too. `--seed` repeats a run's numbers; `--runtime host`
is a rehearsal without a GPU, with `GPUCNN_KERNELS_HOST_PTX=sm_90` of the code that such a GPU is given. Exit
status: 0 all passed; 1 something failed; 2 there is no GPU to run on, for the reason given; 3 nothing failed, but
the time was over before everything had run.
"""


def table(report: Report) -> str:
    """A line for each family, operation and algorithm."""
    lines = [f"{'operation':<42} {'by':<14} {'dtype':<9} {'runs':>5} {'error':>9} {'bound':>9}  result"]
    family = None
    for row in report["operations"]:
        if row["family"] != family:
            family = row["family"]
            lines.append(f"-- {family}")
        verdict = "FAILED" if row["failed"] else "passed"
        if row["too_new_for_this_gpu"]:
            verdict += f", {row['too_new_for_this_gpu']} not for this GPU"
        lines.append(
            f"{row['operation']:<42} {row['algorithm']:<14} {row['dtype']:<9} {row['runs']:>5} "
            f"{row['error']:>9.1e} {row['bound']:>9.1e}  {verdict}"
        )
        lines += [f"      {line}" for message in row["failures"] for line in message.splitlines()]
    for run in report["training"]:
        lines.append(f"-- training {run['network']}")
        if "loss_first" in run:
            lines.append(
                f"{run['steps']} steps of {run['batch_size']} images of {run['image_size']}x{run['image_size']}: "
                f"loss {run['loss_first']:.4f} to {run['loss_last']:.4f}, farthest from float64 "
                f"{run['error']:.1e}, allowed {run['bound']:.1e}: {'passed' if run['passed'] else 'FAILED'}"
            )
        lines += [f"      {message}" for message in run["failures"]]
    for run in report["captured"]:
        lines.append(f"-- captured {run['recipe']}: {'passed' if run['passed'] else 'FAILED'}{rates(run)}")
        lines += [f"      {message}" for message in run["failures"]]
    for check in report["sanitizer"]:
        state = "passed" if check["passed"] else "FAILED" if check["finished"] else "not finished"
        lines.append(f"-- compute-sanitizer {check['tool']}: {state}")
        if not check["passed"]:
            lines += [f"      {line}" for line in check["output"].splitlines()]
    for what in report["not_run"]:
        lines.append(f"-- not run: {what}")
    return "\n".join(lines)


def summary(report: Report) -> str:
    """The verdict in one line."""
    rows = report["operations"]
    failed = sum(bool(row["failed"]) for row in rows)
    runs = sum(row["runs"] for row in rows)
    trained = sum(run["passed"] for run in report["training"])
    captured = sum(run["passed"] for run in report["captured"])
    said = (
        f"{report['verdict']}: {len(rows) - failed} of {len(rows)} operations passed in {runs} runs, "
        f"{trained} of {len(report['training'])} training runs, {captured} of {len(report['captured'])} captured "
        f"ones, {report['seconds']:.0f} s, seed {report['seed']}"
    )
    return said + (f"; {len(report['not_run'])} parts not run" if report["not_run"] else "")


def rates(run: Report) -> str:
    """How fast a captured run was beside the plain one; nothing where it broke off."""
    if "images_per_second" not in run:
        return ""
    return f", {run['images_per_second']:.0f} images/s, {run['images_per_second_plain']:.0f} kernel by kernel"


def write(report: Report, path: Path) -> None:
    """Keep the report; in a folder with a page of reports, write the page anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(finite(report), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: as text."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def page(folder: Path) -> str:
    """The page of all reports in a folder."""
    reports = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    ran = {name: report for name, report in reports.items() if report["runtime"] == "cuda"}
    if not ran:
        return f"{PAGE_HEAD}\n## Reports\n\nNot yet run on a GPU.\n"
    parts = [PAGE_HEAD, "\n## Reports\n"]
    for name, report in ran.items():
        machine = report["machine"]
        parts.append(
            f"\n### {machine['gpu']}, {report['when']}\n\n"
            f"{summary(report)}. Compute capability {machine['compute_capability']}, driver {machine['driver']}, "
            f"CuPy {machine['cupy']}, NVRTC {machine['nvrtc']}, commit {machine['checkout']}. All numbers: "
            f"[{name}]({name}).\n\n"
            "| operation | dtype | runs | largest error / bound | error | result |\n|---|---|---|---|---|---|\n"
        )
        parts += [page_row(rows) for rows in grouped(report["operations"])]
        for run in report["training"]:
            if "loss_first" in run:
                parts.append(
                    f"\nTraining {run['network']}: {run['steps']} steps, loss {run['loss_first']:.4f} to "
                    f"{run['loss_last']:.4f}, farthest from float64 {run['error']:.1e} "
                    f"(the CPU in float32: {run['cpu_float32_error']:.1e}).\n"
                )
        for run in report["captured"]:
            state = "passed" if run["passed"] else "failed"
            parts.append(f"\nCaptured as a CUDA graph, {run['recipe']}: {state}{rates(run)}.\n")
        for check in report["sanitizer"]:
            state = "passed" if check["passed"] else "failed" if check["finished"] else "not finished"
            parts.append(f"\ncompute-sanitizer {check['tool']}: {state}.\n")
    return "".join(parts)


def grouped(rows: Iterable[Report]) -> list[list[Report]]:
    """By operation and dtype, the algorithms together."""
    groups: dict[tuple[str, str], list[Report]] = {}
    for row in rows:
        groups.setdefault((row["operation"], row["dtype"]), []).append(row)
    return list(groups.values())


def page_row(rows: list[Report]) -> str:
    """One operation in one dtype."""
    worst = max(rows, key=lambda row: float(row["error_over_bound"]))
    failed = [row["algorithm"] or "all" for row in rows if row["failed"]]
    return (
        f"| `{worst['operation']}` | {worst['dtype']} | {sum(row['runs'] for row in rows)} | "
        f"{float(worst['error_over_bound']):.2f} | {float(worst['error']):.1e} | "
        f"{'failed: ' + ', '.join(failed) if failed else 'passed'} |\n"
    )
