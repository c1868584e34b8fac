"""Every public name has a docstring: its parameters, what it raises, shapes, units, paper, an example.

Public is what a user imports or meets in the reference:

- the `__all__` of the modules in `MODULES`;
- what the pages in docs/reference show;
- what the command line's own parts offer from Python (`MORE`).

Examples are doctests, which pytest runs. Exceptions are shown by the examples of what raises them, and plain values
(lists of names, aliases of types) have no docstring in Python.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

MODULES = (
    "lightning_compress",
    "lightning_compress.coupling.graph",
    "lightning_compress.distill",
    "lightning_compress.distill.losses",
    "lightning_compress.distill.metrics",
    "lightning_compress.methods.criteria",
    "lightning_compress.methods.forms",
    "lightning_compress.methods.latent",
    "lightning_compress.schedule",
    "lightning_compress.zoo",
)
MORE = (
    "lightning_compress.app.dashboard.write_dashboard",
    "lightning_compress.app.sensitivity.layer_sensitivity",
    "lightning_compress.app.wandb_report.build_report",
    "lightning_compress.methods.equalization.equalize",
    "lightning_compress.methods.soft_kmeans.DifferentiableKMeans",
    "lightning_compress.methods.vbmf.evbmf_rank",
    "lightning_compress.methods.vbmf.vbmf_rank",
    "lightning_compress.zoo.bidirectional.ConvolutionalRBM",
    "lightning_compress.zoo.feedback.SparseCoding",
)

# Where an idea comes from: first author, and the year that the docstring gives. Of what holds several, each.
PAPERS: dict[str, tuple[str, ...]] = {
    "lightning_compress.ChannelPruning": (
        *("Li 2017", "He 2018", "He 2019", "Liu 2017", "Molchanov 2019", "LeCun 1989", "Hu 2016", "Lee 2021"),
    ),
    "lightning_compress.CompactFilters": (
        *(
            "Howard 2017",
            "Han 2019",
            "Iandola 2016",
            "Zhang 2017",
            "Shang 2016",
            "Cohen 2016",
            "Cheng 2015",
            "Chen 2015",
        ),
    ),
    "lightning_compress.Distillation": ("Hinton 2015",),
    "lightning_compress.LowBitWeights": ("Courbariaux 2015", "Rastegari 2016", "Li 2016", "Zhu 2016", "Cho 2021"),
    "lightning_compress.LowRankFactorization": ("Jaderberg 2014", "Zhang 2015", "Kim 2015", "Lebedev 2014"),
    "lightning_compress.MutualModule": ("Zhang 2018",),
    "lightning_compress.Quantization": ("Esser 2020", "Bhalgat 2020", "Choi 2018"),
    "lightning_compress.WeightPruning": (
        *("Han 2015", "Molchanov 2019", "Sanh 2020", "Lee 2019", "Wang 2020", "Sun 2023", "Evci 2020", "Lee 2021"),
        *("Frankle 2018", "Zhu 2017", "Han 2016"),
    ),
    "lightning_compress.WeightSharing": ("Han 2015",),
    "lightning_compress.expand": ("Ding 2021",),
    "lightning_compress.use_sparse_kernels": ("Mishra 2021",),
    "lightning_compress.distill.EarlyExit": ("Zhang 2019",),
    "lightning_compress.distill.losses.AT": ("Zagoruyko 2017",),
    "lightning_compress.distill.losses.BlockMSE": ("Li 2021",),
    "lightning_compress.distill.losses.CRD": ("Tian 2020",),
    "lightning_compress.distill.losses.DIST": ("Huang 2022",),
    "lightning_compress.distill.losses.DKD": ("Zhao 2022",),
    "lightning_compress.distill.losses.FitNet": ("Romero 2015",),
    "lightning_compress.distill.losses.KD": ("Hinton 2015",),
    "lightning_compress.distill.losses.LogitMSE": ("Ba 2014",),
    "lightning_compress.distill.losses.MLKD": ("Jin 2023",),
    "lightning_compress.distill.losses.NKD": ("Yang 2023",),
    "lightning_compress.distill.losses.PKT": ("Passalis 2018",),
    "lightning_compress.distill.losses.RKD": ("Park 2019",),
    "lightning_compress.distill.losses.ReviewKD": ("Chen 2021",),
    "lightning_compress.distill.losses.SP": ("Tung 2019",),
    "lightning_compress.distill.losses.standardized": ("Sun 2024",),
    "lightning_compress.distill.metrics.TeacherAgreement": ("Stanton 2021",),
    "lightning_compress.methods.equalization.equalize": ("Nagel 2019",),
    "lightning_compress.methods.forms.CP": ("Lebedev 2014", "Phan 2020"),
    "lightning_compress.methods.forms.CReLU": ("Shang 2016",),
    "lightning_compress.methods.forms.Channel": ("Zhang 2015", "Denton 2014"),
    "lightning_compress.methods.forms.Circulant": ("Cheng 2015", "Ding 2017"),
    "lightning_compress.methods.forms.DepthwiseSeparable": ("Howard 2017", "Guo 2018"),
    "lightning_compress.methods.forms.Fire": ("Iandola 2016",),
    "lightning_compress.methods.forms.Ghost": ("Han 2019",),
    "lightning_compress.methods.forms.GroupedShuffle": ("Zhang 2017", "Dao 2022"),
    "lightning_compress.methods.forms.Hashed": ("Chen 2015",),
    "lightning_compress.methods.forms.Rotated": ("Cohen 2016",),
    "lightning_compress.methods.forms.Spatial": ("Jaderberg 2014",),
    "lightning_compress.methods.forms.Tucker": ("Kim 2015",),
    "lightning_compress.methods.latent.Binary": ("Courbariaux 2015",),
    "lightning_compress.methods.latent.TernaryWeightNetwork": ("Li 2016",),
    "lightning_compress.methods.latent.TrainedTernary": ("Zhu 2016",),
    "lightning_compress.methods.latent.XnorNet": ("Rastegari 2016",),
    "lightning_compress.methods.sensitivity.measure_sensitivity": ("Li 2017",),
    "lightning_compress.methods.soft_kmeans.DifferentiableKMeans": ("Cho 2021",),
    "lightning_compress.methods.vbmf.evbmf_rank": ("Nakajima 2013",),
    "lightning_compress.methods.vbmf.vbmf_rank": ("Nakajima 2013",),
    "lightning_compress.schedule.cubic": ("Zhu 2017",),
    "lightning_compress.zoo.AlexNet": ("Krizhevsky 2012",),
    "lightning_compress.zoo.CIFAR10": ("Krizhevsky 2009",),
    "lightning_compress.zoo.ContrastiveDivergence": ("Hinton 2002",),
    "lightning_compress.zoo.ConvolutionalDBN": ("Lee 2009",),
    "lightning_compress.zoo.DeconvolutionalNetwork": ("Zeiler 2010",),
    "lightning_compress.zoo.DenseNet": ("Huang 2016",),
    "lightning_compress.zoo.FashionMNIST": ("Xiao 2017",),
    "lightning_compress.zoo.GoogLeNet": ("Szegedy 2014",),
    "lightning_compress.zoo.HierarchicalSparseCoding": ("Yu 2011",),
    "lightning_compress.zoo.LeNet300100": ("LeCun 1998",),
    "lightning_compress.zoo.LeNet5": ("LeCun 1998",),
    "lightning_compress.zoo.MobileNetV1": ("Howard 2017",),
    "lightning_compress.zoo.MobileNetV2": ("Sandler 2018",),
    "lightning_compress.zoo.MobileNetV2Small": ("Sandler 2018",),
    "lightning_compress.zoo.ResNet": ("He 2015",),
    "lightning_compress.zoo.ShuffleNetV2": ("Ma 2018",),
    "lightning_compress.zoo.SqueezeNet": ("Iandola 2016",),
    "lightning_compress.zoo.StackedConvAutoencoder": ("Masci 2011",),
    "lightning_compress.zoo.VGG": ("Simonyan 2014",),
    "lightning_compress.zoo.VGGSmall": ("Simonyan 2014",),
    "lightning_compress.zoo.WideResNet": ("Zagoruyko 2016",),
    "lightning_compress.zoo.bidirectional.ConvolutionalRBM": ("Lee 2009",),
    "lightning_compress.zoo.feedback.SparseCoding": ("Gregor 2010",),
}

# Parameters and attributes of these names are quantities: what is said of them has to name the unit.
UNITS = {
    "bytes": "bytes|file|fraction",
    "epochs": "epoch",
    "latency": "second|time|batch",
    "macs": "multiply-accumulates|MACs",
    "peak_memory": "bytes",
    "ratio": "fraction|for each",
    "seconds": "seconds",
    "sparsity": "fraction|share",
    "start|end|release|freeze": "fraction|likewise",
    "temperature": "above 0|softer|logits|divide|soft",
    "limits?": "unit",
    "wall|cpu|median|low|high": "second",
}

SHAPE = re.compile(
    r"\[[A-Z\d][\w ,.*+/×]*\]|\([A-Z]\w*,[\w ,.*]*\)|any shape|batch first|first dim|shape", re.IGNORECASE
)
SECTIONS = ("Arg", "Attribute", "Return", "Yield", "Raise", "Example")


def names() -> Iterator[str]:
    """The public names, in the order of the rule."""
    for module in MODULES:
        yield from (f"{module}.{name}" for name in importlib.import_module(module).__all__)
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        yield from re.findall(r"^::: (lightning_compress\.\S+)", page.read_text(), re.MULTILINE)
    yield from MORE


def find(name: str) -> Any:
    """What a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def public() -> dict[str, Any]:
    """Name -> object; an object that has several names has the first."""
    found: dict[int, tuple[str, Any]] = {}
    for name in names():
        value = find(name)
        if inspect.isclass(value) or inspect.isfunction(value):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def section(doc: str, title: str) -> str:
    """The text of a section of a Google-style docstring, dedented; empty if there is none."""
    match = re.search(rf"^{title}s?:\n((?:[ ]+.*\n|\n)*)", f"{doc}\n", re.MULTILINE)
    return textwrap.dedent(match[1]) if match else ""


def entries(doc: str, *titles: str) -> dict[str, str]:
    """What sections say of each name."""
    found: dict[str, str] = {}
    for title in titles:
        for match in re.finditer(
            r"^(\*{0,2}\w[\w, ]*)(?: \([^)]*\))?:((?:.*\n?)(?:[ ]+.*\n?|\n)*)", section(doc, title), re.MULTILINE
        ):
            found |= {name.strip().lstrip("*"): match[2] for name in match[1].split(",")}
    return found


def maker(value: Any) -> Any:
    """What takes the parameters: a function; or the class of ours that defines a class's constructor, if one does."""
    if not inspect.isclass(value):
        return value
    owner = next(base for base in value.__mro__ if "__init__" in vars(base))
    return owner if owner.__module__.startswith("lightning_compress") and not issubclass(owner, BaseException) else None


def parameters(value: Any) -> list[str]:
    """Names of the parameters of a function, or of a class's constructor."""
    return [] if maker(value) is None else list(inspect.signature(value).parameters)


def inherited(value: Any) -> dict[str, str]:
    """What is said elsewhere: of a constructor by the class that defines it, or where a docstring refers to."""
    doc = inspect.getdoc(value) or ""
    found = entries(inspect.getdoc(maker(value)) or "", "Args", "Attributes")
    if inspect.isclass(value):
        found |= entries(inspect.getdoc(value.__init__) or "", "Args")
    for other in re.findall(r"arguments are those of `(\w+)`", doc):
        found |= entries(inspect.getdoc(getattr(inspect.getmodule(value), other)) or "", "Args")
    return found


def raised(value: Any) -> bool:
    """Whether the code of a function, or of a constructor, raises an exception itself."""
    functions = [value]
    if inspect.isclass(value):
        functions = [vars(value)[name] for name in ("__init__", "__post_init__") if name in vars(value)]
    for function in functions:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
        except (OSError, TypeError, IndentationError):  # made by `dataclass`
            continue
        if any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(tree)):
            return True
    return False


def annotations(value: Any) -> str:
    """The annotations of a function, or of a module's `forward`, as written."""
    function = getattr(value, "forward", None) if inspect.isclass(value) else value
    if inspect.isclass(value) and (function is None or function.__module__.startswith("torch")):
        return ""
    return " ".join(map(str, inspect.unwrap(function).__annotations__.values()))


def methods(value: Any) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines itself."""
    for name, member in vars(value).items():
        if name.startswith("_") or not isinstance(member, property | classmethod | staticmethod | Callable):
            continue
        if inspect.isclass(member) or (dataclasses.is_dataclass(value) and name in value.__dataclass_fields__):
            continue
        yield name, member.fget if isinstance(member, property) else getattr(member, "__func__", member)


def faults(name: str, value: Any) -> Iterator[str]:
    """What is missing in the docstring of a public name."""
    doc = inspect.getdoc(value) or ""
    own = value.__doc__ or ""
    summary = doc.split("\n\n")[0]
    if not own.strip() or summary.split("\n")[0].rstrip(":s") in SECTIONS or not summary.endswith((".", ":", "!", "?")):
        yield "a summary of its own"
        return
    exception = inspect.isclass(value) and issubclass(value, BaseException)
    if not exception:
        examples = doctest.DocTestFinder(recurse=False).find(inspect.unwrap(value), name)
        if not section(doc, "Example") or not any(test.examples for test in examples):
            yield "an example that runs"
    told = entries(doc, "Args", "Attributes")
    missing = [parameter for parameter in parameters(value) if parameter not in told | inherited(value)]
    if missing:
        yield f"the parameters {', '.join(missing)}"
    if raised(value) and not section(doc, "Raises") and not exception:
        yield "what it raises"
    if re.search(r"\bTensors?\b", annotations(value)):
        function = getattr(value, "forward", value) if inspect.isclass(value) else value
        if not SHAPE.search(f"{doc} {inspect.getdoc(function) or ''}"):
            yield "shapes"
    for unit, pattern in UNITS.items():
        for parameter, text in told.items():
            if re.fullmatch(unit, parameter) and not re.search(pattern, f"{summary} {text}"):
                yield f"the unit of {parameter}"
    for paper in PAPERS.get(name, ()):
        author, year = paper.split()
        if not re.search(rf"\b{author}\b(?:(?!\d{{4}}\b).){{0,150}}\(?{year}\b", " ".join(doc.split())):
            yield f"the paper {paper}"
    if inspect.isclass(value):
        for method, function in methods(value):
            if not (inspect.getdoc(function) or inspect.getdoc(getattr(value, method)) or "").strip():
                yield f"a docstring of {method}"


def test_every_public_name_says_all_there_is_to_say() -> None:
    found = {name: list(faults(name, value)) for name, value in public().items()}
    lines = [f"{name}: lacks {'; '.join(missing)}" for name, missing in found.items() if missing]
    assert not lines, f"{len(lines)} of {len(found)} public names:\n" + "\n".join(lines)


def test_the_rule_covers_what_it_names() -> None:
    found = public()
    assert len(found) > 150
    aliases = {id(find(name)): name for name in PAPERS}
    assert {name for name in PAPERS if id(find(name)) not in {id(value) for value in found.values()}} == set()
    assert len(aliases) == len(PAPERS)


def perfect(width: int, names: list[str]) -> int:
    """Count names.

    Args:
        width: how wide.
        names: what to count.

    Raises:
        ValueError: there is none.

    Example:
        >>> 1 + 1
        2
    """
    if not names:
        raise ValueError
    return len(names)


@pytest.mark.parametrize(
    ("cut", "fault"),
    [
        ("Count names.", "a summary of its own"),
        ("        width: how wide.\n", "the parameters width"),
        ("    Raises:\n        ValueError: there is none.\n", "what it raises"),
        ("        >>> 1 + 1\n        2\n", "an example that runs"),
        ("", None),
    ],
)
def test_each_fault_is_seen(cut: str, fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert perfect.__doc__ is not None
    assert cut in perfect.__doc__
    monkeypatch.setattr(perfect, "__doc__", perfect.__doc__.replace(cut, "", 1) if cut else perfect.__doc__)
    assert list(faults("perfect", perfect)) == ([] if fault is None else [fault])
