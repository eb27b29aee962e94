"""Overhead: `fit_model` against a bare loop with the same precision, layout, data and optimizer.

python -m benchmarks.overhead

The loops are compared over a few steps, without files. What a run writes (a checkpoint a minute, at the
end of each epoch one more, with weights, history and events) is timed apart, several times, and added in
the measure of an epoch of 98 steps.
"""

import argparse
import contextlib
import functools
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import common
from checkpoint import save_checkpoint
from config import Config
from data import Loaders, limit_batches, make_loaders, start_epoch
from models import make_model
from run import make_card
from training.criterion import score
from training.loops import fit_model, forward_all
from training.optim import make_optimizer, one_cycle
from training.progress import event_writer, write_events
from utils import Epoch, History, autocast, pick_precision
from weights_file import save_weights

CPU = torch.device("cpu")
EPOCH = 98  # steps: 50,000 images in batches of 512


def prepare(
    config: Config, steps: int
) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Network, optimizer and schedule as a run makes them, the same every time."""
    torch.manual_seed(0)
    model = make_model(config.model, **config.model_options).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(config.optimizer, model)
    return model, optimizer, one_cycle(optimizer, 1e-3, epochs=1, steps_per_epoch=steps)


def fit_seconds(config: Config, loaders: Loaders, steps: int) -> float:
    """Seconds that `fit_model` takes for some steps and a batch of evaluation."""
    model, optimizer, scheduler = prepare(config, steps)
    limit_batches(loaders.train, steps)
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        fit_model(model, CPU, loaders.train, loaders.test, optimizer, scheduler, 1)
    return time.perf_counter() - begin


def bare_seconds(config: Config, loaders: Loaders, steps: int) -> float:
    """Seconds that the least code takes for the same."""
    model, optimizer, scheduler = prepare(config, steps)
    dtype = pick_precision("auto", CPU)
    start_epoch(loaders.train, 1)
    limit_batches(loaders.train, steps)
    begin = time.perf_counter()
    model.train()
    for images, labels in loaders.train:
        optimizer.zero_grad(set_to_none=True)
        with autocast(CPU, dtype):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
    score(*forward_all(model, CPU, loaders.test, "auto"))
    return time.perf_counter() - begin


def writing_seconds(config: Config, loaders: Loaders, count: int = 8) -> tuple[float, float]:
    """Median seconds of a checkpoint, and of all that is written at the end of an epoch."""
    model, optimizer, scheduler = prepare(config, count * EPOCH)
    images, labels = next(iter(loaders.train))
    F.cross_entropy(model(images[:8]), labels[:8]).backward()
    optimizer.step()  # an optimizer has its moments from the first step on
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    card, history, saves, ends = make_card(config, loaders), History(), [], []

    def save(folder: Path) -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        save_checkpoint(folder / "checkpoints", state | {"history": asdict(history)}, len(history.lrs))

    def end_epoch(folder: Path) -> None:
        history.save(folder)
        save_weights(folder / "weights.safetensors", model, card)
        save(folder)
        write_events(writer, history.epochs[-1], history)

    with tempfile.TemporaryDirectory() as name, contextlib.closing(event_writer(Path(name))) as writer:
        for epoch in range(1, count + 1):
            saves.append(seconds_of(lambda: save(Path(name))))
            history.epochs.append(a_row(epoch))
            history.lrs += [1e-3] * EPOCH
            ends.append(seconds_of(lambda: end_epoch(Path(name))))
    return statistics.median(saves), statistics.median(ends)


def seconds_of(call: Callable[[], None]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def a_row(epoch: int) -> Epoch:
    """A row of a history, with every column that a run without a validation split fills."""
    parts = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return Epoch(epoch=epoch, lr=1e-3, seconds=1.0, images_per_second=1.0, **dict.fromkeys(parts, 0.5))


def compare(width: int, steps: int, args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Rows and claims at one width."""
    sample: dict[str, Any] = {"dataset": "cifar10-sample", "batch_size": 32} if args.smoke else {}
    config = Config(width=width, max_test_batches=1, **sample)
    loaders = make_loaders(config)
    variants = {}
    for name, call in (("bare loop", bare_seconds), ("fit_model", fit_seconds)):
        call(config, loaders, 1)  # imports, pages, kernels
        variants[f"width {width}, {name}"] = functools.partial(call, config, loaders, steps)
    seconds = common.measure(variants, args.rounds)
    save, end = writing_seconds(config, loaders)
    bare, fit = seconds.values()
    epoch = EPOCH / steps * statistics.median(bare)
    loop, files = common.ratios(fit, bare), (end + save * int(epoch / 60)) / epoch
    claims = [
        common.make_claim(f"width {width}: fit_model's loop / bare loop", loop),
        common.make_claim(f"width {width}: all that is written in an epoch / bare epoch", [files]),
        common.make_claim(f"width {width}: both / bare", [x + files for x in loop], 1.02, most=True),
    ]
    rows = [common.make_row(name, values, steps=steps) for name, values in seconds.items()]
    rows.append(common.make_row(f"width {width}, a checkpoint", [save], steps=""))
    return rows, claims


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write overhead.json."""
    args = common.make_parser(__doc__, rounds=8).parse_args(argv)
    # About 6 s and 5 s on two cores with bf16.
    lengths = {4: 2, 2: 3} if args.smoke else {64: 4, 16: 32}
    comparisons = [compare(width, steps, args) for width, steps in lengths.items()]
    rows, claims = (
        [item for part in parts for item in part] for parts in zip(*comparisons, strict=True)
    )
    common.publish(common.make_result("overhead", "seconds", rows, claims, args), args)


if __name__ == "__main__":
    main()
