"""Augmentation: flips, moves, turns and scalings with known answers, EDM's own answers, and the law of the draws."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cmtool.config.parts import AugmentPart
from cmtool.data import augment
from tests.interop import closed_form

GOLDEN = Path(__file__).parent / "golden" / "edm_augment.npz"
EDM = AugmentPart(p=0.12)
SIDE = 24


def nothing(count=1, **given):
    """Changes of `count` images: none but those given."""
    zeros = {name: torch.zeros(count, dtype=torch.float64) for name in augment.Changes.__dataclass_fields__}
    return augment.Changes(**zeros | {name: torch.full_like(zeros[name], value) for name, value in given.items()})


def waves(u, v):
    """A smooth picture at places in pixels from the middle; long waves, so that filters keep them."""
    return torch.cos(0.25 * u + 0.1) * torch.cos(0.2 * v - 0.4) + 0.3 * torch.sin(0.15 * (u + v))


def places(side=SIDE):
    line = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    return line[None, :], line[:, None]


def smooth(side=SIDE):
    x, y = places(side)
    return waves(x, y)[None, None]


def inside(margin=5):
    return slice(margin, SIDE - margin)


def test_flips_and_whole_moves_copy_pixels():
    image = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augment.changed(image, nothing(xflip=1)), image.flip(3))
    assert torch.equal(augment.changed(image, nothing(yflip=1)), image.flip(2))
    right_and_up = augment.changed(image, nothing(whole_x=2, whole_y=1))
    assert torch.equal(right_and_up[..., :7, 2:], image[..., 1:, :6])
    # Mirrored in: the pixels at the rim are not repeated.
    assert torch.equal(right_and_up[..., :7, :2], image[..., 1:, [2, 1]])
    assert torch.equal(augment.changed(image, nothing()), image)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_quarter_turn_moves_pixels(turns):
    image = smooth()
    turned = augment.changed(image, nothing(turn=turns * math.pi / 2))
    # A positive angle turns against the clock, as rot90 does. The filter (sym6) is not quite symmetric: what it moves on
    # the way up it moves back on the way down, unless the picture was turned in between.
    assert (turned - image.rot90(turns, (2, 3))).abs().max() < 0.04
    assert (turned - image.rot90(turns + 1, (2, 3))).abs().max() > 0.4


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        ({"move_x": 1.0 / (SIDE * 0.125)}, lambda x, y: (x - 1, y)),
        ({"move_y": 0.5 / (SIDE * 0.125)}, lambda x, y: (x, y - 0.5)),
        ({"scale": 1.5}, lambda x, y: (x / 2**0.3, y / 2**0.3)),
        ({"scale": -1.0}, lambda x, y: (x * 2**0.2, y * 2**0.2)),
        ({"aniso": 1.0}, lambda x, y: (x / 2**0.2, y * 2**0.2)),
        ({"aniso": 1.0, "axis": math.pi / 2}, lambda x, y: (x * 2**0.2, y / 2**0.2)),
        ({"turn": 0.7}, lambda x, y: (x * math.cos(0.7) - y * math.sin(0.7), x * math.sin(0.7) + y * math.cos(0.7))),
    ],
)
def test_maps_of_a_smooth_picture_have_their_closed_form(changes, source):
    made = augment.changed(smooth(), nothing(**changes))[0, 0]
    wanted = waves(*torch.broadcast_tensors(*source(*places())))
    close = inside(6 if changes.get("scale", 0) < 0 or "turn" in changes else 4)
    assert (made - wanted)[close, close].abs().max() < 0.02
    assert (made - smooth()[0, 0]).abs().max() > 0.1


def test_a_flat_picture_stays_flat_to_its_rim():
    made = augment.changed(torch.full((1, 1, 8, 8), 0.7), nothing(turn=0.6, scale=-1.2, move_x=1.0))
    assert (made - 0.7).abs().max() < 0.02


@pytest.mark.parametrize("name", ["edm", "all"])
def test_the_same_random_numbers_do_and_say_what_edms_own_code_does(name):
    with np.load(GOLDEN) as archive:
        kept = {key.removeprefix(f"{name}/"): archive[key] for key in archive if key.startswith(name)}
    by = {
        kind: {key[2:]: torch.from_numpy(value).double() for key, value in kept.items() if key.startswith(f"{kind}_")}
        for kind in "ugn"
    }
    part = AugmentPart(p=0.6) if name == "edm" else AugmentPart(p=1, xflip=1, translate_int=1)
    image = torch.from_numpy(closed_form.uniform("augmented", (8, 2, 12, 12)))
    changes = augment.settle(part, augment.Numbers(by["u"], by["g"], by["n"]), 12)
    labels = changes.labels(part, 12)
    assert labels.shape[1] == part.labels == {"edm": 9, "all": 11}[name]
    assert (labels - torch.from_numpy(kept["labels"])).abs().max() < 2e-6
    assert (augment.changed(image, changes) - torch.from_numpy(kept["images"])).abs().max() < 1e-4


def test_each_change_has_its_probability_and_its_law():
    part = AugmentPart(p=0.12, translate_int=2.0)
    numbers = augment.drawn(0, 3, 20_000, 0, 20_000)
    told = augment.settle(part, numbers, 16).labels(part, 16)
    xflip, yflip, whole_x, whole_y, scale, cos, sin, along, across, move_x, move_y = told.unbind(1)

    def near(found, wanted, spread):
        assert abs(float(found) - wanted) < 5 * spread / math.sqrt(20_000)

    near(xflip.mean(), 0.5, 0.5)
    near(yflip.mean(), 0.06, 0.25)
    # Of the five whole moves from -2 to 2, those at the ends have half a chance.
    near(((whole_x != 0) | (whole_y != 0)).float().mean(), 0.24 * (1 - 1 / 16), 0.43)
    for value in (scale, sin, along, move_x, move_y):
        near((value != 0).float().mean(), 0.12, 0.33)
        near((value**2).mean() / 0.12, {id(sin): 0.5, id(along): 0.75}.get(id(value), 1.0), 6)
    near((across != 0).float().mean(), 0.06, 0.25)
    torch.testing.assert_close((cos + 1) ** 2 + sin**2, torch.ones_like(cos))
    assert (move_x != 0).equal(move_y != 0)


def test_a_row_depends_on_its_place_alone():
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    whole, told = augment.augmented(EDM, images, 5, 9, 40, 0)
    again = augment.augmented(EDM, images, 5, 9, 40, 0)
    assert torch.equal(again[0], whole) and torch.equal(again[1], told)
    for start, count in ((0, 7), (7, 20), (27, 13)):
        part, said = augment.augmented(EDM, images[start : start + count], 5, 9, 40, start)
        assert torch.equal(said, told[start : start + count])
        torch.testing.assert_close(part, whole[start : start + count], rtol=0, atol=1e-6)
    plain = (told == 0).all(1)
    assert 5 < plain.sum() < 35 and torch.equal(whole[plain], images[plain])
    assert not torch.equal(augment.augmented(EDM, images, 5, 10, 40, 0)[1], told)


def test_without_a_probability_nothing_happens():
    images = torch.rand(4, 1, 8, 8)
    same, told = augment.augmented(AugmentPart(), images, 0, 0, 4, 0)
    assert same is images and told is None and AugmentPart().labels == 0
