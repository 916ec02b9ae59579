"""The discrepancy and the transport cost against the closed Gaussian form, and the law of levels made from it."""

import functools
import json
import math

import pytest
import torch

from cmtool.config.parts import CouplingPart
from cmtool.config.schema import ProcessConfig
from cmtool.data.load import load_dataset
from cmtool.losses.coupling import build_coupling
from cmtool.losses.diagnose import diagnose, discrepancy_exact, level_density, linear_residual
from cmtool.losses.direction import Reference
from cmtool.losses.terms import Nets
from cmtool.rng import generator
from tests.losses.oracles import D, config_of

S = 0.5
LEVELS = (0.1, 0.5, 1.0, 2.0, 5.0, 20.0)


class Exact(torch.nn.Module):
    """The consistency function of N(0, s^2) with sigma_min = 0."""

    def forward(self, x, t, label=None):
        return x * (S / torch.sqrt(S**2 + t**2)).reshape(-1, 1, 1, 1)


@functools.cache
def measured(kind, count=60_000):
    g = torch.Generator().manual_seed(0)
    data = S * torch.randn(count, 1, 1, 1, generator=g, dtype=D)
    net = Exact()
    part = CouplingPart(kind=kind, predictor="online", mix=1.0)
    reference = Reference(data[:2])  # the closed form of R is in `linear` here
    return diagnose(Nets(net, net, net), build_coupling(part), data, levels=LEVELS, reference=reference)


@pytest.mark.parametrize(
    ("kind", "golden"),
    [
        ("independent", (0.961538, 0.5, 0.2, 0.058824, 0.009901, 0.000625)),
        ("generator", (0.8597, 0.1464, 0.02332, 0.002376, 8.189e-5, 3.716e-7)),
    ],
)
def test_discrepancy_is_the_closed_gaussian_form(kind, golden):
    assert [entry.linear for entry in measured(kind)] == pytest.approx(golden, rel=0.025)


def test_transport_cost_is_the_closed_gaussian_form():
    cost = [entry.transport for entry in measured("independent")]
    assert cost == pytest.approx((1.05388, 0.54289, 0.35557, 0.27986, 0.25496, 0.25031), rel=0.015)
    coupled = [entry.coupled for entry in measured("generator")]
    assert coupled == pytest.approx(cost, rel=0.015)  # x0 is the model's answer there
    assert measured("independent")[0].coupled == pytest.approx(S**2 + 1, rel=0.015)


def test_discrepancy_over_reference_images_is_gaussian_too():
    g = torch.Generator().manual_seed(1)
    data = S * torch.randn(4000, 1, 1, 1, generator=g, dtype=D)
    for t, golden in ((0.5, 0.5), (1.0, 0.2), (2.0, 0.058824)):
        z = torch.randn(4000, 1, 1, 1, generator=g, dtype=D)
        assert discrepancy_exact(data, t, z, Reference(data)) == pytest.approx(golden, rel=0.06)


def test_linear_residual_does_not_reward_many_values():
    """Noise that x knows nothing of keeps its variance although 30 values could be fitted to 100 images."""
    g = torch.Generator().manual_seed(0)
    found = [linear_residual(torch.randn(100, 30, generator=g), torch.randn(100, 30, generator=g)) for _ in range(20)]
    assert sum(found) / 20 == pytest.approx(1.0, abs=0.03)


def test_more_values_than_images_are_guessed_one_by_one():
    """Independent Gaussian values: the guess from each value alone is the whole answer, s^2 / (s^2 + t^2)."""
    g = torch.Generator().manual_seed(0)
    x0, z = S * torch.randn(200, 3, 20, 20, generator=g), torch.randn(200, 3, 20, 20, generator=g)
    assert linear_residual(x0 + z, z) == pytest.approx(0.2, rel=0.02)


def test_law_of_levels_follows_the_root_of_the_discrepancy():
    """For Gaussian data sqrt(R) = s / sqrt(s^2 + t^2), whose integral over ln t is -arsinh(s / t); 256 images measure it."""
    g = torch.Generator().manual_seed(1)
    data = S * torch.randn(20_000, 1, 1, 1, generator=g, dtype=D)
    process = ProcessConfig(sigma_data=S, sigma_min=0.1)
    density = level_density(data, process, 0.0, 0)
    ends = [math.asinh(S / t) for t in (process.sigma_min, process.sigma_max)]
    for share in (0.25, 0.5, 0.75, 0.95):
        exact = S / math.sinh(ends[0] + share * (ends[1] - ends[0]))
        assert float(density.quantile(torch.tensor([share], dtype=D))) == pytest.approx(exact, rel=0.1)
    even = level_density(data, ProcessConfig(sigma_data=S), 1.0, 0)
    assert float(even.quantile(torch.tensor([0.5], dtype=D))) == pytest.approx(math.sqrt(0.002 * 80), rel=1e-6)


def test_transport_is_measured_in_batches_of_training():
    """Among more images noise finds a nearer one: measured with all at once the cost would be another run's."""
    g = torch.Generator().manual_seed(0)
    data = S * torch.randn(1030, 1, 1, 1, generator=g, dtype=D)
    coupling, net = build_coupling(CouplingPart(kind="ot")), Exact()
    (small,), (whole,) = (diagnose(Nets(net, net), coupling, data, levels=(1.0,), batch=b) for b in (8, None))
    assert whole.coupled < 0.9 * small.coupled
    z = torch.randn(data.shape, generator=generator(0, "diagnose", "1")).to(data)
    # The last 6 of 1,030 would be a smaller batch and are left out.
    pairs = [(data[i : i + 8].flatten().sort()[0], z[i : i + 8].flatten().sort()[0]) for i in range(0, 1024, 8)]
    best = torch.stack([((x - n) ** 2).mean() for x, n in pairs]).mean()
    assert small.coupled == pytest.approx(float(best), rel=1e-9)


def test_the_predictor_that_is_named_is_asked():
    class Other(Exact):
        def forward(self, x, t, label=None):
            return 0 * x

    data = torch.ones(16, 1, 1, 1, dtype=D)
    coupling = build_coupling(CouplingPart(kind="generator", predictor="online", mix=1.0))
    (found,) = diagnose(Nets(Other(), Other(), Exact()), coupling, data, levels=(1.0,))
    z = torch.randn(data.shape, generator=generator(0, "diagnose", "1")).to(data)
    assert found.coupled == pytest.approx(float((z**2).mean()))  # x0 is the student's 0
    assert found.transport == pytest.approx(float(((z * S / math.hypot(S, 1) - z) ** 2).mean()))  # the average's answer


def test_diagnosis_of_a_run_is_written_down(tmp_path):
    from cmtool.training.diagnosis import Diagnosis
    from cmtool.training.setup import prepare

    config = config_of("ict-gc")
    trainer = prepare(config, load_dataset(config.data), torch.device("cpu"))
    Diagnosis(trainer, tmp_path)()
    (row,) = [json.loads(line) for line in (tmp_path / "discrepancy.jsonl").read_text().splitlines()]
    assert row["step"] == 0
    linear = [level["linear"] for level in row["levels"]]
    assert linear == sorted(linear, reverse=True)


@pytest.mark.parametrize(
    ("recipe", "r_golden"),
    [
        ("ict", (0.961538, 0.5, 0.2, 0.058824, 0.009901, 0.000625)),
        ("ict-gc", (0.8597, 0.1464, 0.02332, 0.002376, 8.189e-5, 3.716e-7)),
    ],
)
def test_what_a_run_writes_is_the_closed_gaussian_form(recipe, r_golden, tmp_path, monkeypatch):
    """The same through a run on Gaussian points, whose model is the exact function: R, and transport cost."""
    from cmtool.training import diagnosis
    from cmtool.training.setup import prepare

    monkeypatch.setattr(diagnosis, "LEAST", 40_000)
    monkeypatch.setattr(diagnosis, "MOST", 40_000)
    sets = ('data.kind="gaussian"', "data.size=40000", "recipe.coupling.mix=1.0")
    config = config_of(recipe, *sets, preset="toy2d")
    trainer = prepare(config, load_dataset(config.data), torch.device("cpu"))
    trainer.state.ema = Exact()
    diagnosis.Diagnosis(trainer, tmp_path)()
    levels = json.loads((tmp_path / "discrepancy.jsonl").read_text())["levels"]
    found = {entry["t"]: entry for entry in levels}
    assert [found[t]["linear"] for t in LEVELS] == pytest.approx(r_golden, rel=0.025)
    costs = [found[t]["coupled" if recipe == "ict-gc" else "transport"] for t in LEVELS]
    assert costs == pytest.approx((1.05388, 0.54289, 0.35557, 0.27986, 0.25496, 0.25031), rel=0.02)


def test_measuring_changes_nothing(tmp_path):
    config = config_of("ict-gc")
    from cmtool.training.diagnosis import Diagnosis
    from cmtool.training.setup import prepare

    def weights(measure):
        trainer = prepare(config, load_dataset(config.data), torch.device("cpu"))
        if measure:
            Diagnosis(trainer, tmp_path).measure()
        trainer.step()
        return torch.cat([p.detach().flatten() for p in trainer.state.student.parameters()])

    assert torch.equal(weights(False), weights(True))
