"""What a preset says about its own pictures holds for no others: reference, times, editing levels, figures."""

from __future__ import annotations

import pytest

from cmtool.config.judgments import (
    describe_judging,
    held_out_data,
    is_teacher_of,
    own_reference,
    preset_of_data,
    reference_of,
)
from cmtool.config.load import from_toml, resolve, to_toml
from cmtool.config.schema import EditConfig, EvalConfig
from cmtool.editing.levels import edit_settings, plan_edit
from cmtool.errors import ConfigError
from cmtool.models import model_header

NO_FACTS = (EditConfig(), None, None, {}, None, "")


def facts(config):
    return (
        config.edit,
        config.eval.reference,
        config.eval.features,
        config.sample.times,
        config.recipe.expected,
        config.about.title,
    )


def header_of(config, **more):
    return model_header(config, num_classes=None, class_names=None, fingerprint="f", **more)


@pytest.mark.parametrize(
    "sets",
    [
        ("data.path=faces",),
        ("data.source=digits", "data.channels=1"),
        ("data.kind=heldout",),
        ("data.resolution=32",),
        ("data.fit=pad",),
        ("data.small=upscale",),
        ("data.filter=box",),
        ("data.path=digits",),
    ],
)
def test_other_pictures_leave_every_judgment_behind(sets):
    resolved = resolve("shapes", sets=sets)
    assert resolved.other_data and facts(resolved.config) == NO_FACTS
    assert not any(key.startswith(("edit", "eval.reference", "sample.times", "about")) for key in resolved.origins)


@pytest.mark.parametrize(
    "sets", [(), ("data.flip=true",), ("data.labels=false",), ("data.size=64",), ("data.kind=",), ("data.path=shapes",)]
)
def test_the_same_pictures_keep_them(sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = resolve("shapes", sets=sets)
    assert not resolved.other_data and facts(resolved.config) == facts(resolve("shapes").config)
    assert resolved.config.eval.reference == "shapes" and resolved.config.edit != EditConfig()


def test_a_folder_with_the_name_of_a_source_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "shapes").mkdir()
    monkeypatch.chdir(tmp_path)
    resolved = resolve("shapes", flags={"data.path": "shapes"})
    assert resolved.other_data and resolved.config.data.source == "folder" and resolved.config.data.path == "shapes"


def test_published_figures_are_of_the_published_data():
    assert resolve("cifar10", recipe="ict").config.recipe.expected is not None
    mine = resolve("cifar10", recipe="ict", flags={"data.path": "birds"}).config
    assert facts(mine) == NO_FACTS
    assert mine.train.lr == resolve("cifar10", recipe="ict").config.train.lr


def test_what_is_named_by_hand_stays():
    sets = ("eval.reference=mine.npz", "eval.features=shapes", 'sample.times={"2" = [80.0, 3.0]}', "edit.stroke=[2.0]")
    config = resolve("shapes", flags={"data.path": "faces"}, sets=sets).config
    assert (config.eval.reference, config.eval.features) == ("mine.npz", "shapes")
    assert config.sample.times == {"2": (80.0, 3.0)} and config.edit.stroke == (2.0,)
    assert config.edit.inpaint == EditConfig().inpaint


def test_the_source_is_that_of_the_path():
    for path, source in (("a/", "folder"), ("b.npz", "npz"), ("c.cmdata", "packed"), ("lsun:d", "lsun")):
        assert resolve("cifar10", flags={"data.path": path}).config.data.source == source
    assert resolve("digits", flags={"data.path": "shapes"}, sets=["data.channels=3"]).config.data.source == "shapes"


def test_a_preset_for_any_folder_has_no_pictures_of_its_own():
    plain, mine = resolve("folder64", recipe="ict"), resolve("folder64", recipe="ict", flags={"data.path": "photos"})
    assert not mine.other_data and facts(mine.config) == facts(plain.config)
    assert resolve("folder64", flags={"data.path": "photos"}, sets=["data.resolution=32"]).other_data


def test_the_resolved_settings_keep_nothing_to_be_found_again(tmp_path):
    """Resumed and extended runs read their settings from this file."""
    config = resolve("shapes", flags={"data.path": "faces"}).config
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert facts(from_toml(tmp_path / "config.toml")) == NO_FACTS


def test_one_sentence_says_what_is_left_out():
    mine = resolve("shapes", flags={"data.path": "faces"})
    said = describe_judging(mine.config, mine.other_data)
    assert "preset shapes" in said and "held out of training are the reference (data.holdout = 0.05)" in said
    whole = resolve("shapes", flags={"data.path": "faces"}, sets=["data.holdout=0"])
    said = describe_judging(whole.config, whole.other_data)
    assert "preset shapes" in said and "no sampling times are searched" in said and "--set eval.reference" in said
    named = resolve("shapes", flags={"data.path": "faces"}, sets=["eval.reference=mine.npz"])
    assert "the reference is mine.npz" in describe_judging(named.config, named.other_data)
    assert describe_judging(resolve("shapes").config) is None
    assert describe_judging(resolve("folder64").config) is None
    assert "no sampling times are searched" in describe_judging(resolve("folder64", sets=["data.holdout=0"]).config)
    edm = resolve("shapes", family="edm", flags={"data.path": "faces"})
    assert "sampling times are searched" not in describe_judging(edm.config, edm.other_data)


def test_a_preset_file_that_judges_by_other_pictures_is_told(tmp_path):
    text = (
        '[data]\nsource = "folder"\npath = "faces"\nresolution = 16\n[train]\nsteps = 5\n[eval]\nreference = "shapes"\n'
    )
    (tmp_path / "shapes.toml").write_text(text)
    config = resolve(str(tmp_path / "shapes.toml"), recipe="ict").config
    said = describe_judging(config)
    assert "faces" in said and "shapes" in said
    assert reference_of(header_of(config)) == "shapes"  # its own file's word, not the shipped preset's


def test_a_header_names_the_data_that_were_used():
    mine = header_of(resolve("shapes", flags={"data.path": "faces"}).config, source="folder of images")
    assert (mine["data"]["source"], mine["data"]["path"]) == ("folder of images", "faces")
    assert mine["times"] == {} and mine["recipe"]["expected"] is None and mine["eval"]["reference"] is None
    own = header_of(resolve("shapes").config, source="shapes")
    assert own["data"]["source"] == "shapes" and "path" not in own["data"] and own["eval"]["reference"] == "shapes"


def test_the_reference_of_a_model_is_its_own():
    assert reference_of(header_of(resolve("shapes", flags={"data.path": "faces"}).config)) is None
    assert reference_of(header_of(resolve("shapes").config)) == "shapes"
    # As published and older files are: no word on it.
    assert reference_of({"preset": "shapes", "data": {"source": "shapes"}}) == "shapes"
    assert reference_of({"preset": "lsun_cat256", "data": {"source": "lsun_cat256"}}) == "lsun_cat256"
    assert reference_of({"preset": "shapes", "data": {"source": "folder of images"}}) is None
    assert reference_of({"preset": "shapes", "data": {"source": "shapes", "path": "shapes"}}) is None
    assert reference_of({"preset": "nobody's"}) is None and reference_of({}) is None


def test_a_preset_of_the_same_name_in_the_working_folder_is_not_meant(tmp_path, monkeypatch):
    (tmp_path / "presets").mkdir()
    text = '[data]\nsource = "folder"\nresolution = 16\n[train]\nsteps = 5\n[eval]\nreference = "mine.npz"\n'
    (tmp_path / "presets" / "shapes.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert reference_of({"preset": "shapes", "data": {"source": "shapes"}}) == "shapes"
    assert preset_of_data({"preset": "shapes"})["data"]["source"] == "shapes"


def test_a_model_stands_for_what_its_training_held_out(tmp_path):
    config = resolve("shapes", flags={"data.path": "faces"}, sets=["data.fit=pad", "data.kind=prefix"]).config
    header = header_of(config, source="folder of images", holdout=0.0125)
    table = held_out_data(header)
    assert table == config.data.model_copy(update={"holdout": 0.0125, "labels": False})
    assert own_reference(header, tmp_path / "m.safetensors") == str(tmp_path / "m.safetensors")
    assert held_out_data(header_of(config)) is None and own_reference(header_of(config), tmp_path) is None
    assert own_reference(header_of(resolve("shapes").config), tmp_path) == "shapes"
    header["data"]["fit"] = "torn"
    with pytest.raises(ConfigError, match="which images its training held out"):
        held_out_data(header)


def test_a_run_that_began_before_there_was_a_holdout_goes_on_with_all_its_images(tmp_path):
    config = resolve("shapes", flags={"data.path": "faces"}).config
    text = to_toml(config)
    (tmp_path / "config.toml").write_text(text.replace("holdout = 0.05\n", ""))
    assert config.data.holdout == 0.05 and from_toml(tmp_path / "config.toml").data.holdout == 0
    (tmp_path / "config.toml").write_text(text)
    assert from_toml(tmp_path / "config.toml") == config


def test_editing_levels_that_were_tuned_on_other_pictures_are_not_called_tuned():
    mine = header_of(resolve("shapes", flags={"data.path": "faces"}).config, source="folder of images")
    for task in ("inpaint", "colorize", "superres"):
        plan = plan_edit(mine, task)
        assert plan.source == f"usual for {task}, not tuned"
        assert plan.times == plan_edit({**mine, "edit": EditConfig().model_dump()}, task).times
        assert plan_edit(header_of(resolve("shapes").config, source="shapes"), task).source == f"tuned for {task}"
    without = {key: value for key, value in mine.items() if key != "edit"}
    assert edit_settings(without) == EditConfig()  # nor those of the preset that it names


def test_a_teacher_nobody_named_is_of_the_same_pictures():
    faces = resolve("shapes", family="cd", flags={"data.path": "faces"}).config
    shapes = resolve("shapes", family="cd").config
    of_faces = header_of(
        resolve("shapes", family="edm", flags={"data.path": "faces"}).config, source="folder of images"
    )
    of_shapes = header_of(resolve("shapes", family="edm").config, source="shapes")
    assert is_teacher_of(faces, of_faces) and is_teacher_of(shapes, of_shapes)
    assert not is_teacher_of(faces, of_shapes) and not is_teacher_of(shapes, of_faces)
    assert EvalConfig(**of_shapes["eval"]).reference == "shapes"


@pytest.mark.parametrize(("recipe", "figure"), [("meanflow", 2.92), ("soflow", 2.86)])
def test_what_published_figures_rest_on_is_in_the_preset(recipe, figure):
    """EDM's augmentation without turning upside down and rotation: six numbers that the network is told."""
    config = resolve("cifar10", recipe=recipe).config
    assert config.recipe.expected.nfe1 == figure
    assert (config.recipe.augment.p, config.recipe.augment.labels, config.network.augment_labels) == (0.12, 6, 6)
