"""Pickles read without running them: every name that a file asks for is answered from a table, or refused.

Nothing from a file is ever looked up in a real module, imported or called. Who reads a kind of pickle gives the table:
harmless stand-ins, by the names that genuine files of that kind contain.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any, ClassVar

Names = Mapping[tuple[str, str], Callable[..., Any]]


class Refused(Exception):
    """A pickle asks for something outside its table; the message says what: "it names 'os.system'"."""


class _Bounded:
    """A file that is never asked for more bytes than it has.

    A pickle claims the lengths of what follows; memory would be taken for what is merely claimed.
    """

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._left = stream, size

    def read(self, count: int = -1) -> bytes:
        """Read `count` bytes, fewer at the end."""
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
    """The pure Python unpickler: the C one can be made to allocate gigabytes by a single memo index."""

    def __init__(self, stream: _Bounded, names: Names, encoding: str) -> None:
        super().__init__(stream, encoding=encoding)
        self._names = names

    def _bytearray(self) -> None:
        # The library's own takes the claimed length before it looks whether the file has it.
        unpickler: Any = self
        unpickler.append(bytearray(unpickler.read(int.from_bytes(unpickler.read(8), "little"))))

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        pickle.BYTEARRAY8[0]: _bytearray,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Answer a name from the table."""
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
    """Return the contents of a pickle in which every object is what `names` makes of it.

    Args:
        stream: the open file.
        size: how many bytes of it there are at most.
        names: (module, name) -> what answers it.
        encoding: how texts of Python 2 are read; "bytes" leaves them as they are.

    Raises:
        Refused: it asks for a name that is not in the table, an extension or data outside itself.
        Exception: whatever a damaged or hostile pickle brings about; the caller makes one sentence of it.
    """
    return _Reader(_Bounded(stream, size), names, encoding).load()
