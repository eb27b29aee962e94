"""Every public function on a pretend accelerator: the CPU's bits, no mixed devices, few waits."""

import itertools
import math
import os
import signal

import numpy as np
import pytest
import torch

import main
import report
import run
import utils
from checkpoint import Checkpoints
from config import RECIPES, Config
from data import make_loaders, start_epoch
from files import write_whole
from models import make_model
from tests.rehearsal import device
from tests.rehearsal.device import counted
from training import guards, loops
from training.guards import Stopped
from transforms import BatchProgram
from visualize import gradcam
from weights_file import load_weights

OPTIMIZERS = ("sgd", "adam", "muon")
STEPS = 3  # an epoch
EPOCH_END = ["tolist in guards.py, check_finite", "tolist in utils.py, stats"]
# In half precision: dropout is one kernel on an accelerator, and rounds once less than the CPU's.
NO_DROPOUT = {"name": "custom_resnet", "width": 4}
EVALUATION = ["item in criterion.py, score"] * 2
ANSWERS = "item in guards.py, check_answers"


@pytest.fixture(autouse=True)
def pretences(monkeypatch):
    """Update as on CUDA, without waiting; one number format for Muon's matrices on both devices."""
    monkeypatch.setattr(guards, "SKIPPING", (device.NAME,))
    monkeypatch.setattr(utils, "cpu_capabilities", dict)


def near(x):
    """The same as plain data, with all tensors on the CPU."""
    return torch.utils._pytree.tree_map(lambda t: t.near if isinstance(t, device.Far) else t, x)


def same(one, other):
    """Whether two structures of tensors and plain data are the same to the bit."""
    ones, others = (torch.utils._pytree.tree_leaves(x) for x in (one, other))
    return len(ones) == len(others) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(ones, others, strict=True)
    )


class Trained:
    """A small network, its optimizer and its loaders on one device."""

    def __init__(self, where, optimizer="sgd", steps=STEPS, batch=16, **options):
        torch.manual_seed(0)
        self.where = where
        self.model = make_model(**(options or {"name": "custom_resnet", "width": 4, "dropout": 0.1}))
        self.optimizer = main.make_optimizer(optimizer, self.model, 0.01)
        self.model.to(where)  # after the optimizer was made, as users do
        config = Config(
            dataset="cifar10-sample", batch_size=batch, max_train_batches=steps, max_test_batches=2
        )
        self.loaders = make_loaders(config, where)

    def train(self, *args, **options):
        return main.train(self.model, self.where, self.loaders.train, self.optimizer, *args, **options)

    def fit(self, epochs=2, **options):
        schedule = main.one_cycle(self.optimizer, 0.01, epochs=epochs, steps_per_epoch=STEPS)
        history = main.fit_model(
            self.model, self.where, *self.loaders[::2], self.optimizer, schedule, epochs, **options
        )
        return [row.stats() for row in history.epochs], history.lrs

    def state(self):
        return near((dict(self.model.state_dict()), self.optimizer.state_dict()))


def both(call, *args, **options):
    """What a call gives on the CPU and on the device, each with the state of model and optimizer."""
    outcomes = []
    for where in ("cpu", device.NAME):
        trained = Trained(where, *args, **options)
        outcomes.append((call(trained), trained.state()))
    assert trained.model.linear.weight.device.type == device.NAME
    return outcomes


def test_a_tensor_of_the_cpu_is_refused_but_for_a_number():
    far = torch.ones(2, device=device.NAME)
    assert same(near(far + torch.tensor(1.0)), torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match="meets one on the device rehearsal"):
        far + torch.ones(2)
    with pytest.raises(RuntimeError, match="not supported"):
        far.numpy()


def test_a_parameter_that_moves_to_the_device_stays_its_optimizers_own():
    trained = Trained(device.NAME)
    assert trained.optimizer.param_groups[0]["params"][0] is trained.model.prep[0].weight


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_gives_the_bits_of_the_cpu(optimizer):
    def call(trained):
        return trained.train(main.one_cycle(trained.optimizer, 0.01, epochs=1, steps_per_epoch=STEPS))

    assert same(*both(call, optimizer))


def test_a_residual_network_gives_the_bits_of_the_cpu():
    assert same(*both(lambda trained: trained.train(), steps=1, name="resnet18", width=8))


@pytest.mark.parametrize(
    "precision, optimizer, steps", [("bf16", "muon", 3), ("fp16", "sgd", 1), ("fp16", "adam", 1)]
)
def test_training_in_half_precision_gives_the_bits_of_the_cpu(precision, optimizer, steps):
    options = {"steps": steps, "batch": 8, **NO_DROPOUT}
    assert same(*both(lambda trained: trained.train(precision=precision), optimizer, **options))


def test_fitting_with_an_average_gives_the_rows_and_weights_of_the_cpu():
    assert same(*both(lambda trained: trained.fit(ema_decay=0.9, tta=True), "muon"))


def test_testing_and_predicting_six_views_give_the_bits_of_the_cpu():
    def call(trained):
        answers = main.predict(trained.model, trained.where, trained.loaders.test, tta=True)
        stats = main.test(trained.model, trained.where, trained.loaders.test, tta=True)
        return stats, answers.probabilities.tobytes(), answers.labels.tobytes()

    assert same(*both(call))


def test_gradcam_gives_the_bits_of_the_cpu_and_brings_two_tensors_over():
    def call(trained):
        images = next(iter(trained.loaders.test))[0]
        with counted() as counts:
            maps = gradcam(trained.model, images, "layer2", [3] * len(images))
        assert len(counts.waits) == 2 * (trained.where != "cpu")
        return maps.tobytes()

    assert same(*both(call))


def test_the_range_test_gives_the_bits_of_the_cpu_and_waits_once_a_step():
    def call(trained):
        list(trained.loaders.train)  # what is made once is made
        start_epoch(trained.loaders.train, 1)
        with counted() as counts:
            found = main.find_lr(
                trained.model,
                trained.where,
                trained.loaders.train,
                trained.optimizer,
                steps=20,
                end_lr=1,
            )
        assert counts.waits == ["item in lr_finder.py, find_lr"] * 20 * (trained.where != "cpu")
        return vars(found)

    assert same(*both(call))


PROGRAMS = {
    "every step": BatchProgram(
        (0.5, 0.4, 0.3),
        (0.2, 0.3, 0.4),
        (40, 40),
        crop=(32, 32),
        flip=0.5,
        gray=0.3,
        hole=1,
        hole_size=(8, 8),
    ),
    "a border of one colour, and now and then a hole": BatchProgram(
        (0.5,) * 3, (0.2,) * 3, (40, 36), "constant", (1, 2, 3), (24, 28), 0.5, 0, 0.5, (4, 9), (9, 8, 7)
    ),
    "none": BatchProgram((0.5,) * 3, (0.2,) * 3),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_batch_program_gives_the_bits_of_the_cpu_and_waits_for_its_constants_only(program, sample):
    batches = []
    for where in ("cpu", device.NAME):
        images = program.prepare(sample.images, where)
        draws = program.draw(np.random.default_rng(0), 64, images)
        index = torch.arange(64).to(where)
        for _ in range(2):
            with counted() as counts:
                batch = program(images, index, draws.to(torch.device(where)))
        assert counts.waits == []  # at the second batch: nothing more is to be copied but the draws
        assert batch.is_contiguous(memory_format=torch.channels_last)
        batches.append(near(batch))
    assert same(*batches) and batches[0].stride() == batches[1].stride()


class Spoiled(list):
    """Two batches of which the second is as a network cannot have it, then a good one."""

    def __init__(self, trained, kind):
        good = [(images, labels) for images, labels in trained.loaders.train]
        images, labels = (x.clone() for x in good[1])
        if kind == "image":
            images[0, 0, 0, 0] = math.nan
        else:
            labels[0] = -100
        super().__init__([good[0], (images, labels), good[2]])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_update_that_is_not_finite_is_left_out_without_waiting_and_so_are_all_after_it(optimizer):
    states, errors = [], []
    for where in ("cpu", device.NAME):
        trained = Trained(where, optimizer)
        trained.loaders = trained.loaders._replace(train=Spoiled(trained, "image"))
        with counted() as counts, pytest.raises(FloatingPointError) as error:
            trained.train()
        assert [x for x in counts.waits if "check_finite" in x] == EPOCH_END[:1] * (where != "cpu")
        parameters = [near(p.detach()) for p in trained.model.parameters()]
        states.append((parameters, near(trained.optimizer.state_dict())))
        errors.append(str(error.value).replace(", or a label is negative,", ""))
        assert not hasattr(trained.optimizer, "found_inf")
    assert "at epoch 1, step 2," in errors[0] and errors[0] == errors[1]
    assert same(*states)


def test_a_negative_label_on_the_device_is_noticed_at_the_end_of_the_epoch():
    trained = Trained(device.NAME)
    batches = Spoiled(trained, "label")
    after_one = Trained("cpu")
    after_one.loaders.train.sampler.batches = 1
    after_one.train()
    with pytest.raises(FloatingPointError, match="or a label is negative, at epoch 1, step 2"):
        main.train(trained.model, trained.where, batches, trained.optimizer)
    assert all(
        same(near(p.detach()), q.detach())
        for p, q in zip(trained.model.parameters(), after_one.model.parameters(), strict=True)
    )


def test_an_overflow_in_fp16_is_skipped_by_the_scaler_without_waiting(monkeypatch):
    def overflowing(where, dtype):
        return torch.amp.GradScaler(where.type, init_scale=2.0**30)

    def call(trained):
        before = [near(p.detach()).clone() for p in trained.model.parameters()]
        with counted() as counts:
            trained.train(precision="fp16")
        assert same(before, [near(p.detach()) for p in trained.model.parameters()])
        end = [EPOCH_END[0], "item in guards.py, check_finite", EPOCH_END[1]]
        assert (
            trained.where == "cpu" or counts.waits[-3:] == end and EPOCH_END[0] not in counts.waits[:-3]
        )

    monkeypatch.setattr(loops, "make_scaler", overflowing)
    assert same(*both(call, steps=2, batch=8, **NO_DROPOUT))


def stopped_at(trained, step):
    """Let SIGTERM come in the middle of one of the steps."""
    count = itertools.count(1)

    def hook(module, inputs, output):
        if trained.model.training and next(count) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    trained.model.linear.register_forward_hook(hook)


@pytest.mark.parametrize(
    "first, second", [(device.NAME, device.NAME), (device.NAME, "cpu"), ("cpu", device.NAME)]
)
def test_a_run_stopped_and_resumed_ends_with_the_bits_of_the_cpu(first, second, tmp_path, capsys):
    options = {"ema_decay": 0.9, "precision": "fp32"}
    whole = Trained("cpu", "adam")
    expected = whole.fit(**options), whole.state()
    begun, resumed = Trained(first, "adam"), Trained(second, "adam")
    stopped_at(begun, STEPS + 2)
    with pytest.raises(Stopped):
        begun.fit(checkpoints=Checkpoints(tmp_path), **options)
    assert "was written with" not in capsys.readouterr().out
    outcome = resumed.fit(checkpoints=Checkpoints(tmp_path, resume=True), **options)
    assert ("was written with" in capsys.readouterr().out) is (first != second)
    assert same((outcome, resumed.state()), expected)


def test_a_command_on_the_device_leaves_the_weights_of_the_cpu_and_a_report(tmp_path, monkeypatch):
    flags = "--recipe demo --width 4 --epochs 1 --lr 0.01 --max-train-batches 4 --max-test-batches 2"
    folders = [tmp_path / device.NAME, tmp_path / "cpu"]
    monkeypatch.setattr(report, "save_figure", lambda figure, path: write_whole(path, b""))  # slow
    for folder in folders:
        command = [*flags.split(), "--device", folder.name, "--output", str(folder)]
        assert main.main(command) == 0
        monkeypatch.setattr(run, "report_run", lambda *arguments: None)  # one report is enough
    one, other = (dict(load_weights(folder)[0].state_dict()) for folder in folders)
    assert same(one, other)
    assert (folders[0] / "report.html").exists() and not (folders[1] / "report.html").exists()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_epoch_of_training_waits_for_its_end_only(optimizer):
    trained = Trained(device.NAME, optimizer)
    trained.train(precision="bf16")  # what is made once is made
    with counted() as counts:
        trained.train(precision="bf16")
    assert counts.waits == EPOCH_END


def test_an_optimizer_that_is_not_fused_waits_once_a_step():
    trained = Trained(device.NAME)
    trained.optimizer = torch.optim.SGD(trained.model.parameters(), lr=0.01, foreach=True)
    trained.train()
    with counted() as counts:
        trained.train()
    assert counts.waits == EPOCH_END[:1] * STEPS + EPOCH_END


def test_testing_waits_for_two_numbers_and_predicting_for_two_arrays_and_both_for_what_is_no_number():
    trained = Trained(device.NAME)
    answers = ["to the host in loops.py, predict"] * 2
    for call, waits in ((main.test, EVALUATION), (main.predict, answers)):
        call(trained.model, trained.where, trained.loaders.test)
        with counted() as counts:
            call(trained.model, trained.where, trained.loaders.test, tta=True)
        assert counts.waits == [ANSWERS, *waits]


def test_an_epoch_of_fit_model_waits_five_times():
    trained = Trained(device.NAME)
    trained.train()
    rest = (*trained.loaders[::2], trained.optimizer)
    with counted() as counts:
        main.fit_model(trained.model, trained.where, *rest, epochs=2, ema_decay=0.9)
    assert counts.waits == [*EPOCH_END, *EVALUATION, "item in guards.py, fault_of"] * 2


def test_a_checkpoint_waits_once_for_each_of_its_tensors(tmp_path):
    trained = Trained(device.NAME)
    trained.fit(epochs=1)
    tensors = len(trained.model.state_dict()) + len(trained.optimizer.state)
    with counted() as counts:
        trained.fit(epochs=1, checkpoints=Checkpoints(tmp_path, seconds=1e9))
    # One before the first step, one at the end.
    assert counts.waits.count("save in checkpoint.py, save_checkpoint") == 2 * tensors


def table_of(heading):
    """The rows of a table in docs/benchmarks.md: a dict from the first cell to the numbers beside it."""
    page = (device.ROOT / "docs" / "benchmarks.md").read_text().partition(f"## {heading}\n")[2]
    lines = [line for line in page.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    return {first: [int(number) for number in numbers] for first, *numbers in cells}


STEP_TABLE = table_of("What a step asks of a GPU")


def operations(recipe, precision, steps):
    """What an epoch of so many steps asks of the device, and the parts of a plain loop's one step."""
    config = Config(
        **RECIPES[recipe] | {"dataset": "cifar10-sample", "batch_size": 2, "width": 8},
        max_train_batches=steps,
    )
    loader = make_loaders(config, device.NAME).train
    model = make_model(config.model, **config.model_options).to(device.NAME)
    optimizer = main.make_optimizer(config.optimizer, model, 0.01, **config.optimizer_options)
    main.train(model, device.NAME, loader, optimizer, precision=precision)
    with counted() as counts:
        main.train(model, device.NAME, loader, optimizer, precision=precision)
    marks = []
    optimizer.zero_grad()
    with counted() as plain:
        images, labels = loader.dataset[2, 0]
        marks.append(len(plain.kernels))
        with utils.autocast(torch.device(device.NAME), utils.PRECISIONS[precision]):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        marks.append(len(plain.kernels))
        loss.backward()
        marks.append(len(plain.kernels))
        optimizer.step()
        marks.append(len(plain.kernels))
    return counts, np.diff([0, *marks]).tolist()


@pytest.mark.parametrize("row", STEP_TABLE)
def test_a_step_launches_no_more_than_the_benchmarks_page_says_and_copies_nothing(row):
    recipe, precision = row.replace("`", "").split(", ")
    (fewer, parts), (more, _) = (operations(recipe, precision, steps) for steps in (1, 2))
    total = len(more.kernels) - len(fewer.kernels)
    measured = [*parts, total - sum(parts), total]
    stated = STEP_TABLE[row]
    assert all(x <= y for x, y in zip(measured, stated, strict=True)), (measured, stated)
    assert more.copies == fewer.copies  # those of the epoch's order, its draws and its sums
