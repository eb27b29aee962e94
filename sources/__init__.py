"""The datasets, by name; each is loaded as a `Split` of images and labels."""

from collections.abc import Callable
from pathlib import Path

from sources.cifar10 import load_cifar10, load_sample
from sources.folder import load_folder
from sources.split import Split, statistics
from sources.torchvision_sets import FETCHED, load_fetched
from utils import choose

__all__ = ["DATASETS", "Split", "load_split", "statistics"]


Load = Callable[[str, Path, int, str], Split]


def fetched(name: str) -> Load:
    """How a dataset of torchvision's is loaded; its images have their size already."""
    return lambda split, root, *_: load_fetched(name, split, root)


# Each is called with the split, the folder of the data, the side of its images in pixels, and how
# pictures become square.
DATASETS: dict[str, Load] = {
    "cifar10": lambda split, root, *_: load_cifar10(split, root),
    "cifar10-sample": lambda split, *_: load_sample(split),
    **{name: fetched(name) for name in FETCHED},
    "folder": load_folder,
}


def load_split(
    dataset: str,
    split: str,
    root: str | Path = "datasets",
    *,
    image_size: int = 32,
    fit: str = "squeeze",
) -> Split:
    """Load the training or test images of a dataset, fetching it if `root` has no whole copy.

    Args:
        dataset: "cifar10", "cifar10-sample" (in the repository), "cifar100", "fashion_mnist", "svhn"
            or "folder": `root` holds train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE, a fifth
            of which is the test set.
        split: "train" or "test".
        root: folder of the data.
        image_size: side that a folder's images are resized to, pixels.
        fit: what is done to a folder's pictures that are not square: "squeeze", "pad" or "crop".

    Raises:
        ValueError: unknown name, or unusable images; the message names them.
        OSError: the dataset could not be had; the message says why, and what to do.
    """
    choose("split", split, ("train", "test"))
    choose("dataset", dataset, DATASETS)
    return DATASETS[dataset](split, Path(root), image_size, fit)
