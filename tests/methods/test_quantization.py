"""Grids: rounding and its gradients, steps from observers, integers there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.calls import as_calls
from lightning_compress.edits import apply_edits
from lightning_compress.grids import Grid, round_to
from lightning_compress.methods.observers import OBSERVERS, Seen, grid_for, steps_for
from lightning_compress.methods.placement import find_places
from lightning_compress.methods.quantization import calibrate, integers, plan, quantized_weights, settle
from lightning_compress.methods.targets import TARGETS
from lightning_compress.quantized import scope_of

GRIDS = (Grid.signed(2), Grid.signed(4), Grid.signed(7), Grid.signed(8), Grid.unsigned(4), Grid.unsigned(8))
every_observer = pytest.mark.parametrize("observer", OBSERVERS)
seeds = st.integers(0, 9999)
grids = st.sampled_from(GRIDS)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Grid]:
    """Values of any size beside a grid, with one step or one for each row, a zero point or none."""
    generator = torch.Generator().manual_seed(draw(seeds))
    grid, wide = draw(grids), draw(st.sampled_from([0.1, 1.0, 30.0]))
    x = torch.randn(4, 3, 5, generator=generator) * wide
    zero = torch.randint(grid.low, grid.high + 1, (), generator=generator).float() if grid.low == 0 else None
    step = torch.rand((4,) if zero is None and draw(st.booleans()) else (), generator=generator) * 0.3 + 0.01
    return x, step, zero, grid


def wide(step: Tensor, x: Tensor) -> Tensor:
    return step.view(-1, *[1] * (x.dim() - 1)) if step.dim() else step


def clear_of_ties(ratio: Tensor) -> Tensor:
    """Where single precision cannot tell two roundings apart there is nothing to compare."""
    return ((ratio - ratio.floor() - 0.5).abs() > 1e-3) & (ratio.abs() < 1e4)


class TestRounding:
    @given(problem=problems())
    @settings(max_examples=60)
    def test_on_the_grid_nearest_and_idempotent(self, problem: tuple[Tensor, Tensor, Tensor | None, Grid]) -> None:
        x, step, zero, grid = problem
        offset = 0.0 if zero is None else float(zero)
        rounded = round_to(x, step, zero, grid)
        whole = (rounded.double() / wide(step, x).double()) + offset
        assert torch.allclose(whole, whole.round(), atol=1e-3)
        assert grid.low <= whole.round().min()
        assert whole.round().max() <= grid.high
        points = torch.arange(grid.low, grid.high + 1).double() - offset
        distances = (x.double()[..., None] - points * wide(step, x).double()[..., None]).abs()
        assert torch.allclose((x.double() - rounded).abs(), distances.min(-1).values, atol=1e-5)
        assert torch.equal(round_to(rounded, step, zero, grid), rounded)
        assert torch.equal(round_to(torch.zeros(4), step.flatten()[0], zero, grid), torch.zeros(4))

    def test_halves_go_to_even_integers(self) -> None:
        halves = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
        assert round_to(halves, torch.tensor(1.0), None, Grid.signed(8)).tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]
        # The zero point is added to what was rounded, as ONNX has it.
        zero = torch.tensor(3.0)
        assert round_to(halves, torch.tensor(1.0), zero, Grid.unsigned(8)).tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0]

    @given(problem=problems())
    @settings(max_examples=60)
    def test_what_torch_computes(self, problem: tuple[Tensor, Tensor, Tensor | None, Grid]) -> None:
        x, step, zero, grid = problem
        offset = 0 if zero is None else int(zero)
        if step.dim():
            none = torch.zeros(len(step), dtype=torch.int32)
            theirs = torch.fake_quantize_per_channel_affine(x, step, none, 0, grid.low, grid.high)
        else:
            theirs = torch.fake_quantize_per_tensor_affine(x, float(step), offset, grid.low, grid.high)
        clear = clear_of_ties(x / wide(step, x))
        assert torch.allclose(round_to(x, step, zero, grid)[clear], theirs[clear], atol=1e-5)

    @pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_types_are_kept(self, kind: torch.dtype) -> None:
        x = torch.randn(50).to(kind)
        rounded = round_to(x, torch.tensor(0.25), None, Grid.signed(4))
        assert rounded.dtype == kind
        assert torch.equal(rounded.float(), round_to(x.float(), torch.tensor(0.25), None, Grid.signed(4)))


class TestGradients:
    """Beside autograd through what rounding stands for: a slope of one, flat where it is clipped."""

    @given(problem=problems(), rule=st.sampled_from(["lsq", "lsq+", "pact"]))
    @settings(max_examples=80)
    def test_of_values_steps_and_zero_points(
        self, problem: tuple[Tensor, Tensor, Tensor | None, Grid], rule: str
    ) -> None:
        x, step, zero, grid = problem
        ours = [x.clone().requires_grad_(), step.clone().requires_grad_()]
        our_zero = None if zero is None else zero.clone().requires_grad_()
        weighting = torch.randn_like(x)
        (round_to(ours[0], ours[1], our_zero, grid, rule) * weighting).sum().backward()

        theirs = [tensor.detach().double().requires_grad_() for tensor in (x, step)]
        their_zero = torch.tensor(0.0 if zero is None else float(zero), dtype=torch.float64, requires_grad=True)
        spread = wide(theirs[1], x)
        ratio = (x / wide(step, x)).double()
        low, high = grid.low - their_zero, grid.high - their_zero
        # Only what the straight-through estimator holds constant is constant: the error of rounding, in steps.
        inside = theirs[0] if rule == "pact" else theirs[0] + spread * (ratio.round() - ratio)
        y = torch.where(ratio.round() > high, high * spread, torch.where(ratio.round() < low, low * spread, inside))
        (y * weighting).sum().backward()

        assume(clear_of_ties(ratio).all())  # one value on the edge is in the sum of all
        for mine, reference in zip(ours, theirs, strict=True):
            assert mine.grad is not None
            assert reference.grad is not None
            scale = 1e-6 + float(weighting.abs().sum()) * grid.levels * 1e-6
            assert torch.allclose(mine.grad.double(), reference.grad, rtol=1e-3, atol=scale)
        if our_zero is not None:
            moved = our_zero.grad if our_zero.grad is not None else torch.zeros(())
            wanted = their_zero.grad if rule == "lsq+" else torch.zeros(())
            assert wanted is not None
            assert torch.allclose(moved.double(), wanted.double(), rtol=1e-3, atol=1e-4)

    def test_straight_through_inside_and_none_outside(self) -> None:
        x = torch.tensor([-9.0, -0.9, 0.2, 0.9, 9.0], requires_grad=True)
        step = torch.tensor(0.5, requires_grad=True)
        round_to(x, step, None, Grid.signed(3)).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
        # -3 and 3 of what is clipped; -2 + 1.8, 0 - 0.4 and 2 - 1.8 of what is rounded.
        assert step.grad is not None
        assert float(step.grad) == pytest.approx(-0.4, abs=1e-6)

    def test_nothing_is_kept_where_nothing_is_trained(self) -> None:
        x = torch.randn(5)
        assert not round_to(x, torch.tensor(0.5), None, Grid.signed(3)).requires_grad
        with torch.no_grad():
            step = torch.tensor(0.5, requires_grad=True)
            assert not round_to(x.requires_grad_(), step, None, Grid.signed(3)).requires_grad


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    """Values as they come up: both signs, one, with outliers, constant, nothing."""
    generator, size = torch.Generator().manual_seed(draw(seeds)), draw(st.sampled_from([1e-3, 1.0, 1e3]))
    x = torch.randn(3000, generator=generator) * size
    kind = draw(st.sampled_from(["normal", "relu", "negative", "outliers", "constant", "zero", "away"]))
    if kind == "outliers":
        x[:3] *= 100
    forms = {"relu": x.relu(), "negative": -x.abs(), "constant": torch.full_like(x, float(x[0])), "zero": 0 * x}
    return {**forms, "away": x.abs() + 5 * x.std()}.get(kind, x)


def seen(*values: Tensor) -> Seen:
    found = Seen()
    for value in values:
        found.add(value)
    return found


def on(x: Tensor, found: tuple[float, float], grid: Grid) -> Tensor:
    return round_to(x, torch.tensor(found[0]), torch.tensor(found[1]), grid)


class TestObservers:
    @every_observer
    @given(x=activations(), grid=st.sampled_from([Grid.signed(8), Grid.unsigned(8), Grid.signed(4), Grid.unsigned(4)]))
    @settings(max_examples=30)
    def test_grids_hold_zero_and_no_more_than_the_range(self, observer: str, x: Tensor, grid: Grid) -> None:
        step, zero = grid_for(seen(x), grid, observer)
        assert step > 0
        assert zero == round(zero)
        assert grid.low <= zero <= grid.high
        assert on(torch.zeros(1), (step, zero), grid) == 0
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        if high > low:
            bound = max(-low, high) if grid.low < 0 else high - low
            assert step * (grid.high if grid.low < 0 else grid.levels - 1) <= bound * (1 + 1e-5)
        if grid.low < 0:
            assert zero == 0.0

    @given(x=activations(), grid=st.sampled_from([Grid.signed(8), Grid.unsigned(8), Grid.unsigned(4)]))
    @settings(max_examples=40)
    def test_minmax_clips_nothing_and_mse_is_never_worse(self, x: Tensor, grid: Grid) -> None:
        found = grid_for(seen(x), grid, "minmax")
        assert (on(x, found, grid) - x).abs().max() <= found[0] * (1 + 1e-3)
        sample = seen(x).values
        other = grid_for(seen(x), grid, "mse")
        limit = (on(sample, found, grid) - sample).square().mean()
        assert (on(sample, other, grid) - sample).square().mean() <= limit * (1 + 1e-4) + 1e-20

    @every_observer
    @pytest.mark.parametrize("value", [3.0, -3.0, 0.0, 1e-6])
    @pytest.mark.parametrize("grid", [Grid.signed(8), Grid.unsigned(8), Grid.unsigned(4)])
    def test_a_constant_is_hit(self, value: float, grid: Grid, observer: str) -> None:
        found = grid_for(seen(torch.full((100,), value)), grid, observer)
        assert float(on(torch.tensor([value]), found, grid)) == pytest.approx(value, rel=0.02)

    @every_observer
    def test_outliers_are_left_out_by_all_but_minmax(self, observer: str) -> None:
        x = torch.randn(60_000)
        x[0] = 40.0
        step, _ = grid_for(seen(x), Grid.signed(4), observer)
        assert (step * 7 > 20) == (observer == "minmax")

    @every_observer
    def test_a_ceiling_is_not_exceeded(self, observer: str) -> None:
        """And is reached as before where values stay below it."""
        for x, top in ((torch.linspace(-8, 8, 999), 6.0), (torch.rand(999), None)):
            step, zero = grid_for(seen(x.clamp_min(0)), Grid.unsigned(8), observer, 6.0)
            assert step * (255 - zero) <= 6.0 + 1e-5
            assert top is not None or (step, zero) == grid_for(seen(x), Grid.unsigned(8), observer)

    def test_the_range_is_that_of_all_calls_and_of_every_value(self) -> None:
        """However few of many values are kept."""
        large = torch.zeros(300_001)
        large[123_457] = 7.0
        found = seen(torch.tensor([-2.0, 1.0]), large)
        assert (found.low, found.high) == (-2.0, 7.0)
        assert grid_for(found, Grid.unsigned(8), "minmax")[0] == pytest.approx(9 / 255)
        assert len(found.values) < 200_000

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_values_that_are_not_finite_are_named(self, bad: float) -> None:
        class Spoils(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.where(x > 0, x, bad).relu()

        net = nn.Sequential(nn.Linear(3, 4), Spoils(), nn.Linear(4, 2))
        calls = as_calls(torch.randn(8, 3))
        placement = find_places(net, calls)
        bits = dict.fromkeys(placement.weights, 8)
        apply_edits(net, [plan(placement, bits, 8, "vnni", ends=False, origin="")])
        with pytest.raises(ValueError, match=r"relu_0: calibration data gives values that are not finite"):
            calibrate(net, placement, calls)


class TestWeights:
    @given(seed=seeds, grid=st.sampled_from([Grid.signed(bits) for bits in (2, 3, 4, 7, 8)]))
    @settings(max_examples=30)
    def test_steps_of_least_error_for_each_output(self, seed: int, grid: Grid) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(6, 4, 3, generator=generator) * torch.rand(6, 1, 1, generator=generator)
        weight[2] = 0
        full, best = (steps_for(weight, grid, observer) for observer in ("minmax", "mse"))
        errors = [(round_to(weight, step, None, grid) - weight).square().flatten(1).sum(1) for step in (best, full)]
        assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-12).all()
        others = [0, 1, 3, 4, 5]
        assert torch.allclose((full * grid.high)[others], weight.flatten(1).abs().amax(1)[others])
        for step in (full, best):
            assert step[2] == step.max()  # as good as any; the others' so that it is of a size with them
            assert (step > 0).all()

    @pytest.mark.parametrize("observer", ["minmax", "mse"])
    def test_a_weight_of_zeros_has_a_step_that_it_can_be_trained_with(self, observer: str) -> None:
        assert torch.equal(steps_for(torch.zeros(3, 4), Grid.signed(8), observer), torch.ones(3))

    @given(seed=seeds, grid=st.sampled_from([Grid.signed(bits) for bits in (2, 3, 4, 7, 8)]))
    @settings(max_examples=30)
    def test_integers_there_and_back(self, seed: int, grid: Grid) -> None:
        weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        step = steps_for(weight, grid, "mse")
        whole = integers(weight, step, grid)
        assert whole.dtype == torch.int8
        rounded = round_to(weight, step, None, grid)
        assert torch.equal(whole * wide(step, weight), rounded)
        assert torch.equal(integers(rounded, step, grid), whole)

    def test_settling_changes_no_output(self) -> None:
        net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(32, 6)
        placement = find_places(net, as_calls(x))
        apply_edits(net, [plan(placement, dict.fromkeys(placement.weights, 4), 8, "vnni", ends=True, origin="")])
        calibrate(net, placement, as_calls(x))
        scope = scope_of(net)
        assert scope is not None
        assert scope.values
        net.get_buffer("relu_0_zero").fill_(1.3)  # as training leaves it
        before = net(x)
        settle(net)
        assert torch.equal(net(x), before)
        assert net.get_buffer("relu_0_zero") == 1.0
        for _, weight, step, grid in quantized_weights(net):
            assert torch.equal(round_to(weight, step, None, grid), weight)


def test_targets() -> None:
    """Sums of products of 8-bit values and 7-bit weights stay within 16 bits; of 8-bit weights they need not."""
    for name, target in TARGETS.items():
        weights, values = target.weights(8), target.values(8)
        assert weights.low == -weights.high
        pair = 2 * max(-values.low, values.high) * weights.high
        assert (pair < 2**15) == (name in ("avx2", "gpu"))
        assert (values.low == 0) == target.unsigned
        assert target.weights(2) == Grid.signed(2)
