"""What every run needs and no one owns: device, seeds, history, the rate finder and the schedule."""

import contextlib
import copy
import csv
import ctypes
import functools
import io
import itertools
import json
import math
import operator
import platform
import random
import statistics
import sys
import warnings
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import choose
from files import write_whole

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of mallopt, in <malloc.h>


class Stats(NamedTuple):
    """Mean loss and accuracy over the images seen; accuracy is a fraction."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Predictions:
    """What a model says of every image of a loader, in the loader's order.

    Shape:
        probabilities float32 (N, K), labels int64 (N,).
    """

    probabilities: np.ndarray
    labels: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class of each image (N,)."""
        return self.probabilities.argmax(1)

    @property
    def accuracy(self) -> float:
        """The fraction of images whose most probable class is their label."""
        return float((self.predicted == self.labels).mean())

    def misclassified(self, count: int | None = None) -> np.ndarray:
        """Indices of the wrong ones, the most confident mistake first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.probabilities[wrong].max(1), kind="stable")][:count]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One row of a history. Accuracies are fractions; what was not measured is None."""

    epoch: int
    lr: float  # that the last step used
    train_loss: float
    train_accuracy: float
    val_loss: float | None = None
    val_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    seconds: float  # of training and evaluation together
    images_per_second: float  # of training alone

    def stats(self) -> dict[str, Stats]:
        """What was measured: "train", and "val" and "test" where they were."""
        parts = {part: (f"{part}_loss", f"{part}_accuracy") for part in ("train", "val", "test")}
        pairs = {part: Stats(*(getattr(self, name) for name in names)) for part, names in parts.items()}
        return {part: stats for part, stats in pairs.items() if stats.loss is not None}


@dataclass
class Tally:
    """An epoch under way: what a resumed run needs to go on in the middle of it."""

    epoch: int
    totals: torch.Tensor  # (3,): loss and hits, summed over images, and sound steps; on the device
    steps: int = 0
    images: int = 0
    seconds: float = 0.0  # of training
    lrs: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, epoch: int, device) -> "Tally":
        """That of an epoch about to begin."""
        return cls(epoch, torch.zeros(3, device=device))

    def stats(self) -> Stats:
        """Mean loss and accuracy; the one transfer of an epoch's sums."""
        return Stats(*(self.totals[:2] / self.images).tolist())


@dataclass
class History:
    """What a run measured: one row an epoch, and the learning rate that each step used."""

    epochs: list[Epoch] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write history.json (everything) and history.csv (the rows)."""
        write_whole(folder / "history.json", json.dumps(asdict(self), indent=1))
        table = io.StringIO()
        writer = csv.DictWriter(table, [item.name for item in fields(Epoch)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, self.epochs))
        write_whole(folder / "history.csv", table.getvalue())

    @property
    def steps_per_epoch(self) -> int:
        """Updates in each of its epochs."""
        return len(self.lrs) // len(self.epochs)

    @property
    def images_per_second(self) -> float:
        """That of its median epoch."""
        return statistics.median(row.images_per_second for row in self.epochs)

    @classmethod
    def load(cls, folder: Path) -> "History":
        """Read what `save` wrote.

        Raises:
            OSError, ValueError, KeyError, TypeError: there is none, or it is something else.
        """
        stored = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        epochs = [Epoch(**row) for row in stored["epochs"]]
        for row in epochs:
            check_numbers("an epoch", [value for value in asdict(row).values() if value is not None])
        check_numbers("lrs", stored["lrs"])
        return cls(epochs, stored["lrs"])


def check_numbers(name: str, values: list) -> None:
    """Refuse what was read and is no list of numbers.

    Raises:
        ValueError: it is named.
    """
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise ValueError(f"{name} must be numbers")


def get_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is CUDA, else Apple's MPS, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" has none
    except (RuntimeError, AssertionError):
        raise ValueError(f"there is no device {name!r} here; choose cpu or auto") from None
    return device


def keep_freed_memory(device: torch.device) -> None:
    """Before work on a CPU: let this process keep the memory that it frees, for the next step.

    glibc hands blocks over 32 MB back to the system, which zeroes them page by page when the next step
    asks for them again: a fifth of a step of CustomResNet. Keeping them takes 3.0 instead of 2.6 GB at
    its peak, until the process ends. Other systems are left alone.
    """
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The number format of the forward pass: float32, bfloat16 or float16.

    "auto" takes what the hardware computes in: bf16 from compute capability 8, fp16 below it (a T4
    claims bf16 and emulates it), bf16 on a CPU with instructions for it, else fp32.

    Raises:
        ValueError: no precision has that name.
    """
    choose("precision", name, ("auto", *PRECISIONS))
    if name in PRECISIONS:
        return PRECISIONS[name]
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if modern else torch.float16
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.11
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def name_of(dtype: torch.dtype) -> str:
    """The name of a number format: fp32, bf16 or fp16."""
    return next(name for name, kind in PRECISIONS.items() if kind == dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context of a forward pass in `dtype`; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def make_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Scales gradients in fp16, where they would vanish; does nothing otherwise.

    Starts at 2^10 instead of PyTorch's 2^16, at which the first steps overflow and are skipped.
    """
    return torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=dtype == torch.float16)


def environment(device: torch.device) -> dict[str, str]:
    """The machine and the versions of a run, in words."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", platform.machine())
        machine = f"{name}, {torch.get_num_threads()} threads"
        if pick_precision("auto", device) == torch.bfloat16:  # else machines of two speeds share a name
            machine += ", bf16"
    packages = ("torch", "torchvision", "albumentations", "numpy")
    versions = [f"{package} {metadata.version(package)}" for package in packages]
    return {
        "machine": machine,
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
    }


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (every device).

    Args:
        deterministic: have cuDNN use only algorithms that give the same bits each time. The networks
            here should need no more: no two windows of their pooling overlap, whose sums would race.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


@contextlib.contextmanager
def random_state_kept(device: torch.device):
    """Leave the global random state as it was, on the CPU and on `device`."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def summarize(model: nn.Module, image_size: int = 32) -> str:
    """Torchinfo's table of a network: kernels, shapes, parameters and multiply-adds for one image.

    Leaves mode, buffers and random state as they were.
    """
    import torchinfo

    device = next(model.parameters()).device
    with random_state_kept(device):
        table = torchinfo.summary(
            model,
            input_data=torch.zeros(1, 3, image_size, image_size, device=device),
            depth=5,  # down to each convolution of a residual block
            col_names=("kernel_size", "input_size", "output_size", "num_params", "mult_adds"),
            verbose=0,
        )
    return str(table).replace("Units.MEGABYTES", "M").replace("Units.GIGABYTES", "G")


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
        found = LRFinderResult(**json.loads(path.read_text(encoding="utf-8")))
        for name, values in asdict(found).items():
            check_numbers(name, list(values.values()) if isinstance(values, dict) else values)
        return found
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not what a run writes ({error})") from None


def find_lr(
    model: nn.Module,
    device: torch.device,
    train_loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    *,
    start_lr: float = 1e-5,
    end_lr: float = 10.0,
    steps: int = 100,
    precision: str = "auto",
    label_smoothing: float = 0.0,
) -> LRFinderResult:
    """Run the LR-range test (Smith, arXiv:1506.01186): raise the rate each step, watch the loss.

    It trains copies, so model, optimizer, loader and random state stay as they were.

    Args:
        start_lr, end_lr: first and last rate; the test ends early when the loss is 5 times its least.
        steps: batches, spaced evenly in the logarithm of the rate.
        precision: of the forward pass, as in `pick_precision`.
        label_smoothing: as in training.

    Raises:
        ValueError: the range is empty, or fewer than 17 steps had a finite loss.
    """
    if not 0 < start_lr < end_lr < math.inf:
        raise ValueError(f"start_lr must be positive and under end_lr, not {start_lr} and {end_lr}")
    device = torch.device(device)
    keep_freed_memory(device)
    dtype = pick_precision(precision, device)
    model.to(device, memory_format=torch.channels_last)  # as in training: the layout moves the numbers
    model, optimizer = copy.deepcopy((model, optimizer))  # together: the copy updates the copy
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # a scheduler's mark, at which the library refuses to run
    scale_rates(optimizer)
    sampler = getattr(train_loader, "sampler", None)
    epoch = getattr(sampler, "epoch", None)
    with random_state_kept(device), contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        finder = import_lr_finder().LRFinder(
            model,
            optimizer,
            nn.CrossEntropyLoss(label_smoothing=label_smoothing),
            device,
            amp_backend="torch",
            amp_config={"device_type": device.type, "dtype": dtype, "enabled": dtype != torch.float32},
            grad_scaler=make_scaler(device, dtype),
        )
        try:
            finder.range_test(train_loader, start_lr=start_lr, end_lr=end_lr, num_iter=steps, smooth_f=0)
        finally:
            if epoch is not None:
                sampler.set_epoch(epoch)
    lrs, losses = finder.history["lr"], finder.history["loss"]
    return LRFinderResult(lrs, losses, suggest_lrs(lrs, losses))


def scale_rates(optimizer: torch.optim.Optimizer) -> None:
    """Make each group step at its share of the rate, where a schedule sets the same rate for all."""
    shares = [group.get("share", 1.0) for group in optimizer.param_groups]

    def multiply(by) -> None:
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = by(group["lr"], share)

    optimizer.register_step_pre_hook(lambda *_: multiply(operator.mul))
    optimizer.register_step_post_hook(lambda *_: multiply(operator.truediv))


def import_lr_finder():
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
            f"it went from {lrs[0]:.2g} to {lrs[-1]:.2g} in {len(lrs)} steps"
        )
    rates, curve = np.array(lrs[: len(finite)]), smooth(finite)
    lowest = int(curve.argmin())
    if curve[0] - curve[lowest] < 0.01 * curve[0]:
        raise ValueError(
            f"the loss of the range test never fell: {curve[0]:.3g} at a rate of {rates[0]:.2g}, "
            f"at best {curve[lowest]:.3g}; give a rate, or look at the data"
        )
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


def one_cycle(
    optimizer: torch.optim.Optimizer,
    max_lr: float,
    *,
    epochs: int,
    steps_per_epoch: int,
    peak_epoch: float = 5.0,
    min_lr: float | None = None,
) -> OneCycleLR:
    """OneCycleLR with a linear rise to the end of `peak_epoch` and a linear fall to almost nothing.

    Two phases, no annihilation phase, momentum left alone. A run too short to reach `peak_epoch`
    peaks at 0.3 of its length.

    Args:
        max_lr: the rate at the peak; a parameter group with a "share" has that share of it.
        epochs, steps_per_epoch: how often it will be stepped, once after each batch.
        peak_epoch: epochs until the peak; the last batch of that epoch uses `max_lr`.
        min_lr: the first rate; the line ends at a hundredth of it, one step after the last. None:
            max_lr / 25, PyTorch's own.

    Raises:
        ValueError: a rate is not positive and finite, or min_lr is over max_lr.
    """
    min_lr = max_lr / 25 if min_lr is None else min_lr
    if not 0 < min_lr <= max_lr < math.inf:
        raise ValueError(f"rates must be 0 < min_lr <= max_lr, finite, not {min_lr} and {max_lr}")
    steps = epochs * steps_per_epoch
    if steps < 1:
        raise ValueError(f"a schedule needs a step: {epochs} epochs of {steps_per_epoch} is none")
    reach = peak_epoch if peak_epoch < epochs else 0.3 * epochs
    peak = min(max(reach * steps_per_epoch - 1, 0.5), steps - 0.5)  # index of the step at the peak
    # One step more than are taken: OneCycleLR's rate after its last step would be negative.
    return OneCycleLR(
        optimizer,
        max_lr=[max_lr * group.get("share", 1.0) for group in optimizer.param_groups],
        total_steps=steps + 1,
        pct_start=(peak + 1) / (steps + 1),
        anneal_strategy="linear",
        div_factor=max_lr / min_lr,
        final_div_factor=100,
        three_phase=False,
        cycle_momentum=False,
    )
