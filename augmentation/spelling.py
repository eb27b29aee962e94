"""Albumentations as it was spelt before version 2, which 2.0.8 warns of and then leaves out."""

import inspect
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the network for news

import albumentations as A
import cv2

# One argument of now for one of before, where the step has the one of now.
RENAMED = {
    "fill_value": "fill",
    "mask_fill_value": "fill_mask",
    "value": "fill",
    "mask_value": "fill_mask",
    "cval": "fill",
    "cval_mask": "fill_mask",
    "mode": "border_mode",
    "pad_cval": "fill",
    "pad_cval_mask": "fill_mask",
    "pad_mode": "border_mode",
}
# One argument of now for a pair of before.
PAIRED = {
    "num_holes_range": ("min_holes", "max_holes"),
    "hole_height_range": ("min_height", "max_height"),
    "hole_width_range": ("min_width", "max_width"),
    "size": ("height", "width"),
}
HOLES = 8  # the number of holes, and their height and width in pixels, that were the defaults
# The order of arguments without a name, where it was another.
ORDER = {
    "CoarseDropout": (
        *("max_holes", "max_height", "max_width", "min_holes", "min_height", "min_width"),
        *("fill_value", "mask_fill_value", "always_apply", "p"),
    ),
    "Cutout": ("num_holes", "max_h_size", "max_w_size", "fill_value", "always_apply", "p"),
    "RandomResizedCrop": ("height", "width", "scale", "ratio", "interpolation", "always_apply", "p"),
}
# These reflected the image at its border unless told otherwise; now they paint the border black.
REFLECTED = (
    *("PadIfNeeded", "ShiftScaleRotate", "Rotate", "SafeRotate"),
    *("ElasticTransform", "GridDistortion", "OpticalDistortion"),
)
# What a step that is no longer there can be written as.
GONE = {
    "Flip": "OneOf([HorizontalFlip(p=1), VerticalFlip(p=1), Rotate((180, 180), p=1)], p=0.5)",
    "RandomBrightness": "RandomBrightnessContrast(contrast_limit=0)",
    "RandomContrast": "RandomBrightnessContrast(brightness_limit=0)",
    "IAAFliplr": "HorizontalFlip",
    "JpegCompression": "ImageCompression",
}


def make_step(name: str, *values: Any, **arguments: Any) -> A.BasicTransform:
    """A step of Albumentations from its arguments, spelt as now or as before version 2.

    What is spelt as before is read with the defaults of then, and a line says what became of it.
    `Cutout` becomes a CoarseDropout, whose holes lie wholly inside the image.

    Raises:
        ValueError: an argument that the step has not, or a value that it does not take; one line.
    """
    kind = A.CoarseDropout if name == "Cutout" else getattr(A, name)
    known = inspect.signature(kind).parameters
    older = name == "Cutout" or (type(next(iter(values), None)) in (int, float) and name in ORDER)
    order = ORDER[name] if older else tuple(known)
    if len(values) > len(order):
        raise ValueError(f"{name} takes {len(order)} arguments at most, not {len(values)}")
    given = dict(zip(order, values, strict=False)) | arguments
    read = translate(name, given, known)
    wrong = [argument for argument in read if argument not in (*known, "strict")]
    if wrong:
        raise ValueError(f"{name} has no argument {', '.join(wrong)}: {cure_of(wrong, known)}")
    try:
        step = kind(**read)
    except ValueError as error:  # pydantic's, of several lines
        words = " ".join(str(error).split()[5:]).partition(" [type=")[0]
        raise ValueError(f"{name} does not take {words}") from None
    if read != {argument: value for argument, value in given.items() if argument != "always_apply"}:
        before, now = written(name, given), written(kind.__name__, read)
        print(f"{before}, spelt as before Albumentations 2, is read as {now}")
    return step


def cure_of(wrong: list[str], known: Collection[str]) -> str:
    """What to write for arguments that a step has not."""
    return "write PadIfNeeded before it" if wrong == ["pad"] else f"it has {', '.join(known)}"


def written(name: str, arguments: dict[str, Any]) -> str:
    """A step as one writes it."""
    return f"{name}({', '.join(f'{argument}={value!r}' for argument, value in arguments.items())})"


def translate(
    name: str, given: dict[str, Any], known: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """Arguments as they are called now; those that have no counterpart stay as they are.

    Args:
        name: of the step, in the spelling of `given`.
        known: the arguments that the step has now.
    """
    sizes = ORDER["CoarseDropout"][:3]
    if name == "Cutout":
        words = dict(zip(ORDER["Cutout"], sizes, strict=False))
        given = {words.get(argument, argument): value for argument, value in given.items()}
    elif given.keys() <= {*known, "strict"}:
        return given
    if name in ("Cutout", "CoarseDropout") and not given.keys() & PAIRED.keys():
        given = dict.fromkeys(sizes, HOLES) | given
    read: dict[str, Any] = {}
    for argument, value in given.items():
        now = new_name(argument, known) or argument
        if now != argument and now in PAIRED:
            read[now] = pair(now, given)
        elif argument != "always_apply" and (value is not None or now == argument):
            read[now] = value
    if given.get("always_apply") and known["p"].default != 1:
        read["p"] = 1
    if name in REFLECTED:
        read.setdefault("border_mode", cv2.BORDER_REFLECT_101)
    return read


def pair(now: str, given: dict[str, Any]) -> tuple[Any, Any]:
    """A range, or a height and a width, from the two arguments that it was."""
    low, high = (given.get(argument) for argument in PAIRED[now])
    if now == "size":
        return low, high
    high = HOLES if high is None else high
    return (high if low is None else low), high


def new_name(argument: str, known: Collection[str]) -> str | None:
    """What an argument of before is called in a step that has those `known`; None: nothing."""
    if argument in known:
        return argument
    names = [RENAMED.get(argument), *(now for now, pair in PAIRED.items() if argument in pair)]
    return next((now for now in names if now in known), None)


def find_step(name: str) -> Any:
    """What Albumentations has by a name; its steps take either spelling.

    Raises:
        AttributeError: it has nothing of that name; what can be written instead, if that is known.
    """
    if name != "Cutout" and not hasattr(A, name):
        cure = f": write {GONE[name]}" if name in GONE else ""
        raise AttributeError(f"neither transforms nor Albumentations {A.__version__} has {name}{cure}")
    found = getattr(A, name, None)
    if name == "Cutout" or (isinstance(found, type) and issubclass(found, A.BasicTransform)):
        return lambda *values, **arguments: make_step(name, *values, **arguments)
    return found


def steps_in(pipeline: Any) -> Iterator[A.BasicTransform]:
    """Every step of a pipeline, and of pipelines in it."""
    if isinstance(pipeline, A.BasicTransform):
        yield pipeline
    for step in pipeline.transforms if isinstance(pipeline, A.BaseCompose) else ():
        yield from steps_in(step)


def check_arguments(pipeline: Any) -> None:
    """Refuse a pipeline whose steps left out arguments that they were given.

    Albumentations 2.0.8 keeps their names and not their values, so they cannot be made good here. Those
    that change no image are passed over: of masks, `always_apply` where p is 1, the colour of a border
    that is reflected.

    Raises:
        ValueError: one line that names step and arguments, and says what to write.
    """
    for step in steps_in(pipeline):
        name, known = type(step).__name__, list(inspect.signature(type(step)).parameters)
        changing = [x for x in getattr(step, "invalid_args", ()) if changes_images(step, x, known)]
        if not changing:
            continue
        cures = {x: "p=1" if x == "always_apply" else new_name(x, known) for x in changing}
        lost = [x for x, cure in cures.items() if cure is None]
        if lost:
            cure = cure_of(lost, known)
            raise ValueError(f"{name} has no argument {', '.join(lost)}, and left it out: {cure}")
        now = ", ".join(dict.fromkeys(str(cure) for cure in cures.values()))
        raise ValueError(
            f"{name} left out {', '.join(changing)}, of Albumentations before version 2: write {now} "
            "instead, or `import transforms as A` for `import albumentations as A`, which reads both"
        )


def changes_images(step: A.BasicTransform, argument: str, known: Collection[str]) -> bool:
    """Whether images could look otherwise if an argument that a step left out were not."""
    now = new_name(argument, known)
    if argument == "always_apply":
        return step.p != 1
    reflected = getattr(step, "border_mode", cv2.BORDER_CONSTANT) != cv2.BORDER_CONSTANT
    return not (now == "fill_mask" or (now == "fill" and reflected))


def check_pipelines_of(holder: Any, depth: int = 3) -> None:
    """`check_arguments` of the pipelines in a dataset of somebody's own, or in what that holds."""
    if isinstance(holder, A.BaseCompose | A.BasicTransform):
        check_arguments(holder)
    elif depth:
        for value in list(getattr(holder, "__dict__", {}).values()):
            check_pipelines_of(value, depth - 1)


def warn_of_fill(compose: A.Compose) -> None:
    """Say so where holes are filled with what is probably not the colour that was meant."""
    mean = None
    for step in compose.transforms:
        if isinstance(step, A.Normalize):
            mean = step.mean
        fill = getattr(step, "fill", 0) if isinstance(step, A.CoarseDropout) else 0
        values = (fill,) if isinstance(fill, int | float | str) else tuple(fill)
        meant: tuple[Any, str] | None = None
        if mean is None and all(isinstance(x, float) and 0 < x < 1 for x in values):
            meant = tuple(round(255 * x) for x in values), "before Normalize, of 0 to 255,"
        elif mean is not None and values == mean:
            meant = 0, "after Normalize, where the mean is 0,"
        if meant:
            colour, where = meant
            print(f"warning: CoarseDropout {where} fills with {fill}; the mean colour is fill={colour}")
