import copy
import itertools
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import models
import visualize
from reporting import lettering
from training.lr_finder import LRFinderResult, suggest_lrs
from transforms import normalize
from utils import Epoch, History, Predictions
from visualize import gradcam

CLASSES = tuple("abcdefghij")


def make_predictions(sample, wrong):
    """Predictions of which the first `wrong` are wrong, each surer than the next."""
    probabilities = np.full((len(sample), 10), 0.01, np.float32)
    predicted = sample.labels.copy()
    predicted[:wrong] = (predicted[:wrong] + 1) % 10
    probabilities[np.arange(len(sample)), predicted] = np.linspace(0.99, 0.5, len(sample))
    return Predictions(probabilities, sample.labels)


def texts(figure):
    """Every title of a figure."""
    titles = [axis.get_title() for axis in figure.axes] + [figure.get_suptitle()]
    return [title for title in titles if title]


def drawn(figure):
    """Draw a figure; returns the renderer, by which its texts know their places."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def make_history(val=False):
    """Two epochs."""
    rows = [
        Epoch(
            epoch=k,
            lr=0.1,
            train_loss=2.0 / k,
            train_accuracy=0.3 * k,
            seconds=1.0,
            images_per_second=9.0,
            **({"val_loss": 1.5, "val_accuracy": 0.4} if val else {}),
            **({"test_loss": 1.6, "test_accuracy": 0.35} if not val or k == 2 else {}),
        )
        for k in (1, 2)
    ]
    return History(rows, [0.01, 0.1, 0.05, 0.001])


@pytest.mark.parametrize("count", [1, 10, 20])
def test_a_gallery_shows_as_many_mistakes_as_asked_with_truth_prediction_and_probability(sample, count):
    figure = visualize.plot_misclassified(sample.images, make_predictions(sample, 30), CLASSES, count)
    titles = texts(figure)
    assert len(titles) == count + 1
    assert titles[0] == "#0 a\n→ b 99.0%"
    assert titles[-1].startswith("30 of 200 misclassified (15.0%)")


def test_an_image_is_grey_where_there_is_no_evidence_and_coloured_where_there_is(sample):
    red = np.zeros((32, 32, 3), np.uint8)
    red[..., 0] = 200
    heat = np.zeros((32, 32), np.float32)
    heat[:16] = 0.003  # scaled by its greatest
    for image in (red, *sample.images[:3]):
        seen = visualize.overlay(image, heat, 0.5).astype(int)
        assert (np.ptp(seen[16:], axis=-1) == 0).all() and (np.ptp(seen[:16], axis=-1) > 80).all()
    assert visualize.overlay(image, np.ones((8, 8), np.float32), 1).shape == image.shape


def test_maps_that_are_compared_share_a_scale(sample):
    weak, strong = np.full((2, 32, 32), 0.002, np.float32) * [[[1]], [[7]]]
    alone, beside = (visualize.overlay(sample.images[0], weak, top=top) for top in (None, 0.014))
    assert (alone == visualize.overlay(sample.images[0], strong)).all()
    assert np.ptp(beside, axis=-1).mean() < np.ptp(alone, axis=-1).mean() / 3


def explained(monkeypatch, sample, tiny, *peaks, names=CLASSES):
    """The Grad-CAM figure of one mistake whose maps, true and predicted, have these greatest values."""
    maps = iter(np.full((1, 32, 32), peak, np.float32) for peak in peaks)
    monkeypatch.setattr(visualize, "gradcam", lambda *arguments: next(maps))
    predictions = make_predictions(sample, 1)
    return visualize.plot_gradcam(tiny, sample.images, predictions, names, layer="layer2", count=1)


def test_a_pair_of_maps_has_one_scale_whose_numbers_stand_beside_it(sample, tiny, monkeypatch):
    figure = explained(monkeypatch, sample, tiny, 0.002, 0.0139)
    _, true, predicted, bar = (axis.images[0].get_array() for axis in figure.axes)
    assert np.ptp(true, axis=-1).mean() < np.ptp(predicted, axis=-1).mean() / 3
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["0", "0.014"]
    assert np.ptp(bar[-1, 0]) == 0 and np.ptp(bar[0, 0]) > 80  # from grey at 0 to the brightest colour


@pytest.mark.parametrize("peaks", [(0.0, 0.01), (0.01, 0.02), (0.0, 0.0)])
def test_no_evidence_is_written_on_the_tile_and_explained_below(sample, tiny, monkeypatch, peaks):
    figure = explained(monkeypatch, sample, tiny, *peaks)
    shown = [text.get_text() for axis in figure.axes[1:3] for text in axis.texts]
    assert shown == ["no evidence"] * peaks.count(0)
    below = " ".join(text.get_text() for text in figure.texts)
    assert ("No evidence: at this layer nothing speaks for the class." in below) == (0 in peaks)
    assert "map has 8 x 8 places" in below


def test_tiles_are_equally_large_whatever_their_titles(sample, tiny):
    mixed = sample.take(np.arange(200).reshape(10, 20).T.ravel())  # a row of the figure: two classes
    names = ["a", "a name of a class that fills three lines of a title, or four", *CLASSES[2:]]
    predictions = make_predictions(mixed, 30)
    figure = visualize.plot_gradcam(tiny, mixed.images, predictions, names, layer="layer2")
    drawn(figure)
    tiles = [axis.get_window_extent() for axis in figure.axes if axis.get_title()]
    sizes = np.array([[tile.width, tile.height] for tile in tiles])
    assert len({title.count("\n") for title in texts(figure)}) > 2
    assert len(tiles) == 30 and np.ptp(sizes, axis=0).max() < 0.01


def test_images_predictions_and_classes_that_do_not_belong_together_are_refused(sample, tiny):
    predictions = make_predictions(sample, 9)
    for images, classes in ((sample.images[:99], CLASSES), (sample.images, CLASSES[:9])):
        with pytest.raises(ValueError, match="99 images for 200|know 10 classes, and 9"):
            visualize.plot_misclassified(images, predictions, classes)
        with pytest.raises(ValueError, match="99 images for 200|know 10 classes, and 9"):
            visualize.plot_gradcam(tiny, images, predictions, classes, layer="layer1")
    with pytest.raises(ValueError, match="know 10 classes, and 9"):
        visualize.plot_confusion_matrix(predictions, CLASSES[:9])


@pytest.mark.parametrize("histories", [{}, {"a": History()}, {"a": make_history(), "b": History()}])
def test_a_history_without_an_epoch_is_refused(histories):
    with pytest.raises(
        ValueError, match="give the history that fit_model returned, of an epoch or more"
    ):
        visualize.plot_history(histories)


def test_a_target_that_is_no_whole_number_is_refused(sample, tiny):
    images = normalize(sample.images[:2], [0.5] * 3, [0.25] * 3)
    with pytest.raises(TypeError, match="float"):
        gradcam(tiny, images, "layer1", [0.5, 1])
    array = gradcam(tiny, images.numpy(), "layer1", [0, 1])
    assert np.array_equal(array, gradcam(tiny, images, "layer1", [0, 1]))


def test_a_gallery_copes_with_no_mistakes(sample, tiny):
    predictions = make_predictions(sample, 0)
    assert texts(visualize.plot_misclassified(sample.images, predictions, CLASSES)) == [
        "0 of 200 misclassified (0.0%); the most confident mistakes"
    ]
    figure = visualize.plot_gradcam(tiny, sample.images, predictions, CLASSES, layer="layer2")
    assert texts(figure) == ["nothing is misclassified: there is no mistake to explain"]


def test_every_figure_is_a_figure_and_none_is_left_open(sample, tiny):
    import matplotlib.pyplot as plt

    predictions = make_predictions(sample, 9)
    losses = [2.3] * 20 + [1.0] * 20 + [float("nan")]
    lrs = np.logspace(-5, 0, 41).tolist()
    finder = LRFinderResult(lrs, losses, suggest_lrs(lrs, losses))
    figures = [
        visualize.plot_samples(sample.images, sample.labels, CLASSES),
        visualize.plot_history({"one": make_history(), "other": make_history(val=True)}),
        visualize.plot_lr_finder(finder, "valley"),
        visualize.plot_lr_history([0.01, 0.1, 0.05, 0.001], 2),
        visualize.plot_misclassified(sample.images, predictions, CLASSES),
        visualize.plot_confusion_matrix(predictions, CLASSES),
        visualize.plot_gradcam(tiny, sample.images, predictions, CLASSES, layer="layer1", count=3),
    ]
    for figure in figures:
        assert isinstance(figure, Figure) and figure.get_figwidth() <= 10  # the width of a notebook
        figure.canvas.draw()
    assert plt.get_fignums() == []


def test_rules_that_suggest_the_same_rate_share_a_line_of_which_none_is_hidden():
    suggestions = {"start": 0.1, "steepest": 0.1, "valley": 0.2, "minimum": 0.2}
    lrs = np.logspace(-5, 0, 41).tolist()
    figure = visualize.plot_lr_finder(
        LRFinderResult(lrs, [2.0] * 20 + [1.0] * 21, suggestions), "valley"
    )
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels[2:] == ["start,\nsteepest: 1.00e-01", "valley (used),\nminimum: 2.00e-01"]
    assert [line.get_linestyle() for line in figure.axes[0].lines[2:]] == ["--", "-"]


def test_runs_share_a_figure_with_looks_and_legends_of_their_own_and_validation_shows():
    histories = {f"run{k}": make_history(val=k == 1) for k in range(30)}
    figure = visualize.plot_history(histories)
    solid = [line for line in figure.axes[1].lines if line.get_linestyle() == "-"]
    assert len({(line.get_color(), line.get_marker()) for line in solid}) == 30
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert len(legend) == 31 and legend[-1] == "training, in the same colours"
    assert legend[:2] == ["run0: test 35.00%, training 60.00%", "run1: val 40.00%, training 60.00%"]


def ticks_of(axis):
    """The texts of the ticks of an axis that lie within its limits."""
    low, high = sorted(axis.get_view_interval())
    texts = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    return [label.get_text() for place, label in texts if low <= place <= high]


@pytest.mark.parametrize("spread", [0, 1e-7, 1e-4, 0.003, 0.04, 0.5])
@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_no_two_ticks_of_the_curves_say_the_same(spread, epochs):
    row = make_history().epochs[0]
    rows = [
        replace(row, epoch=k, train_accuracy=0.44, test_accuracy=0.44 + spread * k / epochs)
        for k in range(1, epochs + 1)
    ]
    figure = visualize.plot_history({"run": History(rows, [0.1] * epochs)})
    drawn(figure)
    for axis in figure.axes:
        for ticks in (ticks_of(axis.xaxis), ticks_of(axis.yaxis)):
            assert ticks and len(ticks) == len(set(ticks))
        assert {"1", str(epochs)} <= set(ticks_of(axis.xaxis)) or epochs > 2
    assert len(ticks_of(figure.axes[1].yaxis)) > 2


def test_a_run_of_one_epoch_shows_points_of_test_and_of_training():
    history = make_history()
    figure = visualize.plot_history({"run": History(history.epochs[:1], [0.1, 0.1])})
    for axis in figure.axes:
        assert all(line.get_marker() not in ("", "None") for line in axis.lines)
        assert ticks_of(axis.xaxis) == ["1"]
    assert [text.get_text() for text in figure.legends[0].texts][-1] == "training"


def test_a_run_that_diverged_does_not_flatten_the_others():
    diverged = make_history()
    diverged.epochs[0] = replace(diverged.epochs[0], train_loss=400.0)
    scales = [
        visualize.plot_history({str(k): one for k, one in enumerate(histories)}).axes[0].get_yscale()
        for histories in ([make_history()], [make_history(), diverged])
    ]
    assert scales == ["linear", "log"]


def test_the_rate_figure_names_its_peak():
    figure = visualize.plot_lr_history([0.01, 0.1, 0.05, 0.001], 2)
    assert texts(figure) == ["Learning rate: 1.00e-02 → 1.00e-01 at epoch 1 → 1.00e-03"]


@pytest.mark.parametrize("steps", [1, 2, 6, 98])
def test_the_rate_figure_draws_its_peak_at_the_epoch_that_it_names(steps):
    lrs = np.interp(np.arange(8 * steps), [0, 5 * steps - 1, 8 * steps], [0.01, 0.4, 0.001]).tolist()
    (axis,) = visualize.plot_lr_history(lrs, steps).axes
    x, y = axis.lines[0].get_data()
    assert (x[np.argmax(y)], x[-1]) == (5, 8) and " at epoch 5 → " in axis.get_title()


def test_a_rate_that_stays_is_not_said_to_peak():
    assert texts(visualize.plot_lr_history([0.1] * 4, 2)) == ["Learning rate: 1.00e-01 throughout"]


def test_the_confusion_matrix_says_what_its_cells_its_bar_and_its_rows_are():
    predictions = Predictions(np.eye(10, dtype=np.float32)[[0, 1, 1]], np.array([0, 1, 2]))
    axis, bar = visualize.plot_confusion_matrix(predictions, CLASSES).axes
    assert axis.get_title().endswith("number: images; colour: their share of the row")
    assert axis.get_ylabel() == "true class (number of its images)"
    assert bar.get_ylabel() == "share of the images of the true class"
    rows = [label.get_text() for label in axis.get_yticklabels()]
    assert rows[:4] == ["a (1)", "b (1)", "c (1)", "d (0)"]


def test_the_reliability_figure_has_a_point_for_each_bin_with_answers(sample):
    predictions = make_predictions(sample, 30)
    found = predictions.calibration()
    figure = visualize.plot_reliability(predictions)
    drawn(figure)
    top, low = figure.axes
    x, y = top.lines[1].get_data()
    filled = found.answers > 0
    assert x.tolist() == found.probability[filled].tolist()
    assert y.tolist() == (found.right[filled] / found.answers[filled]).tolist()
    assert sum(bar.get_height() for bar in low.patches) == 200
    assert f"{100 * found.error:.1f} points" in top.get_title()


def test_the_confusion_matrix_keeps_classes_that_never_occur():
    predictions = Predictions(np.eye(10, dtype=np.float32)[[0, 1, 1]], np.array([0, 1, 2]))
    figure = visualize.plot_confusion_matrix(predictions, CLASSES)
    assert figure.axes[0].images[0].get_array().shape == (10, 10)
    assert len(figure.axes[0].texts) == 100


@pytest.mark.slow
@pytest.mark.parametrize(("count", "widest"), [(21, 20), (100, 20), (200, 41), (700, 41)])
def test_many_classes_fit_a_figure_without_overlap(count, widest):
    labels = np.arange(count)
    predictions = Predictions(np.eye(count, dtype=np.float32), labels)
    figure = visualize.plot_confusion_matrix(predictions, [f"the class {k}" for k in labels])
    renderer = drawn(figure)
    assert max(figure.get_size_inches()) < widest  # WebP ends at 16,383 pixels
    axis = figure.axes[0]
    named = axis.get_yticklabels()[1].get_text() == "the class 1 (1)"
    assert named == (count <= 200)
    assert (f"{count} names could not be read" if not named else "over 20 classes") in axis.get_title()
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        boxes = [label.get_window_extent(renderer) for label in labels if label.get_text()]
        assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))


@pytest.fixture
def box_font(tmp_path, monkeypatch):
    """Install a font of boxes for the letters 猫 and 🐦, for one test."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "box"])
    builder.setupCharacterMap({ord("猫"): "box", ord("🐦"): "box"})
    builder.setupGlyf({".notdef": pen.glyph(), "box": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (900, 0), "box": (900, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Boxes of a Test", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "boxes.ttf")
    manager = lettering.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", list(manager.ttflist))
    found = [str(tmp_path / "boxes.ttf")]
    monkeypatch.setattr(lettering.font_manager, "findSystemFonts", lambda: found)


def figures_of(sample, tiny, names):
    """Every figure that shows names of classes."""
    predictions = make_predictions(sample, 30)
    return [
        visualize.plot_samples(sample.images, sample.labels, names),
        visualize.plot_misclassified(sample.images, predictions, names),
        visualize.plot_confusion_matrix(predictions, names),
        visualize.plot_gradcam(tiny, sample.images, predictions, names, layer="layer1"),
    ]


def shown_in(figure):
    """All texts of a figure; drawn with warnings as errors, so that no letter was missing."""
    drawn(figure)
    return " ".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.slow
def test_names_are_drawn_in_whatever_installed_font_has_their_letters(sample, tiny, box_font):
    names = ["猫", "a 🐦", "b 猫\u200d🐦\ufe0f", *CLASSES[3:]]
    for figure in [*figures_of(sample, tiny, names), visualize.plot_history({"猫": make_history()})]:
        text = shown_in(figure)
        assert "猫" in text and "apt install" not in text


@pytest.mark.slow
def test_names_that_no_font_has_become_numbers_with_a_cure_and_without_a_warning(
    sample, tiny, monkeypatch
):
    manager = lettering.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [x for x in manager.ttflist if "DejaVu" in x.name])
    monkeypatch.setattr(lettering.font_manager, "findSystemFonts", lambda: [])
    names = ["\U0001f9ff", "\u732b\U000e0001\u72ac", "esc\x1b[1m\nline", *CLASSES[3:]]
    for figure in figures_of(sample, tiny, names):
        text = shown_in(figure)
        assert "class 0" in text and "apt install" in text and "\x1b" not in text
    assert "run 0: test" in shown_in(visualize.plot_history({"\u732b": make_history()}))


NAMES = [f"a very long name of a class, number {k}, indeed" for k in range(9)] + ["n" * 60]


@pytest.mark.parametrize("wrong", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (20, 30))])
def test_long_names_lie_beside_each_other_and_within_the_figure(sample, tiny, wrong):
    predictions = make_predictions(sample, wrong)
    for figure in (
        visualize.plot_misclassified(sample.images, predictions, NAMES, 30),
        visualize.plot_gradcam(tiny, sample.images, predictions, NAMES, layer="layer1"),
    ):
        renderer = drawn(figure)
        titles = [axis.title for axis in figure.axes if axis.get_title()]
        head, *boxes = (text.get_window_extent(renderer) for text in (figure._suptitle, *titles))
        assert boxes and all(figure.bbox.fully_contains(*corner) for corner in head.corners())
        pictures = [axis.get_window_extent() for axis in figure.axes if axis.images]
        assert not any(a.overlaps(b) for a, b in itertools.combinations([*boxes, head], 2))
        assert not any(box.padded(-2).overlaps(picture) for box in boxes for picture in pictures)


@pytest.mark.slow
def test_dollars_in_names_are_drawn_and_not_read_as_mathematics(sample, tiny):
    names = ["$", "$$", "$_$", "under $5, over $10", *CLASSES[4:]]
    predictions = make_predictions(sample, 30)
    figures = [
        visualize.plot_samples(sample.images, sample.labels, names),
        visualize.plot_misclassified(sample.images, predictions, names),
        visualize.plot_confusion_matrix(predictions, names),
        visualize.plot_gradcam(tiny, sample.images, predictions, names, layer="layer1"),
        visualize.plot_history({"runs/$a$": make_history()}),
    ]
    for figure in figures:
        drawn(figure)
        found = [text for text in figure.findobj(Text) if "$" in text.get_text()]
        assert found and not any(text._preprocess_math(text.get_text())[1] for text in found)


# Grad-CAM


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("custom_resnet", {"prep": 32, "layer1": 16, "layer2": 8}),
        ("resnet18", {"conv1": 32, "bn1": 32, "layer1": 32, "layer2": 16, "layer3": 8}),
    ],
)
def test_the_layers_allowed_at_32_pixels_leave_out_the_last_stage(name, sides):
    assert visualize.cam_layers(models.make_model(name, width=8)) == sides


def test_where_one_child_holds_all_layers_its_own_are_allowed():
    inner = models.make_model("custom_resnet", width=8)
    assert visualize.cam_layers(torch.nn.Sequential(inner)) == {
        "0.prep": 32,
        "0.layer1": 16,
        "0.layer2": 8,
    }


def test_headings_of_maps_have_as_many_lines_whatever_the_probability(sample, tiny):
    figure = visualize.plot_gradcam(
        tiny, sample.images, make_predictions(sample, 30), CLASSES, layer="layer2"
    )
    heads = [axis.get_title() for axis in figure.axes if "\n" in axis.get_title()]
    assert len(heads) == 20 and {title.count("\n") for title in heads} == {2}


def test_a_map_under_5_by_5_is_refused_with_the_layers_that_are_allowed(tiny):
    images = torch.zeros(1, 3, 32, 32)
    with pytest.raises(
        ValueError, match=r"layer3 has maps of 4 x 4.*choose from prep .32 px., layer1"
    ) as e:
        gradcam(tiny, images, "layer3", [0])
    assert "layer3 (" not in str(e.value)
    assert gradcam(tiny, torch.randn(1, 3, 64, 64), "layer3", [0]).shape == (1, 64, 64)  # 8 x 8 there


@pytest.mark.parametrize(
    ("layer", "targets", "message"),
    [
        ("layer9", [0], "unknown layer 'layer9'; choose from prep"),
        ("linear", [0], "unknown layer 'linear'"),
        ("lyer2", [0], r"unknown layer 'lyer2'.*; did you mean layer2\?"),
        ("layer2", [99], "targets must be 0 to 9, not 99 to 99"),
        ("layer2", [0, 1], "2 targets for 1 images"),
    ],
)
def test_a_map_that_cannot_be_is_refused(tiny, layer, targets, message):
    with pytest.raises(ValueError, match=message):
        gradcam(tiny, torch.zeros(1, 3, 32, 32), layer, targets)


def test_explaining_no_images_gives_no_maps(tiny):
    assert gradcam(tiny, torch.zeros(0, 3, 32, 32), "layer2", []).shape == (0, 32, 32)


def test_grad_cam_leaves_the_model_as_it_was(tiny, sample):
    tiny.train().requires_grad_(False)
    before = copy.deepcopy(tiny.state_dict())
    state = torch.get_rng_state()
    gradcam(tiny, normalize(sample.images[:2]), "layer2", [0, 1])
    assert tiny.training and not any(p.requires_grad or p.grad is not None for p in tiny.parameters())
    assert not any(module._forward_hooks for module in tiny.modules())
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(dict(tiny.state_dict()), dict(before), rtol=0, atol=0)


def test_grad_cam_is_the_formula_of_the_paper(sample):
    torch.manual_seed(1)
    model = models.make_model("custom_resnet", width=8).eval()
    images, target = normalize(sample.images[:3]), [3, 5, 7]
    maps = gradcam(model, images, "layer2", target)
    kept = {}
    model.layer2.register_forward_hook(lambda module, inputs, output: kept.update(a=output))
    scores = model(images)[range(3), target].sum()
    (gradient,) = torch.autograd.grad(scores, kept["a"])
    weights = gradient.mean((2, 3), keepdim=True)
    expected = (weights * kept["a"]).sum(1, keepdim=True).relu().detach()
    expected = torch.nn.functional.interpolate(expected, size=32, mode="bilinear")[:, 0].numpy()
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-6)  # in its own units, unscaled


def test_a_map_that_is_the_same_everywhere_is_evidence():
    conv = torch.nn.Conv2d(3, 2, 3, padding=1)
    torch.nn.init.zeros_(conv.weight)
    torch.nn.init.ones_(conv.bias)
    head = torch.nn.Linear(2, 2)
    head.weight.data = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    model = torch.nn.Sequential(
        OrderedDict(stage=conv, pool=torch.nn.AdaptiveAvgPool2d(1), flat=torch.nn.Flatten(), head=head)
    )
    one, other = gradcam(model, torch.zeros(2, 3, 8, 8), "stage", [0, 1])
    assert one == pytest.approx(2 / 64) and not other.any()  # the score is 2, of 64 equal places


def test_the_maps_for_two_classes_differ(tiny, sample):
    images = normalize(sample.images[:4])
    assert not np.allclose(
        gradcam(tiny, images, "layer2", [0] * 4), gradcam(tiny, images, "layer2", [1] * 4)
    )


def test_grad_cam_figure_has_three_pictures_a_mistake(sample, tiny):
    predictions = make_predictions(sample, 5)
    figure = visualize.plot_gradcam(tiny, sample.images, predictions, CLASSES, layer="layer1", count=4)
    titles = texts(figure)
    assert len(titles) == 3 * 4 + 1
    assert titles[:3] == ["#0", "true\na\n1.0%", "predicted\nb\n99.0%"]
