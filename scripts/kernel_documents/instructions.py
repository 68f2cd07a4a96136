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

_PREFIXES = {
    "multiply-add": ("FFMA", "DFMA", "HFMA2"),
    "tensor core": ("HMMA", "DMMA", "IMMA", "QMMA"),
    "shared memory": ("LDS", "STS", "LDSM", "STSM"),
    "memory": ("LDG", "STG", "LDGSTS", "LD.", "ST."),
    "barrier": ("BAR",),
}
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_SECTION = re.compile(r"^//-+ \.text\.(\w+) +-+$", re.MULTILINE)


def find() -> str | None:
    """The path of nvdisasm, or None."""
    found = shutil.which("nvdisasm")
    if found is not None:
        return found
    places = [Path(place) / "nvidia" for place in sys.path]
    tools = [tool for place in places if place.is_dir() for tool in place.glob("*/bin/nvdisasm")]
    return str(tools[0]) if tools else None


def count(cubin: bytes, tool: str) -> dict[str, list[int]]:
    """By kernel, how many instructions of each of CLASSES its code has: as written, not as often as they run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        answer = subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True)
    return read(answer.stdout)


def read(listing: str) -> dict[str, list[int]]:
    """The same from nvdisasm's text."""
    parts = _SECTION.split(listing)
    return {name: _classes(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _classes(text: str) -> list[int]:
    names: Counter[str] = Counter()
    for name in _LINE.findall(text):
        if name != "NOP":
            names["all"] += 1
            for title, prefixes in _PREFIXES.items():
                # LDG and LDGSTS are two; so are LDS and LDSM: whole names, or with what follows a dot.
                if any(name == prefix or name.startswith(prefix.rstrip(".") + ".") for prefix in prefixes):
                    names[title] += 1
    return [names[title] for title in CLASSES]
