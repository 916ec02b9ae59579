"""One run of `cmtool search-times`, from checked arguments to a model's header."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.cli.evaluate_view import distance_name
from cmtool.cli.lists import BLOCK
from cmtool.errors import UserError

if TYPE_CHECKING:
    from cmtool.cli.find_model import FoundModel
    from cmtool.cli.output import Output
    from cmtool.evaluation.features import Features
    from cmtool.evaluation.measure import Side
    from cmtool.models import Model
    from cmtool.samplers.time_search import SearchResult

# The seeds that decide between the candidates: a block that the search itself does not touch.
FRESH = 1000


def run_search(given: dict[str, Any], output: Output) -> None:
    """Search, show, and if asked write the times into the model's header."""
    from cmtool.cli.evaluate_sets import model_for
    from cmtool.cli.run_model import load_model

    found = model_for(given["model"], given["ref"], ("consistency",))
    output.say(found.describe())
    if given["write"]:
        check_own(found.path)
    ref = given["ref"] or _usual(found)
    model, network, side, usual = _set_up(found, ref, given, output, load_model)
    count = given["num"] or usual
    result, trace_value = _search(model, network, side, count, given, output)
    _show(result, trace_value, found, network, ref, count, given, output)


def check_own(path: Path) -> None:
    """Refuse to change a model that is not the user's: one that came along, or one that was fetched by its name.

    Raises:
        UserError: it is such a file, or its folder cannot be written.
    """
    from cmtool.data.cache import cache_dir

    file = path.resolve()
    strange = {
        Path(__file__).resolve().parents[1]: "came along with cmtool",
        cache_dir(): "was fetched and is kept as published",
    }
    for folder, how in strange.items():
        if file.is_relative_to(folder.resolve()):
            raise UserError(
                f"--write would change {path}, which {how}.", f"copy it and name the copy: cp {path} {path.name}"
            )
    if not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):
        raise UserError(
            f"--write would change {path}, and there is no permission to write it.", "copy it and name the copy"
        )


def _usual(found: FoundModel) -> str:
    from cmtool.cli.evaluate import usual_reference
    from cmtool.cli.evaluate_sets import Wanted
    from cmtool.cli.output import Output

    return usual_reference([Wanted(found.name, found=found)], Output())


def _set_up(
    found: FoundModel, ref: str, given: dict[str, Any], output: Output, load: Callable[..., Model]
) -> tuple[Model, Features, Side, int]:
    from cmtool.evaluation.features import build_features
    from cmtool.evaluation.measure import measure_reference
    from cmtool.evaluation.references import resolve_reference

    data = found.header["data"]
    side = data["resolution"]
    shape = (data["channels"], 1, 1) if data.get("float_samples") else (side, side, data["channels"])
    reference = resolve_reference(ref, shape, given["mode"], output.say)
    model = load(found, given["device"], given["precision"])
    name, mode = given["features"] or reference.features, given["mode"] or reference.mode
    network = build_features(name, shape, mode, str(model.device), output.say)
    images = reference.images
    with output.progress(images.count if images else None, "reference") as advance:
        measured = measure_reference(reference, network, given["batch_size"] or 64, advance)
    return model, network, measured, reference.count


def _search(
    model: Model, network: Features, side: Side, count: int, given: dict[str, Any], output: Output
) -> tuple[SearchResult, dict[str, float]]:
    """Return the winner, and the distance on fresh seeds of every candidate by its method."""
    from cmtool.evaluation.models import BATCH, TimesScore
    from cmtool.evaluation.tuning import descending_grid
    from cmtool.samplers.plan import plan_sampling
    from cmtool.samplers.time_search import Memo, search_times

    size, first = given["batch_size"] or BATCH, given["seed"] * BLOCK
    score = TimesScore(model, network, side, range(first, first + count), size)
    start = (given["seed"] + FRESH) * BLOCK
    fresh = Memo(TimesScore(model, network, side, range(start, start + count), size))
    present = plan_sampling(model.header, steps=given["steps"]).times
    with output.progress(None, f"{given['steps']} steps, {count:,} samples each") as update:

        def report(times: Sequence[float], value: float) -> None:
            update(1, note=f"{', '.join(f'{t:.3g}' for t in times)}: {value:.4g}")

        levels = descending_grid(model, given["grid"])
        joint, steps = given["joint"], given["steps"]
        result = search_times(score, steps, levels, joint=joint, fresh=fresh, candidates=[present], report=report)
    return result, {", ".join(f"{t:.4g}" for t in times): value for times, value in fresh.known.items()}


def _show(
    result: SearchResult,
    judged: dict[str, float],
    found: FoundModel,
    network: Features,
    ref: str,
    count: int,
    given: dict[str, Any],
    output: Output,
) -> None:
    from cmtool.evaluation.plots import plot_search

    name = distance_name(network)
    rows = [[times, value, "<-" if value == result.value else ""] for times, value in judged.items()]
    output.table(f"{name} against {ref}, {count:,} samples of fresh seeds", ["times", name, ""], rows)
    path = given["plot"] or Path("samples") / f"{found.name}-times-{given['steps']}.png"
    plot_search(path, result.trace, result.times, name)
    output.say(f"{len(result.trace)} sets of times were tried: {path}")
    if given["write"]:
        _write(found, result, output)
    output.result(",".join(f"{t:.6g}" for t in result.times))
    output.json(
        {
            "model": str(found.path),
            "reference": ref,
            "features": network.name,
            "steps": given["steps"],
            "times": list(result.times),
            "value": result.value,
            "method": result.method,
            "count": count,
            "candidates": judged,
            "evaluations": [{"times": list(times), "value": value} for times, value in result.trace],
            "plot": str(path),
            "written": given["write"],
        }
    )


def _write(found: FoundModel, result: SearchResult, output: Output) -> None:
    """Put the times into the header; the tensors stay as they are, the file is replaced whole."""
    from cmtool.checkpoint import load_tensors, save_model

    tensors, header = load_tensors(found.path)
    header["times"] = dict(header.get("times") or {}) | {str(len(result.times)): list(result.times)}
    save_model(found.path, tensors, header)
    output.say(f"written into {found.path}: cmtool sample --steps {len(result.times)} uses them now")
