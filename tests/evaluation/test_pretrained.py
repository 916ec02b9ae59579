"""Features of networks that others trained on photographs: EfficientNet-Lite0, timm's models, and none of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cmtool.errors import DataError, OfflineError, UsageError, UserError
from cmtool.evaluation import pretrained
from cmtool.evaluation.features import build_features, usual_features
from cmtool.evaluation.frechet import frechet_from_features
from cmtool.evaluation.inception import WEIGHTS
from cmtool.evaluation.kid import gaussian_mmd
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


# --- the published protocols: figures of their authors' code on the same weights and pictures ---


def filled(network):
    """Return a state dict of the network's shapes that is the same on every machine."""
    state = {}
    for index, (name, value) in enumerate(sorted(network.state_dict().items())):
        drawn = np.random.RandomState(index).standard_normal(tuple(value.shape))
        if value.ndim == 1:
            drawn = 0.1 * drawn + (not name.endswith("bias"))
        else:
            drawn *= 0.3 if value.ndim == 3 else np.prod(value.shape[1:]) ** -0.5
        state[name] = torch.from_numpy(drawn).float()
    return state


def blocks(seed, count=4):
    """Return pictures (count, 40, 56, 3) with edges hard enough for bicubic filters to overshoot."""
    return np.random.RandomState(seed).randint(0, 256, (count, 5, 7, 3)).astype(np.uint8).repeat(8, 1).repeat(8, 2)


@needs_timm
def test_dinov2_features_and_their_distance_are_those_of_dgm_eval():
    """224 pixels by Pillow, positions interpolated from 37 x 37 by (16 + 0.1) / 37, the class token after the norm."""
    import timm

    model = "vit_small_patch14_dinov2.lvd142m"
    # The authors' file has a mask token beside the weights that timm's network has.
    torch.save(filled(timm.create_model(model)) | {"mask_token": torch.zeros(1, 384)}, "dino.pth")
    found = build_features(f"timm:{model}@dino.pth", (40, 56, 3))
    assert found.extras["resize"] == "224 px, bicubic, antialiased, Pillow" and "pillow" in found.fingerprint
    first, second = (found.call(blocks(seed)).features for seed in (0, 1))
    known = [[-0.69794863, -0.61512947, 1.36940527, 0.71286207], [-1.08486342, 0.29031587, 1.70188415, 0.40591788]]
    assert np.allclose(first[:2, :4], known, atol=1e-4)
    assert frechet_from_features(first, second) == pytest.approx(53.23825, rel=2e-5)


@needs_timm
def test_clip_embeddings_and_cmmd_are_those_of_the_authors_code():
    """The middle square by Pillow, the projection, length 1; taken with CLIP of the library transformers."""
    import timm

    model = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"
    state = filled(timm.create_model(model))
    torch.save(state | {"head.bias": torch.zeros(512)}, "clip.pth")
    found = build_features(f"timm:{model}@clip.pth", (40, 56, 3))
    assert found.extras["resize"] == "224 px, bicubic, antialiased, Pillow, middle square"
    first, second = (found.call(blocks(seed)).features for seed in (0, 1))
    known = [[-0.03436930, 0.00038435, 0.04583103, -0.03866312], [-0.00340557, -0.03278735, 0.06549668, -0.03671538]]
    assert np.allclose(first[:2, :4], known, atol=1e-5)
    assert gaussian_mmd(first, second) == pytest.approx(0.9665581, rel=1e-5)


@needs_timm
def test_dinov2_with_registers_equals_its_authors_code():
    """Positions without a class token, antialiased and scaled by 16 / 37."""
    import timm

    model = "vit_small_patch14_reg4_dinov2.lvd142m"
    torch.save(filled(timm.create_model(model)), "registers.pth")
    found = build_features(f"timm:{model}@registers.pth", (40, 56, 3)).call(blocks(0, 2)).features
    known = [[-0.80298120, -0.72552848, 0.78824103, 0.58960724], [-1.15842319, -0.30413374, 1.28711069, 0.26390013]]
    assert np.allclose(found[:, :4], known, atol=1e-4)


@needs_timm
def test_weights_that_are_not_here_and_names_that_are_not_there(tmp_path):
    with pytest.raises(OfflineError) as caught:
        build_features("timm:vit_large_patch14_dinov2.lvd142m", (16, 16, 3))
    said = f"{caught.value.message} {caught.value.hint}"
    assert str(tmp_path / "cache" / "features" / "timm-vit_large_patch14_dinov2.lvd142m.safetensors") in said
    assert "huggingface.co/timm/vit_large_patch14_dinov2.lvd142m" in said and "@FILE" in said
    with pytest.raises(UsageError, match=r"Did you mean .*dinov2"):
        build_features("timm:vit_large_patch14_dinov3.lvd142m", (16, 16, 3))
