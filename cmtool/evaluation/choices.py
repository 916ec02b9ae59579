"""The names that a command line can hold, checked without importing anything heavy."""

from __future__ import annotations

from pathlib import Path

from cmtool.config.find import list_presets
from cmtool.errors import DataError, UsageError, unknown

FEATURES = ("inception", "imagenet", "digits", "shapes", "small", "points")
MODES = ("legacy_tensorflow", "clean", "legacy_pytorch")
REFERENCES = (
    "digits",
    "avatars",
    "shapes",
    "toy2d",
    "cifar10",
    "imagenet64",
    "imagenet64-edm",
    "imagenet256",
    "lsun_bedroom256",
    "lsun_cat256",
)


def check_features(name: str | None) -> None:
    """Refuse a feature network that is neither a name, nor a model of timm, nor a .pt file; raises `UsageError`."""
    if name is None or name in FEATURES or name.startswith("timm:"):
        return
    if not name.endswith((".pt", ".pth")):
        raise UsageError(
            unknown("feature network", name, FEATURES), "or timm:NAME, or the path of a TorchScript module (FILE.pt)"
        )
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
