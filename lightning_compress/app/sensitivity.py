"""`lightning-compress-sensitivity`: what each layer of a trained network is worth, before one decides what to cut."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_compress.app.build import make_data, make_trainer
from lightning_compress.app.dense import dense_task
from lightning_compress.app.hints import print_hints
from lightning_compress.app.jobs import write_json
from lightning_compress.app.offers import offer_networks, offer_sweepers
from lightning_compress.app.train import JobError, quieten, require_numbers
from lightning_compress.calls import as_calls
from lightning_compress.coupling import Coupling, Group, trace_coupling
from lightning_compress.methods.criteria import score_channels
from lightning_compress.methods.sensitivity import measure_sensitivity, without_worst
from lightning_compress.waiting import following, show_waiting
from lightning_compress.wording import require_choice

__all__ = ["layer_sensitivity", "main"]

log = logging.getLogger(__name__)


def main() -> None:
    """The console script."""
    offer_networks(sys.argv[1:])
    offer_sweepers()
    try:
        _hydra_main()
    except SystemExit as ended:  # Hydra has said what is wrong
        if ended.code:
            print_hints(sys.argv[1:], "sensitivity")
        raise


@hydra.main(version_base="1.3", config_path="pkg://lightning_compress.conf", config_name="sensitivity")
def _hydra_main(config: DictConfig) -> None:
    try:
        _run(config, Path(HydraConfig.get().runtime.output_dir))
    except (ValueError, OSError, ModuleNotFoundError, MisconfigurationException) as error:
        raise JobError(str(error)) from error


def _run(config: DictConfig, folder: Path) -> None:
    quieten()
    settings = config.sensitivity
    require_numbers(config, "seed", "dense.max_epochs")
    if not OmegaConf.is_list(settings.shares):
        raise ValueError(f"`sensitivity.shares` must be a list, e.g. [0.25, 0.5], got {settings.shares!r}")
    data = make_data(config)
    task = dense_task(config, data)
    show_waiting(bool(config.trainer.enable_progress_bar))
    rows = layer_sensitivity(
        task,
        data,
        make_trainer(config, logger=False, enable_checkpointing=False, enable_progress_bar=False),
        metric=config.report.metric,
        criterion=settings.criterion,
        shares=list(settings.shares),
    )
    write_json(folder / "sensitivity.json", {"metric": config.report.metric, "rows": rows})
    Console().print(_table(rows, config.report.metric))
    log.info("results: %s", folder / "sensitivity.json")


def layer_sensitivity(
    task: L.LightningModule,
    data: L.LightningDataModule,
    trainer: L.Trainer,
    metric: str = "val/acc",
    criterion: str = "l2",
    shares: Sequence[float] = (0.25, 0.5, 0.75),
) -> list[dict[str, Any]]:
    """What a network loses when a share of one layer's channels is zero, layer by layer (Li et al. 2017).

    The network is as it was afterwards. Nothing is refitted: what pruning itself would lose is less.

    Args:
        task: a LightningModule with a network `net` in it.
        data: with a validation set.
        trainer: runs the validation.
        metric: that the task logs there.
        criterion: what tells the worst channels; one that needs no gradients.
        shares: of a layer's channels that are taken out.

    Returns:
        For each layer: `layer`, `channels`, `macs` (fraction of the network's that would be saved were it halved), and
        for each share in turn `error` (of the outputs, relative; see `measure_sensitivity`) and `metric` (the
        difference to the whole network's).

    Raises:
        ValueError: a share out of range; an unknown criterion, or one that needs gradients; the metric is not logged.

    Example:
        >>> from lightning_compress.zoo import Digits, ImageClassifier, LeNet300100
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = L.Trainer(accelerator="cpu", **quiet)
        >>> rows = layer_sensitivity(ImageClassifier(LeNet300100(image_size=8), 10), Digits(), trainer, shares=[0.5])
        >>> [(row["layer"], row["channels"]) for row in rows]
        [('1', 300), ('3', 100)]
    """
    for share in shares:
        if not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"`sensitivity.shares` must be fractions of a layer's channels in (0, 1), got {share!r}")
    task.eval()
    data.prepare_data()
    data.setup("fit")
    images, _ = next(iter(data.train_dataloader()))
    calls = as_calls(images)
    coupling = trace_coupling(task.get_submodule("net"), calls)
    scores = score_channels(coupling, criterion)
    whole = _validated(task, data, trainer, metric)
    errors = [measure_sensitivity(coupling, scores, calls, share) for share in shares]
    rows = []
    for number, group in following(enumerate(coupling.groups), "validating without channels of a layer"):
        own = scores[group.classes]
        rows.append(
            {
                "layer": group.name,
                "channels": len(own),
                "macs": _saved(coupling, group),
                "error": [float(error[number]) for error in errors],
                "metric": [
                    _validated(task, data, trainer, metric, without_worst(coupling, group, own, share)) - whole
                    for share in shares
                ],
                "shares": list(shares),
            }
        )
    return rows


def _saved(coupling: Coupling, group: Group) -> float:
    mask = coupling.nothing_cut()
    dense = coupling.macs(mask)
    mask[group.classes[: len(group.classes) // 2]] = True
    return 1 - coupling.macs(mask) / dense


def _validated(
    task: L.LightningModule,
    data: L.LightningDataModule,
    trainer: L.Trainer,
    metric: str,
    replaced: dict[str, torch.Tensor] | None = None,
) -> float:
    """The metric with other values in some of the network's parameters."""
    parameters = dict(task.get_submodule("net").named_parameters(remove_duplicate=False))
    kept = {name: parameters[name].detach().clone() for name in replaced or {}}
    try:
        with torch.no_grad():
            for name, value in (replaced or {}).items():
                parameters[name].copy_(value)
        [values] = trainer.validate(task, data, verbose=False)
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)
    if metric not in values:
        require_choice("report.metric", metric, values)
    return float(values[metric])


def _table(rows: Sequence[dict[str, Any]], metric: str) -> Table:
    shares = rows[0]["shares"] if rows else []
    table = Table(title="each layer alone, without the worst of its channels", title_justify="left")
    table.add_column("layer", overflow="fold")
    for column in ("channels", "MACs, halved", *(f"{metric}, −{share:.0%}" for share in shares)):
        table.add_column(column, justify="right")
    table.add_column(f"error, −{shares[len(shares) // 2]:.0%}" if shares else "error", justify="right")
    for row in rows:
        middle = row["error"][len(shares) // 2]
        table.add_row(
            row["layer"],
            str(row["channels"]),
            f"{-row['macs']:+.1%}",
            *(f"{value:+.4f}" for value in row["metric"]),
            f"{middle:.3f}" if np.isfinite(middle) else "",
        )
    return table


if __name__ == "__main__":
    main()
