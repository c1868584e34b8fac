"""Feed-back and bi-directional networks: what their layers promise, how they train, and that ties hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_compress import (
    Budget,
    ChannelPruning,
    CompactFilters,
    LowRankFactorization,
    Quantization,
    WeightPruning,
    WeightSharing,
    load_compressed,
    prune_channels,
    save_compressed,
)
from lightning_compress.edits import history
from lightning_compress.layers import Chain
from lightning_compress.zoo import (
    ContrastiveDivergence,
    ConvolutionalDBN,
    DeconvolutionalNetwork,
    Digits,
    HierarchicalSparseCoding,
    ImageClassifier,
    ImageReconstruction,
    StackedConvAutoencoder,
    VGGSmall,
)
from lightning_compress.zoo.bidirectional import ConvolutionalRBM
from lightning_compress.zoo.feedback import SparseCoding
from lightning_compress.zoo.representations import Representation
from lightning_compress.zoo.unsupervised import PSNR

NETWORKS: list[Callable[..., nn.Module]] = [
    DeconvolutionalNetwork,
    HierarchicalSparseCoding,
    StackedConvAutoencoder,
    ConvolutionalDBN,
]
SMALL: dict[str, Callable[[], nn.Module]] = {
    "deconvolutional": lambda: DeconvolutionalNetwork(1, 10, 8, codes=(8, 12), iterations=3),
    "autoencoder": lambda: StackedConvAutoencoder(1, 10, 8, codes=(8, 12)),
    "dbn": lambda: ConvolutionalDBN(1, 10, 8, codes=(8, 12)),
}


def task(net: nn.Module, **settings: Any) -> L.LightningModule:
    if isinstance(net, ConvolutionalDBN):
        return ContrastiveDivergence(net, 10, **settings)
    return ImageReconstruction(net, 10, **settings)


def fit(module: L.LightningModule, *callbacks: L.Callback, epochs: int = 3, **settings: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, callbacks=list(callbacks), enable_checkpointing=saves, **quiet
    )
    trainer.fit(module, Digits(limit_train=256), **settings)
    return trainer


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("network", NETWORKS)
def test_shapes_and_gradients(network: Callable[..., nn.Module], size: int) -> None:
    torch.manual_seed(0)
    net, x = network(2, 7, size), torch.randn(4, 2, size, size)
    found = net(x)
    assert isinstance(found, Representation)
    assert found.logits.shape == (4, 7)
    assert found.reconstruction.shape == x.shape
    assert found.losses.shape[0] == found.active.shape[0] == 4
    (found.losses.sum() + found.logits.logsumexp(1).sum() + found.reconstruction.square().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ("net", "count"),
    [
        # filters, thresholds, steps, classifier
        (DeconvolutionalNetwork(1, 10, 28), 24 * 9 + 48 * 24 * 9 + 24 + 48 + 2 * 4 + (48 * 49 + 1) * 10),
        (HierarchicalSparseCoding(1, 10, 28), 128 * 36 + 128 * 32 + 4 + (160 + 1) * 10),
        # filters once for both directions, a bias for each
        (StackedConvAutoencoder(1, 10, 28), 32 * 9 + 64 * 32 * 9 + 32 + 64 + 1 + 32 + (64 * 49 + 1) * 10),
        (ConvolutionalDBN(1, 10, 28), 32 * 9 + 64 * 32 * 9 + 32 + 64 + 1 + 32 + (64 * 49 + 1) * 10),
    ],
)
def test_parameter_counts(net: nn.Module, count: int) -> None:
    """Filters count once."""
    assert sum(p.numel() for p in net.parameters()) == count


@pytest.mark.parametrize("network", NETWORKS)
def test_the_probe_reads_and_shapes_nothing(network: Callable[..., nn.Module]) -> None:
    for probe in (True, False):
        torch.manual_seed(0)
        net = network(1, 10, 8, probe=probe)
        net(torch.randn(4, 1, 8, 8)).logits.logsumexp(1).sum().backward()
        touched = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert touched >= {"probe.classifier.weight", "probe.classifier.bias"}
        assert (len(touched) == 2) == probe


@pytest.mark.parametrize("network", [DeconvolutionalNetwork, StackedConvAutoencoder])
def test_greedy_layers_learn_from_their_own_loss_alone(network: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    net = network(1, 10, 8, greedy=True)
    found = net(torch.randn(4, 1, 8, 8))
    found.losses[:, 1].sum().backward()
    first = net.get_submodule("layers.0.filters").weight
    assert first.grad is None or not first.grad.any()
    assert net.get_submodule("layers.1.filters").weight.grad.any()
    assert not found.reconstruction.requires_grad


@pytest.mark.parametrize("build", [*SMALL.values(), lambda: HierarchicalSparseCoding(1, 10, 8, patch=4)])
def test_training_makes_reconstruction_and_classification_better(build: Callable[[], nn.Module]) -> None:
    L.seed_everything(0, verbose=False)
    module = task(build(), lr=0.02)
    before = fit(module, epochs=0).validate(module, Digits(limit_train=256), verbose=False)[0]
    after = fit(module, epochs=40).validate(module, Digits(limit_train=256), verbose=False)[0]
    assert after["val/mse"] < 0.9 * before["val/mse"]
    assert after["val/psnr"] > before["val/psnr"]
    assert after["val/acc"] > before["val/acc"] + 0.1
    assert set(after) == {"val/loss", "val/acc", "val/mse", "val/psnr", "val/active"}


def loss(layer: SparseCoding, x: Tensor, code: Tensor) -> float:
    with torch.no_grad():
        return float(layer.loss(x, code, layer.predict(code)).sum())


class TestSparseCoding:
    def test_each_step_of_inference_lowers_the_objective(self) -> None:
        """With the step sizes that it starts from, which are 1 over the largest eigenvalue."""
        torch.manual_seed(0)
        x = torch.randn(4, 2, 12, 12)
        layer = SparseCoding(2, 16, iterations=12, accelerated=False)
        losses = []
        for steps in range(1, 13):
            shorter = SparseCoding(2, 16, iterations=steps, accelerated=False)
            state = {**layer.state_dict(), "log_step": layer.log_step[:steps]}
            shorter.load_state_dict(state)
            losses.append(loss(shorter, x, shorter(x)))
        assert all(later <= earlier + 1e-5 for earlier, later in itertools.pairwise(losses))
        assert losses[-1] < loss(layer, x, torch.zeros(4, 16, 12, 12))

    def test_acceleration_gets_further(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(4, 1, 12, 12)
        slow = SparseCoding(1, 16, iterations=20, accelerated=False)
        fast = SparseCoding(1, 16, iterations=20)
        fast.load_state_dict(slow.state_dict())
        assert loss(fast, x, fast(x)) < loss(slow, x, slow(x))

    def test_codes_are_sparse_and_not_negative(self) -> None:
        torch.manual_seed(0)
        codes = [SparseCoding(1, 16, penalty=penalty)(torch.randn(4, 1, 12, 12)) for penalty in (0.0, 0.5)]
        assert all((code >= 0).all() for code in codes)
        assert codes[1].count_nonzero() < 0.7 * codes[0].count_nonzero()


class TestRestrictedBoltzmannMachine:
    def machine(self, gaussian: bool) -> ConvolutionalRBM:
        torch.manual_seed(0)
        machine = ConvolutionalRBM(1, 2, gaussian=gaussian).double()
        nn.init.normal_(machine.filters.weight)
        nn.init.normal_(machine.hidden_bias)
        nn.init.normal_(machine.visible_bias)
        return machine

    @pytest.mark.parametrize("gaussian", [True, False])
    def test_free_energy_sums_over_all_states_of_the_hidden_units(self, gaussian: bool) -> None:
        """By hand, over the 5 x 5 states of two channels with one block each."""
        machine = self.machine(gaussian)
        v = torch.rand(1, 1, 2, 2, dtype=torch.float64)
        total, on = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 2, 2, 2, dtype=torch.float64)
        drive = machine.drive(v)
        assert torch.equal(drive, machine.filters(v) + machine.hidden_bias)
        for states in itertools.product(range(5), repeat=2):
            h = torch.zeros(1, 2, 4, dtype=torch.float64)
            for channel, state in enumerate(states):
                if state < 4:
                    h[0, channel, state] = 1
            h = h.view(1, 2, 2, 2)
            weight = (h * drive).sum().exp()
            total += weight
            on += weight * h
        own = 0.5 * (v - machine.visible_bias).square().sum() if gaussian else -(v * machine.visible_bias).sum()
        assert torch.allclose(machine.free_energy(v, drive), own - total.log())
        assert torch.allclose(machine.hidden(drive), on / total)
        assert torch.allclose(machine(v), machine.hidden(drive).sum((2, 3), keepdim=True))
        assert torch.allclose(machine.shares(drive).sum((2, 3)), torch.ones(1, 2, dtype=torch.float64))

    def test_samples_follow_the_probabilities(self) -> None:
        machine = self.machine(True)
        v = torch.rand(1, 1, 4, 4, dtype=torch.float64)
        drive = machine.drive(v).expand(20000, -1, -1, -1)
        sample = machine._sample(drive)
        assert ((sample == 0) | (sample == 1)).all()
        assert nn.functional.avg_pool2d(sample, 2).max() <= 0.25
        assert torch.allclose(sample.mean(0, keepdim=True), machine.hidden(machine.drive(v)), atol=0.02)

    def test_the_gradient_is_that_of_contrastive_divergence(self) -> None:
        """Correlations under the data, minus those under what is made of them; here by their definition."""
        machine = ConvolutionalRBM(1, 3, sampling=False, sparsity=0.5).double()
        v = torch.randn(1, 1, 6, 6, dtype=torch.float64)
        [gradient] = torch.autograd.grad(36 * machine.loss(v, machine.drive(v)).sum(), machine.filters.weight)
        drive = machine.drive(v)
        activity = machine.hidden(drive).mean((2, 3)) - machine.sparsity
        [sparse] = torch.autograd.grad(36 * activity.square().sum(), machine.filters.weight)
        gradient = gradient - sparse  # per pixel, and without what makes units sparse
        fantasy = machine.visible(machine.hidden(drive)).detach()
        for channel, i, j in itertools.product(range(3), range(3), range(3)):
            expected = 0.0
            for sign, visible in ((-1.0, v), (1.0, fantasy)):
                shifted = nn.functional.pad(visible, (1, 1, 1, 1))[..., i : i + 6, j : j + 6]
                expected += sign * float((machine.hidden(machine.drive(visible))[:, channel] * shifted[:, 0]).sum())
            assert float(gradient[channel, 0, i, j]) == pytest.approx(expected)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_contrastive_divergence_lowers_error_and_gap(self, sign: float) -> None:
        """On digits; with the update's sign flipped neither falls."""
        L.seed_everything(0, verbose=False)
        data = Digits(batch_size=256)
        data.setup("fit")
        images = next(iter(data.train_dataloader()))[0]
        machine = ConvolutionalRBM(1, 16)
        optimizer = torch.optim.SGD(machine.parameters(), 0.05, momentum=0.9)

        def error() -> float:
            return float((machine.visible(machine.hidden(machine.drive(images))) - images).square().mean())

        def gap() -> float:
            machine.eval()
            found = float(machine.loss(images, machine.drive(images)).mean().abs())
            machine.train()
            return found

        with torch.no_grad():
            first = error(), gap()
        for _ in range(60):
            optimizer.zero_grad()
            (sign * machine.loss(images, machine.drive(images)).mean()).backward()
            optimizer.step()
        with torch.no_grad():
            last = error(), gap()
        assert (last[0] < 0.9 * first[0]) == (sign > 0)
        assert (last[1] < first[1]) == (sign > 0)


METHODS: dict[str, Callable[[], L.Callback]] = {
    "channel_pruning": lambda: ChannelPruning(Budget(macs=0.6), start=1, end=1, steps=1, samples=32),
    "weight_pruning": lambda: WeightPruning(0.8, start=1, end=1, steps=1),
    "weight_sharing": lambda: WeightSharing(3, start=1),
    "quantization": lambda: Quantization(start=1, samples=32),
    "low_rank": lambda: LowRankFactorization(Budget(macs=0.7), round_to=1, start=1, end=1, samples=32),
    "compact": lambda: CompactFilters("depthwise_separable", start=1, end=1, samples=32),
}


def tied_weights(net: nn.Module) -> dict[str, int]:
    """Name -> place in memory, of everything that the filters are made of."""
    return {name: p.data_ptr() for name, p in net.named_parameters() if ".filters." in name}


def assert_tied(net: nn.Module, x: Tensor) -> None:
    """One set of filters; the way down is the transpose of the way up."""
    for layer in net.layers:  # type: ignore[union-attr]
        filters = layer.filters
        below = torch.randn(2, _inputs(filters), 8, 8)
        if "weight_step" in filters._buffers:  # what it gives upward is rounded, downward only its weights are
            code = torch.zeros(1, filters.out_channels, 8, 8)
            code[0, 0, 4, 4] = 1
            weight = filters(code, transposed=True)[0, :, 3:6, 3:6] / filters.weight_step[0]
            assert torch.allclose(weight, weight.round(), atol=1e-4)
            assert weight.abs().max() <= 128
            continue
        up = filters(below)
        z = torch.randn_like(up)
        assert torch.allclose((up * z).sum(), (below * filters(z, transposed=True)).sum(), rtol=1e-3, atol=1e-3)
    weights = tied_weights(net)
    assert len(set(weights.values())) == len(weights)
    assert not any("decode" in name or "transposed" in name for name, _ in net.named_parameters())
    assert all(torch.isfinite(leaf).all() for leaf in net(x))


def _inputs(filters: nn.Module) -> int:
    first: Any = filters[0] if isinstance(filters, Chain) else filters
    return int(first.in_channels)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SMALL)
def test_filters_stay_tied(name: str, method: str, tmp_path: Path) -> None:
    """After the edit, when saved and loaded, when resumed and when exported."""
    L.seed_everything(0, verbose=False)
    x = torch.randn(3, 1, 8, 8)
    module = task(SMALL[name](), lr=0.002)
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(module, METHODS[method](), saving, epochs=3)
    net = module.net.eval()
    assert isinstance(net, nn.Module)
    assert history(net) or method == "weight_pruning"
    assert_tied(net, x)

    save_compressed(net, tmp_path / "net.safetensors")
    loaded = load_compressed(tmp_path / "net.safetensors", SMALL[name]()).eval()
    assert_tied(loaded, x)
    assert all(map(torch.equal, loaded(x), net(x)))

    resumed = task(SMALL[name](), lr=0.002)
    fit(resumed, METHODS[method](), epochs=3, ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert isinstance(resumed.net, nn.Module)
    assert_tied(resumed.net.eval(), x)
    assert tied_weights(resumed.net).keys() == tied_weights(net).keys()

    exported = torch.export.export(net, (x,))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(exported.module()(x), net(x), strict=True))
    stored = [name for name in exported.state_dict if ".filters." in name and name.endswith("weight")]
    assert sorted(stored) == sorted(name for name in tied_weights(net) if name.endswith("weight"))


def test_dictionaries_that_are_no_layers_are_pruned_too() -> None:
    """Atoms of a raw parameter, in a loop: the pruned network computes what it did with them at zero."""
    torch.manual_seed(0)
    net, x = HierarchicalSparseCoding(1, 10, 8, patch=4).eval(), torch.randn(4, 1, 8, 8)
    done = prune_channels(net, x, ratio=0.5)
    assert done.proof in ("exact", "restricted")
    assert net.dictionary.shape[0] == net.variances.shape[0] == 64
    assert done.costs["macs"][1] < 0.6 * done.costs["macs"][0]


def test_psnr_is_that_of_torchmetrics_with_the_range_of_the_targets() -> None:
    from torchmetrics.image import PeakSignalNoiseRatio

    images, found, metric = torch.rand(6, 1, 4, 4) * 3 - 1, torch.rand(6, 1, 4, 4), PSNR()
    for part in range(3):
        metric.update(found[2 * part : 2 * part + 2], images[2 * part : 2 * part + 2])
    oracle = PeakSignalNoiseRatio(data_range=float(images.max() - images.min()))
    assert torch.allclose(metric.compute(), oracle(found, images))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DeconvolutionalNetwork(image_size=9), "must be a multiple of 2.* got 9"),
        (lambda: StackedConvAutoencoder(image_size=10), "must be a multiple of 4.* got 10"),
        (lambda: ConvolutionalDBN(image_size=2), "must be a multiple of 4.* got 2"),
        (lambda: DeconvolutionalNetwork(codes=()), "`codes` must name"),
        (lambda: StackedConvAutoencoder(codes=()), "`codes` must name"),
        (lambda: ConvolutionalDBN(codes=()), "`codes` must name"),
        (lambda: SparseCoding(1, 2, kernel=4), "`kernel` must be odd.* got 4"),
        (lambda: SparseCoding(1, 2, iterations=0), "`iterations` must be at least 1, got 0"),
        (lambda: SparseCoding(1, 2, penalty=-1.0), "`penalty` must be at least 0, got -1"),
        (lambda: ConvolutionalRBM(1, 2, sparsity=0.0), r"`sparsity` must be .* got 0.0"),
        (lambda: HierarchicalSparseCoding(image_size=8, patch=9), r"`patch` must be between 2 and .* got 9"),
        (lambda: ImageReconstruction(SMALL["dbn"](), 10, reconstruction=-1.0), "`reconstruction` must be 0 or above"),
        (lambda: ContrastiveDivergence(SMALL["dbn"](), 10, lr=0.0), "`lr` must be above 0, got 0"),
    ],
)
def test_misuse_is_named(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (
            lambda: ImageClassifier(SMALL["autoencoder"](), 10),
            "Autoencoder gives a Representation.*ImageReconstruction",
        ),
        (lambda: ImageReconstruction(VGGSmall(1), 10), "VGGSmall gives a Tensor, .* Representation .*classification"),
    ],
)
def test_a_network_of_another_kind_is_told_its_task(module: Callable[[], L.LightningModule], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        fit(module())
