"""Weights in a file with a card, which says what is needed to use them."""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from files import write_whole
from models import MODELS, make_model
from utils import check_numbers, inner_model, nearest, plain_state

DEFAULT_WEIGHTS = "custom_resnet"  # the weights that a command takes if none are named
SHIPPED = Path(__file__).parent / "weights"


def save_weights(path: str | Path, model: nn.Module, card: dict) -> None:
    """Write a model's weights and what is needed to use them, as safetensors, in one step.

    Args:
        path: of the file; a previous one stays whole until the new one is.
        model: whose state dict is written, as it is; of a compiled or parallel one, the model inside.
        card: plain data: "model", "options" (keyword arguments of `make_model`), "classes", "mean",
            "std", "image_size", and "config", the fields of the run, which `main.py test` and
            `report` need.

    Raises:
        ValueError: the card describes another network, so that nothing could load the file.
        OSError: it could not be written.
    """
    write_whole(path, weights_content(model, card))


def weights_content(model: nn.Module, card: dict) -> bytes:
    """The bytes of a weights file.

    Raises:
        ValueError: as in `save_weights`.
    """
    # Compiled modules give names a prefix. Tied weights are written as often as they occur.
    tensors = {
        name.replace("_orig_mod.", ""): tensor.detach().cpu().contiguous().clone()
        for name, tensor in inner_model(model).state_dict().items()
    }
    card = plain_state(card, "the card")
    try:
        check_card(card)
        with torch.device("meta"):
            expected = make_model(card["model"], len(card["classes"]), **card["options"]).state_dict()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the card cannot go with weights ({error!r})") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    misfits = sorted(
        n for n in {*shapes, *expected} if shapes.get(n) != getattr(expected.get(n), "shape", None)
    )
    if misfits:
        named = ", ".join(f"{name} {value}" for name, value in card["options"].items())
        raise ValueError(f"the card says {card['model']} ({named}), which does not fit at {misfits[0]}")
    # One entry: safetensors writes several in an order that changes from process to process.
    return save(tensors, metadata={"card": json.dumps(card | {"sha256": digest(tensors, card)})})


def digest(tensors: dict[str, torch.Tensor], card: dict) -> str:
    """SHA-256 of names and bytes of some tensors, and of their card."""
    hasher = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def load_weights(path: str | Path) -> tuple[nn.Module, dict]:
    """Build the model that a weights file holds, in evaluation mode; return it with the file's card.

    A run folder stands for its weights.safetensors, a network's name for the file in weights/. It cannot
    run code; names and shapes must be those of the network that the card names, which is compared
    before memory is taken for it.

    Raises:
        ValueError: no such file, not a weights file, or tensors that do not fit; one line.
    """
    path = Path(path)
    if str(path) in MODELS and not path.exists():
        path = SHIPPED / f"{path}.safetensors"
    if path.is_dir() and not (path / "weights.safetensors").exists():
        raise ValueError(
            f"{path} has no weights.safetensors: it is no run, or one without a whole epoch"
        )
    path = path / "weights.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}{nearest(str(path), MODELS)}")
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {})["card"])
            missing = {"model", "options", "classes", "mean", "std", "image_size"} - set(card)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        if missing or card.pop("sha256") != digest(tensors, card):
            raise ValueError(f"the card lacks {sorted(missing)}" if missing else "it is damaged")
        check_card(card)
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError("not all of its numbers are finite")
        with torch.device("meta"):
            model = make_model(card["model"], len(card["classes"]), **card["options"])
        model.load_state_dict(tensors, strict=True, assign=True)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
        raise ValueError(f"{path} is no weights file of this package ({reason})") from None
    return model.float().eval(), card


def check_card(card: dict) -> None:
    """Refuse the card of a weights file whose entries are not valid: images could not be prepared by it.

    Raises:
        ValueError: one of its entries is not what `save_weights` asks for.
    """
    size, classes = card["image_size"], card["classes"]
    if type(size) is not int or not 8 <= size <= 1024:
        raise ValueError(f"image_size {size}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes are no list of names")
    for name in ("mean", "std"):
        check_numbers(name, card[name])
        if len(card[name]) != 3 or not all(map(math.isfinite, card[name])):
            raise ValueError(f"{name} {card[name]}")
    if max(map(abs, card["mean"])) > 10:  # in units of a pixel's range, which is 0 to 1
        raise ValueError(f"mean {card['mean']}")
    if not 1e-3 <= min(card["std"]) <= max(card["std"]) <= 10 or not isinstance(
        card.get("config", {}), dict
    ):
        raise ValueError("std is not in 0.001 to 10, or config no mapping")
