import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import main
from config import RECIPES, Config, parse_config
from data import make_loaders
from report import class_names, write_answers, write_report
from reporting import lettering
from reporting.findings import (
    calibration_section,
    classes_section,
    confusions,
    fenced,
    mistakes_section,
    numbers,
)
from reporting.sections import (
    finder_section,
    gap,
    headline,
    how_evaluated,
    method,
    next_step,
    repeat_section,
    warnings_of,
)
from utils import Epoch, History, Predictions, escape, share_interval
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


@pytest.mark.slow
def test_the_report_has_what_the_exercise_hands_in(finished):
    text = (finished / "report.md").read_text()
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert heads == [
        "Data",
        "Network",
        "Learning rate",
        "Training",
        "Classes",
        "How sure it is",
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
        "reliability",
        "misclassified",
        "gradcam_layer1",
        "gradcam_layer2",
    ]
    assert {path.stem for path in (finished / "figures").iterdir()} == set(figures)
    assert "Kernel Shape" in text and "| lr_rule |" in text


@pytest.mark.slow
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
    assert re.search(rf"\| airplane \| ([\d.]+%|never answered) \| {recall:.1%} \|", text)


@pytest.mark.slow
def test_a_run_without_mistakes_has_a_report(finished, tmp_path):
    for name in ("config.json", "environment.json", "summary.txt", "history.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    model, card = load_weights(finished)
    loaders = make_loaders(Config(**card["config"]))
    labels = loaders.test.dataset.split.labels
    perfect = Predictions(np.eye(10, dtype=np.float32)[labels], labels)
    text = write_report(tmp_path, model, loaders, perfect).read_text()
    assert "**100.00%**" in text and "\n0 of 1,000 test images are misclassified" in text


def test_a_peak_whose_range_test_is_lost_is_not_said_to_be_given(finished):
    history = History.load(finished)
    assert "The peak was given." in finder_section(CONFIG | {"lr": 0.1}, None, history)
    said = finder_section(CONFIG | {"lr": None}, None, history)
    assert "that of a range test whose lr_finder.json is gone" in said


def test_numbers_for_programs_are_folded_away_and_those_for_readers_are_short(finished):
    text = (finished / "report.md").read_text()
    assert "Normalised with mean 0.491, 0.482, 0.447 and" in text
    assert re.search(r"<summary>As it ran</summary>\n\n```\nBatchProgram\(", text)


def test_a_network_of_one_child_has_maps_in_its_report_one_of_each_size(finished, tmp_path):
    for name in ("config.json", "environment.json", "history.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    model, card = load_weights(finished)
    wrapped = torch.nn.Sequential(model)
    loaders = make_loaders(Config(**card["config"]))
    predictions = main.predict(model, "cpu", loaders.test, precision="fp32")
    text = write_report(tmp_path, wrapped, loaders, predictions).read_text()
    assert "(16 x 16 places at 0.layer1, 8 x 8 places at 0.layer2)" in text
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == text.count("](figures/")


def test_names_of_classes_are_shown_as_they_are_and_are_no_markup():
    predictions = Predictions(np.eye(2, dtype=np.float32)[[1, 1, 0]], np.array([0, 1, 0]))
    names = [escape(name) for name in ("a|b <b>", "_x_ $1 *2*")]
    text = classes_section(predictions, names) + mistakes_section(predictions, {}, names, CONFIG)
    assert r"| a\|b \<b\> |" in text and r"\_x\_ \$1 \*2\*" in text
    assert not re.search(r"(?<!\\)[<$*_]", text.replace("**", "").partition("![")[0])


@pytest.mark.slow
def test_no_text_from_outside_steers_the_report_the_figures_or_the_page(finished, tmp_path):
    evil = "x\x1b[31m|y\n# Heading\n```\n<script>alert(1)</script> ![i](http://h) \udce9 \u202e"
    for name in ("summary.txt", "history.json", "lr_finder.json", "environment.json", "config.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"output": evil, "data": evil}
    (tmp_path / "config.json").write_text(json.dumps(config))
    machine = {"machine": evil, "versions": evil, "precision": evil}
    (tmp_path / "environment.json").write_text(json.dumps(machine))
    (tmp_path / "summary.txt").write_text("```\n# Heading\n\x1b[31m")
    model, card = load_weights(finished)
    loaders = make_loaders(Config(**card["config"]))
    for loader in (loaders.train, loaders.test):
        named = "x|y # Heading ``` <script>alert(1)</script> ![i](http://h)"  # what a split lets in
        split = replace(loader.dataset.split, classes=(named, *loaders.classes[1:]))
        loader.dataset.split = split
    predictions = main.predict(model, "cpu", loaders.test, precision="fp32")
    text = write_report(tmp_path, model, loaders, predictions).read_text()
    page, table = ((tmp_path / name).read_text() for name in ("report.html", "mistakes.csv"))
    for content in (text, page, table):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\udc80-\udcff]", content)
    assert "<script" not in page and "<h1>Heading" not in page and 'src="http' not in page
    rows = [line for line in text.splitlines() if line.startswith("| output")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 3


def test_a_class_without_an_image_is_called_unknown_and_not_the_worst():
    predictions = make_predictions([0, 0, 1, 1] * 50, [0, 0, 1, 0] * 50)
    text = classes_section(predictions, ["a", "b", "nothing"])
    assert "| nothing | never answered | no image |  |  | 0 |" in text
    assert "No test image is of nothing: how well that is found is unknown." in text
    assert "than nothing" not in text and "Found more often than a (66.7%): b." in text


@pytest.mark.parametrize(("images", "named"), [(4, False), (400, True)])
def test_classes_are_ranked_only_where_their_intervals_are_apart(images, named):
    quarter = images // 4
    labels = [0] * images + [1] * images
    predicted = [0] * images + [1] * (3 * quarter) + [0] * quarter
    text = classes_section(make_predictions(predicted, labels), "abc")
    assert ("Found less often than a (100.0%): b." in text) == named
    assert ("All differences between classes are within the intervals" in text) != named


def test_among_many_equal_classes_none_is_named_by_luck():
    named = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = np.arange(1000) % 10
        predicted = np.where(rng.random(1000) < 0.7, labels, (labels + 1) % 10)
        predictions = Predictions(np.eye(10, dtype=np.float32)[predicted], labels)
        named += "Found" in classes_section(predictions, [str(k) for k in range(10)])
    assert named <= 2  # of 40, at 95 %


def test_the_accuracy_comes_with_its_interval_and_the_level_of_chance():
    predictions = make_predictions([0, 0, 1, 2], [0, 0, 0, 2])
    text = headline(CONFIG, make_history(1.0), predictions, "abc", "fp32")
    low, high = share_interval(3, 4)
    assert f"| its 95% interval (Wilson) | {low:.1%} to {high:.1%} |" in text
    assert "| level of chance: always the most frequent class | 75.0% |" in text


@pytest.mark.parametrize(
    ("asked", "used", "shown"),
    [
        ("auto", "bf16", "| bf16, as `auto` chose |"),
        ("fp32", "fp32", "| fp32 |"),
        ("auto", "auto", "| auto; which was not recorded |"),
    ],
)
def test_the_precision_that_was_used_is_told(asked, used, shown):
    config = CONFIG | {"precision": asked}
    assert shown in headline(config, make_history(1.0), make_predictions([0], [0]), "abc", used)


@pytest.mark.slow
def test_what_auto_became_is_recorded_as_the_run_begins(finished):
    assert stored(finished, "environment")["precision"] == "fp32"


@pytest.mark.parametrize(("right", "said"), [(80, "within the"), (300, "less sure"), (5, "is surer")])
def test_how_sure_it_is_is_judged_by_how_often_it_is_right(right, said):
    probabilities = np.tile(np.array([[0.25, 0.75]]), (100, 1)) if right == 80 else None
    if probabilities is None:
        sure = 0.6 if right == 300 else 0.95
        probabilities = np.tile(np.array([[1 - sure, sure]]), (300, 1))
    labels = (np.arange(len(probabilities)) < right).astype(int)
    text, smoothed = (calibration_section(Predictions(probabilities, labels), x) for x in (0, 0.1))
    assert ("as label smoothing asks" in smoothed) == (right == 300)
    assert said in text and "smoothing" not in text and "expected calibration error is" in text
    assert ("No answer has a probability over 90%" in text) == (right != 5)


CAUSES = {
    "augmented": "on augmented images",
    "dropout": "with dropout at work",
    "ema": "averaged weights",
}


@pytest.mark.parametrize(
    ("changes", "causes"),
    [
        ({}, ["augmented"]),
        ({"padding": 0, "flip": False, "cutout": 0}, []),
        ({"padding": 0, "flip": False, "cutout": 0, "dropout": 0.5}, ["dropout"]),
        ({"flip": False, "cutout": 0, "ema_decay": 0.9}, ["augmented", "ema"]),
        ({"padding": 0, "flip": False, "cutout": 0, "grayscale": 0.1}, ["augmented"]),
    ],
)
@pytest.mark.parametrize("train", [0.2, 0.42, 0.9])
def test_only_causes_that_the_run_has_are_given_for_its_training_accuracy(changes, causes, train):
    history = make_history(1.0)
    history.epochs[-1] = replace(history.epochs[-1], train_accuracy=train)
    said = gap(asdict(Config(**changes)), history)
    assert "while the weights still move" in said and "harder ones" not in said
    assert [name for name, words in CAUSES.items() if words in said] == causes
    assert ("A gap of over 5 points is overfitting" in said) == (train == 0.9)


@pytest.mark.parametrize(
    ("changes", "train", "warned", "said"),
    [
        ({"epochs": 3}, 0.4, False, "finish this run"),
        ({}, 0.4, True, "a lower learning rate, such as `--lr 0.01`"),
        ({"dataset": "cifar10-sample"}, 0.9, False, "with `--dataset cifar10`;"),
        ({"dataset": "cifar10-sample", "model": "resnet18"}, 0.9, False, "`--dataset cifar10`;"),
        ({"optimizer": "sgd"}, 0.9, False, "by `--weight-decay 5e-4`"),
        ({"optimizer": "muon"}, 0.9, False, "by `--weight-decay 0.05`"),
        ({"weight_decay": 0.1, "cutout": 16}, 0.9, False, "more training images, as"),
        ({"cutout": 0}, 0.9, False, "`--cutout 8`"),
        ({"flip": False}, 0.9, False, "`--flip`"),
        ({"dataset": "svhn"}, 0.9, False, "`--optimizer adamw --weight-decay 0.05`"),
        ({"weight_decay": 0.1}, 0.9, False, "more training images"),
        ({}, 0.3, False, "`--epochs 2`"),
    ],
)
def test_one_thing_to_try_next_follows_from_the_run(changes, train, warned, said):
    history = make_history(1.0)
    history.epochs[-1] = replace(history.epochs[-1], train_accuracy=train)
    advice = next_step(asdict(Config(**({"epochs": 1} | changes))), history, warned)
    assert said in advice
    for flags in re.findall(r"`(--[^`]+)`", advice):
        parse_config(flags.replace("--resume --output", "--resume --output x").split())


def test_a_run_without_a_mistake_is_not_told_to_train_longer():
    text = headline(CONFIG, make_history(1.0), make_predictions([0, 1, 2], [0, 1, 2]), "abc", "fp32")
    assert "What to try next:** more test images" in text


def test_the_settings_that_were_changed_come_first_and_the_others_are_folded_away():
    text = repeat_section(asdict(Config(epochs=3, output="runs/p|q")), "", make_predictions([0], [0]))
    changed, others = text.split("<details>")
    assert "| epochs | 3 |" in changed and r"| output | runs/p\|q |" in changed
    assert "| batch_size | 512 |" in others and "epochs |" not in others


def test_close_is_a_number():
    predictions = make_predictions([0] * 700 + [1] * 300, [0] * 1000)
    low, high = share_interval(700, 1000)
    said = f"within about {100 * (high - low) / 2**0.5:.1f} points are close"
    assert said in repeat_section(CONFIG, "", predictions) and "about 4.0 points" in said


def test_answers_are_tables_with_files_where_there_are_files(tmp_path):
    predictions = make_predictions([0, 1, 1, 2], [0, 0, 1, 0])
    write_answers(tmp_path, predictions, "abc", None)
    every = (tmp_path / "predictions.csv").read_text().splitlines()
    assert every[:3] == ["image,label,predicted,probability", "0,a,a,1.000000", "1,a,b,1.000000"]
    assert len(every) == 5
    lines = (tmp_path / "mistakes.csv").read_text().splitlines()
    assert lines == ["index,true,predicted,probability", "1,a,b,1.000000", "3,a,c,1.000000"]
    files = ("w.png", "x, y\n|.png", "z.png", "last.png")
    write_answers(tmp_path, predictions, "abc", files)
    every = (tmp_path / "predictions.csv").read_text().splitlines()
    assert every[0] == "image,file,label,predicted,probability" and every[4] == "3,last.png,a,c,1.000000"
    lines = (tmp_path / "mistakes.csv").read_text().splitlines()
    assert lines[:2] == ["index,file,true,predicted,probability", '1,"x, y |.png",a,b,1.000000']
    assert r"| #1 | x, y \|.png |" in numbers(CONFIG, np.array([1, 3]), files)


@pytest.mark.slow
def test_the_line_that_shows_an_image_shows_that_image(finished, monkeypatch):
    from PIL import Image

    text = (finished / "report.md").read_text()
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]
    number = int(re.search(r"this shows #(\d+)", text)[1])
    seen = []
    monkeypatch.setattr(Image.Image, "show", lambda image: seen.append(image))
    exec(code, {})
    model, card = load_weights(finished)
    expected = make_loaders(Config(**card["config"])).test.dataset.split.images[number]
    assert seen == [Image.fromarray(expected).resize((256, 256))]


def test_an_image_of_a_folder_is_read_as_the_run_read_it():
    config = CONFIG | {"dataset": "folder", "data": "my pictures", "image_size": 48, "fit": "pad"}
    text = numbers(config, np.array([3]), None)
    assert "load_split('folder', 'test', 'my pictures', image_size=48, fit='pad').images[3]" in text


@pytest.mark.slow
def test_the_page_holds_its_figures(finished):
    page = (finished / "report.html").read_text()
    text = (finished / "report.md").read_text()
    assert page.count('src="data:image/png;base64,') == text.count("](figures/")
    assert "figures/" not in page and "<details>" in page and "<table>" in page
    assert "<title>custom" in page and "\\_" not in page.partition("</title>")[0]


def test_a_fence_is_longer_than_any_in_its_text():
    assert fenced("a\n````\nb") == "`````\na\n````\nb\n`````"


def test_names_that_figures_cannot_show_have_their_numbers_in_the_report(monkeypatch):
    assert class_names(["a", "b"]) == ["a", "b"]
    monkeypatch.setattr(lettering, "fonts_for", lambda text: ([], {"\u732b"} & set(text)))
    assert class_names(["a_b", "\u732b"]) == ["0: a_b", "1: \u732b"]


def test_the_report_says_how_much_the_seed_is_known_to_move_and_what_tells_more():
    predictions = make_predictions([0] * 700 + [1] * 300, [0] * 1000)
    quick = repeat_section(asdict(Config(**RECIPES["quick"])), "", predictions)
    assert "3 seeds had a standard deviation of 0.26 points: by the seed alone, two runs" in quick
    other = repeat_section(CONFIG, "", predictions)
    assert "standard deviation" not in other and "`python main.py compare` tells" in other


@pytest.mark.slow
def test_the_report_tells_how_to_run_it_again_and_where_it_ran(finished):
    text = (finished / "report.md").read_text()
    command = re.search(r"```\npython main.py (.*)\n```", text)[1]
    assert parse_config(command.split()) == Config(**stored(finished, "config"))
    environment = stored(finished, "environment")
    assert environment["machine"] in text and environment["versions"] in text


CONFIG = asdict(Config(epochs=1))


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


def test_a_network_that_overfits_is_not_said_to_guess_and_gets_other_advice():
    history = make_history(0.9, 1.2, 1.5)  # the last two are over the loss of guessing, 1.099
    rows = [replace(row, test_accuracy=0.7, train_accuracy=0.95) for row in history.epochs]
    history = History(rows, [0.1, 0.09, 0.07, 0.05, 0.03, 0.01])
    config = asdict(Config(epochs=3, cutout=0))
    text = headline(config, history, make_predictions([0, 1], [0, 2]), "abc", "fp32")
    assert "guessing" not in text and "--lr" not in text and "`--cutout 8`, as the network overf" in text


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
    assert "by the mean logits of six views of each image" in said


def test_confused_pairs_count_both_ways_and_the_worst_comes_first():
    predictions = make_predictions([1, 1, 0, 2, 2, 0], [0, 0, 1, 1, 2, 0])
    assert confusions(predictions, "abc") == [["a, b", 2, 1, "75.0%"], ["b, c", 1, 0, "25.0%"]]
