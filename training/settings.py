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
) -> TrainSettings:
    """Settings as plain numbers, whatever kind of number they were given as."""
    check_one_loss(criterion, label_smoothing)
    return TrainSettings(
        pick_precision(precision, device),
        fraction("label_smoothing", label_smoothing),
        whole_number("seed", seed, 0),
        bool(compile),
        criterion,
    )


def resumable(settings: TrainSettings, steps_per_epoch: int | None) -> dict:
    """What must be the same when a training is continued, as plain data."""
    plain = asdict(replace(settings, criterion=None))
    if settings.criterion is not None:
        plain["criterion"] = describe_criterion(settings.criterion)
    return {**plain, "precision": name_of(settings.precision), "steps_per_epoch": steps_per_epoch}
