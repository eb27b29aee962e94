"""Turns one finished run into a folder a person can read."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from checkpoint import read_files
from config import STORAGE_FIELDS, Config, command_of
from data import Loaders, dataset_of
from files import write_whole
from training.guards import LR_HINT, fault_of
from training.lr_finder import LRFinderResult, read_finder
from transforms import denormalize
from utils import History, Predictions, markdown_table
from visualize import (
    cam_layers,
    plot_confusion_matrix,
    plot_gradcam,
    plot_history,
    plot_lr_finder,
    plot_lr_history,
    plot_misclassified,
    plot_samples,
    save_figure,
)


def comparison(runs: dict[str, tuple[Config, History, str]]) -> list[list[str]]:
    """Rows of a table with a column for each run; of the settings, those that differ."""
    configs, histories, parameters = zip(*runs.values(), strict=True)
    last = [history.epochs[-1] for history in histories]
    done = [
        f"{row.epoch}" if row.epoch == config.epochs else f"{row.epoch} of {config.epochs}"
        for row, config in zip(last, configs, strict=True)
    ]
    rows = [["run", *runs], ["model", *(config.model for config in configs)]]
    rows += [["parameters", *parameters], ["epochs", *done]]
    for name in [item.name for item in fields(Config) if item.name not in ("model", "epochs", "data")]:
        values = [getattr(config, name) for config in configs]
        if name not in STORAGE_FIELDS and len(set(values)) > 1:
            rows.append([name, *("none" if value is None else str(value) for value in values)])
    rows.append(["peak rate", *(f"{max(history.lrs):.3g}" for history in histories)])
    for part in ("train", "val", "test"):
        stats = [row.stats().get(part) for row in last]
        if any(stats):
            rows.append([f"{part} loss", *(f"{s.loss:.4f}" if s else "" for s in stats)])
            rows.append([f"{part} accuracy", *(f"{s.accuracy:.2%}" if s else "" for s in stats)])
    rows.append(["seconds", *(f"{sum(row.seconds for row in h.epochs):,.0f}" for h in histories)])
    return [*rows, ["images/s", *(f"{history.images_per_second:,.0f}" for history in histories)]]


def print_columns(rows: list[list[str]], width: int) -> None:
    """Print a table whose first column names the rows, in lots of as many columns as `width` holds."""
    head = max(len(row[0]) for row in rows)
    cell = 2 + max(len(text) for row in rows for text in row[1:])
    count = max(1, (width - head) // cell)
    for first in range(1, len(rows[0]), count):
        for name, *cells in rows:
            shown = cells[first - 1 : first - 1 + count]
            print(f"{name:<{head}}" + "".join(f"{text:>{cell}}" for text in shown))
        print()


def write_report(
    folder: str | Path, model: nn.Module, loaders: Loaders, predictions: Predictions
) -> Path:
    """Write report.md and its figures into a run folder.

    Args:
        folder: of a run; its config, history, summary and range test are read.
        model: the trained network, for Grad-CAM.
        loaders: of the run, for sample and test images.
        predictions: of the test loader.

    Returns:
        The path of report.md.
    """
    folder = Path(folder)
    run, machine, history = read_files(folder, "config.json", "environment.json", "history.json")
    config = asdict(run)
    found = read_finder(folder) if config["lr"] is None else None
    draw_training(folder, config, history, found, loaders)
    layers = draw_results(folder, model, loaders, predictions)
    classes = [escape(name) for name in loaders.classes]
    parts = [
        headline(config, history, predictions, classes),
        data_section(loaders, config),
        model_section(config, model, (folder / "summary.txt").read_text(encoding="utf-8")),
        finder_section(config, found, history),
        training_section(config, history),
        classes_section(predictions, classes),
        mistakes_section(predictions, layers, classes),
        repeat_section(config, machine),
    ]
    path = folder / "report.md"
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def draw_training(
    folder: Path, config: dict, history: History, found: LRFinderResult | None, loaders: Loaders
) -> None:
    """The figures of data, rate and curves."""
    images, labels = loaders.train.dataset[1, 0]
    pixels = denormalize(images[:20], **loaders.normalization)
    figures = {
        "samples": plot_samples(pixels, labels[:20].tolist(), loaders.classes),
        "curves": plot_history({config["model"]: history}),
        "lr_history": plot_lr_history(history.lrs, history.steps_per_epoch),
    }
    if found:
        figures["lr_finder"] = plot_lr_finder(found, config["lr_rule"])
    save_figures(folder, figures)


def draw_results(
    folder: Path, model: nn.Module, loaders: Loaders, predictions: Predictions
) -> list[str]:
    """The figures of what the network gets right and wrong; returns the layers that Grad-CAM shows."""
    images, classes = dataset_of(loaders.test).split.images, loaders.classes
    layers = list(cam_layers(model, images.shape[1]))[-2:]
    mean, std = loaders.normalization.values()
    figures = {
        "confusion_matrix": plot_confusion_matrix(predictions, classes),
        "misclassified": plot_misclassified(images, predictions, classes),
    }
    for layer in layers:
        figures[f"gradcam_{layer}"] = plot_gradcam(
            model, images, predictions, classes, layer=layer, mean=mean, std=std
        )
    save_figures(folder, figures)
    return layers


def save_figures(folder: Path, figures: dict) -> None:
    """Each figure as figures/NAME.png."""
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, folder / "figures" / f"{name}.png")


def figure(name: str, caption: str) -> str:
    """A figure in Markdown."""
    return f"![{caption}](figures/{name}.png)"


def escape(name: str) -> str:
    """A name of somebody's as Markdown shows it, whatever is in it."""
    return re.sub(r"([\\`*_<>|\[\]$&~])", r"\\\1", name)


def counted(number: int, thing: str) -> str:
    """So many things: 1 epoch, 2 epochs."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def paragraphs(*parts: str) -> str:
    """Markdown blocks with a blank line between them."""
    return "\n\n".join(parts)


def headline(config: dict, history: History, predictions: Predictions, classes: Sequence[str]) -> str:
    """The result, and what one has to know to judge it."""
    row = history.epochs[-1]
    minutes = sum(row.seconds for row in history.epochs) / 60
    validation = [] if row.val_accuracy is None else [["validation accuracy", f"{row.val_accuracy:.2%}"]]
    facts: list[list[Any]] = [
        [f"test accuracy, {len(predictions.labels):,} images", f"**{predictions.accuracy:.2%}**"],
        *validation,
        ["training accuracy, last epoch", f"{row.train_accuracy:.2%}"],
        ["epochs", row.epoch],
        ["minutes of training and evaluation", f"{minutes:.1f}"],
        ["images a second in training, median", f"{history.images_per_second:,.0f}"],
    ]
    return paragraphs(
        f"# {config['model']} on {config['dataset']}: {predictions.accuracy:.2%}",
        *warnings_of(config, history, predictions, classes),
        " ".join(how_evaluated(config)),
        markdown_table(["", "this run"], facts),
    )


def warnings_of(
    config: dict, history: History, predictions: Predictions, classes: Sequence[str]
) -> list[str]:
    """What makes the result worth little: a network that is dead, or a run that was cut short."""
    faults: dict[str | None, list[str]] = {}
    last = history.epochs[-1]
    for row, lrs in zip(history.epochs, np.array_split(history.lrs, last.epoch), strict=True):
        answers = predictions.predicted if row is last else None
        fault = fault_of(
            lrs.tolist(), row is last, row.stats()[row.parts[1]].loss, len(classes), answers
        )
        faults.setdefault(fault, []).append(str(row.epoch))
    found = [f"the network {fault} after epoch {', '.join(faults[fault])}" for fault in faults if fault]
    if found:
        found.append(LR_HINT)
    if last.epoch < config["epochs"]:
        found.append(f"this run stopped after {last.epoch} of {config['epochs']} epochs")
    return [f"> **Warning:** {'; '.join(found)}."] if found else []


def how_evaluated(config: dict) -> list[str]:
    """Sentences on what the accuracy is of."""
    said = ["Accuracy is that of the last epoch; nothing was chosen by looking at the test set."]
    if config["ema_decay"]:
        said.append(
            "The weights are a running average over the run, "
            f"which keeps {config['ema_decay']:g} of itself at each step."
        )
    if config["tta"]:
        said.append("The logits of each image and of its mirror image are averaged, after every epoch.")
    return said


def data_section(loaders: Loaders, config: dict) -> str:
    """What was trained on, and how it looks after augmentation."""
    sizes = [
        f"{len(loader.dataset.split):,} {name}"
        for name, loader in loaders._asdict().items()
        if loader is not None
    ]
    split = dataset_of(loaders.train).split
    mean, std = (", ".join(f"{x:.8f}" for x in xs) for xs in loaders.normalization.values())
    return paragraphs(
        "## Data",
        f"{' + '.join(sizes)} images of {len(split.classes)} classes, "
        f"{split.images.shape[2]} x {split.images.shape[1]} px. Normalised with mean {mean} "
        f"and standard deviation {std}.",
        f"Augmentation of training images, drawn anew in every epoch: {augmentation(config)}. "
        "Validation and test images are only normalised. As it ran:",
        f"```\n{textwrap.fill(dataset_of(loaders.train).describe(), 100)}\n```",
        figure("samples", "The first training batch as the network sees it, normalisation undone"),
    )


def augmentation(config: dict) -> str:
    """The random changes of a training image, in words."""
    changes = {
        f"shifted by up to {config['padding']} px, its border reflected": config["padding"],
        "mirrored half of the time": config["flip"],
        f"grey with a probability of {config['grayscale']:g}": config["grayscale"],
        f"with a square of {config['cutout']} px blanked": config["cutout"],
    }
    return (
        ", ".join(words for words, present in changes.items() if present)
        or "none; their order alone changes"
    )


def model_section(config: dict, model: nn.Module, summary: str) -> str:
    """What the network is, and torchinfo's table."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return paragraphs(
        "## Network",
        f"`{config['model']}` at width {config['width']}: {count:,} parameters. For one image:",
        f"```\n{summary}\n```",
    )


def finder_section(config: dict, found: LRFinderResult | None, history: History) -> str:
    """The range test and what its rules suggest."""
    if found is None:
        return f"## Learning rate\n\nThe peak was given. {schedule_line(config, history)}"
    rows = [
        [rule.replace("_", " "), f"{rate:.3e}", "peak" if rule == config["lr_rule"] else ""]
        for rule, rate in found.suggestions.items()
    ]
    return paragraphs(
        "## Learning rate",
        f"A range test ([Smith](https://arxiv.org/abs/1506.01186)) trained a copy of the network for "
        f"{len(found.lrs)} steps, while the rate rose from {found.lrs[0]:.0e} to {found.lrs[-1]:.0e}. "
        "Rules read its curve differently: start is where the loss begins to fall, steepest where it "
        "falls fastest, valley half-way along the longest fall, minimum the floor.",
        markdown_table(["rule", "rate", "used as"], rows),
        figure("lr_finder", "Loss against learning rate"),
        f"The rule `{config['lr_rule']}` gave the peak. {schedule_line(config, history)}",
    )


def schedule_line(config: dict, history: History) -> str:
    """The least and greatest rate of the run: the exercise's LRMIN and LRMAX."""
    if config["scheduler"] == "none":
        return f"The rate was {history.lrs[0]:.3e} throughout."
    return (
        f"The schedule went from LRMIN {history.lrs[0]:.3e} to LRMAX {max(history.lrs):.3e} "
        f"and down to {history.lrs[-1]:.3e}."
    )


def training_section(config: dict, history: History) -> str:
    """How it was trained, the log, the curves and the rate of every step."""
    parts, rows = history.epochs[0].parts, []
    heads = ["epoch", "lr", *(f"{part} {metric}" for part in parts for metric in ("loss", "acc"))]
    for row in history.epochs:
        stats, cells = row.stats(), [row.epoch, f"{row.lr:.2e}"]
        for part in parts:
            pair = stats.get(part)
            cells += [f"{pair.loss:.4f}", f"{pair.accuracy:.2%}"] if pair else ["", ""]
        rows.append([*cells, f"{row.seconds:.1f}", f"{row.images_per_second:,.0f}"])
    return paragraphs(
        "## Training",
        f"{method(config, history)} {gap(history)}",
        markdown_table([*heads, "seconds", "images/s"], rows),
        figure("curves", "Loss and accuracy by epoch"),
        figure("lr_history", "Learning rate by step"),
    )


def method(config: dict, history: History) -> str:
    """How long the network was trained, on what, by what."""
    options = {"weight decay": config["weight_decay"], "label smoothing": config["label_smoothing"]}
    return (
        f"{counted(len(history.epochs), 'epoch')} of {counted(history.steps_per_epoch, 'step')}, "
        f"{config['batch_size']} images each, by "
        + ", ".join([config["optimizer"], *(f"{name} {x:g}" for name, x in options.items() if x)])
        + ", on the cross-entropy."
    )


def gap(history: History) -> str:
    """What the last training and test accuracy say about each other."""
    row = history.epochs[-1]
    points = 100 * (row.train_accuracy - row.stats()[row.parts[1]].accuracy)
    name = "validation" if row.parts[1] == "val" else "test"
    numbers = f"Training accuracy ended {abs(points):.1f} points"
    if points <= 0:
        return (
            f"{numbers} under {name} accuracy, as the augmented images are the harder ones: the network "
            "does not overfit, and more epochs or a larger one may gain."
        )
    if points > 5:
        return (
            f"{numbers} over {name} accuracy: the network overfits, and more training images or more "
            "augmentation are likelier to help than more epochs."
        )
    return f"{numbers} over {name} accuracy: the network overfits little."


def classes_section(predictions: Predictions, classes: Sequence[str]) -> str:
    """Precision and recall of each class, and what is taken for what."""
    from sklearn.metrics import precision_recall_fscore_support  # a second of imports

    scores = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=range(len(classes)), zero_division=0.0
    )
    rows = [
        [name, f"{precision:.1%}", f"{recall:.1%}", f"{f1:.3f}", f"{count:,}"]
        for name, precision, recall, f1, count in zip(classes, *scores, strict=True)
    ]
    easy, hard = (classes[int(pick(scores[1]))] for pick in (np.argmax, np.argmin))
    return paragraphs(
        "## Classes",
        "Recall is the share of a class's images that are found, precision that of its answers that are "
        f"right. Found best is {easy}, worst {hard}.",
        markdown_table(["class", "precision", "recall", "F1", "images"], rows),
        figure("confusion_matrix", "Confusion matrix"),
    )


def confusions(predictions: Predictions, classes: Sequence[str], count: int = 5) -> list[list]:
    """Table rows of the pairs that are confused most, whichever way: a or b, a for b, b for a, share."""
    wrong = predictions.misclassified()
    pairs = np.zeros((len(classes), len(classes)), int)
    np.add.at(pairs, (predictions.labels[wrong], predictions.predicted[wrong]), 1)
    both = np.triu(pairs + pairs.T)
    best = np.argsort(-both, axis=None, kind="stable")[:count]
    chosen = [(a, b) for a, b in zip(*np.unravel_index(best, both.shape), strict=True) if both[a, b]]
    return [
        [f"{classes[a]}, {classes[b]}", pairs[a, b], pairs[b, a], f"{both[a, b] / len(wrong):.1%}"]
        for a, b in chosen
    ]


def mistakes_section(predictions: Predictions, layers: list[str], classes: Sequence[str]) -> str:
    """What is taken for what and how surely, misclassified images, and where the network looked."""
    wrong, total = predictions.misclassified(), len(predictions.labels)
    said = f"{len(wrong):,} of {total:,} test images are misclassified."
    if not len(wrong):
        return f"## Mistakes\n\n{said}"
    rows = predictions.probabilities[wrong]
    second = (np.argsort(-rows, axis=1)[:, 1] == predictions.labels[wrong]).mean()
    sure = (rows.max(1) > 0.9).mean()
    pairs = confusions(predictions, classes)
    cams = [figure(f"gradcam_{layer}", f"Grad-CAM at {layer}") for layer in layers]
    return paragraphs(
        "## Mistakes",
        f"{said} In {second:.0%} of them the true class is the second guess; in {sure:.0%} the wrong "
        "answer has a probability over 90%. Most often confused are:",
        markdown_table(["a, b", "a taken for b", "b taken for a", "of all mistakes"], pairs),
        "Shown are the mistakes that the network was surest of, each with the true class, the predicted "
        "one and its probability.",
        figure("misclassified", "Most confident mistakes"),
        "Why? Grad-CAM ([Selvaraju et al.](https://arxiv.org/abs/1610.02391)) shows where a layer sees "
        "evidence for a class, here for the true one and for the one predicted instead. Where both maps "
        "lie on the object, its parts are shared by the classes, as with a cat and a dog; where the "
        "predicted one's lies beside it, the background decided.",
        *cams,
    )


def repeat_section(config: dict, machine: str) -> str:
    """The command, the machine, and every field of the run."""
    rows = [[name, "" if value is None else value] for name, value in config.items()]
    return paragraphs(
        "## To repeat it",
        f"```\n{command_of(Config(**config))}\n```",
        f"Seed {config['seed']}; {machine}.",
        "On a CPU, the same versions and number of threads give the same bits. Another seed gives "
        "another result: one run cannot tell two settings apart whose results are close.",
        markdown_table(["field", "value"], rows),
    )
