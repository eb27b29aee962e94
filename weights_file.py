"""Weights in a file with a card, which says what is needed to use them."""

import hashlib
import itertools
import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from files import reason, write_whole
from models import MODELS, make_model
from utils import check_numbers, inner_model, nearest

DEFAULT_WEIGHTS = "custom_resnet"  # the weights that a command takes if none are named
SHIPPED = Path(__file__).parent / "weights"

# How files of torch.save are named, which have no card.
BARE = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".th")
# The entries of somebody's checkpoint that hold its weights.
HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
# What others call the parts of a network that have another name here.
PARTS = {"downsample": "shortcut", "fc": "linear", "classifier": "linear", "head": "linear"}


def plain_state(value: Any, where: str) -> Any:
    """A state with NumPy's numbers and arrays as Python's numbers and tensors; the rest must be plain.

    Args:
        where: the name of the value, for the message.

    Raises:
        ValueError: something in it could be written but not read back; its place is named.
    """
    if value is None or isinstance(value, torch.Tensor | torch.dtype | torch.device):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":  # numbers
        return torch.from_numpy(value.copy())
    if type(value) in (bool, int, float, complex, str, bytes):
        return value
    if type(value) in (list, tuple, set):
        changed = [plain_state(item, f"{where}[{index}]") for index, item in enumerate(value)]
        same = all(new is old for new, old in zip(changed, value, strict=True))
        return value if same else type(value)(changed)
    if isinstance(value, dict):
        items = {
            plain_state(key, where): plain_state(item, f"{where}.{key}") for key, item in value.items()
        }
        same = all(new is old for new, old in zip(items.values(), value.values(), strict=True))
        return value if same and type(value) in (dict, OrderedDict, Counter) else items
    raise ValueError(f"{where} is a {type(value).__name__}, which no checkpoint can hold: make it plain")


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
    path = weights_path(path)
    if path.suffix in BARE:
        raise ValueError(
            f"{path} has no card, which tells images and classes: `python main.py import-weights "
            f"{path}` makes a weights file of it, and import_weights of weights_file.py a network"
        )
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
        fault = (str(error) or type(error).__name__).splitlines()[-1].strip()
        raise ValueError(f"{path} is no weights file of this package ({fault})") from None
    return model.float().eval(), card


def weights_path(path: str | Path) -> Path:
    """The file that is meant by a run folder, a network's name, or a file.

    Raises:
        ValueError: there is none.
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
    return path


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


def import_weights(path: str | Path, name: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Build a network of ours with the weights that somebody else's program wrote.

    Names are those of kuangliu/pytorch-cifar, of torchvision, or any others, if the layers stand in the
    order of ours and have their shapes. Whether the network then computes the same, shapes cannot tell:
    compare its accuracy with the one that the weights had.

    Args:
        path: what `torch.save` wrote of a state dict, or of a checkpoint with one; or safetensors.
        name: a key of `MODELS`; None: the one that fits.

    Returns:
        The network, in evaluation mode, and its `model`, `options` and `num_classes`: the arguments of
        `make_model`.

    Raises:
        ValueError: the file cannot be opened safely, or fits no network of that name; one line.
    """
    if name is not None and name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}")
    tensors, faults = read_tensors(path), {}
    for model_name in [name] if name else MODELS:
        try:
            model, options = network_of(tensors, model_name, is_ordered(path))
        except ValueError as error:
            faults[model_name] = str(error)
        else:
            classes = len(model.state_dict()[f"{head_of(layers_of(model.state_dict()))}.weight"])
            return model, {"model": model_name, "options": options, "num_classes": classes}
    raise ValueError(f"{path} does not fit {'; nor '.join(f'{x}: {y}' for x, y in faults.items())}")


def network_of(
    tensors: Mapping[str, Tensor], name: str, ordered: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """A network of ours, as wide as some tensors say and with as many classes, that holds them."""
    layers = layers_of(tensors)
    kernels = {layer: parts["weight"] for layer, parts in layers.items() if parts["weight"].dim() == 4}
    stem = next((kernel for kernel in kernels.values() if kernel.shape[1] == 3), None)
    head = head_of(layers)
    if stem is None or head is None:
        raise ValueError("there is no convolution of three colours, or no linear layer")
    options: dict[str, Any] = {"width": len(stem)}
    if name == "custom_resnet" and any("bias" in layers[layer] for layer in kernels):
        options["bias"] = True
    with torch.device("meta"):
        model = make_model(name, len(layers[head]["weight"]), **options)
    expected = {key: torch.empty_like(x, device="cpu") for key, x in model.state_dict().items()}
    model.load_state_dict(fitted(tensors, expected, ordered), strict=True, assign=True)
    return model.eval(), options


def initialize(model: nn.Module, path: str | Path) -> str:
    """Give a network the weights of a file; a head with another number of classes keeps its own.

    Args:
        path: as in `import_weights`, or a run folder, or the name of a network in weights/.

    Returns:
        What was done, in words.

    Raises:
        ValueError: the file cannot be read, or does not fit; one line.
    """
    tensors, expected = read_tensors(path), model.state_dict()
    said = f"begins with the weights of {path}"
    try:
        if not same_shapes(tensors, expected):
            theirs, ours = layers_of(tensors), layers_of(expected)
            other, head = head_of(theirs) or "", head_of(ours) or ""
            sizes = [layers[x]["weight"].shape for layers, x in ((theirs, other), (ours, head)) if x]
            if len(sizes) == 2 and sizes[0] != sizes[1] and sizes[0][1] == sizes[1][1]:
                kept = {f"{other}.{part}": tensor for part, tensor in ours[head].items()}
                tensors = {x: y for x, y in tensors.items() if x.rpartition(".")[0] != other} | kept
                counts = f"{sizes[0][0]} classes there, {sizes[1][0]} here"
                said += f", but for {head}, which keeps its first values: {counts}"
        state = fitted(tensors, expected, is_ordered(path))
    except ValueError as error:
        raise ValueError(f"the weights of {path} do not fit the network: {error}") from None
    model.load_state_dict(state, strict=True)
    return said


def is_ordered(path: str | Path) -> bool:
    """Whether a file has its tensors in the order of the network's layers; safetensors sorts them."""
    return weights_path(path).suffix != ".safetensors"


def same_shapes(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names and shapes."""
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (tensors, others)]
    return shapes[0] == shapes[1]


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of somebody's weights by name, as float32, without what wrappers add to the names.

    Raises:
        ValueError: there is no such file, it would run code, or it holds something else.
    """
    path = weights_path(path)
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, SafetensorError, OSError, RuntimeError, EOFError, LookupError) as error:
        object_of = re.search(r"GLOBAL (\S+)", str(error))
        if object_of:
            raise ValueError(
                f"{path} holds a {object_of[1]}, and to read that would run code from the file: write "
                f"torch.save(model.state_dict(), {path.name!r}) where the network is, and import that"
            ) from None
        raise ValueError(f"{path} is no file of weights ({reason(error)[:200]})") from None
    while isinstance(content, dict):
        holder = next((name for name in HOLDERS if isinstance(content.get(name), dict)), None)
        if holder is None:
            break
        content = content[holder]
    entries: dict = content if isinstance(content, dict) else {f"a {type(content).__name__}": None}
    wrong = [str(name) for name, x in entries.items() if not isinstance(x, Tensor)]
    if wrong or not entries:
        raise ValueError(f"{path} holds no state dict, but {', '.join(wrong[:5]) or 'nothing'}")
    tensors = {
        re.sub(r"(^|(?<=\.))(module|_orig_mod)\.", "", name): x.float() if x.is_floating_point() else x
        for name, x in entries.items()
    }
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(f"{path} has numbers that are not finite")
    return tensors


def layers_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer that has weights, in order; a norm's count of batches is left out.

    Raises:
        ValueError: a tensor that belongs to no layer with a weight.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part != "num_batches_tracked":
            layers.setdefault(layer, {})[part] = tensor
    lacking = [name for name, parts in layers.items() if "weight" not in parts]
    if lacking:
        raise ValueError(f"{lacking[0]} has no weight")
    return layers


def head_of(layers: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The last linear layer."""
    linear = [name for name, parts in layers.items() if parts["weight"].dim() == 2]
    return linear[-1] if linear else None


def fitted(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], ordered: bool
) -> dict[str, Tensor]:
    """Somebody's tensors under our names.

    Args:
        tensors: theirs.
        expected: a state dict of the network that they are for.
        ordered: they stand in the order of the layers.

    Raises:
        ValueError: a layer that is missing, or has another shape.
    """
    roots = {name.partition(".")[0] for name in tensors}
    if not same_shapes(tensors, expected) and len(roots) == 1:  # as in Lightning's model.conv1.weight
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    if same_shapes(tensors, expected):
        return dict(tensors)
    ours, theirs = layers_of(expected), layers_of(tensors)
    pairs = pairs_by_name(ours, theirs)
    if pairs is None and not ordered:
        other = next(iter(set(ours) ^ set(theirs)))
        raise ValueError(f"their names differ, as by {other}, and safetensors keeps no order to go by")
    pairs = pairs or pairs_by_order(ours, theirs)
    state = {name: torch.zeros_like(x) for name, x in expected.items() if name.endswith("_tracked")}
    following = dict(itertools.pairwise(ours))
    surplus: Tensor | None = None  # the bias of a convolution that has none here
    for layer, source in pairs.items():
        parts = dict(theirs[source])
        if surplus is not None:  # the norm after it takes it away again
            parts["running_mean"] = parts["running_mean"] - surplus
        surplus = parts.pop("bias") if "bias" in parts.keys() - ours[layer].keys() else None
        if surplus is not None and "running_mean" not in ours.get(following.get(layer, ""), ()):
            raise ValueError(f"{source} has a bias, and {layer} has none")
        parts.setdefault("bias", torch.zeros(len(parts["weight"])))
        for part, tensor in ours[layer].items():
            found = parts[part].shape if part in parts else None
            if found != tensor.shape:
                shapes = [tuple(shape) if shape else "missing" for shape in (tensor.shape, found)]
                raise ValueError(f"{source}.{part} must be {shapes[0]}, not {shapes[1]}")
            state[f"{layer}.{part}"] = parts[part]
        count = f"{source}.num_batches_tracked"
        if count in tensors:
            state[f"{layer}.num_batches_tracked"] = tensors[count]
    return state


def pairs_by_name(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str] | None:
    """Their layer for each of ours by its name, or None."""
    names = {".".join(PARTS.get(part, part) for part in name.split(".")): name for name in theirs}
    for known in ({name: name for name in theirs}, names):
        if known.keys() == set(ours):
            return {name: known[name] for name in ours}
    return None


def pairs_by_order(
    ours: Mapping[str, Mapping[str, Tensor]], theirs: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, str]:
    """Their layer for each of ours: those of one shape in their order, each norm with its convolution.

    Raises:
        ValueError: the layers do not tell.
    """
    here, there = units_of(ours), units_of(theirs)
    for shape in here | there:
        counts = len(there.get(shape, ())), len(here.get(shape, ()))
        if counts[0] != counts[1]:
            raise ValueError(f"it has {counts[0]} layers of shape {shape}, and not {counts[1]}")
    pairs: dict[str, str] = {}
    for shape, units in here.items():
        for unit, source in zip(units, there[shape], strict=True):
            if len(unit) != len(source):
                raise ValueError(f"after {source[0]} there is {'no' * (len(source) < 2)} norm")
            pairs |= dict(zip(unit, source, strict=True))
    return {layer: pairs[layer] for layer in ours}


def units_of(layers: Mapping[str, Mapping[str, Tensor]]) -> dict[tuple[int, ...], list[list[str]]]:
    """Convolutions, each with the norm after it, and linear layers, by the shape of the weight."""
    units: dict[tuple[int, ...], list[list[str]]] = {}
    last: list[str] = []
    for name, parts in layers.items():
        shape = tuple(parts["weight"].shape)
        if len(shape) in (2, 4):
            last = [name]
            units.setdefault(shape, []).append(last)
        elif "running_mean" in parts and len(last) == 1 and len(layers[last[0]]["weight"]) == shape[0]:
            last.append(name)
        else:
            raise ValueError(f"{name} is neither a convolution, the norm after one, nor a linear layer")
    return units
