"""Sequential consistency training with real networks: one per level, each fitted to the frozen one before it.

Many independent runs (methods, learning-rate rules, seeds) are trained at once as one batched network, which on a CPU
costs hardly more than one. The data are a mixture, so the exact conditional mean that each level should learn is known,
and eps is measured rather than guessed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmtool.rng import generator
from cmtool.theory import chain, population
from cmtool.theory.laws import GMM_A, LineMixture, Mixture, product
from cmtool.theory.levels import Levels, li
from cmtool.theory.population import hermite
from cmtool.theory.study import Curve, Panel, Table

Array = NDArray[np.float64]
RATES = ("constant", "decayed", "restarted")


@dataclass(frozen=True)
class Member:
    """One run of the ensemble: `method` "ct" or "cd", `rate` one of RATES, `seed` shared by runs to be compared."""

    method: str
    rate: str
    seed: int


@dataclass(frozen=True)
class Budget:
    """Size of each network and of its training: `steps` per level, `batch` fresh pairs per step, peak rate `lr`."""

    width: int = 48
    steps: int = 300
    batch: int = 256
    lr: float = 4e-3


class Ensemble:
    """E networks d -> width -> width -> d with a skip, f(x) = x + F(x), parameters in one (E, P) tensor."""

    def __init__(self, count: int, dim: int, width: int, seeds: list[int]) -> None:
        self.sizes = [(dim, width), (width, width), (width, dim)]
        rows = [self._draw(generator(seed, "init")) for seed in seeds]
        self.theta = torch.stack(rows).requires_grad_()
        assert len(self.theta) == count

    def _draw(self, gen: torch.Generator) -> Tensor:
        parts = []
        for index, (rows, columns) in enumerate(self.sizes):
            weight = torch.randn(rows * columns, generator=gen) / math.sqrt(rows)
            # The last layer starts at zero, so that the first function is the identity, f_1.
            parts += [weight * (index < len(self.sizes) - 1), torch.zeros(columns)]
        return torch.cat(parts)

    def forward(self, theta: Tensor, x: Tensor) -> Tensor:
        """f(x) for theta (E, P) and x (E, B, d)."""
        h, offset = x, 0
        for index, (rows, columns) in enumerate(self.sizes):
            weight = theta[:, offset : offset + rows * columns].view(-1, rows, columns)
            bias = theta[:, offset + rows * columns : offset + (rows + 1) * columns]
            h = torch.baddbmm(bias[:, None], h, weight)
            h = torch.nn.functional.silu(h) if index < len(self.sizes) - 1 else h
            offset += (rows + 1) * columns
        return x + h


class TorchMixture:
    """The same law as `Mixture`, for tensors (E, B, d)."""

    def __init__(self, law: Mixture) -> None:
        self.log_weights = torch.tensor(np.log(law.weights), dtype=torch.float32)
        self.means = torch.tensor(law.means, dtype=torch.float32)
        self.variances = torch.tensor(law.stds**2, dtype=torch.float32)

    def shares(self, x: Tensor, a: float, b: float) -> Tensor:
        """P(component | x), (..., J)."""
        variance = a * a * self.variances + b * b
        square = ((x[..., None, :] - a * self.means) ** 2).sum(-1)
        terms = self.log_weights - 0.5 * square / variance - 0.5 * self.means.shape[1] * variance.log()
        return terms.softmax(-1)

    def denoise(self, x: Tensor, a: float, b: float) -> Tensor:
        """E[X_0 | x], (..., d)."""
        shares = self.shares(x, a, b)
        pull = a * self.variances / (a * a * self.variances + b * b)
        return shares @ (self.means * (1 - a * pull)[:, None]) + (shares @ pull)[..., None] * x

    def sample(self, count: int, gen: torch.Generator) -> Tensor:
        """X_0, (count, d)."""
        which = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=gen)
        noise = torch.randn(count, self.means.shape[1], generator=gen)
        return self.means[which] + self.variances[which].sqrt()[:, None] * noise


@dataclass(frozen=True)
class Trained:
    """The result of sequential training: the functions of the last level, and each level's measured error, (T-1, E)."""

    ensemble: Ensemble
    theta: Tensor
    stage_errors: Array
    members: list[Member]

    @property
    def eps(self) -> Array:
        """sum_t E||f_t - f_t^*||, (E,): training and class error together, as the theorem adds them up."""
        return self.stage_errors.sum(axis=0)

    def __call__(self, x: Array) -> Array:
        """The outputs of every run at x (n, d): (E, n, d)."""
        rows = torch.tensor(x, dtype=torch.float32).expand(len(self.members), *x.shape)
        with torch.no_grad():
            return self.ensemble.forward(self.theta, rows).double().numpy()


def learning_rate(rule: str, peak: float, stage: float, overall: float) -> float:
    """The rate at `stage` in [0, 1) of a level's steps and `overall` in [0, 1) of all steps.

    constant: peak throughout; decayed: one half-cosine over all levels; restarted: a half-cosine within each level.
    """
    if rule == "constant":
        return peak
    share = overall if rule == "decayed" else stage
    return peak * (0.5 * (1 + math.cos(math.pi * share)) + 1e-3)


class _Adam:
    """Adam with one learning rate per row; fresh moments for each level."""

    def __init__(self, theta: Tensor) -> None:
        self.first, self.second, self.count = torch.zeros_like(theta), torch.zeros_like(theta), 0

    @torch.no_grad()
    def step(self, theta: Tensor, gradient: Tensor, rates: Tensor) -> None:
        self.count += 1
        self.first.lerp_(gradient, 0.1)
        self.second.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        scale = self.second.div(1 - 0.99**self.count).sqrt_().add_(1e-8)
        theta -= rates[:, None] * self.first / (1 - 0.9**self.count) / scale


class _Run:
    """The state that the levels share: data, streams, members."""

    def __init__(self, law: Mixture, levels: Levels, members: list[Member], budget: Budget) -> None:
        self.law, self.levels, self.members, self.budget = TorchMixture(law), levels, members, budget
        self.seeds = sorted({member.seed for member in members})
        self.streams = [generator(seed, "pairs") for seed in self.seeds]
        self.row = torch.tensor([self.seeds.index(member.seed) for member in members])
        self.distilled = torch.tensor([member.method == "cd" for member in members])[:, None, None]
        self.ensemble = Ensemble(len(members), law.dim, budget.width, [member.seed for member in members])

    def pair(self, index: int, count: int) -> tuple[Tensor, Tensor]:
        """(x_t, x_{t-1}) of each run, (E, count, d): one X_0 and one Z for both; CD takes a DDIM step instead."""
        clean = torch.stack([self.law.sample(count, gen) for gen in self.streams])
        noise = torch.stack([torch.randn(count, clean.shape[-1], generator=gen) for gen in self.streams])
        a, b, a_now, b_now = self.coefficients(index)
        x, before = a_now * clean + b_now * noise, a * clean + b * noise
        if self.distilled.any():
            step = b / b_now * x + (a - a_now * b / b_now) * self.law.denoise(x, a_now, b_now)
            return x[self.row], torch.where(self.distilled, step[self.row], before[self.row])
        return x[self.row], before[self.row]

    def coefficients(self, index: int) -> tuple[float, float, float, float]:
        """a_{t-1}, b_{t-1}, a_t, b_t."""
        signal, noise = self.levels.signal, self.levels.noise
        return float(signal[index - 1]), float(noise[index - 1]), float(signal[index]), float(noise[index])

    def previous(self, theta: Tensor | None, x: Tensor) -> Tensor:
        """f_{t-1}(x), the identity at the first level."""
        if theta is None:
            return x
        with torch.no_grad():
            return self.ensemble.forward(theta, x)

    def best(self, index: int, frozen: Tensor | None, x: Tensor, nodes: int = 4) -> Tensor:
        """f_t^*(x), (E, n, d): what this level should learn from the frozen one, by quadrature over the posterior."""
        a, b, a_now, b_now = self.coefficients(index)
        gamma, variances = a - a_now * b / b_now, self.law.variances
        total = a_now * a_now * variances + b_now * b_now
        center = self.law.means + (a_now * variances / total)[:, None] * (x[..., None, :] - a_now * self.law.means)
        spread = gamma * (variances * b_now**2 / total).sqrt()
        xi, weight = (torch.tensor(part, dtype=torch.float32) for part in hermite(nodes))
        grid = torch.cartesian_prod(*[xi] * x.shape[-1]).view(-1, x.shape[-1])
        product = torch.cartesian_prod(*[weight] * x.shape[-1]).view(len(grid), -1).prod(-1)
        points = (b / b_now * x[..., None, :] + gamma * center)[..., None, :] + spread[:, None, None] * grid
        values = self.previous(frozen, points.flatten(1, -2)).view(points.shape)
        mean = (self.law.shares(x, a_now, b_now)[..., None, None] * product[:, None] * values).sum((-2, -3))
        if not self.distilled.any():
            return mean
        step = b / b_now * x + gamma * self.law.denoise(x, a_now, b_now)
        return torch.where(self.distilled, self.previous(frozen, step), mean)

    def fit(self, index: int, frozen: Tensor | None) -> None:
        """Train the function of one level, warm-started from the one before."""
        theta, budget, adam = self.ensemble.theta, self.budget, _Adam(self.ensemble.theta)
        for step in range(budget.steps):
            x, before = self.pair(index, budget.batch)
            target = self.previous(frozen, before)
            # A sum over the runs: their parameters are separate rows, so each gets its own gradient.
            loss = ((self.ensemble.forward(theta, x) - target) ** 2).sum(-1).mean(1).sum()
            (gradient,) = torch.autograd.grad(loss, theta)
            adam.step(theta, gradient, self.rates(index, step))

    def rates(self, index: int, step: int) -> Tensor:
        """The learning rate of each run, (E,)."""
        stage = step / self.budget.steps
        overall = (index - 1 + stage) / (self.levels.count - 1)
        return torch.tensor([learning_rate(m.rate, self.budget.lr, stage, overall) for m in self.members])


def train_sequentially(
    law: Mixture, levels: Levels, members: list[Member], budget: Budget, eval_count: int = 256
) -> Trained:
    """Train f_2 to f_T for every member and measure E||f_t(X_t) - f_t^*(X_t)|| of each level on `eval_count` draws."""
    run = _Run(law, levels, members, budget)
    frozen: Tensor | None = None
    measured = []
    gen = generator(0, "stage-errors")
    for index in range(1, levels.count):
        run.fit(index, frozen)
        with torch.no_grad():
            clean, (_, _, a_now, b_now) = run.law.sample(eval_count, gen), run.coefficients(index)
            x = (a_now * clean + b_now * torch.randn(clean.shape, generator=gen)).expand(len(members), -1, -1)
            gap = run.ensemble.forward(run.ensemble.theta, x) - run.best(index, frozen, x)
        measured.append(gap.norm(dim=-1).mean(1).double().numpy())
        frozen = run.ensemble.theta.detach().clone()
    assert frozen is not None
    return Trained(run.ensemble, frozen, np.array(measured), members)


@dataclass(frozen=True)
class CoupledErrors:
    """E||f(X_T) - Phi(X_T)|| from X_T ~ p_T: `runs` (E,), `population` by method, `error` its standard error.

    The proof bounds this coupled distance. It is an upper bound of W1 and needs no transport solver.
    """

    runs: Array
    population: dict[str, float]
    error: dict[str, float]


def coupled_errors(law: LineMixture, levels: Levels, trained: Trained, seed: int, count: int = 4000) -> CoupledErrors:
    """Coupled errors on two independent copies of `law`; the reference map and the populations are exact per axis."""
    rng = np.random.default_rng(seed)
    x = chain.marginal(product(law, 2), levels, -1, count, rng)
    reference = law.flow(x, population.at(levels, -1), population.at(levels, 0))
    best = {"ct": population.train(law, levels, 1001, 10)[-1], "cd": population.distill(law, levels)}
    runs = np.linalg.norm(trained(x) - reference, axis=2)
    means, errors = {}, {}
    for method, f in best.items():
        exact = np.linalg.norm(f(x) - reference, axis=1)
        means[method] = float(exact.mean())
        rows = [i for i, member in enumerate(trained.members) if member.method == method]
        if rows:
            # Both sources of uncertainty: the test points, which all runs share, and the seeds of the runs.
            inside = runs[rows].mean(axis=0).std(ddof=1) / np.sqrt(count)
            between = runs[rows].mean(axis=1).std(ddof=1) / np.sqrt(len(rows)) if len(rows) > 1 else 0.0
            errors[method] = float(np.hypot(inside, between))
    return CoupledErrors(runs.mean(axis=1), means, errors)


def gap_in_errors(runs: CoupledErrors, trained: Trained) -> float:
    """How many standard errors CT is worse than CD, from runs paired by seed under the restarted rate.

    The error adds those of both methods (seeds and test points) as if independent; they share both, so it is an
    upper bound.
    """
    pairs: dict[int, dict[str, float]] = {}
    for member, value in zip(trained.members, runs.runs, strict=True):
        if member.rate == "restarted":
            pairs.setdefault(member.seed, {})[member.method] = float(value)
    gaps = [pair["ct"] - pair["cd"] for pair in pairs.values() if len(pair) == 2]
    return float(np.mean(gaps) / np.hypot(runs.error["ct"], runs.error["cd"]))


def members_for(seeds: int) -> list[Member]:
    """CT under every learning-rate rule and CD under the restarted one, each with `seeds` seeds."""
    rules = [("ct", rate) for rate in RATES] + [("cd", "restarted")]
    return [Member(method, rate, seed) for method, rate in rules for seed in range(seeds)]


@dataclass(frozen=True)
class TrainingResult:
    """Rows of the table, and the numbers that decide: CT eps / population, slack in standard errors, CT - CD."""

    table: Table
    panel: Panel
    eps_share: float
    excess_errors: float
    ct_over_cd_errors: float
    best_rate: str


def run_training(count: int = 10, seeds: int = 3, steps: int = 300, law: LineMixture = GMM_A) -> TrainingResult:
    """Train CT and CD in the plane (two copies of `law`), and compare with the exact population of the same levels."""
    levels, members = li(count), members_for(seeds)
    trained = train_sequentially(product(law, 2), levels, members, Budget(steps=steps))
    found = coupled_errors(law, levels, trained, seed=0)
    rows, eps_by = [], {}
    for method, rate in dict.fromkeys((member.method, member.rate) for member in members):
        picks = [i for i, member in enumerate(members) if (member.method, member.rate) == (method, rate)]
        values, eps = found.runs[picks], trained.eps[picks]
        base, doubt = found.population[method], found.error[method]
        excess = (float(values.mean()) - base - float(eps.mean())) / doubt
        part = "population" if base >= eps.mean() else "eps + eps_F"
        rows.append(
            [method, rate, float(values.mean()), doubt, base, float(eps.mean()), base + float(eps.mean()), excess, part]
        )
        eps_by[method, rate] = (float(eps.mean()) / base, excess)
    columns = ["method", "rate", "error", "std. error", "population", "eps + eps_F", "sum", "excess (s.e.)", "largest"]
    table = Table(
        f"Networks trained level by level, plane, T = {count}, {steps} steps per level, {seeds} seeds", columns, rows
    )
    share, excess = eps_by["ct", "restarted"]
    rate = min(RATES, key=lambda name: eps_by["ct", name][0])
    return TrainingResult(table, _panel(trained, members), share, excess, gap_in_errors(found, trained), rate)


def _panel(trained: Trained, members: list[Member]) -> Panel:
    levels = list(range(2, len(trained.stage_errors) + 2))
    curves = []
    for method, rate in dict.fromkeys((member.method, member.rate) for member in members):
        picks = [i for i, member in enumerate(members) if (member.method, member.rate) == (method, rate)]
        curves.append(
            Curve(f"{method.upper()}, {rate}", levels, [float(v) for v in trained.stage_errors[:, picks].mean(1)])
        )
    return Panel("Error of each trained level", "level t", "$E\\|f_t - f_t^*\\|$", curves, log_x=False)
