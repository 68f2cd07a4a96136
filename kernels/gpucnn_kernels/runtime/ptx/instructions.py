"""Instructions of one thread: moving, arithmetic, bits, choosing, conversion, jumps."""

from __future__ import annotations

from collections.abc import Sequence

from gpucnn_kernels.runtime.ptx.collective import EXPONENT_BITS, Collective
from gpucnn_kernels.runtime.ptx.operands import cpp_bool, cpp_name, only
from gpucnn_kernels.runtime.ptx.text import SIZES, TYPES, split

# Families of instructions, by the functions of gpucnn_host_instructions.h.
ARITHMETIC = {
    "add": "add", "sub": "subtract", "fma": "fused", "neg": "negate", "abs": "absolute", "min": "minimum",
    "max": "maximum",
}  # fmt: skip
FUNCTIONS = {
    "rcp": "reciprocal", "sqrt": "square_root", "rsqrt": "reciprocal_square_root", "ex2": "power_of_two",
    "lg2": "binary_logarithm", "sin": "sine", "cos": "cosine", "tanh": "hyperbolic_tangent",
}  # fmt: skip
BITWISE = {"and": "&", "or": "|", "xor": "^"}
SHIFTS = {"shl": "shift_left", "shr": "shift_right"}
COUNTS = {"popc": "count_ones", "clz": "count_leading_zeros"}

_ROUNDINGS = {"rz": "TOWARD_ZERO", "rm": "DOWN", "rp": "UP"}
INTEGERS = {"u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64", "b16", "b32", "b64"}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def _part_type(kind: str, parts: int) -> str:
    """The type of bits of a part of ``kind``."""
    return f"b{8 * SIZES[kind] // parts}"


class Instructions(Collective):
    """A kernel's instructions as C++ statements."""

    def instruction(self, text: str) -> str:
        """One instruction, with what it depends on. Raises PtxError."""
        guard = ""
        if text.startswith("@"):
            condition, _, text = text.partition(" ")
            guard = f"if ({self.read(condition[1:], 'pred')}) "
            text = text.strip()
        operation, _, rest = text.partition(" ")
        base, *modifiers = operation.replace("::", "__").split(".")
        try:
            made = self._made(base, modifiers, split(rest))
        except (ValueError, KeyError, IndexError) as error:
            raise self.refuse("this form of the instruction is not known") from error
        return f"{guard}{{ {made} }}" if guard else made

    def _made(self, base: str, modifiers: list[str], operands: list[str]) -> str:
        for family, make in (
            (ARITHMETIC, self._arithmetic), (FUNCTIONS, self._function), (BITWISE, self._bitwise),
            (SHIFTS, self._shift), (COUNTS, self._count),
        ):  # fmt: skip
            if base in family:
                return make(family[base], modifiers, operands)
        handler = getattr(self, f"do_{base}", None)
        if handler is None:
            raise self.refuse("this instruction is not known")
        return str(handler(modifiers, operands))

    def do_bra(self, modifiers: list[str], operands: list[str]) -> str:
        only(modifiers, "uni")
        return f"goto {cpp_name(operands[0])};"

    def do_ret(self, modifiers: list[str], operands: list[str]) -> str:
        only(modifiers, "uni")
        return "return;"

    do_exit = do_ret

    def do_trap(self, modifiers: list[str], operands: list[str]) -> str:
        return f'gpucnn_host::fault({self.where.line}, "trap");'

    def do_mov(self, modifiers: list[str], operands: list[str]) -> str:
        (kind,) = modifiers
        to, source = operands
        if to.startswith("{"):
            parts = self.several(to)
            own = _part_type(kind, len(parts))
            values = [f"part<{TYPES[own]}, {index}>(whole)" for index in range(len(parts))]
            written = (
                self.write(part, own, value) for part, value in zip(parts, values, strict=True) if part != "_"
            )
            return f"{{ const {TYPES[kind]} whole = {self.read(source, kind)}; {' '.join(written)} }}"
        if source.startswith("{"):
            parts = self.several(source)
            joined = self.all_read(parts, _part_type(kind, len(parts)))
            return self.write(to, kind, f"joined<{TYPES[kind]}>({joined})")
        return self.write(to, kind, self.read(source, kind))

    def do_ld(self, modifiers: list[str], operands: list[str]) -> str:
        space, constant, count, kind = self._access(modifiers)
        registers = self.several(operands[0])
        if len(registers) != count:
            raise ValueError(operands)
        place = self.address(operands[1], space)
        if space == "param":
            loads = [f"load_parameter<{TYPES[kind]}>({place} + {SIZES[kind] * index})" for index in range(count)]
            if count == 1:
                return self.write(registers[0], kind, loads[0])
            return (
                "{" + " ".join(self.write(to, kind, load) for to, load in zip(registers, loads, strict=True)) + "}"
            )
        function = f"load_{'constant' if constant else 'from'}<{TYPES[kind]}, {count}>"
        made = f"{{ const auto loaded = {function}({place}, {self.where.line}); "
        for index, register in enumerate(registers):
            made += self.write(register, kind, f"loaded.part[{index}]") + " "
        return made + "}"

    def do_st(self, modifiers: list[str], operands: list[str]) -> str:
        space, _, count, kind = self._access(modifiers)
        values = self.several(operands[1])
        if len(values) != count or space == "param":
            raise ValueError(operands)
        listed = self.all_read(values, kind)
        place = self.address(operands[0], space)
        return f"store_to<{TYPES[kind]}, {count}>({place}, {{{{{listed}}}}}, {self.where.line});"

    @staticmethod
    def _access(modifiers: list[str]) -> tuple[str, bool, int, str]:
        """(space, whether by the way of constants, numbers, type) of a load or a store."""
        rest = list(modifiers)
        kind = rest.pop()
        count = 1
        if rest and rest[-1] in ("v2", "v4", "v8"):
            count = int(rest.pop()[1])
        space = "generic"
        constant = False
        for word in rest:
            if word in ("global", "shared", "param", "const", "local", "shared__cta"):
                space = word
            elif word == "nc":
                constant = True
            elif word not in ("ca", "cg", "cs", "cv", "wb", "wt", "volatile", "weak"):
                raise ValueError(word)
        return space, constant, count, kind

    def do_cvta(self, modifiers: list[str], operands: list[str]) -> str:
        # Addresses of global memory are the same in both; those of shared memory are offsets in its own space.
        kind = modifiers[-1]
        words = modifiers[:-1]
        value = self.read(operands[1], kind)
        if words[-1] in ("shared",):
            value = (
                f"shared_address((void *)({value}))"
                if words[0] == "to"
                else f"(unsigned long)shared_pointer({value})"
            )
        elif words[-1] not in ("global", "param", "const", "local"):
            raise ValueError(words)
        return self.write(operands[0], kind, f"as<{TYPES[kind]}>({value})")

    def _flags(self, modifiers: list[str]) -> tuple[str, str, bool, bool, list[str]]:
        """(type, rounding, flushes, saturates, the rest) of an instruction's modifiers."""
        kind = modifiers[-1]
        rest = [word for word in modifiers[:-1] if word not in ("ftz", "sat", "rn", "rz", "rm", "rp")]
        rounding = next((word for word in modifiers[:-1] if word in ("rn", "rz", "rm", "rp")), "rn")
        return kind, rounding, "ftz" in modifiers, "sat" in modifiers, rest

    def _arithmetic(self, name: str, modifiers: list[str], operands: list[str]) -> str:
        kind, rounding, flushes, saturates, rest = self._flags(modifiers)
        if rest:
            raise ValueError(rest)
        values = self.all_read(operands[1:], kind)
        if kind in ("f32", "f64"):
            directed = f", {_ROUNDINGS[rounding]}" if rounding != "rn" else ""
            name += "_rounded" if directed else "_number"
            value = f"{name}<{TYPES[kind]}, {cpp_bool(flushes)}{directed}>({values})"
        elif kind in INTEGERS:
            value = f"{name}_integer<{TYPES[kind]}>({values})"
        else:
            raise ValueError(kind)
        return self.write(operands[0], kind, f"saturated({value})" if saturates else value)

    def do_copysign(self, modifiers: list[str], operands: list[str]) -> str:
        (kind,) = modifiers
        return self.write(operands[0], kind, f"with_sign<{TYPES[kind]}>({self.all_read(operands[1:], kind)})")

    def do_mul(self, modifiers: list[str], operands: list[str]) -> str:
        kind = modifiers[-1]
        if kind in ("f32", "f64"):
            return self._arithmetic("multiply", modifiers, operands)
        way, _ = modifiers
        values = self.all_read(operands[1:], kind)
        if way == "wide":
            wide = kind[0] + str(int(kind[1:]) * 2)
            return self.write(operands[0], wide, f"multiply_wide<{TYPES[wide]}>({values})")
        return self.write(
            operands[0], kind, f"multiply_{ {'lo': 'low', 'hi': 'high'}[way] }<{TYPES[kind]}>({values})"
        )

    def do_mad(self, modifiers: list[str], operands: list[str]) -> str:
        way, kind = modifiers
        left, right, plus = operands[1:]
        if way == "wide":
            wide = kind[0] + str(int(kind[1:]) * 2)
            product = f"multiply_wide<{TYPES[wide]}>({self.read(left, kind)}, {self.read(right, kind)})"
            kind = wide
        else:
            name = {"lo": "low", "hi": "high"}[way]
            product = f"multiply_{name}<{TYPES[kind]}>({self.read(left, kind)}, {self.read(right, kind)})"
        return self.write(operands[0], kind, f"add_integer<{TYPES[kind]}>({product}, {self.read(plus, kind)})")

    def do_div(self, modifiers: list[str], operands: list[str]) -> str:
        kind = modifiers[-1]
        if kind in ("f32", "f64"):
            words = [word for word in modifiers if word not in ("approx", "full")]
            return self._arithmetic("divide", words, operands)
        (kind,) = modifiers
        values = self.all_read(operands[1:], kind)
        return self.write(operands[0], kind, f"divide_integer<{TYPES[kind]}>({values}, {self.where.line})")

    def do_rem(self, modifiers: list[str], operands: list[str]) -> str:
        (kind,) = modifiers
        values = self.all_read(operands[1:], kind)
        return self.write(operands[0], kind, f"remainder_integer<{TYPES[kind]}>({values}, {self.where.line})")

    def _function(self, name: str, modifiers: list[str], operands: list[str]) -> str:
        words = [word for word in modifiers if word not in ("approx", "rn")]
        kind, _, flushes, _, rest = self._flags(words)
        if rest or any(word in modifiers for word in ("rz", "rm", "rp")):
            raise ValueError(modifiers)
        if kind == "f64" and "approx" in modifiers:
            name += "_rough"
        return self.write(
            operands[0], kind, f"{name}<{TYPES[kind]}, {cpp_bool(flushes)}>({self.read(operands[1], kind)})"
        )

    def _bitwise(self, symbol: str, modifiers: list[str], operands: list[str]) -> str:
        (kind,) = modifiers
        left, right = (self.read(operand, kind) for operand in operands[1:])
        return self.write(operands[0], kind, f"({TYPES[kind]})({left} {symbol} {right})")

    def do_not(self, modifiers: list[str], operands: list[str]) -> str:
        (kind,) = modifiers
        value = self.read(operands[1], kind)
        return self.write(operands[0], kind, f"(!{value})" if kind == "pred" else f"({TYPES[kind]})(~{value})")

    def _shift(self, name: str, modifiers: list[str], operands: list[str]) -> str:
        (kind,) = modifiers
        value, by = self.read(operands[1], kind), self.read(operands[2], "u32")
        return self.write(operands[0], kind, f"{name}<{TYPES[kind]}>({value}, {by})")

    def _bits(self, name: str, types: Sequence[str], modifiers: list[str], operands: list[str]) -> str:
        """Of a type, and operands of their own types ("" is that type)."""
        kind = modifiers[-1]
        values = [self.read(operand, own or kind) for operand, own in zip(operands[1:], types, strict=True)]
        return self.write(operands[0], kind, f"{name}<{TYPES[kind]}>({', '.join(values)})")

    def do_bfi(self, modifiers: list[str], operands: list[str]) -> str:
        return self._bits("insert_field", ["", "", "u32", "u32"], modifiers, operands)

    def do_bfe(self, modifiers: list[str], operands: list[str]) -> str:
        return self._bits("extract_field", ["", "u32", "u32"], modifiers, operands)

    def do_prmt(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers != ["b32"]:
            raise ValueError(modifiers)
        return self._bits("permute", ["", "", "u32"], modifiers, operands)

    def _count(self, name: str, modifiers: list[str], operands: list[str]) -> str:
        (kind,) = modifiers
        return self.write(operands[0], "u32", f"{name}<{TYPES[kind]}>({self.read(operands[1], kind)})")

    def do_bfind(self, modifiers: list[str], operands: list[str]) -> str:
        *shift, kind = modifiers
        value = f"find_leading<{TYPES[kind]}, {cpp_bool(shift == ['shiftamt'])}>({self.read(operands[1], kind)})"
        return self.write(operands[0], "u32", value)

    def do_brev(self, modifiers: list[str], operands: list[str]) -> str:
        return self._bits("reversed", [""], modifiers, operands)

    def do_lop3(self, modifiers: list[str], operands: list[str]) -> str:
        return self._bits("logic", ["", "", "", "u32"], modifiers, operands)

    def do_shf(self, modifiers: list[str], operands: list[str]) -> str:
        direction, mode, kind = modifiers
        return self._bits(f"funnel_{direction}_{mode}", ["", "", "u32"], [kind], operands)

    def do_setp(self, modifiers: list[str], operands: list[str]) -> str:
        comparison, *words = modifiers
        kind = words.pop()
        combine = next((word for word in words if word in BITWISE), None)
        left, right = (self.read(operand, kind) for operand in operands[1:3])
        if kind in ("f32", "f64"):
            value = f"compare_{comparison}<{TYPES[kind]}, {cpp_bool('ftz' in words)}>({left}, {right})"
        else:
            value = f"({left} {_COMPARISONS[comparison]} {right})"
        if combine is not None:
            value = f"({value} {BITWISE[combine]} {self.read(operands[3], 'pred')})"
        if "|" in operands[0]:
            raise ValueError(operands)
        return self.write(operands[0], "pred", value)

    def do_selp(self, modifiers: list[str], operands: list[str]) -> str:
        (kind,) = modifiers
        yes, no = self.read(operands[1], kind), self.read(operands[2], kind)
        return self.write(operands[0], kind, f"({self.read(operands[3], 'pred')} ? {yes} : {no})")

    def do_cvt(self, modifiers: list[str], operands: list[str]) -> str:
        *words, to, source = modifiers
        if to in ("f16x2", "bf16x2"):
            high, low = (self.read(operand, "f32") for operand in operands[1:])
            return self.write(operands[0], to, f"narrow_pair<{EXPONENT_BITS[to[:-2]]}>({high}, {low})")
        value = self.read(operands[1], source)
        flushes, saturates = cpp_bool("ftz" in words), "sat" in words
        rounding = next((word for word in words if word[0] == "r"), "")
        only(words, "ftz", "sat", "rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi")
        floating = ("f32", "f64")
        if to in INTEGERS and source in INTEGERS:
            made = f"({TYPES[to]}){value}"
            if saturates:
                raise ValueError(modifiers)
        elif to in floating and source in INTEGERS:
            if rounding != "rn":
                raise ValueError(modifiers)
            made = f"({TYPES[to]}){value}"
        elif to in INTEGERS and source in floating:
            made = f"to_integer<{TYPES[to]}, {TYPES[source]}, {flushes}>(whole_{rounding}({value}))"
        elif to in floating and source in ("f16", "bf16"):
            made = f"({TYPES[to]})gpucnn_host::Format<{EXPONENT_BITS[source]}>::widen({value})"
        elif to in ("f16", "bf16") and source in floating:
            if rounding != "rn":
                raise ValueError(modifiers)
            made = f"gpucnn_host::Format<{EXPONENT_BITS[to]}>::narrow({value})"
        elif to == "tf32":
            made = f"to_tf32_{rounding}({value})"
        elif to in floating and source in floating:
            if rounding in ("rni", "rzi", "rmi", "rpi"):
                value = f"whole_{rounding}({value})"
            elif rounding not in ("", "rn"):
                raise ValueError(modifiers)
            made = f"to_number<{TYPES[to]}, {TYPES[source]}, {flushes}>({value})"
            made = f"saturated({made})" if saturates else made
        else:
            raise ValueError(modifiers)
        return self.write(operands[0], to, made)
