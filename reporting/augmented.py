"""What the steps of a pipeline do to pictures, one by one."""

import copy
import random
from typing import Any

import numpy as np

from transforms import denormalize, normalization_of


def each_step(compose: Any, pictures: np.ndarray, seed: int = 0) -> dict[str, list[np.ndarray]]:
    """The pictures after each step alone, as if its probability were 1, and after all of them, by name.

    A step that changes the size is applied before those below it, too. Those that make numbers of
    pixels, Normalize and ToTensorV2, are in the last row alone.

    Args:
        compose: an `A.Compose`; it stays as it is.
        pictures: uint8 (N, H, W, 3).
        seed: of the random numbers.

    Raises:
        ValueError: it is no `A.Compose`.
    """
    if not hasattr(compose, "set_random_state"):
        kind = f"{type(compose).__module__.partition('.')[0]}'s {type(compose).__name__}"
        raise ValueError(f"the steps are shown of an A.Compose of Albumentations, not of {kind}")
    rows: dict[str, list[np.ndarray]] = {}
    now = list(pictures)
    for number, step in enumerate(compose.transforms):
        always = copy.deepcopy(step)
        always.p = 1.0
        outputs = applied(always, now, seed + number)
        if not all(isinstance(x, np.ndarray) and x.dtype == np.uint8 for x in outputs):
            continue
        name = f"{type(step).__name__}, p={step.p:g}" if step.p < 1 else type(step).__name__
        rows[name if name not in rows else f"{name} ({number})"] = outputs
        if [x.shape for x in outputs] != [x.shape for x in now]:
            now = outputs
    whole = applied(copy.deepcopy(compose), list(pictures), seed)
    if not all(isinstance(x, np.ndarray) and x.dtype == np.uint8 for x in whole):
        mean, std = normalization_of(compose)
        whole = [denormalize(x[None], mean, std)[0] for x in whole]
    return {**rows, "all of it": whole}


def applied(step: Any, pictures: list[Any], seed: int) -> list[Any]:
    """Pictures through one step, or all, whose random numbers begin at `seed`."""
    step.set_random_state(np.random.default_rng(seed), random.Random(seed))
    return [step(image=picture)["image"] for picture in pictures]
