"""What paper-scale recipes cost, by arithmetic: FLOPs counted by torch on networks without memory, times the steps.

Nothing is measured here: GPU-hours follow from a card's peak rate and the share of it that is assumed to be reached,
and for an H200 from the rate that a training step had there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from cmtool.config.load import read_preset, resolve
from cmtool.config.schema import RunConfig
from cmtool.networks import build_network, parameter_count

# Dense peak rates in TFLOP/s as the makers give them: half precision, and TF32 for passes in float32.
CARDS = {"A100": (312, 156), "H100": (989, 495)}
# TFLOP/s of a step in bfloat16 as docs/scale.md measured it: `ct` on the ImageNet-64 network, 64 images a card.
MEASURED = {"H200": 106}
# VGG-16's convolutions at 224 x 224, one image forward; LPIPS enlarges its images to that size.
VGG = 30.7e9
RECIPES = ("edm", "ct", "cd", "ict", "ict-gc", "ect", "sct", "scd", "pd")


@dataclass(frozen=True)
class Size:
    """A network: parameters, FLOPs of one image's forward pass, bytes kept for its backward pass in float32."""

    parameters: int
    forward: float
    kept: float


def size_of(config: RunConfig) -> Size:
    """Count on the meta device: no weights, no time."""
    data = config.data
    classes = (data.num_classes or 1000) if data.labels else None
    with torch.device("meta"):
        network = build_network(
            config.network, channels=data.channels, resolution=data.resolution, num_classes=classes, seed=0
        )
        inputs: list[Any] = [torch.empty(1, data.channels, data.resolution, data.resolution), torch.empty(1)]
        inputs.append(None if classes is None else torch.zeros(1, dtype=torch.int64))
        if config.network.two_time:
            inputs.append(torch.empty(1))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor._base is None:
            kept[id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*inputs)
    memory = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    return Size(parameter_count(network), counter.get_total_flops(), memory)


def evaluations(config: RunConfig) -> tuple[float, float]:
    """Return (networks' forward passes an image and step, those of VGG): a backward pass counts as two."""
    recipe, passes = config.recipe, 3.0
    if recipe.score.kind != "none":
        # The third network learns (3); it and the teacher answer, for SiD with a gradient to their input (2 each).
        passes += 3 + (4 if recipe.score.kind == "sid" else 2) + 4 * (recipe.score.fake_steps - 1)
        if not recipe.score.keep:
            return passes, 0.0
        passes += 3
    if recipe.target.rule in ("pair", "leap", "two_leg"):
        passes += {"pair": 1, "leap": 0}.get(recipe.target.rule, 2 if recipe.target.first == "own" else 1)
    if recipe.target.rule == "average_velocity" and recipe.target.tangent == "own":
        passes += 1
    if recipe.direction.kind == "sample" and recipe.direction.guidance != 1:
        passes += 2 if recipe.direction.mix or config.network.guided else 1
    if recipe.target.differentiates and recipe.target.rule != "two_leg":
        passes += 2 if recipe.target.derivative == "forward" else 3
    if recipe.coupling.kind == "generator":
        passes += 1
    if recipe.direction.kind in ("teacher", "target"):
        order = {"euler": 1, "heun": 2, "midpoint": 2}.get(recipe.direction.solver, 1)
        passes += order * recipe.direction.substeps * (2 if recipe.direction.guidance != 1 else 1)
    # Two forward passes, and the backward pass to the image of one of them, without gradients of VGG's weights.
    return passes, 3.0 if recipe.distance.kind == "lpips" else 0.0


def cost(config: RunConfig, utilization: float) -> dict[str, Any]:
    """All figures of one recipe."""
    size, train = size_of(config), config.train
    passes, vgg = evaluations(config)
    step = passes * size.forward + vgg * VGG
    whole = step * train.batch_size * train.steps
    copies = 2 + len(train.extra_emas) + config.recipe.target.keeps_network + config.recipe.takes_teacher
    trained = 1 + (config.recipe.score.kind != "none")  # weights of a third network, and moments and gradients of both
    state = 4 * size.parameters * (copies + trained - 1 + trained * (2 + 1))
    row = {
        "recipe": f"{config.preset} {config.recipe_name}",
        "parameters": size.parameters,
        "forward": size.forward,
        "passes": passes,
        "image": step,
        "batch": train.batch_size,
        "steps": train.steps,
        "flops": whole,
        "state": state,
        "kept": size.kept,
    }
    hours = {card: whole / (utilization * 1e12 * rates[0] * 3600) for card, rates in CARDS.items()}
    hours |= {card: whole / (rate * 1e12 * 3600) for card, rate in MEASURED.items()}
    return {**row, **{f"{card} hours": value for card, value in hours.items()}}


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of `docs/scale.md`."""
    heads = ["recipe", "parameters", "GFLOP forward", "passes", "GFLOP an image", "batch", "steps", "EFLOP"]
    heads += [f"{card}-hours" for card in (*CARDS, *MEASURED)] + ["state, GB", "activations an image, GB"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["recipe"], f"{row['parameters'] / 1e6:.1f} M", f"{row['forward'] / 1e9:.1f}", f"{row['passes']:g}"]
        cells += [f"{row['image'] / 1e9:,.0f}", f"{row['batch']:,}", f"{row['steps']:,}", f"{row['flops'] / 1e18:,.0f}"]
        cells += [f"{row[f'{card} hours']:,.0f}" for card in (*CARDS, *MEASURED)]
        cells += [f"{row['state'] / 1e9:.1f}", f"{row['kept'] / 1e9:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Count and print."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--presets", default="cifar10,imagenet64,lsun_bedroom256")
    made.add_argument("--utilization", type=float, default=0.35, help="share of the card's half-precision peak")
    made.add_argument("--json", action="store_true")
    asked = made.parse_args(arguments)
    rows = []
    for preset in asked.presets.split(","):
        for name in [name for name in read_preset(preset).recipes if name in RECIPES]:
            rows.append(cost(resolve(preset, recipe=name).config, asked.utilization))
    print(json.dumps(rows, indent=2) if asked.json else markdown(rows))


if __name__ == "__main__":
    main()
