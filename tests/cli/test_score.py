"""`cmtool train-cd --recipe sid | dmd2 | polish` as typed: what it makes, and which models it refuses."""

from pathlib import Path

import pytest

from cmtool.checkpoint import load_tensors, read_header, save_model
from tests.training.tiny import FLAGS, teacher_file

# Unjudged: the search for sampling times at the end would take longer than the training.
SMALL = (*FLAGS, "--steps", "2", "--batch-size", "4", "--set", "eval.reference=")


@pytest.fixture
def models(tmp_path):
    """A teacher and a consistency model, and the teacher with another range of noise levels."""
    teacher, start = teacher_file(tmp_path / "teacher.safetensors"), tmp_path / "start.safetensors"
    teacher_file(start, recipe="icd")
    tensors, header = load_tensors(teacher)
    save_model(tmp_path / "other.safetensors", tensors, header | {"process": header["process"] | {"sigma_max": 40.0}})
    return tmp_path


def test_three_ways_to_follow_scores(cmtool, models):
    teacher = ("--teacher", models / "teacher.safetensors")
    for recipe, more in (("sid", ()), ("dmd2", ()), ("polish", ("--init", models / "start.safetensors"))):
        done = cmtool("train-cd", *SMALL, "--recipe", recipe, *teacher, *more, "--out", f"runs/{recipe}")
        assert done.code == 0, done.err
        steps = ("--steps", "2") if recipe == "polish" else ()
        sampled = cmtool("sample", "--model", f"runs/{recipe}", "--num", "4", *steps, "--out", f"{recipe}.png")
        assert sampled.code == 0 and Path(f"{recipe}.png").is_file(), sampled.err
    assert read_header("runs/sid/model.safetensors")["process"]["sigma_max"] == 2.5
    assert read_header("runs/polish/model.safetensors")["process"]["sigma_max"] == 80.0
    again = cmtool("train-cd", *SMALL, "--recipe", "sid", *teacher, "--out", "runs/sid")
    assert again.code == 0 and "is finished" in again.err
    # A model of one level has none to go on from.
    refused = cmtool("train-cd", *SMALL, "--recipe", "polish", *teacher, "--init", "runs/sid", "--out", "runs/again")
    assert refused.code == 1 and "keeps a model's several steps" in refused.err and not Path("runs/again").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--recipe polish --teacher {m}/teacher.safetensors", "starts from a trained consistency model"),
        ("--recipe polish --teacher {m}/teacher.safetensors --init {m}/teacher.safetensors", "goes on from a consist"),
        ("--recipe polish --teacher {m}/other.safetensors --init {m}/start.safetensors", "teacher is of another proc"),
        ("--recipe sid --teacher {m}/start.safetensors", "a teacher is needed"),
        ("--recipe sid --teacher {m}/teacher.safetensors --precision bf16", "half precision rounds away"),
        ("--recipe sid --teacher {m}/teacher.safetensors --set recipe.score.levels=[90]", "leaves the noise levels"),
    ],
)
def test_what_is_refused_before_anything_is_written(cmtool, models, line, words):
    refused = cmtool("train-cd", *SMALL, *line.format(m=models).split(), "--out", "runs/r")
    assert refused.code == 1 and words in refused.err, refused.err
    assert "Traceback" not in refused.err and not Path("runs").exists()
