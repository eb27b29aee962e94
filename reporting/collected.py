"""What figures are asked to show, whatever it was collected as: loaders, predictions, arrays, lists."""

import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from training.arguments import respell
from training.loops import predict
from training.pictures import (
    Normalization,
    assumed_normalization,
    classes_of_loader,
    normalization_in,
    normalization_of_loader,
    to_pixels,
)
from utils import Predictions

# What a call may name beside the arguments of the function itself.
EXTRA = (
    *("model", "device", "loader", "images", "labels", "predicted", "predictions"),
    *("collected", "classes", "normalization"),
)
WANTED = (
    "give what `predict` returned; or a model and a loader; or a list of (image, label, prediction); "
    "or images, labels and predicted classes"
)


def from_anything(function: Callable) -> Callable:
    """A figure's function that takes what people have, in any order, and makes its arguments of that.

    These are the forms that predictions can have, with or without names of classes:

        what `predict` returned, which keeps the images that it saw
        model, loader, and maybe device
        a list of (image, label, prediction)
        images, labels, predicted classes: one list or array of each
        images, and what `predict` returned for them

    Images are uint8 (N, H, W, 3); or float (N, 3, H, W) or (N, H, W, 3) from 0 to 1, or normalised: by
    `normalization`, the step itself or its inverse, else by CIFAR-10's.
    """
    parameters = inspect.signature(function).parameters
    known = [*parameters, *(name for name in EXTRA if name not in parameters)]

    @functools.wraps(function)
    def drawn(*values: Any, **keywords: Any) -> Any:
        named = respell(function.__name__, keywords, known)
        given = {name: value for name, value in named.items() if value is not None}
        for value in values:
            if value is not None:
                name = name_of_value(function.__name__, value, given, known)
                given[name] = value
        return function(**arguments_of(function.__name__, given, parameters))

    return drawn


def name_of_value(call: str, value: Any, given: dict[str, Any], known: Sequence[str]) -> str:
    """Which argument a value is, by its kind and by what was given before it.

    Raises:
        TypeError: it is none, or there are two of it.
    """
    for name in names_of_kind(value, given):
        if name in known and name not in given:
            return name
    raise TypeError(f"{call} has no use for this {type(value).__name__}, {words_for(value)}: {WANTED}")


def words_for(value: Any) -> str:
    """A value in a few words on one line."""
    if isinstance(value, Tensor | np.ndarray):
        return f"of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:40]}..."


def names_of_kind(value: Any, given: dict[str, Any]) -> tuple[str, ...]:
    """The arguments that a value could be, the likeliest first."""
    if isinstance(value, Predictions):
        return ("predictions",)
    if "Normalize" in type(value).__name__:
        return ("normalization",)
    if isinstance(value, nn.Module):
        return ("layer",) if "model" in given else ("model",)
    if isinstance(value, str):
        return (
            ("device", "layer") if re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", value) else ("layer", "title")
        )
    if isinstance(value, torch.device):
        return ("device",)
    if isinstance(value, int | np.integer):
        return ("count", "each")
    if isinstance(value, Tensor | np.ndarray):
        return names_of_array(value)
    if isinstance(value, list | tuple):
        return names_of_list(value)
    if isinstance(value, dict):
        return ("classes",)
    return ("loader",) if isinstance(value, Dataset) or hasattr(value, "__iter__") else ()


def names_of_array(value: Any) -> tuple[str, ...]:
    """What an array is, by its shape and its type."""
    if value.ndim >= 3:
        return ("images",)
    if isinstance(value, np.ndarray) and value.dtype.kind in "US":
        return ("classes",)
    scores = value.ndim == 2 and value.shape[1] > 1  # probabilities or logits
    return ("predicted",) if scores else ("labels", "predicted")


def names_of_list(value: Sequence[Any]) -> tuple[str, ...]:
    """What a list is, by its first item."""
    if not value:
        return ("collected", "labels", "predicted")
    first = value[0]
    if isinstance(first, str):
        return ("classes", "layers")
    if isinstance(first, nn.Module):
        return ("layer", "layers")
    if isinstance(first, tuple | list) and len(first) >= 2 and is_image(first[0]):
        batch = getattr(first[0], "ndim", 0) == 4 and len(first) == 2
        return ("loader",) if batch else ("collected",)
    return ("images",) if is_image(first) else ("labels", "predicted")


def is_image(value: Any) -> bool:
    """Whether a value is an image, or one in a batch of its own."""
    return getattr(value, "ndim", 0) >= 3 or hasattr(value, "convert")  # of Pillow


def arguments_of(call: str, given: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """The arguments of a function, made of what was given.

    Raises:
        TypeError: something is missing; it is said what to give.
        ValueError: what was given does not belong together.
    """
    loader = given.get("loader")
    if isinstance(loader, Dataset):
        loader = DataLoader(loader, 256)
    names = given.get("classes", classes_of_loader(loader))
    names = [names[k] for k in sorted(names)] if isinstance(names, dict) else list(map(str, names))
    normalization = as_normalization(given.get("normalization")) or normalization_of_loader(loader)
    if "collected" in given:
        given |= divided(given["collected"])
    if "predictions" in parameters:
        predictions = predictions_of(call, given, loader, names)
        given["predictions"] = predictions
        names = names or list(predictions.classes)
        normalization = as_normalization(given.get("normalization")) or predictions.normalization
    elif "labels" in parameters and "labels" not in given:
        given |= shown_by(call, loader, parameters)
    if "images" in parameters:
        given["images"], normalization = pictures_of(call, given, normalization)
    if "labels" in parameters:
        given["labels"] = np.array([class_number(x, names) for x in given["labels"]], np.int64)
    if "classes" in parameters:
        given["classes"] = names or list(map(str, range(count_of(given))))
    for name in ("mean", "std"):
        if name in parameters and normalization:
            given.setdefault(name, normalization[name])
    return {name: value for name, value in given.items() if name in parameters}


def count_of(given: dict[str, Any]) -> int:
    """The number of classes, where they have no names."""
    if "predictions" in given:
        return given["predictions"].probabilities.shape[1]
    return int(max(given["labels"], default=0)) + 1


def as_normalization(step: Any) -> Normalization | None:
    """That of a Normalize step; of its inverse, whose deviations are over 1, that which it undoes."""
    if step is None or isinstance(step, dict):
        return step
    found = normalization_in(step)
    if found and min(found["std"]) > 1:
        pairs = list(zip(found["mean"], found["std"], strict=True))
        return {"mean": tuple(-m / s for m, s in pairs), "std": tuple(1 / s for _, s in pairs)}
    return found


def divided(collected: Sequence[Sequence[Any]]) -> dict[str, list]:
    """A list of (image, label) or (image, label, prediction) as one list of each."""
    names = ("images", "labels", "predicted")
    columns = list(zip(*collected, strict=True)) or [(), (), ()]
    return {name: list(column) for name, column in zip(names, columns, strict=False)}


def class_number(value: Any, names: Sequence[str]) -> int:
    """The number of a class, from a number, a tensor of one number, or a name.

    Raises:
        ValueError: no class has that name.
    """
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f"no class is called {value!r}; they are {', '.join(names) or 'not named'}")
        return list(names).index(value)
    return int(value.item() if isinstance(value, Tensor | np.ndarray) else value)


def predictions_of(call: str, given: dict[str, Any], loader: Any, names: list[str]) -> Predictions:
    """What was predicted, in whatever form it came.

    Raises:
        TypeError: it did not come; it is said what to give.
        ValueError: labels and predictions do not belong together.
    """
    if "predictions" in given:
        return given["predictions"]
    if "labels" in given and "predicted" in given:
        labels = np.array([class_number(x, names) for x in given["labels"]], np.int64)
        return answered(labels, given["predicted"], names)
    model, device = given.get("model"), given.get("device")
    if model is not None and loader is None and "images" in given and "labels" in given:
        targets = torch.tensor([class_number(x, names) for x in given["labels"]])
        loader = list(zip(stacked(given["images"]).split(256), targets.split(256), strict=True))
    if model is None or loader is None:
        raise TypeError(f"{call} needs predictions: {WANTED}")
    return predict(model, next(model.parameters()).device if device is None else device, loader)


def answered(labels: np.ndarray, predicted: Any, names: Sequence[str]) -> Predictions:
    """Predictions of which only the classes are known, or of a row of scores for each image."""
    first: Any = predicted[0] if len(predicted) else 0
    if getattr(first, "ndim", 0) == 1 and len(first) > 1:
        scores = torch.as_tensor(np.asarray(predicted, np.float32))
        sums = scores.sum(1)
        probable = bool((scores >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
        return Predictions((scores if probable else scores.softmax(1)).numpy(), labels)
    answers = np.array([class_number(x, names) for x in predicted], np.int64)
    if len(answers) != len(labels):
        raise ValueError(f"{len(answers)} predictions for {len(labels)} labels")
    low, high = (int(f([*labels, *answers, 0])) for f in (min, max))
    if low < 0 or (names and high >= len(names)):
        raise ValueError(f"labels and predictions must be 0 to {len(names) - 1}, not {low} to {high}")
    known = np.eye(max(len(names), high + 1), dtype=np.float32)[answers]
    return Predictions(known, labels, with_probabilities=False)


def shown_by(call: str, loader: Any, parameters: Any) -> dict[str, Any]:
    """Images and labels that a loader shows in one pass, or its first batch if that is enough."""
    if loader is None:
        wanted = "images and labels" if "images" in parameters else "labels"
        raise TypeError(f"{call} needs {wanted}: give them, or a loader or a dataset that has them")
    targets = getattr(getattr(loader, "dataset", None), "targets", None)
    if "images" not in parameters and targets is not None:
        return {"labels": targets}
    batches = []
    for batch in loader:
        batches.append(batch)
        if "each" not in parameters and "images" in parameters and len(batches[0][0]) >= 20:
            break
    images, labels = (list(part) for part in zip(*batches, strict=True))
    return {"images": torch.cat(images), "labels": torch.cat(labels)}


def stacked(images: Any) -> Any:
    """Images as one tensor or array, of whatever they were collected."""
    if isinstance(images, Tensor | np.ndarray):
        return images[None] if images.ndim == 3 else images
    if not len(images):
        return np.zeros((0, 1, 1, 3), np.uint8)
    tensors = [
        x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in images
    ]
    return torch.stack([x[0] if x.ndim == 4 else x for x in tensors])


def pictures_of(
    call: str, given: dict[str, Any], normalization: Normalization | None
) -> tuple[np.ndarray, Normalization | None]:
    """Images as pictures, and how they were normalised; those that `predict` kept, if no others came.

    Raises:
        TypeError: there are none.
        ValueError: others came than those that the predictions are of.
    """
    predictions = given.get("predictions")
    seen = None if predictions is None else predictions.images
    if given.get("images") is None:
        if seen is None:
            raise TypeError(f"{call} needs the images too: give them before the predictions")
        return seen, normalization
    images = stacked(given["images"])
    floats = (
        isinstance(images, Tensor)
        and images.is_floating_point()
        or (isinstance(images, np.ndarray) and images.dtype.kind == "f")
    )
    if floats and not normalization:
        normalization = assumed_normalization(torch.as_tensor(images))
    pixels = to_pixels(images, normalization)
    if predictions is not None:
        if len(pixels) < len(predictions.labels):
            raise ValueError(f"{len(pixels)} images for {len(predictions.labels)} predictions")
        pixels = pixels[: len(predictions.labels)]  # the first, of which a smoke run was
    if seen is not None and not alike(pixels, seen):
        raise ValueError(
            "these images are not those of the predictions, or in another order, as of a loader that "
            "shuffles: leave them out, as predictions keep their own"
        )
    return pixels, normalization


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether pictures are the same, but for rounding; a hundred of them are compared."""
    some = np.linspace(0, len(one) - 1, min(100, len(one))).astype(int)
    if one.shape != other.shape:
        return False
    return bool((abs(one[some].astype(int) - other[some]) <= 2).all())
