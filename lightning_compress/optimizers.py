"""Optimizers that go on after an edit: state is cut like its tensor, and new parameters stand where old ones stood."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.edits import Change, Replacement

__all__ = ["AroundSteps", "follow_edits", "states_like"]


def follow_edits(optimizer: Optimizer, changes: Sequence[Change | Replacement]) -> None:
    """Bring an optimizer to what a network has become; groups, learning rates and schedules stay.

    A parameter that was cut is the same object as before. Its state tensors (momenta, second moments, ...) of the old
    shape are cut as it was; scalars (step counts) stay. State of any other shape (factored moments) cannot follow: it
    is dropped for that parameter, with a warning. Parameters that took the place of others take their place in the
    groups too, and start without state.

    Args:
        optimizer: the optimizer.
        changes: what `apply_edits` returned.

    Example:
        >>> import torch
        >>> from lightning_compress.edits import Keep, apply_edits
        >>> net = torch.nn.Linear(2, 3, bias=False)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> adam.step()
        >>> follow_edits(adam, apply_edits(net, [Keep({"weight": {0: (0, 2)}}, {"weight": (3, 2)})]))
        >>> adam.state[net.weight]["exp_avg"].shape
        torch.Size([2, 2])
    """
    for change in changes:
        if isinstance(change, Replacement):
            _replace(optimizer, change)
            continue
        state = optimizer.state.get(change.tensor)
        if not state:
            continue
        odd = [
            name
            for name, value in state.items()
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != change.old_shape
        ]
        if odd:
            warnings.warn(
                f"{type(optimizer).__name__} keeps {', '.join(odd)} in another shape than the parameter "
                f"({list(change.old_shape)}); its state for this parameter starts anew",
                stacklevel=2,
            )
            del optimizer.state[change.tensor]
            continue
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == change.old_shape and value.dim() > 0:
                state[name] = change.slice(value)


def states_like(optimizers: Iterable[Optimizer], parameter: nn.Parameter) -> Iterator[Tensor]:
    """What optimizers keep of each entry of a parameter: momenta, second moments.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(2))
        >>> sgd = torch.optim.SGD([weight], 0.1, momentum=0.9)
        >>> weight.sum().backward()
        >>> sgd.step()
        >>> list(states_like([sgd], weight))
        [tensor([1., 1.])]
    """
    for optimizer in optimizers:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                yield value


class AroundSteps:
    """Calls two functions around the arithmetic of an optimizer's steps, from now on.

    `before` is called when the gradients of a step are there: if the step gets a closure that computes them, as
    Lightning's do, after the closure. `after` is called when the step is done, and before a closure is run once more
    (LBFGS). A step that is skipped, as gradient scalers do when gradients overflow, calls neither. Steps that call the
    step of the class that they inherit from are one.

    Args:
        optimizer: the optimizer.
        before: is given the optimizer.
        after: likewise; it may be called without `before`.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(2))
        >>> sgd = torch.optim.SGD([weight], 0.1)
        >>> around = AroundSteps(sgd, lambda _: print("before"), lambda _: print("after"))
        >>> sgd.step()
        before
        after
        >>> around.remove()
        >>> sgd.step()
    """

    def __init__(
        self, optimizer: Optimizer, before: Callable[[Optimizer], None], after: Callable[[Optimizer], None]
    ) -> None:
        self._before, self._after = before, after
        self._depth = 0
        self._hooks = [
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(self._leave),
        ]

    def reset(self) -> None:
        """No step is under way: one that was has ended in an error."""
        self._depth = 0

    def remove(self) -> None:
        """Call them no more."""
        for hook in self._hooks:
            hook.remove()

    def _enter(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._depth += 1
        if self._depth > 1:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._before(optimizer)
            return None

        def evaluate() -> Any:
            self._after(optimizer)
            try:
                loss = closure()
            except BaseException:
                self.reset()  # whoever catches it may take another step
                raise
            self._before(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], evaluate, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluate}

    def _leave(self, optimizer: Optimizer, *_: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if not self._depth:
            self._after(optimizer)


def _replace(optimizer: Optimizer, change: Replacement) -> None:
    for group in optimizer.param_groups:
        params = group["params"]
        places = [place for place, parameter in enumerate(params) if any(parameter is old for old in change.old)]
        if places:  # in the module's order, which is what a resumed run builds its groups in
            params[places[0] : places[0] + 1] = list(change.new)
            for place in reversed(places[1:]):
                del params[place + len(change.new) - 1]
    for old in change.old:
        optimizer.state.pop(old, None)
