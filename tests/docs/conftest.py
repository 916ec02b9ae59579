"""A folder in which everything lies that README, docs and help texts speak of."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cli.tiny import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything that the pages speak of: photos, a mask, models of the right names. Tiny, so that minutes are seconds."""
    place = tmp_path_factory.mktemp("docs")
    from PIL import Image

    pixels = np.random.default_rng(0)
    picture = lambda side, mode: Image.fromarray(pixels.integers(0, 256, (side, side, 3), dtype=np.uint8)).convert(mode)  # noqa: E731
    for name in ("photo", "scribble", "noisy", "gray"):
        picture(16, "RGB").save(place / f"{name}.png")
    picture(8, "RGB").save(place / "small.png")
    picture(16, "RGB").save(place / "blurred.png")
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[4:12, 4:12] = 255
    Image.fromarray(mask).save(place / "mask.png")
    (place / "photos").mkdir()
    for index in range(12):
        picture(64, "RGB").save(place / "photos" / f"{index}.png")
    demos = place / "demo"
    demos.mkdir()
    shapes = write_model(place, "shapes-demo", resolution=16, num_classes=5, names=list("abcde"))
    shapes.rename(demos / "shapes.safetensors")
    write_model(place, "digits-demo", channels=1, source="digits").rename(demos / "digits.safetensors")
    write_model(place, "avatars-demo", resolution=16, source="avatars").rename(demos / "avatars.safetensors")
    for name in ("shapes-demo", "digits-demo", "avatars-demo"):
        (place / "runs" / name).rmdir()
    return place


@pytest.fixture
def here(folder, monkeypatch):
    import cmtool.api.plan_run as plans
    import cmtool.api.train as training
    import cmtool.interop.published as names
    from cmtool.api.plan import Speeds
    from cmtool.evaluation import pretrained

    monkeypatch.chdir(folder)
    monkeypatch.setenv("CMTOOL_CACHE", str(folder / "cache"))
    monkeypatch.setattr(names, "DEMOS", folder / "demo")
    # The search for sampling times at the end of a training takes longer than everything else here together.
    monkeypatch.setattr(training, "judges", lambda trainer, talk: (None, None))
    monkeypatch.setattr(pretrained, "has_imagenet", lambda: False)  # half a minute for the reference alone
    monkeypatch.setattr(plans, "measure_speeds", lambda *given: Speeds({("small", 16): 400.0}))  # instead of 6 s each
    return folder
