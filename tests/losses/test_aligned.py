"""The distance in learned features: closed forms on a linear network, what its pull does, and the network's training."""

import pytest
import torch

from cmtool.config.load import resolve
from cmtool.data.disturb import disturbed, labels_of
from cmtool.data.load import load_dataset
from cmtool.errors import ConfigError
from cmtool.losses.aligned import Features, build_aligned, norms, unit
from cmtool.losses.assemble import build_distance
from cmtool.training import features
from cmtool.training.run_folder import RunFolder
from tests.losses.oracles import D
from tests.training.tiny import config_of, same, session_of, train, trainer_of

ALIGN = ("recipe.distance.kind=align", "recipe.distance.lessons=12")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))


class Linear(torch.nn.Module):
    """Maps x -> M x with one channel of `len(M)` places: the norm of M (a - b)."""

    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def maps(self, x):
        return ((x.flatten(1) @ self.matrix.T)[:, None, None],)


def network(seed=0, channels=1, side=8):
    """A network whose weights are drawn, as it is used: it does not learn any more."""
    torch.manual_seed(seed)
    return Features(channels, side, labels_of(channels)).double().eval().requires_grad_(False)


def pictures(seed=0, count=3, channels=1, side=8):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=g, dtype=D) * 2 - 1


def pull_of(distance, a, b, weight=1.0):
    a = a.clone().requires_grad_(True)
    value = distance.between(a, b)
    return value.detach(), torch.autograd.grad((weight * value).sum(), a)[0]


def test_of_a_linear_network_value_and_pull_are_known():
    """Value |M (a - b)|, pull M^T M (a - b) over its norm."""
    g = torch.Generator().manual_seed(3)
    matrix = torch.randn(5, 16, generator=g, dtype=D)
    a, b = pictures(side=4), pictures(1, side=4)
    value, pull = pull_of(build_aligned(Linear(matrix)), a, b)
    apart = (a - b).flatten(1) @ matrix.T
    assert torch.allclose(value, apart.norm(dim=1), atol=2e-5)
    want = apart @ matrix
    assert torch.allclose(pull.flatten(1), want / want.norm(dim=1, keepdim=True), atol=1e-8)


def test_the_pull_of_an_image_has_the_norm_of_its_weight():
    weight = torch.tensor([1.0, 0.25, 7.0], dtype=D)
    _, pull = pull_of(build_aligned(network()), pictures(), pictures(1), weight)
    assert torch.allclose(pull.flatten(1).norm(dim=1), weight, atol=1e-9)


def test_equal_images_are_not_pulled():
    a = pictures()
    value, pull = pull_of(build_aligned(network()), a, a)
    assert torch.equal(value, torch.zeros(3, dtype=D)) and torch.equal(pull, torch.zeros_like(a))


def test_a_step_along_the_pull_brings_the_features_nearer():
    distance, a, b = build_aligned(network()), pictures(), pictures(1)
    value, pull = pull_of(distance, a, b)
    for step in (1e-3, 1e-2):
        nearer = distance.between(a - step * pull, b)
        assert bool((nearer < value).all())
        # Steepest descent: no other direction of norm 1 gains as much.
        other = unit(torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=D))
        assert bool((nearer < distance.between(a - step * other, b)).all())


def test_only_the_direction_of_the_gradient_counts():
    """Features in other units give another distance and the same pull."""
    plain, wide = network(), network()
    wide.maps = lambda x: tuple(1000 * m for m in plain.maps(x))
    a, b = pictures(), pictures(1)
    (one, pull), (other, same_pull) = pull_of(build_aligned(plain), a, b), pull_of(build_aligned(wide), a, b)
    assert torch.allclose(other, 1000 * one, rtol=1e-3)
    assert torch.allclose(pull, same_pull, atol=1e-4)


def test_an_image_is_pulled_alike_in_any_company():
    distance, a, b = build_aligned(network()), pictures(), pictures(1)
    whole = pull_of(distance, a, b)[1]
    alone = torch.cat([pull_of(distance, a[i : i + 1], b[i : i + 1])[1] for i in range(3)])
    assert torch.allclose(whole, alone, atol=1e-12)


def test_small_differences_keep_their_digits():
    maps = (torch.full((1, 1, 2, 2), 1e-9),)
    assert float(norms(maps)) == pytest.approx(4e-18 / 2e-5, rel=1e-4)


def test_local_forms_are_the_limits():
    """d(f, f + h v) / h -> form, and the pull of (f, f - h v) -> pull, once h v is above the rounding of norms."""
    distance, f, v = build_aligned(network()), pictures(), pictures(2)
    h = 1e-2
    # Kinks of ReLU and pooling lie between f and f + h v here and there.
    assert torch.allclose(distance.between(f, f + h * v) / h, distance.form(f, v), rtol=0.05)
    pulled = distance.pull(f, v)
    assert torch.allclose(pulled.flatten(1).norm(dim=1), torch.ones(3, dtype=D))
    assert torch.allclose(pulled, distance.pull(f, 1e3 * v), atol=1e-9)
    smooth = build_aligned(Linear(torch.randn(5, 64, generator=torch.Generator().manual_seed(4), dtype=D)))
    assert torch.allclose(pull_of(smooth, f, f - h * v)[1], smooth.pull(f, v), atol=1e-8)
    assert torch.allclose(smooth.between(f, f + v), smooth.form(f, v), rtol=1e-5)


# --- the network -----------------------------------------------------------------------------------------------------


def test_changes_are_told_and_unchanged_images_stay():
    images = pictures(channels=3, count=16)
    made, told = disturbed(images, 0.2, 5, 0)
    assert told.shape == (16, labels_of(3)) and bool(torch.isfinite(made).all())
    untouched = (told == 0).all(1)
    # The last change mixes an image with another: nothing of that either.
    apart = (made - images).flatten(1).abs().amax(1)
    assert bool(untouched.any()) and float(apart[untouched].max()) < 1e-12
    assert float(apart[~untouched].min()) > 1e-6


def test_gray_levels_and_colors_change_as_told():
    """Brightness and contrast act on every value; the hue turns colors around gray, and a half turn twice is nothing."""
    from cmtool.data import disturb

    images, one = pictures(channels=3, count=2), torch.ones(2, dtype=D)
    assert torch.allclose(disturb._recolored(images, 2 * one, 2 * one), (images + 0.4) * 2)
    half = disturb._tinted(images, torch.pi * one, 0 * one)
    assert torch.allclose(half.mean(1), images.mean(1))
    assert torch.allclose(disturb._tinted(half, torch.pi * one, 0 * one), images)
    third = disturb._tinted(images, 2 * torch.pi / 3 * one, 0 * one)
    assert torch.allclose(third, images.roll(1, 1)) or torch.allclose(third, images.roll(-1, 1))
    assert torch.allclose(disturb._tinted(images, 0 * one, -40 * one), images.mean(1, keepdim=True).expand_as(images))


def test_a_blur_has_the_width_it_is_told():
    """Of a spike in the middle: the second moment of what it becomes."""
    from cmtool.data.disturb import _blurred

    spike = torch.zeros(1, 1, 33, 33, dtype=D)
    spike[..., 16, 16] = 1
    row = _blurred(spike, torch.tensor([2.0], dtype=D)).sum((0, 1, 2))
    place = torch.arange(33, dtype=D) - 16
    assert float(row.sum()) == pytest.approx(1, abs=1e-6)
    assert float((row * place**2).sum()) ** 0.5 == pytest.approx(2.0, rel=1e-3)


def test_the_network_learns_to_tell_changes_apart():
    """After 150 steps on digits its answers are nearer than the means of the labels."""
    config = config_of("ict", "recipe.distance.kind=align", "recipe.distance.lessons=150")
    data = load_dataset(config.data)
    net = features.learned_features(config, data, CPU)
    images = data.batch(torch.arange(len(data)))[0].repeat(8, 1, 1, 1)
    changed, told = disturbed(images, 0.15, 77, 0)
    with torch.no_grad():
        wrong = (net(changed) - told).square().mean()
    assert float(wrong) < 0.9 * float(told.var(0).mean())


def test_it_is_a_function_of_images_and_seed_and_made_once(monkeypatch):
    config = config_of("ict", *ALIGN)
    data = load_dataset(config.data)
    first = features.learned_features(config, data, CPU).state_dict()
    kept = features._file(config, data)
    assert kept.is_file()
    torch.manual_seed(99)
    kept.unlink()
    assert same(first, features.learned_features(config, data, CPU).state_dict())
    other = config_of("ict", *ALIGN, **{"train.seed": 1})
    assert not same(first, features.learned_features(other, data, CPU).state_dict())
    monkeypatch.setattr(features, "train_features", lambda *given: pytest.fail("trained again"))
    assert same(first, features.learned_features(config, data, CPU).state_dict())
    assert features.learned_features(config_of("ict"), data, CPU) is None


def test_a_resumed_run_has_the_network_of_its_checkpoint(tmp_path, monkeypatch):
    """To the bit, although the cache is lost and the network that is trained in its place is another one."""
    config = config_of("ict", *ALIGN, "train.checkpoint_every=3", steps=6)
    train(config, tmp_path / "whole")
    session, _ = session_of(config, tmp_path / "cut")
    monkeypatch.setattr(session, "end", lambda: None)
    from cmtool.machine.stopping import Stop

    session.begin(Stop(), ())
    for due in session.trainer.run(Stop(), session.intervals()):
        session.attend(due)
        if session.trainer.state.step == 3:
            break
    for file in (tmp_path / "cache" / "aligned").iterdir():
        file.unlink()
    monkeypatch.setattr(features, "train_features", lambda *given: None)
    train(config, tmp_path / "cut")
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    assert whole.model.read_bytes() == cut.model.read_bytes()
    assert whole.checkpoint(6).read_bytes() == cut.checkpoint(6).read_bytes()


@pytest.mark.parametrize(
    ("preset", "recipe", "sets", "words"),
    [
        ("toy2d", "ict", (), "at least 4 pixels"),
        ("digits", "imm", (), "pulls single images"),
        ("digits", "meanflow", (), "compares images"),
        ("digits", "cd-inf-full", (), "stop_gradient must be true"),
    ],
)
def test_what_it_cannot_be_combined_with(preset, recipe, sets, words):
    with pytest.raises(ConfigError, match=words):
        resolve(preset, recipe=recipe, sets=("recipe.distance.kind=align", *sets), flags={})


def test_without_its_network_it_is_refused():
    with pytest.raises(ConfigError, match="trained on the images"):
        build_distance(config_of("ict", *ALIGN).recipe.distance, 64)


@pytest.mark.parametrize("recipe", ["ict", "ect", "cd-inf"])
def test_any_recipe_of_pairs_takes_it(recipe, tmp_path):
    from tests.training.tiny import teacher_file

    needs = {"ict": {}, "ect": {"init": str(teacher_file(tmp_path / "t.safetensors"))}}
    needs["cd-inf"] = {"teacher": needs["ect"]["init"]}
    trainer = trainer_of(config_of(recipe, *ALIGN, **needs[recipe]))
    before = [p.detach().clone() for p in trainer.state.parameters()]
    trainer.step()
    assert trainer.report().loss > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.state.parameters(), strict=True))
