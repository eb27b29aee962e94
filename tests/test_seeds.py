"""Several seeds by one command: each is a run like any other, and they can be resumed and added to."""

import json
import re
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

import main
import run
from config import Config
from tests.test_compare import make_run, make_seeds
from training.guards import Stopped
from utils import History

SMALL = (
    "--dataset cifar10-sample --width 4 --batch-size 64 --max-train-batches 3 --max-test-batches 2 "
    "--precision fp32 --lr 0.01 --epochs 1"
).split()


@pytest.fixture
def pair(tmp_path):
    """The folder of two finished seeds, 0 and 1, as training would leave it, but for the weights."""
    settings = {"dataset": "cifar10-sample", "width": 4, "lr": 0.01}
    folder = Path(make_seeds(tmp_path / "pair", {0: 0.5, 1: 0.6}, **settings))
    for place in folder.glob("seed-*"):
        (place / "report.html").write_text("")
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The folder of two seeds that were trained, 4 and 5."""
    folder = tmp_path_factory.mktemp("runs") / "pair"
    assert main.main([*SMALL, "--seed", "4", "--seeds", "2", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def begun(real, tmp_path):
    """A copy of it in which the second seed is not begun."""
    shutil.copytree(real, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "seed-5")
    return tmp_path / "r"


@pytest.fixture
def trained(monkeypatch):
    """The seeds that are trained from here on."""
    seeds, execute = [], run.execute
    monkeypatch.setattr(run, "execute", lambda one, *rest: seeds.append(one.seed) or execute(one, *rest))
    return seeds


@pytest.mark.slow
def test_a_seed_of_several_is_the_run_of_that_seed_to_the_bit(real, tmp_path):
    assert main.main([*SMALL, "--seed", "5", "--output", str(tmp_path / "alone")]) == 0
    weights = [path / "weights.safetensors" for path in (real / "seed-5", tmp_path / "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert sorted(path.name for path in real.iterdir()) == ["seed-4", "seed-5", "seeds.json"]


@pytest.mark.slow
def test_seeds_resume_by_their_folder_alone_and_those_that_are_finished_are_not_run_again(
    begun, trained, capsys
):
    assert main.main(["--resume", "--output", str(begun)]) == 0
    assert trained == [5]
    printed = capsys.readouterr().out
    assert f"{begun}/seed-4 is finished\n" in printed
    shares = [History.load(begun / f"seed-{k}").epochs[-1].test_accuracy for k in (4, 5)]
    each = ", ".join(f"{100 * share:.2f}" for share in shares)
    mean = f"mean {50 * sum(shares):.2f} ± "
    assert re.search(
        rf"\nr: test accuracy {each} % \(seed 4, 5\); {mean}.* \(2\), 95% interval", printed
    )
    assert main.main(["--resume", "--output", str(begun)]) == 0
    assert trained == [5]


@pytest.mark.slow
def test_a_seed_that_was_stopped_goes_on_from_its_checkpoint_and_has_its_report_then(
    real, begun, trained, capsys
):
    shutil.copytree(real / "seed-5", begun / "seed-5")
    (begun / "seed-5" / "report.html").unlink()
    before = (begun / "seed-5" / "weights.safetensors").read_bytes()
    assert main.main(["--resume", "--output", str(begun)]) == 0
    assert trained == [5] and (begun / "seed-5" / "report.html").exists()
    assert (begun / "seed-5" / "weights.safetensors").read_bytes() == before
    assert "nothing to resume" not in capsys.readouterr().out


@pytest.fixture
def untrained(monkeypatch):
    """The seeds that are to be trained from here on, and are taken for finished at once."""
    seeds = []

    def leave_run(one, *rest):
        seeds.append(one.seed)
        shutil.rmtree(one.output)
        make_run(Path(one.output), **{**asdict(one), "epochs": 2})
        Path(one.output, "report.html").write_text("")

    monkeypatch.setattr(run, "execute", leave_run)
    return seeds


def test_seeds_can_be_added_and_one_alone_is_a_folder_to_add_to(tmp_path, untrained, capsys):
    folder = str(tmp_path / "r")
    flags = [*SMALL, "--epochs", "2", "--output", folder]
    assert main.main([*flags, "--seeds", "1"]) == 0
    assert "% (seed 0); one seed has no deviation." in capsys.readouterr().out
    assert main.main(["--seeds", "3", "--resume", "--output", folder]) == 0
    assert untrained == [0, 1, 2] and "% (seed 0 to 2); mean " in capsys.readouterr().out
    assert json.loads(Path(folder, "seeds.json").read_text())["seeds"] == 3


def test_a_notebook_runs_seeds_by_the_same_call(tmp_path, untrained):
    config = Config(dataset="cifar10-sample", width=4, lr=0.01, seeds=2, output=str(tmp_path / "r"))
    assert run.run(config) == tmp_path / "r" and untrained == [0, 1]


def test_a_signal_ends_all_seeds_and_says_how_they_go_on(pair, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(run, "fit_model", stop)
    assert main.main(["--seeds", "3", "--resume", "--output", str(pair)]) == 128 + signal.SIGTERM
    assert "--resume continues the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "--width", "8"], "the run has width 4, not 8: continue it with --width 4"),
        (["--resume", "--seed", "4", "--seeds", "6"], "the run has seed 0, not 4"),
        (["--resume", "--seeds", "1"], "seeds must be at least 2, as "),
        (["--seeds", "2"], " is there already; --resume it, or choose another"),
        ([], " is there already; --resume it, or choose another"),
    ],
)
def test_seeds_are_added_to_as_they_began_or_not_at_all(pair, flags, message, monkeypatch, capsys):
    monkeypatch.setattr(run, "execute", lambda *arguments: pytest.fail("a run began"))
    try:
        code = main.main([*flags, *([] if flags[:1] == ["--resume"] else SMALL), "--output", str(pair)])
    except SystemExit as caught:
        code = caught.code
    printed = capsys.readouterr().err
    assert code == 2 and message in printed and printed.count("\n") == 1


def test_one_run_and_several_seeds_never_share_a_folder(pair, monkeypatch, capsys):
    monkeypatch.setattr(run, "execute", lambda *arguments: pytest.fail("a run began"))
    assert main.main(["--resume", "--seeds", "2", "--output", str(pair / "seed-1")]) == 2
    assert "seed-1 holds one run, which --seeds cannot add to; choose another" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pair holds the runs of several seeds; choose another"):
        run.run(Config(dataset="cifar10-sample", output=str(pair), resume=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "seeds must be at least 1, not 0"),
        (["--seeds", "2", "--seed", str(2**32 - 1)], "seeds must be at most 1 from there, not 2"),
        (["--seeds", "2", "--dataset", "folder", "--data", "absent"], "absent"),
        (["--seeds", "2", "--resume"], "there is no run in "),
        (["find-lr", "--seeds", "2", "--recipe", "demo"], "find-lr makes one range test"),
    ],
)
def test_seeds_that_cannot_begin_are_one_line_and_leave_nothing(tmp_path, flags, message, capsys):
    folder = tmp_path / "r"
    try:
        code = main.main([*flags, "--output", str(folder)])
    except SystemExit as caught:
        code = caught.code
    printed = capsys.readouterr().err
    assert code == 2 and message in printed and printed.count("\n") == 1
    assert not folder.exists()


def test_a_file_in_the_place_of_the_folder_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "r").write_text("")
    assert main.main([*SMALL, "--seeds", "2", "--output", str(tmp_path / "r")]) == 2
    assert capsys.readouterr().err == f"main.py: {tmp_path}/r: Not a directory\n"


def test_each_seed_has_a_mirror_of_its_own(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(run, "prepare", lambda one: begun.append(one) or Path(one.output).mkdir() or [])
    monkeypatch.setattr(run, "execute", lambda one: None)
    with pytest.raises(ValueError, match="there is no finished run"):
        run.run(Config(seeds=2, output=str(tmp_path / "r"), mirror="drive/r"))
    assert [one.mirror for one in begun] == ["drive/r-seed-0", "drive/r-seed-1"]
    assert [(one.seed, one.seeds) for one in begun] == [(0, None), (1, None)]


def test_a_folder_of_seeds_without_a_finished_one_cannot_be_compared(pair, capsys):
    for place in pair.glob("seed-*"):
        shutil.rmtree(place)
    assert main.main(["compare", str(pair)]) == 2
    assert capsys.readouterr().err == (
        f"main.py: compare needs two runs or more, not 0; {pair} has 0 of its 2 seeds yet\n"
    )
