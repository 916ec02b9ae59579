"""As typed: a run on a user's own pictures, judged by those it held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmtool.checkpoint import read_header
from cmtool.evaluation import pretrained

TINY = ("--preset", "shapes", "--set", "network.channels=8", "--set", "network.head_channels=8", "--set",
        "network.group_channels=1", "--batch-size", 16, "--set", "data.labels=false", "--set", "data.resolution=8",
        "--set", "network.attention=[]", "--set", "network.channel_mult=[1]")  # fmt: skip


@pytest.fixture(autouse=True)
def without_large_networks(monkeypatch):
    monkeypatch.setattr(pretrained, "has_imagenet", lambda: False)


def write_pictures(folder="photos", count=160):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    Path(folder).mkdir()
    for row, image in enumerate(images):
        Image.fromarray(image).save(f"{folder}/{row:03d}.png")
    return images


def test_a_run_on_ones_own_pictures_is_judged_by_those_it_held_out(cmtool):
    write_pictures()
    words = ("train-ct", *TINY, "--data", "photos", "--steps", 6, "--set", "data.holdout=0.25", "--name", "f", "--set",
             "train.eval_every=3", "--set", "eval.count=40", "--set", "train.log_every=3")  # fmt: skip
    typed = cmtool(*words)
    assert typed.code == 0, typed.err
    assert "of 160 images are held out of training" in typed.err and "copies" in typed.err
    rows = [json.loads(line) for line in Path("runs/f/metrics.jsonl").read_text().splitlines()]
    judged = [row for row in rows if "eval" in row]
    assert [row["step"] for row in judged] == [3, 6]
    assert judged[0]["eval"].keys() == {"fid", "precision", "recall", "copies", "copies_std"}
    assert judged[0]["protocol"]["features"] == "small" and "photos" in judged[0]["protocol"]["reference"]
    data = read_header("runs/f/model.safetensors")["data"]
    assert data["holdout"] == 0.25 and data["path"] == "photos"
    # Without --ref, and with the run as a reference of other samples.
    told = cmtool("eval", "--model", "runs/f", "--num", 40, "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert found["protocol"]["reference"] == "held-out images of photos"
    assert found["results"][0]["metrics"]["copies"] is not None and found["protocol"]["training_images"] > 10
    assert found["protocol"]["reference_fingerprint"] == judged[0]["protocol"]["reference_fingerprint"]
    by_run = cmtool("eval", next(Path("samples").glob("*.npz")), "--ref", "runs/f", "--json", "--metrics", "copies")
    assert by_run.code == 0, by_run.err
    assert json.loads(by_run.out)["results"][0]["metrics"]["copies"] == found["results"][0]["metrics"]["copies"]
    said = cmtool("eval", "--model", "runs/f", "--num", 40)
    assert "small network knows drawn shapes" in said.err and "training of f held out" in said.err
    assert "copies (chance .5)" in said.out
    # It goes on as the same run, and the pictures are needed to judge it.
    assert "is finished" in cmtool(*words).err
    Path("photos").rename("elsewhere")
    gone = cmtool("eval", "--model", "runs/f", "--num", 40)
    assert gone.code == 1 and "photos" in gone.err and "--ref" in gone.err


def test_times_are_searched_on_held_out_pictures(cmtool, monkeypatch):
    from cmtool.evaluation import closing_search

    monkeypatch.setattr(closing_search, "LEAST_COUNT", 1)
    monkeypatch.setattr(closing_search, "OWN_COUNT", 12)
    monkeypatch.setattr(closing_search, "SHARE", 0.1)
    write_pictures()
    typed = cmtool("train-ct", *TINY, "--data", "photos", "--steps", 6, "--set", "data.holdout=0.25", "--name", "f")
    assert typed.code == 0, typed.err
    assert "searching sampling times" in typed.err
    header = read_header("runs/f/model.safetensors")
    assert set(header["times"]) >= {"1", "2"} and header["figures"]["2"] > 0


def test_too_few_pictures_train_without_figures(cmtool):
    write_pictures(count=24)
    typed = cmtool("train-ct", *TINY, "--data", "photos", "--steps", 2, "--name", "f")
    assert typed.code == 0, typed.err
    assert "no images are held out" in typed.err and "at least 10" in typed.err
    assert typed.err.count("no sampling times are searched") == 1
    assert "holdout" not in read_header("runs/f/model.safetensors")["data"]
    judged = cmtool("eval", "--model", "runs/f", "--num", 20)
    assert judged.code == 2 and "--ref" in judged.err
    refused = cmtool("train-ct", *TINY, "--data", "photos", "--set", "data.holdout=1", "--name", "g")
    assert refused.code == 1 and "data.holdout" in refused.err and not Path("runs/g").exists()
