"""Step sizes that are trained, beside the optimizers of the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantized import scope_of

__all__ = ["RULES", "StepTraining"]

RULES = ("lsq", "lsq+", "pact", "fixed")
"""What trains steps: LSQ (Esser et al. 2020), LSQ+ with zero points (Bhalgat et al. 2020), PACT: those of values, from
what is clipped (Choi et al. 2018); or nothing."""


class StepTraining:
    """Trains the steps of a quantized network by Adam, in logarithms, at a learning rate of their own.

    Steps are buffers, and in no optimizer of the run: what suits weights (momentum, weight decay, a large rate) does
    not suit them, and no schedule or checkpoint of the run need know them. In logarithms, as trained thresholds are
    (Jain et al. 2019, arXiv 1903.08066), one rate fits the steps of all layers.

    Args:
        rule: one of `RULES`.
        lr: the learning rate, in octaves.
        limits: name of a step -> the largest it may be.
    """

    def __init__(self, rule: str, lr: float, limits: Mapping[str, float]) -> None:
        self.rule, self.lr, self.limits = rule, lr, dict(limits)
        self._steps: dict[str, Tensor] = {}
        self._latent: dict[str, Tensor] = {}
        self._adam: torch.optim.Adam | None = None
        self._modules: list[nn.Module] = []

    @property
    def running(self) -> bool:
        """Whether steps are trained now."""
        return self._adam is not None

    def begin(self, network: nn.Module, state: Mapping[str, Any] | None = None) -> None:
        """Train the steps of a network from now on.

        Args:
            network: the network.
            state: what `state_dict` gave when a run was interrupted.
        """
        self.end()
        if self.rule == "fixed":
            return
        for path, module in network.named_modules():
            scope = scope_of(module)
            if scope is None:
                continue
            names = [f"{prefix}_step" for prefix, _ in scope.grids()]
            if self.rule != "pact":
                names += [f"{leaf}_step" for leaf in scope.weights]
            if self.rule == "lsq+":
                names += [f"{prefix}_zero" for prefix, grid in scope.grids() if grid.low == 0]
            for name in names:
                self._steps[f"{path}.{name}".lstrip(".")] = module.get_buffer(name).requires_grad_()
            module.__dict__["_quantization_rule"] = self.rule
            self._modules.append(module)
        for name, step in self._steps.items():
            self._latent[name] = _to_latent(name, step.detach()).clone().requires_grad_()
        self._adam = torch.optim.Adam(list(self._latent.values()), self.lr)
        if state:
            with torch.no_grad():
                for name, latent in self._latent.items():
                    latent.copy_(state["latent"][name])
            self._adam.load_state_dict(state["adam"])

    @torch.no_grad()
    def step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Take a step on the gradients that were gathered.

        Args:
            reduce: the mean of a tensor over all processes.
        """
        if self._adam is None or all(step.grad is None for step in self._steps.values()):
            return
        gradients = [torch.zeros_like(s) if s.grad is None else s.grad for s in self._steps.values()]
        flat = reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        for step in self._steps.values():
            step.grad = None
        if not torch.isfinite(flat).all():  # a gradient scaler looks for its scale
            return
        parts = flat.split([gradient.numel() for gradient in gradients])
        for (name, step), part in zip(self._steps.items(), parts, strict=True):
            factor = 1.0 if name.endswith("_zero") else step * math.log(2)
            self._latent[name].grad = part.view_as(step) * factor
        self._adam.step()
        for name, step in self._steps.items():
            latent = self._latent[name]
            limit = self.limits.get(name)
            if limit is not None:
                latent.clamp_(max=math.log2(limit))
            step.copy_(latent if name.endswith("_zero") else torch.exp2(latent))

    def end(self) -> None:
        """Train them no more."""
        for step in self._steps.values():
            step.requires_grad = False
            step.grad = None
        for module in self._modules:
            module.__dict__.pop("_quantization_rule", None)
        self._steps, self._latent, self._modules, self._adam = {}, {}, [], None

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs."""
        if self._adam is None:
            return {}
        latent = {name: value.detach().clone() for name, value in self._latent.items()}
        return {"latent": latent, "adam": self._adam.state_dict()}


def _to_latent(name: str, step: Tensor) -> Tensor:
    return step if name.endswith("_zero") else step.log2()
