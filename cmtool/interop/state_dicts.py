"""Find every set of weights in a training checkpoint: nested, under prefixes, as bare lists, inside an optimizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cmtool.errors import CheckpointError
from cmtool.interop.weights import Found, judged, says_average, settled, words_of

Tensors = dict[str, Tensor]
# Each layout has a tensor with one of these names in every network; whatever precedes it is a prefix.
_ANCHORS = ("time_embed.0.weight", "map_layer0.weight", "emb_noise.weight", "t_embedder.mlp.0.weight")
_ANCHORS_BELOW = ("conv_in.weight",)  # diffusers; autoencoders stored with other layouts have it as well
_INFIX = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
# Counters that averaging wrappers store with the weights.
_BOOKKEEPING = {"n_averaged", "initted", "step", "num_updates", "decay"}
_OPTIMIZERS = {"optimizer", "optimizers", "optim", "opt"}
# Keys of averaged weights in an optimizer's state: AdamW with EMA, torchcontrib's SWA, torch's ASGD.
_IN_OPTIMIZER = ("param_exp_avg", "ema", "ema_param", "swa_buffer", "ax")
_BUFFERS = re.compile(
    r"(^|\.)(freqs|phases|pos_embed|resample_filter|running_mean|running_var|num_batches_tracked|W|sigmas|betas|\w*alphas\w*)$"
)
_WIDTHS = ("stds", "decays", "ema_decays", "ema_rates", "rates", "betas")
_DEEPEST, _MOST = 8, 100_000


@dataclass(frozen=True)
class _Entry:
    """Tensors found together, by name or in a list; `begun` is False if a counter says that nothing was averaged."""

    parts: tuple[str, ...]
    tensors: Tensors | list[Tensor]
    reach: float | None = None
    is_average: bool | None = None
    begun: bool = True


def _is_zero(count: Any) -> bool:
    return bool(count == 0) if isinstance(count, int) or (isinstance(count, Tensor) and count.numel() == 1) else False


def _weighty(values: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.ndim > 0 for value in values)


def _in_optimizer(parts: Sequence[str]) -> bool:
    return any(_OPTIMIZERS & set(words_of(part)) for part in parts)


def _walk(
    content: Any, budget: Iterator[int], parts: tuple[str, ...] = (), reach: float | None = None
) -> Iterator[_Entry]:
    """Yield the groups of tensors in nested dictionaries and lists; `budget` stops files that nest without end."""
    if len(parts) > _DEEPEST or not isinstance(content, Mapping | list | tuple):
        return
    if next(budget, None) is None:
        raise CheckpointError("it nests its contents without end.")
    if isinstance(content, Mapping):
        own = {str(name): value.detach() for name, value in content.items() if isinstance(value, Tensor)}
        if _weighty(list(own.values())) and not (_in_optimizer(parts) and not says_average(parts[-1:])):
            yield _Entry(parts, own, reach)
        if isinstance(content.get("param_groups"), list) and isinstance(content.get("state"), Mapping):
            yield from _optimizer_averages(content, parts)
            return
        widths = next((content[name] for name in _WIDTHS if isinstance(content.get(name), list | tuple)), ())
        # Lightning keeps the number of averages next to the weights, or in a separate table.
        counters = (content, content.get("averaging_state"))
        unbegun = any(isinstance(table, Mapping) and _is_zero(table.get("n_averaged")) for table in counters)
        for name, value in content.items():
            if isinstance(value, list | tuple) and len(value) == len(widths) > 0 and name not in _WIDTHS:
                for index, (inner, width) in enumerate(zip(value, widths, strict=True)):
                    number = float(width) if isinstance(width, int | float) else None
                    yield from _walk(inner, budget, (*parts, str(name), str(index)), number)
            else:
                for entry in _walk(value, budget, (*parts, str(name)), reach):
                    yield replace(entry, begun=False) if unbegun else entry
    else:
        yield from _walk_list(content, budget, parts, reach)


def _walk_list(
    content: Sequence[Any], budget: Iterator[int], parts: tuple[str, ...], reach: float | None
) -> Iterator[_Entry]:
    if content and all(isinstance(value, Tensor) for value in content):
        if _weighty(content):
            yield _Entry(parts, [value.detach() for value in content], reach)
        return
    after_optimizer = False
    for index, value in enumerate(content):
        # NCSN and DDIM code saves [model, optimizer, epoch, step, average].
        for entry in _walk(value, budget, (*parts, str(index)), reach):
            yield replace(entry, is_average=True) if after_optimizer and not parts else entry
        after_optimizer = after_optimizer or (isinstance(value, Mapping) and "param_groups" in value)


def _listed(groups: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """Return the entries of a list that each group of parameters has under `key`."""
    return [entry for group in groups if isinstance(group.get(key), list) for entry in group[key]]


def _optimizer_averages(content: Mapping[str, Any], parts: tuple[str, ...]) -> Iterator[_Entry]:
    """Yield the averages of the parameters that an optimizer's state holds, in the order of its parameters."""
    groups = [group for group in content["param_groups"] if isinstance(group, Mapping)]
    order = _listed(groups, "params")
    states = [content["state"].get(index) for index in order if isinstance(index, int | str)]
    if not order or len(states) < len(order) or not all(isinstance(state, Mapping) for state in states):
        return
    names = _listed(groups, "param_names")
    for key in _IN_OPTIMIZER:
        values = [state.get(key) for state in states]
        if all(isinstance(value, Tensor) for value in values) and _weighty(values):
            listed = [value.detach() for value in values]
            tensors = dict(zip(map(str, names), listed, strict=True)) if len(names) == len(listed) else listed
            yield _Entry((*parts, key), tensors, is_average=True)


def _unwrapped(tensors: Tensors) -> Tensors:
    """Return the tensors without wrapper infixes in their names, unless two names would then coincide."""
    plain = {_INFIX.sub("", name).lstrip("."): tensor for name, tensor in tensors.items()}
    return plain if len(plain) == len(tensors) else tensors


def _prefixes(tensors: Tensors) -> list[str]:
    for anchors in (_ANCHORS, _ANCHORS_BELOW):
        ends = [(name, anchor) for name in tensors for anchor in anchors if f".{name}".endswith(f".{anchor}")]
        if ends:
            return list(dict.fromkeys(name.removesuffix(anchor) for name, anchor in ends))
    prefix = ""
    names = [name for name in tensors if name not in _BOOKKEEPING]
    while names and all(name.startswith(f"{prefix}module.") for name in names):
        prefix += "module."
    return [prefix]


def _networks(entry: _Entry, tensors: Tensors) -> Iterator[Found[Tensors]]:
    """Split tensors by the prefixes that networks have."""
    plain = _unwrapped(tensors)
    prefixes = _prefixes(plain)
    for prefix in prefixes:
        longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        inner = {
            name.removeprefix(prefix): tensor
            for name, tensor in plain.items()
            if name.startswith(prefix) and not (longer and name.startswith(longer))
        }
        parent = prefix.removesuffix("unet.") if prefix.endswith("unet.") else prefix.removesuffix("model.")
        if parent != prefix:  # EDM2 stores the log-variance head next to the network
            inner |= {
                name.removeprefix(parent): tensor
                for name, tensor in plain.items()
                if name.startswith(f"{parent}logvar_")
            }
        if not prefix:
            inner = {name: tensor for name, tensor in inner.items() if name not in _BOOKKEEPING or tensor.numel() > 1}
        found = judged((*entry.parts, *prefix.split(".")[:-1]), inner, entry.reach)
        count = _counter(plain, prefix)
        average = found.average if entry.is_average is None else entry.is_average
        average = average or count is not None
        # Until its first update an AveragedModel holds the weights that it was constructed with.
        begun = entry.begun and not _is_zero(count)
        yield replace(found, average=average, explicit=found.explicit or average, begun=begun)


def _counter(tensors: Tensors, prefix: str) -> Tensor | None:
    """Return the counter of the AveragedModel that holds the network of this prefix, if there is one."""
    ends = (name for name in tensors if f".{name}".endswith(".n_averaged"))
    return next(
        (tensors[name] for name in ends if prefix.startswith(name.removesuffix("n_averaged") + "module.")), None
    )


def _embedded(values: Sequence[Tensor], entries: Sequence[tuple[str, Tensor]]) -> list[str] | None:
    """Return the earliest names, in order, whose shapes match `values`; None if there are none."""
    names, rest = [], iter(entries)
    for value in values:
        name = next((name for name, tensor in rest if tensor.shape == value.shape), None)
        if name is None:
            return None
        names.append(name)
    return names


def _order(values: list[Tensor], raw: Tensors) -> list[str] | None:
    """Return the names that belong to an average stored as a list, judging by the raw weights next to it.

    Such a list holds the parameters, or the trained ones, in the order of `model.parameters()`. A state dict has the
    same order, with buffers in between. Returns None if more than one assignment fits the shapes.
    """
    seen: set[tuple[int, torch.Size]] = set()
    once = []
    for name, tensor in raw.items():
        place = tensor.data_ptr(), tensor.shape
        if tensor.numel() == 0 or place not in seen:
            once.append((name, tensor))
        seen.add(place)
    parameters = [(name, tensor) for name, tensor in once if not _BUFFERS.search(name)]
    for entries in (list(raw.items()), once, parameters):
        first = _embedded(values, entries)
        last = _embedded(values[::-1], entries[::-1])
        if first is not None and last is not None and first == last[::-1]:
            return first if _agrees(values, first, raw) else None
    return None


def _directions(tensors: Sequence[Tensor]) -> Tensor:
    flat = torch.stack([tensor.flatten()[:4096].float() for tensor in tensors])
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _agrees(values: Sequence[Tensor], names: Sequence[str], raw: Tensors) -> bool:
    """Return whether no value looks like the raw weights of another name, which would show another order."""
    alike: dict[torch.Size, list[int]] = {}
    for index, value in enumerate(values):
        if value.numel() >= 64:
            alike.setdefault(value.shape, []).append(index)
    for group in alike.values():
        likeness = _directions([values[i] for i in group]) @ _directions([raw[names[i]] for i in group]).t()
        if bool(((likeness.amax(1) > 0.8) & (likeness.diagonal() < 0.5)).any()):
            return False
    return True


def _from_list(entry: _Entry, raws: Sequence[_Entry]) -> Iterator[Found[Tensors]]:
    values = entry.tensors
    assert isinstance(values, list)
    for raw in raws:
        assert isinstance(raw.tensors, dict)
        names = _order(values, raw.tensors)
        if names is not None:
            named = dict(zip(names, values, strict=True))
            for found in _networks(replace(entry, is_average=True), named):
                # The prefixes come from the raw weights and say nothing about the average.
                yield replace(found, parts=entry.parts, average=True)
            return
    fault = f"it is a list of {len(values)} tensors without names, and nothing in the file tells their order"
    yield Found(entry.parts, True, {}, reach=entry.reach, fault=fault)


def _by_joined_names(entries: Sequence[_Entry], found: Sequence[Found[Tensors]]) -> Iterator[Found[Tensors]]:
    """Yield averages whose names have no dots, as latent diffusion's LitEma writes them: `model_ema.outweight`."""
    for entry in entries:
        assert isinstance(entry.tensors, dict)
        heads = {head for name in entry.tensors if (head := name.partition(".")[0]) != name}
        for head in [head for head in heads if says_average([head])]:
            rest = {n.partition(".")[2]: t for n, t in entry.tensors.items() if n.startswith(f"{head}.")}
            for raw in (one for one in found if one.parts[: len(entry.parts)] == entry.parts and not one.average):
                lead = raw.parts[len(entry.parts) :]
                for start in range(len(lead) + 1):
                    joined = {"".join((*lead[start:], *name.split("."))): name for name in raw.contents}
                    named = {joined[name]: tensor for name, tensor in rest.items() if name in joined}
                    if len(named) > 1 and len(named) >= len(raw.contents) // 2:
                        yield Found((*entry.parts, head), True, named)
                        break


def _filled(found: list[Found[Tensors]]) -> Iterator[Found[Tensors]]:
    """Complete averages that hold only parameters: take buffers and untrained tensors from the raw weights."""
    raws = [one for one in found if not one.average and not one.other_role]
    for one in found:
        lacking: Tensors = {}
        for raw in raws if one.average and one.contents else ():
            if one.contents.keys() < raw.contents.keys():
                lacking = {name: raw.contents[name] for name in raw.contents.keys() - one.contents.keys()}
                break
        yield replace(one, contents={**one.contents, **lacking}, filled=len(lacking)) if lacking else one


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _once(found: Sequence[Found[Tensors]]) -> list[Found[Tensors]]:
    """Drop duplicates: the same tensors of the same kind under two names."""
    kept: list[Found[Tensors]] = []
    for one in found:
        twin = any(
            one.average == other.average
            and one.contents.keys() == other.contents.keys()
            and all(_same(tensor, other.contents[name]) for name, tensor in one.contents.items())
            for other in kept
            if one.contents
        )
        if not twin:
            kept.append(one)
    return kept


def weights_in(content: Any) -> list[Found[Tensors]]:
    """Return every set of weights in the contents of a torch or safetensors file.

    Only networks of known layouts count, if there are any. Prefixes of wrappers and enclosing modules are removed.

    Raises:
        CheckpointError: if it nests without end.
    """
    entries = list(_walk(content, iter(range(_MOST))))
    named = [entry for entry in entries if isinstance(entry.tensors, dict)]
    found = [one for entry in named for one in _networks(entry, entry.tensors)]  # type: ignore[arg-type]
    anchors = _ANCHORS + _ANCHORS_BELOW
    known = [one for one in found if any(anchor in one.contents for anchor in anchors)]
    known += _by_joined_names(named, known)
    raws = [entry for entry in named if any(_holds(entry, one) for one in known if not one.average)]
    for entry in entries:
        if isinstance(entry.tensors, list) and (entry.is_average or says_average(entry.parts)):
            known += _from_list(entry, raws)
    if not known:
        return sorted(found, key=lambda one: -len(one.contents))[:1]
    return _once([replace(one, half=_is_half(one.contents)) for one in _filled(settled(known))])


def _is_half(tensors: Tensors) -> bool:
    """Return whether most of the tensors are in half precision."""
    halves = sum(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors.values())
    return 2 * halves > len(tensors)


def _holds(entry: _Entry, found: Found[Tensors]) -> bool:
    return found.parts[: len(entry.parts)] == entry.parts
