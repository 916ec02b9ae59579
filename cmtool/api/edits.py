"""What edits are made with and what they leave: the model that fits a task, and the kept variations of a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmtool.api.find import FoundModel, find_model
from cmtool.config.judgments import as_named
from cmtool.editing.levels import EditPlan
from cmtool.editing.tasks import Task
from cmtool.errors import UserError
from cmtool.talk import Talk

if TYPE_CHECKING:
    from torch import Tensor

    from cmtool.api.model import Model
    from cmtool.editing.editor import Editor
    from cmtool.editing.photos import Bytes
    from cmtool.editing.subject import Subject


@dataclass(frozen=True)
class Edited:
    """The kept variations of one picture: tensors (K, C, H, W), their seeds, and how far each misses what is known."""

    name: str
    subject: Subject
    images: Tensor
    seeds: tuple[int, ...]
    residuals: tuple[float, ...]

    def pictures(self, talk: Talk) -> Iterator[Bytes]:
        """Yield the bytes (H, W, C) of each variation in its picture's color space; say in which nothing changed."""
        same = []
        for row, seed in enumerate(self.seeds):
            made = self.subject.back(self.images[row : row + 1])
            same += [str(seed)] if self.subject.unchanged(made) else []
            yield made
        if same:
            where = "in the hole " if self.subject.has_hole else ""
            talk.warn(f"{self.name}: the edit changes nothing {where}(seed {', '.join(same)})")


@dataclass(frozen=True)
class Edits:
    """What was made of all pictures, and with what."""

    model: FoundModel
    plan: EditPlan
    pictures: tuple[Edited, ...]


def picture_size(header: Mapping[str, Any]) -> tuple[int, int]:
    """Return (channels, side) of a model's pictures, which a model of latents has decoded."""
    data = as_named(header["data"])
    return data["channels"], data["resolution"]


def find_editor(row: Task, model: Model | FoundModel | str | Path | None, talk: Talk) -> FoundModel:
    """Return the model as a file and its header; a model that is loaded already is not looked for."""

    def refusal(header: Mapping[str, Any]) -> str | None:
        data, (channels, _) = header["data"], picture_size(header)
        if data.get("float_samples"):
            return "makes points, not pictures"
        if data.get("latent") and row.not_in_latents:
            return f"works on latents, and {row.not_in_latents}"
        if row.channels is not None and channels != row.channels:
            return f"works in {channels} channel(s), and colors need three"
        return None if channels in (1, 3, 4) else f"works in {channels} channels"

    if isinstance(model, FoundModel):
        found = model
    elif model is None or isinstance(model, (str, Path)):
        found = find_model(
            None if model is None else str(model),
            kinds=("consistency",),
            fits=lambda header: refusal(header) is None,
            wanted="consistency model of images" + (" in color" if row.channels else ""),
            output=talk,
            preset="shapes" if row.channels else "digits",
        )
    else:
        found = FoundModel(model.path, model.header, "as given")
        if model.kind != "consistency":
            raise UserError(f"{model.path} is a teacher, and editing needs a consistency model.")
    if unfit := refusal(found.header):
        raise UserError(f"{found.path} {unfit}.", "name another with --model")
    return found


def vary(
    name: str, editor: Editor, seeds: Sequence[int], best: int | None, batch_size: int | None, talk: Talk
) -> Edited:
    """Make all variations of one picture, in batches, and keep them, or the `best` most consistent ones."""
    import torch

    label, searched = editor.choose_label()
    if searched:
        names = editor.class_names
        chosen = names[label] if names and label is not None else label
        talk.say(f"{name}: class {chosen} fits it best; --label names another")
    size = batch_size or editor.batch_size
    parts = []
    with talk.progress(len(seeds), Path(name).name) as update:
        for first in range(0, len(seeds), size):
            parts.append(editor.run(seeds[first : first + size], label))
            update(len(parts[-1][0]))
    images, misses = (torch.cat(columns) for columns in zip(*parts, strict=True))
    rows = torch.argsort(misses, stable=True)[:best].tolist() if best else list(range(len(images)))
    residuals = tuple(misses[rows].tolist())
    return Edited(name, editor.subject, images[rows], tuple(seeds[row] for row in rows), residuals)
