"""What one network evaluation buys: ODE, SDE, CT, CD and progressive distillation; L_f; errors end to end.

The samplers use the exact score on the line and give the law after a few evaluations, without random numbers.

Progressive distillation is exact as well. Its target is a *function* of x, so perfect rounds lose nothing: each round
fits one student step to two teacher steps, and the one-step student after log2 N perfect rounds is the N-step DDIM
sampler itself. Hence W1_PD(N) = W1_CD(N) for any data, and 1 - prod cos(dtheta) for Gaussian data. Of imperfect fits,
N - 1 enter (N/2 + N/4 + ... + 1), so independent relative errors of sd tau give the gain a relative sd of
tau sqrt(N - 1), where sequential training with its N levels has tau sqrt(N).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from cmtool.errors import UserError
from cmtool.theory import classes, gaussian, population
from cmtool.theory.laws import GMM_A, LineMixture, parse_law
from cmtool.theory.levels import Levels, li, uniform_angle
from cmtool.theory.population import Map, Spline, at, ddim_step, level_grid
from cmtool.theory.study import Curve, Fit, Panel, Study, Table, power_law
from cmtool.theory.trained import TrainingResult, run_training

Array = NDArray[np.float64]
GMM = "gmm:0.3,0.7;-1,1;0.4"
METHODS = ("ODE (DDIM)", "ODE 2nd order", "SDE", "CT", "CD", "progressive")


class BinnedLaw:
    """A law on the line as mass (n,) in equal bins between `edges` (n+1,); noise is added without drawing samples."""

    def __init__(self, edges: Array, mass: Array) -> None:
        self.edges, self.mass = edges, mass

    @classmethod
    def from_cdf(cls, cdf: Callable[[Array], Array], reach: float = 6.0, size: int = 1000) -> BinnedLaw:
        """The law with this distribution function; what lies beyond `reach` goes into the end bins."""
        edges = np.linspace(-reach, reach, size + 1)
        values = cdf(edges)
        values[0], values[-1] = 0.0, 1.0
        return cls(edges, np.diff(values))

    @property
    def centers(self) -> Array:
        """Bin centers, (n,)."""
        return 0.5 * (self.edges[:-1] + self.edges[1:])

    def spread(self, mean: Map, std: float) -> BinnedLaw:
        """The law of mean(X) + std xi, xi ~ N(0, 1)."""
        rise = ndtr((self.edges[None, :] - mean(self.centers)[:, None]) / std)
        rise[:, 0], rise[:, -1] = 0.0, 1.0
        return BinnedLaw(self.edges, self.mass @ np.diff(rise, axis=1))

    def mapped(self, f: Map) -> BinnedLaw:
        """The law of f(X) for an increasing f."""
        places = np.maximum.accumulate(f(self.edges))
        total = np.concatenate([[0.0], np.cumsum(self.mass)])
        values = np.interp(self.edges, places, total, left=0.0, right=1.0)
        values[0], values[-1] = 0.0, 1.0
        return BinnedLaw(self.edges, np.diff(values))

    def w1(self, cdf: Callable[[Array], Array]) -> float:
        """W1 to the law with this distribution function: the area between the two."""
        total = np.concatenate([[0.0], np.cumsum(self.mass)])
        gap = np.abs(total - cdf(self.edges))
        return float(np.sum(0.5 * (gap[1:] + gap[:-1]) * np.diff(self.edges)))


def level_cdf(law: LineMixture, levels: Levels, index: int) -> Callable[[Array], Array]:
    """The distribution function of X at a level."""
    return lambda x: law.cdf(x, *at(levels, index))


def ancestral_step(law: LineMixture, levels: Levels, index: int) -> tuple[Map, float]:
    """Mean and sd of one reverse SDE step t -> t-1 (Ho et al. 2020, the smaller variance), with the exact denoiser."""
    (a, b), (a_now, b_now) = at(levels, index - 1), at(levels, index)
    keep = a_now / a
    fresh = b_now**2 - keep**2 * b**2
    pull = keep * b**2 / b_now**2

    def mean(x: Array) -> Array:
        clean = law.denoise(x, a_now, b_now)
        return a * clean + pull * (x - a_now * clean)

    return mean, float(b * np.sqrt(fresh) / b_now)


def sde_w1(law: LineMixture, levels: Levels) -> float:
    """W1 of ancestral sampling from N(0, 1) with T - 1 evaluations of the exact score."""
    state = BinnedLaw.from_cdf(ndtr)
    for index in range(levels.count - 1, 0, -1):
        state = state.spread(*ancestral_step(law, levels, index))
    return state.w1(level_cdf(law, levels, 0))


def multistep_w1(law: LineMixture, levels: Levels, functions: list[Map], indices: list[int]) -> float:
    """W1 of multistep consistency sampling: f at indices[0] from N(0, 1), then noise again up to each next index."""
    state = BinnedLaw.from_cdf(ndtr).mapped(functions[indices[0]])
    a_one, b_one = at(levels, 0)
    for index in indices[1:]:
        a, b = at(levels, index)
        keep = a / a_one
        state = state.spread(_scaled(keep), float(np.sqrt(b**2 - keep**2 * b_one**2))).mapped(functions[index])
    return state.w1(level_cdf(law, levels, 0))


def _scaled(factor: float) -> Map:
    return lambda x: factor * x


def second_order(law: LineMixture, levels: Levels) -> Map:
    """DPM-Solver++(2M) (Lu et al. 2022) with the exact denoiser: second order, one evaluation per step.

    Heun's method is not used on VP levels: in sigma = b / a the first step spans decades, and it blows up.
    """
    log_snr = np.log(levels.signal / levels.noise)

    def run(x: Array) -> Array:
        last: Array | None = None
        for index in range(levels.count - 1, 0, -1):
            (a, b), (a_now, b_now) = at(levels, index - 1), at(levels, index)
            clean = law.denoise(x, a_now, b_now)
            blend = clean
            if last is not None:
                ratio = (log_snr[index] - log_snr[index + 1]) / (log_snr[index - 1] - log_snr[index])
                blend = clean + (clean - last) / (2 * ratio)
            x, last = b / b_now * x + (a - a_now * b / b_now) * blend, clean
        return x

    return run


def teacher_steps(law: LineMixture, levels: Levels) -> list[Map]:
    """The T - 1 DDIM steps, the noisy end first."""
    return [_one_step(law, levels, index) for index in range(levels.count - 1, 0, -1)]


def _one_step(law: LineMixture, levels: Levels, index: int) -> Map:
    return lambda x: ddim_step(law, x, at(levels, index - 1), at(levels, index))


def halve(law: LineMixture, levels: Levels, steps: list[Map], starts: list[int], size: int) -> list[Map]:
    """One round: each pair of steps becomes one spline, fitted on the grid of the level the pair starts from."""
    students: list[Map] = []
    for first, second, start in zip(steps[::2], steps[1::2], starts[::2], strict=True):
        x = level_grid(law, *at(levels, start), size)
        students.append(Spline(x, second(first(x))))
    return students


def distill_progressively(law: LineMixture, levels: Levels, size: int = 4001) -> Map:
    """The one-step student after all rounds.

    Raises:
        UserError: when the number of steps, T - 1, is no power of two.
    """
    count = levels.count - 1
    if count < 1 or count & (count - 1):
        raise UserError(
            f"progressive distillation halves its steps; {count} steps (T = {levels.count}) cannot be halved down to "
            "one",
            "use T = 2^k + 1: 17, 33, 65",
        )
    steps, starts = teacher_steps(law, levels), list(range(count, 0, -1))
    while len(steps) > 1:
        steps, starts = halve(law, levels, steps, starts, size), starts[::2]
    return steps[0]


def relative_sd(fits: int, tau: float) -> float:
    """Relative sd of the gain after `fits` independent relative errors of sd tau, exact: sqrt((1 + tau^2)^fits - 1)."""
    return float(np.sqrt(np.expm1(fits * np.log1p(tau**2))))


def _one_budget(law: LineMixture, levels: Levels) -> list[float]:
    """W1 by METHODS at T - 1 evaluations (samplers) or T - 1 fits (CT, CD, progressive: one evaluation to sample)."""
    maps = (
        population.distill(law, levels),
        second_order(law, levels),
        None,
        population.train(law, levels, 1001, 10)[-1],
        population.distill(law, levels),
        distill_progressively(law, levels, 2001),
    )
    return [sde_w1(law, levels) if f is None else population.errors(law, levels, f)[0] for f in maps]


def _budgets(law: LineMixture, budgets: list[int]) -> tuple[Table, list[Fit], list[Curve]]:
    values = [_one_budget(law, uniform_angle(budget + 1)) for budget in budgets]
    rows = [[budget, *found] for budget, found in zip(budgets, values, strict=True)]
    series = {name: [found[i] for found in values] for i, name in enumerate(METHODS)}
    theory = {"ODE (DDIM)": -1.0, "ODE 2nd order": -2.0, "SDE": -1.0, "CT": -1.0, "CD": -1.0}
    fits = [power_law(f"{name} in n, last 3", budgets[-3:], series[name][-3:], order) for name, order in theory.items()]
    curves = [Curve(name, budgets, series[name]) for name in METHODS if name not in ("CD", "progressive")]
    curves[0] = Curve("ODE (DDIM) = CD = progressive", budgets, series["ODE (DDIM)"])
    title = "W1 after n evaluations (ODE, SDE) or n fitted levels, sampled in one evaluation (CT, CD, progressive)"
    return Table(title, ["n", *METHODS], rows), fits, curves


def _multistep(law: LineMixture, count: int) -> Table:
    levels = uniform_angle(count)
    functions = population.train(law, levels, 1001, 10)
    top = count - 1
    rows = []
    for nfe in (1, 2, 4, 8):
        indices = [round(top * (1 - 0.7 * k / nfe)) for k in range(nfe)]
        sampler = population.errors(law, uniform_angle(nfe + 1), population.distill(law, uniform_angle(nfe + 1)))[0]
        rows.append([nfe, multistep_w1(law, levels, functions, indices), sampler, sde_w1(law, uniform_angle(nfe + 1))])
    return Table(
        f"Same number of evaluations to sample; CT has {count} levels", ["NFE", "CT multistep", "ODE", "SDE"], rows
    )


def _lipschitz(count: int) -> tuple[Table, list[Fit], Curve]:
    """Two equal modes of total variance 1 moved closer to Diracs: W1 at fixed T against L_f."""
    rows, levels = [], li(count)
    for std in (0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35):
        law = LineMixture(np.array([0.5, 0.5]), np.array([-1.0, 1.0]) * np.sqrt(1 - std**2), np.array([std, std]))
        slope = population.flow_lipschitz(law, levels)
        ct = population.errors(law, levels, population.train(law, levels, 1001, 8)[-1])[0]
        cd = population.errors(law, levels, population.distill(law, levels))[0]
        rows.append([std, slope, ct, cd])
    table = Table(f"Narrowing two modes at T = {count}", ["s", "L_f", "CT W1", "CD W1"], rows)
    used = [row for row in rows if row[1] > 1.2]
    x = [row[1] for row in used]
    fits = [
        power_law(f"CT W1 in L_f, T = {count}", x, [row[2] for row in used], 3.0),
        power_law(f"CD W1 in L_f, T = {count}", x, [row[3] for row in used], None),
    ]
    return table, fits, Curve("CT", [row[1] for row in rows], [row[2] for row in rows])


def _end_to_end(law: LineMixture, count: int, seed: int) -> Table:
    """Training on samples, in a class, from N(0, I): the three parts of the theorem, the largest by name."""
    levels = li(count)
    f = population.train(law, levels, 1001, 10)[-1]
    base = population.errors(law, levels, f)[0]
    rows = []
    for size in (4, 16):
        for samples in (300, 3000, 30000):
            rng = np.random.default_rng(seed)
            found = classes.run_class(law, levels, "relu", size, samples, rng, "normal", nodes=8)
            parts: dict[str, float] = {"population": base, "eps": found.eps_fit, "eps_F": found.eps_class}
            largest = max(parts, key=parts.__getitem__)
            rows.append([size, samples, found.w1, *parts.values(), sum(parts.values()), largest])
    columns = ["ReLU size", "pairs per level", "W1", "population", "eps", "eps_F", "sum", "largest"]
    return Table(f"End to end, T = {count}: fitted on samples, sampled from N(0, 1)", columns, rows)


def _progressive_noise(tau: float = 0.01, count: int = 65, repeats: int = 4000, seed: int = 0) -> Table:
    """Imperfect fits, Gaussian data: relative sd of the gain, simulated by rounds and by the formula."""
    rng = np.random.default_rng(seed)
    log_gain = np.zeros(repeats)
    fits, maps = 0, (count - 1) // 2
    while maps >= 1:
        log_gain += np.log1p(tau * rng.standard_normal((repeats, maps))).sum(axis=1)
        fits, maps = fits + maps, maps // 2
    sequential = np.log1p(tau * rng.standard_normal((repeats, count - 1))).sum(axis=1)
    rows = [
        ["progressive", fits, float(np.std(np.exp(log_gain))), relative_sd(fits, tau)],
        ["sequential (CT, CD)", count - 1, float(np.std(np.exp(sequential))), relative_sd(count - 1, tau)],
    ]
    return Table(
        f"Relative error {tau:g} in every fit, N = {count - 1} steps",
        ["method", "fits", "simulated sd", "exact sd"],
        rows,
    )


def _findings(budget: Table, fits: list[Fit], lipschitz: list[Fit], end: Table, training: TrainingResult) -> list[str]:
    last = {name: float(value) for name, value in zip(budget.columns[1:], budget.rows[-1][1:], strict=True)}
    order = {fit.name.split(" in ")[0]: fit.exponent for fit in fits}
    largest = {str(row[-1]) for row in end.rows}
    held = sum(row[2] <= row[6] for row in end.rows)
    return [
        f"With exact scores and n = {budget.rows[-1][0]}: ODE {last['ODE (DDIM)']:.4f}, second order "
        f"{last['ODE 2nd order']:.4f}, SDE {last['SDE']:.4f}, CT {last['CT']:.4f}. CT is still at n^{order['CT']:.2f} "
        f"where DDIM is at n^{order['ODE (DDIM)']:.2f}; but CT samples in one evaluation.",
        "CD and progressive distillation equal the DDIM sampler of the same number of steps exactly: their targets "
        "are functions of x, so perfect fits lose nothing. Progressive needs log2(n) rounds instead of n levels.",
        f"Narrowing the modes, CT's error grows as L_f^{lipschitz[0].exponent:.2f} (s.e. {lipschitz[0].error:.2f}); "
        "the theorem proves L_f^3.",
        f"End to end the largest part is {' or '.join(sorted(largest))}, depending on samples and class; the sum of "
        f"the three holds in {held} of {len(end.rows)} cases.",
        f"Networks trained for real: eps + eps_F is {training.eps_share:.2f} of the population error with restarted "
        f"rates (the best rule here is {training.best_rate}), the measured error stays {-training.excess_errors:.1f} "
        f"standard errors below the theorem's sum, and CT is worse than CD by {training.ct_over_cd_errors:.0f} "
        "standard errors.",
    ]


def run(
    data: str = GMM,
    budgets: tuple[int, ...] = (4, 8, 16, 32, 64),
    count: int = 10,
    seeds: int = 3,
    steps: int = 300,
    seed: int = 0,
) -> Study:
    """All comparisons of samplers and trained models; `count`, `seeds`, `steps` size the networks trained in the plane.

    Raises:
        UserError: for budgets that are no powers of two, or a law without width.
    """
    law, sizes = parse_law(data), sorted(set(budgets))
    if len(sizes) < 3 or any(size < 2 or size & (size - 1) for size in sizes):
        raise UserError(
            "budgets must be three or more powers of two, since progressive distillation halves its steps",
            "use --nfe 4,8,16,32,64",
        )
    if (law.stds == 0).any():
        raise UserError("the samplers need a law with a width", "use --data 'gmm:0.3,0.7;-1,1;0.1'")
    if count < 9 or seeds < 2 or steps < 1:
        raise UserError("the trained models need T >= 9, two seeds and one step", "use --T 10 --seeds 4")
    budget, fits, curves = _budgets(law, sizes)
    lipschitz, lipschitz_fits, curve = _lipschitz(512)
    training, end = run_training(count, seeds, steps, GMM_A), _end_to_end(law, 32, seed)
    eta = 1 - gaussian.shrinkage(uniform_angle(65), 1.0)
    slope = Curve("$L_f^3$, the bound", curve.x, [curve.y[0] * (x / curve.x[0]) ** 3 for x in curve.x], "bound")
    return Study(
        "samplers",
        "Samplers: W1 per evaluation, and models really trained",
        "How do training and distillation compare with ODE and SDE samplers?",
        [budget, _multistep(law, 65), training.table, end, lipschitz, _progressive_noise()],
        [*fits, *lipschitz_fits],
        [
            Panel("W1 against n", "n", "W1", curves),
            Panel("Narrowing the modes", "Lipschitz constant $L_f$", "W1", [curve, slope]),
            training.panel,
        ],
        _findings(budget, fits, lipschitz_fits, end, training),
        [
            "SDE: the law itself is carried through the steps (1000 bins), not samples. Trained networks: coupled "
            "distance E||f - Phi|| with the exact flow, an upper bound of W1 that the proof itself uses.",
            f"On N(0, 1) CT, CD, DDIM and progressive distillation are one map at every n (gain {eta:.6f} at n = 64).",
        ],
        {"data": data, "n": sizes, "T": count, "seeds": seeds, "steps": steps, "seed": seed},
    )
