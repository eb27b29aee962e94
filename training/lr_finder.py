"""The LR-range test, and the rules that read a learning rate from it."""

import contextlib
import functools
import io
import itertools
import json
import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import nn
from tqdm import tqdm

from data import BatchLoader, random_state, set_random_state
from files import read_bytes
from training.arguments import any_order
from training.criterion import Criterion, check_one_loss
from training.inputs import check_batch, check_evaluation, check_training, whole_number
from training.optim import copy_of, scale_rates
from utils import (
    check_numbers,
    get_device,
    keep_freed_memory,
    make_scaler,
    pick_precision,
    random_state_kept,
)

UNTRAINED = "if the network is trained already, make it anew for this test"
RULES = ("steepest", "valley", "minimum_over_ten", "minimum")


@dataclass(frozen=True)
class LRFinderResult:
    """A range test: rate and training loss of each step, and the rates that named rules suggest.

    `suggestions` holds one peak rate for each rule (`steepest`, `valley`, `minimum_over_ten`,
    `minimum`) and `start`, where the loss begins to fall: the low end of a schedule.
    """

    lrs: list[float]
    losses: list[float]
    suggestions: dict[str, float]


def read_finder(folder: Path) -> LRFinderResult | None:
    """The range test of a run folder, or None if there was none.

    Raises:
        ValueError: lr_finder.json is not what a run writes.
    """
    path = folder / "lr_finder.json"
    try:
        finder = LRFinderResult(**json.loads(read_bytes(path)))
        missing = {*RULES, "start"} - finder.suggestions.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        for name, values in asdict(finder).items():
            check_numbers(name, list(values.values()) if isinstance(values, dict) else values)
        return finder
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not what a run writes ({error})") from None


@any_order
def find_lr(  # noqa: PLR0913
    model: nn.Module,
    device: torch.device | str,
    train_loader: BatchLoader,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion | None = None,
    *,
    start_lr: float = 1e-5,
    end_lr: float = 10.0,
    steps: int = 100,
    precision: str = "auto",
    label_smoothing: float = 0.0,
) -> LRFinderResult:
    """Run the LR-range test (Smith, arXiv:1506.01186): raise the rate each step, watch the loss.

    The first five arguments may come in any order: their kinds tell them apart.

    It trains copies, so model, optimizer, loader and random state stay as they were, and what the
    caller froze is frozen in the copies too. It waits for a GPU once a step, to read the loss.

    Args:
        criterion: of logits (N, K) and labels (N,); none: cross-entropy with `label_smoothing`.
        start_lr, end_lr: first and last rate; the test ends early when the loss is 5 times its least.
        steps: batches, spaced evenly in the logarithm of the rate.
        precision: of the forward pass, as in `pick_precision`.
        label_smoothing: as in training.

    Raises:
        ValueError: the range is empty, fewer than 17 steps had a finite loss, or what `train` refuses.
    """
    check_one_loss(criterion, label_smoothing)
    if not 0 < start_lr < end_lr < math.inf:
        raise ValueError(f"start_lr must be positive and under end_lr, not {start_lr} and {end_lr}")
    check_training(model, train_loader, optimizer)
    device, steps = get_device(device), whole_number("steps", steps, 1)
    keep_freed_memory(device)
    dtype = pick_precision(precision, device)
    # As in training: the layout moves the numbers.
    model.to(device).to(memory_format=torch.channels_last)
    classes = check_evaluation(model, device, dtype, train_loader, criterion=criterion)
    model, optimizer = copy_of((model, optimizer), model)  # together: the copy updates the copy
    keep_frozen(model)
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # a scheduler's mark, at which the library refuses to run
    scale_rates(optimizer)
    sampler = getattr(train_loader, "sampler", None)
    epoch, draws = getattr(sampler, "epoch", None), random_state(train_loader)
    with random_state_kept(device), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        finder = import_lr_finder().LRFinder(
            model,
            optimizer,
            nn.CrossEntropyLoss(label_smoothing=label_smoothing) if criterion is None else criterion,
            device,
            amp_backend="torch",
            amp_config={"device_type": device.type, "dtype": dtype, "enabled": dtype != torch.float32},
            grad_scaler=make_scaler(device, dtype),
        )
        try:
            batches = checked_batches(train_loader, classes)
            finder.range_test(batches, start_lr=start_lr, end_lr=end_lr, num_iter=steps, smooth_f=0)
        finally:
            set_random_state(train_loader, draws)
            if sampler is not None and epoch is not None:
                sampler.set_epoch(epoch)
    lrs, losses = finder.history["lr"], finder.history["loss"]
    return LRFinderResult(lrs, losses, suggest_lrs(lrs, losses))


def checked_batches(loader: BatchLoader, classes: int) -> Any:
    """A loader of any kind in the form that the library takes, each of its batches checked."""
    batches = import_lr_finder().TrainDataLoaderIter(loader)
    batches.inputs_labels_from_batch = lambda batch: check_batch(batch, classes)
    return batches


def keep_frozen(model: nn.Module) -> None:
    """Let a call of `model.train()`, as the library makes before each step, leave frozen parts alone."""
    if model.training:
        for module in model.modules():
            if not module.training:
                vars(module)["train"] = lambda mode=True, module=module: module


def import_lr_finder() -> ModuleType:
    """The module of torch-lr-finder, with a bar in text where somebody watches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own bar warns in a notebook that it is experimental
        from torch_lr_finder import lr_finder
    lr_finder.tqdm = functools.partial(tqdm, desc="range test", disable=None, leave=False)
    return lr_finder


def suggest_lrs(lrs: list[float], losses: list[float]) -> dict[str, float]:
    """Read a range test by several rules, on finite losses alone, smoothed (a Gaussian of two steps).

    Raises:
        ValueError: fewer than 17 losses before the first that is not finite, or none that is lower
            than the first.
    """
    finite = finite_losses(losses)
    if len(finite) < 17:
        raise ValueError(
            f"the range test has {len(finite)} finite losses and needs 17: "
            f"it went from {lrs[0]:.2g} to {lrs[-1]:.2g} in {len(lrs)} steps; {UNTRAINED}"
        )
    rates, curve = np.array(lrs[: len(finite)]), smooth(finite)
    lowest = int(curve.argmin())
    if curve[0] - curve[lowest] < 0.01 * curve[0]:
        raise ValueError(
            f"the loss of the range test never fell: {curve[0]:.3g} at a rate of {rates[0]:.2g}, "
            f"at best {curve[lowest]:.3g}; {UNTRAINED}; else give a rate, or look at the data"
        )
    still_falling = len(finite) == len(losses) and lowest >= len(curve) - 3
    # What comes after the minimum is divergence: no rule looks there.
    curve, rates = curve[: lowest + 1], rates[: lowest + 1]
    slope = np.gradient(curve, np.log(rates))
    fallen = curve <= curve[0] - 0.1 * (curve[0] - curve[lowest])
    chosen = {
        "start": rates[int(fallen.argmax())],
        "steepest": rates[int(slope.argmin())],
        "valley": rates[valley(curve)],
        "minimum_over_ten": rates[lowest] / 10,
        "minimum": rates[lowest],
    }
    if still_falling:
        print(
            f"range test: the loss still fell at {lrs[-1]:.3g}, the end of the range, so there is no "
            f"minimum; rules that look for one take the valley's rate, {chosen['valley']:.3g}"
        )
        chosen |= dict.fromkeys(("minimum_over_ten", "minimum"), chosen["valley"])
    return {rule: float(rate) for rule, rate in chosen.items()}


def finite_losses(losses: list[float]) -> list[float]:
    """The losses before the first that is not finite."""
    return list(itertools.takewhile(math.isfinite, losses))


def smooth(losses: list[float]) -> np.ndarray:
    """A curve without its step-to-step noise and, unlike a running mean, without lag."""
    return gaussian_filter1d(np.array(losses), sigma=2, mode="nearest")


def valley(curve: np.ndarray) -> int:
    """Half-way along the longest fall, after fastai's default rule, as an index of `curve`.

    The longest fall is the longest decreasing subsequence, found in quadratic time.
    """
    length, previous = np.ones(len(curve), int), np.full(len(curve), -1)
    for i in range(1, len(curve)):
        above = np.flatnonzero(curve[:i] > curve[i])
        if len(above):
            best = above[length[above].argmax()]
            length[i], previous[i] = length[best] + 1, best
    fall = [int(length.argmax())]
    while previous[fall[-1]] >= 0:
        fall.append(int(previous[fall[-1]]))
    return fall[len(fall) // 2]
