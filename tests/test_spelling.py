import random
import warnings

import albumentations as A
import cv2
import numpy as np
import pytest
import torch
import torchvision
from albumentations.pytorch import ToTensorV2
from torch.utils.data import DataLoader, Subset

import main
import transforms
from config import Config
from data import make_loaders
from training.optim import make_optimizer

MEAN = (0.4914, 0.4822, 0.4465)
FILL = (125, 123, 114)
OLD_HOLE = {
    **{"max_holes": 1, "max_height": 16, "max_width": 16},
    **{"min_holes": 1, "min_height": 16, "min_width": 16},
}
END = [A.Normalize(), ToTensorV2()]


def hole(count=(1, 1), height=(16, 16), width=(16, 16), **more):
    return A.CoarseDropout(count, height, width, **more)


def as_before(name, *values, **arguments):
    """A step of Albumentations alone, which warns of the arguments that it leaves out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(A, name)(*values, **arguments)


REFLECT = {"border_mode": cv2.BORDER_REFLECT_101}
OLD = {  # as notebooks write it, and what it was, in the words of now
    "one hole": (
        ("CoarseDropout", (), {**OLD_HOLE, "fill_value": FILL, "mask_fill_value": None}),
        hole(fill=FILL),
    ),
    "one hole, without names": (
        ("CoarseDropout", (1, 16, 16, 1, 16, 16, FILL, None, True), {}),
        hole(fill=FILL, p=1),
    ),
    "holes of other sizes": (
        ("CoarseDropout", (), {"max_holes": 3, "min_holes": 2, "max_height": 9, "max_width": 7}),
        hole((2, 3), (9, 9), (7, 7)),
    ),
    "holes by default": (("CoarseDropout", (), {"max_height": 4}), hole((8, 8), (4, 4), (8, 8))),
    "both spellings in one": (
        ("CoarseDropout", (), {"num_holes_range": (1, 1), "fill_value": 9}),
        A.CoarseDropout((1, 1), fill=9),
    ),
    "Cutout": (
        ("Cutout", (), {"num_holes": 1, "max_h_size": 16, "max_w_size": 16, "fill_value": FILL}),
        hole(fill=FILL),
    ),
    "Cutout by default": (("Cutout", (), {"always_apply": True}), hole((8, 8), (8, 8), (8, 8), p=1)),
    "border in a colour": (
        ("PadIfNeeded", (40, 40), {"border_mode": 0, "value": FILL, "mask_value": 0}),
        A.PadIfNeeded(40, 40, border_mode=0, fill=FILL),
    ),
    "border by default": (
        ("PadIfNeeded", (), {"min_height": 40, "min_width": 40, "always_apply": True}),
        A.PadIfNeeded(40, 40, **REFLECT),
    ),
    "rotated, by default reflected": (("Rotate", (5,), {"value": 0}), A.Rotate(5, **REFLECT)),
    "shifted": (
        ("Affine", (), {"translate_percent": 0.1, "cval": 7, "mode": cv2.BORDER_CONSTANT}),
        A.Affine(translate_percent=0.1, fill=7, border_mode=cv2.BORDER_CONSTANT),
    ),
    "resized crop": (
        ("RandomResizedCrop", (24, 20), {"scale": (0.5, 1)}),
        A.RandomResizedCrop((24, 20), scale=(0.5, 1)),
    ),
    "always": (("HorizontalFlip", (), {"always_apply": True}), A.HorizontalFlip(p=1)),
}


@pytest.mark.parametrize("name", OLD)
def test_what_is_spelt_as_before_does_what_it_did_and_says_so_in_one_line(name, sample, capsys):
    (step, values, arguments), expected = OLD[name]
    found = getattr(transforms, step)(*values, **arguments)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "spelt as before Albumentations 2, is read as" in printed
    assert found.to_dict() == expected.to_dict()
    for seed, image in enumerate(sample.images[:8]):
        for one in (found, expected):
            one.set_random_state(np.random.default_rng(seed), random.Random(seed))
        assert np.array_equal(found(image=image)["image"], expected(image=image)["image"])


@pytest.mark.parametrize(
    ("name", "values", "arguments"),
    [
        ("CoarseDropout", ((1, 1), (8, 8), (8, 8)), {"fill": FILL, "p": 1}),
        ("PadIfNeeded", (40, 40), {}),
        ("Normalize", (MEAN, MEAN), {"always_apply": True}),
        ("HorizontalFlip", (), {"always_apply": False, "p": 0.3}),
    ],
)
def test_what_is_spelt_as_now_or_means_the_same_is_passed_on_without_a_word(
    name, values, arguments, capsys
):
    found = getattr(transforms, name)(*values, **arguments)
    arguments.pop("always_apply", None)
    assert found.to_dict() == getattr(A, name)(*values, **arguments).to_dict()
    assert capsys.readouterr().out == ""


def test_everything_else_of_albumentations_goes_by_our_name_too():
    assert transforms.Compose is A.Compose and transforms.OneOf is A.OneOf
    assert transforms.pytorch.ToTensorV2 is transforms.ToTensorV2 is ToTensorV2


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: transforms.RandomCrop(32, 32, pad=4), "no argument pad: write PadIfNeeded before it"),
        (
            lambda: transforms.GaussNoise(var_limit=5),
            "no argument var_limit: it has std_range, mean_range",
        ),
        (
            lambda: transforms.HorizontalFlip(True, 0.5),
            "HorizontalFlip takes 1 arguments at most, not 2",
        ),
        (
            lambda: transforms.CoarseDropout(**OLD_HOLE | {"min_height": -3}),
            r"CoarseDropout does not take hole_height_range .* \(-3, 16\) must be >= 0",
        ),
    ],
)
def test_a_step_that_cannot_be_read_is_refused_in_one_line(step, message):
    with pytest.raises(ValueError, match=message) as caught:
        step()
    assert "\n" not in str(caught.value)


def test_a_step_that_is_gone_is_named_with_what_to_write():
    with pytest.raises(
        AttributeError, match=r"2.0.8 has Flip: write OneOf\(\[HorizontalFlip\(p=1\), Ver"
    ):
        transforms.Flip()
    with pytest.raises(AttributeError, match="neither transforms nor Albumentations 2.0.8 has Nonsense"):
        transforms.Nonsense()
    with pytest.raises(ImportError):
        from transforms import train_transfrom  # noqa: F401


LEFT_OUT = {
    "holes": (
        ("CoarseDropout", OLD_HOLE | {"fill_value": MEAN}),
        "CoarseDropout left out max_holes, .*, fill_value, of Albumentations before version 2: "
        "write num_holes_range, hole_height_range, hole_width_range, fill instead, or `import tr",
    ),
    "border": (
        ("PadIfNeeded", {"min_height": 40, "min_width": 40, "border_mode": 0, "value": 9}),
        "PadIfNeeded left out value, .*: write fill instead",
    ),
    "always": (
        ("HorizontalFlip", {"always_apply": True}),
        "left out always_apply, .*: write p=1 instead",
    ),
    "pad": (
        ("RandomCrop", {"height": 32, "width": 32, "pad": 4}),
        "no argument pad, and left it out: write PadIfNeeded before it",
    ),
    "unknown": (
        ("ToGray", {"strength": 2}),
        "ToGray has no argument strength, .*: it has num_output_ch",
    ),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_pipeline_that_left_arguments_out_is_refused_wherever_it_comes_in(name, inside, sample):
    (step, arguments), message = LEFT_OUT[name]
    lossy = as_before(step, **arguments)
    compose = A.Compose([A.OneOf([A.Sequential([lossy])]) if inside else lossy, *END])
    config = Config(dataset="cifar10-sample", batch_size=16)
    for door in (
        lambda: transforms.vectorize(compose),
        lambda: transforms.evaluation_transform(compose, sample.images),
        lambda: make_loaders(config, "cpu", compose),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            door()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "step",
    [
        as_before("PadIfNeeded", 40, 40, **REFLECT, value=0, mask_value=0, always_apply=True),
        as_before("CoarseDropout", (1, 1), (8, 8), (8, 8), mask_fill_value=None, p=1, always_apply=True),
    ],
)
def test_arguments_that_change_no_image_may_be_left_out(step):
    program, reason = transforms.vectorize(A.Compose([step, *END]))
    assert program and reason == ""


class Own(torchvision.datasets.VisionDataset):
    """A dataset as notebooks write it, with Albumentations inside."""

    def __init__(self, split, transform):
        super().__init__("", transform=transform)
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        return self.transform(image=self.split.images[index])["image"], int(self.split.labels[index])


class Wrapped:
    def __init__(self, compose):
        self.compose = compose

    def __call__(self, image):
        return self.compose(image=image)


def test_training_refuses_a_loader_of_ones_own_whose_pipeline_left_arguments_out(sample, tiny):
    compose = A.Compose([as_before("CoarseDropout", **OLD_HOLE, fill_value=0), *END])
    whole = A.Compose([transforms.CoarseDropout(**OLD_HOLE, fill_value=0), *END])
    for wrap in (lambda x: x, Wrapped):
        for part in (lambda x: x, lambda x: Subset(x, range(40))):
            optimizer = make_optimizer("adam", tiny)
            with pytest.raises(ValueError, match="CoarseDropout left out max_holes"):
                main.train(tiny, "cpu", DataLoader(part(Own(sample, wrap(compose))), 20), optimizer)
    assert main.train(tiny, "cpu", DataLoader(Subset(Own(sample, whole), range(40)), 20), optimizer)


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (
            [hole(fill=MEAN), *END],
            "of 0 to 255, fills with (0.4914, 0.4822, 0.4465); the mean colour is f",
        ),
        ([A.Normalize(MEAN, MEAN), hole(fill=MEAN), ToTensorV2()], "where the mean is 0, fills with"),
        ([hole(fill=FILL), *END], ""),
        ([hole(fill=0), *END], ""),
        ([hole(fill="random"), *END], ""),
        ([A.Normalize(MEAN, MEAN), hole(fill=0), ToTensorV2()], ""),
    ],
)
def test_holes_in_a_colour_that_is_not_meant_are_said_to_be(steps, line, capsys):
    make_loaders(Config(dataset="cifar10-sample"), "cpu", A.Compose(steps))
    printed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("warning: ")]
    assert len(printed) == bool(line) and line in "".join(printed)


@pytest.mark.parametrize("first", [True, False])
def test_a_notebooks_pipeline_with_normalize_first_runs_as_batches(first, sample, capsys):
    normalize = transforms.Normalize(MEAN, MEAN, always_apply=True)
    rest = [
        transforms.PadIfNeeded(min_height=40, min_width=40, always_apply=True),
        transforms.RandomCrop(32, 32, always_apply=True),
        transforms.HorizontalFlip(),
        transforms.Cutout(num_holes=1, max_h_size=16, max_w_size=16, fill_value=0),
    ]
    compose = A.Compose([normalize, *rest, ToTensorV2()] if first else [*rest, normalize, ToTensorV2()])
    loaders = make_loaders(Config(dataset="cifar10-sample", batch_size=64), "cpu", compose)
    assert "image by image" not in capsys.readouterr().out
    images, _ = next(iter(loaders.train))
    filled = torch.isclose(images, torch.tensor(0.0 if first else -1.0), atol=1e-6)
    holes = filled.all(1).sum((1, 2))
    assert 0.3 < (holes >= 256).float().mean() < 0.7
    assert loaders.normalization["mean"] == MEAN
