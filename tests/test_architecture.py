"""Rooms: each imports only rooms above it, wherever in a file the import stands, and no files import each other in a
circle; files and functions stay small."""

from __future__ import annotations

import ast
import functools
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import cmtool
from tests.import_graph import PACKAGE, circles, import_graph, named_imports

ROOMS = [
    "version",
    "errors",
    "units",
    "talk",
    "files",
    "machine",
    "config",
    "rng",
    "checkpoint",
    "data",
    "diffusion",
    "schedules",
    "networks",
    "models",
    "losses",
    "samplers",
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
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ROOMS)
# A file of more than 400 lines says why here; none has more than 500.
LONG: dict[str, str] = {
    "api/sample.py": "a wish, the job it becomes, and how one and several processes fill it are read as one",
    "config/combinations.py": "every reason to refuse a run stands in one list",
}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imported_rooms(tree: ast.AST, folder: str) -> set[str]:
    """Every room that a module of the package `folder` imports; "" is the face of the package itself."""
    found = set()
    for module, name in named_imports(tree, folder):
        first, *parts = module.split(".")
        if first == "cmtool":
            # `from cmtool import rng` names the room in the imported word, `from cmtool import load` the face.
            found.add(parts[0] if parts else name if name in ROOMS else "")
    return found


def violations(path: Path) -> list[str]:
    room = room_of(path)
    folder = ".".join(["cmtool", *path.relative_to(PACKAGE).parts[:-1]])
    rooms = imported_rooms(ast.parse(path.read_text(encoding="utf-8")), folder)
    below = [other for other in sorted(rooms) if not other or ROOMS.index(other) > ROOMS.index(room)]
    return [
        f"cmtool/{name_of(path)}: {room} imports {other or 'the package itself'}, which lies below it"
        for other in below
    ]


def test_every_file_belongs_to_a_room():
    rooms = {room_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms <= set(ROOMS), f"no such rooms: {rooms - set(ROOMS)}"


def test_rooms_import_only_rooms_above_them():
    found = [violation for path in FILES for violation in violations(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import cmtool", {""}),
        ("from cmtool import load", {""}),
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
    assert imported_rooms(ast.parse(source), "cmtool.config") == rooms


def test_no_files_import_each_other_in_a_circle():
    found = circles(import_graph())
    assert not found, "\n".join(" <-> ".join(sorted(circle)) for circle in found)


def test_a_circle_is_found_wherever_its_imports_stand(tmp_path):
    package = tmp_path / "cmtool"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("def __getattr__(name):\n    from cmtool import a\n    return a\n")
    (package / "a.py").write_text("from cmtool.inner import b\nimport cmtool.c\n")
    (package / "c.py").write_text("import os\n")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "b.py").write_text("if TYPE_CHECKING:\n    from ..d import D\n")
    (package / "d.py").write_text("def f():\n    import cmtool.a\n")
    assert circles(import_graph(package)) == [frozenset({"cmtool.a", "cmtool.inner.b", "cmtool.d"})]
    (package / "c.py").write_text("def f():\n    from cmtool import a\n")
    assert circles(import_graph(package)) == [frozenset({"cmtool.a", "cmtool.inner.b", "cmtool.d", "cmtool.c"})]


def test_every_imported_name_of_the_package_exists():
    """The type checker passes over modules it does not find."""
    found = [f"{place}: {name}" for place, code in written_code() for name in missing_names(code)]
    assert not found, "\n".join(found)


def test_a_name_that_is_gone_is_seen():
    code = "from cmtool.nowhere import x\nimport cmtool.errors, cmtool.gone\ndef f():\n    from cmtool.errors import A, UserError"
    assert set(missing_names(code)) == {"cmtool.nowhere", "cmtool.gone", "cmtool.errors.A"}
    assert not missing_names("from cmtool import load, data\nfrom cmtool.data import Dataset, listing")


def written_code() -> Iterator[tuple[str, str]]:
    """Yield (place, code) of all Python of the project: files, and blocks of the docs."""
    root = PACKAGE.parent
    for folder in ("cmtool", "tests", "benchmarks"):
        for path in (root / folder).rglob("*.py"):
            yield str(path.relative_to(root)), path.read_text(encoding="utf-8")
    for path in [root / "README.md", *(root / "docs").rglob("*.md")]:
        for block in re.findall(r"^ *```python\n(.*?)^ *```", path.read_text(encoding="utf-8"), re.M | re.S):
            yield str(path.relative_to(root)), textwrap.dedent(block)


def missing_names(code: str) -> set[str]:
    """Return what `code` imports from the package and is not there."""
    found = [(module, name) for module, name in named_imports(ast.parse(code), "") if module.split(".")[0] == "cmtool"]
    return {module for module, _ in found if top_names(module) is None} | {
        f"{module}.{name}" for module, name in found if name and name not in (top_names(module) or {name})
    }


@functools.cache
def top_names(module: str) -> set[str] | None:
    """Return what a module of the package defines, with its submodules; None if there is no such module."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not path.is_file():
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imports = (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
    names |= {alias.asname or alias.name for node in imports for alias in node.names}
    inside = place.iterdir() if place.is_dir() else []
    lazy = set(cmtool.__all__) if module == "cmtool" else set()
    return names | lazy | {entry.stem for entry in inside if entry.suffix == ".py" or (entry / "__init__.py").is_file()}


def test_only_the_command_line_imports_the_theory():
    importers = {module.split(".")[1] for module, names in import_graph().items() if any(_is_theory(n) for n in names)}
    assert importers <= {"theory", "cli"}


def _is_theory(module: str) -> bool:
    return module.split(".")[:2] == ["cmtool", "theory"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (500 if name_of(path) in LONG else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (body[-1].end_lineno - body[0].lineno + 1) if body else 0
            assert length <= 40, f"{node.name} has {length} lines"
            whole = node.end_lineno - node.lineno + 1
            assert whole <= 60, f"{node.name} has {whole} lines with its signature and docstring"


def test_functions_have_eleven_lines_on_average():
    lengths = [
        node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert sum(lengths) / len(lengths) <= 11


def test_commands_hand_their_options_on_by_name():
    """Not as `locals()`: what is looked up by a string no type checker sees."""
    users = {name_of(path) for path in (PACKAGE / "cli").glob("*.py") if "locals" in _called(path)}
    assert not users


def _called(path: Path) -> set[str]:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


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
