"""Couplings: which clean image meets which noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cmtool.config.parts import CouplingPart
from cmtool.diffusion.process import exact, expand
from cmtool.errors import ConfigError
from cmtool.losses.terms import Draw, Nets, evaluating, told_of
from cmtool.rng import batch_uniform, moved


def _as_drawn(draw: Draw) -> Draw:
    return draw


def _generates_nothing(nets: Nets, draw: Draw) -> Draw:
    return draw


@dataclass(frozen=True)
class Coupling:
    """The two moments at which a coupling may change a draw.

    `meet` runs before any network does, and may compute on the CPU. `generate` replaces the images that `meet` marked
    as `made` by those that a network makes, and never waits for the CPU.
    """

    meet: Callable[[Draw], Draw] = _as_drawn
    generate: Callable[[Nets, Draw], Draw] = _generates_nothing

    def __call__(self, nets: Nets, draw: Draw) -> Draw:
        """Return the draw as the target rule sees it."""
        return self.generate(nets, self.meet(draw))


@dataclass(frozen=True)
class Pairs:
    """Points of the teacher's paths and their ends.

    `noisy` (M, K, C, H, W) are at the noise levels `levels` (K,), the first of them sigma_max, where the path is noise
    alone; `clean` (M, C, H, W) is the x0 that the teacher's ODE makes of it, and `labels` (M,) its class or None.
    """

    noisy: Tensor
    clean: Tensor
    labels: Tensor | None
    levels: Tensor


def assignment(x0: Tensor, z: Tensor) -> Tensor:
    """Return the index (B,) of the noise for each image (B, ...) that minimizes the total squared distance, on the CPU.

    |x - z|^2 and -<x, z> have the same best assignment: the squares do not depend on it.
    """
    cost = -(exact(x0.flatten(1)) @ exact(z.flatten(1)).T)
    # This import takes half a second, and sampling and editing load this module without needing it.
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1])


def optimal_transport(draw: Draw) -> Draw:
    """Permute the noise within the forward pass so that its total squared distance to the images is least (batch OT).

    Raises:
        ConfigError: for a single image, which has nothing to exchange its noise with.
    """
    if len(draw.x0) < 2:
        raise ConfigError("optimal transport needs at least 2 images a forward pass.", "raise --micro-batch")
    return replace(draw, z=draw.z[assignment(draw.x0, draw.z).to(draw.z.device)])


def predict(net: nn.Module, draw: Draw) -> Tensor:
    """Return what `net` answers at (x_r, r), without dropout and without gradient."""
    told = told_of(draw.augment)
    with evaluating(net), torch.no_grad():
        return net(draw.x0 + expand(draw.r, draw.x0) * draw.z, draw.r, draw.label, **told)


def chosen(draw: Draw) -> Tensor:
    """Draw which images (B,) the model generates, a share `draw.mix` of them."""
    rows = draw.rows
    u = batch_uniform((rows.total,), rows.seed, "generator-mask", rows.step, start=rows.start, count=len(draw.x0))
    return moved(u < draw.mix, draw.x0.device)


def mark_generated(draw: Draw) -> Draw:
    """Mark the images that the model is going to generate; none where their share is zero."""
    return replace(draw, made=chosen(draw)) if draw.mix else draw


def build_generator(part: CouplingPart) -> Coupling:
    """Return the coupling of generator-augmented flows (Issenhuth et al. 2025, Algorithm 1).

    A share mu of the images is replaced by what the predictor answers at the cleaner point (x_r, r); the noise stays.
    mu is the share of *generated* images, as in the paper; the released code's setting is 1 - mu. The mask has a random
    stream of its own: with mu = 0 not one bit of anything else changes.
    """

    def generate(nets: Nets, draw: Draw) -> Draw:
        if draw.made is None:
            return draw
        net = {"online": nets.student, "ema": nets.sample_ema, "frozen": nets.frozen}[part.predictor]
        if net is None:
            raise ConfigError(f"the coupling's predictor '{part.predictor}' is not there.")
        return replace(draw, x0=torch.where(expand(draw.made, draw.x0), predict(net, draw), draw.x0))

    return Coupling(mark_generated, generate)


def build_stored(pairs: Pairs | None) -> Coupling:
    """Return the coupling that takes image and noise from stored pairs or paths of the teacher.

    The noise z is the one whose straight line from x0 meets the stored point whose level is nearest to t. Of pairs that
    is the start: x0 + sigma_max z = x_T. Of paths that are stored at the levels of t it is x_t itself.

    Raises:
        ConfigError: if there are no pairs.
    """
    if pairs is None:
        raise ConfigError("the teacher's pairs are needed, and none were made.")

    def stored(draw: Draw) -> Draw:
        rows = draw.rows
        u = batch_uniform((rows.total,), rows.seed, "pairs", rows.step, start=rows.start, count=len(draw.x0))
        index = moved((u * len(pairs.clean)).long(), pairs.clean.device)
        near = (draw.t[:, None].to(pairs.levels) - pairs.levels).abs().argmin(1)
        x0 = pairs.clean[index].to(draw.x0)
        z = (pairs.noisy[index, near].to(draw.x0) - x0) / expand(pairs.levels[near].to(draw.x0), x0)
        return replace(draw, x0=x0, z=z, label=None if pairs.labels is None else pairs.labels[index])

    return Coupling(stored)


BUILDERS: dict[str, Callable[[CouplingPart, Pairs | None], Coupling]] = {
    "independent": lambda part, pairs: Coupling(),
    "ot": lambda part, pairs: Coupling(optimal_transport),
    "generator": lambda part, pairs: build_generator(part),
    "teacher": lambda part, pairs: build_stored(pairs),
}


def build_coupling(part: CouplingPart, pairs: Pairs | None = None) -> Coupling:
    """Return the coupling that `part` names; "teacher" needs `pairs`."""
    return BUILDERS[part.kind](part, pairs)
