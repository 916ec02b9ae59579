"""The name under which the package is published is its own: no sentence sends anybody to another project's."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from cmtool.errors import DISTRIBUTION, install_extra

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PLACES = ("cmtool", "docs", "presets", "benchmarks", "tests", ".github", ".ci", ".")
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".html", ".js", ".sh", ".txt", ""}
# Programs that fetch a distribution by its name, and then what they are told, up to the end of the command.
FETCH = re.compile(
    r"\b(?:pip3?(?:\.exe)? (?:install|download|wheel)|pipx (?:install|run)|uvx|uv tool (?:install|run)|uv add"
    r"|uv pip install|poetry add|conda install|mamba install|pixi add|hatch run)\b([^\n`&|;)#]*)"
)
FOREIGN = re.compile(r"(?<![\w./:@+-])cmtool(?:\[[\w, -]*\])?(?:(?:[=<>!~]=?|@)[^\s'\"]*)?(?![\w.\[-])")
EXTRA = re.compile(r"(?<![\w./-])cmtool\[[a-z]+(?:, ?[a-z]+)*\]")
INDEX = re.compile(r"pypi\.org/(?:project|simple|pypi)/cmtool(?![\w-])|anaconda\.org/[\w-]+/cmtool(?![\w-])")


def foreign(text):
    """What in `text` reaches the distribution called cmtool."""
    told = [match[1].replace("'", " ").replace('"', " ") for match in FETCH.finditer(text)]
    found = [match[0] for words in told for match in FOREIGN.finditer(words)]
    extras = [match[0] for match in EXTRA.finditer(text)]
    return found + extras + [match[0] for match in INDEX.finditer(text)]


def texts():
    """(place, text) of every file of the project that people read or copy from, this one left out."""
    for place in PLACES:
        files = (ROOT / place).glob("*") if place == "." else (ROOT / place).rglob("*")
        for file in files:
            if file.is_file() and file.suffix in TEXT and file != Path(__file__) and "__pycache__" not in file.parts:
                yield str(file.relative_to(ROOT)), file.read_text(encoding="utf-8", errors="replace")


def literal(node):
    """The text of a string, of pieces put together and of an f-string, with {} for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(value) or "{}" for value in node.values)
    return None


def messages():
    """(place, text) of every string in the package, as Python puts its pieces together."""
    for file in sorted((ROOT / "cmtool").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = literal(node)
            if text:
                yield f"{file.relative_to(ROOT)}:{node.lineno}", text


@pytest.mark.parametrize(
    "text",
    [
        "pip install cmtool",
        "pip install -U cmtool",
        "pip install 'cmtool[track]'",
        'python -m pip install "cmtool>=0.1"',
        "uv pip install torch cmtool",
        "uvx cmtool sample",
        "pipx run cmtool",
        "needs the extra cmtool[data]",
        "https://pypi.org/project/cmtool/",
    ],
)
def test_what_reaches_the_other_project_is_found(text):
    assert foreign(text)


@pytest.mark.parametrize(
    "text",
    [
        "pip install . && cmtool train-ct --preset digits",
        "pip install -e '.[test]' && pytest",
        "pip install '.[track]', then cmtool",
        f"pip install '{DISTRIBUTION}[track]'",
        f"pip install {DISTRIBUTION}",
        "pip install lpips",
        "pip install git+https://example.org/cmtool.git",
        "pip install dist/cmtool_consistency-0.1.0-py3-none-any.whl",
    ],
)
def test_what_does_not_is_let_pass(text):
    text = text.replace(", then cmtool", "` then `cmtool")
    assert not foreign(text)


def test_no_file_and_no_message_reaches_the_other_project():
    places = [*texts(), *messages()]
    assert len(places) > 3000 and {"README.md", "SECURITY.md", "cmtool/errors.py"} <= {place for place, _ in places}
    assert {place: foreign(text) for place, text in places if foreign(text)} == {}


def test_the_project_has_a_name_of_its_own_and_the_command_and_import_stay():
    assert PROJECT["name"] == DISTRIBUTION != "cmtool"
    assert PROJECT["scripts"] == {"cmtool": "cmtool.cli.app:main"}
    extras = set(PROJECT["optional-dependencies"])
    for place, text in messages():
        for named in re.findall(rf"{DISTRIBUTION}\[(\w+)\]", text):
            assert named in extras, place
    assert install_extra("track") == f"pip install '{DISTRIBUTION}[track]'" and "track" in extras


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md"])
def test_the_reader_is_told_that_the_other_one_is_not_ours(name):
    said = (ROOT / name).read_text(encoding="utf-8")
    assert any("another project" in part and DISTRIBUTION in part for part in re.split(r"\n\n|\n- ", said))


def test_nothing_looks_the_package_up_by_the_other_name():
    for file in sorted((ROOT / "cmtool").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", getattr(node.func, "attr", "")) if isinstance(node, ast.Call) else ""
            if name in ("version", "distribution", "metadata", "requires", "files", "find_distributions"):
                assert [literal(word) for word in node.args] != ["cmtool"], (file, node.lineno)


def test_the_package_check_takes_the_wheel_of_this_name():
    wheel = f"{DISTRIBUTION.replace('-', '_')}-*.whl"
    for script in (".ci/run", ".github/workflows/release.yml"):
        said = (ROOT / script).read_text(encoding="utf-8")
        assert wheel in said and "/*.whl" not in said, script
