"""The shipped presets: every recipe resolves, and the published ones hold the published numbers."""

from __future__ import annotations

import pytest

from cmtool.config.find import list_presets
from cmtool.config.load import read_preset, resolve
from cmtool.config.methods import METHODS
from cmtool.config.show import preset_document
from cmtool.config.toml import write_toml
from cmtool.diffusion.grid import karras_grid

SHIPPED = [
    "avatars",
    "celeba64",
    "cifar10",
    "digits",
    "folder128",
    "folder16",
    "folder256",
    "folder32",
    "folder64",
    "imagenet256",
    "imagenet32",
    "imagenet64",
    "lsun_bedroom256",
    "lsun_cat256",
    "lsun_church64",
    "shapes",
    "shapes64",
    "toy2d",
]
PUBLISHED = ("cifar10", "imagenet64", "lsun_bedroom256", "lsun_cat256")


def config(preset, recipe, **more):
    return resolve(preset, recipe=recipe, **more).config


def test_all_are_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(list_presets()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_resolves_and_every_method_can_be_used(name):
    preset = read_preset(name)
    assert set(preset.default) == {"ct", "cd", "edm"}
    for recipe in [*preset.recipes, *METHODS]:
        resolved = config(name, recipe)
        assert resolved.family == METHODS[resolved.recipe.method]["family"]
        assert resolved.about.title and resolved.about.note
    for family in ("edm", "cd", "ct"):
        assert resolve(name, family=family).config.family == family


@pytest.mark.parametrize("name", SHIPPED)
def test_a_preset_written_out_in_full_is_the_same_preset(name, tmp_path):
    path = tmp_path / f"{name}.toml"
    path.write_text(write_toml(preset_document(name)), encoding="utf-8")
    assert read_preset(str(path)).default == read_preset(name).default
    for recipe in read_preset(name).recipes:
        assert config(str(path), recipe) == config(name, recipe)
    if config(name, None).data.resolution > 1:
        other = {"sets": ["network.kind=dit"]}
        assert config(str(path), None, **other) == config(name, None, **other)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_data_sets_default_to_the_papers_recipes(name):
    assert read_preset(name).default == {"ct": "ct", "cd": "cd", "edm": "edm"}


@pytest.mark.parametrize(
    ("preset", "recipe", "steps", "batch", "lr", "ema", "s1", "target", "figures"),
    [
        ("cifar10", "cd", 800_000, 512, 4e-4, 0.9999, 18, 0.0, (3.55, 2.93)),
        ("cifar10", "ct", 800_000, 512, 4e-4, 0.9999, 150, 0.9, (8.70, 5.83)),
        ("imagenet64", "cd", 600_000, 2048, 8e-6, 0.999943, 40, 0.95, (6.20, 4.70)),
        ("imagenet64", "ct", 800_000, 2048, 8e-6, 0.999943, 200, 0.95, (13.0, 11.1)),
        ("lsun_bedroom256", "cd", 600_000, 2048, 1e-5, None, 40, 0.95, (7.80, 5.22)),
        ("lsun_bedroom256", "ct", 1_000_000, 2048, 1e-5, 0.999943, 150, 0.95, (16.0, 7.85)),
        ("lsun_cat256", "cd", 600_000, 2048, 1e-5, 0.999943, 40, 0.95, (11.0, 8.84)),
        ("lsun_cat256", "ct", 1_000_000, 2048, 1e-5, 0.999943, 150, 0.95, (20.7, 11.7)),
    ],
)
def test_table_3_of_the_paper(preset, recipe, steps, batch, lr, ema, s1, target, figures):
    c = config(preset, recipe)
    assert (c.train.steps, c.train.batch_size, c.train.lr, c.train.optimizer) == (steps, batch, lr, "radam")
    assert (c.train.ema.kind, c.train.ema.decay) == (("none", 0.999943) if ema is None else ("exponential", ema))
    assert (c.recipe.curriculum.s1, c.recipe.target.ema, c.recipe.distance.kind) == (s1, target, "lpips")
    assert (c.recipe.expected.nfe1, c.recipe.expected.nfe2) == figures
    assert (c.train.decay, c.train.warmup, c.train.weight_decay, c.network.dropout) == ("none", 0, 0, 0)
    assert c.data.flip and c.recipe.weighting.kind == "uniform" and c.recipe.times.kind == "grid_uniform"
    assert c.recipe.direction.kind == ("teacher" if recipe == "cd" else "sample")
    assert recipe == "ct" or c.recipe.direction.solver == "heun"
    # The released code of ImageNet and LSUN pools VGG's features by the mean, that of CIFAR-10 by the maximum.
    assert (
        c.recipe.distance.pooling == ("max" if preset == "cifar10" else "average") and c.recipe.distance.resize == 224
    )


@pytest.mark.parametrize(
    ("preset", "recipe", "points", "index"),
    [
        ("cifar10", "cd", 18, 11),
        ("imagenet64", "cd", 40, 22),
        ("imagenet64", "ct", 201, 106),
        ("lsun_bedroom256", "cd", 40, 17),
        ("lsun_bedroom256", "ct", 151, 67),
        ("lsun_cat256", "ct", 151, 62),
    ],
)
def test_published_second_noise_levels_lie_on_their_grid(preset, recipe, points, index):
    first, second = config(preset, recipe).sample.times["2"]
    assert first == 80.0
    assert second == pytest.approx(karras_grid(points)[points - 1 - index], abs=5e-7)


def test_teachers():
    cifar, imagenet, cat = (config(name, "edm") for name in ("cifar10", "imagenet64", "lsun_cat256"))
    assert (cifar.train.optimizer, cifar.train.lr, cifar.network.dropout) == ("adam", 1e-3, 0.13)
    assert cifar.train.warmup * cifar.train.steps == pytest.approx(10_000_000 / 512, abs=1)
    assert cifar.train.ema.decay == pytest.approx(0.5 ** (512 / 500_000), abs=1e-7)
    assert (imagenet.train.batch_size, imagenet.train.lr, imagenet.network.dropout) == (4096, 1e-4, 0.1)
    assert (cat.train.steps, cat.sample.sampler, cat.sample.steps) == (300_000, "heun", 40)
    assert all(c.process.parameterization == "edm" for c in (cifar, imagenet, cat))


def test_the_modern_recipes_of_cifar10():
    ict, ect = config("cifar10", "ict"), config("cifar10", "ect")
    assert (ict.train.batch_size, ict.train.lr, ict.network.fourier_scale, ict.network.dropout) == (
        1024,
        1e-4,
        0.02,
        0.3,
    )
    assert (ict.recipe.curriculum.s0, ict.recipe.curriculum.s1, ict.recipe.target.ema) == (10, 1280, 0)
    assert (ect.train.steps, ect.train.batch_size, ect.recipe.needs, ect.recipe.distance.c) == (200_000, 128, "init", 0)
    assert (ect.network.embedding, ect.network.encoder, ect.network.resample_filter) == (
        "positional",
        "standard",
        (1, 1),
    )
    assert ect.sample.times == ict.sample.times == {"2": (80.0, 0.821)}


@pytest.mark.parametrize(
    ("preset", "recipe", "figures"),
    [
        ("cifar10", "ict-deep", (2.51, 2.24)),
        ("imagenet64", "ict-deep", (3.25, 2.77)),
        ("imagenet64", "sct-xl", (2.04, 1.48)),
        ("imagenet64", "scd-xl", (2.44, 1.66)),
        ("imagenet64", "tcm-xl", (2.20, 1.62)),
        ("cifar10", "ect-cmt", (2.74, 1.97)),
        ("cifar10", "imm", (3.20, 1.98)),
    ],
)
def test_settings_published_since(preset, recipe, figures):
    c = config(preset, recipe)
    assert (c.recipe.expected.nfe1, c.recipe.expected.nfe2) == figures
    if recipe == "ict-deep":
        plain = config(preset, "ict")
        assert c.network.num_blocks == 2 * plain.network.num_blocks and c.train == plain.train
    if recipe.endswith("-xl"):
        assert (c.network.kind, c.network.channels) == ("edm2", 384)
        network, _, _ = on_meta(c)
        assert 1.0e9 < sum(parameter.numel() for parameter in network.parameters()) < 1.2e9  # EDM2-XL: 1.1 billion
    if recipe == "imm":
        assert (c.recipe.times.group, c.recipe.gap.k, c.recipe.weighting.a, c.recipe.weighting.b) == (4, 15, 1, 5)
    if recipe == "ect-cmt":
        import torch

        from cmtool.schedules.times import ratio_map

        t = torch.tensor([0.5, 80.0], dtype=torch.float64)
        n = 1 + 8 * torch.sigmoid(-t)
        assert torch.allclose(ratio_map(c.recipe.gap, t, 0), t * (1 - n / 4096))  # CMT's one stage


def test_latents_of_imagenet_at_256():
    """As in the released configurations of SoFlow (3b60d60) and improved MeanFlow (bf60cd7); sCM's for 512 pixels."""
    soflow, imf, sct = (config("imagenet256", name) for name in ("soflow", "imf", "sct"))
    assert all(c.data.shape == (4, 32) and c.data.num_classes == 1000 for c in (soflow, imf, sct))
    times, legs = soflow.recipe.times, soflow.recipe.legs
    assert (times.mean_same, times.std_same, times.same) == (-0.2, 1.0, 0.75)  # velocity_loss_ratio, time_mean[0]
    assert (times.mean, times.std, times.mean_r, times.std_r) == (0.2, 0.8, -1.0, None)
    assert (legs.law, legs.start, legs.end) == ("exponential", 0.1, 0.002)
    assert (soflow.recipe.direction.guidance, 1 - soflow.recipe.direction.mix) == (3.0, 0.25)
    assert (soflow.train.batch_size, soflow.train.betas, soflow.train.lr) == (256, (0.9, 0.99), 1e-4)
    assert soflow.train.steps == pytest.approx(240 * 1_281_167 / 256, rel=1e-3)
    assert (imf.recipe.times.mean, imf.recipe.times.std, imf.recipe.times.same) == (-0.4, 1.0, 0.5)
    assert (imf.train.batch_size, imf.train.betas, imf.train.ema.decay) == (1024, (0.9, 0.95), 0.9999)
    assert imf.train.steps == 640 * (1_281_167 // 1024) and imf.train.warmup == 10 / 640
    assert (imf.network.guided, imf.recipe.direction.guidance, imf.train.label_dropout) == (True, 8.0, 0.1)
    assert (imf.recipe.weighting.p, imf.recipe.weighting.c) == (1.0, 0.01)
    assert (sct.recipe.times.mean, sct.recipe.times.std, sct.train.eps) == (-0.8, 1.6, 1e-11)
    assert sct.recipe.target.warmup * sct.train.steps == pytest.approx(10_000)
    assert sct.train.decay_start * sct.train.steps == pytest.approx(70_000)
    for name, millions in (("soflow", 131.09), ("soflow-xl", 676.44), ("rf-xl", 674.82)):
        assert round(sum(p.numel() for p in on_meta(config("imagenet256", name))[0].parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(("preset", "sizes"), [("avatars", (2, 128, 6, 4)), ("folder64", (4, 384, 12, 6))])
def test_presets_say_how_large_a_transformer_in_place_of_their_unet_is(preset, sizes):
    def found(*more):
        c = config(preset, None, sets=["network.kind=dit", *more])
        return c.network.patch_for(c.data.resolution), c.network.width, c.network.depth, c.network.heads

    assert found() == sizes
    assert found("network.depth=2", "network.heads=2") == (*sizes[:2], 2, 2)
    assert config(preset, None).network.kind == {"avatars": "dit", "folder64": "adm"}[preset]


def test_noise_is_embedded_as_in_the_released_weights():
    assert config("cifar10", "cd").process.noise_scale == 0.25
    assert all(config(name, "cd").process.noise_scale == 250 for name in PUBLISHED[1:])


def on_meta(c):
    import torch

    from cmtool.networks.build import build_network

    channels, side = c.data.shape
    with torch.device("meta"):
        network = build_network(c.network, channels=channels, resolution=side, num_classes=c.data.num_classes)
        image, noise = torch.zeros(1, channels, side, side), torch.zeros(1)
    return network.train(), image, noise


def saved_bytes(network, image, noise):
    """What autograd keeps of one image from the forward to the backward pass, counted without computing anything."""
    import torch

    kept = {}

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[id(tensor.untyped_storage())] = (tensor.numel() * tensor.element_size(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = network(image, noise)
    assert result.shape == image.shape
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("preset", "plain", "batch", "lr", "steps", "mult", "blocks", "attention", "dropout", "millions"),
    [
        ("cifar10", "ict-small", 512, 1e-4, 100_000, (1, 2, 2), 3, (), 0.3, 34.71),
        ("imagenet32", "ict", 512, 8e-5, 150_000, (1, 1, 2), (3, 5, 7), (16,), (0.0, 0.2, 0.2), 39.48),
        ("celeba64", "ict", 128, 8e-5, 150_000, (1, 2, 2, 2), (3, 3, 4, 5), (), (0.0, 0.0, 0.2, 0.2), 59.58),
    ],
)
def test_settings_of_generator_augmented_flows(
    preset, plain, batch, lr, steps, mult, blocks, attention, dropout, millions
):
    """As released; dropout in plain iCT alone, half of the images made by the average."""
    for recipe in (plain, "ict-ot", "ict-gc"):
        c = config(preset, recipe)
        assert (c.train.batch_size, c.train.lr, c.train.steps, c.train.optimizer) == (batch, lr, steps, "lion")
        assert (c.network.channel_mult, c.network.num_blocks, c.network.attention) == (mult, blocks, attention)
        assert c.network.dropout == (dropout if recipe == plain else 0.0)
        assert (c.recipe.curriculum.s0, c.recipe.curriculum.s1, c.recipe.target.ema) == (10, 1280, 0.0)
        network, _, _ = on_meta(c)
        assert round(sum(parameter.numel() for parameter in network.parameters()) / 1e6, 2) == millions
    assert (c.recipe.coupling.mix, c.recipe.coupling.predictor) == (0.5, "ema")
    assert config("lsun_church64", "ict-gc").network == config("celeba64", "ict-gc").network
    assert "settings are not" in config("lsun_church64", "ict-gc").about.note


@pytest.mark.parametrize("name", ["folder64", "folder128", "folder256"])
def test_own_images_need_no_labels_and_fit_a_small_gpu(name):
    """80 M parameters; weights, gradient, average, two moments, a teacher and the activations of a micro-batch in 7.5 GB."""
    c = config(name, "ict", sets=["network.dropout=0"])
    network, image, noise = on_meta(c)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters <= 80_000_000 and not c.data.labels
    assert f"{parameters / 1e6:.0f} M parameters" in c.about.note
    needed = 6 * 4 * parameters + c.train.micro_batch * saved_bytes(network, image, noise)
    assert needed < 6.5e9
    # The images that a posterior mean runs over, with their mirrored copies; that recipe has no teacher.
    images = config(name, "ict-pm").recipe.direction.reference * 2 * 3 * c.data.resolution**2 * 4
    assert 0 < images < 1e9 and needed - 4 * parameters + images < 7e9


@pytest.mark.gpu
def test_256_pixels_fit_in_7_5_gb_on_a_real_device():
    import torch

    from cmtool.networks.build import build_network

    c = config("folder256", "ict")
    network = build_network(c.network, channels=3, resolution=256, num_classes=None).cuda().train()
    optimizer = torch.optim.RAdam(network.parameters())
    images = torch.randn(c.train.micro_batch, 3, 256, 256, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        network(images, torch.zeros(len(images), device="cuda")).square().mean().backward()
        optimizer.step()
    weights = sum(parameter.numel() * 4 for parameter in network.parameters())
    assert torch.cuda.max_memory_allocated() + 2 * weights < 7.5e9, "the average and a teacher come on top"
