"""Draws figures from arrays, histories and, for Grad-CAM, a model; trains nothing and loads no data.

Every function returns a matplotlib `Figure` that belongs to no window: show it by naming it in a
notebook, keep it with `save_figure`.
"""

import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter, PercentFormatter
from torch import nn

from files import write_whole
from reporting.gradcam import cam_layers as cam_layers  # offered here, too
from reporting.gradcam import check_layer, gradcam, overlay
from reporting.lettering import STYLE, font_note, legible, literal, style, wrap
from training.lr_finder import LRFinderResult, finite_losses, smooth
from transforms import CIFAR10_MEAN, CIFAR10_STD, normalize
from utils import History, Predictions, plain, share_interval, show_probability

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v")  # five and six: thirty runs until colour and mark repeat together
TRAINING: dict[str, Any] = {"linestyle": "--", "linewidth": 1, "alpha": 0.7}
BAND: dict[str, Any] = {"alpha": 0.2, "linewidth": 0}
MOST_NAMES = 200  # of classes beside a matrix: more could not be read
CAM_NOTE = (
    "The layer's map has {} x {} places and is enlarged to the image. Colour is evidence for a class: "
    "what a place adds to the class's score (logit). Both maps of a mistake have one scale, beside them."
)
NO_EVIDENCE = (
    "No evidence: at this layer nothing speaks for the class. What speaks against it is not drawn."
)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the file's suffix; a previous file stays whole until then.

    Raises:
        ValueError: matplotlib has no such format.
        OSError: it could not be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:] or "png")
    write_whole(path, content.getvalue())


def plot_samples(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], count: int = 20, title: str = ""
) -> Figure:
    """The first images with their class names.

    Args:
        images: uint8 (N, H, W, 3), as loaded or from `transforms.denormalize`.
        labels: int (N,).
    """
    count = min(count, len(images))
    names = legible(classes)
    return gallery(images[:count], [names[label] for label in labels[:count]], title, font_note(classes))


def plot_misclassified(
    images: np.ndarray, predictions: Predictions, classes: Sequence[str], count: int = 20
) -> Figure:
    """The most confident mistakes: true class, predicted class, its probability.

    Args:
        images: uint8 (N, H, W, 3), in the order of `predictions`.
        count: how many at most; a model without mistakes gets a figure that says so.
    """
    check_match(predictions, classes, images)
    chosen = predictions.misclassified(count)
    total, mistakes = len(predictions.labels), len(predictions.misclassified())
    names = legible(classes)
    titles = [mistake(predictions, index, names) for index in chosen]
    title = (
        f"{mistakes:,} of {total:,} misclassified ({mistakes / total:.1%}); the most confident mistakes"
    )
    return gallery(images[chosen], titles, title, font_note(classes))


def check_match(
    predictions: Predictions, classes: Sequence[str], images: np.ndarray | None = None
) -> None:
    """Refuse predictions of other classes or other images than are given.

    Raises:
        ValueError: how many there are of each.
    """
    count, known = predictions.probabilities.shape
    if len(classes) != known:
        raise ValueError(f"the predictions know {known} classes, and {len(classes)} names are given")
    if images is not None and len(images) != count:
        raise ValueError(f"there are predictions of {count:,} images, and {len(images):,} are given")


def mistake(predictions: Predictions, index: int, classes: Sequence[str]) -> str:
    """Title of one image: its number and truth, prediction and its probability, on two lines."""
    true, predicted = predictions.labels[index], predictions.predicted[index]
    probability = show_probability(predictions.probabilities[index, predicted])
    return f"#{index} {classes[true]}\n→ {classes[predicted]} {probability}"


def gallery(images: np.ndarray, titles: Sequence[str], title: str, note: str = "") -> Figure:
    """Images in rows of five, or seven, each under its title; no images at all is a figure too.

    At most 10 inches wide, so that no notebook shrinks the titles.

    Args:
        note: a sentence below them all.
    """
    columns, inches = (5, 1.65) if len(images) <= 20 else (7, 1.4)
    rows = max(1, -(-len(images) // columns))
    titles = [wrap(name, inches) for name in titles]
    with matplotlib.rc_context(style("".join(titles))):
        height = inches + 0.08 + 0.15 * max((1 + name.count("\n") for name in titles), default=0)
        size = (inches * columns, height * rows + 0.4 * bool(title) + 0.4 * bool(note))
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=11)
        figure.supxlabel(textwrap.fill(note, 100), fontsize=8)
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for cell in cells:
            cell.set_axis_off()
        for cell, image, name in zip(cells, images, titles, strict=False):
            cell.imshow(image)
            cell.set_title(name, fontsize=9, pad=3)
    return figure


def plot_history(histories: Mapping[str, History | Sequence[History]]) -> Figure:
    """Loss and accuracy of one run or several, each with a colour and a mark of its own.

    Solid lines are the test set, or the validation set where a run had one; thin dashed lines are
    training. Of several runs under one name, all as long, the mean is drawn, and a band of one standard
    deviation to each side of it.
    """
    if not histories or not all(history.epochs for history in histories.values()):
        raise ValueError("there is a history without an epoch, or none: nothing can be drawn")
    height = 3.9 + 0.24 * -(-(len(histories) + 1) // 2)
    names = legible(list(histories), "run")
    with matplotlib.rc_context(style("".join(names))):
        figure = Figure(figsize=(10, height), layout="constrained")
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
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4), layout="constrained")
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


def plot_lr_history(lrs: Sequence[float], steps_per_epoch: int) -> Figure:
    """The learning rate that each step used, drawn at the step's end."""
    ends = (np.arange(len(lrs)) + 1) / steps_per_epoch
    peak = int(np.argmax(lrs))
    title = f"Learning rate: {lrs[0]:.2e}"
    if min(lrs) == max(lrs):
        title += " throughout"
    elif 0 < peak < len(lrs) - 1:
        title += f" → {lrs[peak]:.2e} at epoch {ends[peak]:.3g} → {lrs[-1]:.2e}"
    else:
        title += f" → {lrs[-1]:.2e}"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        axis = figure.subplots()
        axis.plot(ends, lrs, color=COLORS[0], marker="o" if len(lrs) <= 20 else "", markersize=4)
        axis.set(xlabel="epochs trained", ylabel="learning rate", ylim=(0, None), title=title)
        axis.set_xlim(0, ends[-1] * 1.03)
    return figure


def plot_reliability(predictions: Predictions) -> Figure:
    """How often answers are right, against the probability that the network gave them.

    Bars are 95 % intervals (Wilson); below stands how many answers each point is of.
    """
    calibration = predictions.calibration()
    edges = np.arange(len(calibration.answers)) / len(calibration.answers)
    filled_bins = np.flatnonzero(calibration.answers)
    share = calibration.right[filled_bins] / calibration.answers[filled_bins]
    limits = [share_interval(calibration.right[k], calibration.answers[k]) for k in filled_bins]
    bars = np.abs(np.transpose(limits) - share)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 5.4), layout="constrained")
        top, low = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([0, 1], [0, 1], "--", color="0.5", linewidth=1, label="as often right as it says")
        marks: dict[str, Any] = {"color": COLORS[0], "fmt": "o", "markersize": 5, "capsize": 2}
        label = "this network, with 95% intervals"
        top.errorbar(calibration.probability[filled_bins], share, bars, label=label, **marks)
        low.bar(edges, calibration.answers, width=0.9 / len(edges), align="edge", color=COLORS[0])
        top.legend(loc="best", fontsize=9)
        top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share of right answers")
        top.set_title(f"Reliability: expected calibration error {100 * calibration.error:.1f} points")
        low.set(xlabel="probability of the answer", ylabel="answers")
        for axis in (top.xaxis, top.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        low.yaxis.get_major_locator().set_params(integer=True)
    return figure


def plot_confusion_matrix(predictions: Predictions, classes: Sequence[str]) -> Figure:
    """Counts of true class (rows) against predicted class (columns), coloured by share of the row.

    Over 20 classes have no counts, over `MOST_NAMES` no names either: they could not be read.
    """
    from sklearn.metrics import confusion_matrix  # a second of imports

    check_match(predictions, classes)
    labels = range(len(classes))
    counts = confusion_matrix(predictions.labels, predictions.predicted, labels=labels)
    totals = counts.sum(1)
    few = len(classes) <= 20
    side = max(5.0, (0.62 if few else 0.17) * len(classes) + 1.4)
    side = side if len(classes) <= MOST_NAMES else 12.0
    names = legible(classes)
    with matplotlib.rc_context(style("".join(names)) | {"axes.grid": False}):
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(counts / np.maximum(totals, 1)[:, None], cmap="Blues", vmin=0, vmax=1)
        if few:
            draw_counts(axis, counts, totals)
        name_classes(axis, names, totals)
        axis.set(
            xlabel="predicted class",
            ylabel="true class (number of its images)" if len(classes) <= MOST_NAMES else "true class",
            title=f"Confusion matrix, accuracy {predictions.accuracy:.2%}\n{matrix_note(len(classes))}",
        )
        share = "share of the images of the true class"
        figure.colorbar(image, format=PercentFormatter(1.0, decimals=0), shrink=0.8, label=share)
        figure.supxlabel(textwrap.fill(font_note(classes), int(12 * side)), fontsize=8)
    return figure


def matrix_note(count: int) -> str:
    """What the cells of a matrix of so many classes show."""
    if count <= 20:
        return "number: images; colour: their share of the row"
    if count <= MOST_NAMES:
        return "colour: share of the row; the numbers are left out, as there are over 20 classes"
    return f"colour: share of the row; {count:,} names could not be read: these are the classes' numbers"


def draw_counts(axis: Axes, counts: np.ndarray, totals: np.ndarray) -> None:
    """The number of images in each cell of a matrix, white on dark cells."""
    for row, column in np.ndindex(counts.shape):
        color = "white" if counts[row, column] > 0.5 * totals[row] else "black"
        place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8.5}
        axis.text(column, row, f"{counts[row, column]:,}", color=color, **place)


def name_classes(axis: Axes, names: Sequence[str], totals: np.ndarray) -> None:
    """The names beside the rows, with how many images each has, and below the columns."""
    if len(names) > MOST_NAMES:
        return
    few = len(names) <= 20
    letters: dict[str, Any] = {"fontsize": 10 if few else 8}
    rows = [f"{name} ({total:,})" for name, total in zip(names, totals, strict=True)]
    rows, columns = ([wrap(x, 1.8) if few else literal(x) for x in texts] for texts in (rows, names))
    turn = {"rotation": 45, "rotation_mode": "anchor", "ha": "right"} if few else {"rotation": 90}
    axis.set_xticks(range(len(names)), columns, **turn, **letters)
    axis.set_yticks(range(len(names)), rows, **letters)


def plot_gradcam(
    model: nn.Module,
    images: np.ndarray,
    predictions: Predictions,
    classes: Sequence[str],
    *,
    layer: str,
    count: int = 10,
    mean: tuple[float, ...] = CIFAR10_MEAN,
    std: tuple[float, ...] = CIFAR10_STD,
) -> Figure:
    """The most confident mistakes, and Grad-CAM against the correct and the predicted class.

    Args:
        images: uint8 (N, H, W, 3), in the order of `predictions`.
        layer: as in `gradcam`.
        count: how many mistakes at most.
        mean, std: the normalisation that the model was trained with.
    """
    check_match(predictions, classes, images)
    chosen = predictions.misclassified(count)
    places = check_layer(model, layer, images.shape[2])
    if not len(chosen):
        return gallery(images[chosen], [], "nothing is misclassified: there is no mistake to explain")
    inputs = normalize(images[chosen], mean, std)
    answers = predictions.labels[chosen], predictions.predicted[chosen]
    pairs = [gradcam(model, inputs, layer, targets) for targets in answers]
    names = legible(classes)
    titles = [
        [f"#{index}", *(cam_title(predictions, index, names, kind) for kind in ("true", "predicted"))]
        for index in chosen
    ]
    notes = [CAM_NOTE.format(*places)]
    if not all(heat.any() for maps in pairs for heat in maps):
        notes.append(NO_EVIDENCE)
    head = f"Grad-CAM at {layer}: image, evidence for the true and for the predicted class"
    with matplotlib.rc_context(style("".join(names))):
        figure, cells = cam_grid(head, titles, [*notes, font_note(classes)])
        for row, index, *maps in zip(cells, chosen, *pairs, strict=True):
            draw_cams(row, images[index], maps)
    return figure


def cam_title(predictions: Predictions, index: int, names: Sequence[str], kind: str) -> str:
    """The true or the predicted class of an image, and its probability, on lines of their own."""
    answer = (predictions.labels if kind == "true" else predictions.predicted)[index]
    probability = show_probability(predictions.probabilities[index, answer])
    return wrap(f"{kind}\n{names[answer]}\n{probability}", 1.2)


def cam_grid(head: str, titles: list[list[str]], notes: list[str]) -> tuple[Figure, list[list[Axes]]]:
    """Two mistakes a row, each of three tiles and a bar, in inches: all tiles are equally large."""
    tile, bar, gap = 1.22, 0.1, 0.08
    heading = 0.14 * max(title.count("\n") + 1 for trio in titles for title in trio) + 0.14
    lines = [line for note in notes for line in textwrap.wrap(note, 140)]
    rows, foot = -(-len(titles) // 2), 0.16 * len(lines) + 0.12
    width, height = 9.5, rows * (tile + heading) + 0.3 + foot
    figure = Figure(figsize=(width, height))
    figure.suptitle(head, fontsize=11, y=1 - 0.08 / height, va="top")
    figure.text(0.1 / width, 0.06 / height, "\n".join(lines), fontsize=8, va="bottom", linespacing=1.3)
    cells = []
    for place, trio in enumerate(titles):
        left = 0.1 + (place % 2) * width / 2
        low = height - 0.3 - (place // 2 + 1) * (tile + heading)
        lefts = [left + k * (tile + gap) for k in range(4)]
        boxes = [(x, low, tile if k < 3 else bar, tile) for k, x in enumerate(lefts)]
        row = [figure.add_axes((x / width, y / height, w / width, h / height)) for x, y, w, h in boxes]
        for cell, title in zip(row, trio, strict=False):
            cell.set_title(title, fontsize=8.5, pad=3)
        cells.append(row)
    return figure, cells


def draw_cams(cells: Sequence[Axes], image: np.ndarray, maps: Sequence[np.ndarray]) -> None:
    """One mistake: the image, and in grey under the map of each of two classes, with their scale."""
    top = float(max(heat.max() for heat in maps))
    for cell, picture in zip(
        cells, [image, *(overlay(image, heat, top=top) for heat in maps)], strict=False
    ):
        cell.imshow(picture)
        cell.set_axis_off()
    for cell, heat in zip(cells[1:], maps, strict=False):
        if not heat.any():
            box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
            cell.text(
                0.5, 0.5, "no evidence", transform=cell.transAxes, ha="center", fontsize=8.5, bbox=box
            )
    bar = cells[3]
    if not top:
        bar.set_axis_off()
        return
    ramp = np.linspace(1, 0, 64, dtype=np.float32)[:, None]
    bar.imshow(overlay(np.full((64, 1, 3), 128, np.uint8), ramp), aspect="auto", extent=(0, 1, 0, top))
    bar.yaxis.tick_right()
    bar.set_yticks([0, top], ["0", f"{top:.2g}"], fontsize=8)
    bar.set_xticks([])
    bar.grid(False)
