"""Latents of an autoencoder: encoded, drawn anew, trained on, decoded; and what is refused."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool import models
from cmtool.config.load import resolve
from cmtool.data import latents
from cmtool.data.packed import latents_writer, read_packed
from cmtool.errors import DataError, UserError, install_extra
from cmtool.evaluation.models import make_images
from cmtool.evaluation.samples import image_shape
from cmtool.samplers.plan import plan_sampling
from cmtool.training.batches import Batches

LATENT = {"autoencoder": "vae", "hash": "0" * 16, "norm": "sd", "shift": [0.0] * 4, "scale": [1.0] * 4,
          "pixels": [3, 16, 16]}  # fmt: skip


def written(path, count=6, seed=0, **changes):
    """A packed file of latents with means of their own and deviations of .1."""
    random = np.random.default_rng(seed)
    with latents_writer(path, 8, 8) as writer:
        for _ in range(count):
            mean = random.normal(size=(4, 8, 8))
            writer.append_planar(np.concatenate([mean, np.full((4, 8, 8), 0.1)]).astype(np.float16), None)
        writer.finish({"source": "latents", "found": count, "latent": {**LATENT, **changes}})
    return path


def test_a_latent_is_drawn_anew_whenever_it_is_seen(tmp_path):
    data = read_packed(written(tmp_path / "z.cmdata", count=2))
    assert (len(data), data.channels, data.resolution, data.float_samples) == (2, 4, 8, False)
    config = resolve("folder64", sets=["data.resolution=16", "train.batch_size=64"]).config
    batches = Batches(config.model_copy(update={"data": config.data.model_copy(update={"flip": False})}), data,
                      torch.device("cpu"), torch.float32)  # fmt: skip
    seen = torch.cat([batches.take(step, 0, 64)[0] for step in range(20)])
    near = (seen[:, None] - data.batch(torch.arange(2))[0][None]).flatten(2)
    which = near.square().mean(2).argmin(1)
    off = near[torch.arange(len(seen)), which]
    assert off.std() == pytest.approx(0.1, rel=0.01)
    assert not torch.equal(seen[0], seen[2]) and which.float().mean() == 0.5
    assert torch.equal(batches.take(3, 8, 4)[0], batches.take(3, 0, 64)[0][8:12])


@pytest.mark.parametrize(
    "changes", [{"shift": [0.0]}, {"scale": None}, {"pixels": [3]}, {"hash": 3}, {"autoencoder": None}]
)
def test_a_damaged_header_is_refused(tmp_path, changes):
    with pytest.raises(DataError, match="damaged"):
        read_packed(written(tmp_path / "z.cmdata", **changes))


def test_latents_and_presets_of_other_pictures(tmp_path, cmtool, workdir):
    written(workdir / "z.cmdata")
    done = cmtool("train-ct", "--preset", "folder64", "--data", "z.cmdata", "--steps", 2)
    assert done.code != 0
    assert "holds latents of images of 16 pixels and 3 channels; the preset wants 64 and 3" in done.err
    assert "--set data.resolution=16" in done.err
    done = cmtool("train-ct", "--preset", "folder64", "--data", "z.cmdata", "--set", "data.resolution=16",
                  "--set", "network.channel_mult=[1,1,1,1,1]", "--steps", 2)  # fmt: skip
    assert done.code != 0 and "the latents are 8 x 8" in done.err
    done = cmtool("data", "show", "z.cmdata")
    assert done.code == 0 and "Traceback" not in done.err
    done = cmtool("data", "make", "z.cmdata", "--resolution", 16, "--out", "y.cmdata")
    assert done.code != 0 and "holds latents, which are not packed again" in done.err


def test_without_the_package_the_sentence_names_it(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    latents.open_autoencoder.cache_clear()
    with pytest.raises(UserError, match="latents need the package 'diffusers'") as caught:
        latents.open_autoencoder(str(tmp_path))
    assert caught.value.hint == install_extra("latent")


def autoencoder(folder, **changes):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra 'latent'")
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16,
             "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip
    torch.manual_seed(0)
    made = diffusers.AutoencoderKL(**{**sizes, **changes}).eval()
    made.save_pretrained(folder)
    return made


def photos(folder, count=20):
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{number:02}.png")


def test_from_pictures_to_pictures(cmtool, workdir):
    made = autoencoder(workdir / "vae")
    photos(workdir / "photos")
    done = cmtool("data", "make", "photos", "--resolution", 16, "--encode", "vae", "--norm", "sd", "--out", "z.cmdata")
    assert done.code == 0, done.err
    data = read_packed(workdir / "z.cmdata")
    pixels = torch.stack([
        torch.from_numpy(np.array(Image.open(workdir / f"photos/{number:02}.png"))) for number in range(20)
    ]).permute(0, 3, 1, 2) / 127.5 - 1  # fmt: skip
    with torch.no_grad():
        law = made.encode(pixels).latent_dist
        expected = made.decode(law.mean).sample.clamp(-1, 1)
    torch.testing.assert_close(data.batch(torch.arange(20))[0], law.mean * 0.18215, rtol=1e-3, atol=1e-3)
    half = data.batch(torch.arange(20))[0] / 0.18215
    with torch.no_grad():
        own = made.decode(half).sample.clamp(-1, 1)
    torch.testing.assert_close(latents.decoder(data.latent)(data.batch(torch.arange(20))[0]), own, rtol=0, atol=1e-5)
    assert (own - expected).abs().max() < 1e-2
    small = ("--set", "data.resolution=16", "--set", "network.channels=16", "--set", "network.channel_mult=[1,2]",
             "--set", "network.attention=[4]", "--set", "network.head_channels=16")  # fmt: skip
    done = cmtool("train-ct", "--preset", "folder64", "--data", "z.cmdata", *small, "--steps", 4, "--batch-size", 8,
                  "--out", "runs/z")  # fmt: skip
    assert done.code == 0, done.err
    done = cmtool("sample", "--model", "runs/z", "--num", 3, "--out", "s.npz")
    assert done.code == 0, done.err
    with np.load(workdir / "s.npz") as archive:
        assert archive["arr_0"].shape == (3, 16, 16, 3) and archive["arr_0"].dtype == np.uint8
        assert archive["arr_0"].std() > 1
    model = models.load(workdir / "runs/z")
    images = make_images(model, plan_sampling(model.header), range(3), batch_size=2)
    assert images.shape == image_shape(model.header) == (16, 16, 3)
    assert cmtool("interpolate", "--model", "runs/z", "--seeds", "1,2", "--num", 3, "--out", "w.png").code == 0
    done = cmtool("edit", "colorize", "photos/00.png", "--model", "runs/z", "--out", "e.png")
    assert done.code != 0 and "works on latents" in done.err
    latents.open_autoencoder.cache_clear()
    latents._known.cache_clear()
    made.decoder.conv_out.bias.data += 1
    made.save_pretrained(workdir / "vae")
    done = cmtool("sample", "--model", "runs/z", "--num", 3, "--out", "t.npz")
    assert done.code != 0 and "is another than the one that the latents were made with" in done.err


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.mkdir(), "is no folder of an autoencoder"),
        (
            lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")),
            "no autoencoder that diffusers reads",
        ),
        (lambda folder: autoencoder(folder, in_channels=1), "takes 1 channels; pictures have 3"),
        (lambda folder: autoencoder(folder, latent_channels=8), "makes 8.*use --norm sd"),
    ],
)
def test_folders_that_are_no_autoencoder(cmtool, workdir, make, words):
    pytest.importorskip("diffusers", reason="needs the extra 'latent'")
    photos(workdir / "photos", 1)
    make(workdir / "vae")
    done = cmtool("data", "make", "photos", "--resolution", 16, "--encode", "vae/", "--out", "z.cmdata")
    assert done.code != 0 and not (workdir / "z.cmdata").exists()
    assert re.search(words, done.err.replace("\n", " ")), done.err
