"""cmtool: train, distil, sample, edit and judge consistency models.

In five lines:

    import cmtool

    model = cmtool.load("demo/shapes")
    images = model.sample(16, steps=2, seed=0)
    cmtool.save(images, "grid.png")
    filled = cmtool.edit.inpaint(model, "photo.png", "mask.png")
    print(cmtool.evaluate(model, "shapes")["fid"])

Each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cmtool.version import __version__ as __version__

if TYPE_CHECKING:
    from cmtool.api import Model as Model
    from cmtool.api import edit as edit
    from cmtool.api import load as load
    from cmtool.api import sample as sample
    from cmtool.api import save as save
    from cmtool.api.evaluate import evaluate as evaluate
    from cmtool.api.evaluate import search_times as search_times

__all__ = ["Model", "__version__", "edit", "evaluate", "load", "sample", "save", "search_times"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and the command line and `cmtool.__version__` do not need it.
    if name in __all__:
        from cmtool import api

        return getattr(api, name)
    raise AttributeError(f"module 'cmtool' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
