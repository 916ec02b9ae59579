"""Networks of other code bases answer here what they answered there, to 2e-5.

The golden files hold the outputs of OpenAI's, diffusers', NVlabs', OpenAI's JAX, DiT's and SiT's implementations (SiT's
velocity with the opposite sign) for weights by formula, drawn anew in every layer, at t = 0.003, 0.5 and 80.
"""

from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmtool import models
from cmtool.interop.layout import reorder_qkv
from cmtool.interop.reading import ImportOptions, import_model
from cmtool.interop.writing import export_model
from tests.interop import closed_form, foreign

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Import a golden's file once; return (model, sentences said)."""
    done = {}

    def get(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            path, options = foreign.write(name, folder)
            said = []
            import_model(path, folder / "model.safetensors", ImportOptions(**options), say=said.append)
            done[name] = models.load(folder / "model.safetensors"), said
        return done[name]

    return get


def raw(model, name):
    x, t, label, stride = foreign.inputs(name)
    c = model.parameterization.coefficients(t)
    with torch.no_grad():
        return model.network(c.c_in[:, None, None, None] * x, c.c_noise, label)[..., ::stride, ::stride]


@pytest.mark.parametrize("name", list(foreign.SOURCES))
def test_an_imported_network_answers_as_its_own_code_does(imported, name):
    model, _ = imported(name)
    meta, expected_raw, expected = foreign.golden(name)
    x, t, label, stride = foreign.inputs(name)
    with torch.no_grad():
        answer = model(x, t, label)[..., ::stride, ::stride]
    assert model.kind == meta["kind"]
    assert expected_raw.std() > 0.3
    assert (raw(model, name) - expected_raw).abs().max() < TOLERANCE
    # A network that predicts noise is multiplied by the noise level, and so is its last digit.
    scale = model.parameterization.coefficients(t).c_out.abs().clamp_min(1)[:, None, None, None]
    assert ((answer - expected) / scale).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp", "edm_adm"])
def test_augmentation_labels_mean_what_they_meant(name, tmp_path):
    """EDM's own networks, told uniform numbers (golden/edm_told.npz), and their round trip through our files."""
    state, key = foreign.state(name), "model.map_augment.weight"
    if key not in state:
        state[key] = torch.from_numpy(closed_form.weight(key, (32, 9)))
    torch.save(OrderedDict(state), tmp_path / "edm.pt")
    options = ImportOptions(form="edm", head_channels=64)
    header = import_model(tmp_path / "edm.pt", tmp_path / "model.safetensors", options)
    assert header["network"]["augment_labels"] == 9
    model = models.load(tmp_path / "model.safetensors")
    x, t, label, _ = foreign.inputs(name)
    c = model.parameterization.coefficients(t)
    told = torch.from_numpy(closed_form.uniform("told", (3, 9)))
    with torch.no_grad():
        inner = c.c_in[:, None, None, None] * x
        answer, silent = (model.network(inner, c.c_noise, label, None, labels) for labels in (told, None))
    with np.load(foreign.GOLDEN / "edm_told.npz") as archive:
        expected = torch.from_numpy(archive[name])
    assert (answer[..., ::2, ::2] - expected).abs().max() < TOLERANCE
    assert (silent - foreign.golden(name)[1]).abs().max() < TOLERANCE
    said = []
    export_model(tmp_path / "model.safetensors", "edm-state", tmp_path / "back.safetensors", said.append)
    back = load_file(tmp_path / "back.safetensors")
    assert torch.equal(back[key], state[key]) and "augment_dim=9" in said[-1]


def test_boundaries_are_those_of_the_form(imported):
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), 0.002)
    label = torch.tensor([0, 5])
    assert torch.equal(imported("openai_imagenet64")[0](x, t, label), x)
    assert not torch.equal(imported("openai_imagenet64_edm")[0](x, t, label), x)


def test_the_learned_log_variance_comes_along(imported):
    model, _ = imported("edm2")
    meta, *_ = foreign.golden("edm2")
    given = model.network.log_variance(torch.tensor(meta["times"]).log() / 4)
    torch.testing.assert_close(given, torch.tensor(meta["logvar"]), rtol=1e-5, atol=1e-5)


def off(model, name):
    return (raw(model, name) - foreign.golden(name)[1]).abs().max().item()


def test_wrong_orders_would_be_noticed(imported):
    """Controls: the comparison above must fail for the mistakes that one makes."""
    name = "openai_imagenet64"
    model, _ = imported(name)
    network, kept = model.network, {key: value.clone() for key, value in model.network.state_dict().items()}
    try:
        for key in kept:
            if ".qkv." in key:
                heads = kept[key].shape[0] // 96
                network.state_dict()[key].copy_(
                    reorder_qkv(kept[key], heads, "heads-three-channels", "three-heads-channels")
                )
        assert off(model, name) > 1e-2, "q, k, v per head"
        network.load_state_dict(kept)
        for key in kept:
            if ".emb_layers." in key:
                network.state_dict()[key].copy_(torch.cat(kept[key].chunk(2)[::-1]))
        assert off(model, name) > 1e-2, "scale and shift exchanged"
    finally:
        network.load_state_dict(kept)
    x, t, label, stride = foreign.inputs(name)
    c_in = model.parameterization.coefficients(t).c_in[:, None, None, None]
    with torch.no_grad():
        mislabeled = network(c_in * x, 0.25 * t.log(), label)[..., ::stride, ::stride]
    assert (mislabeled - foreign.golden(name)[1]).abs().max() > 1e-2, "0.25 ln t instead of 250 ln t"
    assert off(model, name) < TOLERANCE


def test_what_was_assumed_is_said(imported):
    _, said = imported("openai_lsun256")
    text = " ".join(said)
    assert "consistency was assumed (--form)" in text
    assert "0.002 to 80 was assumed" in text
    assert "heads of 64 channels were assumed" in text
    assert "map_augment" in " ".join(imported("edm_ddpmpp")[1])
    assert "without running its embedded source" in " ".join(imported("edm_ddpmpp")[1])
