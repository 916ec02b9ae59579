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
from tests.cli.tiny import write_model
from tests.docs.blocks import ALL, COMMANDS, INLINE, ROOT, Block
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


def helps():
    for name in available():
        command = GROUP.get_command(None, name)
        inner = getattr(command, "commands", {})
        yield from ((f"{name} {sub}", inner[sub]) for sub in inner) if inner else [(name, command)]


@pytest.mark.parametrize(("name", "command"), list(helps()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_help_shows_a_command_that_can_be_typed(name, command):
    said = " ".join(filter(None, [command.help, command.epilog]))
    typed = re.findall(r"(cmtool [a-z].*?)(?= \||, then|, change|\.?$|\s{2}|\n\n|\. )", " ".join(said.split()))
    assert typed, f"cmtool {name} --help has no example"
    for line in typed:
        words = line.replace(">", " ").split()
        if words[1] in available():
            check(words[1:])


# --- running them ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that the pages speak of: photos, a mask, models of the right names. Tiny, so that minutes are seconds."""
    place = tmp_path_factory.mktemp("docs")
    from PIL import Image

    pixels = np.random.default_rng(0)
    picture = lambda side, mode: Image.fromarray(pixels.integers(0, 256, (side, side, 3), dtype=np.uint8)).convert(mode)  # noqa: E731
    for name in ("photo", "scribble", "noisy", "gray"):
        picture(16, "RGB").save(place / f"{name}.png")
    picture(8, "RGB").save(place / "small.png")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(place / "mask.png")
    (place / "photos").mkdir()
    for index in range(12):
        picture(64, "RGB").save(place / "photos" / f"{index}.png")
    demos = place / "demo"
    demos.mkdir()
    shapes = write_model(place, "shapes-demo", resolution=16, num_classes=5, names=list("abcde"))
    shapes.rename(demos / "shapes.safetensors")
    write_model(place, "digits-demo", channels=1, source="digits").rename(demos / "digits.safetensors")
    for name in ("shapes-demo", "digits-demo"):
        (place / "runs" / name).rmdir()
    return place


# Smaller networks, fewer steps and images: what is appended to a command before it is run here.
TINY_NETWORK = ["network.channels=8", "network.channel_mult=[1]", "network.head_channels=8", "network.attention=[]"]
PAGE_ORDER = ["docs/tutorial.md", "README.md", "docs/index.md"]


def tiny(words):
    """Return a command with settings that make it quick."""
    name, given = words[0], set(words)
    if name.startswith("train-"):
        more = [] if {"--dry-run", "--list-recipes"} & given else ["--set", "train.log_every=2"]
        sizes = [word for value in TINY_NETWORK for word in ("--set", value)]
        return (
            [*words, "--steps", "12"]
            if "--extend" in given
            else [*words, *more, *sizes, "--batch-size", "8", "--steps", "6"]
        )
    if name in ("eval", "search-times") and "--make-ref" not in given:
        few = ["--num", "30"] if not {"ours.npz", "photo.png"} & given else []
        return [*words, *few, *(["--metrics", "fid,pr"] if name == "eval" and "--metrics" not in given else [])]
    if name == "sample" and "ours.npz" in given:
        return [*words, "--num", "40"]
    if name == "interpolate":
        return [*words, "--num", "4"]
    return words


@pytest.fixture
def here(folder, monkeypatch):
    import cmtool.cli.train_judges as judges
    import cmtool.interop.names as names

    monkeypatch.chdir(folder)
    monkeypatch.setenv("CMTOOL_CACHE", str(folder / "cache"))
    monkeypatch.setattr(names, "DEMOS", folder / "demo")
    # The search for sampling times at the end of a training takes longer than everything else here together.
    monkeypatch.setattr(judges, "judges", lambda trainer, output: (None, None))
    return folder


def in_order(page):
    return (PAGE_ORDER.index(page) if page in PAGE_ORDER else len(PAGE_ORDER), page)


# Pages of background show long studies; their commands are checked word by word above, and run in tests of their own.
RUN_PAGES = sorted(
    {b.page for b, _ in COMMANDS if b.run and (b.page in PAGE_ORDER or b.page.startswith("docs/howto/"))}, key=in_order
)


@pytest.mark.slow
def test_every_command_block_runs(here, capfd):
    """One test for all pages: later ones use the runs that the tutorial made, as a reader would."""
    failed = []
    for page in RUN_PAGES:
        for block, words in COMMANDS:
            if block.page != page or not block.run or words[1] == "studio":
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
