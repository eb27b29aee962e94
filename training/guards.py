"""What stops a run before it is ruined, or warns: numbers not finite, signals, dead networks."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import data

from utils import EpochState, Stats

# Devices on which PyTorch's fused optimizers leave an update out by the flag of its gradient scaler.
SKIPPING = ("cuda",)
LR_HINT = "a lower --lr may help, or --precision fp32 if the run used another"


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the device itself can skip an update whose loss or gradient is not finite.

    PyTorch's fused CUDA optimizers can: they read a flag on the GPU, the one that PyTorch's gradient
    scaler sets. The CPU then need not wait for the GPU at every step.
    """
    on_gpu = optimizer.param_groups[0]["params"][0].device.type in SKIPPING
    return on_gpu and getattr(optimizer, "_step_supports_amp_scaling", False)


def check_finite(epoch_state: EpochState, scaler: torch.amp.GradScaler, lr: float | None = None) -> None:
    """Stop the training if the loss or the gradient of a step was not finite.

    In fp16 the scaler skips an update whose gradient overflows and halves its scale. That is normal now
    and then, but a scale under one shows that every gradient overflows.

    Args:
        epoch_state: the steps of the epoch so far.
        scaler: of the gradients in fp16.
        lr: the rate of a step that is under way and not counted in `epoch_state` yet, if there is one.

    Raises:
        FloatingPointError: the message names the step; the weights are those before it.
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


def check_answers(logits: torch.Tensor) -> None:
    """Refuse answers that are not numbers: the first class would be taken for the most probable one.

    Raises:
        FloatingPointError: how many there are.
    """
    count = int(torch.isnan(logits).any(1).sum())
    if count:
        raise FloatingPointError(
            f"the network's answers to {count:,} of {len(logits):,} images are not numbers: look for "
            "such values in the images and in the weights"
        )


def check_gradient(loss: torch.Tensor) -> None:
    """Refuse a loss from which no gradient leads to a weight.

    Raises:
        ValueError: what may be the cause.
    """
    if not loss.requires_grad:
        raise ValueError(
            "no gradient leads from the loss to a weight: is there a detach() or a no_grad() in the "
            "model's forward, or is every weight frozen that it uses?"
        )


@contextlib.contextmanager
def statistics_kept_finite(model: nn.Module) -> Iterator[None]:
    """Put back the running statistics of norms that a step with a number that is not finite has spoiled.

    The update of such a step is left out, so that the weights are as before. But its forward pass has
    already moved the running statistics, and a network whose statistics are NaN cannot be evaluated.
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
    """A SIGINT (Ctrl-C) or SIGTERM has ended a run between two updates."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """Lets SIGINT and SIGTERM end a run between two updates, never within one.

    Args:
        agree: where several processes train, a function that tells them all of the signal that one of
            them got. Each then only notes a signal, and they stop together before the next update.
    """

    def __init__(self, agree: Callable[[int | None], int | None] | None = None) -> None:
        self.agree = agree
        self.depth, self.since = 0, 0.0
        self.number: int | None = None
        self.waiting = False  # whether the loop waits for a batch
        self.alarm: threading.Timer | None = None  # sends a deferred signal again

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise `Stopped`; within an update, or while a batch is awaited, note the signal for later."""
        if hasattr(signal, "SIGCHLD"):
            # A Ctrl-C may have ended worker processes, too. PyTorch's SIGCHLD handler would raise an
            # error wherever the program is, even in the middle of an update. Without that handler it
            # notices missing workers when it waits for their next batch.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # PyTorch waits five seconds for each worker that is busy with a batch before it ends it.
        data._utils.MP_STATUS_CHECK_INTERVAL = WORKER_PATIENCE
        if not self.depth and not self.waiting and not self.agree:
            raise Stopped(number)
        now = time.monotonic()
        if self.number is None:
            self.number, self.since = number, now
            if self.waiting and not self.agree:
                self.alarm = threading.Timer(PATIENCE, os.kill, (os.getpid(), number))
                self.alarm.daemon = True
                self.alarm.start()
        elif self.waiting and not self.agree:
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
            # Another process of the run may be gone, in the middle of the update: that must be heard.
            if self.number is None or self.agree:
                raise
            # The signal has also ended a worker process, and PyTorch noticed that during the update.
        finally:
            self.depth -= 1
        if not self.depth and not self.agree:
            self.raise_noted()

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader, of which each can be waited for without missing a signal.

        A signal during the wait is deferred until the batch has come, as a worker process that is left
        in the middle of handing a batch over would print a traceback. After `PATIENCE` seconds the wait
        ends without the batch.
        """
        iterator = iter(loader)
        while True:
            try:
                self.waiting = True
                batch = next(iterator, self)
            except (RuntimeError, OSError, EOFError):
                # The same signal may have ended a worker before it reaches this process: wait for it.
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
        """Raise `Stopped` if a signal was deferred, here or in another process that `agree` asks."""
        number = self.agree(self.number) if self.agree else self.number
        if number is not None:
            self.number = None
            raise Stopped(number)


@contextlib.contextmanager
def signals_noted(agree: Callable[[int | None], int | None] | None = None) -> Iterator[Signals]:
    """A `Signals` that handles SIGINT and SIGTERM; only the main thread can set up such a handler."""
    signals = Signals(agree)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {n: signal.signal(n, signals.handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
