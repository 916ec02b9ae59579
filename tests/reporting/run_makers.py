"""Run folders without training: what a run writes, with numbers that are known."""

import json
from pathlib import Path

from cmtool.checkpoint import save_model
from cmtool.config.load import resolve, to_toml
from cmtool.files.atomic import atomic_text
from cmtool.models import build_model, model_header
from cmtool.rng import generator

BANDS = ("<0.02", "<0.5", ">=10")


def write_run(root, name="digits-ict", preset="digits", recipe="ict", steps=100, finished=True, sets=(), log=None):
    """Write runs/<name> with reports at every tenth step (loss 1 / step), two evaluations and, if finished, a model."""
    small = ["network.channels=8", "network.channel_mult=[1]", "network.head_channels=8", "network.attention=[]"]
    flags = {"train.steps": steps}
    config = resolve(preset, recipe=recipe, sets=[*small, *sets], flags=flags).config
    folder = Path(root) / name
    atomic_text(folder / "config.toml", to_toml(config))
    rows = [
        {"step": step, "steps": steps, "loss": 1 / step, "distance": 2 / step, "bands": dict.fromkeys(BANDS, 3 / step),
         "num_scales": 10 + step, "target_ema": 0.9, "lr": 1e-3, "grad_norm": None, "images_per_s": 100.0,
         "images_seen": 64 * step}
        for step in range(10, steps + 1, 10)
    ]  # fmt: skip
    evals = [{"step": step, "eval": {"fid": 1000.0 / step, "precision": 0.5}} for step in (50, 100) if step <= steps]
    atomic_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in [*rows, *evals]))
    atomic_text(folder / "run.log", (log or "2026-01-02T03:04:05Z start") + "\n")
    if finished:
        header = model_header(config, num_classes=None, class_names=None, fingerprint="f" * 32)
        header |= {"step": steps, "versions": {"cmtool": "0.1.0", "torch": "2.15.0"}}
        model = build_model(header)
        random = generator(1, name)
        state = {
            key: value.clone().normal_(0, 0.1, generator=random) for key, value in model.network.state_dict().items()
        }
        save_model(folder / "model.safetensors", state, header)
    return folder


def write_grids(folder, steps):
    """Write a small sample grid for each step, all of different gray."""
    import torch

    from cmtool.data import save_grid

    for index, step in enumerate(steps):
        save_grid(torch.full((4, 1, 8, 8), index / 10), folder / "samples" / f"step-{step:07d}.png")


def write_evaluation(folder, nfe=1, fid=12.5):
    row = {"created": "2026-01-02T03:04:05Z", "samples": folder.name, "count": 200, "nfe": nfe, "times": [80.0],
           "metrics": {"fid": fid, "precision": 0.25, "recall": None},
           "protocol": {"reference": "digits", "features": "digits"}}  # fmt: skip
    with open(folder / "evaluations.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
