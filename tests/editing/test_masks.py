"""Masks as people have them become what was meant: black is kept, white is generated, the seam stays soft."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from cmtool.editing.photos import GRAIN, NEAR, cleaned, mask_from_alpha, mask_from_image, on_black
from cmtool.editing.regions import match_mask, resize_mask
from cmtool.errors import DataError, UserError


def drawn(seed, side=64, scale=1):
    """A hard mask of one of four kinds: a box, a disk, a brush stroke, blobs; `scale` pixels for each."""
    side *= scale
    random = np.random.default_rng(seed)
    image = Image.new("L", (side, side))
    pen = ImageDraw.Draw(image)
    points = random.integers(0, side, (6, 2)).tolist()
    if seed % 4 == 0:
        pen.rectangle([side // 5, side // 4, *random.integers(side // 2, side, 2).tolist()], fill=255)
    elif seed % 4 == 1:
        pen.ellipse([side // 4, side // 4, *random.integers(side // 2, side, 2).tolist()], fill=255)
    elif seed % 4 == 2:
        pen.line([tuple(point) for point in points], fill=255, width=int(random.integers(2, 9)) * scale)
    else:
        for x, y in points:
            pen.ellipse([x - 6 * scale, y - 6 * scale, x + 6 * scale, y + 6 * scale], fill=255)
    return image


def brushed(seed, side=64):
    """The same drawn with an anti-aliased brush."""
    return drawn(seed, side, 8).resize((side, side), Image.Resampling.BOX)


def stored(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return Image.open(io.BytesIO(stream.getvalue()))


def kept_and_made(image, truth):
    mask = mask_from_image(image, "m").mask
    levels = np.asarray(truth)
    return (mask[levels == 0] == 0).all() and (mask[levels == 255] == 1).all()


@pytest.mark.parametrize("quality", [50, 55, 60, 70, 75, 85, 90, 95])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("draw", [drawn, brushed])
def test_a_jpeg_is_the_mask_that_it_was(quality, mode, draw):
    for seed in range(40):
        truth = draw(seed)
        jpeg = stored(truth.convert(mode), "JPEG", quality=quality)
        assert kept_and_made(jpeg, truth), seed
        # Sent on as something else, the file no longer says that it was a JPEG.
        assert kept_and_made(stored(jpeg.convert("L"), "PNG"), truth), seed


@pytest.mark.parametrize("draw", [drawn, brushed])
@pytest.mark.parametrize("form", [("WEBP", {"quality": 50}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})])
def test_other_formats_too(draw, form):
    for seed in range(20):
        truth = draw(seed)
        assert kept_and_made(stored(truth.convert("RGB"), form[0], **form[1]), truth), seed


@pytest.mark.parametrize("draw", [drawn, brushed])
@pytest.mark.parametrize("noise", [1, 2, 3])
def test_noise_is_neither_kept_nor_made(draw, noise):
    for seed in range(20):
        truth = draw(seed)
        away = np.random.default_rng(seed).integers(-noise, noise + 1, (64, 64, 3))
        noisy = Image.fromarray((np.asarray(truth)[..., None] + away).clip(0, 255).astype(np.uint8))
        assert kept_and_made(noisy, truth), seed
        assert kept_and_made(stored(noisy, "JPEG", quality=80), truth), seed


def test_seams_stay_soft():
    truth = brushed(1)
    seam = mask_from_image(truth, "m").mask
    between = (np.asarray(truth) > NEAR) & (np.asarray(truth) < 255 - NEAR)
    assert between.any() and ((seam > 0) & (seam < 1))[between].all()
    ramp = Image.fromarray(np.linspace(0, 255, 256).astype(np.uint8)[None].repeat(8, 0))
    soft = mask_from_image(ramp, "m").mask[0]
    assert (np.diff(soft) >= 0).all() and soft[NEAR] == 0 and soft[255 - NEAR] == 1
    assert soft[[64, 128, 192]] == pytest.approx([40 / 207, 104 / 207, 168 / 207])
    feathered = drawn(1).filter(ImageFilter.GaussianBlur(4))
    for quality in (50, 90):
        again = mask_from_image(stored(feathered, "JPEG", quality=quality), "m").mask
        assert ((again > 0) & (again < 1)).mean() > 0.1
        assert np.abs(again - mask_from_image(feathered, "m").mask).max() < 0.15


@pytest.mark.parametrize("pair", [(0, 1), (0, 128), (0, 255), (1, 2), (7, 9), (128, 255), (254, 255)])
def test_two_levels_are_black_and_white(pair):
    truth = np.asarray(drawn(3)) > 0
    levels = np.where(truth, pair[1], pair[0])
    forms = [
        Image.fromarray(levels.astype(np.uint8)),
        Image.fromarray(levels.astype(np.uint8)).convert("RGB"),
        Image.fromarray(levels.astype(np.uint8)).convert("LA"),
        Image.fromarray(levels.astype(np.uint16)),
        Image.fromarray(levels.astype(np.int32)),
        Image.fromarray(levels.astype(np.float32)),
        Image.fromarray(levels.astype(np.uint8)).convert("P"),
    ]
    for form in forms:
        assert np.array_equal(mask_from_image(form, "m").mask, truth), form.mode
        assert np.array_equal(mask_from_image(form, "m", invert=True).mask, ~truth), form.mode
    said = mask_from_image(forms[0], "m").notices
    assert said == (() if pair[0] <= NEAR and pair[1] >= 255 - NEAR else (f"m has two levels: {pair[0]} is kept, "
                                                                          f"{pair[1]} is generated",))  # fmt: skip


def test_every_mode_of_a_mask():
    truth = drawn(5)
    levels = np.asarray(truth)
    layer = Image.new("RGBA", truth.size, (255, 255, 255, 0))
    layer.putalpha(truth)
    forms = [truth, truth.convert("1"), truth.convert("P"), truth.convert("RGBA"), truth.convert("LA"), layer,
             truth.convert("CMYK"), Image.fromarray(levels.astype(np.uint16) * 257),
             Image.fromarray((levels / 255).astype(np.float32))]  # fmt: skip
    for form in forms:
        assert np.array_equal(mask_from_image(form, "m").mask, levels / 255), form.mode


def test_what_is_transparent_in_a_mask_is_not_white():
    painted = np.full((2, 2, 4), 255, np.uint8)
    painted[0, :, 3] = 0
    painted[1, 1, 3] = 128
    assert on_black(painted)[..., 0].tolist() == [[0, 0], [255, 128]]
    assert mask_from_image(Image.fromarray(painted), "m").mask.tolist() == [[0, 0], [1, pytest.approx(104 / 207)]]


@pytest.mark.parametrize("level", [1, 0, 255, 254])
def test_one_level_is_empty_or_full(level):
    mask = mask_from_image(Image.new("L", (8, 8), level), "m").mask
    with pytest.raises(UserError, match="empty" if level < 128 else "full"):
        match_mask(mask, 8, 8, "x")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("L", (8, 8), 128), "one level everywhere"),
        (Image.fromarray(np.array([[0, 1, 2]], np.uint8)), "m is empty: its highest level is 2 of 255"),
        (
            Image.fromarray(np.array([[0, 0.01, 0.02]], np.float32)),
            "its highest level is 0.02 of 1, and up to 0.094",
        ),
        (Image.fromarray(np.array([[0, 0.5, 7]], np.float32)), "outside"),
        (Image.fromarray(np.array([[0, np.nan, 1]], np.float32)), "no numbers"),
    ],
)
def test_masks_that_say_nothing_are_refused(image, words):
    with pytest.raises(UserError, match=words):
        mask_from_image(image, "m")


@pytest.mark.parametrize("color", [(255, 0, 0), (0, 0, 255), (0, 90, 0), (255, 255, 0), (128, 0, 0), (255, 200, 200)])
@pytest.mark.parametrize("count", [1, 100, 4096])
def test_color_is_refused_however_little_of_it_there_is(color, count):
    pixels = np.asarray(drawn(4).convert("RGB")).copy().reshape(-1, 3)
    pixels[:count] = color
    with pytest.raises(DataError, match=r"colored pixel|in color"):
        mask_from_image(Image.fromarray(pixels.reshape(64, 64, 3)), "m")


def test_a_tint_too_faint_to_be_a_color_leaves_black_and_white_as_they_are():
    pixels = np.asarray(drawn(4).convert("RGB")).copy()
    truth = pixels[..., 0] > 0
    pixels[truth] = (255, 250, 232)
    pixels[~truth] = (20, 10, 0)
    pixels[0, 0] = (0, 0, 24)
    assert np.array_equal(mask_from_image(Image.fromarray(pixels), "m").mask, truth)


def test_what_is_odd_is_said():
    half = np.asarray(drawn(4)) // 2
    half[0, 0] = 60
    assert "the lightest level of m is 127 of 255" in mask_from_image(Image.fromarray(half), "m").notices[0]
    dark = 255 - half
    assert "darkest level of m is 128" in mask_from_image(Image.fromarray(dark), "m", invert=True).notices[0]
    gray = np.random.default_rng(0).integers(40, 200, (8, 8), dtype=np.uint8)
    assert "mostly gray" in mask_from_image(Image.fromarray(gray), "m").notices[0]
    assert mask_from_image(drawn(4), "m").notices == ()


def test_alpha_means_transparent_whatever_its_levels():
    alpha = np.array([[255, 254, 231, 128, 24, 0]], np.uint8)
    assert mask_from_alpha(alpha)[0].tolist() == [0, 0, 0, pytest.approx(103 / 207), 1, 1]
    assert not mask_from_alpha(np.array([[255, 240]], np.uint8)).any()  # two levels, and nothing is transparent


def test_a_hard_mask_covers_every_pixel_it_touched():
    mask = np.zeros((64, 64))
    mask[10, 10] = 1
    small = resize_mask(mask, 8, 8)
    assert small.sum() == 1
    assert small[1, 1] == 1


@pytest.mark.parametrize("seed", range(12))
def test_resizing_covers_what_is_painted_however_many_levels_there_are(seed):
    random = np.random.default_rng(seed)
    height, width, new_height, new_width = random.integers(1, 40, 4)
    mask = np.round(random.random((height, width)) ** 4, random.integers(0, 3))
    small = resize_mask(mask, new_height, new_width)
    assert small.shape == (new_height, new_width)
    for i in range(new_height):
        for j in range(new_width):
            # Exact fractions: which old rows and columns does the new pixel touch?
            rows = slice(i * height // new_height, -(-(i + 1) * height // new_height))
            columns = slice(j * width // new_width, -(-(j + 1) * width // new_width))
            assert small[i, j] == mask[rows, columns].max()


def test_masks_of_another_shape_empty_or_full_are_refused():
    with pytest.raises(DataError, match="another shape"):
        match_mask(np.eye(8), 8, 16, "x")
    with pytest.raises(UserError, match="empty"):
        match_mask(np.zeros((8, 8)), 8, 8, "x")
    with pytest.raises(UserError, match="full"):
        match_mask(np.ones((8, 8)), 8, 8, "x")
    assert match_mask(np.eye(8), 8, 8, "x")[1] is None


def test_bands_are_where_the_docs_say():
    hard = np.zeros((8, 8))
    hard[:, 4:] = 255
    grained = hard.copy()
    grained[:, 3], grained[:, 4] = 100, 160
    assert np.array_equal(cleaned(grained, lossy=True), hard / 255)
    assert 0 < cleaned(grained)[0, 3] < 1
    assert (NEAR, GRAIN) == (24, 96)
