import numpy as np
import pytest
import torch

import main
import models
import utils
from config import Config
from data import make_loaders
from training.lr_finder import find_lr
from training.optim import one_cycle

pytest.importorskip("lightning", reason="needs requirements-lightning.txt")

from lightning.pytorch import Callback, Trainer

from lit import LitData, LitModel, trainer_options

# Of Lightning 2.6 itself, on torch 2.15.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.slow,
]
CONFIG = Config(
    dataset="cifar10-sample",
    width=4,
    batch_size=64,
    epochs=3,
    val_split=0.1,
    lr=0.01,
    peak_epoch=1,
    label_smoothing=0.1,
    head_lr_scale=0.5,
    max_train_batches=5,
    max_test_batches=3,
    precision="fp32",
    device="cpu",
)


class Notes(Callback):
    """What was logged: the rate of each step, and the means of each epoch and of the test."""

    def __init__(self):
        self.lrs, self.rows, self.tested = [], [], None

    def on_train_batch_end(self, trainer, *arguments):
        self.lrs.append(trainer.callback_metrics["lr"].item())

    def on_train_epoch_end(self, trainer, module):
        self.rows.append({name: value.item() for name, value in trainer.callback_metrics.items()})

    def on_test_epoch_end(self, trainer, module):
        self.tested = {name: value.item() for name, value in trainer.callback_metrics.items()}


def make_trainer(config, root, **options):
    """A quiet Trainer that keeps notes."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"default_root_dir": root, "callbacks": [notes := Notes()], "enable_checkpointing": False}
    return Trainer(**trainer_options(config) | quiet | options), notes


def fit_plainly(config):
    """The same run by `fit_model`."""
    loaders = make_loaders(config)
    utils.seed_everything(config.seed)
    model = models.make_model(config.model, 10, **config.model_options)
    optimizer = main.make_optimizer(config.optimizer, model, config.lr, **config.optimizer_options)
    steps = config.max_train_batches
    options = {"epochs": config.epochs, "steps_per_epoch": steps, "peak_epoch": config.peak_epoch}
    history = main.fit_model(
        model,
        "cpu",
        loaders.train,
        loaders.test,
        optimizer,
        one_cycle(optimizer, config.lr, **options),
        config.epochs,
        val_loader=loaders.validation,
        **config.fit_options,
    )
    return model, history


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same configuration by Lightning and by `fit_model`."""
    module, loaders = LitModel(CONFIG), LitData(CONFIG)
    trainer, notes = make_trainer(CONFIG, tmp_path_factory.mktemp("lightning"))
    trainer.fit(module, datamodule=loaders)
    trainer.test(module, datamodule=loaders, verbose=False)
    return module, notes, *fit_plainly(CONFIG)


def test_lightning_ends_with_the_weights_of_fit_model_bit_for_bit(both):
    module, _, model, _ = both
    ours, theirs = model.state_dict(), module.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_lightning_logs_the_numbers_of_fit_model(both):
    _, notes, _, history = both
    assert notes.lrs == pytest.approx(history.lrs, rel=1e-6) and len(notes.lrs) == 15
    assert np.argmax(notes.lrs) == 4  # the peak, at the end of the first epoch: stepped per batch
    for row, epoch in zip(notes.rows, history.epochs, strict=True):
        logged = [row[f"{part}_{name}"] for part in ("train", "val") for name in ("loss", "acc")]
        expected = (epoch.train_loss, epoch.train_accuracy, epoch.val_loss, epoch.val_accuracy)
        assert logged == pytest.approx(expected, rel=1e-5)
    last = history.epochs[-1]
    tested = (notes.tested["test_loss"], notes.tested["test_acc"])
    assert tested == pytest.approx((last.test_loss, last.test_accuracy), rel=1e-5)


def test_without_a_validation_split_the_test_set_is_not_looked_at(tmp_path):
    config = Config(**CONFIG.identity | {"val_split": 0.0, "epochs": 1})
    trainer, notes = make_trainer(config, tmp_path)
    trainer.fit(LitModel(config), datamodule=LitData(config))
    assert set(notes.rows[0]) == {"lr", "train_loss", "train_acc"}


def test_a_rate_that_is_not_given_is_found_and_a_schedule_can_be_left_out(tmp_path):
    options = {"lr": None, "scheduler": "none", "epochs": 1, "batch_size": 16}
    config = Config(**CONFIG.identity | options)
    trainer, notes = make_trainer(config, tmp_path)
    module, loaders = LitModel(config), LitData(config)
    trainer.fit(module, datamodule=loaders)
    fresh = LitModel(config)
    optimizer = main.make_optimizer("adam", fresh, **config.optimizer_options)
    options = {"precision": "fp32", "label_smoothing": 0.1}
    found = find_lr(fresh.model, "cpu", make_loaders(config).train, optimizer, **options)
    assert notes.lrs == pytest.approx([found.suggestions["minimum"]] * 5, rel=1e-6)


class StopAfterOne(Callback):
    """Ends a training after its first epoch."""

    def on_train_epoch_end(self, trainer, module):
        trainer.should_stop = True


def test_a_checkpoint_of_lightning_is_read_safely_and_continues_to_the_same_bits(both, tmp_path):
    trainer, notes = make_trainer(CONFIG, tmp_path, callbacks=[StopAfterOne()])
    trainer.fit(LitModel(CONFIG), datamodule=LitData(CONFIG))
    assert trainer.global_step == 5
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = LitModel.load_from_checkpoint(tmp_path / "one.ckpt", config=CONFIG, weights_only=True)
    assert torch.equal(loaded.model.linear.weight, trainer.model.model.linear.weight)
    trainer, _ = make_trainer(CONFIG, tmp_path)
    module, place = LitModel(CONFIG), {"ckpt_path": tmp_path / "one.ckpt", "weights_only": True}
    trainer.fit(module, datamodule=LitData(CONFIG), **place)
    ours, theirs = both[0].state_dict(), module.state_dict()
    assert trainer.global_step == 15 and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ema_decay is fit_model's, and must be off here, not 0.9"):
        LitModel(Config(ema_decay=0.9))
    with pytest.raises(ValueError, match="tta is fit_model's, and must be off here, not True"):
        LitModel(Config(tta=True))
    trainer, _ = make_trainer(CONFIG, tmp_path)
    with pytest.raises(ValueError, match="num_classes must be 10, not 3"):
        trainer.fit(LitModel(CONFIG, num_classes=3), datamodule=LitData(CONFIG))


def test_a_checkpoint_of_lightnings_is_loaded_by_its_path_alone_and_predicts(tmp_path):
    trainer, _ = make_trainer(CONFIG, tmp_path, max_epochs=1)
    module, loaders = LitModel(CONFIG), LitData(CONFIG)
    trainer.fit(module, datamodule=loaders)
    trainer.save_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    again = LitModel.load_from_checkpoint(tmp_path / "one.ckpt", map_location="cpu")
    assert again.config == CONFIG
    batches = trainer.predict(again, loaders.loaders.test)
    answers = torch.cat(batches)
    torch.testing.assert_close(answers.sum(1), torch.ones(len(answers)))


def test_a_schedule_without_an_end_is_refused(tmp_path):
    trainer, _ = make_trainer(CONFIG, tmp_path, max_epochs=-1, max_time="00:00:01:00")
    with pytest.raises(ValueError, match="needs an end: give the Trainer max_epochs"):
        trainer.fit(LitModel(CONFIG), datamodule=LitData(CONFIG))


def test_overfit_batches_shows_the_same_batches_in_each_epoch(tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append(batch[0].clone())

    model, data = LitModel(CONFIG), LitData(CONFIG)
    trainer, _ = make_trainer(CONFIG, tmp_path, overfit_batches=2)
    trainer.callbacks.append(Watch())
    trainer.fit(model, data)
    assert len(seen) == 6 and len(seen[0]) == 64
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[5])
    assert not torch.equal(seen[0], seen[1])


def test_the_data_can_be_set_up_without_a_trainer():
    data = LitData(CONFIG)
    data.setup(None)
    assert len(data.train_dataloader()) == 5 and len(data.test_dataloader().dataset) == 1000
