"""One run on several processes, started by torchrun: how they divide batches, agree and end together."""

import contextlib
import ctypes
import datetime
import hashlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from checkpoint import Checkpoints
from data import ALONE, BatchLoader, EpochSampler, Part, batch_length, dataset_of
from files import lock_folder, reason, unlock_folder, write_whole

# Seconds that a process waits for the others until training begins: one may fetch the data, or make the
# range test. `wait_less` sets a shorter time for the training itself.
LONG_WAIT = 1800.0

PR_SET_PDEATHSIG = 1  # an option of Linux's prctl

_alone = False  # inside `alone`


class Nowhere(io.StringIO):
    """Takes text and forgets it."""

    def write(self, text: str) -> int:
        """Forget it."""
        return len(text)


class LostError(OSError):
    """Another process of the run is gone, or no longer answers."""


def own_part() -> Part:
    """Which of how many processes this one is."""
    if _alone or not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    return Part(distributed.get_rank(), distributed.get_world_size())


def first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return own_part().rank == 0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What runs in this block works as a run of one process does, on whole batches."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def started_by_torchrun() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the other processes that torchrun started, if there are any, until the end of the block.

    Raises:
        ValueError: the device is neither a CPU nor a CUDA GPU.
    """
    if not started_by_torchrun() or distributed.is_initialized():
        with together():
            yield
        return
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"several processes train on CPUs or CUDA GPUs, not on {device}: --device cpu")
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else a collective would pick cuda:0 in every process
        # NCCL refuses two processes on one GPU.
        own = device.index == int(os.environ.get("LOCAL_RANK", 0))
        backend = "cpu:gloo,cuda:nccl" if own else "cpu:gloo,cuda:gloo"
    follow_torchrun()
    distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=LONG_WAIT))
    with together():
        yield
    # Only where nothing was raised: a process in trouble must not wait for the others.
    distributed.destroy_process_group()


def follow_torchrun() -> None:
    """On Linux, get SIGTERM when torchrun is killed; else its processes would go on without it."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let the first process alone print, and turn the loss of another process into one line.

    Raises:
        ValueError: the processes' group has no backend for the CPU.
        LostError: nothing may be saved then, as an update may be half done.
    """
    check_group()
    with contextlib.redirect_stdout(sys.stdout if first() else Nowhere()):
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            lost = isinstance(error, distributed.DistError) or "gloo" in text or "NCCL" in text
            if own_part().world == 1 or not lost:
                raise
            late = "time" in text.lower()  # "Timed out", "timeout"
            what = "has not answered in time" if late else "is gone"
            raise LostError(f"another process of this run {what}; --resume continues the run") from None


def wait_less(seconds: float) -> None:
    """From now on, take a process that does not answer for so many seconds for lost."""
    if own_part().world == 1:
        return
    set_timeout = getattr(distributed, "set_timeout", None)
    if set_timeout is None:  # before torch 2.15
        set_timeout = distributed.distributed_c10d._set_pg_timeout
    set_timeout(datetime.timedelta(seconds=seconds))


def tells() -> bool:
    """Whether this is the process of its machine that says how the run ended: the first that asks."""
    if not started_by_torchrun():
        return True
    if not distributed.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"
    store, told = distributed.distributed_c10d._get_default_store(), []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):  # the machine that has the store is gone
            told.append(store.add(f"told on {os.environ.get('GROUP_RANK', 0)}", 1))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(3)
    return told in ([], [1])


def check_group() -> None:
    """Refuse a group of processes that cannot talk about tensors on the CPU.

    Raises:
        ValueError: it has a backend for GPUs alone.
    """
    if own_part().world > 1 and "cpu:" not in distributed.get_backend_config():
        raise ValueError(
            f"the process group's backend is {distributed.get_backend()}, for GPUs alone, and processes "
            'agree on the CPU: init_process_group("cpu:gloo,cuda:nccl")'
        )


def meet(number: int | None = None) -> int | None:
    """Wait for all processes, without a GPU's help; the greatest number that one of them brings."""
    if own_part().world == 1:
        return number
    greatest = torch.tensor(number or 0)
    distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
    return int(greatest) or None


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if own_part().world > 1:
        distributed.all_reduce(tensor)
    return tensor


def gather(content: bytes) -> list[bytes]:
    """The bytes of every process; they are not unpickled, so that nothing in them can run."""
    if own_part().world == 1:
        return [content]
    lengths = [torch.zeros((), dtype=torch.int64) for _ in range(own_part().world)]
    distributed.all_gather(lengths, torch.tensor(len(content)))
    longest = max(1, max(map(int, lengths)))
    mine = torch.frombuffer(bytearray(content.ljust(longest, b"\0")), dtype=torch.uint8)
    rows = [torch.empty_like(mine) for _ in lengths]
    distributed.all_gather(rows, mine)
    return [row.numpy().tobytes()[:length] for row, length in zip(rows, lengths, strict=True)]


def spread(content: bytes | None, source: int = 0) -> bytes:
    """One process's bytes, in all of them."""
    if own_part().world == 1:
        return content or b""
    size = torch.tensor(len(content or b""))
    distributed.broadcast(size, source)
    data = torch.empty(int(size), dtype=torch.uint8)
    if own_part().rank == source:
        data = torch.frombuffer(bytearray(content or b""), dtype=torch.uint8)
    distributed.broadcast(data, source)
    return data.numpy().tobytes()


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What raises in one process raises in all of them."""
    error: ValueError | OSError | None = None
    try:
        yield
    except (ValueError, OSError) as raised:
        error = raised
    if own_part().world > 1:
        texts = gather(b"" if error is None else (reason(error) or type(error).__name__).encode())
        if error is None and any(texts):
            error = ValueError(next(filter(None, texts)).decode())
    if error is not None:
        raise error


def from_first(compute: Callable[[], Any]) -> Any:
    """Plain data that the first process computes, alone; its error is everybody's."""
    value = None
    with agreed():
        if first():
            with alone():
                value = compute()
    return value if own_part().world == 1 else json.loads(spread(json.dumps(value).encode()))


def check_same(**facts: Any) -> None:
    """Refuse to train where processes were given different things.

    Raises:
        ValueError: in every process; it says which process differs from the first, and in what.
    """
    if own_part().world == 1:
        return
    first_has, *others = map(json.loads, gather(json.dumps(facts, default=str).encode()))
    for rank, has in enumerate(others, 1):
        names = ", ".join(name for name in facts if has[name] != first_has[name])
        if names:
            raise ValueError(
                f"process {rank} has other {names} than process 0: "
                "give every process the same command and the same data"
            )


def check_same_bits(model: nn.Module, epoch: int) -> None:
    """Stop if weights or buffers differ between processes by one bit.

    Raises:
        RuntimeError: they do; a memory or a link is faulty, or the model draws numbers of its own.
    """
    if own_part().world == 1:
        return
    digest = hashlib.sha256()
    for tensor in (*model.parameters(), *model.buffers()):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    if len(set(gather(digest.digest()))) > 1:
        raise RuntimeError(f"the weights of the processes differ after epoch {epoch}")


@contextlib.contextmanager
def rows_shared(loader: BatchLoader) -> Iterator[None]:
    """In this block one of `make_loader`'s loaders yields this process's rows of each batch."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, EpochSampler):
        yield
        return
    sampler.part = own_part()
    try:
        yield
    finally:
        sampler.part = ALONE


def take_rows(
    loader: Any, number: int, images: Tensor, labels: Tensor
) -> tuple[tuple[Tensor, Tensor], int]:
    """This process's rows of a batch that a loader yielded, and the number of rows in all processes.

    Loaders of `make_loader` yield these rows; any other yields the same whole batch in every process.

    Args:
        number: of the batch, from 0 in each epoch.

    Raises:
        ValueError: another loader yields different batches in different processes.
    """
    if own_part().world == 1:
        return (images, labels), len(labels)
    if isinstance(getattr(loader, "sampler", None), EpochSampler):
        return (images, labels), batch_length(dataset_of(loader), number)
    check_same(**{"labels in a batch": hashlib.sha256(labels.cpu().numpy().tobytes()).hexdigest()})
    rows = own_part().rows(len(labels))
    return (images[rows], labels[rows]), len(labels)


def all_rows(own: Tensor, count: int) -> Tensor:
    """The `count` rows of a batch in all processes, of which this process's lead back to its weights."""
    rows = own_part().rows(count)
    table = own.new_zeros(count, *own.shape[1:])
    table[rows] = own.detach()
    total(table)
    return torch.cat([table[: rows.start], own, table[rows.stop :]])


def whole_rows(logits: list[Tensor], labels: list[Tensor], counts: list[int]) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of all processes in the order of the loader.

    Each row is written by one process, and the others add zero.

    Args:
        logits, labels: of this process's rows of each batch.
        counts: rows of each batch in all processes.
    """
    if own_part().world == 1:
        return torch.cat(logits), torch.cat(labels)
    width = logits[0].shape[1]
    table = torch.zeros(sum(counts), width + 2, device=logits[0].device)
    begin = 0
    for answers, targets, count in zip(logits, labels, counts, strict=True):
        rows = own_part().rows(count)
        if count >= own_part().world or first():  # of fewer rows than processes each has all
            place = table[begin + rows.start : begin + rows.stop]
            place[:, :width], place[:, width], place[:, width + 1] = answers, targets, 1
        begin += count
    total(table)
    if not (table[:, width + 1] == 1).all():
        raise RuntimeError("an image was not counted exactly once")
    return table[:, :width].contiguous(), table[:, width].long()


def start(checkpoints: Checkpoints, parts: dict, *arguments: Any) -> Checkpoints:
    """`Checkpoints.start` in the first process, whose state all the others begin with.

    Returns:
        The checkpoints to go on with. Those of the other processes keep nothing.

    Raises:
        ValueError: as `Checkpoints.start`, in every process.
    """
    world = own_part().world
    if world == 1:
        return checkpoints.start(parts, *arguments)
    check_same(**arguments[0])
    if checkpoints.resume:
        fetch_newest(checkpoints)
    resume, checkpoints = checkpoints.resume, checkpoints if first() else Checkpoints()
    checkpoints.resume, checkpoints.processes = resume and first(), world
    try:
        with agreed():
            checkpoints.start(parts, *arguments)
        buffer = io.BytesIO()
        if first():
            torch.save(checkpoints.state(), buffer)
        content = spread(buffer.getvalue())
        if not first():
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            checkpoints.restore(state, checkpoints.epoch_state.totals.device)
    except BaseException:
        checkpoints.__exit__()
        raise
    checkpoints.resume = resume
    return checkpoints


def save_together(checkpoints: Checkpoints) -> None:
    """Write a checkpoint; no process goes on, or ends, before it is written.

    Once one has ended, torchrun would end the others too.
    """
    checkpoints.save()
    meet()


def fetch_newest(checkpoints: Checkpoints) -> None:
    """Copy a checkpoint to the first process's machine, where another's disk has a newer one."""
    folders = [folder for folder in (checkpoints.folder, checkpoints.mirrored) if folder is not None]
    paths = [path for folder in folders for path in folder.glob("step-*.ckpt")]
    newest = max(paths, key=lambda path: path.name, default=None)
    names = gather(b"" if newest is None else newest.name.encode())
    owner = names.index(max(names))
    if names[owner] == names[0]:
        return
    with agreed():
        content = newest.read_bytes() if newest is not None and own_part().rank == owner else None
    content = spread(content, owner)
    with agreed():
        if first() and checkpoints.run is not None and checkpoints.folder is not None:
            checkpoints.folder.mkdir(parents=True, exist_ok=True)
            newly = lock_folder(checkpoints.run)
            write_whole(checkpoints.folder / names[owner].decode(), content)
            if newly:
                unlock_folder(checkpoints.run)
            print(f"{names[owner].decode()} is copied from the disk of process {owner}")
