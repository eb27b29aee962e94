"""The long form of what the tests promise about faults: `make battery`.

Every row tries a fault many times, counts how often it really landed, and how often it cost anything.
Every row has a control, the same fault where nothing guards against it, which must do harm.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import cifar

import checkpoint
import main
import models
import sources
import utils
from benchmarks.tables import BATTERY, render_battery
from sources import cifar10
from sources.split import Split
from tests import test_checkpoint as small
from tests import test_data as stand_in
from tests.battery import processes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@dataclass
class Row:
    """What one kind of fault did."""

    fault: str
    tried: int
    landed: int
    losses: int
    control: str  # what the same fault does where nothing guards
    control_harmed: bool
    note: str = ""
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Whether the promise was kept, and the row could have seen it broken."""
        return self.landed == self.tried and self.losses == 0 and self.control_harmed


def images(count: int) -> Split:
    """The first images of each class of the sample's test set."""
    split = sources.load_split("cifar10-sample", "test")
    return split.take(np.arange(1000)[np.arange(1000) % 100 < count // 10])


def stops() -> Row:
    """Stop after every step, with the number of workers changed at the resume."""
    small.EPOCHS, small.STEPS = 4, 5
    sample = images(400)
    expected = small.run(sample)
    steps, landed, losses, blind = small.EPOCHS * small.STEPS, 0, 0, 0
    for stop_at, (before, after) in itertools.product(range(1, steps + 1), ((0, 2), (2, 1), (1, 0))):
        with tempfile.TemporaryDirectory() as folder:
            small.run(sample, folder, stop_at, workers=before)
            state = checkpoint.load_checkpoint(Path(folder) / "checkpoints")
            landed += len(state["history"]["lrs"]) + state["epoch_state"]["steps"] == stop_at
            losses += small.run(sample, folder, workers=after, resume=True) != expected
        if before == 0:
            blind += without_momentum(sample, stop_at) == expected[1]  # losses and accuracies
    small.EPOCHS, small.STEPS = 2, 3
    control = f"optimizer state dropped: {steps - blind} of {steps} differ"
    # After the very last step no update follows that a lost momentum could change.
    return Row(
        "stop after a step, resume with other workers", 3 * steps, landed, losses, control, blind <= 1
    )


def without_momentum(sample, stop_at: int):
    """The history of a resume that forgets the optimizer's state."""
    restore = checkpoint.Checkpoints.restore

    def forget(self, state, device):
        state["parts"]["optimizer"]["state"] = {}
        return restore(self, state, device)

    with tempfile.TemporaryDirectory() as folder:
        small.run(sample, folder, stop_at)
        checkpoint.Checkpoints.restore = forget
        try:
            return small.run(sample, folder, resume=True)[1]
        finally:
            checkpoint.Checkpoints.restore = restore


UNSAFE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
KILLED = (
    "--dataset cifar10-sample --width 24 --batch-size 64 --epochs 3 --max-train-batches 12 "
    "--max-test-batches 2 --lr 0.01 --precision fp32 --checkpoint-seconds 0"
).split()


def start(folder: Path, *flags: str) -> subprocess.Popen:
    """The command line, in a process group of its own, on one thread."""
    return subprocess.Popen(
        [sys.executable, "main.py", *KILLED, "--output", str(folder), *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def weights_of(folder: Path) -> str:
    """SHA-256 of a run's weights file."""
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


def killed_run(seed: int, expected: str) -> tuple[int, int, int, bool]:
    """Three SIGKILLs at random moments, then a resume: landed, in mid-epoch, inside a save, and lost."""
    rng = random.Random(seed)
    landed = middle = saving = 0
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        for _ in range(3):
            process = start(folder, "--resume")
            before = small.newest(folder)
            aim = before + rng.randrange(1, 9)
            while small.newest(folder) < aim and process.poll() is None:
                time.sleep(0.001)
            aim_at_a_save(folder, process) if rng.random() < 0.75 else time.sleep(rng.random() * 0.05)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            landed += process.returncode == -signal.SIGKILL
            saving += any((folder / "checkpoints").glob(".step-*.tmp"))
            middle += small.newest(folder) % 12 != 0
        final = start(folder, "--resume")
        error = final.communicate(timeout=300)[1]
        lost = final.returncode != 0 or weights_of(folder) != expected
        if lost:
            print(seed, final.returncode, error[-500:])
    return landed, middle, saving, lost


def aim_at_a_save(folder: Path, process: subprocess.Popen) -> None:
    """Wait until a checkpoint is being written."""
    while process.poll() is None and not any((folder / "checkpoints").glob(".step-*.tmp")):
        pass


def kills(runs: int) -> Row:
    """SIGKILL at random moments, three in each run."""
    with tempfile.TemporaryDirectory() as root:
        start(Path(root) / "whole").communicate()
        expected = weights_of(Path(root) / "whole")
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(functools.partial(killed_run, expected=expected), range(runs)))
    landed, middle, saving = (sum(outcome[k] for outcome in outcomes) for k in range(3))
    losses = sum(outcome[3] for outcome in outcomes)
    broken = killed_in_place(20)
    note = f"{middle} in mid-epoch, {saving} inside a save"
    enough = middle >= 0.6 * landed and saving >= 0.2 * landed
    return Row(
        "SIGKILL at a random moment, three a run",
        3 * runs,
        landed,
        losses,
        f"files written in place: {broken} of 20 unreadable",
        broken > 0 and enough,
        note,
    )


IN_PLACE = """
import sys, torch
state = {"x": torch.zeros(3_000_000)}
print("ready", flush=True)
while True:
    torch.save(state, sys.argv[1])
"""


def killed_in_place(count: int) -> int:
    """How many files a plain torch.save loop leaves unreadable when it is killed."""
    broken = 0
    for k in range(count):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.pt"
            process = subprocess.Popen([sys.executable, "-c", IN_PLACE, path], stdout=subprocess.PIPE)
            process.stdout.readline()
            time.sleep(0.1 + 0.005 * k)
            process.kill()
            process.communicate()
            try:
                torch.load(path, weights_only=True)
            except Exception:
                broken += 1
    return broken


def signals(each: int) -> Row:
    """SIGINT and SIGTERM at random moments of training."""
    jobs = [(number, k) for number in (signal.SIGINT, signal.SIGTERM) for k in range(each)]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(signalled_run, jobs))
    plain = subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    plain.stdout.readline()
    plain.terminate()
    code = plain.wait()
    return Row(
        "SIGINT and SIGTERM",
        len(jobs),
        sum(outcome[0] for outcome in outcomes),
        sum(outcome[1] for outcome in outcomes),
        f"SIGTERM to plain Python: exit {code}, nothing saved",
        code < 0,
        f"{sum(outcome[2] for outcome in outcomes)} saved in mid-epoch",
    )


def signalled_run(job: tuple[int, int]) -> tuple[bool, bool, bool]:
    """Landed; exit code or checkpoint wrong; and whether a checkpoint in mid-epoch came of it."""
    number, seed = job
    rng = random.Random(f"{number} {seed}")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "run"
        process = start(folder, "--checkpoint-seconds", "1e9")  # at each epoch's end, and on a signal
        aim = rng.choice((0, 12, 24))
        first = folder / f"checkpoints/step-{aim:08d}.ckpt"
        while not first.exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.2)
        landed = process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=120)
        state = checkpoint.load_checkpoint(folder / "checkpoints")
        steps = len(state["history"]["lrs"]) + state["epoch_state"]["steps"]
        middle = state["epoch_state"]["steps"] > 0
        return landed, process.returncode != 128 + number or steps < aim, middle


def corruptions() -> list[Row]:
    """Flipped bits, truncations and zeroed pages of one checkpoint."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    state = {"weights": torch.randn(500_000), "names": {f"layer{k}": torch.randn(8) for k in range(40)}}
    torch.save(state, buffer)
    content = small.with_digest(buffer.getvalue())
    rows = []
    for fault, count, damage, harm in (
        ("one bit flipped", 2000, flip, "takes"),
        ("a page of zeros", 50, blank, "takes"),
        ("file cut off", 200, cut, "crashes on"),
    ):
        landed = losses = harmed = inside = 0
        for k in range(count):
            damaged = damage(content, rng, k)
            landed += damaged != content
            losses += reads(damaged)
            body = damaged[: -checkpoint.DIGEST]
            if body != content[: -checkpoint.DIGEST]:  # else only the digest was hit
                inside += 1
                harmed += loads(body) == (harm == "takes")
        control = f"plain torch.load {harm} {harmed:,} of {inside:,}"
        note = f"{count - inside} in the digest" if inside < count else ""
        rows.append(Row(fault, count, landed, losses, control, harmed > 0, note))
    return rows


def flip(content: bytes, rng, k: int) -> bytes:
    """One bit, in half of the cases near an end of the file, where its directory lies."""
    end = int(rng.integers(1500))
    where = int(rng.integers(len(content))) if k % 2 else (end if k % 4 else len(content) - 1 - end)
    changed = bytearray(content)
    changed[where] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def cut(content: bytes, rng, k: int) -> bytes:
    """The beginning of a file."""
    return content[: int(rng.integers(len(content)))]


def blank(content: bytes, rng, k: int) -> bytes:
    """A file with 4 KiB of zeros."""
    page = int(rng.integers(len(content) // 4096)) * 4096
    return content[:page] + bytes(4096) + content[page + 4096 :]


def reads(content: bytes) -> bool:
    """Whether our reader takes a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            checkpoint.read_checkpoint(Path(file.name))
        except Exception:
            return False
    return True


def loads(content: bytes) -> bool:
    """Whether torch.load takes it."""
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        return False
    return True


def hostile() -> Row:
    """Files that harm when unpickled, at every entry point, with the safe default off."""
    tried = landed = harmed = 0
    with tempfile.TemporaryDirectory() as root, swapped(os.environ, UNSAFE, "1"):
        proof = Path(root) / "proof"
        bodies = [*small.evil_files(proof), b"\x80\x04" + pickle.dumps(small.Evil(proof))]
        for body in [*bodies, numpy_body(proof), huge_body()]:
            live = is_live(body, proof)
            for entry in ("resume", "test", "predict", "report"):
                before = peak_memory()
                enter(entry, Path(tempfile.mkdtemp(dir=root)), body)
                tried, landed = tried + 1, landed + live
                harmed += proof.exists() or peak_memory() - before > HUGE / 4
                proof.unlink(missing_ok=True)
    control = f"torch.load without weights_only is harmed by {landed // 4} of {tried // 4} files"
    return Row("hostile file at an entry point", tried, landed, harmed, control, landed > 0)


HUGE = 4 * 10**9  # bytes that a small file asks for


class Saver:
    """Writes a file when unpickled, by a function of NumPy's."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return np.savetxt, (str(self.path), [1])


def numpy_body(proof: Path) -> bytes:
    """A checkpoint that names a NumPy function."""
    buffer = io.BytesIO()
    torch.save({"parts": Saver(proof)}, buffer)
    return buffer.getvalue()


def huge_body() -> bytes:
    """A checkpoint of the right parts, one tensor of which is `HUGE`."""
    state = {
        "card": None,
        "train_settings": {},
        "parts": {k: p.state_dict() for k, p in some_parts().items()},
    }
    name = next(iter(state["parts"]["model"]))
    state["parts"]["model"][name] = torch.zeros(1).expand(HUGE // 4)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def some_parts() -> dict:
    """Model and optimizer of a small run."""
    model = models.make_model("custom_resnet", width=4)
    return {"model": model, "optimizer": main.make_optimizer("adam", model)}


def is_live(body: bytes, proof: Path) -> bool:
    """Whether a careless reader is harmed by a file: it runs something, or asks for `HUGE` bytes."""
    asked = 0
    with contextlib.suppress(Exception):
        state = torch.load(io.BytesIO(body), weights_only=False)
        asked = max(tensor.nbytes for tensor in state["parts"]["model"].values())
    ran = proof.exists()
    proof.unlink(missing_ok=True)
    return ran or asked >= HUGE > 1000 * len(body)


def enter(entry: str, folder: Path, body: bytes) -> None:
    """Offer a file to one of the commands, as checkpoint or as weights."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/step-00000001.ckpt").write_bytes(small.with_digest(body))
    (folder / "weights.safetensors").write_bytes(body)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if entry == "resume":
            with contextlib.suppress(ValueError, RuntimeError):
                checkpoints = checkpoint.Checkpoints(folder, resume=True)
                checkpoints.start(some_parts(), {}, CPU, lambda epoch_state: None)
        else:
            extra = ["x.png"] if entry == "predict" else []
            main.main([entry, str(folder), *extra])


def peak_memory() -> int:
    """The most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pickled_batches() -> Row:
    """A hostile pickle in place of each of CIFAR-10's, extracted and in its tarball."""
    names = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]
    cases = list(itertools.product(names, (False, True)))
    outcomes = [hostile_batch(*case) for case in cases]
    landed, executed = (sum(outcome[k] for outcome in outcomes) for k in (0, 1))
    control = f"with the hashes unchecked {landed} ran"
    return Row("hostile pickle in CIFAR-10", len(cases), landed, executed, control, landed > 0)


def hostile_batch(name: str, packed: bool) -> tuple[bool, bool]:
    """Whether one hostile batch runs with the hashes unchecked, and with them checked."""
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        proof, path = Path(root) / "proof", Path(root) / "cifar-10-batches-py" / name
        tarball = stand_in.make_tarball(patch, *stand_in.make_small(patch, images(200)))
        with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
            archive.extractall(root, filter="data")
        path.write_bytes(pickle.dumps(small.Evil(proof)))
        if packed:
            with tarfile.open(Path(root) / cifar10.CIFAR10_TARBALL, "w:gz") as archive:
                archive.add(path.parent, path.parent.name)
            path.parent.rename(Path(root) / "aside")
        with contextlib.suppress(OSError):
            fetch(root)
        executed = proof.exists()
        proof.unlink(missing_ok=True)
        patch.setattr(cifar, "check_integrity", lambda *arguments: True)
        patch.setattr(cifar10.hashlib, "file_digest", lambda *arguments: RightMD5)
        with contextlib.suppress(Exception):
            fetch(root)
        return proof.exists(), executed


class RightMD5:
    """Says of any tarball that it is CIFAR-10's."""

    hexdigest = staticmethod(lambda: cifar10.CIFAR10_TARBALL_MD5)


@contextlib.contextmanager
def swapped(table, name: str, value):
    """One entry of a mapping, changed for a while."""
    before = table.get(name)
    table[name] = value
    try:
        yield
    finally:
        if before is None:
            del table[name]
        else:
            table[name] = before


def injections() -> Row:
    """NaN and infinity in loss, gradient, input and weight, in every precision."""
    kinds = ("loss nan", "loss inf", "gradient", "input", "weight")
    outcomes = [injected(*case) for case in itertools.product(kinds, utils.PRECISIONS)]
    dead = plain_loop_with_nan()
    return Row(
        "NaN or infinity in training",
        len(outcomes),
        sum(landed for landed, _ in outcomes),
        sum(lost for _, lost in outcomes),
        f"a plain loop trains on: {dead} of its weights NaN",
        dead > 0,
    )


def injected(kind: str, precision: str) -> tuple[bool, bool]:
    """Whether the fault was met, and whether training went on or its weights were touched."""
    met = []
    torch.manual_seed(0)
    model = models.make_model("custom_resnet", width=4)
    optimizer = main.make_optimizer("adam", model)
    batches = [[x.clone() for x in batch] for batch in small.loaders_of(images(200), 0)[0]] * 8
    count, updates = itertools.count(1), []
    factor = {"loss nan": float("nan"), "loss inf": float("inf")}.get(kind)

    def spoil(module, inputs, output):
        if module.training and next(count) >= 2 and factor is not None:
            met.append(kind)
            return output * factor

    def spoil_gradient(gradient):
        if updates:
            met.append(kind)
            return gradient * float("inf")

    def look(module, inputs):
        if module.training and not all(torch.isfinite(x).all() for x in (*inputs, *model.parameters())):
            met.append(kind)

    model.linear.register_forward_hook(spoil)
    model.register_forward_pre_hook(look)
    if kind == "gradient":
        model.linear.weight.register_hook(spoil_gradient)
    if kind == "input":
        batches[1][0][0, 0, 0, 0] = float("nan")
    if kind == "weight":
        optimizer.register_step_post_hook(lambda *_: model.linear.bias.data.fill_(float("inf")))
    note_updates(model, optimizer, updates)
    try:
        main.train(model, CPU, batches, optimizer, precision=precision)
    except FloatingPointError:
        finite = all(torch.isfinite(p).all() for p in model.parameters())
        return bool(met), len(updates) != 1 or not (finite or kind == "weight")
    return bool(met), True


def note_updates(model, optimizer, updates: list) -> None:
    """Add to `updates` when weights change: a fused optimizer is also called for what it skips."""
    weights = [[p.detach().clone() for p in model.parameters()]]

    def note(*_) -> None:
        weights.append([p.detach().clone() for p in model.parameters()])
        if not all(map(torch.equal, *weights[-2:])):
            updates.append(1)

    optimizer.register_step_post_hook(note)


def plain_loop_with_nan() -> int:
    """How many weights are NaN after a loop that checks nothing met one NaN pixel."""
    model = models.make_model("custom_resnet", width=4)
    optimizer = main.make_optimizer("adam", model)
    for step, (pixels, labels) in enumerate(small.loaders_of(images(200), 0)[0]):
        pixels[0, 0, 0, 0] = float("nan") if step == 1 else pixels[0, 0, 0, 0]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(pixels), labels).backward()
        optimizer.step()
    return int(sum(torch.isnan(p).sum() for p in model.parameters()))


def races(rounds: int, processes: int = 8) -> Row:
    """Processes that start at once on an empty data folder."""
    outcomes = [race(processes) for _ in range(rounds)]
    with swapped(vars(cifar10), "FileLock", lambda path: NoLock()):
        unguarded = [race(processes) for _ in range(3)]
    most = max(len(waiting) for _, waiting in unguarded)
    return Row(
        f"{processes} processes fetch at once",
        rounds,
        sum(waiting[:1] == [processes] for _, waiting in outcomes),
        sum(failed or len(waiting) != 1 for failed, waiting in outcomes),
        f"without the lock: up to {most} downloads",
        most > 1,
        "one download each, which all the others waited for",
    )


class NoLock(contextlib.nullcontext):
    """In the place of a lock, and always to be had."""

    def acquire(self, timeout: float = 0) -> "NoLock":
        return self

    def release(self) -> None:
        pass


def race(processes: int) -> tuple[int, list[int]]:
    """Failed processes of one round, and how many had asked for the lock when a download was over.

    120 images stand in for CIFAR-10.
    """
    sample = images(200)
    records = cifar10.to_records(sample.images[:120], sample.labels[:120])
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in records.items()}
    with tempfile.TemporaryDirectory() as root:
        asked, downloads = Path(root) / "asked", Path(root) / "downloads"
        lock = cifar10.FileLock

        def noted(path):
            append(asked, b"x")
            return lock(path)

        def source(scratch):
            end = time.monotonic() + 5
            while asked.stat().st_size < processes and time.monotonic() < end:
                time.sleep(0.001)
            append(downloads, bytes([asked.stat().st_size]))
            return records

        small_one = {"CIFAR10_SHA256": hashes, "cifar10_sources": lambda root: [("stand-in", source)]}
        with contextlib.ExitStack() as stack:
            for name, value in (small_one | {"FileLock": noted}).items():
                stack.enter_context(swapped(vars(cifar10), name, value))
            forked = multiprocessing.get_context("fork")
            workers = [forked.Process(target=fetch, args=(root,)) for _ in range(processes)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        return sum(worker.exitcode != 0 for worker in workers), list(downloads.read_bytes())


def append(path: Path, content: bytes) -> None:
    """Add to a file that several processes add to."""
    with path.open("ab", buffering=0) as file:
        file.write(content)


def fetch(root: str) -> None:
    """Load both splits, quietly."""
    with contextlib.redirect_stdout(io.StringIO()):
        sources.load_split("cifar10", "train", root)
        sources.load_split("cifar10", "test", root)


BAD_INPUT = (
    "bad_input or refused or unusable or unreadable or impossible or not_resumed "
    "or (unknown and not pipeline)"
)


def bad_input() -> Row:
    """Every bad input of the test suite: one line, exit code 2 or a ValueError, nothing lost."""
    pytest_of = [sys.executable, "-m", "pytest", "-q", "-k", BAD_INPUT, "tests"]
    runs = [
        subprocess.run([*pytest_of, *extra], cwd=ROOT, capture_output=True, text=True)
        for extra in (["--collect-only"], [])
    ]
    collected = len(re.findall(r"^tests/.*::", runs[0].stdout, re.M))
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", runs[1].stdout)}
    passed, failed = counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0)
    loss, refused = ignored_label()
    return Row(
        "bad input",
        collected,
        passed + failed,
        failed + (runs[1].returncode != 0) + (not refused),
        f"label -100 through plain cross-entropy: loss {loss:.2f}, no error",
        math.isfinite(loss),
    )


def ignored_label() -> tuple[float, bool]:
    """The plain loss of a batch with a label of -100, and whether our loop refuses that batch."""
    pixels, labels = next(iter(small.loaders_of(images(200), 0)[0]))
    labels[0] = -100
    model, optimizer = some_parts().values()
    loss = torch.nn.functional.cross_entropy(model(pixels), labels).item()
    try:
        main.train(model, CPU, [(pixels, labels)], optimizer)
    except ValueError:
        return loss, True
    return loss, False


def over_processes() -> list[Row]:
    """Every fault over several processes, and what goes wrong without the guards."""
    expected, rows = processes.whole(), []
    for fault, call in processes.FAULTS.items():
        outcomes = [call(expected, seed) for seed in range(processes.TRIES)]
        times = [outcome.seconds for outcome in outcomes]
        note = f"{min(times):.1f} to {max(times):.1f} s" if "no fault" not in fault else ""
        said = "; ".join(sorted({outcome.said for outcome in outcomes} - {""}))
        landed, losses = (sum(outcome[k] for outcome in outcomes) for k in (0, 1))
        rows.append(Row(fault, len(outcomes), landed, losses, said, True, note))
    harms = processes.controls()
    rows.append(
        Row(
            "no guard",
            len(harms),
            len(harms),
            0,
            "; ".join(harms),
            all(harms.values()),
            "(must do harm)",
        )
    )
    return rows


STAGES = {
    "stops": stops,
    "kills": lambda: kills(100),
    "signals": lambda: signals(30),
    "corruptions": corruptions,
    "hostile": hostile,
    "pickles": pickled_batches,
    "injections": injections,
    "races": lambda: races(50),
    "input": bad_input,
    "processes": over_processes,
}


def battery(names: list[str]) -> int:
    """Run the stages named, or all, and write the table after each; 0 if every promise held.

    The rows of stages that are not run again stay as they are.
    """
    torch.set_num_threads(1)
    rows = json.loads(BATTERY.read_text())["rows"] if names and BATTERY.exists() else []
    broken = [name for name in names or STAGES if not run_stage(name, rows)]
    results = json.loads(BATTERY.read_text())
    print(f"\n{render_battery(results)}\n\nwritten to {BATTERY.relative_to(ROOT)}")
    return 1 if broken else 0


def run_stage(name: str, rows: list[dict]) -> bool:
    """Replace a stage's rows among those of the others, and write them all; whether it held."""
    start = time.monotonic()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = STAGES[name]()
    except Exception:  # the other stages go on
        traceback.print_exc()
        print(f" BROKEN  {name}", flush=True)
        found = []
    found = found if isinstance(found, list) else [found]
    for row in found:
        row.seconds = round((time.monotonic() - start) / len(found), 1)
        print(f"{'held' if row.held else 'BROKEN':>7}  {row.seconds:>7.1f} s  {row.fault}", flush=True)
    others = [row for row in rows if row["stage"] != name]
    rows[:] = others + [{"stage": name, **asdict(row)} for row in found]
    rows.sort(key=lambda row: list(STAGES).index(row["stage"]))
    minutes = sum(row["seconds"] for row in rows) / 60
    results = {**utils.environment(CPU), "minutes": minutes, "rows": rows}
    BATTERY.write_text(json.dumps(results, indent=1) + "\n")
    return bool(found) and all(row.held for row in found)


if __name__ == "__main__":
    sys.exit(battery(sys.argv[1:]))
