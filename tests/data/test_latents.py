"""Latents of an autoencoder: encoded, drawn anew, trained on, decoded; and what is refused."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import cmtool as package
from cmtool import models
from cmtool.config.load import resolve
from cmtool.data import latents
from cmtool.data.packed import latents_writer, read_packed
from cmtool.editing.latent import in_latents
from cmtool.editing.photos import photo_of
from cmtool.editing.tasks import Asked, inpaint
from cmtool.errors import DataError, UserError, install_extra
from cmtool.evaluation.models import make_images
from cmtool.evaluation.samples import image_shape
from cmtool.samplers.plan import plan_sampling
from cmtool.studio.work import Workshop
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
    assert done.err.endswith("Hint: add --set data.resolution=16\n")
    done = cmtool("train-ct", "--preset", "folder64", "--data", "z.cmdata", "--set", "data.resolution=16",
                  "--set", "network.channel_mult=[1,1,1,1,1]", "--steps", 2)  # fmt: skip
    assert done.code != 0 and "the latents are 8 x 8" in done.err
    done = cmtool("train-ct", "--preset", "imagenet256", "--data", "z.cmdata", "--steps", 2)
    assert done.code != 0 and "holds latents of images of 16 pixels" in done.err
    assert done.err.endswith("Hint: add --set data.resolution=16 --set 'data.latent=[4, 8]'\n")
    photos(workdir / "photos", 1)
    done = cmtool("train-ct", "--preset", "imagenet256", "--data", "photos", "--steps", 2)
    assert done.code != 0 and "holds pictures, and the preset trains on latents" in done.err and "--encode" in done.err
    done = cmtool("train-ct", "--preset", "imagenet256", "--data", "z.cmdata", "--set", "data.resolution=16")
    assert done.code != 0 and "the preset wants 4 and 32" in done.err
    done = cmtool("data", "show", "z.cmdata")
    assert done.code == 0 and "Traceback" not in done.err
    done = cmtool("data", "make", "z.cmdata", "--resolution", 16, "--out", "y.cmdata")
    assert done.code != 0 and "holds latents, which are not packed again" in done.err


def test_a_plan_is_for_pictures(cmtool, workdir):
    """Of latents it would say "8 x 8, color": neither the sizes of networks nor the words would fit."""
    written(workdir / "z.cmdata")
    for words in (("plan",), ("train-ct", "--time", "1m")):
        done = cmtool(*words, "--data", "z.cmdata")
        assert done.code == 1 and "z.cmdata holds latents, and plans are made for pictures" in done.err
        assert "a preset for pictures of 16 pixels" in done.err
    assert sorted(path.name for path in workdir.iterdir()) == ["z.cmdata"]


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
    folder.mkdir(exist_ok=True)
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")


SMALL = ("--set", "data.resolution=16", "--set", "network.channels=16", "--set", "network.channel_mult=[1,2]",
         "--set", "network.attention=[4]", "--set", "network.head_channels=16", "--set", "data.holdout=0.2")  # fmt: skip


def as_floats(folder, count=20):
    read = [np.array(Image.open(folder / f"{number:03}.png")) for number in range(count)]
    return torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2) / 127.5 - 1


def trained(cmtool, workdir):
    """200 pictures encoded, 20 steps on them; the autoencoder."""
    made = autoencoder(workdir / "vae")
    photos(workdir / "photos", 200)
    done = cmtool("data", "make", "photos", "--resolution", 16, "--encode", "vae", "--norm", "sd", "--out", "z.cmdata")
    assert done.code == 0, done.err
    done = cmtool("train-ct", "--preset", "folder64", "--data", "z.cmdata", *SMALL, "--steps", 20, "--batch-size", 8,
                  "--out", "runs/z")  # fmt: skip
    assert done.code == 0, done.err
    return made


def test_from_pictures_to_pictures(cmtool, workdir):
    made = trained(cmtool, workdir)
    data, pixels = read_packed(workdir / "z.cmdata"), as_floats(workdir / "photos")
    means = data.batch(torch.arange(20))[0]
    with torch.no_grad():
        law = made.encode(pixels).latent_dist
        whole, own = (made.decode(z).sample.clamp(-1, 1) for z in (law.mean, means / 0.18215))
    decode, encode = latents.decoder(data.latent), latents.encoder(data.latent)
    torch.testing.assert_close(means, law.mean * 0.18215, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(decode(means), own, rtol=0, atol=1e-5)
    torch.testing.assert_close(decode(encode(pixels)), whole, rtol=0, atol=1e-5)
    assert (own - whole).abs().max() < 1e-2  # what half precision costs
    done = cmtool("sample", "--model", "runs/z", "--num", 3, "--out", "s.npz")
    assert done.code == 0, done.err
    with np.load(workdir / "s.npz") as archive:
        assert archive["arr_0"].shape == (3, 16, 16, 3) and archive["arr_0"].dtype == np.uint8
        assert archive["arr_0"].std() > 1
    model = models.load(workdir / "runs/z")
    images = make_images(model, plan_sampling(model.header), range(3), batch_size=2)
    assert images.shape == image_shape(model.header) == (16, 16, 3)
    assert cmtool("interpolate", "--model", "runs/z", "--seeds", "1,2", "--num", 3, "--out", "w.png").code == 0
    for reference in ("photos", "runs/z", "z.cmdata"):  # those of the run and of the file are decoded
        done = cmtool("eval", "--model", "runs/z", "--ref", reference, "--num", 50, "--features", "shapes",
                      "--metrics", "fid", "--json")  # fmt: skip
        assert done.code == 0 and json.loads(done.out)["results"][0]["metrics"]["fid"] > 0, done.err
    done = cmtool("data", "show", "z.cmdata", "--grid", "g.png", "--num", 4)
    assert done.code == 0 and "latents of" in done.out + done.err, done.err
    assert Image.open(workdir / "g.png").size >= (32, 32)
    assert cmtool("report", "runs/z", "--out", "r.html").code == 0
    shop = Workshop(package.load(workdir / "runs/z", "cpu"), "runs/z")
    assert shop.about({})["tasks"] == ["inpaint", "stroke"] and shop.side == 16
    assert shop.sample({})["images"][0].startswith("data:image/png")
    edits_of_latents(cmtool, workdir)
    from_elsewhere(cmtool, workdir)
    latents.open_autoencoder.cache_clear()
    latents._known.cache_clear()
    made.decoder.conv_out.bias.data += 1
    made.save_pretrained(workdir / "vae")
    done = cmtool("sample", "--model", "runs/z", "--num", 3, "--out", "t.npz")
    assert done.code != 0 and "is another than the one that the latents were made with" in done.err


def from_elsewhere(cmtool, workdir):
    """A model decodes in whatever folder it is asked; where its autoencoder is gone, a copy of that name serves."""
    ask = ("sample", "--model", workdir / "runs/z", "--num", 1, "--out")
    for name, moved in (("there", None), ("copied", workdir / "copied/vae"), ("gone", workdir / "moved")):
        latents.open_autoencoder.cache_clear()
        latents._known.cache_clear()
        (workdir / name).mkdir()
        os.chdir(workdir / name)
        if moved is not None:
            (workdir / "vae").rename(moved)
        done = cmtool(*ask, "e.npz")
        if moved is not None:
            moved.rename(workdir / "vae")
        assert (done.code == 0) == (name != "gone"), done.err
    assert "that the latents were made with is not here" in done.err and "Hint: put its folder back" in done.err
    assert not (workdir / "gone/e.npz").exists()
    os.chdir(workdir)


def test_a_name_that_is_no_folder_is_not_asked_of_the_network(cmtool, workdir, monkeypatch):
    """`vae/` can only be a folder; `owner/name` may be on the hub, which `CMTOOL_OFFLINE` forbids to ask."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra 'latent'")
    asked = []
    real = diffusers.AutoencoderKL.from_pretrained
    monkeypatch.setattr(
        diffusers.AutoencoderKL, "from_pretrained", lambda *a, **how: asked.append(how) or real(*a, **how)
    )
    photos(workdir / "photos", 1)
    make = ("data", "make", "photos", "--resolution", 16, "--out", "z.cmdata", "--encode")
    for name, words in (("vae/", "there is no such folder"), ("some/vae", "is no folder here, and CMTOOL_OFFLINE")):
        done = cmtool(*make, name)
        assert done.code == 1 and words in done.err and "Hint: name the folder of a diffusers AutoencoderKL" in done.err
    assert [how["local_files_only"] for how in asked] == [True]


def edits_of_latents(cmtool, workdir):
    """Inpainting keeps every known byte; strokes work; what has no meaning in latents is refused with the reason."""
    mask = np.zeros((16, 16), np.uint8)
    mask[3:9, 4:11] = 255
    Image.fromarray(mask).save(workdir / "m.png")
    other = np.array(Image.open(workdir / "photos/000.png"))
    before = other.copy()
    other[mask > 0] = 7
    Image.fromarray(other).save(workdir / "other.png")
    for name in ("photos/000.png", "other.png"):
        done = cmtool("edit", "inpaint", name, "--mask", "m.png", "--model", "runs/z", "--out", f"e-{name[-7:]}")
        assert done.code == 0, done.err
    first, second = (np.array(Image.open(workdir / f"e-{name}")) for name in ("000.png", "her.png"))
    assert np.array_equal(first, second)  # what lies under the mask is never seen
    assert np.array_equal(first[mask == 0], before[mask == 0]) and not np.array_equal(first[mask > 0], before[mask > 0])
    assert cmtool("edit", "stroke", "other.png", "--model", "runs/z", "--out", "stroke.png").code == 0
    Image.fromarray(255 - np.eye(16, dtype=np.uint8) * 255).save(workdir / "most.png")
    done = cmtool("edit", "inpaint", "other.png", "--mask", "most.png", "--model", "runs/z", "--out", "n.png")
    assert done.code != 0 and "leaves no 2 x 2 pixels wholly known" in done.err
    for task, words, why in (
        ("colorize", (), "no part of a latent is the luma"),
        ("superres", ("--factor", 2), "is a mean of pixels"),
        ("deblur", ("--sigma", 1), "is no linear map of latents"),
        ("denoise", ("--sigma", 0.3), "is no Gaussian noise in latents"),
    ):
        done = cmtool("edit", task, "photos/000.png", *words, "--model", "runs/z", "--out", "n.png")
        said = " ".join(done.err.split())
        assert done.code != 0 and "works on latents, and" in said and why in said, said
    assert not (workdir / "n.png").exists()


def test_a_cell_is_known_only_where_all_of_its_pixels_are(monkeypatch):
    seen = []

    def stand_in(latent):
        return lambda x: seen.append(x) or torch.nn.functional.avg_pool2d(x, 4).repeat(1, 2, 1, 1)[:, :4]

    monkeypatch.setattr("cmtool.editing.latent.encoder", stand_in)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16))
    mask[4:9, 4:8], mask[15, 15] = 1.0, 0.2  # one row into the third cell down; a soft corner
    subject = in_latents(inpaint(photo_of(pixels, 3), 16, Asked(mask=mask)), LATENT)
    weight = subject.operator(subject.y).weight
    expected = torch.ones(4, 4)
    expected[1, 1] = expected[2, 1] = expected[3, 3] = 0
    assert torch.equal(weight[0, 0], expected)
    filled_in = seen[0][0].permute(1, 2, 0).numpy()
    assert np.allclose(filled_in[mask == 0], pixels[mask == 0] / 127.5 - 1, atol=1e-6)
    assert not np.allclose(filled_in[mask == 1], pixels[mask == 1] / 127.5 - 1, atol=0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.mkdir(), "is no folder of an autoencoder"),
        (
            lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")),
            "no autoencoder that diffusers reads",
        ),
        (lambda folder: autoencoder(folder, in_channels=1), "vae/ encodes pictures of in_channels = 1, not 3"),
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
