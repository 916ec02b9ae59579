"""Damage of any kind ends in a data set or in one sentence, never in another exception."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmtool.config.schema import DataConfig
from cmtool.data.decode import read_image
from cmtool.data.load import load_dataset
from cmtool.data.packed import Rules, pack
from cmtool.data.sources.sniff import open_source
from cmtool.errors import DataError
from cmtool.files.cache import cache_dir

GOLDEN = Path(__file__).parent / "golden"
ROUNDS = 40


def damaged(data, seed):
    """Flip, cut, repeat or overwrite a few bytes."""
    draw = random.Random(seed)
    made = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(made))
        how = draw.randrange(4)
        if how == 0:
            made[place] ^= 1 << draw.randrange(8)
        elif how == 1:
            made[place : place + 4] = draw.randbytes(4)
        elif how == 2:
            del made[place : place + draw.randint(1, 40)]
        else:
            made[place:place] = made[max(0, place - 20) : place]
    return bytes(made) or b"x"


def image_bytes(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(stream, kind, **({"exif": exif} if kind in ("JPEG", "WEBP", "PNG") else {}))
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_images(kind):
    whole = image_bytes(kind)
    for seed in range(ROUNDS):
        try:
            image = read_image(damaged(whole, seed), name="it")
        except DataError as error:
            assert "it" in error.message
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3


@pytest.mark.parametrize(
    "name", ["edm_tiny.zip", "cifar_like_batch", "train_data_batch_1.npz", "samples_6x8x8x3.npz", "packed"]
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_data_files(tmp_path, name):
    if name == "packed":
        pack(open_source(GOLDEN / "folders"), tmp_path / "whole", Rules(8))
        whole = (tmp_path / "whole").read_bytes()
    else:
        whole = (GOLDEN / name).read_bytes()
    path = tmp_path / name
    for seed in range(ROUNDS):
        path.write_bytes(damaged(whole, seed))
        try:
            data = load_dataset(DataConfig(source="folder", path=str(path), resolution=8, small="upscale"))
        except DataError:
            continue
        assert data.images.shape[1:] == (3, 8, 8)
    leftovers = [file for file in cache_dir().rglob("*") if file.name.startswith(".")] if cache_dir().exists() else []
    assert not leftovers
