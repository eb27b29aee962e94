"""Draws figures from arrays, histories and, for Grad-CAM, a model; trains nothing and loads no data.

Every function returns a matplotlib `Figure`. A notebook shows it at the end of its cell, `plt.show()`
anywhere, and `save_figure` keeps it. What shows pictures or answers takes them in each of the forms
of `from_anything`, in reporting/collected.py, and in any order.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import nn

from files import write_whole
from reporting.augmented import each_step
from reporting.collected import from_anything
from reporting.curves import COLORS, plot_history, plot_lr_finder, plot_lr_history
from reporting.gradcam import cam_layers, check_layer, gradcam, name_of_layer, overlay
from reporting.lettering import STYLE, font_note, legible, literal, style, wrap
from reporting.screen import new_figure, styled
from reporting.tiles import cam_grid, draw_cams, gallery, picture_rows
from sources import load_split
from training.loops import predict
from transforms import CIFAR10_MEAN, CIFAR10_STD, normalize, train_transform
from utils import Predictions, share_interval, show_probability

__all__ = [
    "cam_layers",
    "class_accuracy",
    "class_counts",
    "gradcam",
    "overlay",
    "plot_augmentations",
    "plot_class_accuracy",
    "plot_confusion_matrix",
    "plot_gradcam",
    "plot_gradcam_layers",
    "plot_history",
    "plot_lr_finder",
    "plot_lr_history",
    "plot_misclassified",
    "plot_reliability",
    "plot_samples",
    "plot_samples_by_class",
    "save_figure",
]
MOST_NAMES = 200  # of classes beside a matrix: more could not be read
CAM_NOTE = (
    "The layer's map has {} x {} places and is enlarged to the image. Colour is evidence for a class: "
    "what a place adds to the class's score (logit). Both maps of an image have one scale, beside them."
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


@from_anything
def plot_samples(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], count: int = 20, title: str = ""
) -> Figure:
    """The first images with their class names; of a loader those of its next batch.

    Args:
        images: uint8 (N, H, W, 3), or a loader in place of images and labels.
        labels: int (N,).
    """
    count = min(count, len(images))
    names = legible(classes)
    return gallery(images[:count], [names[label] for label in labels[:count]], title, font_note(classes))


@from_anything
def plot_samples_by_class(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], each: int = 8
) -> Figure:
    """The first images of each class, a class in each row, and how many it has.

    Args:
        images: uint8 (N, H, W, 3), or a loader or dataset in place of images and labels.
        labels: int (N,).
        each: images of a class at most.
    """
    counts = np.bincount(labels, minlength=len(classes))
    rows = [images[np.flatnonzero(labels == k)[:each]] for k in range(len(classes))]
    names = [f"{name} ({n:,})" for name, n in zip(legible(classes), counts, strict=True)]
    title = f"{len(labels):,} images by class"
    return picture_rows(rows, names, title=title, note=font_note(classes))


@from_anything
def class_counts(labels: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """How many images each class has.

    Args:
        labels: int (N,), or a loader or dataset.
    """
    counts = np.bincount(labels, minlength=len(classes))
    return dict(zip(classes, counts.tolist(), strict=True))


def plot_augmentations(
    transform: Any = None, images: Any = None, count: int = 8, seed: int = 0
) -> Figure:
    """What each step of a pipeline does to some images: a step in each row, alone and always applied.

    Args:
        transform: an `A.Compose`; none: `train_transform()`.
        images: uint8 (N, H, W, 3), or a loader or dataset, whose pictures are shown; none: those of
            the sample in the repository.
        count: images at most.
        seed: of the random numbers.
    """
    if hasattr(images, "set_random_state") or hasattr(getattr(transform, "dataset", transform), "data"):
        transform, images = images, transform
    pictures = getattr(getattr(images, "dataset", images), "data", images)
    pictures = load_split("cifar10-sample", "train").images if images is None else np.asarray(pictures)
    pictures = pictures[:count]
    steps = each_step(train_transform() if transform is None else transform, pictures, seed)
    rows = {"as it is": list(pictures), **steps}
    note = (
        "Each step alone, as if its probability were 1; one that changes the size is done in the rows "
        "below it, too. The last row is the whole pipeline."
    )
    return picture_rows(list(rows.values()), list(rows), title="What each augmentation does", note=note)


@from_anything
def plot_misclassified(
    images: np.ndarray, predictions: Predictions, classes: Sequence[str], count: int = 20
) -> Figure:
    """The most confident mistakes: true class, predicted class, its probability.

    Args:
        images: uint8 (N, H, W, 3), in the order of `predictions`; they may be left out where
            `predict` kept them.
        count: how many at most; a model without mistakes gets a figure that says so.
    """
    check_match(predictions, classes)
    chosen = predictions.misclassified(count)
    total, mistakes = len(predictions.labels), len(predictions.misclassified())
    names = legible(classes)
    titles = [mistake(predictions, index, names) for index in chosen]
    share = f"{mistakes / total:.1%}" if total else "none"
    title = f"{mistakes:,} of {total:,} misclassified ({share}); the most confident mistakes"
    if not predictions.with_probabilities:
        title = f"{mistakes:,} of {total:,} misclassified"
    if total == mistakes:  # mistakes alone were collected
        title = f"{mistakes:,} misclassified"
    return gallery(images[chosen], titles, title, font_note(classes))


def check_match(predictions: Predictions, classes: Sequence[str]) -> None:
    """Refuse predictions of other classes than are named.

    Raises:
        ValueError: how many there are of each.
    """
    known = predictions.probabilities.shape[1]
    if len(classes) != known:
        raise ValueError(f"the predictions know {known} classes, and {len(classes)} names are given")


def mistake(predictions: Predictions, index: int, classes: Sequence[str]) -> str:
    """Title of one image: its number and truth, prediction and its probability, on two lines."""
    true, predicted = predictions.labels[index], predictions.predicted[index]
    probability = probability_of(predictions, index, predicted)
    return f"#{index} {classes[true]}\n→ {classes[predicted]} {probability}".rstrip()


def probability_of(predictions: Predictions, index: int, answer: int) -> str:
    """The probability of a class for an image, if it is known."""
    if not predictions.with_probabilities:
        return ""
    return show_probability(predictions.probabilities[index, answer])


@from_anything
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
    with styled(STYLE):
        figure = new_figure(figsize=(5.4, 5.4), layout="constrained")
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


@from_anything
def class_accuracy(predictions: Predictions, classes: Sequence[str]) -> dict[str, float]:
    """The share of each class's images that are found, from 0 to 1; NaN where it has no image."""
    right = predictions.predicted == predictions.labels
    hits, counts = (
        np.bincount(labels, minlength=len(classes))
        for labels in (predictions.labels[right], predictions.labels)
    )
    shares = np.where(counts > 0, hits / np.maximum(counts, 1), np.nan)
    return dict(zip(classes, shares.tolist(), strict=True))


@from_anything
def plot_class_accuracy(predictions: Predictions, classes: Sequence[str]) -> Figure:
    """The share of each class's images that are found, with 95 % intervals (Wilson)."""
    shares = list(class_accuracy(predictions, classes).values())
    counts = np.bincount(predictions.labels, minlength=len(classes))
    judged = np.flatnonzero(counts)
    limits = [share_interval(round(shares[k] * counts[k]), counts[k]) for k in judged]
    bars = np.abs(np.transpose(limits) - np.array(shares)[judged])
    names = [f"{name} ({n:,})" for name, n in zip(legible(classes), counts, strict=True)]
    with styled(style("".join(names))):
        figure = new_figure(figsize=(7, min(1.2 + 0.28 * len(names), 40)), layout="constrained")
        axis = figure.subplots()
        axis.barh(judged, np.array(shares)[judged], color=COLORS[0], xerr=bars, capsize=2, ecolor="0.3")
        axis.axvline(predictions.accuracy, color="0.3", linestyle="--", linewidth=1, label="all images")
        if len(names) <= MOST_NAMES:
            axis.set_yticks(range(len(names)), [literal(name) for name in names])
        axis.set(
            xlim=(0, 1),
            ylim=(len(names) - 0.4, -0.6),
            xlabel="share of the class's images that are found",
        )
        whole = f"the dashed line is that of all images, {predictions.accuracy:.2%}"
        axis.set_title(f"Accuracy of each class, with 95% intervals;\n{whole}")
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.grid(axis="y", visible=False)
        figure.supxlabel(textwrap.fill(font_note(classes), 80), fontsize=8)
    return figure


@from_anything
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
    with styled(style("".join(names)) | {"axes.grid": False}):
        figure = new_figure(figsize=(side + 0.8, side), layout="constrained")
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


@from_anything
def plot_gradcam(  # noqa: PLR0913
    model: nn.Module,
    images: np.ndarray,
    predictions: Predictions,
    classes: Sequence[str],
    layer: Any = None,
    count: int = 10,
    *,
    right: bool = False,
    mean: tuple[float, ...] = CIFAR10_MEAN,
    std: tuple[float, ...] = CIFAR10_STD,
) -> Figure:
    """The most confident mistakes, and Grad-CAM against the correct and the predicted class.

    Args:
        images: uint8 (N, H, W, 3), in the order of `predictions`; they may be left out where
            `predict` kept them.
        layer: as in `gradcam`.
        count: how many mistakes at most.
        right: show the surest right answers instead, and beside each the class that comes second.
        mean, std: the normalisation that the model was trained with.
    """
    check_match(predictions, classes)
    layer = name_of_layer(model, layer, images.shape[2])
    places = check_layer(model, layer, images.shape[2])
    chosen = right_answers(predictions, count) if right else predictions.misclassified(count)
    if not len(chosen):
        what = (
            "no answer is right" if right else "nothing is misclassified: there is no mistake to explain"
        )
        return gallery(images[chosen], [], what)
    inputs = normalize(images[chosen], mean, std)
    some = Predictions(predictions.probabilities[chosen], predictions.labels[chosen])
    if not predictions.with_probabilities and right:
        device = next(model.parameters()).device
        some = predict(model, device, [(inputs, torch.from_numpy(some.labels))], precision="fp32")
    elif not predictions.with_probabilities:
        some = replace(some, with_probabilities=False)
    pair = {"true": some.labels, "predicted": some.predicted}
    if right:
        pair = {"right": some.labels, "second": second_answers(some)}
    maps = [gradcam(model, inputs, layer, targets) for targets in pair.values()]
    names = legible(classes)
    titles = [
        [f"#{number}", *(cam_title(some, k, names, kind, pair[kind][k]) for kind in pair)]
        for k, number in enumerate(chosen)
    ]
    notes = [CAM_NOTE.format(*places)]
    if not all(heat.any() for one in maps for heat in one):
        notes.append(NO_EVIDENCE)
    head = f"Grad-CAM at {layer}: image, evidence for the {' and for the '.join(pair)} class"
    with styled(style("".join(names))):
        figure, cells = cam_grid(head, titles, [*notes, font_note(classes)])
        for row, index, *heats in zip(cells, chosen, *maps, strict=True):
            draw_cams(row, images[index], heats)
    return figure


def right_answers(predictions: Predictions, count: int) -> np.ndarray:
    """Indices of right answers, the surest first, a class after the other."""
    right = np.flatnonzero(predictions.predicted == predictions.labels)
    right = right[np.argsort(-predictions.probabilities[right].max(1), kind="stable")]
    labels = predictions.labels[right]
    rank = np.array([(labels[:k] == label).sum() for k, label in enumerate(labels)], int)
    return right[np.argsort(rank, kind="stable")][:count]


def second_answers(predictions: Predictions) -> np.ndarray:
    """Of each image the most probable class that is not its own."""
    others = predictions.probabilities.copy()
    others[np.arange(len(others)), predictions.labels] = -1
    return others.argmax(1)


def cam_title(predictions: Predictions, index: int, names: Sequence[str], kind: str, answer: int) -> str:
    """A class of an image, why it is shown, and its probability."""
    return wrap(f"{kind}\n{names[answer]}\n{probability_of(predictions, index, answer)}".rstrip(), 1.2)


@from_anything
def plot_gradcam_layers(  # noqa: PLR0913
    model: nn.Module,
    images: np.ndarray,
    predictions: Predictions,
    classes: Sequence[str],
    layers: Sequence[Any] | None = None,
    count: int = 5,
    *,
    right: bool = False,
    mean: tuple[float, ...] = CIFAR10_MEAN,
    std: tuple[float, ...] = CIFAR10_STD,
) -> Figure:
    """Grad-CAM of the answers at several layers side by side, for the most confident mistakes.

    Args:
        layers: as in `gradcam`; none: every stage whose maps are large enough.
        right: show the surest right answers instead.
        images, predictions, count, mean, std: as in `plot_gradcam`.
    """
    chosen = right_answers(predictions, count) if right else predictions.misclassified(count)
    layers = [name_of_layer(model, layer) for layer in layers or cam_layers(model, images.shape[2])]
    inputs, answers = normalize(images[chosen], mean, std), predictions.predicted[chosen]
    maps = {layer: gradcam(model, inputs, layer, answers) for layer in layers}
    rows = [
        [images[index], *(overlay(images[index], heat[k]) for heat in maps.values())]
        for k, index in enumerate(chosen)
    ]
    names = [mistake(predictions, index, legible(classes)) for index in chosen]
    note = (
        "Evidence for the class that is answered. Each map has a scale of its own: their units differ."
    )
    title = "Grad-CAM at several layers" if rows else "there is no answer of this kind to explain"
    return picture_rows(rows, names, ["image", *layers], title=title, note=note)
