"""import, export and models as a user types them."""

import json
import resource
import subprocess
import sys

import numpy as np
import torch

from cmtool import models
from cmtool.interop import hub
from cmtool.interop.published import DEMOS
from tests.interop import foreign
from tests.interop.own import own_model


def test_from_a_published_file_to_samples_and_back(cmtool, workdir):
    path, _ = foreign.write("openai_imagenet64", workdir)
    path.rename(workdir / "cd_imagenet64_lpips.pt")
    done = cmtool("import", "cd_imagenet64_lpips.pt", "--out", "m.safetensors", "--head-channels", 32)
    assert (done.code, done.out) == (0, "m.safetensors\n")
    for words in ("consistency distillation, LPIPS", "250 ln t", "3 x 64 x 64, 1000 classes", "80; 80,1.38237"):
        assert words in done.err
    assert "multipliers 1-2-3-4" in done.err
    info = cmtool("info", "m.safetensors", "--json")
    assert json.loads(info.out)["times"]["2"][0] == 80.0
    done = cmtool("export", "m.safetensors", "--format", "diffusers", "--out", "d")
    assert (done.code, done.out) == (0, "d\n")
    assert "timesteps=[22, 0]" in done.err
    done = cmtool("import", "d", "--out", "m2.safetensors", "--json")
    assert json.loads(done.out)["header"]["kind"] == "consistency"
    first, second = (models.load(workdir / name).network.state_dict() for name in ("m.safetensors", "m2.safetensors"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_trained_transformer_goes_out_and_comes_back(cmtool, workdir):
    run = ("--set", "network.kind=dit", "--set", "network.depth=2", "--set", "data.size=64", "--steps", 3)
    run += ("--set", "data.resolution=8")  # other pictures than the preset's: no search for sampling times
    done = cmtool("train-ct", "--preset", "shapes", *run, "--batch-size", 4, "--out", "runs/dit")
    assert done.code == 0, done.err
    done = cmtool("export", "runs/dit", "--format", "dit", "--out", "d.pt")
    assert (done.code, done.out) == (0, "d.pt\n")
    assert set(torch.load(workdir / "d.pt", weights_only=True)) == {"ema", "cmtool_header"}
    done = cmtool("import", "d.pt", "--out", "d2.safetensors")
    assert (done.code, done.out) == (0, "d2.safetensors\n")
    assert "dit, patch 2, width 64, depth 2, 2 heads" in done.err
    pictures = []
    for model in ("runs/dit", "d2.safetensors"):
        assert cmtool("sample", "--model", model, "--num", 4, "--out", "s.npz").code == 0
        with np.load(workdir / "s.npz") as samples:
            pictures.append(samples["arr_0"])
    assert np.array_equal(*pictures)
    assert pictures[0].std() > 0.3
    own_model(workdir / "unet.safetensors", side=8)
    done = cmtool("export", "unet.safetensors", "--format", "dit", "--out", "u.pt")
    assert done.code == 1 and done.err.endswith("Hint: choose another --format; hub holds every model\n")
    assert not (workdir / "u.pt").exists()
    done = cmtool("train-ct", "--preset", "shapes", "--set", "network.kind=dit", "--set", "network.patch=5")
    assert done.code != 0 and "network.patch = 5 does not divide data.resolution = 16" in done.err


def test_samples_of_an_exported_pipeline_are_those_of_cmtool(cmtool, workdir):
    """The pipeline's formula with the exported weights and settings, against `cmtool sample` for the same noise."""
    own_model(workdir / "m.safetensors", side=8)
    assert cmtool("export", "m.safetensors", "--format", "diffusers", "--out", "d").code == 0
    done = cmtool("sample", "--model", "m.safetensors", "--seeds", "3,4", "--label", 1, "--label", 2, "--out", "s.npz")
    assert done.code == 0, done.err
    scheduler = json.loads((workdir / "d/scheduler/scheduler_config.json").read_text())
    assert cmtool("import", "d", "--out", "m2.safetensors").code == 0
    unet = models.load(workdir / "m2.safetensors").network
    from cmtool.rng import SampleStreams

    low, high, data = (scheduler[f"sigma_{name}"] for name in ("min", "max", "data"))
    x = high * SampleStreams([3, 4]).normal((3, 8, 8))
    t = torch.tensor([250 * np.log(high)] * 2, dtype=torch.float32)
    with torch.no_grad():
        raw = unet(x / (high**2 + data**2) ** 0.5, t, torch.tensor([1, 2]))
    x0 = data**2 / ((high - low) ** 2 + data**2) * x + (high - low) * data / (high**2 + data**2) ** 0.5 * raw
    image = ((x0.clamp(-1, 1) / 2 + 0.5) * 255).round().permute(0, 2, 3, 1).numpy()
    with np.load(workdir / "s.npz") as samples:
        assert np.abs(samples["arr_0"].astype(float) - image).max() <= 1
        assert samples["arr_0"].std() > 10


def test_bad_input_is_one_sentence(cmtool, workdir):
    (workdir / "x.pt").write_text("not a model at all")
    for words, code, said in (
        (("import", "x.pt", "--out", "m.safetensors"), 1, "no file that is known here"),
        (("import", "none.pt", "--out", "m.safetensors"), 1, "none.pt does not exist"),
        (("import", "x.pt"), 2, "--out"),
        (("import", "x.pt", "--out", "m", "--form", "gan"), 2, "--form"),
        (("export", "none.safetensors", "--format", "openai", "--out", "o"), 1, "no model at none.safetensors"),
        (("export", "m.safetensors", "--format", "gguf", "--out", "o"), 2, "--format"),
        (
            ("export", "m.safetensors", "--format", "openai", "--out", "o", "--push", "a/b"),
            2,
            "--push belongs to --format hub",
        ),
        (("export", "m.safetensors", "--format", "hub", "--out", "o", "--dry-run"), 2, "--dry-run belongs to --push"),
        (("import", "openai/cd_imagenet64_l2", "--out", "m.safetensors"), 1, "CMTOOL_OFFLINE forbids"),
        (("import", "openai/cd_imagenet64_l2", "--out", "m", "--form", "edm"), 2, "translated by its name"),
        (("sample", "--model", "openai/cd_imagenet64_l2"), 1, "CMTOOL_OFFLINE forbids"),
        (("sample", "--model", "openai/cd_imagenet64_l3"), 1, "Did you mean openai/cd_imagenet64_l2?"),
    ):
        done = cmtool(*words)
        assert done.code == code, (words, done)
        assert said in done.err
        assert "Traceback" not in done.err
    assert sorted(entry.name for entry in workdir.iterdir()) == ["x.pt"]


def test_models_lists_what_can_be_named(cmtool, workdir):
    own_model(workdir / "runs/mine/model.safetensors")
    document = json.loads(cmtool("models", "--json").out)
    assert [row["name"] for row in document["runs"]] == ["runs/mine"]
    assert len(document["published"]) == 12
    row = next(row for row in document["published"] if row["name"] == "openai/cd_imagenet64_lpips")
    assert (row["license"], row["bytes"], row["fid"], row["cached"]) == (
        "MIT",
        1_183_597_068,
        {"1": 6.2, "2": 4.7},
        None,
    )
    text = cmtool("models").out
    assert "openai/ct_cat256" in text and "2.1 GB" in text and "6.2 (1), 4.7 (2)" in text and "runs/mine" in text
    assert [row["name"] for row in document["demo"]] == [
        f"demo/{file.stem}" for file in sorted(DEMOS.glob("*.safetensors"))
    ]


def test_a_hub_folder_with_a_dry_push(cmtool, workdir, monkeypatch):
    own_model(workdir / "m.safetensors")
    done = cmtool(
        "export", "m.safetensors", "--format", "hub", "--out", "h", "--push", "me/digits", "--dry-run", "--json"
    )
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["push"]["repository"] == "me/digits" and set(document["push"]["files"]) == set(hub.FILES)
    done = cmtool("export", "m.safetensors", "--format", "hub", "--out", "h2", "--push", "me/digits")
    assert done.code == 1 and "CMTOOL_OFFLINE forbids uploading" in done.err
    done = cmtool("export", "m.safetensors", "--format", "hub", "--out", "h3", "--push", "nonsense", "--dry-run")
    assert done.code == 1 and "it is owner/name" in done.err


MEASURE = """
import resource, sys
from pathlib import Path
from cmtool.interop.reading import ImportOptions, import_model
import safetensors.torch, cmtool.interop.pickles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import_model(Path(sys.argv[1]), Path(sys.argv[2]), ImportOptions(head_channels=64))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_importing_takes_at_most_one_extra_copy(tmp_path):
    """A file of 60 MB, mapped into memory, may add itself and one copy to the process, and little else."""
    assert resource.RUSAGE_SELF == 0
    from cmtool.config.networks import network_config
    from cmtool.networks import build_network

    config = network_config(channels=64, channel_mult=(1, 2, 3, 4), num_blocks=2, attention=(8,), head_channels=64)
    with torch.device("meta"):
        shapes = build_network(config, channels=3, resolution=64).state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in shapes.items()}, tmp_path / "cd.pt")
    size = (tmp_path / "cd.pt").stat().st_size
    assert size > 60e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "cd.pt"), str(tmp_path / "m.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 2.4 * size
