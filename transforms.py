"""Augmentation and normalisation, written once in Albumentations and run per sample or per batch."""

import copy
import itertools
import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for news

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch import Tensor

from augmentation.batch import BatchProgram
from augmentation.spelling import check_arguments, find_step

# Per channel over all 50,000 x 32 x 32 training pixels, in [0, 1]; `statistics` finds them.
# The common 0.2023, 0.1994, 0.2010 is the mean of each image's own deviation: another quantity.
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)

TRIALS = 8  # of a step, to see whether chance has a part in it

# numpy's names for the borders a batch can be padded with.
_BORDERS = {cv2.BORDER_CONSTANT: "constant", cv2.BORDER_REFLECT_101: "reflect"}


if not TYPE_CHECKING:  # which would no longer see a name that is not there

    def __getattr__(name: str) -> Any:
        """What Albumentations has, for `import transforms as A`: steps in the spelling of before too."""
        if name.startswith("_"):
            raise AttributeError(f"transforms has no {name}")
        return find_step(name)


def train_transform(
    mean: tuple[float, ...] = CIFAR10_MEAN,
    std: tuple[float, ...] = CIFAR10_STD,
    *,
    size: int = 32,
    padding: int = 4,
    flip: bool = True,
    cutout: int = 8,
    grayscale: float = 0.0,
) -> A.Compose:
    """Pad and crop at random, mirror, turn grey, cut a square out, normalise.

    Args:
        mean, std: per channel, of pixels in [0, 1].
        size: side of the square images, pixels.
        padding: reflected border before the crop, pixels; 0 turns the crop off.
        flip: mirror left and right with probability 1/2.
        cutout: side of the erased square, pixels, wholly inside the image and filled with the mean
            colour; 0 turns it off. DeVries & Taylor (arXiv:1708.04552) let it overhang the border.
        grayscale: probability of turning an image grey.

    Returns:
        Takes `image=` uint8 (H, W, 3), gives `["image"]` float (3, H, W).
    """
    steps = []
    if padding:
        side = size + 2 * padding
        steps.append(A.PadIfNeeded(side, side, border_mode=cv2.BORDER_REFLECT_101))
        steps.append(A.RandomCrop(size, size))
    if flip:
        steps.append(A.HorizontalFlip(p=0.5))
    if grayscale:
        steps.append(A.ToGray(p=grayscale))
    if cutout:
        fill = tuple(round(255 * channel) for channel in mean)  # before Normalize: 0 to 255
        steps.append(
            A.CoarseDropout(
                num_holes_range=(1, 1),
                hole_height_range=(cutout, cutout),
                hole_width_range=(cutout, cutout),
                fill=fill,
                p=1.0,
            )
        )
    return A.Compose([*steps, A.Normalize(mean, std), ToTensorV2()])


def test_transform(
    mean: tuple[float, ...] = CIFAR10_MEAN, std: tuple[float, ...] = CIFAR10_STD
) -> A.Compose:
    """Normalise: uint8 (H, W, 3) -> float (3, H, W)."""
    return A.Compose([A.Normalize(mean, std), ToTensorV2()])


def normalization_of(compose: A.Compose) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a pipeline's `Normalize`, of pixels in [0, 1].

    Raises:
        ValueError: it has none.
    """
    for step in compose.transforms:
        if isinstance(step, A.Normalize) and step.normalization == "standard":
            return _mean_and_std(step)
    raise ValueError("the pipeline has no A.Normalize with a mean and a std, which testing needs too")


def _mean_and_std(step: A.Normalize) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Those of pixels in [0, 1]; a step may have those of pixels from 0 to 255."""
    scale = step.max_pixel_value / 255
    mean, std = (np.broadcast_to(values, 3).tolist() for values in (step.mean, step.std))
    return tuple(x * scale for x in mean), tuple(x * scale for x in std)


def evaluation_transform(compose: Any, images: np.ndarray) -> A.Compose:
    """A training pipeline without what is random in it, for validation and test.

    What changes every image in the same way stays: Resize, PadIfNeeded, CenterCrop, Normalize,
    ToTensorV2, a mirroring with p=1. A RandomCrop to another size becomes a CenterCrop. The other random
    steps are left out. Where no step but Normalize matters, this is `test_transform`.

    Args:
        compose: the training pipeline; it stays as it is.
        images: uint8 (N, H, W, 3), of which a few are tried.

    Raises:
        ValueError: it is no A.Compose, it fails on the images, or it gives images of another size or
            type than any evaluation could; the message says what to do.
    """
    if not isinstance(compose, A.Compose):
        owner = "torchvision's " if type(compose).__module__.startswith("torchvision") else ""
        raise ValueError(
            f"the transform must be an A.Compose, not {owner}{type(compose).__name__}: "
            "give A.Compose([..., A.Normalize(mean, std), ToTensorV2()])"
        )
    check_arguments(compose)
    if compose.p != 1:
        raise ValueError(f"the pipeline has p={compose.p}: the rest would come unchanged; leave p at 1")
    mean, std = normalization_of(compose)
    noise = np.random.default_rng(0).integers(40, 200, images.shape[1:], dtype=np.uint8)
    probes = [noise, *images[:3]]
    steps: list[A.BasicTransform] = []
    now = probes
    for step in compose.transforms:
        fixed, now = _without_chance(step, now)
        steps += fixed
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in now):
        raise ValueError("the pipeline must end in A.Normalize(mean, std), ToTensorV2()")
    plain = test_transform(mean, std)
    expected = [plain(image=image)["image"] for image in probes]
    pairs = list(zip(now, expected, strict=True))
    if all(x.shape == y.shape and torch.allclose(x, y, atol=1e-4) for x, y in pairs):
        return plain
    return A.Compose(steps)


def _without_chance(step: Any, images: list[Any]) -> tuple[list[A.BasicTransform], list[Any]]:
    """What evaluation keeps of a step, and what that makes of some images."""
    name = type(step).__name__
    always = copy.deepcopy(step)
    always.p = 1.0
    trials = [_outputs(always, images, seed) for seed in range(TRIALS)]
    kinds = {tuple(map(_kind, outputs)) for outputs in trials}
    before = tuple(map(_kind, images))
    same = all(_equal(x, y) for trial in trials[1:] for x, y in zip(trials[0], trial, strict=True))
    if same and step.p == 1:
        return [always], trials[0]
    if kinds == {before}:
        return [], images
    if isinstance(step, A.RandomCrop) and step.p == 1:
        middle = A.CenterCrop(step.height, step.width, **_padding_of(step))
        return [middle], _outputs(middle, images, 0)
    raise ValueError(
        f"{name} with p={step.p:g} changes size or type of images at random, and evaluation has no "
        f"counterpart of that: use p=1, or put A.Resize or A.RandomCrop in its place or before it"
    )


def _padding_of(step: A.RandomCrop) -> dict[str, Any]:
    """The arguments of a crop that say what is done with an image that is too small."""
    names = ("pad_if_needed", "border_mode", "fill", "pad_position")
    return {name: getattr(step, name) for name in names}


def _outputs(step: Any, images: list[Any], seed: int) -> list[Any]:
    """Some images through one step, whose random numbers begin at `seed`."""
    step.set_random_state(np.random.default_rng(seed), random.Random(seed))
    try:
        return [step(image=image)["image"] for image in images]
    except Exception as error:  # whatever a step of somebody's raises
        shape = "x".join(map(str, images[0].shape))
        why = " ".join(str(error).split())
        raise ValueError(f"{type(step).__name__} fails on an image of {shape}: {why}") from None


def _kind(image: Any) -> tuple:
    """What a network must be given the same of in training and in evaluation."""
    return tuple(image.shape), str(image.dtype)


def _equal(one: Any, other: Any) -> bool:
    """Whether two images are the same, to the bit."""
    return _kind(one) == _kind(other) and bool((one == other).all())


def normalize(
    images: np.ndarray, mean: tuple[float, ...] = CIFAR10_MEAN, std: tuple[float, ...] = CIFAR10_STD
) -> Tensor:
    """`test_transform` of many images at once: uint8 (N, H, W, 3) -> float (N, 3, H, W)."""
    program = BatchProgram(tuple(mean), tuple(std))
    padded_images = program.prepare(images)
    count = len(images)
    return program(
        padded_images, torch.arange(count), program.draw(np.random.default_rng(0), count, padded_images)
    )


def denormalize(
    images: Tensor, mean: tuple[float, ...] = CIFAR10_MEAN, std: tuple[float, ...] = CIFAR10_STD
) -> np.ndarray:
    """Undo the normalisation, for figures: float (N, C, H, W) -> uint8 (N, H, W, C), or of one image."""
    if images.dim() == 3:
        return denormalize(images[None], mean, std)[0]
    pixels = images.detach().cpu().float().permute(0, 2, 3, 1)
    pixels = (pixels * torch.tensor(std) + torch.tensor(mean)).mul(255).round().clamp(0, 255)
    return pixels.byte().numpy()


def vectorize(compose: A.Compose) -> tuple[BatchProgram | None, str]:
    """Turn a pipeline into one program over a whole batch, with the same distribution.

    Known are, in this order and each at most once: PadIfNeeded, RandomCrop, HorizontalFlip, ToGray,
    CoarseDropout with one hole of fixed size, ToTensorV2; and, anywhere before ToTensorV2, Normalize.

    Returns:
        The program and "", or None and the reason why the pipeline must run per sample: the step, and
        what to write instead.

    Raises:
        ValueError: a step left out arguments that it was given; the message says what to write.
    """
    check_arguments(compose)
    if compose.p != 1:
        return None, f"the pipeline has p={compose.p}, and a batch runs it always: leave p at 1"
    parts: dict[str, Any] = {}
    late: list[str] = []
    names = [type(step).__name__ for step in compose.transforms]
    order = [kind.__name__ for kind in _READERS if kind is not A.Normalize]
    for step, name in zip(compose.transforms, names, strict=True):
        if type(step) not in _READERS:
            instead = _INSTEAD.get(name, "without it, the rest may")
            return None, f"{name} does not run as batches ({instead}); what does: {', '.join(order)}"
        part = _READERS[type(step)](step)
        if isinstance(part, str):
            return None, f"{name} runs as batches only with {part}"
        if "mean" in parts:
            late += [word for word in ("border", "gray", "hole") if part.get(word)]
        parts |= part
    places = [order.index(name) for name in names if name != "Normalize"]
    for before, place in itertools.pairwise(places):
        if place <= before:
            cure = "write it once" if place == before else f"write it before {order[before]}"
            return None, f"{order[place]} comes after {order[before]}: {cure}, and batches may run"
    if names.count("Normalize") != 1 or names[-1] != "ToTensorV2":
        return None, "the pipeline does not have one Normalize, and ToTensorV2 at its end"
    if parts.get("border") == "reflect":
        late = [word for word in late if word != "border"]
    return BatchProgram(**parts, late=tuple(late)), ""


# Why steps of notebooks do not run as batches, and what to write in their place.
_INSTEAD = {
    "CropAndPad": "PadIfNeeded in its place does",
    "Sequential": "its steps by themselves may",
    "Compose": "its steps by themselves may",
    "ShiftScaleRotate": "PadIfNeeded and RandomCrop shift in its place",
    "Affine": "PadIfNeeded and RandomCrop shift in its place",
    "GridDropout": "CoarseDropout in its place does",
    "ToFloat": "Normalize alone does its work",
}


def _read_pad(step: A.PadIfNeeded) -> dict | str:
    plain = step.p == 1 and step.position == "center" and step.border_mode in _BORDERS
    if not plain or step.min_height is None or step.min_width is None:
        return (
            'min_height, min_width, position="center", p=1 and border_mode 0 (constant) or 4 (reflected)'
        )
    border = _BORDERS[step.border_mode]
    return {"pad": (step.min_height, step.min_width), "border": border, "border_fill": step.fill}


def _read_crop(step: A.RandomCrop) -> dict | str:
    if step.p != 1 or step.pad_if_needed:
        return "p=1 and without pad_if_needed: PadIfNeeded before it pads"
    return {"crop": (step.height, step.width)}


def _read_gray(step: A.ToGray) -> dict | str:
    if step.method != "weighted_average" or step.num_output_channels != 3:
        return 'method="weighted_average" and num_output_channels=3'
    return {"gray": step.p}


def _read_hole(step: A.CoarseDropout) -> dict | str:
    sizes = (step.hole_height_range, step.hole_width_range)
    fixed = all(low == high and isinstance(low, int) and low >= 1 for low, high in sizes)
    if not fixed or tuple(step.num_holes_range) != (1, 1) or isinstance(step.fill, str):
        return "one hole of a fixed size in pixels, as num_holes_range=(1, 1), hole_height_range=(8, 8)"
    return {"hole": step.p, "hole_size": (sizes[0][0], sizes[1][0]), "hole_fill": step.fill}


def _read_normalize(step: A.Normalize) -> dict | str:
    if step.p != 1 or step.normalization != "standard":
        return 'p=1 and normalization="standard"'
    mean, std = _mean_and_std(step)
    return {"mean": mean, "std": std}


_READERS: dict[type, Callable[[Any], dict | str]] = {
    A.PadIfNeeded: _read_pad,
    A.RandomCrop: _read_crop,
    A.HorizontalFlip: lambda step: {"flip": step.p},
    A.ToGray: _read_gray,
    A.CoarseDropout: _read_hole,
    A.Normalize: _read_normalize,
    ToTensorV2: lambda step: {} if step.p == 1 else "p=1",
}
