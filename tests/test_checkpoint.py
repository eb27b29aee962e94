import contextlib
import copy
import ctypes
import errno
import fcntl
import gc
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
import zipfile
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2

import checkpoint
import files
import main
import models
import sources
import utils
import weights_file
from checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from config import Config, check_same_settings, parse_config
from data import EpochSampler, Samples, make_loader, make_loaders
from files import Mirror, lock_folder, unlock_folder, write_whole
from sources import cifar10
from training import guards, loops, lr_finder, optim
from transforms import test_transform as evaluation_transform
from transforms import train_transform

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
EPOCHS, STEPS = 2, 3  # of the small run that is stopped and resumed


def loaders_of(sample, workers):
    """Training loader image by image, as workers of any number do it, and a test loader."""
    dataset = Samples(sample, train_transform(), 16, 0, shuffle=True)
    train = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=EpochSampler(STEPS),
        num_workers=workers,
        generator=torch.Generator(),
    )
    test = sample.take(np.arange(0, 200, 5))
    return train, make_loader(test, evaluation_transform(), "cpu", Config(batch_size=20))


def run(
    sample,
    folder=None,
    stop_at=None,
    workers=0,
    optimizer="adam",
    scheduled=True,
    validated=False,
    device=CPU,
    **options,
):
    """The small run, which a SIGTERM meets in its step `stop_at`; its outcome, or None if stopped.

    `options` are the network's width, and those of `Checkpoints` or of `fit_model`.
    """
    about = {
        name: options.pop(name) for name in ("card", "resume", "mirror", "seconds") if name in options
    }
    torch.manual_seed(0)
    model = models.make_model("custom_resnet", width=options.pop("width", 4), dropout=0.2)
    optimizer = main.make_optimizer(optimizer, model, lr=0.01)
    scheduler = None
    if scheduled:
        scheduler = optim.one_cycle(optimizer, 0.01, epochs=EPOCHS, steps_per_epoch=STEPS)
    train_loader, test_loader = loaders_of(sample, workers)
    count = itertools.count(1)

    def hook(module, inputs, output):
        if model.training and next(count) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    model.linear.register_forward_hook(hook)
    stopped = pytest.raises(guards.Stopped) if stop_at else contextlib.nullcontext()
    with stopped:
        history = main.fit_model(
            model,
            device,
            train_loader,
            test_loader,
            optimizer,
            scheduler,
            EPOCHS,
            val_loader=test_loader if validated else None,
            checkpoints=Checkpoints(folder, **about),
            **({"precision": "fp32"} | options),
        )
        return outcome(model, optimizer, history)


def few(batch):
    """The first images of a batch: CPUs take a hundred times as long in fp16 as in fp32."""
    return [x[:4] for x in batch]


def outcome(model, optimizer, history):
    """All that must be equal, bit for bit: what the clock says is left out."""
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    rows = [{k: v for k, v in vars(row).items() if "second" not in k} for row in history.epochs]
    return hashlib.sha256(buffer.getvalue()).hexdigest(), rows, history.lrs


CARD = {  # of the small run's network
    "model": "custom_resnet",
    "options": {"width": 4, "dropout": 0.2},
    "classes": list(cifar10.CLASSES),
    "image_size": 32,
    "mean": [0.5] * 3,
    "std": [0.2] * 3,
    "config": {},
    "data_sha256": "",
}


@pytest.fixture(scope="module")
def uninterrupted(sample):
    return run(sample)


# Stop and resume


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", range(1, EPOCHS * STEPS + 1))
def test_stopped_at_any_step_and_resumed_with_other_workers_ends_with_the_same_bits(
    sample, uninterrupted, tmp_path, stop_at
):
    workers = stop_at % 3
    assert run(sample, tmp_path, stop_at, workers) is None
    state = load_checkpoint(tmp_path / "checkpoints")
    assert len(state["history"]["lrs"]) + state["epoch_state"]["steps"] == stop_at
    assert run(sample, tmp_path, workers=(workers + 1) % 3, resume=True) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd"},
        {"optimizer": "muon"},
        {"optimizer": "muon", "precision": "fp16", "width": 1},  # fp16 is slow on CPUs
        {"scheduled": False},
        {"validated": True},
        {"precision": "bf16"},
        {"precision": "fp16", "width": 1},
    ],
    ids=str,
)
def test_any_kind_of_run_resumed_ends_with_the_same_bits(sample, tmp_path, options):
    expected = run(sample, **options)
    assert run(sample, tmp_path, stop_at=2, **options) is None
    state = load_checkpoint(tmp_path / "checkpoints")
    assert state["epoch_state"]["steps"] == 2 and ("scaler" in state["parts"])
    assert run(sample, tmp_path, resume=True, **options) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", utils.PRECISIONS)
def test_on_a_gpu_a_deterministic_run_resumed_ends_with_the_same_bits(
    sample, tmp_path, monkeypatch, precision
):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    options = {"device": torch.device("cuda"), "precision": precision}
    expected = run(sample, **options)
    assert run(sample, tmp_path, stop_at=4, **options) is None
    assert run(sample, tmp_path, resume=True, **options) == expected


def test_a_run_from_before_a_field_existed_is_resumed_with_its_default():
    card = {"config": Config().identity, "data_sha256": ""}
    before = {name: value for name, value in card["config"].items() if name != "deterministic"}
    checkpoint.check_same_run({"config": before, "data_sha256": ""}, card)
    card["config"] = Config(deterministic=True).identity
    with pytest.raises(ValueError, match="has deterministic False, not True"):
        checkpoint.check_same_run({"config": before, "data_sha256": ""}, card)


def test_the_comparison_sees_a_lost_momentum(sample, uninterrupted, tmp_path, monkeypatch):
    run(sample, tmp_path, stop_at=2)
    restore = checkpoint.Checkpoints.restore

    def without_momentum(self, state, device):
        state["parts"]["optimizer"]["state"] = {}
        return restore(self, state, device)

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", without_momentum)
    assert run(sample, tmp_path, resume=True) != uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [2, 3, 6])
def test_a_stopped_run_goes_on_with_the_average_that_it_had(sample, tmp_path, stop_at):
    whole = run(sample, tmp_path / "whole", ema_decay=0.9)
    run(sample, tmp_path / "run", stop_at, ema_decay=0.9)
    assert run(sample, tmp_path / "run", resume=True, ema_decay=0.9) == whole
    with pytest.raises(ValueError, match="the training has ema decay 0.9, not 0.5"):
        run(sample, tmp_path / "run", resume=True, ema_decay=0.5)


def test_a_refused_start_leaves_the_folder_to_others(sample, tmp_path):
    run(sample, tmp_path, stop_at=2)
    for options in ({}, {"resume": True, "ema_decay": 0.5}):
        with pytest.raises(ValueError, match=r"holds a run|the training has ema decay"):
            run(sample, tmp_path, **options)
        assert files.LOCKS == {}


def test_looking_at_checkpoints_and_the_clock_changes_nothing(sample, uninterrupted, tmp_path):
    assert run(sample, tmp_path, seconds=0) == uninterrupted


def test_resuming_a_finished_run_trains_no_more(sample, uninterrupted, tmp_path):
    run(sample, tmp_path)
    assert run(sample, tmp_path, resume=True) == uninterrupted


def test_a_finished_run_comes_back_whole_from_its_mirror(sample, uninterrupted, tmp_path):
    card = CARD
    run(sample, tmp_path / "run", mirror=tmp_path / "drive", card=card)
    again = {"resume": True, "mirror": tmp_path / "drive", "card": card}
    assert run(sample, tmp_path / "other", **again) == uninterrupted
    names = {path.name for path in (tmp_path / "other").iterdir()}
    assert names >= {"history.json", "history.csv", "weights.safetensors", "checkpoints"}


def test_a_run_that_failed_begins_again_from_its_first_weights(
    sample, uninterrupted, tmp_path, monkeypatch
):
    step = loops.train_step

    def fail(*arguments):
        raise FloatingPointError

    monkeypatch.setattr(loops, "train_step", fail)
    with pytest.raises(FloatingPointError):
        run(sample, tmp_path)
    monkeypatch.setattr(loops, "train_step", step)
    assert load_checkpoint(tmp_path / "checkpoints")["epoch_state"]["steps"] == 0
    assert run(sample, tmp_path, resume=True) == uninterrupted


@pytest.mark.parametrize("change", [{"epochs": 3}, {"seed": 1}, {"precision": "bf16"}])
def test_another_training_is_not_resumed_even_without_a_card(change, sample, tmp_path, monkeypatch):
    run(sample, tmp_path, stop_at=2)
    name = next(iter(change))
    if name == "epochs":
        monkeypatch.setattr(sys.modules[__name__], "EPOCHS", 3)
    options = {} if name == "epochs" else change
    with pytest.raises(ValueError, match=f"the training has {name} .*, not "):
        run(sample, tmp_path, resume=True, **options)


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    save_two(tmp_path)

    def unplugged(path):
        raise OSError(107, "Transport endpoint is not connected")

    monkeypatch.setattr(Path, "read_bytes", unplugged)
    with pytest.raises(OSError, match="Transport endpoint"):
        load_checkpoint(tmp_path)
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


def test_an_older_run_goes_on_beside_newer_files_without_losing_its_own(tmp_path):
    save_two(tmp_path)
    save_checkpoint(tmp_path, {"step": 0}, 0)
    assert {path.name[5:13] for path in tmp_path.iterdir()} == {"00000000", "00000001", "00000002"}


def test_a_mirror_on_a_drive_that_is_not_mounted_is_not_made_on_this_one(tmp_path, capsys):
    mirror = Mirror(tmp_path / "drive" / "run")
    save_checkpoint(tmp_path / "run", {"step": 1}, 1, mirror)
    mirror.close()
    assert "warning: no copy of step-00000001.ckpt" in capsys.readouterr().out
    assert not (tmp_path / "drive").exists()


def test_a_mirror_that_hangs_holds_nobody_up(tmp_path, monkeypatch, capsys):
    write, back = files.write_whole, threading.Event()

    def hang(path, content):
        if Path(path).parent == tmp_path / "drive":
            assert back.wait(20)
        write(path, content)

    monkeypatch.setattr(files, "write_whole", hang)
    mirror = Mirror(tmp_path / "drive", patience=0.1)
    for step in (1, 2):
        save_checkpoint(tmp_path / "run", {"step": step}, step, mirror)
    mirror.close()
    assert not (tmp_path / "drive").exists() or not any((tmp_path / "drive").iterdir())
    assert "was not ready in 0.1 s" in capsys.readouterr().out
    back.set()
    mirror.patience = 60
    mirror.close()
    assert (tmp_path / "drive" / "step-00000002.ckpt").exists()


def test_a_mirror_in_the_place_of_the_checkpoints_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is where the checkpoints are: name another folder"):
        Checkpoints("r", mirror=tmp_path / "r" / "checkpoints")
    Checkpoints("r", mirror=tmp_path / "r")


@pytest.mark.parametrize("seconds", [-1, math.nan, "60", None])
def test_a_time_between_checkpoints_that_is_none_is_refused(seconds):
    with pytest.raises(ValueError, match="seconds must be a number of at least 0, not"):
        Checkpoints("r", seconds=seconds)


@pytest.fixture
def hanging(tmp_path, monkeypatch):
    """A drive that answers nothing for seconds, whatever it is asked, and a limit far under that."""
    drive = tmp_path / "drive"
    drive.mkdir()

    def after_a_while(method):
        def asked(path, *arguments):
            if drive in (path, path.parent):
                time.sleep(20)
            return method(path, *arguments)

        return asked

    for name in ("glob", "exists", "is_dir", "is_file", "read_bytes"):
        monkeypatch.setattr(Path, name, after_a_while(getattr(Path, name)))
    monkeypatch.setattr(checkpoint, "LISTED", 0.2)
    monkeypatch.setattr(checkpoint, "READ", 0.2)
    return drive


def test_a_drive_that_hangs_is_passed_over_for_a_checkpoint_on_another(tmp_path, hanging, capsys):
    save_checkpoint(tmp_path / "run", {"step": 1}, 1)
    before = time.monotonic()
    assert load_checkpoint(tmp_path / "run", hanging) == {"step": 1}
    assert time.monotonic() - before < 2
    assert f"{hanging} cannot be read now (no answer within 0.2 s)" in capsys.readouterr().out


def test_a_drive_that_hangs_and_may_hold_the_run_is_not_taken_for_an_empty_one(
    sample, tmp_path, hanging
):
    before = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer"):
        run(sample, tmp_path / "run", mirror=hanging, resume=True)
    with pytest.raises(TimeoutError, match="no answer"):
        run(sample, tmp_path / "other", mirror=hanging)
    assert time.monotonic() - before < 15


def test_a_checkpoint_whose_drive_hangs_is_passed_over_for_the_one_before(tmp_path, monkeypatch):
    for step, folder in enumerate(("run", "drive")):
        save_checkpoint(tmp_path / folder, {"step": step}, step)
    read = checkpoint.read_checkpoint

    def hang(path):
        time.sleep(3 * (path.parent.name == "drive"))
        return read(path)

    monkeypatch.setattr(checkpoint, "read_checkpoint", hang)
    monkeypatch.setattr(checkpoint, "READ", 0.2)
    assert load_checkpoint(tmp_path / "run", tmp_path / "drive") == {"step": 0}


def test_a_signal_ends_the_wait_for_a_drive_that_hangs(tmp_path):
    alarm = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    before = time.monotonic()
    with pytest.raises(guards.Stopped), guards.signals_noted():
        alarm.start()
        files.answered(3, lambda path: time.sleep(3), tmp_path)
    assert time.monotonic() - before < 2


def test_what_an_error_holds_is_freed_with_it(tmp_path):
    class GoneError(OSError):
        pass

    def fail(path):
        raise GoneError("gone")

    gc.disable()
    try:
        try:
            files.answered(3, fail, tmp_path)
        except GoneError as error:
            held = weakref.ref(error)
        assert held() is None
    finally:
        gc.enable()


def test_a_slow_mirror_has_the_newest_checkpoint_at_last(tmp_path, monkeypatch):
    write = files.write_whole

    def slow(path, content):
        if Path(path).parent == tmp_path / "drive":
            time.sleep(0.3)
        write(path, content)

    monkeypatch.setattr(files, "write_whole", slow)
    mirror = Mirror(tmp_path / "drive")
    for step in range(1, 6):
        save_checkpoint(tmp_path / "run", {"step": step}, step, mirror)
    mirror.close()
    assert load_checkpoint(tmp_path / "drive") == {"step": 5}


def test_a_folder_that_takes_the_mirrors_name_later_gets_no_copies(tmp_path, capsys):
    mirror = Mirror(tmp_path / "drive")
    save_checkpoint(tmp_path / "run", {"step": 1}, 1, mirror)
    mirror.close()
    (tmp_path / "drive").rename(tmp_path / "unmounted")
    (tmp_path / "drive").mkdir()
    save_checkpoint(tmp_path / "run", {"step": 2}, 2, mirror)
    mirror.close()
    assert not any((tmp_path / "drive").iterdir())
    assert "no longer the folder that it was" in capsys.readouterr().out


def test_numbers_of_numpy_in_a_run_are_kept_as_plain_ones_and_resumed(sample, tmp_path, capsys):
    def fit(resume):
        torch.manual_seed(0)
        model = models.make_model("custom_resnet", width=4)
        optimizer = torch.optim.SGD(model.parameters(), lr=np.logspace(-3, -1, 5)[2], momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=np.float32(0.99))
        checkpoints = Checkpoints(tmp_path, resume=resume)
        numbers = {"epochs": np.int64(2), "seed": np.uint8(3), "label_smoothing": np.float32(0.1)}
        loaders = loaders_of(sample, 0)
        return main.fit_model(
            model, CPU, *loaders, optimizer, scheduler, checkpoints=checkpoints, **numbers
        )

    first = fit(False)
    assert all(type(lr) is float for lr in first.lrs)
    assert fit(True).lrs == first.lrs
    printed = capsys.readouterr().out
    assert "damaged" not in printed and "finished" in printed


@pytest.mark.parametrize("odd", [Path("x"), slice(1), lambda: 0, np.array([Path("x")])])
def test_state_that_no_checkpoint_can_hold_is_refused_by_its_place(tmp_path, odd):
    with pytest.raises(ValueError, match=r"the state.parts.scheduler\[1\] is a \w+, which no"):
        save_checkpoint(tmp_path, {"parts": {"scheduler": [1, odd]}}, 1)
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_run_without_its_checkpoints_is_not_begun_anew(sample, tmp_path):
    run(sample, tmp_path, card=CARD)
    history = (tmp_path / "history.json").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    for resume in (True, False):
        with pytest.raises(ValueError, match="and none of its checkpoints"):
            run(sample, tmp_path, resume=resume)
    assert (tmp_path / "history.json").read_bytes() == history


def make_unreadable(path, how):
    """Something under a checkpoint's name that cannot be read as a file."""
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")


@pytest.mark.parametrize("how", ["folder", "pipe", "link to nothing"])
def test_a_checkpoint_that_cannot_be_read_is_passed_over_for_the_one_before(
    sample, uninterrupted, tmp_path, how, capsys
):
    run(sample, tmp_path, stop_at=5, seconds=0)
    newest = max((tmp_path / "checkpoints").glob("*.ckpt"))
    make_unreadable(newest, how)
    assert load_checkpoint(tmp_path / "checkpoints") is not None
    assert "cannot be read now" in capsys.readouterr().out and newest.name in os.listdir(newest.parent)


def test_a_moment_that_is_missing_from_a_checkpoint_is_refused(sample, tmp_path):
    run(sample, tmp_path, stop_at=2)
    state = load_checkpoint(tmp_path / "checkpoints")
    del state["parts"]["optimizer"]["state"][0]["exp_avg"]
    save_checkpoint(tmp_path / "checkpoints", state, 3)
    with pytest.raises(ValueError, match="lacks a moment"):
        run(sample, tmp_path, resume=True)


def test_tied_complex_and_compiled_weights_come_back(sample, tmp_path):
    model = models.make_model("custom_resnet", width=4, dropout=0.2)
    model.layer1 = torch.compile(model.layer1)
    weights_file.save_weights(tmp_path / "w.safetensors", torch.nn.DataParallel(model), CARD)
    again, _ = weights_file.load_weights(tmp_path / "w.safetensors")
    assert torch.equal(again.linear.weight, model.linear.weight) and not again.training


def test_weights_are_not_written_with_another_networks_card(tmp_path):
    model = models.make_model("custom_resnet", width=8)
    with pytest.raises(ValueError, match=r"the card says custom_resnet \(width 4, .* does not fit at"):
        weights_file.save_weights(tmp_path / "w.safetensors", model, CARD)
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = models.make_model("custom_resnet", width=4, dropout=0.2)
    model.prep[1].running_mean[0] = math.nan
    weights_file.save_weights(tmp_path / "w.safetensors", model, CARD)
    with pytest.raises(ValueError, match="not all of its numbers are finite"):
        weights_file.load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("change", [{"mean": [0.4] * 3}, {"classes": list("abcdefghij")}])
def test_a_changed_card_is_noticed_as_changed_weights_are(tmp_path, change):
    model = models.make_model("custom_resnet", width=4, dropout=0.2)
    content = weights_file.weights_content(model, CARD)
    old, new = (json.dumps(json.dumps(x))[1:-1].encode() for x in (CARD, CARD | change))
    name = next(iter(change)).encode()
    old, new = (x.split(name)[1].split(b"]")[0] for x in (old, new))
    size = int.from_bytes(content[:8], "little") + len(new) - len(old)
    changed = size.to_bytes(8, "little") + content[8:].replace(old, new, 1)
    assert changed != content
    (tmp_path / "w.safetensors").write_bytes(changed)
    with pytest.raises(ValueError, match="it is damaged"):
        weights_file.load_weights(tmp_path / "w.safetensors")


def test_a_flipped_bit_in_a_weights_file_is_noticed(tmp_path):
    path = tmp_path / "w.safetensors"
    weights_file.save_weights(path, models.make_model("custom_resnet", width=4, dropout=0.2), CARD)
    assert weights_file.load_weights(path)[1] == CARD
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="it is damaged"):
        weights_file.load_weights(path)


def test_resuming_what_never_began_begins_and_says_so(sample, uninterrupted, tmp_path, capsys):
    assert run(sample, tmp_path / "new", resume=True) == uninterrupted
    printed = f"nothing to resume in {tmp_path / 'new/checkpoints'}: the run begins\n"
    assert capsys.readouterr().out.startswith(printed)


@pytest.mark.parametrize(
    ("name", "value"),
    [("device", "cuda"), ("versions", "torch 2.10.0"), ("machine", "x86_64, 9 threads")],
)
def test_a_resume_on_another_machine_is_warned_about_once(sample, tmp_path, capsys, name, value):
    run(sample, tmp_path, stop_at=2)
    state = load_checkpoint(tmp_path / "checkpoints")
    now = state["machine"][name]
    state["machine"][name] = value
    save_checkpoint(tmp_path / "checkpoints", state, 2)
    capsys.readouterr()
    run(sample, tmp_path, resume=True)
    printed = capsys.readouterr().out
    assert f"warning: the checkpoint was written with {value}, now {now}: the result" in printed
    assert printed.count("the checkpoint was written with") == 1


def test_a_resume_on_the_same_machine_warns_of_nothing(sample, tmp_path, capsys):
    run(sample, tmp_path, stop_at=2)
    run(sample, tmp_path, resume=True)
    assert "the checkpoint was written" not in capsys.readouterr().out


def test_a_folder_that_holds_a_run_is_not_overwritten(sample, tmp_path):
    run(sample, tmp_path)
    with pytest.raises(ValueError, match="holds a run; resume it, or choose another folder"):
        run(sample, tmp_path)


def test_events_after_a_resume_are_neither_lost_nor_doubled(sample, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(sample, tmp_path, stop_at=5)
    run(sample, tmp_path, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("lr")] == list(range(EPOCHS * STEPS))
    assert [e.step for e in events.Scalars("loss/test")] == [1, 2]


def test_at_least_two_checkpoints_are_kept_and_no_more(sample, tmp_path):
    run(sample, tmp_path, seconds=0)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005.ckpt", "step-00000006.ckpt"]


# A second folder


def test_a_run_resumes_from_its_mirror_when_its_folder_is_gone(sample, uninterrupted, tmp_path):
    run(sample, tmp_path / "run", stop_at=4, mirror=tmp_path / "drive")
    assert run(sample, tmp_path / "other", resume=True, mirror=tmp_path / "drive") == uninterrupted


def test_a_mirror_that_holds_another_run_is_not_mixed_with_it(sample, tmp_path):
    run(sample, tmp_path / "run", mirror=tmp_path / "drive")
    with pytest.raises(ValueError, match="drive holds a run; resume it, or choose another folder"):
        run(sample, tmp_path / "other", mirror=tmp_path / "drive")


def test_a_mirror_that_cannot_be_written_is_a_warning(sample, uninterrupted, tmp_path, capsys):
    (tmp_path / "drive").write_text("a file where the folder should be")
    assert run(sample, tmp_path / "run", mirror=tmp_path / "drive") == uninterrupted
    assert "warning: no copy of step-00000003.ckpt in" in capsys.readouterr().out


# Damage


def save_two(folder):
    """Two checkpoints, of 1 and 2."""
    for step in (1, 2):
        state = {"step": step, "weights": torch.arange(20_000.0) + step}
        save_checkpoint(folder, state, step)
    return folder / "step-00000002.ckpt"


def test_a_whole_checkpoint_is_loaded_and_opens_with_torch_alone(tmp_path):
    path = save_two(tmp_path)
    assert load_checkpoint(tmp_path)["step"] == 2
    assert torch.load(path, weights_only=True)["step"] == 2


def damages(content):
    """Kinds of damage, by name."""
    rng = np.random.default_rng(0)
    for k in range(60):  # half of them in the file's directory, which a checksum of data would miss
        edge = rng.choice([rng.integers(1500), len(content) - 1 - rng.integers(1500)])
        where = int(edge if k % 2 else rng.integers(len(content)))
        flipped = bytearray(content)
        flipped[where] ^= 1 << int(rng.integers(8))
        yield f"bit {where}", bytes(flipped)
    for length in rng.integers(len(content), size=20):
        yield f"cut at {length}", content[:length]
    page = int(rng.integers(4096, len(content) - 8192))
    yield "zeroed page", content[:page] + bytes(4096) + content[page + 4096 :]
    yield from (("empty", b""), ("html", b"<html></html>"), ("longer", content + b"more"))


def test_no_damage_is_loaded_silently_and_the_one_before_is(tmp_path, capsys):
    path = save_two(tmp_path)
    content = path.read_bytes()
    tried = 0
    for name, damaged in damages(content):
        assert damaged != content, name
        path.write_bytes(damaged)
        assert load_checkpoint(tmp_path)["step"] == 1, name
        printed = capsys.readouterr().out
        assert f"checkpoint {path} is damaged" in printed
        assert printed.endswith("; it is kept as step-00000002.damaged\n")
        assert path.with_suffix(".damaged").exists()
        tried += 1
    assert tried == 84
    path.write_bytes(content)
    assert load_checkpoint(tmp_path)["step"] == 2


def test_with_no_whole_checkpoint_there_is_none(tmp_path):
    save_two(tmp_path)
    for path in tmp_path.glob("*.ckpt"):
        path.write_bytes(b"")
    assert load_checkpoint(tmp_path, None, tmp_path / "absent") is None


@contextlib.contextmanager
def disk_full():
    """No file can grow beyond 100 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = save_two(tmp_path)
    with disk_full(), pytest.raises(OSError, match="File too large"):
        save_checkpoint(tmp_path, {"weights": torch.zeros(1000)}, 2)
    assert load_checkpoint(tmp_path)["step"] == 2
    assert sorted(tmp_path.iterdir()) == [tmp_path / "step-00000001.ckpt", path]


def test_a_full_disk_does_not_stop_training_but_is_told_at_once_and_at_the_end(
    sample, tmp_path, capsys, monkeypatch
):
    with disk_full(), pytest.raises(OSError, match="File too large"):
        run(sample, tmp_path)
    printed = capsys.readouterr().out
    assert "warning: not written:" in printed and len(re.findall(r"^ +[12]/2 ", printed, re.M)) == EPOCHS


CAP_DAC_OVERRIDE = 1 << 1  # by which Linux's root writes where the owner of a folder may not


@contextlib.contextmanager
def without_override():
    """Root is held to a folder's permissions as its owner is; another user always is.

    Becoming another user would do, too, but that one may be unable to read the environment, from which
    modules are still to be imported.
    """
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call, this thread
    old = (
        ctypes.c_uint32 * 6
    )()  # effective, permitted, inheritable: capabilities 0 to 31, then 32 to 63
    assert libc.capget(header, old) == 0, os.strerror(ctypes.get_errno())
    new = (ctypes.c_uint32 * 6)(old[0] & ~CAP_DAC_OVERRIDE, *old[1:])
    assert libc.capset(header, new) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, old) == 0, os.strerror(ctypes.get_errno())


@contextlib.contextmanager
def read_only(folder):
    """Nothing can be written below a folder, not even by root."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        with without_override():
            yield
    finally:
        for path in folders:
            path.chmod(0o755)


def test_a_read_only_folder_leaves_the_old_checkpoint_and_says_so_in_one_line(
    sample, uninterrupted, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run(sample, "r", stop_at=4)
    before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    capsys.readouterr()
    with read_only(Path("r")), pytest.raises(OSError, match="Permission denied: .r/history.json"):
        run(sample, "r", resume=True)
    printed = re.findall(r"^warning: not written: .*", capsys.readouterr().out, re.M)
    assert printed == [
        "warning: not written: r/history.json: Permission denied; what was there before is kept"
    ]
    assert before == {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    assert run(sample, "r", resume=True) == uninterrupted


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


# Hostile files


class Evil:
    """Runs a command when unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def with_digest(body):
    return body + hashlib.sha256(body).digest()


def evil_files(proof):
    """Checkpoints that would create `proof`, each with a right digest."""
    for state in (Evil(proof), {"model": [Evil(proof)]}, {"parts": {"a": {"b": Evil(proof)}}}):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        yield buffer.getvalue()
        old = io.BytesIO()
        torch.save(state, old, _use_new_zipfile_serialization=False)
        yield old.getvalue()
        yield pickle.dumps(state)


@pytest.mark.parametrize("forced", [None, "1"])
def test_no_file_can_run_code(tmp_path, monkeypatch, forced, capsys):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    proof = tmp_path / "executed"
    pickle.loads(pickle.dumps(Evil(proof)))
    assert proof.exists()  # it works where nothing guards
    proof.unlink()
    for k, body in enumerate(evil_files(proof)):
        path = tmp_path / f"step-{k:08d}.ckpt"
        path.write_bytes(with_digest(body))
        with pytest.raises(ValueError, match="is whole, but holds what is never read"):
            load_checkpoint(tmp_path)
        (tmp_path / "w.safetensors").write_bytes(body)
        for command in (["test"], ["predict", "x.png"], ["report"]):
            argv = [command[0], str(tmp_path / "w.safetensors"), *command[1:]]
            assert main.main(argv) == 2
    assert not proof.exists()


def test_a_checkpoint_that_claims_huge_tensors_is_refused_before_they_are_made(sample, tmp_path):
    run(sample, tmp_path, stop_at=2)
    state = load_checkpoint(tmp_path / "checkpoints")
    name = next(iter(state["parts"]["model"]))
    state["parts"]["model"][name] = torch.zeros(1).expand(10**9, 40)
    save_checkpoint(tmp_path / "checkpoints", state, 9)
    with pytest.raises(ValueError, match=f"does not fit the model at {name}"):
        run(sample, tmp_path, resume=True)


def test_optimizer_state_of_another_shape_is_refused(sample, tmp_path):
    run(sample, tmp_path, stop_at=2)
    state = load_checkpoint(tmp_path / "checkpoints")
    state["parts"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3, 3)
    save_checkpoint(tmp_path / "checkpoints", state, 9)
    with pytest.raises(ValueError, match="checkpoint's exp_avg does not fit parameter 0"):
        run(sample, tmp_path, resume=True)


def test_weights_that_name_a_huge_network_take_no_memory_for_it(tmp_path):
    from safetensors.torch import save_file

    card = {"model": "custom_resnet", "options": {"width": 10**5}, "classes": ["a"], "image_size": 32}
    tensors = {"x": torch.zeros(1)}
    card |= {"mean": [0.5] * 3, "std": [0.2] * 3, "config": {}}
    card |= {"sha256": weights_file.digest(tensors, card)}
    metadata = {"card": json.dumps(card)}
    save_file(tensors, tmp_path / "w.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="no weights file of this package .*[Uu]nexpected key"):
        weights_file.load_weights(tmp_path / "w.safetensors")


# The command line


SMOKE = (
    "--dataset cifar10-sample --width 4 --batch-size 64 --epochs 2 --max-train-batches 16 "
    "--max-test-batches 2 --lr 0.01 --precision fp32 --checkpoint-seconds 0"
).split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ("epochs", "3"),
        ("batch_size", "128"),
        ("model", "resnet18"),
        ("seed", "1"),
        ("lr", "0.02"),
        ("dataset", "cifar10"),
        ("max_train_batches", "5"),
        ("width", "8"),
    ],
)
def test_a_changed_configuration_is_not_resumed(change, finished, capsys, monkeypatch):
    name, value = change
    monkeypatch.setattr("sources.load_cifar10", lambda part, root: sources.load_sample(part))
    flags = ["--output", str(finished), "--resume", f"--{name.replace('_', '-')}", value]
    flags += ["--width", "8"] * (name == "model")  # the least of a ResNet
    with pytest.raises(SystemExit) as stop:
        main.main([*SMOKE, *flags])
    printed = capsys.readouterr().err
    old = getattr(parse_config(SMOKE), name)
    assert stop.value.code == 2 and printed.count("\n") == 1
    assert f"the run has {name} {old}, not {value}" in printed and "another --output" in printed


def test_a_run_of_another_version_is_refused_in_one_line_that_names_its_settings():
    now = {"config": Config().identity, "data_sha256": ""}
    before = {"config": {**Config().identity, "average": 0.99, "head_rate": 0.5}, "data_sha256": ""}
    with pytest.raises(
        ValueError, match="another version .* the settings average, head_rate: "
    ) as refused:
        checkpoint.check_same_run(before, now)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "advice"),
    [
        (None, 0.1, "without --lr,"),
        (True, False, "with --lr,"),
        (False, True, "with --no-lr,"),
        (0.2, None, "with --lr 0.2,"),
    ],
)
def test_a_refusal_names_flags_that_exist(old, new, advice):
    with pytest.raises(ValueError, match=f"the run has lr {old}, not {new}: continue it {advice}"):
        check_same_settings({"lr": old}, {"lr": new})


@pytest.mark.slow
def test_changed_training_images_are_not_resumed(finished, capsys, monkeypatch):
    monkeypatch.setattr("sources.split.Split.digest", lambda split: "other")
    assert main.main([*SMOKE, "--output", str(finished), "--resume"]) == 2
    assert "the training images in datasets are not those of the run" in capsys.readouterr().err


def test_changed_test_images_are_not_resumed():
    card = {"config": Config().identity, "data_sha256": "", "test_sha256": ""}
    with pytest.raises(ValueError, match="the test images in datasets are not those of the run"):
        checkpoint.check_same_run(card | {"test_sha256": "other"}, card)


@pytest.mark.parametrize("workers", [0, 1])
def test_another_augmentation_is_not_resumed(tmp_path, workers):
    config = Config(dataset="cifar10-sample", workers=workers)
    cards = [
        main.make_card(config, make_loaders(config, "cpu", transform))
        for transform in (None, train_transform(cutout=8), train_transform(cutout=10))
    ]
    checkpoint.check_same_run(cards[0], cards[1])
    with pytest.raises(ValueError, match="the augmentation is not the one that the run began with"):
        checkpoint.check_same_run(cards[0], cards[2])


def unchanged(image, **options):
    return image


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (A.Lambda(image=unchanged), "image=<function unchanged>, "),
        (A.OneOf([A.Lambda(image=unchanged), A.HorizontalFlip()]), "OneOf, Normalize"),
    ],
)
def test_an_augmentation_is_described_alike_in_every_process(sample, first, words):
    samples = Samples(sample, A.Compose([first, A.Normalize(), ToTensorV2()]), 8, 0, shuffle=True)
    before = samples.describe()
    samples.image(1, 0, 0)  # its draws leave no trace
    assert samples.describe() == before and words in before and "0x" not in before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run from the command line."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main.main([*SMOKE, "--output", str(folder)]) == 0
    return folder


def start(folder, *flags):
    """The command line in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "main.py", *SMOKE, "--output", str(folder), *flags],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=60):
    """Look often, so that what follows lands soon after."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def newest(folder):
    """Step of the newest checkpoint, or 0."""
    return max((int(path.stem[5:]) for path in (folder / "checkpoints").glob("step-*.ckpt")), default=0)


def weights_digest(folder):
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


def files_equal(one, other, name):
    return (one / "figures" / name).read_bytes() == (other / "figures" / name).read_bytes()


@pytest.mark.slow
def test_a_run_killed_in_mid_epoch_and_resumed_ends_with_the_same_files(finished, tmp_path, capsys):
    process = start(tmp_path / "r")
    wait_for(lambda: newest(tmp_path / "r") >= 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    state = load_checkpoint(tmp_path / "r/checkpoints")
    assert process.returncode == -signal.SIGKILL and 0 < state["epoch_state"]["steps"] < 16
    assert main.main([*SMOKE, "--output", str(tmp_path / "r"), "--resume"]) == 0
    assert "resumed in epoch" in capsys.readouterr().out
    one, two = (utils.History.load(folder) for folder in (finished, tmp_path / "r"))
    assert one.lrs == two.lrs and [r.test_loss for r in one.epochs] == [r.test_loss for r in two.epochs]
    drawn = sorted(path.name for path in (finished / "figures").iterdir())
    assert [name for name in drawn if not files_equal(finished, tmp_path / "r", name)] == []
    assert weights_digest(finished) == weights_digest(tmp_path / "r")


def test_a_range_test_is_run_once_and_again_only_for_another_run(tmp_path, monkeypatch):
    calls = []
    suggestions = dict.fromkeys(lr_finder.RULES, 0.02) | {"start": 5e-4}
    found = lr_finder.LRFinderResult([1e-4, 1e-3], [2.0, 1.0], suggestions)
    monkeypatch.setattr("run.find_lr", lambda *args, **options: calls.append(1) or found)
    monkeypatch.setattr("run.fit_model", lambda *args, **options: None)
    monkeypatch.setattr("run.report_run", lambda *args: None)
    flags = [flag for flag in SMOKE if flag not in ("--lr", "0.01")]
    for extra, expected in ([], 1), (["--resume"], 1), (["--resume", "--seed", "1"], 2):
        assert main.main([*flags, "--output", str(tmp_path / "r"), *extra]) == 0
        assert len(calls) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_with_128_and_its_number(number, tmp_path, monkeypatch, capsys):
    step, count = loops.train_step, itertools.count(1)

    def interrupted(*arguments, **options):
        if next(count) == 18:  # of 16 in an epoch
            os.kill(os.getpid(), number)
        return step(*arguments, **options)

    monkeypatch.setattr(loops, "train_step", interrupted)
    assert main.main([*SMOKE, "--output", str(tmp_path / "r")]) == 128 + number
    expected = f"main.py: stopped by {number.name}; --resume continues the run\n"
    assert capsys.readouterr().err == expected
    epoch_state = load_checkpoint(tmp_path / "r/checkpoints")["epoch_state"]
    assert (epoch_state["epoch"], epoch_state["steps"]) == (2, 2)


@pytest.mark.slow
def test_a_folder_that_another_process_uses_is_refused_until_that_one_is_killed(
    sample, tmp_path, capsys
):
    process = start(tmp_path / "r", "--workers", "2")
    wait_for(lambda: newest(tmp_path / "r") >= 2)
    assert main.main([*SMOKE, "--workers", "2", "--output", str(tmp_path / "r"), "--resume"]) == 2
    expected = f"main.py: {tmp_path / 'r'} is in use by process {process.pid}\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(ValueError, match="is in use by process"):
        run(sample, tmp_path / "r", resume=True)
    workers = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)  # and not its workers, which have what it had open
    process.wait()
    assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    lock_folder(tmp_path / "r")
    unlock_folder(tmp_path / "r")
    process.communicate()


def test_what_a_killed_process_left_half_written_is_removed(sample, tmp_path):
    run(sample, tmp_path)
    left = [tmp_path / ".weights.safetensors.12.tmp", tmp_path / "checkpoints/.step-00000007.ckpt.1.tmp"]
    for path in left:
        path.write_text("half")
    run(sample, tmp_path, resume=True)
    assert not any(path.exists() for path in left)


def test_a_folder_on_a_drive_without_locks_is_used_all_the_same(
    sample, uninterrupted, tmp_path, monkeypatch
):
    def unsupported(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    assert run(sample, tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_with_workers_saves_too(number, tmp_path):
    process = start(tmp_path / "r", "--workers", "2")
    wait_for(lambda: newest(tmp_path / "r") >= 2)
    assert len(children(process.pid)) >= 2  # the workers are there
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == f"main.py: stopped by {number.name}; --resume continues the run\n"
    assert load_checkpoint(tmp_path / "r/checkpoints")["epoch_state"]["epoch"] in (1, 2, 3)
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)


def children(pid):
    """Processes that a process started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_workers_that_a_signal_ended_do_not_tear_an_update(sample, tmp_path, monkeypatch):
    step, ended = loops.train_step, []

    def end(*arguments, **options):
        sums = step(*arguments, **options)
        if not ended:
            os.kill(os.getpid(), signal.SIGTERM)
            ended.extend(children(os.getpid()))
            for child in ended:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.5)  # so that their end is known before the update is counted
        return sums

    monkeypatch.setattr(loops, "train_step", end)
    with pytest.raises(guards.Stopped):
        run(sample, tmp_path, workers=2)
    assert len(ended) >= 2 and load_checkpoint(tmp_path / "checkpoints")["epoch_state"]["steps"] == 1


# Numbers that are wrong


@pytest.mark.parametrize("what", ["loss", "gradient", "input", "weight"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_number_that_is_not_finite_stops_before_the_update(sample, what, precision):
    torch.manual_seed(0)
    model = models.make_model("custom_resnet", width=4)
    optimizer = main.make_optimizer("adam", model)
    train, _ = loaders_of(sample, 0)
    batches = [[x.clone() for x in batch] for batch in train]
    steps = itertools.count(1)

    def inject(module, inputs, output):
        if module.training and next(steps) == 2 and what in ("loss", "gradient"):
            bad = output * float("nan") if what == "loss" else output
            if what == "gradient":
                bad.register_hook(lambda gradient: gradient * float("inf"))
            return bad

    model.linear.register_forward_hook(inject)
    if what == "input":
        batches[1][0][0, 0, 0, 0] = float("nan")
    before = []
    optimizer.register_step_post_hook(lambda *_: before.append(copy.deepcopy(list(model.parameters()))))
    if what == "weight":
        optimizer.register_step_post_hook(lambda *_: model.linear.bias.data.fill_(float("inf")))
    with pytest.raises(
        FloatingPointError, match="is not finite at epoch 1, step 2, learning rate 0.001"
    ):
        main.train(model, CPU, batches, optimizer, precision=precision)
    assert len(before) == 1  # one update was made, and no other
    kept = zip(before[0], model.parameters(), strict=True)
    assert what == "weight" or all(torch.equal(a, b) for a, b in kept)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
@pytest.mark.parametrize(
    ("what", "precision"), [("loss", "fp32"), ("gradient", "fp32"), ("loss", "fp16")]
)
def test_a_device_that_is_not_waited_for_skips_every_update_after_a_bad_number(
    sample, monkeypatch, name, what, precision
):
    torch.manual_seed(0)
    model = models.make_model("custom_resnet", width=4)
    optimizer = main.make_optimizer(name, model)
    steps, kept = itertools.count(1), []

    def inject(module, inputs, output):
        if module.training:
            step = next(steps)
            if step == 3:
                kept.extend(p.detach().clone() for p in model.parameters())
                output.register_hook(lambda gradient: gradient * float("nan"))
                return output * float("nan") if what == "loss" else output

    model.linear.register_forward_hook(inject)
    monkeypatch.setattr(loops, "skips_on_device", lambda optimizer: True)
    batches = [few(batch) for _ in range(2) for batch in loaders_of(sample, 0)[0]]
    with pytest.raises(FloatingPointError, match=f"the {what}.* is not finite at epoch 1, step 3"):
        main.train(model, CPU, batches, optimizer, precision=precision)
    assert next(steps) == 7  # noticed at the end of the epoch
    assert not hasattr(optimizer, "found_inf")  # whoever uses the optimizer next can update
    assert all(torch.equal(a, b) for a, b in zip(kept, model.parameters(), strict=True))


def test_a_bad_number_is_noticed_before_a_checkpoint_is_written(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "skips_on_device", lambda optimizer: True)
    model = models.make_model("custom_resnet", width=4)
    optimizer = main.make_optimizer("sgd", model)
    steps = itertools.count(1)

    def spoil(module, inputs, output):
        return output * float("nan") if model.training and next(steps) == 2 else output

    model.linear.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="epoch 1, step 2"):
        main.fit_model(
            model, CPU, *loaders_of(sample, 0), optimizer, checkpoints=Checkpoints(tmp_path, seconds=0)
        )
    assert load_checkpoint(tmp_path / "checkpoints")["epoch_state"]["steps"] == 1


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_a_first_update_that_fp16_skips_leaves_no_momentum(sample, name):
    model = models.make_model("custom_resnet", width=4)
    optimizer = main.make_optimizer(name, model)
    batch = few(next(iter(loaders_of(sample, 0)[0])))
    hook = model.linear.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = [p.detach().clone() for p in model.parameters()]
    main.train(model, CPU, [batch], optimizer, precision="fp16")
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


def test_a_gradient_that_keeps_overflowing_in_fp16_stops_the_run(sample):
    model = models.make_model("custom_resnet", width=4)
    model.linear.weight.register_hook(lambda gradient: gradient * float("inf"))
    batch = few(next(iter(loaders_of(sample, 0)[0])))
    optimizer = main.make_optimizer("adam", model)
    with pytest.raises(FloatingPointError, match="gradient in fp16 keeps overflowing"):
        main.fit_model(model, CPU, [batch] * 3, [batch], optimizer, epochs=6, precision="fp16")


def test_a_network_that_answers_one_class_is_warned_about(sample, capsys):
    model = models.make_model("custom_resnet", width=4)
    torch.nn.init.zeros_(model.linear.weight)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    main.fit_model(model, CPU, *loaders_of(sample, 0), frozen, epochs=1, precision="fp32")
    said = "warning: epoch 1: on test images the network answers one class for every image; a lower --lr"
    assert said in capsys.readouterr().out


def test_a_loss_no_better_than_guessing_is_warned_about_once_the_warm_up_is_over(capsys):
    epoch_state = utils.EpochState(3, torch.zeros(3), lrs=[0.1, 0.2])
    guards.warn_if_dead(epoch_state, "test", utils.Stats(2.5, 0.1), torch.eye(10), last=False)
    assert capsys.readouterr().out == ""
    epoch_state.lrs = [0.2, 0.1]
    guards.warn_if_dead(epoch_state, "test", utils.Stats(2.2, 0.1), torch.eye(10), last=True)
    assert capsys.readouterr().out == ""
    guards.warn_if_dead(epoch_state, "test", utils.Stats(2.5, 0.6), torch.eye(10), last=True)
    assert capsys.readouterr().out == ""  # it overfits
    guards.warn_if_dead(epoch_state, "test", utils.Stats(2.5, 0.1), torch.eye(10), last=False)
    said = (
        "epoch 3: on test images the network is no better than guessing (a loss of 2.303); a lower --lr"
    )
    assert said in capsys.readouterr().out


def test_a_checkpoint_holds_nothing_but_tensors_and_plain_python(sample, tmp_path):
    run(sample, tmp_path, stop_at=2)
    path = next((tmp_path / "checkpoints").glob("*.ckpt"))
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        words = re.findall(rb"c([\w.]+)\n(\w+)\n", archive.read(name))
    modules = {module.split(b".")[0] for module, _ in words}
    assert modules <= {b"torch", b"collections"}
