"""Zip archives and .npz files from untrusted sources, read in place.

Nothing is extracted to disk, nothing is unpickled, and decompression bombs are refused before they expand.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cmtool.errors import DataError

_LARGE = 1_000_000_000  # bytes; an archive that expands to less than this does no harm
_EXPANSION = 100  # times; no real image compresses this well
LARGEST_IMAGE_FILE = 512_000_000  # bytes; limit on one image file in an archive
_ROWS = 256


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    total, size = 0, path.stat().st_size
    for info in archive.infolist():
        if not info.filename or info.compress_size > size:
            raise DataError(f"{path} is damaged: a member without a name, or larger than the archive.")
        if (
            ".." in info.filename.replace("\\", "/").split("/")
            or info.filename.startswith(("/", "\\"))
            or ":" in info.filename.split("/")[0]
        ):
            raise DataError(f"{path} is refused: its member '{info.filename}' points outside the archive.")
        if info.flag_bits & 1:
            raise DataError(f"{path} is encrypted; only open archives are read.")
        total += info.file_size
    if total > _LARGE and total > _EXPANSION * size:
        raise DataError(f"{path} is refused: it would expand to {total / 1e9:.1f} GB, as a decompression bomb does.")


def is_zip(path: Path) -> bool:
    """Return whether a file has the directory that ends a zip archive; a file damaged there has none.

    Raises:
        DataError: there is no permission to read the file.
    """
    try:
        with open(path, "rb") as stream:
            return zipfile.is_zipfile(stream)
    except PermissionError:
        raise DataError(f"no permission to read {path}.") from None
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def open_zip(path: Path, form: str = "zip archive") -> zipfile.ZipFile:
    """Open a zip archive for reading members in place; error messages call it a `form`.

    Raises:
        DataError: it is damaged or encrypted, a member's path leads outside, or it would expand like a bomb.
    """
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except PermissionError:
        raise DataError(f"no permission to read {path}.") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} is damaged or is no {form} ({error}).") from None
    try:
        _check_members(path, archive)
    except DataError:
        archive.close()
        raise
    return archive


def read_member(archive: zipfile.ZipFile, name: str, limit: int = LARGEST_IMAGE_FILE) -> bytes:
    """Return one member's bytes; raises DataError when it is missing, damaged or larger than `limit`."""
    try:
        size = archive.getinfo(name).file_size
        if size > limit:
            raise DataError(f"{archive.filename}: {name} is larger than {limit // 10**6} MB.")
        return archive.read(name)
    except KeyError:
        raise DataError(f"{archive.filename} has no member {name}.") from None
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise DataError(f"{archive.filename}: {name} is damaged ({error}).") from None
    except Exception as error:
        if type(error).__module__ in ("zlib", "lzma", "_lzma"):
            raise DataError(f"{archive.filename}: {name} is damaged ({error}).") from None
        raise


@dataclass(frozen=True)
class ArrayInfo:
    """Shape and type of one array in an .npz, read from its header; the data begin `start` bytes into the member."""

    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_columns: bool
    start: int


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"array format {version}")


class NpzReader:
    """The arrays of an .npz, opened once: headers are parsed then, data are read in blocks of rows on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = open_zip(path, "npz")
        self.arrays = {
            info.filename.removesuffix(".npy"): self._inspect(info)
            for info in self._archive.infolist()
            if info.filename.endswith(".npy")
        }
        if not self.arrays:
            raise DataError(f"{path} holds no array.")

    def _inspect(self, info: zipfile.ZipInfo) -> ArrayInfo:
        try:
            with self._archive.open(info) as stream:
                shape, by_columns, dtype = _header(stream)
                start = stream.tell()
        except DataError:
            raise
        except Exception as error:  # header parsing, zlib and zipfile each raise their own types
            raise DataError(f"{self.path}: {info.filename} is damaged ({error}).") from None
        if dtype.hasobject:
            raise DataError(
                f"{self.path} is refused: {info.filename} holds Python objects, which are never loaded: "
                "they can run code."
            )
        if start + math.prod(shape) * dtype.itemsize != info.file_size:
            raise DataError(f"{self.path}: {info.filename} is damaged: shorter or longer than its header says.")
        return ArrayInfo(info.filename, tuple(shape), dtype, by_columns and len(shape) > 1, start)

    def read(self, name: str) -> NDArray[Any]:
        """Return one whole array."""
        if name not in self.arrays:
            raise DataError(f"{self.path} has no array '{name}'; it has {', '.join(self.arrays)}.")
        info = self.arrays[name]
        blob = read_member(self._archive, info.member, limit=1 << 50)
        count = math.prod(info.shape)
        try:
            data = np.frombuffer(blob, info.dtype, count, len(blob) - count * info.dtype.itemsize)
        except ValueError as error:  # a type of zero bytes
            raise DataError(f"{self.path}: '{name}' is damaged ({error}).") from None
        return data.reshape(info.shape, order="F" if info.by_columns else "C")

    def rows(self, name: str, size: int = _ROWS) -> Iterator[NDArray[Any]]:
        """Yield the array in writable blocks of `size` rows, so that it never sits in memory whole; C order only."""
        info = self.arrays[name]
        if info.by_columns:
            raise DataError(
                f"{self.path}: '{name}' is stored by columns (Fortran order), which cannot be read in batches.",
                "save it in C order",
            )
        row = math.prod(info.shape[1:]) * info.dtype.itemsize
        with self._archive.open(info.member) as stream:
            self._exactly(stream, info.start, name)
            for start in range(0, info.shape[0], size):
                count = min(size, info.shape[0] - start)
                blob = bytearray(self._exactly(stream, count * row, name))
                yield np.frombuffer(blob, info.dtype).reshape(count, *info.shape[1:])

    def _exactly(self, stream: IO[bytes], size: int, name: str) -> bytes:
        try:
            blob = stream.read(size)
        except Exception as error:  # zlib and zipfile each raise their own types
            raise DataError(f"{self.path}: '{name}' is damaged ({error}).") from None
        if len(blob) != size:
            raise DataError(f"{self.path} is damaged: '{name}' is truncated.")
        return blob
