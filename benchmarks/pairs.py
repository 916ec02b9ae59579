"""Timing the same work side by side: each round runs every contestant once, in turn, so that all see the same load."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cmtool.machine.device import keep_freed_memory
from cmtool.machine.recorded import WARM_UP


@dataclass(frozen=True)
class Contestant:
    """A name, whether it is ours, and one unit of work; `note` says what is special about it."""

    name: str
    ours: bool
    run: Callable[[], Any]
    note: str = ""


@dataclass
class Comparison:
    """Seconds of every contestant in every round, and what was left out."""

    title: str
    contestants: Sequence[Contestant]
    seconds: dict[str, list[float]]
    absent: dict[str, str] = field(default_factory=dict)
    clock: str = "wall"

    def row(self, name: str) -> dict[str, float]:
        """Median and quartiles in milliseconds."""
        low, middle, high = quartiles(self.seconds[name])
        return {"median_ms": 1e3 * middle, "low_ms": 1e3 * low, "high_ms": 1e3 * high}

    def ratios(self) -> list[dict[str, Any]]:
        """How many times faster each of ours is than each peer, round by round: median and quartiles."""
        found = []
        for ours in (c for c in self.contestants if c.ours):
            for peer in (c for c in self.contestants if not c.ours):
                pairs = zip(self.seconds[peer.name], self.seconds[ours.name], strict=True)
                low, middle, high = quartiles([theirs / own for theirs, own in pairs])
                found.append({"ours": ours.name, "peer": peer.name, "ratio": middle, "low": low, "high": high})
        return found

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        rows = {c.name: {**self.row(c.name), "ours": c.ours, "note": c.note} for c in self.contestants}
        return {
            "title": self.title,
            "clock": self.clock,
            "rounds": len(next(iter(self.seconds.values()), [])),
            "contestants": rows,
            "ratios": self.ratios(),
            "absent": self.absent,
        }

    def markdown(self) -> str:
        """Two tables: times, and ratios with their spread."""
        lines = [f"### {self.title}", "", "| | median ms | quartiles ms | |", "|---|---|---|---|"]
        for c in self.contestants:
            row = self.row(c.name)
            spread = f"{row['low_ms']:.1f} - {row['high_ms']:.1f}"
            lines.append(f"| {c.name} | {row['median_ms']:.1f} | {spread} | {c.note} |")
        ratios = self.ratios()
        if ratios:
            lines += ["", "| cmtool | against | times faster | quartiles |", "|---|---|---|---|"]
        for r in ratios:
            lines.append(f"| {r['ours']} | {r['peer']} | **{r['ratio']:.2f}** | {r['low']:.2f} - {r['high']:.2f} |")
        lines += [f"\nskipped: {name} ({why})" for name, why in self.absent.items()]
        return "\n".join(lines) + "\n"


def peers_there(
    asked: argparse.Namespace, makers: dict[str, Callable[[], Any]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the makers of the peers in `--peers` made, by name, and why the others are absent (ImportError).

    Raises:
        SystemExit: for a name without a maker.
    """
    found: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for name in [name for name in asked.peers.split(",") if name not in ("", "none")]:
        if name not in makers:
            raise SystemExit(f"unknown peer '{name}'; choose from {', '.join(makers)}, none")
        try:
            found[name] = makers[name]()
        except ImportError as error:
            absent[name] = str(error)
    return found, absent


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; a single value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def settled(contestant: Contestant) -> Contestant:
    """Set the allocator as the contestant's own program does: ours keeps all memory, a plain process 64 MiB."""
    keep_freed_memory() if contestant.ours else keep_freed_memory(64 << 20)
    return contestant


def timed(run: Callable[[], Any], clock: str) -> float:
    """Seconds of one unit of work; waits for a GPU before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = CLOCKS[clock]()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCKS[clock]() - began


def compare(
    title: str,
    contestants: Sequence[Contestant],
    rounds: int,
    clock: str,
    absent: dict[str, str] | None = None,
    warm: bool = False,
) -> Comparison:
    """Run every contestant `rounds` times in turn, with a different one first in each round.

    Unless `warm`, each runs once before that; on a GPU it runs until ours has recorded what it replays.
    """
    for contestant in [] if warm else contestants:
        for _ in range(WARM_UP + 2 if torch.cuda.is_available() else 1):
            settled(contestant).run()
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds):
        first = number % max(len(contestants), 1)
        for contestant in [*contestants[first:], *contestants[:first]]:
            seconds[contestant.name].append(timed(settled(contestant).run, clock))
    return Comparison(title, contestants, seconds, absent or {}, clock)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all comparisons share."""
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=(description or "").splitlines()[0])
    made.add_argument(
        "--peers", default="diffusers,openai", help="comma-separated: diffusers, openai, openai-own; none"
    )
    made.add_argument(
        "--openai-path",
        default=os.environ.get("OPENAI_CM_PATH"),
        help="checkout of openai/consistency_models; default: $OPENAI_CM_PATH",
    )
    made.add_argument("--rounds", type=int, default=7, help="pairs that the medians are taken of")
    made.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: time of this process, for busy machines"
    )
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--channels", type=int, default=64, help="base width")
    made.add_argument("--blocks", type=int, default=2)
    made.add_argument("--side", type=int, default=32)
    made.add_argument("--compile", action="store_true", help="ours with torch.compile as well")
    made.add_argument("--json", action="store_true", help="JSON on stdout in place of Markdown")
    made.add_argument("--out", type=Path, help="folder for NAME.md and NAME.json")
    return made


def machine(asked: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    card = torch.cuda.get_device_name() if asked.device.startswith("cuda") else platform.processor()
    return {
        "device": card or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "options": {key: str(value) for key, value in vars(asked).items() if key not in ("out", "openai_path")},
    }


def publish(name: str, comparisons: Sequence[Comparison], asked: argparse.Namespace) -> None:
    """Print all comparisons, and write them as Markdown and JSON to `--out`."""
    document = {"machine": machine(asked), "comparisons": [c.document() for c in comparisons]}
    text = "\n".join(c.markdown() for c in comparisons)
    if asked.out:
        asked.out.mkdir(parents=True, exist_ok=True)
        (asked.out / f"{name}.md").write_text(text, encoding="utf-8")
        (asked.out / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(document, indent=2) + "\n" if asked.json else text)
