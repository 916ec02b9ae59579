"""Fuzzing guided by coverage, with atheris (libFuzzer for Python): pip install '.[fuzz]', then

    python -m tests.fuzz.guided                       # names the readers
    python -m tests.fuzz.guided msgpack -max_total_time=600 corpus/

What follows the reader's name is libFuzzer's (folders hold inputs to begin with and keep those that reach new lines). The
rules are those of the sandbox: one sentence or an answer, no program, no connection, no file elsewhere, a gigabyte, 5 s.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

# What the harness itself must find; not one of the readers.
FAULTY = "faulty"


def _faulty(path: Path) -> None:
    data = path.read_bytes()
    if data[:1] == b"\x01" and data[1:2] == b"\xff":
        raise KeyError("the fault that must be found")


def main(words: list[str]) -> None:
    """Fuzz the reader that `words` begin with until libFuzzer's limits, or until an input breaks a rule (exit code 77)."""
    import atheris

    with atheris.instrument_imports(include=["cmtool"]):
        from tests.fuzz import sandbox
        from tests.fuzz.readers import readers

    place = Path(tempfile.mkdtemp(prefix="cmtool-fuzz-"))
    known = readers(place / "examples")
    known[FAULTY] = sandbox.Reader(FAULTY, "f", (b"abc",), atheris.instrument_func(_faulty))
    if not words or words[0] not in known:
        raise SystemExit("name a reader: " + ", ".join(f"'{name}'" for name in known))
    reader = known[words[0]]
    file = place / "in" / reader.file
    examples = place / "corpus"
    file.parent.mkdir(parents=True)
    examples.mkdir()
    for number, data in enumerate(reader.seeds):
        (examples / f"example-{number}").write_bytes(data)
        file.write_bytes(data)  # imports, and whatever else happens but once
        sandbox._call(reader, file)

    def one(data: bytes) -> None:
        if not sandbox._ALLOWED:  # libFuzzer has opened what it writes to
            sandbox._limit_memory()
            sandbox._witness(str(place))
        file.write_bytes(data)
        sandbox._call(reader, file)

    folders = [word for word in words[1:] if not word.startswith("-")]
    limits = [f"-timeout={int(sandbox.SECONDS)}", "-rss_limit_mb=8192", "-max_len=200000", f"-artifact_prefix={place}/"]
    flags = [word for word in words[1:] if word.startswith("-")]
    atheris.Setup([sys.argv[0], *limits, *flags, *folders, str(examples)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
