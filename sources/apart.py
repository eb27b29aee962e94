"""Pictures of strangers, read in a process of their own.

A file can be made to keep a decoder busy for minutes, or to crash it. A thread cannot be stopped then,
and a crash ends every thread; a process can be ended, and another one started for the next picture.
"""

import atexit
import functools
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sources.folder import open_image, quiet_open, to_square

SECONDS = 20.0  # for one picture; the largest that is accepted takes two
LOCK = threading.Lock()  # the reader has one picture at a time


def read_apart(path: str, sizes: Sequence[int], fit: str) -> tuple[list[np.ndarray], dict[str, Any]]:
    """A picture as `read_image` returns it, decoded once for all `sizes`, and what it was like before.

    Returns:
        Images uint8 (size, size, 3); and the file's `width` and `height` in pixels, and whether it has a
        `transparency`.

    Raises:
        ValueError: as `read_image`; or it took longer than `SECONDS`, or the reader crashed.
    """
    with LOCK:
        reader = start_reader()
        assert reader.stdin and reader.stdout
        limit = threading.Timer(SECONDS, reader.kill)
        limit.start()
        try:
            reader.stdin.write(json.dumps([path, list(sizes), fit]).encode() + b"\n")
            reader.stdin.flush()
            facts = json.loads(reader.stdout.readline())
            content = [reader.stdout.read(3 * size**2) for size in facts.pop("sizes", ())]
        except (OSError, ValueError):  # it has ended: a closed pipe, or no line
            start_reader.cache_clear()
            end_reader(reader)
            reason = "the decoder crashed" if limit.is_alive() else f"it takes over {SECONDS:g} s"
            raise ValueError(f"{path} is no readable image ({reason})") from None
        finally:
            limit.cancel()
    if "error" in facts:
        raise ValueError(facts["error"])
    pairs = zip(content, sizes, strict=True)
    return [
        np.frombuffer(bytearray(data), np.uint8).reshape(size, size, 3) for data, size in pairs
    ], facts


@functools.cache
def start_reader() -> subprocess.Popen:
    """The process that reads pictures, once it is ready."""
    command = [sys.executable, "-m", "sources.apart"]
    root, pipe = Path(__file__).parent.parent, subprocess.PIPE
    reader = subprocess.Popen(command, cwd=root, stdin=pipe, stdout=pipe)
    atexit.register(end_reader, reader)
    assert reader.stdout
    reader.stdout.readline()
    return reader


def end_reader(reader: subprocess.Popen) -> None:
    """End a reader, and wait until it has ended."""
    atexit.unregister(end_reader)
    reader.kill()
    reader.communicate()


def serve() -> None:
    """Read the pictures that standard input names, one a line, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the page, which ends this process
    out = sys.stdout.buffer
    print("ready", flush=True)
    for line in sys.stdin:
        path, sizes, fit = json.loads(line)
        images: list[np.ndarray] = []
        try:
            image = open_image(path)
            images = [to_square(image, size, fit) for size in sizes]
            facts = {"width": image.width, "height": image.height, "sizes": sizes}
            with quiet_open(path) as head:
                facts["transparency"] = head.has_transparency_data
        except ValueError as error:
            facts = {"error": str(error)}
        out.write(json.dumps(facts).encode() + b"\n" + b"".join(image.tobytes() for image in images))
        out.flush()


if __name__ == "__main__":
    serve()
