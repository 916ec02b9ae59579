"""How far a mask travels from the shell to the PNG, counted by tracing, and what another edit has to touch."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmtool.cli.app import run
from tests.cli.tiny import write_model
from tests.test_architecture import PACKAGE

# A shape that nothing else in the command has.
HEIGHT, WIDTH, SIDE = 21, 34, 8


def carries(value):
    """Whether a value is the mask, as a path, an image, an array or a tensor, or holds it under that name."""
    if isinstance(value, dict):
        return carries(value.get("mask"))
    if isinstance(value, Path):
        return value.name == "mask.png"
    if isinstance(value, Image.Image):
        return value.size == (WIDTH, HEIGHT) and value.mode == "L"
    if hasattr(value, "shape"):
        return tuple(value.shape) in ((HEIGHT, WIDTH), (SIDE, SIDE), (1, 1, SIDE, SIDE))
    held = getattr(value, "mask", None)
    return held is not None and carries(held)


def trip(*words):
    """Run a command; return the files of the package that hold the mask one after another: who is handed it, and to whom
    it is returned.
    """
    files: list[str] = []

    def note(frame):
        while frame is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
            frame = frame.f_back
        name = str(Path(frame.f_code.co_filename).relative_to(PACKAGE))
        if name != "cli/app.py" and (not files or files[-1] != name):
            files.append(name)

    def watch(frame, event, argument):
        if not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return
        count = frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount
        handed = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[:count]]
        if event == "call" and any(map(carries, handed)):
            note(frame)
        elif event == "return" and carries(argument):
            note(frame.f_back)

    sys.setprofile(watch)
    try:
        assert run([str(word) for word in words]) == 0
    finally:
        sys.setprofile(None)
    return files


def test_a_mask_from_the_shell_to_the_png(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save("photo.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:12, 7:20] = 255
    Image.fromarray(mask).save("mask.png")
    files = trip("edit", "inpaint", "--mask", "mask.png", "photo.png", "--paste", "--out", "o.png")
    assert files[:2] == ["cli/edit.py", "api/edit.py"] and files[-1] == "editing/regions.py", files
    assert {"data/decode.py", "editing/photos.py", "editing/tasks.py", "editing/loop.py"} <= set(files), files
    assert len(files) - 1 <= 10, files


def strings(path):
    return {node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)}


def test_an_edit_is_known_by_name_in_three_files():
    """What an edit is stands in its row; Python and the command line each add the function that is typed."""
    files = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if strings(path) & {"inpaint", "colorize"}
    }
    assert files == {"editing/tasks.py", "api/edit.py", "cli/edit.py"}


@pytest.mark.parametrize(("called", "places"), [("Editor", {"api/edit.py"}), ("write_samples", {"api/sample.py"})])
def test_editing_and_sampling_are_each_orchestrated_once(called, places):
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == called:
                found.add(str(path.relative_to(PACKAGE)))
    assert found == places
