"""The networks, by name."""

from collections.abc import Callable
from typing import Any

from torch import nn

from models.custom_resnet import CustomResNet
from models.resnet import ResNet, ResNet18, ResNet34

__all__ = ["MODELS", "CustomResNet", "ResNet", "ResNet18", "ResNet34", "make_model"]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "custom_resnet": CustomResNet,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
}


def make_model(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """Build a network by name, with freshly drawn weights.

    Args:
        name: a key of `MODELS`, or the name of its class.
        num_classes: K, the number of logits.
        options: passed on to the network, such as `width=16`.

    Raises:
        ValueError: no network has that name.
    """
    same = {key.replace("_", ""): key for key in MODELS}
    name = same.get(name.lower().replace("_", ""), name)
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    return MODELS[name](num_classes=num_classes, **options)
