"""Imports only ever point down the list in the architecture: a module knows what is below it and nothing above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, KERNELS = ROOT / "gpucnn", ROOT / "kernels" / "gpucnn_kernels"

# From the top to the bottom; what shares a line may import its neighbours.
LINES = (
    ("cli", "__main__"),
    ("visualize",),
    ("interop",),
    ("models",),
    ("training",),
    ("gradient_check",),
    ("layers",),
    ("losses", "optimizers", "parameter_groups", "schedules", "metrics", "initializers", "parameters"),
    ("data",),
    ("ops",),
    ("device", "random", "recycling", "errors", "names"),
)
LEVELS = {name: level for level, line in enumerate(LINES) for name in line}


def modules(package: Path) -> list[Path]:
    return sorted(
        path for path in package.rglob("*.py") if path != PACKAGE / "__init__.py"
    )  # it offers everything


def part_of(module: str) -> str:
    """The place in the list: "gpucnn.ops.cpu" is of "ops"."""
    return module.split(".")[1] if "." in module else ""


def imported(tree: ast.AST, parts: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions too; "from gpucnn import x" is gpucnn.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide where they point"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield node.lineno, name if node.module == "gpucnn" and alias.name in parts else str(node.module)


def without_type_checking(tree: ast.Module) -> ast.Module:
    """Without the blocks that only a type checker reads."""

    class Remover(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                return node.orelse
            return self.generic_visit(node)

    return Remover().visit(tree)


def test_every_module_has_its_place() -> None:
    places = {part_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in modules(PACKAGE)}
    assert places <= set(LEVELS)


@pytest.mark.parametrize("path", modules(PACKAGE), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    place = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    tree = without_type_checking(ast.parse(path.read_text(encoding="utf-8")))
    upward = []
    for line, name in imported(tree, set(LEVELS)):
        target = part_of(name)
        if name.split(".")[0] == "gpucnn" and target in LEVELS and LEVELS[target] < LEVELS[place]:
            upward.append(f"line {line}: {name}")
    assert upward == [], f"{place} is below what it imports"


@pytest.mark.parametrize("path", modules(KERNELS), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_know_nothing_of_gpucnn(path: Path) -> None:
    names = [name for _, name in imported(ast.parse(path.read_text(encoding="utf-8")), set())]
    assert [name for name in names if name.split(".")[0] == "gpucnn"] == []


def test_the_scan_sees_an_upward_import() -> None:
    source = "def f():\n    from gpucnn import cli\n    import gpucnn.cli.train\n"
    assert [part_of(name) for _, name in imported(ast.parse(source), set(LEVELS))] == ["cli", "cli"]
