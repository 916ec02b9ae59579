"""From preset, method, recipe, flags and --set to one configuration: the later wins, and each value knows its origin."""

from __future__ import annotations

import pytest

from cmtool.config.find import find_preset, list_presets
from cmtool.config.load import differing_keys, from_toml, merge, resolve, to_toml
from cmtool.config.overrides import Override
from cmtool.config.toml import parse_value
from cmtool.errors import ConfigError

MINE = """
[data]
source = "shapes"
resolution = 16

[network]
channels = 16

[train]
steps = 100
lr = 2e-3
default = { ct = "mine" }

[recipe.mine]
method = "ict"
lr = 1e-3
betas = [0.5, 0.9]
curriculum = { s1 = 40 }
network = { channels = 24 }
sample = { times = { 2 = [80.0, 1.0] } }
expected = { nfe1 = 9.0 }

[recipe.cd]
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "mine.toml").write_text(MINE)
    return tmp_path / "presets" / "mine.toml"


def test_each_layer_wins_over_the_one_before(mine):
    bare = resolve("mine", recipe="ct").config
    assert (bare.train.lr, bare.network.channels, bare.recipe.curriculum.s1) == (2e-3, 16, 150)
    recipe = resolve("mine").config
    assert (recipe.train.lr, recipe.network.channels, recipe.recipe.curriculum.s1) == (1e-3, 24, 40)
    assert recipe.recipe.curriculum.s0 == 10 and recipe.recipe.distance.kind == "pseudo_huber"
    flagged = resolve("mine", flags={"train.lr": 5e-4, "train.steps": 7, "train.seed": None}).config
    assert (flagged.train.lr, flagged.train.steps, flagged.train.seed) == (5e-4, 7, 0)
    both = resolve("mine", flags={"train.lr": 5e-4}, sets=["train.lr=1e-5", "train.lr=2e-5"])
    assert both.config.train.lr == 2e-5


def test_every_value_remembers_where_it_was_written(mine):
    origins = resolve("mine", flags={"train.steps": 7, "teacher": "t"}, sets=["recipe.lr=1e-5"]).origins
    assert origins["data.source"] == "presets/mine.toml: data.source"
    assert origins["network.channels"] == "presets/mine.toml: recipe.mine.network.channels"
    assert origins["recipe.curriculum.s1"] == "presets/mine.toml: recipe.mine.curriculum.s1"
    assert origins["recipe.curriculum.s0"] == "method ict: curriculum.s0"
    assert (origins["train.steps"], origins["train.lr"]) == ("--steps", "--set recipe.lr")
    assert "train.seed" not in origins


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("recipe.lr=1e-4", lambda c: c.train.lr == 1e-4),
        ("train.lr=1e-4", lambda c: c.train.lr == 1e-4),
        ("recipe.mine.lr=1e-4", lambda c: c.train.lr == 1e-4),
        ("recipe.curriculum.s1=20", lambda c: c.recipe.curriculum.s1 == 20),
        ("recipe.mine.curriculum.s1=20", lambda c: c.recipe.curriculum.s1 == 20),
        ("recipe.network.channels=48", lambda c: c.network.channels == 48),
        ("network.channels=48", lambda c: c.network.channels == 48),
        ("network.channel_mult=[1, 2, 4]", lambda c: c.network.channel_mult == (1, 2, 4)),
        ("network.num_blocks=[1, 2]", lambda c: c.network.num_blocks == (1, 2)),
        ("recipe.distance.kind=l1", lambda c: c.recipe.distance.kind == "l1"),
        ("recipe.distance={kind = 'l2', c = 0.5}", lambda c: c.recipe.distance.c == 0.5),
        ("recipe.options={a = 1}", lambda c: c.recipe.options == {"a": 1}),
        ("data.flip=true", lambda c: c.data.flip is True),
        ("data.path=some/where else", lambda c: c.data.path == "some/where else"),
        ("data.path = 'quoted=with equals'", lambda c: c.data.path == "quoted=with equals"),
        ("train.ema.decay=0.9", lambda c: c.train.ema.decay == 0.9 and c.train.ema.kind == "exponential"),
        ("recipe.times.std=1.5", lambda c: c.recipe.times.std == 1.5 and c.recipe.times.mean == -1.1),
        ("sample.times={3 = [80.0, 2.0, 0.5]}", lambda c: c.sample.times == {"2": (80, 1), "3": (80, 2, 0.5)}),
        ("train.grad_clip=", lambda c: c.train.grad_clip is None),
    ],
)
def test_set_reaches_every_kind_of_setting(mine, text, read):
    assert read(resolve("mine", sets=[text]).config)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 0.0001),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("'x'", "x"),
        ("ict", "ict"),
        ("", None),
        ("{a = 1}", {"a": 1}),
        ("1\nx = 2", "1\nx = 2"),
        ("80,0.8", "80,0.8"),
        ("True", "True"),
        ("C:\\photos", "C:\\photos"),
    ],
)
def test_a_value_is_toml_or_else_text(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_the_recipe_of_a_command(mine):
    assert resolve("mine", family="ct").config.recipe_name == "mine"
    assert resolve("mine", family="cd").config.recipe_name == "cd"
    assert resolve("mine", family="edm").config.recipe.method == "edm"
    euler = resolve("mine", family="cd", recipe="cd-euler").config
    assert (euler.recipe_name, euler.recipe.direction.solver, euler.family) == ("cd-euler", "euler", "cd")


def test_a_smaller_batch_shrinks_the_presets_micro_batch_but_not_yours():
    assert resolve("folder64", flags={"train.batch_size": 8}).config.train.micro_batch == 8
    with pytest.raises(ConfigError, match="--micro-batch: micro_batch = 9 is larger than batch_size = 8"):
        resolve("folder64", flags={"train.batch_size": 8, "train.micro_batch": 9})


def test_merge_goes_key_by_key():
    layers = [Override(("a", "b"), 1, "one"), Override(("a", "c"), 2, "two"), Override(("a",), {"c": 3}, "three")]
    assert merge(layers)[0] == {"a": {"b": 1, "c": 3}}
    assert merge([*layers, Override(("a",), {}, "four")])[0] == {"a": {"b": 1, "c": 3}}


def test_a_run_reads_back_what_it_wrote(mine, tmp_path):
    config = resolve("mine", flags={"init": 'a "quoted" \\ name'}).config
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert from_toml(tmp_path / "config.toml") == config


def test_presets_are_found_by_path_here_and_in_the_package(mine, tmp_path):
    assert find_preset("mine") == find_preset("presets/mine.toml")
    assert find_preset(str(mine)) == mine
    assert {"mine", "digits", "cifar10"} <= set(list_presets())
    (tmp_path / "presets" / "digits.toml").write_text(MINE)
    assert resolve("digits").config.data.source == "shapes", "a preset of one's own hides the shipped one"


def test_what_makes_two_runs_different(mine):
    base = resolve("mine").config
    rhythm = [
        "train.log_every=3",
        "train.checkpoint_every=5",
        "train.sample_every=7",
        "train.eval_every=2",
        "train.keep_every=9",
    ]
    free = resolve("mine", sets=[*rhythm, "train.threads=2", "train.micro_batch=4", "recipe.title=y"]).config
    assert differing_keys(base, free) == []
    other = resolve("mine", sets=["train.lr=7e-4", "network.channels=8", "train.steps=200"]).config
    assert differing_keys(base, other) == [
        ("network.channels", 24, 8),
        ("train.steps", 100, 200),
        ("train.lr", 1e-3, 7e-4),
    ]


def test_a_precision_left_to_the_machine_is_no_difference(mine):
    auto, single, half = (resolve("mine", sets=[f"train.precision={name}"]).config for name in ("auto", "fp32", "bf16"))
    assert differing_keys(auto, single) == [] and differing_keys(half, auto) == []
    assert differing_keys(single, half) == [("train.precision", "fp32", "bf16")]
