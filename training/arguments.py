"""Arguments in any order: each value of a call is known by its kind, so its place does not matter."""

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from utils import nearest

P = ParamSpec("P")
R = TypeVar("R")
# Keywords that other programs use, in lower case, and what they are called here.
SPELLINGS = {
    **dict.fromkeys(("num_epochs", "n_epochs", "no_of_epochs", "max_epochs"), "epochs"),
    **dict.fromkeys(("loss_fn", "loss_func", "loss_function"), "criterion"),
    **dict.fromkeys(("lr_scheduler", "sched"), "scheduler"),
    **dict.fromkeys(("num_iter", "num_iters", "iterations"), "steps"),
    **dict.fromkeys(("data_loader", "dataloader", "test_loader", "testloader"), "loader"),
    **dict.fromkeys(("net", "network"), "model"),
    **dict.fromkeys(("num_images", "num_samples", "number_of_samples", "no_samples", "n"), "count"),
    **dict.fromkeys(("class_names", "class_labels"), "classes"),
    **dict.fromkeys(("target_layers", "target_layer", "layers"), "layer"),
    **dict.fromkeys(("preds", "pred", "y_pred"), "predicted"),
    **dict.fromkeys(("targets", "y_true"), "labels"),
    **dict.fromkeys(("inv_normalize", "normalize"), "normalization"),
}


def is_loss(value: Any) -> bool:
    """Whether a value is one of PyTorch's losses, or a function."""
    return isinstance(value, nn.modules.loss._Loss) or (
        callable(value) and not isinstance(value, nn.Module) and not hasattr(value, "__iter__")
    )


KINDS: dict[str, Callable[[Any], bool]] = {
    "model": lambda value: isinstance(value, nn.Module) and not is_loss(value),
    "device": lambda value: isinstance(value, str | torch.device),
    "optimizer": lambda value: isinstance(value, torch.optim.Optimizer),
    "scheduler": lambda value: (
        hasattr(value, "step") and not isinstance(value, torch.optim.Optimizer | nn.Module)
    ),
    "criterion": lambda value: (
        (isinstance(value, nn.Module) or is_loss(value)) and not hasattr(value, "step")
    ),
    "loader": lambda value: hasattr(value, "__iter__") and not isinstance(value, str | nn.Module),
    "epochs": lambda value: hasattr(value, "__index__") and not isinstance(value, torch.Tensor),
}


def kind_of(name: str) -> str:
    """The kind of value that an argument takes, by the end of its name."""
    return "epochs" if name == "epoch" else name.rpartition("_")[2]


def any_order(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose positional arguments may come in any order, and by their common other names.

    A model, a device, a loader, an optimizer, a scheduler, a criterion and a number of epochs are told
    apart by their kinds; of two loaders the first belongs to the name that comes first. Without a
    device it is the one that the model lies on.
    """
    call, parameters = function.__name__, inspect.signature(function).parameters
    places = [name for name, x in parameters.items() if x.kind == x.POSITIONAL_OR_KEYWORD]

    @functools.wraps(function)
    def arranged(*values: P.args, **keywords: P.kwargs) -> R:
        if len(values) > len(places):
            raise TypeError(f"{call} takes {len(places)} arguments without a name: {', '.join(places)}")
        given: dict[str, Any] = dict.fromkeys(places) | dict(zip(places, values, strict=False))
        named = respell(call, keywords, parameters)
        for name in [name for name in places if name in named]:
            free = next((place for place in (name, *places) if given[place] is None), None)
            if free is None:
                raise TypeError(f"{call} was given more than it takes: leave {name} or another out")
            given[free], given[name] = given[name], named[name]  # what stood there belongs elsewhere
        explicit = {name for name, _ in zip(places, values, strict=False)} | named.keys()
        given = {**named, **arrange(call, given)}
        if given["device"] is None:
            given["device"] = next(
                (x.device for x in getattr(given["model"], "parameters", list)()), "cpu"
            )
        chosen = {name: x for name, x in given.items() if x is not None or name in explicit}
        return function(**chosen)  # type: ignore[call-arg]  # the same arguments, by name

    return arranged


def arrange(call: str, given: dict[str, Any]) -> dict[str, Any]:
    """The values of a call under the names that fit their kinds; what fits nowhere stays where it is.

    Raises:
        ValueError: there are more values of a kind than places for it.
    """
    kinds = {name: kind_of(name) for name in given}
    named: dict[str, list[str]] = {kind: [] for kind in kinds.values()}
    placed: dict[str, Any] = dict.fromkeys(given)
    in_place = [name for name, value in given.items() if KINDS[kinds[name]](value)]
    for name in [*in_place, *(name for name in given if name not in in_place)]:
        fits = [kinds[name]] if name in in_place else [k for k in named if KINDS[k](given[name])]
        left = [k for k in fits if len(named[k]) < list(kinds.values()).count(k)]
        if fits and not left:
            raise ValueError(
                f"{call} was given more than it takes as {fits[0]}, such as a "
                f"{type(given[name]).__name__}: leave it out, or check the arguments"
            )
        if left:
            named[left[0]].append(name)
        elif given[name] is not None:
            placed[name] = given[name]
    for kind, names in named.items():
        places = [name for name in given if kinds[name] == kind]
        ordered = sorted(names, key=list(given).index)
        targets = ordered if set(names) <= set(places) else places
        for place, name in zip(targets, ordered, strict=False):
            if placed[place] is not None:
                unknown = type(placed[place]).__name__
                raise ValueError(f"{call} has no use for a {unknown}: leave it out")
            placed[place] = given[name]
    if given["model"] is not None and placed["model"] is None:
        return given  # there is no network at all, and the checks say so
    return placed


def respell(call: str, others: dict[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Keywords, with their values, by the names that they have here.

    Raises:
        TypeError: one is unknown; the nearest is named.
    """
    ours = {}
    for word, value in others.items():
        small = word.lower()
        ends = [name for name in known if name.endswith(f"_{SPELLINGS.get(small, small)}")]
        choices = (word, SPELLINGS.get(small, small), *ends[:1])
        name = next((choice for choice in choices if choice in known), None)
        if name is None or name in ours:
            hint = nearest(small, known) or f"; it has {', '.join(known)}"
            raise TypeError(f"{call} has no argument {word!r}{hint}")
        ours[name] = value
    return ours
