"""The text of a report on what a run was, section by section, in Markdown."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from config import Config, command_of
from data import Loaders, dataset_of
from reporting.evidence import chance
from reporting.findings import (
    accuracy_interval,
    counted,
    details,
    fenced,
    figure,
    in_percent,
    paragraphs,
)
from training.guards import LR_HINT, fault_of
from training.lr_finder import LRFinderResult
from training.progress import show_duration
from utils import History, Predictions, escape, markdown_table


def headline(
    config: dict, history: History, predictions: Predictions, classes: Sequence[str], precision: str
) -> str:
    """The head of the report: the result, and what a reader needs to know to judge it."""
    row = history.epochs[-1]
    counts = np.bincount(predictions.labels, minlength=len(classes))
    validation = [] if row.val_accuracy is None else [["validation accuracy", f"{row.val_accuracy:.2%}"]]
    by_auto = ""
    if config["precision"] == "auto":
        by_auto = "; which was not recorded" if precision == "auto" else ", as `auto` chose"
    facts: list[list[Any]] = [
        [f"test accuracy, {len(predictions.labels):,} images", f"**{predictions.accuracy:.2%}**"],
        ["its 95% interval (Wilson)", in_percent(accuracy_interval(predictions))],
        ["level of chance: always the most frequent class", f"{counts.max() / counts.sum():.1%}"],
        *validation,
        [f"training accuracy, last epoch, {measured_on(config)}", f"{row.train_accuracy:.2%}"],
        ["epochs", row.epoch],
        ["training and evaluation", show_duration(sum(row.seconds for row in history.epochs))],
        ["images a second in training, median", f"{history.images_per_second:,.0f}"],
        ["number format of the forward pass", f"{escape(precision)}{by_auto}"],
    ]
    warnings = warnings_of(config, history, predictions, classes)
    return paragraphs(
        f"# {escape(config['model'])} on {escape(config['dataset'])}: {predictions.accuracy:.2%}",
        *warnings,
        " ".join(how_evaluated(config)),
        markdown_table(["", "this run"], facts),
        "The interval says where the accuracy on other images of the same kind may lie; another seed "
        "moves it besides.",
        "**What to try next:** "
        f"{next_step(config, history, bool(warnings), len(predictions.misclassified()))}",
    )


def measured_on(config: dict) -> str:
    """Words for the images on which the training accuracy was measured."""
    return "augmented images" if augmentations(config) else "images that are not augmented"


def next_step(config: dict, history: History, warned: bool, mistakes: int = 1) -> str:
    """One thing that is likely to help, by what the run shows."""
    if not mistakes:
        return "more test images, or harder ones: on these it makes no mistake."
    if len(history.epochs) < config["epochs"]:
        return "finish this run, with the same command and `--resume --output` and its folder."
    if warned:
        return f"a lower learning rate, such as `--lr {max(history.lrs) / 10:.2g}`."
    if config["dataset"] == "cifar10-sample":
        return (
            "all 50,000 training images of CIFAR-10, by the command at the end of this page with "
            "`--dataset cifar10`; more images help more than any setting here."
        )
    if gap_of(history) > 5:
        return f"{against_overfitting(config)}, as the network overfits."
    return f"more epochs, such as `--epochs {2 * config['epochs']}`, as the network hardly overfits."


def against_overfitting(config: dict) -> str:
    """What a run has not used yet against overfitting, by flags that fit its other settings."""
    usual = Config(dataset=config["dataset"])
    for name in ("padding", "flip", "cutout"):
        if getattr(usual, name) and not config[name]:
            return f"augmentation, by `--{name}{'' if name == 'flip' else f' {getattr(usual, name)}'}`"
    if not config["weight_decay"]:
        flags = "--weight-decay 5e-4" if config["optimizer"] == "sgd" else "--weight-decay 0.05"
        flags = "--optimizer adamw " * (config["optimizer"] == "adam") + flags
        return f"weight decay, by `{flags}`"
    side = config["image_size"] // 2
    return "more training images" + f", or `--cutout {side}`" * (config["cutout"] < side)


def warnings_of(
    config: dict, history: History, predictions: Predictions, classes: Sequence[str]
) -> list[str]:
    """A warning in Markdown if the network learned nothing, or the run did not come to its end."""
    faults: dict[str | None, list[str]] = {}
    last = history.epochs[-1]
    for row, lrs in zip(history.epochs, np.array_split(history.lrs, last.epoch), strict=True):
        answers = predictions.predicted if row is last else None
        fault = fault_of(lrs.tolist(), row is last, row.stats()[row.parts[1]], len(classes), answers)
        faults.setdefault(fault, []).append(str(row.epoch))
    warnings = [
        f"the network {fault} after epoch {', '.join(faults[fault])}" for fault in faults if fault
    ]
    if warnings:
        warnings.append(LR_HINT)
    if last.epoch < config["epochs"]:
        warnings.append(f"this run stopped after {last.epoch} of {config['epochs']} epochs")
    return [f"> **Warning:** {'; '.join(warnings)}."] if warnings else []


def how_evaluated(config: dict) -> list[str]:
    """Sentences on what the accuracy is of."""
    said = ["Accuracy is that of the last epoch; nothing was chosen by looking at the test set."]
    if config.get("init_from"):
        said.append(f"The run began with the weights of {escape(config['init_from'])}.")
    if config["ema_decay"]:
        said.append(
            "The weights are a running average over the run, "
            f"which keeps {config['ema_decay']:g} of itself at each step."
        )
    if config["tta"]:
        said.append(
            "The last epoch is evaluated by the mean logits of six views of each image: as it is and "
            "moved by a pixel in two directions, each with its mirror image. Earlier epochs are not."
        )
    return said


def data_section(loaders: Loaders, config: dict) -> str:
    """The section on the images: number, normalisation, and what augmentation does to them."""
    sizes = [
        f"{len(loader.dataset.split):,} {name}"
        for name, loader in loaders._asdict().items()
        if loader is not None
    ]
    split = dataset_of(loaders.train).split
    mean, std = (", ".join(f"{x:.3f}" for x in xs) for xs in loaders.normalization.values())
    return paragraphs(
        "## Data",
        f"{' + '.join(sizes)} images of {len(split.classes)} classes, "
        f"{split.images.shape[2]} x {split.images.shape[1]} px. Normalised with mean {mean} "
        f"and standard deviation {std}.",
        f"Augmentation of training images, drawn anew in every epoch: "
        f"{', '.join(augmentations(config)) or 'none; their order alone changes'}. "
        "Validation and test images get the part of it that does not vary.",
        details("As it ran", fenced(textwrap.fill(dataset_of(loaders.train).describe(), 100))),
        figure("samples", "The first training batch as the network sees it, normalisation undone"),
    )


def augmentations(config: dict) -> list[str]:
    """The random changes that augmentation makes to a training image, in words."""
    changes = {
        f"shifted by up to {config['padding']} px, its border reflected": config["padding"],
        "mirrored half of the time": config["flip"],
        f"grey with a probability of {config['grayscale']:g}": config["grayscale"],
        f"with a square of {config['cutout']} px blanked": config["cutout"],
    }
    return [words for words, present in changes.items() if present]


def model_section(config: dict, model: nn.Module, summary: str) -> str:
    """The section on the network: its name, its size, and torchinfo's table of its layers."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return paragraphs(
        "## Network",
        f"{escape(config['model'])} at width {config['width']}: {count:,} parameters.",
        details("Its layers, for one image", fenced(summary)),
    )


def finder_section(config: dict, finder: LRFinderResult | None, history: History) -> str:
    """The section on the learning rate: the range test, and what each rule reads from its curve."""
    if finder is None:
        source = "was given" if config["lr"] else "is that of a range test whose lr_finder.json is gone"
        return f"## Learning rate\n\nThe peak {source}. {schedule_line(config, history)}"
    rows = [
        [escape(rule.replace("_", " ")), f"{rate:.3e}", "peak" if rule == config["lr_rule"] else ""]
        for rule, rate in finder.suggestions.items()
    ]
    return paragraphs(
        "## Learning rate",
        f"A range test ([Smith](https://arxiv.org/abs/1506.01186)) trained a copy of the network for "
        f"{len(finder.lrs)} steps, while the rate rose from {finder.lrs[0]:.2g} to {finder.lrs[-1]:.2g}."
        " Rules read its curve differently: start is where the loss begins to fall, steepest where it "
        "falls fastest, valley half-way along the longest fall, minimum the floor.",
        markdown_table(["rule", "rate", "used as"], rows),
        figure("lr_finder", "Loss against learning rate"),
        f"The rule `{config['lr_rule']}` gave the peak. {schedule_line(config, history)}",
    )


def schedule_line(config: dict, history: History) -> str:
    """A sentence on the rates of the run, by the names that the exercise uses: LRMIN and LRMAX."""
    if config["scheduler"] == "none":
        return f"The rate was {history.lrs[0]:.3e} throughout."
    return (
        f"The schedule went from LRMIN {history.lrs[0]:.3e} to LRMAX {max(history.lrs):.3e} "
        f"and down to {history.lrs[-1]:.3e}."
    )


def training_section(config: dict, history: History) -> str:
    """The section on the training: how it was done, a row for each epoch, and the curves."""
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
        f"{method(config, history)} {gap(config, history)}",
        markdown_table([*heads, "seconds", "images/s"], rows),
        figure("curves", "Loss and accuracy by epoch"),
        figure("lr_history", "Learning rate by step"),
    )


def method(config: dict, history: History) -> str:
    """A sentence on how the network was trained: epochs, steps, batch, optimizer and its options."""
    options = {"weight decay": config["weight_decay"], "label smoothing": config["label_smoothing"]}
    return (
        f"{counted(len(history.epochs), 'epoch')} of {counted(history.steps_per_epoch, 'step')}, "
        f"{config['batch_size']} images each, by "
        + ", ".join([config["optimizer"], *(f"{name} {x:g}" for name, x in options.items() if x)])
        + ", on the cross-entropy."
    )


def gap_of(history: History) -> float:
    """By how many percentage points the last training accuracy exceeds that on other images."""
    row = history.epochs[-1]
    return 100 * (row.train_accuracy - row.stats()[row.parts[1]].accuracy)


def gap(config: dict, history: History) -> str:
    """What the difference between training and test accuracy means, given the settings of the run."""
    points, name = gap_of(history), "test"
    if history.epochs[-1].parts[1] == "val":
        name = "validation"
    causes = ["on augmented images"] if augmentations(config) else []
    causes += ["with dropout at work"] if config["dropout"] else []
    measured = " and ".join(["while the weights still move", *causes])
    averaged = ", which the averaged weights got" if config["ema_decay"] else ""
    said = (
        f"Training accuracy ended {abs(points):.1f} points {'over' if points > 0 else 'under'} {name} "
        f"accuracy{averaged}. It is measured in the course of the epoch, {measured}: the final network "
        "would get another accuracy on its training images."
    )
    if points <= 0:
        return f"{said} Nothing here shows overfitting."
    if points > 5:
        return f"{said} A gap of over 5 points is overfitting: other images are harder than those."
    return f"{said} The network overfits little."


def repeat_section(config: dict, machine: str, predictions: Predictions) -> str:
    """The section on repeating the run: its command, the machine, and every setting."""
    usual = asdict(Config(dataset=config["dataset"])) | {"dataset": Config.dataset}
    low, high = accuracy_interval(predictions)
    said = chance(Config(**config).recipe)
    known = f"Of this recipe, {said} " if said else ""
    rows: dict[bool, list[list[str]]] = {True: [], False: []}
    for name, value in config.items():
        rows[value != usual[name]].append([escape(name), "" if value is None else escape(value)])
    changed = (
        markdown_table(["field", "value"], rows[True]) if rows[True] else "Every setting is a default."
    )
    return paragraphs(
        "## To repeat it",
        fenced(command_of(Config(**config))),
        f"Seed {config['seed']}; {escape(machine)}.",
        "On a CPU, the same versions and number of threads give the same bits. Another seed gives "
        f"another result. Two runs whose accuracies on these {len(predictions.labels):,} images are "
        f"within about {100 * (high - low) / 2**0.5:.1f} points are close: the choice of the images "
        "alone can make such a difference. "
        + known
        + "`--seeds 5` runs five seeds, and `python main.py compare` tells whether the means of two "
        "such folders differ by more than chance.",
        "Settings that differ from the defaults:",
        changed,
        details(
            f"The other {len(rows[False])}, at their defaults",
            markdown_table(["field", "value"], rows[False]),
        ),
    )
