"""Rooms: each imports only rooms above it, wherever in a file the import stands; files and functions stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOMS = [
    "errors",
    "talk",
    "launch",
    "config",
    "memory",
    "rng",
    "recorded",
    "diffusion",
    "schedules",
    "networks",
    "checkpoint",
    "models",
    "losses",
    "samplers",
    "data",
    "editing",
    "training",
    "evaluation",
    "reporting",
    "interop",
    "theory",
    "api",
    "studio",
    "cli",
]
PACKAGE = Path(__file__).resolve().parent.parent / "cmtool"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ROOMS)
# A file of more than 400 lines says why here; none has more than 500.
LONG: dict[str, str] = {}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imported_rooms(tree: ast.AST, package: str) -> set[tuple[str, int]]:
    """Every room that a module imports: at the top, in functions, under TYPE_CHECKING; relative imports resolved."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from cmtool import rng` names the room in the imported word.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "cmtool" else [module]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {(part[1], node.lineno) for part in parts if part[0] == "cmtool" and len(part) > 1}
    return found


def violations(path: Path) -> list[str]:
    room = room_of(path)
    package = ".".join(["cmtool", *path.relative_to(PACKAGE).parts[:-1]])
    wrong = []
    for other, line in sorted(imported_rooms(ast.parse(path.read_text(encoding="utf-8")), package)):
        if other in ROOMS and ROOMS.index(other) > ROOMS.index(room):
            wrong.append(f"cmtool/{name_of(path)}:{line}: {room} imports {other}, which lies below it")
    return wrong


def test_every_file_belongs_to_a_room():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms <= set(ROOMS), f"no such rooms: {rooms - set(ROOMS)}"


def test_rooms_import_only_rooms_above_them():
    found = [violation for path in FILES for violation in violations(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import cmtool.training.loop", {"training"}),
        ("from cmtool import rng, data", {"rng", "data"}),
        ("def f():\n    from cmtool.cli.app import run", {"cli"}),
        ("if TYPE_CHECKING:\n    from cmtool.models import Model", {"models"}),
        ("from ..losses import parts", {"losses"}),
        ("from . import other", {"config"}),
        ("import cmtoolbox.data", set()),
    ],
)
def test_the_rule_sees_every_form_of_import(source, rooms):
    assert {room for room, _ in imported_rooms(ast.parse(source), "cmtool.config")} == rooms


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (500 if name_of(path) in LONG else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
            assert length <= 40, f"{node.name} has {length} lines"


def test_only_the_output_room_imports_rich():
    users = [path for path in PACKAGE.rglob("*.py") if "rich" in _top_names(path)]
    assert [name_of(path) for path in users] == ["cli/output.py"]


def test_settings_and_errors_never_import_torch_or_numpy():
    files = [PACKAGE / "errors.py", *(PACKAGE / "config").glob("*.py")]
    assert not [name_of(path) for path in files if {"torch", "numpy"} & _top_names(path)]


def _top_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names
