"""docs/kernels/compiled.md: what each kernel's compiled code keeps of a multiprocessor, on every architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernel_documents.instructions import CLASSES, MAIN_LOOP

Table = dict[str, Any]
Limits = dict[str, tuple[int, int, int, int]]

INTRODUCTION = """# Compiled code and occupancy

Arithmetic from what NVRTC {version} says of the compiled code, with no GPU at hand: nothing on this page is a
measurement. Registers and shared memory are in [../kernels.md](../kernels.md). Local memory is 0 bytes a thread
for every kernel on every architecture: none spills, none has a stack frame, and a test holds them to that.

Occupancy is the share of a multiprocessor's warps that are resident with the largest block allowed, from the
limits a multiprocessor of the CUDA C++ Programming Guide's table "Technical Specifications per Compute
Capability":

| architecture | warps | blocks | shared memory, KiB | registers |
|---|---|---|---|---|
{limits}
Registers are given to a warp in units of 256; of shared memory the system keeps 1 KiB for each block (on sm_75
none). "Held by" says what keeps an H100 or H200 (sm_90) from more: registers, shared memory, the number of blocks,
or, at 100 %, nothing but its warps.

Instructions are those of the code for sm_90 as it is written, not as often as they run, padding left out: all, and
of these multiply-adds (FFMA, DFMA, HFMA2), instructions of the tensor cores, those that read or write shared
memory and memory, and barriers. The main loop is the one with the largest share of products: of how many
instructions, how many are products (multiply-adds or those of tensor cores). Each of a multiprocessor's four
schedulers issues one instruction a clock and can begin a multiply-add in every one of them, so a kernel reaches no
larger share of that rate than its main loop has of them. A product of tensor cores (m16n8k16 in 16 bits, m16n8k8
in tf32) takes them four clocks at the datasheet's rate: what a loop has of other instructions beyond three for
each of those is time that they wait. Kernels without such a loop have "–".

Written by `scripts/document_kernels.py`; a test holds this page to the table of registers and to CUDA's limits.
"""


def limits_table(limits: Limits, registers: int) -> str:
    """The limits as Markdown rows."""
    return "".join(
        f"| {name} | {warps} | {blocks} | {shared >> 10} | {registers:,} |\n"
        for name, (warps, blocks, shared, _) in limits.items()
    )


def held_by(
    limits: tuple[int, int, int, int], threads: int, registers: int, shared_bytes: int, all_registers: int
) -> str:
    """What keeps a multiprocessor from more resident blocks: the first of the least."""
    most_warps, most_blocks, most_shared, reserved = limits
    warps = -(-threads // 32)
    taken = shared_bytes + reserved
    blocks = {
        "warps": most_warps // warps,
        "registers": all_registers // (-(-registers * 32 // 256) * 256 * warps),
        "shared memory": most_shared // taken if taken else most_blocks,
        "blocks": most_blocks,
    }
    return min(blocks, key=lambda name: blocks[name])


def main_loop(found: list[int] | None) -> str:
    """Its products among its instructions."""
    if found is None:
        return "–"
    products = found[CLASSES.index("tensor core")] or found[CLASSES.index("multiply-add")]
    return f"{products} of {found[0]}, {products / found[0]:.0%}"


def render(
    table: Table,
    counted: Table,
    limits: Limits,
    all_registers: int,
    occupancy: Callable[[str, int, int, int], float],
) -> str:
    """The page, from the table of registers and the counted instructions."""
    architectures = table["architectures"]
    parts = [
        INTRODUCTION.format(
            version=table["nvrtc"].removeprefix("NVRTC "), limits=limits_table(limits, all_registers)
        )
    ]
    heads = [name.removeprefix("sm_") for name in architectures]
    header = ["kernel", "form", "threads", *heads, "held by", *CLASSES, MAIN_LOOP]
    section = ""
    for title, source in table["sources"].items():
        name, _, form = title.partition(" ")
        if name != section:
            section = name
            parts.append(f"\n## {name}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}\n")
        form = form.replace("(SCALAR ", "(").replace(") (", ", ").strip("()")
        known = counted.get(title, {})
        numbers_of = known.get("kernels", {}) if known.get("fingerprint") == source["fingerprint"] else {}
        for kernel, numbers in source["kernels"].items():
            dynamic = numbers.get("dynamic_bytes", 0)
            shares = []
            for architecture, registers, shared in zip(
                architectures, numbers["registers"], numbers["shared_bytes"], strict=True
            ):
                lacks = registers is None
                shares.append(
                    "–"
                    if lacks
                    else f"{occupancy(architecture, numbers['threads'], registers, shared + dynamic):.0%}"
                )
            place = architectures.index("sm_90")
            holder = held_by(
                limits["sm_90"],
                numbers["threads"],
                numbers["registers"][place],
                numbers["shared_bytes"][place] + dynamic,
                all_registers,
            )
            found = numbers_of.get(kernel)
            cells = [f"`{kernel}`", form, str(numbers["threads"]), *shares, holder]
            cells += [str(number) for number in found] if found else ["–"] * len(CLASSES)
            cells.append(main_loop(numbers_of.get(f"{kernel} {MAIN_LOOP}")))
            parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)
