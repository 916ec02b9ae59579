"""Averages chosen after training: profiles, and weights against the average kept all along."""

import numpy as np
import pytest
import torch

from cmtool.checkpoint import load_tensors, read_header
from cmtool.data.load import load_dataset
from cmtool.errors import UserError
from cmtool.training.averages import power_gamma
from cmtool.training.posthoc import Snapshot, combination, overlaps, reconstruct, write_snapshots
from cmtool.training.setup import prepare
from tests.losses.oracles import config_of


def test_overlaps_are_integrals_of_the_profiles():
    t, g, u, h = 3.0, 2.0, 5.0, 6.94
    tau = (np.arange(200_000) + 0.5) / 200_000 * 3
    product = (g + 1) * tau**g / t ** (g + 1) * (h + 1) * tau**h / u ** (h + 1)
    found = overlaps(np.array([t]), np.array([g]), np.array([u]), np.array([h]))
    assert float(found[0, 0]) == pytest.approx(product.mean() * 3, rel=1e-6)


def test_overlaps_of_long_runs_do_not_overflow():
    steps, gammas = np.array([1e6, 2e6]), np.array([power_gamma(0.01)] * 2)
    assert np.isfinite(overlaps(steps, gammas, steps, gammas)).all()


def test_a_snapshot_itself_needs_no_others():
    snapshots = [Snapshot(100 * k, power_gamma(0.10), None) for k in range(1, 6)]
    weights, error = combination(snapshots, 500, power_gamma(0.10))
    assert weights == pytest.approx([0, 0, 0, 0, 1], abs=1e-6)
    assert error < 1e-6


def test_two_widths_and_enough_snapshots_make_a_third():
    snapshots = [Snapshot(50 * k, power_gamma(std), None) for k in range(1, 41) for std in (0.05, 0.10)]
    for std, most in ((0.07, 2e-3), (0.15, 0.02), (0.05, 1e-6)):
        weights, error = combination(snapshots, 2000, power_gamma(std))
        assert error < most
        assert weights.sum() == pytest.approx(1.0, abs=5e-3)


AVERAGES = (
    'train.ema={kind="power",std=0.05}',
    'train.extra_emas=[{kind="power",std=0.10},{kind="power",std=0.07}]',
    "train.lr=0.01",
)


def test_reconstruction_is_the_average_that_was_kept_all_along(tmp_path):
    config = config_of("edm", *AVERAGES, "train.warmup=0", **{"train.steps": 80})
    trainer = prepare(config, load_dataset(config.data), torch.device("cpu"))
    for step in range(1, 81):
        trainer.step()
        if step % 4 == 0:
            write_snapshots(trainer.state, tmp_path)
    for path in (tmp_path / "averages").glob("*-2.safetensors"):
        path.unlink()  # the one that must be found from the other two
    made = reconstruct(tmp_path, 0.07, tmp_path / "made.safetensors")
    assert made["error"] < 0.02
    found = load_tensors(tmp_path / "made.safetensors")[0]
    kept, other = (trainer.state.extra_emas[i].network.state_dict() for i in (1, 0))
    apart = sum(float((other[name] - kept[name]).norm() ** 2) for name in kept) ** 0.5
    missed = sum(float((found[name] - kept[name]).norm() ** 2) for name in kept) ** 0.5
    assert missed < 0.1 * apart
    header = read_header(tmp_path / "made.safetensors")
    assert header["step"] == 80
    assert header["average"]["std"] == 0.07


def test_without_snapshots_the_setting_is_named(tmp_path):
    with pytest.raises(UserError, match="no snapshots") as caught:
        reconstruct(tmp_path, 0.05, tmp_path / "x.safetensors")
    assert "snapshot_every" in caught.value.hint
    for wrong in (0.0, 0.5, -1):
        with pytest.raises(UserError, match="no width"):
            reconstruct(tmp_path, wrong, tmp_path / "x.safetensors")
