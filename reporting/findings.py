"""The text of a report on the test images: classes, calibration and mistakes, with their uncertainty."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from utils import Predictions, escape, markdown_table, plain, share_interval


def figure(name: str, caption: str) -> str:
    """The Markdown that shows a figure of the report."""
    return f"![{caption}](figures/{name}.png)"


def counted(number: int, thing: str) -> str:
    """A number and what it counts, with a plural s where needed: 1 epoch, 2 epochs."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def paragraphs(*parts: str) -> str:
    """Join blocks of Markdown, with a blank line between them."""
    return "\n\n".join(parts)


def details(summary: str, body: str) -> str:
    """A part of a page that is folded away until the reader clicks on its summary."""
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"


def fenced(text: str, language: str = "") -> str:
    """A block of code in Markdown; its fence is longer than any that the text itself contains."""
    lines = [plain(line, squeeze=False) for line in text.splitlines()]
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([fence + language, *lines, fence])


def in_percent(interval: tuple[float, float]) -> str:
    """The two ends of an interval of fractions, as percentages."""
    return f"{interval[0]:.1%} to {interval[1]:.1%}"


def accuracy_interval(predictions: Predictions) -> tuple[float, float]:
    """Wilson's 95 % interval of the accuracy."""
    hits = (predictions.predicted == predictions.labels).sum()
    return share_interval(hits, len(predictions.labels))


def classes_section(predictions: Predictions, classes: Sequence[str]) -> str:
    """The section on classes: precision and recall of each, and which differences are not by chance."""
    from sklearn.metrics import precision_recall_fscore_support  # a second of imports

    scores = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=range(len(classes)), zero_division=0.0
    )
    recall, counts = scores[1], scores[3]
    each = 1 - 0.05 / len(classes)
    intervals = [
        share_interval(round(share * count), count, each)
        for share, count in zip(recall, counts, strict=True)
    ]
    answered = np.bincount(predictions.predicted, minlength=len(classes))
    rows: list[list[Any]] = []
    for k, (name, precision, share, f1, count) in enumerate(zip(classes, *scores, strict=True)):
        right = f"{precision:.1%}" if answered[k] else "never answered"
        recall_cells = [f"{share:.1%}", in_percent(intervals[k]), f"{f1:.3f}"]
        rows.append([name, right, *(recall_cells if count else ["no image", "", ""]), f"{count:,}"])
    heads = ["class", "precision", "recall", "interval of the recall", "F1", "images"]
    table = markdown_table(heads, rows)
    return paragraphs(
        "## Classes",
        "Recall is the share of a class's images that are found, precision that of its answers that are "
        f"right. {told_apart(classes, recall, counts, intervals)}",
        f"The intervals hold for all classes at once with 95% (each is Wilson's at {each:.2%}), so that "
        "the luckiest of many classes is not taken for the easiest.",
        table if len(rows) <= 20 else details(f"The {len(rows)} classes", table),
        figure("confusion_matrix", "Confusion matrix: true class by predicted class"),
    )


def told_apart(
    classes: Sequence[str], recall: np.ndarray, counts: np.ndarray, intervals: list[tuple[float, float]]
) -> str:
    """Sentences on which classes are found more often than others, and which have no test image.

    Two classes are only called different if the intervals of their recalls do not overlap.

    Args:
        classes: their names.
        recall: of each class, as a fraction.
        counts: test images of each class.
        intervals: of each recall; all hold at once with 95 %.
    """
    judged = np.flatnonzero(counts).tolist()
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    said = []
    if absent:
        said.append(f"No test image is of {some(absent)}: how well that is found is unknown.")
    best, worst = (int(judged[pick(recall[judged])]) for pick in (np.argmax, np.argmin))
    harder = [classes[k] for k in judged if intervals[k][1] < intervals[best][0]]
    easier = [classes[k] for k in judged if intervals[k][0] > intervals[worst][1]]
    if harder:  # and so the best is easier than the worst
        names = [some(group) for group in (easier, harder)]
        said.append(
            f"Found more often than {classes[worst]} ({recall[worst]:.1%}): {names[0]}. "
            f"Found less often than {classes[best]} ({recall[best]:.1%}): {names[1]}. "
            "Classes are compared here with the best and the worst alone."
        )
    elif len(judged) > 1:
        said.append("All differences between classes are within the intervals of so few images.")
    return " ".join(said)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, at most `most`, and the number of the others."""
    rest = f" and {len(names) - most:,} others" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def confusions(predictions: Predictions, classes: Sequence[str], count: int = 5) -> list[list]:
    """The pairs of classes that are confused most often, in either direction, as rows of a table.

    Returns:
        For each of `count` pairs at most: "a, b"; images of a taken for b; of b taken for a; the pair's
        share of all mistakes.
    """
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


def calibration_section(predictions: Predictions, label_smoothing: float = 0.0) -> str:
    """The section on calibration: whether the answers are right as often as their probabilities say.

    With label smoothing a network is trained to be less sure than it could be, and the text says so.
    """
    calibration, sure = predictions.calibration(), predictions.probabilities.max(1)
    low, high = accuracy_interval(predictions)
    mean = float(sure.mean())
    verdict = "within the interval of the accuracy, so on average it is about as sure as it should be"
    if mean > high:
        verdict = "over the interval of the accuracy: it is surer than it should be"
    elif mean < low:
        verdict = "under the interval of the accuracy: it is less sure than it could be"
        verdict += ", as label smoothing asks of it" if label_smoothing else ""
    high_ones = sure > 0.9
    right = (predictions.predicted == predictions.labels)[high_ones]
    of_them = "No answer has a probability over 90%."
    if len(right):
        interval = in_percent(share_interval(right.sum(), len(right)))
        of_them = (
            f"Of the {len(right):,} answers with a probability over 90%, {right.mean():.1%} are right "
            f"(95% interval {interval})."
        )
    return paragraphs(
        "## How sure it is",
        "A probability is what the softmax makes of the network's scores. Nothing in training makes it "
        "the share of right answers, so it has to be measured. The mean probability of the answers is "
        f"{mean:.1%}, {verdict}. {of_them}",
        f"The expected calibration error is {100 * calibration.error:.1f} points: how far the points of "
        "the figure lie from its diagonal, weighted by their answers, in 15 bins "
        "([Guo et al.](https://arxiv.org/abs/1706.04599)). By chance, a network that is exactly as "
        f"often right as it says gets up to {100 * calibration.chance:.1f} points on so many images. "
        "All this is of images like these: of others the network may be as sure, and wrong.",
        figure("reliability", "Share of right answers by the probability of the answer"),
    )


def mistakes_section(
    predictions: Predictions,
    layers: dict[str, int],
    classes: Sequence[str],
    config: dict,
    files: Sequence[str] | None = None,
) -> str:
    """The section on mistakes: which classes are confused, the worst mistakes, and their Grad-CAM."""
    wrong, total = predictions.misclassified(), len(predictions.labels)
    said = f"{len(wrong):,} of {total:,} test images are misclassified."
    if not len(wrong):
        return f"## Mistakes\n\n{said}"
    rows = predictions.probabilities[wrong]
    second = (np.argsort(-rows, axis=1)[:, 1] == predictions.labels[wrong]).mean()
    sure = (rows.max(1) > 0.9).mean()
    pairs = confusions(predictions, classes)
    return paragraphs(
        "## Mistakes",
        f"{said} In {second:.0%} of them the true class is the second guess; in {sure:.0%} the wrong "
        "answer has a probability over 90%; how much to make of that stands above. Most often confused "
        "are:",
        markdown_table(["a, b", "a taken for b", "b taken for a", "of all mistakes"], pairs),
        "Shown are the mistakes with the highest probability, each with its number, the true class, the "
        "predicted one and its probability. All are in [mistakes.csv](mistakes.csv), the answers to all "
        "images in [predictions.csv](predictions.csv).",
        figure("misclassified", "The mistakes with the highest probability"),
        numbers(config, wrong[:20], files),
        *cams_part(layers),
    )


def numbers(config: dict, shown: np.ndarray, files: Sequence[str] | None) -> str:
    """What the numbers of the shown images mean, code that shows one of them, and their files if any."""
    source = f"{config['dataset']!r}, 'test', {config['data']!r}"
    if config["dataset"] == "folder":  # the code must read the files as the run did
        options = {name: config[name] for name in ("image_size", "fit") if name in config}
        source += "".join(f", {name}={value!r}" for name, value in options.items())
    code = (
        "from PIL import Image; from sources import load_split\n"
        f"Image.fromarray(load_split({source}).images[{shown[0]}]).resize((256, 256)).show()"
    )
    parts = [
        "The number after # is the index of the image among the test images, from 0. In the package's "
        f"folder this shows #{shown[0]}:",
        fenced(code, "python"),
    ]
    if files is not None:
        rows = [[f"#{k}", escape(files[k])] for k in shown]
        parts.append(details("Their files", markdown_table(["number", "file"], rows, (0, 1))))
    return paragraphs(*parts)


def cams_part(layers: dict[str, int]) -> tuple[str, ...]:
    """The part with Grad-CAM of the mistakes, and what such maps can and cannot tell.

    Args:
        layers: that are shown, each with the side of its maps in pixels.
    """
    if not layers:
        return ("No layer of this network has maps of 5 x 5 or more, so there is no Grad-CAM here.",)
    sizes = ", ".join(f"{side} x {side} places at {name}" for name, side in layers.items())
    return (
        "Grad-CAM ([Selvaraju et al.](https://arxiv.org/abs/1610.02391)) shows where the features of a "
        "layer speak for a class, here for the true one and for the one predicted instead. The maps are "
        f"coarse ({sizes}) and tell where, not why. "
        "Where both lie on the object, the classes share what is there, as a cat and a dog do; where "
        "the predicted one's lies beside it, the surroundings may have counted. To find out, cover that "
        "place and predict again.",
        "No evidence on a tile means that nothing in this layer's map speaks for the class. The class "
        "can have a high probability all the same: probabilities depend on the other classes' scores, "
        "and on later layers.",
        *(figure(f"gradcam_{layer}", f"Grad-CAM of the mistakes at {layer}") for layer in layers),
    )
