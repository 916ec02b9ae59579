"""`data make`, training, `eval` and `edit` see the same bytes and leave out the same files."""

import json
import zipfile

import numpy as np
import pytest

from cmtool.cli.app import run
from cmtool.config.schema import DataConfig
from cmtool.data import describe, load_dataset
from cmtool.data.decode import read_image, to_bytes, upright
from cmtool.data.packed import read_packed
from cmtool.evaluation.samples import open_images
from tests.data import odd_files
from tests.data.odd_files import SIDE, raw_png, usable


def nhwc(images):
    return images.permute(0, 2, 3, 1).numpy()


@pytest.fixture
def odd(tmp_path):
    root = tmp_path / "odd"
    root.mkdir()
    return root, *odd_files.write_all(root)


def config(path, **kw):
    return DataConfig(source="folder", path=str(path), resolution=SIDE, channels=3, **kw)


def test_a_folder_of_odd_files_through_all_four(odd, tmp_path, capsys):
    root, names, reasons = odd
    edited = np.stack([read_image(root / name, 3) for name in names])  # as edit and interpolate read one
    packed = tmp_path / "odd.cmdata"
    assert run(["data", "make", str(root), "--resolution", str(SIDE), "--out", str(packed), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["skipped"] == reasons and made["shape"] == [len(names), 3, SIDE, SIDE]
    trained = load_dataset(config(root))
    judged = open_images(root)
    assert np.array_equal(nhwc(read_packed(packed).images), edited)
    assert np.array_equal(nhwc(trained.images), edited)
    assert np.array_equal(judged.all(), edited)
    total = sum(reasons.values())
    said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    line = f"skipped {total} of {total + len(names)} files: {said}"
    assert line in describe(trained) and line in judged.notes
    assert any("are gray and the others are not: all are taken in color" in note for note in judged.notes)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_that_is_kept_open_has_the_bytes_of_one_that_is_read(odd, channels):
    root, names, _ = odd
    for name in names:
        kept = to_bytes(upright(root / name), channels, name)
        assert np.array_equal(kept, read_image(root / name, channels)), name


def test_the_same_files_in_a_zip(odd, tmp_path):
    root, _names, reasons = odd
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file() and "around" not in file.parts:
                archive.write(file, file.relative_to(root).as_posix())
    within = {reason: count for reason, count in reasons.items() if "link" not in reason}
    folder, zipped = load_dataset(config(root)), load_dataset(config(tmp_path / "odd.zip"))
    judged = open_images(tmp_path / "odd.zip")
    assert np.array_equal(nhwc(zipped.images), nhwc(folder.images)) and zipped.summary["skipped"] == within
    assert np.array_equal(judged.all(), nhwc(folder.images))
    assert any(note.startswith(f"skipped {sum(within.values())} of") for note in judged.notes)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("gray16-key.png", [255, 0, 1, 4, 117, 255, 255, 18]),
        ("gray2-key.png", [0, 255, 170, 255, 0, 255, 170, 255]),
        ("gray4-key.png", [0, 17, 34, 255, 68, 85, 102, 119]),
        ("rgb16-key.png", [255, 31, 54, 78, 101, 125, 148, 171]),
        ("gray-alpha16.png", [240, 215, 196, 186, 184, 189, 201, 221]),  # v a / 255 + 255 - a of the upper bytes
    ],
)
def test_depths_and_transparent_values_by_hand(name, row):
    image = read_image(usable()[name])
    assert image[0, :, 0].tolist() == row and (image == image[0]).all()


def test_a_transparent_black_of_sixteen_bits_is_white_everywhere():
    assert (read_image(raw_png(16, 0, bytes(16), (0,)), 1) == 255).all()
    assert (read_image(raw_png(16, 0, bytes(16), (0,)), 4)[..., 3] == 0).all()


def test_white_is_zero_in_a_tiff_of_sixteen_bits():
    image = read_image(usable()["white-is-zero.tiff"], 1)[..., 0].astype(int)
    assert np.abs(image - (255 - odd_files.ramp(1, 8))).max() <= 1


def test_a_color_set_with_one_gray_file_stays_in_color(tmp_path):
    color, gray = usable()["rgb.png"], usable()["gray.PNG"]
    for folder, files in (("mixed", [gray, color, color]), ("gray", [gray, gray])):
        (tmp_path / folder).mkdir()
        for number, data in enumerate(files):
            (tmp_path / folder / f"{number}.png").write_bytes(data)
    mixed, plain = open_images(tmp_path / "mixed"), open_images(tmp_path / "gray")
    assert mixed.shape == (SIDE, SIDE, 3) and plain.shape == (SIDE, SIDE, 1)
    assert np.array_equal(mixed.all()[1], odd_files.ramp()) and not plain.notes
    assert mixed.notes == ("1 of 3 images are gray and the others are not: all are taken in color",)


def test_colors_that_a_gray_model_drops_are_counted(tmp_path):
    (tmp_path / "a.png").write_bytes(usable()["rgb.png"])
    (tmp_path / "b.png").write_bytes(usable()["gray.PNG"])
    data = load_dataset(DataConfig(source="folder", path=str(tmp_path), resolution=SIDE, channels=1, holdout=0.0))
    assert data.info.notes == ("1 of 2 images lose their colors: one channel is gray",)


def test_alpha_of_arrays_is_laid_on_white_as_that_of_files(tmp_path):
    clear = odd_files.ramp(4)
    np.savez(tmp_path / "x.npz", arr_0=clear[None])
    data = load_dataset(config(tmp_path / "x.npz"))
    assert np.array_equal(nhwc(data.images)[0], read_image(usable()["alpha.png"], 3))


def test_more_than_is_kept_in_memory_is_decoded_again(odd, monkeypatch):
    root, *_ = odd
    whole = open_images(root)
    monkeypatch.setattr("cmtool.evaluation.samples.HELD", 1000)
    again = open_images(root)
    assert again.fingerprint == whole.fingerprint and np.array_equal(again.all(), whole.all())
