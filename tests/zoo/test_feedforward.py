"""The networks: sizes of the papers, shapes, gradients, and that configuration and code agree."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from lightning_compress.calls import as_calls
from lightning_compress.coupling import trace_coupling
from lightning_compress.edits import apply_edits
from lightning_compress.zoo import (
    AlexNet,
    DenseNet,
    GoogLeNet,
    LeNet5,
    LeNet300100,
    MobileNetV1,
    MobileNetV2,
    MobileNetV2Small,
    ResNet,
    ShuffleNetV2,
    SqueezeNet,
    VGGSmall,
    WideResNet,
    densenet40,
    external,
    resnet20,
    resnet32,
    resnet56,
    resnet110,
    timm_model,
    torchvision_model,
    vgg11,
    vgg16,
    wrn_16_2,
    wrn_40_2,
)
from lightning_compress.zoo.feedforward.googlenet import Inception
from lightning_compress.zoo.feedforward.squeezenet import Fire

CONF = Path(__file__).parents[2] / "conf"
LARGE: list[Callable[..., nn.Module]] = [
    *(AlexNet, vgg11, vgg16, GoogLeNet, resnet110, wrn_16_2, wrn_40_2, densenet40, SqueezeNet),
    *(MobileNetV1, MobileNetV2, ShuffleNetV2),
]
"""Built a quarter as wide, where only their shape counts."""
NETWORKS: list[Callable[..., nn.Module]] = [
    *(LeNet300100, LeNet5, VGGSmall, resnet20, resnet32, resnet56, MobileNetV2Small),
    *LARGE,
]


def build(network: Callable[..., nn.Module], size: int, **arguments: Any) -> nn.Module:
    if "image_size" in inspect.signature(network).parameters:
        arguments["image_size"] = size
    return network(**arguments)


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (LeNet300100(), 266_610),  # 267 K and 431 K in Deep Compression
        (LeNet5(), 431_080),
        (resnet20(shortcut="A"), 269_722),  # 0.27 M and 0.85 M in He et al. 2015
        (resnet56(shortcut="A"), 853_018),
        (resnet20(shortcut="B"), 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64)),
        (VGGSmall(), 288_746),
        (resnet32(shortcut="A"), 464_154),  # 0.46 M and 1.7 M
        (resnet110(shortcut="A"), 1_727_962),
        (MobileNetV2Small(), 204_554),
        (wrn_16_2(), 691_674),  # 0.7 M and 2.2 M in Zagoruyko and Komodakis 2016
        (wrn_40_2(), 2_243_546),
        (densenet40(), 1_019_722),  # 1.0 M in Huang et al. 2016
        # with ImageNet's classes; strides, which differ here, have no parameters
        (MobileNetV1(num_classes=1000), 4_231_976),  # 4.2 M in Howard et al. 2017
        (MobileNetV2(num_classes=1000), 3_504_872),  # 3.4 M in Sandler et al. 2018, without BatchNorm's
        (ShuffleNetV2(num_classes=1000), 2_278_604),  # 2.3 M in Ma et al. 2018
        (SqueezeNet(num_classes=1000), 1_235_496),  # 1.24 M, 4.8 MB in Iandola et al. 2016
    ],
)
def test_parameter_counts(network: nn.Module, count: int) -> None:
    assert parameters(network) == count


def convolutions(network: nn.Module, bias: bool = False) -> list[int]:
    """Parameters of each convolution in order, without biases or as if each had one."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    return [layer.weight.numel() + (layer.out_channels if bias else 0) for layer in layers]


def test_convolutions_are_those_of_the_papers() -> None:
    # Krizhevsky et al. 2012, with biases; the first convolution is another one at this size
    assert convolutions(AlexNet(), bias=True)[1:] == [307_456, 885_120, 663_936, 442_624]
    # Simonyan and Zisserman 2014, table 2 (133 M and 138 M with the linear layers that are left out here)
    assert sum(convolutions(vgg11(), bias=True)) == 9_220_480
    assert sum(convolutions(vgg16(), bias=True)) == 14_714_688


def test_inception_modules_have_the_parameters_of_table_1() -> None:
    """Szegedy et al. 2014, in thousands of 1024; the paper's own sums are up to 5 % off its widths."""
    modules = [module for module in GoogLeNet().modules() if isinstance(module, Inception)]
    # the fifth is said to have 463, which its own widths in the same line do not give
    table = [159, 380, 364, 437, 498, 580, 840, 1072, 1388]
    found = [sum(convolutions(module)) / 1024 for module in modules]
    assert found == pytest.approx(table, rel=0.055)


def test_fire_modules_have_the_parameters_of_the_paper() -> None:
    """Iandola et al. 2016, table 1: each has `squeeze * (in + 10 * expand)` weights, and biases."""
    for module in SqueezeNet().modules():
        if isinstance(module, Fire):
            squeeze, expand = module.squeeze.out_channels, module.expand1.out_channels
            own = squeeze * (module.squeeze.in_channels + 10 * expand) + squeeze + 2 * expand
            assert sum(p.numel() for p in module.parameters()) == own


@pytest.mark.parametrize("network", NETWORKS)
def test_channels_can_be_pruned(network: Callable[..., nn.Module]) -> None:
    """Every other class of coupled channels is cut, and the network computes what it did with them zeroed."""
    torch.manual_seed(0)
    net = build(network, 8, in_channels=1, **({"width": 0.25} if network in LARGE else {})).eval()
    x = torch.randn(2, 1, 8, 8)
    coupling = trace_coupling(net, x)
    cut = coupling.nothing_cut()
    for group in coupling.groups:
        cut[group.classes[::2]] = True
    assert cut.any()
    before, calls = parameters(net), as_calls(x)
    apply_edits(net, [coupling.keep_edit(cut)])
    assert parameters(net) < 0.8 * before
    assert net(*calls[0].args).shape == (2, 10)


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("network", NETWORKS)
def test_shapes_and_gradients_at_small_image_sizes(network: Callable[..., nn.Module], size: int) -> None:
    torch.manual_seed(0)
    net = build(network, size, in_channels=2, num_classes=7, **({"width": 0.25} if network in LARGE else {}))
    logits = net(torch.randn(4, 2, size, size))
    assert logits.shape == (4, 7)
    logits.logsumexp(1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.parameters())


@pytest.mark.parametrize("network", NETWORKS)
def test_width_scales_the_channels(network: Callable[..., nn.Module]) -> None:
    wide = 0.25 if network in LARGE else 1.0
    full, half = (build(network, 8, in_channels=1, width=width) for width in (wide, wide / 2))
    assert 0.2 < parameters(half) / parameters(full) < 0.55
    assert half(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="`width` must be above 0, got 0"):
        build(network, 8, width=0)


def test_padded_shortcut_passes_on_every_other_pixel_and_zeros() -> None:
    shortcut = resnet20(shortcut="A").layer2[0].shortcut
    x = torch.randn(1, 16, 8, 8)
    out = shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out.shape == (1, 32, 4, 4)
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"6n \+ 2 .* got 21"):
        ResNet(21, 3, 10, width=1.0, shortcut="B")
    with pytest.raises(ValueError, match=r"`shortcut` must be .* got 'C'"):
        resnet20(shortcut="C")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"6n \+ 4 .*got 17"):
        WideResNet(17, 2, 3, 10, width=1.0, dropout=0.0)
    with pytest.raises(ValueError, match=r"3n \+ 4 .*got 41"):
        DenseNet(41, 12, 3, 10, width=1.0, dropout=0.0)
    with pytest.raises(ValueError, match="at least 4, got 3"):
        LeNet5(image_size=3)


@pytest.mark.parametrize("file", sorted((CONF / "arch").glob("*.yaml")), ids=lambda file: file.stem)
def test_each_arch_builds_and_states_the_defaults_of_its_code(file: Path) -> None:
    config = OmegaConf.load(file)
    config.pop("defaults", None)  # for Hydra
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    defaults = inspect.signature(get_object(container["_target_"])).parameters
    for key, value in container.items():
        if key in {"_target_", "name"} or "${" in str(value):
            continue
        assert (tuple(value) if isinstance(value, list) else value) == defaults[key].default, key

    data = {"in_channels": 3, "num_classes": 5, "image_size": 32}
    network = instantiate(OmegaConf.create({"data": data, "arch": config})).arch
    given = network.eval()(torch.randn(1, 3, 32, 32))
    assert getattr(given, "logits", given).shape == (1, 5)


def test_the_networks_need_torch_alone() -> None:
    code = "import sys, lightning_compress.zoo as zoo; zoo.resnet20(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"lightning", "torchvision", "timm", "sklearn", "hydra"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(("build", "library"), [(timm_model, "timm"), (torchvision_model, "torchvision")])
class TestNetworksByName:
    def test_unknown_name_gets_suggestions(self, build: Callable[..., nn.Module], library: str) -> None:
        with pytest.raises(ValueError, match=f"{library} has no .* 'resnet81'; did you mean .*resnet18"):
            build("resnet81")
        with pytest.raises(ValueError, match="list_models"):
            build("?")

    def test_without_the_library_the_extra_is_named(
        self, build: Callable[..., nn.Module], library: str, uninstall: Callable[[str], None]
    ) -> None:
        uninstall(library)
        with pytest.raises(ModuleNotFoundError, match=rf'{library} is not installed.*"lightning-compress\[vision\]"'):
            build("resnet18")

    def test_without_a_network_pretrained_weights_are_refused(
        self, build: Callable[..., nn.Module], library: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def offline(*args: object, **kwargs: object) -> None:
            raise OSError("no route to host")

        if library == "timm":
            monkeypatch.setattr("timm.create_model", offline)
        else:
            monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
        with pytest.raises(ConnectionError, match=f"{library}'s 'resnet18' .*no route to host.*pretrained=false"):
            build("resnet18", pretrained=True)


def test_a_library_that_is_broken_is_not_called_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")

    monkeypatch.setattr(external.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="yaml"):
        external.require_extra("timm")


def test_torchvision_pretrained_weights_load_but_for_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = torchvision_model("squeezenet1_1", num_classes=1000).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: dict(stored))
    network = torchvision_model("squeezenet1_1", pretrained=True, num_classes=4)
    loaded = {key for key, value in network.state_dict().items() if torch.equal(value, stored[key])}
    assert set(stored) - loaded == {"classifier.1.weight", "classifier.1.bias"}

    del stored["features.0.weight"]
    with pytest.raises(ValueError, match=r"do not fit the network at \['features.0.weight'\]"):
        torchvision_model("squeezenet1_1", pretrained=True, num_classes=4)


def test_torchvision_networks_take_three_channels() -> None:
    with pytest.raises(ValueError, match=r"`in_channels` = 1.*data.in_channels=3"):
        torchvision_model("resnet18", in_channels=1)


@pytest.mark.parametrize(("build", "head"), [(timm_model, "fc"), (torchvision_model, "fc")])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_pretrained_weights_may_come_from_a_file(
    build: Callable[..., nn.Module], head: str, suffix: str, tmp_path: Path
) -> None:
    stored = build("resnet18", num_classes=7).state_dict()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": stored}, path)
    else:
        save_file(stored, path)
    same = build("resnet18", pretrained=str(path), num_classes=7).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in same.items())
    other = build("resnet18", pretrained=str(path), num_classes=4).state_dict()
    assert {name for name in other if not torch.equal(other[name], stored[name])} == {f"{head}.weight", f"{head}.bias"}

    path.write_bytes(b"no weights")
    if suffix == "pt":
        with pytest.raises(ValueError, match="holds something else than tensors"):
            build("resnet18", pretrained=str(path))
    with pytest.raises(FileNotFoundError, match=r"`pretrained` must be .* no file .*missing.pt"):
        build("resnet18", pretrained=str(tmp_path / "missing.pt"))
