"""Guidance of teachers, away from no label or a weak model, and of networks that guide themselves while they train."""

import pytest
import torch

from cmtool.checkpoint import read_header
from cmtool.config.parts import DirectionPart
from cmtool.data.load import load_dataset
from cmtool.diffusion.guidance import guide
from cmtool.errors import CheckpointError, ConfigError, UsageError, UserError
from cmtool.losses.direction import toward_guided_sample, toward_teacher
from cmtool.losses.terms import Nets
from cmtool.models import load
from cmtool.samplers.generate import sample_batch
from cmtool.samplers.plan import Guidance, plan_guidance, plan_sampling
from cmtool.training.inherit import adopt
from cmtool.training.setup import prepare
from tests.losses.oracles import D, config_of, gaussian_denoise, images

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
    sets = ("data.labels=true", "train.label_dropout=0.1", "recipe.direction.mix=0.5")
    losses = []
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
    found = sample_batch(strong, guided, [7], None, weak)
    inside = (less.x0 + 2 * (noise.x0 - less.x0)).clamp(-1, 1)
    free = (noise.x0.abs() < 1) & (less.x0.abs() < 1)  # clamped only once there
    assert torch.allclose(found.x0[free], inside[free], atol=1e-5) and bool(free.any())
    labels = load(teachers["dropped"])
    one = sample_batch(labels, plan, [7], [3])
    two = sample_batch(labels, type(plan)(plan.sampler, plan.times, "", Guidance(3.0)), [7], [3])
    assert not torch.equal(one.x0, two.x0)


REFUSED = [
    ("consistency", 2.0, None, "guided while it is trained"),
    ("kept", 2.0, None, "not trained with dropped labels"),
    ("plain", 2.0, None, "not trained with dropped labels"),
    ("plain", 2.0, "consistency", "a teacher is guided by a teacher"),
    ("plain", 2.0, "large", "resolution 16, the teacher 8"),
    ("plain", 2.0, "kept", "classes"),
    ("consistency", 2.0, "plain", "this is a consistency model"),
    ("plain", None, "small", "--weak only says how --guidance works"),
]


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
