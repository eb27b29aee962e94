import ast
import itertools
import json
import os
import signal
from pathlib import Path

import nbformat
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from training import guards, lr_finder

ROOT = Path(__file__).parent.parent
SMOKE = "--dataset cifar10-sample --width 8 --epochs 1 --batch-size 32 --max-train-batches 4"
SMOKE += " --max-test-batches 5 --precision fp32"
RECIPES = {"train_cifar10": "custom_resnet", "train_resnet18": "resnet18"}


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_of(notebook):
    """Source of every code cell, without the lines for the shell and IPython."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            yield "\n".join(
                "    pass" if line.startswith("    !") else line
                for line in lines
                if line.lstrip()[:1] != "%"
            )


@pytest.mark.parametrize("name", RECIPES)
def test_the_notebook_defines_nothing_and_loops_over_nothing(name):
    banned = (
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Lambda,
        ast.For,
        ast.While,
        ast.comprehension,
    )
    for source in code_of(read(name)):
        assert not any(isinstance(node, banned) for node in ast.walk(ast.parse(source))), source


@pytest.mark.parametrize("name", RECIPES)
def test_the_notebook_is_kept_with_the_outputs_of_a_whole_run_and_no_widgets(name):
    notebook = read(name)
    assert "widgets" not in notebook.metadata
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = [key for cell in code for output in cell.outputs for key in output.get("data", {})]
    assert kinds.count("image/png") == 8
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert str(ROOT) not in json.dumps(notebook)


@pytest.mark.slow
def test_the_notebooks_run_from_top_to_bottom_on_the_sample(tmp_path, monkeypatch):
    """One after the other in one process, which forgets every name in between."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_DEPENDENCIES", "1")  # which takes pip two seconds
    both, notebooks = read("train_cifar10"), [read(name) for name in RECIPES]
    both.cells = []
    for (name, recipe), notebook in zip(RECIPES.items(), notebooks, strict=True):
        flags = f"--recipe {recipe} {SMOKE} --output {tmp_path / name}"
        begin = new_code_cell(f"%reset -f\n%env RUN_FLAGS={flags}")
        both.cells += [begin, *notebook.cells]
    NotebookClient(both, timeout=300, resources={"metadata": {"path": ROOT}}).execute()
    for name, notebook in zip(RECIPES, notebooks, strict=True):
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert sum("image/png" in output.get("data", {}) for output in outputs) == 8
        assert (tmp_path / name / "weights.safetensors").is_file()
        assert (tmp_path / name / "report.md").is_file()


def train_cell(folder, stop_at, monkeypatch):
    """Run a notebook up to its training, and that again if a SIGTERM is to stop it at a step."""
    flags = SMOKE.replace("--epochs 1", "--epochs 2")
    monkeypatch.setenv("RUN_FLAGS", f"{flags} --output {folder} --resume")
    cells = list(code_of(read("train_cifar10")))
    training = next(k for k, source in enumerate(cells) if "fit_model(\n" in source)
    names = {}
    for source in cells[:training]:
        exec(source, names)
    count = itertools.count(1)

    def hook(module, inputs, output):
        if module.training and next(count) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    names["model"].linear.register_forward_hook(hook)
    if stop_at:
        with pytest.raises(guards.Stopped):
            exec(cells[training], names)
    exec(cells[training], names)
    plt.close("all")
    return names["history"], (folder / "weights.safetensors").read_bytes()


@pytest.mark.slow
def test_running_the_training_cell_again_continues_the_run(tmp_path, monkeypatch, capsys):
    found = lr_finder.LRFinderResult([1e-4, 1e-3], [2.0, 1.0], {"start": 5e-4, "minimum": 0.02})
    monkeypatch.setattr("run.find_lr", lambda *args, **options: found)
    (whole, expected), (history, weights) = (
        train_cell(tmp_path / str(stop_at), stop_at, monkeypatch) for stop_at in (None, 6)
    )
    assert "resumed in epoch 2 after 2 steps of it" in capsys.readouterr().out
    assert weights == expected and history.lrs == whole.lrs and len(history.epochs) == 2
