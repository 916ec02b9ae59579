"""LPIPS against the lpips package on a random backbone, its gradients, and what happens without the weights."""

import pytest
import torch

from cmtool.config.parts import DistancePart
from cmtool.errors import CheckpointError, OfflineError
from cmtool.losses.perceptual import BACKBONE, Lpips, build_lpips, channel_weights, read_tensors, vgg_features
from tests.losses.oracles import D


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return vgg_features("max").double()


@pytest.fixture(scope="module")
def small(backbone):
    return Lpips(backbone, channel_weights(), resize=0).double()


def pictures(count=2, side=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, side, side, generator=g, dtype=D) * 2 - 1


def test_it_is_the_published_distance(backbone, small):
    import lpips

    package = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).double()
    ours = dict(backbone.named_parameters())
    with torch.no_grad():
        for theirs, name in zip(package.net.parameters(), ours, strict=True):
            theirs.copy_(ours[name])
    a, b = pictures(), pictures(seed=1)
    assert torch.allclose(small(a, b), package(a, b).flatten(), rtol=1e-9)


def test_average_pooling_is_another_distance(backbone):
    average = vgg_features("average").double()
    average.load_state_dict(backbone.state_dict())
    a, b = pictures(), pictures(seed=1)
    one, other = (Lpips(net, channel_weights(), 0).double()(a, b) for net in (backbone, average))
    assert not torch.allclose(one, other, rtol=1e-3)


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_gradient_is_finite_on_constant_images(small, level):
    a = torch.full((1, 3, 32, 32), level, dtype=D, requires_grad=True)
    (gradient,) = torch.autograd.grad(small(a, pictures(1)).sum(), a)
    assert bool(torch.isfinite(gradient).all())
    (gradient,) = torch.autograd.grad(small(a, a.detach()).sum(), a)
    assert bool(torch.isfinite(gradient).all())


def test_dead_features_give_finite_gradients():
    dead = vgg_features("max").double()
    with torch.no_grad():
        for parameter in dead.parameters():
            parameter.fill_(-1.0)
    a = pictures(1).requires_grad_(True)
    network = Lpips(dead, channel_weights(), 0).double()
    (gradient,) = torch.autograd.grad(network(a, pictures(1, seed=2)).sum(), a)
    assert bool(torch.isfinite(gradient).all())


def test_small_images_are_enlarged_and_large_ones_are_not(backbone):
    seen = []
    network = Lpips(torch.nn.Sequential(*list(backbone)), channel_weights(), 64).double()
    handle = network.features[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[-1]))
    network(pictures(1, 16), pictures(1, 16))
    network.unit_features(torch.zeros(1, 3, 256, 256, dtype=D))
    handle.remove()
    assert seen == [64, 64, 256]


def test_gray_images_are_shown_in_three_channels(small):
    a, b = pictures()[:, :1], pictures(seed=1)[:, :1]
    assert torch.allclose(small(a, b), small(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_local_forms(small):
    f, v = pictures(1), pictures(1, seed=3)
    h = 1e-5
    assert torch.allclose(small(f, f + h * v) / h**2, small.form(f, v), rtol=1e-3)
    y = f.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(small(y, f - h * v).sum(), y)
    pulled = small.pull(f, v)
    assert float((gradient / h - pulled).norm() / pulled.norm()) < 1e-3
    # The Gauss-Newton product is the Hessian's: v H v = 2 form.
    assert float((v * pulled).sum()) == pytest.approx(2 * float(small.form(f, v)), rel=1e-9)


def test_without_the_file_the_sentence_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("CMTOOL_OFFLINE", "1")
    with pytest.raises(OfflineError, match=BACKBONE) as caught:
        build_lpips(DistancePart(kind="lpips"))
    assert str(tmp_path) in caught.value.message
    assert "pseudo_huber" in caught.value.hint


def test_a_damaged_file_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    (place / BACKBONE).write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="damaged"):
        build_lpips(DistancePart(kind="lpips"))
    torch.save({"features.0.weight": torch.zeros(2)}, place / BACKBONE)
    with pytest.raises(CheckpointError, match="VGG16"):
        build_lpips(DistancePart(kind="lpips"))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"x": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


def test_a_complete_file_is_used(tmp_path, monkeypatch, backbone):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    torch.save({f"features.{k}": v.float() for k, v in backbone.state_dict().items()}, place / BACKBONE)
    distance = build_lpips(DistancePart(kind="lpips", resize=0))
    a, b = pictures().float(), pictures(seed=1).float()
    direct = Lpips(backbone, channel_weights(), 0).double()(a.double(), b.double())
    assert torch.allclose(distance.between(a, b).double(), direct, rtol=1e-3)
