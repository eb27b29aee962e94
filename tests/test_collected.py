"""Figures take what people have: loaders, predictions, arrays and lists, in any order."""

import albumentations as A
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import main
import visualize
from config import Config
from data import make_loader
from transforms import CIFAR10_MEAN, CIFAR10_STD, denormalize, normalize, train_transform
from transforms import test_transform as evaluation_transform
from utils import Predictions

CPU = torch.device("cpu")


@pytest.fixture
def loader(sample):
    return make_loader(sample, evaluation_transform(), "cpu", Config(batch_size=50))


@pytest.fixture
def predictions(tiny, loader):
    return main.predict(tiny, CPU, loader, precision="fp32")


def texts(figure):
    """Every title of a figure."""
    titles = [axis.get_title() for axis in figure.axes] + [figure.get_suptitle()]
    return [title for title in titles if title]


def pixels(figure):
    """The pictures of a figure."""
    return [image.get_array() for axis in figure.axes for image in axis.images]


def collected(tiny, sample, form):
    """The mistakes of a network as people collect them in a loop of their own."""
    images, labels = normalize(sample.images), torch.from_numpy(sample.labels)
    with torch.inference_mode():
        answers = tiny.eval()(images).argmax(1, keepdim=True)
    return [
        form(image, label, answer)
        for image, label, answer in zip(images, labels, answers, strict=True)
        if label != answer
    ]


FORMS = {
    "tensors": lambda i, t, p: (i, t, p),
    "numbers": lambda i, t, p: [i.numpy(), t.item(), p.item()],
    "batches of one": lambda i, t, p: (i[None], t[None], p[None]),
    "pictures": lambda i, t, p: (denormalize(i), t.item(), p.item()),
    "from 0 to 1": lambda i, t, p: (denormalize(i) / 255, t.item(), p.item()),
    "names": lambda i, t, p: (i, "abcdefghij"[t], "abcdefghij"[p]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_list_of_mistakes_is_shown_with_its_own_pictures(form, tiny, sample):
    mistakes = collected(tiny, sample, FORMS[form])
    figure = visualize.plot_misclassified(mistakes, list("abcdefghij"), num_images=6)
    titles = texts(figure)
    assert len(titles) == 7 and titles[-1] == f"{len(mistakes)} misclassified"
    first = collected(tiny, sample, FORMS["numbers"])[0]
    assert titles[0] == f"#0 {'abcdefghij'[first[1]]}\n→ {'abcdefghij'[first[2]]}"
    expected = collected(tiny, sample, FORMS["pictures"])
    assert all(
        (abs(a - b.astype(int)) <= 1).all() for a, (b, *_) in zip(pixels(figure), expected, strict=False)
    )


def arrays(predictions):
    return predictions.images, predictions.labels, predictions.predicted


WAYS = {
    "predictions": lambda m, b, p, c: (p,),
    "predictions, classes": lambda m, b, p, c: (p, c),
    "images, predictions, classes": lambda m, b, p, c: (p.images, p, c),
    "model, device, loader, classes": lambda m, b, p, c: (m, CPU, b, c),
    "model, loader, classes, device": lambda m, b, p, c: (m, b, c, "cpu"),
    "model, loader": lambda m, b, p, c: (m, b),
    "model, dataset": lambda m, b, p, c: (m, b.dataset),
    "arrays": lambda m, b, p, c: (*arrays(p), c),
    "lists": lambda m, b, p, c: (*map(list, arrays(p)), c),
    "tensors": lambda m, b, p, c: (*map(torch.from_numpy, arrays(p)), c),
    "names in an array": lambda m, b, p, c: (p, np.array(c)),
    "probabilities": lambda m, b, p, c: (p.images, p.labels, p.probabilities, c),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_give_answers_makes_the_same_numbers_and_figures(way, tiny, loader, predictions):
    given = WAYS[way](tiny, loader, predictions, loader.dataset.classes)
    assert visualize.class_accuracy(*given) == visualize.class_accuracy(predictions)
    matrix = visualize.plot_confusion_matrix(*given).axes[0].images[0].get_array()
    np.testing.assert_allclose(np.diag(matrix), list(visualize.class_accuracy(predictions).values()))
    figure = visualize.plot_misclassified(*given, 4)
    mistakes = predictions.misclassified()
    assert texts(figure)[-1].startswith(f"{len(mistakes)} of 200 misclassified")
    shown, wrong = pixels(figure), predictions.images[mistakes]
    assert {x.tobytes() for x in shown} <= {x.tobytes() for x in wrong} and len(shown) == 4


@pytest.mark.parametrize("way", ["predictions", "arrays"])
def test_grad_cam_takes_the_same(way, tiny, loader, predictions):
    given = WAYS[way](tiny, loader, predictions, loader.dataset.classes)
    assert len(texts(visualize.plot_gradcam(tiny, *given, layer="layer2", count=1))) == 4


def test_accuracy_of_each_class_is_that_of_scikit_learn(predictions, loader):
    from sklearn.metrics import recall_score

    found = visualize.class_accuracy(predictions, loader.dataset.classes)
    expected = recall_score(predictions.labels, predictions.predicted, average=None)
    assert list(found.values()) == pytest.approx(expected.tolist()) and list(found)[3] == "cat"
    axis = visualize.plot_class_accuracy(predictions).axes[0]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(expected.tolist())


def test_a_class_without_an_image_has_no_accuracy(predictions):
    part = Predictions(predictions.probabilities[:40], predictions.labels[:40])
    found = visualize.class_accuracy(part, list("abcdefghij"))
    assert np.isnan(found["j"]) and not np.isnan(found["a"])
    texts(visualize.plot_class_accuracy(part, list("abcdefghij")))


def test_samples_stand_class_by_class_and_are_counted(sample, loader):
    shuffled = DataLoader(
        TensorDataset(normalize(sample.images), torch.from_numpy(sample.labels)), 64, True
    )
    for given in ((loader,), (loader.dataset,), (shuffled,), (sample.images, sample.labels)):
        figure = visualize.plot_samples_by_class(*given, each=3)
        rows = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
        assert len(rows) == 10 and all("(20)" in row for row in rows)
        shown = [image.tobytes() for image in pixels(figure)]
        place = {image.tobytes(): k for k, image in enumerate(sample.images)}
        assert [sample.labels[place[image]] for image in shown] == np.repeat(range(10), 3).tolist()
        assert list(visualize.class_counts(*given).values()) == [20] * 10
    assert visualize.class_counts(loader)["cat"] == 20
    assert texts(visualize.plot_samples(loader))[:2] == ["airplane", "airplane"]


@pytest.mark.parametrize("right", [False, True])
def test_grad_cam_of_right_answers_explains_the_answer_and_the_class_that_comes_second(
    right, tiny, predictions
):
    figure = visualize.plot_gradcam(tiny, predictions, layer="layer2", right=right, count=3)
    titles = texts(figure)
    kinds = ("right", "second") if right else ("true", "predicted")
    assert [title.partition("\n")[0] for title in titles[1:3]] == list(kinds)
    index = int(titles[0][1:])
    assert (predictions.predicted[index] == predictions.labels[index]) is np.bool_(right)
    if right:
        second = predictions.classes[np.argsort(-predictions.probabilities[index])[1]]
        assert titles[2].split("\n")[1].startswith(second)


def test_grad_cam_of_a_list_of_right_answers_asks_the_model_for_the_second(tiny, sample, predictions):
    right = np.flatnonzero(predictions.predicted == predictions.labels)[:4]
    given = [
        (normalize(sample.images[k : k + 1])[0], predictions.labels[k], predictions.labels[k])
        for k in right
    ]
    titles = texts(visualize.plot_gradcam(tiny, given, predictions.classes, layer="layer2", right=True))
    assert len(titles) == 3 * len(right) + 1 and "%" in titles[1]


def test_several_layers_stand_side_by_side(tiny, predictions):
    figure = visualize.plot_gradcam_layers(tiny, predictions, count=2)
    assert texts(figure)[:4] == ["image", "prep", "layer1", "layer2"]
    assert len(pixels(figure)) == 8
    two = visualize.plot_gradcam_layers(
        tiny, predictions, layers=[tiny.layer1, "layer2"], count=1, right=True
    )
    assert texts(two)[:3] == ["image", "layer1", "layer2"]


LAYERS = {
    "a name": lambda m: "layer1.1",
    "a module": lambda m: m.layer1[-1],
    "a list of it": lambda m: [m.layer1[1]],
    "the end of a name": lambda m: ["1.block"],
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_a_name_or_a_module(layer, tiny, sample):
    images = normalize(sample.images[:2])
    given = LAYERS[layer](tiny)
    name = "layer1.1.block" if layer == "the end of a name" else "layer1.1"
    found = visualize.gradcam(tiny, images, [name] if layer == "the end of a name" else given, [0, 1])
    assert (found == visualize.gradcam(tiny, images, name, [0, 1])).all()


class Wrapped(nn.Module):
    """As Lightning's modules hold a network."""

    def __init__(self, network):
        super().__init__()
        self.network, self.metric = network, nn.Identity()

    def forward(self, images):
        return self.network(images)


def test_a_network_within_another_module_is_explained_by_its_own_layers(tiny, sample):
    images, wrapped = normalize(sample.images[:2]), Wrapped(tiny)
    expected = visualize.gradcam(tiny, images, "layer2", [0, 1])
    for layer in ("layer2", "network.layer2", tiny.layer2, wrapped.network.layer2):
        assert (visualize.gradcam(wrapped, images, layer, [0, 1]) == expected).all()
    assert list(visualize.cam_layers(wrapped)) == ["network.prep", "network.layer1", "network.layer2"]


def test_one_image_is_explained_as_a_batch_of_one(tiny, sample):
    images = normalize(sample.images[:1])
    one = visualize.gradcam(tiny, images[0], "layer2", [1])
    np.testing.assert_allclose(one, visualize.gradcam(tiny, images, "layer2", [1]), rtol=1e-3, atol=1e-7)


def test_the_inverse_of_a_normalisation_is_known(tiny, sample):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    inverse = v2.Normalize([-m / s for m, s in zip(mean, std, strict=True)], [1 / s for s in std])
    mistakes = [(image, 0, 1) for image in normalize(sample.images[:3], mean, std)]
    for step in (inverse, v2.Normalize(mean, std), A.Normalize(mean, std)):
        figure = visualize.plot_misclassified(mistakes, ["a", "b"], step)
        shown = np.stack(pixels(figure)).astype(int)
        assert (abs(shown - sample.images[:3]) <= 1).all()


def test_pictures_of_another_pass_over_a_shuffled_loader_are_refused(tiny, sample):
    dataset = TensorDataset(normalize(sample.images), torch.from_numpy(sample.labels))
    shuffled = DataLoader(dataset, 50, shuffle=True)
    predictions = main.predict(tiny, shuffled)
    other = torch.cat([images for images, _ in shuffled])
    with pytest.raises(ValueError, match="in another order.*leave them out"):
        visualize.plot_misclassified(other, predictions, sample.classes)
    figure = visualize.plot_misclassified(predictions, sample.classes)
    true = [title.split()[1] for title in texts(figure)[:-1]]
    place = {image.tobytes(): k for k, image in enumerate(sample.images)}
    assert true == [sample.classes[sample.labels[place[x.tobytes()]]] for x in pixels(figure)]


NOTHING = [
    (
        lambda: visualize.plot_augmentations(v2.Compose([v2.ToImage()])),
        ValueError,
        "not of torchvision's Compose",
    ),
    (lambda: visualize.plot_history({}), ValueError, "give the history that fit_model returned"),
    (lambda: visualize.plot_lr_history([]), ValueError, "no step was trained"),
]


def test_what_is_missing_or_makes_no_sense_is_said_in_one_line(tiny, sample, predictions):
    bare, images = (
        Predictions(predictions.probabilities, predictions.labels),
        normalize(sample.images[:3]),
    )
    cases = [
        (lambda: visualize.plot_misclassified(sample.images), TypeError, "needs predictions: give what"),
        (lambda: visualize.plot_misclassified(bare), TypeError, "needs the images too"),
        (lambda: visualize.plot_samples(sample.labels), TypeError, "needs the images too"),
        (lambda: visualize.plot_confusion_matrix(3.5), TypeError, "has no use for this float, 3.5"),
        (lambda: visualize.plot_misclassified(predictions, colour=1), TypeError, "no argument 'colour'"),
        (lambda: visualize.plot_confusion_matrix([0, 1], [0]), ValueError, "1 predictions for 2 labels"),
        (
            lambda: visualize.plot_confusion_matrix([0, 7], [0, 1], ["a", "b"]),
            ValueError,
            "0 to 1, not 0",
        ),
        (
            lambda: visualize.gradcam(tiny, sample.images, "layer2", [1]),
            ValueError,
            r"give normalize\(images\)",
        ),
        (
            lambda: visualize.gradcam(tiny, images, nn.ReLU(), [1]),
            ValueError,
            "is no part of this model",
        ),
        (
            lambda: visualize.gradcam(tiny, images, ["prep", "layer1"], [1]),
            ValueError,
            "of one layer, not 2",
        ),
    ]
    for call, error, message in [*cases, *NOTHING]:
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_each_augmentation_is_shown_alone_and_all_of_them_together(loader, sample):
    for given in ((train_transform(), loader), (train_transform(), sample.images), (loader,)):
        figure = visualize.plot_augmentations(*given, count=4)
        rows = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
        assert [row.split(",")[0] for row in rows] == [
            "as it is", "PadIfNeeded", "RandomCrop", "HorizontalFlip", "CoarseDropout", "all of it",
        ]  # fmt: skip
        shown = pixels(figure)
        assert (np.stack(shown[:4]) == sample.images[:4]).all()
        assert shown[4].shape == (40, 40, 3)
        assert (shown[12] == shown[8][:, ::-1]).all()  # mirrored, though its probability is 1/2
    assert texts(figure) == ["What each augmentation does"]


def test_new_figures_are_drawn_without_a_warning_and_fit_a_notebook(tiny, predictions, loader):
    for figure in (
        visualize.plot_augmentations(),
        visualize.plot_class_accuracy(predictions),
        visualize.plot_gradcam_layers(tiny, predictions, count=2),
        visualize.plot_samples_by_class(loader),
    ):
        FigureCanvasAgg(figure).draw()
        assert figure.get_figwidth() <= 10


def test_the_statistics_of_the_exercise_are_what_is_assumed_of_numbers_beyond_0_to_1(sample):
    unknown = [(image, 0, 1) for image in normalize(sample.images[:2], CIFAR10_MEAN, CIFAR10_STD)]
    shown = np.stack(pixels(visualize.plot_misclassified(unknown, ["a", "b"])))
    assert (shown == sample.images[:2]).all()
