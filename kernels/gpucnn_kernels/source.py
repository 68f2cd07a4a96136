"""CUDA sources: read, made whole, described.

A source is one ``.cu`` file of the folder ``cuda``. Its project headers (``#include "name.cuh"``) are put in its
place, once each, and its ``#define`` lines in front, so the text says everything that the compiler sees: it is the
same for NVRTC and for the host runtime, and a cache that is keyed by it cannot be fooled by an edited header.

The text is also the one description of its kernels: the launcher reads each kernel's parameters, and the structs
that it takes by value, from here, and so cannot disagree with them.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from gpucnn_kernels.errors import ArgumentError

FOLDER = Path(__file__).parent / "cuda"

SCALARS: dict[str, tuple[str, str]] = {
    "float32": ("float32", "float32"),
    "float16": ("float16", "float32"),
    "bfloat16": ("bfloat16", "float32"),
    "float64": ("float64", "float64"),
}
"""By dtype of the arrays: what ``scalar_t`` (storage) and ``accumulate_t`` (arithmetic) are. See scalar.cuh."""

_VALUES: dict[str, type[Any]] = {
    "bool": ctypes.c_bool,
    "unsigned char": ctypes.c_uint8,
    "int": ctypes.c_int32,
    "unsigned": ctypes.c_uint32,
    "unsigned int": ctypes.c_uint32,
    "long long": ctypes.c_int64,
    "unsigned long long": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_ELEMENTS = {
    "bool": "bool",
    "unsigned char": "uint8",
    "int": "int32",
    "unsigned": "uint32",
    "unsigned int": "uint32",
    "long long": "int64",
    "unsigned long long": "uint64",
    "float": "float32",
    "double": "float64",
    "__half": "float16",
    "half": "float16",
    "__nv_bfloat16": "bfloat16",
}
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"[^\n]*(?:\n|\Z)', re.MULTILINE)
_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\(([^)]*)\)\s*)?(\w+)\s*\(([^)]*)\)\s*\{'
)
_STRUCT = re.compile(r"\bstruct\s+(\w+)\s*\{([^{}()]*)\}\s*;")
_QUALIFIER = re.compile(r"\b(?:const|__restrict__|__restrict|__grid_constant__)\b")
_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Parameter:
    """A kernel's parameter: an array of ``dtype`` (written to unless ``constant``), or a value of a C type."""

    name: str
    dtype: str | None  # of a pointer's elements
    constant: bool
    value: type[Any] | None  # the ctypes type of a parameter that is no pointer


@dataclass(frozen=True)
class Kernel:
    """A kernel's name, its parameters in order, and the largest block that its ``__launch_bounds__`` allow."""

    name: str
    parameters: tuple[Parameter, ...]
    max_threads: int


@dataclass(frozen=True)
class Source:
    """The whole text of a ``.cu`` file for one set of definitions."""

    name: str
    definitions: tuple[tuple[str, str], ...]
    text: str

    @property
    def title(self) -> str:
        """What to call it in messages: "activations (SCALAR float32)"."""
        return " ".join([self.name, *(f"({name} {value})" for name, value in self.definitions)])

    @property
    def architecture(self) -> str | None:
        """The one architecture that it compiles for, such as "sm_90a", where its instructions are of no other."""
        return dict(self.definitions).get("ARCHITECTURE")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the text, which is all that the compiler sees of this project."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def code_fingerprint(self) -> str:
        """SHA-256 of the code alone: the same whatever its comments, and the spaces and lines around them, are."""
        code = _COMMENT.sub(lambda found: found[1] or " ", self.text)
        lines = (" ".join(line.split()) for line in code.splitlines())
        return hashlib.sha256("\n".join(line for line in lines if line).encode()).hexdigest()

    @cached_property
    def kernels(self) -> Mapping[str, Kernel]:
        """The kernels of the file, by name."""
        return _kernels(self.text, dict(self.definitions), self.title)


@cache
def load(name: str, definitions: tuple[tuple[str, str], ...] = ()) -> Source:
    """The source ``cuda/<name>.cu`` with ``definitions`` as (macro, value) pairs.

    ("SCALAR", "float32") chooses the element type. Raises ArgumentError for a name or an element type that there
    is not.
    """
    path = FOLDER / f"{name}.cu"
    if not path.is_file():
        raise ArgumentError(f"there is no CUDA source '{name}'; there are {', '.join(names())}")
    return Source(name, definitions, _defined(definitions) + _inlined(path, set()))


def variant(name: str, scalar: str | None, definitions: Mapping[str, str | int] | None = None) -> Source:
    """The source ``name`` for arrays of dtype ``scalar`` (None: it has no element type) and further definitions.

    The order of the definitions does not matter: one set of them is one text.
    """
    given = [] if scalar is None else [("SCALAR", scalar)]
    for macro, value in sorted((definitions or {}).items()):
        given.append((macro, str(int(value)) if isinstance(value, bool) else str(value)))
    return load(name, tuple(given))


def names() -> list[str]:
    """The names of all sources."""
    return sorted(path.stem for path in FOLDER.glob("*.cu"))


def source_from_text(text: str, name: str = "kernel", definitions: tuple[tuple[str, str], ...] = ()) -> Source:
    """A source of your own, for the same checked launch; definitions and project headers as in :func:`load`."""
    return Source(name, definitions, _defined(definitions) + _with_headers(text, set()))


def _defined(definitions: tuple[tuple[str, str], ...]) -> str:
    lines = []
    for macro, value in definitions:
        if macro == "SCALAR":
            if value not in SCALARS:
                raise ArgumentError(f"kernels take arrays of {', '.join(SCALARS)}, got {value}")
            lines.append(f"#define SCALAR_{value.upper()} 1\n")
        else:
            lines.append(f"#define {macro} {value}\n")
    return "".join(lines)


def _inlined(path: Path, seen: set[str]) -> str:
    text = _with_headers(path.read_text(encoding="utf-8"), seen)
    return text if text.endswith("\n") else text + "\n"


def _with_headers(text: str, seen: set[str]) -> str:
    def replace(match: re.Match[str]) -> str:
        header = match[1]
        if header in seen:
            return ""
        seen.add(header)
        path = FOLDER / header
        if not path.is_file():
            raise ArgumentError(f'#include "{header}": there is no such header among the CUDA sources')
        return _inlined(path, seen)

    return _INCLUDE.sub(replace, text)


def _kernels(text: str, definitions: Mapping[str, str], title: str) -> dict[str, Kernel]:
    plain = _COMMENT.sub(lambda match: match[1] or " ", text)
    elements, values = dict(_ELEMENTS), dict(_VALUES)
    scalar = definitions.get("SCALAR")
    if scalar is not None:
        elements["scalar_t"], elements["accumulate_t"] = SCALARS[scalar]
        values["accumulate_t"] = ctypes.c_double if elements["accumulate_t"] == "float64" else ctypes.c_float
    unreadable: dict[str, str] = {}  # of no concern as long as no kernel takes it
    for name, body in _STRUCT.findall(plain):
        try:
            values[name] = _structure(name, body, values, title)
        except ArgumentError as error:
            unreadable[name] = str(error)
    kernels = {}
    for bounds, name, parameters in _KERNEL.findall(plain):
        parts = [part for part in parameters.split(",") if part.strip()]
        for part in parts:
            for word in part.split():
                if word in unreadable:
                    raise ArgumentError(unreadable[word])
        declared = tuple(_parameter(part, elements, values, f"{title}: {name}") for part in parts)
        kernels[name] = Kernel(name, declared, _threads(bounds, definitions, plain, f"{title}: {name}"))
    form = 'extern "C" __global__ void [__launch_bounds__(number)] name(...) {'
    if not kernels:
        raise ArgumentError(f"{title} has no kernel of the form: {form}")
    if plain.count("__global__") != len(kernels):
        raise ArgumentError(
            f"{title} says __global__ {plain.count('__global__')} times, but only {', '.join(kernels)} could be "
            f"read; write every kernel once, as {form}"
        )
    return kernels


def _threads(bounds: str, definitions: Mapping[str, str], plain: str, where: str) -> int:
    """The first of the launch bounds: a number, or the name of one that the text says once."""
    limit = bounds.split(",")[0].strip() or "1024"
    limit = definitions.get(limit, limit)
    if not limit.isdigit():
        name = re.escape(limit)
        found = re.findall(rf"#[ \t]*define[ \t]+{name}[ \t]+(\d+)[ \t]*$", plain, re.MULTILINE)
        found += re.findall(rf"\bconst(?:expr)?\s+(?:int|unsigned)\s+{name}\s*=\s*(\d+)\s*;", plain)
        if len(set(found)) != 1:
            raise ArgumentError(f"{where}: cannot read the launch bounds '{bounds}'; write a number")
        limit = found[0]
    return int(limit)


def _structure(name: str, body: str, values: Mapping[str, type[Any]], title: str) -> type[ctypes.Structure]:
    fields: list[tuple[str, type[Any]]] = []
    for declaration in body.split(";"):
        words = " ".join(declaration.split())
        if not words:
            continue
        kind, _, members = words.rpartition(" ") if "," not in words else _split_list(words)
        if kind not in values:
            raise ArgumentError(f"{title}: struct {name} has a field of type '{kind}', which is not known")
        for member in members.split(","):
            if not _NAME.fullmatch(member.strip()):
                raise ArgumentError(
                    f"{title}: struct {name} has a field '{member.strip()}'; only plain values are read"
                )
            fields.append((member.strip(), values[kind]))
    if not fields:
        raise ArgumentError(f"{title}: struct {name} has no fields")
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _split_list(words: str) -> tuple[str, str, str]:
    """("long long", "", "a, b") of "long long a, b"."""
    first, _, rest = words.partition(",")
    kind, _, member = first.rpartition(" ")
    return kind, "", f"{member},{rest}"


def _parameter(
    declaration: str, elements: Mapping[str, str], values: Mapping[str, type[Any]], where: str
) -> Parameter:
    constant = bool(re.search(r"\bconst\b", declaration.partition("*")[0]))  # what is pointed to, not the pointer
    words = " ".join(_QUALIFIER.sub(" ", declaration).replace("*", " * ").split())
    kind, _, name = words.rpartition(" ")
    if not _NAME.fullmatch(name):
        raise ArgumentError(f"{where}: the parameter '{' '.join(declaration.split())}' is not understood")
    if kind.endswith("*"):
        element = kind[:-1].strip()
        if element not in elements:
            raise ArgumentError(f"{where}: parameter '{name}' points to '{element}', which is not known")
        return Parameter(name, elements[element], constant, None)
    if kind not in values:
        raise ArgumentError(f"{where}: parameter '{name}' has the type '{kind}', which is not known")
    return Parameter(name, None, True, values[kind])
