"""Writes the report of a finished run: text, figures and a table of mistakes; and compares runs."""

import base64
import html
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import nn

from checkpoint import read_files
from data import Loaders, dataset_of
from files import write_csv, write_whole
from reporting.findings import calibration_section, classes_section, mistakes_section
from reporting.lettering import font_note
from reporting.screen import off_screen
from reporting.sections import (
    data_section,
    finder_section,
    headline,
    model_section,
    repeat_section,
    training_section,
)
from training.lr_finder import LRFinderResult, read_finder
from transforms import denormalize
from utils import History, Predictions, escape, plain, summarize
from visualize import (
    cam_layers,
    plot_confusion_matrix,
    plot_gradcam,
    plot_history,
    plot_lr_finder,
    plot_lr_history,
    plot_misclassified,
    plot_reliability,
    plot_samples,
    save_figure,
)

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 0 1rem 4rem; }}
h2 {{ margin-top: 3rem; border-bottom: 1px solid #8888; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; }}
th, td {{ padding: 0.2rem 0.8rem; border: 1px solid #8888; white-space: nowrap; }}
pre {{ overflow-x: auto; padding: 0.8rem; background: #8882; font-size: 0.85rem; }}
img {{ max-width: 100%; background: white; }}
blockquote {{ border-left: 4px solid #d55e00; margin: 0; padding-left: 1rem; }}
summary {{ cursor: pointer; padding: 0.4rem 0; }}
</style>
<body>
{body}
</body>
</html>
"""


def write_report(
    folder: str | Path, model: nn.Module, loaders: Loaders, predictions: Predictions
) -> Path:
    """Write report.md, the same as report.html, their figures and two tables into a run folder.

    The tables are predictions.csv, of every test image, and mistakes.csv.

    Args:
        folder: of a run; its configuration, machine, history and range test are read.
        model: the trained network, for its summary and Grad-CAM.
        loaders: of the run, for sample and test images.
        predictions: of the network for the test loader.

    Returns:
        The path of report.md.
    """
    with off_screen():
        return write_files(Path(folder), model, loaders, predictions)


def write_files(folder: Path, model: nn.Module, loaders: Loaders, predictions: Predictions) -> Path:
    """The files of `write_report`."""
    run, machine, history = read_files(folder, "config.json", "environment.json", "history.json")
    config = asdict(run) | {"batch_size": dataset_of(loaders.train).batch_size}
    facts = json.loads((folder / "environment.json").read_bytes())
    finder = read_finder(folder) if config["lr"] is None else None
    draw_training(folder, config, history, finder, loaders)
    layers = draw_results(folder, model, loaders, predictions)
    files = getattr(dataset_of(loaders.test).split, "files", None)
    write_answers(folder, predictions, loaders.classes, files)
    classes = class_names(loaders.classes)
    parts = [
        headline(config, history, predictions, classes, facts.get("precision", config["precision"])),
        data_section(loaders, config),
        model_section(config, model, summarize(model, config["image_size"])),
        finder_section(config, finder, history),
        training_section(config, history),
        classes_section(predictions, classes),
        calibration_section(predictions, config["label_smoothing"]),
        mistakes_section(predictions, layers, classes, config, files),
        repeat_section(config, machine, predictions),
    ]
    text = "\n\n".join(parts) + "\n"
    path = folder / "report.md"
    write_whole(path, text)
    write_whole(folder / "report.html", to_html(text, folder))
    return path


def class_names(classes: Sequence[str]) -> list[str]:
    """Names of classes as the report shows them.

    If no installed font can draw some of them, figures show numbers, and each name here gets its number.
    """
    if font_note(classes):
        return [f"{k}: {escape(name)}" for k, name in enumerate(classes)]
    return [escape(name) for name in classes]


def write_answers(
    folder: Path, predictions: Predictions, classes: Sequence[str], files: Sequence[str] | None
) -> None:
    """predictions.csv, a row for each test image, and mistakes.csv, the most confident mistake first."""
    save_predictions(predictions, folder / "predictions.csv", classes, files)
    heads = ["index", *(["file"] if files else []), "true", "predicted", "probability"]
    mistakes = (answer(k, predictions, classes, files) for k in predictions.misclassified())
    write_csv(folder / "mistakes.csv", heads, mistakes)


def answer(
    index: int, predictions: Predictions, classes: Sequence[str], files: Sequence[str] | None
) -> list:
    """A row of such a table: the image's number, its file if it has one, its class and the answer."""
    file = [plain(files[index])] if files else []
    answers = [plain(classes[k]) for k in (predictions.labels[index], predictions.predicted[index])]
    return [index, *file, *answers, f"{predictions.probabilities[index].max():.6f}"]


def save_predictions(
    predictions: Predictions,
    path: str | Path,
    classes: Sequence[str] = (),
    files: Sequence[str] | None = None,
) -> None:
    """Write what was predicted as a CSV file: a row for each image, as in predictions.csv of a run.

    Args:
        classes: names; none: those that the predictions have, else numbers.
        files: where each image came from.
    """
    names = classes or predictions.classes or [str(k) for k in range(predictions.probabilities.shape[1])]
    heads = ["image", *(["file"] if files else []), "label", "predicted", "probability"]
    every = range(len(predictions.labels))
    write_csv(path, heads, (answer(k, predictions, names, files) for k in every))


def to_html(text: str, folder: Path) -> str:
    """A report in Markdown as one HTML page that holds its figures.

    Such a page can be opened and sent as it is; many editors show Markdown without its figures.
    """
    from markdown_it import MarkdownIt

    def embed(match: re.Match[str]) -> str:
        return (
            f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'
        )

    body = MarkdownIt("commonmark").enable("table").render(text)
    body = re.sub(r'src="(figures/[\w.]+\.png)"', embed, body)
    title = html.escape(re.sub(r"\\(.)", r"\1", text.partition("\n")[0].removeprefix("# ")))
    return PAGE.format(title=title, body=body)


def draw_training(
    folder: Path, config: dict, history: History, finder: LRFinderResult | None, loaders: Loaders
) -> None:
    """Save the figures of the training: sample images, curves, rates, range test if there is one."""
    images, labels = loaders.train.dataset[1, 0]
    pixels = denormalize(images[:20], **loaders.normalization)
    figures = {
        "samples": plot_samples(pixels, labels[:20].tolist(), loaders.classes),
        "curves": plot_history({config["model"]: history}),
        "lr_history": plot_lr_history(history.lrs, history.steps_per_epoch),
    }
    if finder:
        figures["lr_finder"] = plot_lr_finder(finder, config["lr_rule"])
    save_figures(folder, figures)


def draw_results(
    folder: Path, model: nn.Module, loaders: Loaders, predictions: Predictions
) -> dict[str, int]:
    """Save the figures of what the network gets right and wrong.

    Returns:
        The layers that Grad-CAM shows, each with the side of its maps in pixels.
    """
    images, classes = dataset_of(loaders.test).split.images, loaders.classes
    last = {side: name for name, side in cam_layers(model, images.shape[1]).items()}  # of each size
    layers = {name: side for side, name in list(last.items())[-2:]}
    mean, std = loaders.normalization.values()
    figures = {
        "confusion_matrix": plot_confusion_matrix(predictions, classes),
        "reliability": plot_reliability(predictions),
        "misclassified": plot_misclassified(images, predictions, classes),
    }
    for layer in layers:
        figures[f"gradcam_{layer}"] = plot_gradcam(
            model, images, predictions, classes, layer=layer, mean=mean, std=std
        )
    save_figures(folder, figures)
    return layers


def save_figures(folder: Path, figures: dict) -> None:
    """Save each figure as figures/NAME.png."""
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_figure(figure, folder / "figures" / f"{name}.png")
