"""Checks what a training is given before anything moves: loader, model, optimizer, schedule, batch."""

import contextlib
import math
import operator
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import Dataset

from augmentation.spelling import check_pipelines_of
from data import BatchLoader, EpochSampler, random_state, set_random_state
from training.criterion import check_criterion
from utils import autocast, inner_model, random_state_kept

# The settings of PyTorch's schedulers that are numbers of steps. Whoever is used to stepping a scheduler
# once an epoch gives a number of epochs, which is too small here.
HORIZONS = ("T_max", "T_0", "step_size", "total_iters", "milestones")


def length_of(loader: Any) -> int | None:
    """The number of a loader's batches; None if it has no length, as one over an IterableDataset."""
    try:
        return len(loader)
    except TypeError:
        return None


def check_loader(name: str, loader: Any) -> None:
    """Refuse what is no loader, one that is empty or can be passed over only once, or one whose
    Albumentations left out arguments that they were given.

    Raises:
        ValueError: one line that names the loader and the cure.
    """
    check_pipelines_of(getattr(loader, "dataset", None))
    kind = type(loader).__name__
    if isinstance(loader, Dataset):
        raise ValueError(f"the {name} loader is a dataset ({kind}): give DataLoader(it, batch_size=...)")
    if isinstance(loader, Iterator):
        raise ValueError(f"the {name} loader ({kind}) ends after one pass: give a DataLoader, or a list")
    if not hasattr(loader, "__iter__"):
        raise ValueError(f"the {name} loader must yield (images, labels), and a {kind} yields nothing")
    if length_of(loader) == 0:
        raise ValueError(
            f"the {name} loader has no batch: are there fewer images than a batch, and drop_last=True?"
        )


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that cannot train the model one batch at a time.

    Raises:
        ValueError: it moves no parameter of the model, or needs a closure.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS asks for the loss several times a step: choose another optimizer")
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in moved for p in model.parameters() if p.requires_grad):
        raise ValueError(
            "the optimizer moves no trainable parameter of this model: was the model made after it? "
            "make the optimizer again"
        )


def check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a scheduler that cannot be stepped after every batch of this optimizer.

    Raises:
        ValueError: one line that says how to make one that fits.
    """
    if scheduler is None:
        return
    kind = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            f"{kind} waits for a validation loss, but schedules here are stepped after every batch: "
            "step it yourself after each `train`, or choose another"
        )
    if not hasattr(scheduler, "step"):
        raise ValueError(f"the scheduler, a {kind}, has no step(): is an argument in the wrong place?")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(f"the {kind} is another optimizer's: make it again, with this optimizer")


def check_steps_left(scheduler: Any, loader: BatchLoader, epochs: int, done: int = 0) -> None:
    """Refuse a schedule that ends before the training; warn of one that seems to count epochs.

    Args:
        done: updates that are done already, in a training that is continued.

    Raises:
        ValueError: the message says how many steps the schedule has left.
    """
    length = length_of(loader)
    if scheduler is None or length is None:
        return
    steps, kind = length * epochs, type(scheduler).__name__
    # One step fewer than `total_steps`: after the last of them OneCycleLR's rate would be negative.
    left = getattr(scheduler, "total_steps", math.inf) - 1 - getattr(scheduler, "last_epoch", 0)
    if left < steps - done - 1:
        raise ValueError(
            f"the {kind} has {max(0, left):.0f} steps left and the training {steps - done}: "
            f"make it again, with {steps} steps in all"
        )
    for name in HORIZONS:
        value = getattr(scheduler, name, None)
        last = max(value, default=0) if isinstance(value, dict) else value
        if isinstance(last, int) and 0 < last <= epochs < steps and not done:
            print(
                f"warning: {kind} is stepped after every batch, {steps} times in all, and its {name} is "
                f"{last}: count it in batches"
            )


def check_training(
    model: Any, train_loader: Any, optimizer: torch.optim.Optimizer, scheduler: Any = None
) -> None:
    """Refuse what cannot be trained; called first by every function that trains.

    Raises:
        ValueError: one line that names what does not fit, and the cure.
    """
    check_model(model)
    check_loader("training", train_loader)
    check_optimizer(optimizer, model)
    check_scheduler(scheduler, optimizer)


def check_model(model: Any) -> None:
    """Refuse what is not a network of PyTorch's.

    Raises:
        ValueError: the message names its type.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model must be an nn.Module, not {type(model).__name__}")


def whole_number(name: str, value: Any, low: int) -> int:
    """A whole number of any type, such as NumPy's, as a plain int.

    Raises:
        ValueError: it is not a whole number, or is under `low`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None
    if number < low:
        raise ValueError(f"{name} must be at least {low}, not {number}")
    return number


def fraction(name: str, value: Any) -> float:
    """A number of any type, such as NumPy's, as a plain float.

    Raises:
        ValueError: it is not a number, or not at least 0 and under 1.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, not {value!r}") from None
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be at least 0 and under 1, not {number}")
    return number


def check_batch(batch: Any, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Check a batch, and return its images float (N, C, H, W) and labels int64 (N,).

    Args:
        classes: the number of classes of the model, for the range of labels; None: it is not known yet.

    Raises:
        ValueError: it is not a pair, has wrong types or shapes, or has a label that is no class.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, Sized) else ""
        raise ValueError(f"a batch must be a pair (images, labels), not a {type(batch).__name__}{size}")
    images, labels = batch
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        kinds = f"{type(images).__name__} and {type(labels).__name__}"
        raise ValueError(f"a batch must be two tensors (images, labels), not {kinds}")
    kinds = f"{images.dtype} {tuple(images.shape)} and {labels.dtype} {tuple(labels.shape)}"
    floats = (torch.float32, torch.float16, torch.bfloat16)
    if images.dtype not in floats or images.dim() != 4 or labels.dtype != torch.int64:
        raise ValueError(f"a batch must be float32 (N, C, H, W) and int64 (N,), not {kinds}")
    if labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(f"a batch needs one label an image, and an image, not {kinds}")
    if classes is not None:
        check_labels(labels, classes)
    return images, labels


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are no class: PyTorch's cross-entropy would ignore a label of -100 silently.

    Labels on a GPU are not looked at, as the CPU would have to wait for them.

    Raises:
        ValueError: the message names the least and the greatest label.
    """
    if labels.device.type != "cpu":
        return
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must be 0 to {classes - 1}, not {low} to {high}")


def count_classes(
    model: nn.Module, images: Tensor, device: torch.device, dtype: torch.dtype, criterion: Any = None
) -> int:
    """The number of classes of a model: the number of logits that it answers to two images.

    The model, its running statistics and the random state stay as they are.

    Args:
        criterion: a loss of one's own, which is tried on that answer.

    Raises:
        ValueError: the model does not return logits (N, K), or the criterion cannot be used; the
            message says what it returns.
    """
    images = images[:2].to(device)
    plain = inner_model(model)  # a compiled model would be compiled again for this size of a batch
    with evaluation_mode(plain), torch.no_grad(), autocast(device, dtype), random_state_kept(device):
        try:
            logits = plain(images)
        except (TypeError, ValueError, RuntimeError) as error:
            fault = str(error).strip().splitlines()[0]
            shape = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"the model does not take a batch of images {shape}: {fault}") from None
    check_logits(logits, len(images))
    if criterion is not None:
        check_criterion(criterion, logits.float())
    return logits.shape[1]


def check_logits(logits: Any, count: int) -> Tensor:
    """Check that a model's output is one row of logits for each of `count` images, and return it.

    Raises:
        ValueError: it is something else; the message says what.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model must return logits (N, K), not a {type(logits).__name__}")
    if logits.dim() != 2 or len(logits) != count or not logits.is_floating_point():
        shape = f"{logits.dtype} {tuple(logits.shape)} for {count} images"
        raise ValueError(f"the model must return logits (N, K), not {shape}")
    return logits


def check_evaluation(
    model: nn.Module, device: torch.device, dtype: torch.dtype, *loaders: Any, criterion: Any = None
) -> int:
    """Check the first batch of each loader to evaluate on, and the model's answer to it.

    The model is moved to the device. Loaders and random state stay as they are.

    Returns:
        The number of classes of the model.

    Raises:
        ValueError: all loaders are None; or a loader, its batch, or the model's answer cannot be used.
    """
    evaluation_loaders = [loader for loader in loaders if loader is not None]
    if not evaluation_loaders:
        raise ValueError("there is nothing to evaluate on: give a test_loader, or a val_loader")
    model.to(device).to(memory_format=torch.channels_last)
    for loader in evaluation_loaders:
        check_loader("evaluation", loader)
        batch = first_batch(loader)
        classes = count_classes(model, check_batch(batch)[0], device, dtype, criterion)
        check_batch(batch, classes)
        names = getattr(getattr(loader, "dataset", None), "classes", None)
        if isinstance(names, list | tuple) and len(names) < classes:
            print(
                f"warning: the model tells {classes} classes apart, and the data has {len(names)}; "
                f"num_classes={len(names)} makes one for it"
            )
    return classes


def first_batch(loader: BatchLoader) -> Any:
    """The first batch of a loader, whose next pass, like the random state, is as if nobody had looked.

    Raises:
        ValueError: the loader has no batch.
    """
    before, sampler = random_state(loader), getattr(loader, "sampler", None)
    epoch = (sampler.epoch, sampler.first) if isinstance(sampler, EpochSampler) else None
    batch = next(iter(loader), None)
    set_random_state(loader, before)
    if isinstance(sampler, EpochSampler) and epoch is not None:
        sampler.set_epoch(*epoch)
    if batch is None:
        raise ValueError("the loader has no batch")
    return batch


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; at the end each of its modules gets its earlier mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def training_mode(model: nn.Module) -> None:
    """Put a model into training mode.

    A model that is in training mode already is left as it is. Its caller may have put some modules in it
    into evaluation mode, such as norms whose statistics are frozen, and they stay there.
    """
    if not model.training:
        model.train()
