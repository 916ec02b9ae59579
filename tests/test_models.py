"""Network + parameterization: the boundary to the bit, save and load, and headers that cannot be understood."""

from __future__ import annotations

import copy

import pytest
import torch

from cmtool.checkpoint import save_model
from cmtool.config.networks import network_config
from cmtool.config.schema import ProcessConfig
from cmtool.errors import CheckpointError
from cmtool.models import ConsistencyModel, build_model, load
from cmtool.networks import parameter_count

NETWORKS = {
    "adm": network_config(kind="adm", channels=8, head_channels=8, attention=(4,)),
    "mlp": network_config(kind="mlp", channels=16),
}


def header(network="adm", parameterization="consistency", kind="consistency", **changes):
    process = ProcessConfig(parameterization=parameterization)
    points = network == "mlp"
    data = {"source": "digits", "resolution": 1 if points else 8, "channels": 2 if points else 1, "num_classes": 3}
    whole = {
        "kind": kind,
        "network": NETWORKS[network].model_dump(mode="json"),
        "process": process.model_dump(mode="json"),
        "data": data | {"class_names": None, "fingerprint": "", "float_samples": points},
        "step": 0,
        "times": {},
    }
    return whole | changes


def random_model(seed=0, **kwargs):
    """A model whose weights are all random: the published initialization ends in zeros, which would hide F."""
    model = build_model(header(**kwargs))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    return model.eval().requires_grad_(False)


def images(model, count=5, seed=1):
    return torch.randn(count, *model.image_shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("network", ["adm", "mlp"])
@pytest.mark.parametrize("parameterization", ["consistency", "hard"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_boundary_is_the_identity_to_the_bit(network, parameterization, seed):
    model = random_model(seed, network=network, parameterization=parameterization)
    x = 3 * images(model)
    single = torch.tensor(0.002, dtype=torch.float32)
    below = torch.nextafter(single, torch.tensor(0.0))
    above = torch.nextafter(single, torch.tensor(1.0))
    label = torch.arange(5) % 3
    for t in (single, below, above):
        assert torch.equal(model(x, t.expand(5), label), x)
    double = copy.deepcopy(model).double()
    exact = torch.full((5,), 0.002, dtype=torch.float64)
    assert torch.equal(double(x.double(), exact, label), x.double())


def test_away_from_the_boundary_the_network_is_heard():
    for parameterization in ("consistency", "hard", "edm"):
        model = random_model(parameterization=parameterization)
        x = images(model)
        assert float((model(x, torch.full((5,), 0.01)) - x).abs().max()) > 1e-4


@pytest.mark.parametrize("t", [0.002, 0.05, 0.5, 80.0])
def test_the_scalings_are_the_published_ones(t):
    """Song et al. 2023, Appendix C, and Karras et al. 2022, table 1, written out with a network that answers 1."""
    data, low = 0.5, 0.002
    expected = {
        "consistency": lambda x: data**2 / ((t - low) ** 2 + data**2) * x + data * (t - low) / (data**2 + t**2) ** 0.5,
        "edm": lambda x: data**2 / (t**2 + data**2) * x + t * data / (data**2 + t**2) ** 0.5,
    }
    for name, formula in expected.items():
        model = build_model(header(parameterization=name)).double()
        seen = {}

        class One(torch.nn.Module):
            def __init__(self, seen):
                super().__init__()
                self.seen, self.p = seen, torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

            def forward(self, x, c_noise, label=None, r=None):
                self.seen.update(x=x, c_noise=c_noise)
                return torch.ones_like(x)

        model.network = One(seen)
        x, times = images(model).double(), torch.full((5,), t, dtype=torch.float64)
        torch.testing.assert_close(model(x, times), formula(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen["x"], x / (t**2 + data**2) ** 0.5, rtol=1e-12, atol=0)
        torch.testing.assert_close(seen["c_noise"], 0.25 * times.log(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("network", ["adm", "mlp"])
def test_saved_and_loaded_is_the_same_function(tmp_path, network):
    model = random_model(network=network)
    save_model(tmp_path / "model.safetensors", model.network.state_dict(), model.header)
    for place in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        again = load(place)
        assert isinstance(again, ConsistencyModel) and not again.training
        assert not any(parameter.requires_grad for parameter in again.parameters())
        x, t, label = images(model), torch.linspace(0.01, 70, 5), torch.tensor([0, 1, 2, -1, 0])
        assert torch.equal(again(x, t, label), model(x, t, label))
    assert load(tmp_path, dtype=torch.float64).dtype == torch.float64
    assert parameter_count(again) == parameter_count(model) == sum(p.numel() for p in model.parameters())


def test_what_a_model_says_of_itself():
    model = random_model()
    assert (model.sigma_min, model.sigma_max, model.sigma_data, model.rho) == (0.002, 80.0, 0.5, 7.0)
    assert model.image_shape == (1, 8, 8) and model.num_classes == 3 and not model.float_samples
    assert random_model(network="mlp").float_samples


def test_labels_none_and_minus_one_are_the_null_class():
    model = random_model()
    x, t = images(model), torch.full((5,), 1.0)
    null = model(x, t, torch.full((5,), -1))
    assert torch.equal(model(x, t), null)
    assert not torch.equal(model(x, t, torch.zeros(5, dtype=torch.int64)), null)


def test_other_sides_that_the_downsampling_divides():
    model = random_model()
    for side in (8, 16, 4):
        x = torch.zeros(2, 1, side, side)
        assert model(x, torch.ones(2)).shape == x.shape


def test_images_do_not_see_one_another():
    model = random_model()
    x, t = images(model), torch.linspace(0.1, 10, 5)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(model(x, t), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "banana"},
        {"network": {"kind": "transformer"}},
        {"network": {"kind": "adm", "channels": -3}},
        {"network": None},
        {"process": {"parameterization": "new"}},
        {"process": {"sigma_min": 1.0, "sigma_max": 0.5}},
        {"data": {"resolution": 8}},
        {"data": "digits"},
        {"data": {"resolution": "8", "channels": 1}},
        {"data": {"resolution": 8, "channels": 10**9}},
    ],
)
def test_headers_that_cannot_be_understood_are_one_sentence(tmp_path, changes):
    model = random_model()
    path = tmp_path / "m.safetensors"
    save_model(path, model.network.state_dict(), model.header | changes)
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert "\n" not in error.value.message and len(error.value.message) < 400


def test_weights_of_another_network_are_refused(tmp_path):
    model = random_model()
    path = tmp_path / "m.safetensors"
    other = model.header | {"network": model.header["network"] | {"channels": 16}}
    save_model(path, model.network.state_dict(), other)
    with pytest.raises(CheckpointError, match="does not fit its own header"):
        load(path)
    weights = dict(model.network.state_dict())
    weights.popitem()
    save_model(path, weights, model.header)
    with pytest.raises(CheckpointError, match="1 tensors differ"):
        load(path)


def test_a_training_state_is_no_model(tmp_path):
    save_model(tmp_path / "state.safetensors", {"student.a": torch.zeros(1)}, {"kind": "training-state", "step": 1})
    with pytest.raises(CheckpointError):
        load(tmp_path / "state.safetensors")


def conditioning(model, x, t, r=None):
    """What the network is given as c_noise."""
    seen = []
    hook = model.network.register_forward_pre_hook(lambda module, given: seen.append(given[1]))
    with torch.no_grad():
        model(x, t, None, r)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("network", ["adm", "mlp"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_time_reaches_the_network_in_float32_whatever_the_precision(network, half):
    """250 ln t as a half would be off by up to four: another noise level."""
    model = random_model(network=network)
    t = torch.tensor([79.3, 12.34, 0.77, 0.0031, 0.002])
    x = images(model)
    exact = conditioning(model, x, t)
    assert torch.equal(conditioning(model, x.to(half), t), exact)
    model.autocast = half
    assert torch.equal(conditioning(model, x, t), exact)
    assert torch.equal(conditioning(model.to(half), x.to(half), t), exact)
    # A time that was given as a half is that half, and no more is lost.
    assert torch.equal(conditioning(model, x.to(half), t.to(half)), conditioning(model, x.to(half), t.to(half).float()))
    assert conditioning(model.double(), x.double(), t).dtype == torch.float64
