"""Features of networks that others trained on photographs: EfficientNet-Lite0, timm's models, and none of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cmtool.errors import DataError, OfflineError, UsageError, UserError
from cmtool.evaluation import pretrained
from cmtool.evaluation.features import build_features, usual_features
from cmtool.evaluation.inception import WEIGHTS
from tests.evaluation.stand_in import write_stand_in

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
needs_timm = pytest.mark.skipif(not pretrained.has_imagenet(), reason="needs the extra features")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def pictures(count=4, side=16, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


@needs_timm
def test_imagenet_features_are_those_of_the_published_network():
    """The sums were taken with the package efficientnet-lite-pytorch on the same weights and pixels."""
    found = build_features("imagenet", (16, 16, 3))
    features = found.call(pictures()).features
    assert features.shape == (4, 1280)
    assert np.allclose(features.sum(1), [275.705139, 254.777420, 215.913986, 281.716003], rtol=1e-5)
    assert np.allclose(features[:, :4], [[0] * 4] * 3 + [[0.02273541, 0, 0, 0]], atol=1e-6)
    assert found.extras["resize"] == "128 px, bicubic, antialiased" and "timm" in found.extras["network"]
    assert found.extras["weights_sha256"].startswith("57934424")
    assert found.distance == "FD (imagenet)"
    gray = pictures(channels=1)
    assert np.array_equal(found.call(gray).features, found.call(gray.repeat(3, axis=-1)).features)


def test_the_best_network_here_is_taken(monkeypatch):
    monkeypatch.setattr(pretrained, "has_imagenet", lambda: False)
    assert (usual_features(), usual_features("small")) == ("inception", "small")
    monkeypatch.setattr(pretrained, "has_imagenet", lambda: True)
    assert usual_features("small") == "imagenet"
    write_stand_in(WEIGHTS.path)
    assert usual_features("small") == "inception"


def test_the_small_network_takes_pictures_of_any_size_and_says_what_it_is():
    small = build_features("small", (40, 40, 1))
    assert small.call(pictures(3, 40, 1)).features.shape == (3, 64)
    shapes = build_features("shapes", (16, 16, 3))
    images = pictures(3)
    assert np.allclose(small.call(images).features, shapes.call(images).features, atol=1e-5)
    assert "drawn shapes" in small.caveat and "[features]" in small.caveat and small.distance == "FD (small)"
    assert small.extras["resize"].startswith("16 px")


def test_without_the_packages_the_sentence_names_the_extra(monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    for name in ("imagenet", "timm:resnet18"):
        with pytest.raises(UserError, match="timm") as caught:
            build_features(name, (16, 16, 3))
        assert "cmtool-consistency[features]" in caught.value.hint


@needs_timm
def test_a_model_of_timm_takes_a_file_and_its_own_size_and_scaling(tmp_path):
    import timm
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("mobilenetv3_small_050.lamb_in1k").eval()
    save_file(network.state_dict(), str(tmp_path / "w.safetensors"))
    name = "timm:mobilenetv3_small_050.lamb_in1k"
    found = build_features(f"{name}@{tmp_path}/w.safetensors", (16, 16, 3))
    x = torch.from_numpy(pictures()).permute(0, 3, 1, 2).float() / 255
    x = nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features((x - mean) / std), pre_logits=True)
    assert np.allclose(found.call(pictures()).features, expected, atol=1e-5)
    assert found.name == name and found.extras["resize"] == "224 px, bicubic, antialiased"
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(DataError, match="does not hold the weights of mobilenetv3_small_050"):
        build_features(f"{name}@{tmp_path}/other.safetensors", (16, 16, 3))
    with pytest.raises(DataError, match="no weights at nowhere"):
        build_features(f"{name}@nowhere.pth", (16, 16, 3))


@needs_timm
def test_dinov2_follows_its_authors():
    """224 pixels, the class token after the norm, and positions interpolated from 37 x 37 by (16 + 0.1) / 37."""
    import timm

    model = "vit_small_patch14_dinov2.lvd142m"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stored = timm.create_model(model).eval()
    torch.save(stored.state_dict(), "dino.pth")
    found = build_features(f"timm:{model}@dino.pth", (16, 16, 3))
    with torch.no_grad():
        grid = stored.pos_embed[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
        x = torch.from_numpy(pictures(1)).permute(0, 3, 1, 2).float() / 255
        x = nn.functional.interpolate(x, (224, 224), mode="bicubic", antialias=True)
        x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
            :, None, None
        ]
        tokens = stored.patch_embed.proj(x).flatten(2).transpose(1, 2) + grid.flatten(2).transpose(1, 2)
        tokens = torch.cat([stored.cls_token + stored.pos_embed[:, :1], tokens], dim=1)
        expected = stored.norm(stored.blocks(tokens))[:, 0]
    assert np.allclose(found.call(pictures(1)).features, expected, atol=1e-4)


@needs_timm
def test_weights_that_are_not_here_and_names_that_are_not_there(tmp_path):
    with pytest.raises(OfflineError) as caught:
        build_features("timm:vit_large_patch14_dinov2.lvd142m", (16, 16, 3))
    said = f"{caught.value.message} {caught.value.hint}"
    assert str(tmp_path / "cache" / "features" / "timm-vit_large_patch14_dinov2.lvd142m.safetensors") in said
    assert "huggingface.co/timm/vit_large_patch14_dinov2.lvd142m" in said and "@FILE" in said
    with pytest.raises(UsageError, match=r"Did you mean .*dinov2"):
        build_features("timm:vit_large_patch14_dinov3.lvd142m", (16, 16, 3))
