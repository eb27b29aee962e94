"""From a `Config` to a run folder, and back."""

import argparse
import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from checkpoint import (
    LISTED,
    Checkpoints,
    check_same_images,
    check_same_run,
    load_checkpoint,
    read_files,
)
from config import MAY_DIFFER, RUN_FILE, SEEDS_FILE, Config
from data import Loaders, dataset_of, make_loader, make_loaders
from files import (
    answered,
    bad_input_refused,
    lock_folder,
    read_bytes,
    unlocked_after,
    unlocked_on_error,
    write_whole,
)
from models import make_model
from sources import load_split
from sources.split import Split
from training.distributed import (
    agreed,
    check_same,
    first,
    from_first,
    joined,
    own_part,
    started_by_torchrun,
    wait_less,
)
from training.guards import Stopped, signals_noted
from training.loops import fit_model, predict
from training.lr_finder import LRFinderResult, find_lr, read_finder
from training.optim import Muon, make_optimizer, one_cycle
from training.progress import show_duration, step_seconds, unfailing_output, watched
from training.shared_model import orthogonal_shared
from transforms import normalize, test_transform
from utils import environment, get_device, name_of, pick_precision, seed_everything, summarize
from weights_file import initialize, load_weights, weights_path


def predict_images(
    model: nn.Module, device: torch.device, images: np.ndarray, card: dict, precision: str | None = None
) -> np.ndarray:
    """Class probabilities (N, K) of images uint8 (N, H, W, 3), computed as a weights' card describes.

    Args:
        precision: another than the run's.
    """
    inputs = normalize(images, card["mean"], card["std"])
    batch = [(inputs, torch.zeros(len(inputs), dtype=torch.int64))]
    config = card.get("config", {})
    precision = precision or config.get("precision", "auto")
    return predict(model, device, batch, precision=precision, tta=config.get("tta", False)).probabilities


def run(config: Config) -> Path:
    """Train as `config` says and write the run folder; with `config.seeds`, as `run_seeds` does.

    Where torchrun started several processes, they train one run together.

    Returns:
        The folder, whose report.md tells the rest.

    Raises:
        ValueError, OSError: the run cannot start; one line that says why.
        FloatingPointError: the loss became not finite; what the folder holds is from before.
        Stopped: SIGINT or SIGTERM came.
    """
    with unfailing_output(), signals_noted():
        if config.seeds:
            return run_seeds(config)
        with joined(get_device(config.device)):
            return execute(config, *prepare(config))


def run_seeds(config: Config) -> Path:
    """Run `config.seeds` seeds from `config.seed` on, each in a folder of its own below one.

    A seed that is finished is not run again, so that `config.resume` goes on where it stopped, and adds
    seeds where there are to be more. At the end stand mean, deviation and the mean's 95 % interval.

    Returns:
        The folder that holds them: seed-0 and so on, and seeds.json.

    Raises:
        ValueError: there are several processes.
    """
    from reporting.comparison import read_groups, summary  # SciPy takes a second

    if started_by_torchrun() or own_part().world > 1:
        raise ValueError("--seeds is for one process: leave torchrun out, or train one --seed at a time")
    with bad_input_refused():
        folder = claim_folder(config)
    try:
        for seed in range(config.seed, config.seed + (config.seeds or 1)):
            place = folder / f"seed-{seed}"
            if is_finished(place):
                print(f"{place} is finished")
                continue
            mirror = config.mirror and f"{config.mirror}-seed-{seed}"
            one = replace(config, seed=seed, seeds=None, output=str(place), mirror=mirror)
            with bad_input_refused():
                ready = prepare(one)
            write_whole(folder / SEEDS_FILE, json.dumps(asdict(config), indent=1))
            execute(one, *ready)
            del ready  # its images and network, before those of the next seed come
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # which fails but for an empty one, in which nothing could begin
    for name, runs in read_groups([str(folder)], least=1).items():
        print(summary(name, runs))
    return folder


def is_finished(folder: Path) -> bool:
    """Whether a run has all its epochs and its report."""
    try:
        config, history = read_files(folder, RUN_FILE, "history.json")
    except ValueError:
        return False
    return len(history.epochs) >= config.epochs and (folder / "report.html").exists()


def prepare(config: Config) -> tuple[torch.device, Loaders, nn.Module, torch.optim.Optimizer, Path]:
    """Device, loaders, model, optimizer and folder of a run; the folder is made last."""
    device = get_device(config.device)
    with agreed():
        loaders, weights = make_loaders(config, device), first_weights(config)
    facts = {name: value for name, value in config.identity.items() if name not in MAY_DIFFER}
    digests = [dataset_of(loader).split.digest() for loader in (loaders.train, loaders.test)]
    check_same(**facts, images=digests)
    seed_everything(config.seed, config.deterministic)
    model = make_model(config.model, len(loaders.classes), **config.model_options)
    if weights:
        with agreed():
            print(initialize(model, weights))
    model.to(device).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(config.optimizer, model, config.lr or 1e-3, **config.optimizer_options)
    if config.share_muon and isinstance(optimizer, Muon):
        optimizer.orthogonal_all = orthogonal_shared
    folder = from_first(lambda: str(open_run(config, device, loaders, model)))
    return device, loaders, model, optimizer, Path(folder)


def first_weights(config: Config) -> Path | None:
    """The file of the weights that a run begins with, or None: with none, or it is continued without.

    Raises:
        ValueError: there is no such file.
    """
    try:
        return weights_path(config.init_from) if config.init_from else None
    except ValueError:
        if config.resume:
            return None
        raise


def open_run(config: Config, device: torch.device, loaders: Loaders, model: nn.Module) -> Path:
    """Make the run folder and write what the run is: configuration, machine, network.

    Raises:
        ValueError: `config.output` holds something already, or, with `config.resume`, another run, or
            another process uses it; it is left as it was.
    """
    for place in filter(None, (config.output, config.mirror)):
        if answered(LISTED, lambda path: path.exists() and not path.is_dir(), Path(place)):
            raise ValueError(f"{place} is not a folder")
    state = None
    if config.resume and config.output:
        lock_folder(config.output)
        with unlocked_on_error(config.output):
            state = load_checkpoint(Path(config.output) / "checkpoints", config.mirror)
            if state is not None:
                check_same_run(state.get("card"), make_card(config, loaders))
            elif config.init_from:
                weights_path(config.init_from)  # refused if it is not there, as the run begins anew
    folder = claim_folder(config)
    lock_folder(folder)
    path = folder / "config.json"
    before = {}
    with contextlib.suppress(OSError, ValueError):  # absent or damaged: written anew below
        before = json.loads(read_bytes(path))
    if not isinstance(before, dict):
        before = {}
    other = any(before.get(name) != value for name, value in config.identity.items())
    if other or (config.init_from and state is None):  # its file may have changed
        (folder / "lr_finder.json").unlink(missing_ok=True)  # of another run, which left no checkpoint
    write_whole(path, json.dumps(asdict(config), indent=1))
    dtype = name_of(pick_precision(config.precision, device))
    facts = {**environment(device), "precision": dtype}
    try:
        read_files(folder, "environment.json")  # of where the run began
    except ValueError:
        write_whole(folder / "environment.json", json.dumps(facts, indent=1))
    write_whole(folder / "summary.txt", summarize(model, config.image_size))
    print(f"{config.model} on {config.dataset}, {device}, {dtype}, seed {config.seed}, in {folder}")
    return folder


# What a run writes before it trains: a folder with nothing else may be begun anew.
BEGINNING = {
    "config.json",
    "environment.json",
    "summary.txt",
    "lr_finder.json",
    "lr_finder.png",
    ".lock",
}


def claim_folder(config: Config) -> Path:
    """A folder that no other run has: `config.output`, or a new one named after model, data and time."""
    if config.output:
        folder = Path(config.output)
        if config.resume and (folder / (RUN_FILE if config.seeds else SEEDS_FILE)).exists():
            there = (
                "one run, which --seeds cannot add to" if config.seeds else "the runs of several seeds"
            )
            raise ValueError(f"output {folder} holds {there}; choose another")
        begun = {path.name for path in folder.iterdir()} if folder.exists() else set()
        if not config.resume and begun - BEGINNING:
            raise ValueError(f"output {folder} is there already; --resume it, or choose another")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = f"{config.model}-{config.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    count = 1
    while True:
        folder = Path("runs", name if count == 1 else f"{name}-{count}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
        count += 1


def execute(
    config: Config,
    device: torch.device,
    loaders: Loaders,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
) -> Path:
    """Find the rate, train, and report, in a run folder that is open; then others may use it."""
    with unlocked_after(folder), resumable_when_stopped():
        checkpoints = Checkpoints(folder, make_card(config, loaders), **config.checkpoint_options)
        if not config.resume:
            print_estimate(config, device, loaders, model)
        finder = None
        if config.lr is None:
            test = functools.partial(range_test, config, device, loaders, model, optimizer, folder)
            finder = LRFinderResult(**from_first(lambda: asdict(test())))
        wait_less(config.process_timeout)
        scheduler = make_scheduler(config, loaders, optimizer, finder)
        fit_model(
            model,
            device,
            loaders.train,
            loaders.test,
            optimizer,
            scheduler,
            config.epochs,
            val_loader=loaders.validation,
            checkpoints=checkpoints,
            **config.fit_options,
        )
        report_run(config, device, loaders, model, folder)
    return folder


def print_estimate(config: Config, device: torch.device, loaders: Loaders, model: nn.Module) -> None:
    """Say how long the run will take on this machine, by a few steps on a copy of the network.

    Where several processes train, each makes these steps with its rows of a batch, at the same time.
    """
    rows, side = own_part().rows(dataset_of(loaders.train).batch_size), config.image_size
    images = torch.zeros(rows.stop - rows.start, 3, side, side, device=device)
    seconds = step_seconds(model, images.to(memory_format=torch.channels_last), config.precision)
    trained = len(loaders.train) * config.epochs + 100 * (config.lr is None)  # the range test has 100
    evaluated = len(loaders.validation or loaders.test) * (config.epochs + 1)  # the report does it, too
    steps = trained + evaluated / 3  # of a step the backward pass, which is left out, takes two thirds
    long = seconds * steps > 1800 and config.model == "custom_resnet"
    hint = "; --recipe quick takes minutes" * long
    if seconds * steps >= 10:
        print(
            f"about {show_duration(seconds * steps)}, by three steps on this machine{hint}", flush=True
        )


@contextlib.contextmanager
def resumable_when_stopped() -> Iterator[None]:
    """Let a signal's message say how the run goes on."""
    try:
        yield
    except Stopped as stop:
        stop.args = (f"{stop}; --resume continues the run",)
        raise


def earlier_range_test(config: Config, folder: Path) -> LRFinderResult | None:
    """A run's range test, or at least the two rates of it that its checkpoint has; None: neither."""
    finder = read_finder(folder)
    state = None if finder else load_checkpoint(folder / "checkpoints", config.mirror)
    if state is None:
        return finder
    group = state["parts"]["optimizer"]["param_groups"][0]
    first, peak = (group.get(name, group["lr"]) for name in ("initial_lr", "max_lr"))
    scale = group.get("lr_scale", 1.0)
    return LRFinderResult([], [], {"start": first / scale, config.lr_rule: peak / scale})


def range_test(
    config: Config,
    device: torch.device,
    loaders: Loaders,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
) -> LRFinderResult:
    """`find_lr` as the run trains; the result is printed and kept as lr_finder.json.

    A run that is continued has its rates already.
    """
    earlier = earlier_range_test(config, folder) if config.resume else None
    if earlier:
        return earlier
    if not watched():
        print("range test: up to 100 steps at rising rates", flush=True)
    finder = find_lr(
        model,
        device,
        loaders.train,
        optimizer,
        precision=config.precision,
        label_smoothing=config.label_smoothing,
    )
    write_whole(folder / "lr_finder.json", json.dumps(asdict(finder)))
    suggested = [f"{rule} {rate:.3g}" for rule, rate in finder.suggestions.items()]
    print(f"range test, {len(finder.lrs)} steps: {', '.join(suggested)}")
    return finder


def make_scheduler(
    config: Config, loaders: Loaders, optimizer: torch.optim.Optimizer, finder: LRFinderResult | None
) -> OneCycleLR | None:
    """Set the rate, given or found; returns the optimizer's scheduler, or None for a constant rate."""
    scheduler = schedule(config, optimizer, finder, config.epochs, len(loaders.train))
    if scheduler is not None:
        group = optimizer.param_groups[0]
        print(f"one-cycle from {group['lr']:.3g} to {group['max_lr']:.3g} and down")
    return scheduler


def schedule(
    config: Config,
    optimizer: torch.optim.Optimizer,
    finder: LRFinderResult | None,
    epochs: int,
    steps: int,
) -> OneCycleLR | None:
    """`make_scheduler` for so many epochs of so many steps.

    A found schedule starts at `start` or at a tenth of its peak, whichever is less.
    """
    low = None
    if config.lr is not None:
        high = config.lr
    elif finder is not None:
        high = finder.suggestions[config.lr_rule]
        low = min(finder.suggestions["start"], high / 10)
    else:
        raise ValueError("there is no rate: set lr, or give the result of a range test")
    if config.scheduler == "none":
        for group in optimizer.param_groups:
            group["lr"] = high * group.get("lr_scale", 1.0)
        return None
    peak = config.peak_epoch
    return one_cycle(optimizer, high, min_lr=low, epochs=epochs, steps_per_epoch=steps, peak_epoch=peak)


def make_card(config: Config, loaders: Loaders) -> dict:
    """What goes with the weights, so that they can be used without the run."""
    weights = first_weights(config)
    begun = {"init_sha256": hashlib.sha256(weights.read_bytes()).hexdigest()} if weights else {}
    return {
        "model": config.model,
        "options": config.model_options,
        "image_size": config.image_size,
        "classes": list(loaders.classes),
        **{name: list(values) for name, values in loaders.normalization.items()},
        "data_sha256": dataset_of(loaders.train).split.digest(),
        "test_sha256": dataset_of(loaders.test).split.digest(),
        "augmentation": dataset_of(loaders.train).describe(),
        "config": config.identity,
        **begun,
    }


def report_run(
    config: Config, device: torch.device, loaders: Loaders, model: nn.Module, folder: Path
) -> None:
    """Predict the test set and write the run's report, then say where it is."""
    from report import write_report  # matplotlib takes a second, which a short command need not wait

    predictions = predict(model, device, loaders.test, precision=config.precision, tta=config.tta)
    if not first():
        return
    path = write_report(folder, model, loaders, predictions)
    images = f"{len(predictions.labels):,} images" + ", six views of each" * config.tta
    print(f"test accuracy {predictions.accuracy:.2%} of {images}")
    print(f"report {path}")
    print(f"the same with its figures in one file: {path.with_suffix('.html')}")


def test_images(
    config: Config, card: dict, device: torch.device, own: bool = False
) -> tuple[Split, DataLoader]:
    """The test images of a dataset, and a loader of them as saved weights expect them.

    Args:
        own: require the test images of the run, by their hash. A folder without train and test folders
            is divided anew when a file comes or goes: the run may have trained on its test images.

    Raises:
        ValueError: the weights know other classes, or the images are not the run's own.
    """
    size, fit = config.image_size, config.fit
    split = load_split(config.dataset, "test", config.data, image_size=size, fit=fit)
    if list(split.classes) != card["classes"]:
        raise ValueError(f"the weights know {card['classes']}, not {list(split.classes)}")
    if own:
        check_same_images(card, {"test_sha256": split.digest()}, config.data)
    whole = replace(config, max_test_batches=None)
    return split, make_loader(split, test_transform(card["mean"], card["std"]), device, whole)


def check_own_weights(folder: Path, card: dict) -> None:
    """Refuse a run folder that holds another run's weights.

    Raises:
        ValueError: the settings that differ are named, or a file of the run is not what it must be.
    """
    config, _ = read_files(folder, "config.json", "history.json")
    ours = {name: value for name, value in config.identity.items() if name not in MAY_DIFFER}
    other = [name for name, value in ours.items() if card["config"].get(name, value) != value]
    if other:
        raise ValueError(f"the weights in {folder} are another run's: they differ in {', '.join(other)}")


def read_model(args: argparse.Namespace) -> tuple[nn.Module, dict, torch.device]:
    """Model and card of saved weights, and the device asked for."""
    return *load_weights(args.weights), get_device(args.device)


def run_config(card: dict, args: argparse.Namespace) -> Config:
    """The configuration of the run that made some weights, with the data and precision asked for."""
    try:
        config = Config(**card["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{args.weights} has no configuration of this version ({error})") from None
    return replace(config, data=args.data or config.data, precision=args.precision or config.precision)
