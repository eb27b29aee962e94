"""What stops a run before it is ruined: values that are not finite, signals, dead networks."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import data

from utils import EpochState, Stats

LR_HINT = "a lower --lr may help, or --precision fp32 if the run used another"


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an update can be left out without waiting for the device to say so.

    PyTorch's fused CUDA optimizers can, by the flag that its gradient scaler sets.
    """
    on_gpu = optimizer.param_groups[0]["params"][0].device.type == "cuda"
    return on_gpu and getattr(optimizer, "_step_supports_amp_scaling", False)


def check_finite(epoch_state: EpochState, scaler: torch.amp.GradScaler, lr: float | None = None) -> None:
    """Stop if a step of the epoch, or the one under way at rate `lr`, had a loss or gradient not finite.

    In fp16 the scaler skips an update whose gradient overflows and halves its scale, which is normal now
    and then; a scale under one says that it will not recover.

    Raises:
        FloatingPointError: the weights are those before that step.
    """
    loss, _, finite = epoch_state.totals.tolist()
    if finite < epoch_state.steps + (lr is not None):
        what = "gradient's norm" if math.isfinite(loss) else "loss"
        on_gpu = epoch_state.totals.device.type != "cpu"  # a negative label counts as not finite there
        fault = f"the {what} is not finite" + ", or a label is negative," * on_gpu
    elif scaler.is_enabled() and scaler.get_scale() < 1:
        finite, fault = epoch_state.steps - (lr is None), "the gradient in fp16 keeps overflowing"
    else:
        return
    rates = epoch_state.lrs if lr is None else [*epoch_state.lrs, lr]
    where = f"epoch {epoch_state.epoch}, step {int(finite) + 1}, learning rate {rates[int(finite)]:.4g}"
    raise FloatingPointError(f"{fault} at {where}; stopped before the update; {LR_HINT}")


@contextlib.contextmanager
def statistics_kept_finite(model: nn.Module) -> Iterator[None]:
    """Where a loss that is not finite spoiled a norm's running statistics, put the earlier ones back.

    Such an update leaves the weights as they are, but the forward pass before it has moved the
    statistics, and a network whose statistics are NaN cannot be evaluated.
    """
    before = [(x, x.clone()) for x in model.buffers() if x.is_floating_point()]
    try:
        yield
    except FloatingPointError:
        for buffer, value in before:
            if not torch.isfinite(buffer).all():
                buffer.copy_(value)
        raise


def fault_of(
    lrs: Sequence[float],
    last: bool,
    stats: Stats,
    classes: int,
    predicted: torch.Tensor | np.ndarray | None = None,
) -> str:
    """What shows that a network learned nothing in an epoch at the rates `lrs`; "" if nothing does.

    The loss alone does not: that of a network which overfits can be over that of guessing too.
    """
    if lrs[-1] > lrs[0] and not last:  # the warm-up
        return ""
    if predicted is not None and (predicted == predicted[0]).all():
        return "answers one class for every image"
    chance = math.log(classes)
    guessing = stats.loss >= chance and stats.accuracy < min(2 / classes, 1 / classes + 0.1)
    return f"is no better than guessing (a loss of {chance:.3f})" if guessing else ""


def warn_if_dead(
    epoch_state: EpochState, part: str, stats: Stats, logits: torch.Tensor, last: bool
) -> None:
    """Warn if a network is no better than a constant answer once the warm-up is over."""
    fault = fault_of(epoch_state.lrs, last, stats, logits.shape[1], logits.argmax(1))
    if fault:
        print(f"warning: epoch {epoch_state.epoch}: on {part} images the network {fault}; {LR_HINT}")


PATIENCE = 2.0  # seconds that a batch may still take after a signal
WORKER_PATIENCE = 0.2  # seconds that each worker process then has to end by itself


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM ended a run, between two updates."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """Lets SIGINT and SIGTERM end a run between two updates, never within one."""

    def __init__(self) -> None:
        self.depth, self.since = 0, 0.0
        self.number: int | None = None
        self.waiting = False  # for a batch
        self.alarm: threading.Timer | None = None  # sends a deferred signal again

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise `Stopped`, or note it for the end of what must not be interrupted."""
        if hasattr(signal, "SIGCHLD"):
            # A Ctrl-C may have ended worker processes, too. PyTorch's SIGCHLD handler would raise an
            # error wherever the program is, even in the middle of an update. Without that handler it
            # notices missing workers when it waits for their next batch.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # PyTorch waits five seconds for each worker that is busy with a batch before it ends it.
        data._utils.MP_STATUS_CHECK_INTERVAL = WORKER_PATIENCE
        if not self.depth and not self.waiting:
            raise Stopped(number)
        now = time.monotonic()
        if self.number is None:
            self.number, self.since = number, now
            if self.waiting:
                self.alarm = threading.Timer(PATIENCE, os.kill, (os.getpid(), number))
                self.alarm.daemon = True
                self.alarm.start()
        elif self.waiting:
            self.raise_noted()
        elif number == signal.SIGINT and now - self.since > 1:
            raise KeyboardInterrupt  # a second Ctrl-C ends the run at once, without a checkpoint

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Defer signals to the end of this block, which then raises `Stopped`."""
        self.depth += 1
        try:
            yield
        except RuntimeError:
            if self.number is None:
                raise
            # A worker process got the signal too and ended, which PyTorch has noticed during the update.
        finally:
            self.depth -= 1
        if not self.depth:
            self.raise_noted()

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader. A signal ends the wait for one that does not come within `PATIENCE`.

        Until then it is deferred: a worker process that is left in the middle of handing a batch over
        would print a traceback.
        """
        iterator = iter(loader)
        while True:
            try:
                self.waiting = True
                batch = next(iterator, self)
            except (RuntimeError, OSError, EOFError):
                # A worker may have got the same signal first, and been missed before it came here.
                time.sleep(0.5)
                if self.number is None:
                    raise
            finally:
                self.waiting = False
                if self.alarm is not None:
                    self.alarm.cancel()
            self.raise_noted()
            if batch is self:
                return
            yield batch

    def raise_noted(self) -> None:
        """End the run if a signal was deferred."""
        if self.number is not None:
            number, self.number = self.number, None
            raise Stopped(number)


@contextlib.contextmanager
def signals_noted() -> Iterator[Signals]:
    """A `Signals` in charge of SIGINT and SIGTERM; outside the main thread nothing can be."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {n: signal.signal(n, signals.handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
