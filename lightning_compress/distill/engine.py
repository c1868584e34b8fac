"""The engine of distillation: runs the teacher on what the student is called with, and adds up the losses.

It knows nothing of Lightning. A callback, or a LightningModule, opens it around a training step; it notices the
student's forward pass by hooks, runs the teachers on the same input, and afterwards gives the terms by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.distill.taps import DistillationError, Taps, logits_of
from lightning_compress.distill.terms import Term
from lightning_compress.quiet import undisturbed

__all__ = ["DistillationError", "Engine", "TeacherCall"]

TeacherCall = Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Tensor]]


class Engine:
    """Terms between one student and its teachers.

    Args:
        student: the module that is called in a training step; a `torch.compile`d one by its wrapper.
        terms: the terms by name.
        teachers: what to call on the student's input, with weights that count among themselves; more may come later.
        who: how messages call the student.
        own: the student's own layers teach: `teachers` stays empty.

    Raises:
        DistillationError: a layer does not exist.

    Attributes:
        projectors: layers that bring a feature loss's sides into one shape, by `<term>/<teacher>/<pair>`, or
            `<term>/<teacher>` for losses that take all pairs at once.
    """

    def __init__(
        self,
        student: nn.Module,
        terms: Mapping[str, Term],
        teachers: Sequence[tuple[float, TeacherCall]],
        who: str = "student",
        own: bool = False,
    ) -> None:
        self.student, self.terms, self.teachers, self.who = student, dict(terms), list(teachers), who
        self.own = own
        self.projectors = nn.ModuleDict()
        self._shapes: dict[str, tuple[Any, Any]] = {}
        self._open = self._several = False
        self._lessons: list[dict[str, Tensor]] = []
        self._forwards = self._used = 0
        self.samples = 1  # in the last batch
        self._taps = Taps(student, _student_names(terms, own), "student")
        self._handle = student.register_forward_pre_hook(self._on_forward, with_kwargs=True, prepend=True)

    @contextmanager
    def listening(self, several: bool = False) -> Iterator[None]:
        """Notice the student's forward pass inside the block.

        Args:
            several: the block may hold several, one after each use of `losses` (manual optimization).

        Raises:
            DistillationError: the student ran twice, or not at all.
        """
        self._forget()
        self._used = 0
        self._open = self._taps.open = True
        self._several = several
        try:
            yield
            if self._forwards or not self._used:
                self._refuse()
        finally:
            self._open = self._taps.open = False
            self._forget()

    @property
    def teaching(self) -> bool:
        """Whether anybody teaches."""
        return self.own or bool(self.teachers)

    @property
    def _weights(self) -> list[float]:
        return [1.0] if self.own else [weight for weight, _ in self.teachers]

    @property
    def pending(self) -> bool:
        """Whether the student has run and its losses have not been taken."""
        return self._forwards > 0

    def skip(self) -> None:
        """Forget the forward pass: the step gave no loss."""
        self._forget()
        self._used += 1

    def losses(self, target: Tensor | None = None) -> dict[str, Tensor]:
        """The terms of the last forward pass, weighted, by name.

        Args:
            target: labels [N], for the losses that need them.

        Raises:
            DistillationError: the student did not run, or a layer inside it did not.
        """
        if not self._forwards:
            self._refuse()
        student = {name: logits_of(value, "student", name) for name, value in self._taps.take().items()}
        lessons = self._taught(student)
        self._forget()
        self._used += 1
        return {
            name: term.weight * self._term(name, term, student, lessons, target) for name, term in self.terms.items()
        }

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run both sides once on a small batch: make the projectors and refuse shapes that do not go together.

        Existing projectors stay. Nothing of the student changes: neither buffers nor random state.

        Raises:
            DistillationError: shapes that nothing can join.
        """
        inner = getattr(self.student, "_orig_mod", self.student)
        with undisturbed(inner), torch.compiler.set_stance("force_eager"), self.listening():
            self.student(*args, **kwargs)
            student = {name: logits_of(value, "student", name) for name, value in self._taps.take().items()}
            lessons = self._taught(student)
            self.skip()
        shapes = {
            key: (_shapes(ours), _shapes(theirs))
            for name, term in self.terms.items()
            for index, lesson in enumerate(lessons)
            for key, ours, theirs in _sides(name, term, index, student, lesson)
        }
        first = next(iter(student.values()))
        for key in [key for key in self.projectors if not _alike(shapes.get(key), self._shapes.get(key))]:
            del self.projectors[key], self._shapes[key]
        for key, (ours, theirs) in shapes.items():
            if key not in self.projectors:
                self._build(key, ours, theirs, first.device, _weights_dtype(inner, first))
        self.projectors.eval()  # the trial below must not move their running statistics
        self._try(student, lessons)
        self.projectors.train()

    def records(self) -> dict[str, Any]:
        """The projectors as plain data: what they were made for, and their weights."""
        return {
            key: {
                "student": _plain(self._shapes[key][0]),
                "teacher": _plain(self._shapes[key][1]),
                "state": p.state_dict(),
            }
            for key, p in self.projectors.items()
        }

    def restore(self, records: Mapping[str, Any], device: torch.device) -> None:
        """The inverse of `records`; projectors of terms that there are no more are left out."""
        for key, record in records.items():
            if key.partition("/")[0] in self.terms:
                dtype = next((v.dtype for v in record["state"].values() if v.is_floating_point()), torch.float32)
                self._build(key, _sizes(record["student"]), _sizes(record["teacher"]), device, dtype)
                self.projectors[key].load_state_dict(record["state"])

    def _build(self, key: str, student: Any, teacher: Any, device: torch.device, dtype: torch.dtype) -> None:
        name = key.partition("/")[0]
        build = getattr(self.terms[name].loss, "projector", None)
        try:
            projector = None if build is None else build(student, teacher)
        except ValueError as error:
            raise DistillationError(f"losses.{name} between {_layers(self.terms[name])}: {error}") from error
        if projector is not None:
            self.projectors[key] = projector.to(device, dtype)
            self._shapes[key] = (student, teacher)

    def remove(self) -> None:
        """Take all hooks off the student."""
        self._handle.remove()
        self._taps.remove()

    def _try(self, student: Mapping[str, Tensor], lessons: Sequence[Mapping[str, Tensor]]) -> None:
        """Evaluate each loss that needs no labels: class counts and shapes that do not fit are heard of."""
        for name, term in self.terms.items():
            for pair in term.pairs:
                for lesson in lessons:
                    ours, theirs = student[pair[0]], lesson[pair[1]]
                    if pair == ("", "") and ours.shape != theirs.shape:
                        raise DistillationError(
                            f"the student's output is {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)} (batch "
                            f"first): losses.{name} compares outputs, so both need the same classes"
                        )
            if term.needs_target:
                continue
            try:
                with torch.no_grad():
                    self._term(name, term, student, lessons, None)
            except (ValueError, RuntimeError, IndexError, TypeError) as error:  # whatever misfit shapes lead to
                raise DistillationError(f"losses.{name} between {_layers(term)}: {error}") from error

    def _term(
        self,
        name: str,
        term: Term,
        student: Mapping[str, Tensor],
        lessons: Sequence[Mapping[str, Tensor]],
        target: Tensor | None,
    ) -> Tensor:
        total: Tensor | None = None
        for index, (weight, lesson) in enumerate(zip(self._weights, lessons, strict=True)):
            for key, ours, theirs in _sides(name, term, index, student, lesson):
                if key in self.projectors:
                    ours, theirs = self.projectors[key](ours, theirs)
                value = term.loss(ours, theirs, target)
                value = value if weight == 1 else weight * value
                total = value if total is None else total + value
        assert total is not None
        return total

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
    def _on_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._open:
            return
        self._forwards += 1
        if self._forwards > 1:
            self._refuse()
        # Before the student runs: it may work on its input in place, and the teacher's passing memory is gone by then.
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [tensor._version for tensor in tensors]
        self._lessons = [teach(args, kwargs) for _, teach in self.teachers]
        if [tensor._version for tensor in tensors] != versions:
            raise DistillationError(
                "the teacher writes into its input, which is the student's too: is its first layer an in-place one?"
            )
        self.samples = next((len(tensor) for tensor in tensors if tensor.dim()), 1)

    def _taught(self, student: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        return [{name: value.detach() for name, value in student.items()}] if self.own else self._lessons

    def _refuse(self) -> None:
        several = "between two calls of manual_backward" if self._several else "in one training step"
        if self._forwards > 1:
            raise DistillationError(
                f"the {self.who} ran twice {several}: which of its outputs the teacher's belong to is not clear. Call "
                "it once, on one batch, or name the part that is called once with `student`"
            )
        if self._forwards:
            raise DistillationError(f"the {self.who} ran, and its loss was never passed to `manual_backward`")
        raise DistillationError(
            f"the {self.who} was not called {several}: name the module that is called with `student`"
        )

    def _forget(self) -> None:
        self._forwards, self._lessons = 0, []
        self._taps.forget()


Side = Tensor | list[Tensor]


def _sides(
    name: str, term: Term, teacher: int, student: Mapping[str, Tensor], lesson: Mapping[str, Tensor]
) -> Iterator[tuple[str, Any, Any]]:
    """What a term's loss is called with, each with the name of its projector."""
    if term.joint:
        yield f"{name}/{teacher}", [student[a] for a, _ in term.pairs], [lesson[b] for _, b in term.pairs]
        return
    for index, (a, b) in enumerate(term.pairs):
        yield f"{name}/{teacher}/{index}", student[a], lesson[b]


def _student_names(terms: Mapping[str, Term], own: bool) -> list[str]:
    pairs = [pair for term in terms.values() for pair in term.pairs]
    return ["", *(name for name, _ in pairs), *(name for _, name in pairs if own)]


def _shapes(side: Side) -> Any:
    return [value.shape for value in side] if isinstance(side, list) else side.shape


def _layers(term: Term) -> str:
    return " and ".join(f"student {a or 'output'!r} / teacher {b or 'output'!r}" for a, b in term.pairs)


def _alike(a: tuple[Any, Any] | None, b: tuple[Any, Any] | None) -> bool:
    """Whether shapes agree in all but the batch."""
    return a is not None and b is not None and [s[1:] for s in _flat(a)] == [s[1:] for s in _flat(b)]


def _flat(shapes: tuple[Any, Any]) -> list[torch.Size]:
    return [size for side in shapes for size in (side if isinstance(side, list) else [side])]


def _plain(shape: Any) -> Any:
    return [list(size) for size in shape] if isinstance(shape, list) else list(shape)


def _sizes(shape: Any) -> Any:
    return [torch.Size(size) for size in shape] if isinstance(shape[0], list) else torch.Size(shape)


def _weights_dtype(student: nn.Module, example: Tensor) -> torch.dtype:
    """What the student's weights are kept in: under autocast its features are narrower than that."""
    return next((p.dtype for p in student.parameters() if p.is_floating_point()), example.dtype)
