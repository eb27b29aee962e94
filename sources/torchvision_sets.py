"""Datasets that torchvision fetches from where their authors keep them."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from files import answered
from sources.download import SOURCE_ERRORS, WHOLE, acquire, network_timeout
from sources.split import Split


class Fetched(NamedTuple):
    """A dataset that torchvision fetches from where its authors keep it.

    Its files are checked by their MD5 before anything is read, by torchvision or as `unpacked` says.
    """

    kind: str  # its class in torchvision.datasets
    files: tuple[str, ...]  # as they are fetched, below the data folder
    ask: Callable[[str], dict] = lambda split: {"train": split == "train"}
    classes: tuple[str, ...] = ()  # where torchvision has no names
    unpacked: dict[str, str] = {}  # MD5 of unpacked files, where torchvision checks the archives alone


# Of MNIST and its relatives torchvision checks the archives alone, not the unpacked files that it reads.
# These sums come from `md5sum datasets/FashionMNIST/raw/*-ubyte`; KMNIST or EMNIST needs its own.
FASHION = {
    "FashionMNIST/raw/train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "FashionMNIST/raw/train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "FashionMNIST/raw/t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "FashionMNIST/raw/t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}


FETCHED = {
    "cifar100": Fetched("CIFAR100", ("cifar-100-python.tar.gz",)),
    "fashion_mnist": Fetched("FashionMNIST", tuple(f"{name}.gz" for name in FASHION), unpacked=FASHION),
    "svhn": Fetched(
        "SVHN",
        ("train_32x32.mat", "test_32x32.mat"),
        ask=lambda split: {"split": split},
        classes=tuple("0123456789"),
    ),
}


def load_fetched(dataset: str, split: str, root: Path) -> Split:
    """A dataset of torchvision's as 32 x 32 RGB: a grey one of 28 pixels gets a black border."""
    fetched = fetch(dataset, split, root)
    pixels = np.asarray(fetched.data)
    if pixels.ndim == 3:
        pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, axis=3)
    elif pixels.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    labels = fetched.labels if hasattr(fetched, "labels") else fetched.targets
    classes = FETCHED[dataset].classes or tuple(fetched.classes)
    return Split(np.ascontiguousarray(pixels), np.asarray(labels, np.int64), classes)


def fetch(dataset: str, split: str, root: Path) -> Any:
    """Torchvision's own object for a split; one process downloads, the others wait."""
    facts = FETCHED[dataset]
    refuse_unreadable(root, facts)
    kind = getattr(import_datasets(), facts.kind)
    with contextlib.suppress(*SOURCE_ERRORS):
        if not damaged(root, facts.unpacked):
            return kind(root, **facts.ask(split))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with acquire(FileLock(root / f"{dataset}.lock")), network_timeout():
            for path in damaged(root, facts.unpacked):
                path.unlink(missing_ok=True)
            print(f"{dataset}: fetching what {root} lacks")
            fetched = functools.partial(kind, **facts.ask(split), download=True)
            return answered(WHOLE, fetched, root)
    except SOURCE_ERRORS as error:
        why = " ".join(str(error).split())
    files = ", ".join(facts.files)
    raise OSError(f"{dataset} could not be had ({why}); put {files} into {root} by hand")


def refuse_unreadable(root: Path, facts: Fetched) -> None:
    """Refuse what torchvision would read unchecked, or wait for.

    Raises:
        OSError: what is in the way; it is to be removed.
    """
    legacy = (
        root / facts.kind / "processed"
    )  # of MNIST and its relatives, left by old versions of torchvision
    if legacy.exists():
        raise OSError(f"{legacy} is an old copy without checksums, which torchvision prefers: remove it")
    for place in (root / name for name in facts.files):
        for match in place.parent.glob(place.name.partition(".")[0] + "*"):
            for path in (match, *match.rglob("*")):
                if path.exists() and not path.is_file() and not path.is_dir():
                    raise OSError(f"{path} is neither a file nor a folder: remove it")


def damaged(root: Path, checksums: dict[str, str]) -> list[Path]:
    """The files below `root` that are missing or have another MD5."""
    check = import_datasets().utils.check_integrity
    return [root / name for name, md5 in checksums.items() if not check(root / name, md5)]


def import_datasets() -> ModuleType:
    """Torchvision's datasets, a second of imports, with a bar where somebody watches."""
    from torchvision import datasets

    datasets.utils.tqdm = functools.partial(tqdm, disable=None, leave=False)
    return datasets
