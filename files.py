"""Writes a file whole or not at all, copies files to a second folder, and locks a run's folder."""

import contextlib
import csv
import errno
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from pathlib import Path
from typing import TextIO, TypeVar

try:
    import fcntl
except ImportError:  # Windows: a folder has no lock there
    fcntl = None  # type: ignore[assignment]  # elsewhere it is a module

Answer = TypeVar("Answer")
LOCKS: dict[Path, TextIO] = {}  # the open lock file of each folder that this process uses


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write a file so that a kill, a full disk or a power cut leaves either the old one or the new one.

    Args:
        path: of the file, in a folder that exists.
        content: bytes, or text, which is written as UTF-8.

    Raises:
        OSError: the file could not be written; an earlier one is untouched.
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
            error.filename = str(path)  # the error of a failed write does not name the file
        raise
    sync_folder(path.parent)


def write_csv(path: str | Path, heads: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a table as a CSV file, whole."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerows([heads, *rows])
    write_whole(path, table.getvalue())


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a regular file. A pipe under its name is refused, as reading one could wait for ever.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def answered(seconds: float, call: Callable[..., Answer], place: str | Path) -> Answer:
    """What a call on a path or address returns; a thread makes it, so that one that hangs can be left.

    Args:
        seconds: to wait for it; Ctrl-C and SIGTERM end the wait too.

    Raises:
        TimeoutError: there was no answer.
    """
    answer: Future[Answer] = Future()

    def work(answer: Future[Answer]) -> None:
        with contextlib.suppress(InvalidStateError):  # nobody waits any longer
            try:
                result = call(place)
            except BaseException as error:
                answer.set_exception(error)
                del answer  # see below
                return
            if answer.cancelled() and hasattr(result, "close"):
                result.close()
            answer.set_result(result)

    threading.Thread(target=work, args=(answer,), daemon=True).start()
    try:
        wait([answer], seconds)
    finally:
        late = answer.cancel()
    if late:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s", str(place))
    try:
        return answer.result()
    finally:
        # An error knows this frame. If the frame knew the answer, which knows the error, these and the
        # connection in the error would wait for the garbage collector.
        del answer


class Mirror:
    """A second folder for copies of files, written by a thread, so that a slow drive delays no training.

    The folder is made at the first copy, but its parents are not: they are missing where a drive is not
    mounted, and then nothing is written to the local disk instead. If another folder is found under the
    name later, as when the drive was unmounted, nothing is written to that one.

    Args:
        folder: where the copies go.
        patience: seconds that `close` waits for the last copy.
    """

    def __init__(self, folder: str | Path, patience: float = 10.0):
        self.folder, self.patience = Path(folder), patience
        self.identity: tuple[int, int] | None = None
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()  # guards `newest` and `thread`, which two threads change
        self.newest: tuple[str, bytes, Callable[[Path], None]] | None = None  # still to be written

    def copy(self, name: str, content: bytes, after: Callable[[Path], None]) -> None:
        """Let the thread write a file, and then call `after` with its path.

        If an earlier file still waits to be written, this one takes its place.
        """
        with self.lock:
            if self.newest is not None:
                print(f"warning: no copy of {self.newest[0]} in {self.folder}, which is slow")
            self.newest = name, content, after
            if self.thread is None:
                self.thread = threading.Thread(target=self.write_all, daemon=True)
                self.thread.start()

    def write_all(self) -> None:
        """Write the file that waits, until there is none: this is what the thread runs."""
        while True:
            with self.lock:
                job, self.newest = self.newest, None
                if job is None:
                    self.thread = None
                    return
            self.write(*job)

    def write(self, name: str, content: bytes, after: Callable[[Path], None]) -> None:
        """Write one file; if that fails, print a warning of one line."""
        try:
            if self.identity is None:
                self.folder.mkdir(exist_ok=True)
            status = self.folder.stat()
            if self.identity not in (None, (status.st_dev, status.st_ino)):
                raise OSError(errno.ENODEV, "it is no longer the folder that it was", str(self.folder))
            self.identity = status.st_dev, status.st_ino
            write_whole(self.folder / name, content)
            after(self.folder / name)
        except OSError as error:
            print(f"warning: no copy of {name} in {self.folder}: {error.strerror or error}")

    def close(self) -> None:
        """Wait until the newest copy is written, for `patience` seconds at most."""
        thread = self.thread
        if thread is not None:
            thread.join(self.patience)
            if thread.is_alive():
                print(f"warning: the last copy in {self.folder} was not ready in {self.patience:g} s")


def lock_folder(folder: str | Path) -> bool:
    """Keep other processes out of a run folder, and remove half-written files of killed ones from it.

    The operating system releases the lock of a process that ends, even of one that is killed. Unlike a
    lock of flock, this one is not inherited by worker processes, which live on for seconds after the
    process that started them was killed. Some network drives have no locks; a folder there is used
    without.

    Returns:
        Whether this call has locked it; False if this process had locked it before, or it has no locks.

    Raises:
        ValueError: another process has locked it.
    """
    path = Path(folder).resolve()
    if fcntl is None or path in LOCKS:
        return False
    try:
        file = (path / ".lock").open("a+")
    except OSError:
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        with file:
            file.seek(0)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"{folder} is in use by process {file.read() or '?'}") from None
        return False
    LOCKS[path] = file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    for partial in (*path.glob(".*.tmp"), *path.glob("checkpoints/.*.tmp")):
        partial.unlink(missing_ok=True)
    return True


def unlock_folder(folder: str | Path) -> None:
    """Let other processes use a run folder again."""
    file = LOCKS.pop(Path(folder).resolve(), None)
    if file is not None:
        file.close()


@contextlib.contextmanager
def unlocked_on_error(folder: str | Path) -> Iterator[None]:
    """Unlock a run folder if this block fails."""
    try:
        yield
    except BaseException:
        unlock_folder(folder)
        raise


@contextlib.contextmanager
def unlocked_after(folder: str | Path) -> Iterator[None]:
    """Unlock a run folder at the end of this block, however it ends."""
    try:
        yield
    finally:
        unlock_folder(folder)


def reason(error: Exception) -> str:
    """An error in one line; if it is the operating system's, the file and what is wrong with it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


@contextlib.contextmanager
def bad_input_refused() -> Iterator[None]:
    """A file that cannot be used in here is bad input, unlike a disk that fails later, during a run."""
    try:
        yield
    except OSError as error:
        raise ValueError(reason(error)) from None


def sync_folder(folder: Path) -> None:
    """Make sure that a renamed file is still there after a power cut, on systems that can do so."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
