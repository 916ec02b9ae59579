"""Every mistake in a preset or on the command line is one sentence: where, what, what would be right."""

from __future__ import annotations

import pytest

from cmtool.config.load import from_toml, resolve
from cmtool.errors import ConfigError

GOOD = """
[data]
source = "digits"
resolution = 8
channels = 1
[train]
steps = 10
"""
MY = "my.toml"


def sentence(**arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(arguments.pop("preset", "digits"), **arguments)
    assert "\n" not in caught.value.message
    return caught.value.message


def check(said: str, expected: str) -> None:
    """Compare the beginning; after `...` (choices that grow with the schema) the end."""
    start, _, end = expected.partition("...")
    assert said.startswith(start) and said.endswith(end or said[-1]), said


FILES = [
    ("[data\n", "my.toml, line 1, column 6: not valid TOML: Expected ']' at the end of a table declaration"),
    (GOOD + "steps = 3\n", "my.toml, line 8, column 10: not valid TOML: Cannot overwrite a value"),
    ("[train]\nsteps = 1\n", "my.toml: data is missing"),
    ("[data]\n" + GOOD.split("\n[train]")[0].split("[data]\n")[1], "my.toml: train is missing"),
    (GOOD.replace("steps", "stepps"), "my.toml: train.stepps is an unknown key; choose steps, "),
    (GOOD.replace("steps = 10", "lr = 1.0"), "my.toml: train.steps is missing"),
    (
        GOOD.replace("[train]", "[trian]"),
        "my.toml: trian is an unknown key; choose about, data, network, process, train, sample, edit, eval, recipe, plan. Did you mean train?",
    ),
    (
        GOOD + "[netwrok]\n",
        "my.toml: netwrok is an unknown key; choose about, data, network, process, train, sample, edit, eval, recipe, plan. Did you mean network?",
    ),
    (GOOD.replace("8", '"eight"'), "my.toml: data.resolution = 'eight' must be a whole number"),
    (GOOD.replace("8", "2000"), "my.toml: data.resolution = 2000 must be at most 1024"),
    (
        GOOD.replace("digits", "digist"),
        "my.toml: data.source = 'digist' is unknown; choose digits, avatars, shapes, toy2d, ",
    ),
    (GOOD + "lr = 0\n", "my.toml: train.lr = 0 must be greater than 0"),
    (GOOD + "lr = nan\n", "my.toml: train.lr = nan must be a finite number"),
    (GOOD + "betas = [0.9]\n", "my.toml: train.betas has too few values: 1"),
    (GOOD + "betas = [0.9, 1.0]\n", "my.toml: train.betas: both betas must lie in [0, 1)"),
    (GOOD + "deterministic = 'perhaps'\n", "my.toml: train.deterministic = 'perhaps' must be true or false"),
    (GOOD + "default = 'ict'\n", "my.toml: train.default = 'ict' must be a table such as { ct = \"ict\" }"),
    (
        GOOD + "default = { ct = 'cd' }\n",
        "my.toml: train.default.ct = 'cd' must be one of its recipes: ct, ",
    ),
    (GOOD + "default = { dc = 'cd' }\n", "my.toml: train.default.dc is an unknown key; choose edm, ct, cd."),
    (GOOD + "[process]\nsigma_min = 90\n", "my.toml: process: sigma_min = 90.0 must be below sigma_max = 80.0"),
    (GOOD + "[sample.times]\n2 = [1.0, 2.0]\n", "my.toml: sample.times: times['2'] must be strictly decreasing"),
    (
        GOOD + "[sample.times]\n3 = [2.0, 1.0]\n",
        "my.toml: sample.times: times['3'] must hold as many noise levels as its key says",
    ),
    (GOOD + "[recipe.ct]\ncurriculum = 5\n", "my.toml: recipe.ct.curriculum = 5 must be a table"),
    (
        GOOD + "[recipe.ct.distance]\nkind = 'hubr'\n",
        "my.toml: recipe.ct.distance.kind = 'hubr' is unknown; choose l1, l2, ... Did you mean pseudo_huber?",
    ),
    (
        GOOD + "[recipe.ct.distance]\nknid = 'l2'\n",
        "my.toml: recipe.ct.distance.knid is an unknown key; choose kind, ... Did you mean kind?",
    ),
    (
        GOOD + "[recipe.ct]\ncurriculm = { s1 = 3 }\n",
        "my.toml: recipe.ct.curriculm.s1 is an unknown key; choose title, ... Did you mean curriculum?",
    ),
    (GOOD + "[recipe.x]\nmethod = 'itc'\n", "my.toml: recipe.x.method = 'itc' is unknown; choose edm, cd, "),
    (GOOD + "[recipe.x]\nlr = 1.0\n", "my.toml: recipe.x.method is missing; choose edm, cd, "),
]


@pytest.mark.parametrize(("text", "start"), FILES, ids=range(len(FILES)))
def test_a_preset_file_with_a_mistake(tmp_path, monkeypatch, text, start):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MY).write_text(text)
    check(sentence(preset=MY, family="ct"), start)


SETS = [
    ("lr", "--set 'lr' must look like key=value"),
    ("=3", "--set '=3' must look like key=value"),
    ("train..lr=3", "--set 'train..lr=3' must look like key=value"),
    ("lr=3", "--set lr names no setting. Did you mean train.lr?"),
    ("trian.lr=3", "--set trian.lr names no setting. Did you mean train.lr?"),
    ("train=3", "--set train is a whole table; name one of its settings, such as train.lr"),
    ("train.lrr=3", "--set train.lrr is an unknown key; choose steps, time, batch_size, "),
    ("train.lr=fast", "--set train.lr = 'fast' must be a number"),
    ("train.lr=-1", "--set train.lr = -1 must be greater than 0"),
    ("train.steps=2.5", "--set train.steps = 2.5 must be a whole number"),
    ("train.steps=0", "--set train.steps = 0 must be at least 1"),
    ("train.threads=9999", "--set train.threads = 9999 must be at most 1024"),
    ("train.precision=fp8", "--set train.precision = 'fp8' is unknown; choose auto, fp32, bf16, fp16, fp64."),
    (
        "train.ema.kind=exp",
        "--set train.ema.kind = 'exp' is unknown; choose exponential, ... Did you mean exponential?",
    ),
    ("network.num_blocks=many", "--set network.num_blocks = 'many' must be a whole number or a list"),
    ("network.kind=unet", "--set network.kind = 'unet' is unknown; choose adm, "),
    ("recipe.method=ct", "--set recipe.method cannot be set: --recipe chooses the method"),
    ("recipe.learning_rate=1", "--set recipe.learning_rate is an unknown key; choose title, "),
    ("recipe.distance.c=-1", "--set recipe.distance.c = -1 must be at least 0"),
    ("process.sigma_max=0.001", "--set process.sigma_max: sigma_min = 0.002 must be below sigma_max = 0.001"),
    ("data.resolution=", "--set data.resolution = None must be a whole number"),
    (
        "data.resolution=11",
        "network.channel_mult has 2 levels, each half the side of the one before: data.resolution = 11",
    ),
    (
        "network.head_channels=7",
        "network.head_channels = 7 does not divide the 64 channels of an attention layer",
    ),
    ("network.patch=3", "network.patch is a setting of dit, and the network is of kind adm"),
    ("network.width=64", "network.width is a setting of dit, and the network is of kind adm"),
    ("network.num_blocks=[1,2,3]", "network.num_blocks has 3 values and network.channel_mult 2"),
]


@pytest.mark.parametrize(("text", "start"), SETS, ids=[text for text, _ in SETS])
def test_a_wrong_set(text, start):
    check(sentence(family="ct", sets=[text]), start)


def test_what_does_not_go_together_comes_with_what_to_type():
    """The file is blamed for what stands in it alone, and a hint says what to type next."""
    with pytest.raises(ConfigError) as typed:
        resolve("digits", recipe="ict", sets=["recipe.curriculum.s1=5"])
    assert typed.value.message == "recipe.curriculum ends (s1 = 5) before it starts (s0 = 10)."
    assert "--set recipe.curriculum.s1=10 or more" in str(typed.value.hint)
    with pytest.raises(ConfigError) as usual:
        resolve("digits", recipe="ict", sets=["recipe.times.kind=lognormal"])
    assert usual.value.hint == "cmtool presets digits shows every setting; --set KEY=VALUE changes one."
    with pytest.raises(ConfigError) as batch:
        resolve("digits", recipe="ict-ot", flags={"train.batch_size": 1})
    assert batch.value.message.startswith("recipe.coupling.kind = 'ot' exchanges noise")


def test_a_wrong_flag_is_named_as_the_option_it_was():
    assert sentence(flags={"train.steps": 0}) == "--steps = 0 must be at least 1"
    assert (
        sentence(flags={"train.micro_batch": 100}) == "--micro-batch: micro_batch = 100 is larger than batch_size = 64"
    )


def test_unknown_presets_and_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence(preset="digist").endswith("toy2d. Did you mean digits?")
    assert sentence(preset="gone.toml") == "preset file gone.toml does not exist"
    assert sentence(preset="presets/") == "preset file presets/ does not exist"
    check(
        sentence(preset="cifar10", family="ct", recipe="itc"),
        "presets/cifar10.toml: unknown recipe 'itc'; choose from ct, ict, ... Did you mean ict?",
    )
    with pytest.raises(ConfigError) as caught:
        resolve("cifar10", family="ct", recipe="cd")
    check(caught.value.message, "recipe 'cd' belongs to train-cd, not to train-ct; choose ct, ict, ")
    assert caught.value.hint == "cmtool train-cd --preset cifar10 --recipe cd"


def test_files_that_are_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MY).write_bytes(b"\xff\xfe\x00")
    assert sentence(preset=MY) == "my.toml is not a text file in UTF-8"
    (tmp_path / "folder.toml").mkdir()
    assert sentence(preset="folder.toml") == "preset file folder.toml is a folder, not a preset file"
    (tmp_path / "plain").write_text(GOOD)
    assert sentence(preset="plain").startswith("'plain' is a file but not a preset")


def test_a_damaged_run_configuration(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("preset = 'digits'\n")
    with pytest.raises(ConfigError, match=r"config\.toml: recipe_name is missing"):
        from_toml(path)
    with pytest.raises(ConfigError, match=r"gone.toml cannot be read: No such file or directory"):
        from_toml(tmp_path / "gone.toml")
