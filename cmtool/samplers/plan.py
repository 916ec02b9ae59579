"""Which sampler at which noise levels: decided and checked using only a model's header, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmtool.config.condition import condition_of, same_condition
from cmtool.config.headers import which_latents
from cmtool.errors import UsageError, UserError, unknown
from cmtool.samplers.times import default_times, header_range, solver_times, times_from_indices, validate_times

# `seed=N` and --seed N mean the sample seeds N * SEED_BLOCK and up, so that two of them never share a sample.
SEED_BLOCK = 1_000_000


@dataclass(frozen=True)
class SamplerInfo:
    """What is known of a sampler before it runs.

    `kind` is the kind of model it fits, `run` its "module:function" below `cmtool.samplers`, `steps` its usual number
    of noise levels, and `evaluations` gives the network evaluations per image for a number of noise levels. `to_zero`:
    it goes on from its last level to 0 instead of ending at sigma_min; `two_time`: it needs a model of two times.
    """

    name: str
    title: str
    kind: str
    run: str
    steps: int
    evaluations: Callable[[int], int]
    to_zero: bool = True
    two_time: bool = False


def _once(levels: int) -> int:
    return levels


def _twice(levels: int) -> int:
    return 2 * levels - 1


def _diffusion(
    name: str, title: str, run: str, steps: int, evaluations: Callable[[int], int] = _once, **more: bool
) -> SamplerInfo:
    return SamplerInfo(name, title, "diffusion", run, steps, evaluations, **more)


def _consistency(name: str, title: str, run: str, **more: bool) -> SamplerInfo:
    return SamplerInfo(name, title, "consistency", run, 1, _once, **more)


SAMPLERS: dict[str, SamplerInfo] = {
    info.name: info
    for info in (
        _consistency("multistep", "Algorithm 1: evaluate, renoise, repeat", "solvers:multistep", to_zero=False),
        _diffusion("heun", "probability-flow ODE, order 2 (Karras et al. 2022)", "solvers:heun", 18, _twice),
        _diffusion("euler", "probability-flow ODE, order 1 (DDIM)", "solvers:euler", 40),
        _diffusion("ancestral", "stochastic, Euler to below and noise up again", "solvers:ancestral", 100),
        _diffusion("dpm", "probability-flow ODE, midpoint of order 2 (OpenAI's dpm)", "solvers:midpoint", 18, _twice),
        _diffusion("ddim", "probability-flow ODE, order 1 (Song et al. 2021)", "solvers:euler", 40),
        _diffusion("dpm-solver-2", "probability-flow ODE, order 2, midpoint in ln t", "solvers:dpm2", 18, _twice),
        _diffusion("dpm-solver++-2m", "probability-flow ODE, order 2, remembers one step", "solvers:dpmpp_2m", 20),
        _diffusion("deis-3", "probability-flow ODE, order 3 once it remembers two steps", "solvers:deis", 20),
        _diffusion("progressive", "Euler steps of progressive distillation", "solvers:progressive", 1, to_zero=False),
        _consistency("jumps", "MeanFlow: straight jumps, no noise in between", "solvers:jumps", two_time=True),
    )
}
# The sampler that a kind of model gets when none is named.
USUAL = {"consistency": "multistep", "diffusion": "heun"}
KIND_NAMES = {"consistency": "a consistency model", "diffusion": "a diffusion model (a teacher)"}


@dataclass(frozen=True)
class Guidance:
    """How samples are guided: a scale, the noise levels it is confined to (None: all), and the file of a weak model.

    Without a weak model a teacher is guided away from its own answer to no label; a guided network of two times is told
    scale and levels.
    """

    scale: float
    interval: tuple[float, float] | None = None
    weak: str | None = None

    def request(self) -> dict[str, Any]:
        """What a sample file records of it."""
        found = {"guidance": self.scale, "guidance_interval": self.interval and list(self.interval), "weak": self.weak}
        return {key: value for key, value in found.items() if value is not None}

    def words(self) -> list[str]:
        """What the name of a file says of it."""
        weak = [] if self.weak is None else [Path(self.weak).parent.name or Path(self.weak).stem]
        return [f"g{self.scale:g}", *(f"{level:g}" for level in self.interval or ()), *weak]


@dataclass(frozen=True)
class SamplePlan:
    """A sampler and its noise levels; `source` says in words where the levels come from."""

    sampler: str
    times: tuple[float, ...]
    source: str
    guidance: Guidance | None = None

    @property
    def nfe(self) -> int:
        """Network evaluations per image; a guided teacher is two networks, or one asked twice."""
        info = SAMPLERS[self.sampler]
        twice = self.guidance is not None and info.kind == "diffusion"
        return info.evaluations(len(self.times)) * (2 if twice else 1)


def misfit(header: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """Return why the model of a header cannot guide one of another header's `data`; None if it can.

    It may see no picture where the other is conditioned on one: then it leads away from answers without the picture.
    """
    own = header["data"]
    if header["kind"] != "diffusion":
        return f"it is {KIND_NAMES[header['kind']]}, and a teacher is guided by a teacher"
    for name in ("resolution", "channels"):
        if own[name] != data[name]:
            return f"it has {name} {own[name]}, the teacher {data[name]}"
    if bool(own.get("num_classes")) != bool(data.get("num_classes")):
        return "one of the two models has classes and the other has none"
    if own.get("condition") and not same_condition(condition_of(own), condition_of(data)):
        return f"it is conditioned on {own['condition']}, the teacher on {data.get('condition') or 'no picture'}"
    if which_latents(own.get("latent")) != which_latents(data.get("latent")):
        return "the two work on latents of different autoencoders, or one of them on pictures"
    return None


def plan_guidance(
    header: Mapping[str, Any],
    scale: float | None,
    interval: Sequence[float] | None = None,
    weak: tuple[str, Mapping[str, Any]] | None = None,
) -> Guidance | None:
    """Check the guidance asked of a model; `weak` is the weak model's file and header. None: no guidance.

    Raises:
        UserError: guidance that the model cannot give, a weak model of another kind, or an option without the others.
    """
    if scale is None:
        if interval is not None or weak is not None:
            raise UsageError(
                f"{'--weak' if weak else '--guidance-interval'} only says how --guidance works, and there is none.",
                "e.g. --guidance 2",
            )
        return None
    if interval is not None and (len(interval) != 2 or not 0 <= interval[0] < interval[1]):
        raise UsageError(
            "--guidance-interval takes a lower and a higher noise level.", "e.g. --guidance-interval 0.2,5"
        )
    levels = None if interval is None else (float(interval[0]), float(interval[1]))
    _check_guidable(header, scale, weak)
    return Guidance(scale, levels, None if weak is None else weak[0])


def _check_guidable(header: Mapping[str, Any], scale: float, weak: tuple[str, Mapping[str, Any]] | None) -> None:
    data = header["data"]
    told = bool((header.get("network") or {}).get("guided"))
    if header["kind"] == "consistency" and (weak is not None or not told):
        raise UserError(
            f"{'--weak' if weak else '--guidance'} changes a teacher's slope, and this is a consistency model: it is "
            f"guided while it is trained{'' if weak else ', and this one was not told of it'}.",
            "a model that is told: cmtool train-ct --recipe imf --set network.guided=true --set "
            "recipe.direction.guidance=8, on images with classes",
        )
    if header["kind"] == "consistency":
        largest = float(((header.get("recipe") or {}).get("direction") or {}).get("guidance", 1.0))
        if not 1 <= scale <= largest:
            raise UserError(
                f"--guidance {scale:g} lies outside what this model was trained with, 1 to {largest:g}.",
                f"e.g. --guidance {largest / 2:g}",
            )
    elif weak is not None:
        if reason := misfit(weak[1], data):
            raise UserError(f"{weak[0]} cannot be the weak model: {reason}.", "name a smaller or earlier teacher")
    elif not data.get("num_classes"):
        raise UserError(
            "guidance leads away from the answer to no label, and this teacher knows no classes.",
            "name a worse teacher with --weak, e.g. an earlier checkpoint or a shorter run",
        )
    elif not header.get("label_dropout"):
        raise UserError(
            "guidance leads away from the answer to no label, and this teacher was not trained with dropped labels.",
            "train one with --set train.label_dropout=0.1, or name a worse teacher with --weak",
        )


def choose_sampler(name: str | None, kind: str, two_time: bool = False) -> SamplerInfo:
    """Return the sampler called `name`, or the usual one for this kind of model; `two_time`: it takes a second time.

    Raises:
        UserError: for an unknown name, or a sampler that does not fit the model.
    """
    if name is None:
        return SAMPLERS[USUAL[kind]]
    if name not in SAMPLERS:
        raise UserError(unknown("sampler", name, SAMPLERS))
    info = SAMPLERS[name]
    if info.kind != kind:
        fitting = ", ".join(
            other.name for other in SAMPLERS.values() if other.kind == kind and (two_time or not other.two_time)
        )
        raise UserError(
            f"sampler '{name}' is for {KIND_NAMES[info.kind]}, and this is {KIND_NAMES[kind]}; choose from {fitting}."
        )
    return info


def check_request(
    steps: int | None, times: Sequence[float] | None, indices: Sequence[int] | None, of: int | None
) -> None:
    """Refuse contradictory ways of naming noise levels before any model is opened.

    Raises:
        UsageError: for more than one of steps, times and indices, or indices without their grid.
    """
    named = [
        flag for flag, value in (("--steps", steps), ("--times", times), ("--indices", indices)) if value is not None
    ]
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} both say when to evaluate; give one of them.")
    if indices is not None and of is None:
        raise UsageError(
            "--indices needs --of, the number of points of the grid they count on.",
            f"e.g. --indices {','.join(map(str, indices))} --of 40",
        )
    if of is not None and indices is None:
        raise UsageError(
            "--of only counts the grid of --indices, and there are none.",
            f"e.g. --indices 0,{of // 2},{of - 1} --of {of}",
        )
    if steps is not None and steps < 1:
        raise UsageError(f"--steps {steps} is no evaluation; use at least 1.")


def plan_sampling(
    header: Mapping[str, Any],
    *,
    sampler: str | None = None,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    indices: Sequence[int] | None = None,
    of: int | None = None,
) -> SamplePlan:
    """Decide sampler and noise levels for the model with this header.

    At most one of `steps` (evaluations of a consistency model, solver steps of a teacher), `times` (noise levels) and
    `indices` with `of` (points of a Karras grid from the noisy end) is given. With none, a consistency model takes one
    evaluation and a teacher its sampler's usual number of steps.

    Raises:
        UserError: for contradictory or unusable requests.
    """
    check_request(steps, times, indices, of)
    usual = header.get("sample") or {}
    two_time = bool((header.get("network") or {}).get("two_time"))
    info = choose_sampler(sampler or usual.get("sampler"), header["kind"], two_time)
    if info.two_time and not two_time:
        raise UserError(f"sampler '{info.name}' needs a model of two times (recipe meanflow), and this has one.")
    sigma_min, sigma_max, rho = header_range(header)
    if times is not None:
        return SamplePlan(info.name, validate_times(times, sigma_min, sigma_max), "as given")
    if indices is not None and of is not None:
        levels = times_from_indices(indices, of, sigma_min, sigma_max, rho)
        return SamplePlan(info.name, levels, f"indices {','.join(map(str, indices))} of a grid of {of}")
    if info.kind == "diffusion":
        count = steps or (usual.get("steps") if sampler is None else None) or info.steps
        if not info.to_zero:
            levels = solver_times(count + 1, sigma_min, sigma_max, rho)[:-1]
            return SamplePlan(info.name, levels, f"{count} steps of a Karras grid that ends at {sigma_min:g}")
        return SamplePlan(info.name, solver_times(count, sigma_min, sigma_max, rho), f"Karras grid of {count}")
    chosen = default_times(steps or info.steps, header)
    return SamplePlan(info.name, chosen.times, chosen.source)
