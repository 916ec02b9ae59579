"""What each of the five convolutions of a pair costs, by kind of layer: forward, two differences, two gradients.

    python -m benchmarks pair-cost [--preset imagenet64] [--batch 64] [--device cuda] [--out pair-cost.json]

One pass of the network shows which convolutions it has, and how often each. Every kind is then timed by itself in the
format of pairs: the student's W x, the target's W' (x' - x) and (W' - W) x, the gradients by input and by weight; and
W (x, x' - x) as one call of twice the batch, rounding into it included, as `train.pairs_in_step` makes it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.card import seconds_of
from cmtool.config.load import resolve
from cmtool.models import placed
from cmtool.networks.convolution import Geometry, computed_by, convolve, half_backward, set_backward_dtype
from cmtool.training.bench import stand_in_data
from cmtool.training.compiling import trial
from cmtool.training.setup import fresh_student

HALF = torch.bfloat16
# Shape of the input without the batch, shape of the weights, and how the convolution moves.
Kind = tuple[tuple[int, ...], tuple[int, ...], Geometry]
PARTS = ("W x", "W' (x' - x)", "(W' - W) x", "by input", "by weight", "W (x, x' - x)")


class Census:
    """A pass that counts its convolutions by kind."""

    reads = False

    def __init__(self) -> None:
        self.kinds: Counter[Kind] = Counter()

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, dtype: torch.dtype
    ) -> Tensor:
        """Count, and convolve as usual."""
        self.kinds[tuple(x.shape[1:]), tuple(weight.shape), geometry] += 1
        return half_backward(x, x.detach().to(dtype), weight, bias, geometry, whole=True)


def census(asked: argparse.Namespace, device: torch.device) -> Counter[Kind]:
    """The inner convolutions of a preset's network on a device, counted on one image."""
    config = resolve(asked.preset, recipe=asked.recipe, sets=asked.sets).config
    model = placed(fresh_student(config, stand_in_data(config, 8)), device)
    set_backward_dtype(model.network, HALF)
    found = Census()
    with computed_by(found):
        model(*trial(model, 1))
    return found.kinds


def works(kind: Kind, batch: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The six pieces of work of a kind of convolution, rounding of their inputs included."""
    shape, sizes, geometry = kind
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format  # that of networks there
    x, near, weight, other = (
        torch.randn(size, device=device).to(memory_format=layout) for size in 2 * [(batch, *shape)] + 2 * [sizes]
    )
    rounded, half = x.to(HALF), weight.to(HALF)
    gradient = torch.randn_like(convolve(rounded, half, geometry), dtype=torch.float32)
    stride, padding, transposed, groups = geometry

    def back(*wanted: bool) -> object:
        moved = (gradient.to(HALF), rounded, half)
        rest = (None, stride, padding, (1, 1), transposed, (0, 0), groups, (*wanted, False))
        return torch.ops.aten.convolution_backward(*moved, *rest)

    def at_once() -> Tensor:
        both = torch.empty((2 * batch, *shape), dtype=HALF, device=device, memory_format=layout)
        both[:batch].copy_(x)
        torch.sub(near, x, out=both[batch:])
        return convolve(both, weight.to(HALF), geometry)

    return {
        "W x": lambda: convolve(x.to(HALF), weight.to(HALF), geometry),
        "W' (x' - x)": lambda: convolve((near - x).to(HALF), other.to(HALF), geometry),
        "(W' - W) x": lambda: convolve(rounded, (other - weight).to(HALF), geometry),
        "by input": lambda: back(True, False),
        "by weight": lambda: back(False, True),
        "W (x, x' - x)": at_once,
    }


def operations(kind: Kind, batch: int) -> float:
    """Additions and multiplications of one of these convolutions."""
    (_, height, width), sizes, geometry = kind
    pixels = height * width if geometry.transposed else height * width // (geometry.stride[0] * geometry.stride[1])
    return 2.0 * batch * pixels * torch.Size(sizes).numel()


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a Markdown table of milliseconds a step, and write JSON too if `--out` is given."""
    made = argparse.ArgumentParser(prog="python -m benchmarks pair-cost", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--preset", default="imagenet64")
    made.add_argument("--recipe", default="ct")
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--set", action="append", default=["recipe.distance.kind=l2"], dest="sets")
    made.add_argument("--out", type=Path, help="file for JSON")
    asked = made.parse_args(arguments)
    device = torch.device(asked.device)
    kinds, rows = census(asked, device), []
    print(f"| input | weights | layers | GFLOP each | {' | '.join(PARTS)} |")
    print(f"|---|---|---|---|{'---|' * len(PARTS)}", flush=True)
    for kind, count in sorted(kinds.items(), key=lambda item: -item[1] * operations(item[0], 1)):
        pieces = works(kind, asked.batch, device)
        times = {part: 1e3 * count * seconds_of(pieces[part], asked.rounds) for part in PARTS}
        flops = operations(kind, asked.batch)
        named = dict(zip(("input", "weights", "geometry"), kind, strict=True))
        rows.append({**named, "layers": count, "flops": flops, "ms": times})
        sizes = " | ".join("x".join(map(str, size)) for size in kind[:2])
        cells = " | ".join(f"{milliseconds:.2f}" for milliseconds in times.values())
        print(f"| {sizes} | {count} | {flops / 1e9:.1f} | {cells} |", flush=True)
    total = {part: sum(row["ms"][part] for row in rows) for part in PARTS}
    print(f"| all | | {sum(kinds.values())} | | {' | '.join(f'{value:.1f}' for value in total.values())} |")
    if asked.out:
        document = {"device": asked.device, "torch": torch.__version__, "batch": asked.batch, "rows": rows}
        asked.out.write_text(json.dumps({**document, "ms": total}, indent=2) + "\n")


if __name__ == "__main__":
    main()
