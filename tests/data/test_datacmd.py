"""`cmtool data` as typed."""

import json

import numpy as np
import pytest
from PIL import Image

from cmtool.cli.app import run
from cmtool.cli.output import Output
from cmtool.config.schema import DataConfig
from cmtool.data import load_dataset, read_png_text
from cmtool.data.packed import read_packed
from cmtool.errors import DataError


def call(capsys, *arguments):
    code = run([str(argument) for argument in ("data", *arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_make_show_and_train_from_one_file(capsys, tmp_path, class_folder):
    packed = tmp_path / "photos.cmdata"
    code, out, err = call(capsys, "make", class_folder, "--resolution", 8, "--out", packed)
    assert code == 0 and out == f"{packed}\n"
    assert err.splitlines() == [
        "6 of 7 files packed as 8 x 8 x 3",
        "skipped: 1 not an image",
        "1 exact duplicates (kept)",
        "3 classes",
    ]
    code, out, _ = call(capsys, "show", packed, "--grid", tmp_path / "grid.png")
    assert code == 0 and "dog" in out and "fingerprint" in out
    assert Image.open(tmp_path / "grid.png").size == (3 * 66 + 2, 2 * 66 + 2)
    assert read_png_text(tmp_path / "grid.png") == {"data": str(packed)}
    table = DataConfig(source="folder", path=str(packed), resolution=8, labels=True)
    direct = load_dataset(table.model_copy(update={"path": str(class_folder)}))
    loaded = load_dataset(table)
    assert loaded.fingerprint == direct.fingerprint and loaded.class_names == ("cat", "dog", "owl")


def test_show_as_json(capsys, tmp_path, class_folder):
    code, out, err = call(capsys, "show", class_folder, "--json")
    facts = json.loads(out)
    assert code == 0 and err == "" and facts["sizes"] == {"12x12": 6} and facts["found"] == 7
    assert facts["class_counts"][2] == {"label": 2, "name": "owl", "images": 2}
    code, out, _ = call(capsys, "make", class_folder, "--resolution", 8, "--out", tmp_path / "a.cmdata", "--json")
    made = json.loads(out)
    assert made["shape"] == [6, 3, 8, 8] and made["rules"]["filter"] == "adm"
    code, out, _ = call(capsys, "show", tmp_path / "a.cmdata", "--json")
    assert json.loads(out)["fingerprint"] == made["fingerprint"]


def test_show_unpacked_forms_and_names(capsys, tmp_path, class_folder, pixels):
    Image.fromarray(pixels(0, 30, 20)).save(class_folder / "cat" / "tall.png")
    (class_folder / "cat" / "broken.png").write_text("x")
    code, out, _ = call(capsys, "show", class_folder, "--json", "--grid", tmp_path / "g.png")
    facts = json.loads(out)
    assert code == 0 and facts["sizes"] == {"12x12": 6, "20x30": 1} and facts["unusable"] == {"unreadable": 1}
    assert Image.open(tmp_path / "g.png").size[0] > 100
    code, out, _ = call(capsys, "show", "digits", "--json")
    assert code == 0 and json.loads(out)["images"] == 1797
    code, *_ = call(capsys, "show", "toy2d", "--grid", tmp_path / "toy.png")
    assert code == 0 and Image.open(tmp_path / "toy.png").size[0] > 300


def test_packing_again_and_packing_built_ins(capsys, tmp_path):
    code, *_ = call(capsys, "make", "shapes", "--resolution", 16, "--out", tmp_path / "s.cmdata")
    code2, *_ = call(
        capsys, "make", tmp_path / "s.cmdata", "--resolution", 8, "--filter", "box", "--out", tmp_path / "s8.cmdata"
    )
    assert code == code2 == 0
    large, small = read_packed(tmp_path / "s.cmdata"), read_packed(tmp_path / "s8.cmdata")
    assert small.class_names == ("circle", "square", "triangle", "plus") and len(small) == 5000
    means = large.images[:50].numpy().reshape(50, 3, 8, 2, 8, 2).mean((3, 5))
    assert np.abs(means - small.images[:50].numpy()).max() <= 1  # Pillow rounds twice


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["show", "{tmp}/nothing"], 1, "there is no data at"),
        (["show"], 2, "missing argument"),
        (["show", "digit"], 1, "did you mean digits?"),
        (["show", "{photos}", "--num", "0"], 2, "--num"),
        (["make", "{photos}", "--out", "{tmp}/x.cmdata"], 2, "--resolution"),
        (["make", "{photos}", "--resolution", "8"], 2, "--out"),
        (["make", "{photos}", "--resolution", "0", "--out", "{tmp}/x.cmdata"], 2, "--resolution"),
        (["make", "{photos}", "--resolution", "8", "--out", "{tmp}/x.cmdata", "--filter", "cubic"], 2, "cubic"),
        (["make", "{photos}", "--resolution", "8", "--out", "{tmp}/x.cmdata", "--channels", "2"], 2, "1, 3 or 4"),
        (["make", "{photos}", "--resolution", "64", "--out", "{tmp}/x.cmdata"], 1, "6 too small"),
        (["make", "{photos}", "--resolution", "8", "--out", "{photos}"], 1, "is a folder"),
        (
            ["make", "{photos}", "--resolution", "8", "--out", "{photos}/notes.txt"],
            1,
            "no packed data set; it is left alone",
        ),
        (["make", "{photos}", "--resolution", "8", "--out", "{photos}/notes.txt/x.cmdata"], 1, "written"),
        (["make", "toy2d", "--resolution", "1", "--out", "{tmp}/x.cmdata"], 1, "points in the plane"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(capsys, tmp_path, class_folder, arguments, code, says):
    typed = [argument.format(tmp=tmp_path, photos=class_folder) for argument in arguments]
    before = sorted(path.name for path in tmp_path.iterdir())
    got, out, err = call(capsys, *typed)
    assert (got, out) == (code, "") and says in err and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_packed_file_of_another_size_is_refused_in_training(tmp_path, capsys, class_folder):
    packed = tmp_path / "p.cmdata"
    call(capsys, "make", class_folder, "--resolution", 8, "--out", packed)
    with pytest.raises(DataError, match="8 pixels and 3 channels; the preset wants 16 and 3") as caught:
        load_dataset(DataConfig(source="folder", path=str(packed), resolution=16))
    assert "--resolution 16" in caught.value.hint
    code, *_ = call(capsys, "make", packed, "--resolution", 8, "--out", packed)
    assert code == 1 and len(read_packed(packed)) == 6


def test_a_first_packing_is_said_once(capsys, class_folder):
    table = DataConfig(source="folder", path=str(class_folder), resolution=8)
    assert len(load_dataset(table, Output())) == 6
    captured = capsys.readouterr()
    assert captured.err == "packing 6 images into the cache; the next start reads that copy\n" and captured.out == ""
    load_dataset(table, Output())
    assert capsys.readouterr().err == ""
