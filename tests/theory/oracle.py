"""Second routes to a number: what the laboratory itself does not need."""

import numpy as np

from cmtool.theory import chain
from cmtool.theory.distances import assignment_w1
from cmtool.theory.laws import product
from cmtool.theory.population import at


def gaussian_sde_sd(levels, std):
    """Output sd of ancestral sampling from N(0, 1) for data N(0, s^2): its exact variance recursion."""
    variance = 1.0
    for index in range(levels.count - 1, 0, -1):
        (a, b), (a_now, b_now) = at(levels, index - 1), at(levels, index)
        keep = a_now / a
        shrink = a_now * std**2 / (a_now**2 * std**2 + b_now**2)
        pull = keep * b**2 / b_now**2
        variance *= (a * shrink + pull * (1 - a_now * shrink)) ** 2
        variance += b**2 * (b_now**2 - keep**2 * b**2) / b_now**2
    return float(np.sqrt(variance))


def sampled_w1(law, levels, outputs, rng):
    """W1 by optimal assignment of 1000 outputs (1000, 2) to draws of X_1, and the floor of two clouds of X_1."""
    plane = product(law, 2)
    clouds = [chain.marginal(plane, levels, 0, len(outputs), rng) for _ in range(3)]
    return assignment_w1(outputs, clouds[0]), assignment_w1(clouds[1], clouds[2])
