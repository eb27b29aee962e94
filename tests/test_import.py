import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import main
import models
from checkpoint import load_checkpoint
from files import unlock_folder
from weights_file import import_weights, initialize, load_weights

ROOT = Path(__file__).parent.parent
SAMPLE = "--dataset cifar10-sample --precision fp32 --lr 0.01 --batch-size 128".split()
SMOKE = [*SAMPLE, "--max-train-batches", "2", "--max-test-batches", "1", "--epochs", "1"]


def some_norms(model):
    """The network with norms that are not as they begin, so that one in another's place is seen."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def block(into, out, bias=False, pool=False):
    layers = [nn.Conv2d(into, out, 3, padding=1, bias=bias), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers[:1], *([nn.MaxPool2d(2)] if pool else []), *layers[1:])


class Named(nn.Module):
    """The exercise's CustomResNet as notebooks spell it: prep_layer, R1, fc."""

    def __init__(self, width=8, bias=False, fc_bias=True):
        super().__init__()
        w = width
        self.prep_layer = block(3, w, bias)
        self.layer_1 = block(w, 2 * w, bias, pool=True)
        self.R1 = nn.Sequential(block(2 * w, 2 * w, bias), block(2 * w, 2 * w, bias))
        self.layer_2 = block(2 * w, 4 * w, bias, pool=True)
        self.layer_3 = block(4 * w, 8 * w, bias, pool=True)
        self.R2 = nn.Sequential(block(8 * w, 8 * w, bias), block(8 * w, 8 * w, bias))
        self.maxpool = nn.MaxPool2d(4)
        self.fc = nn.Linear(8 * w, 10, bias=fc_bias)

    def forward(self, x):
        x = self.layer_1(self.prep_layer(x))
        x = self.layer_3(self.layer_2(x + self.R1(x)))
        return self.fc(self.maxpool(x + self.R2(x)).flatten(1))


class Flat(Named):
    """The same, its residual blocks written first and with other names."""

    def __init__(self):
        super().__init__()
        for name in ("prep_layer", "layer_1", "layer_2", "layer_3"):
            part = getattr(self, name)
            delattr(self, name)
            setattr(self, name, part)


class ShortcutFirst(nn.Module):
    """A ResNet block whose shortcut is written before its convolutions."""

    def __init__(self, into, out, stride):
        super().__init__()
        if stride != 1:
            self.skip = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.one = nn.Sequential(nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out))
        self.two = nn.Sequential(nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        skip = self.skip(x) if hasattr(self, "skip") else x
        return (self.two(self.one(x).relu()) + skip).relu()


def other_resnet18(width=8):
    blocks, into = [], width
    for stage, stride in enumerate((1, 2, 2, 2)):
        out = width << stage
        blocks += [ShortcutFirst(into, out, stride), ShortcutFirst(out, out, 1)]
        into = out
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 10))


def of_torchvision():
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


OTHERS = {
    "as notebooks spell it": (Named, "custom_resnet"),
    "with biases": (lambda: Named(bias=True), "custom_resnet"),
    "a head without bias": (lambda: Named(fc_bias=False), "custom_resnet"),
    "its parts in another order": (Flat, "custom_resnet"),
    "torchvision": (of_torchvision, "resnet18"),
    "shortcuts first": (other_resnet18, "resnet18"),
    "kuangliu's names, which are ours": (lambda: models.make_model("resnet34", width=8), "resnet34"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_network_of_others_answers_the_same_after_it_is_imported(name, tmp_path, sample):
    make, expected = OTHERS[name]
    theirs = some_norms(make())
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    ours, found = import_weights(tmp_path / "x.pth")
    assert found["model"] == expected and found["num_classes"] == 10 and not ours.training
    assert type(ours) is type(models.make_model(expected, width=8))
    images = torch.from_numpy(sample.images[:8]).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    model = models.make_model(expected, 10, **found["options"])
    assert model.load_state_dict(ours.state_dict())
    assert ("bias" in found["options"]) == (name == "with biases")


def state():
    torch.manual_seed(0)
    return some_norms(Named()).state_dict()


WRITTEN = {
    "DataParallel": lambda: {f"module.{name}": x for name, x in state().items()},
    "compiled": lambda: {f"_orig_mod.{name}": x for name, x in state().items()},
    "both": lambda: {f"module._orig_mod.{name}": x for name, x in state().items()},
    "Lightning": lambda: {"epoch": 3, "state_dict": {f"model.{name}": x for name, x in state().items()}},
    "state_dict": lambda: {"state_dict": state(), "best_acc": torch.tensor(0.9), "optimizer": {"lr": 1}},
    "model_state_dict": lambda: {"model_state_dict": state(), "optimizer_state_dict": {}, "loss": 0.3},
    "net": lambda: {"net": state(), "acc": 91.2, "epoch": 20},
    "in half precision": lambda: OrderedDict((name, x.half()) for name, x in state().items()),
    "without counts of batches": lambda: {n: x for n, x in state().items() if "tracked" not in n},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_checkpoints_are_opened_and_what_wrappers_add_to_names_is_taken_away(name, tmp_path):
    torch.save(WRITTEN[name](), tmp_path / "x.pth")
    model, _ = import_weights(tmp_path / "x.pth", "custom_resnet")
    expected = list(state().values())
    tensors = list(model.state_dict().values())
    assert all(x.dtype in (torch.float32, torch.int64) for x in tensors)
    sums = [sum(x.double().sum().item() for x in values) for values in (tensors, expected)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-2)


def without(name):
    return {key: x for key, x in state().items() if not key.startswith(name)}


def norms_apart():
    """Norms that stand after two convolutions: which belongs to which is not told."""
    model = nn.Sequential(OrderedDict(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3), c=nn.BatchNorm2d(8),
                                      d=nn.BatchNorm2d(8), e=nn.Linear(8, 10)))  # fmt: skip
    return model.state_dict()


REFUSED = {
    "a whole model": (lambda: Named(), "holds a .*Named, and to read that would run code .*: write tor"),
    "a list": (lambda: [1, 2], "holds no state dict, but a list"),
    "no weights": (lambda: {"epoch": 3, "lr": 0.1}, "holds no state dict, but epoch, lr"),
    "nothing": (dict, "holds no state dict, but nothing"),
    "infinite": (lambda: state() | {"fc.bias": torch.full((10,), torch.inf)}, "not finite"),
    "no head": (lambda: without("fc"), "does not fit custom_resnet: there is no .*, or no linear"),
    "a layer fewer": (
        lambda: without("R1.1"),
        r"fit custom_resnet: it has 1 layers of shape \(16, 16, 3, 3\), and not 2",
    ),
    "another stem": (
        lambda: torchvision.models.resnet18(num_classes=10).state_dict(),
        r"conv1.weight must be \(64, 3, 3, 3\), not \(64, 3, 7, 7\)",
    ),
    "norms apart": (norms_apart, "d is neither a convolution, the norm after one, nor a linear layer"),
    "another layer": (
        lambda: state() | {"extra.weight": torch.ones(3)},
        "extra is neither a convolution, the norm after one, nor a linear layer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_or_is_unsafe_is_refused_in_one_line(name, tmp_path):
    make, message = REFUSED[name]
    torch.save(make(), tmp_path / "x.pth")
    model = "resnet18" if name == "another stem" else "custom_resnet"
    with pytest.raises(ValueError, match=message) as caught:
        import_weights(tmp_path / "x.pth", model)
    assert "\n" not in str(caught.value) and "x.pth" in str(caught.value)


def test_a_file_that_is_none_is_refused_in_one_line(tmp_path):
    for content in (b"", b"not weights", b"PK\x03\x04 broken"):
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(ValueError, match="x.pth is no file of weights") as caught:
            import_weights(tmp_path / "x.pth")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="there is no weights file .*y.pth"):
        import_weights(tmp_path / "y.pth")
    with pytest.raises(ValueError, match="unknown model 'vgg'"):
        import_weights(tmp_path / "x.pth", "vgg")


def test_safetensors_go_by_names_alone_as_they_keep_no_order(tmp_path, sample):
    theirs = some_norms(of_torchvision())
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    ours, _ = import_weights(tmp_path / "x.safetensors", "resnet18")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    save_file(state(), tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="safetensors keeps no order to go by"):
        import_weights(tmp_path / "y.safetensors", "custom_resnet")


def shipped_elsewhere(path):
    """The weights of the repository as another program would have written them; ours, by their names."""
    ours, card = load_weights("custom_resnet")
    theirs = Named(64)
    values = iter(ours.state_dict().values())
    torch.save({"net": {name: next(values) for name in theirs.state_dict()}, "acc": 94.2}, path)
    return ours, card


@pytest.mark.slow
def test_the_command_writes_a_weights_file_and_prints_its_accuracy(tmp_path, capsys):
    ours, _ = shipped_elsewhere(tmp_path / "best.pth")
    flags = ["--dataset", "cifar10-sample", "--device", "cpu"]
    assert (
        main.main(["import-weights", str(tmp_path / "best.pth"), "--model", "custom_resnet", *flags])
        == 0
    )
    printed = capsys.readouterr().out
    assert "best.safetensors: model custom_resnet, width 64; mean [0.4913" in printed
    said = float(printed.partition("accuracy ")[2].partition("%")[0])
    assert 92 < said < 96 and "warning" not in printed
    model, card = load_weights(tmp_path / "best.safetensors")
    assert all(torch.equal(x, ours.state_dict()[name]) for name, x in model.state_dict().items())
    assert card["source"] == "best.pth" and card["test_accuracy"] == pytest.approx(said / 100, abs=1e-4)
    assert main.main(["test", str(tmp_path / "best.safetensors"), "--device", "cpu"]) == 0
    assert f"accuracy {said:.2f}%" in capsys.readouterr().out
    assert main.main(["predict", str(tmp_path / "best.safetensors"), "docs/app.png"]) == 0
    assert main.main(["import-weights", str(tmp_path / "best.pth"), *flags]) == 2
    assert "best.safetensors is there already; choose another --output" in capsys.readouterr().err


def test_an_accuracy_of_chance_is_warned_of_and_other_numbers_are_taken(tmp_path, capsys):
    torch.save(state(), tmp_path / "x.pth")
    flags = "--dataset cifar10-sample --device cpu --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25".split()
    assert main.main(["import-weights", str(tmp_path / "x.pth"), *flags]) == 0
    assert "warning: that is hardly more than chance" in capsys.readouterr().out
    card = load_weights(tmp_path / "x.safetensors")[1]
    assert card["mean"] == [0.5] * 3 and card["std"] == [0.25] * 3


@pytest.mark.parametrize(
    "command", [["test", "{}"], ["predict", "{}", "docs/app.png"], ["export", "{}"]]
)
def test_commands_say_what_to_do_with_a_file_that_has_no_card(command, tmp_path, capsys):
    torch.save(state(), tmp_path / "x.pth")
    assert main.main([word.format(tmp_path / "x.pth") for word in command]) == 2
    said = capsys.readouterr().err
    assert f"`python main.py import-weights {tmp_path / 'x.pth'}` makes a weights file of it" in said
    assert said.count("\n") == 1


# Beginning with weights


def first_logits(model):
    with torch.no_grad():
        return model.eval()(torch.ones(1, 3, 32, 32))


def test_a_network_begins_with_the_weights_of_a_file(tmp_path):
    theirs = some_norms(Named())
    torch.save({"net": theirs.state_dict()}, tmp_path / "x.pth")
    model = models.make_model("custom_resnet", width=8)
    assert initialize(model, tmp_path / "x.pth") == f"begins with the weights of {tmp_path / 'x.pth'}"
    torch.testing.assert_close(first_logits(model), first_logits(theirs), rtol=1e-4, atol=1e-4)


def test_biases_of_convolutions_that_have_none_here_go_into_the_norms(tmp_path):
    torch.manual_seed(0)
    theirs = some_norms(Named(bias=True))
    torch.save(theirs.state_dict(), tmp_path / "x.pth")
    model = models.make_model("custom_resnet", width=8)
    initialize(model, tmp_path / "x.pth")
    torch.testing.assert_close(first_logits(model), first_logits(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.model."])
def test_a_network_of_any_layers_is_known_by_its_names_behind_a_prefix(prefix, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(3600, 2))
    written = {f"{prefix}{name}": x + 1 for name, x in model.state_dict().items()}
    torch.save({"state_dict": written}, tmp_path / "x.ckpt")
    initialize(model, tmp_path / "x.ckpt")
    assert all(torch.equal(x, written[f"{prefix}{name}"]) for name, x in model.state_dict().items())


def test_a_head_with_another_number_of_classes_keeps_its_first_values(tmp_path):
    torch.save(state(), tmp_path / "x.pth")
    model = models.make_model("custom_resnet", 7, width=8)
    head = {name: x.clone() for name, x in model.linear.state_dict().items()}
    said = initialize(model, tmp_path / "x.pth")
    assert said.endswith("but for linear, which keeps its first values: 10 classes there, 7 here")
    assert all(torch.equal(x, head[name]) for name, x in model.linear.state_dict().items())
    assert torch.equal(
        model.prep[0].weight, torch.load(tmp_path / "x.pth", weights_only=True)["prep_layer.0.weight"]
    )


def test_weights_of_another_width_are_refused_before_anything_moves(tmp_path, capsys):
    torch.save(state(), tmp_path / "x.pth")
    flags = ["--width", "16", "--init-from", str(tmp_path / "x.pth"), "--output", str(tmp_path / "run")]
    assert main.main([*SMOKE, *flags]) == 2
    said = capsys.readouterr().err
    assert "x.pth do not fit the network: it has 0 layers of shape (16, 3, 3, 3), and not 1" in said
    assert main.main([*SMOKE, "--init-from", str(tmp_path / "y.pth"), *flags[4:]]) == 2
    assert "there is no weights file" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.fixture
def begun(tmp_path, capsys):
    """A run of two epochs that began with weights, and the flags of it."""
    torch.save(state(), tmp_path / "x.pth")
    flags = [*SMOKE, "--width", "8", "--epochs", "2", "--init-from", str(tmp_path / "x.pth")]
    assert main.main([*flags, "--output", str(tmp_path / "whole")]) == 0
    assert f"begins with the weights of {tmp_path / 'x.pth'}\n" in capsys.readouterr().out
    return tmp_path, flags


def bits(folder):
    return {name: x.sum().item() for name, x in load_weights(folder)[0].state_dict().items()}


@pytest.mark.slow
def test_a_run_that_began_with_weights_says_so_and_resumes_to_the_same_bits(begun, capsys):
    folder, flags = begun
    assert json.loads((folder / "whole/config.json").read_text())["init_from"] == str(folder / "x.pth")
    assert "began with the weights of" in (folder / "whole/report.md").read_text()
    plain = [word for word in flags if word not in ("--init-from", str(folder / "x.pth"))]
    assert main.main([*plain, "--output", str(folder / "plain")]) == 0
    assert bits(folder / "plain") != bits(folder / "whole")
    card = load_checkpoint(folder / "whole/checkpoints")["card"]
    assert len(card["init_sha256"]) == 64
    newest = sorted((folder / "whole/checkpoints").glob("*.ckpt"))[-1]
    newest.unlink()  # as if it had been killed in the second epoch
    before = bits(folder / "whole")
    (folder / "x.pth").rename(folder / "away.pth")
    unlock_folder(folder / "whole")
    assert main.main(["--resume", "--output", str(folder / "whole")]) == 0
    assert bits(folder / "whole") == before


def test_a_run_is_not_continued_with_another_file_of_first_weights(begun, capsys):
    folder, flags = begun
    torch.save(Named().state_dict(), folder / "x.pth")
    assert main.main(["--resume", "--output", str(folder / "whole")]) == 2
    assert (
        "x.pth is no longer the file that the run began with: put that back" in capsys.readouterr().err
    )
    torch.save(Named().state_dict(), folder / "y.pth")
    again = ["--resume", "--output", str(folder / "whole"), "--init-from", str(folder / "y.pth")]
    with pytest.raises(SystemExit):
        main.main(again)
    assert "the run has init_from" in capsys.readouterr().err


def test_the_range_test_is_of_the_weights_that_the_run_begins_with(begun, monkeypatch, capsys):
    folder, flags = begun
    seen = []

    def stopped(*arguments, **options):
        seen.append(first_logits(arguments[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr("run.find_lr", stopped)
    at = flags.index("--lr")
    flags = [*flags[:at], *flags[at + 2 :], "--output", str(folder / "found")]
    assert main.main(flags) == 130
    theirs = Named().eval()
    theirs.load_state_dict(state())
    torch.testing.assert_close(seen[0], first_logits(theirs), rtol=1e-4, atol=1e-4)
    (folder / "found/lr_finder.json").write_text("of other weights")
    assert main.main([*flags, "--resume"]) == 130 and len(seen) == 2


def test_nothing_in_a_pth_is_run(tmp_path):
    code = (
        "import os, pickle, sys, torch\nclass Bad:\n    def __reduce__(self):\n"
        "        return os.mkdir, (sys.argv[2],)\ntorch.save({'net': Bad()}, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "x.pth", tmp_path / "made"], check=True)
    with pytest.raises(ValueError, match="would run code from the file"):
        import_weights(tmp_path / "x.pth")
    assert not (tmp_path / "made").exists()
