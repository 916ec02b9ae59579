"""Frechet distance and the statistics under it."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from cmtool.errors import DataError
from cmtool.evaluation.frechet import covariance_factor, frechet_distance, frechet_from_features, frechet_to_fit
from cmtool.evaluation.statistics import CHUNK, Moments, Statistics, statistics
from tests.evaluation.known import GOLDEN, degenerate_sets, golden_sets, plain_frechet


def gaussian(mean, covariance):
    return Statistics(1000, np.asarray(mean, float), np.asarray(covariance, float))


def test_commuting_gaussians_have_the_closed_form():
    case = GOLDEN["closed_form"]
    first = gaussian(np.zeros(3), np.diag(np.square(case["std1"])))
    second = gaussian(case["mean_diff"], np.diag(np.square(case["std2"])))
    assert frechet_distance(first, second) == pytest.approx(case["fd"], abs=1e-12)


@pytest.mark.parametrize("dim", [2, 5, 40])
def test_gaussians_that_do_not_commute_are_exact_to_1e9(dim):
    # With C2 = A C1 A and A symmetric positive definite, (C1 C2)^(1/2) = C1 A: the optimal map is linear and known.
    random = np.random.default_rng(dim)
    root = random.standard_normal((dim, dim))
    first = root @ root.T + np.eye(dim)
    other = random.standard_normal((dim, dim))
    map_ = other @ other.T / dim + 0.5 * np.eye(dim)
    second = map_ @ first @ map_
    shift = random.standard_normal(dim)
    assert np.abs(first @ second - second @ first).max() > 0.1
    expected = shift @ shift + np.trace(first) + np.trace(second) - 2 * np.trace(first @ map_)
    found = frechet_distance(gaussian(np.zeros(dim), first), gaussian(shift, second))
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_two_by_two_formula():
    # tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for 2 x 2 matrices with real non-negative eigenvalues.
    first, second = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.2], [-0.2, 3.0]])
    product = first @ second
    expected = np.trace(first) + np.trace(second) - 2 * np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    found = frechet_distance(gaussian(np.zeros(2), first), gaussian(np.zeros(2), second))
    assert found == pytest.approx(expected, abs=1e-12)


def test_golden_features():
    real, fake, _ = golden_sets()
    for value in GOLDEN["fd"].values():
        assert frechet_from_features(real, fake) == pytest.approx(value, rel=1e-9)
        assert frechet_distance(statistics(fake), statistics(real)) == pytest.approx(value, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Matrix is singular", "ignore:invalid value encountered")
@pytest.mark.parametrize("name", degenerate_sets())
def test_equal_to_the_plain_formula_and_to_clean_fid(name):
    real, fake = degenerate_sets()[name]
    one, two = statistics(real), statistics(fake)
    plain = plain_frechet(one.mean, one.covariance, two.mean, two.covariance)
    for found in (frechet_distance(one, two), frechet_from_features(real, fake)):
        assert found == pytest.approx(plain, rel=1e-6, abs=1e-5)
    try:
        from cleanfid.fid import fid_from_feats
        from cleanfid.fid import frechet_distance as clean

        theirs = [clean(one.mean, one.covariance, two.mean, two.covariance), fid_from_feats(real, fake)]
    except TypeError:
        pytest.skip("this scipy has no sqrtm(disp=...), which clean-fid calls")
    for value in theirs:
        assert frechet_from_features(real, fake) == pytest.approx(value, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("name", degenerate_sets())
def test_equal_to_torch_fidelity(name):
    torch_fidelity = pytest.importorskip("torch_fidelity.metric_fid", reason="torch-fidelity is not installed")
    torch = pytest.importorskip("torch")
    real, fake = degenerate_sets()[name]
    sides = [torch_fidelity.fid_features_to_statistics(torch.from_numpy(x)) for x in (fake, real)]
    theirs = torch_fidelity.fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    assert frechet_from_features(real, fake) == pytest.approx(theirs, rel=1e-6, abs=1e-5)


def test_a_set_against_itself_is_zero():
    for name, (real, _) in degenerate_sets().items():
        if name != "far from zero":
            assert abs(frechet_from_features(real, real)) < 1e-9, name


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 30), st.integers(2, 30), st.integers(0, 1000))
def test_never_negative_symmetric_and_blind_to_rotation(dim, n, m, seed):
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((n, dim)), random.standard_normal((m, dim)) * 2 + 1
    turn = scipy.linalg.qr(random.standard_normal((dim, dim)))[0]
    value = frechet_from_features(a, b)
    assert value > -1e-9
    assert frechet_from_features(b, a) == pytest.approx(value, rel=1e-9, abs=1e-9)
    assert frechet_from_features(a @ turn, b @ turn) == pytest.approx(value, rel=1e-8, abs=1e-8)


def test_factor_rebuilds_singular_and_regular_covariances():
    random = np.random.default_rng(0)
    wide, narrow = random.standard_normal((8, 30)), random.standard_normal((8, 3))
    for root in (wide, narrow, np.zeros((8, 1))):
        covariance = root @ root.T
        factor = covariance_factor(covariance)
        assert np.abs(factor @ factor.T - covariance).max() < 1e-9 * max(np.abs(covariance).max(), 1)
    assert covariance_factor(narrow @ narrow.T).shape[1] == 3


def test_streamed_moments_equal_numpy_and_merge():
    random = np.random.default_rng(1)
    rows = random.standard_normal((2 * CHUNK + 77, 9)).astype(np.float32) * 3 + 50
    fit = statistics(iter(np.array_split(rows, 7)))
    wide = rows.astype(np.float64)
    assert np.abs(fit.mean - wide.mean(0)).max() < 1e-12
    assert np.abs(fit.covariance - np.cov(wide, rowvar=False)).max() < 1e-12
    left, right, empty = Moments(9), Moments(9), Moments(9)
    left.add(rows[:500])
    right.add(rows[500:])
    empty.merge(left)
    empty.merge(right)
    empty.merge(Moments(9))
    assert empty.count == len(rows)
    assert np.abs(empty.finish().covariance - fit.covariance).max() < 1e-11


def test_refusals():
    with pytest.raises(DataError, match="not finite"):
        frechet_from_features(np.array([[1.0, np.nan], [0.0, 1.0]]), np.eye(2))
    with pytest.raises(DataError, match="3 and 2 features"):
        frechet_from_features(np.zeros((4, 3)), np.zeros((4, 2)))
    with pytest.raises(DataError, match="at least 2 images"):
        statistics(np.zeros((1, 3)))
    with pytest.raises(DataError, match="no features"):
        statistics(iter([]))
    with pytest.raises(DataError, match="do not fit"):
        statistics(iter([np.zeros((2, 3)), np.zeros((2, 4))]))


@pytest.mark.parametrize("spread", [0.0, 3.0, 12.0])
def test_the_fast_route_of_large_matrices_is_taken_only_where_it_is_exact(spread):
    dim = 300
    random = np.random.default_rng(4)
    turn = scipy.linalg.qr(random.standard_normal((dim, dim)))[0]
    std1, std2 = np.logspace(0, -spread / 2, dim), np.logspace(0.1, -spread / 2, dim)
    first, second = (gaussian(np.zeros(dim), (turn * std**2) @ turn.T) for std in (std1, std2))
    assert frechet_distance(first, second) == pytest.approx(
        ((std1 - std2) ** 2).sum(), rel=1e-9, abs=2e-6 if spread > 9 else 1e-10
    )


def spectra(dim):
    """Rows of features with the spectra that real ones have, single precision as networks answer."""
    random = np.random.default_rng(dim)
    turn = scipy.linalg.qr(random.standard_normal((dim, dim)))[0]
    for name, scale in {
        "flat": np.ones(dim),
        "falling": 1 / np.arange(1, dim + 1),
        "steep": np.exp(-np.linspace(0, 20, dim)),
        "constant": np.zeros(dim),
    }.items():
        for count in (2, dim // 2 + 2, dim + 1, 3 * dim + 5):
            rows = random.standard_normal((count, dim)) * scale @ turn + (100 if name == "flat" else 1)
            yield rows.astype(np.float32)


@pytest.mark.parametrize("dim", [2, 16, 64, 300])
def test_where_rounding_is_all_there_is_the_distance_is_zero_and_not_below(dim):
    for rows in spectra(dim):
        mixed = rows[np.random.default_rng(1).permutation(len(rows))]
        fits = statistics(rows), statistics(mixed)
        ways = (frechet_distance(*fits), frechet_from_features(rows, mixed), frechet_to_fit(rows, fits[1]))
        assert [str(value) for value in ways] == ["0.0"] * 3


@pytest.mark.parametrize("dim", [2, 64, 300])
@pytest.mark.parametrize("step", [1e-4, 1e-6])
def test_small_distances_that_are_true_are_not_hidden(dim, step):
    rows = np.random.default_rng(0).standard_normal((2 * dim + 9, dim))
    fit, aside = statistics(rows), np.eye(dim)[0] * step
    moved = Statistics(fit.count, fit.mean + aside, fit.covariance)
    assert frechet_distance(fit, moved) == pytest.approx(step**2, rel=1e-6)
    wider = Statistics(fit.count, fit.mean, fit.covariance * (1 + step) ** 2)
    assert frechet_distance(fit, wider) == pytest.approx(step**2 * np.trace(fit.covariance), rel=1e-3)
