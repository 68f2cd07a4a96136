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
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

INCLUDE = Path(__file__).parent / "host_include"
RUNTIME = INCLUDE / "runtime.cpp"

COMMON_FLAGS = (
    "-std=c++17",
    "-g1",
    "-gdwarf-4",  # addr2line (binutils 2.40) mistakes the first file of version 5
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
SHOWN_LINES = 24
SAY_AFTER_SECONDS = 1.0


class HostCompileError(RuntimeError):
    """The text does not compile for the host, or there is no compiler; the message says what to do."""


class HostUnavailableError(HostCompileError):
    """Nothing can be compiled for this machine: there is no compiler, or the system is not Linux."""


def build(text: str, kernels: Sequence[str], sanitize: bool) -> Path:
    """The shared library of this text, from the cache or compiled now. Raises HostCompileError."""
    if not kernels:
        raise ValueError("kernels must name at least one kernel of the text, got none")
    compiler = find_compiler()
    title = title_of(kernels)
    unit = translation_unit(text, kernels)
    flags = [*COMMON_FLAGS, *_machine_flags()]
    if sanitize:
        flags += SANITIZED_FLAGS
        flags += CLANG_SANITIZED_FLAGS if _is_clang(compiler) else GCC_SANITIZED_FLAGS
    else:
        flags += KERNEL_FLAGS
    key = _key(compiler, flags, unit)
    library = cache_folder() / f"{re.sub(r'[^A-Za-z0-9_]', '', kernels[0])[:40]}-{key}.so"
    if library.is_file():
        return library
    timer = threading.Timer(SAY_AFTER_SECONDS, _say_compiling, (title,))
    timer.daemon = True
    timer.start()
    try:
        runtime = _runtime_object(compiler)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix="compiling-") as scratch:
            unit_path = Path(scratch) / "unit.cpp"
            unit_path.write_text(unit, encoding="utf-8")
            made = Path(scratch) / "made.so"
            _compile(compiler, [*flags, *LINK_FLAGS, "-o", str(made), str(unit_path), str(runtime)], title)
            os.replace(made, library)
    finally:
        timer.cancel()
    return library


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
    """The path of ``$CXX``, g++ or clang++. Raises HostUnavailableError where there is none."""
    if platform.system() != "Linux":
        raise HostUnavailableError(f"the host runtime works on Linux, this is {platform.system()}")
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found:
            return found
    if asked:
        raise HostUnavailableError(
            f"the C++ compiler that CXX names is not there: '{asked}'; unset CXX or correct it"
        )
    raise HostUnavailableError(
        "no C++ compiler is there; install g++ (apt install g++, dnf install gcc-c++) or clang++"
    )


@functools.cache
def _version(compiler: str, changed: int) -> str:
    del changed  # the file's time: part of the memory's key, so that a new compiler is asked again
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _identity(compiler: str) -> str:
    return _version(compiler, os.stat(compiler).st_mtime_ns)


def _is_clang(compiler: str) -> bool:
    return "clang" in _identity(compiler)


def _machine_flags() -> list[str]:
    return ["-march=native"] if platform.machine() in ("x86_64", "aarch64") else []


@functools.cache
def _machine() -> str:
    """The processor's features, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join([platform.machine(), *dict.fromkeys(line for line in lines if line.startswith(kinds))])


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
    flags = [flag for flag in flags if not flag.startswith("-I")]
    parts = [compiler, _identity(compiler), _machine(), " ".join(flags), _headers(), unit]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _runtime_object(compiler: str) -> Path:
    flags = [*COMMON_FLAGS, *_machine_flags(), "-O2"]
    path = cache_folder() / f"runtime-{_key(compiler, flags, '')}.o"
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="compiling-") as scratch:
            made = Path(scratch) / "runtime.o"
            _compile(compiler, [*flags, "-c", "-o", str(made), str(RUNTIME)], "the host runtime")
            os.replace(made, path)
    return path


def _compile(compiler: str, arguments: Sequence[str], title: str) -> None:
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = (done.stderr or done.stdout).strip().splitlines()
    # The errors first, and the lines that show where; the notes after them rarely help.
    first = next((index for index, line in enumerate(lines) if " error: " in line or "undefined" in line), 0)
    shown = lines[first : first + SHOWN_LINES]
    if len(lines) > first + len(shown):
        shown.append(f"... and {len(lines) - first - len(shown)} more lines")
    hint = "correct the text, or see docs/host-runtime.md for what the host runtime supplies"
    if any(
        "no such instruction" in line or "impossible constraint" in line or "Assembler" in line for line in lines
    ):
        hint = "inline PTX is for NVRTC alone: use cuda/ptx.cuh's functions, or guard it with #ifndef GPUCNN_HOST"
    raise HostCompileError(f"{title} does not compile for the host ({compiler}); {hint}:\n" + "\n".join(shown))


def _say_compiling(title: str) -> None:
    print(f"gpucnn_kernels: compiling {title} for the host, first use", file=sys.stderr, flush=True)


# ---- the cache ----

_fallback: list[Path] = []


def cache_folder() -> Path:
    """Where compiled libraries are kept; a temporary folder, and a line on stderr, where that is not writable."""
    if os.environ.get("GPUCNN_KERNELS_CACHE"):
        root = Path(os.environ["GPUCNN_KERNELS_CACHE"])
    elif os.environ.get("XDG_CACHE_HOME"):
        root = Path(os.environ["XDG_CACHE_HOME"]) / "gpucnn_kernels"
    else:
        root = Path.home() / ".cache" / "gpucnn_kernels"
    folder = root / "host"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "it is not writable"
    except OSError as error:
        reason = str(error)
    if not _fallback:
        _fallback.append(Path(tempfile.mkdtemp(prefix="gpucnn-kernels-")))
        print(
            f"gpucnn_kernels: cannot keep compiled kernels in {folder} ({reason}); they go to {_fallback[0]} "
            "for this process (GPUCNN_KERNELS_CACHE names another folder)",
            file=sys.stderr,
            flush=True,
        )
    return _fallback[0]
