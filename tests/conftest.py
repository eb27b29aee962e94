"""What the tests share: no network, a small real dataset, a small network."""

import socket

import numpy as np
import pytest
import torch

import data
import files
import models

torch.set_num_threads(1)  # quicker for networks this small, and steady on a busy machine


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


@pytest.fixture(scope="session")
def sample():
    """200 real images, 20 of each class."""
    split = data.load_split("cifar10-sample", "test")
    return split.take(np.arange(1000)[np.arange(1000) % 100 < 20])


@pytest.fixture
def tiny():
    """A CustomResNet of width 4, the same every time."""
    torch.manual_seed(0)
    return models.make_model("custom_resnet", width=4)
