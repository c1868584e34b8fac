"""Random networks from a plain specification, so that what fails can be read and typed in again.

A specification is a tuple of steps, each a tuple `(kind, *arguments)`; `RandomNetwork(spec, seed)` builds it. A
counterexample prints as exactly that call.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks.base import classifier, randomize

Step = tuple[Any, ...]
Spec = tuple[Step, ...]

GROUPS = (1, 1, 2, 4)
WIDTHS = (8, 12, 16)  # multiples of every number of groups, so that any step may follow any other
ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "prelu": nn.PReLU}
NORMS = ("none", "batch", "batch", "batch")


class RandomNetwork(nn.Module):
    """A network built from a specification; its affine parameters and statistics are random.

    Args:
        spec: the steps, in order; every step takes and gives (batch, channels, 8, 8).
        seed: of the weights.
        head: end in a classifier, or in a 1x1 convolution.

    Example:
        >>> network = RandomNetwork((("conv", 8, 3, 1, True), ("residual", (("shuffle", 4), ("depthwise", 1)))))
        >>> network(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(self, spec: Spec, seed: int = 0, head: bool = True) -> None:
        super().__init__()
        self.spec, self.seed = spec, seed
        self.body = Steps(spec, 3)
        self.head = classifier(self.body.channels, 5) if head else nn.Conv2d(self.body.channels, 2, 1)
        randomize(self, seed)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def __repr__(self) -> str:
        return f"RandomNetwork({self.spec!r}, seed={self.seed}, head={not isinstance(self.head, nn.Conv2d)})"


class Steps(nn.Sequential):
    """A chain of steps that knows how many channels come out."""

    def __init__(self, spec: Spec, channels: int) -> None:
        super().__init__()
        for kind, *arguments in spec:
            step = STEPS[kind](channels, *arguments)
            channels = getattr(step, "channels", channels)
            self.append(step)
        self.channels = channels


class Conv(nn.Module):
    """A convolution, by layer or by function on a raw parameter, plain or transposed."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        groups: int,
        bias: bool,
        transposed: bool = False,
        raw: bool = False,
    ) -> None:
        super().__init__()
        self.channels = outputs
        groups = groups if inputs % groups == 0 else 1
        kind = nn.ConvTranspose2d if transposed else nn.Conv2d
        layer = kind(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)
        if raw:
            self.weight, self.bias = layer.weight, layer.bias
            self.arguments = {"padding": kernel // 2, "groups": groups}
            self.function = F.conv_transpose2d if transposed else F.conv2d
        else:
            self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "layer"):
            return self.layer(x)
        return self.function(x, self.weight, self.bias, **self.arguments)


class Depthwise(nn.Conv2d):
    """A depthwise convolution with a channel multiplier."""

    def __init__(self, inputs: int, multiplier: int) -> None:
        super().__init__(inputs, inputs * multiplier, 3, padding=1, groups=inputs)
        self.channels = inputs * multiplier


class Residual(nn.Module):
    """A branch added to its input; a 1x1 convolution or zero channels make them fit."""

    def __init__(self, inputs: int, branch: Spec, padded: bool = False) -> None:
        super().__init__()
        self.branch = Steps(branch, inputs)
        self.channels = self.branch.channels
        fits = self.channels == inputs or (padded and self.channels > inputs)
        self.project = nn.Identity() if fits else nn.Conv2d(inputs, self.channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.branch(x), self.project(x)
        return y + F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))


class Concatenate(nn.Module):
    """Several branches side by side, the input among them if asked for."""

    def __init__(self, inputs: int, branches: tuple[Spec, ...], dense: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Steps(branch, inputs) for branch in branches)
        self.dense = dense
        self.channels = sum(branch.channels for branch in self.branches) + dense * inputs

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.dense + [branch(x) for branch in self.branches], 1)


class Split(nn.Module):
    """The first part passes by, the second goes through a branch: by chunk, or at a fixed number of channels."""

    def __init__(self, inputs: int, branch: Spec, fixed: bool) -> None:
        super().__init__()
        self.first = inputs // 2 if inputs % 2 == 0 else inputs
        self.fixed = fixed
        self.branch = Steps(branch, inputs - self.first or inputs)
        self.channels = self.first + self.branch.channels

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2 and not self.fixed:
            return torch.cat((x, self.branch(x)), 1)
        if self.fixed:
            size = (self.first, x.shape[1] - self.first)
            a, b = x.split(size, 1) if size[1] else (x, x)
        else:
            a, b = x.chunk(2, 1)
        return torch.cat((a, self.branch(b)), 1)


class Shuffle(nn.Module):
    """Channels transposed between groups."""

    def __init__(self, inputs: int, groups: int) -> None:
        super().__init__()
        self.groups = groups if inputs % groups == 0 else 1

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class Tied(nn.Module):
    """Up with a filter bank, a nonlinearity, down with the same one transposed."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(F.relu(F.conv2d(x, self.weight, self.bias, padding=1)), self.weight, padding=1)


class Twice(nn.Module):
    """One square convolution called twice."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(inputs, inputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


class Excite(nn.Module):
    """Squeeze and excite, through linear layers."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Linear(inputs, width), nn.Linear(width, inputs)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3))))))
        return x * gate[:, :, None, None]


class DownUp(nn.Module):
    """Strided down, a branch, transposed up."""

    def __init__(self, inputs: int, width: int, branch: Spec) -> None:
        super().__init__()
        self.down = nn.Conv2d(inputs, width, 3, 2, 1)
        self.branch = Steps(branch, width)
        self.up = nn.ConvTranspose2d(self.branch.channels, inputs, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.branch(self.down(x)))


class Scale(nn.Module):
    """A parameter that multiplies the channels."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(inputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


STEPS: dict[str, Any] = {
    "conv": Conv,
    "depthwise": Depthwise,
    "residual": Residual,
    "concatenate": Concatenate,
    "split": Split,
    "shuffle": Shuffle,
    "tied": Tied,
    "twice": Twice,
    "excite": Excite,
    "downup": DownUp,
    "scale": Scale,
    "batch": lambda inputs: nn.BatchNorm2d(inputs),
    "activation": lambda inputs, name: ACTIVATIONS[name](),
    "pool": lambda inputs, kind: {"max": nn.MaxPool2d, "mean": nn.AvgPool2d}[kind](3, stride=1, padding=1),
}


def _leaf_steps() -> st.SearchStrategy[Spec]:
    def conv(draw: Any) -> Spec:
        step = ("conv", draw(st.sampled_from(WIDTHS)), draw(st.sampled_from((1, 3))), draw(st.sampled_from(GROUPS)))
        step += (draw(st.booleans()), draw(st.booleans()), draw(st.booleans()))
        norm = () if draw(st.sampled_from(NORMS)) == "none" else (("batch",),)
        return (step, *norm, ("activation", draw(st.sampled_from(sorted(ACTIVATIONS)))))

    single = st.one_of(
        st.tuples(st.just("depthwise"), st.sampled_from((1, 1, 2))),
        st.tuples(st.just("shuffle"), st.sampled_from((2, 4))),
        st.tuples(st.just("tied"), st.sampled_from(WIDTHS)),
        st.just(("twice",)),
        st.tuples(st.just("excite"), st.sampled_from((4, 6))),
        st.just(("scale",)),
        st.tuples(st.just("pool"), st.sampled_from(("max", "mean"))),
    )
    return st.one_of(st.composite(conv)(), single.map(lambda step: (step,)))


def _compound_steps(inner: st.SearchStrategy[Spec]) -> st.SearchStrategy[Spec]:
    branch = st.lists(inner, min_size=1, max_size=2).map(lambda parts: sum(parts, ()))
    compound = st.one_of(
        st.tuples(st.just("residual"), branch, st.booleans()),
        st.tuples(st.just("concatenate"), st.lists(branch, min_size=1, max_size=3).map(tuple), st.booleans()),
        st.tuples(st.just("split"), branch, st.booleans()),
        st.tuples(st.just("downup"), st.sampled_from(WIDTHS), branch),
    )
    return compound.map(lambda step: (step,))


def specs() -> st.SearchStrategy[Spec]:
    """Specifications of one to five steps, nested up to about three deep, with a plain convolution at the front."""
    parts = st.lists(st.recursive(_leaf_steps(), _compound_steps, max_leaves=6), min_size=1, max_size=4)
    stem = st.sampled_from(WIDTHS).map(lambda width: (("conv", width, 3, 1, True), ("batch",), ("activation", "relu")))
    return st.tuples(stem, parts).map(lambda drawn: drawn[0] + sum(drawn[1], ()))


@st.composite
def networks(draw: st.DrawFn) -> tuple[RandomNetwork, Tensor]:
    """A random network in eval mode and an input for it, (2, 3, 8, 8)."""
    seed = draw(st.integers(0, 9))
    model = RandomNetwork(draw(specs()), seed=seed, head=draw(st.booleans()))
    return model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
