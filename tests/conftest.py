"""What the tests share: no network, a small real dataset, a small network."""

import contextlib
import functools
import gc
import os
import re
import shutil
import signal
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
from tests.proxy import reverse_proxy

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


@pytest.fixture(scope="module")
def unreported():
    """Runs of these tests end without their report, which takes longer than a small training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run.report_run", lambda *arguments: None)
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


@contextlib.contextmanager
def started(command, folder, cwd=ROOT, environment=(), ended=0):
    """A command that serves the page; `folder` is its TMPDIR and has its log, `ended` its exit code."""
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1", **dict(environment)}
    pipes = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, cwd=cwd, env=environment, stderr=log, **pipes) as page,
    ):
        try:
            said = ""
            while not (address := re.search("https?://[^ ;]+", said.splitlines()[-1] if said else "")):
                line = page.stdout.readline()
                assert line, (folder / "log").read_text()
                said += line
            yield Served(address[0], said)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(page.pid, signal.SIGTERM)  # and what it has started
        assert page.wait(30) == ended


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The folder of a short run on the sample."""
    folder = tmp_path_factory.mktemp("small") / "run"
    flags = "--recipe demo --width 8 --epochs 1 --lr 0.01 --precision fp32 --output"
    assert main.main([*flags.split(), str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def served(tmp_path_factory, small_run):
    """The page of a run, in an environment that asks for the opposite of private."""
    folder = tmp_path_factory.mktemp("page")
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
    command = [sys.executable, "app.py", str(small_run), "--device", "cpu"]
    with started(command, folder, environment=hostile) as page:
        yield page
    assert not list(folder.glob("page-*")), "uploads were left behind"
    assert not (folder / "gradio").exists(), "gradio's folder was left behind"


class Site(NamedTuple):
    """Pages under names of this machine, and what can be visited there."""

    port: int

    def at(self, name):
        return f"http://{name}.localhost:{self.port}/"


@pytest.fixture(scope="session")
def space(tmp_path_factory, small_run):
    """The files of docs/space.md, run as a Space would, at page.localhost behind a reverse proxy.

    Every other name has a page that frames this one; course.localhost is allowed to.
    """
    folder = tmp_path_factory.mktemp("space")
    shutil.copy(small_run / "weights.safetensors", folder)
    (folder / "cifar10").symlink_to(ROOT)  # in the place of a clone
    upstream, port = free_port(), free_port()
    file = (ROOT / "docs/space.md").read_text().partition("```py\n")[2].partition("```")[0]
    code = file.replace("server_port=7860", f"server_port={upstream}")
    code = code.replace("https://huggingface.co", f"http://course.localhost:{port}")
    (folder / "app.py").write_text(code)
    spaces = {"SYSTEM": "spaces", "SPACE_ID": "somebody/page", "SPACE_HOST": "page.localhost"}
    spaces |= {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(upstream)}
    command = [sys.executable, "app.py"]
    with (
        started(command, folder, folder, spaces, ended=-signal.SIGTERM),
        reverse_proxy(upstream, port, "page.localhost"),
    ):
        yield Site(port)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
