"""Writes run files that survive a kill, and reads only those that are whole."""

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from config import RUN_FILE, SEEDS_FILE, Config, check_same_settings, check_version
from files import Mirror, answered, lock_folder, read_bytes, reason, unlock_folder, write_whole
from utils import Epoch, EpochState, History, environment
from weights_file import plain_state, save_weights, weights_content

KEPT = 2  # checkpoints; one alone could be the one that is being replaced
LISTED, READ = 30.0, 600.0  # seconds that a drive, perhaps a network's, may take for it
DIGEST = 32  # bytes of SHA-256 behind a checkpoint: torch.load itself checks nothing


def save_checkpoint(folder: str | Path, state: dict, step: int, mirror: Mirror | None = None) -> Path:
    """Write the state of a run as step-STEP.ckpt, and keep the `KEPT` newest.

    Args:
        folder: where the file goes; it is made if it is missing.
        state: tensors and plain Python; numbers and arrays of NumPy are turned into these.
        step: updates done so far.
        mirror: a second folder, to which a thread copies the file while the training goes on. A copy
            that fails is a printed warning.

    Raises:
        ValueError: something in the state could be written but not read back.
        OSError: `folder` cannot hold it; the earlier checkpoints are untouched.
    """
    buffer = io.BytesIO()
    torch.save(plain_state(state, "the state"), buffer)
    body = buffer.getvalue()
    content = body + hashlib.sha256(body).digest()
    path = Path(folder) / f"step-{step:08d}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    remove_old(path)
    if mirror is not None:
        mirror.copy(path.name, content, remove_old)
    return path


def remove_old(newest: Path) -> None:
    """Keep `newest` and the checkpoints just before it, `KEPT` in all, and remove the earlier ones.

    Checkpoints of later steps are left alone, as they may be another run's. Files that killed processes
    left half-written are removed.
    """
    folder = newest.parent
    older = [path for path in sorted(folder.glob("step-*.ckpt")) if path.name <= newest.name]
    for path in [*older[:-KEPT], *folder.glob(".step-*.tmp")]:
        path.unlink(missing_ok=True)


def load_checkpoint(*folders: str | Path | None) -> dict | None:
    """The state of the newest whole checkpoint in some folders, or None if there is none.

    A damaged checkpoint is named in a warning and renamed to *.damaged, and the one before it is read
    instead. A checkpoint that cannot be read at the moment is passed over, too, but keeps its name. A
    training that goes on from an older checkpoint takes longer, and ends with the same bits. The tensors
    are on the CPU. No file can run code.

    Raises:
        OSError: there are checkpoints, and none can be read at the moment.
        MemoryError: there is not enough memory to load a file, which may be whole.
        ValueError: a file is whole, but its contents were not written by this package.
    """
    unread: OSError | None = None
    paths: list[Path] = []
    for folder in (Path(folder) for folder in folders if folder is not None):
        try:
            paths += checkpoints_in(folder)
        except OSError as error:
            print(f"warning: {folder} cannot be read now ({error.strerror or error})")
            unread = unread or error
    for path in sorted(paths, key=lambda path: path.name, reverse=True):
        try:
            return answered(READ, read_checkpoint, path)
        except OSError as error:
            print(f"warning: checkpoint {path} cannot be read now ({error.strerror or error})")
            unread = unread or error
        except DamagedError as error:
            print(f"warning: checkpoint {path} is damaged ({error}){set_aside(path)}")
    if unread is not None:
        raise unread
    if paths:
        print("warning: no checkpoint is whole")
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder.

    Raises:
        OSError: it cannot be listed, or hangs, as a network's drive may.
    """
    return answered(LISTED, lambda path: list(path.glob("step-*.ckpt")), folder)


class DamagedError(ValueError):
    """A checkpoint's bytes are not those that were written."""


def read_checkpoint(path: Path) -> dict:
    """Read one checkpoint file, after its SHA-256 was checked.

    Raises:
        DamagedError: the SHA-256 at its end is not that of the bytes before it.
        ValueError: the SHA-256 is right, but the file holds objects that could run code; they are not
            loaded.
    """
    content = read_bytes(path)
    body, expected = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(body).digest() != expected:
        raise DamagedError(f"{len(content):,} bytes, and the SHA-256 does not match")
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a file that is made to do harm can raise any kind
        kind = type(error).__name__
        raise ValueError(f"checkpoint {path} is whole, but holds what is never read ({kind})") from None


def set_aside(path: Path) -> str:
    """Rename a damaged file, so that it is not taken for a checkpoint again.

    Returns:
        Words for the warning about the file; none if it could not be renamed.
    """
    with contextlib.suppress(OSError):
        return f"; it is kept as {path.rename(path.with_suffix('.damaged')).name}"
    return ""


class Checkpoints:
    """Where the files of one training go, whether it goes on from them, and how often they are written.

    Args:
        folder: for checkpoints, history, TensorBoard events and, if there is a `card`, weights; None
            keeps nothing.
        card: goes with the weights, see `save_weights`; its "config" and "data_sha256" must be the same
            when the training is continued.
        resume: go on from the newest whole checkpoint in `folder` or `mirror`, if there is one. The
            result is that of an uninterrupted run, bit for bit, on the same versions and device.
        mirror: a second folder for checkpoints.
        seconds: between checkpoints within an epoch; there is one after each epoch too.

    Give it to `fit_model`, which calls its methods. `history` and `epoch_state` say how far the training
    has come. From `start` to the end of the `with` block, no other process can use the folder.

    Raises:
        ValueError: `seconds` is no time, or `mirror` is the folder that it is to copy.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        card: dict | None = None,
        *,
        resume: bool = False,
        mirror: str | Path | None = None,
        seconds: float = 60.0,
    ):
        self.run = None if folder is None else Path(folder)
        self.folder = None if folder is None else Path(folder) / "checkpoints"
        if not isinstance(seconds, int | float) or not seconds >= 0:
            raise ValueError(f"seconds must be a number of at least 0, not {seconds!r}")
        if mirror is not None and self.folder and Path(mirror).absolute() == self.folder.absolute():
            raise ValueError(f"the mirror {mirror} is where the checkpoints are: name another folder")
        self.card, self.resume, self.seconds = card, resume, seconds
        self.processes = 1  # that train together; `training.distributed.start` says how many
        self.mirror = None if mirror is None else Mirror(mirror)

    @property
    def mirrored(self) -> Path | None:
        """The second folder, if there is one."""
        return None if self.mirror is None else self.mirror.folder

    @property
    def steps(self) -> int:
        """Updates done so far."""
        return len(self.history.lrs) + self.epoch_state.steps

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        if self.mirror is not None:
            self.mirror.close()
        if self.run is not None and self.locked:
            unlock_folder(self.run)

    def start(
        self,
        parts: dict,
        train_settings: dict,
        device: torch.device,
        check: Callable[[EpochState], None],
        random_state: Callable[[], dict] = dict,
    ) -> "Checkpoints":
        """Load the newest checkpoint, or write the first one; returns itself, to be used by `with`.

        Args:
            parts: the objects that have a state_dict, by name: model, ema_model, optimizer, scheduler,
                scaler.
            train_settings: settings of the training as plain data; a continued training must have the
                same.
            check: called with the epoch's state before it is saved; raises if a loss was not finite.
            random_state: returns the state that the training loader draws from; called before each
                epoch.

        Raises:
            ValueError: the checkpoint is another run's, there is one and it is not to be continued, or
                another process uses the folder.
        """
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.train_settings, self.check, self.random_state = train_settings, check, random_state
        self.history, self.epoch_state = History(), EpochState.of(1, device, random_state())
        self.saved = time.monotonic()
        self.failure: OSError | None = None
        self.locked = False
        count = f"{self.processes} process" + "es" * (self.processes > 1)
        self.machine = {"device": device.type, **environment(device), "processes": count}
        # Where nothing is to be kept both are None; the type checker does not know that.
        if self.run is None or self.folder is None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self.locked = lock_folder(self.run)
        try:
            self.begin(device)
        except BaseException:
            self.__exit__()
            raise
        return self

    def begin(self, device: torch.device) -> None:
        """Do the part of `start` for which the folder must be locked."""
        folders = [folder for folder in (self.folder, self.mirrored) if folder is not None]
        if not self.resume:
            for folder in folders:
                if checkpoints_in(folder):
                    raise ValueError(f"{folder} holds a run; resume it, or choose another folder")
        state = load_checkpoint(*folders) if self.resume else None
        if state is None:
            refuse_lost_run(self.run)
            if self.resume:
                print(f"nothing to resume in {self.folder}: the run begins")
            self.save()  # of step 0, so that a run that fails early can begin again from these weights
            self.check_written()
            return
        try:
            check_same_run(state["card"], self.card)
            check_same_training(state["train_settings"], self.train_settings)
            warn_of_another_machine(state.get("machine", {}), self.machine)
            self.restore(state, device)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the checkpoint in {self.folder} is not of this version ({error})"
            ) from None
        if self.epoch_state.epoch > self.train_settings["epochs"]:
            # The run is finished. Write history and weights again, as the folder may have been restored
            # from the mirror, which holds checkpoints only.
            self.save_epoch()

    def check_written(self) -> None:
        """Check before training that the weights fit their card and that a checkpoint can be read back.

        A drive that loses what is written to it is so noticed before there is anything to lose.
        """
        if self.card is not None:
            weights_content(self.parts.get("ema_model", self.parts["model"]), self.card)
        if self.failure is None and load_checkpoint(self.folder) is None:
            raise ValueError(f"what is written to {self.folder} does not come back as it was written")

    def restore(self, state: dict, device: torch.device) -> None:
        """Load a checkpoint's state into the parts, the history and the epoch's state."""
        if set(state["parts"]) != set(self.parts):
            raise ValueError(
                f"the checkpoint has {sorted(state['parts'])}, the run {sorted(self.parts)}"
            )
        check_shapes(state["parts"], self.parts)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        rows = [Epoch(**row) for row in state["history"]["epochs"]]
        self.history.epochs, self.history.lrs = rows, state["history"]["lrs"]
        self.epoch_state = EpochState(**state["epoch_state"])
        self.epoch_state.totals = self.epoch_state.totals.to(device)
        if self.epoch_state.epoch > self.train_settings["epochs"]:
            print("the training is finished: nothing is left to train")
        else:
            print(
                f"resumed in epoch {self.epoch_state.epoch} after {self.epoch_state.steps} steps of it"
            )

    def save(self) -> None:
        """Write a checkpoint now. If that fails, a warning is printed, and the training can go on."""
        if self.folder is None:
            return
        self.check(self.epoch_state)
        self.attempt(save_checkpoint, self.folder, self.state(), self.steps, self.mirror)
        self.saved = time.monotonic()

    def state(self) -> dict:
        """All that a checkpoint holds."""
        return {
            "card": self.card,
            "train_settings": self.train_settings,
            "machine": self.machine,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "history": asdict(self.history),
            "epoch_state": {**vars(self.epoch_state), "totals": self.epoch_state.totals.cpu()},
        }

    def save_if_due(self) -> None:
        """Write a checkpoint if the last one is `seconds` old."""
        if time.monotonic() - self.saved >= self.seconds:
            self.save()

    def end_epoch(self, row: Epoch) -> None:
        """Add an epoch's row to the history, and save all that is kept of the run."""
        self.history.epochs.append(row)
        self.history.lrs += self.epoch_state.lrs
        self.epoch_state = EpochState.of(
            row.epoch + 1, self.epoch_state.totals.device, self.random_state()
        )
        self.save_epoch()

    def save_epoch(self) -> None:
        """Write history, weights and a checkpoint."""
        self.failure = None
        if self.run is None:
            return
        self.attempt(self.history.save, self.run)
        if self.card is not None:
            model = self.parts.get("ema_model", self.parts["model"])
            self.attempt(save_weights, self.run / "weights.safetensors", model, self.card)
        self.save()

    def attempt(self, write: Callable, *arguments: Any) -> None:
        """Call a function that writes. If it fails, print a warning and keep the error in `failure`."""
        try:
            write(*arguments)
        except OSError as error:
            if self.failure is None:  # one warning an epoch is enough
                print(f"warning: not written: {reason(error)}; what was there before is kept")
            self.failure = self.failure or error

    def raise_failure(self) -> None:
        """Raise the error that kept the last epoch's files from being written, if there was one."""
        if self.failure:
            raise self.failure


def refuse_lost_run(folder: Path | None) -> None:
    """Refuse to begin where a run has left results but no checkpoint: they would be overwritten.

    Raises:
        ValueError: history or weights of a run are there.
    """
    for name in ("history.json", "weights.safetensors"):
        if folder is not None and (folder / name).exists():
            raise ValueError(
                f"{folder} has the {name} of a run and none of its checkpoints, so that it cannot be "
                "continued; choose another folder"
            )


def check_same_run(before: dict | None, now: dict | None) -> None:
    """Refuse to continue a run with another configuration or other data."""
    if before is None or now is None:
        return
    check_version(before["config"])
    # A field that did not exist yet when the run began had the effect of its default.
    check_same_settings(asdict(Config()) | before["config"], now["config"])
    check_same_images(before, now, now["config"].get("data"))
    first = [card["init_sha256"] for card in (before, now) if "init_sha256" in card]
    if len(set(first)) > 1:
        raise ValueError(
            f"{now['config']['init_from']} is no longer the file that the run began with: put that "
            "back, or take it away, as the run has weights of its own"
        )
    if before.get("augmentation", now.get("augmentation")) != now.get("augmentation"):
        raise ValueError("the augmentation is not the one that the run began with")


def check_same_images(card: dict, now: dict, root: str) -> None:
    """Refuse images whose SHA-256 is not the one on a run's card.

    Args:
        card: of the run.
        now: the card of the images that are there; those of which it has no SHA-256 are not compared.
        root: the folder of these images, which the message names.
    """
    for name, part in {"data_sha256": "training", "test_sha256": "test"}.items():
        if name in now and card.get(name, now[name]) != now[name]:
            raise ValueError(
                f"the {part} images in {root} are not those of the run; --data names others"
            )


def warn_of_another_machine(before: dict[str, str], now: dict[str, str]) -> None:
    """Warn if the device, the machine or the versions are not those that wrote the checkpoint."""
    changed = [f"{old}, now {now[name]}" for name, old in before.items() if old != now[name]]
    if changed:
        print(
            f"warning: the checkpoint was written with {'; '.join(changed)}: "
            "the result will not be that of an uninterrupted run to the last bit"
        )


def check_same_training(before: dict, now: dict) -> None:
    """Refuse to continue a training with other settings; one that it did not have is not compared."""
    for name, value in now.items():
        if before.get(name, value) != value:
            raise ValueError(
                f"the training has {name.replace('_', ' ')} {before[name]}, not {value}, "
                "and can only be continued as it began"
            )


def check_shapes(stored: dict, parts: dict) -> None:
    """Refuse a checkpoint whose tensors do not fit, before any of them is copied into the parts."""
    expected = {name: tensor.shape for name, tensor in parts["model"].state_dict().items()}
    for part in {"model", "ema_model"} & set(stored):
        stored_shapes = {name: tensor.shape for name, tensor in stored[part].items()}
        if expected != stored_shapes:
            misfits = sorted(
                n for n in {*expected, *stored_shapes} if expected.get(n) != stored_shapes.get(n)
            )
            raise ValueError(f"the checkpoint does not fit the model at {', '.join(misfits[:3])}")
    for group in stored["optimizer"]["param_groups"]:
        moments = [stored["optimizer"]["state"].get(index, {}) for index in group["params"]]
        if len({frozenset(names) for names in moments if names}) > 1:
            raise ValueError("the checkpoint's optimizer lacks a moment of some parameters")
    shapes = [p.shape for group in parts["optimizer"].param_groups for p in group["params"]]
    for index, moments in stored["optimizer"]["state"].items():
        for name, value in moments.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != shapes[index]:
                raise ValueError(f"the checkpoint's {name} does not fit parameter {index}")


def read_files(folder: Path, *names: str) -> list:
    """JSON files of a run folder as what they describe: `Config`, machine and versions, `History`.

    Raises:
        ValueError: a file is missing, or is not what this package writes; the message names it.
    """
    readers = {
        **dict.fromkeys((RUN_FILE, SEEDS_FILE), lambda path: Config(**json.loads(read_bytes(path)))),
        "environment.json": lambda path: "{machine}; {versions}".format(**json.loads(read_bytes(path))),
        "history.json": lambda path: finished(History.load(path.parent)),
    }
    contents = []
    for name in names:
        try:
            contents.append(readers[name](folder / name))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} is no run folder: it has no {name}") from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{folder / name} is not what a run writes ({error})") from None
    return contents


def finished(history: History) -> History:
    """The same history, if an epoch of it is finished.

    Raises:
        ValueError: none is.
    """
    if not history.epochs:
        raise ValueError("no epoch is finished")
    return history
