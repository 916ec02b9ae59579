"""Names that a command line may hold, checked without importing anything heavy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cmtool.config.find import list_presets
from cmtool.errors import DataError, UsageError, unknown

# The metrics of a plain run, and those that are asked for by name.
METRICS = ("fid", "sfid", "is", "kid", "pr", "dc", "classes")
EXTRA = ("memorization", "consistency")
# The keys of a result, null where one does not apply.
KEYS = (
    "fid",
    "sfid",
    "is",
    "is_std",
    "kid",
    "kid_std",
    "precision",
    "recall",
    "density",
    "coverage",
    "class_agreement",
)
FEATURES = ("inception", "digits", "shapes", "points")
MODES = ("legacy_tensorflow", "clean", "legacy_pytorch")
REFERENCES = (
    "digits",
    "shapes",
    "toy2d",
    "cifar10",
    "imagenet64",
    "imagenet64-edm",
    "lsun_bedroom256",
    "lsun_cat256",
)


def check_metrics(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the metrics asked for, None for all that apply; raises `UsageError` for an unknown one."""
    if not names:
        return None
    for name in names:
        if name not in (*METRICS, *EXTRA):
            raise UsageError(unknown("metric", name, (*METRICS, *EXTRA)))
    return tuple(dict.fromkeys(names))


def check_features(name: str | None) -> None:
    """Refuse a feature network that is neither a name nor a .pt file; raises `UsageError`."""
    if name is None or name in FEATURES:
        return
    if not name.endswith((".pt", ".pth")):
        raise UsageError(unknown("feature network", name, FEATURES), "or the path of a TorchScript module (FILE.pt)")
    if not Path(name).is_file():
        raise UsageError(f"there are no features at {name}.", f"choose from {', '.join(FEATURES)}, or name a FILE.pt")


def check_mode(name: str | None) -> None:
    """Refuse an unknown resizing rule; raises `UsageError`."""
    if name is not None and name not in MODES:
        raise UsageError(unknown("resizing mode", name, MODES))


def check_reference_name(text: str) -> None:
    """Refuse a reference that is no name, no file and no preset; raises `DataError`."""
    if text not in REFERENCES and not Path(text).exists() and text not in list_presets():
        raise DataError(unknown("reference", text, REFERENCES), "or name an .npz, a folder of images, or a preset")
