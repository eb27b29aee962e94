"""Small inputs that people give: each works, or one line says what to write."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

import main
import models
import utils
import visualize
from checkpoint import Checkpoints
from config import Config
from data import make_loaders
from tests.test_visualize import make_history
from transforms import denormalize, normalize
from utils import History


def test_a_history_alone_is_drawn():
    history = make_history()
    named = visualize.plot_history({"this run": history})
    assert [x.get_label() for x in visualize.plot_history(history).axes[1].lines] == [
        x.get_label() for x in named.axes[1].lines
    ]
    drawn, given = (
        visualize.plot_lr_history(*given).axes[0].lines[0].get_xydata()
        for given in ((history,), (history.lrs, 2))
    )
    assert (drawn == given).all()
    assert visualize.plot_lr_history(history.lrs).axes[0].get_xlabel() == "steps trained"


def test_a_history_is_saved_into_a_folder_by_its_name(tmp_path):
    history = make_history()
    history.save(str(tmp_path / "runs" / "x"))
    assert History.load(str(tmp_path / "runs" / "x")) == history


def test_one_image_is_denormalised(sample):
    assert (denormalize(normalize(sample.images[:1])[0]) == sample.images[0]).all()


@pytest.mark.parametrize("name", ["ResNet18", "resnet18", "resnet_18", "RESNET18"])
def test_a_network_is_found_by_the_name_of_its_class(name):
    assert type(models.make_model(name, width=8)) is models.ResNet
    with pytest.raises(ValueError, match="unknown model 'ResNet19'"):
        models.make_model("ResNet19")


def test_a_configuration_takes_paths_and_devices():
    config = Config(output=Path("x"), data=Path("y"), device=torch.device("cpu"))
    assert (config.output, config.data, config.device) == ("x", "y", "cpu")
    assert utils.get_device(torch.device("cpu")) == utils.get_device("cpu") == torch.device("cpu")


def test_a_pipeline_of_torchvisions_is_refused_by_its_name():
    with pytest.raises(ValueError, match="not torchvision's Compose: give A.Compose"):
        make_loaders(Config(dataset="cifar10-sample"), "cpu", v2.Compose([v2.ToImage()]))


def test_a_summary_takes_the_side_or_the_shape_of_an_image(tiny):
    assert (
        utils.summarize(tiny)
        == utils.summarize(tiny, (3, 32, 32))
        == utils.summarize(tiny, (1, 3, 32, 32))
    )
    assert utils.summarize(tiny, 64) != utils.summarize(tiny)


def test_a_range_test_of_a_trained_network_says_to_make_it_anew(sample):
    images, labels = normalize(sample.images), torch.from_numpy(sample.labels)
    batches = [(images[k::4], labels[k::4]) for k in range(4)]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(150):
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ValueError, match="if the network is trained already, make it anew"):
        main.find_lr(
            model, "cpu", batches, optimizer, start_lr=0.01, end_lr=10.0, steps=30, precision="fp32"
        )


def test_a_run_that_is_continued_shows_its_earlier_rows_under_one_head(sample, tmp_path, capsys):
    images, labels = normalize(sample.images[:32]), torch.from_numpy(sample.labels[:32])

    def fit(resume, epochs):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        kept = Checkpoints(tmp_path, resume=resume)
        batches = [(images, labels)] * 2
        main.fit_model(model, "cpu", batches, batches, optimizer, epochs=epochs, checkpoints=kept)
        return [
            line.split()
            for line in capsys.readouterr().out.splitlines()
            if "loss" in line or "/3" in line
        ]

    whole = fit(False, 3)
    newest = sorted((tmp_path / "checkpoints").glob("step-*.ckpt"))
    assert len(newest) == 2
    newest[-1].unlink()
    again = fit(True, 3)
    finished = fit(True, 3)
    for rows in (whole, again, finished):
        assert [row[0] for row in rows] == ["epoch", "1/3", "2/3", "3/3"]
    assert finished[1][:6] == whole[1][:6]


MODULES = ("config", "data", "main", "models", "sources", "utils", "visualize")


@pytest.mark.parametrize("order", [MODULES, MODULES[::-1]])
def test_names_imported_with_a_star_hide_none_of_another_module(order):
    names = {}
    for module in order:
        exec(f"from {module} import *", names)
    import sources.split

    assert names["statistics"] is sources.split.statistics
    assert names["predict"] is main.predict and names["test"] is main.test
    for one, other in itertools.combinations(MODULES, 2):
        spaces = {}, {}
        for module, space in zip((one, other), spaces, strict=True):
            exec(f"from {module} import *", space)
        both = spaces[0].keys() & spaces[1].keys() - {"__builtins__"}
        assert all(spaces[0][name] is spaces[1][name] for name in both), (one, other)
    mean, _ = names["statistics"](np.full((1, 2, 2, 3), 51, np.uint8))
    assert mean == pytest.approx((0.2, 0.2, 0.2))
