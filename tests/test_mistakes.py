"""Mistakes that users make, and that the message about each says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress import Budget
from lightning_compress.app.hints import other_kinds, unknown_names
from lightning_compress.app.train import JobError, check_objectives
from lightning_compress.distill.terms import Term

X = torch.randn(4, 1, 8, 8)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())


@pytest.mark.parametrize(
    ("mistake", "kind", "said"),
    [
        (lambda: Budget(macs=50.0), ValueError, r"got 50\.0; for 50 % give 0\.5"),
        (lambda: Budget(macs="25%"), ValueError, r"got '25%'; for 25 % give 0\.25"),
        (lambda: lc.prune_channels(network(), X, Budget(macs=50)), ValueError, r"write Budget\(macs=0\.5\)"),
        (lambda: lc.prune_channels(network(), X, 0.5), ValueError, r"`budget` must be a Budget, e\.g\. .*, got 0\.5"),
        (lambda: lc.prune_channels(network(), X, ratio=50), ValueError, r"for 50 % give 0\.5"),
        (lambda: lc.WeightPruning(90), ValueError, r"for 90 % give 0\.9"),
        (lambda: lc.ChannelPruning(Budget(macs=0.5), criterion="tailor"), ValueError, "did you mean 'taylor'"),
        (lambda: lc.LowRankFactorization(Budget(macs=0.5), "tuker"), ValueError, "did you mean 'tucker'"),
        (lambda: lc.CompactFilters("gost"), ValueError, "did you mean 'ghost'"),
        (lambda: lc.compact_filters(network(), X, "ghost", ratios=2), ValueError, "did you mean 'ratio'"),
        (lambda: lc.Quantization(observer="mse2"), ValueError, "did you mean 'mse'"),
        (lambda: lc.quantize(network(), X, bits={"fc*": 8}), ValueError, r"matches no .*; near names: 0, 1"),
        (lambda: lc.quantize(network(), None), TypeError, "must be a tensor, .*, got NoneType"),
        (lambda: lc.measure(network(), X.numpy()), TypeError, r"got ndarray; .* torch\.from_numpy"),
        (lambda: lc.measure(network(), {"x": X}), TypeError, r"got dict; for arguments by name give Call"),
        (lambda: lc.measure(network(), DataLoader(TensorDataset(X))), TypeError, r"got DataLoader; .*next\(iter"),
        (lambda: lc.measure("resnet20", X), TypeError, r"`model` must be a network, a torch\.nn\.Module, got str"),
        (lambda: lc.measure(network(), X.repeat(1, 3, 1, 1)), RuntimeError, r"with `inputs`, \(float32\[4, 3, 8, 8\]"),
        (lambda: lc.measure(network(), X.to("meta")), RuntimeError, r"on meta\), and it is on cpu\. Give"),
        (lambda: lc.save_compressed("a.safetensors", network()), TypeError, r"save_compressed\(model, path\)"),
        (lambda: lc.load_compressed(network(), "a.safetensors"), TypeError, r"load_compressed\(path, model\)"),
        (
            lambda: lc.load_from_checkpoint(network(), "a.ckpt"),
            TypeError,
            "class of the LightningModule .* a Sequential",
        ),
        (lambda: lc.apply_edits(network(), [{"kind": "keep"}]), TypeError, "edits_from_json"),
        (lambda: lc.CompressionReport(None), ValueError, "must name the file of the artifact"),
        (lambda: lc.Distillation(None), ValueError, "a teacher must be a network, .*, got None"),
        (lambda: Term("kd"), ValueError, r"must be a loss, e\.g\. KD\(\) .*, got 'kd'"),
        (lambda: lc.prune_channels(nn.ReLU(), X, ratio=0.5), ValueError, "could be cut: it has no layers"),
    ],
)
def test_a_mistake_says_what_to_do(mistake: Callable[[], object], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=f"(?s){said}"):  # notes count
        mistake()


def test_files_of_another_kind_say_who_reads_them(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"is no safetensors file: .* read by load_from_checkpoint"):
        lc.load_compressed(tmp_path / "a.ckpt", network())
    with pytest.raises(TypeError, match=r"is no checkpoint of a Trainer.* load_state_dict"):
        lc.load_from_checkpoint(L.LightningModule, tmp_path / "a.ckpt")


def test_names_of_the_package_are_suggested_by_python_itself() -> None:
    with pytest.raises(AttributeError) as raised:
        lc.ChanelPruning  # noqa: B018
    assert (raised.value.name, raised.value.obj) == ("ChanelPruning", lc)


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["method=chanel_pruning"], ["method=chanel_pruning: did you mean 'channel_pruning'?"]),
        (["arch=vgg16,resnt20", "-m"], ["arch=resnt20: did you mean 'resnet20'?"]),
        (["arch@teacher.net=resnt56"], ["arch@teacher.net=resnt56: did you mean 'resnet56'?"]),
        (["method=low_rank", "method.rnak=2"], ["method.rnak: did you mean 'method.rank'?"]),
        (["trainr.max_epochs=3"], ["trainr.max_epochs: did you mean 'trainer.max_epochs'?"]),
        (["arch=timm/resnet18", "seed=1", "hydra.verbose=true", "+mine=1", "--help"], []),
        (["method.budget.macs=a b=c"], []),
        (["=", "arch=", "nothing.like.it=3"], []),
    ],
)
def test_what_was_perhaps_meant_on_a_command_line(arguments: list[str], hints: list[str]) -> None:
    assert unknown_names(arguments) == hints


def test_a_failing_network_is_as_it_was() -> None:
    net = network().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        lc.measure(net, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert net.training
    assert np.array_equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_value_of_another_kind_is_named_and_hydra_goes_on() -> None:
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        at_work = GlobalHydra.instance().hydra
        said = other_kinds(["trainer.max_epochs=ten", "seed=2", "report.metric=null", "method.budget.macs=0.5", "+x=1"])
        assert said == ["`trainer.max_epochs` is by default 8, got 'ten'"]
        assert GlobalHydra.instance().hydra is at_work


@pytest.mark.parametrize("name", ["val/accuracy", "macs", "latency_b32", "onnx_metric"])
def test_objectives_that_a_job_may_have_are_asked_for_no_sooner(name: str) -> None:
    check_objectives([name])


def test_an_objective_that_no_job_has_is_refused_before_training() -> None:
    with pytest.raises(JobError, match=r"`objective` must be one of .*, got 'mac'; did you mean 'macs'\?"):
        check_objectives(["val/acc", "mac"])
