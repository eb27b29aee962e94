"""The loss that somebody brings: whether it can be used, what it is the mean of, and its name."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils import Stats

# PyTorch's, as an object or a function, or one's own: of logits (N, K) and labels (N,).
Criterion = Callable[[Tensor, Tensor], Tensor]


def check_one_loss(criterion: Any, label_smoothing: float) -> None:
    """Refuse label smoothing beside a criterion, which has its own.

    Raises:
        ValueError: one line that says what to give instead.
    """
    if criterion is not None and label_smoothing:
        raise ValueError(
            "a criterion has its own label smoothing: leave label_smoothing out and give "
            f"nn.CrossEntropyLoss(label_smoothing={label_smoothing})"
        )


def check_criterion(criterion: Any, logits: Tensor) -> None:
    """Refuse a criterion that cannot be computed from logits (N, K) and labels (N,) as a mean or a sum.

    Raises:
        ValueError: one line that says what to give instead.
    """
    name = getattr(criterion, "__name__", type(criterion).__name__)
    better = "give nn.CrossEntropyLoss(), or a function of logits (N, K) and labels (N,)"
    if isinstance(criterion, type):
        raise ValueError(f"the criterion is a class: give an object of it, {name}()")
    probable = logits.exp().sum(1)
    if isinstance(criterion, nn.NLLLoss) and not torch.allclose(probable, probable.new_ones(()), 0, 0.1):
        raise ValueError(
            "NLLLoss takes log-probabilities, and this model returns logits: give "
            "nn.CrossEntropyLoss(), or end the model in log_softmax(1)"
        )
    if isinstance(criterion, nn.Module):
        criterion.to(logits.device)
    weighted = isinstance(criterion, nn.modules.loss._WeightedLoss)
    weight = criterion.weight if weighted else None
    if weight is not None and weight.shape != logits.shape[1:]:
        raise ValueError(
            f"the weight of {name} must have one number a class, {logits.shape[1]}, not {len(weight)}"
        )
    labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", UserWarning)  # that shapes are stretched to fit
            loss = criterion(logits, labels)
    except Exception as error:  # whatever a loss of somebody's raises
        fault = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} does not take logits and labels ({fault}); {better}") from None
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{name} must return one number, as reduction='mean' does, not {shape}")


def images_in_mean(criterion: Criterion | None, count: int) -> int:
    """Of how many of `count` images a criterion's loss is the mean; a sum is one of 1."""
    return 1 if getattr(criterion, "reduction", "mean") == "sum" else count


def score(logits: Tensor, labels: Tensor, criterion: Criterion | None = None) -> Stats:
    """Mean loss and accuracy of logits (N, K) against labels (N,)."""
    hits = (logits.argmax(1) == labels).sum().item()
    with torch.no_grad():
        loss = (F.cross_entropy if criterion is None else criterion)(logits, labels).item()
    count = len(labels)
    return Stats(loss / (count // images_in_mean(criterion, count)), hits / count)


def describe_criterion(criterion: Any) -> str:
    """A criterion in words that are the same in every process: its name, numbers and weights."""
    if not isinstance(criterion, nn.Module):
        return getattr(criterion, "__qualname__", type(criterion).__qualname__)
    plain = {k: x for k, x in vars(criterion).items() if isinstance(x, str | int | float)}
    weights = {name: tensor.tolist() for name, tensor in criterion.state_dict().items()}
    return f"{type(criterion).__qualname__} {plain} {weights}"
