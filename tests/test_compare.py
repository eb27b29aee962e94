import json
import resource
from dataclasses import asdict

import pytest

import main
from config import Config
from utils import Epoch, History
from weights_file import save_weights


def make_run(folder, epochs=2, val=False, **settings):
    """A run folder as training would leave it, without weights."""
    folder.mkdir(parents=True)
    config = Config(epochs=2, **settings)
    rows = [
        Epoch(
            epoch=k,
            lr=0.1,
            train_loss=2.0 / k,
            train_accuracy=0.3 * k,
            seconds=60.0,
            images_per_second=1000.0 * k,
            **({"val_loss": 1.5, "val_accuracy": 0.4} if val else {}),
            **({"test_loss": 1.6, "test_accuracy": 0.35} if not val or k == 2 else {}),
        )
        for k in range(1, epochs + 1)
    ]
    History(rows, [0.05, 0.1] * epochs).save(folder)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return str(folder)


def table_of(printed):
    """The cells of a printed comparison, by the name of their row."""
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
        "": [],
        f"figure {tmp_path / 'compare.png'}": [],
    }
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_is_shown_as_far_as_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    runs = [make_run(tmp_path / "x/r"), make_run(tmp_path / "y/r", epochs=1, val=True)]
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
