"""cmtool: train, distil, sample, edit and judge consistency models.

In five lines:

    import cmtool

    model = cmtool.load("demo/avatars")
    images = model.sample(16, steps=2, seed=0)
    cmtool.save(images, "grid.png")
    filled = cmtool.edit.inpaint(model, "photo.png", "mask.png")
    print(cmtool.evaluate(model, "avatars")["fid"])

And `cmtool.train("photos/", time="30m")` makes a model of your own pictures; `cmtool.plan("photos/")` says what to
expect.

Each name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cmtool.version import __version__ as __version__

if TYPE_CHECKING:
    from cmtool.api import edit as edit
    from cmtool.api.evaluate import evaluate as evaluate
    from cmtool.api.evaluate import search_times as search_times
    from cmtool.api.model import Model as Model
    from cmtool.api.model import load as load
    from cmtool.api.model import sample as sample
    from cmtool.api.model import save as save
    from cmtool.api.plan_run import plan as plan
    from cmtool.api.train import train as train

# Where each name lies: a module below cmtool.api, or something in one.
_PLACES = {
    "Model": "model",
    "edit": "edit",
    "evaluate": "evaluate",
    "search_times": "evaluate",
    "load": "model",
    "sample": "model",
    "plan": "plan_run",
    "save": "model",
    "train": "train",
}
__all__ = ["Model", "__version__", "edit", "evaluate", "load", "plan", "sample", "save", "search_times", "train"]


def __getattr__(name: str) -> Any:
    # Imported on first use: torch takes seconds, and the command line and `cmtool.__version__` do not need it.
    if name in _PLACES:
        module = importlib.import_module(f"cmtool.api.{_PLACES[name]}")
        return module if name == "edit" else getattr(module, name)
    raise AttributeError(f"module 'cmtool' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
