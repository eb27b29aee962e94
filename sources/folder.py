"""A user's own pictures: one folder for each class."""

import contextlib
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from sources.image_file import check_image_file
from sources.split import Split, check_names, stratified_split
from utils import choose, printable

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
# Names of folders that hold a part of the data, not a class; words such as "set" may stand beside them.
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
}
BESIDE = ("set", "split", "data", "dataset", "images", "image", "imgs", "img", "files")
# Folders that programs leave behind, besides hidden ones; they are not looked at.
LEFT_BEHIND = ("__macosx", "__pycache__", "lost+found", "@eadir", "$recycle.bin")
MOST_PIXELS = 50_000_000  # of an image file; more is refused before it is decoded
# What can be done to a picture that is not square, in words.
FITS = {
    "squeeze": "squeezed to a square",
    "pad": "padded with grey to a square",
    "crop": "cropped to the square in their middle",
}
PADDING = (128, 128, 128)
DEPTHS = (8, 10, 12, 14, 16)  # bits of a grey value, as sensors have them
DEEP_LEAST = 64  # of the brightest 8 bits of a colour image of 16: under it, its data have 14 or fewer
# The turn that shows a photograph upright, by the orientation in its metadata; 1 needs none.
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
UPRIGHT = {number: Image.Transpose[name] for number, name in enumerate(_TURNS, 2)}


def load_folder(split: str, root: Path, image_size: int, fit: str) -> Split:
    """A user's own images: one folder a class, files of any size.

    With the training images it prints how many became what.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {printable(root)}")
    choose("fit", fit, FITS)
    tell = split == "train"  # once a run
    if parts := find_parts(root):
        (classes, train), (others, test) = (list_images(part, tell) for part in parts)
        check_same_classes(parts, classes, others)
        rest = [name for name in folders_in(root) if root / name not in parts]
        if rest and tell:
            print(f"{printable(root)}: passed over {listed(rest)}")
    else:
        classes, files = list_images(root, tell)
        # The same split for every seed, so that runs with different seeds are tested on the same images.
        sides = stratified_split(np.array([label for _, label in files]), 0.2, seed=0)
        train, test = ([files[i] for i in side] for side in sides)
    wanted, unwanted = (train, test) if split == "train" else (test, train)
    images, ratios = read_images(wanted, image_size, fit, unwanted)
    if tell:
        how = f"as {listed(part.name for part in parts)} hold them" if parts else "a fifth of each class"
        print(f"{printable(root)}: {counts(classes, train, test)}; {how}")
        tell_shapes(ratios, fit)
    labels = np.array([label for _, label in wanted])
    names = tuple(printable(path.relative_to(root)) for path, _ in wanted)
    prepared = f"images that are not square are {FITS[fit]}" if max(ratios) > 1 else ""
    return Split(images, labels, classes, names, prepared)


def counts(
    classes: Sequence[str], train: Sequence[tuple[Path, int]], test: Sequence[tuple[Path, int]]
) -> str:
    """How many training and test images there are, and of each class."""
    each = [np.bincount([label for _, label in part], minlength=len(classes)) for part in (train, test)]
    rows = (f"{name} {a:,} + {b:,}" for name, a, b in zip(classes, *each, strict=True))
    return f"{len(train):,} training + {len(test):,} test images: {listed(rows)}"


def tell_shapes(ratios: Sequence[float], fit: str) -> None:
    """Print how many training images are not square, if any, and what is done to them."""
    oblong = [ratio for ratio in ratios if ratio > 1]
    if not oblong:
        return
    ways = " or ".join(f"--fit {other}" for other in FITS if other != fit)
    print(
        f"{len(oblong):,} of {len(ratios):,} training images are not square (up to "
        f"{max(oblong):.2f} : 1) and are {FITS[fit]}; {ways} does otherwise"
    )


def find_parts(root: Path) -> tuple[Path, Path] | None:
    """The folders of the training and of the test images, or None if `root` holds classes.

    Raises:
        ValueError: there are parts, but not one of each.
    """
    names = folders_in(root)
    place = printable(root)
    parts: dict[str, list[str]] = {"train": [], "test": [], "val": []}
    for name in names:
        if part := part_of(name):
            parts[part].append(name)
    if parts["train"] and parts["test"]:
        for part in ("train", "test"):
            if len(parts[part]) > 1:
                raise ValueError(
                    f"{place} has {listed(parts[part])}, which all name the {part} images: keep one"
                )
        return root / parts["train"][0], root / parts["test"][0]
    if names and len(names) == sum(map(len, parts.values())):
        raise ValueError(
            f"{place} has {listed(names)}; it needs folders train and test: rename what is there, or "
            "put the classes into one folder, a fifth of which then becomes the test set"
        )
    return None


def part_of(name: str) -> str | None:
    """The part of the data that a folder's name names, such as "train" for TRAIN_SET, or None."""
    words = [word for word in re.findall("[a-z]+", name.casefold()) if word not in BESIDE]
    word = words[0] if len(words) == 1 else ""
    for end in ("", *BESIDE):
        if word.endswith(end) and word.removesuffix(end) in PARTS:
            return PARTS[word.removesuffix(end)]
    return None


def looked_at(name: str) -> bool:
    """Whether a file or folder is the user's: neither hidden nor left behind by a program."""
    return name[0] != "." and name.casefold() not in LEFT_BEHIND


def folders_in(folder: Path) -> list[str]:
    """The names of the folders that a folder holds, in order."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and looked_at(path.name))


def listed(names: Iterable[str], most: int = 10) -> str:
    """Some names in one line, however many there are."""
    shown = [printable(name) for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more


def check_same_classes(parts: tuple[Path, Path], train: Sequence[str], test: Sequence[str]) -> None:
    """Refuse two parts whose class folders differ, by the names in which they do.

    Raises:
        ValueError: they are named.
    """
    if train == test:
        return
    said = []
    for part, names, others in zip(parts, (train, test), (test, train), strict=True):
        if alone := [name for name in names if name not in others]:
            said.append(f"only {printable(part)} has {listed(alone)}")
    plain = [
        {unicodedata.normalize("NFC", name).casefold() for name in names} for names in (train, test)
    ]
    hint = "; they differ in how letters are written alone" if plain[0] == plain[1] else ""
    raise ValueError(f"both parts must have the same classes, but {' and '.join(said)}{hint}")


def list_images(folder: Path, tell: bool = False) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names, and (file, label) of every image below `folder`; hidden files are not looked at.

    Args:
        tell: print how many other files there are.

    Raises:
        ValueError: these are not two folders or more that each hold the images of a class.
    """
    classes, place = folders_in(folder), printable(folder)
    if len(classes) < 2:
        what = f"only {listed(classes)}" if classes else "none"
        if classes and folders_in(folder / classes[0]):
            what += f"; if its folders are the classes, give {printable(folder / classes[0])} instead"
        raise ValueError(f"{place} must hold one folder for each class, two or more, and has {what}")
    check_names(classes)
    suffixes = Image.registered_extensions()
    files: list[tuple[Path, int]] = []
    passed = []
    for label, name in enumerate(classes):
        before = len(files)
        for path in sorted((folder / name).rglob("*")):
            suffix = path.suffix.lower()
            if path.is_dir() or not all(map(looked_at, path.relative_to(folder).parts)):
                continue
            if suffixes.get(suffix) in IMAGE_FORMATS:
                files.append((path, label))
            else:
                passed.append(suffix or path.name)
        if len(files) == before:
            formats = ", ".join(IMAGE_FORMATS)
            raise ValueError(f"{printable(folder / name)} holds no image ({formats}): fill or remove it")
    check_layout(folder, classes, files)
    if passed and tell:
        kinds = ", ".join(f"{printable(kind)} {n}" for kind, n in Counter(passed).most_common(5))
        print(f"{place}: passed over files that are no {', '.join(IMAGE_FORMATS)}: {kinds}")
    return tuple(classes), files


def check_layout(folder: Path, classes: Sequence[str], files: Sequence[tuple[Path, int]]) -> None:
    """Refuse parts of the data that would be taken for classes.

    Those are folders that hold no image themselves but two folders or more, where all of them have such
    folders in common (fold1/cat, fold1/dog, fold2/cat, ...) or one has the name of a part.

    Raises:
        ValueError: they are named.
    """
    inner: list[set[str]] = [set() for _ in classes]  # of each class: names of folders with images
    outer: dict[str, str] = {}  # the same names, casefolded, and as they are
    for path, label in files:
        name = path.parent.name if path.parent != folder / classes[label] else ""
        inner[label].add(name.casefold())
        outer[name.casefold()] = name
    nested = [len(names) > 1 and "" not in names for names in inner]
    shared = set.intersection(*inner)
    named = [k for k, name in enumerate(classes) if nested[k] and part_of(name)]
    if not named and not (all(nested) and len(shared) > 1):
        return
    outer_folders, within = (
        ([classes[k] for k in named], inner[named[0]]) if named else (classes, shared)
    )
    folders = listed(outer[name] for name in sorted(within))
    raise ValueError(
        f"{printable(folder)} has {listed(outer_folders)}, with folders {folders} in them: if those are "
        "the classes, name the outer folders train and test; if not, put the images of each class "
        "directly into its folder"
    )


def read_images(
    files: Sequence[tuple[Path, int]], image_size: int, fit: str, others: Sequence[tuple[Path, int]] = ()
) -> tuple[np.ndarray, list[float]]:
    """Read and resize them all; the unreadable ones are named, with those of `others`, another split.

    Returns:
        uint8 (N, image_size, image_size, 3), and the longer side / the shorter one of each file.

    Raises:
        ValueError: names five of them; if there are more, all were printed, one a line.
    """
    images, ratios, bad = read_all(files, image_size, fit)
    if bad:
        bad += read_all(others, image_size, fit)[2]
        more = ""
        if len(bad) > 5:
            print(*bad, sep="\n")
            more = f"; and {len(bad) - 5} more, listed above"
        total = len(files) + len(others)
        raise ValueError(f"{len(bad)} of {total} files cannot be used: {'; '.join(bad[:5])}{more}")
    return np.stack(images), ratios


def read_all(
    files: Sequence[tuple[Path, int]], image_size: int, fit: str
) -> tuple[list[np.ndarray], list[float], list[str]]:
    """The images that can be read, the ratios of their sides, and what is wrong with the others."""
    images, ratios, bad = [], [], []
    for path, _ in tqdm(files, desc="reading", unit="image", disable=None, leave=False):
        try:
            image = open_image(path)
            images.append(to_square(image, image_size, fit))
            ratios.append(max(image.size) / min(image.size))
        except ValueError as error:
            bad.append(str(error))
    return images, ratios, bad


def read_image(path: str | Path, size: int, fit: str = "squeeze") -> np.ndarray:
    """Any image file as uint8 (size, size, 3): turned upright, RGB over white, made square.

    Args:
        size: pixels.
        fit: what is done to a picture that is not square: "squeeze", "pad" or "crop".

    Raises:
        ValueError: no file, no image, or more than `MOST_PIXELS` pixels.
    """
    return to_square(open_image(path), size, fit)


def to_square(image: Image.Image, size: int, fit: str) -> np.ndarray:
    """An RGB image as uint8 (size, size, 3); a square one is the same whatever the `fit`."""
    if fit == "crop":
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    if fit == "squeeze":
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)
    square = Image.new("RGB", (size, size), PADDING)
    inner = image.resize((width, height), Image.Resampling.BICUBIC)
    square.paste(inner, ((size - width) // 2, (size - height) // 2))
    return np.asarray(square)


def open_image(path: str | Path) -> Image.Image:
    """Any image file, decoded: turned upright, RGB.

    What is transparent becomes white, as a page shows it. Of an animation the first picture is read.

    Raises:
        ValueError: no file, no image, or more than `MOST_PIXELS` pixels.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("no file")
        check_image_file(path)
        with quiet_open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, over {MOST_PIXELS:,}")
            deep = is_deep(image)  # before getexif, which decodes it
            # Not exif_transpose, which writes all metadata anew and fails where any of it is odd.
            turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            upright = opaque(image, deep)
            return upright if turn is None else upright.transpose(turn)
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ValueError(f"{printable(path)} is no readable image ({reason})") from None


def is_deep(image: Image.Image) -> bool:
    """Whether an image that was just opened is a PNG file of 16 bits a channel."""
    tiles = getattr(image, "tile", [])
    return any(isinstance(tile.args, str) and tile.args.endswith(";16B") for tile in tiles)


def opaque(image: Image.Image, deep: bool) -> Image.Image:
    """An image as RGB over white.

    Args:
        deep: its file has 16 bits a channel, of which Pillow reads the upper 8 unless the image is grey.
    """
    if image.mode.startswith("I;16"):
        return shades(np.asarray(image), image.info.get("transparency"))
    plain = image.convert("RGBA") if image.has_transparency_data else image.convert("RGB")
    if deep and np.asarray(plain)[..., :3].max() < DEEP_LEAST:
        raise ValueError("16 bits a channel, of which the upper two are empty; save it with 8")
    if plain.mode == "RGB":
        return plain
    white = Image.new("RGB", plain.size, "white")
    white.paste(plain, mask=plain.getchannel("A"))
    return white


def shades(values: np.ndarray, transparent: int | None) -> Image.Image:
    """A grey image of 16 bits as RGB over white.

    Cameras and scanners of 10, 12 or 14 bits leave the upper ones empty: the least of these depths that
    holds the greatest value becomes 0 to 255.

    Args:
        values: (H, W), 0 to 65535.
        transparent: the value that stands for no colour.
    """
    depth = next(depth for depth in DEPTHS if int(values.max()) < 1 << depth)
    grey = (values.astype(np.int64) >> (depth - 8)).astype(np.uint8)
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


@contextlib.contextmanager
def quiet_open(path: str | Path) -> Iterator[Image.Image]:
    """An image file, without Pillow's warnings of size, palette and damaged metadata.

    They are safe to hide: `read_image` has a limit of its own, and a truncated file still raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            yield image
