"""Writes weight files in one step and reads only those that fit."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from models import make_model


def save_weights(path: str | Path, model: nn.Module, card: dict) -> None:
    """Write a model's weights and what is needed to use them, as safetensors, in one step.

    Args:
        path: of the file; a previous one stays whole until the new one is.
        model: whose state dict is written, as it is.
        card: plain data: "model", "options" (keyword arguments of `make_model`), "classes", "mean",
            "std", "image_size", and "config", the fields of the run, which `main.py test` and
            `report` need.
    """
    path = Path(path)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    partial = path.with_name(path.name + ".tmp")
    save_file(tensors, partial, metadata={"card": json.dumps(card)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_weights(path: str | Path) -> tuple[nn.Module, dict]:
    """Build the model that a weights file holds, and return it with the file's card.

    A run folder stands for its weights.safetensors. The file cannot run code; names and shapes must
    fit the network that the card names.

    Raises:
        ValueError: no such file, not a weights file, or tensors that do not fit; one line.
    """
    path = Path(path)
    path = path / "weights.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"there is no weights file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {})["card"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        with torch.random.fork_rng([]):
            model = make_model(card["model"], len(card["classes"]), **card["options"])
        model.load_state_dict(tensors, strict=True)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[-1].strip()
        raise ValueError(f"{path} is no weights file of this package ({reason})") from None
    return model, card
