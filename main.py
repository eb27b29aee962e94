"""Trains, tests, fits and predicts; the command line of the package.

python main.py --recipe quick              train, and write a report
python main.py test RUN                    evaluate a run folder or a weights file
python main.py predict IMAGE...            classes and probabilities of image files
python main.py find-lr --recipe quick      the range test alone
python main.py report RUN                  write a run's report again
python main.py compare RUN RUN...          a table of runs, and their curves in one figure
python main.py export RUN                  an ONNX file (or --format torch) that answers the same
"""

import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import Checkpoints, check_same_run, load_checkpoint, load_weights
from config import CHOICES, PLACES, Config, choose, make_parser, parse_config
from data import EpochSampler, Loaders, Split, load_split, make_loader, make_loaders, read_image
from files import lock_folder, reason, unlocked_on_error, write_whole
from models import MODELS, make_model
from transforms import normalize, test_transform
from utils import (
    Epoch,
    History,
    LRFinderResult,
    Predictions,
    Stats,
    Tally,
    autocast,
    environment,
    find_lr,
    get_device,
    keep_freed_memory,
    make_scaler,
    name_of,
    one_cycle,
    pick_precision,
    read_finder,
    seed_everything,
    summarize,
)

# The stream of random numbers for dropout = f(seed, epoch, step); data.py has the other two.
DROPOUT = 2
DEFAULT_WEIGHTS = "custom_resnet"  # the weights that a command takes if none are named
MOMENTUM = 0.9
SGD_SHARE = 8  # of Muon's rate: 0.4 to 0.05, the best of a few for ResNet18
CURE = "a lower --lr may help, or --precision fp32 where it is not"


def train(
    model: nn.Module,
    device: torch.device,
    train_loader,
    optimizer: torch.optim.Optimizer,
    scheduler=None,
    *,
    epoch: int | None = None,
    precision: str = "auto",
    label_smoothing: float = 0.0,
    seed: int = 0,
    max_batches: int | None = None,
) -> Stats:
    """Train for one epoch with cross-entropy.

    Args:
        train_loader: yields images float (N, C, H, W) and labels int64 (N,).
        scheduler: stepped after every batch.
        epoch: which one, from 1; none: the loader's next.
        precision: of the forward pass, as in `pick_precision`.
        seed: of dropout.
        max_batches: stop after so many.

    Returns:
        Mean loss and accuracy over the epoch, in training mode and as the weights changed.

    Raises:
        FloatingPointError: loss or gradient is not finite; the weights are those before that step.
    """
    device = torch.device(device)
    tally = Tally.of(start_epoch(train_loader, epoch), device)
    scaler = make_scaler(device, pick_precision(precision, device))
    options = {"precision": precision, "label_smoothing": label_smoothing, "seed": seed}
    for _ in train_steps(
        model, device, train_loader, optimizer, scheduler, scaler, tally, max_batches, **options
    ):
        pass
    return tally.stats()


def train_steps(
    model,
    device: torch.device,
    loader,
    optimizer,
    scheduler,
    scaler,
    tally: Tally,
    max_batches: int | None,
    *,
    precision: str,
    label_smoothing: float,
    seed: int,
    compile: bool = False,
) -> Iterator[None]:
    """The rest of the epoch that `tally` counts, one update at a time; yields between them.

    With a fused optimizer nothing here waits for a GPU but the very first batch and the end of an epoch.
    """
    keep_freed_memory(device)
    dtype = pick_precision(precision, device)
    model.to(device, memory_format=torch.channels_last).train()
    forward = torch.compile(model) if compile else model
    if scaler.is_enabled() and isinstance(optimizer, torch.optim.SGD):
        # Else a first update that is skipped leaves whatever was in memory as momentum.
        for parameter in model.parameters():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
    began = time.perf_counter() - tally.seconds
    for images, labels in progress(loader, tally, max_batches):
        if not tally.steps and tally.epoch == 1:
            check_batch(model, images, labels, device, dtype)
        images, labels = to_device(images, labels, device)
        lr = optimizer.param_groups[0]["lr"]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            key = [seed, DROPOUT, tally.epoch, tally.steps]
            torch.manual_seed(int(np.random.default_rng(key).integers(2**63)))
            train_step(forward, images, labels, optimizer, scaler, tally, dtype, label_smoothing)
        if scheduler is not None:
            scheduler.step()
        tally.lrs.append(lr)
        tally.images += len(labels)
        tally.steps += 1
        tally.seconds = time.perf_counter() - began
        yield
    start_epoch(loader, tally.epoch + 1)
    if not tally.steps:
        raise ValueError("the training loader has no batch")
    check_finite(tally, scaler)
    tally.seconds = time.perf_counter() - began  # now that the device has done it all


def check_batch(model, images: torch.Tensor, labels: torch.Tensor, device, dtype) -> None:
    """Refuse an epoch's first batch if no sense can be made of it; cross-entropy would skip a -100.

    Raises:
        ValueError: wrong types, shapes, or a label that is no class; one line.
    """
    kinds = f"{images.dtype} {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
    if not images.is_floating_point() or images.dim() != 4 or labels.dtype != torch.int64:
        raise ValueError(f"a batch must be float (N, C, H, W) and int64 (N,), not {kinds}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"a batch needs one label an image, not {kinds}")
    model.eval()
    with torch.no_grad(), autocast(device, dtype):
        classes = model(images[:1].to(device)).shape[1]
    model.train()
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, not {low} to {high}")


def train_step(
    forward, images, labels, optimizer, scaler, tally: Tally, dtype, label_smoothing: float
) -> None:
    """One update, added to `tally`; none if loss or gradient is not finite, now or before."""
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, dtype):
        logits = forward(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    sound = torch.isfinite(loss.detach()) & (tally.totals[2] == tally.steps)
    if scaler.is_enabled():  # it skips by the gradient alone: make that what the loss was before
        loss = loss * torch.where(sound, 1.0, math.nan)
    scaler.scale(loss).backward()
    if not scaler.is_enabled():
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
        sound = sound & torch.isfinite(norm)
    hits = (logits.argmax(1) == labels).sum()
    sums = torch.stack([loss.detach().float() * len(labels), hits.float(), sound.float()])
    tally.totals += sums
    if not skips_on_device(optimizer):
        check_finite(tally, scaler, optimizer.param_groups[0]["lr"])
    elif not scaler.is_enabled():
        optimizer.found_inf = 1 - sums[2]
    scaler.step(optimizer)
    vars(optimizer).pop("found_inf", None)  # which would stop whoever uses the optimizer next
    scaler.update()


def skips_on_device(optimizer) -> bool:
    """Whether an update can be left out without waiting for the device to say so.

    PyTorch's fused CUDA optimizers can, by the flag that its gradient scaler sets.
    """
    on_gpu = optimizer.param_groups[0]["params"][0].device.type == "cuda"
    return on_gpu and getattr(optimizer, "_step_supports_amp_scaling", False)


def check_finite(tally: Tally, scaler, lr: float | None = None) -> None:
    """Stop if a step of the epoch, or the one under way at rate `lr`, had a loss or gradient not finite.

    In fp16 the scaler skips such an update and halves its scale, which is normal now and then; a scale
    under one says that it will not recover.

    Raises:
        FloatingPointError: the weights are those before that step.
    """
    loss, _, sound = tally.totals.tolist()
    if sound < tally.steps + (lr is not None):
        what = "gradient's norm" if math.isfinite(loss) else "loss"
        fault = f"the {what} is not finite"
    elif scaler.is_enabled() and scaler.get_scale() < 1:
        sound, fault = tally.steps - (lr is None), "the gradient in fp16 keeps overflowing"
    else:
        return
    rates = tally.lrs if lr is None else [*tally.lrs, lr]
    where = f"epoch {tally.epoch}, step {int(sound) + 1}, learning rate {rates[int(sound)]:.4g}"
    raise FloatingPointError(f"{fault} at {where}; stopped before the update; {CURE}")


def test(
    model: nn.Module,
    device: torch.device,
    test_loader,
    *,
    precision: str = "auto",
    tta: bool = False,
    max_batches: int | None = None,
) -> Stats:
    """Mean cross-entropy and accuracy over every image of a loader, each counted once.

    Args:
        tta: average the logits of each image with those of its mirror image.
    """
    return score(*forward_all(model, device, test_loader, precision, max_batches, tta))


def score(logits: torch.Tensor, labels: torch.Tensor) -> Stats:
    """Mean cross-entropy and accuracy of logits (N, K) against labels (N,)."""
    hits = (logits.argmax(1) == labels).sum().item()
    return Stats(F.cross_entropy(logits, labels).item(), hits / len(labels))


def predict(
    model: nn.Module,
    device: torch.device,
    loader,
    *,
    precision: str = "auto",
    tta: bool = False,
    max_batches: int | None = None,
) -> Predictions:
    """Class probabilities of every image of a loader, in its order; `tta` as in `test`."""
    logits, labels = forward_all(model, device, loader, precision, max_batches, tta)
    return Predictions(logits.softmax(1).cpu().numpy(), labels.cpu().numpy())


def predict_images(
    model: nn.Module, device: torch.device, images: np.ndarray, card: dict, precision: str | None = None
) -> np.ndarray:
    """Class probabilities (N, K) of images uint8 (N, H, W, 3), as the run of a weights' card judges.

    Args:
        precision: another than the run's.
    """
    inputs = normalize(images, card["mean"], card["std"])
    batch = [(inputs, torch.zeros(len(inputs), dtype=torch.int64))]
    config = card.get("config", {})
    precision = precision or config.get("precision", "auto")
    return predict(model, device, batch, precision=precision, tta=config.get("tta", False)).probabilities


def forward_all(model, device, loader, precision: str, max_batches: int | None, tta: bool = False):
    """Logits float32 (N, K) and labels (N,) of a loader, on the device; the model's mode is kept."""
    device = torch.device(device)
    keep_freed_memory(device)
    dtype = pick_precision(precision, device)
    training = model.training
    model.to(device, memory_format=torch.channels_last).eval()
    logits, targets = [], []
    with torch.inference_mode(), autocast(device, dtype):
        for images, labels in itertools.islice(loader, max_batches):
            images, labels = to_device(images, labels, device)
            views = [images, images.flip(-1)] if tta else [images]
            logits.append(sum(model(view).float() for view in views) / len(views))
            targets.append(labels)
    model.train(training)
    return torch.cat(logits), torch.cat(targets)


def fit_model(
    model: nn.Module,
    device: torch.device,
    train_loader,
    test_loader,
    optimizer: torch.optim.Optimizer,
    scheduler=None,
    epochs: int = 20,
    *,
    val_loader=None,
    precision: str = "auto",
    label_smoothing: float = 0.0,
    average: float = 0.0,
    seed: int = 0,
    compile: bool = False,
    tta: bool = False,
    max_train_batches: int | None = None,
    max_test_batches: int | None = None,
    folder: str | Path | None = None,
    card: dict | None = None,
    resume: bool = False,
    mirror: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
) -> History:
    """Train for some epochs, evaluate after each, print one table row for each.

    Args:
        scheduler: stepped after every batch.
        average: what a running average of the weights keeps at each step, such as 0.99; it is judged and
            kept instead of the weights, and the model's at the end. 0: no average.
        compile: the forward and backward pass of training, by `torch.compile`.
        tta: judge as in `test`, with mirror images.
        val_loader: judged after each epoch instead of the test set, which then is looked at once,
            after the last.
        folder: where checkpoints, history, TensorBoard events and, if there is a `card`, weights go.
        card: goes with the weights, see `save_weights`.
        resume: continue from the newest whole checkpoint in `folder` or `mirror`, if there is one. The
            result is that of an uninterrupted run, bit for bit, on the same versions and device.
        mirror: a second folder for checkpoints.
        checkpoint_seconds: between checkpoints within an epoch; there is one after each epoch too.

    Returns:
        One row an epoch, and the learning rate of every step.

    Raises:
        FloatingPointError: a loss or gradient is not finite; what was kept before stays.
        ValueError: the checkpoint is another run's, or there is one and `resume` is off, or another
            process uses `folder`.
        Stopped: SIGINT or SIGTERM came; a checkpoint was written first.
        OSError: the last epoch's files could not be written.
    """
    device = torch.device(device)
    model.to(device, memory_format=torch.channels_last)
    judged = average_of(model) if average else model
    scaler = make_scaler(device, pick_precision(precision, device))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    parts["average"] = judged if average else None
    options = {"precision": precision, "label_smoothing": label_smoothing, "seed": seed}
    options["compile"] = compile
    facts = facts_of(device, train_loader, max_train_batches, epochs=epochs, average=average, **options)
    check = functools.partial(check_finite, scaler=scaler)
    kept = Checkpoints(folder, parts, card, facts, mirror, checkpoint_seconds, check)
    training = (model, device, train_loader, optimizer, scheduler, scaler)
    judging = (judged, device, val_loader, test_loader, epochs, precision, max_test_batches, tta)
    with (
        signals_noted() as signals,
        kept.start(resume, device),
        event_log(folder, kept.history) as update_events,
        averaging(optimizer, model, judged, average, kept),
    ):
        try:
            while kept.tally.epoch <= epochs:
                start = time.perf_counter() - kept.tally.seconds
                start_epoch(train_loader, kept.tally.epoch, kept.tally.steps)
                steps = train_steps(*training, kept.tally, max_train_batches, **options)
                for _ in signals.between(steps):
                    kept.save_if_due()
                row = evaluate(*judging, kept.tally, start)
                with signals.held():
                    kept.end_epoch(row)
                print_row(row, header=len(kept.history.epochs) == 1)
                if folder is not None and kept.failure is None:  # events are a view of the history
                    update_events()
        except Stopped:
            with signals.held():
                kept.save()
            raise
    if kept.failure:
        raise kept.failure
    return kept.history


def average_of(model: nn.Module) -> nn.Module:
    """A copy of a model to average its weights in, sharing what cannot be averaged: counts."""
    counts = {id(x): x for x in model.buffers() if not x.is_floating_point()}
    return copy.deepcopy(model, counts)


@contextlib.contextmanager
def averaging(optimizer, model: nn.Module, averaged: nn.Module, decay: float, kept: Checkpoints):
    """Move `averaged`, its buffers too, towards `model` after each update; put it into `model` at last.

    A part of the update itself: nothing can come between the two. The first t updates weigh as much as
    in their mean, until that keeps more than `decay`: no first weights stay. A decay of 0 does nothing.
    """
    if not decay:
        yield
        return
    pairs = zip(averaged.state_dict().values(), model.state_dict().values(), strict=True)
    old, new = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)

    def move(*_) -> None:
        share = kept.steps / (kept.steps + 1)
        get_ema_multi_avg_fn(min(decay, share))(old, new, None)

    handle = optimizer.register_step_post_hook(move)
    try:
        yield
    finally:
        handle.remove()
    model.load_state_dict(averaged.state_dict())


def facts_of(device, loader, max_batches, *, precision, **options) -> dict:
    """What must be the same when a training is continued; the precision as the device resolves it."""
    return {
        "precision": name_of(pick_precision(precision, device)),
        **options,
        "steps_per_epoch": min(len(loader), max_batches or len(loader)),
    }


def evaluate(
    model,
    device,
    val_loader,
    test_loader,
    epochs,
    precision,
    max_batches,
    tta,
    tally: Tally,
    start: float,
) -> Epoch:
    """Judge the weights at the end of an epoch that began at `start`, and put its row together."""
    stats = {"train": tally.stats()}
    loaders = {"val": val_loader, "test": test_loader}
    if val_loader is None or tally.epoch < epochs:
        del loaders["val" if val_loader is None else "test"]
    for part, loader in loaders.items():
        logits, labels = forward_all(model, device, loader, precision, max_batches, tta)
        stats[part] = score(logits, labels)
        warn_if_dead(tally, part, stats[part], logits, last=tally.epoch == epochs)
    seconds, speed = time.perf_counter() - start, tally.images / tally.seconds
    return make_row(tally.epoch, tally.lrs[-1], stats, seconds, speed)


def warn_if_dead(tally: Tally, part: str, stats: Stats, logits: torch.Tensor, last: bool) -> None:
    """Say so if, with the warm-up over, a network knows no more than a constant answer would."""
    if tally.lrs[-1] > tally.lrs[0] and not last:
        return
    chance = math.log(logits.shape[1])
    if len(logits.argmax(1).unique()) == 1:
        print(f"warning: epoch {tally.epoch} predicts one class for every {part} image; {CURE}")
    elif stats.loss >= chance:
        print(
            f"warning: after epoch {tally.epoch} the {part} loss is {stats.loss:.3f}, no better than "
            f"guessing ({chance:.3f}); {CURE}"
        )


def make_optimizer(
    name: str, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0, head_rate: float = 1.0
) -> torch.optim.Optimizer:
    """Adam, AdamW (betas 0.9, 0.999), SGD with Nesterov momentum 0.9, or Muon, by name; fused kernels.

    Args:
        lr: with Muon that of what it moves; norms, biases and the last layer have SGD_SHARE times it.
        weight_decay: on the weights of convolutions and linear layers, not on norms and biases; with
            Muon not on the last linear layer either.
        head_rate: rate of the last linear layer, as a share of the others'; it decays as they do. The
            square of s trains as if logits were multiplied by s; Page has 1/8.
    """
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    head = [p for module in last for p in module.parameters() if head_rate != 1 or name == "muon"]
    body = [p for p in model.parameters() if not any(p is other for other in head)]
    coupled = name == "adam"  # its penalty is scaled with the gradient; elsewhere the rate multiplies it
    groups = [
        {
            "params": [p for p in part if (p.dim() > 1) is matrix],
            "weight_decay": weight_decay / (1 if coupled else share) if matrix else 0.0,
            "share": share,
            "lr": lr * share,
        }
        for part, share in ((body, 1.0), (head, head_rate))
        for matrix in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    common = {"params": groups, "lr": lr, "fused": True}
    if name == "muon":
        for group in groups[1:]:
            share = group["share"] * SGD_SHARE
            group.update(share=share, lr=lr * share, weight_decay=0.0)
        groups[0].update(momentum=0.0, nesterov=False, orthogonal=True)
    if name in ("sgd", "muon"):
        kind = Muon if name == "muon" else torch.optim.SGD
        return kind(**common, momentum=MOMENTUM, nesterov=True)
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(**common, betas=(0.9, 0.999))
    choose("optimizer", name, CHOICES["optimizer"])


class Muon(torch.optim.SGD):
    """SGD, but matrices move by their momentum made orthogonal: kellerjordan.github.io/posts/muon.

    So it learns all directions at one speed, not only those of large gradients. A kernel is a matrix of
    (outputs, inputs x height x width). The groups with "orthogonal" move so, with Nesterov momentum kept
    here (SGD's own is 0 for them) and a decoupled decay; the others as in SGD. PyTorch's Muon takes no
    kernels.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """One update, on the device alone: where a gradient scaler's flag says so, nothing moves."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        turned = [p for group in self.param_groups if group.get("orthogonal") for p in group["params"]]
        for p in turned:
            if p.grad is None:
                continue
            gradient = p.grad if scale is None else p.grad / scale
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            old = self.state[p]["momentum_buffer"]
            new = MOMENTUM * old + gradient
            matrix = orthogonal((gradient + MOMENTUM * new).flatten(1)).view_as(p)
            old.copy_(new if skip is None else torch.where(skip > 0, old, new))
            p.grad.copy_(matrix if scale is None else matrix * scale)
        inspect.unwrap(torch.optim.SGD.step)(self)  # without the hooks, which this step has run already
        return loss


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About the nearest orthogonal matrix, its singular values 0.7 to 1.2, by Newton-Schulz iteration.

    Five steps of the odd polynomial that Jordan chose, in the device's fastest number format.
    """
    x = (matrix / matrix.norm().clamp(min=1e-30)).to(pick_precision("auto", matrix.device))
    tall = len(x) > len(x.T)
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        even = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, even, x, beta=3.4445)
    return x.T if tall else x


def to_device(images, labels, device: torch.device):
    """A batch on the device, images in channels-last memory; free for what is there already."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images, labels.to(device, non_blocking=True)


def start_epoch(loader, epoch: int | None, first: int = 0) -> int:
    """Make a loader's next pass that of `epoch`, if it knows epochs; return the epoch."""
    sampler = getattr(loader, "sampler", None)
    if epoch is None:
        return getattr(sampler, "epoch", 1)
    if isinstance(sampler, EpochSampler):
        sampler.set_epoch(epoch, first)
    elif hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return epoch


def progress(loader, tally: Tally, max_batches: int | None):
    """The batches that an epoch has left, behind a bar that leaves no trace; none if nobody watches."""
    sampler = getattr(loader, "sampler", None)
    total = sampler.batches if isinstance(sampler, EpochSampler) else len(loader)
    total = min(total, max_batches or total)
    # Our sampler starts at the right batch; of another loader the batches done are passed over.
    done = 0 if isinstance(sampler, EpochSampler) else tally.steps
    watched = sys.stdout.isatty() or "google.colab" in sys.modules
    return tqdm(
        itertools.islice(loader, done, total - tally.steps + done),
        f"epoch {tally.epoch}",
        total,
        initial=tally.steps,
        leave=False,
        file=sys.stdout,
        disable=not watched,
        mininterval=0.5,
    )


def make_row(epoch: int, lr: float, stats: dict[str, Stats], seconds: float, speed: float) -> Epoch:
    """An `Epoch` from the stats of each part that was measured.

    Raises:
        FloatingPointError: one of them is not finite, as after an update that ruined the weights.
    """
    for part, (loss, _) in stats.items():
        if not math.isfinite(loss):
            raise FloatingPointError(f"the {part} loss is {loss} after epoch {epoch}; {CURE}")
    columns = {f"{part}_{name}": x for part, s in stats.items() for name, x in s._asdict().items()}
    return Epoch(epoch=epoch, lr=lr, seconds=seconds, images_per_second=speed, **columns)


def print_row(row: Epoch, header: bool) -> None:
    """One line of the training table, after its head if `header`."""
    stats = row.stats()
    parts = ["train", "val", "test"] if "val" in stats else ["train", "test"]
    if header:
        heads = "".join(f"{part + ' loss':>12}{'acc':>8}" for part in parts)
        print(f"{'epoch':>5}{'lr':>11}{heads}{'seconds':>9}{'images/s':>10}")
    cells = [
        f"{stats[part].loss:>12.4f}{stats[part].accuracy:>8.2%}" if part in stats else f"{'':>20}"
        for part in parts
    ]
    times = f"{row.seconds:>9.1f}{row.images_per_second:>10,.0f}"
    print(f"{row.epoch:>5}{row.lr:>11.3g}{''.join(cells)}{times}", flush=True)


@contextlib.contextmanager
def event_log(folder: str | Path | None, history: History):
    """A function that brings a run folder's TensorBoard events up to date with the history.

    They are written anew when a run is continued: what a killed run left may lack some or have more.
    """
    writers = []

    def update() -> None:
        rows = history.epochs[-1:]
        if not writers:
            from torch.utils.tensorboard import SummaryWriter  # two seconds of imports

            path, rows = Path(folder) / "tensorboard", history.epochs
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


def write_events(writer, row: Epoch, lrs: list[float]) -> None:
    """One epoch's numbers, and the rate of each of its steps, which are the last of `lrs`."""
    for part, stats in row.stats().items():
        for metric, value in stats._asdict().items():
            writer.add_scalar(f"{metric}/{part}", value, row.epoch)
    for step in range(len(lrs) - len(lrs) // row.epoch, len(lrs)):
        writer.add_scalar("lr", lrs[step], step)
    writer.flush()


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM ended a run, between two updates."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """Lets SIGINT and SIGTERM end a run between two updates, never within one."""

    def __init__(self):
        self.depth, self.number, self.since = 0, None, 0.0

    def handle(self, number: int, frame) -> None:
        """Raise `Stopped`, or note it for the end of what must not be interrupted."""
        if hasattr(signal, "SIGCHLD"):
            # Workers may have got the signal too. PyTorch would raise that anywhere, in mid-update too;
            # without its handler it finds them missing when it waits for a batch.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not self.depth:
            raise Stopped(number)
        now = time.monotonic()
        if self.number is None:
            self.number, self.since = number, now
        elif number == signal.SIGINT and now - self.since > 1:
            raise KeyboardInterrupt  # asked twice: at once, and without a checkpoint of half an update

    @contextlib.contextmanager
    def held(self):
        """What runs in here is not interrupted."""
        self.depth += 1
        try:
            yield
        except RuntimeError:
            if self.number is None:
                raise
            # A worker process got the signal too, and was missed before the update.
        finally:
            self.depth -= 1
        if not self.depth and self.number is not None:
            number, self.number = self.number, None
            raise Stopped(number)

    def between(self, steps: Iterator[None]) -> Iterator[None]:
        """The same steps, each of them held, and their worker processes ended whatever happens."""
        try:
            while True:
                with self.held():
                    if next(steps, self) is self:
                        return
                yield
        finally:
            steps.close()


@contextlib.contextmanager
def signals_noted():
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


def run(config: Config) -> Path:
    """Train as `config` says and write the run folder.

    Returns:
        The folder, whose report.md tells the rest.

    Raises:
        ValueError, OSError: the run cannot start; one line that says why.
        FloatingPointError: the loss became not finite; what the folder holds is from before.
    """
    return carry_out(config, *prepare(config))


def prepare(config: Config) -> tuple[torch.device, Loaders, nn.Module, torch.optim.Optimizer, Path]:
    """Device, loaders, model, optimizer and folder of a run; the folder is made last."""
    device = get_device(config.device)
    loaders = make_loaders(config, device)
    seed_everything(config.seed, config.deterministic)
    model = make_model(config.model, len(loaders.classes), **config.model_options)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(config.optimizer, model, config.lr or 1e-3, **config.optimizer_options)
    return device, loaders, model, optimizer, open_run(config, device, loaders, model)


def open_run(config: Config, device: torch.device, loaders: Loaders, model: nn.Module) -> Path:
    """Make the run folder and write what the run is: configuration, machine, network.

    Raises:
        ValueError: `config.output` holds something already, or, with `config.resume`, another run, or
            another process uses it; it is left as it was.
    """
    for place in filter(None, (config.output, config.mirror)):
        if Path(place).exists() and not Path(place).is_dir():
            raise ValueError(f"{place} is not a folder")
    if config.resume:
        lock_folder(config.output)
        with unlocked_on_error(config.output):
            state = load_checkpoint(Path(config.output) / "checkpoints", config.mirror)
            if state is not None:
                check_same_run(state.get("card"), make_card(config, loaders))
    folder = claim_folder(config)
    lock_folder(folder)
    path = folder / "config.json"
    before = {}
    with contextlib.suppress(OSError, ValueError):  # absent or damaged: written anew below
        before = json.loads(path.read_text(encoding="utf-8"))
    if any(before.get(name) != value for name, value in config.identity.items()):
        (folder / "lr_finder.json").unlink(missing_ok=True)  # of another run, which left no checkpoint
    write_whole(path, json.dumps(asdict(config), indent=1))
    if not (folder / "environment.json").exists():  # of where the run began
        write_whole(folder / "environment.json", json.dumps(environment(device), indent=1))
    write_whole(folder / "summary.txt", summarize(model, config.image_size))
    dtype = name_of(pick_precision(config.precision, device))
    print(f"{config.model} on {config.dataset}, {device}, {dtype}, seed {config.seed}, in {folder}")
    return folder


def claim_folder(config: Config) -> Path:
    """A folder that no other run has: `config.output`, or a new one named after model, data and time."""
    if config.output:
        folder = Path(config.output)
        if not config.resume and folder.exists() and any(folder.iterdir()):
            raise ValueError(f"output {folder} is there already; --resume it, or choose another")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = f"{config.model}-{config.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    for ending in itertools.chain([""], (f"-{k}" for k in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            folder = Path("runs", name + ending)
            folder.mkdir(parents=True)
            return folder


def carry_out(config: Config, device, loaders: Loaders, model, optimizer, folder: Path) -> Path:
    """Find the rate, train, and report, in a run folder that is open."""
    found = None
    if config.lr is None:
        found = range_test(config, device, loaders, model, optimizer, folder)
    scheduler = make_scheduler(config, loaders, optimizer, found)
    fit_model(
        model,
        device,
        loaders.train,
        loaders.test,
        optimizer,
        scheduler,
        config.epochs,
        val_loader=loaders.validation,
        folder=folder,
        card=make_card(config, loaders),
        **config.fit_options,
    )
    report_run(config, device, loaders, model, folder)
    return folder


def range_test(
    config: Config, device, loaders: Loaders, model, optimizer, folder: Path
) -> LRFinderResult:
    """`find_lr` as the run trains; the result is printed and kept as lr_finder.json.

    A run that is continued has it already.
    """
    kept = read_finder(folder) if config.resume else None
    if kept:
        return kept
    found = find_lr(
        model,
        device,
        loaders.train,
        optimizer,
        precision=config.precision,
        label_smoothing=config.label_smoothing,
    )
    write_whole(folder / "lr_finder.json", json.dumps(asdict(found)))
    suggested = [f"{rule} {rate:.3g}" for rule, rate in found.suggestions.items()]
    print(f"range test, {len(found.lrs)} steps: {', '.join(suggested)}")
    return found


def make_scheduler(config: Config, loaders: Loaders, optimizer, found: LRFinderResult | None):
    """Set the rate, given or found; returns the optimizer's scheduler, or None for a constant rate."""
    steps = min(len(loaders.train), config.max_train_batches or len(loaders.train))
    scheduler = schedule(config, optimizer, found, config.epochs, steps)
    if scheduler is not None:
        group = optimizer.param_groups[0]
        print(f"one-cycle from {group['lr']:.3g} to {group['max_lr']:.3g} and down")
    return scheduler


def schedule(config: Config, optimizer, found: LRFinderResult | None, epochs: int, steps: int):
    """`make_scheduler` for so many epochs of so many steps.

    A found schedule starts at `start` or at a tenth of its peak, whichever is less.
    """
    high = config.lr or found.suggestions[config.lr_rule]
    if config.scheduler == "none":
        for group in optimizer.param_groups:
            group["lr"] = high * group.get("share", 1.0)
        return None
    low = None if config.lr else min(found.suggestions["start"], high / 10)
    peak = config.peak_epoch
    return one_cycle(optimizer, high, min_lr=low, epochs=epochs, steps_per_epoch=steps, peak_epoch=peak)


def make_card(config: Config, loaders: Loaders) -> dict:
    """What goes with the weights, so that they can be used without the run."""
    return {
        "model": config.model,
        "options": config.model_options,
        "image_size": config.image_size,
        "classes": list(loaders.classes),
        **{name: list(values) for name, values in loaders.normalization.items()},
        "data_sha256": loaders.train.dataset.split.digest(),
        "test_sha256": loaders.test.dataset.split.digest(),
        "augmentation": loaders.train.dataset.describe(),
        "config": config.identity,
    }


def report_run(config: Config, device, loaders: Loaders, model, folder: Path) -> None:
    """Predict the test set and write the run's report, then say where it is."""
    from report import write_report  # matplotlib takes a second, which a short command need not wait

    options = {"precision": config.precision, "tta": config.tta, "max_batches": config.max_test_batches}
    predictions = predict(model, device, loaders.test, **options)
    path = write_report(folder, model, loaders, predictions)
    images = f"{len(predictions.labels):,} images" + ", each with its mirror image" * config.tta
    print(f"test accuracy {predictions.accuracy:.2%} of {images}")
    print(f"report {path}")


@contextlib.contextmanager
def bad_input_refused():
    """What is wrong with the user's input ends the program: one line, exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"main.py: {reason(error)}", file=sys.stderr)
        sys.exit(2)


def train_command(argv: list[str]) -> None:
    """main.py [train] [flags]."""
    others = ", ".join(name for name in COMMANDS if name != "train")
    usage = (
        "main.py [flags]         train a network and write its report\n"
        f"       main.py COMMAND --help  {others}"
    )
    config = parse_config(argv, usage=usage)
    with bad_input_refused():
        ready = prepare(config)
    carry_out(config, *ready)


def find_lr_command(argv: list[str]) -> None:
    """main.py find-lr [flags]: the range test of a run, its figure and its suggestions."""
    from visualize import plot_lr_finder, save_figure

    config = parse_config(argv, "main.py find-lr")
    with bad_input_refused():
        device, loaders, model, optimizer, folder = prepare(config)
    found = range_test(config, device, loaders, model, optimizer, folder)
    save_figure(plot_lr_finder(found, config.lr_rule), folder / "lr_finder.png")
    print(f"figure {folder / 'lr_finder.png'}")


def test_command(argv: list[str]) -> None:
    """main.py test [RUN]: loss and accuracy of saved weights on their dataset's test images."""
    parser = model_parser("test", "Evaluate a run folder or a weights file.")
    parser.add_argument("run", nargs="?", help="the same as --weights")
    add_data_flag(parser)
    given = parser.parse_args(argv)
    with bad_input_refused():
        if given.weights and given.run:
            raise ValueError(f"which weights, {given.run} or {given.weights}? give one")
        given.weights = given.weights or given.run or DEFAULT_WEIGHTS
        model, card, device = read_model(given)
        config = run_config(card, given)
        split, loader = test_images(config, card, device, own=given.data is None)
    stats = test(model, device, loader, precision=config.precision, tta=config.tta)
    images = f"{len(split):,} images" + ", each with its mirror image" * config.tta
    number = name_of(pick_precision(config.precision, device))
    print(f"test loss {stats.loss:.4f}, accuracy {stats.accuracy:.2%} of {images}, in {number}")


def test_images(
    config: Config, card: dict, device: torch.device, own: bool = False
) -> tuple[Split, DataLoader]:
    """The test images of a dataset, and a loader of them as saved weights expect them.

    Args:
        own: they must be those that the run was judged on. A folder without parts is divided anew when
            a file comes or goes, and then tests on images that the run was trained on.

    Raises:
        ValueError: the weights know other classes, or the images are not the run's own.
    """
    split = load_split(config.dataset, "test", config.data, image_size=config.image_size)
    if list(split.classes) != card["classes"]:
        raise ValueError(f"the weights know {card['classes']}, not {list(split.classes)}")
    if own and card.get("test_sha256", split.digest()) != split.digest():
        raise ValueError(
            f"the test images in {config.data} are not those of the run, which may have been trained "
            "on some of them; --data names images to judge on"
        )
    return split, make_loader(split, test_transform(card["mean"], card["std"]), device, config)


def predict_command(argv: list[str]) -> None:
    """main.py predict [RUN] IMAGE...: the most probable classes of image files."""
    parser = model_parser("predict", "Classify image files of any size.")
    parser.add_argument(
        "images", nargs="+", help="image files, after a run folder or weights file or not"
    )
    parser.add_argument("--top", type=int, default=3, help="classes to name (default: 3)")
    given = parser.parse_args(argv)
    first = given.images[0]
    if not given.weights and (Path(first).is_dir() or first.endswith(".safetensors") or first in MODELS):
        given.weights = given.images.pop(0)
    given.weights = given.weights or DEFAULT_WEIGHTS
    with bad_input_refused():
        if not given.images:
            raise ValueError("which images? give one file or more")
        model, card, device = read_model(given)
        images = np.stack([read_image(path, card["image_size"]) for path in given.images])
    probabilities = predict_images(model, device, images, card, given.precision)
    for path, row in zip(given.images, probabilities, strict=True):
        best = np.argsort(-row)[: max(1, given.top)]
        print(f"{path}:", ", ".join(f"{card['classes'][k]} {row[k]:.1%}" for k in best))


def report_command(argv: list[str]) -> None:
    """main.py report RUN: predict the run's test images and write its report again."""
    parser = model_parser("report", "Write the report of a run folder again.", shipped=False)
    add_data_flag(parser)
    given = parser.parse_args(argv)
    folder = Path(given.weights)
    with bad_input_refused():
        model, card, device = read_model(given)
        read_files(folder, "config.json", "environment.json", "history.json")
        config = run_config(card, given)
        loaders = make_loaders(config, device)
        now = make_card(config, loaders)
        for name, did in {"data_sha256": "trained on", "test_sha256": "judged on"}.items():
            if card.get(name, now[name]) != now[name]:
                raise ValueError(f"{config.data} holds other images than the run was {did}")
    report_run(config, device, loaders, model, folder)


def read_files(folder: Path, *names: str) -> list:
    """JSON files of a run folder as what they describe: `Config`, machine, `History`.

    Raises:
        ValueError: one is not there, or not what this package writes; it is named.
    """
    readers = {
        "config.json": lambda path: Config(**json.loads(path.read_text(encoding="utf-8"))),
        "environment.json": lambda path: json.loads(path.read_text(encoding="utf-8"))["machine"],
        "history.json": lambda path: finished(History.load(path.parent)),
    }
    found = []
    for name in names:
        try:
            found.append(readers[name](folder / name))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} is no run folder: it has no {name}") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / name} is not what a run writes ({error})") from None
    return found


def finished(history: History) -> History:
    """The history, if it has an epoch."""
    if not history.epochs:
        raise ValueError("no epoch is finished")
    return history


def compare_command(argv: list[str]) -> None:
    """main.py compare RUN RUN...: a table of runs and a figure of their curves; no model is loaded."""
    from visualize import plot_history, save_figure

    parser = make_parser("main.py compare", "Compare runs: a table, and their curves in one figure.")
    parser.add_argument("runs", nargs="+", help="run folders, two or more")
    parser.add_argument("--output", help="figure to write (default: compare.png beside the first run)")
    given = parser.parse_args(argv)
    runs = read_runs(given.runs)
    path = Path(given.output or Path(given.runs[0]).resolve().parent / "compare.png")
    with bad_input_refused():
        save_figure(plot_history({name: history for name, (_, history, _) in runs.items()}), path)
    print_columns(comparison(runs), shutil.get_terminal_size().columns)
    print(f"figure {path}")


def read_runs(folders: list[str]) -> dict[str, tuple[Config, History, str]]:
    """Configuration, history and number of parameters of run folders.

    Returns:
        They, by the folder's name, or by its path where two have the same name.

    Raises:
        ValueError: fewer than two folders, or one that is no run folder or has no epoch yet.
    """
    paths = list(dict.fromkeys(map(Path, folders)))
    if len(paths) < 2:
        raise ValueError(f"compare needs two runs or more, not {len(paths)}")
    names = [path.resolve().name for path in paths]
    runs = {}
    for path, name in zip(paths, names, strict=True):
        config, history = read_files(path, "config.json", "history.json")
        summary = path / "summary.txt"
        text = summary.read_text(encoding="utf-8") if summary.is_file() else ""
        parameters = re.search(r"Total params: ([\d,]+)", text)
        label = name if names.count(name) == 1 else str(path)
        runs[label] = config, history, parameters[1] if parameters else "?"
    return runs


def comparison(runs: dict[str, tuple[Config, History, str]]) -> list[list[str]]:
    """Rows of a table with a column for each run; of the settings, those that differ."""
    configs, histories, parameters = zip(*runs.values(), strict=True)
    last = [history.epochs[-1] for history in histories]
    done = [
        f"{row.epoch}" if row.epoch == config.epochs else f"{row.epoch} of {config.epochs}"
        for row, config in zip(last, configs, strict=True)
    ]
    rows = [["run", *runs], ["model", *(config.model for config in configs)]]
    rows += [["parameters", *parameters], ["epochs", *done]]
    for name in [item.name for item in fields(Config) if item.name not in ("model", "epochs", "data")]:
        values = [getattr(config, name) for config in configs]
        if name not in PLACES and len(set(values)) > 1:
            rows.append([name, *("none" if value is None else str(value) for value in values)])
    rows.append(["peak rate", *(f"{max(history.lrs):.3g}" for history in histories)])
    for part in ("train", "val", "test"):
        stats = [row.stats().get(part) for row in last]
        if any(stats):
            rows.append([f"{part} loss", *(f"{s.loss:.4f}" if s else "" for s in stats)])
            rows.append([f"{part} accuracy", *(f"{s.accuracy:.2%}" if s else "" for s in stats)])
    rows.append(["seconds", *(f"{sum(row.seconds for row in h.epochs):,.0f}" for h in histories)])
    return [*rows, ["images/s", *(f"{history.images_per_second:,.0f}" for history in histories)]]


def print_columns(rows: list[list[str]], width: int) -> None:
    """Print a table whose first column names the rows, in lots of as many columns as `width` holds."""
    head = max(len(row[0]) for row in rows)
    cell = 2 + max(len(text) for row in rows for text in row[1:])
    count = max(1, (width - head) // cell)
    for first in range(1, len(rows[0]), count):
        for name, *cells in rows:
            shown = cells[first - 1 : first - 1 + count]
            print(f"{name:<{head}}" + "".join(f"{text:>{cell}}" for text in shown))
        print()


def export_command(argv: list[str]) -> None:
    """main.py export RUN: the network as a file that runs without this package, and answers the same."""
    from export import FORMATS, export_model, metadata_of

    parser = make_parser(
        "main.py export", "Write a network for other programs, checked against the original."
    )
    parser.add_argument(
        "weights", nargs="?", default=DEFAULT_WEIGHTS, help="as in test (default: %(default)s)"
    )
    parser.add_argument("--format", default="onnx", help=f"{', '.join(FORMATS)} (default: onnx)")
    parser.add_argument("--output", help="(default: model.onnx or .pt2 in the run, or beside the file)")
    given = parser.parse_args(argv)
    model, card = load_weights(given.weights)
    choose("format", given.format, FORMATS)
    source = Path(given.weights)
    source = source / "model" if source.is_dir() else source
    path = Path(given.output or source.with_suffix(FORMATS[given.format]))
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}")
    images = load_split("cifar10-sample", "test").images[::10]
    grid = np.arange(card["image_size"]) * images.shape[1] // card["image_size"]
    images = images[:, grid][:, :, grid]
    with bad_input_refused():
        difference = export_model(path, model, card, given.format, images)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB of {given.format}")
    print(*(f"  {name}: {text}" for name, text in metadata_of(card).items()), sep="\n")
    print(f"checked on {len(images)} images: logits differ by {difference:.1e} at most")


def model_parser(command: str, description: str, shipped: bool = True):
    """The flags that every command with saved weights has; those in weights/ need not be named."""
    parser = make_parser(f"main.py {command}", description)
    if shipped:
        text = f"run folder, weights file, or name of one in weights/ (default: {DEFAULT_WEIGHTS})"
        parser.add_argument("--weights", help=text)
    else:
        parser.add_argument("weights", metavar="run", help="run folder")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (default: auto)")
    names = ", ".join(CHOICES["precision"])
    parser.add_argument("--precision", help=f"{names} (default: the run's)")
    return parser


def add_data_flag(parser) -> None:
    """For commands that read the dataset of saved weights."""
    parser.add_argument("--data", help="folder that holds the dataset (default: the run's)")


def read_model(given) -> tuple[nn.Module, dict, torch.device]:
    """Model and card of saved weights, and the device asked for."""
    return *load_weights(given.weights), get_device(given.device)


def run_config(card: dict, given) -> Config:
    """The configuration of the run that made some weights, with the data and precision asked for."""
    try:
        config = Config(**card["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{given.weights} has no configuration of this version ({error})") from None
    return replace(config, data=given.data or config.data, precision=given.precision or config.precision)


COMMANDS = {
    "train": train_command,
    "test": test_command,
    "predict": predict_command,
    "find-lr": find_lr_command,
    "report": report_command,
    "compare": compare_command,
    "export": export_command,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; 2 for bad input and 1 for a run that had to stop, after one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    named = bool(argv) and not argv[0].startswith("-")
    command, rest = (argv[0], argv[1:]) if named else ("train", argv)
    try:
        choose("command", command, COMMANDS)
        COMMANDS[command](rest)
    except Stopped as stop:
        print(f"main.py: {stop}; --resume continues the run", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"main.py: {reason(error)}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:
        print(f"main.py: {reason(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
