import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import models
import weights_file

ROOT = Path(__file__).parent.parent
SIZES = {"custom_resnet": 6_573_130, "resnet18": 11_173_962, "resnet34": 21_282_122}


def hub(name, folder=ROOT, **options):
    """What torch.hub gives of a folder."""
    return torch.hub.load(str(folder), name, source="local", **options)


@pytest.fixture
def copy(tmp_path):
    """The files that a download holds, apart from the data."""
    folder = tmp_path / "cifar10-main"
    for name in ("models", "sources", "training"):
        shutil.copytree(ROOT / name, folder / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("name", SIZES)
def test_torch_hub_loads_the_three_networks(name):
    model = hub(name)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert model.training


def test_options_reach_the_network():
    assert hub("resnet18", width=8, num_classes=3)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_pretrained_weights_come_with_their_card_and_ready_to_use(copy, tiny):
    card = {"model": "custom_resnet", "options": {"width": 4}, "classes": list("abcdefghij")}
    card |= {"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": 32}
    (copy / "weights").mkdir()
    weights_file.save_weights(copy / "weights" / "custom_resnet.safetensors", tiny, card)
    model = hub("custom_resnet", copy, pretrained=True)
    assert not model.training and model.card == card
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_the_weights_of_a_network_can_be_kept_and_read_back(tmp_path):
    model = hub("custom_resnet", width=4)
    torch.save(model.state_dict(), tmp_path / "mine.pt")
    again = hub("custom_resnet", width=4)
    again.load_state_dict(torch.load(tmp_path / "mine.pt", weights_only=True))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_weights_that_are_not_there_and_options_that_do_not_fit_are_refused_in_one_line(copy):
    with pytest.raises(ValueError, match="no weights file .*resnet34.safetensors"):
        hub("resnet34", copy, pretrained=True)
    with pytest.raises(ValueError, match="their own options, not width"):
        hub("custom_resnet", copy, pretrained=True, width=4)


def make_repository(folder, answer):
    """A repository as most are: top-level `models` and `utils`, imported when its hubconf is."""
    (folder / "models").mkdir(parents=True)
    (folder / "models" / "__init__.py").write_text("from models.net import net\n")
    (folder / "models" / "net.py").write_text("from utils import ANSWER\ndef net(): return ANSWER\n")
    (folder / "utils.py").write_text(f"ANSWER = {answer!r}\n")
    (folder / "hubconf.py").write_text("dependencies = []\nfrom models import net\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("order", ["theirs ours", "ours theirs"])
def test_another_repository_with_the_same_module_names_gets_its_own_and_we_get_ours(tmp_path, order):
    theirs = make_repository(tmp_path / "theirs", "another network")
    steps = {
        "theirs": f"assert torch.hub.load({str(theirs)!r}, 'net', source='local') == 'another network'",
        "ours": f"""
before = set(sys.modules)
model = torch.hub.load({str(ROOT)!r}, 'custom_resnet', source='local', width=4)
assert type(model).__name__ == 'CustomResNet'
assert not {{'models', 'utils', 'checkpoint'}} & (set(sys.modules) - before)
try:
    torch.hub.load({str(ROOT)!r}, 'resnet34', source='local', pretrained=True)
except ValueError as error:
    assert 'no weights file' in str(error)
""",
    }
    code = "\n".join(["import sys, torch", *(steps[who] for who in order.split())])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_loading_from_the_hub_leaves_the_modules_of_a_program_alone():
    before = dict(sys.modules)
    hub("custom_resnet", width=4)
    assert sys.modules["models"] is models
    assert all(sys.modules[name] is module for name, module in before.items())
