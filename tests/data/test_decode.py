import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from cmtool.data.decode import MAX_PIXELS, fit_image, read_image
from cmtool.errors import DataError


def encoded(picture, kind, **options):
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def halves(width=32, height=16):
    """Left half red, right half blue."""
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[:, : width // 2, 0] = 255
    array[:, width // 2 :, 2] = 255
    return Image.fromarray(array)


@pytest.mark.parametrize(
    ("orientation", "shape", "red"),
    [
        (1, (16, 32), "left"),
        (2, (16, 32), "right"),
        (3, (16, 32), "right"),
        (6, (32, 16), "top"),
        (8, (32, 16), "bottom"),
    ],
)
def test_exif_orientation_is_followed(orientation, shape, red):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(encoded(halves(), "JPEG", quality=95, exif=exif))
    assert image.shape == (*shape, 3)
    height, width = shape
    places = {
        "left": image[:, : width // 2],
        "right": image[:, width // 2 :],
        "top": image[: height // 2],
        "bottom": image[height // 2 :],
    }
    reds = {name: part[..., 0].mean() for name, part in places.items()}
    assert max(reds, key=reds.get) == red


def test_cmyk_jpeg_becomes_rgb():
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    image = read_image(data)
    assert image.shape == (16, 16, 3) and image[..., 0].min() > 240 and image[..., 1:].max() < 15


def test_transparency_is_laid_on_white():
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    image = read_image(encoded(Image.fromarray(rgba), "PNG"))
    assert image[0, 0].tolist() == [255, 0, 0] and image[1, 1].tolist() == [255, 255, 255]
    assert image[0, 1].tolist() == [127, 127, 127]
    assert np.array_equal(read_image(encoded(Image.fromarray(rgba), "PNG"), channels=4), rgba)


def test_palette_with_transparency_and_gray_with_a_transparent_level():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    image = read_image(encoded(palette, "PNG", transparency=1))
    assert image[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    gray = Image.fromarray(np.array([[7, 90]], dtype=np.uint8))
    assert read_image(encoded(gray, "PNG", transparency=7), channels=1)[0, :, 0].tolist() == [255, 90]


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 300, 32768, 65535]], dtype=np.uint16)
    image = read_image(encoded(Image.fromarray(values), "PNG"), channels=1)
    assert image[0, :, 0].tolist() == [round(v / 257) for v in values[0].tolist()]
    assert read_image(encoded(Image.fromarray(values), "TIFF"), channels=3)[0, 3].tolist() == [128, 128, 128]


def rgb16_png(value):
    """A 1 x 1 RGB PNG of 16 bits per channel, which Pillow cannot write."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">3H", *value)))
        + chunk(b"IEND", b"")
    )


def test_sixteen_bit_rgb():
    assert read_image(rgb16_png((0, 0x8080, 0xFFFF)))[0, 0].tolist() == [0, 128, 255]


def test_float_tiff():
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert read_image(encoded(floats, "TIFF"), channels=1)[0, :, 0].tolist() == [0, 128, 255]
    with pytest.raises(DataError, match=r"leave \[0, 1\]"):
        read_image(encoded(Image.fromarray(np.array([[7.0]], dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_return_the_pixels(kind, pixels):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(read_image(encoded(Image.fromarray(pixels(0)), kind, **options)), pixels(0))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_only_when_allowed(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="animation"):
        read_image(data)
    assert read_image(data, animated=True)[0, 0, 0] > 240


def test_damaged_and_foreign_files_are_named(tmp_path, pixels):
    whole = encoded(Image.fromarray(pixels(0, 64, 64)), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("cut.jpg", "text.png", "empty.png", "page.png"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(DataError, match="1, 3 or 4"):
        read_image(whole, channels=2)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(side):
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    assert side * side > MAX_PIXELS
    with pytest.raises(DataError, match="megapixels"):
        read_image(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 40)


def test_adm_rule_step_by_step(pixels):
    image = pixels(3, 50, 83)
    picture = Image.fromarray(image)
    picture = picture.resize((41, 25), Image.Resampling.BOX).resize((20, 12), Image.Resampling.BOX)
    picture = picture.resize((round(20 * 8 / 12), 8), Image.Resampling.BICUBIC)
    expected = np.asarray(picture)[:, (13 - 8) // 2 : (13 - 8) // 2 + 8]
    assert np.array_equal(fit_image(image, 8), expected)


def test_edm_rule_step_by_step(pixels):
    image = pixels(4, 50, 83)
    cut = Image.fromarray(image[:, (83 - 50) // 2 : (83 + 50) // 2])
    assert np.array_equal(fit_image(image, 8, filter="edm"), np.asarray(cut.resize((8, 8), Image.Resampling.LANCZOS)))


def test_box_means_and_orientation_of_the_fits():
    image = np.asarray(halves(32, 16))
    stretched = fit_image(image, 2, "stretch", "box")
    assert stretched.tolist() == [[[255, 0, 0], [0, 0, 255]]] * 2
    padded = fit_image(image, 8, "pad", "box")
    assert padded[:2].max() == 0 and padded[-2:].max() == 0 and padded[2:6, 0].tolist() == [[255, 0, 0]] * 4
    cropped = fit_image(image, 8, "crop", "box")
    assert cropped[:, 0].tolist() == [[255, 0, 0]] * 8 and cropped[:, 7].tolist() == [[0, 0, 255]] * 8


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("rule", ["adm", "edm", "bicubic", "box", "lanczos"])
@pytest.mark.parametrize("shape", [(8, 8), (9, 31), (40, 3), (1, 1), (64, 17)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_fit_gives_the_size_and_keeps_a_constant(fit, rule, shape, channels):
    image = np.full((*shape, channels), 77, dtype=np.uint8)
    made = fit_image(image, 8, fit, rule)
    assert made.shape == (8, 8, channels) and made.dtype == np.uint8
    if fit != "pad" and channels != 4:
        assert (made == 77).all()


def test_an_image_of_the_right_size_is_untouched(pixels):
    assert np.array_equal(fit_image(pixels(5, 8, 8), 8), pixels(5, 8, 8))
