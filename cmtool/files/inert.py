"""Read pickles without running them: every name in a file is resolved from a table or refused.

Nothing in a file is ever looked up in a real module, imported or called. Each caller supplies the table for its kind of
pickle: harmless stand-ins for the names that genuine files contain.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar

Names = Mapping[tuple[str, str], Callable[..., Any]]


class Refused(Exception):
    """A pickle asks for something outside the table; the message says what, e.g. "it names 'os.system'"."""


class _Bounded:
    """A file that limits every read to the bytes it has left.

    A pickle states the length of what follows, and memory would be allocated for lengths that are merely claimed.
    """

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, count: int = -1) -> bytes:
        """Read `count` bytes, or fewer at the end."""
        data = self._stream.read(self._left if count < 0 else min(count, self._left))
        self._left -= len(data)
        return data

    def readline(self) -> bytes:
        """Read up to the end of a line."""
        data = self._stream.readline(self._left)
        self._left -= len(data)
        return data

    def readinto(self, buffer: bytearray) -> int:
        """Fill `buffer` from the file."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Reader(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """The pure Python unpickler; a single memo index can make the C one allocate gigabytes."""

    def __init__(self, stream: _Bounded, names: Names, encoding: str) -> None:
        super().__init__(stream, encoding=encoding)
        self._names = names

    def _bytearray(self) -> None:
        # The standard method allocates the claimed length before checking that the file has it.
        unpickler: Any = self
        unpickler.append(bytearray(unpickler.read(int.from_bytes(unpickler.read(8), "little"))))

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        pickle.BYTEARRAY8[0]: _bytearray,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name from the table."""
        try:
            return self._names[module, name]
        except KeyError:
            raise Refused(f"it names '{module}.{name}'") from None

    def get_extension(self, code: int) -> None:
        """Refuse the registry of extension codes."""
        raise Refused(f"it asks for the extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse data outside the file."""
        raise Refused("it refers to data outside itself")


def read_inert(stream: IO[bytes], size: int, names: Names, encoding: str = "ASCII") -> Any:
    """Return the contents of a pickle, with every object built by `names`.

    Args:
        stream: the open file.
        size: the most bytes that it can hold.
        names: (module, name) -> what stands in for it.
        encoding: how to decode strings of Python 2; "bytes" leaves them undecoded.

    Raises:
        Refused: if it asks for a name outside the table, an extension, or data outside the file.
        Exception: whatever a damaged or hostile pickle causes; the caller turns it into one sentence.
    """
    return _Reader(_Bounded(stream, size), names, encoding).load()
