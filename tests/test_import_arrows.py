"""Imports flow one way, and rooms on one level do not see each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxmerge

ROOT = Path(fxmerge.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

#: Room or file at the top -> level. Each imports what is below it only. ``""`` is the package itself, the public names.
LEVELS = {
    "errors": 0, "_version": 0,
    "core": 1, "data": 1, "budget": 1, "quick_noise": 1,
    "algebra": 2, "graph": 2, "solve": 2, "testing": 2,
    "operators": 3, "stand_in": 3,
    "analysis": 4, "passes": 4,
    "measure": 5,
    "tune": 6, "saved": 6, "survey": 6, "interchange": 6,
    "result": 7, "search": 7,
    "trials": 8,
    "compress": 9,
    "": 10, "backend": 10, "demo": 10,
    "cli": 11,
    "__main__": 12,
}  # fmt: skip

#: Room -> what it does without: what is computed apart from what is edited, what must start fast apart from torch.
WITHOUT = {
    "errors": ("torch", "numpy"),
    "core": ("torch.fx", "torch.nn"),
    "algebra": ("torch.fx",),
    "solve": ("torch",),
}


def room(path: Path) -> str:
    inside = path.relative_to(ROOT)
    name = inside.parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imported(tree: ast.AST) -> Iterator[str]:
    """Qualified names of everything imported anywhere in a file; of ``from a import b``, ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(path: Path) -> set[str]:
    return set(imported(ast.parse(path.read_text(encoding="utf-8"))))


def rooms_seen(path: Path) -> set[str]:
    """The rooms of ours that a file imports from."""
    ours = [name.split(".") for name in names(path) if name.split(".")[0] == "fxmerge"]
    return {parts[1] if len(parts) > 1 and parts[1] in LEVELS else "" for parts in ours if parts != ["fxmerge"]} | (
        {""} if _imports_the_package(path) else set()
    )


def _imports_the_package(path: Path) -> bool:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return any(alias.name == "fxmerge" for node in nodes if isinstance(node, ast.Import) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_is_below_it_or_in_its_own_room(path: Path) -> None:
    mine = room(path)
    assert mine in LEVELS, f"give {mine} a level"
    above = {seen for seen in rooms_seen(path) - {mine} if LEVELS[seen] >= LEVELS[mine]}
    assert not above, f"{path.relative_to(ROOT)} sees {above}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_does_without_what_is_not_its_business(path: Path) -> None:
    barred = WITHOUT.get(room(path), ())
    found = {name for name in names(path) for bar in barred if name == bar or name.startswith(bar + ".")}
    assert not found


def test_every_level_is_a_room() -> None:
    assert {room(path) for path in FILES} == set(LEVELS)


def test_the_parser_sees_all_kinds_of_imports() -> None:
    code = "import a.b, c\nfrom d import e\ndef f():\n    from g.h import i as j\n"
    assert set(imported(ast.parse(code))) == {"a.b", "c", "d", "d.e", "g.h", "g.h.i"}


def test_no_operator_is_named_outside_the_room_of_operators() -> None:
    """A new operator is a new file there, and nothing else."""
    for path in FILES:
        if room(path) in ("core", "solve", "analysis"):
            assert not {name for name in names(path) if name.startswith("torch.nn")}, path


@pytest.mark.parametrize("module", ["fxmerge.solve.frontier", "fxmerge.core.plan", "fxmerge.analysis.cuts"])
def test_a_room_can_be_imported_by_itself(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import {module}"], cwd=ROOT.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_stand_there_once() -> None:
    assert len(fxmerge.__all__) == len(set(fxmerge.__all__))
    for name in fxmerge.__all__:
        assert getattr(fxmerge, name) is not None
