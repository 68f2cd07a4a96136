"""PTX as text: kernels with their parameters and statements, variables, the types' names in C++."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from gpucnn_kernels.errors import CompileError


class PtxError(CompileError):
    """PTX that the translation does not know."""


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement of a function's body, "open", "close", "label" or "code", and its line in the source."""

    kind: str
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable: ``space`` is "shared", "dynamic" (shared memory that a launch asks for), "global" and so on."""

    name: str
    space: str
    kind: str  # the type of an element
    alignment: int
    count: int
    initial: str  # what it holds at first, as PTX writes it; often nothing

    @property
    def size(self) -> int:
        """Bytes."""
        return SIZES[self.kind] * self.count


@dataclass(slots=True)
class Entry:
    """A kernel: its parameters as (name, type, bytes), and its body."""

    name: str
    parameters: list[tuple[str, str, int]] = field(default_factory=list)
    body: list[Statement] = field(default_factory=list)


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_HEADER = re.compile(r"^\s*\.(?:version|target|address_size|file)\b[^\n]*", re.MULTILINE)
_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s[^,]*?)?([\w$]+)\s*(?:\[(\d+)\])?\s*$"
)
_VARIABLE = re.compile(
    r"^\s*(\.extern\s+|\.visible\s+|\.weak\s+)?\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"([\w$]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
    re.DOTALL,
)
_LOCATION = re.compile(
    r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:\s*,\s*function_name[^\n]*?inlined_at\s+(\d+)\s+(\d+)\s+\d+)?"
)
_LABEL = re.compile(r"(\$?[A-Za-z_]\w*)\s*:")

_BYTES = {
    1: "pred b8 u8 s8",
    2: "b16 u16 s16 f16 bf16",
    4: "b32 u32 s32 f32 tf32 f16x2 bf16x2",
    8: "b64 u64 s64 f64",
}
SIZES = {kind: size for size, kinds in _BYTES.items() for kind in kinds.split()}
"""Bytes by type."""
TYPES = {
    "pred": "bool", "b8": "unsigned char", "u8": "unsigned char", "s8": "signed char", "b16": "unsigned short",
    "u16": "unsigned short", "s16": "short", "f16": "unsigned short", "bf16": "unsigned short", "b32": "unsigned",
    "u32": "unsigned", "s32": "int", "f32": "float", "tf32": "unsigned", "f16x2": "unsigned", "bf16x2": "unsigned",
    "b64": "unsigned long", "u64": "unsigned long", "s64": "long", "f64": "double",
}  # fmt: skip
"""What a register of a type is in C++."""


def _statements(body: str) -> Iterator[Statement]:
    """The body's statements; a brace opens a scope where a statement may begin, else it holds operands."""
    line = position = 0
    while position < len(body):
        letter = body[position]
        if letter.isspace():
            position += 1
        elif letter in "{}":
            yield Statement("open" if letter == "{" else "close", "", line)
            position += 1
        elif body.startswith((".loc ", ".loc\t"), position):
            end = body.index("\n", position)
            found = _LOCATION.match(body[position:end])
            if found is None:
                raise PtxError(f"a place in the source was not understood: {body[position:end]}")
            if found[1] == "1":
                line = int(found[2])
            elif found[3] == "1":
                line = int(found[4])
            position = end
        elif label := _LABEL.match(body, position):
            yield Statement("label", label[1], line)
            position = label.end()
        else:
            end = body.index(";", position)
            yield Statement("code", " ".join(body[position:end].split()), line)
            position = end + 1


def _closing(text: str, position: int) -> int:
    """Where the brace closes that was opened just before ``position``."""
    depth = 1
    for found in re.compile(r"[{}]").finditer(text, position):
        depth += 1 if found[0] == "{" else -1
        if not depth:
            return found.start()
    raise PtxError("a function's body has no end")


def _parameters(text: str) -> list[tuple[str, str, int]]:
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _PARAMETER.match(part)
        if match is None:
            raise PtxError(f"a parameter was not understood: {part}")
        kind, name, count = match[1], match[2], match[3]
        found.append((name, kind if count is None else "struct", SIZES[kind] * int(count or 1)))
    return found


def variable(text: str) -> Variable | None:
    """What a declaration declares; None for another statement."""
    found = _VARIABLE.match(text)
    if found is None:
        return None
    linkage, space, alignment, kind, name, dimensions, initial = found.groups()
    count = 1
    for size in re.findall(r"\[(\d+)\]", dimensions):
        count *= int(size)
    if linkage is not None and linkage.strip() == ".extern":
        space, count = "dynamic", 0
    return Variable(name, space, kind, int(alignment or 1), count, (initial or "").strip())


def split(operands: str) -> list[str]:
    """Operands, at the commas outside of braces and brackets."""
    parts, depth, begin = [], 0, 0
    for position, letter in enumerate(operands):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            parts.append(operands[begin:position].strip())
            begin = position + 1
    parts.append(operands[begin:].strip())
    return [part for part in parts if part]


def read_program(ptx: str) -> tuple[dict[str, Entry], list[Variable]]:
    """(the kernels by name, the variables outside of them). Raises PtxError."""
    plain = _HEADER.sub("", _COMMENT.sub("", ptx))
    entries: dict[str, Entry] = {}
    outside = []
    position = 0
    while found := _ENTRY.search(plain, position):
        outside.append(plain[position : found.start()])
        end = _closing(plain, found.end())
        body = [
            Statement("open", "", 0),
            *_statements(plain[found.end() : end]),
            Statement("close", "", 0),
        ]
        entries[found[1]] = Entry(found[1], _parameters(found[2]), body)
        position = end + 1
    declared = (variable(text) for text in "".join(outside).split(";"))
    return entries, [one for one in declared if one is not None]
