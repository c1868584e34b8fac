"""Calibration: what a network's layers see and give on a few hundred unlabelled inputs.

Runs of a network that feed the inputs and outputs of some layers to whoever sums them up. They stop at the last layer
that is asked for, and keep no activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.calls import Call, run_calls
from lightning_compress.methods.replaceable import Layers
from lightning_compress.quiet import undisturbed, without_observers

__all__ = ["compare_outputs", "first_and_last", "input_norms", "visit"]


class _Stop(BaseException):
    """Ends a run: nothing that is asked for comes after."""


def visit(
    model: nn.Module,
    layers: Layers,
    paths: Sequence[str],
    calls: Sequence[Call],
    see: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Run a network and see the inputs and outputs of some of its layers.

    Args:
        model: the network.
        layers: what is known of it.
        paths: the layers.
        calls: what to run it on.
        see: called with path, input and output at each of their calls.
    """
    with without_observers(model), undisturbed(model):
        for number, call in enumerate(calls):
            expected = layers.hits[number % len(layers.hits)]
            with _watching(model, paths, sum(expected[path] for path in paths), see):
                _run(model, call)


def compare_outputs(
    model: nn.Module,
    trial: nn.Module,
    layers: Layers,
    path: str,
    calls: Sequence[Call],
    see: Callable[[Tensor, Tensor], None],
    inner: str = "",
) -> None:
    """Run two networks side by side, and see a layer's inputs in one with its outputs in the other.

    Args:
        model: the network whose outputs are wanted.
        trial: the one whose inputs are seen.
        layers: what is known of `model`.
        path: the layer.
        calls: what to run them on.
        see: called with input and wanted output at each of its calls.
        inner: a layer inside of what stands at `path` in `trial`, whose inputs are seen instead.
    """
    source = f"{path}.{inner}" if inner else path
    with without_observers(model), undisturbed(model), undisturbed(trial):
        for number, call in enumerate(calls):
            count = layers.hits[number % len(layers.hits)][path]
            wanted: list[Tensor] = []
            with _watching(model, [path], count, lambda _, __, y, kept=wanted: kept.append(y)):  # type: ignore[misc]
                _run(model, call)
            outputs = iter(wanted)
            with _watching(trial, [source], count, lambda _, x, __, kept=outputs: see(x, next(kept)), before=True):  # type: ignore[misc]
                _run(trial, call)


@torch.no_grad()
def input_norms(network: nn.Module, calls: Sequence[Call]) -> dict[str, Tensor]:
    """The root of the mean square of each input that a layer sees.

    Args:
        network: the network.
        calls: calibration data.

    Returns:
        Name of the weight -> one value for each input channel; of linear layers and convolutions without groups.
    """
    sums: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str, sides: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if kwargs.get("transposed") is True:  # these are no inputs of the layer, but of its transpose
                return
            x = args[0].detach().float()
            square = x.square().transpose(0, x.dim() - 1 - sides).flatten(1).sum(1)
            before, count = sums.get(name, (torch.zeros_like(square), 0))
            sums[name] = before + square, count + x.numel() // len(square)

        return hook

    with without_observers(network), undisturbed(network):
        handles = []
        for name, module in network.named_modules():
            plain = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
            if plain or isinstance(module, nn.Linear):
                hook = watch(f"{name}.weight".lstrip("."), module.weight.dim() - 2)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            run_calls(network, calls)
        finally:
            for handle in handles:
                handle.remove()
    return {name: (total / count).sqrt() for name, (total, count) in sums.items()}


@torch.no_grad()
def first_and_last(network: nn.Module, names: Iterable[str], calls: Sequence[Call]) -> tuple[str, ...]:
    """The weight that a network uses first, and the one that it uses last, as its modules are called.

    Args:
        network: the network.
        names: names of weights.
        calls: what to run it on.

    Returns:
        Their names; none, if none of these modules is called.

    Example:
        >>> from lightning_compress.calls import as_calls
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 1))
        >>> first_and_last(net, ["0.weight", "1.weight", "2.weight"], as_calls(torch.zeros(1, 2)))
        ('0.weight', '2.weight')
    """
    seen: list[str] = []
    with without_observers(network), undisturbed(network), ExitStack() as stack:
        for name in names:
            module = network.get_submodule(name.rpartition(".")[0])
            hook = module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
            stack.callback(hook.remove)
        run_calls(network, calls)
    return (seen[0], seen[-1]) if seen else ()


def _run(model: nn.Module, call: Call) -> None:
    with suppress(_Stop):
        model.get_submodule(call.path)(*call.args, **call.kwargs)


@contextmanager
def _watching(
    model: nn.Module,
    paths: Sequence[str],
    count: int,
    see: Callable[[str, Tensor, Tensor], None],
    before: bool = False,
) -> Iterator[None]:
    """Hooks on some layers; the run ends when they have been called `count` times. `before`: with no output yet."""
    left = count

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            nonlocal left
            see(path, args[0], args[0] if output is None else output)
            left -= 1
            if not left:
                raise _Stop

        return hook

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(watch(path)).remove)
        yield
