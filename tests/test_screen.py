"""Figures show themselves where somebody sees them, once, and leave no window behind."""

import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot as plt
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from reporting import screen
from reporting.screen import new_figure, off_screen

ROOT = Path(__file__).parent.parent
# Each cell, and the numbers of points of the figures that it must show, in this order.
CELLS = [
    (
        "import warnings; warnings.simplefilter('error')\n"
        "from visualize import plot_lr_history\n"
        "from reporting.screen import off_screen\n"
        "def draw(k): return plot_lr_history(list(range(1, k + 1)))",
        [],
    ),
    ("draw(3)", [3]),
    ("draw(3); done = True", [3]),
    ("figure = draw(4)", [4]),
    ("figure", [4]),
    ("figure", [4]),
    ("for k in (2, 3, 4): draw(k)", [2, 3, 4]),
    ("import matplotlib.pyplot as plt\ndraw(5)\nplt.show()\nprint('after')", [5, "after"]),
    ("draw(2)\ndraw(3)", [2, 3]),
    ("draw(2).savefig('/dev/null', format='png')", [2]),
    ("for k in range(30): draw(2)", [2] * 30),
    ("for k in (2, 3):\n    draw(k)\n    plt.show()", [2, 3]),
    ("with off_screen(): hidden = draw(6)", []),
    ("hidden", [6]),
    ("print(plt.get_fignums())", ["[]"]),
]


@pytest.mark.slow
def test_a_notebook_shows_each_figure_once_and_in_order():
    counted = "from matplotlib.figure import Figure\n"
    counted += "Figure.__repr__ = lambda f: f'points {len(f.axes[0].lines[0].get_xdata())}'\n"
    book = new_notebook(cells=[new_code_cell(source) for source in [counted, *(s for s, _ in CELLS)]])
    NotebookClient(book, timeout=300, resources={"metadata": {"path": ROOT}}).execute()
    for cell, (source, expected) in zip(book.cells[1:], CELLS, strict=True):
        shown = []
        for output in cell.outputs:
            data = output.get("data", {})
            assert ("image/png" in data) == (output.output_type != "stream"), source
            text = output.text.strip() if output.output_type == "stream" else data["text/plain"]
            shown.append(int(text.split()[1]) if text.startswith("points") else text)
        assert shown == expected, source


WINDOWS = '''
"""A backend that has windows, for a test: it notes what is shown."""
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

class FigureManager(FigureManagerBase):
    def show(self):
        print("window", self.canvas.figure.axes[0].get_title())

class FigureCanvas(FigureCanvasAgg):
    manager_class = FigureManager
'''
SCRIPT = """
import gc, warnings, weakref
warnings.simplefilter("error")
import matplotlib.pyplot as plt
from visualize import plot_lr_history
from reporting.screen import off_screen
plot_lr_history([1, 2, 3])
plot_lr_history([1.0, 1.0])
plt.show()
plt.close("all")
made = [weakref.ref(plot_lr_history([1, 2])) for _ in range(60)]
gc.collect()
print("alive", sum(one() is not None for one in made), len(plt.get_fignums()))
with off_screen():
    plot_lr_history([1, 2])
print(len(plt.get_fignums()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["module://windows", "agg"])
def test_a_script_shows_its_figures_under_show_and_keeps_few(backend, tmp_path):
    (tmp_path / "windows.py").write_text(WINDOWS)
    environment = {"MPLBACKEND": backend, "PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    windows = [
        "window Learning rate: 1.00e+00 → 3.00e+00",
        "window Learning rate: 1.00e+00 throughout",
        f"alive {screen.MOST} {screen.MOST}",
        str(screen.MOST),
    ]
    assert done.stdout.splitlines() == (["alive 0 0", "0"] if backend == "agg" else windows)


def test_where_nothing_is_seen_no_figure_is_among_those_of_pyplot():
    assert matplotlib.get_backend().lower() in screen.SILENT
    with off_screen():
        new_figure(figsize=(1, 1))
    assert new_figure(figsize=(1, 1)).get_figwidth() == 1 and plt.get_fignums() == []
