"""Operands of PTX instructions in C++: registers by scope, numbers, addresses in a space."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gpucnn_kernels.runtime.ptx.text import SIZES, TYPES, Entry, PtxError, Statement, Variable, split

SPECIAL = {
    **{f"%tid.{axis}": f"gpucnn_host::indices.thread.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"gpucnn_host::indices.block_size.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"gpucnn_host::indices.block.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"gpucnn_host::indices.grid_size.{axis}" for axis in "xyz"},
    "%laneid": "gpucnn_host::lane()",
    "WARP_SZ": "32u",
}
_HEXADECIMAL = re.compile(r"^0([fFdD])([0-9A-Fa-f]+)$")
_INTEGER = re.compile(r"^(-?)(0[xX][0-9a-fA-F]+|\d+)(U?)$")
_ADDRESS = re.compile(r"^\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)|(-\s*\d+))?\s*\]$")


def cpp_name(name: str) -> str:
    """A register's, a label's or a variable's name, as C++ can have it."""
    return "ptx_" + name.replace("%", "").replace("$", "_")


def cpp_bool(value: bool) -> str:
    """As C++ writes it."""
    return "true" if value else "false"


def only(words: Sequence[str], *allowed: str) -> None:
    """Raise ValueError where a modifier is none of these: the form of the instruction is not known."""
    if unknown := set(words) - set(allowed):
        raise ValueError(unknown)


class Operands:
    """What a kernel's instructions name. ``where`` is the statement that is being translated."""

    def __init__(self, entry: Entry, variables: Sequence[Variable]) -> None:
        self.entry = entry
        self.variables = {variable.name: variable for variable in variables}
        self.parameters = {name: index for index, (name, _, _) in enumerate(entry.parameters)}
        self.scopes: list[dict[str, str]] = []  # by scope, the type of each register by name
        self.where = Statement("code", "", 0)
        words = (re.findall(r"%?[\w$]+", part.text) for part in entry.body if not part.text.startswith(".reg"))
        self.used = {word for found in words for word in found}

    def refuse(self, what: str) -> PtxError:
        """The error that says so of the statement at hand."""
        return PtxError(f"{self.entry.name}, line {self.where.line}: {what}: {self.where.text}")

    def register_type(self, name: str) -> str | None:
        """The PTX type of a register; None: there is no such."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
            family = name.rstrip("0123456789")
            if family != name and f"{family}<" in scope:
                return scope[f"{family}<"]
        return None

    def read(self, operand: str, kind: str) -> str:
        """An operand as a C++ value of the PTX type ``kind``."""
        wanted = TYPES[kind]
        if operand.startswith("!"):
            return f"(!{self.read(operand[1:], kind)})"
        if operand in SPECIAL:
            return f"as<{wanted}>({SPECIAL[operand]})"
        own = self.register_type(operand)
        if own is not None:
            return cpp_name(operand) if TYPES[own] == wanted else f"as<{wanted}>({cpp_name(operand)})"
        if found := _HEXADECIMAL.match(operand):
            return f"as<{wanted}>(0x{found[2]}{'u' if found[1] in 'fF' else 'ul'})"
        if found := _INTEGER.match(operand):
            number = int(found[2], 0) * (-1 if found[1] else 1)
            if kind == "pred":
                return "true" if number else "false"
            if kind in ("f32", "f64"):
                raise self.refuse(f"the number {operand} as {kind}")
            return f"(({wanted})0x{number & ((1 << 8 * SIZES[kind]) - 1):x}ul)"
        if operand in self.variables or operand in self.parameters:
            return f"as<{wanted}>({self.symbol(operand)})"
        raise self.refuse(f"the operand {operand} is not known")

    def symbol(self, name: str) -> str:
        """A variable's address, in the space that it is of, as 64 bits."""
        if name in self.parameters:
            return f"parameter_address(arguments, {self.parameters[name]})"
        space = self.variables[name].space
        if space == "dynamic":
            return "shared_address(gpucnn_host::dynamic_shared_memory)"
        return f"shared_address({cpp_name(name)})" if space == "shared" else f"(unsigned long){cpp_name(name)}"

    def write(self, operand: str, kind: str, value: str) -> str:
        """The statement that gives ``value``, of the PTX type ``kind``, to a register."""
        if operand == "_":
            return f"(void)({value});"
        own = self.register_type(operand)
        if own is None:
            raise self.refuse(f"the register {operand} is not known")
        if TYPES[own] == TYPES[kind]:
            return f"{cpp_name(operand)} = {value};"
        if SIZES[own] < SIZES[kind]:
            raise self.refuse(f"{operand} is narrower than {kind}")
        return f"{cpp_name(operand)} = as<{TYPES[own]}>({value});"

    def address(self, operand: str, space: str) -> str:
        """``[register+4]`` as a pointer to unsigned char."""
        found = _ADDRESS.match(operand)
        if found is None:
            raise self.refuse(f"the address {operand}")
        own = self.register_type(found[1])
        offset = int((found[2] or found[3] or "0").replace(" ", ""), 0)
        if own is not None:
            base = f"as<unsigned {'long' if SIZES[own] == 8 else 'int'}>({cpp_name(found[1])})"
        else:
            base = self.symbol(found[1])
        if offset:
            base = f"({base} + ({offset}))"
        return f"shared_pointer({base})" if space.startswith("shared") else f"((unsigned char *)({base}))"

    def several(self, operand: str) -> list[str]:
        """The registers of ``{a, b}``, or the one."""
        return split(operand[1:-1]) if operand.startswith("{") else [operand]

    def all_read(self, operands: Sequence[str], kind: str) -> str:
        """Several as a list of C++ values."""
        return ", ".join(self.read(operand, kind) for operand in operands)

    def all_written(self, registers: Sequence[str], kind: str, array: str) -> str:
        """The statements that give the elements of an array to registers."""
        return " ".join(self.write(to, kind, f"{array}[{index}]") for index, to in enumerate(registers))

    def declare(self, kind: str, names: str) -> str:
        """Registers of the innermost scope; in C++ those in use: a family is declared to its last number."""
        scope = self.scopes[-1]
        declared = []
        for name in split(names):
            if found := re.match(r"^([%\w$]+)<(\d+)>$", name):
                scope[f"{found[1]}<"] = kind
                declared += [f"{found[1]}{number}" for number in range(int(found[2]))]
            else:
                scope[name] = kind
                declared.append(name)
        return "".join(f"{TYPES[kind]} {cpp_name(name)}; " for name in declared if name in self.used)
