"""MkDocs hook: the reference pages are written from the code at every build, so that they cannot fall behind it."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["COLUMNS"] = "80"


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for name, page in pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=page))
    return files


def pages() -> dict[str, str]:
    """Return the text of every reference page by its name."""
    return {"commands": commands(), "settings": settings(), "methods": methods(), "python": python()}


# --- commands ---


def every_command() -> Iterator[tuple[str, Any]]:
    """Yield (words after `cmtool`, click command) of every command and sub-command."""
    import typer

    from cmtool.cli.app import app, available

    group: Any = typer.main.get_command(app)
    for name in available():
        command = group.get_command(None, name)
        yield name, command
        for inner, sub in getattr(command, "commands", {}).items():
            yield f"{name} {inner}", sub


def help_of(words: str, command: Any) -> str:
    """Return what `cmtool WORDS --help` prints."""
    import typer

    context = typer.Context(command, info_name=f"cmtool {words}")
    context.help_option_names = ["-h", "--help"]
    return command.get_help(context)


def commands() -> str:
    """Return the page of commands: each one's help as it is printed."""
    parts = [
        "# Commands\n\nWhat `cmtool COMMAND --help` prints. Data go to stdout or files, talk and progress to stderr. "
        "Every command takes `--json`: one document on stdout and nothing else.\n\n"
        "Exit codes: 0 done, 1 your mistake (one sentence says which), 2 wrong usage, 130 interrupted, 143 terminated."
    ]
    parts += [f"## {words}\n\n```text\n{help_of(words, command)}\n```" for words, command in every_command()]
    return "\n\n".join(parts) + "\n"


# --- settings ---


def settings() -> str:
    """Return the page of settings: every table of a preset with types, defaults, bounds and meaning."""
    from cmtool.config import parts as recipe_parts
    from cmtool.config.schema import EditLevels, RunConfig

    out = [
        "# Settings\n\nA preset is one TOML file with the tables below; `cmtool presets NAME` prints one with every "
        "setting, and `--set table.key=value` changes any of them. `recipe.` means the chosen recipe."
    ]
    for name in ("about", "data", "network", "process", "train", "sample", "edit", "eval"):
        kinds = get_args(RunConfig.model_fields[name].annotation)
        for kind in kinds:  # told apart by their `kind`
            out.append(_table(f'{name}: kind = "{kind.model_fields["kind"].default}"', kind))
        if not kinds:
            out.append(_table(name, RunConfig.model_fields[name].annotation))
        if name == "edit":
            out.append(_table("edit.inpaint, edit.colorize, edit.superres", EditLevels))
    out.append(_table("recipe", recipe_parts.RecipeConfig))
    for name, field in recipe_parts.RecipeConfig.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            out.append(_table(f"recipe.{name}", field.annotation))
    return "\n\n".join(out) + "\n"


def _table(name: str, model: Any) -> str:
    rows = [
        f"| `{key}` | {_type(field.annotation)} | {_default(field)} | {_meaning(field)} |"
        for key, field in model.model_fields.items()
        if not hasattr(field.annotation, "model_fields")
    ]
    intro = inspect.cleandoc(model.__doc__ or "")
    head = "| setting | type | default | meaning |\n| --- | --- | --- | --- |\n"
    return f"## `[{name}]`\n\n{intro}\n\n{head}" + "\n".join(rows)


def _type(annotation: Any) -> str:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    for name in ("typing.", "cmtool.config.schema.", "cmtool.config.parts."):
        text = text.replace(name, "")
    text = re.sub(r"Annotated\[(\w+), FieldInfo\([^\]]*\]\)\]", r"\1", text)
    text = re.sub(r"^Union\[(.*)\]$", lambda found: found[1].replace(", ", " | "), text)
    text = re.sub(r"Literal\[([^\]]*)\]", lambda found: _choices(found[1]), text)
    return text.replace(" | ", " or ").replace("NoneType", "None").replace("<", "&lt;")


def _choices(text: str) -> str:
    return ", ".join(f"`{choice.strip()}`" for choice in text.replace("'", '"').split(","))


def _default(field: Any) -> str:
    if field.is_required():
        return "*must be given*"
    value = field.get_default(call_default_factory=True)
    if hasattr(value, "model_dump"):
        return "`{...}`"
    return f"`{value}`".replace("|", "\\|") if value != "" else ""


def _meaning(field: Any) -> str:
    signs = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}
    bounds = [
        f"{signs[type(rule).__name__]} {next(iter(vars(rule).values()), '') if vars(rule) else ''}".strip()
        if hasattr(rule, "__dict__") and vars(rule)
        else f"{signs[type(rule).__name__]} {getattr(rule, type(rule).__name__.lower())}"
        for rule in field.metadata
        if type(rule).__name__ in signs
    ]
    said = (field.description or "").replace("|", "\\|")
    return said + (f" ({', '.join(bounds)})" if bounds else "")


# --- methods ---


def methods() -> str:
    """Return the page of methods: every recipe that can be named, and what the presets publish for them."""
    from cmtool.config.find import list_presets
    from cmtool.config.load import read_preset, resolve
    from cmtool.config.methods import METHODS

    out = [
        "# Methods\n\nEach can be named by any preset: `--recipe NAME`. *Needs* says what must be there before.\n",
        "| method | command | what it is | needs |\n| --- | --- | --- | --- |",
    ]
    for name, row in METHODS.items():
        out.append(f"| `{name}` | `train-{row['family']}` | {row.get('title', '')} | {row.get('needs', 'nothing')} |")
    out.append("\n## Published figures\n\nFID in one and two evaluations, as the papers give them.\n")
    out.append("| preset | recipe | 1 | 2 | source |\n| --- | --- | --- | --- | --- |")
    for preset in list_presets():
        for recipe in read_preset(preset).recipes:
            expected = resolve(preset, recipe=recipe).config.recipe.expected
            if expected is not None and (expected.nfe1 or expected.nfe2):
                figures = " | ".join("-" if value is None else f"{value:g}" for value in (expected.nfe1, expected.nfe2))
                out.append(f"| `{preset}` | `{recipe}` | {figures} | {expected.source} |")
    return "\n".join(out) + "\n"


# --- Python ---


def python() -> str:
    """Return the page of the Python interface: signatures and docstrings of what `import cmtool` offers."""
    import cmtool
    from cmtool.api import edit

    out = [f"# Python\n\n```python\n{_example(cmtool.__doc__ or '')}\n```"]
    for name in ("load", "sample", "evaluate", "search_times", "train", "save"):
        out.append(_entry(f"cmtool.{name}", getattr(cmtool, name)))
    out.append(f"## cmtool.Model\n\n{_prose(cmtool.Model)}")
    for name, member in vars(cmtool.Model).items():
        if not name.startswith("_") or name == "__call__":
            target = member.fget if isinstance(member, property) else member
            out.append(_entry(f"Model.{name}", target, "###", isinstance(member, property)))
    out.append(f"## cmtool.edit\n\n{_prose(edit)}")
    for name in ("inpaint", "colorize", "superres", "stroke", "denoise"):
        out.append(_entry(f"cmtool.edit.{name}", getattr(edit, name), "###"))
    return "\n\n".join(out) + "\n"


def _example(text: str) -> str:
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith("    ") or not line.strip()).strip()


def _prose(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


def _signature(function: Any) -> str:
    """Return a signature without the quotes that postponed annotations are printed in."""
    signature = inspect.signature(function)
    said = [str(parameter) for name, parameter in signature.parameters.items() if name != "self"]
    kinds = [parameter.kind for name, parameter in signature.parameters.items() if name != "self"]
    if inspect.Parameter.KEYWORD_ONLY in kinds:
        said.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    answer = "" if signature.return_annotation is inspect.Parameter.empty else f" -> {signature.return_annotation}"
    short = f"({', '.join(said)}){answer}"
    text = short if len(short) < 80 else "(\n    " + ",\n    ".join(said) + f",\n){answer}"
    return re.sub(r": '([^']*)'", r": \1", text)


def _entry(name: str, function: Any, level: str = "##", is_property: bool = False) -> str:
    signature = "" if is_property else _signature(function)
    said = inspect.cleandoc(function.__doc__ or "")
    # Sections of a docstring (Args:, Raises:) are indented text: shown as it stands.
    first, *rest = said.split("\n\n")
    body = "\n\n".join(rest)
    shown = f"\n\n```text\n{body}\n```" if body else ""
    return f"{level} {name}\n\n```python\n{name}{signature}\n```\n\n{first}{shown}"
