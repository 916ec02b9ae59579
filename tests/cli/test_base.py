"""The frame of the command line: help, versions, exit codes, one sentence for every failure, clean streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cmtool.cli.app import COMMANDS, available
from cmtool.cli.failure import describe
from cmtool.cli.output import Output
from cmtool.config.find import list_presets
from cmtool.config.load import read_preset, resolve
from cmtool.errors import UsageError, UserError


def test_help_lists_every_command_with_its_line(cmtool):
    for words in (["--help"], ["-h"], []):
        typed = cmtool(*words)
        assert typed.code == 0 and typed.err == ""
        for name in available():
            assert f"  {name} " in typed.out and COMMANDS[name].help.split()[0] in typed.out
    assert max(map(len, typed.out.splitlines())) <= 80


@pytest.mark.parametrize("name", available())
def test_every_command_has_help(cmtool, name):
    typed = cmtool(name, "--help")
    assert typed.code == 0, typed.err
    assert typed.out.startswith(f"Usage: cmtool {name} ")


@pytest.mark.parametrize("name", ["edit", "data", "theory", "runs"])
def test_the_list_of_a_group_is_whole(cmtool, name):
    said = cmtool(name, "--help").out.split("Commands:\n")[1]
    assert "..." not in said and all(line.endswith(".") for line in said.splitlines())


@pytest.mark.parametrize("name", [*available(), "edit inpaint", "data make", "theory scaling"])
def test_help_is_plain_and_fits_80_columns(cmtool, name):
    said = cmtool(*name.split(), "--help").out
    assert max(map(len, said.splitlines())) <= 80
    assert "\x1b" not in said and "\b" not in said


def test_examples_stand_one_below_another_and_can_be_copied():
    from cmtool.cli.app import lay_out_examples

    long = "cmtool edit inpaint --mask mask.png photo.png --model demo/shapes --num 6 --grid --paste --out strip.png"
    said = lay_out_examples(f"What it does.\n\nExamples: cmtool runs | {long}, then:\n    cmtool report.")
    assert said.startswith("What it does.\n\n\b\nExamples:\n  cmtool runs\n  cmtool edit inpaint --mask")
    lines = said.split("Examples:\n")[1].splitlines()
    assert max(map(len, lines)) <= 76 and len(lines) == 4
    typed = "\n".join(lines).replace("\\\n", " ")
    assert [" ".join(line.split()) for line in typed.splitlines()] == ["cmtool runs", long, "cmtool report"]
    assert lay_out_examples("No word of it.") == "No word of it." and lay_out_examples(None) is None


def test_version(cmtool):
    assert cmtool("--version").out == "cmtool 0.1.0\n"


@pytest.mark.parametrize(
    ("words", "sentence", "hint"),
    [
        (["smaple"], "no such command 'smaple'. Did you mean sample?", "cmtool --help"),
        (["train-tc"], "no such command 'train-tc'. Did you mean train-ct", "cmtool --help"),
        (["xyzzy"], "no such command 'xyzzy'.", "cmtool --help"),
        (["--versoin"], "no such option --versoin. Did you mean --version?", "cmtool --help"),
        (["train-ct", "--stpes", "3"], "no such option --stpes. Did you mean --steps?", "cmtool train-ct --help"),
        (["presets", "--jsn"], "no such option --jsn. Did you mean --json?", "cmtool presets --help"),
        (["info"], "missing argument 'path'.", "cmtool info --help"),
        (["presets", "a", "b"], "got unexpected extra argument(s) (b)", "cmtool presets --help"),
        (["train-ct", "--steps", "many"], "--steps = 'many' must be a whole number", "cmtool train-ct --help"),
        (["train-ct", "--steps", "0"], "--steps = 0 must be at least 1", "cmtool train-ct --help"),
        (
            ["train-ct", "--device", "gpu"],
            "--device = 'gpu' is unknown; choose auto, cpu, cuda, mps.",
            "cmtool train-ct --help",
        ),
        (["train-ct", "--preset"], "option '--preset' requires an argument.", "cmtool --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_2_and_names_the_nearest(cmtool, words, sentence, hint):
    typed = cmtool(*words)
    first, second = typed.err.splitlines()
    assert (typed.code, typed.out) == (2, "")
    assert first.startswith(f"Error: {sentence}"), first
    assert second.startswith(f"Hint: {hint}")


def test_a_mistake_exits_with_1_and_says_what_to_do_next(cmtool):
    typed = cmtool("presets", "digist")
    assert (typed.code, typed.out) == (1, "")
    assert typed.err.startswith("Error: unknown preset 'digist'; choose from avatars, celeba64, cifar10, digits, ")
    assert "Did you mean digits?\nHint: cmtool presets lists them" in typed.err


def test_with_json_a_mistake_is_the_document(cmtool):
    typed = cmtool("presets", "digist", "--json")
    assert (typed.code, typed.err) == (1, "")
    assert "Did you mean digits?" in json.loads(typed.out)["error"]
    wrong = cmtool("presets", "--json", "--nope")
    assert wrong.code == 2 and json.loads(wrong.out)["hint"] == "cmtool presets --help"


def test_a_traceback_only_when_asked_for(cmtool, monkeypatch):
    assert "Traceback" not in cmtool("presets", "digist").err
    monkeypatch.setenv("CMTOOL_DEBUG", "1")
    typed = cmtool("presets", "digist")
    assert "Traceback" in typed.err and typed.err.rstrip().splitlines()[-2].startswith("Error: unknown preset")


class OutOfMemoryError(RuntimeError):
    """Stands for torch's, which is known by its name."""


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (UserError("said", "next"), "said", 1),
        (UsageError("said"), "said", 2),
        (KeyboardInterrupt(), "interrupted", 130),
        (PermissionError(13, "Permission denied", "runs/x"), "runs/x: permission denied", 1),
        (OSError(28, "No space left on device", "out.npz"), "out.npz: no space left on device", 1),
        (MemoryError(), "out of memory", 1),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory", 1),
        (RuntimeError("one\n  two"), "RuntimeError: one two", 1),
        (ValueError(), "ValueError: no message", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_failure_is_one_sentence(error, sentence, code):
    failure = describe(error)
    assert (failure.sentence, failure.code) == (sentence, code)


def test_an_unexpected_failure_asks_for_a_debug_run(cmtool, monkeypatch):
    monkeypatch.setattr("cmtool.cli.presets.list_presets", lambda: 1 / 0)
    typed = cmtool("presets")
    assert (typed.code, typed.out) == (1, "")
    assert (
        typed.err
        == "Error: ZeroDivisionError: division by zero\nHint: This should not happen: CMTOOL_DEBUG=1 shows where it did.\n"
    )


def test_a_reader_that_leaves_early_is_no_error(workdir):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-m", "cmtool", "presets", "cifar10"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as writer:
        writer.stdout.close()
        assert writer.stderr.read() == ""
    assert writer.returncode in (0, 1)


def test_presets_lists_all_in_80_columns(cmtool):
    typed = cmtool("presets")
    assert typed.code == 0
    for name in list_presets():
        assert name in typed.out
    assert "cd 3.55 / 2.93" in typed.out and "ct 8.70 / 5.83" in typed.out
    assert max(map(len, typed.out.splitlines())) <= 80 and "\x1b" not in typed.out


def test_presets_as_json(cmtool):
    typed = cmtool("presets", "--json")
    documents = {document["name"]: document for document in json.loads(typed.out)}
    assert typed.err == "" and set(documents) == set(list_presets())
    assert documents["cifar10"]["expected"]["cd"]["nfe1"] == 3.55
    assert documents["digits"]["resolution"] == 8


def test_one_preset_in_full_is_a_preset(cmtool, workdir):
    typed = cmtool("presets", "imagenet64")
    (workdir / "copy.toml").write_text(typed.out)
    assert tomllib.loads(typed.out)["network"]["head_channels"] == 64
    for recipe in read_preset("imagenet64").recipes:
        copy = resolve("copy.toml", recipe=recipe).config
        assert copy.model_copy(update={"preset": "imagenet64"}) == resolve("imagenet64", recipe=recipe).config
    assert json.loads(cmtool("presets", "imagenet64", "--json").out)["recipe"]["cd"]["distance"]["kind"] == "lpips"


def test_a_damaged_preset_of_ones_own_does_not_hide_the_others(cmtool, workdir):
    (workdir / "presets").mkdir()
    (workdir / "presets" / "broken.toml").write_text("[data\n")
    typed = cmtool("presets")
    assert typed.code == 0 and "broken" in typed.out and "digits" in typed.out
    assert cmtool("presets", "broken").err.startswith("Error: presets/broken.toml, line 1, column 6: not valid TOML")


def test_output_keeps_its_streams_apart(capsys):
    for mode in ({"json_mode": True}, {"quiet": True}, {}):
        out = Output(**mode)
        out.say("talk")
        out.warn("careful")
        out.result("path.png")
        out.json({"a": 1})
        out.table("title", ["name", "value"], [["x", 1.5], ["y", None]])
        with out.progress(3, "working") as update:
            update(note="half way")
        written, said = capsys.readouterr()
        assert "Warning: careful\n" in said and ("talk" in said) == (not mode)
        assert "working" not in said, "no progress where stderr is no terminal"
        if "json_mode" in mode:
            assert json.loads(written) == {"a": 1}
        else:
            assert written.startswith("path.png\n") and "1.5" in written and '"a"' not in written


def drawn(capsys, monkeypatch, width, heads, rows):
    monkeypatch.setenv("COLUMNS", str(width))
    Output().table("", heads, rows)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= width
    return said


def test_a_table_that_is_too_wide_wraps_between_words_alone(capsys, monkeypatch):
    heads = ["run", "recipe", "steps", "loss", "precision", "recall"]
    rows = [["digits-ict-pm", "digits ict-pm", "3,100", 5.2263, 0.79, 0.92]]
    for width in (100, 60, 57):
        said = drawn(capsys, monkeypatch, width, heads, rows)
        assert {"digits-ict-pm", "digits", "ict-pm", "3,100", "5.2263", "precision", "0.79", "0.92"} <= set(
            said.split()
        )


def test_a_table_whose_words_do_not_fit_becomes_two_columns(capsys, monkeypatch):
    heads = ["recipe", *(f"part-{i}" for i in range(9))]
    rows = [["ict", *(f"answer-number-{i}" for i in range(8)), None], ["cd", *"abcdefghi"]]
    said = " ".join(drawn(capsys, monkeypatch, 80, heads, rows).split())
    assert "ict part-0 answer-number-0; part-1 answer-number-1;" in said and "part-8 -" not in said
    assert "cd part-0 a; part-1 b;" in said and said.endswith("part-8 i")
    # Room for all of it: a table again.
    assert "part-0 answer" not in " ".join(drawn(capsys, monkeypatch, 200, heads, rows).split())


@pytest.mark.parametrize("family", ["edm", "ct", "cd"])
def test_lists_stay_readable_at_80_columns(cmtool, monkeypatch, family):
    monkeypatch.setenv("COLUMNS", "80")
    said = cmtool(f"train-{family}", "--preset", "digits", "--list-recipes").out
    assert max(map(len, said.splitlines())) <= 80
    words = set(said.replace(";", " ").split())
    wanted = read_preset("digits").fitting(family)
    assert {"independent", *wanted} <= words


def test_tables_align_numbers_and_respect_the_width(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    Output().table("", ["name", "FID"], [["a", 1.25], ["b", 10.5], ["words " * 20, None]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert all(len(line) <= 44 for line in lines)
    assert [line.split()[-1] for line in lines[2:4]] == ["1.25", "10.5"]
    assert lines[2].index("1.25") + 4 == lines[3].index("10.5") + 4
