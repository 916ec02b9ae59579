"""Color profiles: converted to sRGB where they differ from it, by every reader, and back for what is written."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from cmtool.data.decode import read_image
from cmtool.data.profiles import convert, other_profile, own_profile, to_srgb
from tests.data.wide import LINEAR_GRAY, WIDE

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def colors():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=form, **options)
    return stream.getvalue()


def expected(image):
    """sRGB by the formulas: decode gamma 2.2, change primaries (both of white D50), encode by sRGB's curve."""
    wide = np.array([[0.60974, 0.31111, 0.01947], [0.20528, 0.62567, 0.06087], [0.14919, 0.06322, 0.74457]])
    srgb = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.71410]])
    linear = ((image / 255.0) ** (563 / 256)) @ wide @ np.linalg.inv(srgb)
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_wide_colors_become_those_of_srgb():
    made = read_image(encoded(Image.fromarray(colors()), icc_profile=WIDE)).astype(float)
    assert np.abs(made - expected(colors())).max() < 2
    assert np.abs(made - colors()).max() > 20


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_every_format_that_carries_a_profile(form):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(form, {})
    flat = Image.new("RGB", (16, 16), (40, 170, 60))
    made = read_image(encoded(flat, form, icc_profile=WIDE, **options))
    assert np.abs(made - expected(np.asarray(flat))).max() < 3


def test_srgb_itself_and_no_profile_change_nothing():
    for options in ({}, {"icc_profile": SRGB}):
        image = Image.open(io.BytesIO(encoded(Image.fromarray(colors()), **options)))
        assert to_srgb(image) is image
        assert other_profile(image) is None
        assert np.array_equal(read_image(encoded(image, **options)), colors())


@pytest.mark.parametrize("bad", [b"x", WIDE[:200], WIDE[:128] + b"\0" * 300, LINEAR_GRAY])
def test_profiles_that_are_damaged_or_of_gray_are_ignored_in_color(bad):
    assert np.array_equal(read_image(encoded(Image.fromarray(colors()), icc_profile=bad)), colors())


def test_gray_with_a_profile_of_its_own():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    made = read_image(encoded(ramp, icc_profile=LINEAR_GRAY), channels=1)[0, :, 0].astype(float)
    linear = np.arange(256) / 255
    curve = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(made - curve).max() < 2
    assert np.array_equal(read_image(encoded(ramp, icc_profile=WIDE), channels=1)[0, :, 0], np.arange(256))


def test_transparency_is_kept_and_palettes_are_converted():
    alpha = np.random.default_rng(1).integers(0, 256, (16, 16, 1), dtype=np.uint8)
    rgba = np.concatenate([colors(), alpha], axis=2)
    made = read_image(encoded(Image.fromarray(rgba), icc_profile=WIDE), channels=4)
    assert np.array_equal(made[..., 3:], alpha)
    assert np.abs(made[..., :3] - expected(colors())).max() < 2
    palette = Image.fromarray(colors()).quantize(16)
    made = read_image(encoded(palette, icc_profile=WIDE))
    assert np.abs(made - expected(np.asarray(palette.convert("RGB")))).max() < 2


def test_there_and_back_is_where_it_was():
    middle = colors() // 2 + 64  # all of sRGB lies within the wide colors, and not the other way round
    for pixels, profile in ((middle, WIDE), (middle[..., :1], LINEAR_GRAY)):
        own = convert(pixels, profile, back=True)
        again = convert(own, profile)
        assert own.shape == again.shape == pixels.shape
        assert np.abs(own.astype(int) - pixels).max() > 10
        assert np.abs(again.astype(int) - pixels).max() <= 3
    assert convert(middle, None) is middle


def test_a_profile_is_carried_only_by_pixels_of_its_kind():
    color, gray = Image.fromarray(colors()), Image.fromarray(colors()[..., 0])
    for image, profile, channels, own in (
        (color, WIDE, 3, WIDE),
        (color, WIDE, 1, None),
        (color, LINEAR_GRAY, 3, None),
        (gray, LINEAR_GRAY, 1, LINEAR_GRAY),
        (gray, LINEAR_GRAY, 3, None),
        (gray, WIDE, 1, None),
    ):
        assert own_profile(Image.open(io.BytesIO(encoded(image, icc_profile=profile))), channels) == own


def test_a_set_says_once_how_many_were_converted(tmp_path):
    from cmtool.data.packed import Rules, pack, read_packed
    from cmtool.data.sources.sniff import open_source
    from cmtool.evaluation.samples import open_images

    for index in range(5):
        Image.fromarray(colors()).save(tmp_path / f"{index}.png", **({"icc_profile": WIDE} if index < 2 else {}))
    said = "2 of 5 images have another color profile and are converted to sRGB (2 of wide test)"
    header = pack(open_source(tmp_path), tmp_path / "a.cmdata", Rules(16))
    assert header["notes"] == [said]
    (tmp_path / "a.cmdata").rename(tmp_path.parent / "a.cmdata")
    images = open_images(tmp_path)
    assert list(images.notes) == [said]
    judged = np.concatenate(list(images.batches(8)))
    packed = read_packed(tmp_path.parent / "a.cmdata").images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(judged, packed)
    assert np.abs(judged[0] - expected(colors())).max() < 2 and np.array_equal(judged[4], colors())
