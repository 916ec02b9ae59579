"""K01 to K28: every known answer to its digits, and that the comparison itself can fail."""

from __future__ import annotations

import pytest

from cmtool.theory.checks import digits, near, run_checks

IDS = [f"K{number:02d}" for number in range(1, 29)]


@pytest.fixture(scope="module")
def checks():
    return run_checks()


@pytest.mark.parametrize("id", IDS)
def test_known_answer(checks, id):
    found = [check for check in checks if check.id == id]
    assert found, f"{id} is not checked"
    assert [check for check in found if not check.passed] == []


def test_the_published_digits_are_the_ones_compared(checks):
    """A few literal values here, so that nobody can mend a wrong formula by editing its expected value."""
    expected = {
        ("K01", "alpha_50"): 0.565974963,
        ("K04", "W2, mean 1, s = .5"): 0.0127911170,
        ("K09", "Heun product, N = 18"): 6.59541349e-3,
        ("K11", "R, a = 2"): 0.390705314,
        ("K13", "1/cosh(pi/2)"): 0.398536815,
        ("K15", "limit"): 1.25663937,
        ("K16", "W1 gap"): 0.407003742,
        ("K17", "GMM-A CT W1, T = 64"): 0.0801086220,
        ("K19", "Phi_{64->1}(0)"): 0.771347632,
        ("K20", "GMM-E W1, N = 18, CT"): 0.103014931,
        ("K28", "no-intercept gain B_32, mean 1, s = .5"): 1.043268834,
    }
    values = {(check.id, check.what): check.value for check in checks}
    for key, number in expected.items():
        assert values[key] == pytest.approx(number, rel=3e-9 if key[0] != "K28" else 1e-9)


def test_digits_accepts_one_unit_of_the_last_and_no_more():
    assert digits("K", "x", 1.23456, "1.2345").passed
    assert not digits("K", "x", 1.23471, "1.2345").passed
    assert digits("K", "x", 2.58322e-5, "2.5832e-5").passed
    assert not digits("K", "x", 2.5836e-5, "2.5832e-5").passed
    assert not near("K", "x", 1.0, 1.1, 0.05).passed
    assert not digits("K", "x", float("nan"), "1").passed


def test_quick_leaves_the_recursions_out(checks):
    quick = {check.id for check in run_checks(quick=True)}
    assert quick == {f"K{number:02d}" for number in range(1, 17)} < {check.id for check in checks}
