"""A run from the command line, stopped and continued, without and with what is in the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import main
import run
from config import Config
from files import lock_folder, unlock_folder
from training import lr_finder
from utils import History
from visualize import plot_lr_finder

ROOT = Path(main.__file__).parent
pytestmark = pytest.mark.usefixtures("unreported")  # but for what runs in a process of its own
SMALL = (
    "--dataset cifar10-sample --width 4 --batch-size 64 --max-train-batches 3 --max-test-batches 2 "
    "--precision fp32"
).split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, unreported):
    """The folder of a run of two epochs, with a seed of its own."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    assert (
        main.main([*SMALL, "--lr", "0.01", "--epochs", "2", "--seed", "7", "--output", str(folder)]) == 0
    )
    return folder


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of it that stands after its first epoch."""
    folder = tmp_path / "r"
    shutil.copytree(finished, folder)
    for path in sorted((folder / "checkpoints").glob("*.ckpt"))[1:]:
        path.unlink()
    return folder


def test_a_run_resumes_by_its_folder_alone(finished, stopped):
    assert main.main(["--resume", "--output", str(stopped)]) == 0
    config = json.loads((stopped / "config.json").read_text())
    assert (config["seed"], config["width"], config["lr"], config["epochs"]) == (7, 4, 0.01, 2)
    ours, theirs = History.load(stopped), History.load(finished)
    assert ours.lrs == theirs.lrs
    assert [row.test_loss for row in ours.epochs] == [row.test_loss for row in theirs.epochs]


def test_a_folder_that_is_mistyped_is_refused_before_anything_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "make_loaders", lambda *arguments: pytest.fail("the data was loaded"))
    assert main.main(["--resume", "--output", str(tmp_path / "nope")]) == 2
    printed = capsys.readouterr().err
    assert "nope to resume; to begin one, name a --recipe" in printed and printed.count("\n") == 1
    assert not (tmp_path / "nope").exists()


def test_a_run_of_which_the_mirror_alone_is_left_resumes_without_other_flags(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(main, "prepare", lambda config: started.append(config) or [])
    monkeypatch.setattr(main, "execute", lambda config: None)
    flags = ["--resume", "--output", str(tmp_path / "new"), "--mirror", str(tmp_path / "drive")]
    assert main.main(flags) == 0 and len(started) == 1


@pytest.mark.parametrize("name", ["config.json", "environment.json"])
def test_a_pipe_in_the_place_of_a_file_of_a_run_is_not_waited_for(tmp_path, name):
    (tmp_path / "r").mkdir()
    os.mkfifo(tmp_path / "r" / name)
    flags = ["--lr", "0.01", "--epochs", "1", "--output", str(tmp_path / "r")]
    assert main.main([*SMALL, *flags]) == 0
    assert json.loads((tmp_path / "r" / name).read_text())


def test_all_that_differs_from_the_run_is_named_at_once_and_nothing_is_fetched(
    stopped, monkeypatch, capsys
):
    monkeypatch.setattr(run, "make_loaders", lambda *arguments: pytest.fail("the data was loaded"))
    before = (stopped / "config.json").read_bytes()
    flags = ["--recipe", "quick", "--seed", "3", "--dataset", "cifar10"]
    with pytest.raises(SystemExit) as caught:
        main.main([*flags, "--resume", "--output", str(stopped)])
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and printed.count("\n") == 1
    for words in ("width 4, not 16", "epochs 2, not 10", "seed 7, not 3", "dataset cifar10-sample"):
        assert words in printed
    assert before == (stopped / "config.json").read_bytes()


def test_flags_that_say_the_same_and_where_the_data_lies_may_be_given(stopped):
    assert (
        main.main([*SMALL, "--seed", "7", "--data", "elsewhere", "--resume", "--output", str(stopped)])
        == 0
    )


def test_a_machine_file_that_is_damaged_is_written_anew(stopped):
    (stopped / "environment.json").write_text("")
    assert main.main(["--resume", "--output", str(stopped)]) == 0
    assert "machine" in json.loads((stopped / "environment.json").read_text())


@pytest.mark.parametrize("text", ["[]", "null", "[" * 10**6, "{}x", '{"made_up": 1}'])
def test_a_damaged_configuration_is_named_and_refused(stopped, text, capsys):
    (stopped / "config.json").write_text(text)
    with pytest.raises(SystemExit):
        main.main(["--resume", "--output", str(stopped)])
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and ("config.json is not" in printed or "made_up" in printed)


def test_another_runs_weights_make_no_report(stopped, tmp_path, capsys):
    other = tmp_path / "other"
    main.main([*SMALL, "--lr", "0.02", "--epochs", "1", "--output", str(other)])
    shutil.copy(other / "weights.safetensors", stopped)
    assert main.main(["report", str(stopped)]) == 2
    assert "are another run's: they differ in epochs, lr, seed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["onecycle", "none"])
def test_a_run_whose_range_test_is_lost_resumes_without_another(tmp_path, monkeypatch, scheduler):
    suggestions = dict.fromkeys(lr_finder.RULES, 0.02) | {"start": 5e-4}
    finder = lr_finder.LRFinderResult([1e-4, 1e-3], [2.0, 1.0], suggestions)
    monkeypatch.setattr(run, "find_lr", lambda *_, **__: finder)
    monkeypatch.setattr(run, "report_run", lambda *_: None)
    flags = ["--epochs", "2", "--scheduler", scheduler, "--head-lr-scale", "0.5", "--output"]
    assert main.main([*SMALL, *flags, str(tmp_path / "a")]) == 0
    whole = History.load(tmp_path / "a")
    for count in (3, 1):  # checkpoints that are left: all, so that it is finished, or that of epoch 1
        shutil.copytree(tmp_path / "a", tmp_path / str(count))
        for path in sorted((tmp_path / str(count) / "checkpoints").glob("*.ckpt"))[count:]:
            path.unlink()
        (tmp_path / str(count) / "lr_finder.json").unlink()
        monkeypatch.setattr(run, "find_lr", lambda *_, **__: pytest.fail("a range test"))
        assert main.main(["--resume", "--output", str(tmp_path / str(count))]) == 0
        again = History.load(tmp_path / str(count))
        assert again.lrs == whole.lrs
        assert [row.test_loss for row in again.epochs] == [row.test_loss for row in whole.epochs]
    config = Config(**json.loads((tmp_path / "1" / "config.json").read_text()))
    figure = plot_lr_finder(run.range_test(config, *[None] * 4, tmp_path / "1"))
    assert "whose losses are lost" in figure.axes[0].get_title()


def start(*flags, cwd=ROOT):
    """A run in a process of its own, whose output can be read line by line."""
    return subprocess.Popen(
        [sys.executable, "-u", "main.py", *SMALL, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_the_range_test_ends_it_with_one_line_and_the_same_command_starts_again(
    tmp_path, number, code
):
    flags = ["--width", "16", "--epochs", "1", "--output", str(tmp_path / "r")]
    process = start(*flags)
    while not process.stdout.readline().startswith("range test"):
        pass
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert errors == f"main.py: stopped by {number.name}; --resume continues the run\n"
    again = start(*flags, "--lr", "0.01", "--max-train-batches", "1")
    printed, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert "test accuracy" in printed


def test_a_second_process_is_refused_until_the_report_is_written(tmp_path, monkeypatch):
    seen = []
    code = f"from files import lock_folder; lock_folder({str(tmp_path / 'r')!r})"

    def look(*arguments):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        seen.append(done.stderr)

    monkeypatch.setattr(run, "report_run", look)
    main.main([*SMALL, "--lr", "0.01", "--epochs", "1", "--output", str(tmp_path / "r")])
    assert f"is in use by process {os.getpid()}" in seen[0]
    assert lock_folder(tmp_path / "r")  # which is free again
    unlock_folder(tmp_path / "r")


def test_a_killed_worker_or_short_memory_is_one_line(monkeypatch, capsys):
    for text, cure in {
        "DataLoader worker (pid 7) is killed by signal: Killed. \nmore": "--resume continues the run",
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate": "smaller --batch",
        "no C++ compiler\nlong explanation": "python -X dev main.py shows where",
    }.items():

        def fail(argv, text=text):
            raise RuntimeError(text)

        monkeypatch.setitem(main.COMMANDS, "train", fail)
        assert main.main([]) == 1
        printed = capsys.readouterr().err
        assert cure in printed and printed.count("\n") == 1


HANGING = """
import sys, time, torch
from torch.utils.data import DataLoader, Dataset
sys.path.insert(0, {root!r})
import main
from checkpoint import Checkpoints

class Stuck(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        if index >= 32:
            print("stuck", flush=True)
            time.sleep(1000)
        return torch.rand(3, 16, 16), index % 4

if __name__ == "__main__":
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    quick = [(torch.rand(4, 3, 16, 16), torch.arange(4))]
    stuck = DataLoader(Stuck(), 8, num_workers={workers}, persistent_workers={workers} > 0)
    train, test = (quick, stuck) if {evaluation} else (stuck, quick)
    checkpoints = Checkpoints({folder!r})
    optimizer.register_step_post_hook(lambda *_: print("updated", flush=True))
    main.fit_model(model, "cpu", train, test, optimizer, epochs=1, checkpoints=checkpoints)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "evaluation"), [(0, False), (4, False), (4, True)])
def test_a_wait_for_a_batch_that_never_comes_ends_soon_after_a_signal(tmp_path, workers, evaluation):
    values = {"folder": str(tmp_path / "r"), "workers": workers, "evaluation": evaluation}
    code = HANGING.format(root=str(ROOT), **values)
    (tmp_path / "hang.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "hang.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    printed = ""  # where two processes write at once, two words may share a line
    # PyTorch alone would wait five seconds for each worker that is stuck.
    while printed.count("stuck") < max(1, workers) or "updated" not in printed:
        printed += process.stdout.readline()
        assert process.poll() is None, printed
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=19)
    assert "Stopped: stopped by SIGTERM" in errors
    assert len(list((tmp_path / "r" / "checkpoints").glob("*.ckpt"))) == 2  # the first, and one now


@pytest.mark.slow
@pytest.mark.parametrize("program", ["main.py", "app.py"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_a_program_loads_ends_it_with_one_line(program, number, code):
    process = subprocess.Popen(
        [sys.executable, "-v", program, "--help"], stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    while not process.stderr.readline().startswith("import 'torch"):  # which Python says by -v
        pass
    process.send_signal(number)
    said = [x for x in process.communicate(timeout=30)[1].splitlines() if x.startswith(program)]
    assert process.returncode == code
    assert said == [f"{program}: stopped by {number.name}"]


@pytest.mark.parametrize("command", ["test", "predict", "compare"])
def test_a_signal_ends_every_command_and_promises_no_run_where_there_is_none(
    command, monkeypatch, capsys
):
    monkeypatch.setitem(main.COMMANDS, command, lambda argv: os.kill(os.getpid(), signal.SIGTERM))
    assert main.main([command]) == 143
    assert capsys.readouterr().err == "main.py: stopped by SIGTERM\n"
