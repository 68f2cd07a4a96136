"""What instructions a compiled kernel is made of, as nvdisasm shows its binary.

nvdisasm comes with the package nvidia-cuda-nvdisasm, or with a CUDA toolkit. Without it the counts that are there
stay for the sources that have not changed, and others have none.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

CLASSES = ("all", "multiply-add", "tensor core", "shared memory", "memory", "barrier")
"""The columns: all instructions but padding, and some of them."""

MAIN_LOOP = "main loop"
"""The name, behind a kernel's, under which the counts of its main loop stand."""

_PREFIXES = {
    "multiply-add": ("FFMA", "DFMA", "HFMA2"),
    "tensor core": ("HMMA", "DMMA", "IMMA", "QMMA", "HGMMA"),
    "shared memory": ("LDS", "STS", "LDSM", "STSM"),
    "memory": ("LDG", "STG", "LDGSTS", "LD.", "ST."),
    "barrier": ("BAR",),
}
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_LABEL = re.compile(r"^(\.L_\w+):")
_BRANCH = re.compile(r"BRA.*`\((\.L_\w+)\)")
_SECTION = re.compile(r"^//-+ \.text\.(\w+) +-+$", re.MULTILINE)
_PRODUCTS = 8  # the fewest in a loop that can be a kernel's main loop


def find() -> str | None:
    """The path of nvdisasm, or None."""
    found = shutil.which("nvdisasm")
    if found is not None:
        return found
    places = [Path(place) / "nvidia" for place in sys.path]
    tools = [tool for place in places if place.is_dir() for tool in place.glob("*/bin/nvdisasm")]
    return str(tools[0]) if tools else None


def count(cubin: bytes, tool: str) -> dict[str, list[int]]:
    """By kernel, how many instructions of each of CLASSES its code has: as written, not as often as they run.

    Under the kernel's name and MAIN_LOOP behind it, those of the loop that its time goes by, if there is one.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        answer = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True)
    return read(answer.stdout)


def read(listing: str) -> dict[str, list[int]]:
    """The same from nvdisasm's text."""
    parts = _SECTION.split(listing)
    found: dict[str, list[int]] = {}
    for kernel, text in zip(parts[1::2], parts[2::2], strict=True):
        names, loops = _code(text)
        found[kernel] = _classes(names)
        if main := _main_loop(names, loops):
            found[f"{kernel} {MAIN_LOOP}"] = main
    return found


def _code(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions' names in their order, and the loops as (first, last) places among them."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _LINE.match(line):
            names.append(instruction[1])
            branch = _BRANCH.search(line)
            if branch and branch[1] in labels:  # backwards
                loops.append((labels[branch[1]], len(names) - 1))
    return names, loops


def _main_loop(names: list[str], loops: list[tuple[int, int]]) -> list[int] | None:
    """Of the loop with the largest share of products: of tensor cores, where there are any, or multiply-adds."""
    kind = CLASSES.index("tensor core")
    if not _classes(names)[kind]:
        kind = CLASSES.index("multiply-add")
    bodies = [_classes(names[first : last + 1]) for first, last in loops]
    bodies = [body for body in bodies if body[kind] >= _PRODUCTS]
    return max(bodies, key=lambda body: body[kind] / body[0], default=None)


def _classes(instructions: list[str]) -> list[int]:
    names: Counter[str] = Counter()
    for name in instructions:
        if name != "NOP":
            names["all"] += 1
            for title, prefixes in _PREFIXES.items():
                # LDG and LDGSTS are two; so are LDS and LDSM: whole names, or with what follows a dot.
                if any(name == prefix or name.startswith(prefix.rstrip(".") + ".") for prefix in prefixes):
                    names[title] += 1
    return [names[title] for title in CLASSES]
