"""`cmtool sample` as it is typed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmtool.api.choose import choose_labels, choose_seeds
from cmtool.cli.options import parse_floats, parse_ints
from cmtool.data.images import read_png_text
from cmtool.errors import UsageError
from cmtool.samplers import solvers
from cmtool.units import format_ints
from tests.cli.tiny import Shell, write_model


@pytest.fixture
def shell(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CMTOOL_MODEL", raising=False)
    return Shell(tmp_path, capfd)


def archive(path):
    with np.load(path, allow_pickle=False) as found:
        return {key: found[key] for key in found}


def close_bytes(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_sample_alone_makes_a_grid_of_64_from_the_newest_run(shell, tmp_path):
    write_model(tmp_path)
    code, out, err = shell("sample")
    assert code == 0
    assert out.strip() == "samples/tiny-1-0.png"
    assert "newest finished run" in err
    text = read_png_text(tmp_path / out.strip())
    assert text["seeds"] == "0-63"
    assert text["times"] == "[80.0]"
    assert text["model_hash"]
    # 8 x 8 pictures of 8 pixels, each enlarged 8 times, with gutters.
    assert Image.open(tmp_path / out.strip()).size == (8 * 66 + 2, 8 * 66 + 2)


def test_a_consistency_run_is_taken_before_a_newer_teacher(shell, tmp_path):
    write_model(tmp_path, "student")
    teacher = write_model(tmp_path, "teacher", kind="diffusion")
    os.utime(teacher, (time.time() + 10,) * 2)
    assert "student" in shell.out("sample", "--num", 1)
    assert "teacher" in shell.out("sample", "--num", 1, "--sampler", "euler", "--steps", 2)
    assert "teacher-3-0" in shell.out("sample", "--num", 1, "--model", "runs/teacher", "--steps", 2)


def test_the_environment_names_the_model(shell, tmp_path, monkeypatch):
    write_model(tmp_path, "a")
    monkeypatch.setenv("CMTOOL_MODEL", str(write_model(tmp_path, "b")))
    code, out, err = shell("sample", "--num", 1)
    assert (code, out.strip()) == (0, "samples/b-1-0.png")
    assert "CMTOOL_MODEL" in err


def test_npz_carries_images_labels_and_what_they_are(shell, tmp_path):
    write_model(tmp_path, num_classes=3, names=["ant", "bee", "cat"])
    assert shell.out("sample", "--num", 5, "--steps", 2, "--out", "s.npz") == "s.npz"
    found = archive("s.npz")
    assert found["arr_0"].shape == (5, 8, 8, 3)
    assert found["arr_0"].dtype == np.uint8
    assert found["arr_1"].shape == (5,)
    meta = json.loads(str(found["meta"]))
    assert (meta["nfe"], meta["times"], meta["seeds"]) == (2, [80.0, 0.8], "0-4")
    assert not (tmp_path / "s.npz.partial").exists()


@pytest.mark.parametrize("suffix", ["npz", "folder"])
def test_batch_size_changes_nothing_but_speed(shell, tmp_path, suffix):
    write_model(tmp_path, num_classes=3)
    outs = []
    for size in (8, 3):
        out = f"b{size}" + (".npz" if suffix == "npz" else "")
        shell.out("sample", "--num", 8, "--batch-size", size, "--times", "80,0.5", "--out", out)
        outs.append(
            archive(out)["arr_0"]
            if suffix == "npz"
            else np.stack([np.asarray(Image.open(f)) for f in sorted((tmp_path / out).glob("*.png"))])
        )
    assert len(outs[0]) == 8
    assert close_bytes(*outs)


def test_each_sample_depends_on_its_seed_alone(shell, tmp_path):
    write_model(tmp_path, num_classes=5)
    shell.out("sample", "--seeds", "5-8", "--out", "many.npz")
    shell.out("sample", "--seeds", "7", "--out", "one.npz")
    many, one = archive("many.npz"), archive("one.npz")
    assert close_bytes(many["arr_0"][2:3], one["arr_0"])
    assert many["arr_1"][2] == one["arr_1"][0]
    assert not close_bytes(many["arr_0"][1:2], one["arr_0"])


def test_two_seeds_share_no_sample(shell, tmp_path):
    write_model(tmp_path)
    first = shell.json("sample", "--num", 3, "--seed", 0, "--out", "a.npz")
    second = shell.json("sample", "--num", 3, "--seed", 1, "--out", "b.npz")
    assert not set(parse_ints(first["seeds"], "")) & set(parse_ints(second["seeds"], ""))


def test_labels_by_name_number_and_all(shell, tmp_path):
    write_model(tmp_path, num_classes=3, names=["ant", "bee", "cat"])
    shell.out("sample", "--num", 4, "--label", "cat", "--label", "0", "--out", "l.npz")
    assert archive("l.npz")["arr_1"].tolist() == [2, 0, 2, 0]
    shell.out("sample", "--num", 6, "--label", "all", "--out", "m.npz")
    assert archive("m.npz")["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]


def test_times_levels_and_indices_are_the_same_thing(shell, tmp_path):
    write_model(tmp_path)
    shell.out("sample", "--num", 2, "--indices", "0,22,39", "--of", 40, "--out", "i.npz")
    by_index = json.loads(str(archive("i.npz")["meta"]))
    assert by_index["nfe"] == 2
    shell.out("sample", "--num", 2, "--times", ",".join(map(repr, by_index["times"])), "--out", "t.npz")
    assert np.array_equal(archive("i.npz")["arr_0"], archive("t.npz")["arr_0"])


def test_the_models_own_times_are_used_and_said(shell, tmp_path):
    write_model(tmp_path, times={"2": [80.0, 1.5]})
    _, _, err = shell("sample", "--num", 1, "--steps", 2)
    assert "own times" in err
    assert "1.5" in err


def test_quantization_can_truncate(shell, tmp_path):
    write_model(tmp_path)
    shell.out("sample", "--num", 4, "--out", "r.npz")
    shell.out("sample", "--num", 4, "--quantize", "truncate", "--out", "t.npz")
    difference = archive("r.npz")["arr_0"].astype(int) - archive("t.npz")["arr_0"]
    assert set(np.unique(difference)) == {0, 1}


def test_points_are_kept_as_floats_and_drawn_as_a_scatter(shell, tmp_path):
    write_model(tmp_path, source="toy2d")
    assert Image.open(shell.out("sample")).size[0] > 300
    shell.out("sample", "--num", 7, "--out", "p.npz")
    points = archive("p.npz")["arr_0"]
    assert points.shape == (7, 2, 1, 1)
    assert points.dtype == np.float32
    assert "points" in shell.fails("sample", "--out", "folder")


def test_json_is_one_document_and_nothing_else(shell, tmp_path):
    write_model(tmp_path)
    code, out, err = shell("sample", "--num", 2, "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert document["path"] == "samples/tiny-1-0.png"
    assert document["nfe"] == 1


def test_a_cut_off_file_is_continued_without_repeating_a_seed(shell, tmp_path, monkeypatch):
    from cmtool.data import shards

    write_model(tmp_path, num_classes=4)
    shell.out("sample", "--num", 20, "--batch-size", 4, "--out", "whole.npz")
    monkeypatch.setattr(shards, "SHARD_SECONDS", 0.0)
    monkeypatch.setattr(shards.ShardStore, "assemble", _killed)
    shell("sample", "--num", 20, "--batch-size", 4, "--out", "cut.npz")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    parts = sorted((tmp_path / "cut.npz.partial").glob("*-*.npz"))
    assert len(parts) == 5
    # As a kill would leave it: shards missing at the end, one of them half-way through its write.
    parts[3].unlink()
    parts[4].rename(parts[4].with_name(".000000016-000000020.tmp-1-ab.npz"))
    document = shell.json("sample", "--num", 20, "--batch-size", 4, "--out", "cut.npz")
    assert document["continued_at"] == 12
    whole, cut = archive("whole.npz"), archive("cut.npz")
    assert np.array_equal(whole["arr_0"], cut["arr_0"])
    assert np.array_equal(whole["arr_1"], cut["arr_1"])
    assert not (tmp_path / "cut.npz.partial").exists()


def _killed(self, meta):
    raise KeyboardInterrupt


def test_parts_of_another_request_are_not_mixed_in(shell, tmp_path, monkeypatch):
    from cmtool.data import shards

    write_model(tmp_path)
    monkeypatch.setattr(shards.ShardStore, "assemble", _killed)
    assert shell("sample", "--num", 4, "--out", "s.npz")[0] == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert "seeds" in shell.fails("sample", "--num", 4, "--seed", 1, "--out", "s.npz")


def test_a_folder_is_continued_and_foreign_folders_are_refused(shell, tmp_path):
    write_model(tmp_path)
    shell.out("sample", "--num", 6, "--out", "f")
    (tmp_path / "f" / "000004.png").unlink()
    assert shell.json("sample", "--num", 6, "--out", "f")["continued_at"] == 4
    assert read_png_text(tmp_path / "f" / "000004.png")["seed"] == "4"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").write_bytes(b"x")
    assert "other files" in shell.fails("sample", "--num", 2, "--out", "mine")


@pytest.mark.parametrize("left", [b"", bytes(500), None], ids=["empty", "zeros", "cut"])
def test_a_picture_that_a_power_cut_broke_is_made_again(shell, tmp_path, left):
    write_model(tmp_path)
    shell.out("sample", "--num", 4, "--out", "f")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "f").glob("*.png")}
    (tmp_path / "f" / "000002.png").write_bytes(whole["000002.png"][:-1] if left is None else left)
    assert shell.json("sample", "--num", 4, "--out", "f")["continued_at"] == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "f").glob("*.png")} == whole


def test_a_folder_does_not_wait_for_the_disk_image_by_image(shell, tmp_path, monkeypatch):
    write_model(tmp_path)
    waits = []
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: waits.append(handle) or plain(handle))
    shell.out("sample", "--num", 3, "--out", "few")
    few = len(waits)
    shell.out("sample", "--num", 30, "--out", "many")
    assert len(waits) - few == few


def test_a_signal_ends_the_batch_that_is_being_made(shell, tmp_path, monkeypatch):
    write_model(tmp_path)
    solved, made = solvers.multistep, []

    def slow(denoise, x, sigmas, noise):
        made.append(len(x))
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return solved(denoise, x, sigmas, noise)

    monkeypatch.setattr(solvers, "multistep", slow)
    began = time.monotonic()
    code, _, said = shell("sample", "--num", 24, "--batch-size", 4, "--out", "cut")
    assert code == 128 + signal.SIGTERM and "what was made is kept" in said
    assert time.monotonic() - began < 30
    assert made == [4, 4, 4] and len(list((tmp_path / "cut").glob("*.png"))) == 8
    assert shell.json("sample", "--num", 24, "--batch-size", 4, "--out", "cut")["continued_at"] == 8


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_kill_dash_nine_loses_nothing_that_was_written(shell, tmp_path):
    write_model(tmp_path)
    shell.out("sample", "--num", 3000, "--batch-size", 10, "--out", "whole.npz")
    code = (
        "from cmtool.data import shards; shards.SHARD_SECONDS = 0.02; import sys; from cmtool.cli.app import run;"
        "run(['sample', '--num', '3000', '--batch-size', '10', '--out', 'big.npz'])"
    )
    root = str(Path(__file__).resolve().parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("big.npz.partial/0*.npz")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    if not (tmp_path / "big.npz").exists():
        assert shell.json("sample", "--num", 3000, "--batch-size", 10, "--out", "big.npz")["continued_at"] > 0
    assert np.array_equal(archive("whole.npz")["arr_0"], archive("big.npz")["arr_0"])


BAD = [
    (["--steps", "0"], "steps"),
    (["--steps", "2", "--times", "80,1"], "give one of them"),
    (["--times", "80,abc"], "no number"),
    (["--times", "80,,1"], "empty entry"),
    (["--times", "0.8,80"], "strictly decrease"),
    (["--times", "100"], "outside the model's range"),
    (["--indices", "0,22"], "--of"),
    (["--indices", "0,50", "--of", "40"], "outside a grid"),
    (["--of", "40"], "--indices"),
    (["--sampler", "heunn"], "Did you mean heun"),
    (["--sampler", "heun"], "choose from multistep"),
    (["--label", "dog"], "unknown label"),
    (["--label", "9"], "unknown label"),
    (["--seeds", "9-4"], "backwards"),
    (["--seeds", "x"], "neither"),
    (["--seeds", "1-3", "--num", "9"], "disagree"),
    (["--seeds", "1-3", "--seed", "0"], "give one of them"),
    (["--out", "a.jpg"], "not written here"),
    (["--out", "file/x.png"], "file"),
    (["--num", "20000"], "too many for one grid"),
    (["--device", "tpu"], "tpu"),
    (["--quantize", "floor"], "floor"),
    (["--model", "nowhere"], "no model"),
    (["--model", "file"], "damaged"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_sentence_and_leaves_nothing(shell, tmp_path, arguments, says):
    write_model(tmp_path, num_classes=2, names=["ant", "bee"])
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    assert says in shell.fails("sample", *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "typed",
    ["--out a.jpg", "--out f --model runs/points", "--num 20000", "--label 9", "--times 1,2", "--seeds 1 --seed 1",
     "--sampler heun", "--model runs/none"],
)  # fmt: skip
def test_mistakes_are_answered_before_torch_is_imported(tmp_path, typed):
    write_model(tmp_path, num_classes=2)
    points = write_model(tmp_path, "points", source="toy2d")
    os.utime(points, (1, 1))
    code = (
        "import sys; from cmtool.cli.app import run\n"
        f"assert run(['sample', *{typed.split()!r}]) in (1, 2); assert 'torch' not in sys.modules"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr.startswith("Error: "), done.stderr
    assert not (tmp_path / "samples").exists()


def test_more_points_than_a_grid_has_room_for_are_one_picture(shell, tmp_path):
    write_model(tmp_path, source="toy2d")
    assert Image.open(shell.out("sample", "--num", 10_001)).size[0] > 300


def test_the_command_in_the_file_can_be_typed_again(shell, tmp_path, monkeypatch):
    write_model(tmp_path, num_classes=2, names=["an ant", "bee"])
    words = ["sample", "--num", "1", "--label", "an ant", "--out", "my ant.png"]
    monkeypatch.setattr(sys, "argv", ["cmtool", *words])
    assert shlex.split(read_png_text(shell.out(*words))["command"]) == ["cmtool", *words]


def test_no_model_at_all_says_how_to_get_one(shell):
    assert "cmtool train-ct --preset digits" in shell.fails("sample")


def test_a_label_for_an_unconditional_model_is_refused(shell, tmp_path):
    write_model(tmp_path)
    assert "not conditioned" in shell.fails("sample", "--label", "1")


def test_lists_round_trip():
    assert parse_ints("37,40-43", "--seeds") == (37, 40, 41, 42, 43)
    assert format_ints((37, 40, 41, 42, 43)) == "37,40-43"
    assert format_ints(range(64)) == "0-63"
    assert format_ints(()) == ""
    assert parse_floats("80, 0.8", "--times") == (80.0, 0.8)
    assert choose_seeds(3, 2, None, 64) == range(2_000_000, 2_000_003)
    assert choose_seeds(None, None, None, 64) == range(64)
    assert choose_labels(["3"], 10, [str(9 - i) for i in range(10)]) == [6]
    with pytest.raises(UsageError):
        parse_ints("0-99999999999", "--seeds")


def test_a_teacher_is_guided_by_no_label_or_by_a_weak_model(shell, tmp_path):
    write_model(tmp_path, "student")
    write_model(tmp_path, "weak", kind="diffusion", num_classes=3)
    write_model(tmp_path, "teacher", kind="diffusion", num_classes=3, label_dropout=0.1)
    ask = ("sample", "--model", "runs/teacher", "--num", 2, "--label", 1, "--steps", 2, "--sampler", "euler")
    found = {}
    for name, more in {
        "plain": (),
        "none": ("--guidance", 1),
        "labels": ("--guidance", 2),
        "outside": ("--guidance", 2, "--guidance-interval", "0.0001,0.001"),
        "weak": ("--guidance", 2, "--weak", "runs/weak"),
    }.items():
        shell.out(*ask, *more, "--out", f"{name}.npz")
        found[name] = archive(tmp_path / f"{name}.npz")["arr_0"]
    assert np.array_equal(found["plain"], found["none"]) and np.array_equal(found["plain"], found["outside"])
    assert not np.array_equal(found["plain"], found["labels"]) and not np.array_equal(found["weak"], found["labels"])
    document = shell.json(*ask, "--guidance", 2, "--weak", "runs/weak", "--out", "again.npz")
    assert (document["nfe"], document["guidance"], document["weak"]) == (4, 2.0, "runs/weak/model.safetensors")
    assert "runs/teacher" in shell("sample", "--guidance", 3, "--num", 1)[2]  # not the newest consistency model


def test_guidance_that_a_model_cannot_give_is_refused(shell, tmp_path):
    write_model(tmp_path, "student")
    write_model(tmp_path, "teacher", kind="diffusion")
    for words, sentence in {
        ("--model", "runs/student", "--guidance", 2): "guided while it is trained",
        ("--model", "runs/teacher", "--guidance", 2): "knows no classes",
        ("--model", "runs/teacher", "--guidance", 2, "--weak", "runs/student"): "a teacher is guided by a teacher",
        ("--model", "runs/teacher", "--weak", "runs/teacher"): "there is none",
        ("--model", "runs/teacher", "--guidance", 2, "--guidance-interval", "5,1"): "lower and a higher",
    }.items():
        assert sentence in shell.fails("sample", *words)
    assert not (tmp_path / "samples").exists()
