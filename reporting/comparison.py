"""Runs side by side: grouped where the seed alone differs, and what the difference is worth."""

import contextlib
import csv
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoint import read_files
from config import RUN_FILE, SEEDS_FILE, STORAGE_FIELDS, Config
from files import read_bytes
from reporting.evidence import MOST, chance, difference, disagreement, estimate
from reporting.findings import some
from utils import History, Stats, plain
from weights_file import load_weights

FORMS = {"peak rate": ".3g", "loss": ".4f", "accuracy": ".2%", "seconds": ",.0f", "images/s": ",.0f"}
NAMES = {"val": "validation", "test": "test"}


class Run(NamedTuple):
    """A run as it lies in its folder, with what its weights say, if they are there."""

    folder: Path
    config: Config
    history: History
    parameters: str
    test_sha256: str | None  # of the test images

    @property
    def finished(self) -> bool:
        """Whether it has all its epochs, and so an accuracy on the test set."""
        return len(self.history.epochs) >= self.config.epochs and "test" in self.last

    @property
    def last(self) -> dict[str, Stats]:
        """Loss and accuracy of its last epoch, of those of "train", "val" and "test" that it has."""
        return self.history.epochs[-1].stats()


Groups = dict[str, list[Run]]


def read_groups(folders: Sequence[str | Path], least: int = 2) -> Groups:
    """The runs in some folders, grouped where they differ in the seed alone.

    A folder of several seeds counts as its finished runs. Runs of one seed are never in one group, so
    that two versions of the code can be compared, and a run that is not finished is in none.

    Returns:
        A dict from the names of each group's folders, their paths where two have the same, to its runs.

    Raises:
        ValueError: there are fewer than `least` runs with an epoch; others are left out, and said to be.
    """
    units: dict[Path, list[Run]] = {}
    faults = []
    for path in dict.fromkeys(map(Path, folders)):
        try:
            runs, fault = read_folder(path)
        except ValueError as error:
            runs, fault = [], str(error)
        faults += [fault] if fault else []
        seen = {run.folder.resolve() for others in units.values() for run in others}
        if runs := [run for run in runs if run.folder.resolve() not in seen]:
            units[path] = runs
    count = sum(map(len, units.values()))
    if count < least:
        few = (
            f"compare needs two runs or more, not {count}" if least == 2 else "there is no finished run"
        )
        raise ValueError("; ".join([few, *faults]))
    for fault in faults:
        print(f"left out: {fault}")
    return named(units)


def read_folder(path: Path) -> tuple[list[Run], str]:
    """The run in a folder, or the finished ones of several seeds, and what is not there yet.

    Raises:
        ValueError: it holds neither.
    """
    if not (path / SEEDS_FILE).exists():
        return [read_run(path)], ""
    (config,) = read_files(path, SEEDS_FILE)
    runs = []
    for place in path.glob("seed-*"):
        with contextlib.suppress(ValueError):  # begun only
            runs.append(read_run(place))
    runs = sorted((run for run in runs if run.finished), key=lambda run: run.config.seed)
    missing = f"{path} has {len(runs)} of its {config.seeds} seeds yet"
    return runs, missing if len(runs) < (config.seeds or 0) else ""


def read_run(path: Path) -> Run:
    """One run.

    Raises:
        ValueError: the folder holds none that has an epoch.
    """
    config, history = read_files(path, RUN_FILE, "history.json")
    parameters, sha = "?", None
    with contextlib.suppress(ValueError):  # curves can be compared without the weights
        model, card = load_weights(path)
        parameters = f"{sum(p.numel() for p in model.parameters()):,}"
        sha = card.get("test_sha256")
    return Run(path, config, history, parameters, sha)


def named(units: dict[Path, list[Run]]) -> Groups:
    """Put together what differs in the seed alone, and name the groups."""
    groups: list[tuple[list[Path], list[Run]]] = []
    for path, runs in units.items():
        for paths, others in groups:
            new_seeds = set(seeds_of(others)).isdisjoint(seeds_of(runs))
            if new_seeds and differ_in_seed_alone(others[0], runs[0]):
                paths.append(path)
                others += runs
                break
        else:
            groups.append(([path], list(runs)))
    names = [path.resolve().name for path in units]
    labels = dict(zip(units, names, strict=True))
    labels = {path: name if names.count(name) == 1 else str(path) for path, name in labels.items()}
    return {
        some([plain(labels[path]) for path in paths]): sorted(runs, key=lambda run: run.config.seed)
        for paths, runs in groups
    }


def differ_in_seed_alone(first: Run, second: Run) -> bool:
    """Whether two finished runs have the same settings and images, but for the seed."""
    same_images = first.config.dataset != "folder" or first.test_sha256 == second.test_sha256
    return same_images and all(
        run.finished and run.config.recipe == first.config.recipe for run in (first, second)
    )


def seeds_of(runs: Sequence[Run]) -> list[int]:
    """The seeds of some runs."""
    return [run.config.seed for run in runs]


def some_seeds(runs: Sequence[Run]) -> str:
    """The seeds of some runs in words: 0 to 4, or one by one."""
    seeds = seeds_of(runs)
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def shown(values: Sequence[float | None], form: str) -> str:
    """One value, or the mean of several with deviation and number; nothing if there are none."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    found = estimate(numbers)
    mean = f"{found.mean:{form}}"
    if found.deviation is None:
        return mean
    return f"{mean.removesuffix('%')} ± {found.deviation:{form}} ({found.number})"


def comparison(groups: Groups) -> list[list[str]]:
    """Rows of a table with a column for each group; of the settings, those that differ."""
    columns = list(groups.values())
    heads = [runs[0].config for runs in columns]
    rows = [["run", *groups], ["model", *(config.model for config in heads)]]
    rows.append(["parameters", *(runs[0].parameters for runs in columns)])
    rows.append(["epochs", *(epochs_done(runs[0]) for runs in columns)])
    for name in [item.name for item in fields(Config) if item.name not in ("model", "epochs", "data")]:
        values = [getattr(config, name) for config in heads]
        if name == "seed" and (len(set(values)) > 1 or any(len(runs) > 1 for runs in columns)):
            rows.append(["seed", *map(some_seeds, columns)])
        elif name not in STORAGE_FIELDS and len(set(values)) > 1:
            rows.append([name, *("none" if value is None else str(value) for value in values)])
    measured = [[measures(run) for run in runs] for runs in columns]
    for name in measured[0][0]:
        form = FORMS.get(name) or FORMS[name.split()[-1]]
        cells = [shown([values[name] for values in column], form) for column in measured]
        rows += [[name, *cells]] if any(cells) else []
    return rows


def measures(run: Run) -> dict[str, float | None]:
    """What the table shows of a run, by the names of its rows; None: not measured."""
    history = run.history
    values: dict[str, float | None] = {"peak rate": max(history.lrs)}
    for part in ("train", "val", "test"):
        found = run.last.get(part)
        values[f"{part} loss"] = found.loss if found else None
        values[f"{part} accuracy"] = found.accuracy if found else None
    seconds = sum(row.seconds for row in history.epochs)
    return values | {"seconds": seconds, "images/s": history.images_per_second}


def epochs_done(run: Run) -> str:
    """How many epochs a run has, and of how many where some are left."""
    done, all_of_them = len(run.history.epochs), run.config.epochs
    return f"{done}" if run.finished else f"{done} of {all_of_them}"


def print_columns(rows: list[list[str]], width: int) -> None:
    """Print a table whose first column names the rows, in lots of as many columns as `width` holds."""
    head = max(len(row[0]) for row in rows)
    cell = 2 + max(len(text) for row in rows for text in row[1:])
    count = max(1, (width - head) // cell)
    for first in range(1, len(rows[0]), count):
        for name, *cells in rows:
            line = cells[first - 1 : first - 1 + count]
            print(f"{name:<{head}}" + "".join(f"{text:>{cell}}" for text in line))
        print()


def findings(groups: Groups) -> list[str]:
    """What the runs say of each group's mean, of the difference between two groups, and of two runs."""
    lines = [summary(name, runs) for name, runs in groups.items() if len(runs) > 1]
    if len(groups) == 2:
        lines.append(verdict(groups))
    elif len(groups) > 2:
        lines.append("A difference is judged between two groups: name the folders of two alone.")
    runs = [run for members in groups.values() for run in members]
    return lines + ([two_networks(*runs)] if len(runs) == 2 else [])


def summary(name: str, runs: Sequence[Run]) -> str:
    """The accuracies of some finished runs, their mean and deviation, and the mean's 95 % interval."""
    part = judged_part(runs)
    values = list(accuracies(runs, part).values())
    found = estimate(values)
    each = ", ".join(f"{100 * value:.2f}" for value in values)
    said = f"{name}: {NAMES[part]} accuracy {each} % (seed {some_seeds(runs)})"
    if found.deviation is None or found.interval is None:
        return f"{said}; one seed has no deviation."
    low, high = (f"{100 * end:.2f}" for end in found.interval)
    return (
        f"{said}; mean {100 * found.mean:.2f} ± {100 * found.deviation:.2f} % ({found.number}), "
        f"95% interval of the mean {low} to {high} %."
    )


def judged_part(runs: Sequence[Run]) -> str:
    """What runs are judged by: the held-out images where all have as many of them, else the test set."""
    shares = {run.config.val_split for run in runs}
    return "val" if len(shares) == 1 and all("val" in run.last for run in runs) else "test"


def accuracies(runs: Sequence[Run], part: str) -> dict[int, float]:
    """The accuracies of finished runs, by their seeds."""
    return {run.config.seed: run.last[part].accuracy for run in runs}


def verdict(groups: Groups) -> str:
    """Whether the difference between two groups is more than their seeds make by chance."""
    (first, ours), (second, theirs) = groups.items()
    if not same_images(ours[0], theirs[0]):
        return f"{first} and {second} were tested on different images: they cannot be compared."
    for name, (run, *_) in groups.items():
        if not run.finished:
            return (
                f"{name} has {epochs_done(run)} epochs: nothing is told of a run that is not finished."
            )
    part = judged_part([*ours, *theirs])
    values = [accuracies(side, part) for side in (ours, theirs)]
    if min(len(ours), len(theirs)) < 2:
        return alone(groups, part)
    found = difference(*values)
    how = f"paired by seed, n = {len(ours)}"
    if not found.paired:
        how = f"Welch, n = {len(ours)} and {len(theirs)}"
    said = f"{first} minus {second}: {100 * found.value:+.2f} points of {NAMES[part]} accuracy"
    if found.interval is None:
        return (
            f"{said} at every seed. Not told apart: without any deviation between seeds there is "
            "nothing to judge by; more seeds may show one."
        )
    low, high = (f"{100 * end:+.2f}" for end in found.interval)
    said += f", 95% interval {low} to {high} ({how})"
    if found.told:
        return f"{said}. Told apart."
    needed = f"about {found.needed:,}" if found.needed else f"over {MOST:,}"
    return (
        f"{said}. Not told apart: {needed} seeds a side would be needed for a difference of this size."
    )


def same_images(first: Run, second: Run) -> bool:
    """Whether two runs were tested on the same images, as far as they say."""
    shas = {run.test_sha256 for run in (first, second)} - {None}
    settings = {(run.config.dataset, run.config.max_test_batches) for run in (first, second)}
    return len(shas) < 2 and len(settings) == 1


def alone(groups: Groups, part: str) -> str:
    """What can be said where a group is one run: by how much such runs are known to differ by chance."""
    singles = [name for name, runs in groups.items() if len(runs) < 2]
    said = [
        f"Nothing can be told of a difference from one run ({', '.join(singles)}): --seeds 5 makes five."
    ]
    for name, runs in groups.items():
        known = chance(runs[0].config.recipe) if name in singles and part == "test" else ""
        said += [f"Of the recipe of {name}, {known}"] if known else []
    return " ".join(said)


def two_networks(first: Run, second: Run) -> str:
    """McNemar's exact test of two runs on the same test images, or why there is none."""
    try:
        ours, theirs = (read_answers(run.folder) for run in (first, second))
    except ValueError as error:
        return f"No test image by image: {error}."
    if not same_images(first, second) or [row[0] for row in ours] != [row[0] for row in theirs]:
        return "No test image by image: the test images are not the same."
    found = disagreement(*(np.array([true == said for true, said in rows]) for rows in (ours, theirs)))
    told = "are told apart" if found.p_value < 0.05 else "are not told apart"
    return (
        f"Of {len(ours):,} test images {first.folder} alone is right on {found.first_alone:,}, "
        f"{second.folder} alone on {found.second_alone:,} (McNemar's exact test, p = "
        f"{found.p_value:.2g}): these two networks {told}. Other seeds of the same settings are other "
        "networks."
    )


def read_answers(folder: Path) -> list[tuple[str, str]]:
    """The true and the predicted class of each test image of a run, from predictions.csv.

    Raises:
        ValueError: it is not there, or is something else; the command that writes it is named.
    """
    path = folder / "predictions.csv"
    try:
        rows = list(csv.DictReader(read_bytes(path).decode().splitlines()))
        return [(row["label"], row["predicted"]) for row in rows]
    except (OSError, ValueError, KeyError, csv.Error):
        raise ValueError(f"{path} cannot be read; python main.py report {folder} writes it") from None
