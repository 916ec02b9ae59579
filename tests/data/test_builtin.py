import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as sklearn_digits

from cmtool.config.schema import DataConfig
from cmtool.data import describe, load_dataset, split_indices
from cmtool.data.shapes import (
    COLORS,
    GROUNDS,
    HELD_OUT,
    SHAPES,
    hashed_uniforms,
    shapes_attributes,
    shapes_images,
)
from cmtool.data.toy import KINDS, RING_NOISE, RING_RADIUS, toy2d_points
from cmtool.errors import DataError


def config(source, **kw):
    return DataConfig(**{"source": source, "resolution": 8, "channels": 1, "labels": True, **kw})


def shapes_image(index, resolution):
    return shapes_images(index, 1, resolution)[0][0]


def test_digits_are_the_scans():
    data, table = load_dataset(config("digits")), sklearn_digits()
    assert data.images.shape == (1797, 1, 8, 8) and data.images.dtype == torch.uint8
    assert torch.equal(data.labels, torch.from_numpy(table.target)) and data.num_classes == 10
    assert {round(v * 255 / 16 + 1e-9) for v in range(17)} == set(data.images.unique().tolist())
    assert np.abs(data.images[:, 0].numpy() / 255 - table.images / 16).max() <= 0.5 / 255 + 1e-9
    images, labels = data.batch(torch.tensor([5, 0]))
    assert images.dtype == torch.float32 and images.min() == -1 and labels.tolist() == [5, 0]


def test_digits_larger_in_color_in_parts_and_fewer():
    large = load_dataset(config("digits", resolution=16, channels=3))
    assert large.images.shape == (1797, 3, 16, 16) and torch.equal(large.images[:, 0], large.images[:, 2])
    train, held = load_dataset(config("digits", kind="train")), load_dataset(config("digits", kind="heldout"))
    assert len(train) == 1438 and len(held) == 359
    whole = sorted(map(bytes, load_dataset(config("digits")).images.numpy().reshape(1797, -1)))
    parts = [*train.images.numpy().reshape(1438, -1), *held.images.numpy().reshape(359, -1)]
    assert sorted(map(bytes, parts)) == whole
    assert len(load_dataset(config("digits", size=100))) == 100


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"source": "digits", "resolution": 4}, "not shrunk to 4"),
        ({"source": "digits", "channels": 2}, "1 or 3 channels"),
        ({"source": "digits", "kind": "trian"}, "Did you mean train"),
        ({"source": "shapes"}, "must be 3, not 1"),
        ({"source": "avatars", "resolution": 16}, "must be 3, not 1"),
        ({"source": "avatars", "resolution": 24, "channels": 3}, "a multiple of it, not 24"),
        ({"source": "toy2d"}, "2 channels and resolution 1"),
        ({"source": "toy2d", "channels": 2, "resolution": 1, "kind": "two_moon"}, "Did you mean two_moons"),
    ],
)
def test_impossible_requests_are_one_sentence(bad, says):
    with pytest.raises(DataError, match=says):
        load_dataset(config(**bad))


def test_labels_only_when_asked_for():
    data = load_dataset(config("digits", labels=False))
    assert data.labels is None and data.num_classes is None and data.batch(torch.arange(2))[1] is None
    assert describe(data) == ["digits: 1,797 images of 8 x 8 x 1"]
    assert describe(load_dataset(config("digits")))[1] == "10 classes, 174 to 183 images each"


def test_hash_is_splitmix64():
    # First outputs of SplitMix64 from seed 0 (reference implementation by Vigna, prng.di.unimi.it).
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert hashed_uniforms(0, 2, 2).reshape(-1).tolist() == [(v >> 11) * 2.0**-53 for v in known]
    u = hashed_uniforms(0, 20000, 8)
    assert np.abs(np.corrcoef(u.T) - np.eye(8)).max() < 0.03 and abs(u.mean() - 0.5) < 0.003


def test_a_shape_is_a_function_of_its_index():
    block, labels = shapes_images(0, 600, 16)
    for index in (0, 1, 511, 512, 599):
        assert np.array_equal(shapes_image(index, 16), block[index])
        assert SHAPES[labels[index]] == shapes_attributes(index).shape
    held, _ = shapes_images(HELD_OUT, 600, 16)
    assert not {image.tobytes() for image in held} & {image.tobytes() for image in block}
    assert np.bincount(labels).min() > 120


@pytest.mark.parametrize("index", range(12))
def test_a_shape_shows_its_attributes_at_every_resolution(index):
    said = shapes_attributes(index)
    small, large = shapes_image(index, 16), shapes_image(index, 64)
    middle = large[:, int(said.y * 64), int(said.x * 64)]
    assert tuple(middle) == COLORS[said.color]
    assert tuple(large[:, 0, 0]) == GROUNDS[said.upper] and tuple(large[:, 63, 63]) == GROUNDS[said.lower]
    assert said.upper != said.lower
    boxed = large.reshape(3, 16, 4, 16, 4).mean((2, 4))
    assert np.abs(boxed - small).mean() < 4


def test_areas_of_the_shapes():
    """Covered area against the closed form at a fine grid: circle pi r^2, square, plus and triangle."""
    for index in range(8):
        said = shapes_attributes(index)
        r, image = said.radius, shapes_image(index, 256).astype(int)
        ground = (np.arange(256) + 0.5)[:, None] / 256 > said.horizon
        plain = np.where(
            ground, np.array(GROUNDS[said.lower])[:, None, None], np.array(GROUNDS[said.upper])[:, None, None]
        )
        away = np.abs(image - plain).max(0) > 12
        covered = away.sum(1)[np.abs((np.arange(256) + 0.5) / 256 - said.horizon) > 0.01].sum() / 65536
        arm = 0.36 * r
        area = {
            "circle": np.pi * r * r,
            "square": (1.72 * r) ** 2,
            "plus": 8 * arm * r - 4 * arm**2,
            "triangle": (1.9 * r) ** 2 / 2,
        }
        assert covered == pytest.approx(area[said.shape], rel=0.12)


def test_shapes_are_spread_as_edm_expects():
    data = load_dataset(config("shapes", resolution=16, channels=3, size=1000))
    images, _ = data.batch(torch.arange(1000))
    assert 0.45 < images.std() < 0.55 and data.class_names == SHAPES
    held = load_dataset(config("shapes", resolution=16, channels=3, size=1000, kind="heldout"))
    assert held.fingerprint != data.fingerprint


def test_avatars_are_the_faces_that_the_seeds_draw():
    """The bytes are those of the 12,000 faces that benchmarks/make_avatars.mjs draws, in the order of their seeds."""
    small = {"resolution": 16, "channels": 3}
    train, held = (load_dataset(config("avatars", kind=kind, **small)) for kind in (None, "heldout"))
    assert train.images.shape == (8000, 3, 16, 16) and held.images.shape == (4000, 3, 16, 16)
    assert load_dataset(config("avatars", kind="train", **small)).fingerprint == train.fingerprint
    faces = torch.cat([train.images, held.images]).permute(0, 2, 3, 1).numpy()
    digest = hashlib.sha256(faces.tobytes()).hexdigest()
    assert digest == "1b671a519b6b7f5a9ab31e0e1b1373aeab89df1823b2f5221f69cf0889d8d41f"
    assert len({face.tobytes() for face in faces}) == 12_000 and train.labels is None
    large = load_dataset(config("avatars", resolution=48, channels=3, size=5))
    assert torch.equal(large.images[..., 1::3, 2::3], train.images[:5]) and len(large) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_are_centered_spread_and_indexed(kind):
    points, labels = toy2d_points(kind, 0, 8000)
    assert points.shape == (8000, 2, 1, 1) and points.dtype == np.float32
    assert np.abs(points.mean(0)).max() < 0.03 and 0.25 < points.std() < 0.55
    assert set(labels) == set(range(KINDS[kind][1]))
    assert kind == "gaussian" or np.abs(points).max() < 1.05
    later, _ = toy2d_points(kind, 4000, 10)
    assert np.array_equal(later, points[4000:4010])


def test_eight_gaussians_have_the_moments_they_claim():
    points, labels = toy2d_points("gaussians8", 0, 40_000)
    flat = points.reshape(-1, 2)
    assert flat.var(0) == pytest.approx([RING_RADIUS**2 / 2 + RING_NOISE**2] * 2, rel=0.02)
    assert flat[labels == 2].mean(0) == pytest.approx([0, RING_RADIUS], abs=0.005)
    assert flat[labels == 2].std(0) == pytest.approx([RING_NOISE] * 2, rel=0.05)
    pair, names = toy2d_points("dirac2", 0, 100)
    assert set(pair.reshape(-1).tolist()) == {-0.5, 0.5} and set(names) == {0, 1}


def test_toy_data_stay_floats():
    data = load_dataset(config("toy2d", resolution=1, channels=2, kind="rings", size=50))
    assert data.float_samples and torch.equal(data.batch(torch.arange(50))[0], data.images)
    assert describe(data)[0] == "toy2d: 50 points in the plane"


def test_split_is_disjoint_complete_and_stable():
    train, held = split_indices(1797)
    assert len(train) == 1438 and sorted([*train.tolist(), *held.tolist()]) == list(range(1797))
    again, _ = split_indices(1797)
    assert torch.equal(train, again)
    assert len(split_indices(10, 0.5)[0]) == 5
