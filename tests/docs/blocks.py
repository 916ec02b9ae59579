"""Commands and programs as README and docs show them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.parent.name != "reference"]


@dataclass(frozen=True)
class Block:
    """A block of a page: its language, its text, and whether it is meant to be run."""

    page: str
    line: int
    language: str
    text: str
    run: bool

    @property
    def commands(self) -> list[list[str]]:
        """The words of every `cmtool` command in it, in order; what a launcher starts with `-m cmtool` is one."""
        lines = self.text.replace("\\\n", " ").splitlines()
        parts = [part for line in lines for part in re.sub(r"\s+# .*", "", line).split("&&")]
        found = [re.fullmatch(r"\s*(?:.* -m )?(cmtool .*)", part) for part in parts]
        return [shlex.split(match[1]) for match in found if match]

    @property
    def launched(self) -> bool:
        """Whether another program starts its commands, e.g. torchrun."""
        return "-m cmtool" in self.text


def blocks(page: Path) -> list[Block]:
    """Fenced blocks, and indented ones (README); a comment `<!-- not run: why -->` above excuses the next one."""
    name = str(page.relative_to(ROOT))
    found, lines, start, language, excused = [], [], 0, "", False
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), ""], 1):
        if start:
            if line.startswith("```"):
                found.append(Block(name, start, language, "\n".join(lines), not excused))
                start, excused = 0, False
            else:
                lines.append(line)
        elif line.startswith("```"):
            start, language, lines = number, line[3:].strip(), []
        elif line.startswith("    ") and not line.strip().startswith(("-", "*")):
            found.append(Block(name, number, "sh", line.strip(), not excused))
        elif line.startswith("<!-- not run:"):
            excused = True
        elif line.strip() and not line.startswith("#"):
            excused = False
    return found


ALL = [block for page in PAGES for block in blocks(page)]
COMMANDS = [(block, words) for block in ALL if block.language in ("sh", "") for words in block.commands]
INLINE = [
    (str(page.relative_to(ROOT)), shlex.split(code))
    for page in PAGES
    for code in re.findall(r"`(cmtool [^`]+)`", page.read_text(encoding="utf-8"))
]
