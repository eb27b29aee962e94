"""How each batch of a run is trained on, and what of that must be the same when it is continued."""

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from training.criterion import Criterion, check_one_loss, describe_criterion
from training.inputs import fraction, whole_number
from utils import name_of, pick_precision


@dataclass(frozen=True)
class TrainSettings:
    """How each batch is trained on; the same in the whole run."""

    precision: torch.dtype  # of the forward pass
    label_smoothing: float = 0.0
    seed: int = 0  # of dropout
    compile: bool = False
    criterion: Criterion | None = None  # none: cross-entropy with `label_smoothing`
    sync_norm: bool = True  # batch norm over the rows of all processes

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        if self.criterion is not None:
            return self.criterion(logits, labels)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def make_settings(  # noqa: PLR0913
    device: torch.device,
    precision: str,
    label_smoothing: float,
    seed: int,
    compile: bool = False,
    criterion: Criterion | None = None,
    sync_norm: bool = True,
) -> TrainSettings:
    """Settings as plain numbers, whatever kind of number they were given as."""
    check_one_loss(criterion, label_smoothing)
    return TrainSettings(
        pick_precision(precision, device),
        fraction("label_smoothing", label_smoothing),
        whole_number("seed", seed, 0),
        bool(compile),
        criterion,
        bool(sync_norm),
    )


def resumable(
    settings: TrainSettings, epochs: int, ema_decay: float, steps_per_epoch: int | None, processes: int
) -> dict:
    """What must be the same when a training is continued, as plain data.

    The number of processes may change, unless each normalises its own rows.
    """
    plain = asdict(replace(settings, criterion=None))
    if settings.criterion is not None:
        plain["criterion"] = describe_criterion(settings.criterion)
    if not settings.sync_norm:
        plain["processes"] = processes
    plain |= {"precision": name_of(settings.precision), "steps_per_epoch": steps_per_epoch}
    return {"epochs": epochs, "ema_decay": ema_decay, **plain}
