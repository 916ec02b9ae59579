"""Guidance of teachers, away from no label or a weak model, and of networks that guide themselves while they train."""

import pytest
import torch

from cmtool.checkpoint import read_header
from cmtool.config.networks import network_config
from cmtool.config.parts import DirectionPart
from cmtool.data.load import load_dataset
from cmtool.diffusion.guidance import Told, guide, numbers_of
from cmtool.errors import CheckpointError, ConfigError, UsageError, UserError
from cmtool.losses.direction import build_guidances, toward_guided_sample, toward_teacher
from cmtool.losses.terms import Nets
from cmtool.models import load
from cmtool.networks import build_network
from cmtool.samplers.generate import sample_batch
from cmtool.samplers.plan import Guidance, misfit, plan_guidance, plan_sampling
from cmtool.training.inherit import adopt
from cmtool.training.setup import prepare
from tests.losses.oracles import D, config_of, gaussian_denoise, images, rows

CPU = torch.device("cpu")


def labeled(x, t, label):
    return x + label.reshape(-1, 1, 1, 1)


def test_a_weak_model_is_led_away_from():
    """N(0, .5^2) as the strong answer, N(0, 1) as the weak one: D_weak + w (D - D_weak), in an interval of levels."""
    strong, weak = (lambda x, t, label, s=s: gaussian_denoise(s)(x, t) for s in (0.5, 1.0))
    x, t = images(0.3, -4.0, 7.0), torch.tensor([0.1, 3.0, 60.0], dtype=D)
    found = guide(strong, 2.5, weak)(x, t, None)
    expected = 2.5 * gaussian_denoise(0.5)(x, t) - 1.5 * gaussian_denoise(1.0)(x, t)
    assert torch.allclose(found, expected, atol=1e-12)
    some = guide(strong, 2.5, weak, (1.0, 10.0))(x, t, None)
    assert torch.equal(some[1], found[1]) and torch.equal(some[[0, 2]], gaussian_denoise(0.5)(x, t)[[0, 2]])
    assert torch.equal(guide(strong, 1.0, weak)(x, t, None), gaussian_denoise(0.5)(x, t))
    assert torch.equal(toward_teacher(strong, 2.5, weak)(None, x, None)(x, t), found)


def test_a_network_guides_itself_as_meanflow_and_soflow_do():
    """omega v + kappa u(c) + (1 - omega - kappa) u(no label), in clean images; SoFlow: m (v + (w - 1)(v - u)) + (1 - m) u(c)."""

    class Own(torch.nn.Module):
        def forward(self, x, t, label, r):
            assert torch.equal(t, r) and not self.training
            return 0.5 * x + label.reshape(-1, 1, 1, 1)

    net, x0 = Own().train(), images(0.2, -0.4, 0.9)
    x, t, label = images(1.0, 2.0, 3.0), torch.tensor([0.5, 1.0, 20.0], dtype=D), torch.tensor([4, -1, 2])
    own, free = net.eval()(x, t, label, t), net(x, t, torch.full_like(label, -1), t)
    net.train()
    part = DirectionPart(guidance=3.0, mix=0.75, interval=(0.0, 10.0))
    found = toward_guided_sample(part)(Nets(net, net), x0, label)(x, t)
    omega, kappa = 3.0 * 0.25, 0.75
    meanflow = omega * x0 + kappa * own + (1 - omega - kappa) * free
    soflow = 0.25 * (x0 + (3.0 - 1) * (x0 - free)) + 0.75 * own
    assert torch.allclose(meanflow, soflow, atol=1e-12) and torch.allclose(found[0], meanflow[0], atol=1e-12)
    assert torch.equal(found[1:], x0[1:])  # no label; above the interval
    assert net.training
    # Where the network is right, the guided velocity is what it must give: v + (w - 1)(v - u(no label)).
    right = x0 + 2.0 * (x0 - free)
    fixed = 0.25 * (3.0 * x0 - 2.0 * free) + 0.75 * right
    assert torch.allclose(fixed, right, atol=1e-12)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Teachers of the digits: with dropped labels, without, and without classes."""
    folder, found = tmp_path_factory.mktemp("teachers"), {}
    kinds = {
        "dropped": ("data.labels=true", "train.label_dropout=0.1"),
        "kept": ("data.labels=true", "train.label_dropout=0"),
        "plain": (),
        "small": ("network.channels=4", "network.head_channels=4"),
        "large": ("data.resolution=16",),
    }
    for name, sets in kinds.items():
        trainer = prepare(config := config_of("edm", *sets), load_dataset(config.data), CPU)
        g = torch.Generator().manual_seed(len(found))
        with torch.no_grad():
            for parameter in trainer.state.ema.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
        trainer.state.export(found.setdefault(name, folder / f"{name}.safetensors"))
    trainer = prepare(config := config_of("ict"), load_dataset(config.data), CPU)
    trainer.state.export(found.setdefault("consistency", folder / "ict.safetensors"))
    return found


def started(recipe, teachers, teacher, *sets):
    config = config_of(recipe, *sets, teacher=str(teachers[teacher]))
    config = adopt(config, read_header(teachers[teacher]))
    return prepare(config, load_dataset(config.data), CPU)


def test_distillation_from_a_guided_teacher(teachers):
    """A weak model changes what the student must reach, by any rule; without classes it is the only guidance."""
    weak = f'recipe.direction.weak="{teachers["small"]}"'
    for recipe in ("mfd", "cd", "ctm"):
        losses = []
        for sets in ((), (weak, "recipe.direction.guidance=2.0")):
            trainer = started(recipe, teachers, "plain", *sets)
            trainer.step()
            losses.append(trainer.report().distance)
        assert losses[0] != losses[1]


def test_a_flow_map_begins_as_its_teacher(teachers):
    """mfd takes over a teacher's weights and scalings: from t to t it is the teacher's velocity."""
    trainer, teacher = started("mfd", teachers, "plain"), load(teachers["plain"])
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1.0, 60.0])
    student = trainer.state.student.eval()
    assert torch.allclose(student(x, t, None, t), teacher(x, t), atol=1e-6)
    trainer.step()
    assert trainer.report().loss > 0


@pytest.mark.parametrize("recipe", ["soflow", "meanflow", "imf"])
def test_training_with_guidance_inside(recipe):
    sets = ("data.labels=true", "train.label_dropout=0.1", "recipe.direction.mix=0.25")
    losses = []  # at mix = 1 - 1 / scale a fresh network, whose answers are all the same, would be told x0 itself
    for scale in (1.0, 2.0):
        config = config_of(recipe, *sets, f"recipe.direction.guidance={scale}", "recipe.direction.interval=[0.01,40]")
        trainer = prepare(config, load_dataset(config.data), CPU)
        trainer.step()
        losses.append(trainer.report().distance)
    assert losses[0] != losses[1]


def test_samples_of_a_guided_teacher(teachers):
    strong, weak = load(teachers["plain"]), load(teachers["small"])
    plan = plan_sampling(strong.header, sampler="euler", steps=1)
    given = Guidance(2.0, None, str(teachers["small"]))
    guided = type(plan)(plan.sampler, plan.times, plan.source, given)
    assert guided.nfe == 2 * plan.nfe == 2
    noise = sample_batch(strong, plan, [7])  # one step from 80 to 0 is the answer itself
    less = sample_batch(weak, plan, [7])
    found = sample_batch(strong, guided, [7], weak=weak)
    inside = (less.x0 + 2 * (noise.x0 - less.x0)).clamp(-1, 1)
    free = (noise.x0.abs() < 1) & (less.x0.abs() < 1)  # clamped only once there
    assert torch.allclose(found.x0[free], inside[free], atol=2e-4) and bool(free.any())
    labels = load(teachers["dropped"])
    one = sample_batch(labels, plan, [7], [3])
    two = sample_batch(labels, type(plan)(plan.sampler, plan.times, "", Guidance(3.0)), [7], [3])
    assert not torch.equal(one.x0, two.x0)


REFUSED = [
    ("consistency", 2.0, None, "guided while it is trained"),
    ("kept", 2.0, None, "not trained with dropped labels"),
    ("plain", 2.0, None, "knows no classes"),
    ("plain", 2.0, "consistency", "a teacher is guided by a teacher"),
    ("plain", 2.0, "large", "resolution 16, the teacher 8"),
    ("plain", 2.0, "kept", "classes"),
    ("consistency", 2.0, "plain", "this is a consistency model"),
    ("plain", None, "small", "--weak only says how --guidance works"),
]


def test_a_weak_model_sees_the_same_picture_or_none():
    """And it works in the same latents; a condition of the same shape but another kind is refused too."""
    data = {"resolution": 16, "channels": 3}
    latent = {"hash": "a", "shift": [0.0], "scale": [1.0], "pixels": [3, 64, 64]}

    def reason(weak, strong):
        return misfit({"kind": "diffusion", "data": data | weak}, data | strong)

    assert reason({}, {}) is reason({}, {"condition": "gray"}) is reason({"condition": "a"}, {"condition": "b"}) is None
    assert reason({"latent": latent}, {"latent": dict(latent)}) is None
    assert reason({"condition": "gray"}, {}) == "it is conditioned on gray, the teacher on no picture"
    assert reason({"condition": "edges"}, {"condition": "gray"}) == "it is conditioned on edges, the teacher on gray"
    for strong in ({}, {"latent": {**latent, "hash": "b"}}):
        assert "different autoencoders" in reason({"latent": latent}, strong)


@pytest.mark.parametrize(("model", "scale", "weak", "words"), REFUSED)
def test_guidance_that_is_refused(teachers, model, scale, weak, words):
    header = read_header(teachers[model])
    given = None if weak is None else (str(teachers[weak]), read_header(teachers[weak]))
    with pytest.raises(UserError, match=words) as caught:
        plan_guidance(header, scale, None, given)
    assert caught.value.hint and "\n" not in caught.value.message


def test_an_interval_that_is_refused(teachers):
    header = read_header(teachers["dropped"])
    with pytest.raises(UsageError, match="lower and a higher"):
        plan_guidance(header, 2.0, (5.0, 0.2))
    with pytest.raises(UsageError, match="--guidance-interval only says how"):
        plan_guidance(header, None, (0.2, 5.0))
    assert plan_guidance(header, None) is None
    assert plan_guidance(header, 2.0, (0.2, 5.0)) == Guidance(2.0, (0.2, 5.0))


def test_weak_models_that_training_refuses(teachers):
    for weak, words in (("consistency", "guided by a teacher"), ("large", "resolution 16")):
        sets = (f'recipe.direction.weak="{teachers[weak]}"', "recipe.direction.guidance=2.0")
        with pytest.raises(CheckpointError, match=words):
            started("mfd", teachers, "plain", *sets)
    with pytest.raises(ConfigError, match="changes nothing"):
        config_of("mfd", 'recipe.direction.weak="x"')
    with pytest.raises(ConfigError, match="weak is for"):
        config_of("ict", 'recipe.direction.weak="x"', "recipe.direction.guidance=2.0")
    with pytest.raises(ConfigError, match=r"label_dropout = 0"):
        config_of("soflow", "data.labels=true", "recipe.direction.guidance=2.0")
    with pytest.raises(ConfigError, match="must rise"):
        config_of("soflow", "recipe.direction.interval=[5.0, 0.2]")


# --- Networks that are told of guidance ---

GUIDED = ("data.labels=true", "train.label_dropout=0.1", "network.guided=true", "recipe.direction.guidance=8.0")


def test_what_guided_networks_are_told():
    """ln w even in [0, ln 8], an interval about the middle of rectified flow's time; whole where r = t."""
    law = build_guidances(config_of("imf", *GUIDED))
    t, r = torch.full((4000,), 2.0, dtype=D), torch.full((4000,), 0.5, dtype=D)
    told = law((t, r), rows(4000))
    log_w, first, last = told.unbind(1)
    assert float(log_w.max()) < torch.log(torch.tensor(8.0)) < float(log_w.max()) + 0.01
    assert float(log_w.mean()) == pytest.approx(1.0397, abs=0.03) and float((8 * (-log_w).exp()).min()) >= 1
    assert float(first.max()) <= 0.5 <= float(last.min()) and float(first.mean()) == pytest.approx(0.25, abs=0.01)
    assert torch.equal(law((t[:100], r[:100]), rows(4000, start=300)), told[300:400])
    whole = law((t, t), rows(4000))
    assert torch.equal(whole[:, 0], log_w) and set(whole[:, 1].tolist()) == {0.0} and set(whole[:, 2].tolist()) == {1.0}
    assert build_guidances(config_of("imf")) is None
    assert numbers_of(4.0, (1.0, 3.0)).tolist() == [pytest.approx([1.386294, 0.5, 0.75])]


def test_a_told_network_is_guided_as_improved_meanflow_says():
    """v + (1 - 1 / w) (u(c) - u(no label)) inside the interval that the row was told, in clean images."""

    class Own(torch.nn.Module):
        def forward(self, x, t, label, r):
            assert r.shape == (3, 4) and torch.equal(r[:, 0], t)
            return 0.5 * x + label.reshape(-1, 1, 1, 1) + r[:, 1].reshape(-1, 1, 1, 1)

    net, x0 = Own(), images(0.2, -0.4, 0.9)
    x, t, label = images(1.0, 2.0, 3.0), torch.tensor([0.5, 1.0, 20.0], dtype=D), torch.tensor([4, 2, 3])
    told = torch.tensor([[1.2, 0.0, 1.0], [0.7, 0.4, 0.6], [2.0, 0.1, 0.9]], dtype=D)
    nets = Nets(net, net).told(told)
    assert nets.student is nets.target
    found = toward_guided_sample(DirectionPart(guidance=8.0))(nets, x0, label)(x, t)
    own, free = nets.student(x, t, label, t), nets.student(x, t, torch.full_like(label, -1), t)
    w = told[:, 0].exp().reshape(-1, 1, 1, 1)
    expected = x0 + (1 - 1 / w) * (own - free)
    assert torch.allclose(found[:2], expected[:2], atol=1e-12)
    assert torch.equal(found[2], x0[2])  # 20 is .952 of the way, above .9


@pytest.mark.parametrize("kind", ["adm", "song", "edm2", "mlp", "dit"])
def test_a_guided_network_hears_what_it_is_told(kind):
    width = {"channels": 16, "num_blocks": 1} if kind == "mlp" else {"channels": 8, "head_channels": 8}
    config = network_config(kind=kind, two_time=True, guided=True, **width)
    network = build_network(config, channels=1, resolution=8)
    plain = build_network(config.model_copy(update={"guided": False}), channels=1, resolution=8)
    state = network.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    x, c = torch.randn(2, 1, 8, 8, generator=g), torch.tensor([0.3, 0.8])
    answers = [
        network(x, c, None, torch.tensor([[0.1, w, low, high]] * 2))
        for w, low, high in ((0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 0.3, 1.0), (0.0, 0.0, 0.6))
    ]
    assert all(not torch.allclose(answers[0], other, atol=1e-5) for other in answers[1:])
    with pytest.raises(UserError, match=r"\(B, 4\) for a guided network"):
        network(x, c, None, c)
    with pytest.raises(UserError, match=r"\(B,\) for an unguided network"):
        plain(x, c, None, torch.zeros(2, 4))


@pytest.mark.parametrize("recipe", ["imf", "soflow"])
def test_scale_and_interval_are_chosen_at_sampling_time(recipe, tmp_path):
    config = config_of(recipe, *GUIDED)
    trainer = prepare(config, load_dataset(config.data), CPU)
    for _ in range(2):
        trainer.step()
    assert trainer.report().loss > 0
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.state.ema.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.1)
    trainer.state.export(tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors")
    plan = plan_sampling(model.header)
    asked = [plan_guidance(model.header, *given) for given in ((None,), (1.0,), (4.0,), (4.0, (0.5, 2.0)))]
    found = [sample_batch(model, type(plan)(plan.sampler, plan.times, "", guidance), [3], [1]).x0 for guidance in asked]
    assert type(plan)(plan.sampler, plan.times, "", asked[2]).nfe == plan.nfe
    assert torch.equal(found[0], found[1])  # as if nothing were said
    assert not torch.equal(found[1], found[2]) and not torch.equal(found[2], found[3])
    with pytest.raises(UserError, match="1 to 8"):
        plan_guidance(model.header, 9.0)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 4.0])
    told = Told(model, numbers_of(1.0, None))
    assert torch.equal(told(x, t, torch.tensor([0, 1]), t / 2), model(x, t, torch.tensor([0, 1]), t / 2))


def test_guided_networks_that_are_refused():
    for sets, words in (
        (GUIDED[:3], "needs the largest scale"),
        ((*GUIDED, "recipe.direction.mix=0.5"), "leave recipe.direction.mix"),
        (GUIDED[1:], "class labels"),
    ):
        with pytest.raises(ConfigError, match=words):
            config_of("imf", *sets)
    with pytest.raises(ConfigError, match="from scratch"):
        config_of("ict", *GUIDED)
