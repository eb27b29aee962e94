import json
import resource
from dataclasses import asdict
from pathlib import Path

import pytest

import main
from config import RECIPES, Config
from utils import Epoch, History
from visualize import plot_history
from weights_file import save_weights


def make_run(folder, done=2, val=False, accuracy=0.35, **settings):
    """A run folder as training would leave it, without weights."""
    folder.mkdir(parents=True)
    config = Config(**{"epochs": 2, **settings})
    rows = [
        Epoch(
            epoch=k,
            lr=0.1,
            train_loss=2.0 / k,
            train_accuracy=0.6 * k / done,
            seconds=60.0,
            images_per_second=1000.0 * k,
            **({"val_loss": 1.5, "val_accuracy": 0.05 + accuracy} if val else {}),
            **({"test_loss": 1.6, "test_accuracy": accuracy} if not val or k == config.epochs else {}),
        )
        for k in range(1, done + 1)
    ]
    History(rows, [0.05, 0.1] * done).save(folder)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return str(folder)


def make_seeds(folder, accuracies, seeds=None, val=False, **settings):
    """The folder of several seeds, with finished runs of some accuracies by their seeds."""
    folder.mkdir(parents=True)
    for seed, accuracy in accuracies.items():
        make_run(folder / f"seed-{seed}", val=val, accuracy=accuracy, seed=seed, **settings)
    config = Config(**{"epochs": 2, **settings}, seeds=seeds or len(accuracies))
    (folder / "seeds.json").write_text(json.dumps(asdict(config)))
    return str(folder)


def compared(capsys, monkeypatch, *runs):
    """What compare prints of some runs on a wide screen: its table, and the lines below it."""
    monkeypatch.setenv("COLUMNS", "900")
    assert main.main(["compare", *runs]) == 0
    printed = capsys.readouterr().out
    rest = printed.rpartition("images/s")[2].splitlines()[1:-1]
    return table_of(printed), [line for line in rest if line]


def table_of(printed):
    """The cells of a printed comparison, by the name of their row."""
    printed = printed.partition("\n\n")[0]
    rows = [line.split("  ") for line in printed.splitlines()]
    return {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}


def test_a_comparison_shows_results_and_only_the_settings_that_differ(tmp_path, capsys, tiny):
    runs = [make_run(tmp_path / "a", data="here"), make_run(tmp_path / "b", val=True, cutout=16)]
    card = {"model": "custom_resnet", "options": {"width": 4}, "classes": list("abcdefghij")}
    card |= {"mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 32}
    save_weights(tmp_path / "a/weights.safetensors", tiny, card)
    assert main.main(["compare", *runs]) == 0
    printed = capsys.readouterr().out
    assert table_of(printed) == {
        "run": ["a", "b"],
        "model": ["custom_resnet"] * 2,
        "parameters": ["26,350", "?"],  # of the second there are no weights
        "epochs": ["2", "2"],
        "cutout": ["8", "16"],
        "peak rate": ["0.1", "0.1"],
        "train loss": ["1.0000"] * 2,
        "train accuracy": ["60.00%"] * 2,
        "val loss": ["1.5000"],
        "val accuracy": ["40.00%"],
        "test loss": ["1.6000"] * 2,
        "test accuracy": ["35.00%"] * 2,
        "seconds": ["120"] * 2,
        "images/s": ["1,500"] * 2,
    }
    assert printed.endswith(f"figure {tmp_path / 'compare.png'}\n")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    runs = [make_run(tmp_path / "x/r"), make_run(tmp_path / "y/r", done=1, val=True)]
    output = tmp_path / "both.png"
    assert main.main(["compare", *runs, "--output", str(output)]) == 0
    table = table_of(capsys.readouterr().out)
    assert table["run"] == runs  # one name for both folders
    assert table["epochs"] == ["2", "1 of 2"] and table["test loss"] == ["1.6000"]
    assert output.is_file() and not (tmp_path / "x/compare.png").exists()


def test_a_narrow_screen_shows_the_runs_in_lots(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    runs = [make_run(tmp_path / name) for name in "abc"]
    main.main(["compare", *runs])
    lines = capsys.readouterr().out.splitlines()
    heads = [line.split() for line in lines if line.startswith("run ")]
    assert heads == [["run", "a", "b"], ["run", "c"]] and max(map(len, lines[:-1])) <= 50


FIVE = (0.86, 0.87, 0.88, 0.87, 0.865)


def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path, capsys, monkeypatch):
    runs = [make_run(tmp_path / name, seed=k, accuracy=0.3 + k / 10) for k, name in enumerate("abc")]
    runs.append(make_run(tmp_path / "d", seed=3, accuracy=0.5, optimizer="sgd", device="cpu"))
    table, said = compared(capsys, monkeypatch, runs[2], *runs[:2], runs[3])
    assert table["run"] == ["c, a, b", "d"] and table["seed"] == ["0 to 2", "3"]
    assert table["test accuracy"] == ["40.00 ± 10.00% (3)", "50.00%"]
    assert table["train loss"] == ["1.0000 ± 0.0000 (3)", "1.0000"]
    assert said[0] == (
        "c, a, b: test accuracy 30.00, 40.00, 50.00 % (seed 0 to 2); mean 40.00 ± 10.00 % (3), "
        "95% interval of the mean 15.16 to 64.84 %."
    )
    assert said[1].startswith("Nothing can be told of a difference from one run (d)")
    assert len(said) == 2  # four runs: no test image by image


def test_two_versions_of_the_code_are_two_groups_though_their_settings_are_the_same(
    tmp_path, capsys, monkeypatch
):
    before = make_seeds(tmp_path / "before", dict(enumerate(FIVE)))
    after = make_seeds(tmp_path / "after", dict(enumerate(reversed(FIVE))))
    more = make_seeds(tmp_path / "more", {5: 0.9, 6: 0.8})
    table, _ = compared(capsys, monkeypatch, before, after, more)
    assert table["run"] == ["before, more", "after"] and table["seed"] == ["0 to 6", "0 to 4"]


def test_a_difference_over_that_of_the_seeds_is_told_apart_paired_by_seed(tmp_path, capsys, monkeypatch):
    sgd = make_seeds(tmp_path / "sgd", {k: x + 0.02 + k / 1e4 for k, x in enumerate(FIVE)}, lr=0.1)
    adam = make_seeds(tmp_path / "adam", dict(enumerate(FIVE)))
    table, said = compared(capsys, monkeypatch, sgd, adam)
    assert table["run"] == ["sgd", "adam"] and table["lr"] == ["0.1", "none"]
    assert said[2] == (
        "sgd minus adam: +2.02 points of test accuracy, 95% interval +2.00 to +2.04 (paired by seed, "
        "n = 5). Told apart."
    )


def test_a_difference_within_that_of_the_seeds_is_not_and_it_is_said_how_many_would_tell(
    tmp_path, capsys, monkeypatch
):
    sgd = make_seeds(tmp_path / "sgd", {k: x + 0.005 for k, x in enumerate(FIVE, 3)}, lr=0.1)
    adam = make_seeds(tmp_path / "adam", dict(enumerate(FIVE)))
    _, said = compared(capsys, monkeypatch, sgd, adam)
    assert "+0.50 points" in said[2] and "(Welch, n = 5 and 5)" in said[2]
    assert said[2].endswith(
        " Not told apart: about 36 seeds a side would be needed for a difference of this size."
    )
    twin = make_seeds(tmp_path / "twin", {k: x + 1e-7 * k for k, x in enumerate(FIVE, 3)}, lr=0.2)
    assert "Not told apart: over 1,000 seeds" in compared(capsys, monkeypatch, adam, twin)[1][2]


def test_identical_runs_are_not_told_apart(tmp_path, capsys, monkeypatch):
    runs = [make_seeds(tmp_path / name, {0: 0.5, 1: 0.5}) for name in "ab"]
    _, said = compared(capsys, monkeypatch, *runs)
    assert said[0].endswith("95% interval of the mean 50.00 to 50.00 %.")
    assert said[2].startswith("a minus b: +0.00 points of test accuracy at every seed. Not told apart: ")


def test_settings_that_were_tried_on_held_out_images_are_judged_by_those(tmp_path, capsys, monkeypatch):
    held = {"val": True, "val_split": 0.1, "epochs": 2}
    runs = [
        make_seeds(tmp_path / x, {0: 0.5, 1: 0.6}, lr=lr, **held) for x, lr in (("a", 0.1), ("b", 0.2))
    ]
    _, said = compared(capsys, monkeypatch, *runs)
    assert said[0].startswith("a: validation accuracy 55.00, 65.00 %")
    assert "points of validation accuracy" in said[2]
    other = make_seeds(tmp_path / "c", {0: 0.5, 1: 0.6}, val=True, val_split=0.2)
    assert "points of test accuracy" in compared(capsys, monkeypatch, runs[0], other)[1][2]


def test_one_run_against_one_tells_nothing_but_what_is_known_of_the_recipe(
    tmp_path, capsys, monkeypatch
):
    quick = make_run(tmp_path / "quick", done=10, **RECIPES["quick"])
    other = make_run(tmp_path / "other", done=10, **RECIPES["quick"], lr=0.1)
    _, said = compared(capsys, monkeypatch, quick, other)
    assert said[0] == (
        "Nothing can be told of a difference from one run (quick, other): --seeds 5 makes five. "
        "Of the recipe of quick, 3 seeds had a standard deviation of 0.26 points: by the seed alone, "
        "two runs differ by up to 1.6 points in 95 of 100 cases."
    )


def test_runs_on_other_images_are_not_judged(tmp_path, capsys, monkeypatch):
    real = make_seeds(tmp_path / "a", dict(enumerate(FIVE)))
    sample = make_seeds(tmp_path / "b", dict(enumerate(FIVE)), dataset="cifar10-sample")
    few = make_seeds(tmp_path / "c", dict(enumerate(FIVE)), max_test_batches=1)
    for other in (sample, few):
        _, said = compared(capsys, monkeypatch, real, other)
        assert said[2].endswith("were tested on different images: they cannot be compared.")


def test_three_groups_are_not_judged_and_it_is_said_why(tmp_path, capsys, monkeypatch):
    runs = [make_seeds(tmp_path / name, {0: 0.5, 1: 0.6}) for name in "abc"]
    assert compared(capsys, monkeypatch, *runs)[1][3].startswith("A difference is judged between two")


def test_seeds_that_are_not_finished_are_left_out_by_number(tmp_path, capsys, monkeypatch):
    folder = make_seeds(tmp_path / "a", {0: 0.5, 1: 0.6}, seeds=5)
    make_run(tmp_path / "a" / "seed-2", done=1, seed=2)
    (tmp_path / "a" / "seed-3").mkdir()
    table, said = compared(capsys, monkeypatch, folder, f"{folder}/seed-0")
    assert table["test accuracy"] == ["55.00 ± 7.07% (2)"]  # and the one that is named twice counts once
    assert main.main(["compare", folder]) == 0
    assert capsys.readouterr().out.startswith(f"left out: {folder} has 2 of its 5 seeds yet\n")


def test_a_run_that_is_not_finished_is_never_judged(tmp_path, capsys, monkeypatch):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", done=1, seed=1)]
    _, said = compared(capsys, monkeypatch, *runs)
    assert said[0] == "b has 1 of 2 epochs: nothing is told of a run that is not finished."


def with_answers(run, predicted, labels="aabbcc"):
    """Give a run the predictions of six images."""
    rows = [
        f"{k},{true},{said},0.9" for k, (true, said) in enumerate(zip(labels, predicted, strict=True))
    ]
    Path(run, "predictions.csv").write_text("\n".join(["image,label,predicted,probability", *rows]))
    return run


def test_two_runs_are_tested_on_the_images_that_they_disagree_on(tmp_path, capsys, monkeypatch):
    a = with_answers(make_run(tmp_path / "a"), "aabbcc")
    b = with_answers(make_run(tmp_path / "b", lr=0.1), "bbaabc")
    _, said = compared(capsys, monkeypatch, a, b)
    assert said[1].startswith(
        f"Of 6 test images {a} alone is right on 5, {b} alone on 0 (McNemar's exact test, p = 0.062): "
        "these two networks are not told apart."
    )
    c = with_answers(make_run(tmp_path / "c", seed=1), "aabbcc")
    assert "alone is right on 0, " in compared(capsys, monkeypatch, a, c)[1][1]  # one group of two


def test_without_the_same_images_there_is_no_test_image_by_image(tmp_path, capsys, monkeypatch):
    a, b = (with_answers(make_run(tmp_path / name), "aabbcc") for name in "ab")
    with_answers(b, "aabbcc", "aabbca")
    assert compared(capsys, monkeypatch, a, b)[1][1].endswith(": the test images are not the same.")
    for spoil in (
        Path.unlink,
        lambda path: path.write_text("x,y\n1,2\n"),
        lambda path: path.write_bytes(b"\xff"),
    ):
        with_answers(b, "aabbcc")
        spoil(Path(b, "predictions.csv"))
        said = compared(capsys, monkeypatch, a, b)[1][1]
        assert said.endswith(f"{b}/predictions.csv cannot be read; python main.py report {b} writes it.")


def test_names_of_runs_are_shown_without_escapes(tmp_path, capsys, monkeypatch):
    runs = [make_run(tmp_path / name) for name in ("\x1b[31mone", "two")]
    assert compared(capsys, monkeypatch, *runs)[0]["run"] == ["[31mone", "two"]


def test_a_group_is_drawn_as_its_mean_with_a_band_of_one_deviation():
    rows = {"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5, "seconds": 1.0}
    rows |= {"images_per_second": 1.0}
    losses = [(3.0, 0.2), (5.0, 0.4)]
    runs = [History([Epoch(**rows, test_loss=x, test_accuracy=y)] * 2, [0.1]) for x, y in losses]
    figure = plot_history({"five": runs, "one": runs[0]})
    for axis, mean, spread in zip(figure.axes, (4.0, 0.3), (2**0.5, 0.02**0.5), strict=True):
        (band,) = axis.collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((mean - spread, mean + spread))
        assert mean in [pytest.approx(line.get_ydata()[-1]) for line in axis.lines]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[0] == "five: test 30.00 ± 14.14% (2), training 50.00%"
    assert labels[-1] == "mean ± standard deviation of the runs"
    assert len(plot_history({"one": runs[0]}).legends[0].get_texts()) == 2


def test_a_band_never_goes_below_zero_on_a_scale_of_powers_of_ten():
    rows = {
        "train_loss": 1.0,
        "train_accuracy": 0.5,
        "lr": 0.1,
        "seconds": 1.0,
        "images_per_second": 1.0,
    }
    runs = [
        History([Epoch(epoch=k, test_loss=x, test_accuracy=y, **rows) for k, x in enumerate(losses, 1)])
        for y, losses in ((0.0, (900.0, 1.0, 1.0, 1.0)), (0.1, (2.0, 1.1, 1.0, 1.0)))
    ]
    figure = plot_history({"x": runs})
    assert figure.axes[0].get_yscale() == "log"
    assert all(axis.collections[0].get_paths()[0].vertices[:, 1].min() >= 0 for axis in figure.axes)
    figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.rename(run.with_name("gone")), "is no run folder: it has no config.json"),
        (lambda run: (run / "history.json").unlink(), "is no run folder: it has no history.json"),
        (lambda run: (run / "history.json").write_text("{}"), "history.json is not what a run writes"),
        (lambda run: (run / "history.json").write_text("[" * 100_000), "is not what a run writes"),
        (lambda run: History([], ["0.1"]).save(run), "writes (lrs must be numbers)"),
        (
            lambda run: (run / "config.json").write_text('{"flip": {}}'),
            "flip must be bool or none, not {}",
        ),
        (lambda run: (run / "config.json").write_text("[1]"), "config.json is not what a run writes"),
        (
            lambda run: History().save(run),
            "history.json is not what a run writes (no epoch is finished)",
        ),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys, change, message):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    change(tmp_path / "b")
    assert main.main(["compare", *runs]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and str(tmp_path / "b") in printed.err
    assert printed.err.count("\n") == 1 and printed.out == ""


def test_one_run_is_no_comparison_however_often_it_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    assert main.main(["compare", run, f"{run}/"]) == 2
    assert capsys.readouterr().err == "main.py: compare needs two runs or more, not 1\n"


def test_a_full_disk_leaves_the_figure_that_was_there(tmp_path, capsys):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    (tmp_path / "compare.png").write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        assert main.main(["compare", *runs]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert (tmp_path / "compare.png").read_bytes() == b"before"


@pytest.mark.parametrize("name", ["absent/c.png", "c.nothing", "a"])
def test_a_figure_that_cannot_be_written_is_one_line(tmp_path, capsys, name):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    assert main.main(["compare", *runs, "--output", str(tmp_path / name)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("main.py: ") and printed.count("\n") == 1
