"""Networks of timm and torchvision by name: what is asked for wrongly, what is missing, and weights from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_compress.zoo import timm_model, torchvision_model


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


@pytest.mark.parametrize("build", [timm_model, torchvision_model])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_pretrained_weights_may_come_from_a_file(build: Callable[..., nn.Module], suffix: str, tmp_path: Path) -> None:
    stored = build("resnet18", num_classes=7).state_dict()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": stored}, path)
    else:
        save_file(stored, path)
    same = build("resnet18", pretrained=path, num_classes=7).state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in same.items())
    other = build("resnet18", pretrained=str(path), num_classes=4).state_dict()
    assert {name for name in other if not torch.equal(other[name], stored[name])} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("build", [timm_model, torchvision_model])
def test_a_file_that_does_not_fit_is_refused(build: Callable[..., nn.Module], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`pretrained` must be .* no file .*missing.pt"):
        build("resnet18", pretrained=str(tmp_path / "missing.pt"))

    for name in ("weights.pt", "weights.safetensors"):
        path = tmp_path / name
        path.write_bytes(b"no weights")
        with pytest.raises(ValueError, match=rf"{name} holds something else than tensors, or is damaged"):
            build("resnet18", pretrained=str(path))

    path = tmp_path / "other.pt"
    for other in ([torch.zeros(1)], {"epoch": 3}, {"state_dict": torch.zeros(1)}):
        torch.save(other, path)
        with pytest.raises(ValueError, match="holds no state dict"):
            build("resnet18", pretrained=str(path))
    torch.save(build("resnet34").state_dict(), path)  # has all that resnet18 has, in the same shapes
    with pytest.raises(ValueError, match=r"another network: this one has no \['layer1.2.conv1.weight', .* more"):
        build("resnet18", pretrained=str(path))
    torch.save(build("resnet18").fc.state_dict(), path)
    with pytest.raises(ValueError, match=r"another network: this one has no \['weight', 'bias'\]"):
        build("resnet18", pretrained=str(path))
    torch.save({}, path)
    with pytest.raises(ValueError, match=r"do not fit the network at \['conv1.weight', .* more"):
        build("resnet18", pretrained=str(path))
