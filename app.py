"""The web page: classify a picture, see where the network looks, browse its mistakes.

python app.py          the weights and the images in the repository
python app.py RUN      a run, tested on its own test images, with its curves

In Python, `from app import demo` gives the first page as a gradio object, and `make_demo` that of a run.
"""

import argparse
import functools
import html
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from training.starting import end_on_signals

if __name__ == "__main__":  # before gradio and PyTorch, which take seconds to load
    end_on_signals("app.py")

# Gradio's settings in the environment serve any file, run code, open a second server without our guard.
for name in [
    name for name in os.environ if name.startswith("GRADIO_") or name in ("SYSTEM", "SPACE_ID")
]:
    del os.environ[name]
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # else every page reports that it was started

import gradio as gr
import numpy as np
import torch
from gradio.components import Component
from gradio.data_classes import ImageData
from gradio.utils import get_upload_folder
from torch import nn

from checkpoint import read_files
from config import make_parser
from reporting.markup import figure, legend, matrix, note, picture_tag, tag, wide
from reporting.screen import off_screen
from run import predict_images, run_config, test_images
from serving import check_address, check_names, check_pillow, launch, private_uploads, serve
from sources.apart import read_apart
from sources.cifar10 import CLASSES
from sources.folder import FITS
from sources.split import Split
from training.loops import predict
from training.lr_finder import read_finder
from transforms import normalize
from utils import Predictions, get_device
from visualize import (
    cam_layers,
    gradcam,
    overlay,
    plot_confusion_matrix,
    plot_history,
    plot_lr_finder,
    plot_lr_history,
)
from weights_file import DEFAULT_WEIGHTS, load_weights

COUNTS = (6, 12, 25, 50, 100, 200)  # mistakes on one page, and as many images beside them
MOST_EXAMPLES = 20  # pictures to click
MOST_ROWS = 200  # of a confusion matrix that is a table, and not a drawing
CHUNK = 32  # images whose feature maps Grad-CAM holds at once
SIDE = 384  # of a picture under its map, pixels
ANY = -1  # no class chosen
PAIR = "(one scale for the two maps of an image)"


class Shown(NamedTuple):
    """What the page is about: a network, and what it says of some test images."""

    model: nn.Module
    card: dict
    device: torch.device
    split: Split
    predictions: Predictions
    folder: Path | None  # of the run, if there is one
    dataset: str  # that the test images are from


def open_shown(given: argparse.Namespace) -> Shown:
    """Load the network, and let it judge test images.

    A run is tested on its own test set, as in `main.py test`; weights alone on the sample in the
    repository, if they know its classes and no other data is given.

    Raises:
        ValueError, OSError: weights or data cannot be used; one line.
    """
    model, card = load_weights(given.weights)
    device, config = get_device(given.device), run_config(card, given)
    folder = Path(given.weights) if (Path(given.weights) / "history.json").is_file() else None
    own = given.data is None
    if folder is None and own and card["classes"] == list(CLASSES):
        config, own = replace(config, dataset="cifar10-sample", image_size=32), False
    split, loader = test_images(config, card, device, own)
    print(f"judging {len(split):,} test images of {config.dataset}")
    predictions = predict(model, device, loader, precision=config.precision, tta=config.tta)
    return Shown(model, card, device, split, predictions, folder, config.dataset)


def explain(
    shown: Shown, path: str | None, top: float, layer: str, target: int, opacity: float
) -> tuple[dict[str, float] | None, str]:
    """The `top` most probable classes of a picture, and where `layer` sees evidence for `target`.

    Args:
        path: of an image file, or None.
        target: a class, or `ANY`: the most probable one.

    Returns:
        Class names with probabilities, and HTML; no names where the file cannot be used.
    """
    if path is None:
        return None, note("Choose a picture, or click an example.")
    card, classes = shown.card, shown.split.classes
    picture = read_upload(path, card["image_size"], card["config"].get("fit", "crop"))
    if isinstance(picture, str):
        return None, note(picture, role="alert")
    probabilities = predict_images(shown.model, shown.device, picture.small[None], card)[0]
    best = np.argsort(-probabilities)
    answer = best[0] if target == ANY else target
    heat = evidence(shown, picture.small[None], [answer], layer)[0]
    caption = f"Evidence for {classes[answer]} at {layer}" + ("" if heat.any() else ": none")
    drawn = figure(overlay(picture.large, heat, opacity), f"{caption}\n{picture.judged}".strip())
    names = {classes[k]: float(probabilities[k]) for k in best[: int(top)]}
    return names, f'<div class="large">{drawn}{legend(opacity)}</div>'


class Picture(NamedTuple):
    """An uploaded picture: for the network, for the page, and what of it the network judges."""

    small: np.ndarray  # uint8 (image_size, image_size, 3)
    large: np.ndarray  # uint8 (SIDE, SIDE, 3)
    judged: str


@functools.lru_cache(maxsize=16)  # one decoding for all settings that are tried on a picture
def read_upload(path: str, size: int, fit: str) -> Picture | str:
    """A picture, or why the file is none, as HTML that does not name the path."""
    try:
        (small, large), facts = read_apart(path, (size, SIDE), fit)
    except ValueError as error:
        reason = str(error).partition(" is no readable image ")[2].replace(f" {path!r}", "")
        return f"This file is no readable image {html.escape(reason, quote=False)}. Choose another one."
    judged = []
    if facts["width"] != facts["height"]:
        judged.append(f"Pictures that are not square are {FITS[fit]}.")
    if facts["transparency"]:
        judged.append("What is transparent is white.")
    return Picture(small, large, " ".join(judged))


def evidence(
    shown: Shown, images: np.ndarray, targets: Sequence[int] | np.ndarray, layer: str
) -> np.ndarray:
    """Grad-CAM of uint8 images (N, H, W, 3), some at a time: float32 (N, H, W)."""
    maps = [np.zeros((0, *images.shape[1:3]), np.float32)]
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        inputs = normalize(images[part], shown.card["mean"], shown.card["std"])
        maps.append(gradcam(shown.model, inputs, layer, targets[part]))
    return np.concatenate(maps)


def browse(shown: Shown, true: int, predicted: int, layer: str, count: int) -> str:
    """Mistakes of `true` taken for `predicted`, and right answers for these classes beside them.

    Mistakes are shown under the maps of both classes; right answers have the runner-up for the second.
    """
    answers = shown.predictions
    wrong, right = choose(answers, true, predicted)
    second = np.argsort(-answers.probabilities, axis=1)[:, 1]
    pages = (
        ("Mistaken, the surest first", wrong, "predicted", answers.predicted),
        ("Right, the least sure first", right, "runner-up", second),
    )
    columns = [
        column(shown, title, found, kind, others, layer, count) for title, found, kind, others in pages
    ]
    return f'{legend(about=PAIR)}<div class="columns">{"".join(columns)}</div>'


def choose(predictions: Predictions, true: int, predicted: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the mistakes, surest first, and of the right answers, least sure first, asked for."""
    labels, answers = predictions.labels, predictions.predicted
    wrong, right = predictions.misclassified(), np.flatnonzero(labels == answers)
    right = right[np.argsort(predictions.probabilities[right].max(1), kind="stable")]
    if true != ANY:
        wrong = wrong[labels[wrong] == true]
    if predicted != ANY:
        wrong = wrong[answers[wrong] == predicted]
    if (true, predicted) != (ANY, ANY):
        right = right[np.isin(labels[right], (true, predicted))]
    return wrong, right


def column(
    shown: Shown, title: str, found: np.ndarray, kind: str, others: np.ndarray, layer: str, count: int
) -> str:
    """The first images at `found`: alone, and under the maps of the true class and of `others`."""
    chosen = found[:count]
    images, truth = shown.split.images[chosen], shown.predictions.labels[chosen]
    pairs = (("true", truth), (kind, others[chosen]))
    maps = [evidence(shown, images, answers, layer) for _, answers in pairs]
    cards = []
    for k, index in enumerate(chosen):
        cells = [figure(images[k], f"image\n#{index}")]
        for (name, answers), heats in zip(pairs, maps, strict=True):
            probability = shown.predictions.probabilities[index, answers[k]]
            caption = f"{name}\n{shown.split.classes[answers[k]]} {probability:.0%}"
            caption += "" if heats[k].any() else ", no evidence"
            top = max(heat[k].max() for heat in maps)  # one scale, so that the two can be compared
            cells.append(figure(overlay(images[k], heats[k], top=top), caption))
        cards.append(f'<div class="card">{"".join(cells)}</div>')
    head = f"<h2>{title}</h2><p>{len(chosen):,} of {len(found):,}</p>"
    return f"<section>{head}{''.join(cards) or note('There is none.')}</section>"


@off_screen()
def plots(shown: Shown) -> str:
    """The curves of a run and the confusion matrix, on no background, for light and dark."""
    found = {}
    if shown.folder:
        (history,), test = read_files(shown.folder, "history.json"), read_finder(shown.folder)
        found["Loss and accuracy"] = plot_history({shown.card["model"]: history})
        found["Learning rate"] = plot_lr_history(history.lrs, history.steps_per_epoch)
        if test and shown.card["config"]["lr"] is None:
            found["Range test"] = plot_lr_finder(test, shown.card["config"]["lr_rule"])
    parts = [] if found else [note("These weights came without their run: there are no curves.")]
    few = len(shown.split.classes) <= MOST_ROWS
    if not few:
        found["Confusion matrix"] = plot_confusion_matrix(shown.predictions, shown.split.classes)
    for name, plot in found.items():
        buffer = io.BytesIO()
        plot.savefig(buffer, format="webp", dpi=150, transparent=True)
        most = 88 * plot.get_figwidth()  # px, so that letters are of one size
        least = most if most > 880 else 0  # a wide one is scrolled, not shrunk
        parts.append(wide(name, tag(buffer, name), f"--most: {most:.0f}px; --least: {least:.0f}px"))
    return "".join(parts) + (matrix(shown.predictions, shown.split.classes) if few else "")


def headline(shown: Shown) -> str:
    """What the page is about, in two lines."""
    size = sum(p.numel() for p in shown.model.parameters())
    right = f"right on {shown.predictions.accuracy:.2%} of {len(shown.split):,} test images"
    if shown.dataset == "cifar10-sample":
        right += " (a sample: on all 10,000 it may differ)"
    return f"<h1>What {html.escape(shown.card['model'])} sees</h1><p>{size:,} parameters, {right}</p>"


def make_page(shown: Shown) -> gr.Blocks:
    """The page: one tab for pictures, one for the network's mistakes, one for its run.

    Raises:
        ValueError: a file of the run is damaged.
    """
    drawn = plots(shown)
    with gr.Blocks(title="What it sees", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(headline(shown), elem_classes="headline")
        with gr.Tab("A picture"):
            add_picture(shown, page)
        with gr.Tab("Mistakes"):
            add_mistakes(shown, page)
        with gr.Tab("The run"):
            gr.HTML(drawn)
    page.queue(max_size=16, default_concurrency_limit=1)
    return page


def add_picture(shown: Shown, page: gr.Blocks) -> None:
    """A picture, Grad-CAM over it, and its most probable classes; the style sheet places them."""
    most = len(shown.split.classes)
    images, names = examples(shown.split)
    form = {"format": "png", "sources": ["upload", "clipboard"], "buttons": []}
    with gr.Row(elem_id="desk"):
        picture = gr.Image(images[0], label="Picture", elem_id="picture", **form)
        add_examples(images, names, picture)
        seen = gr.HTML(elem_id="map")
        with gr.Column(elem_id="answer"):
            label = gr.Label(label="Prediction")
            layer, target = layer_choice(shown), class_choice(shown, "Evidence for", "most probable")
            opacity = gr.Slider(0, 1, 0.7, step=0.05, label="Opacity", buttons=[])
            tops = sorted({min(top, most) for top in (1, 2, 3, 5, 10, 20)})
            top = gr.Dropdown(tops, value=min(5, most), label="Classes to name", filterable=False)
    picture.preprocess = uploaded
    opacity.preprocess = lambda value: float(np.clip(value or 0, 0, 1))  # what is typed is not refused
    inputs = [picture, top, layer, target, opacity]
    answer_to(page, functools.partial(explain, shown), inputs, [label, seen])


def examples(split: Split) -> tuple[np.ndarray, list[str]]:
    """The first image of every class, or of classes spread over all of them, and their names."""
    classes, firsts = np.unique(split.labels, return_index=True)
    spread = np.linspace(0, len(classes) - 1, min(len(classes), MOST_EXAMPLES)).round().astype(int)
    return split.images[firsts[spread]], [split.classes[k] for k in classes[spread]]


def add_examples(images: np.ndarray, names: Sequence[str], picture: gr.Image) -> None:
    """Buttons with names that put an image in the place of the picture."""
    buttons = "".join(
        f'<button type="button" value="{k}">{picture_tag(image, "")}'
        f"<span>{html.escape(name)}</span></button>"
        for k, (image, name) in enumerate(zip(images, names, strict=True))
    )
    listen = """element.addEventListener("click", event => {
        const button = event.target.closest("button");
        if (button) trigger("select", {index: Number(button.value)});
    })"""
    group = f"<h2>Examples</h2><div>{buttons}</div>"
    chosen = gr.HTML(group, js_on_load=listen, elem_id="examples")

    def pick(event: gr.EventData) -> np.ndarray:
        return images[int(event.index) % len(images)]

    chosen.select(pick, None, picture, api_visibility="private")


def add_mistakes(shown: Shown, page: gr.Blocks) -> None:
    """Mistakes and right answers, chosen by class."""
    with gr.Row():
        true = class_choice(shown, "True class", "any")
        predicted = class_choice(shown, "Predicted class", "any")
        layer = layer_choice(shown)
        count = gr.Dropdown(list(COUNTS), value=COUNTS[0], label="How many", filterable=False)
    answer_to(page, functools.partial(browse, shown), [true, predicted, layer, count], gr.HTML())


def answer_to(
    page: gr.Blocks,
    function: Callable[..., Any],
    inputs: list[Component],
    outputs: Component | list[Component],
) -> None:
    """Call a function when the page opens and when an input changes; of many changes the last counts."""
    changes = [page.load, *(item.change for item in inputs)]
    gr.on(changes, function, inputs, outputs, api_visibility="private", trigger_mode="always_last")


def uploaded(upload: ImageData | None) -> str | None:
    """The path of an uploaded picture, which gradio would open whatever its format and size.

    Raises:
        gr.Error: the request names another file of this machine; gradio 6.31 lets one without `meta` by.
    """
    if upload is None:
        return None
    path = Path(upload.path or "").resolve()
    if not (path.is_file() and path.is_relative_to(Path(get_upload_folder()).resolve())):
        raise gr.Error("this is no uploaded file", print_exception=False)
    return upload.path


def layer_choice(shown: Shown) -> gr.Dropdown:
    """The layers whose maps are large enough for Grad-CAM, the deepest first chosen."""
    layers = cam_layers(shown.model, shown.card["image_size"])
    names = [(f"{name}, {side} px", name) for name, side in layers.items()]
    return gr.Dropdown(names, value=names[-1][1], label="Layer", filterable=False)


def class_choice(shown: Shown, label: str, neutral: str) -> gr.Dropdown:
    """The classes, by number, after a neutral choice."""
    names = [(name, k) for k, name in enumerate(shown.split.classes)]
    return gr.Dropdown([(neutral, ANY), *names], label=label)


def make_demo(
    weights: str = DEFAULT_WEIGHTS, data: str | None = None, device: str = "auto"
) -> gr.Blocks:
    """The page of some weights; its `launch` is `serving.launch`, which keeps it private and guarded.

    Args:
        weights: run folder or weights file.
        data: folder of the run's dataset; None: the run's.
        device: "cpu", "cuda", "mps" or "auto".

    Raises:
        ValueError, OSError: weights or data cannot be used; one line.
    """
    check_pillow()
    private_uploads()
    given = argparse.Namespace(weights=weights, data=data, device=device, precision=None)
    page = make_page(open_shown(given))
    page.launch = functools.partial(launch, page)
    return page


def __getattr__(name: str) -> gr.Blocks:
    """`demo`, made when it is first asked for: importing loads no network."""
    if name != "demo":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = page = make_demo()
    return page


def main(argv: list[str] | None = None) -> int:
    """Open the page; 2 and one line on stderr where that cannot be."""
    parser = make_parser("app.py", __doc__)
    parser.add_argument("weights", nargs="?", default=DEFAULT_WEIGHTS, help="run folder or weights file")
    parser.add_argument("--data", help="folder of the run's dataset (default: the run's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (default: auto)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: anyone in the network may use it")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="a public address, for up to a week")
    for flag, value, meaning in (
        ("--allow-host", "NAME", "a further name of the page, as behind a proxy; may be repeated"),
        ("--allow-frame", "ORIGIN", "a site that may frame the page, as https://huggingface.co"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=value, help=meaning)
    parser.set_defaults(precision=None)
    given = parser.parse_args(argv)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)  # uploads are removed
        check_pillow()
        check_address(given.host, given.port)
        check_names(given.allow_host, given.allow_frame)
        allowed = {"allowed_hosts": given.allow_host, "allowed_frames": given.allow_frame}
        private_uploads()
        serve(make_page(open_shown(given)), given.host, given.port, share=given.share, **allowed)
    except (ValueError, OSError) as error:
        print(f"app.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the page was open
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
