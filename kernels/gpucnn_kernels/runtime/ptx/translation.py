"""A C++ translation unit for the host runtime of a PTX program."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gpucnn_kernels.runtime.ptx.instructions import Instructions
from gpucnn_kernels.runtime.ptx.operands import cpp_name
from gpucnn_kernels.runtime.ptx.text import TYPES, Entry, PtxError, Variable, read_program, variable

_REGISTERS = re.compile(r"^\.reg\s+\.(\w+)\s+(.*)$", re.DOTALL)


class _Function(Instructions):
    """One kernel's translation."""

    def __init__(self, entry: Entry, variables: Sequence[Variable], title: str) -> None:
        super().__init__(entry, variables)
        self.title = title
        self.shared = [found for found in variables if found.space == "shared" and found.name in self.used]
        self.own: list[Variable] = []  # those that it declares itself

    def definition(self) -> list[str]:
        """The lines of the function, with the shared variables that are its own in front."""
        lines = list(self._lines())
        uses = [
            f"const gpucnn_host::SharedUse use_{name}(slot_{name}, {name});"
            for name in (cpp_name(found.name) for found in self.shared + self.own)
        ]
        declared = [line for found in self.own for line in _shared(found)]
        return [*declared, f"void {self.entry.name}(void **arguments) {{", *uses, *lines, "}"]

    def _lines(self) -> Iterator[str]:
        for statement in self.entry.body:
            self.where = statement
            if statement.kind == "open":
                self.scopes.append({})
                yield "{"
            elif statement.kind == "close":
                self.scopes.pop()
                yield ";}"
            elif statement.kind == "label":
                yield f"{cpp_name(statement.text)}: ;"
            elif made := self._code(statement.text):
                yield f'#line {statement.line} "{self.title}"\n{made}' if statement.line else made

    def _code(self, text: str) -> str:
        if text.startswith(".pragma"):
            return ""
        if found := _REGISTERS.match(text):
            return self.declare(found[1], found[2])
        declared = variable(text)
        if declared is None:
            return self.instruction(text)
        self.variables[declared.name] = declared
        if declared.space == "shared":
            self.own.append(declared)
            return ""
        if declared.space != "local":
            raise self.refuse("a variable inside a kernel")
        return f"alignas({declared.alignment}) unsigned char {cpp_name(declared.name)}[{declared.size}];"


def translate(ptx: str, kernels: Sequence[str], title: str) -> str:
    """The C++ translation unit of these kernels of ``ptx``, for the host runtime.

    ``title`` is the name of the source that its lines are of. Raises PtxError for what is not known.
    """
    entries, variables = read_program(ptx)
    if missing := [name for name in kernels if name not in entries]:
        raise PtxError(
            f"{title}: the PTX has no kernel {', '.join(missing)}; it has {', '.join(entries) or 'none'}"
        )
    functions = [_Function(entries[name], variables, title) for name in kernels]
    used = set().union(*(function.used for function in functions))
    lines = ['#include "gpucnn_host_instructions.h"', "namespace {"]
    for found in variables:
        if found.name in used:
            lines += _declared(found)
    for function in functions:
        lines += function.definition()
    listed = []
    for function in functions:
        name, parameters = function.entry.name, function.entry.parameters
        sizes = ", ".join([*(str(size) for _, _, size in parameters), "0"])
        kinds = "".join(_letter(kind, size) for _, kind, size in parameters)
        lines.append(f"static const unsigned long sizes_of_{name}[] = {{{sizes}}};")
        listed.append(f'{{"{name}", {name}, {len(parameters)}, sizes_of_{name}, "{kinds}"}}')
    lines += [
        "}",
        f"static const gpucnn_host::Kernel list[] = {{{', '.join(listed)}}};",
        'extern "C" GPUCNN_HOST_VISIBLE const gpucnn_host::Kernel *gpucnn_host_kernels() { return list; }',
        "",
    ]
    return "\n".join(lines)


def _declared(found: Variable) -> list[str]:
    """A variable of the whole program."""
    if found.space == "dynamic":
        return []
    if found.space == "shared":
        return _shared(found)
    initial = found.initial if found.initial.startswith("{") else f"{{{found.initial}}}"
    kind, name = TYPES[found.kind], cpp_name(found.name)
    return [f"alignas({found.alignment}) static {kind} {name}[{found.count}] = {initial};"]


def _shared(found: Variable) -> list[str]:
    name = cpp_name(found.name)
    return [
        f"alignas({found.alignment}) static unsigned char {name}[{found.size}];",
        f"static gpucnn_host::SharedSlot slot_{name};",
    ]


def _letter(kind: str, size: int) -> str:
    """What a parameter may be given: of eight bytes, PTX does not tell a pointer from a number."""
    if kind == "struct":
        return "s"
    if kind.startswith("f") and size > 2:
        return "f"
    return "w" if size == 8 else "i"
