import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

import models
import visualize
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
    assert titles[0] == "a\n→ b 99.0%"
    assert titles[-1].startswith("30 of 200 misclassified (15.0%)")


def test_an_image_shows_through_its_map_where_there_is_no_evidence(sample):
    image = sample.images[0]
    heat = np.zeros((32, 32), np.float32)
    heat[:16] = 1
    seen = visualize.overlay(image, heat, 0.5)
    assert (seen[16:] == image[16:]).all()
    brightest = 255 * np.array([0.988362, 0.998364, 0.644924])  # the end of inferno
    assert np.abs(seen[:16] - (image[:16] + brightest) / 2).max() <= 1
    assert (visualize.overlay(image, heat, 0) == image).all()
    assert visualize.overlay(image, np.ones((8, 8), np.float32), 1).shape == image.shape


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


def test_runs_share_a_figure_with_looks_and_legends_of_their_own_and_validation_shows():
    histories = {f"run{k}": make_history(val=k == 1) for k in range(30)}
    figure = visualize.plot_history(histories)
    solid = [line for line in figure.axes[1].lines if line.get_linestyle() == "-"]
    assert len({(line.get_color(), line.get_marker()) for line in solid}) == 30
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert len(legend) == 30
    assert legend[:2] == ["run0: test 35.00%, training 60.00%", "run1: val 40.00%, training 60.00%"]


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
    assert texts(figure) == ["Learning rate: 1.00e-02 → 1.00e-01 at epoch 1.0 → 1.00e-03"]


def test_the_confusion_matrix_keeps_classes_that_never_occur():
    predictions = Predictions(np.eye(10, dtype=np.float32)[[0, 1, 1]], np.array([0, 1, 2]))
    figure = visualize.plot_confusion_matrix(predictions, CLASSES)
    assert figure.axes[0].images[0].get_array().shape == (10, 10)
    assert len(figure.axes[0].texts) == 100


@pytest.mark.slow
@pytest.mark.parametrize(("count", "widest"), [(100, 20), (700, 41)])
def test_many_classes_fit_a_figure_without_overlap(count, widest):
    labels = np.arange(count)
    predictions = Predictions(np.eye(count, dtype=np.float32), labels)
    figure = visualize.plot_confusion_matrix(predictions, [f"class {k}" for k in labels])
    renderer = drawn(figure)
    assert max(figure.get_size_inches()) < widest  # WebP ends at 16,383 pixels
    boxes = [label.get_window_extent(renderer) for label in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))


NAMES = [f"a very long name of a class, number {k}, indeed" for k in range(9)] + ["n" * 60]


@pytest.mark.parametrize("wrong", [1, 20, 30])
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
    expected = torch.nn.functional.interpolate(expected, size=32, mode="bilinear")[:, 0]
    flat = expected.flatten(1)
    expected = (expected - flat.amin(1)[:, None, None]) / (1e-7 + flat.amax(1) - flat.amin(1))[
        :, None, None
    ]
    correlation = [
        np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(maps, expected.numpy(), strict=True)
    ]
    assert min(correlation) > 0.95  # the library scales before it resizes
    assert maps.min() >= 0 and maps.max() <= 1


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
    assert titles[0] == "#0" and titles[1].startswith("true") and titles[2].startswith("predicted")
    assert titles[1].endswith("a 1.0%") and titles[2].endswith("b 99.0%")
