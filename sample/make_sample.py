"""Makes the sample from verified CIFAR-10: `python -m sample.make_sample [--data datasets]`."""

import argparse
import hashlib
import json

import numpy as np
from PIL import Image

from sources.cifar10 import CLASSES, SAMPLE, load_cifar10

COLUMNS = 50
SEED = 0
PICTURES = ("cat", "ship")  # classes whose first test image is a file of its own, for examples


def main() -> None:
    """Write train.png, test.png and sample.json: as many images of each class, chosen by SEED.

    The first test images of `PICTURES` are written as files of their own, too.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="datasets")
    root = parser.parse_args().data
    card = {}
    for split, each in (("train", 400), ("test", 100)):
        full = load_cifar10(split, SAMPLE.parent / root)
        rng = np.random.default_rng(SEED)
        members = [np.flatnonzero(full.labels == label) for label in range(10)]
        index = np.concatenate([np.sort(rng.choice(m, each, replace=False)) for m in members])
        images = full.images[index]
        mosaic = images.reshape(-1, COLUMNS, 32, 32, 3).swapaxes(1, 2).reshape(-1, COLUMNS * 32, 3)
        Image.fromarray(mosaic).save(SAMPLE / f"{split}.png", optimize=True)
        card[split] = {"sha256": hashlib.sha256(images.data).hexdigest(), "index": index.tolist()}
    for name in PICTURES:  # `images` are those of the test set, 100 of each class in turn
        Image.fromarray(images[100 * CLASSES.index(name)]).save(SAMPLE / f"{name}.png", optimize=True)
    (SAMPLE / "sample.json").write_text(json.dumps(card))


if __name__ == "__main__":
    main()
