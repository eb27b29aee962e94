import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "files": 0,
    "config": 0,
    "models": 0,
    "transforms": 0,
    "data": 1,
    "utils": 1,
    "checkpoint": 2,
    "visualize": 2,
    "export": 2,
    "report": 3,
    "main": 4,
    "hubconf": 5,
    "app": 5,
    "lit": 5,
}
EXTRAS = {"app", "lit"}  # need more than requirements.txt
PUBLIC = {
    "config": {"Config", "RECIPES", "parse_config"},
    "models": {"MODELS", "make_model", "CustomResNet", "ResNet", "ResNet18", "ResNet34"},
    "transforms": {
        "CIFAR10_MEAN",
        "CIFAR10_STD",
        "train_transform",
        "test_transform",
        "vectorize",
        "denormalize",
    },
    "data": {"load_split", "statistics", "make_loaders", "CLASSES"},
    "utils": {"get_device", "seed_everything", "summarize", "find_lr", "one_cycle", "History", "Stats"},
    "checkpoint": {"save_checkpoint", "load_checkpoint", "save_weights", "load_weights"},
    "visualize": {
        "plot_samples",
        "plot_history",
        "plot_lr_finder",
        "plot_lr_history",
        "plot_misclassified",
        "gradcam",
        "plot_gradcam",
        "plot_confusion_matrix",
    },
    "export": {"export_model"},
    "report": {"write_report"},
    "main": {"train", "test", "fit_model", "predict", "run", "main"},
}
SOURCES = [  # not what lies in environments such as .venv
    path for path in ROOT.rglob("*.py") if not any(p[0] == "." for p in path.relative_to(ROOT).parts)
]


def imports_of(path):
    """Top-level names of every module that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("module", FLOORS)
def test_imports_point_to_lower_floors_only(module):
    path = ROOT / f"{module}.py"
    files = [path] if path.is_file() else list((ROOT / module).glob("*.py"))
    for file in files:
        ours = {name for name in imports_of(file) if name in FLOORS and name != module}
        allowed = {name for name in FLOORS if FLOORS[name] < FLOORS[module]}
        if module == "config":
            allowed = {"models"}  # the names to choose from
        assert ours <= allowed


@pytest.mark.parametrize("module", PUBLIC)
def test_the_names_that_the_design_settled_are_there(module):
    assert PUBLIC[module] <= set(vars(__import__(module)))


def test_importing_everything_is_silent_and_asks_for_no_network_or_device():
    code = (
        "import socket, torch\n"
        "def refuse(*arguments): raise SystemExit('a connection was tried')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "state = torch.get_rng_state()\n"
        f"import {', '.join(sorted(FLOORS.keys() - EXTRAS))}\n"
        "assert torch.equal(state, torch.get_rng_state()) and not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def functions(path):
    """Every function of a file, with its length without the docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
            yield node.name, node.end_lineno - start


def test_no_function_is_over_40_lines():
    long = [f"{path.name}:{name} {n}" for path in SOURCES for name, n in functions(path) if n > 40]
    assert long == []


def test_every_load_is_explicitly_safe():
    """An explicit weights_only=True holds even where the environment asks for the opposite."""
    banned = ("pickle.load", "weights_only=False", "allow_pickle=True", "pickle_module")
    sources = [path for path in SOURCES if "tests" not in path.relative_to(ROOT).parts]
    lines = [line for path in sources for line in path.read_text().splitlines()]
    assert [line for line in lines if any(word in line for word in banned)] == []
    loads = [line for line in lines if "torch.load(" in line]
    assert loads and all("weights_only=True" in line for line in loads)


def test_nothing_below_the_top_floor_imports_the_benchmarks():
    for module in FLOORS:
        path = ROOT / f"{module}.py"
        for file in [path] if path.is_file() else (ROOT / module).glob("*.py"):
            assert not {"benchmarks", "tests"} & set(imports_of(file))
