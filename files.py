"""Writes a file whole or not at all."""

import contextlib
import os
from pathlib import Path


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file so that a kill, a full disk or a power cut leaves either the old one or the new one.

    Args:
        path: of the file, in a folder that exists.
        content: bytes, or text, which becomes UTF-8.

    Raises:
        OSError: it could not be written; what was there before is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not say of which file
        raise
    sync_folder(path.parent)


def reason(error: Exception) -> str:
    """An error in one line; one of the operating system says which file, and why."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, on systems that can sync a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
