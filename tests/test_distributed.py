"""Several processes train one run. `make battery` has the long form, by torchrun itself."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import checkpoint
import files
import main
import models
import run
import sources
from config import Config
from data import Part, make_loader
from training import distributed, shared_model
from training.guards import Signals, Stopped
from training.optim import one_cycle, orthogonal_each
from transforms import evaluation_transform, train_transform

CPU = torch.device("cpu")
STEPS, EPOCHS = 3, 2
# Processes are forked from one that has imported everything, which saves seconds for each.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["main", "report", "pytest", "torch._dynamo", "torch.utils.tensorboard"]  # all that a run imports
)
pytestmark = pytest.mark.slow
STORES = []
RUN = (
    "--dataset cifar10-sample --width 4 --batch-size 64 --epochs 2 --max-train-batches 4 "
    "--max-test-batches 2 --lr 0.01 --precision fp32 --device cpu --checkpoint-seconds 0"
).split()


class Double(nn.Module):
    """A network that computes in float64, where rounding does not hide what differs."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = models.make_model("custom_resnet", width=4, dropout=dropout).double()

    def forward(self, images):
        return self.net(images.double())


def loaders_of(batch=64, workers=0):
    """192 real images, whole batches or image by image; and 200 to evaluate."""
    split = sources.load_split("cifar10-sample", "test")
    split = split.take(np.arange(1000)[np.arange(1000) % 100 < 20])
    config = Config(batch_size=batch, workers=workers, max_train_batches=STEPS)
    train = make_loader(split, train_transform(), CPU, config, shuffle=True)
    return train, make_loader(split, evaluation_transform(train_transform(), split.images), CPU, config)


def fit(folder=None, *, dropout=0.0, workers=0, optimizer="sgd", stop_at=None, batches=None, **options):
    """Weights and losses of a short training in float64, or what stopped it."""
    train, test = loaders_of(workers=workers)
    model = Double(dropout)
    moved = main.make_optimizer(optimizer, model, 0.05)
    schedule = one_cycle(moved, 0.05, epochs=EPOCHS, steps_per_epoch=STEPS)
    resume, said = options.pop("resume", False), io.StringIO()
    if stop_at is not None:
        moved.register_step_post_hook(StopAt(stop_at))
    seconds = 0 if options.pop("every_step", False) else 60
    checkpoints = checkpoint.Checkpoints(folder, resume=resume, seconds=seconds) if folder else None
    with contextlib.redirect_stdout(said), contextlib.suppress(Stopped):
        parts = (model, CPU, batches or train, test, moved, schedule, EPOCHS)
        history = main.fit_model(*parts, precision="fp32", checkpoints=checkpoints, **options)
        losses = [(row.train_loss, row.test_loss, row.test_accuracy) for row in history.epochs]
        return {"weights": flat(model), "losses": losses, "said": said.getvalue()}
    return {"stopped": [path.name for path in sorted(Path(folder).glob("checkpoints/*"))]}


class StopAt:
    """A hook that gives this process SIGTERM after some updates."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self, *_):
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGTERM)


def flat(model):
    """All of a network's state as one tensor."""
    return torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])


def apart(one, other):
    """How far two states are from each other, in relation to their size."""
    return float((one - other).norm() / one.norm())


def begin(rank, world, port, folder, call, arguments):
    """In a new process: take the rank that torchrun would give, call, and write down what came of it."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    names |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    for stream, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    if call in (main.main, without_report):
        sys.exit(call(*arguments[0]))
    torch.distributed.init_process_group("gloo")
    try:
        result = call(*arguments[0], **arguments[1])
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        result = {"error": type(error).__name__, "text": str(error)}
    torch.save(result, folder / f"{rank}.pt")
    os._exit(0)  # whatever the others are at


def without_report(argv):
    """The command line, for what happens before the report."""
    run.report_run = lambda *_: None
    return main.main(argv)


def start(world, folder, call, *arguments, **options):
    """Start some processes that know each other."""
    folder.mkdir(parents=True, exist_ok=True)
    # As in torchrun's agent, the store outlives the processes.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    ranks = [
        SERVER.Process(target=begin, args=(rank, world, store.port, folder, call, (arguments, options)))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return ranks


def ended(ranks, seconds=180):
    """The exit codes of processes, which must end in time."""
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes


def results_of(world, folder, call, *arguments, **options):
    """What a call returned in each of some processes."""
    codes = ended(start(world, folder, call, *arguments, **options))
    texts = [(folder / f"{rank}.err").read_text() for rank in range(world)]
    assert codes == [0] * world, texts
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]  # ours


def lines_of(folder, world):
    """What the processes of a command said last, on stderr."""
    texts = [(folder / f"{rank}.err").read_text() for rank in range(world)]
    return [line for text in texts for line in text.splitlines() if line.startswith("main.py:")]


@pytest.fixture(scope="module")
def alone():
    """The same training in one process, without and with dropout."""
    return {dropout: fit(dropout=dropout) for dropout in (0.0, 0.5)}


def test_every_row_of_a_batch_belongs_to_one_process():
    for world in range(1, 9):
        for count in range(world, 70):
            parts = [Part(rank, world).rows(count) for rank in range(world)]
            rows = [row for part in parts for row in range(count)[part]]
            sizes = {part.stop - part.start for part in parts}
            assert rows == list(range(count)) and max(sizes) - min(sizes) <= 1
    assert Part(2, 3).rows(2) == slice(0, 2)  # too few to divide: all for everyone


def test_a_group_of_one_process_trains_to_the_same_bits_as_none(tmp_path, alone):
    (result,) = results_of(1, tmp_path, fit, dropout=0.5)
    assert torch.equal(result["weights"], alone[0.5]["weights"])
    assert result["losses"] == alone[0.5]["losses"]


@pytest.mark.parametrize("world, dropout", [(2, 0.0), (3, 0.5)])
def test_some_processes_train_as_one_does(tmp_path, alone, world, dropout):
    results = results_of(world, tmp_path, fit, dropout=dropout)
    for result in results:
        assert torch.equal(result["weights"], results[0]["weights"])
        assert apart(result["weights"], alone[dropout]["weights"]) < 1e-12
        np.testing.assert_allclose(result["losses"], alone[dropout]["losses"], rtol=1e-5)
    assert results[0]["said"].count(" 2/2 ") == 1 and not results[1]["said"]  # one log


class Uneven(nn.Module):
    """A loss that gives classes weights and compares rows, so that it is no mean over the rows."""

    def __init__(self, reduction):
        super().__init__()
        self.reduction = reduction

    def forward(self, logits, labels):
        weight = torch.linspace(1, 3, logits.shape[1], dtype=logits.dtype)
        loss = F.cross_entropy(logits, labels, weight, reduction=self.reduction)
        return loss / (64 if self.reduction == "sum" else 1) + logits.std(0).mean()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_some_processes_train_as_one_does_with_a_loss_that_is_no_mean_over_rows(tmp_path, reduction):
    one = fit(criterion=Uneven(reduction))
    for result in results_of(3, tmp_path, fit, criterion=Uneven(reduction)):
        assert apart(result["weights"], one["weights"]) < 1e-12
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5)


def test_without_synced_norms_it_is_another_training(tmp_path, alone):
    results = results_of(2, tmp_path, fit, sync_norm=False)
    assert apart(results[0]["weights"], alone[0.0]["weights"]) > 1e-2
    assert torch.equal(results[0]["weights"], results[1]["weights"])  # statistics too


def logits_of(sizes):
    """Predictions for 1,000 images in batches of several sizes."""
    split = sources.load_split("cifar10-sample", "test")
    model = Double()
    rows = {}
    for size in sizes:
        loader = make_loader(
            split, evaluation_transform(train_transform(), split.images), CPU, Config(batch_size=size)
        )
        predictions = main.predict(model, CPU, loader, precision="fp32")
        rows[size] = predictions.probabilities, predictions.labels
        assert np.array_equal(predictions.images, split.images)
    loader = make_loader(split, train_transform(), CPU, Config(batch_size=64), shuffle=True)
    predictions = main.predict(model, CPU, loader, precision="fp32")
    rows["shuffled"] = predictions.images, predictions.labels
    pair = [(torch.zeros(1, 3, 32, 32), torch.tensor([3]))]  # fewer images than processes
    rows["one"] = main.predict(model, CPU, pair, precision="fp32").labels
    return rows


def test_every_test_image_counts_once_whatever_the_batch(tmp_path):
    sizes = (48, 64, 333)
    expected = logits_of(sizes)
    labels = sources.load_split("cifar10-sample", "test").labels
    for world in (2, 3):
        for rows in results_of(world, tmp_path / str(world), logits_of, sizes):
            assert rows["one"].tolist() == [3]
            for found, expect in zip(rows["shuffled"], expected["shuffled"], strict=True):
                assert np.array_equal(found, expect)
            for size in sizes:
                probabilities, found = rows[size]
                assert np.array_equal(found, labels)
                np.testing.assert_allclose(probabilities, expected[size][0], atol=1e-6)


def test_three_processes_resume_to_the_same_bits(tmp_path):
    whole = results_of(3, tmp_path / "a", fit, optimizer="muon", ema_decay=0.9)
    stopped = results_of(
        3, tmp_path / "b", fit, tmp_path / "run", optimizer="muon", ema_decay=0.9, stop_at=2
    )
    assert "step-00000002.ckpt" in stopped[0]["stopped"]
    again = results_of(
        3, tmp_path / "c", fit, tmp_path / "run", optimizer="muon", ema_decay=0.9, resume=True
    )
    for result in again:
        assert torch.equal(result["weights"], whole[0]["weights"])
    assert again[0]["losses"] == whole[0]["losses"]
    assert "resumed in epoch 1 after 2 steps" in again[0]["said"]


def test_another_number_of_processes_goes_on_with_a_warning_or_is_refused(tmp_path, alone):
    results_of(2, tmp_path / "a", fit, tmp_path / "run", stop_at=2)
    again = results_of(3, tmp_path / "b", fit, tmp_path / "run", resume=True)
    assert "written with 2 processes, now 3 processes: the result will not be" in again[0]["said"]
    assert apart(again[0]["weights"], alone[0.0]["weights"]) < 1e-12
    results_of(2, tmp_path / "c", fit, tmp_path / "unsynced", stop_at=2, sync_norm=False)
    again = results_of(3, tmp_path / "d", fit, tmp_path / "unsynced", resume=True, sync_norm=False)
    for result in again:
        assert "the training has processes 2, not 3" in result["text"]


def fit_unprimed(*arguments, **options):
    """The control of the test above: without the backward pass after which DDP repacks its buckets."""

    def fake(shared, *_):
        for parameter in shared.parameters():
            parameter.grad = torch.zeros_like(parameter)

    shared_model.prime = fake
    return fit(*arguments, **options)


def on_own_disks(root, **options):
    """Each process has a disk of its own."""
    return fit(root / str(distributed.own_part().rank), **options)


def test_the_newest_checkpoint_is_used_whichever_machine_has_it(tmp_path, alone):
    results_of(2, tmp_path / "a", on_own_disks, tmp_path, stop_at=4)
    (tmp_path / "0").rename(tmp_path / "1")  # ranks are given anew at a restart
    again = results_of(2, tmp_path / "b", on_own_disks, tmp_path, resume=True)
    assert "step-00000004.ckpt is copied from the disk of process 1" in again[0]["said"]
    assert "resumed in epoch 2 after 1 steps" in again[0]["said"]
    assert apart(again[0]["weights"], alone[0.0]["weights"]) < 1e-12


def lost_in_a_step(folder, guarded=True):
    """A process is killed in mid-update, and torchrun's SIGTERM comes at the same moment."""
    rank, step, before = distributed.own_part().rank, [], F.cross_entropy

    def lose(logits, labels, **options):
        step.append(1)
        if len(step) == 3:
            signal.raise_signal(signal.SIGTERM if rank == 0 else signal.SIGKILL)
        return before(logits, labels, **options)

    @contextlib.contextmanager
    def swallowing(self):
        """`Signals.held` as it is right for one process."""
        self.depth += 1
        with contextlib.suppress(RuntimeError):
            yield
        self.depth -= 1
        if not self.depth and self.number is not None:
            raise Stopped(self.number)

    F.cross_entropy = lose
    if not guarded:
        Signals.held = swallowing
    return fit(folder, every_step=True)


def weights_after_a_loss(folder, guarded=True):
    """The weights of a run that lost a process in mid-update, was resumed, and came to its end."""
    ended(start(2, folder / "a", lost_in_a_step, folder / "run", guarded))
    lost = torch.load(folder / "a" / "0.pt", weights_only=False)
    assert lost.get("error") == ("LostError" if guarded else None), lost
    assert newest(folder / "run") == 2
    return results_of(2, folder / "b", fit, folder / "run", resume=True)[0]["weights"]


def test_no_half_of_an_update_is_saved_when_a_process_is_lost(tmp_path):
    whole = results_of(2, tmp_path / "whole", fit)[0]["weights"]
    assert torch.equal(weights_after_a_loss(tmp_path), whole)


def fit_spoiled(folder):
    """A training in which one process meets a NaN in the last step of the first epoch."""
    rank, met, before = distributed.own_part().rank, [], F.cross_entropy

    def spoiled(logits, labels, **options):
        met.append(1)
        return before(logits, labels, **options) * (float("nan") if (rank, len(met)) == (1, 3) else 1)

    F.cross_entropy = spoiled
    return fit(folder)


def test_a_nan_in_one_process_stops_all_at_the_same_step(tmp_path):
    results = results_of(3, tmp_path, fit_spoiled, tmp_path / "run")
    assert {result["error"] for result in results} == {"FloatingPointError"}
    assert all("at epoch 1, step 3," in result["text"] for result in results)
    assert sorted(path.name for path in tmp_path.glob("run/checkpoints/*")) == ["step-00000000.ckpt"]


def own_batches(differ):
    """A list of batches, of which this process takes its rows, if all processes have the same."""
    torch.manual_seed(differ * distributed.own_part().rank)
    images, labels = torch.randn(3, 50, 3, 32, 32), torch.randint(10, (3, 50))
    return fit(batches=[(x, y) for x, y in zip(images, labels, strict=True)])


def test_lists_of_batches_are_divided_and_must_be_the_same_everywhere(tmp_path):
    expected = own_batches(0)
    results = results_of(2, tmp_path / "a", own_batches, 0)
    assert apart(results[0]["weights"], expected["weights"]) < 1e-12
    for result in results_of(2, tmp_path / "b", own_batches, 1):
        assert "process 1 has other labels in a batch than process 0" in result["text"]


def refusals():
    """What cannot be shared, in words."""
    texts = []
    unused, odd = Double(), Double()
    unused.extra = nn.Linear(1, 1)
    odd.net.prep[1].__class__ = type("OddNorm", (nn.BatchNorm2d,), {})
    train, _ = loaders_of()
    small = [(torch.zeros(1, 3, 32, 32), torch.tensor([0]))]
    for model, loader in ((unused, train), (odd, train), (Double(), small)):
        optimizer = main.make_optimizer("sgd", model)
        try:
            main.train(model, CPU, loader, optimizer, precision="fp32")
        except ValueError as error:
            texts.append(str(error))
    return texts


def test_what_cannot_be_shared_is_refused_in_one_line(tmp_path):
    for texts in results_of(2, tmp_path, refusals):
        assert "extra.weight takes no part in the model's answer" in texts[0]
        assert "net.prep.1, a OddNorm, normalises the rows of one process alone" in texts[1]
        assert texts[2] == "a batch of 1 images is too small for 2 processes"
        assert len(texts) == 3 and not any("\n" in text for text in texts)


def matrices():
    """Made orthogonal by one process each, and by all."""
    torch.manual_seed(0)
    given = [torch.randn(rows, 72) for rows in (8, 64, 16, 128, 3)]
    return orthogonal_each(given), shared_model.orthogonal_shared(given)


def test_shared_newton_schulz_gives_the_same_bits(tmp_path):
    for each, shared in results_of(3, tmp_path, matrices):
        assert all(torch.equal(one, other) for one, other in zip(each, shared, strict=True))


def weights_of(folder):
    """SHA-256 of a run's weights file."""
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


def newest(folder):
    """The step of the newest checkpoint."""
    return max([int(path.stem[5:]) for path in folder.glob("checkpoints/step-*.ckpt")], default=-1)


def wait_for_step(folder, step, ranks):
    """Wait until a run has got so far."""
    while newest(folder) < step and all(process.is_alive() for process in ranks):
        time.sleep(0.005)
    assert newest(folder) >= step


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that nothing interrupted."""
    root = tmp_path_factory.mktemp("whole")
    assert ended(start(2, root, main.main, [*RUN, "--output", str(root / "run")])) == [0, 0]
    return root / "run"


def test_a_run_of_two_processes_leaves_one_report_and_one_log(whole):
    assert (whole / "report.html").exists() and (whole / "history.csv").exists()
    log = (whole.parent / "0.out").read_text()
    assert log.count("test accuracy") == 1 and log.count("in " + str(whole)) == 1
    assert (whole.parent / "1.out").read_text() == ""
    state = checkpoint.load_checkpoint(whole / "checkpoints")
    assert state["machine"]["processes"] == "2 processes"


def test_a_killed_process_ends_the_others_with_one_line(tmp_path):
    folder = tmp_path / "run"
    ranks = start(3, tmp_path / "a", without_report, [*RUN, "--output", str(folder), "--workers", "1"])
    wait_for_step(folder, 2, ranks)
    ranks[1].kill()
    begin = time.monotonic()
    assert ended(ranks, 15) == [1, -signal.SIGKILL, 1] and time.monotonic() - begin < 15
    assert lines_of(tmp_path / "a", 3) == [
        "main.py: another process of this run is gone; --resume continues the run"
    ]


def test_a_run_of_two_processes_that_was_killed_ends_with_the_same_bits(tmp_path, whole):
    folder = tmp_path / "run"
    flags = [*RUN, "--output", str(folder), "--resume"]
    ranks = start(2, tmp_path / "a", without_report, flags)
    wait_for_step(folder, 3, ranks)
    ranks[0].kill()
    assert ended(ranks, 15) == [-signal.SIGKILL, 1]
    assert ended(start(2, tmp_path / "b", without_report, flags)) == [0, 0]
    assert weights_of(folder) == weights_of(whole)


def test_sigterm_saves_one_checkpoint_at_an_agreed_step(tmp_path, whole):
    folder = tmp_path / "run"
    flags = [*RUN, "--output", str(folder), "--resume", "--checkpoint-seconds", "1e9"]
    ranks = start(2, tmp_path / "a", without_report, flags)
    wait_for_step(folder, 4, ranks)
    ranks[1].terminate()  # one is enough
    assert ended(ranks) == [143, 143]
    assert lines_of(tmp_path / "a", 2) == ["main.py: stopped by SIGTERM; --resume continues the run"]
    assert 4 <= newest(folder) < 8
    assert ended(start(2, tmp_path / "b", without_report, flags)) == [0, 0]
    assert weights_of(folder) == weights_of(whole)


def test_a_frozen_process_is_noticed(tmp_path):
    folder = tmp_path / "run"
    flags = [*RUN, "--output", str(folder), "--process-timeout", "2"]
    ranks = start(2, tmp_path, without_report, flags)
    wait_for_step(folder, 2, ranks)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    assert ended(ranks[:1], 12) == [1]
    ranks[1].kill()
    assert lines_of(tmp_path, 1) == [
        "main.py: another process of this run has not answered in time; --resume continues the run"
    ]


def test_bad_input_of_one_process_is_refused_by_all_with_one_line(tmp_path, whole):
    again = [*RUN, "--output", str(whole)]
    assert ended(start(2, tmp_path / "a", without_report, again)) == [2, 2]
    assert lines_of(tmp_path / "a", 2) == [
        f"main.py: output {whole} is there already; --resume it, or choose another"
    ]
    files.lock_folder(whole)  # by this process
    assert ended(start(2, tmp_path / "d", main.main, [*again, "--resume"])) == [2, 2]
    assert lines_of(tmp_path / "d", 2) == [f"main.py: {whole} is in use by process {os.getpid()}"]
    typo = [*RUN, "--width", "x"]
    assert ended(start(2, tmp_path / "b", main.main, typo)) == [2, 2]
    assert len(lines_of(tmp_path / "b", 2)) == 1
    several = [*RUN, "--seeds", "2", "--output", str(tmp_path / "seeds")]
    assert ended(start(2, tmp_path / "e", main.main, several)) == [2, 2]
    assert lines_of(tmp_path / "e", 2) == [
        "main.py: --seeds is for one process: leave torchrun out, or train one --seed at a time"
    ]
    assert not (tmp_path / "seeds").exists()
    assert ended(start(2, tmp_path / "c", main.main, ["test"])) == [2, 2]
    assert lines_of(tmp_path / "c", 2) == [
        "main.py: torchrun is for training alone: python main.py test"
    ]


def other_data(folder):
    """A run whose second process has other images."""
    if os.environ["RANK"] == "1":
        load = sources.load_sample
        sources.load_sample = lambda part: load(part).take(np.arange(900))
    return str(main.run(Config(**CONFIG, output=folder)))


CONFIG = {"dataset": "cifar10-sample", "width": 4, "batch_size": 64, "epochs": 1, "device": "cpu"}
CONFIG |= {"max_train_batches": 20, "max_test_batches": 1, "precision": "fp32"}


def test_other_data_in_one_process_is_refused_by_all(tmp_path):
    for result in results_of(2, tmp_path, other_data, str(tmp_path / "run")):
        assert result["text"] == (
            "process 1 has other images than process 0: "
            "give every process the same command and the same data"
        )
    assert not (tmp_path / "run").exists()


def ranged(folder):
    """A run that finds its rate."""
    return str(main.run(Config(**CONFIG, output=folder)))


def test_the_range_test_of_two_processes_is_that_of_one(tmp_path):
    results_of(2, tmp_path / "a", ranged, str(tmp_path / "two"))
    ranged(str(tmp_path / "one"))
    one, two = ((tmp_path / name / "lr_finder.json").read_bytes() for name in ("one", "two"))
    assert one == two and len(json.loads(one)["lrs"]) > 17


def lit():
    """A training by Lightning in the same processes."""
    from lightning.pytorch import Trainer

    from lit import LitData, LitModel, trainer_options

    config = Config(**CONFIG, lr=0.01)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = trainer_options(config) | {
        "devices": 2,
        "strategy": "ddp",
        "use_distributed_sampler": True,
    }
    trainer, module = Trainer(**options, **quiet), LitModel(config)
    trainer.fit(module, datamodule=LitData(config))
    return flat(module), trainer.global_step


def test_lightning_gives_each_process_batches_of_its_own(tmp_path):
    pytest.importorskip("lightning", reason="needs requirements-lightning.txt")
    (one, steps), (other, _) = results_of(2, tmp_path, lit)
    assert steps == CONFIG["max_train_batches"] / 2
    parameters = one.numel()
    assert torch.isfinite(one).all() and parameters == other.numel()
