"""Network + parameterization = a model that is called as `model(x, t, label, r)` and returns a clean image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from cmtool.checkpoint import load_tensors, resolve_file
from cmtool.config.condition import condition_of
from cmtool.config.networks import network_config
from cmtool.config.schema import ProcessConfig, RunConfig
from cmtool.config.sources import SOURCES
from cmtool.diffusion.parameterization import Coefficients, build_parameterization
from cmtool.diffusion.process import VarianceExploding, expand
from cmtool.errors import CheckpointError, UserError
from cmtool.machine.recorded import Recorded
from cmtool.networks import build_network
from cmtool.networks.convolution import hold_in
from cmtool.networks.in_step import Pairing
from cmtool.networks.normalization import wide
from cmtool.networks.truncated import TruncatedNetwork

# The pictures (B, K, H, W) that conditioned models see in the current block of code.
_BESIDE: ContextVar[Tensor | None] = ContextVar("beside", default=None)
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What a guided network is told where there is no guidance: ln of the scale, first and last time.
UNGUIDED = torch.tensor([0.0, 0.0, 1.0], device="cpu")


@contextlib.contextmanager
def beside(pictures: Tensor | None) -> Iterator[None]:
    """Show conditioned models these pictures, (B, K, H, W) or one for all, beside the input of every call."""
    token = _BESIDE.set(pictures)
    try:
        yield
    finally:
        _BESIDE.reset(token)


class Model(nn.Module):
    """A raw network inside its parameterization.

    Call: x (B, C, H, W) with sides divisible by the network's down-sampling, t (B,) in [sigma_min, sigma_max],
    label (B,) int or None (None and -1 are the null class), r (B,) the time to go to in two-time models (None: the
    clean end), or (B, 4) with guidance beside it in guided ones (`diffusion.guidance.Told`), augment (B, L) how the
    images were augmented (None: not at all, as for samples). Returns (B, C, H, W), the estimate of x0, in x's dtype.
    """

    kind = "model"

    def __init__(self, network: nn.Module, process: ProcessConfig, header: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.process = process
        self.header = header
        self.parameterization = build_parameterization(process)
        self.condition = condition_of(header.get("data", {}))
        self.autocast: torch.dtype | None = None
        # Whether consistency training asks it for a pair of passes that share their half-precision rounding errors.
        self.paired = False
        # What runs such a pair; None: one pass after the other.
        self.pairing: Pairing | None = None
        self._replayed: Callable[..., Tensor] | None = None

    @property
    def sigma_min(self) -> float:
        """Smallest noise level: f is the identity there."""
        return self.process.sigma_min

    @property
    def sigma_max(self) -> float:
        """Largest noise level: where sampling starts."""
        return self.process.sigma_max

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data that the scalings assume."""
        return self.process.sigma_data

    @property
    def rho(self) -> float:
        """Exponent of the Karras grid."""
        return self.process.rho

    @property
    def num_classes(self) -> int | None:
        """Number of class labels that the network is conditioned on; None: unconditional."""
        return self.header["data"].get("num_classes")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images it was trained on."""
        data = self.header["data"]
        return data["channels"], data["resolution"], data["resolution"]

    @property
    def latent(self) -> dict[str, Any] | None:
        """How the latents that it works on were made; None: it works on pictures or points."""
        return self.header.get("data", {}).get("latent")

    @property
    def clamps(self) -> bool:
        """Whether its answers are pictures, which lie in [-1, 1]."""
        return not self.float_samples and self.latent is None

    @property
    def float_samples(self) -> bool:
        """Whether samples are points (toy data), to be kept as floats and never clamped."""
        return bool(self.header["data"].get("float_samples", False))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return next(self.network.parameters()).dtype

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        r: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Return c_skip x + c_out F(c_in x, c_noise, label, r, augment), the scalings in at least x's precision."""
        c = self.parameterization.coefficients(wide(t))
        raw = self._raw(x, c, label, r, augment)
        return expand(c.c_skip.to(x.dtype), x) * x + expand(c.c_out.to(x.dtype), x) * raw

    def raw(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        r: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        """Return F itself at the scaled input, (B, C, H, W) in x's dtype; arguments as in a call of the model."""
        return self._raw(x, self.parameterization.coefficients(wide(t)), label, r, augment)

    def _raw(
        self, x: Tensor, c: Coefficients, label: Tensor | None, r: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        inner = self._with_condition(expand(c.c_in.to(x.dtype), x) * x)
        if r is None and getattr(self.network, "two_time", False):
            r = torch.zeros_like(c.c_noise)
        guidance = None
        if r is not None and getattr(self.network, "guided", False):
            r, guidance = (r[:, 0], r[:, 1:]) if r.ndim == 2 else (r, UNGUIDED.to(r).expand(len(r), 3))
        # Half precision resolves 250 ln t only to one or two units, so the network's conditioning is at least float32.
        exact = torch.promote_types(x.dtype, torch.float32)
        if r is not None and self.process.parameterization not in ("flow", "trig"):
            r = r.clamp_min(self.sigma_min)  # where ln r ends: a jump to 0 is one to sigma_min
        to = None if r is None else self.parameterization.coefficients(wide(r)).c_noise.to(exact)
        if to is not None and guidance is not None:
            to = torch.cat([to[:, None], guidance.to(exact)], dim=1)
        with torch.autocast(x.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            told = (label, to) if augment is None else (label, to, augment)
            raw = (self._replayed or self.network)(inner, c.c_noise.to(exact), *told)
        # A conditioned network answers in as many channels as it sees; the condition's are not used.
        return (raw if self.condition is None else raw[:, : x.shape[1]]).to(x.dtype)

    def _with_condition(self, inner: Tensor) -> Tensor:
        """Return the network's input (B, C, H, W), with the channels of the condition appended."""
        if self.condition is None:
            return inner
        pictures = _BESIDE.get()
        if pictures is None:
            raise UserError(
                f"this model is conditioned on a picture ({self.header['data']['condition']}), and gets none here.",
                "cmtool sample --condition FILE gives it one",
            )
        if len(pictures) == 1:
            pictures = pictures.expand(len(inner), -1, -1, -1)
        return torch.cat([inner, pictures.to(inner)], dim=1)

    @contextlib.contextmanager
    def replaying(self) -> Iterator[None]:
        """On a GPU, record what the network does with a batch and replay it for other batches of the same shape.

        For sampling: the weights stay as they are, dropout is off, and no gradients are recorded.
        """
        compiled = any(part._compiled_call_impl is not None for part in self.network.modules())
        learns = self.training or any(parameter.requires_grad for parameter in self.parameters())
        if self._replayed is not None or self.device.type != "cuda" or compiled or learns:
            yield
            return
        recorded = Recorded(lambda *inputs: (self.network(*inputs),))
        self._replayed = lambda *inputs: recorded(*inputs)[0]
        try:
            yield
        finally:
            self._replayed = None

    def log_variance(self, t: Tensor) -> Tensor:
        """Return the head w (B,) of a network with `log_variance` at the noise levels t (B,)."""
        network: Any = self.network
        return network.log_variance(self.parameterization.coefficients(wide(t)).c_noise)


class ConsistencyModel(Model):
    """f(x, t): the clean end of the trajectory through x at t."""

    kind = "consistency"


class Denoiser(Model):
    """D(x, t) = E[x0 | x_t = x]: a diffusion model, the teacher of a distillation."""

    kind = "diffusion"


KINDS: dict[str, type[Model]] = {"consistency": ConsistencyModel, "diffusion": Denoiser}


def ve_process(model: Model) -> VarianceExploding:
    """Return the noise process of a model."""
    return VarianceExploding(model.sigma_min, model.sigma_max, model.sigma_data)


def model_header(
    config: RunConfig,
    *,
    num_classes: int | None,
    class_names: list[str] | None,
    fingerprint: str,
    source: str | None = None,
    holdout: float = 0.0,
) -> dict[str, Any]:
    """Return the header that a model trained by `config` starts with: everything needed to rebuild it.

    `source` is what was found at `config.data.path`, e.g. "folder of images"; `holdout` is the bound below which the
    keys of images lie that were held out, with what else is needed to find these again.
    """
    data = config.data
    held = {"holdout": holdout, **data.model_dump(include={"size", "fit", "filter", "small"})}
    edits = config.recipe.model_kind == "consistency" and not SOURCES[data.source].points
    return {
        "kind": config.recipe.model_kind,
        "preset": config.preset,
        "recipe_name": config.recipe_name,
        "recipe": config.recipe.model_dump(mode="json"),
        "seed": config.train.seed,
        "step": 0,
        "network": config.network.model_dump(mode="json"),
        "process": config.process.model_dump(mode="json"),
        "data": {
            "source": (source if data.path else None) or data.source,
            **({"path": data.path} if data.path else {}),
            **({"kind": data.kind} if data.kind else {}),
            "resolution": data.resolution,
            "channels": data.channels,
            **({"condition": data.condition} if data.condition else {}),
            "num_classes": num_classes,
            "class_names": class_names,
            "fingerprint": fingerprint,
            "float_samples": SOURCES[data.source].points,
            **(held if holdout else {}),
        },
        "times": {key: list(value) for key, value in config.sample.times.items()},
        "sample": {"sampler": config.sample.sampler, "steps": usual_steps(config)},
        **({"edit": config.edit.model_dump(mode="json")} if edits else {}),
        "eval": {"reference": config.eval.reference, "features": config.eval.features},
        "label_dropout": config.train.label_dropout if config.data.labels else 0.0,
    }


def usual_steps(config: RunConfig) -> int | None:
    """Return how many steps a model takes by default: as configured, else those that halving ends at."""
    curriculum = config.recipe.curriculum
    return config.sample.steps or (curriculum.s1 if curriculum.scales == "halving" else None)


def build_model(header: dict[str, Any]) -> Model:
    """Build a model from its header (kind, network, process, data), with fresh weights that its seed decides.

    Raises:
        CheckpointError: if the header names something unknown to this version.
    """
    try:
        table = network_config(**header["network"])
        process = ProcessConfig(**header["process"])
        data = header["data"]
        seen = condition_of(data)
        channels = data["channels"] + (0 if seen is None else seen.channels)
        shape = {"channels": channels, "resolution": data["resolution"], "num_classes": data.get("num_classes")}
        kind, seed = KINDS[header["kind"]], int(header.get("seed") or 0)
        late = build_network(table, **shape, seed=seed)
        network: nn.Module = late
        if process.truncated_at is not None:
            level = build_parameterization(process).coefficients(torch.tensor([process.truncated_at], device="cpu"))
            early = build_network(table, **shape, seed=seed)
            network = TruncatedNetwork(early, late, float(level.c_noise))
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError, UserError) as error:
        raise CheckpointError(f"the model's header cannot be understood: {_in_one_line(error)}") from error
    return kind(network, process, header)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, problem['loc'])) or 'process'}: {problem['msg']}."
    if isinstance(error, KeyError):
        return f"{error} is missing or unknown."
    return f"{' '.join(str(error).split())[:200]}"


def placed(model: Model, device: torch.device, compiled: bool = False) -> Model:
    """Move a model to a device, in the memory layout that is fastest there; return it.

    That is channels last on a CPU and in compiled code. Elsewhere it is channels first: torch's group normalization on
    a GPU supports nothing else, and every layer would have to convert (a fifth of a step, measured on an H200).
    """
    last = compiled or device.type == "cpu"
    return model.to(device).to(memory_format=torch.channels_last if last else torch.contiguous_format)


def apply_precision(model: Model, precision: str) -> Model:
    """Set how a model computes: fp64 in double, bf16 and fp16 by autocast around the network, else float32.

    With half precision the scalings, the time embedding, and the first and last convolution stay in float32. Only for
    models that are used, not trained: half precision rounds their weights permanently.
    """
    if precision == "fp64":
        return model.double()
    half = HALF.get(precision)
    model.autocast = half
    if half is not None:
        hold_in(model.network, half)
    return model


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Rebuild a model (its sampling average, in evaluation mode, without gradients) from a file or run folder.

    Raises:
        CheckpointError: if there is no model there, or it is damaged.
    """
    file = resolve_file(path)
    tensors, header = load_tensors(file)
    # First built without memory, so that a header that promises more than the file holds costs nothing.
    with torch.device("meta"):
        model = build_model(header)
    shapes = {name: tensor.shape for name, tensor in model.network.state_dict().items()}
    wrong = sorted(set(shapes) ^ set(tensors)) or [name for name in shapes if shapes[name] != tensors[name].shape]
    if wrong:
        raise CheckpointError(f"{file} does not fit its own header: {len(wrong)} tensors differ, first {wrong[0]}.")
    if set(dict(model.named_buffers())) - set(model.state_dict()):
        model = build_model(header).to(dtype)  # a network with derived buffers needs them computed
    else:
        # Not `to_empty`: for tensors without memory it imports torch's symbolic shapes, which takes most of a second.
        model = model.to(dtype)._apply(_with_memory)
    # Copied, not assigned: the weights keep the memory layout that the network chose, and so its speed and bits.
    model.network.load_state_dict(tensors)
    model.header = header
    model.requires_grad_(False)
    return placed(model, torch.device(device)).eval()


def _with_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return an uninitialized CPU tensor with the size, layout and dtype of one without memory."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
