"""What README and docs tell people to type is there, and runs: on tiny settings, page after page in one folder."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from cmtool.cli.app import app, available, run
from cmtool.config.load import resolve
from tests.docs.blocks import ALL, COMMANDS, INLINE, ROOT, Block
from tests.docs.help_examples import HELPS, examples
from tests.docs.tiny import lay_out, tiny
from tests.reporting.run_makers import write_run

GROUP = typer.main.get_command(app)
# Words that stand for something of the reader's.
STAND_INS = {"X", "NAME", "COMMAND", "WORDS", "RUN", "TEACHER", "SRC", "..."}


def find(words):
    """The click command that `words` (after cmtool) name, and the words that are left."""
    assert words[0] in available(), f"there is no command {words[0]}"
    command = GROUP.get_command(None, words[0])
    if words[1:] and words[1] in getattr(command, "commands", {}):
        return command.commands[words[1]], words[2:]
    return command, words[1:]


def check(words):
    command, rest = find(words)
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    options = {word.split("=")[0] for word in rest if re.match(r"-[-a-z]", word)}
    assert options <= known | {"--help", "-h"}, f"cmtool {' '.join(words)}: no option {options - known}"
    given = dict(itertools.pairwise(rest))
    preset = given.get("--preset", "")
    if words[0].startswith("train-") and preset and not preset.endswith(".toml"):
        sets = [value for option, value in itertools.pairwise(rest) if option == "--set"]
        resolve(preset, family=words[0].removeprefix("train-"), recipe=given.get("--recipe"), sets=sets)


@pytest.mark.parametrize(
    ("block", "words"), COMMANDS, ids=lambda value: f"{value.page}:{value.line}" if isinstance(value, Block) else ""
)
def test_every_command_has_its_options_and_settings(block, words):
    check(words[1:])


@pytest.mark.parametrize(
    ("page", "words"), INLINE, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_every_command_in_a_sentence_has_its_options(page, words):
    if not STAND_INS & set(words) and words[1:] and not words[1].startswith("-"):
        check([word.split("=")[0] if word.endswith("...") else word for word in words[1:]])


@pytest.mark.parametrize("name", HELPS)
def test_every_help_shows_a_command_that_can_be_typed(name):
    typed = examples(HELPS[name])
    assert typed, f"cmtool {name} --help has no example"
    for line in typed:
        words = line.replace(">", " ").split()
        if words[1] in available():
            check(words[1:])


# --- running them ---

PAGE_ORDER = ["docs/tutorial.md", "README.md", "docs/index.md"]


def in_order(page):
    return (PAGE_ORDER.index(page) if page in PAGE_ORDER else len(PAGE_ORDER), page)


RUN_PAGES = sorted({block.page for block, _ in COMMANDS if block.run}, key=in_order)
# Serves until it is stopped: tests/browser.
NOT_HERE = ("studio",)


@pytest.mark.slow
def test_every_command_block_runs(here, capfd):
    """One test for all pages: later ones use the runs that the tutorial made, as a reader would."""
    lay_out(here)
    failed = []
    for page in RUN_PAGES:
        for block, words in COMMANDS:
            if block.page != page or not block.run or block.launched or words[1] in NOT_HERE:
                continue
            code = run(tiny(words[1:]))
            said = capfd.readouterr()
            if code != 0:
                failed.append(f"{page}:{block.line}: {' '.join(words)}\n  {said.err.strip()[-300:]}")
    assert not failed, "\n".join(failed)


def test_the_commands_of_the_readme_run(here, capfd):
    for block, words in COMMANDS:
        if block.page == "README.md" and block.run and "eval" not in words:
            assert run(tiny(words[1:])) == 0, f"{' '.join(words)}: {capfd.readouterr().err}"


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "python" and "import cmtool" in block.text],
                         ids=lambda block: f"{block.page}:{block.line}")  # fmt: skip
def test_every_program_runs(here, block):
    """Programs as they stand, but judged by few samples."""
    torch.manual_seed(0)
    text = re.sub(r"num=200", "num=30", block.text)
    exec(compile(text, f"{block.page}:{block.line}", "exec"), {})  # the project's own pages


# --- troubleshooting ---

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^### (.+)\n<!-- (provoked by|said by): (.+) -->$", TEXT, flags=re.M)


def test_every_entry_of_troubleshooting_says_where_its_sentence_is_from():
    assert len(ENTRIES) == len(re.findall("^### ", TEXT, flags=re.M)) > 20


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder in which every mistake of the page can be made."""
    from PIL import Image

    place = tmp_path_factory.mktemp("wrong")
    (place / "empty").mkdir()
    gray = write_run(place / "runs", "gray")
    for file in ("metrics.jsonl", "run.log"):
        (gray / file).unlink()
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(place / "photo.png")
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(place / "black.png")
    Image.fromarray(np.full((16, 8), 255, dtype=np.uint8)).save(place / "narrow.png")
    (place / "broken.safetensors").write_bytes(b"x" * 100)
    return place


@pytest.mark.parametrize(("sentence", "how", "source"), ENTRIES, ids=lambda text: text[:40])
def test_the_sentences_of_troubleshooting_are_real(wrong, monkeypatch, tmp_path, capfd, sentence, how, source):
    if how == "said by":
        code = "".join((ROOT / source).read_text(encoding="utf-8").split('"\n'))
        assert sentence in code.replace('f"', '"').replace('            "', ""), f"{source} no longer says: {sentence}"
        return
    if "cuda" in source and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path if source == "cmtool sample" else wrong)
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    assert run(source.split()[1:]) in (1, 2)
    said = " ".join(capfd.readouterr().err.split())
    assert sentence in said, said


def test_the_site_builds_strictly(tmp_path):
    mkdocs = pytest.importorskip("mkdocs.commands.build", reason="needs the extra docs: pip install '.[docs]'")
    pytest.importorskip("material", reason="needs the extra docs: pip install '.[docs]'")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    mkdocs.build(config)
    page = (tmp_path / "site" / "reference" / "commands.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in available())
    assert Path(tmp_path / "site" / "index.html").is_file()
