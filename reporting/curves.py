"""Curves over epochs, steps and rates."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter, PercentFormatter

from reporting.lettering import STYLE, legible, literal, style
from reporting.screen import new_figure, styled
from training.lr_finder import LRFinderResult, finite_losses, smooth
from utils import History, plain

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v")  # five and six: thirty runs until colour and mark repeat together
TRAINING: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "alpha": 0.7}
BAND: dict[str, Any] = {"alpha": 0.2, "linewidth": 0}


def plot_history(histories: Mapping[str, History | Sequence[History]] | History) -> Figure:
    """Loss and accuracy of one run or several, each with a colour and a mark of its own.

    Solid lines are the test set, or the validation set where a run had one; thin dashed lines are
    training. Of several runs under one name, all as long, the mean is drawn, and a band of one standard
    deviation to each side of it.

    Args:
        histories: by the names of the runs; or the history of one.

    Raises:
        ValueError: there is no run, or one without an epoch.
    """
    if not isinstance(histories, Mapping):
        histories = {"this run": histories}
    if not histories or not all(map(drawable, histories.values())):
        raise ValueError(
            "give the history that fit_model returned, of an epoch or more, or a dict of several"
        )
    height = 3.9 + 0.24 * -(-(len(histories) + 1) // 2)
    names = legible(list(histories), "run")
    with styled(style("".join(names))):
        figure = new_figure(figsize=(10, height), layout="constrained")
        axes = figure.subplots(1, 2)
        looks = zip(itertools.cycle(COLORS), itertools.cycle(MARKS), strict=False)
        for name, history, (color, mark) in zip(names, histories.values(), looks, strict=False):
            runs = [history] if isinstance(history, History) else history
            draw_curves(axes, name, runs, color, mark)
        for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
            axis.set(xlabel="epoch", title=metric.capitalize())
            axis.xaxis.get_major_locator().set_params(integer=True)
            keep_apart(axis, 0.002)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))  # with as many decimals as ticks need
        losses = np.concatenate([line.get_ydata() for line in axes[0].lines]).astype(float)
        if np.nanmax(losses) > 10 * np.nanmedian(losses):  # one that diverged would flatten the others
            axes[0].set(yscale="log", title="Loss (logarithmic)")
            axes[0].yaxis.set_major_formatter(LogFormatter())
            axes[0].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
        lines = [line for line in axes[1].lines if line.get_linestyle() == "-"]
        label = "training" if len(lines) == 1 else "training, in the same colours"
        training = Line2D([], [], label=label, color=COLORS[0] if len(lines) == 1 else "0.4", **TRAINING)
        handles = [*lines, training]
        if axes[1].collections:
            band = "mean ± standard deviation of the runs"
            handles.append(Patch(facecolor="0.4", label=band, **BAND))
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def drawable(history: Any) -> bool:
    """Whether a value is a history of an epoch or more, or several of these."""
    runs = [history] if isinstance(history, History) else history
    return bool(runs) and all(isinstance(run, History) and bool(run.epochs) for run in runs)


def keep_apart(axis: Axes, least: float) -> None:
    """Make an axis at least so high, and as wide as an epoch, so that its ticks have different texts."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    if right - left < 1:
        middle = round((left + right) / 2)
        axis.set(xlim=(middle - 1, middle + 1), xticks=[middle])
    if high - low < least:
        axis.set_ylim((low + high - least) / 2, (low + high + least) / 2)


def draw_curves(axes: np.ndarray, name: str, runs: Sequence[History], color: str, mark: str) -> None:
    """Loss and accuracy of a run, or the mean of several, on two axes; the label tells how both end."""
    part = runs[0].epochs[0].parts[1]
    epochs = [row.epoch for row in runs[0].epochs]
    point = {"marker": mark if len(epochs) == 1 else "", "fillstyle": "none"}
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        trained, evaluated = (
            np.array([[getattr(row, f"{part}_{metric}") for row in run.epochs] for run in runs], float)
            for part in ("train", part)
        )
        axis.plot(epochs, trained.mean(0), color=color, **TRAINING, **point)
        style = {"color": color, "marker": mark, "markersize": 5, "linewidth": 2}
        ends = f"{part} {evaluated[:, -1].mean():.2%}"
        if len(runs) > 1:
            mean, spread = evaluated.mean(0), evaluated.std(0, ddof=1)
            low = np.maximum(mean - spread, 0)  # under which no loss or accuracy can be
            axis.fill_between(epochs, low, mean + spread, color=color, **BAND)
            ends = f"{ends.removesuffix('%')} ± {spread[-1]:.2%} ({len(runs)})"
        label = f"{literal(name)}: {ends}, training {trained[:, -1].mean():.2%}"
        axis.plot(epochs, evaluated.mean(0), "-", label=label, **style)


def plot_lr_finder(result: LRFinderResult, rule: str | None = None) -> Figure:
    """Loss against rate in a range test, with what each rule suggests; `rule` is drawn bold."""
    losses = np.array(result.losses)
    curve = smooth(finite_losses(result.losses))
    title = f"Learning-rate range test, {len(losses)} steps"
    with styled(STYLE):
        figure = new_figure(figsize=(9.5, 4), layout="constrained")
        axis = figure.subplots()
        if len(curve):
            axis.plot(result.lrs, losses, color="0.6", linewidth=1.5, label="training loss")
            axis.plot(result.lrs[: len(curve)], curve, color="0.2", linewidth=2, label="smoothed")
            low, first = curve.min(), curve[0]
            axis.set_ylim(low - 0.15 * (first - low), first + 0.5 * (first - low) + 0.1)
        else:  # as of a run whose checkpoint alone knows its rates
            title = "Learning-rate range test, whose losses are lost"
        draw_suggestions(axis, result.suggestions, rule)
        axis.set(xscale="log", xlabel="learning rate", ylabel="loss", title=title)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def draw_suggestions(axis: Axes, suggestions: dict[str, float], rule: str | None) -> None:
    """A line at each suggested rate; rules that suggest the same share one, so that none is hidden."""
    rules: dict[float, list[str]] = {}
    for name, rate in suggestions.items():
        rules.setdefault(rate, []).append(name)
    for (rate, names), color in zip(rules.items(), COLORS, strict=False):
        words = [plain(name.replace("_", " ")) + " (used)" * (name == rule) for name in names]
        label = literal(",\n".join(words) + f": {rate:.2e}")
        used: dict[str, Any] = {"linestyle": "-", "linewidth": 2.5}
        line = used if rule in names else {"linestyle": "--", "linewidth": 1.2}
        axis.axvline(rate, color=color, label=label, **line)


def plot_lr_history(lrs: Sequence[float] | History, steps_per_epoch: int | None = None) -> Figure:
    """The learning rate that each step used, drawn at the step's end.

    Args:
        lrs: rates, or the history that has them.
        steps_per_epoch: none: that of the history, or the axis counts steps.
    """
    if isinstance(lrs, History):
        steps_per_epoch = steps_per_epoch or lrs.steps_per_epoch
        lrs = lrs.lrs
    if not len(lrs):
        raise ValueError("there is no learning rate to draw: no step was trained")
    unit, label = ("epoch", "epochs trained") if steps_per_epoch else ("step", "steps trained")
    ends = (np.arange(len(lrs)) + 1) / (steps_per_epoch or 1)
    peak = int(np.argmax(lrs))
    title = f"Learning rate: {lrs[0]:.2e}"
    if min(lrs) == max(lrs):
        title += " throughout"
    elif 0 < peak < len(lrs) - 1:
        title += f" → {lrs[peak]:.2e} at {unit} {ends[peak]:.3g} → {lrs[-1]:.2e}"
    else:
        title += f" → {lrs[-1]:.2e}"
    with styled(STYLE):
        figure = new_figure(figsize=(8, 3.4), layout="constrained")
        axis = figure.subplots()
        axis.plot(ends, lrs, color=COLORS[0], marker="o" if len(lrs) <= 20 else "", markersize=4)
        axis.set(xlabel=label, ylabel="learning rate", ylim=(0, None), title=title)
        axis.set_xlim(0, ends[-1] * 1.03)
    return figure
