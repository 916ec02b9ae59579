"""Examples in help texts: told in one sentence of a docstring, shown one below another, so that each can be copied."""

from __future__ import annotations

import re

# Click writes help texts into 78 columns, indented by two; examples stand two further in.
_WIDTH = 74
_EXAMPLES = re.compile(r"\s*\bExamples?: (.*)", re.DOTALL)


def lay_out_examples(text: str | None) -> str | None:
    """Return a help text whose last sentence `Examples: cmtool a | cmtool b` has become lines that click leaves alone.

    A command longer than a line continues after a backslash, as shells read it. Texts without examples are unchanged.
    """
    found = _EXAMPLES.search(text or "")
    if text is None or found is None:
        return text
    commands = re.split(r" \| |, then: ", " ".join(found[1].split()).removesuffix("."))
    lines = [line for command in commands for line in _folded(command)]
    head = "Examples:" if len(commands) > 1 else "Example:"
    # The \b keeps click from filling the paragraph.
    return f"{text[: found.start()]}\n\n\b\n{head}\n".lstrip("\n") + "\n".join(f"  {line}" for line in lines)


def first_clause(text: str | None) -> str:
    """Return the first sentence of a help text up to its first colon or semicolon: its line in a list of commands."""
    sentence = " ".join((text or "").split("\n\n")[0].split())
    return re.split(r"[:;] |\.(?: |$)", sentence)[0] + "." if sentence else ""


def _folded(command: str) -> list[str]:
    lines = [""]
    for word in command.split(" "):
        if len(lines[-1]) + len(word) + 3 > _WIDTH:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines
