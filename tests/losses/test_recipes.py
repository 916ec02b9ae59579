"""Every recipe trains, on images and on points; parts that do not go together are refused with one sentence."""

import dataclasses

import pytest
import torch

from cmtool.checkpoint import read_header
from cmtool.config.methods import METHODS
from cmtool.data.load import load_dataset
from cmtool.errors import CheckpointError, ConfigError, UserError
from cmtool.losses.direction import Reference, posterior_mean
from cmtool.models import load
from cmtool.networks.truncated import TruncatedNetwork
from cmtool.samplers.generate import generate
from cmtool.samplers.plan import plan_sampling
from cmtool.training.inherit import adopt, check_needs
from cmtool.training.setup import prepare
from tests.losses.oracles import config_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A teacher and a consistency model of each preset, with weights that answer something."""
    folder, found = tmp_path_factory.mktemp("sources"), {}
    for preset in ("digits", "toy2d"):
        for recipe in ("edm", "ict", "rf"):
            config = config_of(recipe, preset=preset)
            trainer = prepare(config, load_dataset(config.data), CPU)
            g = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in trainer.state.ema.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
            found[preset, recipe] = folder / f"{preset}-{recipe}.safetensors"
            trainer.state.export(found[preset, recipe])
    return found


def started(recipe, sources, *sets, preset="digits", source=None):
    """A small run of a recipe from what it needs."""
    needs = METHODS[recipe].get("needs", "nothing")
    flags = {}
    if needs.startswith("teacher"):
        flags["teacher"] = str(sources[preset, source or "edm"])
    if needs.endswith("init"):
        flags["init"] = str(sources[preset, source or ("ict" if needs.endswith("consistency_init") else "edm")])
    config = config_of(recipe, *sets, preset=preset, **flags)
    check_needs(config)
    if flags:
        config = adopt(config, read_header(flags.get("init") or flags["teacher"]))
    return prepare(config, load_dataset(config.data), CPU)


FEW_PAIRS = ("recipe.coupling.pairs=16", "recipe.coupling.solver_steps=3")


@pytest.mark.parametrize("preset", ["digits", "toy2d"])
@pytest.mark.parametrize("recipe", METHODS)
def test_every_recipe_trains_and_its_model_samples(recipe, preset, sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    sets = FEW_PAIRS if METHODS[recipe].get("coupling", {}).get("kind") == "teacher" else ()
    trainer = started(recipe, sources, *sets, "train.lr=1e-4", preset=preset)
    before = [p.detach().clone() for p in trainer.state.student.parameters()]
    for _ in range(2):
        trainer.step()
    report = trainer.report()
    assert report.loss == report.loss
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.state.student.parameters(), strict=True)]
    assert any(moved)
    trainer.state.export(tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors")
    (batch,) = generate(model, plan_sampling(model.header), [0, 1])
    assert bool(torch.isfinite(batch.x0).all())


def test_pairs_are_made_once(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path))
    first = started("kd", sources, *FEW_PAIRS)
    monkeypatch.setattr("cmtool.training.setup.make_pairs", lambda *given: pytest.fail("made again"))
    again = started("kd", sources, *FEW_PAIRS)
    for trainer in (first, again):
        trainer.step()
    assert first.report().loss == again.report().loss


def test_truncated_model_keeps_stage_one_below_its_level(sources, tmp_path):
    trainer = started("tcm", sources)
    for _ in range(3):
        trainer.step()
    trainer.state.export(tmp_path / "tcm.safetensors")
    stage_one, model = load(sources["digits", "ict"]), load(tmp_path / "tcm.safetensors")
    assert isinstance(model.network, TruncatedNetwork)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    low, high = torch.tensor([0.1, 0.5, 0.9, 0.999]), torch.tensor([1.0, 1.001, 5.0, 80.0])
    assert torch.equal(model(x, low), stage_one(x, low))
    assert not torch.equal(model(x, high), stage_one(x, high))
    mixed = torch.tensor([0.1, 2.0, 0.9, 80.0])
    assert torch.allclose(model(x, mixed)[[0, 2]], stage_one(x, mixed)[[0, 2]], atol=1e-6)
    frozen = [p for name, p in trainer.state.student.named_parameters() if ".early." in name]
    assert frozen
    assert not any(p.requires_grad for p in frozen)


def test_truncated_model_targets_below_its_level_are_stage_one(sources):
    """At the atom the target is the frozen network's: with t = t' the student learns from stage one alone."""
    trainer, first = started("tcm", sources), load(sources["digits", "ict"]).eval()
    config = trainer.config
    assert config.recipe.times.low == config.process.truncated_at == 1.0
    for parameter in trainer.state.student.network.late.parameters():
        parameter.data.add_(0.1)
    seen, call = [], trainer.objective.target

    def watched(nets, points):
        seen.append((points, call(nets, points)))
        return seen[-1][1]

    trainer.objective = dataclasses.replace(trainer.objective, target=watched)
    trainer.state.student.eval()
    trainer.step()
    points, pair = seen[0]
    atom = points.t == 1.0
    assert int(atom.sum()) == round(0.25 * config.train.batch_size)
    assert bool((points.r[atom] < 1).all())
    x_r = points.x0 + points.r[:, None, None, None] * points.z
    with torch.no_grad():
        expected = first(x_r, points.r, points.label)
    assert torch.allclose(pair.target[atom], expected[atom], atol=1e-5)
    high = points.r >= 1
    assert bool(high.any())
    assert not torch.allclose(pair.target[high], expected[high], atol=1e-2)


def test_the_teacher_of_progressive_distillation_is_renewed_at_stage_ends(sources):
    trainer = started("pd", sources, "recipe.curriculum.s0=4")
    state, seen = trainer.state, []
    total = trainer.config.train.steps
    for step in range(total):
        before = [p.clone() for p in state.target.parameters()]
        points = trainer.curriculum().num_scales
        trainer.step()
        renewed = any(not torch.equal(a, b) for a, b in zip(before, state.target.parameters(), strict=True))
        if renewed:
            seen.append((step + 1, points - 1))
            assert all(
                torch.equal(a, b) for a, b in zip(state.target.parameters(), state.student.parameters(), strict=True)
            )
        if len(seen) == 2:
            break
    assert [intervals for _, intervals in seen] == [4, 2]


def test_progressive_distillation_that_ends_above_one_step_says_so(sources, tmp_path):
    """Its usual number of steps is what its last stage was trained for."""
    for last in (1, 4):
        trainer = started("pd", sources, f"recipe.curriculum.s1={last}")
        trainer.state.export(tmp_path / "pd.safetensors")
        plan = plan_sampling(read_header(tmp_path / "pd.safetensors"))
        assert (plan.sampler, plan.nfe) == ("progressive", last)


def test_meanflow_samples_by_its_own_jumps(sources):
    trainer = started("meanflow", sources)
    assert plan_sampling(trainer.state.ema.header, steps=2).sampler == "jumps"


def test_rate_and_optimizer_begin_anew_in_every_stage(sources):
    """As released: the rate falls to zero within a stage, and moments are forgotten with the old teacher."""
    sets = ("recipe.curriculum.s0=4", 'train.restart="stage"', 'train.decay="linear"', 'train.optimizer="adam"')
    trainer = started("pd", sources, *sets, "train.decay_start=0", "train.decay_end=0", "train.warmup=0")
    group, optimizer = trainer.state.optimizer.param_groups[0], trainer.state.optimizer
    rates, ages = [], []
    for _ in range(trainer.config.train.steps):
        trainer.step()
        rates.append(group["lr"] / trainer.config.train.lr)
        ages.append(int(next(iter(optimizer.state.values()))["step"]))
    assert len(ages) == 40  # stages of 1, 2 and 2 fifths
    assert ages == [*range(1, 9), *range(1, 17), *range(1, 17)]
    assert rates == pytest.approx([1 - k / length for length in (8, 16, 16) for k in range(length)])


def test_denoising_towards_the_posterior_mean(sources):
    """A direction holds for denoisers too: the target is the mean of the images given x_t, not the image."""
    noisy = "recipe.times.mean=1.0"
    plain = started("edm", sources, noisy)
    mean = started("edm", sources, noisy, 'recipe.direction.kind="posterior_mean"')
    seen = []
    for trainer in (plain, mean):
        call = trainer.objective.target

        def watched(nets, points, call=call):
            seen.append((points, call(nets, points)))
            return seen[-1][1]

        trainer.objective = dataclasses.replace(trainer.objective, target=watched)
        trainer.step()
    (points, sample), (_, averaged) = seen
    assert torch.equal(sample.target, points.x0)
    bank = mean.dataset.batch(torch.arange(len(mean.dataset)))
    expected = posterior_mean(points.x_t, points.t, Reference(bank[0], bank[1]), points.label)
    assert torch.allclose(averaged.target, expected, atol=1e-5)
    assert not torch.allclose(averaged.target, points.x0, atol=1e-2)


def test_a_teacher_of_rectified_flow_passes_its_scalings_on(sources):
    trainer = started("reflow", sources, *FEW_PAIRS, source="rf")
    assert trainer.config.process.parameterization == "flow"
    trainer.step()
    with pytest.raises(ConfigError, match="trig_tangent"):
        started("scd", sources, source="rf")


def test_scd_keeps_the_conditioning_of_its_teacher(sources):
    trainer, teacher = started("scd", sources), load(sources["digits", "edm"])
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.01, 1.0, 60.0])
    assert torch.allclose(trainer.state.student.eval()(x, t), teacher(x, t), atol=1e-6)


REFUSED = [
    ("ict-ot", ("train.batch_size=1",), "at least 2 images"),
    ("ict-ot", ("train.micro_batch=1",), "at least 2 images"),
    ("ict-gc", ('recipe.coupling.predictor="frozen"',), "coupling.model"),
    ("ict", ("recipe.curriculum.s1=5",), r"ends \(s1 = 5\) before it starts"),
    ("ict", ("recipe.curriculum.s1=2000000",), "2,000,000 grid points"),
    ("cd", ("recipe.curriculum.s1=1",), "at least 2 points"),
    ("pd", ("recipe.curriculum.s0=1", "recipe.curriculum.s1=8"), "cannot end at s1 = 8"),
    ("ct-inf", ('network.attention_kernel="auto"',), "no forward-mode derivative"),
    ("cd-inf-full", ("network.checkpointing=true",), "no forward-mode derivative"),
    ("sct", ("train.compile=true",), "no forward-mode derivative"),
    ("meanflow", ("network.two_time=false",), "two_time"),
    ("meanflow", ('process.parameterization="trig"',), "parameterization"),
    ("soflow", ("network.two_time=false",), "two_time"),
    ("soflow", ("recipe.legs.start=0.0001",), "cannot end at"),
    ("aflow", ("recipe.legs.begins=0.5", "recipe.legs.ends=0.4"), "must be below"),
    ("aflow", ('recipe.legs.law="constant"',), "shrinks to nothing"),
    ("aflow", ("train.compile=true",), "no forward-mode derivative"),
    ("shortcut", ('recipe.times.kind="lognormal"',), "draws one"),
    ("meanflow", ('recipe.times.kind="discrepancy"',), "draws one"),
    ("ict-ot", ("train.batch_size=5", "train.micro_batch=2"), "leaves one alone"),
    ("ict-ot", ('train.micro_batch="auto"',), "cannot be 'auto'"),
    ("ict-pm", ('recipe.direction.pool="batch"', 'train.micro_batch="auto"'), "cannot be 'auto'"),
    ("ict", ('train.restart="stage"',), "scales = 'halving'"),
    ("sct", ('process.parameterization="consistency"',), "'edm' or 'trig'"),
    ("sct", ("network.log_variance=false",), "log_variance"),
    ("sct", ('recipe.gap.kind="ratio"',), "limit r -> t"),
    ("ict", ('recipe.times.kind="lognormal"',), "two different times"),
    ("edm", ('recipe.weighting.kind="inverse_gap"',), "t - r"),
    ("cd", ("recipe.direction.guidance=2.0",), "class labels"),
    ("ict", ("recipe.direction.guidance=2.0",), "direction.kind = 'teacher'"),
    ("ict", ('recipe.direction.kind="teacher"',), "train-cd"),
    ("ict", ('recipe.coupling.kind="teacher"',), "train-cd"),
    ("cd-2m", ("recipe.direction.substeps=1",), "at least 2"),
    ("ict", ('recipe.direction.kind="target"',), "target network"),
    ("tcm", ("recipe.times.low=2.0",), "truncated_at"),
    ("tcm", ("recipe.times.low=100.0",), "outside the noise levels"),
    ("ict", ('recipe.times.kind="two_lognormal"', 'recipe.gap.kind="ratio"'), "average_velocity' or 'two_leg"),
    ("ict", ('recipe.distance.kind="lpips"', "data.channels=2"), "gray or RGB"),
    ("meanflow", ('recipe.distance.kind="lpips"',), "compares images"),
    ("imm", ("train.batch_size=10",), "train.batch_size = 10 is no multiple of 4"),
    ("imm", ("train.micro_batch=2",), "train.micro_batch = 2 is no multiple of 4"),
    ("imm", ('train.micro_batch="auto"',), "cannot be 'auto'"),
    ("imm", ("network.two_time=false",), "two_time"),
    ("imm", ('recipe.gap.kind="none"',), "belong together"),
    ("cmt", ('recipe.curriculum.scales="doubling"',), "one grid"),
    ("kd", ("recipe.coupling.path=true",), "one grid"),
    ("ict", ('recipe.times.kind="flow_pair"',), "belong together|two different times"),
]


@pytest.mark.parametrize(("recipe", "sets", "words"), REFUSED)
def test_combinations_that_are_refused(recipe, sets, words):
    with pytest.raises(ConfigError, match=words) as caught:
        config_of(recipe, *sets)
    assert "\n" not in caught.value.message
    assert "pydantic" not in caught.value.message


@pytest.mark.parametrize("recipe", [name for name, row in METHODS.items() if row.get("needs", "nothing") != "nothing"])
def test_what_a_recipe_needs_is_asked_for(recipe):
    with pytest.raises(UserError) as caught:
        check_needs(config_of(recipe))
    assert "cmtool train-" in caught.value.hint


def test_stage_two_of_a_diffusion_model_is_refused(sources):
    config = config_of("tcm", init=str(sources["digits", "edm"]))
    with pytest.raises(CheckpointError, match="goes on from a consistency model"):
        adopt(config, read_header(sources["digits", "edm"]))


def test_guidance_by_a_teacher_without_dropped_labels_is_refused():
    from types import SimpleNamespace

    from cmtool.config.parts import DirectionPart
    from cmtool.training.setup import check_guidance

    part = DirectionPart(kind="teacher", guidance=1.5)
    with pytest.raises(ConfigError, match="dropped labels"):
        check_guidance(part, SimpleNamespace(header={"label_dropout": 0.0}))
    check_guidance(part, SimpleNamespace(header={"label_dropout": 0.1}))


def test_guidance_extrapolates_from_the_unlabeled_answer():
    from cmtool.losses.direction import toward_teacher

    def teacher(x, t, label):
        return x + label.reshape(-1, 1, 1, 1)

    x, label = torch.zeros(2, 1, 2, 2), torch.tensor([3, 5])
    denoise = toward_teacher(teacher, 2.0)(None, x, label)
    assert denoise(x, torch.ones(2))[:, 0, 0, 0].tolist() == [7.0, 11.0]  # -1 + 2 (label + 1)


def test_no_method_is_named_outside_its_table():
    """A method is a row of parts: code that asks for one by name would be a branch."""
    from pathlib import Path

    import cmtool

    folder = Path(cmtool.__file__).parent
    for path in folder.rglob("*.py"):
        if path.name != "methods.py" and "theory" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert "method ==" not in text, path
            assert "recipe_name ==" not in text, path


def test_class_conditional_distillation_with_guidance_and_stored_pairs(tmp_path, monkeypatch):
    """Labels go through teacher, guidance, pairs and student; a teacher that never dropped them cannot guide."""
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    labeled = ("data.labels=true",)
    teachers = {}
    for share in (0.1, 0.0):
        config = config_of("edm", *labeled, f"train.label_dropout={share}")
        trainer = prepare(config, load_dataset(config.data), CPU)
        trainer.step()
        teachers[share] = tmp_path / f"teacher-{share}.safetensors"
        trainer.state.export(teachers[share])
    for recipe, sets in (("cd", ("recipe.direction.guidance=1.5",)), ("kd", FEW_PAIRS), ("pd", ())):
        config = config_of(recipe, *labeled, *sets, teacher=str(teachers[0.1]))
        trainer = prepare(adopt(config, read_header(teachers[0.1])), load_dataset(config.data), CPU)
        trainer.step()
        assert trainer.report().loss > 0
    config = config_of("cd", *labeled, "recipe.direction.guidance=1.5", teacher=str(teachers[0.0]))
    with pytest.raises(ConfigError, match="dropped labels"):
        prepare(adopt(config, read_header(teachers[0.0])), load_dataset(config.data), CPU)


def test_a_frozen_predictor_is_loaded(sources):
    path = sources["digits", "ict"]
    config = config_of("ict-gc", 'recipe.coupling.predictor="frozen"', f'recipe.coupling.model="{path}"')
    trainer = prepare(config, load_dataset(config.data), CPU)
    trainer.step()
    assert trainer.nets.frozen is not None
    assert not any(p.requires_grad for p in trainer.nets.frozen.parameters())
