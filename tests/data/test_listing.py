"""One walk: what counts, what is skipped and why, and which class an image has, in folders, zips and their wrappers."""

import io
import json
import os
import stat
import zipfile

import numpy as np
import pytest
from PIL import Image

from cmtool.config.schema import DataConfig
from cmtool.data import load_dataset
from cmtool.data.listing import class_labels, list_folder
from cmtool.data.sources.sniff import open_source
from cmtool.errors import DataError
from cmtool.evaluation.samples import open_images


def png(seed=0, side=8):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(place, files):
    """Write name -> bytes (None: a png of its own) as a folder, or as a zip where `place` ends so."""
    whole = {name: png(number) if data is None else data for number, (name, data) in enumerate(files.items())}
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w") as archive:
            for name, data in whole.items():
                archive.writestr(name, data)
        return place
    for name, data in whole.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def load(path, **kw):
    return load_dataset(
        DataConfig(source="folder", path=str(path), resolution=8, **{"labels": True, "holdout": 0.0, **kw})
    )


CLASSES = dict.fromkeys(["cat/1.png", "cat/old/2.png", "dog/3.png"])
HIDDEN = {
    ".ipynb_checkpoints/1-checkpoint.png": None,
    "cat/.ipynb_checkpoints/1-checkpoint.png": None,
    "__MACOSX/cat/._1.png": b"x",
    "__MACOSX/1.png": None,
    "cat/._1.png": b"x",
    "cat/Thumbs.db": b"x",
    "Desktop.ini": b"x",
    ".DS_Store": b"x",
    "@eaDir/1.png": None,
    ".git/config": b"x",
}
FORMS = ["set", "set.zip"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrapper", ["", "photos/"])
def test_hidden_and_system_files_never_count(tmp_path, form, wrapper):
    files = {wrapper + name: data for name, data in CLASSES.items()}
    files |= {(name if name.startswith("__MACOSX") else wrapper + name): data for name, data in HIDDEN.items()}
    data = load(write(tmp_path / form, files))
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 0, 1]
    assert data.summary["skipped"] == {} and data.summary["found"] == 3
    judged = open_images(tmp_path / form)
    assert judged.count == 3 and judged.groups.tolist() == [0, 0, 1] and judged.notes == ()


def edm(wrapper="", labels=(0, 1, 0)):
    names = ["00000/img0.png", "00000/img1.png", "00001/img2.png"]
    table = json.dumps({"labels": [list(row) for row in zip(names, labels, strict=True)]}).encode()
    return {wrapper + name: None for name in names} | {f"{wrapper}dataset.json": table}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrapper", ["", "mydata/", "a/b/"])
def test_an_edm_set_is_found_in_its_wrapper(tmp_path, form, wrapper):
    data = load(write(tmp_path / form, edm(wrapper)))
    assert data.labels.tolist() == [0, 1, 0] and data.num_classes == 2 and data.class_names is None
    assert data.info.source.startswith("EDM") and data.summary["skipped"] == {}
    judged = open_images(tmp_path / form)
    assert judged.count == 3 and judged.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize("form", FORMS)
def test_an_edm_set_beside_other_images_is_not_read_by_its_folders(tmp_path, form):
    write(tmp_path / form, edm("one/") | edm("two/"))
    with pytest.raises(DataError, match=r"holds an EDM data set in its folder one/ and images outside it"):
        load(tmp_path / form)
    with pytest.raises(DataError, match="holds an EDM data set"):
        open_images(tmp_path / form)


@pytest.mark.parametrize("form", FORMS)
def test_a_dataset_json_of_another_tool_is_no_table(tmp_path, form):
    data = load(write(tmp_path / form, CLASSES | {"dataset.json": b'{"title": "pets"}', "dog/dataset.json": b"{}"}))
    assert data.class_names == ("cat", "dog") and data.summary["skipped"] == {"not an image": 2}


def test_labels_that_are_asked_for_by_name_lose_to_the_table_aloud(tmp_path):
    data = load(write(tmp_path / "set", edm()), kind="folders")
    assert "the labels are those of dataset.json" in data.info.notes


def test_links_are_followed_loops_are_not_and_broken_ones_are_counted(tmp_path):
    root = write(tmp_path / "set", {"z_real/1.png": None, "z_real/2.png": None, "other/3.png": None})
    os.symlink(root / "z_real", root / "a_link")
    os.symlink(root / "z_real" / "1.png", root / "other" / "4.png")
    os.symlink(root, root / "other" / "around")
    os.symlink(root / "other" / "self", root / "other" / "self")
    os.symlink(root / "gone", root / "gone_class")
    os.symlink(root / "gone.png", root / "other" / "5.png")
    data = load(root)
    assert data.class_names == ("a_link", "other", "z_real") and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    expected = {"a broken link": 3, "a link to a folder around it": 1}
    assert data.summary["skipped"] == expected and open_images(root).count == 6
    assert open_images(root).notes == ("skipped 4 of 10 files: 3 a broken link, 1 a link to a folder around it",)


def test_a_link_to_a_folder_around_the_root_brings_nothing_from_beside_it(tmp_path):
    write(tmp_path / "up" / "set", CLASSES)
    write(tmp_path / "up" / "other", {"stray.png": None})
    for number, target in enumerate(["..", "../..", str(tmp_path / "up")]):
        (tmp_path / "up" / "set" / f"link{number}").symlink_to(target)
    found = list_folder(tmp_path / "up" / "set")
    assert found.images == sorted(CLASSES) and found.skipped == {"a link to a folder around it": 3}


def test_a_bitmap_without_a_file_header_is_read(tmp_path):
    picture = Image.open(io.BytesIO(png()))
    picture.save(write(tmp_path / "set", {"cat/a.png": None}) / "cat" / "b.dib", "DIB")
    data = load(tmp_path / "set")
    assert data.summary["skipped"] == {} and (data.images[0] == data.images[1]).all()


def test_a_new_broken_link_is_counted_though_the_images_are_packed_already(tmp_path):
    root = write(tmp_path / "set", CLASSES)
    assert load(root).summary["skipped"] == {}
    os.symlink(root / "gone.png", root / "cat" / "5.png")
    assert load(root).summary["skipped"] == {"a broken link": 1}


def test_archives_with_links_dots_and_backslashes(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("./cat/1.png", png(1))
        archive.writestr(zipfile.ZipInfo("dog/2.png"), png(2))
        windows = zipfile.ZipInfo("dog/3.png")
        windows.filename = "dog\\3.png"
        archive.writestr(windows, png(3))
        link = zipfile.ZipInfo("dog/4.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "2.png")
    data = load(tmp_path / "x.zip")
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 1, 1]
    assert data.summary["skipped"] == {"a link inside an archive": 1}
    assert open_images(tmp_path / "x.zip").count == 3


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_may_not_be_read_is_counted(tmp_path):
    root = write(tmp_path / "set", CLASSES)
    (root / "dog").chmod(0)
    try:
        assert list_folder(root).skipped == {"in a folder that cannot be read": 1}
    finally:
        (root / "dog").chmod(0o755)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrapper", ["pets/", "pets/train/", "download/pets/train/"])
def test_wrappers_around_class_folders_are_no_classes(tmp_path, form, wrapper):
    data = load(write(tmp_path / form, {f"{wrapper}{name}": None for name in CLASSES}))
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize("form", FORMS)
def test_images_beside_class_folders_are_said_to_end_the_classes(tmp_path, form):
    write(tmp_path / form, CLASSES | {"stray.png": None})
    [note] = load(tmp_path / form, labels=False).info.notes
    assert note == "1 image lies next to the folders, so the folders are not classes"
    assert open_images(tmp_path / form).notes == (note,)
    with pytest.raises(DataError, match="no class labels"):
        load(tmp_path / form)


def test_a_name_without_a_prefix_is_no_class_of_its_own():
    assert class_labels(["a_1.png", "b_2_3.png"], "prefix").names == ("a", "b")
    with pytest.raises(DataError, match=r"b2\.png has no underscore"):
        class_labels(["a_1.png", "b2.png"], "prefix")


def test_an_array_among_images_does_not_make_a_zip_an_npz(tmp_path):
    features = io.BytesIO()
    np.save(features, np.zeros((3, 4), np.float32))
    data = load(write(tmp_path / "x.zip", {"features.npy": features.getvalue()} | CLASSES))
    assert len(data) == 3 and data.summary["skipped"] == {"not an image": 1}


def test_tables_of_facts_do_not_hide_the_images_beside_them(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    root = write(tmp_path / "set", CLASSES)
    parquet.write_table(arrow.table({"file_name": ["1.png"], "text": ["a cat"]}), root / "metadata.parquet")
    assert load(root).class_names == ("cat", "dog")
    parquet.write_table(arrow.table({"image": [png(), png(1)]}), root / "metadata.parquet")
    source = open_source(root)
    assert source.kind == "parquet" and source.count == 2
    assert source.notes == ("3 image files lie in the same folder and are left out (parquet is read)",)


def test_a_published_form_is_found_in_the_one_folder_around_it(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "around" / "set").mkdir(parents=True)
    parquet.write_table(arrow.table({"image": [png(), png(1)]}), tmp_path / "around" / "set" / "0.parquet")
    assert open_source(tmp_path / "around").count == 2


def tables(tmp_path, *columns):
    arrow = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "tables").mkdir()
    for number, table in enumerate(columns):
        parquet.write_table(arrow.table(table), tmp_path / "tables" / f"{number}.parquet")
    return tmp_path / "tables"


def test_the_image_column_is_the_one_so_called_and_not_the_first(tmp_path):
    place = tables(tmp_path, {"before": [png(9)], "image": [png(1)], "y": [3], "label": [1]})
    data = load(place)
    assert data.labels.tolist() == [1]
    assert np.array_equal(data.images[0].permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(png(1)))))
    assert "of the columns before, image image is taken for the images" in data.info.notes
    assert "of the columns label, y label is taken for the labels" in data.info.notes


def test_two_columns_of_images_without_a_usual_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="several columns of images: before, after"):
        load(tables(tmp_path, {"before": [png(9)], "after": [png(1)]}))


def test_later_tables_must_have_the_columns_of_the_first(tmp_path):
    with pytest.raises(DataError, match=r"1\.parquet has other columns or class names than 0\.parquet"):
        load(tables(tmp_path, {"image": [png()], "label": [0]}, {"image": [png()], "y": [0]}))


def test_rows_without_a_label_are_counted(tmp_path):
    place = tables(tmp_path, {"image": [png(), png(1), png(2)], "label": [0, -1, None]})
    assert load(place, labels=False).info.notes == ("2 of 3 rows have no label, so that none is used",)


def test_labels_that_are_no_numbers_are_said_to_be_left_out(tmp_path):
    place = tables(tmp_path, {"image": [png()], "label": ["cat"]})
    assert load(place, labels=False).info.notes == ("the column label (string) holds no class numbers and is not used",)
