"""One row a data source, read by everybody who knows something of a source by its name."""

import pytest

from cmtool.config.schema import DataConfig
from cmtool.config.sources import DATA_SOURCES, SOURCES, named_source, source_of_path
from cmtool.data import load_dataset
from cmtool.data.builtin import BUILTIN
from cmtool.data.sources.known import KNOWN


def test_every_source_has_a_row_and_a_reader():
    assert tuple(SOURCES) == DATA_SOURCES
    assert {name for name, row in SOURCES.items() if row.built_in} == set(BUILTIN)
    assert {name for name, row in SOURCES.items() if not row.built_in and not row.needs_path} == set(KNOWN)


@pytest.mark.parametrize("name", [name for name, row in SOURCES.items() if row.built_in])
def test_the_usual_size_of_a_built_in_source_loads(name):
    resolution, channels = SOURCES[name].usual
    data = load_dataset(DataConfig(source=name, resolution=resolution, channels=channels, size=20))
    assert (data.resolution, data.channels, data.float_samples) == (resolution, channels, SOURCES[name].points)


def test_names_and_endings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_source("digits") == "digits" and named_source("digit") is None and named_source(None) is None
    (tmp_path / "digits").mkdir()
    assert named_source("digits") is None
    kinds = {"a.npz": "npz", "a.cmdata": "packed", "photos": "folder", "a.zip": "folder", "lsun:x.npz": "lsun"}
    assert {path: source_of_path(path) for path in kinds} == kinds
