"""Teachers: where they come from, and how they are run."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.artifact import load_compressed
from lightning_compress.calls import shown_inputs
from lightning_compress.distill.taps import DistillationError, Taps, logits_of
from lightning_compress.edits import apply_edits, edits_from_json, rewind_edits, skeleton
from lightning_compress.quiet import without_observers
from lightning_compress.wording import require_choice

__all__ = ["EXITS", "SELF", "FrozenTeacher", "Teacher", "as_teachers", "load_teacher"]

SELF = "self"
EXITS = "exits"
TeacherPrecision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A teacher: where it comes from and how it runs.

    Attributes:
        source: a network; `"self"`, the student as it is before a method's first edit; `"exits"`, its own deeper layers
            in the same step; `"timm/NAME"` or `"torchvision/NAME"` with its published weights; the path of a checkpoint
            (Lightning's, or a state dict) or of a compressed artifact (`.safetensors`).
        net: for files, a network of the architecture that they hold; by default the student's.
        weight: how much this teacher counts beside others.
        precision: `fp32`, `bf16` or `fp16`; None: the precision of the training step.
        compile: run it through `torch.compile`.
        channels_last: run it in channels-last memory format.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> Teacher("teacher.ckpt", precision="int8")
        Traceback (most recent call last):
        ValueError: `precision` must be one of fp32, bf16, fp16, None, got 'int8'
    """

    source: nn.Module | str | Path
    net: nn.Module | None = None
    weight: float = 1.0
    precision: TeacherPrecision | None = None
    compile: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.source, nn.Module | str | Path):
            raise ValueError(
                "a teacher must be a network, the path of a checkpoint or an artifact, 'timm/NAME', 'torchvision/NAME' "
                f"or 'self', got {self.source!r}"
            )
        if self.precision not in (None, *get_args(TeacherPrecision)):
            require_choice("precision", self.precision, (*_DTYPES, None))
        if not self.weight > 0:
            raise ValueError(f"a teacher's `weight` must be above 0, got {self.weight!r}")

    @property
    def name(self) -> str:
        """How messages call it."""
        return type(self.source).__name__ if isinstance(self.source, nn.Module) else repr(str(self.source))


def as_teachers(value: Any) -> tuple[Teacher, ...]:
    """One teacher or several, from all that stands for them.

    Raises:
        ValueError: none, or "self" or "exits" beside others.
    """
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    teachers = tuple(item if isinstance(item, Teacher) else Teacher(item) for item in items)
    if not teachers:
        raise ValueError("`teacher` is an empty list")
    for teacher in teachers:
        if len(teachers) > 1 and teacher.source in (SELF, EXITS):
            raise ValueError(f"`teacher`: {teacher.source!r} cannot be one of several teachers")
    return teachers


def load_teacher(teacher: Teacher, student: nn.Module) -> nn.Module:
    """The network of a teacher, with its weights.

    Args:
        teacher: any but "self".
        student: whose architecture a file holds if the teacher has no `net`.

    Raises:
        FileNotFoundError: there is no such file.
        DistillationError: the file holds something else, or another network.
        ModuleNotFoundError: timm or torchvision is needed and not installed.
    """
    source = teacher.source
    if isinstance(source, nn.Module):
        return source
    library, _, name = str(source).partition("/")
    if library in ("timm", "torchvision") and name:
        from lightning_compress.zoo.external import published_model

        return published_model(library, name)
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"teacher: there is no file {path}; a teacher is a network, 'self', 'timm/NAME', 'torchvision/NAME', a "
            "checkpoint or a compressed artifact"
        )
    net = copy.deepcopy(teacher.net) if teacher.net is not None else _dense_copy(student)
    try:
        return load_compressed(path, net) if path.suffix == ".safetensors" else _load_checkpoint(path, net)
    except ValueError as error:
        hint = "" if teacher.net is not None else "; if it is of another architecture, give Teacher(path, net=...)"
        raise DistillationError(f"teacher {path}: {error}{hint}") from error


def _dense_copy(student: nn.Module) -> nn.Module:
    with without_observers(student):
        net = skeleton(student, lambda tensor: tensor.detach().cpu().clone())
    rewind_edits(net)
    return net


def _load_checkpoint(path: Path, net: nn.Module) -> nn.Module:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, LookupError, RuntimeError) as error:  # whatever damage leads to
        raise DistillationError(f"it holds something else than tensors, or is damaged: {error}") from error
    if not isinstance(loaded, Mapping):
        raise DistillationError(f"it holds a {type(loaded).__name__}, no state dict")
    record = loaded.get("lightning_compress")
    if record:
        apply_edits(net, edits_from_json(record["edits"]))
    state: Mapping[str, Any] = loaded.get("state_dict", loaded)
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    prefix = _prefix(state, expected)
    found = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    missing = [name for name in expected if name not in found]
    differing = [n for n in expected if n in found and tuple(found[n].shape) != expected[n]]
    if missing or differing:
        what = (
            f"{len(missing)} tensors are missing {missing[:3]}" if missing else _differences(differing, found, expected)
        )
        raise DistillationError(f"it is not of this {type(net).__name__}: {what}")
    net.load_state_dict({name: found[name] for name in expected})
    return net


def _prefix(state: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What the checkpoint's names have in front of the network's: the attribute that held it."""
    prefixes = {name.removesuffix(last) for last in expected for name in state if name.endswith(last)} | {""}
    return max(prefixes, key=lambda p: (sum(p + name in state for name in expected), -len(p)))


def _differences(names: Sequence[str], found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    shown = [f"{name} is {tuple(found[name].shape)} instead of {expected[name]}" for name in names[:3]]
    return "; ".join(shown)


class FrozenTeacher:
    """A teacher at work: in evaluation mode, without gradients, part of nobody's module tree.

    Args:
        network: the network; a copy is made only if precision, memory format or compilation change it.
        spec: how it runs.
        names: layers whose outputs are wanted; the empty name is the network's own output.

    Raises:
        DistillationError: a layer does not exist.
    """

    def __init__(self, network: nn.Module, spec: Teacher, names: Iterable[str]) -> None:
        self.spec = spec
        self._dtype = None if spec.precision is None else _DTYPES[spec.precision]
        if self._dtype is not None or spec.channels_last or spec.compile:
            network = copy.deepcopy(network)
        if self._dtype is not None:
            network.to(self._dtype)
        if spec.channels_last:
            network.to(memory_format=torch.channels_last)
        self.network = network
        self._modes = [(module, module.training) for module in network.modules()]
        first = next(iter(network.parameters()), None)
        self._home = torch.device("cpu") if first is None else first.device
        network.eval()
        compiled: Any = torch.compile(network) if spec.compile else network
        self._call: nn.Module = compiled
        self._taps = Taps(self._call, names, "teacher")

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The outputs wanted, by name, for a call of the student.

        Raises:
            DistillationError: the teacher does not take what the student gets, or gives a value that is not finite.
        """
        args, kwargs = pytree.tree_map_only(Tensor, self._convert, (args, dict(kwargs)))
        taps = self._taps
        taps.forget()
        taps.open = True
        try:
            with torch.no_grad(), self._precision(args):
                self._call(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise DistillationError(
                f"the teacher {self.spec.name} cannot be called with what the student gets, "
                f"{shown_inputs(args, kwargs)}: {error}; give a teacher that takes the same inputs"
            ) from error
        finally:
            taps.open = False
        outputs = {name: logits_of(value, "teacher", name) for name, value in taps.take().items()}
        for name, value in outputs.items():
            # One look per step: a teacher that gives NaN would have destroyed the student by the next one.
            if not torch.isfinite(value).all():
                what = f"layer {name!r}" if name else "output"
                raise DistillationError(
                    f"the teacher {self.spec.name} gives NaN or infinity at its {what}: are its weights whole, its "
                    "inputs scaled as it was trained with, and its precision wide enough?"
                )
        return outputs

    def to(self, device: torch.device) -> None:
        """Move to where the student trains."""
        self.network.to(device)

    def release(self) -> None:
        """Take the hooks off and leave the network in the mode and on the device that it came in."""
        self._taps.remove()
        self.network.to(self._home)
        for module, training in self._modes:
            module.training = training

    def _convert(self, tensor: Tensor) -> Tensor:
        if self._dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        if self.spec.channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def _precision(self, args: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
        if self._dtype is None:
            return contextlib.nullcontext()
        device = next((a.device.type for a in pytree.tree_leaves(args) if isinstance(a, Tensor)), "cpu")
        return torch.autocast(device, enabled=False)
