"""Passes of a step on a GPU, recorded with their backward passes and replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cmtool.config.schema import RunConfig
from cmtool.losses.draw import Draw, Slice
from cmtool.losses.objective import Loss
from cmtool.losses.recipes import has_dropout
from cmtool.recorded import Recorded
from cmtool.rng import moved

# Steps that may wait in the GPU's queue: more would only hold on to their images.
IN_QUEUE = 4


def replayable(config: RunConfig, device: torch.device, processes: int = 1) -> bool:
    """Whether a pass may be recorded: no masks are drawn in it, and no number that it needs is on the processor.

    Not in one of several processes: how that goes beside their gradients' sums has not been seen.
    """
    train = config.train
    asked = train.cuda_graphs and not train.compile and processes == 1
    return asked and device.type == "cuda" and train.precision != "fp16" and not has_dropout(config)


class Replay:
    """Passes that add to gradients in memory of their own, which recordings write to.

    `work(draw, share)` does a pass with its backward pass; `pause` lets the thread that loads images come to rest;
    `tell` is told why passes are not recorded, if so.
    """

    def __init__(
        self,
        work: Callable[[Draw, Tensor], Loss],
        parameters: Callable[[], list[nn.Parameter]],
        pause: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        self._work, self._parameters, self._pause = work, parameters, pause
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._reached: set[nn.Parameter] = set()
        self._steps: list[torch.cuda.Event] = []
        self._rows = Slice(0, 0, 0, 0)
        self.calls = Recorded(
            self._pass, self._before, tell=lambda why: tell(f"train.cuda_graphs: a pass is not recorded: {why}")
        )

    def __call__(self, draw: Draw, share: float) -> Loss:
        """Do a pass of `draw`, with `share` of the run done; the gradients are added up."""
        device = draw.x0.device
        done = moved(torch.tensor(share, dtype=torch.float32), device)
        self._rows = draw.rows
        weighted, distance = self.calls(draw.x0, draw.z, draw.t, draw.r, draw.label, draw.made, done)
        return Loss(weighted, distance, draw.t)

    def clear_gradients(self) -> bool:
        """Set the gradients to zero where they are, and wait for a step that is far behind.

        Returns False before the first recording: there are none in memory that is kept.
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

    def _pass(
        self, x0: Tensor, z: Tensor, t: Tensor, r: Tensor, label: Tensor | None, made: Tensor | None, share: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Of a recipe whose images the model makes in part `made` says which: the share itself is not looked at again.
        draw = Draw(x0, z, t, r, label, 0.0 if made is None else 1.0, self._rows, made)
        loss = self._work(draw, share)
        return loss.weighted.detach(), loss.distance

    def _before(self) -> None:
        """Give gradients their memory, with what earlier passes of this step have added up in it.

        A weight that no pass has reached gets none: the optimizer leaves it alone, as it does without recordings.
        """
        self._pause()
        for parameter in self._parameters():
            if parameter.grad is None and parameter in self._reached:
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                self._gradients[parameter] = parameter.grad
