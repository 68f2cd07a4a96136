"""From CUDA text to a shared library on this machine: the text's few substitutions, the compiler, the disk cache.

What is substituted in the text (its lines stay where they are):

- comments become blanks;
- ``__shared__ T name[4], other;`` becomes static variables, followed by objects that fill them with 0xFF when a
  block first comes upon them;
- ``extern __shared__ T name[];`` becomes a reference to the dynamic shared memory;
- ``#include <cuda_fp16.h>`` and the other headers of ``host_include`` also go in front of the text.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpucnn_kernels.runtime.compiler import (
    HostCompileError,
    HostUnavailableError,
    announced,
    cache_folder,
    fingerprint,
    is_clang,
    machine_flags,
    run_compiler,
)
from gpucnn_kernels.runtime.compiler import find_compiler as find_any_compiler

INCLUDE = Path(__file__).parent / "host_include"
RUNTIME = INCLUDE / "runtime.cpp"

COMMON_FLAGS = (
    "-std=c++17",
    "-g1",
    "-gdwarf-4",  # addr2line (binutils 2.40) mistakes the first file of version 5
    "-fno-var-tracking",  # where variables are, which -g1 does not say: with sanitizers, half of the time
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-fno-strict-aliasing",  # device code reads arrays as wider vectors
    "-fno-math-errno",
    "-ffp-contract=off",  # only an explicit fma is one, the same on every machine
    "-w",
)
KERNEL_FLAGS = ("-O2", "-nostdinc", f"-I{INCLUDE}")
PTX_FLAGS = ("-O1", "-nostdinc", f"-I{INCLUDE}")  # thousands of statements and jumps: -O2 takes minutes
SANITIZED_FLAGS = (
    "-O1",
    "-nostdinc",
    f"-I{INCLUDE}",
    "-DGPUCNN_HOST_SANITIZE=1",
    "-fsanitize=kernel-address,undefined",
    "-fsanitize-recover=all",
    "-fno-omit-frame-pointer",
)
GCC_SANITIZED_FLAGS = (
    "--param=asan-instrumentation-with-call-threshold=0",
    "--param=asan-globals=1",
    "--param=asan-stack=0",
    "-fsanitize=bounds-strict",
    "-fno-tree-loop-distribute-patterns",  # a loop turned into memcpy would go unchecked
)
CLANG_SANITIZED_FLAGS = (
    "-mllvm",
    "-asan-instrumentation-with-call-threshold=0",
    "-mllvm",
    "-asan-stack=0",
    "-mllvm",
    "-asan-globals=1",
    "-fno-builtin-memcpy",
    "-fno-builtin-memset",
)
LINK_FLAGS = ("-shared", "-Wl,--no-undefined")


def build(text: str, kernels: Sequence[str], sanitize: bool, ptx: str | None = None) -> Path:
    """The shared library of this text, from the cache or compiled now; of its PTX for the architecture ``ptx``.

    Raises HostCompileError, and for ``ptx`` CompileError.
    """
    if not kernels:
        raise ValueError("kernels must name at least one kernel of the text, got none")
    compiler = find_compiler()
    title = title_of(kernels)
    unit = translation_unit(text, kernels) if ptx is None else ""
    flags = [*COMMON_FLAGS, *machine_flags(), *_poison_flags(compiler)]
    if sanitize:
        flags += SANITIZED_FLAGS
        flags += CLANG_SANITIZED_FLAGS if is_clang(compiler) else GCC_SANITIZED_FLAGS
    else:
        flags += KERNEL_FLAGS if ptx is None else PTX_FLAGS
    key = _key(compiler, flags, unit if ptx is None else _identity_of_ptx(text, ptx))
    library = cache_folder("host") / f"{re.sub(r'[^A-Za-z0-9_]', '', kernels[0])[:40]}-{key}.so"
    if library.is_file():
        return library
    with announced(f"{title} for the host"):
        runtime = _runtime_object(compiler)
        if ptx is not None:
            unit = _unit_of_ptx(text, kernels, ptx)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="compiling-") as scratch:
            unit_path = Path(scratch) / "unit.cpp"
            unit_path.write_text(unit, encoding="utf-8")
            made = Path(scratch) / "made.so"
            _compile(compiler, [*flags, *LINK_FLAGS, "-o", str(made), str(unit_path), str(runtime)], title)
            os.replace(made, library)
    return library


def _identity_of_ptx(text: str, architecture: str) -> str:
    """What its translation unit depends on, without making it."""
    from gpucnn_kernels.runtime import nvrtc

    modules = sorted(Path(__file__).with_name("ptx").glob("*.py"))
    translation = [module.read_text(encoding="utf-8") for module in modules]
    return "\n".join([architecture, nvrtc.available()[1], *translation, text])


def _unit_of_ptx(text: str, kernels: Sequence[str], architecture: str) -> str:
    from gpucnn_kernels.runtime import nvrtc
    from gpucnn_kernels.runtime.ptx import translate
    from gpucnn_kernels.source import Source

    return translate(nvrtc.compile_to_ptx(Source(kernels[0], (), text), architecture), kernels, title_of(kernels))


def title_of(kernels: Sequence[str]) -> str:
    """The name that compiler messages give to the text: "vector_add.cu"."""
    return f"{kernels[0]}.cu"


# ---- the text ----

_TOKEN = re.compile(r'//(?:\\\n|[^\n])*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)
_ANGLED = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<([^>\n]+)>", re.MULTILINE)
_SHARED = re.compile(r"(?:\bextern\s+)?(?:(?:__align__|alignas)\s*\([^()]*\)\s*)?\b__shared__\b([^;]*);")
_ALIGNMENT = re.compile(r"(?:__align__|alignas)\s*\((?:[^()]|\([^()]*\))*\)|__attribute__\s*\(\([^;]*?\)\)")


def translation_unit(text: str, kernels: Sequence[str]) -> str:
    """What the C++ compiler gets for ``text``."""
    plain = without_comments(text)
    headers = [name for name in dict.fromkeys(_ANGLED.findall(plain)) if (INCLUDE / name).is_file()]
    entries = ", ".join(f"GPUCNN_HOST_KERNEL({name})" for name in kernels)
    return "\n".join(
        [
            '#include "gpucnn_host.h"',
            *(f"#include <{name}>" for name in headers),
            "namespace {",
            f'#line 1 "{title_of(kernels)}"',
            with_shared_memory(plain, title_of(kernels)),
            "}",
            '#line 1 "the list of kernels"',
            f"static const gpucnn_host::Kernel list[] = {{{entries}}};",
            'extern "C" GPUCNN_HOST_VISIBLE const gpucnn_host::Kernel *gpucnn_host_kernels() { return list; }',
            "",
        ]
    )


def without_comments(text: str) -> str:
    """``text`` with blanks for comments; strings and line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        token = match[0]
        return " " + "\n" * token.count("\n") if token.startswith("/") else token

    return _TOKEN.sub(blank, text)


def with_shared_memory(text: str, title: str) -> str:
    """``text`` with its ``__shared__`` declarations substituted; raises HostCompileError where one cannot be."""

    def replace(match: re.Match[str]) -> str:
        line = text.count("\n", 0, match.start()) + 1
        before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if before.lstrip().startswith("#"):
            raise HostCompileError(
                f"{title}:{line}: the host runtime reads no __shared__ declaration inside a macro; write it out"
            )
        declaration, newlines = match[1], "\n" * match[0].count("\n")
        if "=" in declaration or "{" in declaration:
            raise HostCompileError(
                f"{title}:{line}: a __shared__ variable cannot have an initial value: {' '.join(match[0].split())}"
            )
        alignment = " ".join(_ALIGNMENT.findall(match[0]))
        words = " ".join(_ALIGNMENT.sub(" ", declaration).split())
        kind, declarators = _declarators(words)
        if match[0].startswith("extern"):
            name, dimensions = declarators[0]
            if len(declarators) != 1 or not dimensions.replace(" ", "").startswith("[]"):
                raise HostCompileError(
                    f"{title}:{line}: dynamic shared memory is declared as 'extern __shared__ type name[];', got "
                    f"'{' '.join(match[0].split())}'"
                )
            return (
                f"static {kind} (&{name}){dimensions} = reinterpret_cast<{kind} (&){dimensions}>("
                f"gpucnn_host::dynamic_shared_memory);{newlines}"
            )
        variables = ", ".join(name + dimensions for name, dimensions in declarators)
        uses = "".join(
            f" static gpucnn_host::SharedSlot gpucnn_slot_{name};"
            f" const gpucnn_host::SharedUse gpucnn_use_{name}(gpucnn_slot_{name}, {name});"
            for name, _ in declarators
        )
        return f"static {alignment} {kind} {variables};{uses}{newlines}"

    return _SHARED.sub(replace, text)


def _declarators(words: str) -> tuple[str, list[tuple[str, str]]]:
    """("float", [("a", "[2][3]"), ("b", "")]) of "float a[2][3], b"."""
    parts, depth, begin = [], 0, 0
    in_brackets = 0
    for position, letter in enumerate(words):
        in_brackets += (letter in "[(") - (letter in "])")
        if not in_brackets:
            depth += (letter == "<") - (letter == ">")
        if letter == "," and not in_brackets and not depth:
            parts.append(words[begin:position].strip())
            begin = position + 1
    parts.append(words[begin:].strip())
    found = []
    kind = ""
    for index, part in enumerate(parts):
        bracket = _first_bracket(part)
        head, dimensions = part[:bracket].rstrip(), part[bracket:]
        match = re.search(r"(\w+)$", head)
        name = match[1] if match else ""
        if index == 0:
            kind = head[: len(head) - len(name)].strip()
        found.append((name, dimensions))
    return kind, found


def _first_bracket(part: str) -> int:
    depth = 0
    for position, letter in enumerate(part):
        depth += (letter == "<") - (letter == ">")
        if letter == "[" and not depth:
            return position
    return len(part)


# ---- the compiler ----


def find_compiler() -> str:
    """The path of ``$CXX``, g++ or clang++, on Linux. Raises HostUnavailableError where there is none."""
    if platform.system() != "Linux":
        raise HostUnavailableError(f"the host runtime works on Linux, this is {platform.system()}")
    return find_any_compiler()


@functools.cache
def _poison_flags(compiler: str) -> tuple[str, ...]:
    """Local variables begin as bytes that no result survives, by a compiler that can: g++ 12, clang++ 8."""
    flag = "-ftrivial-auto-var-init=pattern"
    return () if run_compiler(compiler, [flag, "-fsyntax-only", "-x", "c++", os.devnull]) else (flag,)


@functools.cache
def _headers() -> str:
    """The text of all the runtime's headers and sources."""
    return "\n".join(
        f"{path.name}\n{path.read_text(encoding='utf-8')}"
        for path in sorted(INCLUDE.iterdir())
        if path.suffix in (".h", ".cpp")
    )


def _key(compiler: str, flags: Sequence[str], unit: str) -> str:
    # Where the headers lie makes no difference to what is compiled.
    return fingerprint(compiler, [flag for flag in flags if not flag.startswith("-I")], _headers(), unit)


def _runtime_object(compiler: str) -> Path:
    flags = [*COMMON_FLAGS, *machine_flags(), "-O2"]
    path = cache_folder("host") / f"runtime-{_key(compiler, flags, '')}.o"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="compiling-") as scratch:
            made = Path(scratch) / "runtime.o"
            _compile(compiler, [*flags, "-c", "-o", str(made), str(RUNTIME)], "the host runtime")
            os.replace(made, path)
    return path


_PTX_SIGNS = ("no such instruction", "impossible constraint", "Assembler", "<inline asm>")


def _compile(compiler: str, arguments: Sequence[str], title: str) -> None:
    said = run_compiler(compiler, arguments)
    if said is None:
        return
    hint = "correct the text, or see docs/host-runtime.md for what the host runtime supplies"
    if any(sign in said for sign in _PTX_SIGNS):
        hint = "inline PTX is for NVRTC alone: use cuda/ptx.cuh's functions, or guard it with #ifndef GPUCNN_HOST"
    raise HostCompileError(f"{title} does not compile for the host ({compiler}); {hint}:\n{said}")
