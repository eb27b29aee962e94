import pytest
import torch
import torchinfo

import models
import utils
from reporting.gradcam import map_shapes

PUBLISHED = [  # network, options, parameters
    ("custom_resnet", {}, 6_573_130),
    ("custom_resnet", {"bias": True}, 6_575_370),
    ("resnet18", {}, 11_173_962),
    ("resnet34", {}, 21_282_122),
]
MULTIPLY_ADDS = {  # of one image of 32 x 32 pixels
    "custom_resnet": 379.27e6,
    "resnet18": 555.42e6,
    "resnet34": 1159.40e6,
}
STAGES = {
    "custom_resnet": {"prep": (64, 32), "layer1": (128, 16), "layer2": (256, 8), "layer3": (512, 4)},
    "resnet18": {
        "conv1": (64, 32),
        "layer1": (64, 32),
        "layer2": (128, 16),
        "layer3": (256, 8),
        "layer4": (512, 4),
    },
}
STAGES["resnet34"] = STAGES["resnet18"]


@pytest.mark.parametrize(("name", "options", "count"), PUBLISHED)
def test_parameter_count_is_the_published_one(name, options, count):
    model = models.make_model(name, **options)
    assert sum(p.numel() for p in model.parameters()) == count
    assert f"{count:,}" in (models.MODELS[name].__doc__)


@pytest.mark.parametrize("name", models.MODELS)
def test_multiply_adds_are_the_published_ones(name):
    info = torchinfo.summary(models.make_model(name), input_data=torch.zeros(1, 3, 32, 32), verbose=0)
    assert info.total_mult_adds == pytest.approx(MULTIPLY_ADDS[name], rel=1e-3)


@pytest.mark.parametrize(("name", "stage"), [(n, s) for n in STAGES for s in STAGES[n]])
def test_stage_has_the_documented_shape(name, stage):
    channels, side = STAGES[name][stage]
    assert map_shapes(models.make_model(name), 32)[stage] == (1, channels, side, side)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("side", [32, 48])
def test_logits_have_shape_n_by_classes_at_any_size(name, side):
    model = models.make_model(name, num_classes=7, width=8)
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 7)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_parameter_receives_a_gradient(name):
    model = models.make_model(name, width=8)
    model(torch.randn(4, 3, 32, 32)).logsumexp(1).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_resnet_whose_gradient_may_crash_a_cpu_is_refused():
    with pytest.raises(ValueError, match="width of a ResNet must be at least 8, not 7"):
        models.make_model("resnet18", width=7)


def test_unknown_model_names_the_choices():
    with pytest.raises(ValueError, match="unknown model 'vgg'; choose from custom_resnet, resnet18"):
        models.make_model("vgg")


def test_pool_of_custom_resnet_is_max_pool_4_at_32_pixels(tiny):
    maps = torch.randn(2, 32, 4, 4)
    assert torch.equal(tiny.pool(maps), torch.nn.functional.max_pool2d(maps, 4))


def test_dropout_acts_in_training_only():
    model = models.make_model("custom_resnet", width=4, dropout=0.5)
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_resnet_state_dict_has_the_reference_names():
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]

    def block(stage, index, shortcut):
        prefix = f"layer{stage}.{index}"
        names = [f"{prefix}.conv{k}.weight" for k in (1, 2)]
        names += [f"{prefix}.bn{k}.{part}" for k in (1, 2) for part in norm]
        if shortcut:
            names += [f"{prefix}.shortcut.0.weight"] + [f"{prefix}.shortcut.1.{part}" for part in norm]
        return names

    expected = ["conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{part}" for part in norm)]
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for index in range(blocks):
            expected += block(stage, index, shortcut=stage > 1 and index == 0)
    assert sorted(models.ResNet34().state_dict()) == sorted(expected)


def test_summary_shows_the_columns_and_leaves_the_model_and_the_random_state_alone(tiny):
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    state = torch.get_rng_state()
    table = utils.summarize(tiny.train())
    assert all(word in table for word in ("Kernel Shape", "Input Shape", "Output Shape", "Mult-Adds"))
    assert "Units." not in table and tiny.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny.state_dict().items())
