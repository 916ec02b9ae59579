"""The page of exit codes and JSON documents is held to what the commands do."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests.faults.harness import trial

NETWORK = ("socket.connect", "socket.getaddrinfo", "urllib.Request")
ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
TRAIN = ("train-edm", "--preset", str(ROOT / "tests" / "golden_preset.toml"), "--out", "run", "--steps", "2")
KINDS = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading of the page."""
    part = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def schema(command: str) -> list[tuple[str, type, bool]]:
    """(key, type, may be null) of a command's document as the page has it."""
    text = next(row[1] for row in rows("JSON documents") if row[0] == command)
    found = re.findall(r"`(\w+)` (string|integer|number|boolean|array|object)(\?)?", text)
    assert found, command
    return [(key, KINDS[kind], bool(null)) for key, kind, null in found]


def holds(document: dict, command: str) -> None:
    for key, kind, null in schema(command):
        assert key in document, f"{command}: {key} is missing"
        value = document[key]
        assert (null and value is None) or type(value) is kind, f"{command}: {key} is {value!r}"


def test_training_documents(cmtool):
    done = cmtool(*TRAIN, "--json")
    assert done.code == 0
    holds(json.loads(done.out), "`train-edm`, `train-ct`, `train-cd`")
    again = cmtool(*TRAIN, "--json")
    assert again.code == 0 and json.loads(again.out) == json.loads(done.out)
    holds(json.loads(cmtool(*TRAIN, "--dry-run", "--json").out), "`train-* --dry-run`")
    holds(json.loads(cmtool("train-ct", "--list-recipes", "--json").out), "`train-* --list-recipes`")
    holds(json.loads(cmtool("info", "run", "--json").out), "`info`")
    sampled = cmtool("sample", "--model", "run", "--num", "2", "--steps", "3", "--out", "s.npz", "--json")
    holds(json.loads(sampled.out), "`sample`")
    judged = cmtool("eval", "s.npz", "--ref", "digits", "--metrics", "fid", "--json")
    assert judged.code == 0, judged.err
    holds(json.loads(judged.out), "`eval`")
    stopped = cmtool(*TRAIN[:-4], "--out", "long", "--steps", "100000", "--max-time", "0.3s", "--json")
    assert stopped.code == 0
    document = json.loads(stopped.out)
    holds(document, "`train-edm`, `train-ct`, `train-cd`")
    assert document["model"] is None and not document["finished"]


def test_documents_of_files_that_are_made(cmtool, workdir):
    training = ("train-ct", "--preset", TRAIN[2], "--steps", "2", "--batch-size", "4", "--out", "runs/a")
    training += ("--set", "process.noise_scale=250")
    assert cmtool(*training).code == 0
    assert cmtool("sample", "--num", 2, "--out", "photos/").code == 0
    lines = {
        "`edit`": ("edit", "denoise", "photos/000000.png", "--sigma", 0.5),
        "`interpolate`": ("interpolate", "--seeds", "1,2", "--num", 3),
        "`models`": ("models",),
        "`runs`": ("runs",),
        "`report`": ("report", "runs/a", "--no-samples"),
        "`export`": ("export", "runs/a", "--format", "openai", "--out", "x.pt"),
        "`import`": ("import", "x.pt", "--form", "consistency", "--resolution", 8, "--out", "m.safetensors"),
        "`data make`": ("data", "make", "photos", "--resolution", 8, "--out", "p.cmdata"),
    }
    for command, words in lines.items():
        done = cmtool(*words, "--json")
        assert done.code == 0, (command, done.out)
        holds(json.loads(done.out, parse_constant=pytest.fail), command)


def test_numbers_that_are_not_finite_are_null(capsys):
    from cmtool.cli.output import Output

    Output(json_mode=True).json({"a": [float("nan"), 1.5], "b": {"c": float("inf"), "d": (float("-inf"),)}})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": [None, 1.5],
        "b": {"c": None, "d": [None]},
    }


def test_documents_of_lists(cmtool):
    (first, *_) = json.loads(cmtool("presets", "--json").out)
    holds(first, "`presets`")
    holds(json.loads(cmtool("presets", "digits", "--json").out), "`presets NAME`")
    holds(json.loads(cmtool("data", "show", "digits", "--json").out), "`data show`")


def test_documents_of_measurements(cmtool):
    small = ("train-edm", "--preset", TRAIN[2], "--steps", "6", "--set", "train.snapshot_every=2", "--out")
    consistency = ("train-ct", "--preset", TRAIN[2], "--steps", "2", "--batch-size", "8", "--out", "runs/c")
    for words in ((*small, "runs/a"), (*small, "runs/b", "--seed", 1), consistency):
        assert cmtool(*words).code == 0
    search = ("search-times", "--model", "runs/c", "--ref", "digits", "--num", 32, "--grid", 4)
    lines = {
        "`ema`": ("ema", "runs/a", "--std", 0.1),
        "`runs diff`": ("runs", "diff", "runs/a", "runs/b"),
        "`search-times`": search,
        "`eval --make-ref`": ("eval", "--make-ref", "r.npz", "--data", "digits"),
        "`bench`": ("bench", "--preset", "toy2d", "--seconds", 0.1),
        "`theory check`": ("theory", "check", "--quick"),
        "`theory STUDY`": ("theory", "scaling", "--d", "1", "--T", "16,32,64,128", "--out", "t"),
        "`theory plan`": ("theory", "plan", "--dim", "2", "--eps", "0.3"),
    }
    for command, words in lines.items():
        done = cmtool(*words, "--json")
        assert done.code == 0, (command, done.out)
        holds(json.loads(done.out, parse_constant=pytest.fail), command)


def test_every_command_is_on_the_page_of_documents():
    from cmtool.cli.app import COMMANDS

    listed = " ".join(row[0] for row in rows("JSON documents")).replace("train-*", "")
    for name in COMMANDS:
        assert re.search(rf"[` ]{name}[` ]", listed), name


FAILURES = [
    (("train-ct", "--preset", "x"), 1),
    (("train-ct", "--steps", "0"), 2),
    (("train-cd",), 1),
    (("sample", "--model", "none"), 1),
    (("sample", "--num", "0"), 2),
    (("info", "none.safetensors"), 1),
    (("eval", "none.npz", "--ref", "digits"), 1),
    (("import", "none.pt", "--out", "m.safetensors"), 1),
    (("export", "none", "--format", "openai", "--out", "x.pt"), 1),
    (("data", "make", "none", "--resolution", "8", "--out", "d.cmdata"), 1),
    (("nonsense",), 2),
]  # fmt: skip


@pytest.mark.parametrize(("words", "code"), FAILURES, ids=[" ".join(words) for words, _ in FAILURES])
def test_failures_keep_their_code_and_document(cmtool, words, code):
    plain = cmtool(*words)
    assert plain.code == code and plain.out == ""
    assert [line.split(":")[0] for line in plain.err.splitlines() if ":" in line].count("Error") == 1
    typed = cmtool(*words, "--json")
    assert typed.code == code
    holds(json.loads(typed.out), "any failure")


def test_every_code_of_the_page_is_known():
    codes = [row[0] for row in rows("Exit codes")]
    assert codes == ["0", "1", "2", "129", "130", "143", "N"]


def test_every_variable_of_the_page_is_read_somewhere():
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "cmtool").rglob("*.py"))
    for row in rows("Environment"):
        name = row[0].strip("`").removesuffix("=1")
        assert f'"{name}"' in source, name


@pytest.mark.parametrize(
    "settings",
    [
        {"LC_ALL": "tr_TR.UTF-8", "PYTHONUTF8": "0", "TZ": "Asia/Kathmandu"},
        pytest.param({"LC_ALL": "C", "TZ": "Asia/Kathmandu"}, marks=pytest.mark.slow),
    ],
)
def test_locale_and_time_zone_change_nothing(cmtool_process, workdir, settings):
    """Numbers, file names and times are written the same everywhere, also below a folder with a name in Japanese."""
    words = (*TRAIN[:-4], "--out", "ラン 1", "--steps", "2")
    done = cmtool_process(*words, FORCE_COLOR="", TERM="xterm-256color", **settings)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err and "\r" not in done.err, "a pipe gets no colors and no bars"
    run = workdir / "ラン 1"
    assert (run / "model.safetensors").is_file()
    assert all(line[19] == "Z" for line in (run / "run.log").read_text(encoding="utf-8").splitlines())
    assert json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])["step"] == 1


def test_no_command_touches_the_network(workdir):
    """Audited in forked processes, since a hook cannot be removed: no name is resolved and no socket connected."""

    def forbid():
        os.environ.pop("CMTOOL_OFFLINE", None)
        sys.addaudithook(lambda event, arguments: os._exit(9) if event in NETWORK else None)

    for words in (TRAIN, ("sample", "--model", "run", "--num", "2", "--steps", "3"), ("info", "run"), ("presets",),
                  ("models",), ("data", "show", "digits")):  # fmt: skip
        done = trial("network", words, workdir, forbid)
        assert done.code == 0, (words, done.err)
    caught = trial("network", ("sample", "--model", "openai/cd_cat256_l2"), workdir, forbid)
    assert caught.code == 9, "the hook catches nothing"


def test_float64_stays_off_the_mps_path():
    """MPS has no float64: what draws or computes in it must be on the CPU before it is moved."""
    import torch

    from cmtool.config.schema import ProcessConfig
    from cmtool.diffusion.parameterization import build_parameterization
    from cmtool.rng import SampleStreams, batch_normal

    assert batch_normal((2, 3), 0).dtype == SampleStreams([1]).normal((3,)).dtype == torch.float32
    for name in ("consistency", "edm", "hard"):
        found = build_parameterization(ProcessConfig(parameterization=name)).coefficients(torch.tensor([0.5, 3.0]))
        assert {tensor.dtype for tensor in found} == {torch.float32}
