import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest

import main
from config import Config, parse_config
from data import make_loaders
from report import (
    classes_section,
    confusions,
    escape,
    how_evaluated,
    method,
    mistakes_section,
    warnings_of,
    write_report,
)
from utils import Epoch, History, Predictions
from weights_file import load_weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run with range test and validation set."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    flags = (
        "--dataset cifar10-sample --width 4 --batch-size 32 --epochs 2 --val-split 0.1 "
        "--max-train-batches 3 --precision fp32"
    ).split()
    assert main.main([*flags, "--output", str(folder)]) == 0
    return folder


def test_the_report_has_what_the_exercise_hands_in(finished):
    text = (finished / "report.md").read_text()
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert heads == [
        "Data",
        "Network",
        "Learning rate",
        "Training",
        "Classes",
        "Mistakes",
        "To repeat it",
    ]
    figures = re.findall(r"!\[[^]]+\]\(figures/(\w+)\.png\)", text)
    assert figures == [
        "samples",
        "lr_finder",
        "curves",
        "lr_history",
        "confusion_matrix",
        "misclassified",
        "gradcam_layer1",
        "gradcam_layer2",
    ]
    assert {path.stem for path in (finished / "figures").iterdir()} == set(figures)
    assert "Kernel Shape" in text and "| lr_rule |" in text


def test_the_reports_numbers_are_those_of_the_history_and_of_the_saved_weights(finished):
    text = (finished / "report.md").read_text()
    last = History.load(finished).epochs[-1]
    model, card = load_weights(finished)
    loaders = make_loaders(Config(**card["config"]))
    predictions = main.predict(model, "cpu", loaders.test, precision="fp32")
    assert f"**{predictions.accuracy:.2%}**" in text and predictions.accuracy == last.test_accuracy
    assert f"| validation accuracy | {last.val_accuracy:.2%} |" in text
    assert "3,600 train + 400 validation + 1,000 test images of 10 classes" in text
    recall = (predictions.predicted == 0)[predictions.labels == 0].mean()
    assert re.search(rf"\| airplane \| [\d.]+% \| {recall:.1%} \|", text)


def test_a_run_without_mistakes_has_a_report(finished, tmp_path):
    for name in ("config.json", "environment.json", "summary.txt", "history.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    model, card = load_weights(finished)
    loaders = make_loaders(Config(**card["config"]))
    labels = loaders.test.dataset.split.labels
    perfect = Predictions(np.eye(10, dtype=np.float32)[labels], labels)
    text = write_report(tmp_path, model, loaders, perfect).read_text()
    assert "**100.00%**" in text and "\n0 of 1,000 test images are misclassified" in text


def test_names_of_classes_are_shown_as_they_are_and_are_no_markup():
    predictions = Predictions(np.eye(2, dtype=np.float32)[[1, 1, 0]], np.array([0, 1, 0]))
    names = [escape(name) for name in ("a|b <b>", "_x_ $1 *2*")]
    text = classes_section(predictions, names) + mistakes_section(predictions, [], names)
    assert r"| a\|b \<b\> |" in text and r"\_x\_ \$1 \*2\*" in text
    assert not re.search(r"(?<!\\)[<$*_]", text.replace("**", "").partition("![")[0])


def test_the_report_tells_how_to_run_it_again_and_where_it_ran(finished):
    text = (finished / "report.md").read_text()
    command = re.search(r"```\npython main.py (.*)\n```", text)[1]
    assert parse_config(command.split()) == Config(**stored(finished, "config"))
    environment = stored(finished, "environment")
    assert environment["machine"] in text and environment["versions"] in text


def stored(folder, name):
    """A JSON file of a run folder; its `output` is not part of the description."""
    content = json.loads((folder / f"{name}.json").read_text())
    content.pop("output", None)
    return content


def make_history(*test_losses):
    """Epochs whose rate rises in the first and falls from then on."""
    rows = [
        Epoch(
            epoch=k,
            lr=0.1 / k,
            train_loss=1.0,
            train_accuracy=0.5,
            test_loss=loss,
            test_accuracy=0.4,
            seconds=1.0,
            images_per_second=1.0,
        )
        for k, loss in enumerate(test_losses, 1)
    ]
    return History(rows, [row.lr for row in rows])


def make_predictions(predicted, labels):
    """Sure of each answer, out of three classes."""
    return Predictions(np.eye(3, dtype=np.float32)[predicted], np.array(labels))


@pytest.mark.parametrize(
    ("losses", "predicted", "warning"),
    [
        ((9.0, 0.5, 0.4), [0, 1], None),  # the first epoch is the warm-up
        ((1.0, 0.5, 0.4), [1, 1], "network answers one class for every image after epoch 3; a lower"),
        ((1.0, 1.2, 0.4), [0, 1], "is no better than guessing (a loss of 1.099) after epoch 2; a lower"),
        ((1.0, 0.5), [0, 1], "this run stopped after 2 of 3 epochs."),
    ],
)
def test_a_result_that_is_worth_little_comes_with_a_warning(losses, predicted, warning):
    predictions = make_predictions(predicted, [0, 1])
    history = make_history(*losses)
    history.lrs = [0.05, 0.1, 0.09, 0.07, 0.05, 0.03][: 2 * len(losses)]
    found = warnings_of(asdict(Config(epochs=3)), history, predictions, "abc")
    assert len(found) == (warning is not None) and (not found or warning in found[0])


def test_a_first_epoch_that_was_no_warm_up_is_judged_in_the_report_as_in_training():
    predictions = make_predictions([0, 1], [0, 1])
    found = warnings_of(asdict(Config(epochs=2)), make_history(9.0, 0.5), predictions, "abc")
    assert "after epoch 1;" in found[0]


@pytest.mark.parametrize(("count", "said"), [(1, "1 epoch of 1 step, "), (2, "2 epochs of 1 step, ")])
def test_one_epoch_is_not_called_epochs(count, said):
    assert method(asdict(Config()), make_history(*[1.0] * count)).startswith(said)


def test_averages_of_weights_and_of_mirror_images_are_owned_up_to():
    plain = Config()
    assert len(how_evaluated(asdict(plain))) == 1
    said = " ".join(how_evaluated(asdict(replace(plain, tta=True, ema_decay=0.99))))
    assert "running average over the run, which keeps 0.99 of itself" in said
    assert "The logits of each image and of its mirror image are averaged, after every epoch." in said


def test_confused_pairs_count_both_ways_and_the_worst_comes_first():
    predictions = make_predictions([1, 1, 0, 2, 2, 0], [0, 0, 1, 1, 2, 0])
    assert confusions(predictions, "abc") == [["a, b", 2, 1, "75.0%"], ["b, c", 1, 0, "25.0%"]]
