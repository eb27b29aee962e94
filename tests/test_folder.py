"""A user's own pictures: layouts, names, and what becomes of a picture."""

import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import data
import main
from config import Config
from data import make_loaders
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
    with pytest.raises(ValueError, match=r"caf\\udce9.png is no readable") as caught:
        load_split("folder", "train", tmp_path)
    assert r"\x1b[2J\n.png is no readable" in str(caught.value)


# What becomes of a picture


def see_through(hidden):
    """A grey square in a field of no colour, whose bytes hold one nevertheless."""
    image = Image.new("RGBA", (64, 64), (*hidden, 0))
    image.paste((90, 90, 90, 255), (16, 16, 48, 48))
    return image


def grey_over(background):
    """The same square on a background."""
    image = Image.new("RGB", (64, 64), background)
    image.paste((90, 90, 90), (16, 16, 48, 48))
    return image


def keyed(image, colour):
    """The same picture without alpha, in which one colour stands for none."""
    flat = Image.new("RGB", image.size, colour)
    flat.paste(image, mask=image.getchannel("A"))
    return flat


def save_see_through(path, kind, hidden):
    """One picture in the ways in which files can say that some of it is transparent."""
    image = see_through(hidden)
    if kind in ("RGBA", "webp", "frame"):
        image.save(path, lossless=True)
    elif kind == "LA":
        image.convert("LA").save(path)
    elif kind == "colour key":
        keyed(image, hidden).save(path, transparency=hidden)
    elif kind == "grey key":
        keyed(image, (hidden[1],) * 3).convert("L").save(path, transparency=hidden[1])
    elif kind == "16 bits":
        deep = np.asarray(keyed(image, (7, 7, 7)).convert("L")).astype(np.uint16) * 257
        Image.fromarray(deep).save(path, transparency=7 * 257)
    elif kind == "animated":
        image.save(path, save_all=True, append_images=[Image.new("RGBA", (64, 64), "red")])
    else:
        image.quantize(8).save(path)


KINDS = ("RGBA.png", "webp.webp", "LA.png", "colour key.png", "grey key.png", "16 bits.png")


@pytest.mark.parametrize("name", [*KINDS, "palette.png", "frame.gif", "animated.gif", "animated.png"])
@pytest.mark.parametrize("hidden", [(0, 255, 0), (255, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("size", [64, 20])
def test_what_is_transparent_is_white_whatever_colour_is_hidden_there(name, hidden, size, tmp_path):
    save_see_through(tmp_path / name, name.partition(".")[0], hidden)
    grey_over("white").save(tmp_path / "plain.png")
    expected = folder.read_image(tmp_path / "plain.png", size).astype(int)
    assert np.abs(folder.read_image(tmp_path / name, size) - expected).max() <= 2


def test_a_picture_that_is_wholly_transparent_is_white(tmp_path):
    Image.new("1", (64, 64)).save(tmp_path / "bits.png", transparency=0)
    assert (folder.read_image(tmp_path / "bits.png", 8) == 255).all()


def test_what_is_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (9, 9), (0, 0, 200, 128)).save(tmp_path / "half.png")
    assert (
        np.abs(folder.read_image(tmp_path / "half.png", 9)[0, 0] - np.array([127, 127, 227])).max() <= 1
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_opaque_pictures_are_read_as_before(mode, sample, tmp_path):
    Image.fromarray(sample.images[0]).convert(mode).save(tmp_path / "x.png")
    assert np.array_equal(folder.read_image(tmp_path / "x.png", 32), sample.images[0])


def test_the_colours_of_print_are_those_of_the_screen(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg")
    assert np.abs(folder.read_image(tmp_path / "red.jpg", 8) - np.array([255, 0, 0])).max() <= 2


@pytest.mark.parametrize(
    ("bits", "shown"), [(8, 255), (10, 255), (12, 255), (14, 255), (16, 255), (15, 127), (11, 127)]
)
def test_grey_pictures_of_few_bits_in_a_file_of_16_keep_their_shades(bits, shown, tmp_path):
    values = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "deep.png")
    found = folder.read_image(tmp_path / "deep.png", 64)
    assert found.max() == shown and len(np.unique(found)) == shown + 1
    assert np.abs(found[..., 0] - values.astype(int) * shown / values.max()).max() <= 1


def write_png(path, values, colour_type, key=()):
    """A PNG file of 16 bits a channel, which Pillow can read and not write; `key` is transparent."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)),
        *([(b"tRNS", struct.pack(f">{len(key)}H", *key))] if key else []),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    raw = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        raw += struct.pack(">I", len(content)) + name + content
        raw += struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(raw)


@pytest.mark.parametrize(("channels", "colour_type"), [(2, 4), (3, 2), (4, 6)])
def test_colours_of_16_bits_are_read_and_those_of_12_refused(channels, colour_type, tmp_path):
    values = np.linspace(0, 65535, 64).astype(int)[:, None, None].repeat(64, 1).repeat(channels, 2)
    values[..., channels - 1 if channels != 3 else 3 :] = 65535
    write_png(tmp_path / "full.png", values, colour_type)
    found = folder.read_image(tmp_path / "full.png", 64)
    assert np.abs(found[..., 0] - (values[..., 0] >> 8)).max() <= 1
    write_png(tmp_path / "low.png", values >> 4, colour_type)
    with pytest.raises(
        ValueError, match=r"low.png is no readable image \(16 bits a channel, .*; save it"
    ):
        folder.read_image(tmp_path / "low.png", 64)


def test_a_transparent_colour_of_16_bits_is_white_too(tmp_path):
    values = np.full((16, 16, 3), 40_000)
    values[4:12, 4:12] = (65535, 0, 257)
    write_png(tmp_path / "key.png", values, 2, key=(65535, 0, 257))
    found = folder.read_image(tmp_path / "key.png", 16)
    assert (found[5:11, 5:11] == 255).all() and (found[0] == 40_000 >> 8).all()


# Pictures that are not square, and the files they come from

FITS = ("squeeze", "pad", "crop")


def striped(width, height):
    """Red at the ends of the longer side, green between them."""
    image = Image.new("RGB", (width, height), (0, 255, 0))
    if width > height:
        image.paste((255, 0, 0), (0, 0, width // 4, height))
        image.paste((255, 0, 0), (width - width // 4, 0, width, height))
    else:
        image.paste((255, 0, 0), (0, 0, width, height // 4))
        image.paste((255, 0, 0), (0, height - height // 4, width, height))
    return image


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (800, 400), (12, 24)])
def test_what_is_not_square_is_squeezed_padded_or_cropped(size, tmp_path):
    striped(*size).save(tmp_path / "x.png")
    turn = (lambda x: x) if size[0] > size[1] else (lambda x: x.transpose(1, 0, 2))
    read = {fit: turn(folder.read_image(tmp_path / "x.png", 32, fit)).astype(int) for fit in folder.FITS}
    assert all(image.shape == (32, 32, 3) for image in read.values())
    red, green = np.array([255, 0, 0]), np.array([0, 255, 0])
    ends, middle = [0, 1, -2, -1], slice(14, 18)
    assert (np.abs(read["crop"][16, 2:-2] - green) < 60).all()  # its ends are gone
    for fit, row in (("squeeze", 2), ("squeeze", 29), ("pad", 16)):
        assert (np.abs(read[fit][row, ends] - red) < 60).all(), fit
        assert (np.abs(read[fit][row, middle] - green) < 60).all(), fit
    assert (read["pad"][[0, 7, 24, 31]] == 128).all()


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000)])
@pytest.mark.parametrize("fit", FITS)
def test_a_picture_of_any_shape_can_be_read(size, fit, tmp_path):
    Image.new("RGB", size, (9, 9, 9)).save(tmp_path / "x.png")
    assert folder.read_image(tmp_path / "x.png", 32, fit).shape == (32, 32, 3)


@pytest.mark.parametrize("side", [7, 32, 100])
def test_a_square_picture_is_the_same_whatever_the_fit(side, sample, tmp_path):
    Image.fromarray(sample.images[3]).resize((side, side)).save(tmp_path / "x.png")
    squeezed, padded, cropped = (folder.read_image(tmp_path / "x.png", 32, fit) for fit in folder.FITS)
    assert np.array_equal(squeezed, padded) and np.array_equal(squeezed, cropped)


@pytest.mark.parametrize("fit", FITS)
def test_the_log_and_the_description_say_what_was_done_to_the_shape(fit, tmp_path, capsys):
    fill(tmp_path, "a", "b", count=10)
    for name in ("a/0.png", "b/0.png", "b/1.png", "a/1.png", "a/2.png", "b/2.png"):
        striped(30, 10).save(tmp_path / name)
    split = load_split("folder", "train", tmp_path, fit=fit)
    odd = sum(name.endswith(("0.png", "1.png", "2.png")) for name in split.files)
    printed = capsys.readouterr().out
    assert (
        f"{odd} of 16 training images are not square (up to 3.00 : 1) and are {folder.FITS[fit]}"
        in printed
    )
    assert f"--fit {fit}" not in printed and printed.count("--fit") == 2
    config = Config(dataset="folder", data=str(tmp_path), fit=fit, batch_size=8)
    for workers in (0, 2):
        loaders = make_loaders(replace(config, workers=workers))
        described = loaders.train.dataset.describe()
        assert described.endswith(f"; images that are not square are {folder.FITS[fit]}")


def test_of_square_pictures_nothing_is_said(tmp_path, capsys):
    split = load_split("folder", "train", fill(tmp_path, "a", "b", count=10))
    assert "not square" not in capsys.readouterr().out and split.prepared == ""


@pytest.mark.parametrize("parts", [("train/", "test/"), ("Training/", "Testing/"), ("", "")])
def test_every_image_knows_its_file(parts, tmp_path):
    fill(tmp_path, *(f"{part}{name}" for part in set(parts) for name in ("a", "b/deep")), count=10)
    place = tmp_path / parts[0] / "a"
    os.rename(place / "0.png", os.fsdecode(os.fsencode(place) + b"/caf\xe9\n.png"))
    seen = set()
    for split, part in zip(("train", "test"), parts, strict=True):
        loaded = load_split("folder", split, tmp_path, image_size=12)
        for name, label, image in zip(loaded.files, loaded.labels, loaded.images, strict=True):
            assert name.startswith(f"{part}{('a', 'b')[label]}/") and name.isprintable()
            if "\\" not in name:
                assert np.array_equal(folder.read_image(tmp_path / name, 12), image)
        seen |= set(loaded.files)
    assert len(seen) == (40 if parts[0] else 20)


# What fits a folder without a flag


@pytest.mark.parametrize(
    ("count", "size"),
    [(2, 2), (3, 2), (7, 4), (8, 8), (63, 8), (96, 8), (127, 8), (128, 16), (1000, 64), (4095, 256)],
)
def test_a_batch_fits_the_images_there_are(count, size):
    assert data.fitting_batch(count) == size <= count
    assert data.fitting_batch(4096) == data.fitting_batch(10**7) == 512


def test_a_folder_needs_no_flag_and_the_log_says_what_was_chosen(tmp_path, capsys):
    config = Config(dataset="folder", data=str(fill(tmp_path, "a", "b", count=50)))
    loaders = make_loaders(config)
    printed = capsys.readouterr().out
    assert "80 training + 20 test images: a 40 + 10, b 40 + 10; a fifth of each class" in printed
    assert "batches of 8 images, 10 an epoch; --batch-size takes another number" in printed
    assert "half of the training images are mirrored; --no-flip for letters" in printed
    assert [len(labels) for _, labels in loaders.train] == [8] * 10
    make_loaders(replace(config, batch_size=16, flip=False))
    printed = capsys.readouterr().out
    assert "batches of" not in printed and "mirrored" not in printed
    make_loaders(Config(dataset="cifar10-sample"))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_hundred_pictures_of_any_shape_train_test_and_predict_with_no_other_flag(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for k in range(50):
            width, height = rng.integers(5, 90, 2)
            pixels = rng.integers(120 * label, 120 * label + 100, (height, width, 3), dtype=np.uint8)
            mode = ("RGB", "L", "RGBA", "P")[k % 4]
            Image.fromarray(pixels).convert(mode).save(tmp_path / "mine" / name / f"{k}.png")
    run = str(tmp_path / "run")
    flags = f"--dataset folder --data {tmp_path / 'mine'} --epochs 2 --width 4 --lr 0.01 --output {run}"
    assert main.main(flags.split()) == 0
    printed = capsys.readouterr().out
    assert "not square" in printed and "batches of 8 images, 10 an epoch" in printed
    assert main.main(["test", run]) == 0
    assert "of 20 images" in capsys.readouterr().out
    assert main.main(["predict", run, str(tmp_path / "mine/dark/0.png")]) == 0
