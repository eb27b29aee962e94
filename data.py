"""Brings a dataset to disk, verified, and yields batches."""

import operator
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from augmentation.batch import AugmentParams, BatchProgram
from augmentation.spelling import warn_of_fill
from config import Config
from sources import load_split
from sources.split import Split, statistics, stratified_split
from transforms import CIFAR10_MEAN, CIFAR10_STD, evaluation_transform, train_transform, vectorize

__all__ = [
    "BatchLoader",
    "Batches",
    "Loaders",
    "Samples",
    "Split",
    "load_split",
    "make_loader",
    "make_loaders",
    "statistics",
    "stratified_split",
]


class BatchLoader(Protocol):
    """A `DataLoader`, a list of batches, or whatever else can be passed over again and has a length.

    It yields images float (N, C, H, W) and labels int64 (N,).
    """

    def __iter__(self) -> Iterator[Any]: ...

    def __len__(self) -> int: ...


def start_epoch(loader: BatchLoader, epoch: int | None, first: int = 0) -> int:
    """Make a loader's next pass that of `epoch`, if it knows epochs; return the epoch."""
    sampler = getattr(loader, "sampler", None)
    if epoch is None:
        return getattr(sampler, "epoch", 1)
    if isinstance(sampler, EpochSampler):
        sampler.set_epoch(epoch, first)
    elif sampler is not None and hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return epoch


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers were given."""
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    places = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    candidates = [getattr(place, "generator", None) for place in places]
    return list(dict.fromkeys(x for x in candidates if isinstance(x, torch.Generator)))


def random_state(loader: Any) -> dict:
    """The state that a user's own loader draws from in this process, as plain data.

    These are the global generators of PyTorch, NumPy and Python, and those that the loader was given.
    Loaders of `make_loader` use none of them, and have an empty one.
    """
    if isinstance(getattr(loader, "sampler", None), EpochSampler):
        return {}
    numpy, python = np.random.get_state(legacy=False), random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": numpy | {"state": {name: np.asarray(x).tolist() for name, x in numpy["state"].items()}},
        "python": [python[0], list(python[1]), python[2]],
        "loader": [generator.get_state() for generator in generators_of(loader)],
    }


def set_random_state(loader: Any, state: dict) -> None:
    """Draw on from a state of `random_state`; an empty one changes nothing."""
    if not state:
        return
    torch.set_rng_state(state["torch"])
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], np.uint32)
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": key}})
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    for generator, own in zip(generators_of(loader), state["loader"], strict=False):
        generator.set_state(own)


# The streams of random numbers: order = f(seed, epoch), augmentation = f(seed, epoch, position).
ORDER, AUGMENTATION = 0, 1


class Part(NamedTuple):
    """Which of how many processes this one is; alone, where nothing else is said."""

    rank: int = 0
    world: int = 1

    def rows(self, count: int) -> slice:
        """This process's rows of a batch of `count`; numbers of rows differ by one at most.

        Where there are fewer rows than processes, each process has them all.
        """
        if count < self.world:
            return slice(0, count)
        return slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)


ALONE = Part()


SHARED_MEMORY = Path("/dev/shm")  # where worker processes of Linux put their batches
PREFETCHED = 2  # batches that each worker prepares ahead
BATCH_TIMEOUT = 300  # seconds; a batch that takes longer never comes


class EpochSampler(SequentialSampler):
    """The keys (epoch, batch) of an epoch's `batches`, which a dataset turns into images.

    Where several processes share each batch, keys have this one's `part` as a third item; worker
    processes know it from there.

    `set_epoch` chooses the epoch and, to go on in the middle of it, the first batch. A complete pass
    moves on to the next epoch by itself; a look at the first batches does not (but worker processes
    read ahead, and may complete a short epoch unseen).

    Its keys are in order, hence its class: Lightning gives loaders of others a sampler of its own.
    """

    def __init__(self, batches: int):
        self.batches, self.part = batches, ALONE
        self.set_epoch(1)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Make the next pass that of `epoch`, from batch `first` on."""
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[tuple]:  # type: ignore[override]  # keys of its own
        epoch, part = self.epoch, (self.part,) if self.part.world > 1 else ()
        yield from ((epoch, batch, *part) for batch in range(self.first, self.batches))
        self.set_epoch(epoch + 1)

    def __len__(self) -> int:
        return self.batches


def limit_batches(loader: DataLoader, batches: int) -> None:
    """Shorten each epoch of one of `make_loader`'s loaders."""
    cast(EpochSampler, loader.sampler).batches = batches


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation that depends on nothing but its arguments."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


def batch_length(dataset: "Batches | Samples", batch: int) -> int:
    """The number of images in a batch of an epoch, the last of which may be shorter."""
    return min(dataset.batch_size, len(dataset.split) - batch * dataset.batch_size)


def batch_positions(dataset: "Batches | Samples", batch: int, part: Part = ALONE) -> slice:
    """The positions in the epoch of a batch, or of a process's part of it."""
    rows = part.rows(batch_length(dataset, batch))
    first = batch * dataset.batch_size
    return slice(first + rows.start, first + rows.stop)


class Batches(Dataset):
    """Whole batches, augmented by a batch program on the device that holds the images.

    Key (epoch, batch) -> images float (n, C, H, W) and labels int64 (n,), both on the device, or on the
    CPU if that is Apple's MPS. Key (epoch, batch, part) -> a process's rows of them. Key i -> image i,
    as the first epoch would augment it at place i, and its label as an int. `data`, `targets` and
    `classes` are what torchvision's datasets have.
    """

    def __init__(
        self,
        split: Split,
        program: BatchProgram,
        device: torch.device | str,
        batch_size: int,
        seed: int,
        shuffle: bool,
    ):
        # MPS copies a strided view whole before it reads from one, and here that is every crop there is.
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.split, self.program = split, program
        self.data, self.targets, self.classes = split.images, split.labels.tolist(), split.classes
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.padded_images = program.prepare(split.images, self.device)
        self.labels = torch.from_numpy(split.labels).to(self.device)
        # Epoch, order and draws of the epoch last asked for.
        self.epoch_cache: tuple[int, Tensor, AugmentParams] | None = None
        self.single_draws: AugmentParams | None = None  # those of key i

    def __len__(self) -> int:
        return len(self.split)

    def describe(self) -> str:
        """What is done to the images, in words that are the same in every process."""
        return "; ".join(filter(None, (repr(self.program), self.split.prepared)))

    def __getitem__(self, key: tuple | int) -> tuple[Tensor, Tensor | int]:
        if not isinstance(key, tuple):
            return self.single(place_of(key, len(self)))
        epoch, *place = key
        if self.epoch_cache is None or self.epoch_cache[0] != epoch:
            self.epoch_cache = (epoch, *self.make_epoch_cache(epoch))
        _, order, augment_params = self.epoch_cache
        positions = batch_positions(self, *place)
        index = order[positions]
        return self.program(self.padded_images, index, augment_params.at(positions)), self.labels[index]

    def single(self, index: int) -> tuple[Tensor, int]:
        """Image `index`, augmented as the first epoch does at that place, and its label."""
        if self.single_draws is None:
            self.single_draws = self.draws(1)
        at = self.single_draws.at(slice(index, index + 1))
        images = self.program(self.padded_images, torch.tensor([index], device=self.device), at)
        return images[0], self.targets[index]

    def order(self, epoch: int) -> np.ndarray:
        """Which image stands at each place of an epoch."""
        count = len(self.split)
        return epoch_order(count, self.seed, epoch) if self.shuffle else np.arange(count)

    def draws(self, epoch: int) -> AugmentParams:
        """The random decisions of a whole epoch; made on the CPU, so the same on every device."""
        rng = np.random.default_rng([self.seed, AUGMENTATION, epoch])
        return self.program.draw(rng, len(self.split), self.padded_images).to(self.device)

    def make_epoch_cache(self, epoch: int) -> tuple[Tensor, AugmentParams]:
        """Order and draws of a whole epoch."""
        return torch.from_numpy(self.order(epoch)).to(self.device, non_blocking=True), self.draws(epoch)


def place_of(key: Any, count: int) -> int:
    """The index that a key of one's own names, from the end if it is negative.

    Raises:
        IndexError: there is no such image, which also ends a loop over the images.
    """
    index = operator.index(key)
    if not -count <= index < count:
        raise IndexError(f"there are {count} images, from 0 on; {index} is none of them")
    return index % count


class Samples(Dataset):
    """The same batches image by image through any Albumentations pipeline, for DataLoader workers.

    Keys, `data`, `targets` and `classes` are those of `Batches`.

    Albumentations 2.0.8 gives every worker one and the same stream, and its `set_random_seed` gives
    every transform of a pipeline one and the same generator. Here each image has a generator of its
    own, f(seed, epoch, position), that its transforms share, whichever worker it meets.
    """

    def __init__(self, split: Split, compose: Any, batch_size: int, seed: int, shuffle: bool):
        self.split, self.compose = split, compose
        self.data, self.targets, self.classes = split.images, split.labels.tolist(), split.classes
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle

    def __len__(self) -> int:
        return len(self.split)

    def describe(self) -> str:
        """What is done to the images, in words that are the same in every process."""
        transforms = self.compose.transforms
        try:
            words = re.sub(" at 0x[0-9a-f]+", "", repr(transforms))  # addresses of functions
        except ValueError:  # Albumentations cannot write a nested function down
            words = ", ".join(type(transform).__name__ for transform in transforms)
        return "; ".join(filter(None, (words, self.split.prepared)))

    def __getitem__(self, key: tuple | int) -> tuple[Tensor, Tensor | int]:
        if not isinstance(key, tuple):
            place = place_of(key, len(self))
            return self.image(1, place, place), self.targets[place]
        epoch, *where = key
        positions = batch_positions(self, *where)
        index = self.order(epoch)[positions]
        images = [self.image(epoch, positions.start + k, i) for k, i in enumerate(index)]
        return torch.stack(images), torch.from_numpy(self.split.labels[index])

    def order(self, epoch: int) -> np.ndarray:
        """Which image stands at each place of an epoch."""
        count = len(self.split)
        return epoch_order(count, self.seed, epoch) if self.shuffle else np.arange(count)

    def image(self, epoch: int, position: int, index: int) -> Tensor:
        """Image `index` as it looks at one position of one epoch: float (C, H, W)."""
        rng = np.random.default_rng([self.seed, AUGMENTATION, epoch, position])
        self.compose.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        return self.compose(image=self.split.images[index])["image"]


class Loaders(NamedTuple):
    """The three loaders of a run; `.dataset.split` of each holds its raw images and class names."""

    train: DataLoader
    validation: DataLoader | None
    test: DataLoader

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels."""
        return dataset_of(self.test).split.classes

    @property
    def normalization(self) -> dict[str, tuple[float, ...]]:
        """The `mean` and `std` of every loader.

        Raises:
            ValueError: they are not all that is done to a test image, so that whoever prepared one with
                them alone would show the network something else.
        """
        dataset = dataset_of(self.test)
        if isinstance(dataset, Batches) and dataset.program == BatchProgram(*dataset.program[:2]):
            return {"mean": dataset.program.mean, "std": dataset.program.std}
        raise ValueError(
            "mean and std alone do not prepare a test image here, and more a card cannot hold: "
            f"the pipeline also does {dataset.describe()}"
        )


def dataset_of(loader: DataLoader) -> Batches | Samples:
    """The dataset of one of `make_loader`'s loaders."""
    return cast(Batches | Samples, loader.dataset)


def fitting_batch(count: int) -> int:
    """The largest power of two that gives `count` images eight batches or more, from 8 to 512.

    Of fewer than 8 images it is the largest power of two of them; batch norm needs two.
    """
    most = min(max(count // 8, 8), 512, max(count, 2))
    return 1 << (most.bit_length() - 1)


def with_batch_size(config: Config, count: int) -> Config:
    """The same run with a batch that fits `count` training images, if it has none yet.

    Raises:
        ValueError: its batch is larger than the training set.
    """
    if config.batch_size is None:
        size = fitting_batch(count)
        print(f"batches of {size} images, {count // size} an epoch; --batch-size takes another number")
        return replace(config, batch_size=size)
    if config.batch_size > count:
        raise ValueError(
            f"batch_size must be at most the number of training images, {count}, not "
            f"{config.batch_size}; --batch-size {fitting_batch(count)} fits"
        )
    return config


def make_loaders(config: Config, device: torch.device | str = "cpu", transform: Any = None) -> Loaders:
    """Load the data of a run and wrap it in loaders.

    Args:
        config: of the run.
        device: where batches are made, and the images kept.
        transform: an `A.Compose` to train with instead of the one that `config` describes; what
            `vectorize` does not know runs image by image in worker processes. What is not random in
            it holds for validation and test too.

    Raises:
        ValueError: the batch is larger than the training set, the data is unusable, or `transform`
            has no counterpart for testing or left arguments out; the message says what to do.
        OSError: the data could not be had.
    """
    train, test = (
        load_split(config.dataset, part, config.data, image_size=config.image_size, fit=config.fit)
        for part in ("train", "test")
    )
    validation = None
    if config.val_split:
        train_index, held_out = stratified_split(train.labels, config.val_split, config.seed)
        train, validation = train.take(train_index), train.take(held_out)
    config = with_batch_size(config, len(train))
    if transform is None:
        known = config.dataset in ("cifar10", "cifar10-sample")
        mean, std = (CIFAR10_MEAN, CIFAR10_STD) if known else statistics(train.images)
        if config.dataset == "folder" and config.flip:
            print("half of the training images are mirrored; --no-flip for letters, digits and the like")
        transform = train_transform(
            mean,
            std,
            size=config.image_size,
            padding=config.padding,
            flip=bool(config.flip),  # no longer None, which stands for what fits the dataset
            cutout=config.cutout,
            grayscale=config.grayscale,
        )
    evaluate = evaluation_transform(transform, train.images)
    warn_of_fill(transform)
    steps = [type(step).__name__ for step in evaluate.transforms]
    if steps != ["Normalize", "ToTensorV2"]:
        print(f"test images go through {', '.join(steps)}, as that is not random in training")
    return Loaders(
        make_loader(train, transform, device, config, shuffle=True),
        make_loader(validation, evaluate, device, config) if validation else None,
        make_loader(test, evaluate, device, config),
    )


def set_up_worker(worker: int) -> None:
    """Set up a worker: no threads of OpenCV's beside the processes that fill the cores, no Ctrl-C.

    A Ctrl-C goes to every process of a terminal; the main one saves the run first and ends the workers.
    """
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def check_shared_memory(samples: Samples, workers: int) -> None:
    """Refuse more batches in worker processes than the memory holds in which they are handed over.

    A worker that finds it full is killed, and nobody says why.

    Raises:
        ValueError: what is needed, what is there, and what to do.
    """
    if not SHARED_MEMORY.is_dir():  # only Linux has it
        return
    batches = workers * PREFETCHED + 2  # two more are in the hands of the training
    size = min(samples.batch_size, len(samples.split))
    needed = batches * size * (samples.image(1, 0, 0).nbytes + 8)  # and 8 bytes of label
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ValueError(
            f"{workers} workers hand over {batches} batches of {size} images, "
            f"{needed / 2**20:,.0f} MiB, in {SHARED_MEMORY}, where {free / 2**20:,.0f} MiB are free: "
            "take fewer --workers or a smaller --batch-size, or give a container more "
            "(docker run --shm-size 1g)"
        )


def make_loader(
    split: Split, transform: Any, device: torch.device | str, config: Config, shuffle: bool = False
) -> DataLoader:
    """One loader: shuffled without the last short batch to train, in order and whole to evaluate."""
    program, reason = vectorize(transform)
    size = config.batch_size or fitting_batch(len(split))
    batches = len(split) // size if shuffle else -(-len(split) // size)
    limit = config.max_train_batches if shuffle else config.max_test_batches
    batches = min(batches, limit or batches)
    # A generator of its own: a DataLoader without one draws from the global stream at every pass.
    common: dict[str, Any] = {
        "sampler": EpochSampler(batches),
        "batch_size": None,
        "generator": torch.Generator(),
    }
    if program and not (shuffle and config.workers):
        dataset = Batches(split, program, device, size, config.seed, shuffle)
        return DataLoader(dataset, **common)
    workers = config.workers or min(2, os.cpu_count() or 1)
    samples = Samples(split, transform, size, config.seed, shuffle)
    check_shared_memory(samples, workers)
    if not program:
        print(f"augmentation runs image by image in {workers} processes: {reason}")
    return DataLoader(
        samples,
        **common,
        num_workers=workers,
        prefetch_factor=PREFETCHED,
        timeout=BATCH_TIMEOUT,
        worker_init_fn=set_up_worker,
        persistent_workers=True,
        pin_memory=torch.device(device).type == "cuda",
    )
