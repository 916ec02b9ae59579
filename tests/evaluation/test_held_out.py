"""Copies against held-out images, and judging a run on a user's own images by those it held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmtool.config.schema import EvalConfig
from cmtool.data.dataset import from_tensors
from cmtool.data.holdout import hold_out
from cmtool.errors import DataError, UserError
from cmtool.evaluation import pretrained
from cmtool.evaluation.closing_search import OWN_COUNT, RunJudge
from cmtool.evaluation.judge import Judge
from cmtool.evaluation.memorization import nearer_to_training
from cmtool.evaluation.references import Reference, held_out_reference
from cmtool.evaluation.samples import from_array
from cmtool.evaluation.verdict import Judging, judge_sets
from cmtool.training.report import Watch


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "has_imagenet", lambda: False)
    monkeypatch.chdir(tmp_path)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def test_the_share_equals_its_definition():
    samples, training, held = normal(60, 4, seed=1), normal(40, 4, seed=2) + 100, normal(50, 4, seed=3) + 100
    samples += 100

    def nearest(others):
        return np.linalg.norm(samples[:, None] - others[None], axis=-1).min(axis=1)

    found = nearer_to_training(samples, training, held)
    assert found.share == np.mean(nearest(training) < nearest(held[:40]))
    with pytest.raises(DataError):
        nearer_to_training(samples, training[:1], held)


def test_the_error_is_the_spread_over_all_ways_to_call_half_of_the_images_training():
    """With few clusters most samples are nearest to few images, and chance strays far more than a coin."""
    rows, samples = normal(60, 2, seed=1), 0.3 * normal(200, 2, seed=2)
    random, shares = np.random.default_rng(3), []
    for _ in range(2000):
        order = random.permutation(60)
        shares.append(nearer_to_training(samples, rows[order[:30]], rows[order[30:]]).share)
    found = nearer_to_training(samples, rows[:30], rows[30:])
    assert np.mean(shares) == pytest.approx(0.5, abs=4 * np.std(shares) / 2000**0.5)
    assert found.error == pytest.approx(np.std(shares), rel=0.06)
    assert found.error > 2 * 0.5 / 200**0.5


def test_copies_are_significant_and_fresh_samples_are_not():
    training, held, fresh = normal(400, 8, seed=1), normal(400, 8, seed=2), normal(500, 8, seed=3)
    honest = nearer_to_training(fresh, training, held)
    assert not honest.significant and abs(honest.share - 0.5) < 3 * honest.error
    copied = np.concatenate([fresh[:400], training[:100] + 0.01])
    caught = nearer_to_training(copied, training, held)
    assert caught.significant and caught.share == pytest.approx(0.6, abs=0.05)


def test_training_warns_once_when_samples_begin_to_be_copies():
    watch = Watch()
    assert not watch.figures(10, {"fid": 100.0, "copies": 0.52, "copies_std": 0.01})
    (said,) = watch.figures(20, {"fid": 90.0, "copies": 0.56, "copies_std": 0.01})
    assert "step 20" in said and "56%" in said and "50 ± 1.0 %" in said
    assert not watch.figures(30, {"fid": 80.0, "copies": 0.6, "copies_std": 0.01})
    assert not watch.figures(40, {"fid": 80.0})


def split(count=400, share=0.25):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return hold_out(from_tensors(torch.from_numpy(images).permute(0, 3, 1, 2), None, "test"), share)


def test_held_out_images_judge_with_as_many_of_the_training_images():
    data = split()
    reference = held_out_reference(data, "photos")
    assert reference.features == "small" and reference.count == 1000
    assert reference.images.count == reference.training.count == len(data.held_out)
    judge = Judge.of(reference)
    held = judge(from_array(data.held_out.images.permute(0, 2, 3, 1).numpy(), "held"))
    assert held.values["fid"] == pytest.approx(0, abs=1e-6) and held.values["copies"] == 0
    learned = judge(from_array(data.images.permute(0, 2, 3, 1).numpy(), "all training images"))
    assert learned.values["copies"] > 0.5 + 3 * learned.values["copies_std"]
    assert any("copies images" in note for note in learned.notes)
    said = judge.protocol(None)
    assert (said["training_images"], said["reference"]) == (len(data.held_out), "held-out images of photos")
    assert said["features"] == "small" and said["resize"] and said["weights_sha256"]
    with pytest.raises(DataError, match="not held out"):
        Judge.of("digits")(from_array(np.zeros((20, 8, 8, 1), np.uint8), "black"), ["copies"])


def test_a_reference_that_lacks_what_a_metric_asks_is_refused_before_samples_are_made():
    class Slow:
        shape = (8, 8, 1)

        def open(self, usual):
            raise AssertionError("samples were made")

    with pytest.raises(DataError, match="not held out"):
        judge_sets([Slow()], "digits", Judging(metrics=("fid", "copies")))
    with pytest.raises(AssertionError, match="samples were made"):
        judge_sets([Slow()], "digits", Judging(metrics=("fid", "memorization")))


def test_a_run_judge_looks_at_held_out_images_only_when_it_is_asked(monkeypatch):
    header = {"kind": "consistency", "data": {"resolution": 8, "channels": 3}, "times": {}}
    model = type("Model", (), {"header": header, "device": "cpu"})()
    judge = RunJudge.of(EvalConfig(), model, split())
    assert judge.own and judge.count == 1000 and judge.metrics == ("fid", "pr", "copies")
    assert "judge" not in judge.__dict__
    assert judge.search_count(1000) == 0 and judge.search_count(10**6) == OWN_COUNT
    assert not judge.is_worth(model, 1000) and judge.is_worth(model, 5000)
    assert judge.quick
    monkeypatch.setattr(pretrained, "has_imagenet", lambda: True)
    assert not RunJudge.of(EvalConfig(), model, split()).quick
    assert RunJudge.of(EvalConfig(features="small"), model, split()).quick
    with pytest.raises(UserError, match="names no reference"):
        RunJudge.of(EvalConfig(), model, split(share=0.0))


# --- metrics that are defined with a network of their own ---


def test_cmmd_is_its_definition():
    from cmtool.evaluation.kid import gaussian_mmd

    first, second = 6 * normal(30, 5, seed=1), 6 * normal(20, 5, seed=2) + 1

    def kernel(a, b):
        return np.exp(-(np.linalg.norm(a[:, None] - b[None], axis=-1) ** 2) / 200).mean()

    expected = 1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))
    assert gaussian_mmd(first, second) == pytest.approx(expected, rel=1e-9)
    # Points a and b alone: 2 - 2 exp(-|a - b|^2 / 200), times 1,000.
    assert gaussian_mmd(np.zeros((1, 1)), np.full((1, 1), 10.0)) == pytest.approx(2000 * (1 - np.exp(-0.5)))


def test_one_command_judges_in_several_networks(monkeypatch):
    from dataclasses import replace

    from cmtool.evaluation.metrics import METRICS

    for name in ("fdd", "cmmd"):
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], network="small"))
    pictures = np.random.default_rng(1).integers(0, 256, (2, 60, 16, 16, 3), dtype=np.uint8)
    real, samples = (from_array(part, name) for part, name in zip(pictures, ("real", "samples"), strict=True))
    reference = Reference("real", "", real, "shapes", 60)
    judge = Judge.of(reference)
    found = judge(samples, ("fid", "fdd", "cmmd"))
    alone = Judge.of(reference, features="small")(samples, ("fid", "fdd", "cmmd"))
    assert found.values["fid"] == judge(samples, ("fid",)).values["fid"]
    assert found.values["fdd"] == alone.values["fdd"] == alone.values["fid"]
    assert found.values["cmmd"] == alone.values["cmmd"] > 0
    said = judge.protocol(("fid", "fdd"))
    assert said["features"] == "shapes" and said["beside"]["fdd"]["features"] == "small"
