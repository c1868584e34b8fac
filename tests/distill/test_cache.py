"""A cached output is the sample's own, bit for bit, or it is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn

from lightning_compress.distill.cache import CacheError, OutputCache, weights_digest
from lightning_compress.distill.fingerprints import differ, fingerprint
from lightning_compress.files import write_atomic

ROOT = Path(__file__).parents[2]


def images(count: int = 8, size: int = 16) -> Tensor:
    """Smooth, bright images, as photographs are: a shift changes little."""
    coarse = torch.rand(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(5))
    return 0.3 + 0.5 * F.interpolate(coarse, (size, size), mode="bicubic")


def filled(folder: Path, samples: int = 20) -> tuple[OutputCache, Tensor, Tensor]:
    """A cache that holds samples 0 to 7."""
    cache, x, y = OutputCache(folder, samples, "t"), images(), torch.randn(8, 10)
    cache.store(range(8), [x], y)
    return cache, x, y


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (10,), (3, 4, 4)], ids=str)
def test_round_trip(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, y = images(), (3 * torch.randn(8, *shape)).to(dtype)
    if dtype.is_floating_point:
        y.view(8, -1)[:4, 0] = torch.tensor([torch.nan, torch.inf, -0.0, torch.finfo(dtype).tiny], dtype=dtype)
    indices = [5, 19, 0, 7, 2, 11, 3, 1]
    OutputCache(tmp_path, 20, "t").store(indices, [x], y)
    for cache in (OutputCache(tmp_path, 20, "t"), OutputCache(str(tmp_path), 20, "t")):
        got = cache.lookup(indices, [x])
        assert got is not None
        assert (got.dtype, got.shape) == (dtype, y.shape)
        assert torch.equal(got.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


def test_any_layout_of_outputs_and_inputs(tmp_path: Path) -> None:
    x, y = images(), torch.randn(8, 4, 6)
    cache = OutputCache(tmp_path, 8, "t")
    cache.store(range(8), [x.to(memory_format=torch.channels_last).requires_grad_()], y.mT.requires_grad_())
    got = cache.lookup(range(8), [x])
    assert got is not None
    assert torch.equal(got, y.mT)
    got.zero_()  # a copy of what the file holds
    again = cache.lookup(range(8), [x])
    assert again is not None
    assert torch.equal(again, y.mT)


def test_missing_rows(tmp_path: Path) -> None:
    cache, x, y = filled(tmp_path)
    assert cache.lookup([0, 8], [x[:2]]) is None
    assert OutputCache(tmp_path, 20, "other").lookup([0], [x[:1]]) is None
    cache.store([8, 0], [torch.cat([x[1:2] + 1, x[:1]])], y[:2])
    got = cache.lookup([8, 0], [torch.cat([x[1:2] + 1, x[:1]])])
    assert got is not None
    assert torch.equal(got, y[[0, 0]])  # what is there stays


def test_other_batches_of_the_same_inputs(tmp_path: Path) -> None:
    cache, x, y = filled(tmp_path)
    for indices in ([3], [7, 0, 3], [1, 1]):
        got = cache.lookup(indices, [x[indices]])
        assert got is not None
        assert torch.equal(got, y[indices])


def test_inputs_of_another_place_or_precision_are_the_same(tmp_path: Path) -> None:
    cache, x, _ = filled(tmp_path)
    for like in (x.bfloat16(), x.half(), x.double(), x * (1 + 1e-6)):
        assert cache.lookup(range(8), [like]) is not None


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(-1),
    "upside down": lambda x: x.flip(-2),
    "shift right": lambda x: x.roll(1, -1),
    "shift down": lambda x: x.roll(1, -2),
    "mixup": lambda x: 0.99 * x + 0.01 * x.roll(1, 0),
    "noise": lambda x: x + 0.01 * torch.randn_like(x),
    "brightness": lambda x: x * 1.01,
    "offset": lambda x: x + 0.01,
    "erased": lambda x: x * (torch.arange(16) > 1),
    "channels": lambda x: x.flip(1),
    "neighbour": lambda x: x.roll(1, 0),
    "size": lambda x: x[..., :12],
    "nan": lambda x: x * torch.nan,
    "one infinite pixel": lambda x: x.masked_fill(torch.arange(3 * 16 * 16).view(3, 16, 16) == 3, torch.inf),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("sample", range(8))
def test_changed_input(tmp_path: Path, change: Callable[[Tensor], Tensor], sample: int) -> None:
    cache, x, y = filled(tmp_path)
    message = rf"sample {sample}'s input differs.*augmented randomly.*use cache=None"
    changed = change(x)[sample : sample + 1]
    with pytest.raises(CacheError, match=message):
        cache.lookup([sample], [changed])
    with pytest.raises(CacheError, match=message):
        cache.lookup([sample, 9], [changed.repeat(2, 1, 1, 1)])  # though another one is missing
    with pytest.raises(CacheError, match=message):
        cache.store([sample], [changed], y[:1])
    got = cache.lookup([sample], [x[sample : sample + 1]])
    assert got is not None
    assert torch.equal(got, y[sample : sample + 1])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinite_input_is_not_kept(tmp_path: Path, value: float) -> None:
    """It would be another in every epoch, and the error then would blame augmentation."""
    cache, x, y = OutputCache(tmp_path, 20, "t"), images(), torch.randn(8, 10)
    x[2, 0, 3, 3] = value
    with pytest.raises(CacheError, match=r"sample 12's input is not finite.*use cache=None"):
        cache.store(range(10, 18), [x], y)
    assert cache.lookup([10], [x[:1]]) is None


def test_imaginary_part(tmp_path: Path) -> None:
    x = torch.randn(4, 6, dtype=torch.complex64)
    cache = OutputCache(tmp_path, 4, "t")
    cache.store(range(4), [x], torch.zeros(4))
    assert cache.lookup(range(4), [x]) is not None
    with pytest.raises(CacheError, match="input differs"):
        cache.lookup(range(4), [x.conj()])


def test_batch_of_low_precision_that_is_mixed(tmp_path: Path) -> None:
    """Rounding hides more there; one sample of a batch is enough."""
    x = images().bfloat16()
    cache = OutputCache(tmp_path, 8, "t")
    cache.store(range(8), [x], torch.zeros(8))
    for share in (0.99, 0.9):
        with pytest.raises(CacheError, match="input differs"):
            cache.lookup(range(8), [share * x + (1 - share) * x.roll(1, 0)])


@pytest.mark.parametrize("size", [1, 3, 1000, 4095, 4096, 4097, 3 * 64 * 64])
def test_distance_of_fingerprints_is_that_of_the_inputs(size: int) -> None:
    x = torch.randn(200, size)
    for step, wrong in ((0.0, 0), (0.0001, 0), (0.003, 200)):
        moved = x + step * F.normalize(torch.randn(200, size), dim=1) * x.norm(dim=1, keepdim=True)
        found = differ(fingerprint([x]), fingerprint([moved])).sum()
        assert found == wrong if size > 3 else abs(found - wrong) <= 10


def test_fingerprint_is_independent_of_the_batch() -> None:
    x = torch.randn(5, 3, 40, 40)
    whole = fingerprint([x])
    for index in range(5):
        np.testing.assert_allclose(fingerprint([x[index : index + 1]]), whole[index : index + 1], rtol=1e-6)


def test_fingerprint_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 5000)
    whole = fingerprint([x])
    monkeypatch.setattr("lightning_compress.distill.fingerprints._CHUNK", 20000)
    np.testing.assert_allclose(fingerprint([x]), whole, rtol=1e-6)


def test_fingerprint_stays_the_same_for_ever() -> None:
    """Else caches of an earlier version would all be refused, as if the data were augmented."""
    got = fingerprint([torch.arange(1.0, 4.0)[None]])[0, 0]
    assert got.tolist() == pytest.approx([0, 6, -6, -2, 0, -2, -6, -2, 0.0005 * 14**0.5])


def test_several_inputs(tmp_path: Path) -> None:
    cache, a, b = OutputCache(tmp_path, 4, "t"), 100 * torch.randn(2, 5), torch.tensor([1, 2])
    cache.store([0, 1], [a, b], torch.zeros(2))
    assert cache.lookup([1], [a[1:], b[1:]]) is not None
    with pytest.raises(CacheError, match="sample 0's input differs"):
        cache.lookup([1, 0], [a[[1, 0]], torch.tensor([2, 3])])
    with pytest.raises(CacheError, match=r"with 2 inputs .* now with 1"):
        cache.lookup([0], [a[:1]])
    with pytest.raises(CacheError, match="inputs 2, expected 1"):
        cache.store([0], [a[:1]], torch.zeros(1))


def test_other_length_of_the_data_set(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(CacheError, match=r"samples 20, expected 21.*can be deleted"):
        OutputCache(tmp_path, 21, "t")


def test_other_outputs(tmp_path: Path) -> None:
    cache, x, y = filled(tmp_path)
    with pytest.raises(CacheError, match=r"shape \[10\], expected \[9\].*can be deleted"):
        cache.store([9], [x[:1]], y[:1, :9])
    with pytest.raises(CacheError, match=r"dtype float32, expected bfloat16.*can be deleted"):
        cache.store([9], [x[:1]], y[:1].bfloat16())
    with pytest.raises(CacheError, match="got 2 for 1 samples"):
        cache.store([9], [x[:1]], y[:2])
    assert cache.lookup([9], [x[:1]]) is None


def test_outputs_without_numbers(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="empty"):
        OutputCache(tmp_path, 2, "t").store([0], [torch.zeros(1, 2)], torch.zeros(1, 0))
    assert not list(tmp_path.glob("t/*"))


@pytest.mark.parametrize("index", [20, -1, 10**9])
def test_index_out_of_range(tmp_path: Path, index: int) -> None:
    cache, x, y = filled(tmp_path)
    with pytest.raises(IndexError, match=f"sample {index} is not in a data set of 20 samples"):
        cache.lookup([index], [x[:1]])
    with pytest.raises(IndexError, match=f"sample {index} is not in a data set of 20 samples"):
        cache.store([index], [x[:1]], y[:1])


@pytest.mark.parametrize("inputs", [[], [torch.zeros(())], [torch.zeros(2, 3), torch.zeros(1, 3)]])
def test_inputs_without_a_batch(tmp_path: Path, inputs: list[Tensor]) -> None:
    with pytest.raises(CacheError, match=r"whose first dim is the batch: 2 samples.*use cache=None"):
        OutputCache(tmp_path, 20, "t").lookup([0, 1], inputs)


@pytest.mark.parametrize(("samples", "teacher"), [(0, "t"), (-1, "t"), (3, ""), (3, "../up"), (3, "a/b"), (3, ".")])
def test_arguments(tmp_path: Path, samples: int, teacher: str) -> None:
    with pytest.raises(ValueError, match="`samples` must be" if samples < 1 else "`teacher` must be"):
        OutputCache(tmp_path, samples, teacher)


def altered(text: str, **fields: Any) -> str:
    return json.dumps(json.loads(text) | fields)


DAMAGE: dict[str, Callable[[str], str]] = {
    "cut off": lambda text: text[:20],
    "empty": lambda text: "",
    "list": lambda text: "[1]",
    "other keys": lambda text: '{"format": 1}',
    "no such dtype": lambda text: altered(text, dtype="float3"),
    "no dtype": lambda text: altered(text, dtype="nn"),
    "shape": lambda text: altered(text, shape="abc"),
    "inputs": lambda text: altered(text, inputs=0),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_description(tmp_path: Path, damage: Callable[[str], str]) -> None:
    filled(tmp_path)
    path = tmp_path / "t" / "cache.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(CacheError, match=r"cache\.json is damaged; delete .*t and the outputs are computed again"):
        OutputCache(tmp_path, 20, "t")


def test_other_format(tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / "t" / "cache.json"
    path.write_text(altered(path.read_text(), format=99))
    with pytest.raises(CacheError, match="format 99, expected 1"):
        OutputCache(tmp_path, 20, "t")


@pytest.mark.parametrize("name", ["outputs.bin", "records.bin"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    filled(tmp_path)
    path = tmp_path / "t" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match=f"{name} is damaged: it has .* bytes instead of"):
        OutputCache(tmp_path, 20, "t")
    path.unlink()
    with pytest.raises(CacheError, match="it has 0 bytes"):
        OutputCache(tmp_path, 20, "t")


@pytest.mark.parametrize("moment", ["_write", "_mark"])
def test_killed_before_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    cache, x, y = filled(tmp_path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            cache.store([8, 9], [x[:2] + 1], y[:2])
    cache = OutputCache(tmp_path, 20, "t")
    assert cache.lookup([8], [x[:1] + 1]) is None
    assert cache.lookup([8], [x[:1] + 2]) is None  # no claim about its input either
    assert cache.lookup(range(8), [x]) is not None
    cache.store([8, 9], [x[:2] + 1], y[:2])
    got = cache.lookup([9], [x[1:2] + 1])
    assert got is not None
    assert torch.equal(got, y[1:2])


@pytest.mark.parametrize("name", ["outputs.bin", "records.bin"])
def test_power_cut_that_loses_data_but_not_the_mark(tmp_path: Path, name: str) -> None:
    cache, x, y = filled(tmp_path)
    path = tmp_path / "t" / name
    data = bytearray(path.read_bytes())
    row = len(data) // 20
    data[3 * row : 3 * row + 16] = bytes(16)
    path.write_bytes(data)
    cache = OutputCache(tmp_path, 20, "t")
    assert cache.lookup([3], [x[3:4]]) is None
    assert cache.lookup([2, 4], [x[[2, 4]]]) is not None
    cache.store(range(8), [x], y)
    got = cache.lookup(range(8), [x])
    assert got is not None
    assert torch.equal(got, y)


def test_killed_while_the_files_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lightning_compress.distill.cache.write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            filled(tmp_path)
    assert OutputCache(tmp_path, 20, "t").lookup([0], [images()[:1]]) is None
    cache, x, _ = filled(tmp_path)
    assert cache.lookup(range(8), [x]) is not None


def test_files_are_made_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two processes that both find nothing would empty each other's files."""
    held = []

    def write(path: Path, data: str) -> None:
        with pytest.raises(Timeout):
            FileLock(tmp_path / "t" / "cache.lock").acquire(timeout=0)
        held.append(path)
        write_atomic(path, data)

    monkeypatch.setattr("lightning_compress.distill.cache.write_atomic", write)
    filled(tmp_path)
    assert held == [tmp_path / "t" / "cache.json"]
    FileLock(tmp_path / "t" / "cache.lock").acquire(timeout=0).lock.release()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(CacheError, match=r"cannot make .*outputs\.bin of 0 MiB: .*No space left on device"):
        filled(tmp_path)


WRITER = """
import sys, torch
from lightning_compress.distill.cache import OutputCache
folder, rank = sys.argv[1], int(sys.argv[2])
cache = OutputCache(folder, 400, "t")
print("ready", flush=True)
sys.stdin.read()  # until both are here
for start in range(0, 400, 20):
    indices = list(range(start, start + 20))[rank * 8 : rank * 8 + 12]  # four are of both
    x = torch.tensor(indices, dtype=torch.float32)[:, None] * torch.ones(5) + torch.arange(5.0)
    if cache.lookup(indices, [x]) is None:
        cache.store(indices, [x], x.bfloat16())
"""


def test_two_processes(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    assert not (tmp_path / "t" / "cache.json").exists()  # making the files is part of the race
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.close()
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    x = torch.arange(400.0)[:, None] * torch.ones(5) + torch.arange(5.0)
    got = OutputCache(tmp_path, 400, "t").lookup(range(400), [x])
    assert got is not None
    assert torch.equal(got, x.bfloat16())


def test_files_made_by_another_process_are_found(tmp_path: Path) -> None:
    late = OutputCache(tmp_path, 20, "t")
    early = OutputCache(tmp_path, 20, "t")
    x, y = images(), torch.randn(8, 10)
    early.store(range(4), [x[:4]], y[:4])
    late.store(range(4, 8), [x[4:]], y[4:])
    for cache in (early, late, OutputCache(tmp_path, 20, "t")):
        got = cache.lookup(range(8), [x])
        assert got is not None
        assert torch.equal(got, y)
    third = OutputCache(tmp_path, 20, "u")
    OutputCache(tmp_path, 20, "u").store([0], [x[:1]], y[:1])
    assert third.lookup([0], [x[:1]]) is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu(tmp_path: Path) -> None:
    cache, x, y = filled(tmp_path)
    got = cache.lookup(range(8), [x.cuda()])
    assert got is not None
    assert got.is_cuda
    assert torch.equal(got.cpu(), y)
    cache.store([8], [x[:1].cuda()], y[:1].cuda())
    assert cache.lookup([8], [x[:1]]) is not None


class Extra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"scale": self.in_features}

    def set_extra_state(self, state: Any) -> None:
        del state


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, **options), nn.BatchNorm2d(4))


def test_digest_tells_weights_apart() -> None:
    changed, buffer, half = net(), net(), net()
    with torch.no_grad():
        changed[0].weight[0, 0, 0, 0] += 1e-6
        buffer[1].num_batches_tracked += 1
    half[0].bfloat16()
    reshaped = nn.Sequential(nn.Conv2d(1, 4, (1, 9)), nn.BatchNorm2d(4))
    reshaped.load_state_dict(
        {
            k: v.view(w.shape)
            for (k, v), w in zip(net().state_dict().items(), reshaped.state_dict().values(), strict=True)
        }
    )
    named = nn.ModuleDict({"a": net()[0], "b": net()[1]})
    nets = [net(), changed, buffer, half, reshaped, named, Extra(2, 2), nn.Sequential()]
    digests = [weights_digest(one) for one in nets]
    assert len(set(digests)) == len(nets)
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)


def test_digest_tells_dtypes_of_the_same_bits_apart() -> None:
    zeros = [nn.BatchNorm2d(2, affine=False).to(dtype) for dtype in (torch.float16, torch.bfloat16)]
    for one in zeros:
        one.running_var.zero_()
    assert weights_digest(zeros[0]) != weights_digest(zeros[1])


def test_digest_of_the_same_weights() -> None:
    same = net().to(memory_format=torch.channels_last).eval().requires_grad_(False)
    assert weights_digest(same) == weights_digest(net())


def test_digest_is_a_name_for_a_cache(tmp_path: Path) -> None:
    OutputCache(tmp_path, 1, weights_digest(net())).store([0], [torch.zeros(1, 1)], torch.zeros(1, 1))
