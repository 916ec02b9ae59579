"""Read NVlabs' network pickles without running them.

A genuine file refers to few names: the call that would execute its embedded source, tensor builders, and containers.
Each becomes an inert record here, and every other name is refused (`cmtool.files.inert`).
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmtool.errors import CheckpointError
from cmtool.files.inert import Refused, read_inert
from cmtool.interop.weights import Found, judged, settled


class Inert:
    """Stands in for an object whose contents do not matter: it keeps what it is given and does nothing."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertDict(dict[Any, Any]):
    """Stands in for a dictionary of attributes (dnnlib's EasyDict)."""


@dataclass
class Storage:
    """The bytes of a tensor storage as `torch.save` wrote them, not decoded yet."""

    data: bytes

    def load(self) -> Tensor:
        """Return the storage as a flat tensor."""
        # A genuine nested file has torch's old format, which is never compressed. A zip here was put there on purpose.
        if not isinstance(self.data, bytes) or self.data[:2] == b"PK":
            raise CheckpointError("the pickle holds a tensor storage of an unknown kind.")
        try:
            stored = torch.load(io.BytesIO(self.data), map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:
            # Foreign bytes can fail in any way, and none of them may end in a traceback.
            raise CheckpointError(f"the pickle holds a damaged or hostile tensor ({type(error).__name__}).") from None
        if not isinstance(stored, torch.TypedStorage):
            raise CheckpointError("the pickle holds a tensor storage of an unknown kind.")
        return torch.tensor([], dtype=stored.dtype).set_(stored)  # type: ignore[call-overload]


@dataclass
class View:
    """A tensor as a view into a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        """Ignore what the file adds to a tensor (hooks, attributes)."""

    def load(self, cache: dict[int, Tensor]) -> Tensor:
        """Return the tensor; each storage is decoded once.

        Raises:
            CheckpointError: if the view reaches outside its storage.
        """
        if not isinstance(self.storage, Storage):
            raise CheckpointError("the pickle holds a tensor without a storage.")
        if id(self.storage) not in cache:
            cache[id(self.storage)] = self.storage.load()
        flat = cache[id(self.storage)]
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or any(not isinstance(n, int) or n < 0 for n in numbers):
            raise CheckpointError("the pickle holds a tensor of impossible shape.")
        reach = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True)) + 1
        if 0 not in self.size and reach > flat.numel():
            raise CheckpointError("the pickle holds a tensor that reaches outside its storage.")
        return flat.as_strided(self.size, self.stride, self.offset).clone()


@dataclass
class Record:
    """A persistent object: its class name, its attributes, and a hash of the source it came with (never run)."""

    name: str = "?"
    state: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def source_hash(self) -> str:
        """SHA-256 of the embedded source, for provenance."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the constructor."""
        found = self.state.get("_init_kwargs")
        return dict(found) if isinstance(found, dict) else {}


class Module(Inert):
    """Stands in for one of torch's containers."""


def _persistent(meta: Any = None, *_: Any) -> Record:
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise CheckpointError("the pickle holds a persistent object of an unknown kind.")
    return Record(str(meta.get("class_name", "?")), meta["state"], str(meta.get("module_src", "")))


def _view(storage: Any, offset: Any = 0, size: Any = (), stride: Any = (), *_: Any) -> View:
    return View(storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any = None, *_: Any) -> Any:
    return data


def _storage(data: Any = b"", *_: Any) -> Storage:
    return Storage(data)


def _note(*arguments: Any) -> Inert:
    return Inert(*arguments)


_HARMLESS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "getattr"): _note,
    ("__builtin__", "getattr"): _note,
    ("__builtin__", "set"): set,
    ("dnnlib.util", "EasyDict"): InertDict,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch", "device"): _note,
    ("numpy", "dtype"): Inert,
    ("numpy", "ndarray"): Inert,
    **{("torch", name): Inert for name in ("float16", "bfloat16", "float32", "float64", "int64", "Size")},
    **{(f"numpy.{core}.multiarray", name): _note for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
    **{
        ("torch.nn.modules.container", name): Module
        for name in ("ModuleDict", "ModuleList", "Sequential", "ParameterList")
    },
}


def read_pickle(path: Path) -> Any:
    """Return the contents of a pickle with every object replaced by an inert record.

    Raises:
        CheckpointError: if it is damaged, or refers to any name outside a short list.
    """
    try:
        with open(path, "rb") as stream:
            return read_inert(stream, path.stat().st_size, _HARMLESS)
    except Refused as error:
        raise CheckpointError(f"{path} is refused: {error}, which no network pickle needs.") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error.message}") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:
        # A hostile or truncated pickle can fail in any way that Python objects can.
        raise CheckpointError(
            f"{path} is no readable pickle ({type(error).__name__}); was the download complete?"
        ) from None


def _submodules(module: Any) -> dict[str, Any]:
    state = module.state if isinstance(module, Record | Module) else None
    return state if isinstance(state, dict) else {}


def flatten(module: Any, prefix: str = "", cache: dict[int, Tensor] | None = None, depth: int = 0) -> dict[str, Tensor]:
    """Return a recorded module's state dict: parameters and persistent buffers under dotted names.

    Raises:
        CheckpointError: if a tensor's shape is impossible.
    """
    cache = {} if cache is None else cache
    state = _submodules(module)
    if depth > 50:
        raise CheckpointError("the pickle nests its modules without end.")
    hidden = state.get("_non_persistent_buffers_set") or ()
    result = {}
    for group in ("_parameters", "_buffers"):
        for name, value in (state.get(group) or {}).items():
            if isinstance(value, View) and name not in hidden:
                result[f"{prefix}{name}"] = value.load(cache)
    for name, child in (state.get("_modules") or {}).items():
        result |= flatten(child, f"{prefix}{name}.", cache, depth + 1)
    return result


def network_records(content: Any, path: Path) -> list[Found[Record]]:
    """Return the networks inside a snapshot.

    Raises:
        CheckpointError: if there is none; the message lists what was found.
    """
    if isinstance(content, Record):
        return [judged((), content)]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a network snapshot.")
    found = [judged((str(key),), value) for key, value in content.items() if isinstance(value, Record)]
    networks = [one for one in found if _submodules(one.contents).keys() & {"_modules", "_parameters"}]
    if not networks:
        raise CheckpointError(
            f"{path} holds no network under 'ema' or 'net'; it holds: {', '.join(map(str, list(content)[:10]))}."
        )
    return settled(networks)
