"""What is shown while a network trains: bar, table, TensorBoard events."""

import contextlib
import itertools
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from data import BatchLoader, EpochSampler
from training.guards import LR_HINT
from utils import Epoch, EpochState, History, Stats

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def progress(loader: BatchLoader, epoch_state: EpochState) -> tqdm:
    """The batches that an epoch has left; in a terminal and in Colab behind a transient bar."""
    # Our sampler starts at the right batch; of another loader the batches done are passed over.
    ours = isinstance(getattr(loader, "sampler", None), EpochSampler)
    watched = sys.stdout.isatty() or "google.colab" in sys.modules
    return tqdm(
        itertools.islice(loader, 0 if ours else epoch_state.steps, None),
        f"epoch {epoch_state.epoch}",
        len(loader),
        initial=epoch_state.steps,
        leave=False,
        file=sys.stdout,
        disable=not watched,
        mininterval=0.5,
    )


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


def print_row(row: Epoch, header: bool) -> None:
    """One line of the training table, after its head if `header`."""
    stats = row.stats()
    if header:
        heads = "".join(f"{part + ' loss':>12}{'acc':>8}" for part in row.parts)
        print(f"{'epoch':>5}{'lr':>11}{heads}{'seconds':>9}{'images/s':>10}")
    cells = [
        f"{stats[part].loss:>12.4f}{stats[part].accuracy:>8.2%}" if part in stats else f"{'':>20}"
        for part in row.parts
    ]
    times = f"{row.seconds:>9.1f}{row.images_per_second:>10,.0f}"
    print(f"{row.epoch:>5}{row.lr:>11.3g}{''.join(cells)}{times}", flush=True)


@contextlib.contextmanager
def event_log(folder: Path | None, history: History) -> Iterator[Callable[[], None]]:
    """A function that brings a run folder's TensorBoard events, if there is one, up to date.

    They are written anew when a run is continued: what a killed run left may lack some or have more.
    """
    writers: list[SummaryWriter] = []

    def update() -> None:
        if folder is None:
            return
        rows = history.epochs[-1:]
        if not writers:
            from torch.utils.tensorboard import SummaryWriter  # two seconds of imports

            path, rows = folder / "tensorboard", history.epochs
            shutil.rmtree(path, ignore_errors=True)
            writers.append(SummaryWriter(path))
        for row in rows:
            write_events(
                writers[0], row, history.lrs[: row.epoch * len(history.lrs) // len(history.epochs)]
            )

    try:
        yield update
    finally:
        for writer in writers:
            writer.close()


def write_events(writer: "SummaryWriter", row: Epoch, lrs: list[float]) -> None:
    """One epoch's numbers, and the rate of each of its steps, which are the last of `lrs`."""
    for part, stats in row.stats().items():
        for metric, value in stats._asdict().items():
            writer.add_scalar(f"{metric}/{part}", value, row.epoch)
    for step in range(len(lrs) - len(lrs) // row.epoch, len(lrs)):
        writer.add_scalar("lr", lrs[step], step)
    writer.flush()
