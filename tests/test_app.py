import argparse
import html
import re
import shutil
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main
import weights_file
from config import Config
from reporting import markup as markup_of
from sources import cifar10
from sources.folder import FITS, read_image
from sources.split import Split
from utils import Predictions

pytest.importorskip("gradio", reason="the page is an extra: requirements-app.txt")

import app
import serving

ROOT = Path(__file__).parent.parent
SMOKE = "--dataset cifar10-sample --width 4 --batch-size 256 --epochs 1 --max-train-batches 3 --lr 0.01"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, unreported):
    """A run of three steps."""
    folder = tmp_path_factory.mktemp("page") / "run"
    assert main.main([*SMOKE.split(), "--precision", "fp32", "--output", str(folder)]) == 0
    return folder


def given(weights, **others):
    """Flags as the command line reads them."""
    common = {"weights": str(weights), "data": None, "device": "cpu", "precision": None}
    return argparse.Namespace(**common | others)


@pytest.fixture(scope="module")
def shown(folder):
    return app.open_shown(given(folder))


@pytest.fixture
def picture(tmp_path, sample):
    """A photograph as people have them: no square, not small."""
    path = tmp_path / "photo.jpg"
    Image.fromarray(sample.images[70]).resize((160, 120)).save(path)
    return str(path)


def texts(markup):
    """The captions of some HTML."""
    return [html.unescape(text) for text in re.findall("<figcaption>(.*?)</figcaption>", markup, re.S)]


def test_a_picture_gets_the_classes_that_the_command_line_gives_it(shown, folder, picture, capsys):
    label, _ = app.explain(shown, picture, 3, "layer1", app.ANY, 0.5)
    assert main.main(["predict", str(folder), picture, "--device", "cpu"]) == 0
    said = ", ".join(f"{name} {probability:.1%}" for name, probability in label.items())
    assert capsys.readouterr().out == f"{picture}: {said}\n"


@pytest.mark.parametrize("top", [1, 10])
def test_as_many_classes_are_named_as_asked(shown, picture, top):
    label, _ = app.explain(shown, picture, top, "layer1", app.ANY, 0.5)
    assert len(label) == top
    assert list(label.values()) == sorted(label.values(), reverse=True)


def test_the_map_changes_with_layer_class_and_opacity_and_says_what_it_shows(shown, picture):
    pages = {
        choice: app.explain(shown, picture, 1, *choice)[1]
        for choice in (("layer1", 3, 0.5), ("layer2", 3, 0.5), ("layer1", 5, 0.5), ("layer1", 3, 0.9))
    }
    assert len(set(pages.values())) == 4
    assert texts(pages["layer2", 3, 0.5])[0].startswith("Evidence for cat at layer2")
    best = next(iter(app.explain(shown, picture, 1, "layer1", app.ANY, 0.5)[0]))
    assert f"Evidence for {best} " in app.explain(shown, picture, 1, "layer1", app.ANY, 0.5)[1]


def test_no_picture_is_no_error(shown):
    label, markup = app.explain(shown, None, 3, "layer1", app.ANY, 0.5)
    assert label is None and "Choose a picture" in markup


def png_header(width, height):
    """A PNG that says it has so many pixels, and has none."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


HOSTILE = {
    "text": b"<script>alert(1)</script>",
    "vector": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "bomb": png_header(60_000, 60_000),
    "large": png_header(13_000, 13_000),
    "cut": png_header(32, 32),
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_without_its_path_or_a_map(shown, tmp_path, name):
    path = tmp_path / "photo.png"
    path.write_bytes(HOSTILE[name])
    label, markup = app.explain(shown, str(path), 3, "layer1", app.ANY, 0.5)
    assert label is None and "<img" not in markup
    text = re.fullmatch('<p class="note" role="alert">(.*)</p>', markup)[1]
    assert text.startswith("This file is no readable image (") and text.count("his file") == 1
    assert str(tmp_path) not in text and "\n" not in text and "<" not in text


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
@pytest.mark.parametrize("size", [(60, 60), (600, 200), (200, 600)])
def test_what_of_a_picture_is_judged_is_said_under_its_map(shown, tmp_path, mode, size, fit):
    card = shown.card | {"config": shown.card["config"] | {"fit": fit}}
    Image.new(mode, size).save(tmp_path / "photo.png")
    _, markup = app.explain(shown._replace(card=card), str(tmp_path / "photo.png"), 3, "layer1", 0, 0.5)
    said = "\n".join(texts(markup)[0].split("\n")[1:])
    assert ("What is transparent is white." in said) == (mode in ("RGBA", "LA"))
    assert (f"Pictures that are not square are {FITS[fit]}." in said) == (size != (60, 60))


@pytest.mark.parametrize("fit", FITS)
def test_a_picture_is_judged_over_white_and_in_the_square_that_the_network_learned(tmp_path, fit):
    for name, color in (("clear", (0, 0, 0, 0)), ("white", (255, 255, 255, 255))):
        image = Image.new("RGBA", (300, 100), color)
        image.paste((200, 60, 40, 255), (120, 20, 220, 80))
        image.save(tmp_path / f"{name}.png")
    clear, white = (
        app.read_upload(str(tmp_path / f"{name}.png"), 32, fit) for name in ("clear", "white")
    )
    for one, other, side in zip(clear[:2], white[:2], (32, app.SIDE), strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, read_image(tmp_path / "clear.png", side, fit))


@pytest.mark.parametrize("fit", [None, *FITS])
def test_a_wide_picture_gets_the_classes_that_the_command_line_gives_it(
    shown, tmp_path, sample, capsys, fit
):
    config = {name: value for name, value in shown.card["config"].items() if name != "fit"}
    card = shown.card | {"config": config | ({"fit": fit} if fit else {})}
    weights_file.save_weights(tmp_path / "w.safetensors", shown.model, card)
    Image.fromarray(np.concatenate(sample.images[[0, 70, 140]], axis=1)).save(tmp_path / "wide.png")
    label, _ = app.explain(shown._replace(card=card), str(tmp_path / "wide.png"), 3, "layer1", 0, 0.5)
    assert main.main(["predict", *(str(tmp_path / name) for name in ("w.safetensors", "wide.png"))]) == 0
    said = ", ".join(f"{name} {probability:.1%}" for name, probability in label.items())
    assert capsys.readouterr().out.endswith(f"wide.png: {said}\n")


def test_an_upload_is_decoded_once_whatever_is_then_chosen(shown, picture, monkeypatch):
    read, paths = app.read_apart, []
    monkeypatch.setattr(app, "read_apart", lambda *given: paths.append(given[0]) or read(*given))
    for choice in (("layer1", 3, 0.5), ("layer2", 3, 0.5), ("layer1", 5, 0.1)):
        app.explain(shown, picture, 1, *choice)
    assert paths == [picture]


@pytest.mark.parametrize("count", [2, 10, 100, 1000])
def test_examples_are_of_as_many_classes_as_there_is_room_for_spread_over_all(sample, count):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(count), 3))
    images = np.broadcast_to(labels[:, None, None, None] // 4, (3 * count, 8, 8, 3)).astype(np.uint8)
    examples, names = app.examples(Split(images, labels, tuple(f"class {k}" for k in range(count))))
    chosen = [int(name.removeprefix("class ")) for name in names]
    assert len(set(chosen)) == len(examples) == min(count, app.MOST_EXAMPLES)
    assert chosen[0] == 0 and chosen[-1] == count - 1 and chosen == sorted(chosen)
    np.testing.assert_array_equal(examples[:, 0, 0, 0], [k // 4 for k in chosen])


def test_a_class_without_a_test_image_has_no_example():
    split = Split(np.zeros((2, 8, 8, 3), np.uint8), np.array([2, 0]), ("ant", "bee", "cow"))
    assert app.examples(split)[1] == ["ant", "cow"]


def test_the_head_says_where_the_accuracy_is_that_of_a_sample(shown):
    assert "of 1,000 test images (a sample: on all 10,000 it may differ)" in app.headline(shown)
    assert "sample" not in app.headline(shown._replace(dataset="cifar10"))


@pytest.mark.parametrize("count", [2, 10, 100])
def test_the_confusion_matrix_is_a_table_with_named_rows_and_columns(count):
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(0, count, (2, 4 * count))
    predictions = Predictions(np.eye(count)[answers], labels)
    markup = markup_of.matrix(predictions, [f"<{k}>" for k in range(count)])
    assert "<0>" not in markup and markup.count("&lt;0&gt;") == 2
    rows = re.findall('<th scope="row">(.*?)</th>(.*?)</tr>', markup)
    columns = re.findall('<th scope="col"><span>(.*?)</span>', markup)
    assert [name for name, _ in rows] == columns == [f"&lt;{k}&gt;" for k in range(count)]
    counts = np.array([re.findall(r"<td[^>]*>([\d,]+)</td>", cells) for _, cells in rows], int)
    expected = np.zeros((count, count), int)
    np.add.at(expected, (labels, answers), 1)
    np.testing.assert_array_equal(counts, expected)


def test_the_legend_shows_the_colours_of_the_maps_at_their_opacity():
    bars = [markup_of.legend(opacity) for opacity in (0.2, 0.75)]
    assert bars[0] != bars[1] and all("no evidence <img" in bar for bar in bars)


def test_help_keeps_its_line_breaks(capsys):
    with pytest.raises(SystemExit):
        app.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert "python app.py          the weights and the images in the repository" in lines
    assert "python app.py RUN      a run, tested on its own test images, with its curves" in lines


def test_choosing_by_class_finds_mistakes_of_the_pair_and_right_answers_of_both():
    labels = np.array([0, 0, 0, 1, 1, 2])
    answers = np.array([0, 1, 2, 1, 0, 2])
    probabilities = np.full((6, 3), 0.01)
    probabilities[np.arange(6), answers] = [0.6, 0.7, 0.9, 0.5, 0.8, 0.4]
    predictions = Predictions(probabilities, labels)
    found = {
        pair: tuple(indices.tolist() for indices in app.choose(predictions, *pair))
        for pair in ((app.ANY, app.ANY), (0, app.ANY), (app.ANY, 0), (0, 1), (2, 1))
    }
    assert found == {
        (app.ANY, app.ANY): ([2, 4, 1], [5, 3, 0]),
        (0, app.ANY): ([2, 1], [0]),
        (app.ANY, 0): ([4], [0]),
        (0, 1): ([1], [3, 0]),
        (2, 1): ([], [5, 3]),
    }


def test_mistakes_are_shown_beside_right_answers_each_under_two_maps(shown):
    captions = texts(app.browse(shown, app.ANY, app.ANY, "layer1", 2))
    kinds = [caption.split("\n")[0] for caption in captions]
    assert kinds == ["image", "true", "predicted"] * 2 + ["image", "true", "runner-up"] * 2
    index = shown.predictions.misclassified()[0]
    label, answer = shown.predictions.labels[index], shown.predictions.predicted[index]
    assert captions[0] == f"image\n#{index}"
    assert captions[1].startswith(f"true\n{cifar10.CLASSES[label]} ")
    sure = shown.predictions.probabilities[index, answer]
    assert captions[2].startswith(f"predicted\n{cifar10.CLASSES[answer]} {sure:.0%}")


def test_more_mistakes_than_grad_cam_takes_at_once_get_the_same_maps(shown, monkeypatch):
    whole = app.browse(shown, app.ANY, app.ANY, "layer1", 5)
    monkeypatch.setattr(app, "CHUNK", 2)
    assert app.browse(shown, app.ANY, app.ANY, "layer1", 5) == whole


def test_a_pair_of_classes_without_mistakes_is_no_error(shown):
    assert "There is none." in app.browse(shown, 3, 3, "layer1", 5)


def test_names_from_a_file_are_text_on_the_page_and_not_markup(shown):
    evil = tuple(f"<script>{k}</script>" for k in range(10))
    card = shown.card | {"model": "<b>"}
    evil = shown._replace(card=card, split=Split(shown.split.images, shown.split.labels, evil))
    markup = app.browse(evil, app.ANY, app.ANY, "layer1", 1) + app.headline(evil)
    assert "<script" not in markup and "<b>" not in markup and "&lt;script" in markup


def test_the_page_of_a_run_has_its_curves_and_that_of_weights_alone_says_why_not(shown, tmp_path):
    assert app.plots(shown).count("<img") == 2  # its rate was given: no range test
    assert app.plots(shown).count("<table") == 1
    card = shown.card | {"config": shown.card["config"] | {"dataset": "cifar10", "data": "nowhere"}}
    weights_file.save_weights(tmp_path / "alone.safetensors", shown.model, card)
    alone = app.open_shown(given(tmp_path / "alone.safetensors"))
    assert alone.folder is None and len(alone.split) == 1000
    assert app.plots(alone).count("<img") == 0 and "no curves" in app.plots(alone)


def test_the_page_opens_on_the_weights_and_the_sample_of_the_repository():
    opened = app.open_shown(given("custom_resnet"))
    assert opened.folder is None and len(opened.split) == 1000
    assert opened.predictions.accuracy > 0.9


@pytest.mark.slow
def test_a_run_on_one_s_own_images_is_shown_like_any_other(tmp_path, sample):
    for k in range(40):
        (tmp_path / "images" / f"kind <{k % 2}>").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(sample.images[k]).resize((50 + k, 60))
        image.save(tmp_path / "images" / f"kind <{k % 2}>" / f"{k}.png")
    flags = f"--dataset folder --data {tmp_path / 'images'} --image-size 48 --batch-size 16 --width 4"
    flags += f" --epochs 1 --lr 0.01 --precision fp32 --output {tmp_path / 'run'}"
    assert main.main(flags.split()) == 0
    shown = app.open_shown(given(tmp_path / "run"))
    assert shown.split.images.shape == (8, 48, 48, 3)
    label, markup = app.explain(shown, str(tmp_path / "images/kind <1>/1.png"), 9, "layer2", 1, 0.5)
    assert set(label) == {"kind <0>", "kind <1>"} and "kind &lt;1&gt; at layer2" in markup
    cards = len(texts(app.browse(shown, app.ANY, app.ANY, "layer2", 8))) // 3
    assert cards == 8 and app.plots(shown).count("<img") == 2


def test_what_cannot_be_shown_ends_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.setattr(app, "serve", lambda *_, **__: pytest.fail("the page was opened"))
    assert app.main([str(tmp_path / "none")]) == 2
    card = {"model": "custom_resnet", "options": {"width": 4}, "classes": list("abcdefghij")}
    card |= {"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 32}
    card |= {"config": Config(dataset="cifar10-sample", width=4).identity}
    weights_file.save_weights(tmp_path / "w.safetensors", tiny, card)
    assert app.main([str(tmp_path / "w.safetensors")]) == 2
    monkeypatch.setattr(serving.PIL, "__version__", "12.3.0")
    assert app.main([str(tmp_path / "none")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("app.py: ") for line in lines)
    assert "there is no weights file" in lines[0]
    assert "the weights know" in lines[1] and "pip install --no-deps 'pillow>=13'" in lines[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port 99999", "port must be 1 to 65535, not 99999"),
        ("--port 0", "port must be 1 to 65535, not 0"),
        ("--host ", ", port any: "),
        ("--host no.such.host.invalid", "no.such.host.invalid, port any: "),
        ("--port {}", "Address already in use"),
        (
            "--allow-host https://page.example",
            "a name alone, as page.example is, not 'https://page.example'",
        ),
        ("--allow-host page.example:80", "a name alone, as page.example is, not 'page.example:80'"),
        ("--allow-host *", "a name alone, as page.example is, not '*'"),
        ("--allow-host a.example --allow-host ", "a name alone, as page.example is, not ''"),
        ("--allow-frame huggingface.co", "as https://huggingface.co is, not 'huggingface.co'"),
        ("--allow-frame https://a.example/", "as https://huggingface.co is, not 'https://a.example/'"),
        ("--allow-frame https://*.example", "as https://huggingface.co is, not 'https://*.example'"),
        ("--allow-frame *", "as https://huggingface.co is, not '*'"),
        ("--allow-frame https://a.example;x", "as https://huggingface.co is, not 'https://a.example;x'"),
    ],
)
def test_what_the_page_cannot_be_served_as_is_one_line(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(app, "serve", lambda *_, **__: pytest.fail("the page was opened"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert app.main(flags.format(taken.getsockname()[1]).split(" ")) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    "content", ["{}", '{"lrs": 1, "losses": [1], "suggestions": {}}', "[" * 100_000]
)
@pytest.mark.parametrize("name", ["lr_finder.json", "history.json"])
def test_a_damaged_run_is_refused_by_the_name_of_its_file(
    folder, tmp_path, monkeypatch, capsys, name, content
):
    monkeypatch.setattr(app, "serve", lambda *_, **__: pytest.fail("the page was opened"))
    run = shutil.copytree(folder, tmp_path / "run")
    (run / name).write_text(content)
    assert app.main([str(run)]) == 2
    assert f"{name} is not what a run writes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("localhost", True),
        ("LocalHost:7860", True),
        ("page.example:443", True),
        ("127.0.0.1:7860", True),
        ("192.168.0.7", True),
        ("[::1]:7860", True),
        ("[::1]", True),
        ("", False),
        (":7860", False),
        ("attacker.example", False),
        ("attackerlocalhost", False),
        ("attacker.page.example", False),
        ("page.example.attacker.example", False),
        ("localhost.attacker.example:7860", False),
        ("127.0.0.1.attacker.example", False),
        ("page.example:x", False),
    ],
)
def test_a_page_answers_to_numbers_and_to_its_own_names_alone(host, known):
    assert serving.is_known(host, {"localhost", "page.example"}) == known


def test_a_name_that_the_module_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'app' has no attribute 'page'"):
        app.page  # noqa: B018
