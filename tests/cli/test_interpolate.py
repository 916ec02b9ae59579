"""`cmtool interpolate` as it is typed."""

import numpy as np
import pytest
from PIL import Image

from tests.cli.tiny import Shell, write_model


@pytest.fixture
def shell(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    return Shell(tmp_path, capfd)


def test_a_grid_of_24_by_default(shell, tmp_path):
    assert shell.out("interpolate") == "samples/tiny-path-0-1.png"
    assert (tmp_path / "samples" / "tiny-path-0-1.png").is_file()


def test_the_ends_are_the_samples_themselves(shell, tmp_path):
    shell.out("interpolate", "--seeds", "7,9", "--num", 5, "--out", "frames")
    shell.out("sample", "--seeds", "7,9", "--out", "ends.npz")
    with np.load("ends.npz") as found:
        ends = found["arr_0"].astype(int)
    files = sorted((tmp_path / "frames").glob("*.png"))
    assert len(files) == 5
    for file, end in ((files[0], ends[0]), (files[-1], ends[1])):
        assert np.abs(np.asarray(Image.open(file)).astype(int) - end).max() <= 1


def test_a_loop_as_a_gif(shell):
    document = shell.json("interpolate", "--seeds", "1,2,3", "--num", 12, "--loop", "--out", "clip.gif")
    assert (document["frames"], document["seeds"]) == (12, [1, 2, 3])
    with Image.open("clip.gif") as clip:
        assert clip.n_frames == 12
        assert clip.info["loop"] == 0
        assert clip.size == (128, 128)


def test_two_pictures_are_inverted_by_a_teacher_and_the_error_is_said(shell, tmp_path):
    write_model(tmp_path, "teacher", kind="diffusion")
    for name, seed in (("a.png", 1), ("b.png", 2)):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(name)
    document = shell.json("interpolate", "--images", "a.png", "b.png", "--num", 4, "--inversion-steps", 6, "--out", "f")
    assert len(document["reconstruction_rmse"]) == 2
    assert all(error > 0 for error in document["reconstruction_rmse"])
    assert len(list((tmp_path / "f").glob("*.png"))) == 4


BAD = [
    (["--seeds", "1"], "needs two"),
    (["--seeds", "a,b"], "neither"),
    (["--num", "1"], "num"),
    (["--out", "x.mp4"], "not written here"),
    (["--out", "file"], "not a folder"),
    (["--images", "a.png"], "needs two"),
    (["--images", "a.png", "gone.png"], "no such file"),
    (["--images", "a.png", "a.png"], "there is no teacher"),
    (["--images", "a.png", "a.png", "--teacher", "runs/tiny"], "teacher is needed"),
    (["a.png"], "--images"),
    (["--teacher", "runs/tiny"], "--images"),
    (["--label", "3"], "not conditioned"),
    (["--times", "1,2"], "strictly decrease"),
    (["--model", "nowhere"], "no model"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_sentence_and_leaves_nothing(shell, tmp_path, arguments, says):
    (tmp_path / "file").write_text("x")
    Image.new("RGB", (8, 8)).save("a.png")
    before = sorted(tmp_path.rglob("*"))
    assert says in shell.fails("interpolate", *arguments)
    assert sorted(tmp_path.rglob("*")) == before
