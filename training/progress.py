"""What is shown while a network trains: bar, table, TensorBoard events."""

import contextlib
import itertools
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from data import BatchLoader, EpochSampler
from training.guards import LR_HINT
from training.inputs import length_of
from training.optim import copy_of
from utils import Epoch, EpochState, History, Stats, autocast, pick_precision, random_state_kept

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


QUIET = 60.0  # seconds without a word, where output is no terminal


def watched() -> bool:
    """Whether somebody sees a bar move: in a terminal, and in Colab."""
    return sys.stdout.isatty() or "google.colab" in sys.modules


def progress(loader: BatchLoader, epoch_state: EpochState) -> Iterator[Any]:
    """The batches that an epoch has left, behind a transient bar, or with a line a minute."""
    # Our sampler starts at the right batch; of another loader the batches done are passed over.
    ours = isinstance(getattr(loader, "sampler", None), EpochSampler)
    batches = itertools.islice(loader, 0 if ours else epoch_state.steps, None)
    name, total = f"epoch {epoch_state.epoch}", length_of(loader)
    if not watched():
        yield from told(batches, name, epoch_state.steps, total)
        return
    yield from tqdm(
        batches, name, total, initial=epoch_state.steps, leave=False, file=sys.stdout, mininterval=0.5
    )


def told(batches: Iterator[Any], name: str, done: int, total: int | None) -> Iterator[Any]:
    """The batches, with a line about every minute."""
    since = time.monotonic()
    for count, batch in enumerate(batches, done):
        if time.monotonic() - since > QUIET:
            print(f"{name}: {count} of {total or 'unknown'} batches done", flush=True)
            since = time.monotonic()
        yield batch


def step_seconds(model: nn.Module, images: Tensor, precision: str) -> float:
    """Seconds that a network takes for a forward and a backward pass on images (N, C, H, W), about.

    It is the fastest of three passes of a copy of the network, so that nothing in the network moves.
    """
    device = images.device
    dtype, model = pick_precision(precision, device), copy_of(model, model)
    labels, taken = torch.zeros(len(images), dtype=torch.int64, device=device), []
    with random_state_kept(device):
        for _ in range(3):
            begin = time.perf_counter()
            with autocast(device, dtype):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            loss.item()  # waits for a GPU
            taken.append(time.perf_counter() - begin)
    return min(taken)


def show_duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def make_row(epoch_state: EpochState, stats: dict[str, Stats], seconds: float) -> Epoch:
    """The row of an epoch that took `seconds`, from the stats of each part that was measured.

    Raises:
        FloatingPointError: one of them is not finite, as after an update that ruined the weights.
    """
    epoch = epoch_state.epoch
    for part, (loss, _) in stats.items():
        if not math.isfinite(loss):
            raise FloatingPointError(f"the {part} loss is {loss} after epoch {epoch}; {LR_HINT}")
    columns = {f"{part}_{name}": x for part, s in stats.items() for name, x in s._asdict().items()}
    speed = epoch_state.images / epoch_state.seconds
    return Epoch(
        epoch=epoch, lr=epoch_state.lrs[-1], seconds=seconds, images_per_second=speed, **columns
    )


def print_row(row: Epoch, epochs: int, header: bool, left: float | None) -> None:
    """One line of the training table, after its head if `header`; `left` seconds are still to go.

    Without them it is a row of a run that is continued.
    """
    stats = row.stats()
    if header:
        heads = "".join(f"{part + ' loss':>12}{'acc':>8}" for part in row.parts)
        print(f"{'epoch':>7}{'lr':>11}{heads}{'seconds':>9}{'images/s':>10}{'left':>9}")
    cells = [
        f"{stats[part].loss:>12.4f}{stats[part].accuracy:>8.2%}" if part in stats else f"{'':>20}"
        for part in row.parts
    ]
    rest = "" if left is None else f"{clock(left):>9}"
    times = f"{row.seconds:>9.1f}{row.images_per_second:>10,.0f}{rest}"
    print(f"{f'{row.epoch}/{epochs}':>7}{row.lr:>11.3g}{''.join(cells)}{times}", flush=True)


def clock(seconds: float) -> str:
    """A time such as 2:05 (minutes and seconds) or 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class UnfailingOutput:
    """A stream whose writes never fail: once one does, what follows goes nowhere, and stderr says so.

    A full disk under a log, or a reader that is gone, must not end a training.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, or give up writing."""
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, or give up writing."""
        self.attempt(self.stream.flush)

    def attempt(self, call: Callable, *arguments: Any) -> None:
        """Call, and on an error send the stream, and what it still holds, to nowhere."""
        try:
            call(*arguments)
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                if not isinstance(error, BrokenPipeError):  # whose reader has seen enough, as `head` has
                    print(f"output is lost from here on: {error.strerror or error}", file=sys.stderr)
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def unfailing_output() -> Iterator[None]:
    """Let no print end what runs in this block."""
    with contextlib.redirect_stdout(UnfailingOutput(sys.stdout)):
        yield
        sys.stdout.flush()


@contextlib.contextmanager
def training_log(
    folder: Path | None, history: History, epochs: int
) -> Iterator[Callable[[Epoch, bool], None]]:
    """A function that shows a row of the history and, if its second argument is true, writes events.

    The rows that a continued run has already come first.

    The TensorBoard events of a run folder are a view of the history, and are written anew when a run is
    continued: what a killed run left may lack some or have more. Neither they nor a print can end a
    training: the first failure of the events is told, and they are left alone from then on.
    """
    writer: SummaryWriter | None = None
    written, broken = 0, False

    def show(row: Epoch, write: bool = True) -> None:
        nonlocal writer, written, broken
        left = statistics.median(x.seconds for x in history.epochs) * (epochs - row.epoch)
        print_row(row, epochs, len(history.epochs) == 1, left)
        if broken or folder is None or not write:
            return
        try:
            writer = writer or event_writer(folder)
            for row in history.epochs[written:]:
                write_events(writer, row, history)
            written = len(history.epochs)
        except Exception as error:  # TensorBoard's own, and whatever its writing thread met
            print(f"warning: no TensorBoard events from here on: {' '.join(str(error).split())}")
            broken = True

    with unfailing_output():
        for row in history.epochs:
            print_row(row, epochs, row is history.epochs[0], None)
        try:
            yield show
        finally:
            with contextlib.suppress(Exception):  # a writer that failed fails once more as it closes
                if writer is not None:
                    writer.close()


def event_writer(folder: Path) -> "SummaryWriter":
    """A writer of a run folder's TensorBoard events, in place of those that were there."""
    from torch.utils.tensorboard import SummaryWriter  # two seconds of imports

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    return SummaryWriter(folder / "tensorboard")


def write_events(writer: "SummaryWriter", row: Epoch, history: History) -> None:
    """One epoch's numbers, and the rate of each of its steps."""
    for part, stats in row.stats().items():
        for metric, value in stats._asdict().items():
            writer.add_scalar(f"{metric}/{part}", value, row.epoch)
    steps = history.steps_per_epoch
    for step in range((row.epoch - 1) * steps, row.epoch * steps):
        writer.add_scalar("lr", history.lrs[step], step)
    writer.flush()
