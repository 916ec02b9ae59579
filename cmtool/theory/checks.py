"""The known answers K01 to K28: what the formulas must give, digit by digit, and where two routes must agree.

An expected value is text, and its digits are the tolerance: one unit of the last. Kinds: A is a closed form
independent of the code, B two numerical routes, R a number that only this recursion has given so far.

W1 of the mixture recursions (K17, K18, K20) was first computed with the plain trapezoid rule on 8001 nodes, which is
off in the sixth digit where |gap| has a corner. The checks repeat that rule to its digits and also hold the converged
values (marked "converged").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from cmtool.theory import chain, classes, edm, gap, gaussian, population, typical
from cmtool.theory.distances import folded, normal_nodes
from cmtool.theory.laws import GMM_A, GMM_E, LineMixture, product
from cmtool.theory.levels import Levels, geometric, karras, li, li_betas

# What numpy returns: floats, its own scalars, and arrays of one element.
Number = Any


@dataclass(frozen=True)
class Check:
    """One comparison; `tolerance` is absolute. `kind` is A, B or R."""

    id: str
    what: str
    kind: str
    value: float
    expected: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the value agrees."""
        return bool(abs(self.value - self.expected) <= self.tolerance)


def digits(id: str, what: str, value: Number, expected: str, kind: str = "A") -> Check:
    """A check against a printed number: it must agree to one unit of the last digit."""
    exponent = Decimal(expected).as_tuple().exponent
    assert isinstance(exponent, int)
    return Check(id, what, kind, float(value), float(expected), 1.0001 * 10.0**exponent)


def near(id: str, what: str, value: Number, expected: Number, tolerance: float, kind: str = "B") -> Check:
    """A check against another route, within an absolute tolerance."""
    return Check(id, what, kind, float(value), float(expected), tolerance)


DIRACS = LineMixture(np.array([0.5, 0.5]), np.array([-1.0, 1.0]), np.zeros(2))


def _vp_gaussian() -> Iterator[Check]:
    levels, (beta, step) = li(100), li_betas(100)
    yield digits("K01", "h at T = 100", step, "0.184206807")
    yield digits("K01", "beta_2", beta[1], "2.58321636e-5")
    yield digits("K01", "beta_50", beta[49], "0.0864337471")
    yield digits("K01", "alpha_50", levels.alpha[49], "0.565974963")
    yield digits("K01", "alpha_100", levels.alpha[99], "2.71811580e-5")
    yield digits("K01", "first t on the plateau", 1 + int(np.argmax(beta >= step * (1 - 1e-12))), "55")
    yield digits(
        "K02", "Phi_{100->1}(0.7), mean 1, s = .5", gaussian.flow_map(levels, 1, 0.5, 100, 1, 0.7), "1.34739887"
    )
    yield digits("K02", "Phi_{100->50}(0.7)", gaussian.flow_map(levels, 1, 0.5, 100, 50, 0.7), "1.27940397")
    yield digits("K02", "f_100(0.7)", gaussian.consistency(levels, 1, 0.5, 0.7), "1.33868547")
    half = gaussian.flow_map(levels, 1, 0.5, 50, 1, gaussian.flow_map(levels, 1, 0.5, 100, 50, 0.7))
    yield near("K02", "semigroup", half, gaussian.flow_map(levels, 1, 0.5, 100, 1, 0.7), 1e-13)
    table = {0.25: "0.244486906", 0.5: "0.487538972", 1: "0.972096732", 2: "1.94215535", 4: "3.88874337"}
    for std, text in table.items():
        yield digits("K03", f"A_100, s = {std:g}", gaussian.gains(levels, std)[-1], text)
    v = gaussian.moments(levels, 0, 2.0)[1]
    product_of_cos = gaussian.gains(levels, 2.0)[-1] * np.sqrt(v[-1] / v[0])
    yield near("K03", "A sqrt(v_T/v_1) = prod cos, s = 2", product_of_cos, 1 - gaussian.shrinkage(levels, 2.0), 1e-12)
    w1, w2, _ = gaussian.distances(levels, 1, 0.5)
    yield digits("K04", "W2, mean 1, s = .5", w2, "0.0127911170")
    yield digits("K04", "W1, mean 1, s = .5", w1, "0.0102072041")
    for dim, text in {1: "0.0222635871", 2: "0.0349715608", 8: "0.0765002893", 32: "0.156616564"}.items():
        yield digits("K05", f"W1 isotropic s = 1, d = {dim}", gaussian.distances(levels, 0, 1, dim)[0], text)
    limit = 2**20 * gaussian.shrinkage(li(2**20), 1) / (4 * np.log(2**20))
    yield digits("K06", "T eta / (4 log T), T = 2^20", limit, "0.154521344")
    yield digits("K06", "its limit I(1)", gaussian.li_constant(1.0), "0.154522472")
    yield digits("K07", "equal angles, T = 10", gaussian.smallest_shrinkage(9), "0.128709195")


def _edm_gaussian() -> Iterator[Check]:
    yield digits("K08", "f(1, .5), mean .3, s = .5", edm.consistency(1, 0.5, 0.3, 0.5), "0.794978707")
    yield digits("K08", "f(60, 80)", edm.consistency(60, 80, 0.3, 0.5), "0.673120698")
    yield digits("K08", "D(1, 2)", edm.denoise(1, 2, 0.3, 0.5), "0.341176471")
    skip, out = _parameterization(2.0)
    yield digits("K08", "c_skip(2)", skip, "0.0589344093")
    yield digits("K08", "c_out(2)", out, "0.484586179")
    texts = {18: ("5.28797756e-3", "6.59541349e-3"), 72: ("6.00471469e-3", "6.26792061e-3")}
    for count, (euler, heun) in texts.items():
        times = karras(count).noise
        yield digits("K09", f"Euler = CT product, N = {count}", np.prod(edm.euler_factors(times, 0.5)), euler)
        yield digits("K09", f"Heun product, N = {count}", np.prod(edm.heun_factors(times, 0.5)), heun)
    yield digits("K09", "exact product", edm.exact_ratio(karras(18).noise, 0.5), "6.24992793e-3")
    (euler_a, heun_a), (euler_b, heun_b) = (edm.deficits(karras(count), 0.5) for count in (576, 1280))
    scale = np.log(1279 / 575)
    yield digits("K10", "Euler order, N 576 -> 1280", np.log(euler_a / euler_b) / scale, "0.998299")
    yield digits("K10", "Heun order", np.log(heun_a / heun_b) / scale, "2.002541")
    yield digits("K10", "(N-1)(1-ratio), N = 1280", 1279 * euler_b, "2.838651")


def _parameterization(t: float) -> tuple[float, float]:
    """c_skip and c_out at t, from the code that training uses: this is where the oracle tests the project."""
    import torch

    from cmtool.config.schema import ProcessConfig
    from cmtool.diffusion.parameterization import build_parameterization

    found = build_parameterization(ProcessConfig()).coefficients(torch.tensor([t], dtype=torch.float64))
    return float(found[0]), float(found[1])


def _gap() -> Iterator[Check]:
    yield digits("K11", "R, a = 2", gap.l2_discrepancy(0.5), "0.390705314")
    yield digits("K11", "R, a = 1", gap.l1_discrepancy(0.5), "0.622572932")
    l2, l1 = gap.exact_losses(0.5, 100_000)
    yield digits("K11", "N^2 L_CT at N = 1e5", l2, "31.255636")
    yield near("K11", "N L1_CT at N = 1e5 against R", l1, gap.l1_discrepancy(0.5), 1e-7)
    levels = karras(18)
    v, kept = 0.25 + 0.002**2, 1 - gaussian.shrinkage(levels, 0.5)
    yield digits("K12", "sum of stage losses, N = 18", edm.stage_losses(levels, 0.5).sum(), "0.0710356865")
    yield near("K12", "v (1 - prod cos^2)", v * (1 - kept**2), edm.stage_losses(levels, 0.5).sum(), 1e-12, "A")
    yield digits("K13", "joint, equal angles, N = 1000", edm.joint_gain(np.linspace(0, np.pi / 2, 1000)), "0.398536579")
    yield digits("K13", "1/cosh(pi/2)", 1 / np.cosh(np.pi / 2), "0.398536815")
    yield digits("K13", "joint, Karras N = 1000", edm.joint_gain(karras(1000).angles(0.5)), "0.302294317")
    yield digits("K14", "R_IC(1)", gap.residual_independent(0.5, 1), "0.2")
    yield digits("K14", "R_GC(1)", gap.residual_generator(0.5, 1), "0.0233165015")
    yield digits("K14", "R_GC(5)", gap.residual_generator(0.5, 5), "8.18947e-5")
    yield digits("K15", "share 1, ideal, N = 18", gap.spread_ratio(karras(18).noise, 0.5, 1), "1.197392")
    yield digits("K15", "share .5, own, N = 1280", gap.spread_ratio(karras(1280).noise, 0.5, 0.5, "own"), "1.127302")
    yield digits("K15", "share 0, N = 18", gap.spread_ratio(karras(18).noise, 0.5, 0), "0.846070")
    yield digits("K15", "limit", gap.spread_limit(), "1.25663937")
    yield digits("K16", "l1 mass, limit", gap.minority_mass(0.7), "0.0964981291")
    yield digits("K16", "l1 mass, sigma_max = 80", gap.minority_mass(0.7, 80), "0.0986527")
    yield digits("K16", "W1 gap", 2 * (0.3 - gap.minority_mass(0.7)), "0.407003742")
    yield near("K16", "chain, N = 5120", gap.l1_chain_mass(karras(5120).noise, 0.7), gap.minority_mass(0.7, 80), 1e-6)


def _plain_w1(law: LineMixture, levels: Levels, f: population.Map, start: str, limit: float) -> float:
    """W1 by the plain trapezoid rule on 8001 nodes, as the known answers were first found."""
    _, weight, difference = population.gap_at_nodes(law, levels, f, start, limit, 8001)
    return float(weight @ np.abs(difference))


def _mixtures() -> Iterator[Check]:
    ct = {10: "0.228235770", 16: "0.166031072", 32: "0.116420032", 64: "0.0801086220"}
    ct_converged = {10: "0.2282372", 16: "0.1660304", 32: "0.1164217", 64: "0.0801088"}
    cd = {10: "0.116556841", 16: "0.0744163986", 32: "0.0452860656", 64: "0.0272328091"}
    cd_converged = {10: "0.1165568", 16: "0.0744163", 32: "0.0452860", 64: "0.0272329"}
    for count in ct:
        levels = li(count)
        f, g = population.train(GMM_A, levels, 2001, 24)[-1], population.distill(GMM_A, levels)
        yield digits("K17", f"GMM-A CT W1, T = {count}", _plain_w1(GMM_A, levels, f, "normal", 9.0), ct[count], "B")
        converged = population.errors(GMM_A, levels, f, count=20001)[0]
        yield digits("K17", f"converged, T = {count}", converged, ct_converged[count], "B")
        # The first computation also interpolated the composed map, and its last three digits contain that error.
        yield near(
            "K18", f"GMM-A CD W1, T = {count}", _plain_w1(GMM_A, levels, g, "normal", 9.0), float(cd[count]), 1e-7
        )
        converged = population.errors(GMM_A, levels, g, count=20001)[0]
        yield digits("K18", f"converged, T = {count}", converged, cd_converged[count], "B")
    yield digits("K19", "f_64(0)", float(f(np.zeros(1))[0]), "0.713626164", "B")
    flow = GMM_A.flow(np.zeros(1), population.at(levels, -1), population.at(levels, 0))
    yield digits("K19", "Phi_{64->1}(0)", float(flow[0]), "0.771347632", "B")
    rng = np.random.default_rng(0)
    mean, error = chain.consistency(product(GMM_A, 1), levels, np.zeros((1, 1)), 20_000, rng)
    yield near("K19", "f_64(0) by the chain", float(mean[0, 0]), float(f(np.zeros(1))[0]), 4 * float(error[0, 0]))


def _edm_mixture() -> Iterator[Check]:
    levels = karras(18)
    functions = population.train(GMM_E, levels, 3001)
    maps = {
        "CT": functions[-1],
        "Euler": population.distill(GMM_E, levels),
        "Heun": population.distill(GMM_E, levels, population.heun_step),
    }
    texts = {
        "CT": ("0.103014931", "0.1030153"),
        "Euler": ("0.0549973543", "0.0549974"),
        "Heun": ("0.0191824194", "0.0191824"),
    }
    for name, f in maps.items():
        kind = "B" if name == "CT" else "R"
        yield digits(
            "K20", f"GMM-E W1, N = 18, {name}", _plain_w1(GMM_E, levels, f, "exact", 8.0), texts[name][0], kind
        )
        converged = population.errors(GMM_E, levels, f, "exact", 40001)[0]
        yield digits("K20", f"converged, {name}", converged, texts[name][1], kind)
    losses = population.stage_losses(GMM_E, levels, functions).sum()
    yield digits("K12", "sum of stage losses, GMM-E, N = 18", losses, "0.08239077", "B")
    z, weight = normal_nodes(8.0, 4001)
    output = functions[-1](GMM_E.quantile(z, *population.at(levels, -1)))
    lost = GMM_E.variance + 0.002**2 - (weight @ output**2 - (weight @ output) ** 2)
    yield near("K12", "variance lost, GMM-E", lost, losses, 1e-7)


def _rest() -> Iterator[Check]:
    yield digits("K21", "affine floor of GMM-A", classes.affine_floor(GMM_A), "0.286058377", "B")
    yield digits("K22", "P(out), d = 2, T = 100, c3 = 1", typical.gaussian_outside(2, 100, 1), "6.28318531e-4")
    yield digits("K22", "P(out), d = 8, T = 100, c3 = .5", typical.gaussian_outside(8, 100, 0.5), "4.66592822e-3")
    yield digits("K23", "two Diracs, theorem's schedule: W1/sqrt(h)", gap.dirac_limit_li(), "0.362697785")
    yield digits("K23", "two Diracs, geometric grid: W1/sqrt(kappa)", np.sqrt(2) / np.pi, "0.450158158")
    levels = li(2048)
    w1 = population.errors(DIRACS, levels, population.train(DIRACS, levels, 1201)[-1])[0]
    yield near("K23", "recursion, T = 2048", w1 / np.sqrt(li_betas(2048)[1]), gap.dirac_limit_li(), 0.0037)
    grid = geometric(200, 1e-3, 1e2)
    w1 = population.errors(DIRACS, grid, population.train(DIRACS, grid, 4001)[-1])[0]
    kappa = np.log(grid.noise[1] / grid.noise[0])
    yield near("K23", "recursion, geometric, 200 points", w1 / np.sqrt(kappa), np.sqrt(2) / np.pi, 0.006)
    yield digits(
        "K24", "bias .1, s = 1, T = 10", float(folded(0.1, gaussian.output_error(li(10), 0, 1)[1])), "0.156718741"
    )
    levels = li(32)
    mixture = population.errors(GMM_A, levels, population.train(GMM_A, levels, 2001)[-1])[1]
    side = gaussian.distances(levels, 0, 0.4)[1]
    for dim, text in {1: "0.145511684", 2: "0.147084", 8: "0.156187", 32: "0.188246"}.items():
        yield digits(
            "K25", f"GMM-A x N(0, .16)^(d-1), W2, d = {dim}", np.hypot(mixture, np.sqrt(dim - 1) * side), text, "B"
        )
    found = classes.run_class(GMM_A, levels, "relu", 8)
    yield digits("K26", "ReLU-8, T = 32: W1", found.w1, "0.127806", "R")
    yield digits("K26", "ReLU-8, T = 32: eps_F", found.eps_class, "0.144426", "R")
    moment, bound = typical.score_moment(LineMixture(np.ones(1), np.zeros(1), np.array([0.5])), li(100), 49)
    yield digits("K27", "E s^2, s = .5, T = 100, t = 50", moment, "1.737563")
    yield digits("K27", "its bound 1/(1 - alpha)", bound, "2.304015")
    yield digits(
        "K28", "no-intercept gain B_32, mean 1, s = .5", gaussian.no_intercept_gain(levels, 1, 0.5), "1.043268834"
    )
    yield digits("K28", "A_32", gaussian.gains(levels, 0.5)[-1], "0.472787886")


GROUPS: tuple[Callable[[], Iterator[Check]], ...] = (_vp_gaussian, _edm_gaussian, _gap, _mixtures, _edm_mixture, _rest)
QUICK = GROUPS[:3]


def run_checks(quick: bool = False) -> list[Check]:
    """All known answers in order of their id; `quick` leaves out those that need a recursion."""
    found = [check for group in (QUICK if quick else GROUPS) for check in group()]
    return sorted(found, key=lambda check: check.id)
