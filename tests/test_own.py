"""Users' own models, loaders and schedulers train as in a plain loop, to the bit, or are refused.

The cases are the rows of docs/own_objects.md; `python -m tests.test_own` writes the page anew.
"""

import copy
import inspect
import itertools
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import main
from checkpoint import Checkpoints
from reporting import gradcam
from training import guards
from transforms import denormalize

CPU = torch.device("cpu")
PAGE = Path(main.__file__).parent / "docs" / "own_objects.md"
COUNT, SIZE, EPOCHS = 40, 16, 2
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")


def images_and_labels(count=COUNT):
    """A few random images (N, 3, 16, 16) of four classes, the same every time."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 4
    return torch.randn(count, 3, SIZE, SIZE, generator=generator) + labels[
        :, None, None, None
    ] / 4, labels


class Normalized(NamedTuple):
    """What `predict` looks for in a dataset's transform."""

    mean: tuple
    std: tuple


def dataset():
    return TensorDataset(*images_and_labels())


# Models


def conv(*more):
    """A convolution, a norm and a head, around `more`."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *more, nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


class Own(nn.Module):
    """A network whose forward pass is a function of it and the images."""

    def __init__(self, forward: Callable, **parts):
        super().__init__()
        self.body, self.function = conv(), forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, images):
        return self.function(self, images)


def tied():
    first = nn.Conv2d(8, 8, 3, padding=1)
    second = nn.Conv2d(8, 8, 3, padding=1)
    second.weight = first.weight
    return conv(first, nn.ReLU(), second)


def complex_weights():
    def forward(own, images):
        spectrum = torch.fft.rfft2(images) * own.filter
        return own.body(torch.fft.irfft2(spectrum, s=images.shape[-2:]))

    weight = torch.complex(torch.ones(3, SIZE, SIZE // 2 + 1), torch.zeros(3, SIZE, SIZE // 2 + 1))
    return Own(forward, filter=nn.Parameter(weight))


def frozen_norm():
    model = conv().train()
    model[1].eval().requires_grad_(False)
    return model


def keeps_features():
    def forward(own, images):
        own.features = own.body[:3](images)
        return own.body[3:](own.features)

    return Own(forward)


def old_weight_norm():
    return conv(nn.utils.weight_norm(nn.Conv2d(8, 8, 3, padding=1)))


def used(model):
    """The model after a forward pass, as a notebook leaves it."""
    model(images_and_labels()[0][:2])
    return model


def small_transformer():
    def forward(own, images):
        tokens = own.patches(images).flatten(2).transpose(1, 2)
        return own.head(own.encoder(tokens).mean(1))

    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    return Own(
        forward,
        patches=nn.Conv2d(3, 16, 4, 4),
        encoder=nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        head=nn.Linear(16, 4),
    )


def frozen_backbone():
    model = conv()
    model[:-1].requires_grad_(False)
    return model


def two_inputs():
    return Own(lambda own, images, masks: own.body(images * masks))


WORKS = "works"
MODELS = {
    "convolutions alone, no linear layer": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        WORKS,
    ),
    "one linear layer, no norm": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 4)), WORKS),
    "tied weights": (tied, WORKS),
    "complex weights": (complex_weights, WORKS),
    "a norm that is frozen in evaluation mode": (frozen_norm, WORKS),
    "a backbone without gradients": (frozen_backbone, WORKS),
    "group norm": (lambda: conv(nn.GroupNorm(2, 8)), WORKS),
    "instance norm with running statistics": (
        lambda: conv(nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU()),
        WORKS,
    ),
    "spectral norm": (lambda: conv(nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))), WORKS),
    "old weight norm, used before": (lambda: used(old_weight_norm()), WORKS),
    "keeps its features as an attribute, used before": (lambda: used(keeps_features()), WORKS),
    "ends in squeeze()": (lambda: Own(lambda own, images: own.body(images).squeeze()), WORKS),
    "a small transformer": (small_transformer, WORKS),
    "recomputes activations (checkpointing)": (
        lambda: Own(
            lambda own, images: own.body[3:](
                torch.utils.checkpoint.checkpoint(own.body[:3], images, use_reentrant=False)
            )
        ),
        WORKS,
    ),
    "torch.compile": (lambda: torch.compile(conv(), backend="eager"), WORKS),
    "DataParallel": (lambda: nn.DataParallel(conv()), WORKS),
    "returns a dict": (
        lambda: Own(lambda own, images: {"logits": own.body(images)}),
        r"must return logits \(N, K\), not a dict",
    ),
    "returns a tuple": (
        lambda: Own(lambda own, images: (own.body(images), images)),
        r"must return logits \(N, K\), not a tuple",
    ),
    "returns a map for each image": (
        lambda: conv()[:3],
        r"must return logits \(N, K\), not torch.float32",
    ),
    "needs a second input": (two_inputs, "does not take a batch of images"),
    "is made for other images": (lambda: nn.Conv2d(1, 4, 3), "does not take a batch of images"),
    "float64": (lambda: conv().double(), "does not take a batch of images"),
    "is no nn.Module": (lambda: torch.sum, "must be an nn.Module"),
}

# Loaders


class Stream(IterableDataset):
    """Images one after another, without a length."""

    def __iter__(self):
        return iter(zip(*images_and_labels(), strict=True))


def batches(change=lambda images, labels: (images, labels)):
    return [change(*batch) for batch in DataLoader(dataset(), 8, generator=torch.Generator())]


def spoiled(labels):
    labels = labels.clone()
    labels[0] = -100
    return labels


LOADERS = {
    "a list of batches": (batches, WORKS),
    "DataLoader, shuffled": (lambda: DataLoader(dataset(), 8, shuffle=True), WORKS),
    "DataLoader with a generator": (
        lambda: DataLoader(dataset(), 8, shuffle=True, generator=torch.Generator().manual_seed(3)),
        WORKS,
    ),
    "DataLoader with a sampler of its own generator": (
        lambda: DataLoader(
            dataset(), 8, sampler=RandomSampler(dataset(), generator=torch.Generator().manual_seed(3))
        ),
        WORKS,
    ),
    "DataLoader with a batch sampler": (
        lambda: DataLoader(dataset(), batch_sampler=BatchSampler(RandomSampler(dataset()), 8, True)),
        WORKS,
    ),
    "weighted sampling": (
        lambda: DataLoader(dataset(), 8, sampler=WeightedRandomSampler(torch.ones(COUNT), COUNT)),
        WORKS,
    ),
    "two worker processes": (lambda: DataLoader(dataset(), 8, shuffle=True, num_workers=2), WORKS),
    "a part of a dataset, the last batch dropped": (
        lambda: DataLoader(Subset(dataset(), range(37)), 8, drop_last=True),
        WORKS,
    ),
    "batches of several sizes": (lambda: DataLoader(Subset(dataset(), range(34)), 8), WORKS),
    "an IterableDataset, without a length": (lambda: DataLoader(Stream(), 8), WORKS),
    "images in half precision": (lambda: batches(lambda x, y: (x.half().float(), y)), WORKS),
    "a dataset": (dataset, "is a dataset .* give DataLoader"),
    "an iterator": (lambda: iter(batches()), "ends after one pass"),
    "None": (lambda: None, "must yield"),
    "no batch": (list, "has no batch"),
    "fewer images than a batch": (lambda: DataLoader(dataset(), 64, drop_last=True), "has no batch"),
    "triples": (lambda: batches(lambda x, y: (x, y, y)), r"must be a pair .* not a tuple of 3"),
    "dicts": (lambda: batches(lambda x, y: {"x": x, "y": y}), "must be a pair .* not a dict"),
    "NumPy arrays": (lambda: batches(lambda x, y: (x.numpy(), y.numpy())), "must be two tensors"),
    "float64 images": (
        lambda: batches(lambda x, y: (x.double(), y)),
        "must be float32 .* not torch.float64",
    ),
    "images as bytes": (
        lambda: batches(lambda x, y: (x.byte(), y)),
        "must be float32 .* not torch.uint8",
    ),
    "int32 labels": (lambda: batches(lambda x, y: (x, y.int())), "and int64"),
    "one-hot labels": (lambda: batches(lambda x, y: (x, F.one_hot(y, 4))), "one label an image"),
    "labels from 1": (lambda: batches(lambda x, y: (x, y + 1)), "labels must be 0 to 3, not 1 to 4"),
    "a label of -100": (
        lambda: batches(lambda x, y: (x, spoiled(y))),
        "labels must be 0 to 3, not -100",
    ),
}

# Schedulers

TOTAL = EPOCHS * COUNT // 8
SCHEDULERS = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 6]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=TOTAL + 1),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, TOTAL, 2.0),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 4),
}
REFUSED_SCHEDULERS = {
    "ReduceLROnPlateau": (lr_scheduler.ReduceLROnPlateau, "waits for a validation loss"),
    "OneCycleLR of too few steps": (
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=TOTAL // 2),
        f"steps left and the training {TOTAL}",
    ),
    "one of another optimizer": (
        lambda o: lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), 4),
        "is another optimizer's",
    ),
    "a file name": (lambda o: Path("schedule"), r"has no step\(\)"),
}


def cases(table, works):
    """The names of those that work, or of those that are refused."""
    return [name for name, (_, verdict) in table.items() if (verdict is WORKS) is works]


def make(name, seed=0):
    """A model of the table and its optimizer, the same every time."""
    torch.manual_seed(seed)
    model = MODELS[name][0]()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.SGD(trained, lr=0.05, momentum=0.9)


def plain_loop(model, loader, optimizer, scheduler=None, epochs=EPOCHS):
    """Ten lines that everybody knows."""
    model.to(memory_format=torch.channels_last)
    for _ in range(epochs):
        if not model.training:
            model.train()
        for images, labels in loader:
            images = images.to(memory_format=torch.channels_last)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()


def state_of(model):
    """Weights and buffers, and the mode of each module."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return weights, [module.training for module in model.modules()]


def assert_same(one, two):
    """The same to the bit."""
    assert one[0].keys() == two[0].keys() and one[1] == two[1]
    for name, tensor in one[0].items():
        assert torch.equal(tensor, two[0][name]), name


def fit(model, loader, optimizer, scheduler=None, **options):
    """The same by `fit_model`."""
    options = {"epochs": EPOCHS, "precision": "fp32"} | options
    return main.fit_model(model, CPU, loader, batches()[:2], optimizer, scheduler, **options)


@pytest.mark.parametrize("name", cases(MODELS, works=True))
def test_an_own_model_trains_as_in_a_plain_loop_to_the_bit(name):
    (one, first), (two, second) = make(name), make(name)
    plain_loop(one, batches(), first)
    fit(two, batches(), second)
    assert_same(state_of(one), state_of(two))


@pytest.mark.parametrize("name", cases(MODELS, works=True))
def test_looking_at_an_own_model_changes_nothing_in_it(name):
    model, optimizer = make(name)
    model.to(memory_format=torch.channels_last)
    before = copy.deepcopy(state_of(model))
    main.find_lr(model, CPU, batches(), optimizer, steps=20, start_lr=1e-4, end_lr=0.1, precision="fp32")
    predictions = main.predict(model, CPU, batches(), precision="fp32")
    assert main.test(model, CPU, batches(), precision="fp32").accuracy == predictions.accuracy
    assert_same(before, state_of(model))


@pytest.mark.parametrize("name", cases(MODELS, works=False))
def test_an_own_model_that_cannot_be_trained_is_refused_before_anything_moves(name):
    made, message = MODELS[name]
    model = made()
    is_module = isinstance(model, nn.Module)
    optimizer = torch.optim.SGD(model.parameters() if is_module else [nn.Parameter(torch.ones(1))], 0.1)
    before = state_of(model) if is_module else None
    for call in (
        lambda: fit(model, batches(), optimizer),
        lambda: main.train(model, CPU, batches(), optimizer, precision="fp32"),
        lambda: main.find_lr(model, CPU, batches(), optimizer, precision="fp32"),
        lambda: main.predict(model, CPU, batches(), precision="fp32"),
        lambda: main.test(model, CPU, batches(), precision="fp32"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        if is_module:
            assert_same(before, state_of(model))


@pytest.mark.parametrize("name", cases(LOADERS, works=True))
def test_an_own_loader_trains_as_in_a_plain_loop_to_the_bit(name):
    results = []
    for loop in (plain_loop, fit):
        loader = LOADERS[name][0]()
        model, optimizer = make("tied weights")
        torch.manual_seed(5)
        loop(model, loader, optimizer)
        results.append(state_of(model))
    assert_same(*results)


def stop_after(model, steps):
    """A SIGTERM that meets the model in one of its training steps."""
    count = itertools.count(1)

    def hook(module, inputs, output):
        if module.training and next(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return model.register_forward_hook(hook)


@pytest.mark.parametrize("name", cases(LOADERS, works=True))
def test_a_run_with_an_own_loader_that_is_stopped_in_mid_epoch_ends_with_the_same_bits(name, tmp_path):
    model, optimizer = make("tied weights")
    torch.manual_seed(5)
    fit(model, LOADERS[name][0](), optimizer)
    whole = state_of(model)
    for resume in (False, True):
        loader = LOADERS[name][0]()
        model, optimizer = make("tied weights")
        torch.manual_seed(6 if resume else 5)  # a new process stands elsewhere
        options = {"checkpoints": Checkpoints(tmp_path, resume=resume)}
        if resume:
            fit(model, loader, optimizer, **options)
        else:
            stop_after(model, 7)
            with pytest.raises(guards.Stopped):
                fit(model, loader, optimizer, **options)
    assert_same(whole, state_of(model))


@pytest.mark.parametrize("name", cases(LOADERS, works=False))
def test_an_own_loader_that_makes_no_sense_is_refused_before_an_update(name):
    made, message = LOADERS[name]
    model, optimizer = make("tied weights")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for call in (
        lambda: fit(model, made(), optimizer),
        lambda: main.train(model, CPU, made(), optimizer, precision="fp32"),
        lambda: main.find_lr(model, CPU, made(), optimizer, precision="fp32"),
        lambda: main.predict(model, CPU, made(), precision="fp32"),
        lambda: main.test(model, CPU, made(), precision="fp32"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_every_scheduler_of_pytorch_is_among_the_cases():
    theirs = {
        name
        for name, kind in inspect.getmembers(lr_scheduler, inspect.isclass)
        if issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert theirs - {"LRScheduler"} <= {*SCHEDULERS, *REFUSED_SCHEDULERS}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_own_scheduler_moves_as_in_a_plain_loop_and_is_resumed_to_the_bit(name, tmp_path):
    model, optimizer = make("tied weights")
    plain_loop(model, batches(), optimizer, SCHEDULERS[name](optimizer))
    expected = state_of(model)
    for stop, resume in ((7, False), (None, True)):
        model, optimizer = make("tied weights")
        if stop:
            stop_after(model, stop)
        scheduler = SCHEDULERS[name](optimizer)
        with pytest.raises(guards.Stopped) if stop else warnings.catch_warnings():
            checkpoints = Checkpoints(tmp_path, resume=resume)
            fit(model, batches(), optimizer, scheduler, checkpoints=checkpoints)
    assert_same(expected, state_of(model))


@pytest.mark.parametrize("name", REFUSED_SCHEDULERS)
def test_an_own_scheduler_that_cannot_carry_the_run_is_refused_before_anything_moves(name, tmp_path):
    made, message = REFUSED_SCHEDULERS[name]
    model, optimizer = make("tied weights")
    before = state_of(model)
    scheduler = made(optimizer)
    with pytest.raises(ValueError, match=message):
        fit(model, batches(), optimizer, scheduler, checkpoints=tmp_path / "r")
    assert_same(before, state_of(model))
    assert not (tmp_path / "r").exists()
    with pytest.raises(ValueError, match=message):  # a first run may say resume, too
        fit(model, batches(), optimizer, scheduler, checkpoints=Checkpoints(tmp_path / "n", resume=True))
    assert_same(before, state_of(model))


def test_the_same_schedule_is_refused_for_a_second_run():
    model, optimizer = make("tied weights")
    scheduler = SCHEDULERS["OneCycleLR"](optimizer)
    fit(model, batches(), optimizer, scheduler)
    with pytest.raises(ValueError, match=f"has 0 steps left and the training {TOTAL}"):
        fit(model, batches(), optimizer, scheduler)


def test_a_schedule_that_counts_epochs_is_warned_about(capsys):
    model, optimizer = make("tied weights")
    fit(model, batches(), optimizer, lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS))
    said = f"is stepped after every batch, {TOTAL} times in all, and its T_max is 2"
    assert capsys.readouterr().out.count(said) == 1


def test_an_optimizer_of_another_model_is_refused():
    model, _ = make("tied weights")
    _, other = make("tied weights")
    with pytest.raises(ValueError, match="moves no trainable parameter of this model"):
        fit(model, batches(), other)


def test_of_a_shuffled_loader_images_labels_and_answers_are_of_one_pass():
    model, _ = make("tied weights")
    images, labels = images_and_labels()
    loader = DataLoader(dataset(), 8, shuffle=True)
    loader.dataset.transform = Normalized((0.0,) * 3, (1.0,) * 3)
    shuffled = main.predict(model, CPU, loader, precision="fp32")
    in_order = main.predict(model, CPU, batches(), precision="fp32")
    pictures = denormalize(images, (0.0,) * 3, (1.0,) * 3)
    place = [int((pictures == one).all((1, 2, 3)).argmax()) for one in shuffled.images]
    assert sorted(place) == list(range(COUNT)) != place
    assert (shuffled.labels == labels.numpy()[place]).all()
    np.testing.assert_allclose(shuffled.probabilities, in_order.probabilities[place], atol=1e-5)


@pytest.mark.parametrize(
    "name", ["tied weights", "complex weights", "keeps its features as an attribute, used before"]
)
def test_an_average_moves_every_weight_and_buffer_once(name):
    model, optimizer = make(name)
    seen = []
    optimizer.register_step_post_hook(
        lambda *_: seen.append({k: v.clone() for k, v in model.state_dict().items()})
    )
    fit(model, batches(), optimizer, epochs=1, ema_decay=0.5)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() or tensor.is_complex():
            average = seen[0][key]
            for later in seen[1:]:
                average = average + (later[key] - average) / 2
            torch.testing.assert_close(tensor, average, msg=key)


def test_after_a_loss_that_is_not_finite_the_network_can_still_be_evaluated():
    model, optimizer = make("tied weights")
    spoiled = batches()
    spoiled[3][0][:] = float("nan")
    with pytest.raises(FloatingPointError, match="step 4"):
        main.train(model, CPU, spoiled, optimizer, precision="fp32")
    assert main.test(model, CPU, batches(), precision="fp32").loss < 10


@pytest.mark.parametrize(
    "name",
    [
        "convolutions alone, no linear layer",
        "tied weights",
        "a norm that is frozen in evaluation mode",
        "old weight norm, used before",
        "keeps its features as an attribute, used before",
        "torch.compile",
        "DataParallel",
    ],
)
def test_gradcam_shows_an_own_model_and_leaves_it_as_it_was(name):
    model, _ = make(name)
    before = copy.deepcopy(state_of(model))
    layer = next(iter(gradcam.map_shapes(model, SIZE)))
    images, labels = images_and_labels(4)
    expected = gradcam.gradcam(model, images, layer, labels)
    with torch.inference_mode():
        inside = gradcam.gradcam(model, images * 1, layer, labels)
    assert expected.shape == (4, SIZE, SIZE) and (expected == inside).all() and expected.any()
    assert_same(before, state_of(model))


def page() -> str:
    """The page in docs/, from the cases above."""
    rows = {"Models": MODELS, "Loaders": LOADERS}
    rows["Schedulers, stepped after every batch"] = {
        **dict.fromkeys(SCHEDULERS, (None, WORKS)),
        **REFUSED_SCHEDULERS,
    }
    lines = [
        "# Your own model, loader and scheduler",
        "",
        "Each of these was given to `fit_model` (models and loaders also to `train`, `find_lr`,",
        "`predict` and `test`). *Works* means: the same weights to the bit as a plain loop of ten lines",
        "in channels-last memory, and, for loaders and schedulers, the same bits after a stop in",
        "mid-epoch and a resume. What is refused is refused in one line before an update. The cases",
        "are in `tests/test_own.py`.",
    ]
    for title, table in rows.items():
        lines += ["", f"## {title}", "", "| what | |", "|---|---|"]
        lines += [
            f"| {name} | {'works' if verdict is WORKS else 'refused'} |"
            for name, (_, verdict) in table.items()
        ]
    return "\n".join(lines) + "\n"


def test_the_page_in_docs_is_made_from_these_cases():
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
