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
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import data
import main
import models
import utils
from tests import test_checkpoint as small

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results.json"
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


def images(count: int) -> data.Split:
    """The first images of each class of the sample's test set."""
    split = data.load_split("cifar10-sample", "test")
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
            landed += len(state["history"]["lrs"]) + state["tally"]["steps"] == stop_at
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
        while small.newest(folder) < aim and process.poll() is None:
            time.sleep(0.001)
        while not (folder / "checkpoints").is_dir() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.2)
        landed = process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=120)
        state = checkpoint.load_checkpoint(folder / "checkpoints")
        steps = len(state["history"]["lrs"]) + state["tally"]["steps"]
        middle = state["tally"]["steps"] > 0
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
        landed = losses = harmed = 0
        for k in range(count):
            damaged = damage(content, rng, k)
            landed += damaged != content
            losses += reads(damaged)
            harmed += loads(damaged[: -checkpoint.DIGEST]) == (harm == "takes")
        rows.append(Row(fault, count, landed, losses, f"plain torch.load {harm} {harmed}", harmed > 0))
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
    """Files that run a command when unpickled, at every entry point, with the safe default off."""
    tried = executed = 0
    with tempfile.TemporaryDirectory() as root, swapped(os.environ, UNSAFE, "1"):
        proof = Path(root) / "proof"
        pickle.loads(pickle.dumps(small.Evil(proof)))
        harmed = proof.exists()
        proof.unlink(missing_ok=True)
        bodies = [*small.evil_files(proof), b"\x80\x04" + pickle.dumps(small.Evil(proof))]
        for body, entry in itertools.product(bodies, ("resume", "test", "predict", "report")):
            folder = Path(tempfile.mkdtemp(dir=root))
            (folder / "step-00000001.ckpt").write_bytes(small.with_digest(body))
            (folder / "weights.safetensors").write_bytes(body)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                if entry == "resume":
                    assert checkpoint.load_checkpoint(folder) is None
                else:
                    extra = ["x.png"] if entry == "predict" else []
                    with contextlib.suppress(SystemExit):
                        main.main([entry, str(folder), *extra])
            tried += 1
            executed += proof.exists()
            proof.unlink(missing_ok=True)
    return Row("hostile file at an entry point", tried, tried, executed, "plain pickle runs it", harmed)


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
    torch.manual_seed(0)
    model = models.make_model("custom_resnet", width=4)
    optimizer = main.make_optimizer("adam", model)
    batches = [[x.clone() for x in batch] for batch in small.loaders_of(images(200), 0)[0]] * 8
    count, updates = itertools.count(1), []
    factor = {"loss nan": float("nan"), "loss inf": float("inf")}.get(kind)

    def spoil(module, inputs, output):
        if module.training and next(count) >= 2 and factor is not None:
            return output * factor

    model.linear.register_forward_hook(spoil)
    if kind == "gradient":
        model.linear.weight.register_hook(lambda g: g * float("inf") if len(updates) else g)
    if kind == "input":
        batches[1][0][0, 0, 0, 0] = float("nan")
    if kind == "weight":
        optimizer.register_step_post_hook(lambda *_: model.linear.bias.data.fill_(float("inf")))
    optimizer.register_step_post_hook(lambda *_: updates.append(1))
    try:
        main.train(model, CPU, batches, optimizer, precision=precision)
    except FloatingPointError:
        finite = all(torch.isfinite(p).all() for p in model.parameters())
        return True, len(updates) != 1 or not (finite or kind == "weight")
    return True, True


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
    with swapped(vars(data), "FileLock", lambda path: contextlib.nullcontext()):
        unguarded = [race(processes) for _ in range(3)]
    most = max(requests for _, requests in unguarded)
    losses = sum(failed or requests != 1 for failed, requests in outcomes)
    return Row(
        f"{processes} processes fetch at once",
        rounds,
        rounds,
        losses,
        f"without the lock: up to {most} downloads",
        most > 1,
        "one download each",
    )


def race(processes: int) -> tuple[int, int]:
    """Failed processes and downloads of one round, with 120 images standing in for CIFAR-10."""
    sample = images(200)
    records = data.to_records(sample.images[:120], sample.labels[:120])
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in records.items()}
    with tempfile.TemporaryDirectory() as root:
        log = Path(root) / "downloads"

        def source(scratch):
            with log.open("a") as file:
                file.write("x")
            time.sleep(0.05)
            return records

        stand_in = {"CIFAR10_SHA256": hashes, "cifar10_sources": lambda root: [("a stand-in", source)]}
        with contextlib.ExitStack() as stack:
            for name, value in stand_in.items():
                stack.enter_context(swapped(vars(data), name, value))
            forked = multiprocessing.get_context("fork")
            workers = [forked.Process(target=fetch, args=(root,)) for _ in range(processes)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        return sum(worker.exitcode != 0 for worker in workers), len(log.read_text())


def fetch(root: str) -> None:
    """Load both splits, quietly."""
    with contextlib.redirect_stdout(io.StringIO()):
        data.load_split("cifar10", "train", root)
        data.load_split("cifar10", "test", root)


def bad_input() -> Row:
    """Every bad input of the test suite: one line, exit code 2 or a ValueError, nothing lost."""
    words = "bad_input or refused or unusable or unreadable or impossible or unknown or not_resumed"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", words, "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    passed, failed = counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0)
    strange = main.main(["fly"])
    return Row(
        "bad input",
        passed + failed,
        passed + failed,
        failed + (done.returncode != 0),
        f"an unknown command exits with {strange}",
        strange == 2,
    )


def show(rows: list[Row]) -> None:
    """The table, as Markdown."""
    print("\n| fault | tried | landed | losses | the same without the guard |\n|---|---:|---:|---:|---|")
    for row in rows:
        note = f" ({row.note})" if row.note else ""
        print(f"| {row.fault}{note} | {row.tried:,} | {row.landed:,} | {row.losses} | {row.control} |")


def battery() -> int:
    """Run it all, print the table and write it as JSON; 0 if every promise held."""
    torch.set_num_threads(1)
    rows, began = [], time.monotonic()
    stages = [
        stops,
        lambda: kills(100),
        lambda: signals(30),
        corruptions,
        hostile,
        injections,
        lambda: races(50),
        bad_input,
    ]
    for stage in stages:
        start = time.monotonic()
        with contextlib.redirect_stdout(sys.stderr):
            found = stage()
        found = found if isinstance(found, list) else [found]
        for row in found:
            row.seconds = round((time.monotonic() - start) / len(found), 1)
            print(
                f"{'held' if row.held else 'BROKEN':>7}  {row.seconds:>7.1f} s  {row.fault}", flush=True
            )
        rows += found
    show(rows)
    minutes = (time.monotonic() - began) / 60
    machine = utils.environment(CPU)
    RESULTS.write_text(
        json.dumps({**machine, "minutes": minutes, "rows": [asdict(r) for r in rows]}, indent=1)
    )
    print(f"\n{minutes:.1f} minutes on {machine['machine']}; {RESULTS.relative_to(ROOT)}")
    return 0 if all(row.held for row in rows) else 1


if __name__ == "__main__":
    sys.exit(battery())
