"""Notebooks as students and teachers have them run here; how their calls had to change is counted.

The programs in tests/notebooks_of_others are written in the manner of such notebooks. Above a statement
that had to change stands what it was, as `# theirs: ...`; a statement without such a line is as it was.
`python -m tests.test_notebooks_of_others` writes the table of docs/coming-from-a-course-notebook.md.
"""

import ast
import functools
import importlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torchvision import datasets

import config
import models
from sources import load_split
from tests.test_architecture import FLOORS

FOLDER = Path(__file__).parent / "notebooks_of_others"
DRIVERS = sorted(path.stem for path in FOLDER.glob("*.py"))
PAGE = Path(__file__).parent.parent / "docs" / "coming-from-a-course-notebook.md"
KINDS = ("as it stands", "renamed", "argument changed", "no counterpart")
BEGIN, END = "<!-- call sites -->\n", "<!-- end -->\n"


def imported(tree):
    """The names that a program imports from this package."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in FLOORS:
            for alias in node.names:
                module = importlib.import_module(node.module)
                every = getattr(module, "__all__", [x for x in vars(module) if x[0] != "_"])
                names |= set(every) if alias.name == "*" else {alias.name}
    return names - {"torch", "nn", "np", "A", "Any", "Tensor", "Path"}


def statements(body):
    """Every simple statement, also within loops; not those of functions and classes."""
    for node in body:
        if isinstance(node, ast.For | ast.With | ast.If):
            yield from statements(node.body)
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
            yield node


def is_site(node, names):
    """Whether a statement calls this package, or asks one of its datasets something."""
    called = {
        x.func.id for x in ast.walk(node) if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)
    }
    asked = any(isinstance(x, ast.Attribute) and x.attr == "dataset" for x in ast.walk(node))
    return bool(called & names) or asked


class Unnamed(ast.NodeTransformer):
    """Gives all functions that are called one name."""

    def visit_Call(self, node):  # noqa: N802
        self.generic_visit(node)
        inner = node.func
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        if isinstance(inner, ast.Name):
            node.func = ast.Name("function")
        return node


def call_sites(path):
    """The kind of every call site of a program, with what was called."""
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    names, found = imported(tree), []
    for node in statements(tree.body):
        above = lines[node.lineno - 2].strip()
        if above.startswith("# theirs: "):
            theirs = above.removeprefix("# theirs: ")
            pair = [ast.parse(theirs), ast.parse(ast.unparse(node))]
            if ast.dump(pair[0]) == ast.dump(pair[1]):
                raise ValueError(f"{path.name}: {theirs} stands as it was")
            one, other = (ast.dump(Unnamed().visit(call)) for call in pair)
            found.append(("renamed" if one == other else "argument changed", theirs))
        elif is_site(node, names):
            found.append(("as it stands", ast.unparse(node)))
    missing = [line for line in lines if line.startswith("# no counterpart")]
    return [*found, *(("no counterpart", line) for line in missing)]


def counts():
    """How many call sites of each kind each driver has."""
    return {name: Counter(kind for kind, _ in call_sites(FOLDER / f"{name}.py")) for name in DRIVERS}


def table():
    """The counts as Markdown, with their sum."""
    every = counts()
    every["**all**"] = sum(every.values(), Counter())
    rows = [f"| {' | '.join(['notebook', *KINDS])} |", f"|---|{'---:|' * len(KINDS)}"]
    for name, counted in every.items():
        cells = [str(counted[kind]) for kind in KINDS]
        rows.append(f"| {' | '.join([name.replace('_', ' '), *cells])} |")
    return "\n".join(rows) + "\n"


class SmallCIFAR10(datasets.CIFAR10):
    """Torchvision's dataset with 128 images of the sample, and no download."""

    def __init__(self, root, train=True, transform=None, download=False):
        split = load_split("cifar10-sample", "train" if train else "test")
        split = split.take(np.arange(0, len(split), len(split) // 128)[:128])
        self.data, self.targets, self.classes = split.images, split.labels.tolist(), list(split.classes)
        self.transform, self.target_transform, self.train = transform, None, train


def small_config(batch_size):
    """A `Config` of the sample, with two batches of training images an epoch and one of test images."""
    few = {"max_train_batches": 2, "max_test_batches": 1, "dataset": "cifar10-sample"}
    return config.Config(batch_size=min(batch_size, 64), **few)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Networks of width 8, the sample, two batches an epoch, no screen; nothing else is changed."""
    for name in ("CustomResNet", "ResNet18"):
        monkeypatch.setattr(models, name, functools.partial(getattr(models, name), width=8))
    monkeypatch.setattr(datasets, "CIFAR10", SmallCIFAR10)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("name", DRIVERS)
def test_a_notebook_of_this_habit_runs_from_top_to_bottom(name, small):
    program = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    program = program.replace("from config import Config\n", "Config = small_config\n")
    exec(compile(program, name, "exec"), {"__name__": name, "small_config": small_config})
    assert len(plt.get_fignums()) <= 2  # those that the notebook itself opened


def test_most_call_sites_need_nothing_but_another_import_or_name():
    every = sum(counts().values(), Counter())
    assert len(DRIVERS) >= 12 and every.total() >= 214
    assert every["as it stands"] + every["renamed"] >= 0.75 * every.total()


def test_the_table_of_the_page_is_made_from_the_notebooks():
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table()


def test_a_change_of_name_is_told_from_a_change_of_arguments(tmp_path):
    (tmp_path / "x.py").write_text(
        "from main import test, train\n"
        "train(a, b)\n"
        "# theirs: x = tools.evaluate(a, b)\nx = test(a, b)\n"
        "# theirs: evaluate(a)\ntest(a, b)\n"
        "# theirs: z(1)\n# no counterpart: so\n"
        "print(1)\nfor k in y:\n    print(k.dataset)\n"
    )
    kinds = [kind for kind, _ in call_sites(tmp_path / "x.py")]
    assert kinds == ["as it stands", "renamed", "argument changed", "as it stands", "no counterpart"]


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
