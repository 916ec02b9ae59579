"""Losses and samples at a fixed seed, in float64, pinned to nine digits.

Whoever changes one of these numbers says so under Numerics in the changelog, and writes the new ones with
`python -m tests.test_golden --write`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling
from tests.training.tiny import reports, trainer_of, with_source

FILE = Path(__file__).with_name("golden.json")
PRESET = Path(__file__).with_name("golden_preset.toml")
RECIPES = ("edm", "cd", "ct", "ict", "ict-pm", "ect")
STEPS = 3


def measured(recipe: str, folder: Path) -> dict[str, list[float]]:
    """Return the losses of three steps, and pixels of samples in one and two steps (18 Heun steps of a teacher)."""
    trainer = trainer_of(with_source(recipe, folder, preset=str(PRESET), steps=STEPS))
    found = {"loss": [report.loss for report in reports(trainer)]}
    model = trainer.state.ema
    times = [None] if recipe == "edm" else [[80.0], [80.0, 0.8]]
    for given in times:
        plan = plan_sampling(model.header, times=given)
        (batch,) = generate(model, plan, [0, 1, 2])
        assert batch.x0.dtype == torch.float64
        found[f"samples {len(plan.times)}"] = [*batch.x0.flatten()[::40].tolist(), float(batch.x0.square().mean())]
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_and_samples_are_the_pinned_ones(recipe, tmp_path):
    expected = json.loads(FILE.read_text())[recipe]
    found = measured(recipe, tmp_path)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-9, abs=1e-11), name


def test_the_pinned_numbers_tell_the_recipes_apart():
    golden = json.loads(FILE.read_text())
    assert golden.keys() == set(RECIPES)
    losses = [tuple(golden[recipe]["loss"]) for recipe in RECIPES]
    assert len(set(losses)) == len(RECIPES) and all(len(loss) == STEPS and min(loss) > 0 for loss in losses)


if __name__ == "__main__" and "--write" in sys.argv:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        numbers = {recipe: measured(recipe, Path(name)) for recipe in RECIPES}
    FILE.write_text(json.dumps(numbers, indent=1) + "\n")
    print(FILE)
