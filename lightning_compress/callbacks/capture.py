"""Capture: learn how a LightningModule calls its network, from a dry training step on real data.

No `example_inputs`: a batch is made from the training data, `training_step` is run on it up to the first thing that
would change anything (`manual_backward`, an optimizer's `step`), and what the network was called with is recorded. All
that the step may leave behind is put back: random state, buffers, metrics, gradients, lists of the module. Samples
are taken at fixed places of the data set, so that a resumed run, and every rank, sees the same ones.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.callbacks.dry import StopStep, dry_step
from lightning_compress.calls import Call, batch_size

__all__ = ["Captured", "batches", "capture", "find_network", "run_step"]


@dataclass(frozen=True)
class Captured:
    """How the network is called in training.

    Attributes:
        path: dotted name of the network inside the LightningModule; empty for the LightningModule itself.
        network: that module.
        calls: the calls of one step.
        calibration: the calls of as many steps as give the samples asked for, one step after the other.
        outside: names of the network's parameters that the step uses outside of these calls.

    Example:
        >>> from lightning_compress.calls import as_calls
        >>> net, calls = torch.nn.Linear(2, 1), as_calls(torch.zeros(8, 2))
        >>> Captured("net", net, calls, calls * 4, ()).path  # what `capture` gives
        'net'
    """

    path: str
    network: nn.Module
    calls: tuple[Call, ...]
    calibration: tuple[Call, ...]
    outside: tuple[str, ...]


def find_network(module: pl.LightningModule, network: str | None = None) -> str:
    """The dotted name of the network inside a LightningModule.

    Args:
        module: the LightningModule.
        network: the name, if the user gave one. Otherwise the only child that has parameters, or the LightningModule
            itself when there are several. A network wrapped by `torch.compile` is looked up inside the wrapper.

    Raises:
        MisconfigurationException: there is no such submodule, or nothing has parameters.
    """
    if network is None:
        children = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
        own = any(True for _ in module.parameters(recurse=False))
        if not children and not own:
            raise MisconfigurationException(f"{type(module).__name__} has no parameters: there is nothing to compress")
        network = children[0] if len(children) == 1 and not own else ""
    names = dict(module.named_modules())
    if network not in names:
        known = ", ".join(name for name, _ in module.named_children())
        raise MisconfigurationException(
            f"`network`: {type(module).__name__} has no submodule {network!r}; it has {known}"
        )
    inner = f"{network}._orig_mod"
    return inner if network and inner in names else network


def capture(trainer: pl.Trainer, module: pl.LightningModule, network: str | None = None, samples: int = 1) -> Captured:
    """Record how the network is called. Callable from `on_train_start` on; leaves no trace in the run.

    Args:
        trainer: the Trainer, with its training data set up.
        module: its LightningModule.
        network: dotted name of the network, see `find_network`.
        samples: least number of samples in `calibration`, if the data has as many.

    Raises:
        MisconfigurationException: the network is never called in `training_step`, or the step cannot be run dry.

    Example:
        >>> from lightning_compress.zoo import Digits, ImageClassifier, LeNet300100
        >>> class Look(pl.Callback):
        ...     def on_train_start(self, trainer, pl_module):
        ...         captured = capture(trainer, pl_module)
        ...         print(captured.path, captured.calls[0].tensors()[0].shape)
        >>> off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        >>> quiet = dict.fromkeys(off, False)
        >>> trainer = pl.Trainer(max_steps=1, accelerator="cpu", limit_val_batches=0, callbacks=[Look()], **quiet)
        >>> trainer.fit(ImageClassifier(LeNet300100(image_size=8), 10), Digits())
        net torch.Size([128, 1, 8, 8])
    """
    path = find_network(module, network)
    target = module.get_submodule(path)
    steps: list[list[Call]] = []
    outside: set[str] = set()
    seen = 0
    with isolate_rng():
        torch.manual_seed(0)
        for batch in batches(trainer.train_dataloader, samples):
            recorder = _Recorder(module, path)
            with dry_step(module), recorder:
                run_step(trainer, module, batch)
            if not recorder.calls:
                raise MisconfigurationException(
                    f"{path or type(module).__name__} is never called in `training_step`: call the network (or one of "
                    "its submodules) there, or name the part that is called with `network=...`"
                )
            steps.append(recorder.calls)
            outside |= recorder.outside
            seen += batch_size(recorder.calls)
            if seen >= samples:
                break
    calibration = tuple(call for step in steps for call in step)
    return Captured(path, target, tuple(steps[0]), calibration, tuple(sorted(outside)))


class _Recorder:
    """Records the outermost calls of a network and of the modules inside it."""

    def __init__(self, module: pl.LightningModule, path: str) -> None:
        self.calls: list[Call] = []
        self.outside: set[str] = set()
        self._target = module.get_submodule(path)
        # A compiled network is called through its wrapper.
        wrapper = module.get_submodule(path.rpartition(".")[0]) if path.endswith("_orig_mod") else None
        self._modules = [("", wrapper)] if wrapper is not None else list(self._target.named_modules())
        self._depth = 0
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._watch = _ParameterWatch(self)
        self.names = {id(p): name for name, p in self._target.named_parameters()}

    @property
    def inside(self) -> bool:
        """Whether a recorded call is running."""
        return self._depth > 0

    def __enter__(self) -> _Recorder:
        for name, module in self._modules:
            if name and not any(True for _ in module.parameters()):
                continue
            enter = self._entering(name)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._watch.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._watch.__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._depth:
                self.calls.append(Call(args, kwargs, name).map(lambda tensor: tensor.detach().clone()))
            self._depth += 1

        return enter

    def _leave(self, *_: object) -> None:
        self._depth -= 1


class _ParameterWatch(TorchFunctionMode):
    """Notes which of the network's parameters are used while none of its calls is running."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._recorder.inside:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and id(leaf) in self._recorder.names:
                    self._recorder.outside.add(self._recorder.names[id(leaf)])
        return func(*args, **(kwargs or {}))


def batches(loaders: Any, samples: int) -> Iterator[Any]:
    """Batches in the structure of the Trainer's loaders, from evenly spaced samples where the data has places.

    Args:
        loaders: the Trainer's loader, or loaders.
        samples: least number of samples in all batches together, if the data has as many.
    """
    leaves, spec = pytree.tree_flatten(loaders)
    streams = [_loader_batches(loader, samples) for loader in leaves]
    for parts in zip(*streams, strict=False):
        yield pytree.tree_unflatten(list(parts), spec)


def _loader_batches(loader: Any, samples: int) -> Iterator[Any]:
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        yield from loader  # a stream has no places: its first batches
        return
    assert dataset is not None
    length = len(dataset)
    size = getattr(loader.batch_sampler, "batch_size", None) or loader.batch_size
    if size is None:  # automatic batching is off: each item is a batch
        yield from (loader.collate_fn(dataset[i]) for i in range(length))
        return
    count = min(max(samples, size), length)
    places = [i * length // count for i in range(count)]
    for start in range(0, count, size):
        chosen = places[start : start + size]
        fetch_many = getattr(dataset, "__getitems__", None)
        yield loader.collate_fn(fetch_many(chosen) if fetch_many else [dataset[i] for i in chosen])


def run_step(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """Run the `training_step` of the module's class on a batch from `batches`, inside of a `dry_step`.

    Args:
        trainer: the Trainer.
        module: its LightningModule.
        batch: a batch as its loader makes it.

    Returns:
        What the step returns; None where something that would change anything has ended it.

    Raises:
        MisconfigurationException: the step takes an iterator over the data.
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
    step = type(module).training_step  # not the instance's: another callback may have wrapped that
    accepted = list(inspect.signature(step).parameters.values())[1:]
    if any(parameter.name == "dataloader_iter" for parameter in accepted):
        raise MisconfigurationException(
            "compression does not work with a `training_step` that takes `dataloader_iter`; let it take "
            "(batch, batch_idx)"
        )
    indexed = len(accepted) > 1 or any(parameter.kind is parameter.VAR_POSITIONAL for parameter in accepted)
    arguments = (batch, 0) if indexed else (batch,)
    eager = torch.compiler.set_stance("force_eager")
    with trainer.precision_plugin.train_step_context(), eager, contextlib.suppress(StopStep):
        return step(module, *arguments)
    return None
