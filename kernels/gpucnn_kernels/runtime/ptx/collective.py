"""Instructions by which threads work together: barriers, atomics, shuffles, tensor cores, asynchronous copies."""

from __future__ import annotations

from gpucnn_kernels.runtime.ptx.operands import Operands, cpp_bool, only
from gpucnn_kernels.runtime.ptx.text import SIZES, TYPES

_FORMATS = {"tf32": "gpucnn_host::TF32", "f16": "gpucnn_host::HALF", "bf16": "gpucnn_host::BFLOAT16"}
EXPONENT_BITS = {"f16": 5, "bf16": 8}
_ATOMIC_TYPES = {
    "u32": "unsigned", "s32": "int", "b32": "unsigned", "u64": "unsigned long long", "b64": "unsigned long long",
    "s64": "long long", "f32": "float", "f64": "double",
}  # fmt: skip
_ATOMICS = {
    "add": "Add", "exch": "Exch", "min": "Min", "max": "Max", "and": "And", "or": "Or", "xor": "Xor", "cas": "CAS",
    "inc": "Inc", "dec": "Dec",
}  # fmt: skip


class Collective(Operands):
    """A method an instruction, ``do_`` and its name: of its modifiers and operands it makes a C++ statement.

    ValueError, KeyError and IndexError say that a form of it is not known.
    """

    def do_bar(self, modifiers: list[str], operands: list[str]) -> str:
        line = self.where.line
        if modifiers == ["warp", "sync"]:
            return f"warp_barrier({self.read(operands[0], 'u32')}, {line});"
        if modifiers == ["sync"] and operands == ["0"]:
            return f"gpucnn_host::block_barrier({line}, gpucnn_host::BARRIER, 0);"
        reduced, combination, kind = modifiers
        to, barrier, predicate = operands
        if (reduced, barrier) != ("red", "0"):
            raise ValueError(operands)
        name = {"popc": "BARRIER_COUNT", "and": "BARRIER_AND", "or": "BARRIER_OR"}[combination]
        value = f"gpucnn_host::block_barrier({line}, gpucnn_host::{name}, {self.read(predicate, 'pred')})"
        return self.write(to, kind, f"({TYPES[kind]})({value})")

    def do_atom(self, modifiers: list[str], operands: list[str]) -> str:
        words = [word for word in modifiers if word not in ("relaxed", "gpu", "acq_rel", "noftz")]
        space = words.pop(0) if words[0] in ("global", "shared") else "generic"
        operation, kind = words
        if kind in EXPONENT_BITS:
            function = {"add": "add_atomically"}[operation]
            place, value = self.address(operands[1], space), self.read(operands[2], kind)
            return self.write(
                operands[0], kind, f"{function}<{EXPONENT_BITS[kind]}>({place}, {value}, {self.where.line})"
            )
        place = f"({_ATOMIC_TYPES[kind]} *){self.address(operands[1], space)}"
        values = ", ".join(f"({_ATOMIC_TYPES[kind]}){self.read(operand, kind)}" for operand in operands[2:])
        aligned = f"check_aligned({self.address(operands[1], space)}, {SIZES[kind]}, {self.where.line}); "
        called = f"atomic{_ATOMICS[operation]}({place}, {values})"
        return aligned + self.write(operands[0], kind, f"({TYPES[kind]}){called}")

    def do_red(self, modifiers: list[str], operands: list[str]) -> str:
        return self.do_atom(modifiers, ["_", *operands])

    def do_shfl(self, modifiers: list[str], operands: list[str]) -> str:
        _, mode, kind = modifiers
        to, _, inside = operands[0].partition("|")
        value = self.read(operands[1], kind)
        lane, clamp, mask = (self.read(operand, "u32") for operand in operands[2:])
        arguments = f"{value}, {lane}, {clamp}, {mask}, inside, {self.where.line}"
        made = f"{{ bool inside; const unsigned moved = shuffle_{mode}({arguments}); "
        made += self.write(to, kind, "moved")
        return made + (f" {self.write(inside, 'pred', 'inside')}" if inside else "") + " }"

    def do_vote(self, modifiers: list[str], operands: list[str]) -> str:
        _, mode, kind = modifiers
        predicate, mask = self.read(operands[1], "pred"), self.read(operands[2], "u32")
        ballot = f"ballot({predicate}, {mask}, {self.where.line})"
        value = {"ballot": ballot, "any": f"({ballot} != 0)", "all": f"({ballot} == {mask})"}[mode]
        return self.write(operands[0], kind, value)

    def do_redux(self, modifiers: list[str], operands: list[str]) -> str:
        _, operation, kind = modifiers
        given = "int" if kind == "s32" else "unsigned"
        value, mask = self.read(operands[1], kind), self.read(operands[2], "u32")
        called = f"__reduce_{operation}_sync({mask}, ({given}){value}, {self.where.line})"
        return self.write(operands[0], kind, f"({TYPES[kind]}){called}")

    def do_ldmatrix(self, modifiers: list[str], operands: list[str]) -> str:
        only(modifiers, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "b16")
        registers = self.several(operands[0])
        if len(registers) != int(next(word for word in modifiers if word in ("x1", "x2", "x4"))[1]):
            raise ValueError(operands)
        place, transposed = self.address(operands[1], "shared"), cpp_bool("trans" in modifiers)
        arguments = f"words, {place}, {len(registers)}, {transposed}, {self.where.line}"
        made = f"{{ unsigned words[{len(registers)}]; gpucnn_host::load_matrices({arguments}); "
        return f"{made}{self.all_written(registers, 'b32', 'words')} }}"

    def do_mma(self, modifiers: list[str], operands: list[str]) -> str:
        *words, shape, by_row, by_column, sums, left_type, right_type, plus = modifiers
        only(words, "sync", "aligned")
        if (by_row, by_column, sums, plus) != ("row", "col", "f32", "f32") or left_type != right_type:
            raise ValueError(modifiers)
        depth = int(shape.removeprefix("m16n8k"))
        to, left, right, before = (self.several(operand) for operand in operands)
        words_of_left = depth // (2 if left_type == "tf32" else 4)
        if [len(part) for part in (to, left, right, before)] != [4, words_of_left, words_of_left // 2, 4]:
            raise ValueError(operands)
        made = f"{{ float sums[4] = {{{self.all_read(before, 'f32')}}}; "
        made += f"const unsigned left[] = {{{self.all_read(left, 'b32')}}}, "
        made += f"right[] = {{{self.all_read(right, 'b32')}}}; "
        arguments = f"sums, left, right, {_FORMATS[left_type]}, {depth}, {self.where.line}"
        made += f"gpucnn_host::multiply_matrices({arguments}); "
        return f"{made}{self.all_written(to, 'f32', 'sums')} }}"

    def do_cp(self, modifiers: list[str], operands: list[str]) -> str:
        _, *words = modifiers
        line = self.where.line
        if words == ["commit_group"]:
            return "gpucnn_host::commit_copies();"
        if words == ["wait_group"]:
            return f"gpucnn_host::wait_for_copies({int(operands[0])}, {line});"
        if words == ["wait_all"]:
            return f"gpucnn_host::wait_for_copies(-1, {line});"
        way, *spaces = words
        size = int(operands[2])
        if spaces != ["shared", "global"] or way not in ("ca", "cg") or (way == "cg" and size != 16):
            raise ValueError(modifiers)
        taken = str(size)
        if len(operands) == 4 and self.register_type(operands[3]) == "pred":
            taken = f"({self.read(operands[3], 'pred')} ? 0 : {size})"
        elif len(operands) == 4:
            taken = f"(int){self.read(operands[3], 'u32')}"
        to, source = self.address(operands[0], "shared"), self.address(operands[1], "global")
        return f"gpucnn_host::copy_async({to}, {source}, {size}, {taken}, {line});"

    def do_membar(self, modifiers: list[str], operands: list[str]) -> str:
        only(modifiers, "gl", "sys")
        return "gpucnn_host::thread_fence();"

    def do_fence(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers == ["proxy", "async", "shared__cta"]:
            return "gpucnn_host::show_to_products();"
        only(modifiers, "acq_rel", "sc", "gpu", "sys")
        return "gpucnn_host::thread_fence();"

    def do_wgmma(self, modifiers: list[str], operands: list[str]) -> str:
        what, *words = modifiers
        line = self.where.line
        if what == "fence":
            return f"gpucnn_host::begin_products({line});"
        if what == "commit_group":
            return f"gpucnn_host::commit_products({line});"
        if what == "wait_group":
            return f"gpucnn_host::wait_for_products({int(operands[0])}, {line});"
        sync, aligned, shape, sums_type, left_type, right_type = words
        columns = int(shape.removeprefix("m64n").removesuffix("k16"))
        sums = self.several(operands[0])
        left, right, adding, *scales = operands[1:]
        found = sync, aligned, sums_type, left_type, len(sums)
        if found != ("sync", "aligned", "f32", right_type, columns // 2):
            raise ValueError(modifiers)
        if scales != ["1", "1", "0", "0"]:
            raise ValueError(operands)
        made = f"{{ float sums[{len(sums)}] = {{{self.all_read(sums, 'f32')}}}; "
        made += f"if (!{self.read(adding, 'pred')}) for (float &sum : sums) sum = 0; "
        made += f"gpucnn_host::multiply_warpgroup_at_once(sums, {columns}, {self.read(left, 'b64')}, "
        made += f"{self.read(right, 'b64')}, {_FORMATS[left_type]}, {line}); "
        return f"{made}{self.all_written(sums, 'f32', 'sums')} }}"
