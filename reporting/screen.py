"""Where a figure shows itself: among pyplot's, if somebody sees those; else nowhere."""

import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Matplotlib's backends that draw into files and memory alone.
SILENT = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}
INLINE = {"inline", "module://matplotlib_inline.backend_inline"}
MOST = 19  # figures that wait to be shown; matplotlib warns of more than 20
LABEL = "a figure of visualize.py"  # by which ours are known among those of pyplot
on_screen: ContextVar[bool] = ContextVar("on_screen", default=True)


def new_figure(**options: Any) -> Figure:
    """An empty figure, which a notebook shows at the end of its cell, and `plt.show()` anywhere.

    Where nobody sees figures (no screen, another thread, within `off_screen`) pyplot is not told of it,
    so that it ends with its last use. Elsewhere at most `MOST` wait: then a notebook shows them, and of
    windows that nobody has opened the oldest is given up.

    Args:
        options: of `matplotlib.figure.Figure`.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not on_screen.get() or matplotlib.get_backend().lower() in SILENT:
        return Figure(**options)
    from matplotlib import pyplot as plt

    ours = [n for n, label in zip(plt.get_fignums(), plt.get_figlabels(), strict=True) if label == LABEL]
    if ours and len(plt.get_fignums()) >= MOST:
        if matplotlib.get_backend().lower() in INLINE:
            plt.show()
        else:
            plt.close(ours[0])
    figure = plt.figure(FigureClass=Shown, **options)
    figure.set_label(LABEL)
    return figure


@contextlib.contextmanager
def styled(style: dict[Any, Any]) -> Iterator[None]:
    """Draw with matplotlib's settings changed for this block.

    The first figure of a notebook turns interactive mode on, by which it shows figures. Matplotlib's own
    `rc_context` would turn that off again.
    """
    with matplotlib.rc_context(style):
        yield
        interactive = matplotlib.is_interactive()
    matplotlib.interactive(interactive)


@contextlib.contextmanager
def off_screen() -> Iterator[None]:
    """Keep the figures that are drawn in this block for files: no window, no output of a cell."""
    token = on_screen.set(False)
    try:
        yield
    finally:
        on_screen.reset(token)


class Shown(Figure):
    """A figure of pyplot's that a notebook shows once: as a cell's value, or else at the cell's end."""

    def _ipython_display_(self) -> None:
        from IPython.display import display
        from matplotlib import pyplot as plt

        number = int(getattr(self, "number", 0))
        if plt.fignum_exists(number):
            labels = dict(zip(plt.get_fignums(), plt.get_figlabels(), strict=True))
            plt.close(self)
            for earlier in sorted(n for n, label in labels.items() if label == LABEL and n < number):
                display(plt.figure(earlier))  # in the order in which they were drawn
        raise NotImplementedError  # by which IPython goes on and shows it as it shows any figure
