import ast
import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SMOKE = "--dataset cifar10-sample --width 4 --epochs 1 --batch-size 128 --precision fp32"
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


@pytest.mark.parametrize("name", RECIPES)
def test_the_notebook_runs_from_top_to_bottom_on_the_sample(name, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_FLAGS", f"--recipe {RECIPES[name]} {SMOKE} --output {tmp_path / 'run'}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    notebook = read(name)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": ROOT}}).execute()
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 8
    assert (tmp_path / "run" / "weights.safetensors").is_file()
    assert (tmp_path / "run" / "report.md").is_file()
