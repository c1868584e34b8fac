"""Layers replaced one after another, each on the inputs that those before it really give.

The network is followed by a trial copy in which layers are replaced in the order that data reaches them. Each is fitted
so that, on the trial's inputs, it gives the original's outputs: errors made before it are mended where they can be,
instead of adding up. Nothing is trained, and the network itself is not touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_compress.calls import Call
from lightning_compress.edits import Replace, Spec, apply_edits, renew, skeleton
from lightning_compress.methods.approximation import Form, Init
from lightning_compress.methods.batchnorm import reestimate_batchnorm
from lightning_compress.methods.calibration import compare_outputs
from lightning_compress.methods.moments import Moments, Objective
from lightning_compress.methods.replaceable import Layer, Layers
from lightning_compress.quiet import without_observers
from lightning_compress.waiting import following
from lightning_compress.wording import require_choice

__all__ = ["Data", "Fit", "Init", "Planned", "fit", "replacement"]


@dataclass(frozen=True)
class Planned:
    """What a layer is to become."""

    layer: Layer
    form: Form
    rank: Any

    @property
    def spec(self) -> Spec:
        """What comes in its place."""
        return self.form.spec(self.layer.geometry, self.rank)


@dataclass(frozen=True)
class Data:
    """What a form may ask while a layer is fitted.

    Attributes:
        layer: the layer.
        model: the original network.
        trial: the copy in which the layers before it were replaced.
        layers: what is known of the network.
        calls: calibration data.
    """

    layer: Layer
    model: nn.Module
    trial: nn.Module
    layers: Layers
    calls: Sequence[Call]

    def objective(self, init: Init) -> Objective:
        """The least-squares problem of the layer's weight: of its outputs, or of itself where there is no data."""
        if init == "weights" or not self.layer.informed or not self.calls:
            return Objective.of_weight(self.layer.weight)
        moments = self.moments(Moments(self.layer.geometry))
        return moments.objective(self.layer.centred)

    def correct(self, offset: Tensor | None) -> Tensor | None:
        """The bias of what replaces the layer, [outputs].

        Args:
            offset: what is wanting to the mean outputs; None where that is not known. If the layer has no bias, the
                norm behind it takes it up.
        """
        if offset is None:
            return self.layer.bias
        if self.layer.geometry.bias:
            return offset
        if self.layer.norm is not None:
            mean = self.trial.get_submodule(self.layer.norm).running_mean
            assert isinstance(mean, Tensor)
            mean -= offset.to(mean.dtype)
        return None

    def moments(
        self, moments: Moments, inner: str = "", wanted: Callable[[Tensor], Tensor] = lambda outputs: outputs
    ) -> Moments:
        """Sum up the inputs of the layer in the trial, or of a layer inside of what replaced it, with wanted outputs.

        Args:
            moments: where to.
            inner: name of a layer inside of what stands in the layer's place in the trial.
            wanted: makes the wanted outputs from the original layer's.

        Raises:
            ValueError: values that are not finite; the message names the layer.
        """
        scale = self.layer.scale

        def see(x: Tensor, y: Tensor) -> None:
            if scale is not None:
                y = y * scale.to(y.dtype).view(-1, *[1] * len(self.layer.geometry.kernel))
            moments.add(x, wanted(y))

        compare_outputs(self.model, self.trial, self.layers, self.layer.path, self.calls, see, inner)
        unknowns = moments.geometry.matrix[2]
        if moments.count < unknowns:
            warnings.warn(
                f"{self.layer.path}: {moments.count} calibration samples for {unknowns} unknowns of each output; what "
                "they leave open stays near the trained weights. Give more samples.",
                stacklevel=2,
            )
        return moments


@dataclass(frozen=True)
class Fit:
    """Layers that are ready to take the place of others.

    Attributes:
        edit: what is replaced by what.
        errors: path -> output error that is left, relative to the energy of the outputs.
    """

    edit: Replace
    errors: Mapping[str, float]
    _trial: nn.Module
    _calls: Sequence[Call]

    def apply(self, model: nn.Module) -> None:
        """Set the weights of the new layers in a network that has been through `edit`, and re-estimate BatchNorm."""
        with torch.no_grad():
            for path in self.edit.layers:
                values = self._trial.get_submodule(path).state_dict()
                model.get_submodule(path).load_state_dict(values)
        if self._calls:
            reestimate_batchnorm(model, self._calls)


def replacement(planned: Sequence[Planned], origin: str) -> Replace:
    """The edit of a plan."""
    return Replace({item.layer.path: (item.layer.spec, item.spec) for item in planned}, origin)


def fit(
    model: nn.Module, layers: Layers, planned: Sequence[Planned], calls: Sequence[Call], init: Init, origin: str
) -> Fit:
    """Find the weights of what replaces some layers.

    Args:
        model: the network; it is not changed.
        layers: its layers.
        planned: what some of them are to become.
        calls: calibration data; without it BatchNorm is left as it is.
        init: where the weights come from.
        origin: of the edit.

    Raises:
        ValueError: `init="data"` without data, or data with values that are not finite.
    """
    require_choice("init", init, get_args(Init))
    if init == "data" and not calls:
        raise ValueError('`init="data"` needs calibration data; without, use init="weights"')
    with without_observers(model):
        trial = skeleton(model, lambda tensor: tensor)
    for module in trial.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean = module.running_mean.clone()  # corrected on the way, as is the variance
            module.running_var = None if module.running_var is None else module.running_var.clone()
    errors: dict[str, float] = {}
    place = {layer.path: number for number, layer in enumerate(layers.found)}
    in_order = sorted(planned, key=lambda item: place[item.layer.path])
    for item in following(in_order, "fitting layers"):
        path = item.layer.path
        apply_edits(trial, [replacement([item], origin)])
        module = trial.get_submodule(path)
        renew(module, torch.Tensor.clone)  # a bias that was carried over is still the network's own
        layer = replace(item.layer, scale=None)
        if init == "data" and item.layer.norm is not None and item.layer.scale is not None:
            layer = item.layer.scaled
            _scale_norm(trial.get_submodule(item.layer.norm), item.layer.scale)
        try:
            with torch.no_grad():
                errors[path] = item.form.fit(item.rank, module, Data(layer, model, trial, layers, calls), init)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from problem
    return Fit(replacement(planned, origin), errors, trial, calls)


def _scale_norm(norm: nn.Module, scale: Tensor) -> None:
    """Let a BatchNorm give what it gave, of inputs that are scaled."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = scale.to(norm.running_mean.dtype)
    norm.running_mean *= factor
    norm.running_var.copy_((norm.running_var + norm.eps) * factor.square() - norm.eps)
