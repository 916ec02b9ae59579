"""Regions, masks and fits: nothing of a hole leaks, and what is put back fits where it came from."""

import numpy as np
import pytest

from cmtool.editing import regions as placing
from cmtool.editing.regions import (
    Region,
    blend,
    filled,
    put_resized,
    region_around,
    region_of_fit,
    resize,
    resize_mask,
    take_resized,
)


def test_a_region_inside_gives_back_what_it_took():
    picture = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    region = Region(1, 0, 3, 2)
    assert np.array_equal(region.take(picture), picture[1:4, :2])
    assert np.array_equal(region.put(picture, region.take(picture)), picture)


def test_a_region_beyond_the_rim_repeats_the_rim_and_puts_only_the_inside():
    picture = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    region = Region(-1, -1, 5, 6)
    taken = region.take(picture)
    assert taken.shape == (5, 6, 1)
    assert taken[0, 0] == picture[0, 0]
    assert taken[4, 5] == picture[2, 3]
    assert np.array_equal(region.put(np.zeros_like(picture), taken), picture)


@pytest.mark.parametrize(
    ("fit", "expected"), [("crop", (0, 1, 4, 4)), ("pad", (-1, 0, 6, 6)), ("stretch", (0, 0, 4, 6))]
)
def test_fits(fit, expected):
    region = region_of_fit(4, 6, fit)
    assert (region.top, region.left, region.height, region.width) == expected


def test_the_region_around_a_mask_has_half_context_and_stays_inside():
    mask = np.zeros((100, 200))
    mask[5:25, 150:160] = 1
    region = region_around(mask, 16)
    assert (region.height, region.width) == (40, 40)
    assert (region.top, region.left) == (0, 135)
    assert region.take(mask).sum() == mask.sum()
    small = np.zeros((100, 200))
    small[50, 199] = 1
    assert region_around(small, 16).left == 184


def test_a_mask_larger_than_half_the_picture_still_fits():
    mask = np.zeros((50, 200))
    mask[10:20, 20:190] = 1
    region = region_around(mask, 16)
    assert region.height == region.width == 170
    assert region.take(mask).sum() >= mask.sum()


def test_blending_keeps_black_bytes_and_takes_white_ones():
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(2))
    mask = np.zeros((6, 6))
    mask[:2], mask[2] = 1.0, 0.5
    out = blend(a, b, mask)
    assert np.array_equal(out[3:], a[3:])
    assert np.array_equal(out[:2], b[:2])
    assert np.abs(out[2] - (a[2].astype(float) + b[2]) / 2).max() <= 0.5


def test_resizing_keeps_the_channels():
    for channels in (1, 3, 4):
        assert resize(np.zeros((4, 6, channels), np.uint8), 8, 8).shape == (8, 8, channels)


@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (30, 30)])
def test_a_vast_region_taken_axis_by_axis_is_the_region(shape, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    region = region_of_fit(*shape, "pad")
    taken = take_resized(picture, region, 16, 16, resize)
    put = put_resized(picture, region, taken, resize)
    assert np.array_equal(taken, resize(region.take(picture), 16, 16))
    monkeypatch.setattr(placing, "MAX_PIXELS", 10)
    # Bytes are rounded between the axes, in another order.
    assert np.abs(take_resized(picture, region, 16, 16, resize).astype(int) - taken).max() <= 2
    assert np.abs(put_resized(picture, region, taken, resize).astype(int) - put).max() <= 2


@pytest.mark.parametrize("shape", [(10, 60_000), (60_000, 10)])
def test_the_square_around_a_long_strip_is_never_held(shape):
    picture = np.full((*shape, 3), 90, np.uint8)
    region = region_of_fit(*shape, "pad")
    assert region.height * region.width == 60_000**2  # 10 GiB of bytes
    taken = take_resized(picture, region, 16, 16, resize)
    assert taken.shape == (16, 16, 3)
    assert (taken == 90).all()
    assert (put_resized(picture, region, taken + 1, resize) == 91).all()
    mask = np.zeros(shape)
    mask[mask.shape[0] // 2, mask.shape[1] // 2] = 1
    inner = take_resized(mask, region, 16, 16, resize_mask)
    assert inner.sum() >= 1
    assert set(np.unique(inner)) == {0.0, 1.0}


@pytest.mark.parametrize("seed", range(6))
def test_a_hole_is_filled_from_known_pixels_alone(seed):
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(5, 60, 2))
    picture = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
    hole = random.random(shape) < random.choice([0.05, 0.5, 0.98])
    hole[0, 0] = False
    other = np.where(hole[..., None], random.integers(0, 256, picture.shape, dtype=np.uint8), picture)
    made = filled(picture, hole)
    assert np.array_equal(made, filled(other, hole))
    assert np.array_equal(made[~hole], picture[~hole])
    assert (made[hole] >= picture[~hole].min(axis=0)).all() and (made[hole] <= picture[~hole].max(axis=0)).all()


def test_a_hole_in_one_color_becomes_that_color():
    picture = np.full((40, 30, 3), 90, np.uint8)
    hole = np.zeros((40, 30), bool)
    hole[5:30, 3:29] = True
    assert (filled(np.where(hole[..., None], 7, picture).astype(np.uint8), hole) == 90).all()
