import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import export
import main
import models
import utils
from sources.cifar10 import CLASSES
from transforms import CIFAR10_MEAN, CIFAR10_STD, normalize
from weights_file import save_weights

FORMATS = [
    "torch",
    pytest.param("onnx", marks=pytest.mark.filterwarnings("ignore")),  # of the exporter's imports
]


@pytest.fixture(params=FORMATS)
def format(request):
    """Each format whose packages are here."""
    if request.param == "onnx":
        for name in export.ONNX_PACKAGES:
            pytest.importorskip(name)
    return request.param


def make_card(model="custom_resnet", size=32, options=None):
    """A card of untrained weights."""
    return {
        "model": model,
        "options": options or {"width": 4},
        "image_size": size,
        "classes": list(CLASSES),
        "mean": list(CIFAR10_MEAN),
        "std": list(CIFAR10_STD),
    }


def run(content, format, images):
    """Logits of an exported network."""
    return (export.run_onnx if format == "onnx" else export.run_torch)(content)(images)


@pytest.mark.slow
def test_a_run_judged_by_six_views_is_exported_with_them(format, sample, tmp_path):
    torch.manual_seed(0)
    model = models.make_model("custom_resnet", width=4).eval()
    card = make_card() | {"config": {"tta": True}}
    export.export_model(tmp_path / "there", model, card, format, sample.images[:5])
    inputs = normalize(sample.images[:5])
    with torch.no_grad():
        plain = model(inputs).numpy()
        expected = sum(share * model(view) for share, view in utils.six_views(inputs)).numpy()
    answer = run((tmp_path / "there").read_bytes(), format, sample.images[:5])
    np.testing.assert_allclose(answer, expected, atol=1e-4, rtol=0)
    assert np.abs(answer - plain).max() > 1e-3
    assert export.metadata_of(card)["six views"] == "averaged inside"


@pytest.mark.slow
def test_an_exported_network_takes_pixels_and_answers_as_the_model_does(format, sample, tmp_path):
    torch.manual_seed(0)
    model = models.make_model("resnet18", width=8)
    for module in model.modules():  # statistics that a fresh network would not miss
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5), module.running_var.uniform_(0.5, 2)
    path = tmp_path / "there"
    difference = export.export_model(path, model, make_card("resnet18"), format, sample.images[:5])
    for images in np.split(sample.images[:20], [1, 3]):
        with torch.no_grad():
            expected = model(normalize(images)).numpy()
        found = run(path.read_bytes(), format, images)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert 0 <= difference < 1e-4


@pytest.mark.slow
def test_the_classes_and_the_layout_go_with_it(format, sample, tmp_path, tiny):
    path = tmp_path / "there"
    export.export_model(path, tiny, make_card(), format, sample.images[:5])
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        metadata = session.get_modelmeta().custom_metadata_map
        (given,), (answer,) = session.get_inputs(), session.get_outputs()
        assert (given.name, given.type) == ("images", "tensor(uint8)")
        assert given.shape == ["batch", 32, 32, 3] and answer.shape == ["batch", 10]
    else:
        metadata = dict.fromkeys(export.metadata_of(make_card()), "")
        torch.export.load(io.BytesIO(path.read_bytes()), extra_files=metadata)
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert metadata["input"].startswith("images: uint8 (N, 32, 32, 3), RGB")


def test_a_network_that_answers_otherwise_is_not_written(sample, tmp_path, tiny, monkeypatch):
    forward = export.PixelsToLogits.forward

    def twisted(self, images):
        return forward(self, images) * 1.01

    monkeypatch.setattr(export.PixelsToLogits, "forward", twisted)
    with pytest.raises(FloatingPointError, match="logits differ by up to .*nothing was written"):
        export.export_model(tmp_path / "there", tiny, make_card(), "torch", sample.images[:5])
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_both_cures(sample, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx, onnxscript, onnxruntime: pip .* --format torch"):
        export.export_model(tmp_path / "there", tiny, make_card(), "onnx", sample.images[:5])


def test_the_command_writes_into_the_run_and_says_what_it_checked(tmp_path, capsys):
    model = models.make_model("custom_resnet", width=4)
    save_weights(tmp_path / "weights.safetensors", model, make_card(size=40))
    assert main.main(["export", str(tmp_path), "--format", "torch"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path / 'model.pt2'}: ") and '"airplane", "automobile"' in printed
    assert "(N, 40, 40, 3)" in printed and "checked on 100 images: logits differ by" in printed
    assert (tmp_path / "model.pt2").stat().st_size > 1e5


def test_a_weights_file_is_exported_beside_itself(tmp_path, monkeypatch):
    model = models.make_model("custom_resnet", width=4)
    save_weights(tmp_path / "cats.safetensors", model, make_card())
    monkeypatch.setattr(export, "export_model", lambda path, *rest: path.touch() or 0.0)
    assert main.main(["export", str(tmp_path / "cats.safetensors")]) == 0
    assert (tmp_path / "cats.onnx").is_file()


def test_weights_of_the_repository_are_exported_among_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "export_model", lambda path, *rest: path.touch() or 0.0)
    assert main.main(["export", "--format", "torch"]) == 0
    assert [str(path) for path in Path().rglob("*")] == ["runs", "runs/custom_resnet.pt2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "there is no weights file nowhere"),
        (["RUN", "--format", "onx"], "unknown format 'onx'; choose from onnx, torch; did you"),
        (["RUN", "--format", "torch", "--output", "absent/m.pt2"], "there is no folder absent"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, argv, message):
    model = models.make_model("custom_resnet", width=4)
    save_weights(tmp_path / "weights.safetensors", model, make_card())
    try:
        code = main.main(["export", *(str(tmp_path) if word == "RUN" else word for word in argv)])
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr().err
    assert code == 2 and message in printed and printed.count("\n") == 1
