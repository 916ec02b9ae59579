"""A network that is trained, with what moves it: its optimizer, its gradients, and their way into a checkpoint."""

from __future__ import annotations

from torch import Tensor, nn

from cmtool.config.schema import TrainConfig
from cmtool.models import Model
from cmtool.training.optimizers import Gradients, build_optimizer, optimizer_tensors, restore_optimizer
from cmtool.training.sharding import Sharding, local, share


class Learner:
    """A model with an optimizer of its own. With `sharding` its network has been split before.

    `rate` is its learning rate in units of the run's.
    """

    def __init__(self, model: Model, train: TrainConfig, sharding: Sharding | None, rate: float = 1.0) -> None:
        self.model, self.sharding, self.rate = model, sharding, rate
        self.names = [name for name, p in model.network.named_parameters() if p.requires_grad]
        # What the optimizer updates: the weights, or this process's rows of them in the same memory.
        self.trained = self.parameters() if sharding is None else [nn.Parameter(local(p)) for p in self.parameters()]
        self.optimizer = build_optimizer(train, self.trained)
        self.gradients = Gradients(train, self.parameters, self.trained, sharding)

    def parameters(self) -> list[nn.Parameter]:
        """Return the weights that are trained, in the order of `names`."""
        return [p for p in self.model.network.parameters() if p.requires_grad]

    def set_rate(self, lr: float) -> None:
        """Set the learning rate from that of the run."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * self.rate

    def normalize(self) -> None:
        """Bring the weights of a magnitude-preserving network back to unit size after a step."""
        normalize = getattr(self.model.network, "normalize_weights", None)
        if normalize is not None:
            normalize()

    def moments(self) -> dict[str, Tensor]:
        """Return the optimizer's state by name; in a sharded run process 0 gets it and the others nothing."""
        state = optimizer_tensors(self.optimizer, self.names)
        return state if self.sharding is None else self.sharding.gather_moments(state, self._like())

    def restore(self, moments: dict[str, Tensor]) -> None:
        """Put back what `moments` gave."""
        if self.sharding is not None:
            like = self._like()
            moments = {k: share(v, like[k.rsplit(".", 1)[0]]) if v.dim() else v for k, v in moments.items()}
        restore_optimizer(self.optimizer, self.names, moments)

    def _like(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.names, self.parameters(), strict=True))
