"""Couplings: which clean image meets which noise. Each takes what was drawn and gives it back, changed or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cmtool.config.parts import CouplingPart
from cmtool.diffusion.process import exact, expand
from cmtool.errors import ConfigError
from cmtool.losses.draw import Draw, Nets
from cmtool.rng import batch_uniform, moved

Coupling = Callable[[Nets, Draw], Draw]


@dataclass(frozen=True)
class Pairs:
    """Noise and what the teacher's ODE makes of it: x_T at sigma_max and x0, (M, C, H, W) each; labels (M,) or None."""

    noisy: Tensor
    clean: Tensor
    labels: Tensor | None
    sigma_max: float


def independent(nets: Nets, draw: Draw) -> Draw:
    """Images and noise as they were drawn."""
    return draw


def assignment(x0: Tensor, z: Tensor) -> Tensor:
    """Return for each image (B, ...) the index (B,) of its noise at the least total squared distance, on the CPU.

    |x - z|^2 and -<x, z> have the same best assignment, for the squares do not depend on it.
    """
    cost = -(exact(x0.flatten(1)) @ exact(z.flatten(1)).T)
    # Half a second of import that only this coupling needs; sampling and editing load this room too.
    from scipy.optimize import linear_sum_assignment

    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1])


def optimal_transport(nets: Nets, draw: Draw) -> Draw:
    """Noise permuted within the forward pass so that the total squared distance to the images is least (batch OT).

    Raises:
        ConfigError: for a single image, which has nothing to be exchanged with.
    """
    if len(draw.x0) < 2:
        raise ConfigError("optimal transport needs at least 2 images a forward pass.", "raise --micro-batch")
    return replace(draw, z=draw.z[assignment(draw.x0, draw.z).to(draw.z.device)])


def predict(net: nn.Module, draw: Draw) -> Tensor:
    """Return the answer of `net` at (x_r, r) without dropout and without gradient."""
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            return net(draw.x0 + expand(draw.r, draw.x0) * draw.z, draw.r, draw.label)
    finally:
        net.train(training)


def chosen(draw: Draw) -> Tensor:
    """Draw which images (B,) the model makes itself, a share `draw.mix` of them."""
    rows = draw.rows
    u = batch_uniform((rows.total,), rows.seed, "generator-mask", rows.step, start=rows.start, count=len(draw.x0))
    return moved(u < draw.mix, draw.x0.device)


def build_generator(part: CouplingPart) -> Coupling:
    """Return the coupling of generator-augmented flows (Issenhuth et al. 2025, Algorithm 1).

    A share mu of the images is replaced by the predictor's answer at the cleaner point (x_r, r); the noise stays. mu
    is the share of *generated* images, as in the paper; the released code's setting is 1 - mu. The mask has a stream
    of its own: with mu = 0 nothing else changes by a bit.
    """

    def generated(nets: Nets, draw: Draw) -> Draw:
        if draw.mix == 0:
            return draw
        net = {"online": nets.student, "ema": nets.sample_ema, "frozen": nets.frozen}[part.predictor]
        if net is None:
            raise ConfigError(f"the coupling's predictor '{part.predictor}' is not there.")
        made = chosen(draw) if draw.made is None else draw.made
        return replace(draw, x0=torch.where(expand(made, draw.x0), predict(net, draw), draw.x0))

    return generated


def build_stored(pairs: Pairs | None) -> Coupling:
    """Return the coupling that takes image and noise from stored pairs of the teacher.

    The noise z is the one whose straight line from x0 meets x_T at sigma_max, so that x0 + sigma_max z = x_T.

    Raises:
        ConfigError: if there are no pairs.
    """
    if pairs is None:
        raise ConfigError("the teacher's pairs are needed, and none were made.")

    def stored(nets: Nets, draw: Draw) -> Draw:
        rows = draw.rows
        u = batch_uniform((rows.total,), rows.seed, "pairs", rows.step, start=rows.start, count=len(draw.x0))
        index = moved((u * len(pairs.clean)).long(), pairs.clean.device)
        x0 = pairs.clean[index].to(draw.x0)
        z = (pairs.noisy[index].to(draw.x0) - x0) / pairs.sigma_max
        return replace(draw, x0=x0, z=z, label=None if pairs.labels is None else pairs.labels[index])

    return stored


BUILDERS: dict[str, Callable[[CouplingPart, Pairs | None], Coupling]] = {
    "independent": lambda part, pairs: independent,
    "ot": lambda part, pairs: optimal_transport,
    "generator": lambda part, pairs: build_generator(part),
    "teacher": lambda part, pairs: build_stored(pairs),
}


def build_coupling(part: CouplingPart, pairs: Pairs | None = None) -> Coupling:
    """Return the coupling that `part` names; `pairs` are needed by "teacher"."""
    return BUILDERS[part.kind](part, pairs)
