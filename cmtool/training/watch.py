"""Watching a run for signs of divergence that leave every number finite. It warns and changes nothing."""

from __future__ import annotations

from collections import deque
from statistics import median

from cmtool.training.report import Report

_MEMORY = 20
_ENOUGH = 5


class Watch:
    """Compares each figure with what was usual lately.

    The loss against the median of the last reports of the same N (it moves with N by itself), the norm of the sampling
    average against its own, a quality figure (FID: smaller is better) against the best so far.
    """

    def __init__(self) -> None:
        self._recent: dict[str, deque[float]] = {}
        self._best: dict[str, float] = {}
        self._warned: set[str] = set()

    def report(self, report: Report, average_norm: float) -> list[str]:
        """Return warnings about a report and the Euclidean norm of the sampling average's weights at its step."""
        here = f"step {report.step}"
        loss = self._jumps(f"loss at N = {report.num_scales}", report.loss, 10.0)
        norm = self._jumps("norm of the sampling average", average_norm, 3.0)
        return [
            f"{here}: the {what}. The run may be diverging; a smaller train.lr or train.grad_clip=1.0 helps."
            for what in (loss, norm)
            if what
        ]

    def quality(self, step: int, name: str, value: float) -> list[str]:
        """Return a warning if a figure (smaller is better) has become much worse than its best."""
        best = self._best.setdefault(name, value)
        self._best[name] = min(best, value)
        if value <= 2.0 * best:
            self._warned.discard(name)
            return []
        if name in self._warned:
            return []
        self._warned.add(name)
        return [f"step {step}: {name} is {value:.4g} after {best:.4g} at its best. The run may be diverging."]

    def _jumps(self, name: str, value: float, factor: float) -> str | None:
        """Say so, once, when `value` leaves the `factor`-fold of the median of its last values.

        A loss with learned weights passes zero on its way down: there the largest of the last values sets the scale.
        """
        recent = self._recent.setdefault(name, deque(maxlen=_MEMORY))
        if len(recent) < _ENOUGH:
            recent.append(value)
            return None
        usual = median(recent)
        scale = usual if min(recent) > 0 else max(abs(number) for number in recent)
        recent.append(value)
        if value <= usual + (factor - 1) * scale:
            self._warned.discard(name)
            return None
        if name in self._warned:
            return None
        self._warned.add(name)
        return f"{name} is {value:.4g} where {usual:.4g} was usual"
