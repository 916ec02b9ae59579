"""Make the small models that are bundled with the package.

    python benchmarks/make_demo.py avatars runs/avatars-icd
    python benchmarks/make_demo.py digits runs/digits-ict-pm
    python benchmarks/make_demo.py shapes runs/shapes-ict-pm

Takes a finished run, rounds its weights to bfloat16, and writes cmtool/demo/NAME.safetensors with the command that
trained it, its seed and its figures in the header. It evaluates the written file, with separate seeds, so that the
figures are those of the file. `--skip-figures` leaves out the evaluation.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import cmtool
from cmtool.checkpoint import load_tensors, save_model
from cmtool.config.load import from_toml, resolve
from cmtool.config.schema import RunConfig

DEMOS = Path(cmtool.__file__).parent / "demo"
LARGEST = 6_000_000  # bytes
STEPS = (1, 2, 4)
SEED = 900  # seed of the samples that are evaluated


def training_command(config: RunConfig) -> str:
    """Return the shortest command that resolves to the same settings, as far as options can say it."""
    words = ["cmtool", f"train-{config.family}", "--preset", config.preset]
    usual = resolve(config.preset, family=config.family).config
    if usual.recipe_name != config.recipe_name:
        words += ["--recipe", config.recipe_name]
        usual = resolve(config.preset, family=config.family, recipe=config.recipe_name).config
    for key, flag in (("steps", "--steps"), ("batch_size", "--batch-size"), ("seed", "--seed")):
        if getattr(usual.train, key) != getattr(config.train, key):
            words += [flag, str(getattr(config.train, key))]
    return " ".join(words)


def commands(run: Path) -> str:
    """Return the commands that made a run: its teacher's first, where that is a run as well."""
    config = from_toml(run / "config.toml")
    teacher = Path(config.teacher).parent if config.teacher else None
    first = f"{commands(teacher)} && " if teacher is not None and (teacher / "config.toml").is_file() else ""
    return first + training_command(config)


def bfloat16(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Round floating-point weights to bfloat16; anything else stays."""
    return {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors.items()}


def judge(path: Path, preset: str, count: int) -> dict[str, float]:
    """Frechet distance of the file's samples for each number of steps, and precision and recall of one step."""
    model = cmtool.load(path, "cpu")
    found: dict[str, float] = {}
    for steps in STEPS:
        figures = cmtool.evaluate(model, preset, num=count, steps=steps, seed=SEED, metrics=("fid", "pr"), device="cpu")
        found[str(steps)] = round(figures["fid"], 4)
        if steps == 1:
            found |= {key: round(figures[key], 4) for key in ("precision", "recall")}
        print(f"{steps} step{'s' * (steps > 1)}: {figures}", flush=True)
    return found


def make(name: str, run: Path, figures: bool, count: int, command: str | None = None) -> Path:
    """Write the demo file of a run and return its path; nothing is left if it is too large.

    `command` is what made it; None: the run's own command, after its teacher's.
    """
    config = from_toml(run / "config.toml")
    tensors, header = load_tensors(run / "model.safetensors")
    small = bfloat16(tensors)
    size = sum(t.numel() * t.element_size() for t in small.values())
    if size > LARGEST - 100_000:
        raise SystemExit(f"{size:,} bytes of weights are more than a demo may have ({LARGEST:,} with its header).")
    said = {"command": command or commands(run), "seed": config.train.seed}
    path = DEMOS / f"{name}.safetensors"
    save_model(path, small, header | said)
    if figures:
        save_model(path, small, header | said | {"figures": judge(path, config.preset, count), "figures_count": count})
    print(f"{path}: {path.stat().st_size:,} bytes, {said['command']}")
    return path


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="avatars, digits or shapes: the file is demo/NAME")
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--count", type=int, default=1797, help="samples that are judged")
    parser.add_argument("--command", help="what made the run, where there is more to it than a teacher and a student")
    parser.add_argument("--skip-figures", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    make(given.name, given.run, not given.skip_figures, given.count, given.command)


if __name__ == "__main__":
    main()
