"""One judge for every way to judge: the rows of metrics, one pass over a file, and who calls it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cmtool
from cmtool.data import save_npz
from cmtool.errors import DataError, UsageError
from cmtool.evaluation import samples as sets
from cmtool.evaluation.judge import Judge
from cmtool.evaluation.metrics import HEADINGS, KEYS, METRICS, check_metrics
from cmtool.evaluation.samples import from_array, image_shape, open_images
from tests.cli.test_eval import digits, write_digits_model
from tests.cli.tiny import Shell

PACKAGE = Path(cmtool.__file__).parent


@pytest.fixture
def shell(workdir, capfd):
    return Shell(workdir, capfd)


def settle(path):
    """Let a file be older than the span in which another change could go unseen."""
    at = os.stat(path).st_mtime - 100
    os.utime(path, (at, at))
    while sets._stamp(Path(path)) == "":
        pass


# --- one row a metric ------------------------------------------------------------------------------------------------


def test_every_metric_is_one_row_that_gives_the_figures_it_names(workdir):
    judge, images = Judge.of("digits", (8, 8, 1)), from_array(digits(60, 0.2), "a")
    for name, metric in METRICS.items():
        if metric.network is not None or any(
            need.__name__ in ("_spatial_features", "_model", "_held_out") for need in (*metric.asks, *metric.needs)
        ):
            continue
        found = judge(images, (name,))
        given = {key for key, value in found.values.items() if value is not None or key not in KEYS}
        assert given <= set(metric.figures), name
        unlabeled = name == "classes"
        assert unlabeled or any(found.values[key] is not None for key in metric.figures), name


def test_keys_and_headings_come_from_the_rows():
    assert KEYS == (
        "fid", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall", "density", "coverage", "class_agreement",
        "copies", "copies_std"
    )  # fmt: skip
    assert list(HEADINGS.values()) == [
        "FID", "sFID", "IS", "KID", "precision", "recall", "density", "coverage", "classes", "FDD", "CMMD", "copies (chance .5)",
        "copies", "expected", "pixel copies", "inconsistency",
    ]  # fmt: skip
    assert check_metrics(["kid", "fid", "kid"]) == ("kid", "fid") and check_metrics([]) is None
    with pytest.raises(UsageError, match="Did you mean fid"):
        check_metrics(["fdi"])


def test_the_rows_can_be_read_without_anything_heavy():
    code = "import sys, cmtool.evaluation.metrics, cmtool.evaluation.choices; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- one pass over a file --------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What is opened, and how many images of each set are read."""
    counted = {"opened": [], "read": {}}
    opening = sets.open_images

    def opens(path):
        counted["opened"].append(str(path))
        images = opening(path)

        def read(size):
            for batch in images.read(size):
                counted["read"][str(path)] = counted["read"].get(str(path), 0) + len(batch)
                yield batch

        return sets.replace(images, read=read)

    for module in [module for name, module in sys.modules.items() if name.startswith("cmtool.")]:
        if getattr(module, "open_images", None) is opening:
            monkeypatch.setattr(module, "open_images", opens)
    return counted


def test_a_sample_file_is_opened_and_read_once_and_not_read_when_it_is_known(shell, seen):
    save_npz("a.npz", digits(200, 0.2))
    settle("a.npz")
    words = ("eval", "a.npz", "--ref", "digits", "--metrics", "fid,kid,pr")
    first = shell.json(*words)["results"]
    assert seen["opened"] == ["a.npz"] and seen["read"] == {"a.npz": 200}
    again = shell.json(*words)["results"]
    assert seen["opened"] == ["a.npz"] * 2 and seen["read"] == {"a.npz": 200}
    assert again == first and first[0]["fingerprint"] == open_images("a.npz").fingerprint


def test_pixels_that_several_metrics_look_at_are_still_read_once(shell, workdir, seen):
    save_npz("a.npz", digits(50, 0.02))
    row = shell.json("eval", "a.npz", "--ref", "digits", "--metrics", "fid,memorization")["results"][0]
    assert row["metrics"]["copies_pixels"] > 0.9 and (workdir / row["closest"]).is_file()
    assert (seen["opened"], seen["read"]) == (["a.npz"], {"a.npz": 50})


def test_a_file_that_changed_is_read_again_and_its_figures_are_its_own(shell, seen):
    save_npz("a.npz", digits(200, 0.2))
    settle("a.npz")
    words = ("eval", "a.npz", "--ref", "digits", "--metrics", "fid")
    first = shell.json(*words)["results"][0]
    before = os.stat("a.npz")
    save_npz("a.npz", digits(200, 0.3))
    os.utime("a.npz", ns=(before.st_atime_ns, before.st_mtime_ns))  # as copying with its times does
    assert os.stat("a.npz").st_size == before.st_size
    second = shell.json(*words)["results"][0]
    assert second["metrics"]["fid"] > first["metrics"]["fid"] and second["fingerprint"] != first["fingerprint"]
    some = shell.json(*words, "--num", 100)["results"][0]
    assert some["count"] == 100 and some["fingerprint"] not in (first["fingerprint"], second["fingerprint"])


def test_a_file_that_has_just_changed_has_no_stamp_to_be_known_by(workdir):
    save_npz("a.npz", digits(20))
    assert open_images("a.npz").stamp == "" and open_images("a.npz").first(10).stamp == ""
    settle("a.npz")
    stamps = {open_images("a.npz").stamp, open_images("a.npz").first(10).stamp, open_images("a.npz").first(9).stamp}
    assert len(stamps) == 3 and "" not in stamps
    assert from_array(digits(20), "a").stamp is None


def test_samples_of_a_model_are_opened_once_too(shell, workdir, seen):
    write_digits_model(workdir)
    shell.json("eval", "--ref", "digits", "--num", 30, "--metrics", "fid")
    seen["opened"].clear()
    seen["read"].clear()
    shell.json("eval", "--ref", "digits", "--num", 30, "--metrics", "fid")
    assert seen["opened"] == ["samples/tiny-1-0-30.npz"]


# --- every way to judge ----------------------------------------------------------------------------------------------


def test_all_ways_to_judge_go_through_the_judge():
    """Resolving a reference, building its features and measuring them is written once."""
    chain = {"build_features", "measure_reference"}
    users = {}
    for file in PACKAGE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        for name in chain & {getattr(call, "id", getattr(call, "attr", "")) for call in calls}:
            users.setdefault(name, set()).add(str(file.relative_to(PACKAGE)))
    assert users == {name: {"evaluation/judge.py"} for name in chain}


def test_python_and_the_command_line_find_the_same(shell, workdir):
    save_npz("a.npz", digits(120, 0.2))
    typed = shell.json("eval", "a.npz", "--ref", "digits")["results"][0]["metrics"]
    known = {key: value for key, value in typed.items() if value is not None}
    assert cmtool.evaluate("a.npz", "digits") == known
    model = write_digits_model(workdir)
    words = ("search-times", "--model", model, "--ref", "digits", "--num", 30, "--grid", 6, "--seed", 2)
    typed = shell.json(*words, "--device", "cpu")
    found = cmtool.search_times(cmtool.load(model, "cpu"), "digits", num=30, grid=6, seed=2)
    assert list(found.times) == typed["times"] and found.value == typed["value"] and found.method == typed["method"]


def test_a_reference_made_in_python_is_the_one_made_by_the_command(shell, workdir):
    from cmtool.api.evaluate import make_reference

    save_npz("real.npz", digits(90))
    made = make_reference("python.npz", "real.npz", features="digits", num=60, device="cpu")
    words = ("--features", "digits", "--num", 60, "--device", "cpu")
    typed = shell.json("eval", "--make-ref", "typed.npz", "--data", "real.npz", *words)
    assert (typed["count"], typed["features"]) == (made.count, made.features) == (60, "digits")
    with np.load("python.npz") as one, np.load("typed.npz") as other:
        assert sorted(one) == sorted(other) and all(np.array_equal(one[key], other[key]) for key in one)
    assert "must end in .npz" in shell.fails("eval", "--make-ref", "ref.json", "--data", "real.npz")


def test_a_judge_says_what_does_not_fit(workdir):
    judge = Judge.of("digits", (8, 8, 1))
    with pytest.raises(DataError, match="4 x 4 with 1 channel against a reference of 8 x 8"):
        judge(from_array(digits(20)[:, :4, :4].copy(), "small"))
    with pytest.raises(UsageError, match="asks a consistency model"):
        judge(from_array(digits(20), "a"), ("consistency",))
    np.savez("stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(DataError, match="holds statistics only"):
        Judge.of("stats.npz")


def test_the_shape_of_a_models_samples_is_read_from_its_header():
    assert image_shape({"data": {"resolution": 8, "channels": 3}}) == (8, 8, 3)
    assert image_shape({"data": {"resolution": 1, "channels": 2, "float_samples": True}}) == (2, 1, 1)
