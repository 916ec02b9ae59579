"""The noise levels of a sampler's evaluations: checked, translated from indices, or chosen by default."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cmtool.diffusion.grid import karras_grid
from cmtool.errors import UserError

# The second evaluation returns to where one-step models err most: t = .3 to 1.5 for data of unit range. Improved
# consistency training uses .821.
SECOND = 0.8
# Further evaluations are spread around SECOND by this ratio, as far as the range allows.
RATIO = 2.5
# Repeated here because importing the schema would cost half of the time allowed for answering a usage mistake.
RANGE = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
# A header's range and a typed number may differ by rounding.
SLACK = 1e-6


class ChosenTimes(NamedTuple):
    """Noise levels, and where they come from in words for the user."""

    times: tuple[float, ...]
    source: str


def validate_times(times: Sequence[float], sigma_min: float, sigma_max: float) -> tuple[float, ...]:
    """Return `times` as floats after checking that a model with this range can use them.

    Raises:
        UserError: for no times, a value that is not finite or outside [sigma_min, sigma_max], or values that do not
            strictly decrease; the sentence names the value.
    """
    values = tuple(float(value) for value in times)
    if not values:
        raise UserError("no times are given", "Name at least one noise level, e.g. --times 80,0.8")
    for value in values:
        if not math.isfinite(value) or not sigma_min * (1 - SLACK) <= value <= sigma_max * (1 + SLACK):
            raise UserError(
                f"time {value:g} is outside the model's range [{sigma_min:g}, {sigma_max:g}]",
                f"Noise levels run from {sigma_max:g} (pure noise) to {sigma_min:g} (clean): --times {sigma_max:g},0.8",
            )
    for before, after in itertools.pairwise(values):
        if after >= before:
            ordered = ",".join(f"{level:g}" for level in sorted(set(values), reverse=True))
            raise UserError(
                f"times must strictly decrease, and {after:g} follows {before:g}",
                f"Write them from noisy to clean: --times {ordered}",
            )
    return tuple(min(max(value, sigma_min), sigma_max) for value in values)


def times_from_indices(
    indices: Sequence[int], of: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> tuple[float, ...]:
    """Translate published indices on a grid of `of` points, counted from the noisy end, into noise levels.

    Index 0 is sigma_max and of - 1 is sigma_min, where a consistency model is the identity. Published lists end with
    that entry; it costs no evaluation and is dropped. "0,22,39 of 40" is thus two evaluations.

    Raises:
        UserError: for a grid of fewer than two points, indices outside it, not strictly ascending, or only the last.
    """
    if of < 2:
        raise UserError(f"--of {of} is no grid: it counts points and needs at least 2")
    for index in indices:
        if not 0 <= index < of:
            raise UserError(f"index {index} is outside a grid of {of} points (0 to {of - 1})")
    for before, after in itertools.pairwise(indices):
        if after <= before:
            raise UserError(
                f"indices must strictly ascend (0 is the noisiest), and {after} follows {before}",
                f"Write them as --indices {','.join(str(i) for i in sorted(set(indices)))} --of {of}",
            )
    kept = [index for index in indices if index != of - 1]
    if not kept:
        raise UserError(
            f"the indices leave nothing to evaluate: {of - 1} of {of} is the clean end, where f is the identity",
            f"Start with 0, e.g. --indices 0,{of // 2},{of - 1} --of {of}",
        )
    grid = karras_grid(of, sigma_min, sigma_max, rho)
    return tuple(grid[of - 1 - index] for index in kept)


def geometric_times(steps: int, first: float, last: float) -> tuple[float, ...]:
    """`steps` levels from `first` down to `last` with a constant ratio; ends exact. One level is `first`."""
    if steps == 1:
        return (first,)
    ratio = (last / first) ** (1 / (steps - 1))
    return (first, *(first * ratio**index for index in range(1, steps - 1)), last)


def spread_times(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> tuple[float, ...]:
    """Return sigma_max, then steps - 1 geometric levels about .8 (ratio 2.5, closer where the range is full).

    For 80 the first sets are (80), (80, .8), (80, 1.26, .51), (80, 2, .8, .32).
    """
    if steps < 1:
        raise UserError(f"{steps} steps are no evaluation; use at least 1")
    if steps == 1:
        return (sigma_max,)
    center = SECOND if sigma_min < SECOND < sigma_max else math.sqrt(sigma_min * sigma_max)
    if steps == 2:
        return (sigma_max, center)
    reach = RATIO ** ((steps - 2) / 2)
    # One ratio is left free at either end, so that a long list stays within the range and strictly decreasing.
    high = min(center * reach, sigma_max * (center / sigma_max) ** (1 / (steps - 1)))
    low = max(center / reach, sigma_min * (center / sigma_min) ** (1 / (steps - 1)))
    return (sigma_max, *geometric_times(steps - 1, high, low))


def header_range(header: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return (sigma_min, sigma_max, rho) of a model's header, with the defaults of `ProcessConfig`."""
    process = header.get("process") or {}
    return tuple(float(process.get(key, usual)) for key, usual in RANGE.items())  # type: ignore[return-value]


def default_times(steps: int, header: Mapping[str, Any]) -> ChosenTimes:
    """Return the noise levels for `steps` evaluations of the model with this header.

    These are the header's own for that number, found at the end of training or published; without them, sigma_max and
    geometric levels below it.

    Raises:
        UserError: for fewer than one step, or times in the header that are not usable.
    """
    sigma_min, sigma_max, _ = header_range(header)
    if steps < 1:
        raise UserError(f"--steps {steps} is no evaluation; use at least 1")
    known = (header.get("times") or {}).get(str(steps))
    if known:
        return ChosenTimes(validate_times(known, sigma_min, sigma_max), f"the model's own times for {steps}")
    chosen = spread_times(steps, sigma_min, sigma_max)
    if steps == 1:
        return ChosenTimes(chosen, "one evaluation at the largest noise level")
    return ChosenTimes(chosen, f"default times: the model has none of its own for {steps}")


def solver_times(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> tuple[float, ...]:
    """The descending Karras grid of `steps` points for a teacher's ODE; the solver goes on to 0 after the last."""
    if steps < 1:
        raise UserError(f"--steps {steps} is no step; use at least 1")
    if steps == 1:
        return (sigma_max,)
    return tuple(reversed(karras_grid(steps, sigma_min, sigma_max, rho)))
