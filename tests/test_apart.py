import os
import signal
import threading

import numpy as np
import pytest
from PIL import Image

from sources import apart
from sources.folder import FITS, read_image


@pytest.fixture
def photo(tmp_path, sample):
    path = tmp_path / "photo — größer.jpg"
    Image.fromarray(sample.images[70]).resize((160, 120)).save(path)
    return str(path)


@pytest.fixture
def stuck(monkeypatch):
    """A reader that is stopped, as one that is busy for ever, and a limit that a test can wait for."""
    monkeypatch.setattr(apart, "SECONDS", 0.5)
    os.kill(apart.start_reader().pid, signal.SIGSTOP)


def test_a_picture_is_read_apart_as_it_is_read_here(photo):
    for fit in FITS:
        images, facts = apart.read_apart(photo, (32, 384), fit)
        for image, size in zip(images, (32, 384), strict=True):
            np.testing.assert_array_equal(image, read_image(photo, size, fit))
        assert facts == {"width": 160, "height": 120, "transparency": False}


def test_what_is_refused_here_is_refused_apart_in_the_same_words(tmp_path):
    for name, content in (("a.png", b"hello"), ("b.png", b""), ("none.png", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as here:
            read_image(tmp_path / name, 32)
        with pytest.raises(ValueError) as there:
            apart.read_apart(str(tmp_path / name), (32,), "crop")
        assert str(there.value) == str(here.value)


@pytest.mark.slow
def test_a_picture_that_keeps_the_decoder_busy_is_given_up_and_the_next_one_is_read(photo, stuck):
    with pytest.raises(ValueError, match=r"photo .*\.jpg is no readable image \(it takes over 0.5 s\)"):
        apart.read_apart(photo, (32,), "crop")
    apart.SECONDS = 60.0
    assert apart.read_apart(photo, (32,), "crop")[0][0].shape == (32, 32, 3)


@pytest.mark.slow
def test_a_picture_that_ends_the_decoder_is_refused_and_the_next_one_is_read(photo):
    pid = apart.start_reader().pid
    os.kill(pid, signal.SIGSTOP)  # the picture is in its hands
    crash = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    crash.start()
    with pytest.raises(ValueError, match="the decoder crashed"):
        apart.read_apart(photo, (32,), "crop")
    crash.join()
    assert apart.read_apart(photo, (32,), "crop")[0][0].shape == (32, 32, 3)
