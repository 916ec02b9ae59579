"""Feature networks: the Inception path with a stand-in, resizing rules, shipped and users' networks."""

import hashlib

import numpy as np
import pytest
import torch

from cmtool.errors import DataError, OfflineError, UsageError
from cmtool.evaluation import domain, train_features
from cmtool.evaluation.choices import FEATURES, MODES
from cmtool.evaluation.features import build_features
from cmtool.evaluation.inception import RESIZERS, WEIGHTS, resize_tensorflow
from tests.evaluation.stand_in import write_stand_in

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")


def pictures(count=4, side=32, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


@pytest.fixture
def inception_place(tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    return WEIGHTS.path


def test_without_weights_the_sentence_says_what_where_and_how(inception_place):
    with pytest.raises(OfflineError) as caught:
        build_features("inception", (32, 32, 3))
    assert "inception-2015-12-05.pt" in caught.value.message
    assert str(inception_place) in caught.value.message
    assert WEIGHTS.url in caught.value.hint and str(inception_place) in caught.value.hint
    assert not inception_place.parent.exists()


@pytest.mark.parametrize("mode", MODES)
def test_a_file_in_that_place_runs_the_real_path(inception_place, mode):
    network, said = write_stand_in(inception_place), []
    features = build_features("inception", (32, 32, 3), mode, say=said.append)
    images = pictures()
    found = features.call(images)
    assert found.features.shape == (4, 2048)
    assert found.spatial.shape == (4, 2023)
    assert found.probabilities.shape == (4, 1008)
    assert features.name == f"inception ({mode})"
    assert "not the published file" in said[0]
    x = RESIZERS[mode](torch.from_numpy(images).permute(0, 3, 1, 2).float())
    x = x * 2 / 255 - 1 if mode == "legacy_pytorch" else (x - 128) / 128
    with torch.no_grad():
        first = network.layers[0](x)
        pool = network.layers(x).flatten(1)
        # ADM's order is (row, column, channel), and its logits have no bias.
        spatial = first[:, :7].permute(0, 2, 3, 1).reshape(4, -1)
        chances = (pool @ network.output.weight.T).softmax(1)
    assert np.abs(found.features - pool.numpy()).max() < 1e-5
    assert np.abs(found.spatial - spatial.numpy()).max() < 1e-5
    assert np.abs(found.probabilities - chances.numpy()).max() < 1e-6


def test_a_script_without_the_spatial_layer_gives_no_spatial_features(inception_place):
    write_stand_in(inception_place, spatial=False)
    found = build_features("inception", (32, 32, 3)).call(pictures())
    assert found.spatial is None and found.features.shape == (4, 2048)


def test_gray_images_are_repeated_and_alpha_is_refused(inception_place):
    write_stand_in(inception_place)
    features = build_features("inception", (32, 32, 1))
    gray = pictures(2, channels=1)
    assert np.array_equal(features.call(gray).features, features.call(gray.repeat(3, axis=-1)).features)
    with pytest.raises(DataError, match="4 channels"):
        features.call(pictures(channels=4))


@pytest.mark.parametrize("content", [b"", b"not a script at all", b"PK\x03\x04broken"])
def test_a_damaged_weight_file_is_one_sentence(inception_place, content):
    inception_place.parent.mkdir(parents=True)
    inception_place.write_bytes(content)
    with pytest.raises(DataError, match="no TorchScript file"):
        build_features("inception", (32, 32, 3))


def test_tensorflow_1_resizing_by_hand():
    # 2 -> 299: the source coordinate of output i is 2 i / 299, without a half-pixel center; the last pixel is repeated.
    ramp = torch.tensor([[0.0, 100.0]]).expand(2, 2)[None, None]
    row = resize_tensorflow(ramp)[0, 0, 0]
    expected = torch.arange(299) * 2 / 299 * 100
    assert torch.allclose(row, expected.clamp(max=100), atol=1e-4)
    constant = torch.full((1, 3, 7, 5), 42.0)
    assert torch.equal(resize_tensorflow(constant), torch.full((1, 3, 299, 299), 42.0))


def test_resizing_rules_equal_clean_fid():
    build_resizer = pytest.importorskip("cleanfid.resize").build_resizer
    images = pictures(2, 48)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    for mode in ("clean", "legacy_pytorch"):
        theirs = np.stack([build_resizer(mode)(image) for image in images])
        assert np.abs(RESIZERS[mode](tensor).permute(0, 2, 3, 1).numpy() - theirs).max() < 1e-3


def test_the_rules_differ():
    tensor = torch.from_numpy(pictures(1, 64)).permute(0, 3, 1, 2).float()
    made = [RESIZERS[mode](tensor) for mode in MODES]
    assert all((a - b).abs().mean() > 10 for a, b in ((made[0], made[1]), (made[0], made[2])))


@pytest.mark.parametrize(("name", "shape"), [("digits", (8, 8, 1)), ("shapes", (16, 16, 3))])
def test_shipped_networks_recognize_their_data(name, shape):
    features = build_features(name, shape)
    lesson = train_features.LESSONS[name](shape[0])
    images = ((lesson.images[:500] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    found = features.call(images)
    assert found.features.shape == (500, domain.FEATURES)
    assert (found.probabilities.argmax(1) == lesson.classes[:500].numpy()).mean() > 0.97
    assert features.domain
    assert domain.weights_path(name, shape[0]).stat().st_size < 400_000


def test_the_script_that_ships_them_is_reproducible():
    lesson = train_features.digits_lesson()
    trained = [domain.train_classifier(lesson.images[:96], lesson.classes[:96], 1, seed) for seed in (0, 0, 1)]
    first, second, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in trained)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.slow
def test_shipped_weights_are_what_the_script_makes():
    model, about = train_features.train("digits-8")
    shipped = domain.load_classifier("digits", 8)
    assert about == shipped.about
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, shipped.model.state_dict()[name], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("digits", (16, 16, 1), "8 x 8 pixels, not 16 x 16"),
        ("digits", (8, 8, 3), "8 x 8 with 1 channel; these are 8 x 8 with 3 channels"),
        ("digits", (8, 16, 1), "square"),
        ("digits", (2, 1, 1), "points"),
        ("points", (8, 8, 1), "points in the plane"),
        ("inception", (2, 1, 1), "points"),
    ],
)
def test_images_that_a_network_is_not_for(name, shape, words, inception_place):
    write_stand_in(inception_place)
    with pytest.raises(DataError, match=words):
        build_features(name, shape)


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3))


class Wrong(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def test_a_users_script_gets_uint8_rgb_and_is_named_by_its_content(tmp_path):
    path = tmp_path / "mine.pt"
    torch.jit.script(Mean()).save(str(path))
    features = build_features(str(path), (8, 8, 1))
    images = pictures(3, 8, 1)
    found = features.call(images).features
    assert np.allclose(found, images.mean((1, 2)).repeat(3, axis=1))
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:32] in features.fingerprint


def test_users_scripts_that_do_not_work(tmp_path):
    torch.jit.script(Wrong()).save(str(tmp_path / "wrong.pt"))
    with pytest.raises(DataError, match=r"must return floats .*torch.float32 \(2, 3, 8, 8\)"):
        build_features(str(tmp_path / "wrong.pt"), (8, 8, 3)).call(pictures(2, 8))
    torch.save({"a": torch.zeros(1)}, tmp_path / "state.pt")
    with pytest.raises(DataError, match="no TorchScript module"):
        build_features(str(tmp_path / "state.pt"), (8, 8, 3))
    with pytest.raises(UsageError, match=r"no features at nowhere\.pt"):
        build_features("nowhere.pt", (8, 8, 3))
    with pytest.raises(UsageError, match="Did you mean inception"):
        build_features("inceptoin", (8, 8, 3))
    with pytest.raises(UsageError, match="resizing mode"):
        build_features("inception", (8, 8, 3), mode="bicubic")


def test_damaged_shipped_weights(tmp_path, monkeypatch):
    path = tmp_path / "digits-8.safetensors"
    monkeypatch.setattr(domain, "weights_path", lambda data, resolution: path)
    path.write_bytes(b"garbage")
    with pytest.raises(DataError, match="damaged"):
        domain.load_classifier("digits", 8)


def test_names_are_those_that_can_be_built():
    assert set(MODES) == set(RESIZERS)
    assert set(FEATURES) == {"inception", "imagenet", "digits", "shapes", "small", "points"}
