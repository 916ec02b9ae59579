"""Several sets of samples judged against one reference: what was found for each, and how the sets compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cmtool.evaluation.bootstrap import Comparison
from cmtool.evaluation.judge import Judge, Shape
from cmtool.evaluation.metrics import METRICS, Metrics
from cmtool.evaluation.samples import ImageSet
from cmtool.machine.device import choose_device
from cmtool.machine.world import World
from cmtool.talk import SILENCE, Talk

# Comparing two sets takes two covariances per resample: it is done by default only where that costs nothing.
CHEAP_DIM, ROUNDS = 512, 200


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How sets are judged.

    `bootstrap` is the number of resamples behind intervals and comparisons; None: no intervals, and comparisons only
    where they cost nothing.
    """

    metrics: tuple[str, ...] | None = None
    features: str | None = None
    mode: str | None = None
    bootstrap: int | None = None
    batch_size: int = 64
    device: str = "auto"

    @property
    def network(self) -> str | None:
        """The feature network: the one that was named, else that of the metrics if one defines them all."""
        networks = {METRICS[name].network for name in self.metrics or ()}
        return self.features or (networks.pop() if len(networks) == 1 else None)


@dataclass(frozen=True)
class Opened:
    """A set of images with a name, what its makers say about it, and how to measure their model's consistency."""

    name: str
    images: ImageSet
    about: dict[str, Any] = field(default_factory=dict)
    trajectories: Callable[[], dict[str, float]] | None = None


class Candidate(Protocol):
    """A set that is to be judged. Its size (H, W, C) is known at once; its images are opened or made later."""

    @property
    def shape(self) -> Shape:
        """Return (H, W, C)."""

    def open(self, usual: int) -> Opened:
        """Return the images; `usual` is the number of samples that the reference is usually compared with."""


@dataclass(frozen=True)
class JudgedSet:
    """One set and what was found: its metrics and, if requested, their 95 % intervals by key."""

    opened: Opened
    found: Metrics
    intervals: dict[str, list[float]]

    def row(self) -> dict[str, Any]:
        """Return everything as one row of a document."""
        assert self.found.measured is not None
        row: dict[str, Any] = {"samples": self.opened.name, "count": self.opened.images.count, **self.opened.about}
        row |= {"fingerprint": self.found.measured.fingerprint, "metrics": self.found.values}
        if self.found.per_class:
            row["per_class"] = self.found.per_class
        if self.intervals:
            row["intervals"] = self.intervals
        row["notes"] = [*self.opened.images.notes, *self.found.notes]
        return row


@dataclass(frozen=True)
class Compared:
    """The first set and another one by name, and how far they differ in one metric."""

    first: str
    second: str
    paired: bool
    result: Comparison


@dataclass(frozen=True)
class Verdict:
    """What came out: the judge, its protocol, every set in order, and comparisons of the first with the others.

    `sets` is empty in all but the first of several processes. `undecided`: sets could have been compared, but nobody
    asked, and it takes minutes.
    """

    judge: Judge
    sets: list[JudgedSet]
    protocol: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Compared] = field(default_factory=list)
    undecided: bool = False


def judge_sets(
    candidates: Sequence[Candidate], reference: str, how: Judging, talk: Talk = SILENCE, world: World | None = None
) -> Verdict:
    """Judge sets of images of one size against a reference, one after another.

    Args:
        candidates: what to judge, at least one.
        reference: a name, file, folder or preset.
        how: metrics, features and the rest.
        talk: told what is done and how far it is.
        world: processes that share the work; all must call this.

    Raises:
        UserError: unknown names, images of another size than the reference's, a reference that cannot be fetched.
    """
    world = world or World()
    device = str(choose_device(how.device, world.local_rank))
    judge = Judge.of(
        reference, candidates[0].shape, how.network, how.mode, device, talk, world, batch_size=how.batch_size
    )
    judge.check(how.metrics)
    sets = [_judged(candidate, judge, how) for candidate in candidates]
    if not world.main:
        return Verdict(judge, [])
    assert judge.side is not None
    rounds = how.bootstrap
    if rounds is None:
        rounds = ROUNDS if judge.side.fit.dim <= CHEAP_DIM else 0
    comparisons = _compared(judge, sets, rounds) if rounds else []
    return Verdict(judge, sets, judge.protocol(how.metrics), comparisons, len(sets) > 1 and not rounds)


def _judged(candidate: Candidate, judge: Judge, how: Judging) -> JudgedSet:
    opened = candidate.open(judge.reference.count)
    if how.metrics and "memorization" in how.metrics:
        opened = replace(opened, images=opened.images.in_memory())  # its pixels are read more than once
    found = judge(opened.images, how.metrics, opened.trajectories)
    return JudgedSet(opened, found, judge.intervals(found, how.bootstrap) if how.bootstrap and judge.side else {})


def _compared(judge: Judge, sets: Sequence[JudgedSet], rounds: int) -> list[Compared]:
    found = []
    for second in sets[1:]:
        paired = same_seeds(sets[0].opened, second.opened)
        for result in judge.compare(sets[0].found, second.found, paired, rounds):
            found.append(Compared(sets[0].opened.name, second.opened.name, paired, result))
    return found


def same_seeds(first: Opened, second: Opened) -> bool:
    """Whether sample i of both sets was made from the same seed."""
    seeds = first.about.get("seeds")
    if first.images.count != second.images.count or not seeds:
        return False
    return str(seeds).split("-")[0] == str(second.about.get("seeds", "")).split("-")[0]
