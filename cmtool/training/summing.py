"""Gradients summed over the processes of a run, bucket by bucket, each as soon as its last gradient is there.

Buckets depend on the parameters alone and are sent in one order. So a sum that starts within the backward pass has the
bits of one that starts after it, and every process sends the same buckets whichever weights its passes reach.
DistributedDataParallel is not used: a step may run several passes of one network, and its hooks sit on the network's
call, which forward-mode derivatives bypass. Here they sit on the weights, and only during the last backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Bytes of gradients in one message: enough for the network's full rate, and few enough that sending begins early.
BUCKET = 25 * 2**20


def buckets(parameters: Sequence[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    """Return the parameters in buckets of one dtype and at most `limit` bytes, or of one larger parameter.

    The last parameter comes first, because backward passes go from a network's end to its beginning.
    """
    found: list[list[nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        if not found or size + parameter.nbytes > limit or parameter.dtype != found[-1][0].dtype:
            found.append([])
            size = 0
        found[-1].append(parameter)
        size += parameter.nbytes
    return found


class GradientSum:
    """Replaces the gradients of a network by their sums over all processes; missing gradients count as zeros."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._buckets = buckets(parameters, BUCKET)
        self._sent: list[tuple[Tensor, Any]] = []  # what is being summed, and what to wait for

    @contextlib.contextmanager
    def begun_within(self) -> Iterator[None]:
        """Send the buckets while the backward pass runs that is called here, the last one of a step.

        A bucket waits for those before it, and for the pass's end if the pass does not reach all of its weights. If the
        pass fails and the step's passes are done again, what has been sent stands: its gradients were complete.
        """
        missing = [len(bucket) for bucket in self._buckets]

        def arrival(number: int) -> Callable[[Tensor], None]:
            def arrived(_: Tensor) -> None:
                missing[number] -= 1
                while len(self._sent) < len(missing) and not missing[len(self._sent)]:
                    self._send()

            return arrived

        hooks = [
            parameter.register_post_accumulate_grad_hook(arrival(number))
            for number, bucket in enumerate(self._buckets)
            for parameter in bucket
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._send_rest()

    def finish(self) -> None:
        """Send what has not been sent, wait for all sums and put them in the gradients' places."""
        self._send_rest()
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            pieces = flat.split([parameter.numel() for parameter in bucket])
            gradients = []
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                gradients.append(parameter.grad)
            torch._foreach_copy_(gradients, [p.view(g.shape) for p, g in zip(pieces, gradients, strict=True)])
        self._sent.clear()

    def _send_rest(self) -> None:
        while len(self._sent) < len(self._buckets):
            self._send()

    def _send(self) -> None:
        """Begin to sum the next bucket."""
        bucket = self._buckets[len(self._sent)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([gradient.detach().reshape(-1) for gradient in gradients])
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))
