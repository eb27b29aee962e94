"""What the tests share: no network, a small real dataset, a small network."""

import functools
import gc
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import files
import main
import models
import sources
from sources import cifar10

ROOT = Path(__file__).parent.parent

# Quicker for networks this small, and steady on a busy machine; the same for processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish():
    """What is imported by now stays, and need not be looked through at every garbage collection."""
    gc.freeze()


def pytest_unconfigure():
    """Triton, at its end, takes what is never collected for leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every connection that leaves this machine is an error."""
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(autouse=True)
def no_lock_outlives_its_test():
    """A run folder stays locked until its process ends, which here comes after many tests."""
    yield
    for folder in list(files.LOCKS):
        files.unlock_folder(folder)


@pytest.fixture(autouse=True, scope="session")
def sample_is_decoded_once():
    """Reading its 5,000 images takes a sixth of a second, and most tests do."""
    load = functools.cache(lambda split, folder: cifar10.load_sample(split))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "load_sample", lambda split: load(split, cifar10.SAMPLE))
        yield


@pytest.fixture(scope="session")
def sample():
    """200 real images, 20 of each class."""
    split = sources.load_split("cifar10-sample", "test")
    return split.take(np.arange(1000)[np.arange(1000) % 100 < 20])


@pytest.fixture
def tiny():
    """A CustomResNet of width 4, the same every time."""
    torch.manual_seed(0)
    return models.make_model("custom_resnet", width=4)


class Served(NamedTuple):
    address: str
    said: str  # until it was ready


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The page of a short run on the sample, in an environment that asks for the opposite of private."""
    folder = tmp_path_factory.mktemp("page")
    flags = "--recipe demo --width 8 --epochs 1 --lr 0.01 --precision fp32 --output"
    assert main.main([*flags.split(), str(folder / "run")]) == 0
    hostile = {
        "GRADIO_SHARE": "True",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_ANALYTICS_ENABLED": "True",
        "GRADIO_ALLOWED_PATHS": "/",
        "GRADIO_VIBE_MODE": "1",
        "GRADIO_WATCH_DEMO_PATH": __file__,
        "GRADIO_NUM_WORKERS": "1",
        "GRADIO_PROFILING": "1",
        "GRADIO_DEBUG": "1",
        "http_proxy": "http://127.0.0.1:9",
        "ALL_PROXY": "junk",
    }
    command = [sys.executable, "app.py", str(folder / "run"), "--device", "cpu"]
    environment = os.environ | hostile | {"TMPDIR": str(folder)}
    with (folder / "log").open("w") as log:
        page = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        lines = []
        for line in page.stdout:
            lines.append(line)
            if line.startswith("the page is at "):
                break
        assert lines and "http" in lines[-1], (folder / "log").read_text()
        yield Served(lines[-1].split()[4].rstrip(";"), "".join(lines))
        page.terminate()
        assert page.wait(30) == 0
        page.stdout.close()
    assert not list(folder.glob("page-*")), "uploads were left behind"
    assert not (folder / "gradio").exists(), "gradio's folder was left behind"
