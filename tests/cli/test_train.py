"""`cmtool train-edm`, `train-ct`, `train-cd` as they are typed: what they make, what they refuse, how they end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from cmtool.checkpoint import read_header, save_model
from tests.conftest import heeded_signals
from tests.training.tiny import FLAGS, teacher_file

ROOT = Path(__file__).resolve().parents[2]
SMALL = (*FLAGS, "--steps", "6", "--batch-size", "8")


def files(folder="."):
    """Every file below the working folder."""
    return sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher of the digits, one of other images, a consistency model, and a file that is cut short."""
    import torch

    folder = tmp_path_factory.mktemp("models")
    teacher = teacher_file(folder / "teacher.safetensors")
    header = read_header(teacher)
    weights = {"a": torch.zeros(2)}
    save_model(folder / "student.safetensors", weights, header | {"kind": "consistency"})
    save_model(folder / "wide.safetensors", weights, header | {"data": header["data"] | {"resolution": 16}})
    save_model(folder / "classes.safetensors", weights, header | {"data": header["data"] | {"num_classes": 10}})
    save_model(folder / "empty.safetensors", weights, header)
    (folder / "cut.safetensors").write_bytes(teacher.read_bytes()[:-9])
    (folder / "flipped.safetensors").write_bytes(teacher.read_bytes()[:-9] + b"123456789")
    (folder / "text.safetensors").write_text("hello")
    return folder


def test_the_three_commands_one_after_another(cmtool, monkeypatch):
    edm = cmtool("train-edm", *SMALL)
    assert edm.code == 0, edm.err
    assert edm.out == "runs/digits-edm/model.safetensors\n"
    assert "then: cmtool train-cd --preset digits --teacher runs/digits-edm\n" in edm.err
    cd = cmtool("train-cd", *SMALL, "--recipe", "cd")
    assert cd.code == 0, cd.err
    assert "model runs/digits-edm/model.safetensors" in cd.err and "newest finished run of a teacher" in cd.err
    assert read_header("runs/digits-cd/model.safetensors")["kind"] == "consistency"
    monkeypatch.setattr("cmtool.api.train.judges", lambda trainer, talk: (None, None))  # seconds each
    ct = cmtool("train-ct", *SMALL, "--recipe", "ict", "--out", "runs/a b/ü")
    assert ct.code == 0 and ct.out == "runs/a b/ü/model.safetensors\n"
    assert "next: cmtool sample --model 'runs/a b/ü'" in ct.err
    assert "then: cmtool report 'runs/a b/ü'" in ct.err
    ect = cmtool("train-ct", *SMALL, "-r", "ect", "--init", "runs/digits-edm")
    assert ect.code == 0, ect.err
    config = tomllib.loads(Path("runs/digits-ect/config.toml").read_text())
    assert config["init"] == "runs/digits-edm/model.safetensors" and config["train"]["steps"] == 6


def test_the_same_command_twice(cmtool):
    first = cmtool("train-edm", *SMALL)
    before = {name: os.stat(name).st_mtime_ns for name in files()}
    again = cmtool("train-edm", *SMALL)
    assert again.code == 0 and again.out == first.out
    assert "is finished" in again.err and "--fresh" in again.err
    assert before == {name: os.stat(name).st_mtime_ns for name in files()}
    fresh = cmtool("train-edm", *SMALL, "--fresh")
    assert fresh.code == 0 and os.stat("runs/digits-edm/model.safetensors").st_mtime_ns not in before.values()


def test_a_finished_run_whose_model_is_damaged_is_made_again(cmtool):
    assert cmtool("train-edm", *SMALL).code == 0
    model = Path("runs/digits-edm/model.safetensors")
    good = model.read_bytes()
    model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    again = cmtool("train-edm", *SMALL)
    assert again.code == 0 and "is damaged" in again.err
    assert model.read_bytes() == good


def test_another_configuration_in_the_same_folder(cmtool):
    assert cmtool("train-edm", *SMALL).code == 0
    before = {name: os.stat(name).st_mtime_ns for name in files()}
    other = cmtool("train-edm", *SMALL, "--set", "train.lr=0.003", "--seed", 4)
    assert other.code == 1
    assert "train.seed: 0 there, 4 here" in other.err and "train.lr" in other.err
    assert before == {name: os.stat(name).st_mtime_ns for name in files()}


def test_json_is_one_document(cmtool):
    done = cmtool("train-edm", *SMALL, "--json")
    assert json.loads(done.out) == {"model": "runs/digits-edm/model.safetensors", "steps": 6, "finished": True}
    assert done.err == ""
    dry = json.loads(cmtool("train-edm", "--dry-run", "--json").out)
    assert dry["config"]["recipe_name"] == "edm"
    assert "digits.toml" in dry["origins"]["data.source"]
    listed = json.loads(cmtool("train-ct", "--list-recipes", "--json").out)
    assert {"ct", "ict", "ict-pm", "ect"} <= {row["recipe"] for row in listed["recipes"]}
    wrong = cmtool("train-ct", "--preset", "nope", "--json")
    assert wrong.code == 1 and "unknown preset" in json.loads(wrong.out)["error"]


def test_recipes_are_listed(cmtool):
    typed = cmtool("train-cd", "--list-recipes")
    assert typed.code == 0
    for name in ("cd", "cd-euler", "cd-l1"):
        assert any(line.split()[:1] == [name] for line in typed.out.splitlines())


def test_a_dry_run_says_that_its_data_are_not_here(cmtool):
    typed = cmtool("train-ct", "--preset", "folder64", "--data", "no/where", "--dry-run")
    assert typed.code == 0 and tomllib.loads(typed.out)["data"]["path"] == "no/where"
    assert "Warning: there is no data at no/where." in typed.err
    for words in (("--preset", "folder64"), ("--preset", "shapes", "--data", "digits", "--set", "data.channels=1")):
        assert "Warning" not in cmtool("train-ct", *words, "--dry-run").err


@pytest.mark.parametrize("preset", ["digits", "cifar10", "imagenet64", "lsun_bedroom256"])
@pytest.mark.parametrize("command", ["train-ct", "train-edm"])
def test_a_dry_run_prints_what_would_be_run_and_writes_nothing(cmtool, command, preset):
    typed = cmtool(command, "--preset", preset, "-n", "--steps", 1234, "--set", "train.lr=0.5")
    assert typed.code == 0, typed.err
    settings = tomllib.loads(typed.out)
    assert settings["preset"] == preset
    assert settings["train"]["steps"] == 1234 and settings["train"]["lr"] == 0.5
    assert not files()


def test_what_needs_no_torch_imports_none(workdir):
    """Dry runs, lists and mistakes answer before torch is imported."""
    code = (
        "import sys; from cmtool.cli.app import run\n"
        "for words in (['train-ct', '-n', '-p', 'cifar10'], ['train-ct', '--list-recipes'], ['train-ct', '-p', 'x'],\n"
        "              ['train-cd', '--preset', 'digits'], ['train-ct', '--teacher', 'x'], ['train-edm', '--set', 'a'],\n"
        "              ['train-edm', '--max-time', 'x'], ['train-ct', '--steps', '0'], ['train-ct', '-p', 'folder64'],\n"
        "              ['train-ct', '-p', 'folder64', '--data', 'nowhere'], ['train-edm', '--small', 'x']):\n"
        "    run(words); assert 'torch' not in sys.modules, words\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=workdir, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What is typed after the command, what the sentence must say, the exit code. {m} is the folder of models.
BAD = [
    ("train-ct --preset nope", "unknown preset 'nope'", 1),
    ("train-ct --preset digit", "Did you mean digits?", 1),
    ("train-ct --preset no/where.toml", "preset file no/where.toml does not exist", 1),
    ("train-ct --recipe icx", "unknown recipe 'icx'", 1),
    ("train-ct --recipe edm", "belongs to train-edm, not to train-ct", 1),
    ("train-edm --recipe ict", "belongs to train-ct, not to train-edm", 1),
    ("train-cd --recipe ict --teacher {m}/teacher.safetensors", "belongs to train-ct, not to train-cd", 1),
    ("train-ct --set train.lrr=1", "train.lrr", 1),
    ("train-ct --set lr=1", "Did you mean train.lr", 1),
    ("train-ct --set train.lr", "must look like key=value", 1),
    ("train-ct --set train=3", "whole table", 1),
    ("train-ct --set train.lr=fast", "train.lr", 1),
    ("train-ct --set train.lr=-1", "greater than 0", 1),
    ("train-ct --set train.lr=nan", "train.lr", 1),
    ("train-ct --set train.betas=[0.9,1.5]", "betas", 1),
    ("train-ct --set train.optimizer=adamm", "adamw", 1),
    ("train-ct --set network.kind=vit", "network.kind", 1),
    ("train-ct --set process.sigma_min=90", "must be below sigma_max", 1),
    ("train-ct --set recipe.method=ct", "--recipe chooses the method", 1),
    ("train-ct --steps 0", "--steps", 2),
    ("train-ct --steps many", "--steps", 2),
    ("train-ct --batch-size -4", "--batch-size", 2),
    ("train-ct --seed -1", "--seed", 2),
    ("train-ct --micro-batch 128 --batch-size 64", "micro_batch = 128 is larger", 1),
    ("train-ct --device gpu", "--device", 2),
    ("train-ct --device cuda", "no usable cuda device", 1),
    ("train-ct --precision fp8", "--precision", 2),
    ("train-ct --max-time soon", "no time span", 2),
    ("train-ct --requeue-exit-code 300", "--requeue-exit-code", 2),
    ("train-ct --stepz 5", "no such option --stepz. Did you mean --steps?", 2),
    ("train-ct extra", "extra", 2),
    ("train-cd", "needs a teacher", 1),
    ("train-cd --teacher {m}/none.safetensors", "there is no model", 1),
    ("train-cd --teacher {m}/student.safetensors", "a teacher is needed", 1),
    (
        "train-cd --teacher {m}/teacher.safetensors --set recipe.direction.guidance=2 --set recipe.direction.weak=demo/digits",
        "name another with --set recipe.direction.weak",
        1,
    ),
    ("train-cd --teacher {m}/wide.safetensors", "resolution 16", 1),
    ("train-cd --teacher {m}/classes.safetensors", "10 classes", 1),
    ("train-cd --teacher {m}/cut.safetensors", "is damaged", 1),
    ("train-cd --teacher {m}/flipped.safetensors", "do not match the digest", 1),
    ("train-cd --teacher {m}/text.safetensors", "no safetensors file", 1),
    ("train-cd --teacher {m}/empty.safetensors", "does not fit its own header", 1),
    ("train-cd --teacher {m}", "holds no model.safetensors", 1),
    ("train-ct --teacher {m}/teacher.safetensors", "takes no teacher", 1),
    ("train-ct --recipe ect", "starts from a trained model", 1),
    ("train-cd --teacher {m}/teacher.safetensors --init {m}/teacher.safetensors", "takes no --init", 1),
    ("train-edm --init {m}/cut.safetensors", "--init", 1),
    ("train-ct --init {m}/cut.safetensors", "is damaged", 1),
    ("train-ct --preset folder64", "--data", 1),
    ("train-ct --preset folder64 --data no/where", "no/where", 1),
    ("train-ct --preset folder64 --data hollow", "hollow", 1),
    ("train-ct --preset folder64 --data texts", "texts", 1),
    ("train-ct --set data.channels=4", "1 or 3 channels", 1),
    ("train-ct --set data.resolution=4", "not shrunk", 1),
    ("train-ct --set data.kind=tests", "heldout", 1),
    ("train-ct --out a-file", "is a file, not a run folder", 1),
    ("train-ct --out texts", "not empty and holds no run", 1),
    ("train-ct --out a-file/run", "a-file", 1),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "says", "code"), BAD, ids=[row[0].replace("{m}/", "") for row in BAD])
def test_bad_input_is_one_sentence_and_writes_nothing(cmtool, models, typed, says, code):
    Path("hollow").mkdir()
    Path("texts").mkdir()
    Path("texts/notes.txt").write_text("no image")
    Path("a-file").write_text("")
    before = files()
    answer = cmtool(*typed.format(m=models).split())
    lines = answer.err.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1 and says in answer.err, answer.err
    assert all(line.startswith(("Error: ", "Hint: ")) for line in lines[lines.index(errors[0]) :])
    assert "Traceback" not in answer.err and "should not happen" not in answer.err
    assert answer.code == code and answer.out == ""
    assert files() == before and not Path("runs").exists()


def test_unreadable_images_are_skipped_with_a_count(cmtool):
    Path("photos").mkdir()
    for index in range(9):
        Image.effect_noise((64, 64), 60 + index).convert("RGB").save(f"photos/{index}.png")
    Path("photos/broken.png").write_bytes(Path("photos/0.png").read_bytes()[:100])
    words = ["--set", "network.channels=8", "--set", "network.attention=[]", "--set", "network.channel_mult=[1,1]"]
    words += ["--set", "network.num_blocks=1", "--steps", "1", "--batch-size", "2", "--set", "network.head_channels=8"]
    typed = cmtool("train-ct", "--preset", "folder64", "--data", "photos", "--recipe", "ict", *words)
    assert typed.code == 0, typed.err
    assert "9 images" in typed.err and "skipped 1 of 10 files" in typed.err


def test_small_images_are_enlarged_and_others_fitted_when_asked(cmtool):
    Path("small").mkdir()
    for index in range(3):
        Image.effect_noise((40, 8), 60 + index).convert("RGB").save(f"small/{index}.png")
    words = ["train-edm", "--preset", str(ROOT / "tests" / "golden_preset.toml"), "--data", "small", "--steps", "1"]
    words += ["--set", "data.channels=3", "--set", "data.resolution=16"]
    refused = cmtool(*words, "--out", "a")
    assert refused.code == 1 and "3 too small" in refused.err and "--small upscale" in refused.err
    done = cmtool(*words, "--out", "a", "--small", "upscale", "--fit", "pad")
    assert done.code == 0, done.err
    assert "3 images of 16 x 16 x 3" in done.err and "packing 3 images" in done.err
    data = tomllib.loads(Path("a/config.toml").read_text())["data"]
    assert (data["small"], data["fit"]) == ("upscale", "pad")
    wrong = cmtool(*words, "--small", "enlarge")
    assert wrong.code == 2 and "choose skip, upscale" in wrong.err


def test_a_run_that_goes_on_with_other_images_says_so(cmtool):
    Path("photos").mkdir()
    for index in range(3):
        Image.effect_noise((16, 16), 60 + index).convert("RGB").save(f"photos/{index}.png")
    words = ["train-edm", "--preset", str(ROOT / "tests" / "golden_preset.toml"), "--data", "photos", "--out", "a"]
    words += ["--set", "data.channels=3", "--steps", "4", "--set", "train.checkpoint_every=2"]
    assert cmtool(*words).code == 0
    Path("a/model.safetensors").unlink()
    assert "have changed" not in cmtool(*words).err
    Path("a/model.safetensors").unlink()
    Image.effect_noise((16, 16), 90).convert("RGB").save("photos/more.png")
    again = cmtool(*words)
    assert again.code == 0 and "Warning: the data have changed since a was last trained" in again.err


def test_every_mistake_in_settings_says_where_to_look(cmtool):
    assert "Hint: cmtool presets lists" in cmtool("train-ct", "--set", "train.lr=fast").err
    assert "Hint: cmtool sample --help" in cmtool("sample", "--sampler", "heunn").err


def test_the_disk_is_short(cmtool, monkeypatch):
    from cmtool.training import forecast

    monkeypatch.setattr(forecast.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    typed = cmtool("train-edm", *SMALL)
    assert typed.code == 1 and "has 1 kB free and the run needs" in typed.err
    assert not Path("runs").exists()


def test_no_permission(workdir):
    if os.name != "posix":
        pytest.skip("POSIX permissions")
    # Root may write anywhere unless it gives that right away for the process.
    wrapper = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if wrapper and shutil.which("setpriv") is None:
        pytest.skip("runs as root and has no setpriv")
    (workdir / "locked").mkdir(mode=0o555)
    words = [*wrapper, sys.executable, "-m", "cmtool", "train-edm", *SMALL, "--out", "locked/run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=workdir, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "no permission to write locked/run" in done.stderr and "Traceback" not in done.stderr
    assert not list((workdir / "locked").iterdir())


def test_a_disk_that_fills_during_the_run_keeps_the_last_good_checkpoint(cmtool, monkeypatch):
    import errno

    import cmtool.training.state as state

    plain = state.save_model

    def full_later(path, tensors, header):
        if header["step"] == 6:
            raise_full = OSError(errno.ENOSPC, "No space left on device")
            from cmtool.files.atomic import writing

            with writing(Path(path)):
                raise raise_full
        plain(path, tensors, header)

    words = ["train-edm", *SMALL, "--set", "train.checkpoint_every=3"]
    with monkeypatch.context() as patched:
        patched.setattr(state, "save_model", full_later)
        typed = cmtool(*words)
    assert typed.code == 1 and "the disk is full" in typed.err
    assert files("runs/digits-edm/checkpoints") == ["runs/digits-edm/checkpoints/step-0000003/state.safetensors"]
    assert cmtool(*words).code == 0
    assert read_header("runs/digits-edm/model.safetensors")["step"] > 3


@pytest.mark.parametrize(
    ("every", "says"), [(1, "the last checkpoint is kept"), (300, "no checkpoint had been written yet")]
)
def test_a_loss_that_is_not_finite_names_the_step(cmtool, every, says):
    rhythm = ["--steps", "300", "--set", f"train.checkpoint_every={every}"]
    typed = cmtool("train-edm", *SMALL, "--set", "train.lr=10", "--set", "train.optimizer=sgd", *rhythm)
    assert typed.code == 1
    assert "is not finite at step" in typed.err and says in typed.err
    assert (files("runs/digits-edm/checkpoints") != []) == (every == 1)
    assert not Path("runs/digits-edm/model.safetensors").exists()


def start(workdir, *words):
    """Start a run of many steps as a process and return it once it is training."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with heeded_signals():
        process = subprocess.Popen(
            [sys.executable, "-m", "cmtool", *words],
            cwd=workdir,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    until = time.monotonic() + 90
    folder = workdir / words[words.index("--out") + 1]
    while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    assert process.poll() is None, process.stderr.read()
    return process


LONG = ("train-edm", *FLAGS, "--batch-size", "8", "--steps", "100000", "--set", "train.log_every=1")


@pytest.mark.parametrize(
    ("number", "extra", "code"),
    [
        (signal.SIGINT, (), 130),
        (signal.SIGTERM, ("--requeue-exit-code", "99"), 99),
    ],
)
def test_signals_save_and_say_so(workdir, number, extra, code):
    process = start(workdir, *LONG, "--out", "run", *extra)
    second = subprocess.run(
        [sys.executable, "-m", "cmtool", *LONG, "--out", "run"],
        cwd=workdir, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert second.returncode == 1 and f"another process (pid {process.pid} on " in second.stderr
    asked = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert time.monotonic() - asked < 20
    assert b"stopped after step" in err and b"the same command goes on from there" in err
    assert len(files(workdir / "run" / "checkpoints")) == 1
    assert not (workdir / "run" / "run.lock").exists()


def test_the_scheduler_can_stop_it_by_time(cmtool):
    typed = cmtool(*LONG, "--out", "run", "--max-time", "1s")
    assert typed.code == 0 and "time limit reached after step" in typed.err and typed.out == ""
    stopped = cmtool(*LONG, "--out", "run", "--max-time", "1s", "--requeue-exit-code", "85", "--json")
    assert stopped.code == 85
    document = json.loads(stopped.out)
    assert document["model"] is None and document["finished"] is False and document["steps"] > 0
    interrupted = cmtool("train-edm", *FLAGS, "--out", "run")
    assert interrupted.code == 1 and "another configuration" in interrupted.err


def test_threads_and_determinism_can_be_asked_for(cmtool):
    import torch

    words = ["train-edm", *SMALL, "--deterministic", "--set", "train.threads=1"]
    try:
        assert cmtool(*words, "--out", "a").code == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert read_header("a/model.safetensors")["machine"]["deterministic"] is True
    assert cmtool(*words, "--out", "b").code == 0
    torch.use_deterministic_algorithms(False)
    assert Path("a/model.safetensors").read_bytes() == Path("b/model.safetensors").read_bytes()


def test_quiet_leaves_stderr_empty(cmtool):
    typed = cmtool("train-edm", *SMALL, "--quiet")
    assert typed.code == 0 and typed.err == "" and typed.out == "runs/digits-edm/model.safetensors\n"
