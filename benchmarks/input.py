"""Input: whole batches against the same pipeline image by image, and two workers against one process.

python -m benchmarks.input

One thread. Batches of 512: pad 4, crop 32, flip, cutout 8, normalise, float32 out.
"""

import argparse
import functools
import time
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import common
from config import Config
from data import make_loader
from sources import load_split
from sources.split import Split
from transforms import train_transform

BATCH = 512


class Plain(Dataset):
    """What a course notebook does: the pipeline on one image at a time, as the library draws."""

    def __init__(self, split: Split):
        self.split, self.compose = split, train_transform()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.compose(image=self.split.images[index])["image"], int(self.split.labels[index])

    def __len__(self) -> int:
        return len(self.split)


def rate(loader: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Images a second over one whole pass, from the first request to the last batch."""
    begin = time.perf_counter()
    count = sum(len(labels) for _, labels in loader)
    return count / (time.perf_counter() - begin)


def loaders_of(split: Split, batch: int) -> dict[str, DataLoader]:
    """Each variant's loader; the slow ones get the first half of the images."""
    few = split.take(np.arange(max(batch, len(split) // 2)))
    config = Config(batch_size=batch)
    transform, two = train_transform(), Config(batch_size=batch, workers=2)
    workers = make_loader(few, transform, "cpu", two, shuffle=True)
    same = DataLoader(workers.dataset, sampler=workers.sampler, batch_size=None)
    return {
        "whole batches": make_loader(split, transform, "cpu", config, shuffle=True),
        "Albumentations, image by image": DataLoader(Plain(few), batch, shuffle=True, drop_last=True),
        "ours image by image, one process": same,
        "ours image by image, two workers": workers,
    }


def distinct(loader: Iterable[tuple[Tensor, Tensor]]) -> int:
    """How many different images a pass over copies of one and the same image yields."""
    return len({image.numpy().tobytes() for images, _ in loader for image in images})


def count_distinct(image: np.ndarray, count: int) -> dict[str, int]:
    """Different augmentations among `count` draws by two workers: ours, and the library left alone."""
    copies = Split(np.repeat(image[None], count, axis=0), np.zeros(count, np.int64), ("one", "two"))
    config = Config(batch_size=64, workers=2)
    ours = make_loader(copies, train_transform(), "cpu", config, shuffle=True)
    plain = DataLoader(Plain(copies), batch_size=64, num_workers=2)
    return {"ours": distinct(ours), "Albumentations": distinct(plain)}


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write input.json."""
    args = common.make_parser(__doc__, rounds=7).parse_args(argv)
    batch, count = (64, 256) if args.smoke else (BATCH, 1024)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        split = load_split("cifar10-sample" if args.smoke else "cifar10", "train")
        split = split.take(np.arange(640)) if args.smoke else split
        loaders = loaders_of(split, batch)
        for loader in loaders.values():  # pages, caches, worker processes
            list(islice(loader, 1)) if loader.num_workers == 0 else rate(loader)
        variants = {name: functools.partial(rate, loader) for name, loader in loaders.items()}
        rates = common.measure(variants, args.rounds)
        draws = count_distinct(split.images[0], count)
        result = summarize(rates, draws, count, args)
    finally:
        torch.set_num_threads(before)
    common.publish(result, args)


def summarize(
    rates: dict[str, list[float]], draws: dict[str, int], count: int, args: argparse.Namespace
) -> dict:
    """The result with its claims."""
    batches, library, one, two = rates.values()
    claims = [
        common.make_claim("whole batches / Albumentations", common.ratios(batches, library), 25),
        common.make_claim("two workers / one process", common.ratios(two, one), 1.5),
        # Of 1,024 draws out of 101,250 possible ones, five coincide on average.
        common.make_claim("different draws, our two workers", [draws["ours"] / count], 0.98),
        common.make_claim("different draws, the library's own", [draws["Albumentations"] / count]),
    ]
    rows = [common.make_row(name, values) for name, values in rates.items()]
    return common.make_result("input", "images/s", rows, claims, args, batch=BATCH, draws=count)


if __name__ == "__main__":
    main()
