"""Where everything that a user sees is written: the only module that imports rich.

Data and results go to stdout, talk and progress to stderr; with `--json` stdout carries one document and nothing else.
Rich is imported when a table or a progress bar is drawn, never before, so that the command line stays light.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TextIO

from cmtool.machine.launch import is_first

ProgressUpdate = Callable[..., None]


def is_terminal(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def command_line() -> str:
    """Return the command as it was typed, quoted so that a shell reads it back."""
    import shlex

    return shlex.join(["cmtool", *sys.argv[1:]])


def spelled(text: str, keep: str = "\n\t") -> str:
    """Spell out what steers a terminal, `keep` excepted: names from strangers' files are shown as well."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def _talk(text: str) -> None:
    """Write a line to stderr; if it cannot be delivered (a closed pipe, a lost terminal) the work continues."""
    with suppress(OSError):
        print(spelled(text), file=sys.stderr, flush=True)


def _finite(document: Any) -> Any:
    """Return a document with null for the numbers that JSON cannot hold."""
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [_finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document


def columns() -> int:
    """Return the width to write for: that of the terminal or `COLUMNS`, 80 where there is none; at least 40."""
    import shutil

    return max(40, shutil.get_terminal_size((80, 24)).columns)


class Output:
    """What one command says and shows.

    Args:
        json_mode: stdout carries only the document given to `json`; tables, results and talk are dropped.
        quiet: no talk and no progress; warnings, tables and results stay.
        silent: nothing at all.
    """

    def __init__(self, json_mode: bool = False, quiet: bool = False, silent: bool = False) -> None:
        self.json_mode = json_mode or silent
        self.quiet = quiet or self.json_mode
        self.silent = silent

    @classmethod
    def of_rank(cls, json_mode: bool = False, quiet: bool = False) -> Output:
        """The output of a command that several processes run together: all but the first are silent."""
        return cls(json_mode, quiet, silent=not is_first())

    def say(self, text: str) -> None:
        """Talk to the user on stderr."""
        if not self.quiet:
            _talk(text)

    def warn(self, text: str) -> None:
        """Warn on stderr, whatever the mode."""
        if not self.silent:
            _talk(f"Warning: {text}")

    def result(self, text: str) -> None:
        """Put a result (a path, a document) on stdout as it is."""
        if not self.json_mode:
            print(text.removesuffix("\n"), flush=True)

    def json(self, document: Any) -> None:
        """Put one JSON document on stdout; does nothing outside JSON mode."""
        if self.json_mode and not self.silent:
            text = json.dumps(_finite(document), indent=2, ensure_ascii=False, default=str, allow_nan=False)
            print(text, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Draw a table on stdout; numbers are aligned to the right, short names in the first column are not wrapped.

        Args:
            title: printed above; may be empty.
            columns: the heads.
            rows: cells of any kind; None is drawn as a dash.
        """
        if not self.json_mode:
            _draw_table(title, columns, [[_cell(value) for value in row] for row in rows])

    @contextmanager
    def progress(self, total: int | None, description: str = "") -> Iterator[ProgressUpdate]:
        """Show progress on stderr while the block runs; silent when quiet or when stderr is no terminal.

        Yields:
            update(advance=1, note="", completed=None): moves the bar by `advance`, or to `completed`, and shows `note`.
        """
        if self.quiet or not is_terminal(sys.stderr):
            yield lambda advance=1, note="", completed=None: None
            return
        with _progress_bar(total, description) as update:
            yield update


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else spelled(str(value))


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").rstrip("%"))
    except ValueError:
        return text == "-"
    return True


# The width between two columns (a space and the divider), and at both edges together.
_BETWEEN, _EDGES = 2, 2


def _draw_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    widths = _widths(heads, rows, columns())
    if widths is None:
        heads, rows = _gathered(heads, rows)
        widths = [None] * len(heads)
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(**look)
    for index, head in enumerate(heads):
        numbers = bool(rows) and all(_is_number(row[index]) for row in rows)
        # Names stay whole unless they would push everything else off the page.
        name = index == 0 and max((len(row[0]) for row in rows), default=0) <= columns() // 3
        justify: Literal["left", "right"] = "right" if numbers else "left"
        table.add_column(head, justify=justify, overflow="fold", no_wrap=name, width=widths[index])
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(file=sys.stdout, width=columns(), highlight=False)
    if title:
        # Not the table's own title, which is wrapped to the table's width.
        console.print(Text(title, style="bold"))
    console.print(table)


def _widths(heads: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> list[int | None] | None:
    """Return a width for each column so that no word is broken, None where rich may choose; None when they do not fit.

    A table of two columns, name and text, is left to rich: a path or a digest longer than the line has to be broken.
    """
    from rich.cells import cell_len

    cells = [[head, *(row[index] for row in rows)] for index, head in enumerate(heads)]
    full = [max(map(cell_len, column)) for column in cells]
    room -= _EDGES + _BETWEEN * (len(heads) - 1)
    if sum(full) <= room or len(heads) < 3:
        return [None] * len(heads)
    least = [max(cell_len(word) for cell in column for word in cell.split() or [""]) for column in cells]
    least[0] = full[0] if full[0] <= room // 3 else least[0]
    spare = room - sum(least)
    if spare < 0:
        return None
    widths = least
    while spare and widths != full:
        # One more for the column that would need the most lines.
        tight = max(range(len(full)), key=lambda i: full[i] / widths[i] if widths[i] < full[i] else 0)
        widths[tight] += 1
        spare -= 1
    return list(widths)


def _gathered(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return a table of two columns for a narrow page: the first, and all others as `head value; head value`."""
    pairs = [zip(heads[1:], row[1:], strict=True) for row in rows]
    return [heads[0], ""], [
        [row[0], "; ".join(f"{head} {cell}".strip() for head, cell in found if cell != "-") or "-"]
        for row, found in zip(rows, pairs, strict=True)
    ]


def fitting(note: str, room: int) -> str:
    """Return the leading parts of a note (two spaces stand between parts) that fit into `room` characters."""
    from rich.cells import cell_len

    kept = ""
    for part in note.split("  "):
        longer = f"{kept}  {part}" if kept else part
        if cell_len(longer) > room:
            break
        kept = longer
    return kept


@contextmanager
def _progress_bar(total: int | None, description: str) -> Iterator[ProgressUpdate]:
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    console = Console(file=sys.stderr)
    parts = _progress_parts(console.width, total, description)
    taken = sum(width + 1 for _, width in parts)
    note_column = TextColumn("{task.fields[note]}", markup=False)
    with Progress(*(part for part, _ in parts), note_column, console=console, transient=False) as progress:
        task = progress.add_task(description, total=total, note="")

        def update(advance: float = 1, note: str = "", completed: float | None = None) -> None:
            moved: dict[str, Any] = {"advance": advance} if completed is None else {"completed": completed}
            progress.update(task, note=fitting(note, console.width - taken), **moved)

        yield update


def _progress_parts(room: int, total: int | None, description: str) -> list[tuple[Any, int]]:
    """Return what precedes the note, each part with its width: everything on 100 columns, the essentials on 40.

    Rich would squeeze everything into dots where a line is too long.
    """
    from rich.cells import cell_len
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    clock = len("0:00:00")
    name = (TextColumn("{task.description}", markup=False), cell_len(description))
    count = (MofNCompleteColumn(), 2 * len(str(total or "?")) + 1)
    elapsed, left = (TimeElapsedColumn(), clock), (TimeRemainingColumn(), clock)
    if room < 60:
        return [count, left]
    bar = 20 if room >= 100 else 10
    return [name, (BarColumn(bar), bar), count, *([elapsed] if room >= 100 else []), left]
