"""Training with augmentation: who is told of it, what stays to the bit without it, and what is refused."""

import pytest
import torch

from cmtool.config.load import from_toml, resolve, to_toml
from cmtool.data import load_dataset
from cmtool.errors import ConfigError, UserError
from cmtool.losses.direction import Reference, posterior_mean, toward_posterior_mean
from cmtool.machine.world import World
from cmtool.models import load, model_header
from cmtool.networks import build_network
from cmtool.training.setup import prepare
from tests.networks.test_networks import CASES
from tests.training.tiny import CPU, advance, config_of, teacher_file, trainer_of

ON = "recipe.augment.p=0.12"


def weights(trainer):
    return trainer.state.student.network.state_dict()


def test_the_network_gets_an_input_for_what_was_done_and_files_say_so(tmp_path):
    config = config_of("edm", ON)
    assert config.network.augment_labels == 9 and config.recipe.augment.labels == 9
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert from_toml(tmp_path / "config.toml") == config
    header = model_header(config, num_classes=None, class_names=None, fingerprint="")
    assert header["network"]["augment_labels"] == 9
    assert "augment_labels" not in config_of("edm").network.model_dump()
    six = config_of("edm", ON, "recipe.augment.yflip=0", "recipe.augment.rotate_frac=0")
    assert six.network.augment_labels == 6  # MeanFlow's


@pytest.mark.parametrize("recipe", ["edm", "ict", "ict-pm", "ect-gc"])
def test_without_a_probability_every_bit_is_as_before(recipe, tmp_path):
    """A network that could hear of augmentation, told nothing; and changes that never happen, told as zeros."""
    init = {"init": str(teacher_file(tmp_path / "m.safetensors"))} if recipe == "ect-gc" else {}
    plain = trainer_of(config_of(recipe, **init))
    deaf = trainer_of(config_of(recipe, "network.augment_labels=9", **init))
    never = trainer_of(config_of(recipe, "recipe.augment.p=1e-300", "recipe.augment.xflip=0", **init))
    for trainer in (plain, deaf, never):
        advance(trainer, 3)
    for other in (deaf, never):
        assert all(torch.equal(value, weights(other)[name]) for name, value in weights(plain).items())
        assert not weights(other)["map_augment.weight"].any()


def test_what_is_told_is_learned_and_steps_are_a_function_of_their_number():
    config = config_of("ict-pm", ON, steps=4)
    whole, parts = trainer_of(config), trainer_of(config)
    advance(whole, 4)
    advance(parts, 2)
    parts.batches.take(7, 0, 3)  # what else is drawn does not matter
    advance(parts, 4)
    assert all(torch.equal(value, weights(parts)[name]) for name, value in weights(whole).items())
    assert weights(whole)["map_augment.weight"].abs().sum() > 0
    micro = trainer_of(config_of("ict-pm", ON, "train.micro_batch=3", steps=4))
    advance(micro, 1)
    other = trainer_of(config)
    advance(other, 1)
    for name, value in weights(other).items():
        torch.testing.assert_close(weights(micro)[name], value, rtol=1e-3, atol=1e-5)


def test_processes_share_the_augmented_batch():
    config = config_of("edm", ON, batch=10)
    whole = trainer_of(config).batches.take(2, 0, 10)
    rows = [World(rank, 3).rows(10) for rank in range(3)]
    parts = [trainer_of(config).batches.take(2, *own) for own in rows]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), whole[0], rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([part[2] for part in parts]), whole[2])


@pytest.mark.parametrize("kind", ["adm", "ddpm++", "edm2", "mlp", "dit"])
def test_every_kind_hears_and_zeros_are_silence(kind):
    table, channels, side, classes = CASES[kind]
    network = build_network(
        table.model_copy(update={"augment_labels": 9}), channels=channels, resolution=side, num_classes=classes
    )
    plain = build_network(table, channels=channels, resolution=side, num_classes=classes)
    own = plain.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in network.state_dict().items() if name in own)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x, c = torch.randn(2, channels, side, side), torch.tensor([0.1, -0.3])
    told = torch.tensor([[0.0] * 9, [1.0] * 9])
    silent, heard = network(x, c), network(x, c, None, None, told)
    assert torch.equal(heard[0], silent[0]) and not torch.allclose(heard[1], silent[1])
    with pytest.raises(UserError, match="takes 9 augmentation labels"):
        network(x, c, None, None, told[:, :6])
    with pytest.raises(UserError, match="takes no augmentation labels"):
        plain(x, c, None, None, told)


def test_the_mean_of_augmented_images_is_that_of_images_augmented_alike():
    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(3)) * 2 - 1
    reference = Reference(images)
    x0 = torch.cat([images[:1], images[1:2].flip(-1), images[2:3].flip(-2)])
    told = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    t = torch.full((3,), 0.8)
    x = x0 + 0.8 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(4))
    found = toward_posterior_mean(reference, mirrors=True)(None, x0, None, told)(x, t)
    assert torch.equal(found[:1], posterior_mean(x[:1], t[:1], reference))
    mirrored = posterior_mean(x[1:2], t[1:2], Reference(images.flip(-1)))
    torch.testing.assert_close(found[1:2], mirrored)
    assert torch.equal(found[2:], x0[2:])


def test_a_student_hears_what_its_teacher_hears_or_is_told_nothing(tmp_path):
    config = config_of("edm", ON)
    trainer = prepare(config, load_dataset(config.data), CPU)
    advance(trainer, 2)
    from cmtool.checkpoint import save_model

    path = tmp_path / "teacher.safetensors"
    save_model(path, weights(trainer), trainer.state.student.header)
    plain = prepare(config_of("icd", teacher=str(path)), load_dataset(config.data), CPU)
    assert "map_augment.weight" not in weights(plain)
    told = prepare(config_of("icd", ON, teacher=str(path)), load_dataset(config.data), CPU)
    assert torch.equal(weights(told)["map_augment.weight"], load(path).network.state_dict()["map_augment.weight"])
    for student in (plain, told):
        advance(student, 1)
    deaf = teacher_file(tmp_path / "deaf.safetensors")
    with pytest.raises(ConfigError, match="the teacher was trained without"):
        prepare(config_of("icd", ON, teacher=str(deaf)), load_dataset(config.data), CPU)


@pytest.mark.parametrize(
    ("preset", "recipe", "sets", "says"),
    [
        ("toy2d", "edm", (ON,), "at least 4 pixels"),
        ("digits", "kd", (ON,), "uses none"),
        ("digits", "ict-pm", (ON, "recipe.direction.pool=batch"), "changed unlike"),
        ("digits", "edm", (ON, "network.augment_labels=3"), "tells 9 numbers, and network.augment_labels is 3"),
        ("digits", "edm", ("recipe.augment.p=1.5",), "recipe.augment.p"),
        ("digits", "edm", (ON, *(f"recipe.augment.{x}=0" for x in ("xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac"))), "no change"),
    ],
)  # fmt: skip
def test_what_cannot_be_augmented_is_one_sentence(preset, recipe, sets, says):
    with pytest.raises(ConfigError, match=says):
        resolve(preset, recipe=recipe, sets=sets)
