"""Kernel distance and Inception Score."""

import numpy as np
import pytest

from cmtool.errors import DataError
from cmtool.evaluation.inception_score import inception_score
from cmtool.evaluation.kid import KernelDistance, kernel_distance, kid_notes, mmd, subset_draws
from tests.evaluation.known import GOLDEN, degenerate_sets, golden_sets


def test_golden_kernel_distance_and_one_subset_of_everything():
    real, fake, _ = golden_sets()
    assert mmd(real, fake) == pytest.approx(GOLDEN["kid_full"], rel=1e-12)
    everything = [(np.arange(400), np.arange(500))]
    assert kernel_distance(fake, real, everything).mean == pytest.approx(GOLDEN["kid_full"], rel=1e-12)


def test_one_dimension_by_hand():
    # k(x, y) = (xy + 1)^3 on {0, 1} against {1, 2}: within 1 and 27, across (1 + 1 + 8 + 27) / 4.
    assert mmd(np.array([[0.0], [1.0]]), np.array([[1.0], [2.0]])) == pytest.approx(1 + 27 - 2 * 37 / 4)


@pytest.mark.parametrize("name", degenerate_sets())
def test_equal_to_clean_fid_on_the_same_subsets(name):
    kernel = pytest.importorskip("cleanfid.fid").kernel_distance
    real, fake = degenerate_sets()[name]
    size = min(len(real), len(fake))
    np.random.seed(11)
    theirs = kernel(fake, real, num_subsets=5)
    np.random.seed(11)
    # clean-fid draws the reference first.
    drawn = [(np.random.choice(len(real), size, False), np.random.choice(len(fake), size, False)) for _ in range(5)]
    found = kernel_distance(fake, real, [(b, a) for a, b in drawn])
    assert found.mean == pytest.approx(theirs, rel=1e-6, abs=1e-6)


def test_equal_to_torch_fidelity_with_its_own_draws():
    theirs = pytest.importorskip("torch_fidelity.metric_kid", reason="torch-fidelity is not installed")
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    fake, real = random.standard_normal((1100, 12)), random.standard_normal((1300, 12)) * 1.1
    value = theirs.kid_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), kid_subsets=8, kid_subset_size=1000, rng_seed=2020, verbose=False,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1,
    )  # fmt: skip
    found = kernel_distance(fake, real, subsets=8)
    assert found.mean == pytest.approx(value["kernel_inception_distance_mean"], abs=1e-9)
    assert found.std == pytest.approx(value["kernel_inception_distance_std"], abs=1e-9)


def test_unbiased_and_reproducible():
    random = np.random.default_rng(3)
    values = [mmd(*random.standard_normal((2, 40, 5))) for _ in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    first = [rows.tolist() for pair in subset_draws(50, 60, 2) for rows in pair]
    assert first == [rows.tolist() for pair in subset_draws(50, 60, 2) for rows in pair]


def test_golden_inception_score():
    _, _, chances = golden_sets()
    for splits in (1, 5):
        expected = GOLDEN["inception_score"][f"splits{splits}"]
        found = inception_score(chances, splits=splits)
        assert found.blocks == pytest.approx(expected, rel=1e-12)
        assert found.mean == pytest.approx(np.mean(expected), rel=1e-9)
        assert found.std == (pytest.approx(np.std(expected), rel=1e-9) if splits > 1 else None)


def test_score_ends_and_blocks():
    certain = np.eye(10)[np.arange(100) % 10]
    assert inception_score(certain).mean == pytest.approx(10)
    assert inception_score(np.full((50, 10), 0.1)).mean == pytest.approx(1)
    assert len(inception_score(certain, block=30).blocks) == 4
    assert inception_score(certain[:5000]).blocks == inception_score(certain[:5000], block=100).blocks


def test_refusals():
    with pytest.raises(DataError, match="at least 2 images"):
        kernel_distance(np.zeros((1, 3)), np.zeros((9, 3)))
    with pytest.raises(DataError, match="3 and 4 features"):
        kernel_distance(np.zeros((9, 3)), np.zeros((9, 4)))
    with pytest.raises(DataError, match="not finite"):
        kernel_distance(np.full((9, 3), np.nan), np.zeros((9, 3)))
    with pytest.raises(DataError, match="no images"):
        inception_score(np.zeros((0, 10)))


@pytest.mark.parametrize("count", [40, 1200])
def test_a_set_against_itself_is_at_distance_zero_in_any_order_and_single_precision(count):
    random = np.random.default_rng(0)
    rows = random.standard_normal((count, 24)).astype(np.float32) * 3 + 5
    again = (rows * (1 + random.uniform(-1e-7, 1e-7, rows.shape))).astype(np.float32)
    for other in (rows, again[random.permutation(count)]):
        assert str(kernel_distance(rows, other).mean) == "0.0" and kernel_distance(rows, other).std is None
    assert str(kernel_distance(np.ones((30, 4)) * 0.3, np.ones((20, 4)) * 0.3).mean) == "0.0"


@pytest.mark.parametrize("change", ["one row", "one value", "a small shift"])
def test_sets_that_differ_a_little_are_not_at_distance_zero(change):
    rows = np.random.default_rng(0).standard_normal((50, 8))
    other = rows.copy()
    if change == "one row":
        other[7] = other[8]
    elif change == "one value":
        other[7, 3] += 1e-4
    else:
        other += 1e-4
    assert kernel_distance(rows, other).mean != 0


def test_the_spread_is_given_only_where_subsets_are_smaller_than_the_sets():
    random = np.random.default_rng(5)
    for n, m in ((300, 300), (300, 1500), (1500, 1000), (1000, 1000)):
        rows, others = random.standard_normal((n, 6)), random.standard_normal((m, 6)) * 1.1
        found = kernel_distance(rows, others, subsets=4)
        assert found.std is None and found.subset == min(n, m)
        if n == m:
            assert found.mean == pytest.approx(mmd(rows, others), rel=1e-12)
    found = kernel_distance(random.standard_normal((1200, 6)), random.standard_normal((1300, 6)), subsets=4)
    assert found.std is not None and found.std > 1e-6


def test_the_notes_say_what_the_spread_is_worth():
    (one,) = kid_notes(KernelDistance(0.1, None, 300), 300, 5000)
    assert "all 300 images" in one and "without an error" in one
    (two,) = kid_notes(KernelDistance(0.1, 0.01, 1000), 1797, 1500)
    assert "less than its error" in two.replace("\n", " ")
    assert kid_notes(KernelDistance(0.1, 0.01, 1000), 5000, 5000) == []
    assert "same features" in kid_notes(KernelDistance(0.0, None, 300), 300, 300)[0]


def test_one_block_of_the_inception_score_has_no_spread():
    chances = np.random.default_rng(0).dirichlet(np.ones(10), 400)
    assert inception_score(chances).std is None
    assert inception_score(chances, block=200).std > 0
