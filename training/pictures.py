"""The pictures that a loader showed: what `predict` keeps, so that they belong to its answers."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Batches, EpochSampler, Samples
from transforms import CIFAR10_MEAN, CIFAR10_STD, denormalize

Normalization = dict[str, tuple[float, ...]]  # "mean" and "std" per channel, of pixels in [0, 1]
MOST_KEPT = 2**30  # bytes of pictures that are copied for one prediction: 350,000 of 32 x 32


def normalization_in(transform: Any, depth: int = 3) -> Normalization | None:
    """The mean and the deviation of the Normalize step of a transform, whosever it is, or None."""
    steps = getattr(transform, "transforms", None) or [getattr(transform, "transform", None)]
    for step in [transform, *(steps if isinstance(steps, list | tuple) else [steps])]:
        mean, std = getattr(step, "mean", None), getattr(step, "std", None)
        if mean is not None and std is not None:
            numbers = [tuple(np.ravel(np.asarray(x, float)).tolist()) for x in (mean, std)]
            scale = getattr(step, "max_pixel_value", 255) / 255  # of Albumentations
            mean, std = (tuple(scale * x for x in values) for values in numbers)
            return {"mean": mean, "std": std}
        if depth and step is not transform and step is not None:
            found = normalization_in(step, depth - 1)
            if found:
                return found
    return None


def normalization_of_loader(loader: Any) -> Normalization | None:
    """The mean and the deviation that a loader's images are normalised by, as far as it can be seen."""
    dataset: Any = getattr(loader, "dataset", None)
    while hasattr(dataset, "dataset"):  # a part of another
        dataset = dataset.dataset
    if isinstance(dataset, Batches):
        return {"mean": dataset.program.mean, "std": dataset.program.std}
    if isinstance(dataset, Samples):
        return normalization_in(dataset.compose)
    return normalization_in(getattr(dataset, "transform", None))


def classes_of_loader(loader: Any) -> tuple[str, ...]:
    """The names of the classes of a loader's dataset, or of the one that it is a part of."""
    dataset: Any = getattr(loader, "dataset", None)
    while dataset is not None and not hasattr(dataset, "classes"):
        dataset = getattr(dataset, "dataset", None)
    return tuple(map(str, getattr(dataset, "classes", ())))


def to_pixels(images: Any, normalization: Normalization | None = None) -> np.ndarray:
    """Pictures from whatever images were collected as: uint8 (N, H, W, 3).

    Args:
        images: (N, 3, H, W) or (N, H, W, 3), as a tensor or an array; bytes; numbers from 0 to 1; or
            normalised numbers.
        normalization: that is undone; none: CIFAR-10's, but for images that are all within 0 to 1.

    Raises:
        ValueError: they are no pictures in colour.
    """
    values = images.detach().cpu() if isinstance(images, Tensor) else torch.as_tensor(np.asarray(images))
    if values.dim() != 4 or 3 not in (values.shape[1], values.shape[3]):
        raise ValueError(
            f"pictures must be (N, 3, H, W) or (N, H, W, 3), in colour, not {tuple(values.shape)}"
        )
    if values.shape[1] != 3 or values.shape[3] == 3 and values.dtype == torch.uint8:
        values = values.permute(0, 3, 1, 2)
    if not values.is_floating_point():
        return values.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return denormalize(values, **(normalization or assumed_normalization(values)))


def assumed_normalization(values: Tensor) -> Normalization:
    """That of images whose own nobody knows: none, if all lie within 0 to 1; else CIFAR-10's."""
    if values.numel() and values.min() >= 0 and values.max() <= 1:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return {"mean": CIFAR10_MEAN, "std": CIFAR10_STD}


class Pictures:
    """What a pass over a loader shows, noted as it passes.

    Of a loader of `make_loaders` these are the images of its dataset, which are not copied while they
    are in order; of another the images of each batch, a byte for each of their numbers.
    """

    def __init__(self, loader: Any):
        dataset: Any = getattr(loader, "dataset", None)
        ours = isinstance(dataset, Batches | Samples) and isinstance(loader.sampler, EpochSampler)
        self.split = dataset.split if ours else None
        self.order: Any = dataset.order(loader.sampler.epoch) if ours else None
        self.first = loader.sampler.first * dataset.batch_size if ours else 0
        self.classes = classes_of_loader(loader)
        self.normalization = normalization_of_loader(loader)
        self.copies: list[np.ndarray] | None = []

    def noted(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of the loader, unchanged."""
        for batch in loader:
            if self.split is None:
                self.copy(batch)
            yield batch

    def copy(self, batch: Any) -> None:
        """Keep the images of a batch as pictures, if they can be seen and there is room."""
        images: Any = batch[0] if isinstance(batch, tuple | list) and batch else None
        fits = isinstance(images, Tensor) and images.dim() == 4 and images.shape[1] == 3
        if self.copies is None or not fits or images.dtype == torch.uint8:
            self.copies = None
            return
        if self.normalization is None:
            self.normalization = assumed_normalization(images)
        self.copies.append(denormalize(images, **self.normalization))
        same = len({x.shape[1:] for x in self.copies}) == 1
        if not same or sum(x.nbytes for x in self.copies) > MOST_KEPT:
            self.copies = None

    def kept(self, count: int) -> dict[str, Any]:
        """The pictures of `Predictions`, how they were normalised, and the names of the classes.

        Args:
            count: images that passed, in all processes.
        """
        images = None
        if self.split is not None:
            index = self.order[self.first : self.first + count]
            whole = (index == np.arange(len(index))).all()
            images = self.split.images[: len(index)] if whole else self.split.images[index]
        elif self.copies:
            images = np.concatenate(self.copies)
        return {"images": images, "classes": self.classes, "normalization": self.normalization or {}}
