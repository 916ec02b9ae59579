"""How far a pair's direction is from the flow's: the discrepancy R and the transport cost, per noise level.

Consistency training follows x' = z, the flow v = E[z | x_t]. Their mean squared distance R(t) is what distillation
does not have and what generator-augmented coupling makes small (Issenhuth et al. 2025, Theorems 1 and 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from cmtool.config.schema import ProcessConfig
from cmtool.diffusion.process import exact, expand
from cmtool.losses.coupling import Coupling
from cmtool.losses.direction import Reference, posterior_mean
from cmtool.losses.terms import Draw, Nets, Slice
from cmtool.rng import generator
from cmtool.schedules.times import LevelDensity, density_from

# Images whose posterior mean is taken: each is compared with every reference image.
ASKED = 512
LEVELS = (0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0)


@dataclass(frozen=True)
class Discrepancy:
    """At noise level t, per value of an image.

    `linear`: R with the best linear guess of z from x_t, an upper bound that is exact for Gaussian data and can be had
    for any coupling; `exact`: R of the independent coupling with E[z | x_t] over the images themselves; `transport`:
    E|f(x_t) - z|^2 of the model's answer; `coupled`: E|x0 - z|^2 of the coupling.
    """

    t: float
    linear: float
    exact: float
    transport: float
    coupled: float

    def row(self) -> dict[str, float]:
        """Return the numbers by name."""
        return asdict(self)


def linear_residual(x: Tensor, z: Tensor) -> float:
    """Mean square of z - E*[z | x] over values, E* the best affine guess, with n - p - 1 in place of n (float64).

    x and z (n, ...). With fewer than twice as many images as values, each value is guessed from its own alone, which
    also bounds R from above.
    """
    a, b = exact(x.flatten(1)), exact(z.flatten(1))
    a, b = a - a.mean(0), b - b.mean(0)
    n, p = a.shape
    if n < 2 * p:
        own = (a * b).sum(0) / (a**2).sum(0).clamp_min(1e-300)
        return float(((b - own * a) ** 2).sum() / ((n - 2) * p))
    solution = torch.linalg.lstsq(a, b).solution
    return float(((b - a @ solution) ** 2).sum() / ((n - p - 1) * b.shape[1]))


def discrepancy_exact(images: Tensor, t: float, z: Tensor, reference: Reference) -> float:
    """R of the independent coupling at level t: E|z - (x_t - D(x_t)) / t|^2 per value, D over the reference."""
    level = torch.full((len(images),), t, dtype=images.dtype, device=images.device)
    x_t = images + expand(level, images) * z
    wrong = (posterior_mean(x_t, level, reference) - images) / t
    return float((exact(wrong) ** 2).mean())


@torch.no_grad()
def diagnose(
    nets: Nets,
    coupling: Coupling,
    images: Tensor,
    label: Tensor | None = None,
    *,
    levels: Sequence[float] = LEVELS,
    mix: float = 1.0,
    seed: int = 0,
    reference: Reference | None = None,
    batch: int | None = None,
) -> list[Discrepancy]:
    """Measure a coupling and the average used for sampling on images (n, C, H, W), one entry for each noise level.

    The coupling sees `batch` images at once (None: all). Take as many as a forward pass of training: optimal transport
    depends on it. It sees r = t, so that both ends of a pair lie at the level; `mix` is the share of images that a
    generator coupling replaces (1: all, the coupling itself). `reference` defaults to the images.
    """
    reference = reference or Reference(images)
    average = nets.student if nets.sample_ema is None else nets.sample_ema
    size = batch or len(images)
    # Whole batches only: in a smaller last one, images would meet fewer others.
    starts = range(0, max(len(images) // size, 1) * size, size)
    found = []
    for t in levels:
        z = torch.randn(images.shape, generator=generator(seed, "diagnose", f"{t:.9g}")).to(images)
        x0, noise, answers = [], [], []
        for start in starts:
            own = slice(start, min(start + size, len(images)))
            level = torch.full((len(images[own]),), t, dtype=images.dtype, device=images.device)
            rows = Slice(seed, 0, start, len(images))
            labels = None if label is None else label[own]
            draw = coupling(nets, Draw(images[own], z[own], (level, level), labels, mix, rows))
            x0.append(draw.x0)
            noise.append(draw.z)
            answers.append(average(draw.x0 + t * draw.z, level, draw.label))
        clean, met, answer = torch.cat(x0), torch.cat(noise), torch.cat(answers)
        found.append(
            Discrepancy(
                t,
                linear_residual(clean + t * met, met),
                discrepancy_exact(images[:ASKED], t, z[:ASKED], reference),
                float((exact(answer - met) ** 2).mean()),
                float((exact(clean - met) ** 2).mean()),
            )
        )
    return found


def level_density(images: Tensor, process: ProcessConfig, floor: float, seed: int, nodes: int = 33) -> LevelDensity:
    """Return the law of levels whose density over ln t follows the root of the discrepancy R of these images.

    R is that of the independent coupling, per value of an image; of finitely many images it falls to 0 at small levels.
    """
    low, high = math.log(process.sigma_min), math.log(process.sigma_max)
    levels = torch.linspace(low, high, nodes, dtype=torch.float64).exp()
    some, reference = images[:256], Reference(images)
    height = []
    for index, t in enumerate(levels.tolist()):
        z = torch.randn(some.shape, generator=generator(seed, "density", index)).to(some)
        height.append(math.sqrt(discrepancy_exact(some, t, z, reference)))
    return density_from(levels, torch.tensor(height, dtype=torch.float64), floor)
