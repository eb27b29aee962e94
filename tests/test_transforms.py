import random

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from scipy import stats

import transforms
from augmentation.batch import AugmentParams
from transforms import denormalize, train_transform, vectorize

PIPELINES = {
    "default": train_transform(),
    "everything": train_transform(grayscale=0.5, cutout=16),
    "no crop": train_transform(padding=0),
    "only normalise": transforms.test_transform(),
    "black border": A.Compose(
        [
            A.PadIfNeeded(41, 40, border_mode=0, fill=(9, 0, 200)),
            A.RandomCrop(32, 32),
            A.CoarseDropout((1, 1), (5, 5), (9, 9), fill=7, p=0.5),
            A.Normalize(),
            ToTensorV2(),
        ]
    ),
}
STEPS = [
    A.PadIfNeeded(41, 40, border_mode=0, fill=(9, 0.7, 200)),
    A.RandomCrop(32, 32),
    A.HorizontalFlip(p=0.5),
    A.ToGray(p=0.5),
    A.CoarseDropout((1, 1), (5, 5), (9, 9), fill=(0.5, 7.3, 1.25), p=0.5),
]
for place in range(len(STEPS) + 1):
    steps = [*STEPS[:place], A.Normalize(*2 * [(0.5, 0.4, 0.3)]), *STEPS[place:], ToTensorV2()]
    PIPELINES[f"Normalize at {place}"] = A.Compose(steps)
PIPELINES["Normalize before a reflected border"] = A.Compose(
    [A.Normalize(0.5, 0.25), A.PadIfNeeded(40, 40, border_mode=4), *STEPS[1:], ToTensorV2()]
)


def run_per_sample(compose, image, seed):
    """One image through Albumentations, and the decisions that it took."""
    compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
    compose.save_applied_params = True
    result = compose(image=image)
    applied = {name.split(".")[-1]: params for name, params in result["applied_transforms"]}
    left, top = applied["RandomCrop"]["crop_coords"][:2] if "RandomCrop" in applied else (0, 0)
    hole = applied["CoarseDropout"]["holes"][0] if "CoarseDropout" in applied else (0, 0, 0, 0)
    decisions = (
        top,
        left,
        "HorizontalFlip" in applied,
        "ToGray" in applied,
        "CoarseDropout" in applied,
        hole[1],
        hole[0],
    )
    return result["image"], decisions


def run_many(compose, images):
    """Every image through Albumentations: tensors and draws."""
    outputs, decisions = zip(*(run_per_sample(compose, x, i) for i, x in enumerate(images)), strict=True)
    return torch.stack(outputs), AugmentParams(*map(torch.as_tensor, zip(*decisions, strict=True)))


@pytest.mark.parametrize("name", PIPELINES)
def test_same_draws_give_the_same_pixels_per_sample_and_per_batch(name, sample):
    expected, draws = run_many(PIPELINES[name], sample.images)
    program, reason = vectorize(PIPELINES[name])
    assert reason == ""
    batch = program(program.prepare(sample.images), torch.arange(len(sample)), draws)
    torch.testing.assert_close(batch, expected, rtol=0, atol=2e-6)


def counts(draws):
    """How often each offset, flip and hole position came up."""
    return {name: np.bincount(np.asarray(values, int)) for name, values in draws._asdict().items()}


def test_both_forms_draw_offset_flip_and_hole_from_the_same_distribution(sample):
    compose = train_transform()
    program, _ = vectorize(compose)
    store = program.prepare(sample.images)
    images = np.repeat(sample.images[:1], 4000, axis=0)
    per_sample = counts(run_many(compose, images)[1])
    per_batch = counts(program.draw(np.random.default_rng(0), 4000, store))
    for name, possible in {"top": 9, "left": 9, "flip": 2, "hole_top": 25, "hole_left": 25}.items():
        for form in (per_sample, per_batch):
            assert len(form[name]) == possible, name
            assert stats.chisquare(form[name]).pvalue > 1e-3, name  # uniform, as the other is


def test_every_pair_of_decisions_is_independent(sample):
    program, _ = vectorize(train_transform(grayscale=0.5))
    draws = program.draw(np.random.default_rng(1), 4000, program.prepare(sample.images))
    halves = {
        "top": draws.top > 4,
        "left": draws.left > 4,
        "flip": draws.flip,
        "gray": draws.gray,
        "hole_top": draws.hole_top > 12,
        "hole_left": draws.hole_left > 12,
    }
    for first in halves:
        for second in halves:
            if first < second:
                table = np.histogram2d(halves[first].int(), halves[second].int(), bins=2)[0]
                assert stats.chi2_contingency(table).pvalue > 1e-3, (first, second)


@pytest.mark.parametrize("side", [1, 8, 16])
def test_cutout_erases_exactly_side_squared_pixels_in_the_mean_colour(side, sample):
    program, _ = vectorize(train_transform(padding=0, flip=False, cutout=side))
    white = np.full_like(sample.images, 255)
    store = program.prepare(white)
    draws = program.draw(np.random.default_rng(0), len(white), store)
    pixels = denormalize(program(store, torch.arange(len(white)), draws))
    erased = (pixels != 255).all(-1)
    assert (erased.sum((1, 2)) == side * side).all()
    assert (pixels[erased] == (125, 123, 114)).all()


def test_cutout_reaches_every_corner(sample):
    program, _ = vectorize(train_transform())
    draws = program.draw(np.random.default_rng(0), 20_000, program.prepare(sample.images))
    corners = set(zip(draws.hole_top.tolist(), draws.hole_left.tolist(), strict=True))
    assert {(0, 0), (0, 24), (24, 0), (24, 24)} <= corners
    assert max(map(max, corners)) == 24


@pytest.mark.parametrize("options", [{"padding": 4}, {"flip": True}, {"cutout": 8}, {"grayscale": 1.0}])
def test_each_augmentation_changes_pixels(options, sample):
    nothing = {"padding": 0, "flip": False, "cutout": 0, "grayscale": 0.0}
    compose = train_transform(**(nothing | options))
    plain = transforms.normalize(sample.images)
    changed = [
        not torch.equal(run_per_sample(compose, image, seed)[0], plain[seed])
        for seed, image in enumerate(sample.images[:40])
    ]
    assert sum(changed) > 10


def test_denormalize_undoes_normalize(sample):
    assert np.array_equal(denormalize(transforms.normalize(sample.images)), sample.images)


def test_normalised_batches_are_channels_last(sample):
    assert transforms.normalize(sample.images).is_contiguous(memory_format=torch.channels_last)


END = [A.Normalize(), ToTensorV2()]


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([A.Rotate(), *END], "Rotate does not run as batches (without it, the rest may); what does:"),
        ([A.CropAndPad(px=4), *END], "CropAndPad does not run as batches (PadIfNeeded in its place"),
        ([A.Sequential([A.HorizontalFlip()]), *END], "its steps by themselves may"),
        (
            [A.HorizontalFlip(), A.RandomCrop(8, 8), *END],
            "RandomCrop comes after HorizontalFlip: write it before HorizontalFlip",
        ),
        (
            [A.HorizontalFlip(), A.HorizontalFlip(), *END],
            "HorizontalFlip comes after HorizontalFlip: write it once",
        ),
        ([A.CoarseDropout((1, 2), (8, 8), (8, 8)), *END], "CoarseDropout runs as batches only with one"),
        ([A.CoarseDropout((1, 1), (4, 8), (8, 8)), *END], "CoarseDropout runs as batches only with one"),
        ([A.RandomCrop(8, 8, p=0.5), *END], "RandomCrop runs as batches only with p=1"),
        ([A.ToGray(method="max"), *END], 'ToGray runs as batches only with method="weighted_average"'),
        (
            [A.PadIfNeeded(40, 40, position="top_left"), *END],
            "PadIfNeeded runs as batches only with min",
        ),
        ([A.Normalize(normalization="image"), ToTensorV2()], "Normalize runs as batches only with p=1"),
        ([A.HorizontalFlip()], "the pipeline does not have one Normalize, and ToTensorV2 at its end"),
        ([A.Normalize(), *END], "the pipeline does not have one Normalize"),
        ([ToTensorV2(), A.Normalize()], "the pipeline does not have one Normalize"),
    ],
)
def test_an_unknown_pipeline_has_no_batch_program_but_what_to_write_instead(steps, reason):
    program, found = vectorize(A.Compose(steps))
    assert program is None and reason in found


def test_a_pipeline_that_runs_sometimes_has_no_batch_program():
    assert vectorize(A.Compose(END, p=0.5)) == (
        None,
        "the pipeline has p=0.5, and a batch runs it always: leave p at 1",
    )


def test_a_program_is_described_as_before_where_nothing_comes_after_the_normalisation():
    """A run is continued only if its augmentation has the description that it began with."""
    ours = repr(vectorize(train_transform())[0])
    assert ours.endswith("hole_size=(8, 8), hole_fill=(125.0, 123.0, 114.0))")
    late = repr(vectorize(A.Compose([A.Normalize(), A.ToGray(), ToTensorV2()]))[0])
    assert late.endswith("late=('gray',))")


@pytest.mark.parametrize("place", range(6))
def test_evaluation_needs_no_more_than_normalising_wherever_that_stands(place, sample):
    evaluate = transforms.evaluation_transform(PIPELINES[f"Normalize at {place}"], sample.images[:4])
    assert repr(evaluate) == repr(transforms.test_transform(*2 * [(0.5, 0.4, 0.3)]))


# What evaluation keeps of a training pipeline


def middle(images, side):
    """The middle of images, cut out by hand."""
    first = (images.shape[1] - side) // 2
    return images[:, first : first + side, first : first + side]


FIXED = {  # steps that change every image in the same way, and what they make of it
    "CenterCrop": (A.CenterCrop(24, 24), lambda x: middle(x, 24)),
    "HorizontalFlip": (A.HorizontalFlip(p=1), lambda x: x[:, :, ::-1]),
    "InvertImg": (A.InvertImg(p=1), lambda x: 255 - x),
    "PadIfNeeded": (
        A.PadIfNeeded(40, 40, border_mode=0),
        lambda x: np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0))),
    ),
    "Resize": (A.Resize(64, 64, interpolation=0), lambda x: x.repeat(2, 1).repeat(2, 2)),
    "Rotate": (A.Rotate((180, 180), p=1), lambda x: x[:, ::-1, ::-1]),
}
CHANCE = {  # random steps that leave the size alone
    "nothing": [],
    "flip": [A.HorizontalFlip(p=0.5)],
    "rotate": [A.Rotate(20, p=1)],
    "some crop": [A.RandomResizedCrop((32, 32), scale=(0.2, 1))],
    "one of two": [A.OneOf([A.RandomBrightnessContrast(p=1), A.ColorJitter(p=1)], p=0.7)],
}


@pytest.mark.parametrize("chance", CHANCE)
@pytest.mark.parametrize("name", FIXED)
def test_evaluation_keeps_what_every_training_image_goes_through(name, chance, sample):
    step, by_hand = FIXED[name]
    compose = A.Compose([*CHANCE[chance], step, A.Normalize(), ToTensorV2()])
    evaluate = transforms.evaluation_transform(compose, sample.images)
    expected = transforms.normalize(np.ascontiguousarray(by_hand(sample.images)), *IMAGENET)
    found = torch.stack([evaluate(image=image)["image"] for image in sample.images])
    assert found.shape == expected.shape
    assert (found - expected).abs().gt(1e-4).float().mean() < 0.02  # Rotate interpolates its border


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("side", [24, 32, 36, 44])
@pytest.mark.parametrize("pad", [0, 40])
def test_a_random_crop_is_a_crop_of_the_middle_in_evaluation(side, pad, sample):
    steps = [A.PadIfNeeded(pad, pad)] if pad else []
    crop = A.RandomCrop(side, side, pad_if_needed=side > max(32, pad))
    compose = A.Compose([*steps, crop, A.Normalize(), ToTensorV2()])
    evaluate = transforms.evaluation_transform(compose, sample.images)
    image = sample.images[:1]
    found = evaluate(image=image[0])["image"][None]
    assert found.shape == (1, 3, side, side) == (1, *compose(image=image[0])["image"].shape)
    inner = min(side, 32)
    expected = transforms.normalize(np.ascontiguousarray(middle(image, inner)), *IMAGENET)
    start = (side - inner) // 2
    found = found[..., start : start + inner, start : start + inner]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 255.0, 65535.0])
def test_the_scale_of_a_normalisation_holds_for_evaluation_too(scale, sample):
    step = A.Normalize(*(tuple(255 / scale * x for x in xs) for xs in IMAGENET), max_pixel_value=scale)
    for compose in (
        A.Compose([step, ToTensorV2()]),
        A.Compose([A.Rotate(20, p=0.5), step, ToTensorV2()]),
    ):
        evaluate = transforms.evaluation_transform(compose, sample.images)
        found = torch.stack([evaluate(image=image)["image"] for image in sample.images[:9]])
        expected = transforms.normalize(sample.images[:9], *IMAGENET)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"padding": 0}, {"padding": 3, "grayscale": 0.3}])
def test_evaluation_of_ones_own_images_only_normalises(options, sample):
    evaluate = transforms.evaluation_transform(train_transform(**options), sample.images)
    assert repr(evaluate) == repr(transforms.test_transform())


def test_finding_out_what_is_random_moves_no_state(sample):
    compose = train_transform()
    compose.set_random_seed(3)
    transforms.evaluation_transform(compose, sample.images)
    again = train_transform()
    again.set_random_seed(3)
    one, other = (pipeline(image=sample.images[0])["image"] for pipeline in (compose, again))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (A.Rotate(), "must be an A.Compose, not Rotate: give A.Compose"),
        ([A.HorizontalFlip(), *END], "must be an A.Compose, not list"),
        (A.OneOf([A.Rotate()]), "must be an A.Compose, not OneOf"),
        (lambda image: image, "must be an A.Compose, not function"),
        (A.Compose(END, p=0.5), "the pipeline has p=0.5"),
        (A.Compose([A.Resize(64, 64, p=0.5), *END]), "Resize with p=0.5 changes size or type"),
        (A.Compose([A.RandomResizedCrop((64, 64)), *END]), "RandomResizedCrop with p=1 changes size"),
        (A.Compose([A.RandomScale(p=1), *END]), "RandomScale with p=1 changes size"),
        (A.Compose([A.Normalize(p=0.5), ToTensorV2()]), "Normalize with p=0.5 changes size or type"),
        (A.Compose([A.RandomCrop(64, 64), *END]), "RandomCrop fails on an image of 32x32x3"),
        (A.Compose([A.Normalize()]), "must end in A.Normalize"),
        (A.Compose([ToTensorV2()]), "has no A.Normalize"),
    ],
)
def test_a_pipeline_without_a_counterpart_in_evaluation_is_refused_in_one_line(
    transform, message, sample
):
    with pytest.raises(ValueError, match=message) as caught:
        transforms.evaluation_transform(transform, sample.images)
    assert "\n" not in str(caught.value)
