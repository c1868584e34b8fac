"""The report: what a compression came to, measured on the saved file itself, dense and compressed in one run."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.artifact import load_compressed, save_compressed
from lightning_compress.callbacks.capture import capture, find_network
from lightning_compress.callbacks.comparison import blank, budget_rows, environment, layer_rows
from lightning_compress.callbacks.evaluation import evaluate, from_rank_zero
from lightning_compress.callbacks.logs import begin_curves, log_costs, log_results
from lightning_compress.calls import Call, batch_size, resize_batch
from lightning_compress.deployment import Deployed, RuntimeNetwork, compare_deployed, deploy, missing_packages
from lightning_compress.edits import Edit, Quantize, history, rewind_edits, skeleton
from lightning_compress.exporting import ExportError
from lightning_compress.footprint import measure
from lightning_compress.latency import BATCH_SIZES, compare_latency
from lightning_compress.quiet import without_observers
from lightning_compress.results import Metric, Results
from lightning_compress.waiting import show_waiting
from lightning_compress.wording import did_you_mean

__all__ = ["CompressionReport"]


class CompressionReport(L.Callback):
    """Save the compressed network at the end of training, measure what was saved, and say how it compares.

    Beside any compression callback: before the first edit it keeps a copy of the dense network and takes its metric;
    at the end of `fit` it writes the artifact, loads it again into a dense structure without weights, and measures
    both networks in turn on the same inputs. It prints a table, writes `results.json` and hands the final figures to
    the loggers, which also hear what the network costs before the first edit and after each. Where nothing was
    compressed it reports the dense network alone.

    "Dense" is the network as it was just before its first edit; the table says in which epoch that was. A run that is
    resumed after that has its metric from the checkpoint, and its structure, but no longer its weights.

    Args:
        path: the artifact to write; its folder is made if need be.
        metric: name of a validation metric, as the LightningModule logs it; None for none.
        results: the file for the results, relative to the folder of `path`.
        latency: time both networks.
        batch_sizes: the batch sizes to time.
        network: dotted name of the network inside the LightningModule; by default it is found.
        table: print the tables.
        onnx: also write both networks as ONNX, check them, and time them in ONNX Runtime; None: if the network is
            quantized, for in torch it is no faster.

    Raises:
        ValueError: an argument that cannot be right.

    Example:
        >>> CompressionReport("out/net.safetensors", metric="val/acc").results_path.as_posix()
        'out/results.json'
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "compressed.safetensors",
        metric: str | None = None,
        results: str = "results.json",
        latency: bool = True,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        network: str | None = None,
        table: bool = True,
        onnx: bool | None = None,
    ) -> None:
        """Check the arguments."""
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"`path` must name the file of the artifact, e.g. 'compressed.safetensors', got {path!r}")
        self.path = Path(path)
        self.results_path = self.path.parent / results
        for name, file in (("path", self.path), ("results", self.results_path)):
            if not file.name or file.is_dir():
                raise ValueError(f"`{name}` must name a file, got {os.fspath(file)!r}")
        if self.path == self.results_path:
            raise ValueError(f"`path` and `results` must differ, got {os.fspath(self.path)!r} for both")
        if metric is not None and (not isinstance(metric, str) or not metric):
            raise ValueError(f"`metric` must be the name of a logged metric or None, got {metric!r}")
        sizes = tuple(batch_sizes)
        if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
            raise ValueError(f"`batch_sizes` must be integers of at least 1, got {batch_sizes!r}")
        self.metric, self.latency, self.batch_sizes = metric, latency, sizes
        if onnx not in (None, True, False):
            raise ValueError(f"`onnx` must be true, false or null, got {onnx!r}")
        self.network, self.table, self.onnx = network, table, onnx
        self.results: Results | None = None
        self._frozen: dict[str, str] = {}
        self._first: dict[str, Any] = {}  # where the first edit was made, and the dense network's metric there
        self._dense: nn.Module | None = None
        self._calls: tuple[Call, ...] = ()
        self._captured = ""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a metric that no validation can give; make the folder."""
        if stage != "fit":
            return
        show_waiting(trainer.progress_bar_callback is not None)
        if self.onnx and (missing := missing_packages()):
            raise MisconfigurationException(
                f"onnx=True needs packages that are not installed ({', '.join(missing)}): "
                'pip install "lightning-compress[export]"'
            )
        self._calls = ()
        if self.metric is not None and not trainer.enable_validation:
            raise MisconfigurationException(
                f"metric={self.metric!r} needs validation, and there is none: define `validation_step`, give "
                "validation data and leave `limit_val_batches` above 0, or set metric=None"
            )
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.results_path.parent.mkdir(parents=True, exist_ok=True)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """What comes after the run is not of its progress bar."""
        show_waiting(True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record how the network is called; check on one batch that the metric is there."""
        self._capture(trainer, pl_module, find_network(pl_module, self.network))
        if not history(pl_module.get_submodule(self._captured)):
            self._first, self._frozen, self._dense = {}, {}, None  # of an earlier fit, of another network
        if self.metric is not None:
            self._evaluate(trainer, pl_module, self._copy(pl_module.get_submodule(self._captured)), batches=1)
        if trainer.is_global_zero:
            begin_curves(trainer, *([] if self.metric is None else [self.metric]))
        self._log_costs(trainer, pl_module)

    def before_edits(self, trainer: L.Trainer, pl_module: L.LightningModule, network_path: str) -> None:
        """Before the first edit: keep the dense network, and take its metric."""
        if self._first:
            return
        self._capture(trainer, pl_module, network_path)
        network = pl_module.get_submodule(network_path)
        self._first = {"epoch": trainer.current_epoch, "step": trainer.global_step, "metric": None}
        if not history(network):
            self._dense = self._copy(network)
            if self.metric is not None:
                from_rank_zero(trainer, self._dense)
                self._first["metric"] = self._evaluate(trainer, pl_module, self._dense)

    def after_edits(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        network_path: str,
        edits: Sequence[Edit],
        frozen: Mapping[str, str],
    ) -> None:
        """Note what could not be cut; tell the loggers what the network costs now."""
        self._frozen = dict(frozen)
        self._log_costs(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the artifact, measure it, and report."""
        if not self._calls:  # a run that had finished before: there was no training to listen to
            pl_module.to(trainer.strategy.root_device)
            self._capture(trainer, pl_module, find_network(pl_module, self.network))
            pl_module.cpu()
        network = pl_module.get_submodule(self._captured)
        dense = self._dense or self._copy(network)
        rewind_edits(dense)
        compressed = None
        if trainer.is_global_zero:
            save_compressed(network, self.path)
        if history(network):
            first = trainer.is_global_zero
            compressed = load_compressed(self.path, blank(dense)) if first else self._copy(network)
            from_rank_zero(trainer, compressed)
        metric = self._metric(trainer, pl_module, dense, compressed)
        if trainer.is_global_zero:
            self.results = self._measure(trainer, dense, compressed, metric)
            self.results.save(self.results_path)  # whatever comes of other files
            self.results = replace(self.results, deployed=self._deployed(trainer, pl_module, dense, compressed))
            self.results.save(self.results_path)
            self._tell(trainer, self.results)
        self._dense = None
        trainer.strategy.barrier("compression report")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run can no longer find out."""
        return {"first": dict(self._first), "frozen": dict(self._frozen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._first, self._frozen = dict(state_dict["first"]), dict(state_dict["frozen"])

    def _capture(self, trainer: L.Trainer, pl_module: L.LightningModule, path: str) -> None:
        if self._calls and path == self._captured:
            return
        captured = capture(trainer, pl_module, path)
        calls = resize_batch(captured.calls, min(batch_size(captured.calls), max(self.batch_sizes)))
        self._captured, self._calls = captured.path, tuple(call.map(Tensor.cpu) for call in calls)

    def _log_costs(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and trainer.loggers:
            network = self._copy(pl_module.get_submodule(self._captured)).to(trainer.strategy.root_device)
            log_costs(trainer, measure(network, self._calls))

    def _copy(self, network: nn.Module) -> nn.Module:
        with without_observers(network):
            return skeleton(network, lambda tensor: tensor.cpu().clone())

    def _evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, network: nn.Module, batches: int | None = None
    ) -> float:
        values = evaluate(trainer, pl_module, self._captured, network, batches=batches)
        if self.metric not in values:
            raise MisconfigurationException(
                f"metric={self.metric!r} is not logged in validation by {type(pl_module).__name__}; "
                f"it logs {', '.join(values) or 'nothing'}{did_you_mean(self.metric, values)}"
            )
        return values[self.metric]

    def _metric(
        self, trainer: L.Trainer, pl_module: L.LightningModule, dense: nn.Module, compressed: nn.Module | None
    ) -> Metric | None:
        if self.metric is None:
            return None
        if compressed is None:
            return Metric(self.metric, self._evaluate(trainer, pl_module, dense), None)
        value = self._evaluate(trainer, pl_module, compressed)
        before = self._first.get("metric")
        if before is None:
            return Metric(
                self.metric, None, value, "the network had been cut before this run, its dense metric is unknown"
            )
        when = f"dense is the network before its first edit, in epoch {self._first['epoch']}"
        return Metric(self.metric, before, value, f"{when}; compressed is the reloaded file")

    def _measure(
        self, trainer: L.Trainer, dense: nn.Module, compressed: nn.Module | None, metric: Metric | None
    ) -> Results:
        device = trainer.strategy.root_device
        sides = {"dense": dense} | ({} if compressed is None else {"compressed": compressed})
        for side in sides.values():
            side.to(device)
        footprints = {name: measure(side, self._calls) for name, side in sides.items()}
        if self.latency:
            times = compare_latency({name: (side, self._calls) for name, side in sides.items()}, self.batch_sizes)
            footprints = {name: replace(footprint, latency=times[name]) for name, footprint in footprints.items()}
        large, small = footprints["dense"], footprints.get("compressed")
        if small is not None:
            small = replace(small, bytes=self.path.stat().st_size)
            if self._dense is None:  # the structure is known, the values are not
                large = replace(large, nonzero=None)
        return Results(
            dense=large,
            compressed=small,
            metric=metric,
            layers=() if compressed is None or small is None else layer_rows(dense, compressed, large, small),
            frozen=self._frozen,
            budgets=() if small is None else budget_rows(trainer, large, small),
            edits=dict(Counter(edit.origin or edit.kind for edit in history(compressed or dense))),
            artifact=os.path.relpath(self.path, self.results_path.parent),
            network=self._captured,
            environment=environment(trainer),
        )

    def _deployed(
        self, trainer: L.Trainer, pl_module: L.LightningModule, dense: nn.Module, compressed: nn.Module | None
    ) -> dict[str, Deployed]:
        """What `_deploy` finds, if it is wanted; where nobody has asked for it, what cannot be done is said."""
        quantized = compressed is not None and any(isinstance(edit, Quantize) for edit in history(compressed))
        if not (quantized if self.onnx is None else self.onnx):
            return {}
        try:
            return self._deploy(trainer, pl_module, dense, compressed)
        except (ExportError, ImportError) as error:
            if self.onnx:
                raise
            rank_zero_warn(f"CompressionReport writes no ONNX files, and has no figures of a runtime: {error}")
            return {}

    def _deploy(
        self, trainer: L.Trainer, pl_module: L.LightningModule, dense: nn.Module, compressed: nn.Module | None
    ) -> dict[str, Deployed]:
        """Both networks as ONNX files; what they cost, and what the compressed one is worth there."""
        if len(self._calls) != 1:
            raise ExportError(f"a training step calls the network {len(self._calls)} times, and a file is of one call")
        files = {"compressed": self.path.with_suffix(".onnx"), "dense": self.path.with_suffix(".dense.onnx")}
        sides = {"dense": dense} | ({} if compressed is None else {"compressed": compressed})
        if compressed is None:
            files["dense"] = files["compressed"]
        found = {name: (deploy(side, files[name], self._calls[0]), files[name]) for name, side in sides.items()}
        deployed = {name: own for name, (own, _) in found.items()}
        if self.latency:
            deployed = compare_deployed(found, self._calls, self.batch_sizes)
        if self.metric is not None and compressed is not None and self._captured and trainer.world_size == 1:
            value = self._evaluate(trainer, pl_module, RuntimeNetwork(files["compressed"]))
            deployed["compressed"] = replace(deployed["compressed"], metric=value)
        return deployed

    def _tell(self, trainer: L.Trainer, results: Results) -> None:
        log_results(trainer, results)
        if self.table:
            from rich.console import Console

            from lightning_compress.tables import comparison_table, layer_table

            console = Console()
            if results.layers or results.frozen:
                console.print(layer_table(results))
            console.print(comparison_table(results))
