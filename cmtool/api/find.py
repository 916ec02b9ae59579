"""Which model a command means: the one named, `$CMTOOL_MODEL`, or the newest finished run that fits.

Only headers are read, with the standard library, so that a wrong argument is reported before torch is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.checkpoint import model_hash, read_header, resolve_file
from cmtool.config.headers import missing_in_header
from cmtool.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from cmtool.models import Model
    from cmtool.talk import Talk

KIND_NAMES = {"consistency": "consistency model", "diffusion": "teacher"}
# Prefixes of names that are not paths; only for these is it worth importing the code that knows them.
NAMED = ("demo/", "openai/", "hf:")
Fits = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class FoundModel:
    """A model file, its header, and a description of how it was chosen."""

    path: Path
    header: dict[str, Any]
    how: str

    @property
    def name(self) -> str:
        """A short name for files made with it: that of its run folder, else its own."""
        return (
            self.path.parent.name if self.path.name == "model.safetensors" and self.path.parent.name else self.path.stem
        )

    @property
    def digest(self) -> str:
        """The short digest of header and weights that samples carry."""
        return model_hash(self.path)

    def describe(self) -> str:
        """Return one line for the user: what the model is and why it was chosen."""
        step = self.header.get("step")
        made = " ".join(str(self.header[key]) for key in ("preset", "recipe_name") if self.header.get(key))
        details = ", ".join(part for part in (made, f"step {step}" if step else "") if part)
        return f"model {self.path}{f' ({details})' if details else ''}, {self.how}"


def finished_runs(runs: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return (file, header) of every readable finished run below `runs`, newest first."""
    files = [file for file in runs.glob("*/model.safetensors") if file.is_file()]
    found = []
    for file in sorted(files, key=lambda file: (file.stat().st_mtime, str(file)), reverse=True):
        try:
            header = read_header(file)
        except CheckpointError:
            continue
        if not missing_in_header(header):
            found.append((file, header))
    return found


def _named(name: str, talk: Talk | None) -> Path:
    """Return the file that `name` means: a file, a run folder, or a model that is bundled or fetched by name."""
    if Path(name).exists() or not name.startswith(NAMED):
        return resolve_file(name)
    from cmtool.interop.published import resolve_model

    return resolve_model(name, talk)


def find_model(
    given: str | None,
    *,
    kinds: Sequence[str] = ("consistency", "diffusion"),
    fits: Fits | None = None,
    wanted: str = "model",
    option: str = "--model",
    output: Talk | None = None,
    preset: str = "digits",
) -> FoundModel:
    """Return the model that a command uses.

    Args:
        given: what the user named; None: `$CMTOOL_MODEL`, else the newest finished run below `runs/`.
        kinds: kinds that fit, preferred first: a run of the first kind is taken before any of the second.
        fits: a further condition on the header of a run that was not named.
        wanted: what to call the model in messages, e.g. "teacher".
        option: the option to name in messages.
        output: where to report that a published model is fetched; None: nowhere.
        preset: the preset to suggest training if there is no model.

    Raises:
        UserError: if there is none, or the named one is of the wrong kind.
    """
    name = given or (os.environ.get("CMTOOL_MODEL") if option == "--model" else None)
    command = f"cmtool {'train-ct' if kinds[0] == 'consistency' else 'train-edm'} --preset {preset}"
    if name:
        path = _named(name, output)
        header = read_header(path)
        if header.get("kind") not in kinds:
            needed = " or ".join(KIND_NAMES.get(kind, kind) for kind in kinds)
            kind = header.get("kind") or "file of no known kind"
            raise UserError(
                f"{path} is a {KIND_NAMES.get(kind, kind)}, and a {needed} is needed.",
                f"name another with {option}, or train one with `{command}`",
            )
        if lacking := missing_in_header(header):
            raise CheckpointError(f"{path} is damaged or no whole model: its header has no {lacking}.")
        return FoundModel(path, header, f"as {option} says" if given else "as $CMTOOL_MODEL says")
    candidates = finished_runs(Path("runs"))
    for kind in kinds:
        for path, header in candidates:
            if header.get("kind") == kind and (fits is None or fits(header)):
                return FoundModel(path, header, f"the newest finished run of a {KIND_NAMES.get(kind, kind)}")
    along = ", e.g. demo/digits, which came along" if option == "--model" and kinds[0] == "consistency" else ""
    raise UserError(
        f"there is no {wanted}: no {option} is given, and no finished run under ./runs fits.",
        f"train one with `{command}`, or name one with {option}{along}",
    )


def load_model(found: FoundModel | Path, device: str, precision: str) -> Model:
    """Load a model for running.

    Args:
        found: a found model, or the path of its file.
        device: "auto", "cpu", "cuda" or "mps".
        precision: "auto" is float32, so that samples do not depend on the machine; "fp64", or "bf16" and "fp16" by
            autocast around the network.
    """
    from cmtool.machine.device import choose_device, keep_freed_memory
    from cmtool.models import apply_precision, load

    keep_freed_memory()
    # mps has no float64, and apply_precision would only notice inside torch.
    place = choose_device("cpu" if device == "auto" and precision == "fp64" else device)
    return apply_precision(load(found if isinstance(found, Path) else found.path, place), precision)
