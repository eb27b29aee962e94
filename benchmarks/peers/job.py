"""The work that every peer gets: network, images, batch, steps; and the clock it is timed by."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from models import CustomResNet

MEAN = (0.49139968, 0.48215841, 0.44653091)
STD = (0.24703223, 0.24348513, 0.26158784)
LR = 1e-3  # Adam's own; the same for all, so that the losses can be compared


@dataclass(kw_only=True)
class Clock:
    """Times `steps` updates after a warm-up; it can stand where a loop steps its scheduler."""

    steps: int
    device: torch.device = torch.device("cpu")
    warmup: int = 1
    done: int = 0
    marks: list[float] = field(default_factory=list)

    @property
    def updates(self) -> int:
        """How many updates to make."""
        return self.warmup + self.steps

    def mark(self) -> None:
        """To be called after every update; reads the clock after the warm-up and at the end."""
        self.done += 1
        if self.done in (self.warmup, self.updates):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

    step = mark

    @property
    def seconds(self) -> float:
        """Of the updates that count."""
        begin, end = self.marks
        return end - begin


@dataclass(kw_only=True)
class Job(Clock):
    """One measurement of one peer.

    Args:
        images, labels: uint8 (N, 32, 32, 3) and int64 (N,).
        precision: fp32, bf16 or fp16, what the machine is fast in; who offers it may use it.
        folder: for whatever a trainer writes.
    """

    images: np.ndarray
    labels: np.ndarray
    width: int
    batch: int
    precision: str
    folder: Path
    workers: int = 2
    note: str = ""  # the peer's settings

    def make_model(self) -> CustomResNet:
        """The network, with the same weights for everyone."""
        torch.manual_seed(0)
        return CustomResNet(width=self.width)

    @property
    def needed(self) -> int:
        """How many images that takes."""
        return self.updates * self.batch

    def result(self, model: torch.nn.Module) -> dict:
        """Images a second, updates made, and how well the first images are fitted."""
        return {
            "rate": self.steps * self.batch / self.seconds,
            "updates": self.done,
            "loss": self.loss(model),
            "note": self.note,
        }

    def loss(self, model: torch.nn.Module) -> float:
        """Cross-entropy of the first 512 training images as they are, in fp32, by batch statistics."""
        images = torch.from_numpy(self.images[:512]).float() / 255
        images = (images - torch.tensor(MEAN)) / torch.tensor(STD)
        model.to(self.device).float().train()
        with torch.no_grad():
            logits = model(images.permute(0, 3, 1, 2).to(self.device))
        return F.cross_entropy(logits, torch.from_numpy(self.labels[:512]).to(self.device)).item()
