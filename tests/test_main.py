import copy
import csv
import errno
import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import data
import main
import models
import run
import sources
import utils
from checkpoint import Checkpoints, load_checkpoint
from config import Config, parse_config
from data import make_loader
from sources import cifar10
from sources.split import statistics
from training import lr_finder, optim, progress
from transforms import normalize, train_transform
from transforms import test_transform as evaluation_transform
from visualize import plot_gradcam, plot_misclassified
from weights_file import digest, load_weights, save_weights

CPU = torch.device("cpu")
CARD = {  # of `build`'s network
    "model": "custom_resnet",
    "options": {"width": 4},
    "classes": list(cifar10.CLASSES),
    "mean": [0.5] * 3,
    "std": [0.2] * 3,
    "image_size": 32,
    "config": {},
    "data_sha256": "",
}
SMOKE = (
    "--dataset cifar10-sample --width 4 --batch-size 64 --epochs 2 --max-train-batches 3 "
    "--max-test-batches 2 --lr 0.01 --precision fp32"
).split()


@pytest.fixture
def loaders(sample):
    """Training and test loader over the small sample."""
    config = Config(batch_size=32)
    train = make_loader(sample, train_transform(), "cpu", config, shuffle=True)
    return train, make_loader(sample, evaluation_transform(), "cpu", config)


def build(seed=0, **options):
    """A small network and its optimizer, the same every time."""
    torch.manual_seed(seed)
    model = models.make_model("custom_resnet", width=4, **options)
    return model, main.make_optimizer("adam", model, lr=0.01)


def fit(loaders, epochs=2, **options):
    """A short run in fp32; returns model and history."""
    model, optimizer = build(dropout=0.2)
    scheduler = optim.one_cycle(optimizer, 0.01, epochs=epochs, steps_per_epoch=len(loaders[0]))
    history = main.fit_model(
        model, CPU, *loaders, optimizer, scheduler, epochs, precision="fp32", **options
    )
    return model, history


def weights(model):
    """Every weight and buffer as one vector."""
    return torch.cat([tensor.double().ravel() for tensor in model.state_dict().values()])


def untimed(history):
    """Rows without what the clock says."""
    return [
        (row.lr, row.train_loss, row.train_accuracy, row.val_loss, row.test_loss, row.test_accuracy)
        for row in history.epochs
    ]


# Training


def test_fit_overfits_one_batch_and_warns_of_nothing(sample, capsys):
    one = sample.take(np.arange(0, 200, 20))
    loader = make_loader(one, evaluation_transform(), "cpu", Config(batch_size=10), shuffle=True)
    model, optimizer = build()
    history = main.fit_model(model, CPU, loader, loader, optimizer, epochs=60, precision="fp32")
    assert history.epochs[-1].test_accuracy == 1.0
    assert history.epochs[-1].train_loss < 0.1 < history.epochs[0].train_loss
    assert "warning" not in capsys.readouterr().out.partition("\n   10 ")[2]


def test_same_seed_gives_the_same_weights_and_history(loaders):
    (one, first), (two, second) = fit(loaders), fit(loaders)
    assert torch.equal(weights(one), weights(two)) and untimed(first) == untimed(second)


def test_another_seed_gives_another_dropout(loaders):
    assert not torch.equal(weights(fit(loaders, seed=0)[0]), weights(fit(loaders, seed=1)[0]))


def test_an_average_of_the_weights_is_judged_kept_and_left_in_the_model(loaders, tmp_path):
    model, optimizer = build()
    seen = [weights(model)]
    optimizer.register_step_post_hook(lambda *_: seen.append(weights(model)))
    options = {"epochs": 1, "precision": "fp32", "ema_decay": 0.75}
    history = main.fit_model(
        model, CPU, *loaders, optimizer, checkpoints=Checkpoints(tmp_path, CARD), **options
    )
    expected = seen[0]
    for count, later in enumerate(seen[1:]):  # first the mean of all, so that no first weights stay
        share = min(0.75, count / (count + 1))
        expected = share * expected + (1 - share) * later
    counts = torch.cat(
        [torch.full((tensor.numel(),), "tracked" in name) for name, tensor in model.state_dict().items()]
    )
    expected[counts] = len(loaders[0])  # the batches that a norm has seen are counted, not averaged
    torch.testing.assert_close(weights(model), expected, rtol=1e-4, atol=1e-5)
    assert main.test(model, CPU, loaders[1], precision="fp32") == history.epochs[0].stats()["test"]
    assert torch.equal(weights(load_weights(tmp_path)[0]), weights(model))
    assert len(optimizer._optimizer_step_post_hooks) == 1  # the one of this test


def test_a_compiled_network_trains_to_the_same_weights(loaders, monkeypatch):
    plain, _ = fit(loaders)
    calls, compiler = [], torch.compile

    def without_code_generation(model, mode, dynamic):
        calls.append(model)
        return compiler(model, backend="eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", without_code_generation)
    compiled, _ = fit(loaders, compile=True)
    assert calls == [compiled]  # once, to train with; evaluation runs as it is
    assert torch.equal(weights(plain), weights(compiled))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["custom_resnet", "resnet18"])
def test_a_network_is_one_graph_in_training_and_another_for_a_smaller_last_batch(name, monkeypatch):
    graphs, compiler = [], torch.compile

    def kept(graph, inputs):
        graphs.append([type(x) for x in inputs])
        return graph.forward

    def whole(model, mode, dynamic):  # fullgraph: an error where Python would look at a tensor
        return compiler(model, backend=kept, fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", whole)
    torch._dynamo.reset()
    model = models.make_model(name, width=8)
    images, labels = torch.randn(20, 3, 32, 32), torch.arange(20) % 10
    loader = [(images[i : i + 8], labels[i : i + 8]) for i in (0, 8, 16)]  # 8, 8 and 4
    optimizer = main.make_optimizer("sgd", model, 0.01)
    main.fit_model(model, CPU, loader, loader, optimizer, epochs=2, precision="fp32", compile=True)
    assert len(graphs) == 2
    assert all(issubclass(kind, torch.Tensor) for kinds in graphs for kind in kinds)  # no size varies


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler for torch.compile")
def test_a_network_compiled_to_machine_code_trains_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no processes that stay
    torch._dynamo.reset()
    trained = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10))
        optimizer = main.make_optimizer("sgd", model, 0.01)
        images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
        options = {"epochs": 2, "precision": "fp32", "compile": compile}
        main.fit_model(model, CPU, [(images, labels)] * 2, [(images, labels)], optimizer, **options)
        trained.append(weights(model))
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-5)
    assert any(tmp_path.rglob("*.so"))


def test_looking_changes_nothing(loaders, tmp_path):
    plain, _ = fit(loaders)
    train, test = loaders
    model, optimizer = build(dropout=0.2)
    utils.summarize(model)
    predictions = main.predict(model, CPU, test)
    next(iter(train))
    lr_finder.find_lr(model, CPU, train, optimizer, start_lr=1e-4, end_lr=0.05, steps=20)
    images = test.dataset.split.images
    plot_gradcam(model, images, predictions, cifar10.CLASSES, layer="layer2", count=2)
    plot_misclassified(images, predictions, cifar10.CLASSES)
    scheduler = optim.one_cycle(optimizer, 0.01, epochs=2, steps_per_epoch=6)
    main.fit_model(
        model,
        CPU,
        train,
        test,
        optimizer,
        scheduler,
        2,
        precision="fp32",
        val_loader=test,
        checkpoints=tmp_path,
    )
    assert torch.equal(weights(plain), weights(model))


def test_training_leaves_the_global_random_state_alone(loaders):
    model, optimizer = build()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    main.train(model, CPU, loaders[0], optimizer)
    assert torch.equal(state, torch.get_rng_state())


def test_the_recorded_rates_are_those_that_the_steps_used(loaders):
    model, optimizer = build()
    scheduler = optim.one_cycle(optimizer, 0.01, epochs=2, steps_per_epoch=6)
    used, step = [], optimizer.step
    optimizer.step = lambda *a, **k: used.append(optimizer.param_groups[0]["lr"]) or step(*a, **k)
    optimizer.step._wrapped_by_lr_sched = True
    optimizer._opt_called = True
    history = main.fit_model(model, CPU, *loaders, optimizer, scheduler, 2, precision="fp32")
    assert history.lrs == used and len(used) == 12
    assert [row.lr for row in history.epochs] == [used[5], used[11]]


def test_plain_epochs_of_train_see_new_augmentations_each_time(loaders):
    model, optimizer = build()
    for _ in range(2):
        main.train(model, CPU, loaders[0], optimizer, precision="fp32")
    assert loaders[0].sampler.epoch == 3


class Numbers(Dataset):
    """Images whose label says which they are, and whose first pixel is a fresh random number."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        image = torch.full((3, 32, 32), index / 40)
        image[0, 0, 0] = torch.rand(())
        return image, index % 10


def test_a_plain_shuffled_loader_has_another_order_and_other_draws_each_epoch():
    model, optimizer = build()
    seen = []

    def note(module, inputs):
        if module.training:
            seen.append(inputs[0][:, :, 0, 0].clone())

    model.prep.register_forward_pre_hook(note)
    loader = DataLoader(Numbers(), 8, shuffle=True)
    main.fit_model(model, CPU, loader, loader, optimizer, epochs=2, precision="fp32")
    train_batches = [torch.cat(seen[k : k + 5]) for k in (0, 5)]  # of epoch 1 and 2
    orders = [batch[:, 1].tolist() for batch in train_batches]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert not set(train_batches[0][:, 0].tolist()) & set(train_batches[1][:, 0].tolist())


def test_a_list_of_batches_is_a_loader_too(sample):
    batch = (normalize(sample.images[:16]), torch.from_numpy(sample.labels[:16]))
    model, optimizer = build()
    history = main.fit_model(model, CPU, [batch], [batch], optimizer, epochs=2, precision="fp32")
    assert len(history.epochs) == 2 and history.epochs[0].images_per_second > 0


PIXELS = torch.zeros(4, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (PIXELS, torch.tensor([0, 1, 2, -100]), "labels must be 0 to 9, not -100 to 2"),
        (PIXELS, torch.tensor([0, 1, 2, 10]), "labels must be 0 to 9, not 0 to 10"),
        (PIXELS.byte(), torch.zeros(4, dtype=torch.int64), "must be float32 .* not torch.uint8"),
        (PIXELS[0], torch.zeros(3, dtype=torch.int64), "must be float"),
        (PIXELS, torch.zeros(4), "and int64"),
        (PIXELS, torch.zeros(3, dtype=torch.int64), "one label an image"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused_before_the_first_update(images, labels, message):
    model, optimizer = build()
    before = weights(model)
    with pytest.raises(ValueError, match=message) as caught:
        main.train(model, CPU, [(images, labels)], optimizer, precision="fp32")
    assert torch.equal(before, weights(model)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:7", "meta", torch.device("meta")])
@pytest.mark.parametrize("action", ["train", "fit_model", "find_lr", "test", "predict"])
def test_a_device_that_is_not_there_is_refused_by_every_function(tiny, loaders, device, action):
    train, test = loaders
    others = {"train": [train], "fit_model": [train, test], "find_lr": [train]}.get(action)
    optimizer = [torch.optim.SGD(tiny.parameters(), 0.1)] if others else []
    with pytest.raises(ValueError, match="there is no device .* here; choose cpu or auto"):
        getattr(main, action)(tiny, device, *(others or [test]), *optimizer)


@pytest.mark.parametrize("action", [main.test, main.predict])
def test_answers_that_are_not_numbers_are_no_result(tiny, action):
    images = torch.zeros(4, 3, 32, 32)
    images[2] = math.nan
    with pytest.raises(FloatingPointError, match="answers to 1 of 4 images are not numbers"):
        action(tiny, CPU, [(images, torch.zeros(4, dtype=torch.int64))])


def test_a_model_without_a_gradient_is_refused_in_one_line(tiny, loaders, monkeypatch):
    forward = tiny.forward
    monkeypatch.setattr(tiny, "forward", lambda x: forward(x).detach())
    with pytest.raises(ValueError, match="no gradient leads from the loss to a weight"):
        main.train(tiny, CPU, loaders[0], torch.optim.SGD(tiny.parameters(), 0.1))


def test_a_loader_without_batches_is_refused():
    model, optimizer = build()
    with pytest.raises(ValueError, match="the training loader has no batch"):
        main.train(model, CPU, [], optimizer)


def test_weights_ruined_by_the_last_update_stop_the_run_and_are_not_kept(loaders, tmp_path):
    model, _ = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    data.limit_batches(loaders[0], 1)
    with pytest.raises(FloatingPointError, match=r"the test loss is (nan|inf) after epoch 1"):
        main.fit_model(
            model,
            CPU,
            *loaders,
            optimizer,
            epochs=2,
            precision="fp32",
            checkpoints=Checkpoints(tmp_path, CARD),
        )
    assert not (tmp_path / "weights.safetensors").exists() and not (tmp_path / "history.json").exists()


def test_test_loss_is_per_image_whatever_the_batch_size(sample):
    model, _ = build()
    stats = [
        main.test(
            model,
            CPU,
            make_loader(sample, evaluation_transform(), "cpu", Config(batch_size=size)),
            precision="fp32",
        )
        for size in (200, 64, 7)  # the last batch of 64 has 8 images, that of 7 has 4
    ]
    for other in stats[1:]:
        assert other == pytest.approx(stats[0], rel=1e-5)


def test_train_loss_is_per_image_when_the_last_batch_is_short():
    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10)
    model, _ = build()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum, module.forward = 0.0, lambda x: x  # else each batch has its own statistics
    stats = main.train(
        model, CPU, DataLoader(TensorDataset(images, labels), 8), frozen, precision="fp32"
    )
    expected = nn.functional.cross_entropy(model(images), labels).item()
    assert stats.loss == pytest.approx(expected, rel=1e-5)


def test_tta_averages_the_logits_of_six_views_of_each_image(loaders):
    model, _ = build()
    images = torch.cat([batch for batch, _ in loaders[1]])
    model.eval()
    with torch.no_grad():
        expected = sum(share * model(view) for share, view in utils.six_views(images)).softmax(1)
    found = main.predict(model, CPU, loaders[1], precision="fp32", tta=True)
    torch.testing.assert_close(torch.from_numpy(found.probabilities), expected, rtol=1e-4, atol=1e-5)
    plain = main.predict(model, CPU, loaders[1], precision="fp32")
    assert not np.allclose(plain.probabilities, found.probabilities, atol=1e-3)
    stats = main.test(model, CPU, loaders[1], precision="fp32", tta=True)
    assert stats.accuracy == found.accuracy


def test_a_run_judged_by_six_views_is_so_after_its_last_epoch_alone(loaders):
    _, plain = fit(loaders, epochs=2)
    model, history = fit(loaders, epochs=2, tta=True)
    evaluated = main.test(model, CPU, loaders[1], precision="fp32", tta=True)
    assert history.epochs[0].stats()["test"] == plain.epochs[0].stats()["test"]
    assert history.epochs[1].stats()["test"] == evaluated
    assert evaluated.loss != main.test(model, CPU, loaders[1], precision="fp32").loss


@pytest.mark.slow
def test_the_weights_in_the_repository_are_as_good_as_their_card_says(capsys):
    card = (Path(main.__file__).parent / "weights/custom_resnet.md").read_text()
    said = re.search(r"sample in the repository \|.* ([\d.]+)% in fp32", card)[1]
    model, facts = load_weights("custom_resnet")
    config = Config(**facts["config"] | {"dataset": "cifar10-sample"})
    _, loader = run.test_images(config, facts, CPU)
    stats = main.test(model, CPU, loader, precision="fp32", tta=config.tta)
    assert 100 * stats.accuracy == pytest.approx(float(said), abs=0.21)  # two images, for other kernels
    file = Path(main.__file__).parent / "weights/custom_resnet.safetensors"
    assert f"{file.stat().st_size:,} bytes" in card
    assert f"| SHA-256 | {sha256(file.read_bytes()).hexdigest()} |" in card


def test_photographs_are_classified_by_the_weights_in_the_repository(tmp_path, capsys):
    split, expected = sources.load_split("cifar10-sample", "test"), ("cat", "ship", "horse")
    for name in expected:
        image = Image.fromarray(split.images[split.labels == split.classes.index(name)][1])
        image.resize((640, 480), Image.Resampling.BICUBIC).save(tmp_path / f"{name}.jpg")
    assert main.main(["predict", *(str(tmp_path / f"{name}.jpg") for name in expected)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split(": ")[0]).stem for line in lines] == list(expected)
    assert tuple(line.split(": ")[1].split()[0] for line in lines) == expected


def test_testing_and_predicting_change_nothing_and_agree(loaders):
    model, _ = build()
    model.train()
    before = weights(model)
    stats, predictions = main.test(model, CPU, loaders[1]), main.predict(model, CPU, loaders[1])
    assert model.training and torch.equal(before, weights(model))
    assert stats.accuracy == pytest.approx(predictions.accuracy)
    assert predictions.probabilities.sum(1) == pytest.approx(np.ones(200), abs=1e-5)


@pytest.mark.parametrize(("precision", "dtype"), utils.PRECISIONS.items())
def test_the_forward_pass_runs_in_the_precision_asked_for(loaders, precision, dtype):
    model, optimizer = build()
    seen = set()
    model.linear.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    train, test = ([[x[:4] for x in next(iter(loader))]] for loader in loaders)  # fp16 is slow on CPUs
    stats = main.train(model, CPU, train, optimizer, precision=precision)
    main.test(model, CPU, test, precision=precision)
    assert seen == {dtype} and math.isfinite(stats.loss)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_label_smoothing_reaches_the_loss(loaders):
    losses = []
    for smoothing in (0.0, 0.5):
        model, _ = build()
        frozen = torch.optim.SGD(model.parameters(), lr=0.0)
        losses.append(
            main.train(model, CPU, loaders[0], frozen, label_smoothing=smoothing, precision="fp32").loss
        )
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_fit_prints_one_head_and_one_row_an_epoch(loaders, capsys):
    fit(loaders, epochs=3)
    lines = capsys.readouterr().out.splitlines()
    heads = "epoch lr train loss acc test loss acc seconds images/s left"
    assert " ".join(lines[0].split()) == heads
    assert [line.split()[0] for line in lines[1:]] == ["1/3", "2/3", "3/3"]
    assert lines[-1].endswith(" 0:00")
    assert len({len(line) for line in lines}) == 1


def test_with_a_validation_set_the_test_set_is_looked_at_once_at_the_end(loaders, capsys):
    _, history = fit(loaders, epochs=3, val_loader=loaders[1])
    assert [row.test_accuracy is None for row in history.epochs] == [True, True, False]
    assert all(row.val_accuracy is not None for row in history.epochs)
    lines = capsys.readouterr().out.splitlines()
    assert "val loss" in lines[0] and len({len(line) for line in lines}) == 1


class Full(io.StringIO):
    """A stream on a disk that is full."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_output_that_cannot_be_written_ends_no_training(loaders, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Full())
    model, history = fit(loaders)
    assert len(history.epochs) == 2
    assert "output is lost from here on: No space left on device" in capsys.readouterr().err


@pytest.mark.slow
def test_a_command_whose_output_is_a_full_device_ends_well(tmp_path):
    command = [sys.executable, "main.py", *SMOKE, "--output", str(tmp_path / "r")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, cwd=Path(main.__file__).parent, text=True
        )
    assert done.returncode == 0 and "output is lost" in done.stderr
    assert (tmp_path / "r" / "report.md").exists()


@pytest.mark.parametrize("trouble", ["a file in the folder's place", "writes that fail"])
def test_events_that_cannot_be_written_end_no_training(loaders, tmp_path, monkeypatch, capsys, trouble):
    if trouble == "writes that fail":
        from training import progress

        def fail(*arguments):
            raise OSError("no space")

        monkeypatch.setattr(progress, "write_events", fail)
    else:
        (tmp_path / "tensorboard").touch()
    _, history = fit(loaders, checkpoints=tmp_path)
    assert len(history.epochs) == 2
    assert capsys.readouterr().out.count("warning: no TensorBoard events from here on") == 1


def test_a_resumed_run_prints_its_head_and_its_earlier_rows_again(loaders, tmp_path, capsys):
    fit(loaders, epochs=2, checkpoints=tmp_path)
    state = load_checkpoint(tmp_path / "checkpoints")
    newest = max((tmp_path / "checkpoints").glob("*.ckpt"))
    newest.unlink()
    assert state["epoch_state"]["epoch"] == 3
    capsys.readouterr()
    fit(loaders, epochs=2, checkpoints=Checkpoints(tmp_path, resume=True))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-3:]] == ["epoch", "1/2", "2/2"]


def test_where_nobody_watches_a_long_epoch_says_how_far_it_is(loaders, monkeypatch, capsys):
    from training import progress

    monkeypatch.setattr(progress, "QUIET", 0.0)
    fit(loaders, epochs=1)
    assert "epoch 1: 2 of 6 batches done" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_training_before_the_update(loaders):
    model, optimizer = build()
    nn.init.constant_(model.linear.bias, math.inf)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        FloatingPointError, match=r"the loss is not finite at epoch 4, step 1, learning rate 0.01"
    ):
        main.train(model, CPU, loaders[0], optimizer, epoch=4)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_unknown_optimizer_names_the_choices(tiny):
    with pytest.raises(ValueError, match="unknown optimizer 'lion'; choose from adam, adamw, sgd, muon"):
        main.make_optimizer("lion", tiny)


@pytest.mark.parametrize("precision", utils.PRECISIONS.values(), ids=str)
@pytest.mark.parametrize(("shape", "size"), [((8, 40), 1e-12), ((40, 8), 1e12), ((16, 16), 1.0)])
def test_orthogonal_turns_every_singular_value_into_about_one(shape, size, precision, monkeypatch):
    monkeypatch.setattr(optim, "pick_precision", lambda *_: precision)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * size
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = optim.orthogonal(matrix).float()
    assert found.shape == matrix.shape
    assert ((torch.linalg.svdvals(found) - 0.95).abs() < 0.35).all()
    assert (found * (u @ v)).sum() / found.norm() / (u @ v).norm() > 0.97


@pytest.mark.parametrize(("name", "decay"), [("adam", 0.1), ("adamw", 0.4), ("sgd", 0.4)])
def test_a_slower_last_layer_decays_as_the_others_do(tiny, name, decay):
    optimizer = main.make_optimizer(name, tiny, weight_decay=0.1, head_lr_scale=0.25)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0, decay, 0]


def test_muon_turns_convolutions_as_pytorchs_own_turns_matrices_and_leaves_the_rest_to_sgd(tiny):
    torch.manual_seed(0)
    optimizer = main.make_optimizer("muon", tiny, lr=0.05, weight_decay=0.1, head_lr_scale=0.25)
    convolutions, norms, head, bias = optimizer.param_groups
    assert all(p.dim() == 4 for p in convolutions["params"]) and len(convolutions["params"]) == 8
    assert [g["lr"] for g in (norms, head, bias)] == pytest.approx([0.4, 0.1, 0.1])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0, 0, 0]
    wide = [p for p in convolutions["params"] if len(p) <= p[0].numel()]  # PyTorch's scales tall ones
    matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in wide]
    before = [p.detach().clone() for p in matrices]
    theirs = torch.optim.Muon(matrices, lr=0.05, weight_decay=0.1, momentum=0.9)
    others = [p for g in (norms, head, bias) for p in g["params"]]
    copies = [nn.Parameter(p.detach().clone()) for p in others]
    slower = {"params": copies[len(norms["params"]) :], "lr": 0.1}
    groups = [{"params": copies[: len(norms["params"])]}, slower]
    sgd = torch.optim.SGD(groups, lr=0.4, momentum=0.9, nesterov=True)
    for _ in range(3):
        for mine, copied in [*zip(wide, matrices, strict=True), *zip(others, copies, strict=True)]:
            mine.grad = torch.randn_like(mine)
            copied.grad = mine.grad.reshape_as(copied).clone()
        for each in (optimizer, theirs, sgd):
            each.step()
    for mine, copied, first in zip(wide, matrices, before, strict=True):
        assert (mine.flatten(1) - copied).norm() < 0.05 * (copied - first).norm()
    for mine, copied in zip(others, copies, strict=True):
        torch.testing.assert_close(mine, copied)


def test_muon_calls_a_closure_for_the_gradients_of_its_update(tiny):
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    called = copy.deepcopy(tiny)
    loss = tiny(images).square().mean()
    loss.backward()
    main.make_optimizer("muon", tiny).step()
    optimizer = main.make_optimizer("muon", called)

    def closure():
        value = called(images).square().mean()
        value.backward()
        return value

    assert torch.equal(optimizer.step(closure), loss)
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), called.parameters(), strict=True))


def test_muon_runs_each_hook_once(tiny):
    optimizer, calls = main.make_optimizer("muon", tiny), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


def test_muon_takes_the_scale_out_of_scaled_gradients(tiny):
    torch.manual_seed(0)
    scaled = copy.deepcopy(tiny)
    for model, scales in ((tiny, (1.0, 1.0)), (scaled, (2.0**14, 2.0**10))):
        optimizer = main.make_optimizer("muon", model, lr=0.05)
        for step, scale in enumerate(scales):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i + step)) * scale
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), scaled.parameters(), strict=True))


@pytest.mark.parametrize("scale", [None, 2.0**14])
def test_muon_leaves_gradients_as_they_were(tiny, scale):
    torch.manual_seed(0)
    optimizer = main.make_optimizer("muon", tiny, lr=0.05, weight_decay=0.1)
    if scale:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    for p in tiny.parameters():
        p.grad = torch.randn_like(p) * (scale or 1.0)
    before = [p.grad.clone() for p in tiny.parameters()]
    weights = [p.detach().clone() for p in tiny.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, old) for p, old in zip(tiny.parameters(), before, strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(tiny.parameters(), weights, strict=True))


# The command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    assert main.main([*SMOKE, "--output", str(folder)]) == 0
    return folder


def test_a_run_leaves_everything_in_its_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json",
        "environment.json",
        "summary.txt",
        "history.json",
        "history.csv",
        "weights.safetensors",
        "checkpoints",
        "tensorboard",
        "figures",
        "report.md",
        "report.html",
        "mistakes.csv",
        "predictions.csv",
        ".lock",
    }
    assert Config(**json.loads((finished / "config.json").read_text())).max_train_batches == 3


def test_tensorboard_has_every_epoch_and_every_rate(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    history = utils.History.load(finished)
    assert set(events.Tags()["scalars"]) == {
        "loss/train",
        "loss/test",
        "accuracy/train",
        "accuracy/test",
        "lr",
    }
    assert [e.value for e in events.Scalars("lr")] == pytest.approx(history.lrs)
    assert [e.value for e in events.Scalars("loss/test")] == pytest.approx(
        [row.test_loss for row in history.epochs]
    )


def test_command_line_and_library_give_the_same_history(finished):
    config = Config(**json.loads((finished / "config.json").read_text()))
    loaders = data.make_loaders(config)
    utils.seed_everything(config.seed)
    model = models.make_model("custom_resnet", width=4)
    optimizer = main.make_optimizer("adam", model)
    scheduler = optim.one_cycle(optimizer, 0.01, epochs=2, steps_per_epoch=3)
    history = main.fit_model(
        model, CPU, loaders.train, loaders.test, optimizer, scheduler, 2, precision="fp32"
    )
    assert untimed(history) == untimed(utils.History.load(finished))


@pytest.mark.parametrize("name", ["", "weights.safetensors"])
def test_saved_weights_test_as_they_are(finished, name, capsys):
    from weights_file import load_weights

    assert main.main(["test", str(finished / name)]) == 0
    printed = capsys.readouterr().out
    model, card = load_weights(finished)
    split = sources.load_split("cifar10-sample", "test")
    loader = make_loader(split, evaluation_transform(), "cpu", Config(batch_size=100))
    stats = main.test(model, CPU, loader, precision="fp32")
    assert (
        f"test loss {stats.loss:.4f}, accuracy {stats.accuracy:.2%} of 1,000 images, in fp32" in printed
    )
    assert card["classes"] == list(cifar10.CLASSES)


def test_predict_writes_every_probability_into_a_csv_file(finished, tmp_path, sample):
    for k in range(2):
        Image.fromarray(sample.images[k]).save(tmp_path / f"{k}.png")
    files = [str(tmp_path / f"{k}.png") for k in range(2)]
    assert main.main(["predict", str(finished), *files, "--csv", str(tmp_path / "p.csv")]) == 0
    with (tmp_path / "p.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["file"] for row in rows] == files and len(rows[0]) == 13
    for row in rows:
        numbers = {name: float(row[name]) for name in cifar10.CLASSES}
        assert sum(numbers.values()) == pytest.approx(1, abs=1e-4)
        assert numbers[row["predicted"]] == max(numbers.values()) == float(row["probability"])
    assert main.main(["predict", str(finished), *files, "--csv", str(tmp_path / "no" / "p.csv")]) == 2


def test_every_answer_to_a_test_image_is_in_the_folder_of_a_run(finished):
    with (finished / "predictions.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    with (finished / "mistakes.csv").open() as lines:
        mistakes = list(csv.DictReader(lines))
    assert [int(row["image"]) for row in rows] == list(range(len(rows)))
    wrong = sum(row["label"] != row["predicted"] for row in rows)
    last = utils.History.load(finished).epochs[-1]
    assert wrong == len(mistakes) == round((1 - last.test_accuracy) * len(rows))


def test_predict_names_the_most_probable_classes(finished, tmp_path, sample, capsys):
    from weights_file import load_weights

    paths = [str(tmp_path / f"{k}.png") for k in range(2)]
    for path, image in zip(paths, sample.images, strict=False):
        Image.fromarray(image).save(path)
    assert main.main(["predict", str(finished), *paths, "--top", "2", "--precision", "fp32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    model, card = load_weights(finished)
    with torch.no_grad():
        first = model.eval()(normalize(sample.images[:1])).softmax(1)[0]
    best = [f"{card['classes'][k]} {first[k]:.1%}" for k in first.argsort(descending=True)[:2]]
    assert lines[0] == f"{paths[0]}: {', '.join(best)}" and len(lines) == 2


@pytest.mark.slow
def test_find_lr_writes_its_figure_and_suggestions(tmp_path, capsys):
    flags = "--dataset cifar10-sample --width 4 --batch-size 64 --precision fp32".split()
    assert main.main(["find-lr", *flags, "--output", str(tmp_path / "f")]) == 0
    assert {path.name for path in (tmp_path / "f").iterdir()} >= {"lr_finder.json", "lr_finder.png"}
    assert re.search(r"range test, \d+ steps: start \S+, steepest", capsys.readouterr().out)


@pytest.mark.slow
def test_a_found_rate_is_the_peak_of_the_run_and_start_its_first(tmp_path, monkeypatch):
    found = lr_finder.LRFinderResult(
        [1e-4, 1e-3],
        [2.0, 1.0],
        {"start": 5e-4, "valley": 0.002, "minimum": 0.02, "steepest": 1.0, "minimum_over_ten": 1.0},
    )
    monkeypatch.setattr("run.find_lr", lambda *args, **options: found)
    flags = [flag for flag in SMOKE if flag not in ("--lr", "0.01")]
    assert main.main([*flags, "--lr-rule", "minimum", "--output", str(tmp_path / "r")]) == 0
    history = utils.History.load(tmp_path / "r")
    assert history.lrs[0] == pytest.approx(5e-4) and max(history.lrs) <= 0.02
    assert "LRMIN 5.000e-04 to LRMAX" in (tmp_path / "r/report.md").read_text()


def test_a_constant_rate_needs_no_schedule(tmp_path, monkeypatch):
    monkeypatch.setattr("run.report_run", lambda *arguments: None)
    assert main.main([*SMOKE, "--scheduler", "none", "--output", str(tmp_path / "r")]) == 0
    assert utils.History.load(tmp_path / "r").lrs == [0.01] * 6


@pytest.mark.parametrize(
    "model, seconds, expected",
    [
        # 3 steps an epoch, 2 epochs; 2 batches are evaluated after each and for the report, at a third
        (
            "custom_resnet",
            450.0,
            "about 60.0 minutes, by three steps on this machine; --recipe quick takes",
        ),
        ("resnet18", 450.0, "about 60.0 minutes, by three steps on this machine\n"),
        ("custom_resnet", 2.0, "about 16 seconds, by three steps on this machine\n"),
    ],
)
def test_a_run_says_how_long_it_will_take(model, seconds, expected, monkeypatch, capsys):
    config = Config(
        model=model,
        lr=0.1,
        dataset="cifar10-sample",
        epochs=2,
        batch_size=64,
        max_train_batches=3,
        max_test_batches=2,
    )
    monkeypatch.setattr(run, "step_seconds", lambda *_: seconds)
    run.print_estimate(config, CPU, data.make_loaders(config), nn.Identity())
    assert expected in capsys.readouterr().out


def test_timing_a_network_moves_nothing_in_it():
    model, _ = build()
    before, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert progress.step_seconds(model, torch.zeros(4, 3, 32, 32), "fp32") > 0
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
def test_a_report_can_be_written_again(finished, capsys):
    before = (finished / "report.md").read_text()
    (finished / "report.md").unlink()
    assert main.main(["report", str(finished)]) == 0
    assert (finished / "report.md").read_text() == before


@pytest.mark.parametrize("name", ["config.json", "environment.json", "history.json"])
@pytest.mark.parametrize("content", ["", "[]", '{"model": 3}'])
def test_a_run_folder_with_a_damaged_file_is_refused_by_name(finished, tmp_path, name, content, capsys):
    shutil.copytree(finished, tmp_path / "r")
    (tmp_path / "r" / name).write_text(content)
    assert main.main(["report", str(tmp_path / "r")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert f"{name} is not what a run writes" in printed


def test_a_run_that_diverges_exits_with_1_and_keeps_what_it_had(tmp_path, capsys):
    flags = [
        *SMOKE,
        "--optimizer",
        "sgd",
        "--epochs",
        "5",
        "--scheduler",
        "none",
        "--output",
        str(tmp_path / "r"),
    ]
    assert main.main([*flags, "--lr", "1e30"]) == 1
    printed = capsys.readouterr()
    assert re.fullmatch(r"main.py: the loss is not finite at epoch 1, step 2, .*\n", printed.err)


BAD = [
    (["--model", "vgg"], "unknown model"),
    (["fly"], "unknown command 'fly'; choose from train, test, predict, find-lr, report, compare, "),
    (["tets"], "; did you mean test?"),
    (["test", "RUN", "--presicion", "fp32"], "--presicion fp32; did you mean --precision?"),
    (["--recipe", "fast"], "unknown recipe"),
    (["--dataset", "mnist"], "unknown dataset"),
    (["--lr", "-1"], "lr must be positive"),
    (["--epochs", "0"], "epochs must be at least 1"),
    ([*SMOKE, "--batch-size", "5000"], "batch_size must be at most"),
    ([*SMOKE, "--device", "tpu"], "there is no device 'tpu'"),
    (["--dataset", "folder", "--data", "nowhere"], "there is no folder nowhere"),
    (["test", "nowhere"], "there is no weights file nowhere"),
    (["predict", "--weights", "nowhere", "image.png"], "there is no weights file nowhere"),
    (["predict", "nowhere", "image.png"], "nowhere is no readable image"),
    (["predict", "RUN"], "which images?"),
    (["predict", "RUN", "README.md"], "README.md is no readable image"),
    (["predict", "RUN", "absent.png"], "absent.png is no readable image (No such file"),
    (["test", "tests"], "tests has no weights.safetensors: it is no run, or one without a whole epoch"),
    (["test", "README.md"], "README.md is no weights file of this package"),
    (["report", "nowhere"], "there is no weights file nowhere"),
    ([*SMOKE, "--output", "RUN"], "is there already; --resume it, or choose another"),
    ([*SMOKE, "--output", "README.md"], "README.md is not a folder"),
    ([*SMOKE, "--output", "README.md", "--resume"], "README.md is not a folder"),
    ([*SMOKE, "--output", "README.md/r"], "main.py: README.md/r: Not a directory"),
    ([*SMOKE, "--mirror", "README.md"], "README.md is not a folder"),
    (["--data", "README.md"], "main.py: README.md/cifar-10-batches-bin"),
    (["report"], "required: run"),
]


@pytest.mark.parametrize(("argv", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(argv, message, finished, capsys, monkeypatch):
    argv = [str(finished) if word == "RUN" else word for word in argv]
    try:
        code = main.main(argv)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2 and message in printed.err
    assert printed.err.count("\n") == 1 and printed.err.startswith("main.py")


def test_weights_without_a_run_of_this_version_are_refused_in_one_line(finished, tmp_path, capsys):
    from weights_file import load_weights, save_weights

    model, card = load_weights(finished)
    for config in ({"gone": 1}, None):
        other = {name: value for name, value in card.items() if name != "config"}
        save_weights(tmp_path / "w.safetensors", model, other | ({"config": config} if config else {}))
        assert main.main(["test", str(tmp_path / "w.safetensors")]) == 2
        printed = capsys.readouterr().err
        assert "has no configuration of this version" in printed
        assert printed.count("\n") == 1


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {run.claim_folder(Config()) for _ in range(3)}
    assert len(folders) == 3 and all(folder.is_dir() for folder in folders)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder of 240 images of three classes, of many sizes, formats and modes."""
    root = tmp_path_factory.mktemp("mine")
    kinds = itertools.cycle(["RGB jpg", "L png", "P gif", "CMYK jpeg", "RGBA webp", "RGB bmp", "1 png"])
    split = sources.load_split("cifar10-sample", "test")
    for label, name in enumerate(("ant", "bumble bee", "cow")):
        (root / name).mkdir()
        for k, index in enumerate(np.flatnonzero(split.labels == label)[:80]):
            mode, suffix = next(kinds).split()
            image = Image.fromarray(split.images[index]).resize((20 + k, 150 - k)).convert(mode)
            image.save(root / name / f"{k}.{suffix}")
    return root


@pytest.fixture(scope="module")
def trained_on_mine(mine, tmp_path_factory):
    """The folder of a run on them at 64 pixels, with range test and validation set."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    flags = "--dataset folder --image-size 64 --width 4 --batch-size 16 --epochs 1 --val-split 0.1"
    argv = [*flags.split(), "--precision", "fp32", "--data", str(mine), "--output", str(folder)]
    assert main.main(argv) == 0
    return folder


@pytest.mark.slow
def test_a_folder_of_images_of_any_kind_trains_and_reports(mine, trained_on_mine):
    text = (trained_on_mine / "report.md").read_text(encoding="utf-8")
    assert "172 train + 20 validation + 48 test images of 3 classes, 64 x 64 px" in text
    figures = {path.stem for path in (trained_on_mine / "figures").iterdir()}
    assert {"lr_finder", "misclassified", "gradcam_layer2", "gradcam_layer3"} <= figures  # 16, 8 px
    config = Config(dataset="folder", data=str(mine), image_size=64, val_split=0.1, batch_size=32)
    mean, std = statistics(data.make_loaders(config).train.dataset.split.images)
    for values in (mean, std):
        assert ", ".join(f"{value:.3f}" for value in values) in text


@pytest.mark.slow
def test_a_run_on_a_folder_is_tested_used_and_reported_again(mine, trained_on_mine, tmp_path, capsys):
    run = shutil.copytree(trained_on_mine, tmp_path / "r")
    before = (run / "report.md").read_text(encoding="utf-8")
    (run / "report.md").unlink()
    assert main.main(["report", str(run), "--precision", "fp32"]) == 0
    assert (run / "report.md").read_text(encoding="utf-8") == before
    accuracy = re.search(r"\*\*([\d.]+%)\*\*", before)[1]
    assert main.main(["test", str(run)]) == 0
    assert f"accuracy {accuracy} of 48 images" in capsys.readouterr().out
    assert main.main(["predict", str(run), str(mine / "ant/0.jpg"), "--top", "1"]) == 0
    assert re.search(r"0.jpg: (ant|bumble bee|cow) [\d.]+%\n$", capsys.readouterr().out)


@pytest.mark.slow
def test_a_run_is_not_reported_on_other_images(mine, trained_on_mine, tmp_path, capsys):
    other = shutil.copytree(mine, tmp_path / "other")
    shutil.copy(other / "ant/0.jpg", other / "ant/copy.jpg")
    before = (trained_on_mine / "report.md").read_bytes()
    assert main.main(["report", str(trained_on_mine), "--data", str(other)]) == 2
    assert f"the training images in {other} are not those of the run" in capsys.readouterr().err
    assert (trained_on_mine / "report.md").read_bytes() == before


@pytest.mark.slow
def test_a_run_is_not_reported_on_other_test_images(mine, trained_on_mine, tmp_path, capsys):
    def digests(folder):
        parts = ("train", "test")
        return [sources.load_split("folder", part, folder, image_size=64).digest() for part in parts]

    other = shutil.copytree(mine, tmp_path / "other")
    before = digests(mine)
    for path in other.glob("*/*.jpg"):
        Image.open(path).rotate(180).save(path)
        if digests(other)[0] == before[0]:
            break  # it is a test image
        shutil.copy(mine / path.relative_to(other), path)
    assert digests(other)[1] != before[1]
    assert main.main(["report", str(trained_on_mine), "--data", str(other)]) == 2
    assert f"the test images in {other} are not those of the run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_not_tested_on_what_a_changed_folder_lends_it_of_its_training(
    mine, trained_on_mine, tmp_path, capsys
):
    added = mine / "ant/copy.jpg"
    shutil.copy(mine / "ant/0.jpg", added)
    try:
        assert main.main(["test", str(trained_on_mine)]) == 2
        message = f"the test images in {mine} are not those of the run"
        assert message in capsys.readouterr().err
        assert main.main(["test", str(trained_on_mine), "--data", str(mine)]) == 0  # on one's own head
    finally:
        added.unlink()
    assert main.main(["test", str(trained_on_mine)]) == 0


@pytest.mark.slow
def test_a_run_with_worker_processes_reports_too(tmp_path):
    assert main.main([*SMOKE, "--workers", "1", "--output", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r/figures/samples.png").is_file()


def test_deterministic_kernels_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    run.prepare(parse_config([*SMOKE, "--deterministic", "--output", str(tmp_path / "r")]))
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_run_reports_and_augments_as_the_cpu_does(tmp_path, sample):
    assert main.main([*SMOKE[:-2], "--output", str(tmp_path / "r")]) == 0
    config = Config(batch_size=32)
    batches = [make_loader(sample, train_transform(), d, config, shuffle=True) for d in ("cpu", "cuda")]
    (ours, _), (theirs, _) = (next(iter(loader)) for loader in batches)
    torch.testing.assert_close(ours, theirs.cpu(), rtol=0, atol=2e-6)


def test_a_refused_run_leaves_no_folder(tmp_path):
    assert main.main([*SMOKE, "--batch-size", "5000", "--output", str(tmp_path / "r")]) == 2
    assert not (tmp_path / "r").exists()


def test_a_small_dataset_of_ones_own_is_told_which_batch_fits(sample, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sources.DATASETS, "svhn", lambda split, *_: sample)  # 200 images, by code
    assert main.main(["--dataset", "svhn", "--output", str(tmp_path / "r")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "the number of training images, 200, not 512; --batch-size 16 fits" in printed


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 4},
        {"image_size": "32"},
        {"image_size": 10**6},
        {"mean": None},
        {"mean": [0.5]},
        {"mean": [1e9, 0.5, 0.5]},
        {"std": [0.2, 0.2, 0]},
        {"std": [0.2, 0.2, 1e-9]},
        {"std": [0.2, 0.2, math.inf]},
        {"classes": {"a": 0}},
        {"config": None},
    ],
    ids=str,
)
def test_a_card_that_nothing_could_be_judged_by_is_refused(finished, tmp_path, capsys, wrong):
    model, card = load_weights(finished)
    with pytest.raises(ValueError, match="the card cannot go with weights"):
        save_weights(tmp_path / "w.safetensors", model, card | wrong)
    tensors, card = model.state_dict(), card | wrong
    metadata = {"card": json.dumps(card | {"sha256": digest(tensors, card)})}
    save_file(tensors, tmp_path / "w.safetensors", metadata=metadata)
    assert main.main(["test", str(tmp_path / "w.safetensors")]) == 2
    printed = capsys.readouterr().err
    assert "is no weights file of this package" in printed and printed.count("\n") == 1


def test_weights_of_another_shape_are_refused(finished, tmp_path):
    _, card = load_weights(finished)
    wide = models.make_model("custom_resnet", width=8).state_dict()
    metadata = {"card": json.dumps(card | {"sha256": digest(wide, card)})}
    save_file(wide, tmp_path / "w.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="no weights file of this package .*size mismatch"):
        load_weights(tmp_path / "w.safetensors")
