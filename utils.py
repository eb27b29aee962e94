"""What every run needs and no one owns: device, seeds, history, the rate finder and the schedule."""

import contextlib
import ctypes
import difflib
import itertools
import json
import os
import platform
import random
import re
import statistics
import sys
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from files import read_bytes, write_csv, write_whole

__all__ = [
    "Calibration",
    "Epoch",
    "History",
    "Predictions",
    "Stats",
    "environment",
    "get_device",
    "pick_precision",
    "seed_everything",
    "summarize",
]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of mallopt, in <malloc.h>


class Stats(NamedTuple):
    """Mean loss and accuracy over the images seen; accuracy is a fraction."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Predictions:
    """What a model says of every image of a loader, in the order of one pass, and the images themselves.

    Shape:
        probabilities float32 (N, K), labels int64 (N,), images uint8 (N, H, W, 3) or None.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    images: np.ndarray | None = None  # none: they are not in colour, or were too many to keep
    classes: tuple[str, ...] = ()  # names; none: the loader has none
    with_probabilities: bool = True  # without, those of the answers are 1, as they are not known
    normalization: dict[str, tuple[float, ...]] = field(default_factory=dict)  # "mean" and "std"

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

    def calibration(self, bins: int = 15) -> "Calibration":
        """Answers in bins of equal width by their probability, 15 as in Guo et al., arXiv:1706.04599."""
        sure, right = self.probabilities.max(1).astype(float), self.predicted == self.labels
        place = np.minimum((sure * bins).astype(int), bins - 1)
        counts, total = np.bincount(place, minlength=bins), np.bincount(place, sure, bins)

        def error(right: np.ndarray) -> float:
            return float(np.abs(np.bincount(place, right, bins) - total).sum() / len(sure))

        random = np.random.default_rng(0)
        chance = [error(random.random(len(sure)) < sure) for _ in range(100)]
        hits = np.bincount(place, right, bins).astype(int)
        mean = total / np.maximum(counts, 1)
        return Calibration(counts, hits, mean, error(right), float(np.quantile(chance, 0.95)))


class Calibration(NamedTuple):
    """How often answers are right, by the probability that they were given, in bins of equal width.

    `error` is the expected calibration error: how far the share of right answers lies from the mean
    probability, averaged over the bins, each weighted by its number of answers. `chance` is what 95 of
    100 networks stay under on these images that are exactly as often right as they say.

    Shape:
        answers and right int (B,), probability float (B,): its mean over a bin, 0 where none is.
    """

    answers: np.ndarray
    right: np.ndarray
    probability: np.ndarray
    error: float
    chance: float


def share_interval(hits: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for the share that `hits` of `count` estimate; 0 to 1 where there are none."""
    if not count:
        return 0.0, 1.0
    from scipy.stats import binomtest  # a second of imports

    interval = binomtest(int(hits), int(count)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


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

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the data, the second evaluated after each epoch: "val" if held out, else "test"."""
        return ("train", "test") if self.val_loss is None else ("train", "val", "test")

    def measured(self) -> list[float | None]:
        """What every row has, and both loss and accuracy of each part that was evaluated, or None."""
        pairs = [(self.val_loss, self.val_accuracy), (self.test_loss, self.test_accuracy)]
        evaluated = [pair for pair in pairs if pair != (None, None)] or pairs
        always = [getattr(self, item.name) for item in fields(self) if item.default is MISSING]
        return [*always, *itertools.chain(*evaluated)]

    def stats(self) -> dict[str, Stats]:
        """What was measured: "train", and "val" and "test" where they were."""
        row = vars(self)
        pairs = {part: Stats(row[f"{part}_loss"], row[f"{part}_accuracy"]) for part in self.parts}
        return {part: stats for part, stats in pairs.items() if stats.loss is not None}


@dataclass
class EpochState:
    """An epoch under way: what a resumed run needs to go on in the middle of it."""

    epoch: int
    totals: torch.Tensor  # (3,): summed loss and hits of images, number of finite steps; on the device
    steps: int = 0
    images: int = 0
    seconds: float = 0.0  # of training
    lrs: list[float] = field(default_factory=list)
    random: dict = field(default_factory=dict)  # what `data.random_state` said as it began

    @classmethod
    def of(cls, epoch: int, device: torch.device | str, random: dict | None = None) -> "EpochState":
        """The state of an epoch that is about to begin."""
        return cls(epoch, torch.zeros(3, device=device), random=random or {})

    def stats(self) -> Stats:
        """Mean loss and accuracy; the one transfer of an epoch's sums."""
        return Stats(*(self.totals[:2] / self.images).tolist())


@dataclass
class History:
    """What a run measured: one row an epoch, and the learning rate that each step used."""

    epochs: list[Epoch] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)

    def save(self, folder: str | Path) -> None:
        """Write history.json (everything) and history.csv (the rows) into a folder, which is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "history.json", json.dumps(asdict(self), indent=1))
        rows = [asdict(row).values() for row in self.epochs]
        write_csv(folder / "history.csv", [item.name for item in fields(Epoch)], rows)

    @property
    def steps_per_epoch(self) -> int:
        """Updates in each of its epochs."""
        return len(self.lrs) // len(self.epochs)

    @property
    def images_per_second(self) -> float:
        """That of its median epoch."""
        return statistics.median(row.images_per_second for row in self.epochs)

    @classmethod
    def load(cls, folder: str | Path) -> "History":
        """Read what `save` wrote.

        Raises:
            OSError, ValueError, KeyError, TypeError: there is none, or it is something else.
        """
        stored = json.loads(read_bytes(Path(folder) / "history.json"))
        epochs = [Epoch(**row) for row in stored["epochs"]]
        for number, row in enumerate(epochs, 1):
            check_numbers(f"what epoch {number} measured", row.measured())
        check_numbers("lrs", stored["lrs"])
        return cls(epochs, stored["lrs"])


def check_numbers(name: str, values: list) -> None:
    """Refuse what was read and is no list of numbers.

    Raises:
        ValueError: it is named.
    """
    if not isinstance(values, list) or not all(
        type(value) is float or (type(value) is int and abs(value) < 2**63) for value in values
    ):
        raise ValueError(f"{name} must be numbers")


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside a compiled or parallel one, or the model itself."""
    model = getattr(model, "_orig_mod", model)
    parallel = nn.DataParallel | nn.parallel.DistributedDataParallel
    return model.module if isinstance(model, parallel) else model


def get_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name, or the device itself; "auto" is CUDA, else Apple's MPS, else the CPU.

    Of several processes that torchrun started each has a GPU of its own, unless `name` has a number.

    Raises:
        ValueError: there is no such device here.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and str(name) in ("auto", "cuda") and torch.cuda.is_available():
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > gpus:
            raise ValueError(f"there are {gpus} GPUs for {processes} processes: --nproc-per-node {gpus}")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if torch.empty(1, device=device).is_meta:
            raise RuntimeError("its tensors hold no numbers")
    except (RuntimeError, AssertionError, TypeError):
        raise ValueError(f"there is no device {str(name)!r} here; choose cpu or auto") from None
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
        capabilities = cpu_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def cpu_capabilities() -> dict[str, Any]:
    """What the CPU can do, by PyTorch's names; nothing before torch 2.11."""
    return getattr(torch.cpu, "get_capabilities", dict)()


def name_of(dtype: torch.dtype) -> str:
    """The name of a number format: fp32, bf16 or fp16."""
    return next(name for name, kind in PRECISIONS.items() if kind == dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context of a forward pass in `dtype`; float32 leaves everything as it is."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def six_views(images: Tensor) -> list[tuple[float, Tensor]]:
    """The views of images (N, C, H, W) whose logits `tta` averages, each with its share.

    They are the image and its mirror image, each as it is and moved along the diagonal by a pixel in
    either direction, with a reflected border, as in airbench (Keller Jordan, arXiv 2404.00498). Those
    that are not moved have half of the weight.
    """
    padded = nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    placed = [(1 / 4, images), (1 / 8, padded[..., :-2, :-2]), (1 / 8, padded[..., 2:, 2:])]
    return [(share, view) for share, place in placed for view in (place, place.flip(-1))]


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
        name = cpu_capabilities().get("cpu_name", platform.machine())
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
        deterministic: have cuDNN, and NCCL if it is not in use yet, take only algorithms that give the
            same bits each time. The networks here should need no more: as their pooling windows do not
            overlap, no gradient is summed in an order that changes.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        os.environ.update(NCCL_NVLS_ENABLE="0", NCCL_ALGO="Ring")  # NVLS changes the order of sums


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave the global random state as it was, on the CPU and on `device`."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from generators seeded anew, on the CPU and on `device`, then let them go on as before.

    `torch.manual_seed` gives the same numbers. But it also seeds devices that are not used, and formats
    a stack trace for each that has not been started, which takes longer than all else here.
    """
    generators = [torch.random.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def summarize(model: nn.Module, image_size: int | tuple[int, ...] = 32) -> str:
    """Torchinfo's table of a network: kernels, shapes, parameters and multiply-adds for one image.

    Leaves mode, buffers and random state as they were.

    Args:
        image_size: side of a square image, pixels; or its shape (3, H, W), or (N, 3, H, W).
    """
    import torchinfo

    shape = (3, image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    device = next(model.parameters()).device
    with random_state_kept(device):
        table = torchinfo.summary(
            model,
            input_data=torch.zeros(1, *shape[-3:], device=device),
            depth=5,  # down to each convolution of a residual block
            col_names=("kernel_size", "input_size", "output_size", "num_params", "mult_adds"),
            verbose=0,
        )
    return str(table).replace("Units.MEGABYTES", "M").replace("Units.GIGABYTES", "G")


def printable(name: object) -> str:
    """A name as any terminal, report and file can hold it, escaped where it would not be.

    Escaped are line breaks and other control characters, bytes that are no UTF-8, and what turns the
    direction of writing. Unlike `plain`, it keeps two names two.
    """
    categories = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories of such characters
    turns = "LRE RLE LRO RLO PDF LRI RLI FSI PDI".split()
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in categories or unicodedata.bidirectional(c) in turns
        else c
        for c in str(name)
    )


def plain(text: object, squeeze: bool = True) -> str:
    """Text from outside (a name, a path, a value) on one line, without what steers a terminal or a page.

    Control characters, line breaks and lone surrogates become spaces and replacement characters;
    characters that turn the direction of writing or cannot be seen go, but for the joiners of scripts.

    Args:
        squeeze: make one space of several.
    """
    kinds = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\ufffd", "Co": "\ufffd", "Cn": "\ufffd", "Cf": ""}
    joiners = "\u200c\u200d"
    shown = [c if c in joiners else kinds.get(unicodedata.category(c), c) for c in str(text)]
    return " ".join("".join(shown).split()) if squeeze else "".join(shown)


def escape(text: object) -> str:
    """Text from outside as Markdown shows it, whatever is in it."""
    within = r"(?<![^\W_])_|_(?![^\W_])"  # an underscore inside a word is no markup
    return re.sub(rf"([\\`*<>|\[\]$&~#]|{within})", r"\\\1", plain(text))


def show_probability(probability: float) -> str:
    """A network's probability in percent; none is 0 or 1, so one that rounds to it gets a bound."""
    shown = f"{probability:.1%}"
    return {"100.0%": ">99.9%", "0.0%": "<0.1%"}.get(shown, shown)


def markdown_table(heads: list[str], rows: list[list], left: tuple[int, ...] = (0,)) -> str:
    """A Markdown table whose columns are aligned right, but for those whose indices are in `left`."""
    head, *body = (f"| {' | '.join(map(str, line))} |" for line in [heads, *rows])
    rule = "".join("---|" if column in left else "---:|" for column in range(len(heads)))
    return "\n".join([head, f"|{rule}", *body])


def choose(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse a value that is not among the choices, and name the nearest one.

    Raises:
        ValueError: one line.
    """
    if value not in choices:
        listed = ", ".join(choices)
        raise ValueError(f"unknown {name} {value!r}; choose from {listed}{nearest(value, choices)}")


def nearest(value: str | Path, choices: Collection[str]) -> str:
    """The choice that a misspelt value was probably meant to be, as the end of a message."""
    near = difflib.get_close_matches(str(value), choices, 1)
    return f"; did you mean {near[0]}?" if near else ""
