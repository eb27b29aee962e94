import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# DESIGN: a module may import modules of lower floors only. Inside a folder the rooms have floors, too.
FLOORS = {
    "augmentation": 0,
    "files": 0,
    "models": 0,
    "transforms": 1,
    "utils": 1,
    "sources": 2,
    "weights_file": 2,
    "config": 3,
    "data": 4,
    "checkpoint": 4,
    "training": 5,
    "reporting": 6,
    "export": 6,
    "visualize": 7,
    "report": 8,
    "run": 9,
    "main": 10,
    "serving": 10,
    "app": 11,
    "hubconf": 11,
    "lit": 11,
}
ROOMS = {
    "augmentation": {"batch": 0, "spelling": 0, "__init__": 1},
    "reporting": {
        "augmented": 0,
        "collected": 0,
        "gradcam": 0,
        "lettering": 0,
        "evidence": 0,
        "findings": 0,
        "comparison": 1,
        "screen": 0,
        "markup": 1,
        "curves": 1,
        "tiles": 1,
        "sections": 1,
        "__init__": 2,
    },
    "sources": {
        "split": 0,
        "download": 0,
        "image_file": 0,
        "cifar10": 1,
        "folder": 1,
        "apart": 2,
        "torchvision_sets": 1,
        "__init__": 2,
    },
    "training": {
        "starting": 0,
        "arguments": 0,
        "criterion": 0,
        "distributed": 0,
        "guards": 0,
        "optim": 0,
        "pictures": 0,
        "inputs": 1,
        "lr_finder": 2,
        "progress": 2,
        "settings": 2,
        "shared_model": 3,
        "loops": 4,
        "__init__": 5,
    },
}
EXTRAS = {
    "app": "gradio",
    "serving": "gradio",
    "lit": "lightning",
}  # what each needs beyond requirements.txt
SOURCES = [  # not what lies in environments such as .venv
    path for path in ROOT.rglob("*.py") if not any(p[0] == "." for p in path.relative_to(ROOT).parts)
]


def imports_of(path):
    """Full names of every module that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def files_of(module):
    """The files of a module, or of a folder of them."""
    path = ROOT / f"{module}.py"
    return [path] if path.is_file() else sorted((ROOT / module).glob("*.py"))


@pytest.mark.parametrize("module", FLOORS)
def test_imports_point_to_lower_floors_only(module):
    allowed = {name for name in FLOORS if FLOORS[name] < FLOORS[module]}
    for file in files_of(module):
        ours = {name.split(".")[0] for name in imports_of(file)} & FLOORS.keys()
        assert ours - {module} <= allowed, file.name


@pytest.mark.parametrize("folder", ROOMS)
def test_imports_inside_a_folder_point_to_lower_rooms_only(folder):
    rooms = ROOMS[folder]
    assert {path.stem for path in files_of(folder)} == set(rooms)
    for path in files_of(folder):
        inside = {name.split(".")[1] for name in imports_of(path) if name.startswith(f"{folder}.")}
        assert inside <= {room for room in rooms if rooms[room] < rooms[path.stem]}, path.name


def test_every_file_at_the_top_has_a_floor():
    assert {path.stem for path in ROOT.glob("*.py")} <= set(FLOORS)


def test_no_file_of_the_package_is_over_500_lines():
    lines = {path: len(path.read_text().splitlines()) for m in FLOORS for path in files_of(m)}
    assert [path.name for path, count in lines.items() if count > 500] == []


@pytest.mark.slow
def test_importing_everything_is_silent_and_asks_for_no_network_or_device():
    there = {"app", "serving"} if find_spec(EXTRAS["app"]) else set()  # Lightning itself is not silent
    code = (
        "import signal, socket, torch\n"
        "def refuse(*arguments): raise SystemExit('a connection was tried')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGINT)\n"
        f"import {', '.join(sorted(FLOORS.keys() - EXTRAS.keys() | there))}\n"
        "assert torch.equal(state, torch.get_rng_state()) and not torch.cuda.is_initialized()\n"
        "assert signal.getsignal(signal.SIGINT) is handler\n"
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
    for file in (file for module in FLOORS for file in files_of(module)):
        assert not {"benchmarks", "tests"} & {name.split(".")[0] for name in imports_of(file)}
