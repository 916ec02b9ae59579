"""Two models side by side, or a model and a feature network: classes meet by name, whatever numbers they have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cmtool as package
from cmtool.api.find import find_model
from cmtool.checkpoint import load_tensors, save_model
from cmtool.config.classes import class_map, class_places
from cmtool.errors import DataError
from cmtool.evaluation.consistency import measure_consistency
from tests.cli.tiny import write_model

ORDER = [3, 1, 0, 2]  # the new number of each class


def renumbered(source, target, names=None):
    """Copy a model with its classes in another order: by name it is the same model."""
    tensors, header = load_tensors(source)
    rows, old = torch.empty_like(tensors["label_emb.weight"]), header["data"]["class_names"]
    new = [""] * len(old)
    for index, place in enumerate(ORDER):
        rows[place], new[place] = tensors["label_emb.weight"][index], old[index]
    data = header["data"] | {"class_names": names or new}
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    save_model(target, tensors | {"label_emb.weight": rows}, header | {"data": data})
    return Path(target)


@pytest.fixture
def shapes(workdir):
    """The model that came along, and the same with its classes in another order."""
    return find_model("demo/shapes").path, renumbered(find_model("demo/shapes").path, "other.safetensors")


def test_places_of_names():
    assert class_places(["b", "a"], ["a", "b", "c"], "it") == [1, 0]
    assert class_places(["Cat"], ["dog", "cat"], "it") == [1]
    assert class_places(["a", "A"], ["A", "a"], "it") == [1, 0]
    with pytest.raises(DataError, match="does not have: c"):
        class_places(["a", "c"], ["a", "b"], "it")
    with pytest.raises(DataError, match="several"):
        class_places(["a"], ["a", "a"], "it")
    table = {"num_classes": 2, "class_names": ["a", "b"]}
    assert class_map(table, {"num_classes": 2, "class_names": ["b", "a"]}, "it") == [1, 0]
    assert class_map(table, table, "it") is None and class_map(table, {"num_classes": None}, "it") is None
    assert class_map(table, {"num_classes": 2}, "it") is None
    with pytest.raises(DataError, match="the model has 2 classes and it has 3"):
        class_map({"num_classes": 2}, {"num_classes": 3}, "it")


def test_the_agreement_with_a_class_goes_by_its_name(cmtool, shapes):
    found = []
    for number, model in enumerate(shapes):
        for label in ("circle", "plus"):
            made = cmtool("sample", "--model", model, "--label", label, "--num", 24, "--out", f"{number}{label}.npz")
            assert made.code == 0, made.err
        words = (
            "eval",
            f"{number}circle.npz",
            f"{number}plus.npz",
            "--ref",
            "shapes",
            "--metrics",
            "classes",
            "--json",
        )
        rows = json.loads(cmtool(*words).out)["results"]
        found.append([row["metrics"]["class_agreement"] for row in rows])
    assert found[0] == found[1] and min(found[0]) > 0.9


def test_classes_that_the_features_do_not_know_have_no_agreement(workdir):
    strange = renumbered(find_model("demo/shapes").path, "strange.safetensors", ["cat", "dog", "cow", "hen"])
    assert "class_agreement" not in package.evaluate(package.load(strange, "cpu"), "shapes", num=8)


def labeled(kind, name, **more):
    return write_model(Path(), name, kind=kind, num_classes=4, names=["circle", "square", "triangle", "plus"], **more)


def test_a_model_is_asked_for_the_class_that_its_teacher_follows(workdir):
    teacher, model = labeled("diffusion", "t"), labeled("consistency", "m")
    other = renumbered(model, "runs/n/model.safetensors")
    load = lambda path: package.load(path, "cpu").module  # noqa: E731
    found = [measure_consistency(load(path), load(teacher), count=8, levels=4).figures() for path in (model, other)]
    assert found[0] == found[1]
    strange = renumbered(model, "runs/s/model.safetensors", ["a", "b", "c", "d"])
    with pytest.raises(DataError, match="does not have: circle"):
        measure_consistency(load(strange), load(teacher), count=8, levels=4)


def test_a_picture_goes_to_its_noise_as_the_class_of_the_name(cmtool):
    model, teacher = labeled("consistency", "m"), labeled("diffusion", "t")
    other = renumbered(teacher, "runs/u/model.safetensors")
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"{index}.png")
    for one, out in ((teacher, "a"), (other, "b")):
        words = ("interpolate", "--images", "0.png", "1.png", "--model", model, "--teacher", one, "--label", "circle")
        typed = cmtool(*words, "--num", 4, "--inversion-steps", 4, "--out", f"{out}.png")
        assert typed.code == 0, typed.err
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(Image.open("b.png")))
