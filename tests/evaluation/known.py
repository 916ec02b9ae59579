"""Seeded features with known figures, degenerate sets, and the definitions written out plainly."""

import json
from pathlib import Path

import numpy as np
import scipy.linalg

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text())


def golden_sets():
    """Reference (500, 16), generated (400, 16) and class probabilities (600, 10), as `golden/metrics.json` says."""
    random = np.random.default_rng(20240601)
    mix = random.standard_normal((16, 16))
    real = random.standard_normal((500, 16)) @ mix / 4 + 0.3
    fake = random.standard_normal((400, 16)) @ mix / 4 * 1.1 + 0.35
    real, fake = real.astype(np.float32).astype(np.float64), fake.astype(np.float32).astype(np.float64)
    logits = random.standard_normal((600, 10)) * 3
    chances = np.exp(logits - logits.max(1, keepdims=True))
    return real, fake, chances / chances.sum(1, keepdims=True)


def degenerate_sets():
    """Pairs (reference, generated) on which careless implementations fail, by name."""
    random = np.random.default_rng(7)
    base, other = random.standard_normal((300, 24)), random.standard_normal((260, 24)) * 1.2 + 0.1
    constant, constant_other = base.copy(), other.copy()
    constant[:, 5] = constant_other[:, 5] = 3.0
    return {
        "random": (base, other),
        "identical": (base, base.copy()),
        "duplicated points": (np.repeat(base[:60], 5, axis=0), np.repeat(other[:52], 5, axis=0)),
        "shared points": (base, np.concatenate([base[:100], other[:100]])),
        "fewer samples than dimensions": (base[:20], other[:15]),
        "one constant feature": (constant, constant_other),
        "collapsed": (base, np.repeat(base[:1], 50, axis=0)),
        "far from zero": (base + 1e4, other + 1e4),
        "a lattice with ties": (
            np.indices((6, 6, 6)).reshape(3, -1).T * 1.0,
            np.indices((5, 5, 5)).reshape(3, -1).T + 0.5,
        ),
    }


def plain_frechet(mean1, cov1, mean2, cov2):
    """The formula as printed: trace of the matrix square root of the product."""
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    shift = mean1 - mean2
    return float(shift @ shift + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root).real)


def plain_manifold(real, fake, k=3, k_density=5):
    """Precision, recall, density and coverage with whole distance matrices in float64."""

    def squares(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    own_real, own_fake, cross = np.sort(squares(real, real), 1), np.sort(squares(fake, fake), 1), squares(real, fake)
    inside = cross <= own_real[:, k][:, None]
    wide = cross < own_real[:, k_density][:, None]
    return {
        "precision": inside.any(0).mean(),
        "recall": (cross <= own_fake[:, k][None]).any(1).mean(),
        "density": wide.sum(0).mean() / k_density,
        "coverage": wide.any(1).mean(),
    }
