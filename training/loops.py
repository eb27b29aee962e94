"""The path of a batch: train, test, predict, and the loop over epochs."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import Checkpoints
from data import BatchLoader, random_state, set_random_state, start_epoch
from training.arguments import any_order
from training.criterion import Criterion, check_criterion, score
from training.distributed import (
    check_same_bits,
    meet,
    own_part,
    rows_shared,
    save_together,
    start,
    take_rows,
    together,
    total,
    whole_rows,
)
from training.guards import (
    Signals,
    Stopped,
    check_answers,
    check_finite,
    check_gradient,
    signals_noted,
    skips_on_device,
    statistics_kept_finite,
    warn_if_dead,
)
from training.inputs import (
    check_batch,
    check_evaluation,
    check_labels,
    check_loader,
    check_logits,
    check_model,
    check_steps_left,
    check_training,
    count_classes,
    evaluation_mode,
    fraction,
    length_of,
    training_mode,
    whole_number,
)
from training.optim import Scheduler, averaging, ema_copy
from training.pictures import Pictures
from training.progress import make_row, progress, training_log
from training.settings import TrainSettings, make_settings, resumable
from training.shared_model import average_buffers, loss_part, prepare_forward
from utils import (
    EpochState,
    History,
    Predictions,
    Stats,
    autocast,
    get_device,
    keep_freed_memory,
    make_scaler,
    pick_precision,
    seeded,
    six_views,
)

# The stream of random numbers for dropout = f(seed, epoch, step); data.py has the other two.
DROPOUT = 2


@dataclass
class TrainState:
    """What changes as a network trains; a checkpoint holds the state of each part."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None  # stepped after every batch
    scaler: torch.amp.GradScaler
    ema_model: nn.Module | None = None  # holds the average of the weights, where there is one
    classes: int | None = None  # that the model tells apart; known from the first batch on
    forward: Callable | None = None  # the model as it is trained: compiled, shared by processes

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds, by name; a scheduler that has no state is left out."""
        parts = {name: part for name, part in vars(self).items() if name != "forward"}
        return {name: part for name, part in parts.items() if hasattr(part, "state_dict")}

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and saved."""
        return self.model if self.ema_model is None else self.ema_model


@any_order
def train(  # noqa: PLR0913
    model: nn.Module,
    device: torch.device | str,
    train_loader: BatchLoader,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None = None,
    criterion: Criterion | None = None,
    epoch: int | None = None,
    *,
    precision: str = "auto",
    label_smoothing: float = 0.0,
    seed: int = 0,
    sync_norm: bool = True,
) -> Stats:
    """Train for one epoch. The first seven arguments may come in any order: their kinds tell them apart.

    Args:
        train_loader: yields images float (N, C, H, W) and labels int64 (N,).
        scheduler: stepped after every batch.
        criterion: of logits (N, K) and labels (N,); none: cross-entropy with `label_smoothing`.
        epoch: which one, from 1; none: the loader's next.
        precision: of the forward pass, as in `pick_precision`.
        seed: of dropout.
        sync_norm: as in `fit_model`.

    Returns:
        Mean loss and accuracy over the epoch, in training mode and as the weights changed.

    Raises:
        FloatingPointError: loss or gradient is not finite; the weights are those before that step.
    """
    device = get_device(device)
    settings = make_settings(
        device, precision, label_smoothing, seed, criterion=criterion, sync_norm=sync_norm
    )
    check_training(model, train_loader, optimizer, scheduler)
    check_steps_left(scheduler, train_loader, 1)
    state = TrainState(model, optimizer, scheduler, make_scaler(device, settings.precision))
    epoch_state = EpochState.of(start_epoch(train_loader, epoch), device)
    with together(), statistics_kept_finite(model), rows_shared(train_loader):
        for _ in train_steps(state, device, train_loader, epoch_state, settings, Signals()):
            pass
    return epoch_state.stats()


def train_steps(
    state: TrainState,
    device: torch.device,
    loader: BatchLoader,
    epoch_state: EpochState,
    settings: TrainSettings,
    signals: Signals,
) -> Generator[None, None, None]:
    """Train on the batches that the epoch of `epoch_state` has left.

    A generator: it yields after each update, so that the caller can save a checkpoint or stop there. No
    signal interrupts an update; one that comes while a batch is waited for ends the wait.
    With a fused optimizer nothing here waits for a GPU but the very first batch and the end of an epoch.
    """
    keep_freed_memory(device)
    model, optimizer = state.model, state.optimizer
    model.to(device).to(memory_format=torch.channels_last)
    training_mode(model)
    if state.scaler.is_enabled() and isinstance(optimizer, torch.optim.SGD):
        # Start the momentum at zero. If fp16 skipped the first update, PyTorch would leave the momentum
        # buffers uninitialised.
        for parameter in model.parameters():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
    began = time.perf_counter() - epoch_state.seconds
    for batch in signals.batches(progress(loader, epoch_state)):
        if state.classes is None:
            state.classes = count_classes(
                model, check_batch(batch)[0], device, settings.precision, settings.criterion
            )
        own, count = take_rows(loader, epoch_state.steps, *check_batch(batch, state.classes))
        images, labels = to_device(*own, device)
        state.forward = prepare_forward(state.forward, model, images, count, settings)
        with signals.held():
            lr = float(optimizer.param_groups[0]["lr"])
            key = [settings.seed, DROPOUT, epoch_state.epoch, epoch_state.steps]
            with seeded(int(np.random.default_rng(key).integers(2**63)), device):
                train_step(state.forward, images, labels, state, epoch_state, settings, count)
            if state.scheduler is not None:
                state.scheduler.step()
            epoch_state.lrs.append(lr)
            epoch_state.images += count
            epoch_state.steps += 1
            epoch_state.seconds = time.perf_counter() - began
        yield
    start_epoch(loader, epoch_state.epoch + 1)
    if not epoch_state.steps:
        raise ValueError("the training loader has no batch")
    check_finite(epoch_state, state.scaler)
    epoch_state.seconds = time.perf_counter() - began  # now that the device has done it all


def train_step(
    forward: Callable,
    images: Tensor,
    labels: Tensor,
    state: TrainState,
    epoch_state: EpochState,
    settings: TrainSettings,
    count: int,
) -> None:
    """One update, whose loss and hits are added to `epoch_state`.

    There is none if the loss or the gradient is not finite, in this step or in an earlier one of the
    epoch. In fp16 the gradient scaler leaves it out. Elsewhere the run stops here (`check_finite`); on a
    GPU, which must not be waited for, the optimizer is told by `found_inf`, and the run stops at the
    end of the epoch. All processes that share the batch of `count` rows do the same.
    """
    optimizer, scaler = state.optimizer, state.scaler
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, settings.precision):
        logits = forward(images)
        loss, factor, counted = loss_part(settings, logits, labels, count)
    check_gradient(loss)
    sound = epoch_state.totals[2] == epoch_state.steps  # totals[2] counts the finite steps
    if labels.device.type != "cpu":  # without waiting: cross-entropy leaves out a label of -100
        sound = sound & (labels >= 0).all()
    if scaler.is_enabled():  # it looks at gradients alone, so make them NaN where the loss is not finite
        loss = loss * torch.where(torch.isfinite(loss.detach()) & sound, 1.0, math.nan)
    scaler.scale(loss if factor == 1 else loss * factor).backward()
    if not settings.sync_norm:
        average_buffers(state.model)
    must_be_finite = loss.detach()
    if not scaler.is_enabled():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
        must_be_finite = must_be_finite + torch.stack(norms).sum()  # which it is if all are
    finite = torch.isfinite(must_be_finite) & sound
    hits = (logits.argmax(1) == labels).sum()
    sums = torch.stack([loss.detach().float() * counted, hits.float(), finite.float()])
    if own_part().world > 1:
        sums[2] = total(sums)[2] == own_part().world  # what is not finite in one process stops all
    epoch_state.totals += sums
    if not skips_on_device(optimizer):
        check_finite(epoch_state, scaler, optimizer.param_groups[0]["lr"])
    elif not scaler.is_enabled():
        vars(optimizer)["found_inf"] = 1 - sums[2]
    scaler.step(optimizer)
    vars(optimizer).pop("found_inf", None)  # left there, it would stop the optimizer's next user
    scaler.update()


@any_order
def test(
    model: nn.Module,
    device: torch.device | str,
    test_loader: BatchLoader,
    criterion: Criterion | None = None,
    *,
    precision: str = "auto",
    tta: bool = False,
) -> Stats:
    """Mean loss and accuracy over every image of a loader, each counted once; arguments in any order.

    Args:
        criterion: of logits (N, K) and labels (N,); none: cross-entropy.
        tta: average the logits of six views of each image, as in `six_views`.

    Raises:
        FloatingPointError: an answer is not a number, and so would be the loss.
    """
    check_model(model)
    check_loader("test", test_loader)
    with together():
        logits, labels = forward_all(model, get_device(device), test_loader, precision, tta)
    check_answers(logits)
    if criterion is not None:
        check_criterion(criterion, logits)
    return score(logits, labels, criterion)


@any_order
def predict(
    model: nn.Module,
    device: torch.device | str,
    loader: BatchLoader,
    *,
    precision: str = "auto",
    tta: bool = False,
) -> Predictions:
    """Class probabilities of every image of a loader, with the images; arguments in any order.

    Images, labels and probabilities are all in the order of this one pass, so they belong together
    even where the loader shuffles.

    Args:
        tta: as in `test`.
    """
    check_model(model)
    check_loader("prediction", loader)
    pictures = Pictures(loader)
    with together():
        logits, labels = forward_all(model, get_device(device), loader, precision, tta, pictures)
    check_answers(logits)
    kept = pictures.kept(len(labels))
    return Predictions(logits.softmax(1).cpu().numpy(), labels.cpu().numpy(), **kept)


def forward_all(  # noqa: PLR0913
    model: nn.Module,
    device: torch.device,
    loader: BatchLoader,
    precision: str,
    tta: bool = False,
    pictures: Pictures | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits float32 (N, K) and labels (N,) of a loader, on the device; every module's mode is kept.

    With a loader of `make_loaders` nothing here waits for a GPU but the very first batch. What passes is
    noted in `pictures`.
    """
    keep_freed_memory(device)
    dtype = pick_precision(precision, device)
    model.to(device).to(memory_format=torch.channels_last)
    logits: list[Tensor] = []
    targets: list[Tensor] = []
    counts: list[int] = []
    batches = loader if pictures is None else pictures.noted(loader)
    with evaluation_mode(model), torch.inference_mode(), autocast(device, dtype), rows_shared(loader):
        for number, batch in enumerate(batches):
            own, count = take_rows(loader, number, *check_batch(batch))
            images, labels = to_device(*own, device)
            views = six_views(images) if tta else [(1.0, images)]
            try:
                answers = [
                    share * check_logits(model(view), len(labels)).float() for share, view in views
                ]
            except (TypeError, ValueError, RuntimeError):
                count_classes(model, images, device, dtype)  # which says in one line what is wrong
                raise
            check_labels(batch[1], answers[0].shape[1])
            logits.append(torch.stack(answers).sum(0))
            targets.append(labels)
            counts.append(count)
    if not logits:
        raise ValueError("the loader has no batch")
    return whole_rows(logits, targets, counts)


@any_order
def fit_model(  # noqa: PLR0913
    model: nn.Module,
    device: torch.device | str,
    train_loader: BatchLoader,
    test_loader: BatchLoader | None,
    optimizer: torch.optim.Optimizer,
    scheduler: Scheduler | None = None,
    epochs: int = 20,
    criterion: Criterion | None = None,
    *,
    val_loader: BatchLoader | None = None,
    precision: str = "auto",
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    seed: int = 0,
    compile: bool = False,
    tta: bool = False,
    sync_norm: bool = True,
    checkpoints: Checkpoints | str | Path | None = None,
) -> History:
    """Train for some epochs, evaluate after each, print one table row for each.

    The first eight arguments may come in any order: their kinds tell them apart, and of two loaders the
    first is trained on.

    Args:
        train_loader: of `make_loader`'s loaders the first epoch is 1 in each call, so that a second
            call trains on the same batches; a `Config` of another seed makes a loader of others.
        test_loader: evaluated after each epoch; None where there is a `val_loader`.
        scheduler: stepped after every batch.
        criterion: of logits (N, K) and labels (N,), for training and evaluation; none: cross-entropy,
            in training with `label_smoothing`.
        ema_decay: of an exponential moving average (EMA) of the weights, such as 0.99. The average is
            evaluated and saved in place of the weights, and copied into the model at the end. 0: none.
        compile: the forward and backward pass of training, as in `compiled`.
        tta: evaluate six views of each image after the last epoch, as in `test`; six times the work.
        sync_norm: where several processes train, normalise over the rows of all of them, as one process
            would; False is quicker, and another training.
        val_loader: evaluated after each epoch instead of the test set, which then is evaluated once,
            after the last.
        checkpoints: a `Checkpoints`, which can continue a run that was stopped, or just the folder for
            them, which must not hold any yet. None: nothing is written.

    Returns:
        One row an epoch, and the learning rate of every step.

    Raises:
        FloatingPointError: a loss or gradient is not finite; what was kept before stays.
        ValueError: the checkpoint is another run's, or there is one that is not to be continued, or
            another process uses the folder.
        Stopped: SIGINT or SIGTERM came; a checkpoint was written first.
        LostError: another process of the run is gone; nothing was written after the step before.
        OSError: the last epoch's files could not be written.
    """
    device, epochs = get_device(device), whole_number("epochs", epochs, 1)
    ema_decay = fraction("ema_decay", ema_decay)
    settings = make_settings(device, precision, label_smoothing, seed, compile, criterion, sync_norm)
    if not isinstance(checkpoints, Checkpoints):
        checkpoints = Checkpoints(checkpoints)
    check_training(model, train_loader, optimizer, scheduler)
    if not checkpoints.resume:  # which brings the schedule's own state
        check_steps_left(scheduler, train_loader, epochs)
    check_evaluation(model, device, settings.precision, val_loader, test_loader, criterion=criterion)
    ema_model = ema_copy(model) if ema_decay else None
    state = TrainState(model, optimizer, scheduler, make_scaler(device, settings.precision), ema_model)
    unchanging = resumable(settings, epochs, ema_decay, length_of(train_loader), own_part().world)
    check = functools.partial(check_finite, scaler=state.scaler)
    draws = functools.partial(random_state, train_loader)
    with (
        together(),
        signals_noted(meet if own_part().world > 1 else None) as signals,
        start(checkpoints, state.parts, unchanging, device, check, draws) as checkpoints,
        training_log(checkpoints.run, checkpoints.history, epochs) as show,
        averaging(optimizer, model, state.evaluated, ema_decay, lambda: checkpoints.steps),
    ):
        try:
            if checkpoints.resume:
                check_steps_left(scheduler, train_loader, epochs, checkpoints.steps)
            while (epoch_state := checkpoints.epoch_state).epoch <= epochs:
                began, last = time.perf_counter() - epoch_state.seconds, epoch_state.epoch == epochs
                train_epoch(state, device, train_loader, checkpoints, settings, signals)
                due = loaders_due(val_loader, test_loader, last)
                stats = evaluate(state, device, due, epoch_state, last, criterion, precision, tta)
                row = make_row(epoch_state, stats, time.perf_counter() - began)
                with signals.held():
                    checkpoints.end_epoch(row)
                show(row, checkpoints.failure is None)
                signals.raise_noted()
        except Stopped:
            with signals.held():
                save_together(checkpoints)
            raise
    checkpoints.raise_failure()
    return checkpoints.history


def train_epoch(
    state: TrainState,
    device: torch.device,
    loader: BatchLoader,
    checkpoints: Checkpoints,
    settings: TrainSettings,
    signals: Signals,
) -> None:
    """What is left of the epoch under way, with a checkpoint now and then."""
    epoch_state = checkpoints.epoch_state
    set_random_state(loader, epoch_state.random)
    start_epoch(loader, epoch_state.epoch, epoch_state.steps)
    steps = train_steps(state, device, loader, epoch_state, settings, signals)
    with statistics_kept_finite(state.model), contextlib.closing(steps), rows_shared(loader):
        for _ in steps:
            checkpoints.save_if_due()


def loaders_due(
    val_loader: BatchLoader | None, test_loader: BatchLoader | None, last: bool
) -> dict[str, BatchLoader]:
    """The loaders to evaluate after an epoch, by part; beside a `val_loader` the test set comes last."""
    due = {"val": val_loader, "test": test_loader if last or val_loader is None else None}
    return {part: loader for part, loader in due.items() if loader is not None}


def evaluate(
    state: TrainState,
    device: torch.device,
    loaders: dict[str, BatchLoader],
    epoch_state: EpochState,
    last: bool,
    criterion: Criterion | None,
    precision: str,
    tta: bool,
) -> dict[str, Stats]:
    """Loss and accuracy of an epoch's training and of each loader; `tta` after the last alone."""
    check_same_bits(state.evaluated, epoch_state.epoch)
    stats = {"train": epoch_state.stats()}
    for part, loader in loaders.items():
        logits, labels = forward_all(state.evaluated, device, loader, precision, tta and last)
        stats[part] = score(logits, labels, criterion)
        plain = stats[part] if criterion is None else score(logits, labels)
        warn_if_dead(epoch_state, part, plain, logits, last)
    return stats


def to_device(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch on the device, images in channels-last memory; free for what is there already."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images, labels.to(device, non_blocking=True)
