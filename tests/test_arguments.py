"""What people give to the loops: criteria, in any place, and arguments in any order."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import main
from checkpoint import Checkpoints
from training.optim import one_cycle

CPU = torch.device("cpu")
EXACT = {"precision": "fp32"}


@pytest.fixture
def batches(sample):
    """Three batches of real images, in no order."""
    order = np.random.default_rng(0).permutation(len(sample.labels))[:96].reshape(3, 32)
    images = torch.from_numpy(sample.images).permute(0, 3, 1, 2).float() / 255
    return [(images[index], torch.from_numpy(sample.labels[index])) for index in order]


def network(*more, classes=10):
    torch.manual_seed(0)
    head = nn.Linear(4, classes)
    conv = nn.Conv2d(3, 4, 3, stride=4)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head, *more)


def trained(batches, call, model=None):
    """The weights after a call of `train` or `fit_model`, which gets model, optimizer and scheduler."""
    model = model or network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = one_cycle(optimizer, 0.1, epochs=1, steps_per_epoch=len(batches))
    result = call(model, optimizer, scheduler)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), result


def by_hand(batches, criterion, model=None):
    """The same in a plain loop."""

    def loop(model, optimizer, scheduler):
        total = 0.0
        model.to(memory_format=torch.channels_last)
        for images, labels in batches:
            optimizer.zero_grad()
            loss = criterion(model(images.to(memory_format=torch.channels_last)), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item() / len(batches)
        return total

    return trained(batches, loop, model)


WEIGHT = torch.linspace(0.5, 2.0, 10)
CRITERIA = {
    "CrossEntropyLoss": nn.CrossEntropyLoss,
    "label smoothing": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "class weights": lambda: nn.CrossEntropyLoss(weight=WEIGHT),
    "both": lambda: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2),
    "F.cross_entropy": lambda: F.cross_entropy,
    "MultiMarginLoss": nn.MultiMarginLoss,
    "a function": lambda: lambda logits, labels: F.cross_entropy(logits / 2, labels),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_trains_as_in_a_plain_loop_to_the_bit_and_its_loss_is_told(name, batches):
    criterion = CRITERIA[name]()
    expected, loss = by_hand(batches, criterion)
    weights, stats = trained(
        batches, lambda m, o, s: main.train(m, CPU, batches, o, s, criterion, **EXACT)
    )
    assert torch.equal(weights, expected)
    assert stats.loss == pytest.approx(loss, rel=1e-5)


def test_a_sum_is_trained_on_as_a_sum_and_told_as_a_mean(batches):
    def small(model):
        return torch.optim.SGD(model.parameters(), lr=0.001)

    criterion, model, same = nn.CrossEntropyLoss(reduction="sum"), network(), network()
    summed = main.train(model, CPU, batches, small(model), criterion, **EXACT)
    faster = torch.optim.SGD(same.parameters(), lr=0.001 * 32)
    mean = main.train(same, CPU, batches, faster, nn.CrossEntropyLoss(), **EXACT)
    assert summed == pytest.approx(mean, rel=1e-4)
    losses = [main.test(model, CPU, batches, given, **EXACT).loss for given in (criterion, None)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_nll_loss_is_used_where_the_model_ends_in_log_softmax_and_refused_where_not(batches):
    ends_in_it, criterion = network(nn.LogSoftmax(1)), nn.NLLLoss()
    expected, _ = by_hand(batches, criterion, network(nn.LogSoftmax(1)))
    call = lambda m, o, s: main.train(m, CPU, batches, o, criterion, s, **EXACT)  # noqa: E731
    assert torch.equal(trained(batches, call, ends_in_it)[0], expected)
    with pytest.raises(ValueError, match=r"this model returns logits: give nn.CrossEntropyLoss\(\)"):
        trained(batches, call)


ORDERS = {
    "after the scheduler": lambda m, o, s, c, b: main.train(m, CPU, b, o, s, c, **EXACT),
    "before the scheduler": lambda m, o, s, c, b: main.train(m, "cpu", b, o, c, s, **EXACT),
    "before the optimizer": lambda m, o, s, c, b: main.train(m, CPU, b, c, o, s, **EXACT),
    "the device last": lambda m, o, s, c, b: main.train(m, b, o, c, s, CPU, **EXACT),
    "no device": lambda m, o, s, c, b: main.train(m, b, o, c, s, **EXACT),
    "keywords": lambda m, o, s, c, b: main.train(
        model=m, device=CPU, train_loader=b, optimizer=o, criterion=c, scheduler=s, **EXACT
    ),
    "other keywords": lambda m, o, s, c, b: main.train(m, CPU, b, o, loss_fn=c, lr_scheduler=s, **EXACT),
    "with an epoch": lambda m, o, s, c, b: main.train(m, CPU, b, o, c, s, 3, **EXACT),
    "fit_model": lambda m, o, s, c, b: main.fit_model(m, CPU, b, b, o, c, s, NUM_EPOCHS=1, **EXACT),
    "fit_model, epochs second": lambda m, o, s, c, b: main.fit_model(m, 1, CPU, b, b, o, s, c, **EXACT),
    "fit_model, loaders first": lambda m, o, s, c, b: main.fit_model(m, b, b, CPU, o, s, c, 1, **EXACT),
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_kinds_of_arguments_tell_them_apart_in_any_order(order, batches):
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    expected, _ = by_hand(batches, criterion)
    weights, _ = trained(batches, lambda m, o, s: ORDERS[order](m, o, s, criterion, batches))
    assert torch.equal(weights, expected)


def test_of_two_loaders_the_first_is_trained_on_wherever_they_stand(batches):
    seen = []

    class Told(list):
        def __init__(self, name, batches):
            super().__init__(batches)
            self.name = name

        def __iter__(self):
            seen.append(self.name)
            return super().__iter__()

    train, test = Told("train", batches[:2]), Told("test", batches[2:])
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = main.fit_model(model, train, test, CPU, optimizer, epochs=1, **EXACT)
    assert seen[-2:] == ["train", "test"] and len(history.lrs) == 2


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_test_and_predict_take_their_three_in_any_order_and_without_a_device(order, batches):
    model = network()
    given = [(model, CPU, batches)[k] for k in order]
    expected = main.test(model, CPU, batches, **EXACT)
    assert (
        main.test(*given, nn.CrossEntropyLoss(), **EXACT)
        == expected
        == main.test(model, batches, **EXACT)
    )
    assert main.predict(*given, **EXACT).accuracy == expected.accuracy
    assert main.predict(model, batches, **EXACT).accuracy == expected.accuracy


def test_the_range_test_takes_a_criterion_and_the_usual_names(batches):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    options = {"start_lr": 1e-4, "end_lr": 1.0, **EXACT}
    found = main.find_lr(model, optimizer, smooth, CPU, batches, num_iter=30, **options)
    same = main.find_lr(model, CPU, batches, optimizer, label_smoothing=0.1, steps=30, **options)
    assert found == same and len(found.lrs) == 30


class Two(nn.Module):
    def forward(self, logits, labels):
        return logits.sum(), labels


REFUSED = {
    "one number an image": (lambda: nn.CrossEntropyLoss(reduction="none"), "must return one number"),
    "two answers": (Two, "Two must return one number.*not tuple"),
    "a class": (lambda: nn.CrossEntropyLoss, r"give an object of it, CrossEntropyLoss\(\)"),
    "MSELoss": (nn.MSELoss, "MSELoss does not take logits and labels"),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, "BCEWithLogitsLoss does not take logits and labels"),
    "weights of other classes": (
        lambda: nn.CrossEntropyLoss(weight=torch.ones(3)),
        "must have one number a class, 10, not 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_criterion_that_cannot_be_used_is_refused_in_one_line_before_an_update(name, batches):
    made, message = REFUSED[name]
    model, before = network(), network().state_dict()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (
        lambda c: main.train(model, CPU, batches, optimizer, c, **EXACT),
        lambda c: main.fit_model(model, CPU, batches, batches, optimizer, c, epochs=1, **EXACT),
        lambda c: main.find_lr(model, CPU, batches, optimizer, c, **EXACT),
        lambda c: main.test(model, CPU, batches, c, **EXACT),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call(made())
        assert "\n" not in str(caught.value)
    assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, o, b: main.train(m, CPU, b, o, o), ValueError, "more than it takes as optimizer"),
        (lambda m, o, b: main.fit_model(m, CPU, b, b, o, epoch=3), TypeError, "did you mean epochs"),
        (lambda m, o, b: main.train(m, CPU, b, o, momentum=3), TypeError, "has no argument 'momentum'"),
        (
            lambda m, o, b: main.train(m, CPU, b, o, nn.CrossEntropyLoss(), label_smoothing=0.1),
            ValueError,
            "has its own label smoothing",
        ),
    ],
)
def test_a_call_that_has_no_plain_meaning_is_refused_in_one_line(call, error, message, batches):
    model = network()
    with pytest.raises(error, match=message) as caught:
        call(model, torch.optim.SGD(model.parameters(), lr=0.1), batches)
    assert "\n" not in str(caught.value)


def test_a_run_is_continued_with_its_own_criterion_alone(batches, tmp_path):
    def fit(resume, epochs=1, **given):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept = Checkpoints(tmp_path, resume=resume)
        return main.fit_model(
            model, CPU, batches, batches, optimizer, epochs=epochs, checkpoints=kept, **given
        )

    fit(False, criterion=nn.CrossEntropyLoss(weight=WEIGHT))
    assert len(fit(True, criterion=nn.CrossEntropyLoss(weight=WEIGHT)).epochs) == 1
    for other in (nn.CrossEntropyLoss(weight=WEIGHT + 1), nn.CrossEntropyLoss(), None):
        with pytest.raises(ValueError, match="criterion"):
            fit(True, criterion=other)


def test_evaluation_uses_the_criterion_of_the_call(batches):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    smooth = nn.CrossEntropyLoss(label_smoothing=0.3)
    history = main.fit_model(model, CPU, batches, batches, optimizer, smooth, epochs=1, **EXACT)
    told = history.epochs[-1].test_loss
    assert told == main.test(model, CPU, batches, smooth, **EXACT).loss
    assert told != main.test(model, CPU, batches, **EXACT).loss


def test_a_model_of_more_classes_than_the_data_has_is_warned_about(sample, capsys):
    from config import Config
    from data import make_loader
    from transforms import test_transform

    loader = make_loader(sample, test_transform(), CPU, Config(batch_size=50), shuffle=True)
    model = network(classes=64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    main.fit_model(model, CPU, loader, loader, optimizer, epochs=1, **EXACT)
    assert "tells 64 classes apart, and the data has 10; num_classes=10" in capsys.readouterr().out
