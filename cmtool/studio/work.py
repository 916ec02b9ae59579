"""What the studio's page asks for, done with one model: edits, samples, walks, each with its shell command."""

from __future__ import annotations

import base64
import binascii
import io
import shlex
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from cmtool.api.edit import How, arrays
from cmtool.api.edits import picture_size
from cmtool.api.interpolate import decoded, first_label
from cmtool.api.model import Model
from cmtool.data import to_nhwc
from cmtool.editing.operators import blur
from cmtool.editing.photos import photo_of
from cmtool.editing.subject import tensor
from cmtool.editing.tasks import TASKS
from cmtool.errors import UserError, unknown
from cmtool.rng import generator
from cmtool.samplers.interpolation import key_noise, path
from cmtool.talk import SILENCE

Bytes = NDArray[np.uint8]
Asked = Mapping[str, Any]
_NO_PICTURE = (ValueError, binascii.Error, OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError)
MOST, FRAMES = 16, 25  # variations of an edit; points of a walk


def png_uri(picture: Bytes) -> str:
    """Return a picture (H, W, C) as a PNG inside an address."""
    stream = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def open_uri(text: Any, side: int, what: str) -> Image.Image:
    """Return the PNG inside an address, of `side` pixels.

    Raises:
        UserError: it is none, or of another size.
    """
    try:
        head, _, body = str(text).partition(",")
        if head != "data:image/png;base64":
            raise ValueError
        image = Image.open(io.BytesIO(base64.b64decode(body, validate=True)), formats=["PNG"])
        if image.size != (side, side):
            raise UserError(f"{what} is {image.width} x {image.height}, and the model works on {side} x {side}.")
        image.load()
    except _NO_PICTURE as error:
        raise UserError(f"{what} is no picture.") from error
    return image


def _number(asked: Asked, key: str, kind: type, low: float, high: float, usual: Any) -> Any:
    value = asked.get(key, usual)
    try:
        value = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key} = {str(value)[:40]!r} is no number.") from None
    if not low <= value <= high:
        raise UserError(f"{key} = {value} must lie between {low} and {high}.")
    return value


class Workshop:
    """One model and everything that the page can ask of it; one thing at a time.

    Args:
        model: a consistency model of images.
        name: how the model is named in shell commands.
    """

    def __init__(self, model: Model, name: str) -> None:
        self.model, self.name = model, name
        self.channels, self.side = picture_size(model.header)
        self._turn = threading.Lock()
        self.actions: dict[str, Callable[[Asked], dict[str, Any]]] = {
            "about": self.about,
            "sample": self.sample,
            "edit": self.edit,
            "walk": self.walk,
        }

    def ask(self, action: str, asked: Asked) -> dict[str, Any]:
        """Do one thing, when those before are done.

        Raises:
            UserError: an unknown action, or a request that cannot be carried out.
        """
        if action not in self.actions:
            raise UserError(unknown("action", action, self.actions))
        with self._turn:
            return self.actions[action](asked)

    def about(self, asked: Asked) -> dict[str, Any]:
        """Say what the model is."""
        fitting = [task for task in TASKS.values() if task.channels in (None, self.channels)]
        tasks = [task.name for task in fitting if not (self.model.module.latent and task.not_in_latents)]
        factors = [factor for factor in (2, 4, 8, 16) if self.side % factor == 0 and factor < self.side]
        classes = self.model.class_names or [str(index) for index in range(self.model.num_classes or 0)]
        return {"name": self.name, "side": self.side, "channels": self.channels, "classes": classes, "tasks": tasks,
                "factors": factors, "preset": self.model.header.get("preset")}  # fmt: skip

    def sample(self, asked: Asked) -> dict[str, Any]:
        """Make one picture to begin with."""
        seed, label = _number(asked, "seed", int, 0, 10**6 - 1, 0), self._label(asked)
        picture = to_nhwc(self.model.sample(seeds=[seed], label=label))[0]
        words = ["sample", "--seeds", str(seed), *self._label_words(asked), "--out", "photo.png"]
        return {"images": [png_uri(picture)], "command": self._command(words), "inputs": []}

    def edit(self, asked: Asked) -> dict[str, Any]:
        """Carry out one of the edits on the page's picture.

        `asked` holds task, picture (PNG address), and as the task needs: mask (without one: what is transparent in the
        picture), factor, sigma; num, seed, label.
        """
        task = asked.get("task")
        if task not in TASKS:
            raise UserError(unknown("edit", str(task), TASKS))
        given = open_uri(asked.get("picture"), self.side, "the picture")
        photo = photo_of(given, self.channels).pixels
        how = How(
            num=_number(asked, "num", int, 1, MOST, 4),
            seed=_number(asked, "seed", int, 0, 10**6 - 1, 0),
            label=self._label(asked),
        )
        inputs, words = {"photo.png": png_uri(photo)}, []
        picture: Image.Image | Bytes = photo
        takes = TASKS[task].takes
        if "mask" in takes:
            # The page's own files: what is transparent in the picture must still be so for the command.
            picture, inputs["photo.png"] = given, str(asked["picture"])
            if asked.get("mask") is not None:
                how = replace(how, mask=open_uri(asked["mask"], self.side, "the mask"))
                inputs["mask.png"], words = str(asked["mask"]), ["--mask", "mask.png"]
        if "factor" in takes:
            how = replace(how, factor=_number(asked, "factor", int, 2, self.side, 2))
            picture = reduced(photo, how.factor or 1)
            inputs["photo.png"], words = png_uri(picture), ["--factor", str(how.factor)]
        if "blur" in takes:
            how = replace(how, sigma=_number(asked, "sigma", float, 0.1, 8.0, 1.0))
            picture = blurred(photo, how.sigma or 0.0)
            inputs["photo.png"], words = png_uri(picture), ["--sigma", f"{how.sigma:g}"]
        if "sigma" in takes:
            how = replace(how, num=1, sigma=_number(asked, "sigma", float, 0.01, 2.0, 0.3))
            picture = noisy(photo, how.sigma or 0.0, how.seed)
            inputs["photo.png"], words = png_uri(picture), ["--sigma", f"{how.sigma:g}"]
        else:
            words += ["--num", str(how.num), "--seed", str(how.seed)]
        return self._edited(asked, task, words, picture, how, inputs)

    def _edited(
        self, asked: Asked, task: str, words: list[str], picture: Image.Image | Bytes, how: How, inputs: dict[str, str]
    ) -> dict[str, Any]:
        made = arrays(task, self.model, picture, how)
        out = "edited.png" if len(made) == 1 else "edited/"
        command = self._command(["edit", task, "photo.png", *words, *self._label_words(asked), "--out", out])
        given = [{"name": name, "uri": uri} for name, uri in inputs.items()]
        return {"images": [png_uri(picture) for picture in made], "command": command, "inputs": given}

    def walk(self, asked: Asked) -> dict[str, Any]:
        """Return the picture at one place (0 .. FRAMES - 1) of the walk between two seeds."""
        seeds = [_number(asked, key, int, 0, 10**6 - 1, usual) for key, usual in (("from", 0), ("to", 1))]
        place = _number(asked, "place", int, 0, FRAMES - 1, 0)
        label = self._label(asked)
        label = first_label(self.model.module, seeds) if label is None else label
        point = path(key_noise(seeds, self.model.image_shape), FRAMES)[place : place + 1]
        frame = decoded(self.model.module, point, self.model.plan(), label, SILENCE)
        words = ["interpolate", "--seeds", f"{seeds[0]},{seeds[1]}", "--num", str(FRAMES), *self._label_words(asked),
                 "--out", "walk.gif"]  # fmt: skip
        return {"images": [png_uri(to_nhwc(frame)[0])], "command": self._command(words), "inputs": []}

    def _label(self, asked: Asked) -> int | None:
        label = asked.get("label")
        return None if label in (None, "") else self.model.label(str(label))

    def _label_words(self, asked: Asked) -> list[str]:
        label = asked.get("label")
        return [] if label in (None, "") else ["--label", str(label)]

    def _command(self, words: list[str]) -> str:
        return shlex.join(["cmtool", *words, "--model", self.name])


def noisy(photo: Bytes, sigma: float, seed: int) -> Bytes:
    """Return a picture (H, W, C) with Gaussian noise, so that there is something to remove."""
    clean = tensor(photo)
    noise = torch.randn(clean.shape, generator=generator(seed, "studio-noise"))
    return to_nhwc((clean + sigma * noise).clamp(-1, 1))[0]


def blurred(photo: Bytes, sigma: float) -> Bytes:
    """Return a picture (H, W, C) blurred by `sigma` pixels, so that there is something to sharpen."""
    height, width = photo.shape[:2]
    return to_nhwc(blur(height, width, sigma, sigma).measure(tensor(photo)).clamp(-1, 1))[0]


def reduced(photo: Bytes, factor: int) -> Bytes:
    """Return a picture (H, W, C) made `factor` times smaller: each pixel the rounded mean of a patch.

    Raises:
        UserError: the factor does not divide the sides.
    """
    height, width, channels = photo.shape
    if height % factor or width % factor:
        raise UserError(f"factor {factor} does not divide {height} pixels.")
    patches = photo.reshape(height // factor, factor, width // factor, factor, channels).astype(np.float64)
    return np.floor(patches.mean(axis=(1, 3)) + 0.5).astype(np.uint8)
