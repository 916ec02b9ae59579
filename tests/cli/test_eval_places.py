"""Judging writes into a run folder and to --out, and nowhere else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cmtool
from cmtool.config.load import resolve, to_toml
from cmtool.data import save_folder, save_npz
from cmtool.files.atomic import atomic_text
from tests.cli.test_eval import digits, write_digits_model
from tests.cli.tiny import Shell, write_model

PACKAGE = Path(cmtool.__file__).parent


@pytest.fixture
def shell(workdir, capfd):
    return Shell(workdir, capfd)


def held(folder):
    """What a folder holds: place, size and time of every file and folder; compiled modules are Python's own affair."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size * path.is_file(), path.stat().st_mtime_ns * path.is_file())
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def test_judging_a_model_that_came_along_leaves_a_read_only_package_as_it_was(tmp_path, workdir):
    site = tmp_path / "site"
    shutil.copytree(PACKAGE, site / "cmtool", ignore=shutil.ignore_patterns("__pycache__"))
    if not (site / "cmtool/presets").exists():
        shutil.copytree(PACKAGE.parent / "presets", site / "cmtool/presets")
    before = held(site)
    places = [site, *site.rglob("*")]
    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    words = ["eval", "--model", "demo/digits", "--ref", "digits", "--num", "20", "--metrics", "fid", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "cmtool", *words, "--out", "result.json"]
    done = subprocess.run(command, cwd=workdir, env=environment, capture_output=True, text=True, timeout=300)
    for path in places:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 0, done.stderr
    assert held(site) == before
    assert "could not be written" not in done.stderr
    assert json.loads((workdir / "result.json").read_text())["results"][0]["count"] == 20


def elsewhere(workdir, tmp_path, name):
    """A model that lies in no run folder, and the folder that must stay as it is."""
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(write_model(tmp_path / "made", channels=1, source="digits"), folder / "model.safetensors")
    if name == "home":  # some other program's settings
        (folder / "config.toml").write_text('[user]\nname = "x"\n')
    elif name == "damaged":
        (folder / "config.toml").write_text("[data\n")
    elif name == "readonly":
        folder.chmod(0o555)
    return folder


@pytest.mark.parametrize("name", ["imported", "home", "damaged", "readonly"])
def test_nothing_is_written_beside_a_model_that_lies_in_no_run(shell, workdir, tmp_path, name):
    folder = elsewhere(workdir, tmp_path, name)
    before = held(folder)
    words = ("eval", "--model", folder / "model.safetensors", "--ref", "digits", "--num", 20, "--metrics", "fid")
    code, _, err = shell(*words)
    assert code == 0 and "could not be written" not in err
    # The samples that were made name their model too.
    (made,) = (workdir / "samples").glob("*.npz")
    shell.out("eval", made, "--ref", "digits", "--metrics", "fid")
    folder.chmod(0o755)
    assert held(folder) == before


def test_a_run_keeps_a_row_and_samples_and_references_keep_nothing(shell, workdir):
    model = write_digits_model(workdir)
    save_folder(digits(40, 0.2), "mine")
    save_folder(digits(40), "theirs")
    save_npz("mine.npz", digits(40, 0.2))
    before = held(workdir)
    shell.out("eval", "mine", "mine.npz", "--ref", "theirs", "--features", "digits", "--metrics", "fid,kid")
    assert held(workdir) == before
    shell.out("eval", "--model", model, "--ref", "theirs", "--features", "digits", "--metrics", "fid", "--num", 20)
    added = {path for path in held(workdir).keys() - before.keys() if Path(path).suffix}
    assert added == {"runs/tiny/evaluations.jsonl", "samples/tiny-1-0-20.npz"}


def test_a_search_does_not_write_into_what_came_along_or_was_fetched(shell, workdir, tmp_path):
    before = held(PACKAGE / "demo")
    words = ("--ref", "digits", "--steps", 2, "--num", 20, "--grid", 5, "--write")
    err = shell.fails("search-times", "--model", "demo/digits", *words)
    assert "came along with cmtool" in err and "copy it" in err and "features" not in err
    fetched = tmp_path / "cache/models/hf/x.safetensors"
    fetched.parent.mkdir(parents=True)
    shutil.copy(write_digits_model(workdir), fetched)
    assert "was fetched" in shell.fails("search-times", "--model", fetched, *words)
    assert held(PACKAGE / "demo") == before


def test_a_folder_is_a_run_by_its_settings(tmp_path):
    from cmtool.cli.evaluate_sets import is_run

    assert not is_run(tmp_path)
    atomic_text(tmp_path / "config.toml", to_toml(resolve("digits").config))
    assert is_run(tmp_path)
    (tmp_path / "config.toml").write_text("data = 3\n")
    assert not is_run(tmp_path)
