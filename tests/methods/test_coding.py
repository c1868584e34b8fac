"""Entropy coding: exact, small, and never decoded into something else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress.artifact import ArtifactError, artifact_bytes, load_compressed, save_compressed
from lightning_compress.methods.coding import CodingError, decode, encode, worth_trying

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def round_trip(tensor: Tensor) -> bytes:
    code = encode(tensor)
    assert same_bits(decode(code, tensor.dtype, tensor.shape), tensor)
    return code


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from(DTYPES),
    distinct=st.integers(1, 300),
    zeros=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_tensor_comes_back(
    shape: list[int], dtype: torch.dtype, distinct: int, zeros: float, wide: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (*shape, 40) if wide else tuple(shape)
    book = torch.randn(distinct, generator=generator) * 50
    values = book[torch.randint(distinct, size, generator=generator)]
    values = values * (torch.rand(size, generator=generator) >= zeros)
    round_trip(values.to(dtype))


def test_many_small_masks() -> None:
    """Small enough for both ways to code where the zeros are to take the same number of bytes now and then."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        rows, columns = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 8), (16, 80)))
        alive = torch.rand(rows, columns, generator=generator) < torch.rand((), generator=generator)
        round_trip(torch.where(alive, torch.randn(rows, columns, generator=generator), 0.0))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.zeros(0, 5),
        torch.tensor(3.0),
        torch.zeros(1000, 30),
        torch.full((50, 50), -0.25),
        torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45]).repeat(50),
        torch.arange(100_000, dtype=torch.float32),
        torch.eye(5000, 20),
        torch.eye(300).to(memory_format=torch.contiguous_format).t(),
    ],
    ids=[
        "empty",
        "empty rows",
        "one weight",
        "zeros",
        "constant",
        "special",
        "all distinct",
        "many rows",
        "transposed",
    ],
)
def test_the_edges(tensor: Tensor) -> None:
    round_trip(tensor)


def test_ten_million_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 16, (2500, 4000), generator=generator).float()
    tensor *= torch.rand(tensor.shape, generator=generator) < 0.1
    code = round_trip(tensor)
    p = 0.1 * 15 / 16
    entropy = -(p * np.log2(p) + (1 - p) * np.log2(1 - p)) + p * np.log2(15)
    assert len(code) * 8 / tensor.numel() == pytest.approx(entropy, rel=0.01)


def test_the_size_is_near_the_entropy_and_below_it_where_columns_are_empty() -> None:
    generator = torch.Generator().manual_seed(0)
    book = torch.randn(31, generator=generator)
    density = torch.rand(784, generator=generator) ** 4  # inputs that are hardly used, as the border of an image
    mask = torch.rand(300, 784, generator=generator) < density
    tensor = torch.where(mask, book[torch.randint(31, mask.shape, generator=generator)], 0.0)
    share = float(mask.float().mean())
    plain = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    known = float(-(density * density.log2() + (1 - density) * (1 - density).clamp_min(1e-9).log2()).mean())
    bits = len(encode(tensor)) * 8 / tensor.numel() - share * np.log2(31)
    assert known < bits < known + 0.5 * (plain - known)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 60),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.int64]),
    distinct=st.integers(1, 20),
    zeros=st.sampled_from([0.0, 0.3, 0.95]),
    seed=st.integers(0, 99),
)
def test_rows_with_values_of_their_own_come_back(
    rows: int, columns: int, dtype: torch.dtype, distinct: int, zeros: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    books = torch.randn(rows, distinct, generator=generator) * 50
    values = books.gather(1, torch.randint(distinct, (rows, columns), generator=generator))
    round_trip((values * (torch.rand(rows, columns, generator=generator) >= zeros)).to(dtype))


def test_rows_with_values_of_their_own_are_coded_near_their_entropy() -> None:
    """One bit for a sign, and the values of a row once."""
    signs = torch.randn(128, 64, 3, 3).sign()
    tensor = signs * torch.rand(128, 1, 1, 1)
    code = round_trip(tensor)
    assert len(code) < 1.01 * tensor.numel() / 8 + 128 * 9 + 64
    for damaged in (code[:-3], code[:40] + b"\xff" + code[41:]):
        with pytest.raises(CodingError):
            decode(damaged, tensor.dtype, tensor.shape)
    assert encode(signs)[0] == 1  # one codebook, as in the first version
    assert code[0] == 2
    with pytest.raises(CodingError, match="another version"):
        decode(b"\x01" + code[1:], tensor.dtype, tensor.shape)


def test_data_of_another_tensor_is_refused() -> None:
    tensor = torch.eye(64)
    code = encode(tensor)
    with pytest.raises(CodingError):
        decode(code[:-5], tensor.dtype, tensor.shape)
    with pytest.raises(CodingError):
        decode(code + b"1234", tensor.dtype, tensor.shape)
    with pytest.raises(CodingError):
        decode(b"", tensor.dtype, tensor.shape)
    with pytest.raises(CodingError, match="another shape"):
        decode(code, tensor.dtype, (3, 3))


def test_what_is_worth_trying() -> None:
    assert not worth_trying(torch.rand(100, 100))
    assert not worth_trying(torch.zeros(10))
    assert not worth_trying(torch.zeros(100, 100, device="meta"))
    assert worth_trying(torch.rand(100, 100).round(decimals=1))
    assert worth_trying(torch.rand(100, 100) * (torch.rand(100, 100) < 0.5))


def sparse_network() -> nn.Module:
    """A tenth of the weights, of 15 values."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32 * 36, 300))
    with torch.no_grad():
        for weight in (net[0].weight, net[3].weight):
            weight.copy_(((weight / weight.abs().max() * 7).round() / 8).where(torch.rand_like(weight) < 0.1, 0.0))
            weight += 0.0  # no zero has a sign
    return net


def test_an_artifact_is_smaller_and_loads_bit_by_bit_in_another_process(tmp_path: Path) -> None:
    net = sparse_network()
    save_compressed(net, tmp_path / "a")
    size = (tmp_path / "a").stat().st_size
    assert size == artifact_bytes(net) < artifact_bytes(net, coded=False) / 30
    loaded = load_compressed(tmp_path / "a", sparse_network())
    for name, tensor in net.state_dict().items():
        assert same_bits(loaded.state_dict()[name], tensor), name
    torch.save(net.state_dict(), tmp_path / "state")
    script = (
        "import sys, torch\n"
        "from tests.methods.test_coding import sparse_network, same_bits, load_compressed\n"
        "net = load_compressed(sys.argv[1] + '/a', sparse_network()).state_dict()\n"
        "state = torch.load(sys.argv[1] + '/state', weights_only=True)\n"
        "assert all(same_bits(net[name], tensor) for name, tensor in state.items())\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])


def test_a_damaged_artifact_is_never_a_network(tmp_path: Path) -> None:
    save_compressed(sparse_network(), tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    for place in np.linspace(9, len(data) - 1, 60).astype(int):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        (tmp_path / "b").write_bytes(damaged)
        with pytest.raises(ArtifactError):
            load_compressed(tmp_path / "b", sparse_network())
    (tmp_path / "b").write_bytes(data[:-7])
    with pytest.raises(ArtifactError, match="truncated"):
        load_compressed(tmp_path / "b", sparse_network())


def test_another_decoding_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine that rounds differently would decode."""
    save_compressed(sparse_network(), tmp_path / "a")
    monkeypatch.setattr("lightning_compress.methods.zeros.PRIOR", 4.1)
    with pytest.raises(ArtifactError, match="decoded"):
        load_compressed(tmp_path / "a", sparse_network())
