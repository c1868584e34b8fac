"""Every command that README, documentation and help texts show can be typed as it stands there."""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import ConfigCompositionException
from PIL import Image

from lightning_compress.app.offers import offer_networks, offer_sweepers
from tests.app.test_conf import unbound

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
HELP = sorted(ROOT.glob("conf/hydra/help/*.yaml"))
ARGPARSE = {  # where the options of a command are
    "lightning-compress-dashboard": "lightning_compress.app.dashboard.command",
    "lightning-compress-wandb-report": "lightning_compress.app.wandb_report",
}
OTHERS = {"apt", "apt-get", "cd", "git", "pytest", "source", "sudo", "wandb", ".venv/bin/pre-commit", "."}
TINY = (
    *("dense.max_epochs=1", "trainer.max_epochs=3", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"),
    *(
        "trainer.limit_test_batches=1",
        "trainer.enable_progress_bar=false",
        "data.batch_size=32",
        "report.latency=false",
    ),
)


def shown(page: Path) -> list[str]:
    """The lines of a page's shell blocks, or of a help text, that are commands."""
    text = page.read_text()
    if page in HELP:
        lines = re.findall(r"^    (lightning-compress\S* *.*)$", text, re.MULTILINE)
        return [re.split(r" {2,}", line)[0] for line in lines if "..." not in line]
    blocks = re.findall(r"^ *```(?:bash|sh|shell|console)[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def commands(page: Path) -> Iterator[list[str]]:
    """Each command of a page, in words, without what stands before it for the environment."""
    for line in shown(page):
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "|", ";"):
                if command:
                    yield command
                command = []
            elif command or not re.fullmatch(r"[A-Z_]+=.*", word):
                command.append(word)


FOUND = sorted(
    {(page.relative_to(ROOT).as_posix(), tuple(words)) for page in [*PAGES, *HELP] for words in commands(page)}
)
HYDRA = ("lightning-compress", "lightning-compress-sensitivity")
TRAINING = sorted({words for _, words in FOUND if words[0] in HYDRA})


class Parsed(BaseException):
    """The options of a command could be read; it need not go on."""


def values(override: Override) -> list[str]:
    """What a sweep gives a name, one after another; or the one value."""
    name = override.get_key_element()
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if isinstance(override.value(), IntervalSweep):
        return [f"{name}={override.value().start}", f"{name}={override.value().end}"]
    return [f"{name}={value}" for value in override.sweep_string_iterator()]


def check_hydra(words: tuple[str, ...]) -> None:
    """Each job that the command asks for composes, and every node fits what it names."""
    overrides = [word for word in words[1:] if not word.startswith("-")]
    offer_networks(overrides)
    offer_sweepers()
    with initialize_config_module("lightning_compress.conf", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(overrides)
        swept = [values(override) for override in parsed]
        name = "sensitivity" if words[0].endswith("sensitivity") else "train"
        composed = 0
        for number in range(max(map(len, swept), default=1)):
            job = [choices[number % len(choices)] for choices in swept]
            try:
                config = compose(name, overrides=job, return_hydra_config=True)
            except ConfigCompositionException:
                if "glob(" not in " ".join(overrides):  # what does not fit a glob is left out of the sweep
                    raise
                continue
            assert unbound(config) == []
            composed += 1
    assert composed


def check_options(words: tuple[str, ...], start: Callable[[], object]) -> None:
    """The parser of the command takes its options."""
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        parse(parser, *args, **kwargs)  # type: ignore[call-overload]
        raise Parsed

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(sys, "argv", list(words)),
        pytest.raises(Parsed),
    ):
        start()


def script(path: str) -> Callable[[], object]:
    """What `python path` does."""
    return lambda: runpy.run_path(str(ROOT / path), run_name="__main__")


@pytest.mark.parametrize(("page", "words"), FOUND, ids=[f"{page}: {' '.join(words)}" for page, words in FOUND])
def test_command_can_be_typed(page: str, words: tuple[str, ...]) -> None:
    tool, *rest = words
    if tool in HYDRA:
        check_hydra(words)
    elif tool in ARGPARSE:
        check_options(words, importlib.import_module(ARGPARSE[tool]).main)
    elif tool == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in rest if "=" not in word} <= targets
    elif tool in ("pip", "uv") or rest[:2] == ["-m", "pip"]:
        extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
        for asked in re.findall(r"(?:^|[ ./])(?:lightning-compress|\.)\[([\w,]+)\]", " ".join(rest)):
            assert set(asked.split(",")) <= extras
    elif tool == "python" and rest[0].startswith("benchmarks/"):
        check_options(tuple(rest), script(rest[0]))
    elif tool == "python" and not rest[0].startswith("-"):
        assert ((ROOT / page).parent / rest[0]).is_file()
    elif tool == "python":
        assert rest[:2] in (["-m", "venv"], ["-m", "pytest"])
    else:
        assert tool in OTHERS, f"nobody has said how {tool} is checked"


def test_a_mistake_is_seen() -> None:
    with pytest.raises(ConfigCompositionException):
        check_hydra(("lightning-compress", "method.budget.mac=0.5"))
    with pytest.raises(AssertionError):
        check_hydra(("lightning-compress", "+trainer.max_epoch=3"))
    with pytest.raises(SystemExit):
        check_options(("search.py", "--seeds", "x"), script("benchmarks/search.py"))


@pytest.mark.slow
@pytest.mark.parametrize("words", TRAINING, ids=" ".join)
def test_command_runs(words: tuple[str, ...], tmp_path: Path) -> None:
    """As it stands there, with a few images."""
    line = " ".join(words)
    if "launcher=submitit " in f"{line} " or "address=auto" in line:
        pytest.skip("needs a cluster")
    if "accelerator=gpu" in line and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    (tmp_path / "path" / "to").mkdir(parents=True)
    for split, label, number in itertools.product(("train", "test"), range(10), range(8)):
        place = tmp_path / "path" / "to" / "images" / split / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (20 * label, 60 * number, 0)).save(place / f"{number}.png")
    module = "lightning_compress.app." + ("sensitivity" if words[0].endswith("sensitivity") else "train")
    tiny = [*TINY, *(["hydra.sweeper.n_trials=2"] if "sweep=pareto" in line else [])]
    run = [sys.executable, "-m", module]
    if "dense.ckpt=path/to/weights.ckpt" in line:
        subprocess.run([*run, "method=none", *TINY], cwd=tmp_path, check=True, capture_output=True)
        [made] = tmp_path.glob("outputs/cache/*.ckpt")
        made.rename(tmp_path / "path" / "to" / "weights.ckpt")
    done = subprocess.run(
        [*run, *words[1:], *tiny],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
