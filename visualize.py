"""Draws figures from arrays, histories and, for Grad-CAM, a model; trains nothing and loads no data.

Every function returns a matplotlib `Figure` that belongs to no window: show it by naming it in a
notebook, keep it with `save_figure`.
"""

import copy
import io
import itertools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn

from files import write_whole
from training.lr_finder import LRFinderResult, finite_losses, smooth
from transforms import CIFAR10_MEAN, CIFAR10_STD, normalize
from utils import History, Predictions, nearest

# Okabe and Ito's colours, told apart with every kind of colour vision.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MARKS = ("o", "s", "^", "D", "v")  # five and six: thirty runs until colour and mark repeat together
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.dpi": 110,
    "figure.constrained_layout.h_pad": 0.06,  # inches
}
# Of an image. Where its height is given matplotlib need not look for ticks in the way: half the time.
TITLE = {"y": 1.0, "pad": 3}  # axes, points
WIDEST = 40  # inches, of a confusion matrix
SMALLEST_MAP = 5  # pixels: a class activation map under 5 x 5 shows where nothing is


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
    names = [classes[label] for label in labels[:count]]
    return gallery(images[:count], names, title)


def plot_misclassified(
    images: np.ndarray, predictions: Predictions, classes: Sequence[str], count: int = 20
) -> Figure:
    """The most confident mistakes: true class, predicted class, its probability.

    Args:
        images: uint8 (N, H, W, 3), in the order of `predictions`.
        count: how many at most; a model without mistakes gets a figure that says so.
    """
    chosen = predictions.misclassified(count)
    total, wrong = len(predictions.labels), len(predictions.misclassified())
    titles = [mistake(predictions, index, classes) for index in chosen]
    title = f"{wrong:,} of {total:,} misclassified ({wrong / total:.1%}); the most confident mistakes"
    return gallery(images[chosen], titles, title)


def mistake(predictions: Predictions, index: int, classes: Sequence[str]) -> str:
    """Title of one image: truth, prediction and its probability, on two lines."""
    true, predicted = predictions.labels[index], predictions.predicted[index]
    return f"{classes[true]}\n→ {classes[predicted]} {predictions.probabilities[index, predicted]:.1%}"


def gallery(images: np.ndarray, titles: Sequence[str], title: str) -> Figure:
    """Images in rows of five, or seven, each under its title; no images at all is a figure too.

    At most 10 inches wide, so that no notebook shrinks the titles.
    """
    columns, inches = (5, 1.65) if len(images) <= 20 else (7, 1.4)
    rows = max(1, -(-len(images) // columns))
    titles = [wrap(name, inches) for name in titles]
    with matplotlib.rc_context(STYLE):
        height = inches + 0.08 + 0.15 * max((1 + name.count("\n") for name in titles), default=0)
        size = (inches * columns, height * rows + 0.4 * bool(title))
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, fontsize=11)
        cells = figure.subplots(rows, columns, squeeze=False).ravel()
        for cell in cells:
            cell.set_axis_off()
        for cell, image, name in zip(cells, images, titles, strict=False):
            cell.imshow(image)
            cell.set_title(name, fontsize=9, **TITLE)
    return figure


def wrap(text: str, inches: float) -> str:
    """A small title in lines that are no longer than its picture is wide."""
    letters = int(inches * 14)  # of DejaVu Sans, 9 points
    return literal("\n".join(textwrap.fill(line, letters) for line in text.splitlines()))


def literal(text: str) -> str:
    """A name that matplotlib draws as it is: between two dollar signs it would expect mathematics."""
    return text.replace("$", r"\$")


def plot_history(histories: dict[str, History]) -> Figure:
    """Loss and accuracy of one run or several, each with a colour and a mark of its own.

    Solid lines are the test set, or the validation set where a run had one; thin dashed lines are
    training.
    """
    height = 3.9 + 0.24 * -(-len(histories) // 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, height), layout="constrained")
        axes = figure.subplots(1, 2)
        looks = zip(itertools.cycle(COLORS), itertools.cycle(MARKS), strict=False)
        for (name, history), (color, mark) in zip(histories.items(), looks, strict=False):
            draw_curves(axes, name, history, color, mark)
        for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
            axis.set(xlabel="epoch", title=f"{metric.capitalize()} (dashed: training)")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        losses = np.concatenate([line.get_ydata() for line in axes[0].lines])
        if losses.max() > 20 * np.median(losses):  # one that diverged would flatten the others
            axes[0].set_yscale("log")
        lines = [line for line in axes[1].lines if line.get_linestyle() == "-"]
        figure.legend(handles=lines, loc="outside lower center", ncols=min(2, len(lines)))
    return figure


def draw_curves(axes: np.ndarray, name: str, history: History, color: str, mark: str) -> None:
    """A run's loss and accuracy on two axes; the solid line's label tells how both end."""
    part = history.epochs[0].parts[1]
    epochs = [row.epoch for row in history.epochs]
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        trained = [getattr(row, f"train_{metric}") for row in history.epochs]
        evaluated = [getattr(row, f"{part}_{metric}") for row in history.epochs]
        axis.plot(epochs, trained, "--", color=color, linewidth=1, alpha=0.6)
        style = {"color": color, "marker": mark, "markersize": 5, "linewidth": 2}
        label = f"{literal(name)}: {part} {evaluated[-1]:.2%}, training {trained[-1]:.2%}"
        axis.plot(epochs, evaluated, "-", label=label, **style)


def plot_lr_finder(result: LRFinderResult, rule: str | None = None) -> Figure:
    """Loss against rate in a range test, with what each rule suggests; `rule` is drawn bold."""
    losses = np.array(result.losses)
    curve = smooth(finite_losses(result.losses))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4), layout="constrained")
        axis = figure.subplots()
        axis.plot(result.lrs, losses, color="0.6", linewidth=1.5, label="training loss")
        axis.plot(result.lrs[: len(curve)], curve, color="0.2", linewidth=2, label="smoothed")
        for (name, rate), color in zip(result.suggestions.items(), COLORS, strict=False):
            used = name == rule
            label = f"{name.replace('_', ' ')}: {rate:.2e}{' (used)' if used else ''}"
            axis.axvline(
                rate,
                color=color,
                linestyle="-" if used else "--",
                label=label,
                linewidth=2.5 if used else 1.2,
            )
        low, first = curve.min(), curve[0]
        limits = (low - 0.15 * (first - low), first + 0.5 * (first - low) + 0.1)
        axis.set(
            xscale="log",
            xlabel="learning rate",
            ylabel="loss",
            ylim=limits,
            title=f"Learning-rate range test, {len(losses)} steps",
        )
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    return figure


def plot_lr_history(lrs: Sequence[float], steps_per_epoch: int) -> Figure:
    """The learning rate that each step used."""
    steps = np.arange(len(lrs)) / steps_per_epoch
    peak = int(np.argmax(lrs))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        axis = figure.subplots()
        axis.plot(steps, lrs, color=COLORS[0])
        axis.set(
            xlabel="epochs trained",
            ylabel="learning rate",
            ylim=(0, None),
            title=f"Learning rate: {lrs[0]:.2e} → {lrs[peak]:.2e} at epoch "
            f"{(peak + 1) / steps_per_epoch:.1f} → {lrs[-1]:.2e}",
        )
    return figure


def plot_confusion_matrix(predictions: Predictions, classes: Sequence[str]) -> Figure:
    """Counts of true class (rows) against predicted class (columns), coloured by share of the row."""
    from sklearn.metrics import confusion_matrix  # a second of imports

    labels = range(len(classes))
    counts = confusion_matrix(predictions.labels, predictions.predicted, labels=labels)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(max(5.0, (0.62 if len(classes) <= 20 else 0.17) * len(classes) + 1.4), WIDEST)
    letters: dict[str, Any] = {"fontsize": min(10, 60 * side / len(classes))}
    names = [wrap(name, 1.4) if len(classes) <= 20 else literal(name) for name in classes]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(side + 0.8, side), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(classes) <= 20:
            for row, column in np.ndindex(counts.shape):
                color = "white" if shares[row, column] > 0.5 else "black"
                axis.text(
                    column,
                    row,
                    f"{counts[row, column]:,}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color=color,
                )
        axis.set_xticks(labels, names, rotation=45, ha="right", rotation_mode="anchor", **letters)
        axis.set_yticks(labels, names, **letters)
        axis.set(
            xlabel="predicted",
            ylabel="true",
            title=f"Confusion matrix, accuracy {predictions.accuracy:.2%}",
        )
        figure.colorbar(image, format=PercentFormatter(1.0, decimals=0), shrink=0.8)
    return figure


def cam_layers(model: nn.Module, image_size: int = 32) -> dict[str, int]:
    """The stages of a network whose maps are large enough for Grad-CAM: name and side in pixels."""
    return large_stages(map_shapes(model, image_size))


def large_stages(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Those of a network's maps that belong to a stage and are large enough: name and side."""
    stages = {name: min(shape[2:]) for name, shape in shapes.items() if "." not in name}
    return {name: side for name, side in stages.items() if side >= SMALLEST_MAP}


def map_shapes(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    """Output shape (1, C, H, W) of every named layer that makes a map, for one image."""
    model = copy.deepcopy(model).eval()
    shapes = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                shapes[name] = tuple(output.shape)

        return hook

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(note(name))
    with torch.no_grad():
        weight = next(model.parameters())
        model(torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype))
    return shapes


def gradcam(
    model: nn.Module, images: Tensor, layer: str, targets: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Grad-CAM (Selvaraju et al., arXiv:1610.02391): where a layer sees evidence for a class.

    Works on a copy of the model in float32, so mode, gradients and hooks of the model stay as they are.

    Args:
        images: normalised float (N, 3, H, W).
        layer: name of a layer as in `model.named_modules()`, such as "layer2" or "layer2.0.conv1".
        targets: the class to explain for each image, (N,).

    Returns:
        float32 (N, H, W) from 0 to 1; all zero where the layer has no evidence for the class.

    Raises:
        ValueError: unknown layer, a map under 5 x 5, or targets that do not fit.
    """
    from pytorch_grad_cam import GradCAM  # two seconds of imports
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    check_layer(model, layer, images.shape[-1])
    targets = [int(target) for target in targets]
    if len(targets) != len(images):
        raise ValueError(f"{len(targets)} targets for {len(images)} images")
    if not targets:
        return np.zeros((0, *images.shape[2:]), np.float32)
    model = copy.deepcopy(model).float().eval().requires_grad_()
    device = next(model.parameters()).device
    with torch.no_grad():
        classes = model(images[:1].to(device)).shape[1]
    if not all(0 <= target < classes for target in targets):
        raise ValueError(f"targets must be 0 to {classes - 1}, not {min(targets)} to {max(targets)}")
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        # Not as a context manager, which hides an IndexError; the hooks die with the copy.
        cam = GradCAM(model, [model.get_submodule(layer)])
        maps = cam(images.to(device), [ClassifierOutputTarget(target) for target in targets])
    return np.asarray(maps, np.float32)


def overlay(image: np.ndarray, heat: np.ndarray, opacity: float = 0.75) -> np.ndarray:
    """An image under its map: the more evidence, the less of the image is left.

    Args:
        image: uint8 (H, W, 3).
        heat: float (h, w) from 0 to 1, scaled to the image.
        opacity: of the map where it is 1.
    """
    heat = cv2.resize(heat, image.shape[1::-1])
    cover = opacity * heat[..., None]
    colors = 255 * matplotlib.colormaps["inferno"](heat)[..., :3]
    return (image * (1 - cover) + colors * cover).round().astype(np.uint8)


def check_layer(model: nn.Module, layer: str, image_size: int) -> None:
    """Refuse a layer that Grad-CAM cannot use, and name those that it can."""
    shapes = map_shapes(model, image_size)
    allowed = ", ".join(f"{name} ({side} px)" for name, side in large_stages(shapes).items())
    if layer not in shapes:
        raise ValueError(f"unknown layer {layer!r}; choose from {allowed}{nearest(layer, shapes)}")
    height, width = shapes[layer][2:]
    if min(height, width) < SMALLEST_MAP:
        raise ValueError(
            f"layer {layer} has maps of {height} x {width}, under {SMALLEST_MAP} x {SMALLEST_MAP}; "
            f"choose from {allowed}"
        )


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
    chosen = predictions.misclassified(count)
    if not len(chosen):
        check_layer(model, layer, images.shape[2])
        return gallery(images[chosen], [], "nothing is misclassified: there is no mistake to explain")
    inputs = normalize(images[chosen], mean, std)
    pairs = [
        gradcam(model, inputs, layer, answers[chosen])
        for answers in (predictions.labels, predictions.predicted)
    ]
    with matplotlib.rc_context(STYLE):
        rows = -(-len(chosen) // 2)
        figure = Figure(figsize=(9.2, 1.72 * rows + 0.5), layout="constrained")
        figure.suptitle(f"Grad-CAM at {layer}: image, evidence for the true and for the predicted class")
        cells = figure.subplots(rows, 6, squeeze=False)
        for cell in cells.ravel():
            cell.set_axis_off()
        for place, index in enumerate(chosen):
            trio = cells[place // 2, 3 * (place % 2) :][:3]
            draw_cams(trio, images[index], [maps[place] for maps in pairs], predictions, index, classes)
    return figure


def draw_cams(
    cells: np.ndarray,
    image: np.ndarray,
    maps: Sequence[np.ndarray],
    predictions: Predictions,
    index: int,
    classes: Sequence[str],
) -> None:
    """One mistake: the image, and it again under the map of each of the two classes."""
    answers = (predictions.labels[index], predictions.predicted[index])
    cells[0].imshow(image)
    cells[0].set_title(f"#{index}", fontsize=8.5, **TITLE)
    for cell, heat, answer, kind in zip(cells[1:], maps, answers, ("true", "predicted"), strict=True):
        cell.imshow(overlay(image, heat))
        note = "" if heat.any() else ": no evidence"
        probability = predictions.probabilities[index, answer]
        title = wrap(f"{kind}{note}\n{classes[answer]} {probability:.1%}", 1.5)
        cell.set_title(title, fontsize=8.5, **TITLE)
