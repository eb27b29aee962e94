"""What datasets answer, and what `predict` keeps of the images that it was shown."""

import copy
from collections import Counter

import albumentations as A
import numpy as np
import pytest
import torch
from albumentations.pytorch import ToTensorV2
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import v2

import main
from config import Config
from data import Batches, EpochSampler, Samples, make_loader
from training import pictures
from transforms import CIFAR10_MEAN, CIFAR10_STD, denormalize, normalize, train_transform, vectorize
from transforms import test_transform as evaluation_transform

EXACT = {"precision": "fp32"}
KINDS = {
    "whole batches": lambda split: Batches(split, vectorize(train_transform())[0], "cpu", 32, 5, True),
    "image by image": lambda split: Samples(split, train_transform(), 32, 5, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_dataset_answers_what_torchvisions_do(kind, sample):
    dataset = KINDS[kind](sample)
    theirs = datasets.CIFAR10.__new__(datasets.CIFAR10)  # without a download
    theirs.data, theirs.targets, theirs.transform = sample.images, sample.labels.tolist(), None
    theirs.target_transform = None
    assert len(dataset) == len(theirs) == 200
    assert (dataset.data == theirs.data).all() and dataset.targets == theirs.targets
    assert dataset.classes[3] == "cat" and Counter(dataset.targets)[3] == 20
    for k in (0, 199, -1, np.int64(7)):
        image, label = dataset[k]
        assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and label == theirs[k][1]
    with pytest.raises(IndexError, match="there are 200 images"):
        dataset[200]
    assert len(list(dataset)) == 200  # a loop over it ends


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_of_a_dataset_is_that_image_augmented_the_same_every_time(kind, sample):
    dataset, other = KINDS[kind](sample), KINDS[kind](sample)
    plain = normalize(sample.images)
    for k in (3, 150):
        assert torch.equal(dataset[k][0], other[k][0])
        nearest = (plain - dataset[k][0]).abs().mean((1, 2, 3)).argmin()
        mirrored = (plain.flip(-1) - dataset[k][0]).abs().mean((1, 2, 3)).argmin()
        assert k in (nearest, mirrored)
    still = Batches(sample, vectorize(evaluation_transform())[0], "cpu", 32, 0, False)
    assert torch.equal(still[5][0], plain[5])


def test_looking_at_single_images_changes_no_batch(sample):
    one, two = KINDS["whole batches"](sample), KINDS["whole batches"](sample)
    first = [one[2, k][0] for k in range(6)]
    for k, expected in enumerate(first):
        two[k]
        assert torch.equal(two[2, k][0], expected)


def test_a_loader_of_ones_own_over_our_dataset_trains(sample, tiny):
    loader = DataLoader(KINDS["whole batches"](sample), batch_size=50, shuffle=True)
    optimizer = torch.optim.SGD(tiny.parameters(), lr=0.01)
    stats = main.train(tiny, "cpu", loader, optimizer, **EXACT)
    assert np.isfinite(stats.loss) and main.predict(tiny, loader, **EXACT).images.shape == (
        200,
        32,
        32,
        3,
    )


class Own(torch.utils.data.Dataset):
    """A dataset as people write them."""

    def __init__(self, split, transform):
        self.split, self.transform, self.classes = split, transform, list(split.classes)

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        image = self.split.images[index]
        if isinstance(self.transform, A.Compose):
            return self.transform(image=image)["image"], int(self.split.labels[index])
        return self.transform(image), int(self.split.labels[index])


HALF = (0.5, 0.5, 0.5)
TRANSFORMS = {
    "torchvision": lambda: v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(HALF, HALF)]
    ),
    "not normalised": lambda: v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
    "Albumentations": lambda: A.Compose([A.Normalize(HALF, (0.2, 0.2, 0.2)), ToTensorV2()]),
    "bytes": lambda: A.Compose(
        [A.Normalize((127.5,) * 3, (51.0,) * 3, max_pixel_value=1.0), ToTensorV2()]
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("part", [False, True])
def test_of_any_shuffled_loader_the_pictures_are_those_of_the_answers(name, part, sample, tiny):
    dataset = Own(sample, TRANSFORMS[name]())
    chosen = Subset(dataset, range(40, 120)) if part else dataset
    predictions = main.predict(tiny, DataLoader(chosen, 32, shuffle=True), **EXACT)
    by_picture = {image.tobytes(): k for k, image in enumerate(sample.images)}
    place = [by_picture[image.tobytes()] for image in predictions.images]
    assert sorted(place) == (list(range(40, 120)) if part else list(range(200))) != place
    assert (predictions.labels == sample.labels[place]).all()
    assert predictions.classes == sample.classes
    again = normalize(predictions.images, **predictions.normalization)
    inputs = torch.stack([dataset[k][0] for k in place])
    torch.testing.assert_close(again, inputs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("limit", [None, 2])
def test_of_our_loaders_the_pictures_are_those_of_the_answers(shuffle, limit, sample, tiny):
    config = Config(batch_size=50, max_train_batches=limit, max_test_batches=limit, seed=3)
    loader = make_loader(sample, evaluation_transform(), "cpu", config, shuffle)
    if shuffle:
        loader.sampler.set_epoch(4)
    inputs = torch.cat([images for images, _ in copy.deepcopy(loader)])
    predictions = main.predict(tiny, loader, **EXACT)
    assert (denormalize(inputs) == predictions.images).all()
    assert len(predictions.images) == len(predictions.labels) == (100 if limit else 200)
    assert np.shares_memory(predictions.images, sample.images) is not shuffle
    assert predictions.normalization == {"mean": CIFAR10_MEAN, "std": CIFAR10_STD}
    assert isinstance(loader.sampler, EpochSampler)


def test_too_many_pictures_are_not_kept_and_the_answers_are_the_same(sample, tiny, monkeypatch):
    loader = DataLoader(Own(sample, TRANSFORMS["torchvision"]()), 50)
    whole = main.predict(tiny, loader, **EXACT)
    monkeypatch.setattr(pictures, "MOST_KEPT", 150 * 32 * 32 * 3)
    few = main.predict(tiny, loader, **EXACT)
    assert few.images is None and (few.probabilities == whole.probabilities).all()


def test_images_that_are_not_in_colour_are_classified_without_pictures(sample):
    grey = [(torch.rand(8, 1, 8, 8), torch.arange(8))]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    assert main.predict(model, grey, **EXACT).images is None
