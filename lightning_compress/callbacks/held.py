"""What the callbacks have in common that hold weights in a state: some at zero, some at the values of others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.base import CompressionCallback
from lightning_compress.edits import Companions, companion
from lightning_compress.methods.patterns import matches, no_match, unmatched

__all__ = ["HeldWeights"]


class HeldWeights(CompressionCallback):
    """Base of the callbacks whose state of each weight is a companion of it.

    The state holds after every step of every optimizer, whatever the step did, and after edits of other callbacks.

    Args:
        exclude: patterns of parameter or module names that stay as they are.
        life: the arguments of `CompressionCallback`.
    """

    settles_values: ClassVar[bool] = True
    role: ClassVar[str]
    origin: ClassVar[str]

    def __init__(self, *, exclude: Sequence[str], **life: Any) -> None:
        """Keep the arguments."""
        super().__init__(**life)
        self.exclude = tuple(exclude)
        self._held: list[tuple[str, nn.Parameter, Tensor]] | None = None
        self._hooks: list[Any] = []

    @abstractmethod
    def hold(self, network: nn.Module) -> None:
        """Bring the weights back to their state."""

    def changed(self) -> None:
        """Which weights are held, or how, is another: what is kept of it is out of date."""
        self._held = None

    # Which weights.

    def choose(self, network: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, str]]:
        """The weights that may be held, by name, and why others may not: those of at least two dims are asked about."""
        chosen, left = {}, {}
        for name, weight in network.named_parameters():
            if weight.dim() >= 2 and weight.requires_grad:
                patterns = [pattern for pattern in self.exclude if matches(name, pattern)]
                reason = f"is excluded by pattern {patterns[0]!r}" if patterns else self.refuses(name, weight)
                if reason is None:
                    chosen[name] = weight
                else:
                    left[name] = reason
        return chosen, left

    def refuses(self, name: str, weight: Tensor) -> str | None:
        """Why a weight cannot be held; None if it can."""
        return None

    def require(self, network: nn.Module, patterns: Iterable[str] = ()) -> dict[str, nn.Parameter]:
        """The weights that may be held.

        Raises:
            MisconfigurationException: a pattern matches nothing; there is no weight.
        """
        nothing = unmatched(network, [*self.exclude, *patterns])
        if nothing is not None:
            raise MisconfigurationException(no_match(network, nothing))
        chosen, left = self.choose(network)
        if not chosen:
            why = "; ".join(f"{name} {reason}" for name, reason in list(left.items())[:5])
            raise MisconfigurationException(
                f"{type(self).__name__} finds no weight to work on: {why or 'none has two dims'}"
            )
        return chosen

    def held(self, network: nn.Module) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Name, weight and companion of all that have one; kept, for each step asks."""
        if self._held is None:
            beside = ((name, w, companion(network, name, self.role)) for name, w in network.named_parameters())
            self._held = [(name, weight, state) for name, weight, state in beside if state is not None]
        return self._held

    def companions(self, network: nn.Module, weights: Mapping[str, Tensor]) -> list[Companions]:
        """The edit that gives weights their companions, if some have none."""
        new = {n: tuple(w.shape) for n, w in weights.items() if companion(network, n, self.role) is None}
        return [Companions(self.role, new, self.origin)] if new else []

    # The life.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See `CompressionCallback`."""
        super().on_train_start(trainer, pl_module)
        self._let_go()  # of a run that ended in an error
        network = self.target(pl_module)
        for optimizer in trainer.optimizers:
            self._hooks.append(self.watch(optimizer, network))
        self.hold(network)

    def watch(self, optimizer: Optimizer, network: nn.Module) -> Any:
        """See to it that the state holds after an optimizer's steps; what is returned has a method `remove`."""
        return optimizer.register_step_post_hook(lambda *_: self.hold(network))

    def after_edits(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Edits of other callbacks may have cut tensors, and written to weights."""
        self.changed()
        self.hold(self.target(pl_module))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave module and optimizers as they came."""
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.changed()
