"""Turns one finished run into a folder a person can read."""

import json
from pathlib import Path

import numpy as np
from torch import nn

from config import Config, command_of
from files import write_whole
from transforms import denormalize
from utils import History, LRFinderResult, Predictions
from visualize import (
    cam_layers,
    plot_confusion_matrix,
    plot_gradcam,
    plot_history,
    plot_lr_finder,
    plot_lr_history,
    plot_misclassified,
    plot_samples,
)


def write_report(folder: str | Path, model: nn.Module, loaders, predictions: Predictions) -> Path:
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
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    history = History.load(folder)
    found = read_finder(folder)
    draw_training(folder, config, history, found, loaders)
    layers = draw_results(folder, model, loaders, predictions)
    parts = [
        headline(config, environment, history, predictions),
        data_section(loaders),
        model_section((folder / "summary.txt").read_text(encoding="utf-8")),
        finder_section(config, found, history),
        training_section(history),
        classes_section(predictions, loaders.classes),
        mistakes_section(predictions, layers),
        configuration_section(config),
    ]
    path = folder / "report.md"
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def read_finder(folder: Path) -> LRFinderResult | None:
    """The range test of a run, or None if its rate was given."""
    path = folder / "lr_finder.json"
    return LRFinderResult(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def draw_training(folder: Path, config: dict, history: History, found, loaders) -> None:
    """The figures of data, rate and curves."""
    images, labels = loaders.train.dataset[1, 0]
    pixels = denormalize(images[:20], **loaders.normalization)
    figures = {
        "samples": plot_samples(pixels, labels[:20].tolist(), loaders.classes),
        "curves": plot_history({config["model"]: history}),
        "lr_history": plot_lr_history(history.lrs, len(history.lrs) // len(history.epochs)),
    }
    if found:
        figures["lr_finder"] = plot_lr_finder(found, config["lr_rule"])
    save_figures(folder, figures)


def draw_results(folder: Path, model: nn.Module, loaders, predictions: Predictions) -> list[str]:
    """The figures of what the network gets right and wrong; returns the layers that Grad-CAM shows."""
    images, classes = loaders.test.dataset.split.images, loaders.classes
    layers = list(cam_layers(model, images.shape[1]))[-2:]
    figures = {
        "confusion_matrix": plot_confusion_matrix(predictions, classes),
        "misclassified": plot_misclassified(images, predictions, classes),
    }
    for layer in layers:
        figures[f"gradcam_{layer}"] = plot_gradcam(
            model, images, predictions, classes, layer=layer, **loaders.normalization
        )
    save_figures(folder, figures)
    return layers


def save_figures(folder: Path, figures: dict) -> None:
    """Each figure as figures/NAME.png."""
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png")


def figure(name: str, caption: str) -> str:
    """A figure in Markdown."""
    return f"![{caption}](figures/{name}.png)"


def table(heads: list[str], rows: list[list]) -> str:
    """A Markdown table; every column but the first is aligned right."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def paragraphs(*parts: str) -> str:
    """Markdown blocks with a blank line between them."""
    return "\n\n".join(parts)


def headline(config: dict, environment: dict, history: History, predictions: Predictions) -> str:
    """The result, and all that is needed to get it again."""
    row = history.epochs[-1]
    minutes = sum(row.seconds for row in history.epochs) / 60
    validation = [] if row.val_accuracy is None else [["validation accuracy", f"{row.val_accuracy:.2%}"]]
    facts = [
        [f"test accuracy, {len(predictions.labels):,} images", f"**{predictions.accuracy:.2%}**"],
        *validation,
        ["training accuracy, last epoch", f"{row.train_accuracy:.2%}"],
        ["epochs", row.epoch],
        ["minutes of training and evaluation", f"{minutes:.1f}"],
        ["images a second in training, median", f"{median_speed(history):,.0f}"],
        ["seed", config["seed"]],
        ["machine", environment["machine"]],
        ["versions", environment["versions"]],
    ]
    return paragraphs(
        f"# {config['model']} on {config['dataset']}: {predictions.accuracy:.2%}",
        "Accuracy is that of the last epoch; nothing was chosen by looking at the test set.",
        table(["", "this run"], facts),
        f"To run it again:\n\n```\n{command_of(Config(**config))}\n```",
    )


def median_speed(history: History) -> float:
    """Images a second of the median epoch."""
    return float(np.median([row.images_per_second for row in history.epochs]))


def data_section(loaders) -> str:
    """What was trained on, and how it looks after augmentation."""
    sizes = [
        f"{len(loader.dataset.split):,} {name}"
        for name, loader in loaders._asdict().items()
        if loader is not None
    ]
    split = loaders.train.dataset.split
    mean, std = (", ".join(f"{x:.8f}" for x in xs) for xs in loaders.normalization.values())
    return paragraphs(
        "## Data",
        f"{' + '.join(sizes)} images of {len(split.classes)} classes, "
        f"{split.images.shape[2]} x {split.images.shape[1]} px. Normalised with mean {mean} "
        f"and standard deviation {std}.",
        figure("samples", "The first training batch as the network sees it, normalisation undone"),
    )


def model_section(summary: str) -> str:
    """Torchinfo's table."""
    return f"## Network\n\n```\n{summary}\n```"


def finder_section(config: dict, found: LRFinderResult | None, history: History) -> str:
    """The range test and what its rules suggest."""
    if found is None:
        return f"## Learning rate\n\nGiven; no range test was run. {schedule_line(config, history)}"
    rows = [
        [rule.replace("_", " "), f"{rate:.3e}", "peak" if rule == config["lr_rule"] else ""]
        for rule, rate in found.suggestions.items()
    ]
    return paragraphs(
        "## Learning rate",
        f"A range test of {len(found.lrs)} steps on a copy of the network, from {found.lrs[0]:.0e} "
        f"up. `start` is where the loss begins to fall. {schedule_line(config, history)}",
        table(["rule", "rate", "used as"], rows),
        figure("lr_finder", "Loss against learning rate"),
    )


def schedule_line(config: dict, history: History) -> str:
    """The least and greatest rate of the run: the exercise's LRMIN and LRMAX."""
    if config["scheduler"] == "none":
        return f"The rate was {history.lrs[0]:.3e} throughout."
    return (
        f"The schedule went from LRMIN {history.lrs[0]:.3e} to LRMAX {max(history.lrs):.3e} "
        f"and down to {history.lrs[-1]:.3e}."
    )


def training_section(history: History) -> str:
    """The log, the curves and the rate of every step."""
    parts = ["train", "val", "test"] if "val" in history.epochs[0].stats() else ["train", "test"]
    heads = ["epoch", "lr", *(f"{part} {metric}" for part in parts for metric in ("loss", "acc"))]
    rows = []
    for row in history.epochs:
        stats, cells = row.stats(), [row.epoch, f"{row.lr:.2e}"]
        for part in parts:
            pair = stats.get(part)
            cells += [f"{pair.loss:.4f}", f"{pair.accuracy:.2%}"] if pair else ["", ""]
        rows.append([*cells, f"{row.seconds:.1f}", f"{row.images_per_second:,.0f}"])
    return paragraphs(
        "## Training",
        table([*heads, "seconds", "images/s"], rows),
        figure("curves", "Loss and accuracy by epoch"),
        figure("lr_history", "Learning rate by step"),
    )


def classes_section(predictions: Predictions, classes) -> str:
    """Precision and recall of each class, and what is taken for what."""
    from sklearn.metrics import precision_recall_fscore_support  # a second of imports

    scores = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=range(len(classes)), zero_division=0.0
    )
    rows = [
        [name, f"{precision:.1%}", f"{recall:.1%}", f"{f1:.3f}", f"{count:,}"]
        for name, precision, recall, f1, count in zip(classes, *scores, strict=True)
    ]
    return paragraphs(
        "## Classes",
        table(["class", "precision", "recall", "F1", "images"], rows),
        figure("confusion_matrix", "Confusion matrix"),
    )


def mistakes_section(predictions: Predictions, layers: list[str]) -> str:
    """Misclassified images, and where the network looked."""
    cams = [figure(f"gradcam_{layer}", f"Grad-CAM at {layer}") for layer in layers]
    return paragraphs(
        "## Mistakes",
        f"{len(predictions.misclassified()):,} of {len(predictions.labels):,} test images are "
        "misclassified. Shown are those that the network was surest of.",
        figure("misclassified", "Most confident mistakes"),
        "Grad-CAM shows where a layer sees evidence for a class, here for the true one and for the "
        "one predicted instead.",
        *cams,
    )


def configuration_section(config: dict) -> str:
    """Every field of the run."""
    rows = [[name, "" if value is None else value] for name, value in config.items()]
    return "## Configuration\n\n" + table(["field", "value"], rows)
