"""What a run came to, as it is written to `results.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress.deployment import Deployed
from lightning_compress.files import write_atomic
from lightning_compress.footprint import Footprint
from lightning_compress.latency import Spread

__all__ = ["BudgetRow", "LayerRow", "Metric", "Quantity", "Results", "ResultsError"]

FORMAT = 1


class ResultsError(ValueError):
    """A file that is not the results of a run."""


@dataclass(frozen=True)
class Metric:
    """The metric that was asked for, on the validation data.

    Attributes:
        name: as the LightningModule logs it.
        dense: its value before anything was cut; None where `note` says why.
        compressed: its value for the reloaded artifact; None where nothing was compressed.
        note: when the dense value was taken, or why there is none.
    """

    name: str
    dense: float | None
    compressed: float | None
    note: str = ""


@dataclass(frozen=True)
class LayerRow:
    """What became of one tensor.

    Attributes:
        tensor: its name.
        before: its dense shape; None if it is new.
        after: its shape now; None if it is gone.
        macs_before: multiply-accumulates of its module, dense.
        macs_after: the same, compressed.
    """

    tensor: str
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class BudgetRow:
    """What was asked for and what was reached.

    Attributes:
        callback: the class of the callback that had the budget.
        unit: what is limited, `macs` for example.
        requested: as given: a fraction of the dense network, or an absolute number.
        reached: in the same terms; None where it was not measured.
    """

    callback: str
    unit: str
    requested: float
    reached: float | None


@dataclass(frozen=True)
class Quantity:
    """One line of the comparison.

    Attributes:
        key: a flat name for loggers.
        label: a name for people.
        kind: `metric`, `count`, `plain` (a number that is no cost), `bytes`, `ms` or `fraction`.
        dense: the value before.
        compressed: the value now.
        dense_range: lowest and highest of repeated measurements.
        compressed_range: the same, compressed.
    """

    key: str
    label: str
    kind: str
    dense: float | None
    compressed: float | None = None
    dense_range: tuple[float, float] | None = None
    compressed_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Results:
    """Everything that a report knows.

    Attributes:
        dense: the footprint before anything was cut.
        compressed: the footprint of the reloaded artifact; None where nothing was compressed.
        metric: the metric that was named, if one was.
        layers: the tensors that changed shape.
        frozen: tensor location -> why it was never cut.
        budgets: requested against reached.
        edits: method -> how many edits it made.
        artifact: the name of the artifact's file, in the same folder unless it says otherwise.
        network: dotted name of the network in the LightningModule; empty if it is the module itself.
        deployed: `dense` and `compressed` -> the network as an ONNX file; empty where none was written.
        environment: versions, seed, threads, load, device, date.

    Example:
        >>> dense = Footprint(params=10, nonzero=10, macs=40, bytes=200, peak_memory=50)
        >>> small = Footprint(params=5, nonzero=5, macs=10, bytes=100, peak_memory=50)
        >>> results = Results(dense, small)
        >>> results.figures()["ratio/macs"]
        0.25
        >>> Results.from_json(results.to_json()) == results
        True
    """

    dense: Footprint
    compressed: Footprint | None = None
    metric: Metric | None = None
    layers: Sequence[LayerRow] = ()
    frozen: Mapping[str, str] = field(default_factory=dict)
    budgets: Sequence[BudgetRow] = ()
    edits: Mapping[str, int] = field(default_factory=dict)
    artifact: str = ""
    network: str = ""
    deployed: Mapping[str, Deployed] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the results as JSON; the file appears whole or not at all.

        Args:
            path: the file, in a folder that exists; an older file is replaced.
        """
        write_atomic(path, json.dumps(self.to_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read what `save` wrote.

        Raises:
            ResultsError: no such file, or its contents are something else.
        """
        name = os.fspath(path)
        try:
            data = json.loads(Path(path).read_text("utf-8"))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ResultsError(f"there is no file {name!r}") from error
        except ValueError as error:
            raise ResultsError(f"{name!r} is not JSON: {error}") from error
        found = data.get("format") if isinstance(data, dict) else None
        if found != FORMAT:
            raise ResultsError(f"{name!r} is not the results of a run: expected format {FORMAT}, got {found!r}")
        try:
            return cls.from_json(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ResultsError(f"{name!r} is damaged: {error!r}") from error

    def to_json(self) -> dict[str, Any]:
        """The results as JSON data."""
        compressed = None if self.compressed is None else self.compressed.to_json()
        return {
            "format": FORMAT,
            **asdict(self),
            "dense": self.dense.to_json(),
            "compressed": compressed,
            "deployed": {side: deployed.to_json() for side, deployed in self.deployed.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Results:
        """The inverse of `to_json`."""
        compressed, metric = data["compressed"], data["metric"]
        layers = [{**row, "before": _shape(row["before"]), "after": _shape(row["after"])} for row in data["layers"]]
        return cls(
            dense=Footprint.from_json(data["dense"]),
            compressed=None if compressed is None else Footprint.from_json(compressed),
            metric=None if metric is None else Metric(**metric),
            layers=tuple(LayerRow(**row) for row in layers),
            budgets=tuple(BudgetRow(**row) for row in data["budgets"]),
            deployed={side: Deployed.from_json(own) for side, own in data["deployed"].items()},
            **{name: data[name] for name in ("frozen", "edits", "artifact", "network", "environment")},
        )

    def figures(self) -> dict[str, float]:
        """The final numbers under flat names, for a logger: `dense/macs`, `compressed/macs`, `ratio/macs` and so on.

        Latencies are medians in milliseconds. A ratio is compressed / dense; for the metric it is the difference.
        """
        figures: dict[str, float] = {}
        for quantity in self.quantities():
            key, dense, compressed = quantity.key, quantity.dense, quantity.compressed
            figures |= {} if dense is None else {f"dense/{key}": dense}
            figures |= {} if compressed is None else {f"compressed/{key}": compressed}
            if dense is not None and compressed is not None:
                if quantity.kind == "metric":
                    figures[f"difference/{key}"] = compressed - dense
                elif quantity.kind not in ("fraction", "plain") and dense:
                    figures[f"ratio/{key}"] = compressed / dense
        return figures

    def quantities(self) -> list[Quantity]:
        """What is compared, line by line."""
        dense, small = self.dense, self.compressed
        lines = []
        if self.metric is not None:
            metric = self.metric
            lines.append(Quantity("metric", metric.name, "metric", metric.dense, metric.compressed))
        for key, label, kind in (
            ("params", "parameters", "count"),
            ("macs", "MACs per sample", "count"),
            ("bytes", "size on disk", "bytes"),
            ("peak_memory", "peak memory, batch 1", "bytes"),
            ("sparsity", "zeros that are stored", "fraction"),
        ):
            lines.append(Quantity(key, label, kind, getattr(dense, key), getattr(small, key, None)))
        for size, before in dense.latency.items():
            after = None if small is None else small.latency.get(size)
            new_wall, new_cpu = (None, None) if after is None else (after.wall, after.cpu)
            threads = f"{before.threads} thread{'s' if before.threads > 1 else ''}"
            lines.append(_times(f"latency_b{size}", f"latency, batch {size}, {threads}", before.wall, new_wall))
            lines.append(_times(f"cpu_time_b{size}", f"CPU time, batch {size}, 1 thread", before.cpu, new_cpu))
        return lines + self._deployed_quantities()

    def _deployed_quantities(self) -> list[Quantity]:
        dense, small = self.deployed.get("dense"), self.deployed.get("compressed")
        if dense is None:
            return []
        lines = []
        if self.metric is not None and small is not None and small.metric is not None:
            name = f"{self.metric.name}, in ONNX Runtime"
            lines.append(Quantity("onnx_metric", name, "metric", self.metric.dense, small.metric))
        for key, label, kind in (
            ("bytes", "ONNX file", "bytes"),
            ("integer_layers", f"layers on integers, of {(small or dense).layers}", "plain"),
        ):
            lines.append(Quantity(f"onnx_{key}", label, kind, getattr(dense, key), getattr(small, key, None)))
        for size, before in dense.latency.items():
            after = None if small is None else small.latency.get(size)
            label = f"ONNX Runtime, batch {size}, 1 thread"
            lines.append(_times(f"onnx_latency_b{size}", label, before.wall, None if after is None else after.wall))
        return lines


def _times(key: str, label: str, old: Spread, new: Spread | None) -> Quantity:
    after = (None, None) if new is None else (new.median, (new.low, new.high))
    return Quantity(key, label, "ms", old.median, after[0], (old.low, old.high), after[1])


def _shape(value: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value)
