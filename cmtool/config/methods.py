"""Every method as one row of parts: what a recipe starts from when a preset names `method = "..."`.

A row holds only what differs from the defaults of `RecipeConfig`, and what the method changes in other tables
(`process`, `network`, `train`). Nothing else knows methods by name.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def _row(base: Row, **changes: Any) -> Row:
    """Return `base` with some of its entries replaced; a table is merged, its inner tables replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


_EDM: Row = {
    "family": "edm",
    "title": "EDM denoising (Karras et al. 2022)",
    "times": {"kind": "lognormal", "mean": -1.2, "std": 1.2},
    "gap": {"kind": "none"},
    "target": {"rule": "data"},
    "distance": {"kind": "l2"},
    "weighting": {"kind": "karras"},
    "process": {"parameterization": "edm"},
}

_CD: Row = {
    "family": "cd",
    "title": "consistency distillation (Song et al. 2023)",
    "needs": "teacher",
    "curriculum": {"scales": "fixed", "s1": 18},
    "direction": {"kind": "teacher", "solver": "heun"},
    "distance": {"kind": "l2"},
}

_ICT: Row = {
    "family": "ct",
    "title": "improved consistency training (Song & Dhariwal 2024)",
    "may_init": True,
    "times": {"kind": "grid_lognormal", "mean": -1.1, "std": 2.0},
    "curriculum": {"scales": "doubling", "s0": 10, "s1": 1280},
    "distance": {"kind": "pseudo_huber"},
    "weighting": {"kind": "inverse_gap"},
}

_ECT: Row = {
    "family": "ct",
    "title": "easy consistency tuning (Geng et al. 2025)",
    "needs": "init",
    "times": {"kind": "lognormal", "mean": -1.1, "std": 2.0},
    "gap": {"kind": "ratio", "map": "sigmoid", "q": 2.0, "stages": 8},
    "distance": {"kind": "pseudo_huber", "c": 0.0},
    "weighting": {"kind": "inverse_gap"},
    "process": {"parameterization": "edm"},
}

# Only the written-out attention has a forward-mode derivative.
_FORWARD: Row = {"attention_kernel": "math"}

_CD_LIMIT: Row = {
    "family": "cd",
    "title": "consistency distillation in continuous time (Song et al. 2023, Theorem 5)",
    "needs": "teacher",
    "times": {"kind": "karras_uniform"},
    "gap": {"kind": "none"},
    "direction": {"kind": "teacher"},
    "target": {"rule": "tangent"},
    "distance": {"kind": "l2"},
    "network": _FORWARD,
}

_SCT: Row = {
    "family": "ct",
    "title": "continuous-time consistency training, sCT (Lu & Song 2025)",
    "needs": "init",
    "times": {"kind": "lognormal", "mean": -1.0, "std": 1.4},
    "gap": {"kind": "none"},
    "target": {"rule": "trig_tangent", "normalize": "norm", "c": 0.1, "warmup": 0.025},
    "distance": {"kind": "l2"},
    "weighting": {"kind": "learned"},
    "process": {"kind": "trig", "parameterization": "edm"},
    "network": {**_FORWARD, "log_variance": True},
}

# Samples at the largest level alone, seen by nothing but the two denoisers; data give the classes and no more.
_SID: Row = {
    "family": "cd",
    "title": "score identity distillation, SiD (Zhou et al. 2024)",
    "needs": "teacher",
    "may_init": True,
    "times": {"kind": "largest"},
    "gap": {"kind": "none"},
    "direction": {"kind": "teacher"},
    "target": {"rule": "data"},
    "score": {"kind": "sid", "alpha": 1.2},
    "network": {"dropout": 0.0},
    "train": {"optimizer": "adam", "betas": [0.0, 0.999], "precision": "auto"},
}

# Networks that give the average velocity between two times, and jump from one to the other.
_FLOW_MAP: Row = {
    "family": "ct",
    "may_init": True,
    "times": {"kind": "two_lognormal", "mean": -2.0, "std": 2.0, "same": 0.25},
    "gap": {"kind": "none"},
    "process": {"kind": "flow", "parameterization": "flow"},
    "network": {"two_time": True},
    "sample": {"sampler": "jumps"},
}

METHODS: dict[str, Row] = {
    "edm": _EDM,
    "cd": _CD,
    "cd-euler": _row(
        _CD, title="consistency distillation, Euler teacher steps", direction={"kind": "teacher", "solver": "euler"}
    ),
    "cd-l1": _row(_CD, title="consistency distillation, l1 distance", distance={"kind": "l1"}),
    "rf": _row(
        _EDM,
        title="rectified flow (Liu et al. 2023)",
        times={"kind": "flow_uniform"},
        weighting={"kind": "flow"},
        process={"kind": "flow", "parameterization": "flow"},
    ),
    "cd-2m": _row(
        _CD,
        title="consistency distillation, DPM-Solver++ 2M within a pair",
        direction={"kind": "teacher", "solver": "dpmpp_2m", "substeps": 4},
    ),
    "cd-inf": _CD_LIMIT,
    "cd-inf-l1": _row(
        _CD_LIMIT,
        title="consistency distillation in continuous time, l1 distance (Theorem 4)",
        target={"stop_gradient": False},
        distance={"kind": "l1"},
        network={"checkpointing": False},
    ),
    "cd-inf-full": _row(
        _CD_LIMIT,
        title="consistency distillation in continuous time, no stop-gradient (Theorem 3)",
        target={"stop_gradient": False},
        weighting={"kind": "grid_speed"},
        network={"checkpointing": False},
    ),
    "scd": _row(
        _SCT,
        family="cd",
        title="continuous-time consistency distillation, sCD (Lu & Song 2025)",
        needs="teacher",
        direction={"kind": "teacher"},
    ),
    "pd": {
        "family": "cd",
        "title": "progressive distillation (Salimans & Ho 2022)",
        "kind": "diffusion",
        "needs": "teacher",
        "curriculum": {"scales": "halving", "s0": 4096, "s1": 1},
        "direction": {"kind": "target", "solver": "euler", "substeps": 2},
        "target": {"rule": "leap", "update": "stage"},
        "distance": {"kind": "l2"},
        "weighting": {"kind": "truncated_snr"},
        "process": {"parameterization": "edm"},
        # Its usual number of steps is that of the last stage (models.usual_steps).
        "sample": {"sampler": "progressive"},
    },
    "kd": {
        "family": "cd",
        "title": "knowledge distillation on stored teacher pairs (Luhman & Luhman 2021)",
        "needs": "teacher",
        "times": {"kind": "largest"},
        "gap": {"kind": "none"},
        "coupling": {"kind": "teacher"},
        "target": {"rule": "data"},
        "distance": {"kind": "l2"},
    },
    "cmt": {
        "family": "cd",
        "title": "consistency mid-training on points of the teacher's paths (Hu et al. 2025)",
        "needs": "teacher",
        "times": {"kind": "grid_log"},
        "curriculum": {"scales": "fixed", "s1": 17},
        "coupling": {"kind": "teacher", "path": True},
        "target": {"rule": "data"},
        "distance": {"kind": "pseudo_huber"},
        "process": {"parameterization": "edm"},
    },
    "reflow": {
        "family": "cd",
        "title": "rectified flow straightened on stored teacher pairs (Liu et al. 2023)",
        "kind": "diffusion",
        "needs": "teacher",
        "times": {"kind": "flow_uniform"},
        "gap": {"kind": "none"},
        "coupling": {"kind": "teacher"},
        "target": {"rule": "data"},
        "distance": {"kind": "l2"},
        "weighting": {"kind": "flow"},
        "process": {"kind": "flow", "parameterization": "edm"},
        "sample": {"sampler": "euler", "steps": 1},
    },
    "icd": {
        "family": "cd",
        "title": "consistency distillation with iCT's times, curriculum, distance and weights",
        "needs": "teacher",
        "times": {"kind": "grid_lognormal", "mean": -1.1, "std": 2.0},
        "curriculum": {"scales": "doubling", "s0": 10, "s1": 1280},
        "direction": {"kind": "teacher", "solver": "heun"},
        "distance": {"kind": "pseudo_huber"},
        "weighting": {"kind": "inverse_gap"},
    },
    "sid": _SID,
    "dmd2": _row(
        _SID,
        title="distribution matching distillation, DMD2 without discriminator (Yin et al. 2024)",
        score={"kind": "dmd", "reach": [0.02, 0.98], "fake_steps": 5},
    ),
    "polish": {
        "family": "cd",
        "title": "SiD on a trained consistency model, whose other noise levels go on as in icd",
        "needs": "teacher_and_consistency_init",
        "times": {"kind": "grid_lognormal", "mean": -1.1, "std": 2.0},
        "curriculum": {"scales": "fixed", "s1": 81},
        "direction": {"kind": "teacher", "solver": "heun"},
        "distance": {"kind": "pseudo_huber"},
        "weighting": {"kind": "inverse_gap"},
        "score": {"kind": "sid", "alpha": 1.0, "keep": 1.0},
        "network": {"dropout": 0.0},
        "train": {"optimizer": "adam", "betas": [0.0, 0.999], "precision": "auto"},
    },
    "ct": {
        "family": "ct",
        "title": "consistency training (Song et al. 2023)",
        "may_init": True,
        "curriculum": {"scales": "sqrt", "s0": 2, "s1": 150},
        "target": {"rule": "pair", "ema": 0.9, "adaptive": True},
        "distance": {"kind": "l2"},
    },
    "ct-inf": _row(
        _CD_LIMIT,
        family="ct",
        title="consistency training in continuous time (Song et al. 2023, Theorem 6)",
        needs="init",
        direction={"kind": "sample"},
    ),
    "ict": _ICT,
    "ict-pm": _row(
        _ICT,
        title="improved consistency training towards the posterior mean (variance-reduced, SCT)",
        direction={"kind": "posterior_mean"},
    ),
    "ict-cauchy": _row(
        _ICT,
        title="improved consistency training, Cauchy distance (Dao et al. 2025)",
        distance={"kind": "cauchy", "c_scale": 0.03},
    ),
    "ict-ot": _row(
        _ICT,
        title="improved consistency training, batch optimal transport (Pooladian et al. 2023)",
        coupling={"kind": "ot"},
    ),
    "ict-gc": _row(
        _ICT,
        title="improved consistency training, generator-augmented (Issenhuth et al. 2025)",
        coupling={"kind": "generator", "mix": 0.5},
    ),
    "ect": _ECT,
    "ect-gc": _row(
        _ECT,
        title="easy consistency tuning, generator-augmented (Issenhuth et al. 2025)",
        coupling={"kind": "generator", "mix": 0.3},
    ),
    "ect-vr": _row(
        _ECT,
        title="easy consistency tuning towards the posterior mean, times where the discrepancy is",
        times={"kind": "discrepancy"},
        direction={"kind": "posterior_mean"},
    ),
    "sct": _SCT,
    "tcm": {
        "family": "ct",
        "title": "truncated consistency model, stage two (Lee et al. 2025)",
        "needs": "consistency_init",
        "times": {"kind": "student_t", "low": 1.0, "std": 0.2, "df": 0.01, "atom": 0.25},
        "gap": {"kind": "ratio", "map": "constant", "q": 2.0, "stages": 1, "first": 9, "cap": 0.999},
        "distance": {"kind": "pseudo_huber", "c": 0.0},
        "weighting": {"kind": "inverse_gap", "atom": 0.1},
        "process": {"truncated_at": 1.0},
    },
    "meanflow": _row(
        _FLOW_MAP,
        title="MeanFlow (Geng et al. 2025)",
        target={"rule": "average_velocity"},
        distance={"kind": "squared_norm"},
        weighting={"kind": "adaptive", "p": 0.75, "c": 1e-3},
        network=_FORWARD,
    ),
    "imf": _row(
        _FLOW_MAP,
        title="improved MeanFlow: the derivative along the network's own velocity (Geng et al. 2025b)",
        times={"same": 0.5},
        target={"rule": "average_velocity", "tangent": "own"},
        distance={"kind": "squared_norm"},
        weighting={"kind": "adaptive", "p": 1.0, "c": 0.01},
        network=_FORWARD,
    ),
    "mfd": _row(
        _FLOW_MAP,
        family="cd",
        title="MeanFlow distillation: the teacher's velocity and its average (Sabour et al. 2025)",
        needs="teacher",
        may_init=False,
        # Of MeanFlow's levels (mean -2) one in 1,400 lies above the largest, where the teacher's answer would remain.
        times={"mean": 0.5},
        direction={"kind": "teacher"},
        target={"rule": "average_velocity"},
        distance={"kind": "squared_norm"},
        weighting={"kind": "adaptive", "p": 0.75, "c": 1e-3},
        process={"parameterization": "edm"},
        network=_FORWARD,
    ),
    "tfm": _row(
        _FLOW_MAP,
        title="trajectory flow matching: every average velocity towards that of the sample (Zhang et al. 2025)",
        target={"rule": "two_leg"},
        distance={"kind": "l2"},
    ),
    "soflow": _row(
        _FLOW_MAP,
        title="SoFlow: consistency of two legs, the first ever shorter (Luo et al. 2026)",
        times={"mean": -0.9, "std": 1.6, "mean_r": -4.0, "same": 0.0},
        legs={"law": "exponential", "start": 1.0, "end": 0.0003125},
        target={"rule": "two_leg", "residual": "rate"},
        distance={"kind": "l2"},
        weighting={"kind": "adaptive", "p": 0.75, "c": 1e-3},
    ),
    "aflow": _row(
        _FLOW_MAP,
        title="alpha-Flow: from flow matching to MeanFlow (Zhang et al. 2025)",
        times={"same": 0.5},
        legs={"law": "sigmoid", "end": 0.005},
        target={"rule": "two_leg", "residual": "step", "limit": True},
        distance={"kind": "l2"},
        weighting={"kind": "adaptive", "p": 1.0, "c": 1e-3},
        network=_FORWARD,
    ),
    "shortcut": _row(
        _FLOW_MAP,
        title="shortcut models: one step as two half as long (Frans et al. 2025)",
        times={"kind": "dyadic", "same": 0.875},
        legs={"start": 0.5},
        target={"rule": "two_leg", "first": "own", "ema": 0.999},
        distance={"kind": "l2"},
        # Halves and quarters of the whole way, as in training.
        sample={"times": {"2": (80.0, 0.9756), "4": (80.0, 2.8571, 0.9756, 0.3279)}},
    ),
    "ctm": _row(
        _FLOW_MAP,
        family="cd",
        title="consistency trajectory model without discriminator (Kim et al. 2024)",
        needs="teacher",
        may_init=False,
        times={"kind": "two_karras"},
        legs={"law": "uniform", "end": 0.05},
        direction={"kind": "teacher", "solver": "heun", "substeps": 2},
        target={"rule": "two_leg"},
        distance={"kind": "l2"},
        weighting={"kind": "adaptive", "p": 0.75, "c": 1e-3},
        process={"parameterization": "edm"},
    ),
    "imm": {
        "family": "ct",
        "title": "inductive moment matching (Zhou et al. 2025)",
        "may_init": True,
        "times": {"kind": "flow_pair", "group": 4},
        "gap": {"kind": "decrement", "k": 12.0},
        "target": {"rule": "moments"},
        "distance": {"kind": "pseudo_huber", "c": 0.0},
        "weighting": {"kind": "sigmoid", "a": 1.0, "b": 5.0},
        "process": {"kind": "flow", "parameterization": "flow"},
        "network": {"two_time": True},
        "sample": {"sampler": "jumps"},
    },
}
