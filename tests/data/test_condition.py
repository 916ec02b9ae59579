"""Pictures beside the input: what they are of images, that training and sampling see the right ones, and refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from cmtool.config.condition import parse_condition
from cmtool.config.load import resolve
from cmtool.config.schema import DataConfig
from cmtool.data.condition import derived, own_conditions, picture_conditions, split
from cmtool.data.load import load_dataset
from cmtool.errors import ConfigError, DataError, UserError
from cmtool.evaluation.models import make_images
from cmtool.models import beside, build_model
from cmtool.samplers.plan import plan_sampling
from cmtool.training.inherit import adopt

DATA = {"source": "shapes", "resolution": 16, "channels": 3, "num_classes": None, "float_samples": False}


def header(condition, network=None, **more):
    network = network or {"kind": "adm", "channels": 8, "channel_mult": [1], "head_channels": 8}
    data = {**DATA, **({"condition": condition} if condition else {})}
    return {"kind": "consistency", "network": network, "process": {}, "data": data, **more}


def live(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.network.parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return model.eval()


def test_pictures_by_hand():
    image = torch.tensor([[0.0, 1.0, 0.0, 0.0]] * 4).expand(1, 3, 4, 4)
    small = derived(image, parse_condition("superres:2", 3, 4))
    assert torch.equal(small[0, 0], torch.tensor([[0.5, 0.5, 0.0, 0.0]] * 4)) and small.shape == (1, 3, 4, 4)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    torch.testing.assert_close(derived(red, parse_condition("gray", 3, 4)), torch.full((1, 1, 4, 4), 2 * 0.299 - 1))
    edges = derived(image, parse_condition("edges", 3, 4))
    torch.testing.assert_close(edges[0, 0, 1], 2 * torch.tensor([0.5, 0.0, 0.5, 0.0]) - 1)
    step = derived(torch.tensor([-1.0, -1.0, 1.0, 1.0]).expand(1, 1, 4, 4), parse_condition("edges", 1, 4))
    assert torch.equal(step[0, 0, 2], torch.tensor([-1.0, 1.0, 1.0, -1.0]))


@pytest.mark.parametrize(
    ("preset", "sets", "words"),
    [
        (
            "shapes",
            ["data.condition=superres:3"],
            "'superres:3' does not divide the side of 16 pixels; choose superres:2",
        ),
        ("shapes", ["data.condition=superres"], "choose superres:2, superres:4, superres:8, superres:16"),
        ("digits", ["data.condition=gray"], "is for images of three channels, and these have 1"),
        ("toy2d", ["data.condition=edges"], "data.condition is a picture, and these data are points"),
        ("shapes", ["data.condition=gray", "recipe.coupling.kind=teacher"], "stores pairs that have no picture"),
        ("shapes", ["data.condition=grey"], "'grey' is none of superres:N, gray, edges"),
    ],
)
def test_conditions_that_make_no_sense_are_refused(preset, sets, words):
    with pytest.raises(ConfigError, match=words):
        resolve(preset, family="ct", sets=sets)


@pytest.mark.parametrize("kind", ["adm", "song", "edm2", "dit"])
def test_every_network_sees_the_picture_and_answers_in_the_channels_of_the_image(kind):
    network = {"kind": kind, "channels": 16, "channel_mult": [1, 2], "head_channels": 16}
    model = live(build_model(header("gray", network)))
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.full((2,), 5.0)
    with pytest.raises(UserError, match=r"conditioned on a picture \(gray\), and gets none here"):
        model(x, t)
    pictures = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    with beside(pictures), torch.no_grad():
        both = model(x, t)
    with beside(pictures[:1]), torch.no_grad():
        one = model(x, t)
    assert both.shape == x.shape
    torch.testing.assert_close(both[0], one[0], rtol=1e-4, atol=1e-5)
    assert (both[1] - one[1]).abs().max() > 1e-3
    assert model.image_shape == (3, 16, 16)


def test_a_teacher_must_see_the_same_picture():
    run = resolve("shapes", family="cd", sets=["data.condition=gray", "data.labels=false"]).config
    source = {**header("gray"), "process": run.process.model_dump(), "network": run.network.model_dump()}
    assert adopt(run, source).data.condition == "gray"
    for other, words in ((None, "is not conditioned on a picture; the run is conditioned on gray"),
                         ("edges", "is conditioned on edges; the run is conditioned on gray")):  # fmt: skip
        data = {**DATA, **({"condition": other} if other else {})}
        with pytest.raises(UserError, match=words):
            adopt(run, {**source, "data": data})


def pairs(folder, names, side=16, seed=0, gray=False):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        shape = (side, side) if gray else (side, side, 3)
        Image.fromarray(np.random.default_rng(seed + number).integers(0, 256, shape, dtype=np.uint8)).save(
            folder / name
        )
    return folder


def test_pairs_are_told_by_their_names_and_turn_with_their_images(tmp_path):
    from cmtool.training.batches import Batches, batch_indices, flip_mask

    pairs(tmp_path / "photos", ["b.png", "a.png", "c.png"])
    pairs(tmp_path / "drawn", ["c.bmp", "b.bmp", "a.bmp"], seed=50)
    table = DataConfig(source="folder", path=str(tmp_path / "photos"), resolution=16, condition=str(tmp_path / "drawn"))
    data = load_dataset(table)
    # "a" was the second photo and is the third drawing.
    for found, seed in ((data.images[0], 1), (data.beside[0], 52)):
        drawn = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        assert np.array_equal(found.permute(1, 2, 0).numpy(), drawn)
    plain = load_dataset(table.model_copy(update={"condition": None}))
    assert plain.fingerprint != data.fingerprint and plain.beside is None
    config = resolve("folder64", sets=["data.resolution=16", f"data.path={table.path}", f"data.condition={table.condition}",
                                       "data.flip=true", "train.batch_size=16"]).config  # fmt: skip
    images, *_ = Batches(config, data, torch.device("cpu"), torch.float32).take(3, 4, 8)
    x0, pictures = split(images, parse_condition(table.condition, 3, 16), 3)
    chosen, flips = batch_indices(0, 3, 16, 3)[4:12], flip_mask(0, 3, 16)[4:12]
    assert flips.any() and not flips.all()
    for row, (index, flip) in enumerate(zip(chosen, flips, strict=True)):
        for found, bank in ((x0, data.batch(index[None])[0]), (pictures, data.pairs(index[None]))):
            assert torch.equal(found[row], bank[0].flip(-1) if flip else bank[0])
    assert torch.equal(own_conditions({**DATA, "source": "folder", "path": table.path, "condition": table.condition})([4]),
                       data.pairs(torch.tensor([1])))  # fmt: skip


def test_conditions_of_own_pictures_are_those_that_were_held_out(tmp_path):
    names = [f"{number:02}.png" for number in range(40)]
    pairs(tmp_path / "photos", names)
    pairs(tmp_path / "drawn", names, seed=100)
    place = {"path": str(tmp_path / "photos"), "resolution": 16, "holdout": 0.5}
    for condition in ("superres:4", str(tmp_path / "drawn")):
        held = load_dataset(DataConfig(source="folder", condition=condition, **place)).held_out
        header = {**DATA, "source": "folder of images", "condition": condition, **place}
        assert 10 <= len(held) <= 30
        index = torch.tensor([2, 0])
        beside = held.pairs(index)
        expected = derived(held.batch(index)[0], parse_condition(condition, 3, 16)) if beside is None else beside
        torch.testing.assert_close(own_conditions(header)([2, len(held)]), expected)


@pytest.mark.parametrize(
    ("names", "side", "words"),
    [
        (["a.png"], 16, "1 of the 2 images in .*photos have no picture of their name in .*drawn, e.g. b"),
        (["a.png", "b.png", "c.png"], 16, "1 of the 3 images in .*drawn have no picture of their name in .*photos"),
        (["a.png", "b.png", "b.bmp"], 16, "differ in their endings alone"),
        (["a.png", "b.png"], 8, "no usable image"),
    ],
)
def test_pairs_that_do_not_match_are_refused(tmp_path, names, side, words):
    pairs(tmp_path / "photos", ["a.png", "b.png"])
    pairs(tmp_path / "drawn", names, side=side)
    table = DataConfig(source="folder", path=str(tmp_path / "photos"), resolution=16, condition=str(tmp_path / "drawn"))
    with pytest.raises(DataError, match=words):
        load_dataset(table)


def test_a_folder_of_pairs_that_is_not_there(tmp_path):
    pairs(tmp_path / "photos", ["a.png"])
    table = DataConfig(source="folder", path=str(tmp_path / "photos"), resolution=16, condition=str(tmp_path / "no"))
    with pytest.raises(DataError, match="no does not exist"):
        load_dataset(table)


def test_pictures_of_a_user_become_what_training_saw(tmp_path):
    data = load_dataset(DataConfig(source="shapes", resolution=16, channels=3, size=8))
    images, _ = data.batch(torch.arange(8))
    seen = parse_condition("superres:4", 3, 16)
    pixels = data.images[5].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    named = {**DATA, "condition": "superres:4"}
    torch.testing.assert_close(picture_conditions(tmp_path / "whole.png", named)([0, 7]), derived(images[[5, 5]], seen))
    small = np.ascontiguousarray(pixels[::4, ::4])
    Image.fromarray(small).save(tmp_path / "small.png")
    found = picture_conditions(tmp_path / "small.png", named)([0])[0].permute(1, 2, 0).numpy()
    assert np.allclose(found[1::4, 2::4], small / 127.5 - 1, atol=1e-6)
    with pytest.raises(DataError, match="no such file"):
        picture_conditions(tmp_path / "no.png", named)


def test_samples_to_be_judged_are_conditioned_on_pictures_that_training_did_not_see():
    seen = []
    model = live(build_model(header("superres:4")))
    model.network.register_forward_pre_hook(lambda module, given: seen.append(given[0][:, 3:]))
    images = make_images(model, plan_sampling(model.header, steps=1), range(3, 9), batch_size=4)
    assert images.shape == (16, 16, 3)
    table = DataConfig(source="shapes", resolution=16, channels=3, kind="heldout")
    own = load_dataset(table).batch(torch.arange(3, 9))[0]
    torch.testing.assert_close(torch.cat(seen), derived(own, parse_condition("superres:4", 3, 16)))


def test_trained_and_sampled_as_typed(cmtool, workdir):
    # At another side than the preset's, so that no sampling times are searched for.
    sets = ("data.condition=superres:4", "data.size=64", "data.resolution=8", "network.channels=16")
    run = [word for text in sets for word in ("--set", text)]
    done = cmtool("train-ct", "--preset", "shapes", *run, "--steps", 4, "--batch-size", 8, "--out", "runs/c")
    assert done.code == 0, done.err
    assert "superres:4" in cmtool("info", "runs/c").out
    Image.fromarray(np.full((2, 2, 3), 200, np.uint8)).save(workdir / "face.png")
    levels = ("--times", "0.5", "--num", 2, "--seed", 0, "--out", "s.npz")
    samples = []
    for more in ((), ("--condition", "face.png"), ("--condition", "face.png")):
        (workdir / "s.npz").unlink(missing_ok=True)
        done = cmtool("sample", "--model", "runs/c", *levels, *more)
        assert done.code == 0, done.err
        with np.load(workdir / "s.npz") as archive:
            samples.append(archive["arr_0"])
    assert np.array_equal(*samples[1:])
    for command, words in (
        (("sample", "--model", "demo/shapes", "--condition", "face.png"), "and this one was not"),
        (("sample", "--model", "runs/c", "--condition", "nowhere.png"), "nowhere.png does not exist"),
        (("edit", "colorize", "face.png", "--model", "runs/c", "--out", "e.png"), "conditioned on a picture"),
        (("export", "runs/c", "--format", "openai", "--out", "o.pt"), "no place for the picture"),
    ):
        done = cmtool(*command)
        assert done.code != 0 and words in done.err and "Traceback" not in done.err
