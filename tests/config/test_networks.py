"""The [network] table: one for each kind, told apart by `kind`, in files and messages as when all kinds shared one."""

import pytest
from pydantic import ValidationError

from cmtool.config.load import from_toml, resolve, to_toml
from cmtool.config.networks import NETWORKS, MlpConfig, NetworkConfig, SongConfig, network_config
from cmtool.errors import ConfigError
from cmtool.models import build_model
from cmtool.networks.build import build_network, network_class

# What a model file held of its network when all kinds shared one table.
EVERY_SETTING = {
    "channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attention": [4],
    "head_channels": 8,
    "group_channels": 1,
    "dropout": 0.0,
    "scale_shift": True,
    "embedding": "positional",
    "fourier_scale": 16.0,
    "encoder": "standard",
    "resample_filter": [1, 1],
    "two_time": False,
    "log_variance": False,
    "attention_kernel": "auto",
    "checkpointing": False,
}


def header(kind, **network):
    return {
        "kind": "consistency",
        "network": {"kind": kind, **EVERY_SETTING, **network},
        "process": {},
        "data": {"channels": 1, "resolution": 8, "num_classes": None},
    }


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("others", ["as written", "null"])
def test_headers_with_the_settings_of_all_kinds_load(kind, others):
    own = set(NETWORKS[kind].model_fields)
    nothing = {name: None for name in EVERY_SETTING if name not in own} if others == "null" else {}
    model = build_model(header(kind, **nothing))
    assert type(model.network) is network_class(network_config(kind=kind))


@pytest.mark.parametrize("kind", ["adm", "mlp", "song", "edm2"])
def test_files_name_every_setting_in_the_order_they_always_had(kind):
    table = network_config(
        kind=kind, **{name: EVERY_SETTING[name] for name in ("channels", "channel_mult", "attention")}
    )
    written = table.model_dump(mode="json")
    assert list(written) == ["kind", *EVERY_SETTING]
    assert network_config(**written) == table
    assert all(isinstance(written[name], list) for name in ("channel_mult", "attention", "resample_filter"))


def test_a_run_writes_its_network_and_reads_it_back(tmp_path):
    config = resolve("cifar10", recipe="ict").config
    assert isinstance(config.network, SongConfig)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert from_toml(tmp_path / "config.toml") == config


def test_another_kind_takes_what_it_knows_of_a_presets_table():
    network = resolve("digits", recipe="ict", sets=["network.kind=mlp"]).config.network
    assert isinstance(network, MlpConfig)
    assert network.channels == resolve("digits", recipe="ict").config.network.channels
    assert not hasattr(network, "channel_mult")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "network.kind=sonng",
            "--set network.kind = 'sonng' is unknown; choose adm, mlp, song, edm2, dit. Did you mean song?",
        ),
        ("network.kind=3", "--set network.kind = 3 is unknown; choose adm, mlp, song, edm2, dit."),
        ("network.encodr=residual", "augment_labels, patch, width, depth, heads, mlp_ratio"),
        ("network.channels=2", "--set network.channels = 2 must be at least 4"),
        ("network.num_blocks=x", "--set network.num_blocks = 'x' must be a whole number or a list"),
        ("network.attention=[4.5]", "--set network.attention = 4.5 must be a whole number"),
    ],
)
def test_a_wrong_setting_is_named_as_it_was_typed(setting, words):
    with pytest.raises(ConfigError) as error:
        resolve("digits", recipe="ict", sets=[setting])
    assert words in str(error.value)


def test_a_preset_of_an_unknown_kind_names_its_place(tmp_path):
    from cmtool.config.show import preset_document

    path = tmp_path / "mine.toml"
    path.write_text('[data]\nsource = "digits"\nresolution = 8\n[train]\nsteps = 1\n[network]\nkind = "unet"\n')
    with pytest.raises(ConfigError, match=r"mine.toml: network.kind = 'unet' is unknown; choose adm"):
        preset_document(str(path))
    with pytest.raises(ConfigError, match=r"mine.toml: network.kind = 'unet' is unknown; choose adm"):
        resolve(str(path), recipe="ict")


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ({"kind": "vit"}, "choose adm, mlp, song, edm2"),
        ({"kind": "song", "blocks": 3}, "blocks"),
        ({"kind": "adm", "channels": -1}, "channels"),
        ({"kind": ["adm"]}, "choose adm"),
    ],
)
def test_a_header_of_a_network_that_is_not_known_is_refused(network, words):
    from cmtool.errors import CheckpointError

    with pytest.raises(CheckpointError, match=words):
        build_model(header("adm") | {"network": network})


@pytest.mark.parametrize(
    ("settings", "side", "words"),
    [
        ({"kind": "adm", "num_blocks": (1, 2, 3)}, 8, "num_blocks has 3 values and network.channel_mult 2"),
        ({"kind": "edm2", "channel_mult": (1, 2, 2)}, 6, "must be a multiple of 4"),
        ({"kind": "song", "channels": 32, "head_channels": 12}, 8, "does not divide the 64 channels"),
        ({"kind": "song", "resample_filter": (1, 2, 1)}, 8, "even number of taps, not 3"),
        ({"kind": "mlp", "dropout": (0.1, 0.2)}, 8, "an mlp has no levels"),
    ],
)
def test_each_table_refuses_what_its_network_cannot_be(settings, side, words):
    table = network_config(**settings)
    with pytest.raises(ValueError, match=words):
        table.check(side)
    with pytest.raises(ConfigError, match=words):
        build_network(table, channels=1, resolution=side)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_table_made_by_its_class_or_by_its_kind_is_the_same(kind):
    assert NETWORKS[kind](channels=16) == NetworkConfig(kind=kind, channels=16)
    assert NETWORKS[kind]().kind == kind
    with pytest.raises(ValidationError, match="chanels"):
        NETWORKS[kind](chanels=16)


def test_what_may_be_half_is_said_by_the_table():
    assert {kind for kind, table in NETWORKS.items() if table.halves == "convolutions"} == {"adm", "song", "dit"}
