import copy
import html
import itertools
import json
import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import models
import utils
from config import Config
from data import make_loader
from training import lr_finder, optim
from training.lr_finder import find_lr, suggest_lrs
from training.optim import make_optimizer, one_cycle
from training.progress import show_duration
from transforms import train_transform
from utils import Epoch, History, Predictions

CPU = torch.device("cpu")
ROOT = Path(utils.__file__).parent

# Memory

FAULTS = """
import resource, torch
from utils import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
keep_freed_memory(torch.device("cpu"))
faults()  # the last that costs
print(plain, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_memory_that_was_freed_is_used_again_without_a_page_fault():
    printed = subprocess.check_output([sys.executable, "-c", FAULTS], cwd=ROOT, text=True)
    plain, again = map(int, printed.split())
    assert again <= 100 and plain >= 10_000


# The schedule


def test_a_share_of_the_rate_holds_in_the_range_test_and_in_the_schedule(sample):
    model = models.make_model("custom_resnet", width=4)
    optimizer = make_optimizer("sgd", model, lr=0.1, weight_decay=1e-3, head_lr_scale=0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.025, 0.025]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-3, 0.0, 4e-3, 0.0]
    seen = []
    copies = copy.deepcopy((model, optimizer))[1]
    optim.scale_rates(copies)
    copies.register_step_pre_hook(lambda *_: seen.append([g["lr"] for g in copies.param_groups]))
    for group in copies.param_groups:
        group["lr"] = 0.4  # as a range test sets it
    copies.step()
    assert seen == [[0.4, 0.4, 0.1, 0.1]] and [g["lr"] for g in copies.param_groups] == [0.4] * 4
    scheduler = one_cycle(optimizer, 0.8, epochs=2, steps_per_epoch=3, peak_epoch=1)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.8, 0.8, 0.2, 0.2])


def rates(epochs, steps_per_epoch, max_lr=0.1, **options):
    """The rate that each step of a run uses, and the one left behind after the last."""
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    scheduler = one_cycle(optimizer, max_lr, epochs=epochs, steps_per_epoch=steps_per_epoch, **options)
    used = []
    for _ in range(epochs * steps_per_epoch):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(used), optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("epochs", [6, 10, 24])
def test_the_rate_peaks_at_the_last_step_of_epoch_five(epochs):
    used, _ = rates(epochs, 98)
    assert used.argmax() == 5 * 98 - 1
    assert used.max() == pytest.approx(0.1)


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5])
def test_a_run_too_short_for_the_peak_peaks_early(epochs):
    used, _ = rates(epochs, 98)
    assert abs(used.argmax() - (0.3 * epochs * 98 - 1)) <= 1
    assert used.max() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 6, 24])
@pytest.mark.parametrize("steps_per_epoch", [1, 2, 3, 10, 98])
@pytest.mark.parametrize("peak_epoch", [0, 0.5, 1, 5, 24, 1000])
def test_no_rate_is_ever_negative_and_none_rises_after_the_peak(epochs, steps_per_epoch, peak_epoch):
    used, after = rates(epochs, steps_per_epoch, peak_epoch=peak_epoch)
    every = [*used, after]
    assert min(every) > 0 and max(every) <= 0.1 * (1 + 1e-9)
    assert (np.diff(every[int(used.argmax()) :]) < 0).all()


def test_the_rate_starts_at_min_lr_is_linear_and_ends_at_a_hundredth_of_it():
    used, after = rates(10, 50, min_lr=0.02)
    assert used[0] == pytest.approx(0.02) and after == pytest.approx(0.0002)
    up, down = used[: used.argmax() + 1], used[used.argmax() :]
    assert np.allclose(np.diff(up, 2), 0) and np.allclose(np.diff(down, 2), 0)


def test_momentum_is_left_alone():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1, momentum=0.9)
    one_cycle(optimizer, 0.1, epochs=2, steps_per_epoch=5)
    assert optimizer.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    "options",
    [
        {"max_lr": -1},
        {"max_lr": 0},
        {"max_lr": math.nan},
        {"max_lr": math.inf},
        {"max_lr": 0.1, "min_lr": 0.2},
        {"max_lr": 0.1, "min_lr": -0.1},
        {"max_lr": 0.1, "epochs": 0},
        {"max_lr": 0.1, "peak_epoch": -1},
        {"max_lr": 0.1, "peak_epoch": math.nan},
    ],
)
def test_an_impossible_schedule_is_refused(options):
    arguments = {"epochs": 2, "steps_per_epoch": 5} | options
    with pytest.raises(ValueError, match=r"rates must be|a schedule needs a step|peak_epoch must be"):
        one_cycle(torch.optim.Adam([nn.Parameter(torch.zeros(1))]), **arguments)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
@pytest.mark.parametrize("options", [{"lr": -1}, {"lr": math.nan}, {"weight_decay": math.nan}])
def test_every_optimizer_refuses_numbers_that_are_none(tiny, name, options):
    with pytest.raises(ValueError, match="(lr|weight_decay) must be at least 0, not (-1|nan)"):
        make_optimizer(name, tiny, **options)


# The range test


SHORT = {"start_lr": 1e-4, "end_lr": 0.05, "steps": 20}


@pytest.fixture
def loader(sample):
    return make_loader(sample, train_transform(), "cpu", Config(batch_size=32), shuffle=True)


def test_finding_a_rate_changes_nothing(tiny, loader):
    optimizer = make_optimizer("sgd", tiny, lr=0.1)
    tiny(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    one_cycle(optimizer, 0.1, epochs=2, steps_per_epoch=6)  # leaves a mark that the library refuses
    tiny.eval()
    loader.sampler.set_epoch(7)
    before = copy.deepcopy(
        (tiny.state_dict(), optimizer.state_dict(), [p.grad for p in tiny.parameters()])
    )
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    find_lr(tiny, CPU, loader, optimizer, **SHORT)
    after = (tiny.state_dict(), optimizer.state_dict(), [p.grad for p in tiny.parameters()])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not tiny.training and loader.sampler.epoch == 7
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])


def test_a_range_test_is_silent_and_the_same_every_time(tiny, loader, capsys):
    optimizer = make_optimizer("adam", tiny)
    first, second = (find_lr(tiny, CPU, loader, optimizer, **SHORT) for _ in range(2))
    assert first == second
    assert capsys.readouterr() == ("", "")


def test_a_range_test_covers_its_range_evenly_and_falls(tiny, loader):
    found = find_lr(tiny, CPU, loader, make_optimizer("adam", tiny), start_lr=1e-4, end_lr=0.1, steps=40)
    assert found.lrs[0] == pytest.approx(1e-4) and found.lrs[-1] == pytest.approx(0.1)
    assert np.allclose(np.diff(np.log(found.lrs)), np.log(1000) / 39)
    assert min(found.losses) < found.losses[0] - 0.2
    assert set(found.suggestions) == {"start", "steepest", "valley", "minimum_over_ten", "minimum"}
    assert found.suggestions["minimum"] == pytest.approx(10 * found.suggestions["minimum_over_ten"])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_range_test_runs_in_the_precision_of_the_run(loader, precision):
    seen = set()
    model = models.make_model("custom_resnet", width=1)  # and few images: fp16 is slow on CPUs
    model.linear.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    batches = [[x[:4] for x in batch] for batch in loader]
    find_lr(model, CPU, batches, make_optimizer("adam", model), **SHORT, precision=precision)
    assert seen == {utils.PRECISIONS[precision]}


def test_a_plain_dataloader_works_too(tiny):
    dataset = TensorDataset(torch.randn(64, 3, 32, 32), torch.arange(64) % 10)
    found = find_lr(tiny, CPU, DataLoader(dataset, 16), make_optimizer("adam", tiny), **SHORT)
    assert len(found.lrs) == 20


def test_a_failure_in_mid_test_leaves_the_model_as_it_was(tiny):
    dataset = TensorDataset(torch.randn(64, 3, 32, 32), torch.full((64,), 3))
    calls = itertools.count()

    def fail(module, inputs):
        if module.training and next(calls) == 3:
            raise IndexError

    tiny.register_forward_pre_hook(fail)
    before, state = copy.deepcopy(tiny.state_dict()), np.random.get_state()[1].copy()
    with pytest.raises(IndexError):
        find_lr(tiny, CPU, DataLoader(dataset, 16), make_optimizer("adam", tiny), steps=20)
    assert np.array_equal(state, np.random.get_state()[1])
    torch.testing.assert_close(dict(tiny.state_dict()), dict(before), rtol=0, atol=0)


def curve(count=100, lowest=60, bottom=1.0):
    """A range test as in the books: flat, falling, rising; without noise."""
    lrs = np.logspace(-5, 0, count)
    losses = np.full(count, 2.3)
    losses[20:lowest] = np.linspace(2.3, bottom, lowest - 20)
    losses[lowest:] = np.linspace(bottom, 5, count - lowest)
    return lrs.tolist(), losses.tolist()


def test_a_loss_that_still_falls_at_the_end_of_the_range_has_no_minimum(capsys):
    lrs = np.logspace(-5, 1, 100)
    losses = np.full(100, 2.3)
    losses[40:] = np.linspace(2.3, 0.1, 60)
    found = suggest_lrs(lrs.tolist(), losses.tolist())
    assert found["minimum"] == found["minimum_over_ten"] == found["valley"] < 0.5
    assert "still fell at 10, the end of the range" in capsys.readouterr().out


def test_each_rule_reads_the_curve_as_its_name_says():
    lrs, losses = curve()
    found = suggest_lrs(lrs, losses)
    assert lrs[58] <= found["minimum"] <= lrs[61]  # smoothing rounds the tip of the curve
    assert found["minimum_over_ten"] == pytest.approx(found["minimum"] / 10)
    assert lrs[22] < found["steepest"] < lrs[58]
    assert lrs[30] < found["valley"] < lrs[45]  # half-way down
    assert lrs[20] < found["start"] < lrs[27]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_suggestions_use_only_what_comes_before_the_first_loss_that_is_not_finite(bad):
    lrs, losses = curve()
    losses[80:] = [bad] * 20
    assert suggest_lrs(lrs, losses) == pytest.approx(suggest_lrs(lrs[:80], losses[:80]))


@pytest.mark.parametrize("finite", [0, 1, 16])
def test_too_few_finite_losses_suggest_nothing(finite):
    lrs, losses = curve()
    with pytest.raises(ValueError, match=f"has {finite} finite losses and needs 17"):
        suggest_lrs(lrs, losses[:finite] + [math.nan] * (100 - finite))


def test_a_run_of_nan_is_an_error_and_not_a_suggestion(tiny, loader):
    nn.init.constant_(tiny.linear.weight, math.nan)
    with pytest.raises(ValueError, match="0 finite losses"):
        find_lr(tiny, CPU, loader, make_optimizer("adam", tiny), steps=20)


@pytest.mark.parametrize("shape", [np.full(100, 2.3), np.linspace(2.3, 9, 100)])
def test_a_loss_that_never_falls_suggests_nothing(shape):
    with pytest.raises(ValueError, match="the loss of the range test never fell"):
        suggest_lrs(curve()[0], shape.tolist())


def test_no_rule_looks_beyond_the_minimum():
    lrs, losses = curve(lowest=30)
    losses[60:] = np.linspace(9, 2, 40).tolist()  # a longer fall, after the blow-up
    assert max(suggest_lrs(lrs, losses).values()) <= lrs[31]


def test_an_empty_range_is_refused(tiny, loader):
    with pytest.raises(ValueError, match="start_lr must be positive and under end_lr"):
        find_lr(tiny, CPU, loader, make_optimizer("adam", tiny), start_lr=1, end_lr=0.1)


# History, predictions, devices


def row(epoch, **changes):
    values = {
        "lr": 0.1,
        "train_loss": 2.0,
        "train_accuracy": 0.25,
        "seconds": 1.5,
        "images_per_second": 100.0,
    }
    return Epoch(epoch=epoch, **(values | changes))


def test_history_survives_a_round_trip(tmp_path):
    rows = [row(1, test_loss=1.0, test_accuracy=0.5), row(2, val_loss=0.1, val_accuracy=0.5)]
    history = History(rows, [0.1, 1 / 3])
    history.save(tmp_path)
    assert History.load(tmp_path) == history
    table = (tmp_path / "history.csv").read_text().splitlines()
    assert table[0].startswith("epoch,lr,train_loss,train_accuracy,val_loss") and len(table) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"train_loss": None},
        {"seconds": None},
        {"test_loss": None},
        {"test_accuracy": None},
        {"test_loss": None, "test_accuracy": None},
        {"val_loss": 1.0},
        {"lr": 10**400},
        {"images_per_second": "9"},
    ],
)
def test_a_history_with_a_hole_is_refused_by_its_epoch(tmp_path, changes):
    whole = row(1, test_loss=1.0, test_accuracy=0.5)
    History([whole, replace(whole, **changes)], [0.1, 0.1]).save(tmp_path)
    with pytest.raises(ValueError, match="what epoch 2 measured must be numbers"):
        History.load(tmp_path)


def test_predictions_know_their_mistakes_most_confident_first():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]], np.float32)
    predictions = Predictions(probabilities, np.array([0, 1, 0, 1]))
    assert predictions.accuracy == 0.5
    assert predictions.misclassified().tolist() == [2, 1]
    assert predictions.misclassified(1).tolist() == [2]


def test_the_calibration_error_is_that_of_guo_et_al():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.3] * 4, 500).astype(np.float32)
    probabilities[0] = [1, 0, 0, 0]  # a certain answer is in the last bin, not beyond it
    predictions = Predictions(probabilities, rng.integers(0, 4, 500))
    sure, right = probabilities.max(1), predictions.predicted == predictions.labels
    expected = 0.0
    for low in np.arange(15) / 15:  # the formula of the paper, bin by bin
        members = (sure >= low) & ((sure < low + 1 / 15) | (low > 0.93))
        if members.any():
            expected += members.mean() * abs(right[members].mean() - sure[members].mean())
    found = predictions.calibration()
    assert found.error == pytest.approx(expected, abs=1e-6)
    assert (found.answers.sum(), found.right.sum()) == (500, right.sum())
    assert 0.02 < found.chance < found.error / 2  # these labels were drawn without a look


def test_a_network_that_is_as_often_right_as_it_says_is_within_chance():
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet([0.5] * 3, 2000)
    labels = np.array([rng.choice(3, p=row) for row in probabilities])
    found = Predictions(probabilities, labels).calibration()
    assert found.error < found.chance < 0.05


def test_the_interval_of_a_share_is_wilsons():
    assert utils.share_interval(0, 0) == (0.0, 1.0)
    z, n = 1.959964, 1000
    for hits in (0, 1, 700, 999, 1000):
        p = hits / n
        middle, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n**2)
        expected = [(middle + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
        assert utils.share_interval(hits, n) == pytest.approx(expected, abs=1e-6)
    assert utils.share_interval(3, 4, 0.99)[0] < utils.share_interval(3, 4)[0]


# Text from outside


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a\n# b", "a # b"),
        ("\x1b[31mred\x1b[0m", "[31mred [0m"),
        ("\u202eright to left\u202c", "right to left"),
        ("caf\udce9", "caf\ufffd"),
        ("one\u2028two\x85three\ttabbed", "one two three tabbed"),
        ("\u732b \u5c3a", "\u732b \u5c3a"),
        (Path("a/b"), "a/b"),
        (0.1, "0.1"),
    ],
)
def test_text_from_outside_is_one_harmless_line(given, shown):
    assert utils.plain(given) == shown


@pytest.mark.parametrize(
    "given", ["a|b", "<b>", "[x](y)", "![x](y)", "`x`", "_x_ *y*", "~~z~~", "# h", "&lt;"]
)
def test_markup_in_text_from_outside_is_shown_as_it_is(given):
    from markdown_it import MarkdownIt

    page = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    cell = page.render(f"|head|\n|---|\n|{utils.escape(given)}|\n")
    assert f"<td>{html.escape(given)}</td>" in cell


def test_no_probability_is_shown_as_certain_or_as_impossible():
    shown = [utils.show_probability(p) for p in (1.0, 0.9996, 0.5, 0.0004, 0.0)]
    assert shown == [">99.9%", ">99.9%", "50.0%", "<0.1%", "<0.1%"]
    assert not {"100.0%", "0.0%"} & {utils.show_probability(p) for p in np.linspace(0, 1, 100_001)}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.04 seconds"),
        (2.34, "2.3 seconds"),
        (61, "61 seconds"),
        (90, "1.5 minutes"),
        (9000, "2.5 hours"),
    ],
)
def test_a_time_is_told_in_the_unit_that_suits_it(seconds, shown):
    assert show_duration(seconds) == shown


def test_seeding_makes_every_generator_repeat():
    drawn = []
    for _ in range(2):
        utils.seed_everything(3)
        drawn.append((torch.rand(1).item(), np.random.rand(), utils.random.random()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "gpu"])
def test_an_absent_device_is_refused(name):
    with pytest.raises(ValueError, match=f"there is no device '{name}' here"):
        utils.get_device(name)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_automatic_precision_on_a_gpu_follows_its_compute_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert utils.pick_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16)],
)
def test_automatic_precision_on_a_cpu_follows_its_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert utils.pick_precision("auto", CPU) == expected


def test_unknown_precision_names_the_choices():
    with pytest.raises(
        ValueError, match="unknown precision 'fp6'; choose from auto, fp32, bf16, fp16; did"
    ):
        utils.pick_precision("fp6", CPU)


def test_a_range_test_result_can_be_kept_as_json(tiny, loader):
    found = find_lr(tiny, CPU, loader, make_optimizer("adam", tiny), **SHORT)
    assert lr_finder.LRFinderResult(**json.loads(json.dumps(found.__dict__))) == found


def test_machines_with_and_without_bf16_have_two_names(monkeypatch):
    names = set()
    for able in (True, False):
        found = {"cpu_name": "AMD EPYC", "avx512_bf16": able}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        names.add(utils.environment(CPU)["machine"])
    assert names == {"AMD EPYC, 1 threads", "AMD EPYC, 1 threads, bf16"}


def test_six_views_are_an_image_and_its_mirror_image_in_three_places():
    images = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    up_left = images[:, :, [1, 0, 1, 2]][..., [1, 0, 1, 2, 3]]  # from where the border was reflected
    down_right = images[:, :, [1, 2, 3, 2]][..., [1, 2, 3, 4, 3]]
    places = [(0.25, images), (0.125, up_left), (0.125, down_right)]
    expected = [(share, view) for share, place in places for view in (place, place.flip(3))]
    for (share, view), (wanted, image) in zip(utils.six_views(images), expected, strict=True):
        assert share == wanted
        assert torch.equal(view, image)


def test_numbers_drawn_under_a_seed_are_those_of_manual_seed_and_later_ones_are_not_moved():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(1)
    following = torch.rand(3)
    torch.manual_seed(1)
    with utils.seeded(5, CPU):
        drawn = torch.rand(3)
    assert torch.equal(drawn, expected)
    assert torch.equal(torch.rand(3), following)
    with pytest.raises(ZeroDivisionError), utils.seeded(5, CPU):
        1 / 0  # noqa: B018
