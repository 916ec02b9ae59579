"""Export of the one-step generator as a program (ONNX, TorchScript), checked against the model after writing."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmtool.errors import UserError, install_extra
from cmtool.files.atomic import atomic_write
from cmtool.models import Model
from cmtool.networks import set_attention_kernel

TOLERANCE = 2e-4
Inputs = tuple[Tensor, ...]


class Generator(nn.Module):
    """Maps z (B, C, H, W) of unit variance, and labels (B,) for a conditional model, to images in [-1, 1]."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.sigma_max, self.float_samples = model, model.sigma_max, model.float_samples

    def forward(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Return f(sigma_max z, sigma_max, label), clamped unless the samples are points."""
        t = torch.full_like(z[:, 0, 0, 0], self.sigma_max)
        x0 = self.model(z * self.sigma_max, t, label)
        return x0 if self.float_samples else x0.clamp(-1, 1)


def example(model: Model, batch: int, seed: int) -> Inputs:
    """Return the generator's inputs: unit noise and, for a conditional model, labels."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn((batch, *model.image_shape), generator=generator)
    if model.num_classes is None:
        return (z,)
    return z, torch.randint(model.num_classes, (batch,), generator=generator)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' own messages (deprecations, optimizer statistics)."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(previous)


def _torchscript(generator: Generator, inputs: Inputs, path: Path) -> None:
    with _quiet(), torch.no_grad():
        traced = torch.jit.trace(generator, inputs, check_trace=False)
        torch.jit.save(traced, str(path))


def _run_torchscript(path: Path) -> Callable[[Inputs], np.ndarray]:
    with _quiet():
        program = torch.jit.load(str(path))
    return lambda inputs: program(*inputs).detach().numpy()


def _onnx(generator: Generator, inputs: Inputs, path: Path) -> None:
    names = ["z", "label"][: len(inputs)]
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes: dict[str, Any] = {name: {0: batch} for name in names}
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            generator,
            inputs,
            str(path),
            input_names=names,
            output_names=["image"],
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _run_onnx(path: Path) -> Callable[[Inputs], np.ndarray]:
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        reference = ReferenceEvaluator(str(path))
        return lambda inputs: reference.run(None, _feed(inputs))[0]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, _feed(inputs))[0]


def _feed(inputs: Inputs) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in zip(("z", "label"), inputs, strict=False)}


def _require_onnx() -> None:
    for package in ("onnx", "onnxscript"):
        try:
            __import__(package)
        except ImportError:
            raise UserError(f"--format onnx needs the package '{package}'.", install_extra("onnx")) from None


def write(model: Model, out: Path, format: str, say: Callable[[str], None]) -> None:
    """Write the one-step generator, then run the written program on new inputs with another batch size.

    Raises:
        UserError: if a package is missing, the model needs a second time, or the program answers differently.
    """
    if model.kind != "consistency":
        raise UserError(
            f"--format {format} holds a one-step generator, which a consistency model is and a teacher is not."
        )
    if getattr(model.network, "two_time", False):
        raise UserError(f"--format {format} is for models of one time; this one needs a second.")
    if format == "onnx":
        _require_onnx()
    set_attention_kernel(model.network, "math")
    generator = Generator(model.cpu()).eval()
    writer, runner = (_onnx, _run_onnx) if format == "onnx" else (_torchscript, _run_torchscript)
    with atomic_write(out) as temporary:
        writer(generator, example(model, 2, seed=0), temporary)
        inputs = example(model, 3, seed=1)
        with torch.no_grad():
            expected = generator(*inputs).numpy()
        error = float(np.abs(runner(temporary)(inputs) - expected).max())
        if not error <= TOLERANCE:
            raise UserError(f"the {format} program differs from the model by {error:.2g}; it was not kept.")
    inputs_said = "z (B, C, H, W) of unit variance" + (" and label (B,)" if model.num_classes else "")
    say(f"takes {inputs_said}; differs from the model by at most {error:.1e} on 3 images.")
