"""Every method as one row of parts: what a recipe starts from when a preset names `method = "..."`.

A row holds only what differs from the defaults of `RecipeConfig`, and the tables that the method needs changed
(`process`, `network`, `train`). No other place knows methods by name.
"""

from __future__ import annotations

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "edm": {
        "family": "edm",
        "title": "EDM denoising (Karras et al. 2022)",
        "times": {"kind": "lognormal", "mean": -1.2, "std": 1.2},
        "gap": {"kind": "none"},
        "target": {"rule": "data"},
        "distance": {"kind": "l2"},
        "weighting": {"kind": "karras"},
        "process": {"parameterization": "edm"},
    },
    "cd": {
        "family": "cd",
        "title": "consistency distillation (Song et al. 2023)",
        "needs": "teacher",
        "curriculum": {"scales": "fixed", "s1": 18},
        "direction": {"kind": "teacher", "solver": "heun"},
        "distance": {"kind": "l2"},
    },
    "cd-euler": {
        "family": "cd",
        "title": "consistency distillation, Euler teacher steps",
        "needs": "teacher",
        "curriculum": {"scales": "fixed", "s1": 18},
        "direction": {"kind": "teacher", "solver": "euler"},
        "distance": {"kind": "l2"},
    },
    "cd-l1": {
        "family": "cd",
        "title": "consistency distillation, l1 distance",
        "needs": "teacher",
        "curriculum": {"scales": "fixed", "s1": 18},
        "direction": {"kind": "teacher", "solver": "heun"},
        "distance": {"kind": "l1"},
    },
    "ct": {
        "family": "ct",
        "title": "consistency training (Song et al. 2023)",
        "may_init": True,
        "curriculum": {"scales": "sqrt", "s0": 2, "s1": 150},
        "target": {"rule": "pair", "ema": 0.9, "adaptive": True},
        "distance": {"kind": "l2"},
    },
    "ict": {
        "family": "ct",
        "title": "improved consistency training (Song & Dhariwal 2024)",
        "may_init": True,
        "times": {"kind": "grid_lognormal", "mean": -1.1, "std": 2.0},
        "curriculum": {"scales": "doubling", "s0": 10, "s1": 1280},
        "distance": {"kind": "pseudo_huber"},
        "weighting": {"kind": "inverse_gap"},
    },
    "ict-pm": {
        "family": "ct",
        "title": "improved consistency training towards the posterior mean (variance-reduced, SCT)",
        "may_init": True,
        "times": {"kind": "grid_lognormal", "mean": -1.1, "std": 2.0},
        "curriculum": {"scales": "doubling", "s0": 10, "s1": 1280},
        "direction": {"kind": "posterior_mean"},
        "distance": {"kind": "pseudo_huber"},
        "weighting": {"kind": "inverse_gap"},
    },
    "ect": {
        "family": "ct",
        "title": "easy consistency tuning (Geng et al. 2025)",
        "needs": "init",
        "times": {"kind": "lognormal", "mean": -1.1, "std": 2.0},
        "gap": {"kind": "ratio", "map": "sigmoid", "q": 2.0, "stages": 8},
        "distance": {"kind": "pseudo_huber", "c": 0.0},
        "weighting": {"kind": "inverse_gap"},
        "process": {"parameterization": "edm"},
    },
}
