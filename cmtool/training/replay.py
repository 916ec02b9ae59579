"""Passes of a step on a GPU, recorded with their backward passes and replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from cmtool.config.schema import RunConfig
from cmtool.losses.assemble import has_dropout
from cmtool.losses.objective import Loss
from cmtool.losses.terms import Draw
from cmtool.machine.recorded import Recorded
from cmtool.rng import moved

# Steps that may wait in the GPU's queue; more would only keep their images in memory.
IN_QUEUE = 4


def replayable(config: RunConfig, device: torch.device, processes: int = 1) -> bool:
    """Whether a pass may be recorded: it draws no masks, and the CPU needs no number from the GPU.

    Not with several processes: recordings have not yet been tried together with summing gradients between processes.
    Nor with a fake network, which would have to be recorded by itself and together with the model.
    """
    train = config.train
    asked = train.cuda_graphs and not train.compile and processes == 1
    asked = asked and config.recipe.score.kind == "none"
    return asked and device.type == "cuda" and train.precision != "fp16" and not has_dropout(config)


def flattened(draw: Draw) -> tuple[list[Tensor | None], Callable[[tuple[Tensor | None, ...]], Draw]]:
    """Return every tensor of a draw, None where one is missing, and a function that puts others in their places.

    Everything else stays as it is in `draw`: images drawn by another schedule or for other rows look the same to a
    recording.
    """
    found: list[Tensor | None] = []
    places: list[tuple[str, int | None]] = []  # a field, and how many tensors its tuple has
    for entry in fields(draw):
        value: Any = getattr(draw, entry.name)
        if isinstance(value, tuple):
            found += value
            places.append((entry.name, len(value)))
        elif value is None or isinstance(value, Tensor):
            found.append(value)
            places.append((entry.name, None))

    def put(tensors: tuple[Tensor | None, ...]) -> Draw:
        left = list(tensors)
        new: dict[str, Any] = {}
        for name, count in places:
            taken, left = left[: count or 1], left[count or 1 :]
            new[name] = taken[0] if count is None else tuple(taken)
        return replace(draw, **new)

    return found, put


class Replay:
    """Passes that add up gradients in fixed memory that recordings write to.

    Args:
        loss: runs the networks of a pass.
        descend: adds the gradients of its loss.
        parameters: the parameters whose gradients are kept.
        pause: waits until the thread that loads images is idle.
        tell: receives the reason if passes are not recorded.
    """

    def __init__(
        self,
        loss: Callable[[Draw], Loss],
        descend: Callable[[Loss], None],
        parameters: Callable[[], list[nn.Parameter]],
        pause: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        self._loss, self._descend, self._parameters, self._pause = loss, descend, parameters, pause
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._reached: set[nn.Parameter] = set()
        self._steps: list[torch.cuda.Event] = []
        self._put: Callable[[tuple[Tensor | None, ...]], Draw] | None = None
        self.calls = Recorded(
            self._pass, self._before, tell=lambda why: tell(f"train.cuda_graphs: a pass is not recorded: {why}")
        )

    def __call__(self, draw: Draw) -> Loss:
        """Do a pass and add its gradients to those of the step."""
        share = moved(torch.tensor(draw.share, dtype=torch.float32), draw.x0.device)
        tensors, self._put = flattened(replace(draw, share=share))
        weighted, distance = self.calls(*tensors)
        self._put = None  # it holds on to the images
        return Loss(weighted, distance, draw.t)

    def clear_gradients(self) -> bool:
        """Set the gradients to zero in place, and wait if the GPU is too many steps behind.

        Returns False before the first recording, when no gradients have fixed memory yet.
        """
        if not self._gradients:
            self._reached |= {parameter for parameter in self._parameters() if parameter.grad is not None}
            return False
        for parameter, gradient in self._gradients.items():
            parameter.grad = gradient
        torch._foreach_zero_(list(self._gradients.values()))
        self._steps.append(torch.cuda.Event())
        self._steps[-1].record()
        if len(self._steps) > IN_QUEUE:
            self._steps.pop(0).synchronize()
        return True

    def _pass(self, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self._put is not None
        loss = self._loss(self._put(tensors))
        self._descend(loss)
        return loss.weighted.detach(), loss.distance

    def _before(self) -> None:
        """Give gradients their fixed memory, holding what earlier passes of this step have added up.

        A weight that no pass has reached gets none: the optimizer skips it, as it does without recordings.
        """
        self._pause()
        for parameter in self._parameters():
            if parameter.grad is None and parameter in self._reached:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                self._gradients[parameter] = parameter.grad
