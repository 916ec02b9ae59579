"""Files as other code bases write them, from weights by formula; and what those code bases answered."""

import functools
import json
import pickle
import struct
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from cmtool.networks.dit import sincos_positions
from tests.interop import closed_form

GOLDEN = Path(__file__).parent / "golden"
# Golden name -> what the file or folder is called, and what its user must say.
SOURCES = {
    "openai_imagenet64": ("cd_small.pt", {"head_channels": 32}),
    "openai_imagenet64_edm": ("edm_small.pt", {"head_channels": 32, "form": "edm"}),
    "openai_lsun256": ("ct_small.pt", {}),
    "guided_imagenet64": ("guided.pt", {"head_channels": 32, "form": "edm"}),
    "diffusers_imagenet64": ("pipeline", {}),
    "diffusers_lsun256": ("pipeline", {}),
    "edm_ddpmpp": ("network-snapshot-000001.pkl", {}),
    "edm_ncsnpp": ("network-snapshot-000001.pkl", {}),
    "edm_adm": ("network-snapshot-000001.pkl", {}),
    "edm2": ("network-snapshot-000001.pkl", {}),
    "tcm_edm2": ("network-snapshot-000001.pkl", {}),
    "jax_ncsnpp": ("checkpoint_80", {}),
    "dit_s2": ("DiT-S-2.pt", {}),
    "sit_s2": ("SiT-S-2.pt", {}),
}


@functools.cache
def golden(name):
    """Return (meta, raw, f) of one foreign implementation."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return json.loads(str(archive["meta"])), torch.from_numpy(archive["raw"]), torch.from_numpy(archive["f"])


def state(name):
    """The foreign state dict, by its own names."""
    return dict(_state(name))


@functools.cache
def _state(name):
    if name == "sit_s2":
        return _state("dit_s2")  # the same names and shapes
    meta, *_ = golden(name)
    form = closed_form.flax_weight if name.startswith("jax") else closed_form.weight
    made = {}
    for key, shape in meta["layout"].items():
        made[key] = torch.from_numpy(form(key, tuple(shape)))
        if key.endswith("resample_filter"):
            taps = torch.tensor([1.0, 3.0, 3.0, 1.0] if shape[-1] == 4 else [1.0, 1.0])
            made[key] = (taps.outer(taps) / taps.sum() ** 2)[None, None]
        if key == "pos_embed":
            made[key] = sincos_positions(meta["side"] // 2, meta["side"] // 2, shape[2])
    return made


def inputs(name):
    """Return x, t, label as the foreign implementation was given them, and the stride of what was kept."""
    meta, *_ = golden(name)
    x = closed_form.noisy_images((meta.get("channels", 3), meta["side"], meta["side"]), meta["times"])
    label = None if meta["labels"] is None else torch.tensor(meta["labels"])
    return torch.from_numpy(x), torch.tensor(meta["times"]), label, meta["stride"]


def write(name, folder):
    """Write the foreign file or folder into `folder` and return (path, options for the import)."""
    meta, *_ = golden(name)
    file, options = SOURCES[name]
    path = Path(folder) / file
    if name.startswith("diffusers"):
        write_pipeline(path, state(name), meta["full"])
    elif name.startswith("jax"):
        path.write_bytes(pack(flax_state(state(name))))
    elif path.suffix == ".pkl":
        write_snapshot(path, state(name), meta.get("cls", "EDMPrecond"), meta.get("kwargs", {"channels_per_head": 32}))
    else:
        torch.save(OrderedDict(state(name)), path)
    return path, options


def write_pipeline(path, tensors, config):
    """A ConsistencyModelPipeline folder."""
    from safetensors.torch import save_file

    for inner in ("unet", "scheduler"):
        (path / inner).mkdir(parents=True)
    save_file(tensors, str(path / "unet/diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})
    (path / "unet/config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config}))
    scheduler = {"num_train_timesteps": 201, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0}
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    (path / "model_index.json").write_text(json.dumps({"_class_name": "ConsistencyModelPipeline"}))


class Persistent:
    """Pickles like an object of NVlabs' persistence module."""

    def __init__(self, name, state, source="# the source of the class\n"):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


@contextmanager
def nvlabs():
    """A `torch_utils.persistence` module for the time of writing a pickle, whose only function must never run."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("a pickle was executed")

    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    sys.modules |= {"torch_utils": package, "torch_utils.persistence": module}
    try:
        yield
    finally:
        del sys.modules["torch_utils"], sys.modules["torch_utils.persistence"]


def module_tree(tensors, name="Layer", **attributes):
    """Nest a flat state dict into recorded modules; `enc` and `dec` are torch's own containers."""
    own, groups = {}, {}
    for key, tensor in tensors.items():
        head, dot, rest = key.partition(".")
        if dot:
            groups.setdefault(head, {})[rest] = tensor
        else:
            own[head] = tensor
    buffers = {key: value for key, value in own.items() if key in ("resample_filter", "freqs", "phases")}
    state = {
        "training": False,
        "_parameters": OrderedDict(
            (key, torch.nn.Parameter(value)) for key, value in own.items() if key not in buffers
        ),
        "_buffers": OrderedDict(buffers),
        "_non_persistent_buffers_set": set(),
        "_modules": OrderedDict((key, module_tree(inner, key)) for key, inner in groups.items()),
        **attributes,
    }
    if name not in ("enc", "dec"):
        return Persistent(name, state)
    container = torch.nn.ModuleDict()
    container.__dict__["_modules"] = dict(state["_modules"])
    return container


def write_snapshot(path, tensors, name, kwargs):
    """A network-snapshot pickle."""
    with nvlabs(), open(path, "wb") as stream:
        network = module_tree(tensors, name, sigma_min=0, sigma_max=float("inf"), sigma_data=0.5, _init_kwargs=kwargs)
        pickle.dump(
            {"ema": network, "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {"path": "x.zip"}}, stream
        )


def flax_state(leaves):
    """A training state as flax serializes it."""
    tree = {}
    for name, value in leaves.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value.numpy()
    zeros = {"Conv_0": {"kernel": np.zeros((1, 1, 1, 1), np.float32)}}
    return {
        "step": 7,
        "lr": 1e-3,
        "ema_rate": 0.999,
        "params": zeros,
        "params_ema": tree,
        "model_state": {},
        "rng_state": None,
    }


def pack(value):
    """A msgpack encoder for what flax writes."""
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if 0 <= value < 128 else b"\xd3" + struct.pack(">q", value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return (bytes([0xA0 + len(data)]) if len(data) < 32 else b"\xd9" + bytes([len(data)])) + data
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    if isinstance(value, list | tuple):
        return bytes([0x90 + len(value)]) + b"".join(map(pack, value))
    if isinstance(value, np.ndarray):
        inner = pack([list(value.shape), value.dtype.name, value.tobytes()])
        return b"\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner
    head = bytes([0x80 + len(value)]) if len(value) < 16 else b"\xde" + struct.pack(">H", len(value))
    return head + b"".join(pack(key) + pack(item) for key, item in value.items())
