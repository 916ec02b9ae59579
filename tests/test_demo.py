"""The models that come along: small, told by their header, and made by the script that says so."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import cmtool
from cmtool.checkpoint import load_tensors, read_header
from cmtool.interop.published import DEMOS, demo_names
from tests.conftest import ROOT
from tests.reporting.run_makers import write_run


def _script():
    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "benchmarks" / "make_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["avatars", "digits", "shapes"])
def test_a_demo_is_small_and_says_how_it_was_made(name):
    path = DEMOS / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"demo/{name} is not in this checkout: benchmarks/make_demo.py makes it")
    assert path.stat().st_size <= 6_000_000
    header = read_header(path)
    assert header["command"].startswith("cmtool train-") and header["preset"] == name
    assert isinstance(header["seed"], int) and header["figures"]["1"] > 0
    tensors, _ = load_tensors(path)
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert f"demo/{name}" in demo_names()
    samples = cmtool.load(f"demo/{name}", "cpu").sample(16)
    assert samples.std(0).mean() > 0.2  # not one picture sixteen times


def test_the_script_rounds_a_run_and_keeps_its_header(tmp_path, monkeypatch):
    script = _script()
    monkeypatch.setattr(script, "DEMOS", tmp_path)
    run = write_run(tmp_path / "runs", "digits-ict", recipe="ict", steps=50)
    path = script.make("digits", run, figures=False, count=10)
    before, after = cmtool.load(run, "cpu"), cmtool.load(path, "cpu")
    assert after.module.dtype == torch.float32
    assert torch.allclose(before.sample(4), after.sample(4), atol=0.1)
    assert path.stat().st_size < 0.6 * (run / "model.safetensors").stat().st_size
    header = read_header(path)
    assert header["command"] == "cmtool train-ct --preset digits --recipe ict --steps 50"
    assert (header["seed"], header["step"]) == (0, 50)
    assert not list(tmp_path.glob(".*"))


def test_the_script_names_the_teachers_command_too(tmp_path, monkeypatch):
    script = _script()
    monkeypatch.setattr(script, "DEMOS", tmp_path)
    teacher = write_run(tmp_path / "runs", "digits-edm", recipe="edm", steps=70)
    run = write_run(tmp_path / "runs", "digits-icd", recipe="icd", steps=50)
    settings = run / "config.toml"
    settings.write_text(f'teacher = "{teacher / "model.safetensors"}"\n' + settings.read_text())
    header = read_header(script.make("digits", run, figures=False, count=10))
    assert (
        header["command"] == "cmtool train-edm --preset digits --steps 70 && cmtool train-cd --preset digits --steps 50"
    )


def test_a_run_that_is_too_large_leaves_nothing(tmp_path, monkeypatch):
    script = _script()
    monkeypatch.setattr(script, "DEMOS", tmp_path / "demo")
    monkeypatch.setattr(script, "LARGEST", 101_000)
    run = write_run(tmp_path / "runs", "digits-ict", recipe="ict")
    with pytest.raises(SystemExit, match="more than a demo may have"):
        script.make("digits", run, figures=False, count=10)
    assert not (tmp_path / "demo").exists()
