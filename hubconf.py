"""Offers the networks to `torch.hub.load("OWNER/cifar10", "custom_resnet", pretrained=True)`."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

dependencies = ["torch", "safetensors", "numpy", "filelock", "PIL", "tqdm"]

_ROOT = Path(__file__).resolve().parent


def custom_resnet(pretrained: bool = False, **options: Any) -> nn.Module:
    """CustomResNet: 6,573,130 parameters; `options` as in `make_model`."""
    return _network("custom_resnet", pretrained, options)


def resnet18(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-18 for 32 x 32 images: 11,173,962 parameters; `options` as in `make_model`."""
    return _network("resnet18", pretrained, options)


def resnet34(pretrained: bool = False, **options: Any) -> nn.Module:
    """ResNet-34 for 32 x 32 images: 21,282,122 parameters; `options` as in `make_model`."""
    return _network("resnet34", pretrained, options)


def _network(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """A network with fresh weights, or with those in weights/: then in eval mode, with its `card`.

    The card names what the weights expect: classes, mean, std and image_size.

    Raises:
        ValueError: there are no such weights, or `options` asks them to be of another shape.
    """
    if not pretrained:
        with _own_modules():
            make_model = importlib.import_module("models").make_model
        return make_model(name, **options)
    if options:
        raise ValueError(f"pretrained weights have their own options, not {', '.join(options)}")
    with _own_modules():
        load_weights = importlib.import_module("weights_file").load_weights
    model, card = load_weights(_ROOT / "weights" / f"{name}.safetensors")
    model.card = card
    return model.eval()


@contextlib.contextmanager
def _own_modules() -> Iterator[None]:
    """Import this repository's `models`, `utils` and so on, whoever else has modules of these names.

    Those that were imported before are set aside and put back, and ours are forgotten: neither gets
    the other's.
    """
    rooms = {path.parent.name for path in _ROOT.glob("*/__init__.py")}
    ours = {path.stem for path in _ROOT.glob("*.py")} - {"hubconf"} | rooms

    def take_out() -> dict[str, ModuleType]:
        present = [name for name in sys.modules if name.split(".")[0] in ours]
        return {name: sys.modules.pop(name) for name in present}

    theirs = take_out()
    sys.path.insert(0, str(_ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(_ROOT))
        take_out()
        sys.modules.update(theirs)
