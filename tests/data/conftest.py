import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Keep packed copies and downloads of a test to itself, and the network out."""
    monkeypatch.setenv("CMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CMTOOL_OFFLINE", "1")
    monkeypatch.delenv("CMTOOL_DATA", raising=False)


@pytest.fixture
def pixels():
    """RGB noise: pixels(seed, height, width)."""

    def make(seed, height=12, width=12):
        return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return make


@pytest.fixture
def class_folder(tmp_path, pixels):
    """Three classes, two images each, one exact duplicate, a text file beside them."""
    root = tmp_path / "photos"
    for index, name in enumerate(["cat", "cat", "dog", "dog", "owl", "owl"]):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(min(index, 4))).save(root / name / f"{index}.png")
    (root / "notes.txt").write_text("not an image")
    return root
