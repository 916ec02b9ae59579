"""Precision, recall, density and coverage against their definitions."""

import numpy as np
import pytest

from cmtool.errors import DataError
from cmtool.evaluation import manifold as module
from cmtool.evaluation.manifold import manifold
from tests.evaluation.known import GOLDEN, degenerate_sets, golden_sets, plain_manifold


@pytest.mark.parametrize("k", [3, 5])
def test_golden_features(k):
    real, fake, _ = golden_sets()
    found = manifold(real, fake, k, k).figures()
    assert found == pytest.approx({name: GOLDEN[f"prdc{k}"][name] for name in found}, abs=1e-12)


@pytest.mark.parametrize("name", degenerate_sets())
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_to_brute_force(name, dtype):
    real, fake = (x.astype(dtype) for x in degenerate_sets()[name])
    plain = plain_manifold(real.astype(np.float64), fake.astype(np.float64))
    assert manifold(real, fake).figures() == pytest.approx(plain, abs=1e-12)


def test_blocks_change_nothing(monkeypatch):
    real, fake = degenerate_sets()["shared points"]
    whole = manifold(real, fake)
    monkeypatch.setattr(module, "ROWS", 37)
    monkeypatch.setattr(module, "COLUMNS", 53)
    parts = manifold(real, fake)
    assert parts.figures() == whole.figures()
    assert (parts.inside == whole.inside).all()


@pytest.mark.parametrize("name", ["random", "identical", "fewer samples than dimensions", "one constant feature"])
def test_equal_to_torch_fidelity(name):
    theirs = pytest.importorskip("torch_fidelity.metric_prc", reason="torch-fidelity is not installed")
    torch = pytest.importorskip("torch")
    real, fake = degenerate_sets()[name]
    precision, recall = theirs.calculate_precision_recall_full(torch.from_numpy(fake), torch.from_numpy(real), 3)
    found = manifold(real, fake)
    # torch-fidelity averages its mask in float32.
    assert (found.precision, found.recall) == pytest.approx((precision, recall), abs=1e-6)


def test_every_kind_of_failure_shows_in_its_own_figure():
    random = np.random.default_rng(0)
    real = random.standard_normal((400, 4))
    few = real[:1] + 0.05 * random.standard_normal((400, 4))
    assert manifold(real, few).precision > 0.9
    assert manifold(real, few).recall < 0.05
    far = real + 100
    assert manifold(real, far).figures() == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    assert manifold(real, real).figures() == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}


def test_refusals():
    rows = np.random.default_rng(0).standard_normal((6, 3))
    with pytest.raises(DataError, match=r"need more than 5 images a side; the samples hold 4"):
        manifold(rows, rows[:4])
    with pytest.raises(DataError, match="the reference holds 5"):
        manifold(rows[:5], rows)
    with pytest.raises(DataError, match="not finite"):
        manifold(np.where(rows > 0, np.nan, rows), rows)


def test_many_dimensions_far_from_zero():
    random = np.random.default_rng(9)
    real = (random.random((130, 512)) ** 4 + 30).astype(np.float32)
    fake = np.concatenate([real[:40], (random.random((70, 512)) ** 4 + 30.02).astype(np.float32)])
    plain = plain_manifold(real.astype(np.float64), fake.astype(np.float64))
    assert manifold(real, fake).figures() == pytest.approx(plain, abs=1e-12)
