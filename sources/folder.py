"""A user's own pictures: one folder for each class."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from sources.split import Split, stratified_split

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
PARTS = {"train", "test", "val", "valid", "validation"}  # folders that are no classes, if all there is
MOST_PIXELS = 50_000_000  # of an image file; more is refused before it is decoded
# The turn that shows a photograph upright, by the orientation in its metadata; 1 needs none.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
UPRIGHT = {number: Image.Transpose[name] for number, name in enumerate(_TURNS, 2)}


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
        # The same split for every seed, so that runs with different seeds are tested on the same images.
        sides = stratified_split(np.array([label for _, label in files]), 0.2, seed=0)
        train, test = ([files[i] for i in side] for side in sides)
    wanted, rest = (train, test) if split == "train" else (test, train)
    return read_images(classes, wanted, image_size, rest)


def list_images(folder: Path, tell: bool = False) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names, and (file, label) of every image below `folder`; hidden files are not looked at.

    Args:
        tell: print how many other files there are.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(classes) < 2:
        raise ValueError(f"{folder} must hold one folder for each class, two or more, not {classes}")
    suffixes = Image.registered_extensions()
    files: list[tuple[Path, int]] = []
    passed = []
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
    classes: tuple[str, ...],
    files: Sequence[tuple[Path, int]],
    image_size: int,
    others: Sequence[tuple[Path, int]] = (),
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


def read_all(files: Sequence[tuple[Path, int]], image_size: int) -> tuple[list[np.ndarray], list[str]]:
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
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            upright = image if turn is None else image.transpose(turn)
            if upright.mode.startswith("I;16"):  # Pillow would cut the values off at 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            upright = upright.convert("RGB")
            return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{path} is no readable image ({reason})") from None


@contextlib.contextmanager
def quiet_open(path: str | Path) -> Iterator[Image.Image]:
    """An image file, without Pillow's warnings of size, palette and damaged metadata.

    They are safe to hide: `read_image` has a limit of its own, and a truncated file still raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            yield image
