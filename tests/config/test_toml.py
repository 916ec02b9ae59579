"""Writing and reading TOML: whatever a configuration can hold comes back unchanged."""

from __future__ import annotations

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from cmtool.config.load import resolve
from cmtool.config.schema import RunConfig
from cmtool.config.toml import write_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), TEXT)
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4))
)


@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_tables_survive(tables):
    assert tomllib.loads(write_toml(tables)) == tables


def test_none_is_left_out_and_tables_follow_plain_values():
    text = write_toml({"a": {"b": None, "c": 1, "d": {"e": 2}}, "f": 3, "g": {}})
    assert text == "f = 3\n\n[a]\nc = 1\n\n[a.d]\ne = 2\n\n[g]\n"


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "train.lr": st.floats(1e-12, 10),
            "train.steps": st.integers(1, 2**62),
            "train.betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
            "train.grad_clip": st.one_of(st.none(), st.floats(1e-6, 1e6)),
            "train.deterministic": st.booleans(),
            "network.num_blocks": st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9))),
            "network.channel_mult": st.tuples(st.integers(1, 9), st.integers(1, 9)),
            "recipe.distance.c": st.one_of(st.none(), st.floats(0, 10)),
            "recipe.options": st.dictionaries(TEXT, st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=3),
            "data.path": TEXT,
            "init": TEXT,
        },
    )
)
def test_configurations_survive(flags):
    config = resolve("digits", recipe="ict", flags=flags).config
    text = write_toml(config.model_dump())
    assert RunConfig.model_validate(tomllib.loads(text)) == config
