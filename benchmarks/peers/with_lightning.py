"""Lightning's Trainer as its pages on speed and its CIFAR-10 tutorial have it.

Mixed precision, workers that stay, nothing read from the device in a step, its own checkpoint and log.
"""

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.peers.job import LR, Job
from benchmarks.peers.plain import Cifar

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Classifier(lightning.LightningModule):
    """The network with its loss and its optimizer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross-entropy of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as for everyone."""
        return torch.optim.Adam(self.parameters(), lr=LR)


class Clock(lightning.Callback):
    """Tells the job of every update."""

    def __init__(self, job: Job):
        self.job = job

    def on_train_batch_end(self, *arguments: object) -> None:
        """One update is done."""
        self.job.mark()


def fit(job: Job) -> nn.Module:
    """Train for one pass over as many images as the job needs."""
    job.note = f"{PRECISIONS[job.precision]}, NCHW"
    model = job.make_model()
    loader = DataLoader(
        Cifar(job),
        job.batch,
        shuffle=True,
        num_workers=job.workers,
        persistent_workers=True,
        pin_memory=job.device.type == "cuda",
    )
    trainer = lightning.Trainer(
        accelerator=job.device.type if job.device.type == "cpu" else "gpu",
        devices=1,
        precision=PRECISIONS[job.precision],
        max_epochs=1,
        callbacks=[Clock(job)],
        default_root_dir=job.folder,
    )
    trainer.fit(Classifier(model), loader)
    return model
