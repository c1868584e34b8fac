"""Artifacts: what comes back is what went in, and nothing else ever comes back."""

from __future__ import annotations

import base64
import json
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from lightning_compress import container
from lightning_compress.artifact import ArtifactError, artifact_bytes, load_compressed, read_metadata, save_compressed
from lightning_compress.edits import Keep, apply_edits, edits_to_json, history, named_tensors

# The network lives in a file of its own, so that a fresh process can make it without any code of the tests.
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.head = nn.Linear(width, 5)
        self.register_buffer("table", torch.arange(float(width)), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))) * self.table[:, None, None]
        return self.head(self.depthwise(x).mean((2, 3)))
"""
namespace: dict[str, Any] = {}
exec(NET, namespace)
Net: Callable[..., nn.Module] = namespace["Net"]


def cut(kept: tuple[int, ...], width: int = 8) -> Keep:
    first = {
        "conv.weight": (width, 3, 3, 3),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "norm.running_mean": (width,),
        "norm.running_var": (width,),
        "depthwise.weight": (width, 1, 3, 3),
        "depthwise.bias": (width,),
        "table": (width,),
    }
    n = len(kept)
    return Keep(
        slices={**{name: {0: kept} for name in first}, "head.weight": {1: kept}},
        sizes={**first, "head.weight": (5, width)},
        attributes={
            "conv": {"out_channels": (width, n)},
            "norm": {"num_features": (width, n)},
            "depthwise": {"in_channels": (width, n), "out_channels": (width, n), "groups": (width, n)},
            "head": {"in_features": (width, n)},
        },
        origin="test",
    )


def trained(*edits: Keep, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Net()
    with torch.no_grad():
        for _, tensor in named_tensors(net):
            if tensor.is_floating_point() and tensor is not net.table:
                tensor.uniform_(0.5, 1.5)
        net.steps.fill_(7)
    apply_edits(net, edits)
    return net.eval()


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
TWICE = (cut((0, 2, 3, 5, 7)), cut((1, 2, 4), 5))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_compressed(trained(*TWICE), tmp_path / "net.safetensors", {"who": "me", "acc": 0.5})
    return tmp_path / "net.safetensors"


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = dict(named_tensors(a)), dict(named_tensors(b))
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n], right[n]) for n in left
    )


@pytest.mark.parametrize("edits", [(), TWICE[:1], TWICE], ids=["dense", "once", "twice"])
def test_round_trip(tmp_path: Path, edits: tuple[Keep, ...]) -> None:
    net = trained(*edits)
    save_compressed(net, tmp_path / "a")
    fresh = Net().train()
    loaded = load_compressed(tmp_path / "a", fresh)
    assert loaded is fresh
    assert not any(module.training for module in loaded.modules())
    assert history(loaded) == edits
    assert same(loaded, net)
    assert torch.equal(loaded(X), net(X))
    assert artifact_bytes(net) == (tmp_path / "a").stat().st_size


def test_outputs_are_identical_in_a_fresh_process_that_cannot_unpickle(tmp_path: Path) -> None:
    net = trained(*TWICE)
    save_compressed(net, tmp_path / "net.safetensors")
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "run.py").write_text(
        "import pickle, sys\n"
        "import torch\n"
        "from net import Net\n"
        "def refuse(*args, **kwargs):\n"
        "    raise AssertionError('pickle was used')\n"
        "torch.load = pickle.load = pickle.loads = pickle.Unpickler = refuse\n"
        "from lightning_compress.artifact import load_compressed\n"
        "x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"
        "y = load_compressed('net.safetensors', Net())(x)\n"
        "heavy = [name for name in ('lightning', 'torchvision', 'pytorch_lightning') if name in sys.modules]\n"
        "print(y.detach().numpy().tobytes().hex(), heavy)\n"
    )
    package = Path(container.__file__).parent.parent
    out = subprocess.run(
        [sys.executable, "run.py", str(torch.get_num_threads())],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.split(maxsplit=1) == [net(X).detach().numpy().tobytes().hex(), "[]\n"]


def test_other_programs_read_it(saved: Path) -> None:
    """It is an ordinary safetensors file with the names of the original."""
    with safe_open(saved, "pt") as file:
        assert set(file.keys()) == set(Net().state_dict())
        assert torch.equal(file.get_tensor("conv.weight"), trained(*TWICE).conv.weight)
        assert file.metadata()["format"] == "pt"


def test_metadata_comes_back(saved: Path) -> None:
    about = read_metadata(saved)
    assert about["metadata"] == {"who": "me", "acc": 0.5}
    assert about["edits"] == TWICE
    assert about["architecture"] == {name: tuple(t.shape) for name, t in named_tensors(Net())}


def test_same_contents_same_bytes(tmp_path: Path, saved: Path) -> None:
    save_compressed(trained(*TWICE), tmp_path / "again", {"who": "me", "acc": 0.5})
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_saving_and_loading_leave_the_model_alone(tmp_path: Path) -> None:
    net, other = trained(TWICE[0]).train(), trained(TWICE[0])
    save_compressed(net, tmp_path / "a")
    assert same(net, other)
    assert history(net) == TWICE[:1]
    assert net.training


# What tensors can be like.


def test_dtypes_come_back_as_they_were(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(3))
            for name, value in {
                "b": torch.tensor(True),
                "c": torch.arange(5, dtype=torch.int8),
                "d": torch.tensor(3.5, dtype=torch.float64),
                "e": torch.zeros(0, 4),
                "f": torch.randn(2, dtype=torch.complex64).conj(),
                "g": torch.tensor(-(2**62)),
            }.items():
                self.register_buffer(name, value)

    net = Mixed()
    net.a.data = net.a.data.to(torch.bfloat16)
    save_compressed(net, tmp_path / "a")
    loaded = load_compressed(tmp_path / "a", Mixed())
    assert same(loaded, net)
    assert loaded.a.dtype is torch.bfloat16
    assert isinstance(loaded.a, nn.Parameter)


def test_bfloat16_networks_work_with_their_unsaved_buffers(tmp_path: Path) -> None:
    net = trained(*TWICE).to(torch.bfloat16)
    save_compressed(net, tmp_path / "a")
    loaded = load_compressed(tmp_path / "a", Net())
    assert loaded.table.dtype is torch.bfloat16
    assert torch.equal(loaded(X.bfloat16()), net(X.bfloat16()))


def test_strides_are_no_matter(tmp_path: Path) -> None:
    net = trained(*TWICE)
    expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net = net.to(memory_format=torch.channels_last)
    net.head.weight.data = net.head.weight.data.t().contiguous().t()
    save_compressed(net, tmp_path / "a")
    loaded = load_compressed(tmp_path / "a", Net().to(memory_format=torch.channels_last))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.items())
    assert loaded.depthwise.weight.is_contiguous(memory_format=torch.channels_last)


class Tied(nn.Module):
    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 4, bias=False)
        self.again = nn.Linear(6, 4, bias=False)
        if tie:
            self.again.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.encode(x) + self.again(x), self.encode.weight.t())


KEEP_TIED = Keep(
    {"encode.weight": {0: (1, 2)}, "again.weight": {0: (1, 2)}},
    {"encode.weight": (4, 6), "again.weight": (4, 6)},
    {"encode": {"out_features": (4, 2)}, "again": {"out_features": (4, 2)}},
)


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    net = Tied()
    apply_edits(net, [KEEP_TIED])
    save_compressed(net, tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        assert list(file.keys()) == ["encode.weight"]
    loaded = load_compressed(tmp_path / "a", Tied())
    assert loaded.encode.weight is loaded.again.weight
    x = torch.randn(3, 6)
    assert torch.equal(loaded(x), net(x))
    untied = load_compressed(tmp_path / "a", Tied(tie=False))
    assert untied.encode.weight is not untied.again.weight
    assert torch.equal(untied(x), net(x))


def test_tensors_that_parted_do_not_load_into_a_tie(tmp_path: Path) -> None:
    save_compressed(Tied(tie=False), tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"ties 'encode.weight' and 'again.weight'"):
        load_compressed(tmp_path / "a", Tied())


def test_views_of_one_storage_are_stored_apart(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.randn(10)
            self.a, self.b = nn.Parameter(flat[:6]), nn.Parameter(flat[4:])

    net = Views()
    save_compressed(net, tmp_path / "a")
    assert same(load_compressed(tmp_path / "a", Views()), net)


def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None: ...

    sparse = nn.Module()
    sparse.register_buffer("s", torch.eye(3).to_sparse())
    for net, name in (
        (nn.Sequential(Extra(2, 2)), "0._extra_state"),
        (sparse, "'s'"),
        (nn.Linear(2, 2, device="meta"), "'weight'.*meta"),
        (nn.Linear(2, 2, dtype=torch.complex128), "'weight'"),
    ):
        with pytest.raises(ArtifactError, match=name):
            save_compressed(net, tmp_path / "a")
    with pytest.raises(ArtifactError, match="JSON"):
        save_compressed(nn.Linear(2, 2), tmp_path / "a", {"x": torch.zeros(1)})
    assert os.listdir(tmp_path) == []


def test_compiled_networks_are_saved_under_their_own_names(tmp_path: Path) -> None:
    net = trained(*TWICE)
    save_compressed(torch.compile(net), tmp_path / "a")
    assert same(load_compressed(tmp_path / "a", Net()), net)
    wrapper = torch.compile(Net())
    assert load_compressed(tmp_path / "a", wrapper) is wrapper
    assert same(wrapper._orig_mod, net)


# What must never load.


def refused(path: Path, match: str, net: nn.Module | None = None) -> None:
    """The file is refused, and the network is what it was."""
    net = net or trained(seed=5).train()
    before, edits = {name: (t, t.clone()) for name, t in named_tensors(net)}, history(net)
    with pytest.raises(ArtifactError, match=match):
        load_compressed(path, net)
    assert history(net) == edits
    assert net.training
    for name, tensor in named_tensors(net):
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])


def test_every_flipped_bit_is_found(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [(i, bit) for i in range(40) for bit in range(8)]
    draw = random.Random(0)
    places += [(draw.randrange(40, header), draw.randrange(8)) for _ in range(400)]
    places += [(draw.randrange(header, len(data)), draw.randrange(8)) for _ in range(200)]
    places += [(header - 1, 5), (header, 0), (len(data) - 1, 7)]
    start = data.index(b"sha256:")
    places += [(start + i, draw.randrange(8)) for i in range(90)]
    bad = tmp_path / "bad"
    for place, bit in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        bad.write_bytes(flipped)
        with pytest.raises(ArtifactError):
            read_metadata(bad)
    bad.write_bytes(bytes(flipped))
    refused(bad, "damaged|truncated|safetensors")


def test_truncated_at_any_length(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    bad = tmp_path / "bad"
    for length in [*range(64), *range(64, len(data), 37), len(data) - 1]:
        bad.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"truncated|header is damaged"):
            read_metadata(bad)
    bad.write_bytes(data + b"\0")
    refused(bad, f"expected {len(data)} bytes, got {len(data) + 1}")


def test_no_file_no_folder_no_artifact(saved: Path, tmp_path: Path) -> None:
    refused(tmp_path / "missing", "there is no file")
    refused(tmp_path, "is a folder: name the file in it")
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle")
    refused(tmp_path / "pickle", "no safetensors file")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    refused(tmp_path / "other", "not written by save_compressed")
    with pytest.raises(ArtifactError, match="folder does not exist"):
        save_compressed(Net(), tmp_path / "no" / "a")


def test_another_format_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(container, "FORMAT", 3)
        save_compressed(Net(), tmp_path / "a")
    refused(tmp_path / "a", "has format 3, this version of lightning_compress reads 2")


def test_an_edit_of_an_unknown_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Keep, "to_json", lambda self: {"kind": "teleport"})
        save_compressed(trained(*TWICE), tmp_path / "a")
    refused(tmp_path / "a", "unknown kind of edit 'teleport'")


def test_another_architecture_names_the_tensors(saved: Path) -> None:
    refused(
        saved,
        r"another architecture; tensors that differ:\n  conv.weight: expected \[8, 3, 3, 3\], got \[12, 3, 3, 3\]",
        Net(12).train(),
    )
    more = Net().train()
    more.extra = nn.Linear(1, 1)
    refused(saved, r"extra.weight: expected none, got \[1, 1\]", more)
    less = Net().train()
    del less.head
    refused(saved, r"head.weight: expected \[5, 8\], got none", less)


def test_an_architecture_that_differs_in_groups_only(tmp_path: Path) -> None:
    """All tensors have the right shapes; it is the edit of an attribute that does not fit."""
    save_compressed(trained(*TWICE), tmp_path / "a")
    net = Net().train()
    net.depthwise.groups = 4
    refused(tmp_path / "a", "depthwise.groups: expected 8, got 4", net)


def test_models_that_were_compressed_before(saved: Path) -> None:
    again = load_compressed(saved, trained(*TWICE, seed=3))
    assert same(again, trained(*TWICE))
    assert history(again) == TWICE
    refused(saved, "2 edits and the network has already been through 1 others", trained(TWICE[0]).train())
    refused(saved, "another architecture|already been through", trained(cut((0, 1))).train())


def test_a_meta_network_is_refused(saved: Path) -> None:
    with torch.device("meta"):
        net = Net()
    with pytest.raises(ArtifactError, match=r"'conv.weight'.*meta device"):
        load_compressed(saved, net)


def test_a_failing_write_leaves_the_old_artifact(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved.read_bytes()
    real, written = container._contents, []

    def failing(tensors: dict[str, Tensor]) -> Any:
        for content in real(tensors):
            if written:
                raise OSError("disk full")
            written.append(content)
            yield content

    monkeypatch.setattr(container, "_contents", failing)
    with pytest.raises(OSError, match="disk full"):
        save_compressed(trained(), saved)
    assert written
    assert saved.read_bytes() == data
    assert os.listdir(saved.parent) == [saved.name]


def test_edits_in_the_file_are_plain_json(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        packed = json.loads(file.metadata()["lightning_compress"])["manifest"]
    manifest = json.loads(zlib.decompress(base64.b85decode(packed)))
    assert manifest["edits"] == edits_to_json(TWICE)
