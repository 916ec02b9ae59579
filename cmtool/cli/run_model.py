"""From a model file to a model that computes: device and precision as asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cmtool.cli.find_model import FoundModel
    from cmtool.models import Model


def load_model(found: FoundModel, device: str, precision: str) -> Model:
    """Load a found model for running.

    Args:
        found: the model file.
        device: "auto", "cpu", "cuda" or "mps".
        precision: "auto" is float32, so that samples do not depend on the machine; "fp64", or "bf16" and "fp16" by
            autocast around the network.
    """
    from cmtool.memory import keep_freed_memory
    from cmtool.models import apply_precision, load
    from cmtool.training.setup import choose_device

    keep_freed_memory()
    # fp64 exists on no mps device, and apply_precision would only find out inside torch.
    place = choose_device("cpu" if device == "auto" and precision == "fp64" else device)
    return apply_precision(load(found.path, place), precision)
