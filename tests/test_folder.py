"""A user's own pictures: layouts, names, and what becomes of a picture."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from sources import folder, load_split


def fill(root, *names, count=2):
    """A few small pictures, each of its own colour, in each of some folders below `root`."""
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (12, 12), (k * 20, i * 20, 90)).save(root / name / f"{i}.png")
    return root


# Parts and classes


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, "train") for name in ("train", "Training", "TRAIN", "Training Set", "train2017")),
        *((name, "train") for name in ("trainset", "train_images", "TRAINING-DATA", "01_train")),
        *((name, "test") for name in ("test", "Testing", "TEST", "test_set", "Test Images", "testdata")),
        *((name, "val") for name in ("val", "valid", "Validation", "VAL_SET", "dev", "eval")),
        *((name, None) for name in ("trains", "train station", "testament", "valley", "data", "images")),
        *((name, None) for name in ("set", "contest", "seg_train", "cat", "7", "protest images")),
    ],
)
def test_a_part_is_known_by_its_name_in_any_case_and_common_form(name, part):
    assert folder.part_of(name) == part


@pytest.mark.parametrize(
    ("train", "test"), [("Training", "Testing"), ("TRAIN", "test"), ("train_set", "test_set")]
)
def test_parts_of_other_names_are_parts_and_no_classes(train, test, tmp_path):
    fill(tmp_path, f"{train}/a", f"{train}/b", f"{test}/a", f"{test}/b", "Validation/a")
    for split in ("train", "test"):
        loaded = load_split("folder", split, tmp_path)
        assert loaded.classes == ("a", "b") and len(loaded) == 4


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ["Training/a", "Training/b", "Validation/a", "Validation/b"],
            "it needs folders train and test",
        ),
        (["train/a", "train/b", "Train/a", "Train/b", "test/a"], "has Train, train, which all name the"),
        (
            ["fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"],
            "has fold1, fold2, with folders cat, dog",
        ),
        (
            ["seg_train/x/a", "seg_train/x/b", "seg_test/x/A", "seg_test/x/B"],
            "with folders a, b in them",
        ),
        (["2019/a", "2019/b", "2020/a", "2020/b", "2020/c"], "has 2019, 2020, with folders a, b in"),
        (["train/a", "train/b", "unlabelled"], "has train, with folders a, b in them"),
        (["pets/cat", "pets/dog"], "has only pets; if its folders are the classes, give .*pets instead"),
        (["train/a", "train/b", "test/a"], "test must hold one folder for each class"),
        (
            ["train/Cat", "train/dog", "test/cat", "test/dog"],
            "train has Cat and only .*test has cat; they",
        ),
        (["train/a", "train/b", "test/a", "test/c"], "but only .*train has b and only .*test has c$"),
    ],
)
def test_a_layout_that_could_be_guessed_wrong_is_refused_in_one_line(folders, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_split("folder", "train", fill(tmp_path, *folders))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["train", "bus", "car"], ("bus", "car", "train")),
        (["train", "test tube"], ("test tube", "train")),
        (["cat/indoor", "cat/outdoor", "dog"], ("cat", "dog")),
        (["n01/images", "n02/images"], ("n01", "n02")),
        (["cat/red", "cat/grey", "dog/brown", "dog/white"], ("cat", "dog")),
        (["cat", "dog", "__MACOSX/cat", ".ipynb_checkpoints", "cat/.ipynb_checkpoints"], ("cat", "dog")),
        (["train/a", "train/b", "test/a", "test/b", "__MACOSX/train"], ("a", "b")),
        (["train/a", "train/b", "test/a", "test/b", "test/__MACOSX", "train/.git"], ("a", "b")),
    ],
)
def test_a_layout_that_is_clear_is_read_as_it_is(folders, classes, tmp_path):
    fill(tmp_path, *folders, count=5)
    assert load_split("folder", "train", tmp_path).classes == classes


# Names


@pytest.mark.parametrize(
    ("name", "shown"),
    [(b"caf\xe9", r"caf\\udce9"), (b"a\nb", r"a\\nb"), (b"\x1b[31mred", r"\\x1b\[31mred")],
)
@pytest.mark.parametrize("inside", [b".", b"train"])
def test_a_class_whose_name_cannot_be_shown_is_refused_before_a_picture_is_read(
    name, shown, inside, tmp_path
):
    root = fill(tmp_path, "one", "two", "test/one")
    place = os.path.join(os.fsencode(root), inside)
    os.renames(os.fsencode(root / "one"), os.path.join(place, name))
    os.renames(os.fsencode(root / "two"), os.path.join(place, b"two"))
    (root / "test/one/0.png").write_text("no picture")
    with pytest.raises(
        ValueError, match=f"the class name {shown} has bytes that are no UTF-8"
    ) as caught:
        load_split("folder", "train", root)
    assert str(caught.value).isascii() and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["\u5c71", "\u00e9t\u00e9", "\U0001f408", "a b", "\u0627\u0628"])
def test_a_class_may_have_any_name_that_can_be_shown(name, tmp_path):
    assert load_split("folder", "train", fill(tmp_path, name, "x", count=5)).classes == tuple(
        sorted((name, "x"))
    )


def test_a_file_whose_name_cannot_be_shown_is_named_escaped(tmp_path):
    fill(tmp_path, "one", "two")
    for name in (b"caf\xe9.png", b"\x1b[2J\n.png"):
        with open(os.path.join(os.fsencode(tmp_path / "one"), name), "w") as file:
            file.write("no picture")
    code = f"from sources import load_split; load_split('folder', 'train', {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    last = done.stderr.splitlines()[-1]
    assert rb"caf\udce9.png is no readable" in last and rb"\x1b[2J\n.png is no readable" in last
