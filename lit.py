"""The package's networks, data and schedule for those who train with Lightning."""

import math
import warnings
from dataclasses import asdict

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.data import _update_dataloader
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from config import Config
from data import Loaders, make_loaders, start_epoch
from models import make_model
from run import schedule
from training.lr_finder import find_lr
from training.optim import make_optimizer
from utils import get_device, make_scaler, pick_precision, seed_everything


class LitModel(LightningModule):
    """A network, its loss, its optimizer and its schedule, as `config` says.

    Logs train_loss, train_acc, val_loss, val_acc, test_loss, test_acc, means over all images of an
    epoch, and lr, the rate that a step used. The Trainer decides on epochs, precision and device, see
    `trainer_options`. Without dropout, which here draws from the global stream, the weights are those of
    `fit_model`, bit for bit. A checkpoint of an epoch's end continues to the same bits, one from within
    an epoch does not.

    Args:
        config: of the run; Lightning's checkpoints keep it as a dict, for `load_from_checkpoint`.
        num_classes: K, the number of logits.

    Raises:
        ValueError: `config` wants what only `fit_model` does.
    """

    def __init__(self, config: Config | dict, num_classes: int = 10):
        super().__init__()
        config = Config(**config) if isinstance(config, dict) else config  # as a checkpoint has it
        self.save_hyperparameters({"config": asdict(config), "num_classes": num_classes})
        for name in ("ema_decay", "tta", "compile", "init_from"):
            if getattr(config, name):
                raise ValueError(
                    f"{name} is fit_model's, and must be off here, not {getattr(config, name)}"
                )
        self.config, self.num_classes = config, num_classes
        seed_everything(config.seed, config.deterministic)
        self.model = make_model(config.model, num_classes, **config.model_options)
        self.model.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, K)."""
        return self.model(images)

    def setup(self, stage: str) -> None:
        """Refuse data of another number of classes."""
        loaders = getattr(self.trainer.datamodule, "loaders", None)
        if loaders and len(loaders.classes) != self.num_classes:
            raise ValueError(f"num_classes must be {len(loaders.classes)}, not {self.num_classes}")

    def on_train_epoch_start(self) -> None:
        """Count epochs from 1, as our samplers do; Lightning has just told them its own, from 0.

        With `overfit_batches` each epoch is the first one again, so that its batches are the same.
        """
        epoch = 1 if self.trainer.overfit_batches else self.current_epoch + 1
        start_epoch(self.trainer.train_dataloader, epoch)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        self.log("lr", self.optimizers().param_groups[0]["lr"], on_step=True, on_epoch=False)
        return self.score("train", batch, self.config.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Loss and accuracy of a batch."""
        self.score("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Loss and accuracy of a batch."""
        self.score("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Class probabilities (N, K) of a batch."""
        return self(batch[0]).softmax(1)

    def score(self, part: str, batch: tuple[Tensor, Tensor], label_smoothing: float = 0.0) -> Tensor:
        """The loss of a batch; it and the accuracy count once an image in the epoch's means."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        accuracy = (logits.argmax(1) == labels).float().mean()
        means = {f"{part}_loss": loss, f"{part}_acc": accuracy}
        self.log_dict(means, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer | dict:
        """The optimizer and a schedule over all the steps that the Trainer will take, one a batch."""
        config, trainer = self.config, self.trainer
        optimizer = make_optimizer(config.optimizer, self, config.lr or 1e-3, **config.optimizer_options)
        steps = trainer.estimated_stepping_batches  # which loads the training data
        finder = None
        if config.lr is None:
            finder = find_lr(
                self.model,
                self.device,
                trainer.train_dataloader,
                optimizer,
                precision=config.precision,
                label_smoothing=config.label_smoothing,
            )
        epochs = trainer.max_epochs
        if not epochs or epochs < 1 or not math.isfinite(steps):
            raise ValueError("a one-cycle schedule needs an end: give the Trainer max_epochs")
        scheduler = schedule(config, optimizer, finder, epochs, -(-steps // epochs))
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class LitData(LightningDataModule):
    """The loaders of a run, their batches made on the Trainer's device.

    There is no validation without `config.val_split`: the test set is for `Trainer.test` alone.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.loaders: Loaders = None  # type: ignore[assignment]  # until `setup`

    def setup(self, stage: str | None = None) -> None:
        """Load the data once; without a Trainer, for the CPU."""
        # What advises more workers does not know that these batches need none.
        warnings.filterwarnings("ignore", ".*does not have many workers")
        if self.loaders is None:
            device = self.trainer.strategy.root_device if self.trainer else "cpu"
            self.loaders = make_loaders(self.config, device)

    def train_dataloader(self) -> DataLoader:
        """The training images, shuffled and augmented."""
        return self.divided(self.loaders.train)

    def val_dataloader(self) -> DataLoader | list:
        """The images held out, if there are any."""
        return self.divided(self.loaders.validation) if self.loaders.validation else []

    def test_dataloader(self) -> DataLoader:
        """The test images."""
        return self.divided(self.loaders.test)

    def divided(self, loader: DataLoader) -> DataLoader:
        """The loader; where the Trainer has several processes, one with this process's batches of it.

        Lightning's own division would take our sampler for one of single images.
        """
        if self.trainer is None or self.trainer.world_size == 1:
            return loader
        place = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        return _update_dataloader(
            loader, DistributedSamplerWrapper(loader.sampler, shuffle=False, **place)
        )


def trainer_options(config: Config) -> dict:
    """Keyword arguments of a `Trainer` that trains as `config` says: epochs, precision, device."""
    device = get_device(config.device)
    dtype = pick_precision(config.precision, device)
    options = {"precision": {torch.float32: "32-true", torch.bfloat16: "bf16-mixed"}.get(dtype)}
    if dtype == torch.float16:  # Lightning's own scaler starts so high that first steps are skipped
        options = {"plugins": MixedPrecision("16-mixed", device.type, make_scaler(device, dtype))}
    return {
        **options,
        "accelerator": device.type,
        "devices": [device.index or 0] if device.type == "cuda" else 1,
        "max_epochs": config.epochs,
        "limit_val_batches": None if config.val_split else 0,
        "log_every_n_steps": 10,
        "enable_model_summary": dtype == torch.float32,  # it warns of any other, and counts in 32 bits
    }
