"""Writes docs/kernels.md and docs/kernels/: what each kernel takes of a GPU, on seven architectures, and what is
predicted from that.

    .venv/bin/python scripts/document_kernels.py             compile what has changed, write all
    .venv/bin/python scripts/document_kernels.py --all       compile everything anew
    .venv/bin/python scripts/document_kernels.py --check     only say whether the pages are the tables'

It needs no GPU, but the packages nvidia-cuda-nvrtc-cu12 and nvidia-cuda-runtime-cu12, which the extra "test"
brings on Linux; to count instructions also nvdisasm (the package nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpucnn_kernels import catalog
from gpucnn_kernels.runtime import nvrtc

if (HERE := str(Path(__file__).resolve().parent)) not in sys.path:
    sys.path.append(HERE)
from kernel_documents import compiled, instructions, predictions

DOCUMENTS = Path(__file__).resolve().parent.parent / "docs"
TABLE = DOCUMENTS / "kernels" / "registers.json"
PAGE = DOCUMENTS / "kernels.md"
INSTRUCTIONS = DOCUMENTS / "kernels" / "instructions.json"
COUNTED = "sm_90"  # the architecture whose instructions are counted

Table = dict[str, Any]

# Of a multiprocessor, by architecture: warps, blocks, bytes of shared memory, and how many of these the system
# takes for each block. All have 65,536 registers, given to warps in units of 256. From CUDA's programming guide.
LIMITS = {
    "sm_75": (32, 16, 64 << 10, 0),
    "sm_80": (64, 32, 164 << 10, 1024),
    "sm_86": (48, 16, 100 << 10, 1024),
    "sm_89": (48, 24, 100 << 10, 1024),
    "sm_90": (64, 32, 228 << 10, 1024),
    "sm_100": (64, 32, 228 << 10, 1024),
    "sm_120": (48, 24, 100 << 10, 1024),
}
REGISTERS, UNIT, WARP = 65536, 256, 32

INTRODUCTION = """# The kernels

`gpucnn_kernels` is a package of its own: functions on device arrays, no model classes, nothing of `gpucnn`.

```python
import cupy, gpucnn_kernels

x = cupy.random.standard_normal((64, 3, 224, 224), dtype="float32")
weight = cupy.random.standard_normal((16, 3, 3, 3), dtype="float32")
y = gpucnn_kernels.conv2d_forward(x, weight, stride=2)
```

- Arrays: CuPy's; PyTorch's, JAX's and Numba's on the GPU too (results come back in their kind). float32, float16,
  bfloat16 and float64; images contiguous or channels-last. Nothing is converted or copied unasked: what does not
  fit is an error that names the argument, what came and what was expected.
- `out=` takes the result, `stream=` a stream of any of these libraries.
- Sums are in float32 (float64 for float64).
- A kernel compiles when it is first used and is kept on disk. `gpucnn_kernels.warm_up(("float32", "float16"))` or
  `gpucnn warm-up` compiles all of them ahead, `processes=` (`--processes`) of them at a time.
- `GPUCNN_KERNELS_RUNTIME=host` runs the same source on the CPU, on NumPy arrays: for tests, not for speed.
- Kernels of your own: `gpucnn_kernels.source.source_from_text` and `gpucnn_kernels.launch.Call` give them the same
  compiler, cache and checks.

`tests/outside_project` is a project that uses the package in this way, with tests of its own.

Whether the kernels work on your GPU: `python3 scripts/validate_gpu.py`, see [gpu/README.md](gpu/README.md).

## Tensor cores

`algorithm="tensor"` of `conv2d_forward`, `conv2d_backward_data` and `conv2d_backward_filter` multiplies on tensor
cores, on GPUs from compute capability 8.0 on. `precision` says how:

| arrays | precision | each product |
|---|---|---|
| float32 | `"float32"` or None | three of tf32, as exact as float32 |
| float32 | `"tf32"` | one, of numbers rounded to 10 fraction bits |
| float16, bfloat16 | their own or None | exact, summed in float32 |

Channels-last arrays whose channels a group are a multiple of 16 bytes are read where they lie. Others are copied
by one launch into a workspace, filled up with zeros; results are written in either layout without a copy. A first
layer, of up to four input channels, has kernels of its own in 16 bits and, forward, in tf32: they copy nothing.
The
automatic choice may take tensor cores where `precision` is `"tf32"`, `"float16"` or `"bfloat16"`, and for float32
arrays without one, three products for each, where that is reckoned to be much faster. Results are then as exact as
float32's, of infinities and NaN too; of numbers below 2e-35 digits are lost. `precision="float32"` keeps a call's
products in float32 itself, `GPUCNN_KERNELS_THREE_PRODUCTS=0` in the environment a program's. None of these kernels
has been measured on a GPU yet; the heads of `cuda/conv2d_tensor*.cu` give their limits and what is expected.

`algorithm="wgmma"` of the first two multiplies float16 and bfloat16 by the instructions of a warpgroup, which H100
and H200 (compute capability 9.0) have and no later GPU: the one way to the datasheet's rate there. It is taken
where it is asked for by name, until it was measured.

## What a convolution ends with

Every algorithm of `conv2d_forward` stores activation(scale * sum + bias + residual), made in float32 (float64 for
float64) and rounded once: `bias` and `scale` for each output channel, `residual` of the result's shape and memory
format, `activation` by name. A residual block's sum and ReLU, or a batch norm in evaluation, then take no pass of
their own. im2col, whose products are cuBLAS's, ends in a second launch. `conv2d_backward_data` takes a `residual`
likewise, which may be `out` itself: the gradients of a residual block's two branches need no pass of their own.

`conv2d_max_pool2d_forward` also pools: one launch from the images to the maxima and their places, which
`max_pool2d_backward` takes; the convolution's result is stored nowhere. `conv2d_max_pool2d_pays` says where gpucnn
takes it, in training and in `compile_for_inference`: where it is reckoned faster than the convolution's own way
and a pooling, which is so of first layers and small images. That is arithmetic, not measured.

`conv2d_backward_filter(..., bias_out=...)` makes the bias's gradient with the weight's, in the same pass over dy
where its way allows that, and `max_pool2d_backward(..., y=, activation=)` goes back through the activation, too.
Batch norm takes a `residual` and an `activation`, and gives the gradients of both; `with_mask=` leaves a bit a
number that backward reads in the place of the result.

## Fully connected layers

`linear_forward(..., activation=)` and `linear_backward`, which gives all three gradients, are one launch each
where the layer is so small that launches are its time (`linear_choice.py` reckons where cuBLAS is better): both
factors through shared memory, a block's warps sharing out the sum, bias and activation before it is stored.

## What "auto" is

`algorithm="auto"` takes the way that is usual for such a problem, by the table in `conv2d_choice.py`, unless
another is reckoned to be a quarter faster on the GPU at hand by `conv2d_cost.py`: a page of arithmetic on blocks,
bytes, rates and launches, most of whose constants are estimates until they are measured.
`gpucnn_kernels.conv2d_choose` says what it is. It never takes a way that gives other bits from run to run.

Measuring instead of reckoning: inside of `with gpucnn_kernels.autotune():`, or with
`GPUCNN_KERNELS_AUTOTUNE=1`, the first call of each problem tries every such way and tile on the call's own
arrays, between events, and the fastest is remembered in the cache folder, by GPU, driver, CUDA and the text of
the kernels. That takes some hundred runs of each convolution, once. Ways differ from each other in the last
bits: where two are equally fast, two machines, or two runs that both measured, may choose differently. A
process never changes a choice that it has used, and nothing is measured while a graph is captured or an arena
recorded.

## What each kernel takes

Compiled by NVRTC {version}, with no GPU at hand: registers a thread for each architecture (75 is sm_75; – where it
lacks the instructions), shared memory in bytes a block, static and, behind a plus, dynamic. No kernel spills
registers to memory or needs a stack frame. Occupancy is the share of a multiprocessor's warps that are at work
with the largest block allowed, on an H100 or H200 (sm_90) and the least of all seven; it is arithmetic, not a
measurement. This page is written by `scripts/document_kernels.py`. Tests hold it to the sources as they are, and
its numbers to the compiler's on four of the architectures (`GPUCNN_TEST_ARCHITECTURES=all`: on all seven), exactly
for NVRTC {version}, within a quarter or 8 registers for others. The occupancy on every architecture and
the instructions of the compiled code are in [kernels/compiled.md](kernels/compiled.md), what is predicted of their
times in [kernels/predictions.md](kernels/predictions.md).
"""


def occupancy(architecture: str, threads: int, registers: int, shared_bytes: int) -> float:
    """The share of a multiprocessor's warps that are resident with blocks of ``threads`` threads."""
    most_warps, most_blocks, most_shared, reserved = LIMITS[architecture]
    warps = -(-threads // WARP)
    registers_a_warp = -(-registers * WARP // UNIT) * UNIT
    blocks = min(
        most_blocks,
        most_warps // warps,
        REGISTERS // registers_a_warp // warps,
        most_shared // (shared_bytes + reserved) if shared_bytes + reserved else most_blocks,
    )
    return blocks * warps / most_warps


def compile_all(known: Table | None) -> Table:
    """The table of all kernels; forms whose code is that of ``known``'s are taken from there."""
    usable, version = nvrtc.available()
    if not usable:
        sys.exit(f"document_kernels.py: {version}")
    architectures = list(nvrtc.ARCHITECTURES)
    same = known is not None and (known["nvrtc"], known["architectures"]) == (version, architectures)
    old = known["sources"] if known is not None and same else {}
    needed, dynamic = catalog.capabilities(), catalog.shared_bytes()
    sources = list(needed)
    fresh = [made for made in sources if old.get(made.title, {}).get("fingerprint") != made.code_fingerprint]
    print(f"{version}: compiling {len(fresh)} of {len(sources)} sources for {len(architectures)} architectures")
    found = nvrtc.resources_of(
        (made, architecture) for made in fresh for architecture in nvrtc.architectures_of(made, needed[made])
    )
    table: Table = {"nvrtc": version, "architectures": architectures, "sources": {}}
    for made in sources:
        if made not in fresh:
            table["sources"][made.title] = old[made.title]
            continue
        kernels = {}
        for name, kernel in made.kernels.items():
            # None where the architecture lacks what the kernel needs.
            reports = [found.get((made.title, architecture), {}).get(name) for architecture in architectures]
            kernels[name] = {
                "threads": kernel.max_threads,
                "registers": [report and report.registers for report in reports],
                "shared_bytes": [report and report.shared_bytes for report in reports],
            }
            if name in dynamic:
                kernels[name]["dynamic_bytes"] = dynamic[name]
            for architecture, report in zip(architectures, reports, strict=True):
                if report is None:
                    continue
                if report.spill_store_bytes or report.spill_load_bytes or report.stack_bytes:
                    sys.exit(f"document_kernels.py: {made.title}: {name} on {architecture}: {report}")
        table["sources"][made.title] = {"fingerprint": made.code_fingerprint, "kernels": kernels}
    return table


def render(table: Table) -> str:
    """The page."""
    architectures = table["architectures"]
    parts = [INTRODUCTION.format(version=table["nvrtc"].removeprefix("NVRTC "))]
    section = ""
    for title, source in table["sources"].items():
        name, _, form = title.partition(" ")
        if name != section:
            section = name
            head = " | ".join(name.removeprefix("sm_") for name in architectures)
            parts.append(
                f"\n### {name}\n\n| kernel | form | threads | {head} | shared | occupancy, least |\n"
                f"|---|---|---|{'---|' * len(architectures)}---|---|\n"
            )
        form = form.replace("(SCALAR ", "(").replace(") (", ", ").strip("()")
        parts += [row(kernel, form, numbers, architectures) for kernel, numbers in source["kernels"].items()]
    return "".join(parts)


def row(kernel: str, form: str, numbers: Table, architectures: list[str]) -> str:
    """A kernel's line."""
    dynamic = numbers.get("dynamic_bytes", 0)
    static = max(size for size in numbers["shared_bytes"] if size is not None)
    shares = {
        architecture: occupancy(architecture, numbers["threads"], registers, shared + dynamic)
        for architecture, registers, shared in zip(
            architectures, numbers["registers"], numbers["shared_bytes"], strict=True
        )
        if registers is not None
    }
    cells = [
        f"`{kernel}`",
        form,
        f"{numbers['threads']}",
        *("–" if registers is None else str(registers) for registers in numbers["registers"]),
        f"{static} + {dynamic}" if dynamic else f"{static}",
        f"{shares['sm_90']:.0%}, {min(shares.values()):.0%}",
    ]
    return f"| {' | '.join(cells)} |\n"


def count_instructions(table: Table) -> Table:
    """By title, the instructions of each kernel's code; of sources that have not changed those that are there."""
    known = json.loads(INSTRUCTIONS.read_text(encoding="utf-8")) if INSTRUCTIONS.exists() else {}
    tool = instructions.find()
    counted: Table = {}
    for made, capability in catalog.capabilities().items():
        old = known.get(made.title)
        if old is not None and old["fingerprint"] == made.code_fingerprint:
            counted[made.title] = old
        elif tool is not None and made.title in table["sources"]:
            assert COUNTED in nvrtc.architectures_of(made, capability)
            cubin, _ = nvrtc.compile_source(made, COUNTED)
            kernels = instructions.count(cubin, tool)
            counted[made.title] = {
                "fingerprint": made.code_fingerprint,
                "kernels": {
                    name: kernels[name]
                    for kernel in made.kernels
                    for name in (kernel, f"{kernel} {instructions.MAIN_LOOP}")
                    if name in kernels
                },
            }
    if tool is None and len(counted) < len(table["sources"]):
        print("document_kernels.py: nvdisasm is not there: changed sources are without counts of instructions")
    return counted


def pages(table: Table, counted: Table) -> dict[Path, str]:
    """All pages and what belongs to them, but the two tables themselves, as text."""
    rows = predictions.table()
    folder = TABLE.parent
    return {
        PAGE: render(table),
        folder / "compiled.md": compiled.render(table, counted, LIMITS, REGISTERS, occupancy),
        folder / "predictions.md": predictions.render(rows),
        folder / "predictions.json": predictions.written(rows),
    }


def read() -> Table | None:
    """The table as it was written last, or None."""
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else None


def written(table: Table) -> str:
    """The table as text, a kernel a line so that changes are seen."""
    lines = [
        f'{{"nvrtc": {json.dumps(table["nvrtc"])},',
        f' "architectures": {json.dumps(table["architectures"])},',
    ]
    lines.append(' "sources": {')
    sources = list(table["sources"].items())
    for index, (title, source) in enumerate(sources):
        lines.append(f'  {json.dumps(title)}: {{"fingerprint": "{source["fingerprint"]}", "kernels": {{')
        kernels = [f"   {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in source["kernels"].items()]
        lines.append(",\n".join(kernels))
        lines.append("  }}" + ("," if index + 1 < len(sources) else ""))
    return "\n".join([*lines, " }", "}"]) + "\n"


def main(arguments: list[str]) -> int:
    """Write table and page, or check the page; the exit status."""
    if arguments == ["--check"]:
        table = read()
        if table is None:
            return 1
        counted = json.loads(INSTRUCTIONS.read_text(encoding="utf-8")) if INSTRUCTIONS.exists() else {}
        stale = [
            path
            for path, text in pages(table, counted).items()
            if not path.exists() or path.read_text(encoding="utf-8") != text
        ]
        for path in stale:
            print(f"document_kernels.py: {path} is not up to date", file=sys.stderr)
        return 1 if stale else 0
    if arguments not in ([], ["--all"]):
        print(__doc__, file=sys.stderr)
        return 2
    table = compile_all(None if arguments else read())
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(written(table), encoding="utf-8")
    counted = count_instructions(table)
    lines = [f" {json.dumps(title)}: {json.dumps(source)}" for title, source in counted.items()]
    INSTRUCTIONS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    for path, text in pages(table, counted).items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
