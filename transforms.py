"""Augmentation and normalisation, written once in Albumentations and run per sample or per batch."""

import copy
import functools
import math
import os
import random
from typing import Any, NamedTuple

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for news

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch import Tensor

# Per channel over all 50,000 x 32 x 32 training pixels, in [0, 1]; `statistics` finds them.
# The common 0.2023, 0.1994, 0.2010 is the mean of each image's own deviation: another quantity.
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)

TRIALS = 8  # of a step, to see whether chance has a part in it

# numpy's names for the borders a batch can be padded with.
_BORDERS = {cv2.BORDER_CONSTANT: "constant", cv2.BORDER_REFLECT_101: "reflect"}


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
    return tuple(x * scale for x in step.mean), tuple(x * scale for x in step.std)


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
        raise ValueError(
            f"the transform must be an A.Compose, not {type(compose).__name__}: "
            "give A.Compose([..., A.Normalize(mean, std), ToTensorV2()])"
        )
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
    """Undo the normalisation, for figures: float (N, C, H, W) -> uint8 (N, H, W, C)."""
    pixels = images.detach().cpu().float().permute(0, 2, 3, 1)
    pixels = (pixels * torch.tensor(std) + torch.tensor(mean)).mul(255).round().clamp(0, 255)
    return pixels.byte().numpy()


class AugmentParams(NamedTuple):
    """One random decision of each kind per image, each (N,): int64 offsets in pixels, bool yes or no."""

    top: Tensor  # of the crop, in the padded image
    left: Tensor
    flip: Tensor
    gray: Tensor
    hole: Tensor
    hole_top: Tensor  # in the cropped image
    hole_left: Tensor

    def at(self, positions: slice) -> "AugmentParams":
        """The decisions for some of the positions."""
        return AugmentParams(*(draw[positions] for draw in self))

    def to(self, device: torch.device) -> "AugmentParams":
        """The decisions on another device."""
        return AugmentParams(*(draw.to(device) for draw in self))


class BatchProgram(NamedTuple):
    """A pipeline of known operations as one program over a batch, on the device that holds the data.

    Pad, crop and flip are a single gather from images that were padded and mirrored once. One core,
    batch 512: 485 k images/s, where the same pipeline per sample makes 11.8 k (AMD EPYC).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: tuple[int, int] = (0, 0)  # least height and width before the crop
    border: str = "reflect"
    border_fill: tuple[float, ...] | float = 0
    crop: tuple[int, int] | None = None  # height and width; None: the whole image
    flip: float = 0.0  # probabilities
    gray: float = 0.0
    hole: float = 0.0
    hole_size: tuple[int, int] = (0, 0)
    hole_fill: tuple[float, ...] | float = 0

    def prepare(self, images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
        """uint8 (N, H, W, C) -> the padded images and, if the program flips, their mirror images.

        Returns:
            uint8 (N, 1 or 2, H', W', C) on the device, which `__call__` gathers from.
        """
        count, height, width, channels = images.shape
        rows = padded(height, self.pad[0], self.border)[:, None]
        columns = padded(width, self.pad[1], self.border)
        columns = np.stack([columns, columns[::-1]] if self.flip else [columns])[:, None]
        outside = (rows < 0) | (columns < 0)
        source = np.where(outside, height * width, rows * width + columns)  # (1 or 2, H', W')
        pixels = torch.from_numpy(images).to(device).reshape(count, height * width, channels)
        if outside.any():
            fill = constant(self.border_fill, pixels.device).to(torch.uint8)
            pixels = torch.cat([pixels, fill.expand(count, 1, channels)], dim=1)
        return pixels[:, torch.from_numpy(source).to(device)]

    def draw(self, rng: np.random.Generator, count: int, padded_images: Tensor) -> AugmentParams:
        """Decide for `count` images at once; the same generator gives the same decisions."""
        height, width = padded_images.shape[2:4]
        crop_height, crop_width = self.crop or (height, width)
        augment_params = (
            rng.integers(0, height - crop_height, count, endpoint=True),
            rng.integers(0, width - crop_width, count, endpoint=True),
            rng.random(count) < self.flip,
            rng.random(count) < self.gray,
            rng.random(count) < self.hole,
            rng.integers(0, crop_height - self.hole_size[0], count, endpoint=True),
            rng.integers(0, crop_width - self.hole_size[1], count, endpoint=True),
        )
        return AugmentParams(*(torch.from_numpy(draw) for draw in augment_params))

    def __call__(self, padded_images: Tensor, index: Tensor, augment_params: AugmentParams) -> Tensor:
        """Augment and normalise the images of `padded_images` at `index`.

        Args:
            store: from `prepare`, on any device.
            index: int64 (n,), which images.
            draws: from `draw`, (n,) each, on the same device.

        Returns:
            float (n, C, h, w) in channels-last memory.
        """
        height, width = self.crop or padded_images.shape[2:4]
        # The crop comes before the flip: seen from the mirror image, its offset counts from the right.
        left = torch.where(
            augment_params.flip,
            padded_images.shape[3] - width - augment_params.left,
            augment_params.left,
        )
        view = index * padded_images.shape[1] + augment_params.flip
        where = position(padded_images, view, augment_params.top, left)
        images = windows(padded_images, height, width).index_select(0, where)
        images = images.view(len(index), height, width, -1)
        if self.gray:
            images = torch.where(augment_params.gray.view(-1, 1, 1, 1), to_gray(images), images)
        if self.hole:
            self._cut(images, augment_params)
        # A row of pixels at a time: three channels alone would leave the processor's lanes empty.
        mean, std = (constant(row * width, images.device) * 255 for row in (self.mean, self.std))
        values = images.float()
        values.view(-1, len(mean)).sub_(mean).mul_(1 / std)
        return values.permute(0, 3, 1, 2)

    def _cut(self, images: Tensor, augment_params: AugmentParams) -> None:
        """Fill each image's hole, in place."""
        every = torch.arange(len(images), device=images.device)
        where = position(images, every, augment_params.hole_top, augment_params.hole_left)
        holes = windows(images, *self.hole_size)
        fill = constant(self.hole_fill, images.device).to(images.dtype)
        fill = fill.expand(images.shape[-1]).repeat(self.hole_size[1])
        if self.hole < 1:
            fill = torch.where(augment_params.hole.view(-1, 1, 1), fill, holes[where])
        holes[where] = fill


def windows(images: Tensor, height: int, width: int) -> Tensor:
    """Every height x width window of images (..., H, W, C), as a view (positions, height, width x C).

    Its rows are runs of bytes, which are copied at once: three times as fast as pixel by pixel. Windows
    across an image's border are nonsense, and `position` never names one.
    """
    *count, rows, columns, channels = images.shape
    last = (math.prod(count) * rows - height + 1) * columns - width + 1
    return images.as_strided((last, height, width * channels), (channels, columns * channels, 1))


def position(images: Tensor, image: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Where in `windows` of images (..., H, W, C) those at these places are."""
    rows, columns = images.shape[-3:-1]
    return (image * rows + top) * columns + left


def padded(side: int, least: int, border: str) -> np.ndarray:
    """The source index of each pixel of a padded row, -1 for fill; an extra pixel comes last."""
    missing = max(0, least - side)
    widths = (missing // 2, missing - missing // 2)
    if border == "reflect":
        return np.pad(np.arange(side), widths, mode="reflect")
    return np.pad(np.arange(side), widths, mode="constant", constant_values=-1)


@functools.lru_cache
@torch.inference_mode(False)
def constant(values: tuple[float, ...] | float, device: torch.device) -> Tensor:
    """Numbers on a device, copied there once: each copy would wait for the device."""
    return torch.tensor(values, device=device)


def to_gray(images: Tensor) -> Tensor:
    """uint8 RGB (N, H, W, 3) -> the same shape, grey, with OpenCV's fixed-point weights to the bit."""
    red, green, blue = images.int().unbind(-1)
    gray = (9798 * red + 19235 * green + 3735 * blue + (1 << 14)) >> 15
    return gray.to(torch.uint8).unsqueeze(-1).expand_as(images)


def vectorize(compose: A.Compose) -> tuple[BatchProgram | None, str]:
    """Turn a pipeline into one program over a whole batch, with the same distribution.

    Known are, in this order and each at most once: PadIfNeeded, RandomCrop, HorizontalFlip, ToGray,
    CoarseDropout with one hole of fixed size, Normalize, ToTensorV2.

    Returns:
        The program and "", or None and the reason why the pipeline must run per sample.
    """
    if compose.p != 1:
        return None, f"the pipeline has p={compose.p}, and a batch runs it always"
    parts: dict[str, Any] = {}
    order = iter(_READERS.items())
    for step in compose.transforms:
        name = type(step).__name__
        reader = next((read for kind, read in order if type(step) is kind), None)
        if reader is None:
            known = ", ".join(kind.__name__ for kind in _READERS)
            return None, f"{name} is unknown or out of order; known in order: {known}"
        part = reader(step)
        if part is None:
            return None, f"{name} has arguments that only the per-sample path knows"
        parts |= part
    if "mean" not in parts or type(compose.transforms[-1]) is not ToTensorV2:
        return None, "the pipeline does not end in Normalize, ToTensorV2"
    return BatchProgram(**parts), ""


def _read_pad(step: A.PadIfNeeded) -> dict | None:
    plain = step.p == 1 and step.position == "center" and step.border_mode in _BORDERS
    if not plain or step.min_height is None or step.min_width is None:
        return None
    border = _BORDERS[step.border_mode]
    return {"pad": (step.min_height, step.min_width), "border": border, "border_fill": step.fill}


def _read_crop(step: A.RandomCrop) -> dict | None:
    if step.p != 1 or step.pad_if_needed:
        return None
    return {"crop": (step.height, step.width)}


def _read_gray(step: A.ToGray) -> dict | None:
    if step.method != "weighted_average" or step.num_output_channels != 3:
        return None
    return {"gray": step.p}


def _read_hole(step: A.CoarseDropout) -> dict | None:
    sizes = (step.hole_height_range, step.hole_width_range)
    fixed = all(low == high and isinstance(low, int) and low >= 1 for low, high in sizes)
    if not fixed or tuple(step.num_holes_range) != (1, 1) or isinstance(step.fill, str):
        return None
    return {"hole": step.p, "hole_size": (sizes[0][0], sizes[1][0]), "hole_fill": step.fill}


def _read_normalize(step: A.Normalize) -> dict | None:
    if step.p != 1 or step.normalization != "standard":
        return None
    mean, std = _mean_and_std(step)
    return {"mean": mean, "std": std}


_READERS = {
    A.PadIfNeeded: _read_pad,
    A.RandomCrop: _read_crop,
    A.HorizontalFlip: lambda step: {"flip": step.p},
    A.ToGray: _read_gray,
    A.CoarseDropout: _read_hole,
    A.Normalize: _read_normalize,
    ToTensorV2: lambda step: {} if step.p == 1 else None,
}
