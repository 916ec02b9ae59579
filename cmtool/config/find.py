"""From the name of a preset to its file.

A preset is searched for as a path, then in `./presets`, then among those shipped inside the package, and last beside
the package, where an editable install keeps them.
"""

from __future__ import annotations

from pathlib import Path

from cmtool.errors import ConfigError, unknown

PACKAGE = Path(__file__).resolve().parent.parent


def preset_folders() -> list[Path]:
    """Return the existing folders that hold presets, in the order of the search."""
    folders = [Path("presets"), PACKAGE / "presets", PACKAGE.parent / "presets"]
    return [folder for folder in folders if folder.is_dir()]


def list_presets() -> dict[str, Path]:
    """Return every preset that can be named, in alphabetical order, with its file."""
    found: dict[str, Path] = {}
    for folder in preset_folders():
        for path in sorted(folder.glob("*.toml")):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def find_preset(name: str) -> Path:
    """Return the file of a preset.

    Args:
        name: a name such as "digits", or the path of a TOML file.

    Raises:
        ConfigError: no such file or name; the nearest names are given.
    """
    if name.endswith(".toml") or "/" in name or "\\" in name:
        return _by_path(name)
    presets = list_presets()
    if name in presets:
        return presets[name]
    if Path(name).is_file():
        raise ConfigError(f"'{name}' is a file but not a preset: the name of a preset file ends in .toml")
    hint = "cmtool presets lists them; a file of your own is given by its path (my.toml)."
    raise ConfigError(unknown("preset", name, presets), hint)


def _by_path(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    what = "is a folder, not a preset file" if path.is_dir() else "does not exist"
    hint = "cmtool presets lists those that can be given by name."
    if path.stem in list_presets():
        hint = f"There is a preset named {path.stem}: give --preset {path.stem}."
    raise ConfigError(f"preset file {name} {what}", hint)


def shown(path: Path) -> str:
    """Return a preset file's name for messages: relative to the working folder, or presets/NAME.toml if shipped."""
    path = path.resolve()
    for folder, label in ((Path.cwd(), Path()), (PACKAGE / "presets", Path("presets")), (PACKAGE.parent, Path())):
        if path.is_relative_to(folder.resolve()):
            return (label / path.relative_to(folder.resolve())).as_posix()
    return str(path)
