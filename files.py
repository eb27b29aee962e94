"""Writes a file whole or not at all, into a folder that one process uses."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows: a folder has no lock there
    fcntl = None  # type: ignore[assignment]  # a module, where there is one

LOCKS: dict[Path, TextIO] = {}  # the open lock file of each folder that this process uses


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


def lock_folder(folder: str | Path) -> None:
    """Keep other processes out of a run folder, and remove what killed ones left half-written there.

    The system takes the lock from a process that ends, however it ends; unlike flock's, this kind does
    not pass to worker processes, which outlive a killed one for seconds. A folder that can have no lock,
    such as one on some network drives, is used without.

    Raises:
        ValueError: another process has it.
    """
    path = Path(folder).resolve()
    if fcntl is None or path in LOCKS:
        return
    try:
        file = (path / ".lock").open("a+")
    except OSError:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            file.seek(0)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"{folder} is in use by process {file.read() or '?'}") from None
        return
    LOCKS[path] = file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    for partial in (*path.glob(".*.tmp"), *path.glob("checkpoints/.*.tmp")):
        partial.unlink(missing_ok=True)


def unlock_folder(folder: str | Path) -> None:
    """Let other processes have a run folder."""
    file = LOCKS.pop(Path(folder).resolve(), None)
    if file is not None:
        file.close()


@contextlib.contextmanager
def unlocked_on_error(folder: str | Path) -> Iterator[None]:
    """Let others have a run folder if what was to be done with it fails."""
    try:
        yield
    except BaseException:
        unlock_folder(folder)
        raise


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
