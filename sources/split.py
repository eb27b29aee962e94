"""What every source of data returns, a `Split`, and how one is divided and measured."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from utils import printable


@dataclass(frozen=True)
class Split:
    """Images and labels of one part of a dataset.

    Shape:
        images uint8 (N, H, W, 3), labels int64 (N,) from 0 to K - 1, K names in `classes`, N in `files`.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    files: tuple[str, ...] | None = None  # where each image came from, below the data folder
    prepared: str = ""  # in words, what was done to the files' pictures

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"images must be uint8 (N, H, W, 3), not {self.images.dtype} {shape}")
        if len(self.images) == 0:
            raise ValueError("there are no images")
        if len(self.labels) != len(self.images):
            raise ValueError(f"{len(self.labels)} labels for {len(self.images)} images")
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high >= len(self.classes):
            raise ValueError(f"labels must be 0 to {len(self.classes) - 1}, not {low} to {high}")
        if self.files is not None and len(self.files) != len(self.images):
            raise ValueError(f"{len(self.files)} file names for {len(self.images)} images")
        check_names(self.classes)

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """SHA-256 of images and labels."""
        hasher = hashlib.sha256(np.ascontiguousarray(self.images).data)
        hasher.update(np.ascontiguousarray(self.labels).data)
        return hasher.hexdigest()

    def take(self, index: np.ndarray) -> "Split":
        """The images at `index`."""
        files = self.files and tuple(self.files[int(i)] for i in np.arange(len(self))[index])
        return replace(self, images=self.images[index], labels=self.labels[index], files=files)


def check_names(classes: Iterable[str]) -> None:
    """Refuse class names that a report, a table or a terminal could not show.

    Raises:
        ValueError: the first of them is named, escaped.
    """
    for name in classes:
        if printable(name) != name:
            raise ValueError(
                f"the class name {printable(name)} has bytes that are no UTF-8, or control characters, "
                "here written with backslashes: rename it"
            )


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels, in [0, 1].

    Exact: it counts how often each of the 256 values occurs. The deviation is at least 1/255, one step,
    as normalising divides by it, and a channel may be the same everywhere.

    Args:
        images: uint8 (N, H, W, C).
    """
    values = np.arange(256) / 255
    counts = [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    means = [np.average(values, weights=count) for count in counts]
    variances = [
        np.average((values - mean) ** 2, weights=count)
        for mean, count in zip(means, counts, strict=True)
    ]
    return tuple(map(float, means)), tuple(max(float(v**0.5), 1 / 255) for v in variances)


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to keep and to hold out, `fraction` of each class; f(seed), both ascending.

    Raises:
        ValueError: a class is too small to be on both sides.
    """
    if np.bincount(labels)[np.unique(labels)].min() < 2:
        raise ValueError(f"cannot hold out {fraction:.0%} of {len(labels)} images: a class has only one")
    from sklearn.model_selection import train_test_split  # a second of imports that few runs need

    try:
        train_index, held_out = train_test_split(
            np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise ValueError(f"cannot hold out {fraction:.0%} of {len(labels)} images: {error}") from None
    return np.sort(train_index), np.sort(held_out)
