"""Edits with a model of latents: what is known of a picture becomes what is known of its latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.nn.functional import max_pool2d

from cmtool.data.latents import encoder
from cmtool.editing.loop import known_pixels
from cmtool.editing.regions import filled
from cmtool.editing.subject import Subject, picture, tensor
from cmtool.errors import UserError


def in_latents(subject: Subject, latent: Mapping[str, Any]) -> Subject:
    """Return a subject whose y is the latent (1, C', h, w) of the picture; `legal` and `back` stay those of pixels.

    A cell of the latent is known only where all of its pixels are. The encoder sees further than one cell, so that a
    hole is filled from around before it looks: nothing of what was there reaches the known cells.

    Raises:
        UserError, DataError: no cell is wholly known, or the autoencoder is not here.
    """
    weight = subject.operator(subject.y).weight
    if weight is None:
        return replace(subject, y=encoder(latent)(subject.y))
    hole = weight < 1
    y = encoder(latent)(tensor(filled(picture(subject.y), hole[0, 0].numpy())))
    cell = subject.y.shape[-1] // y.shape[-1]
    made = max_pool2d(hole.float(), cell)
    if made.min() > 0:
        raise UserError(
            f"the mask leaves no {cell} x {cell} pixels wholly known, which the model sees as one.", "paint less white"
        )
    return replace(subject, y=y, operator=lambda like: known_pixels(made.to(like)))
