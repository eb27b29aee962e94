"""Trains, tests, fits and predicts; the command line of the package.

python main.py --recipe quick              train, and write a report
python main.py test RUN                    evaluate a run folder or a weights file
python main.py predict RUN IMAGE...        classes and probabilities of image files
python main.py find-lr --recipe quick      the range test alone
python main.py report RUN                  write a run's report again
"""

import contextlib
import itertools
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from checkpoint import load_weights, save_weights
from config import CHOICES, Config, make_parser, parse_config
from data import Loaders, load_split, make_loader, make_loaders, read_image
from models import make_model
from transforms import normalize, test_transform
from utils import (
    Epoch,
    History,
    LRFinderResult,
    Predictions,
    Stats,
    autocast,
    environment,
    find_lr,
    get_device,
    make_scaler,
    one_cycle,
    pick_precision,
    random_state_kept,
    seed_everything,
    summarize,
    write_text,
)

# The stream of random numbers for dropout = f(seed, epoch, step); data.py has the other two.
DROPOUT = 2
CURE = "a lower --lr or --precision fp32 may help"


def train(
    model: nn.Module,
    device: torch.device,
    train_loader,
    optimizer: torch.optim.Optimizer,
    scheduler=None,
    *,
    epoch: int | None = None,
    precision: str = "auto",
    label_smoothing: float = 0.0,
    seed: int = 0,
    max_batches: int | None = None,
) -> Stats:
    """Train for one epoch with cross-entropy.

    Args:
        train_loader: yields images float (N, C, H, W) and labels int64 (N,).
        scheduler: stepped after every batch.
        epoch: which one, from 1; none: the loader's next.
        precision: of the forward pass, as in `pick_precision`.
        seed: of dropout.
        max_batches: stop after so many.

    Returns:
        Mean loss and accuracy over the epoch, in training mode and as the weights changed.

    Raises:
        FloatingPointError: the loss is not finite; the weights are those before that step.
    """
    device = torch.device(device)
    scaler = make_scaler(device, pick_precision(precision, device))
    options = {"precision": precision, "label_smoothing": label_smoothing, "seed": seed}
    return train_epoch(
        model, device, train_loader, optimizer, scheduler, scaler, epoch, max_batches, **options
    )[0]


def train_epoch(
    model,
    device: torch.device,
    loader,
    optimizer,
    scheduler,
    scaler,
    epoch: int | None,
    max_batches: int | None,
    *,
    precision: str,
    label_smoothing: float,
    seed: int,
) -> tuple[Stats, list[float], int]:
    """`train`, and also the rate that each step used and the number of images seen."""
    dtype = pick_precision(precision, device)
    epoch = start_epoch(loader, epoch)
    model.to(device, memory_format=torch.channels_last).train()
    totals = torch.zeros(2, device=device)  # loss and hits, summed over images
    lrs, seen = [], 0
    for step, (images, labels) in enumerate(progress(loader, f"epoch {epoch}", max_batches)):
        images, labels = to_device(images, labels, device)
        lrs.append(optimizer.param_groups[0]["lr"])
        where = f"epoch {epoch}, step {step + 1}, learning rate {lrs[-1]:.4g}"
        with random_state_kept(device):
            torch.manual_seed(int(np.random.default_rng([seed, DROPOUT, epoch, step]).integers(2**63)))
            totals += train_step(model, images, labels, optimizer, scaler, dtype, label_smoothing, where)
        seen += len(labels)
        if scheduler is not None:
            scheduler.step()
    start_epoch(loader, epoch + 1)
    if not seen:
        raise ValueError("the training loader has no batch")
    return Stats(*(totals / seen).tolist()), lrs, seen  # one transfer for the epoch's sums


def train_step(
    model, images, labels, optimizer, scaler, dtype, label_smoothing: float, where: str
) -> torch.Tensor:
    """One update; returns loss and hits summed over the batch, on the device."""
    optimizer.zero_grad(set_to_none=True)
    with autocast(images.device, dtype):
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss.item()} at {where}; stopped before the update; {CURE}"
        )
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    hits = (logits.argmax(1) == labels).sum()
    return torch.stack([loss.detach().float() * len(labels), hits.float()])


def test(
    model: nn.Module,
    device: torch.device,
    test_loader,
    *,
    precision: str = "auto",
    max_batches: int | None = None,
) -> Stats:
    """Mean cross-entropy and accuracy over every image of a loader, each counted once."""
    logits, labels = forward_all(model, device, test_loader, precision, max_batches)
    hits = (logits.argmax(1) == labels).sum().item()
    return Stats(F.cross_entropy(logits, labels).item(), hits / len(labels))


def predict(
    model: nn.Module,
    device: torch.device,
    loader,
    *,
    precision: str = "auto",
    max_batches: int | None = None,
) -> Predictions:
    """Class probabilities of every image of a loader, in its order."""
    logits, labels = forward_all(model, device, loader, precision, max_batches)
    return Predictions(logits.softmax(1).cpu().numpy(), labels.cpu().numpy())


def forward_all(model, device, loader, precision: str, max_batches: int | None):
    """Logits float32 (N, K) and labels (N,) of a loader, on the device; the model's mode is kept."""
    device = torch.device(device)
    dtype = pick_precision(precision, device)
    training = model.training
    model.to(device, memory_format=torch.channels_last).eval()
    logits, targets = [], []
    with torch.inference_mode(), autocast(device, dtype):
        for images, labels in itertools.islice(loader, max_batches):
            images, labels = to_device(images, labels, device)
            logits.append(model(images).float())
            targets.append(labels)
    model.train(training)
    return torch.cat(logits), torch.cat(targets)


def fit_model(
    model: nn.Module,
    device: torch.device,
    train_loader,
    test_loader,
    optimizer: torch.optim.Optimizer,
    scheduler=None,
    epochs: int = 20,
    *,
    val_loader=None,
    precision: str = "auto",
    label_smoothing: float = 0.0,
    seed: int = 0,
    max_train_batches: int | None = None,
    max_test_batches: int | None = None,
    folder: str | Path | None = None,
    card: dict | None = None,
) -> History:
    """Train for some epochs, evaluate after each, print one table row for each.

    Args:
        scheduler: stepped after every batch.
        val_loader: judged after each epoch instead of the test set, which then is looked at once,
            after the last.
        folder: where history, TensorBoard events and, if there is a `card`, weights are written at
            the end of every epoch.
        card: goes with the weights, see `save_weights`.

    Returns:
        One row an epoch, and the learning rate of every step.

    Raises:
        FloatingPointError: the loss is not finite; the rows and weights of the epochs before are kept.
    """
    history, device = History(), torch.device(device)
    scaler = make_scaler(device, pick_precision(precision, device))
    options = {"precision": precision, "label_smoothing": label_smoothing, "seed": seed}
    evaluate = {"precision": precision, "max_batches": max_test_batches}
    with event_writer(folder) as writer:
        for epoch in range(1, epochs + 1):
            start = time.perf_counter()
            trained, lrs, seen = train_epoch(
                model,
                device,
                train_loader,
                optimizer,
                scheduler,
                scaler,
                epoch,
                max_train_batches,
                **options,
            )
            speed = seen / (time.perf_counter() - start)
            stats = {"train": trained}
            if val_loader is not None:
                stats["val"] = test(model, device, val_loader, **evaluate)
            if val_loader is None or epoch == epochs:
                stats["test"] = test(model, device, test_loader, **evaluate)
            row = make_row(epoch, lrs[-1], stats, time.perf_counter() - start, speed)
            history.epochs.append(row)
            history.lrs += lrs
            print_row(row, header=epoch == 1)
            if folder is not None:
                write_events(writer, row, history.lrs)
                history.save(Path(folder))
                if card is not None:
                    save_weights(Path(folder) / "weights.safetensors", model, card)
    return history


def make_optimizer(
    name: str, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Adam, AdamW (betas 0.9, 0.999) or SGD with Nesterov momentum 0.9, by name."""
    common = {"params": model.parameters(), "lr": lr, "weight_decay": weight_decay}
    if name == "sgd":
        return torch.optim.SGD(**common, momentum=0.9, nesterov=True)
    if name in ("adam", "adamw"):
        kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return kind(**common, betas=(0.9, 0.999))
    raise ValueError(f"unknown optimizer {name!r}; choose from adam, adamw, sgd")


def to_device(images, labels, device: torch.device):
    """A batch on the device, images in channels-last memory; free for what is there already."""
    images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
    return images, labels.to(device, non_blocking=True)


def start_epoch(loader, epoch: int | None) -> int:
    """Make a loader's next pass that of `epoch`, if it knows epochs; return the epoch."""
    sampler = getattr(loader, "sampler", None)
    if epoch is None:
        return getattr(sampler, "epoch", 1)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    return epoch


def progress(loader, name: str, max_batches: int | None):
    """The batches of a loader behind a bar that leaves no trace; none where nobody watches."""
    total = len(loader) if max_batches is None else min(len(loader), max_batches)
    watched = sys.stdout.isatty() or "google.colab" in sys.modules
    return tqdm(
        itertools.islice(loader, max_batches),
        name,
        total,
        leave=False,
        file=sys.stdout,
        disable=not watched,
        mininterval=0.5,
    )


def make_row(epoch: int, lr: float, stats: dict[str, Stats], seconds: float, speed: float) -> Epoch:
    """An `Epoch` from the stats of each part that was measured.

    Raises:
        FloatingPointError: one of them is not finite, as after an update that ruined the weights.
    """
    for part, (loss, _) in stats.items():
        if not math.isfinite(loss):
            raise FloatingPointError(f"the {part} loss is {loss} after epoch {epoch}; {CURE}")
    columns = {f"{part}_{name}": x for part, s in stats.items() for name, x in s._asdict().items()}
    return Epoch(epoch=epoch, lr=lr, seconds=seconds, images_per_second=speed, **columns)


def print_row(row: Epoch, header: bool) -> None:
    """One line of the training table, after its head if `header`."""
    stats = row.stats()
    parts = ["train", "val", "test"] if "val" in stats else ["train", "test"]
    if header:
        heads = "".join(f"{part + ' loss':>12}{'acc':>8}" for part in parts)
        print(f"{'epoch':>5}{'lr':>11}{heads}{'seconds':>9}{'images/s':>10}")
    cells = [
        f"{stats[part].loss:>12.4f}{stats[part].accuracy:>8.2%}" if part in stats else f"{'':>20}"
        for part in parts
    ]
    times = f"{row.seconds:>9.1f}{row.images_per_second:>10,.0f}"
    print(f"{row.epoch:>5}{row.lr:>11.3g}{''.join(cells)}{times}", flush=True)


def event_writer(folder: str | Path | None):
    """TensorBoard's writer for a run folder, or nothing for no folder."""
    if folder is None:
        return contextlib.nullcontext()
    from torch.utils.tensorboard import SummaryWriter  # two seconds of imports

    return SummaryWriter(Path(folder) / "tensorboard")


def write_events(writer, row: Epoch, lrs: list[float]) -> None:
    """One epoch's numbers, and the rate of each of its steps, for TensorBoard."""
    for part, stats in row.stats().items():
        for metric, value in stats._asdict().items():
            writer.add_scalar(f"{metric}/{part}", value, row.epoch)
    steps = len(lrs) // row.epoch
    for step in range(len(lrs) - steps, len(lrs)):
        writer.add_scalar("lr", lrs[step], step)
    writer.flush()


def run(config: Config) -> Path:
    """Train as `config` says and write the run folder.

    Returns:
        The folder, whose report.md tells the rest.

    Raises:
        ValueError, OSError: the run cannot start; one line that says why.
        FloatingPointError: the loss became not finite; what the folder holds is from before.
    """
    return carry_out(config, *prepare(config))


def prepare(config: Config) -> tuple[torch.device, Loaders, nn.Module, torch.optim.Optimizer, Path]:
    """Device, loaders, model, optimizer and folder of a run; the folder is made last."""
    device = get_device(config.device)
    loaders = make_loaders(config, device)
    seed_everything(config.seed)
    model = make_model(config.model, len(loaders.classes), **config.model_options)
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(config.optimizer, model, config.lr or 1e-3, config.weight_decay)
    return device, loaders, model, optimizer, open_run(config, device, model)


def open_run(config: Config, device: torch.device, model: nn.Module) -> Path:
    """Make the run folder and write what the run is: configuration, machine, network.

    Raises:
        ValueError: `config.output` holds something already; no run overwrites another.
    """
    folder = claim_folder(config)
    write_text(folder / "config.json", json.dumps(asdict(config), indent=1))
    write_text(folder / "environment.json", json.dumps(environment(device), indent=1))
    write_text(folder / "summary.txt", summarize(model, config.image_size))
    dtype = str(pick_precision(config.precision, device)).removeprefix("torch.")
    print(f"{config.model} on {config.dataset}, {device}, {dtype}, seed {config.seed}, in {folder}")
    return folder


def claim_folder(config: Config) -> Path:
    """A folder that no other run has: `config.output`, or a new one named after model, data and time."""
    if config.output:
        folder = Path(config.output)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"output {folder} is there already; choose another or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    name = f"{config.model}-{config.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    for ending in itertools.chain([""], (f"-{k}" for k in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            folder = Path("runs", name + ending)
            folder.mkdir(parents=True)
            return folder


def carry_out(config: Config, device, loaders: Loaders, model, optimizer, folder: Path) -> Path:
    """Find the rate, train, and report, in a run folder that is open."""
    found = None
    if config.lr is None:
        found = range_test(config, device, loaders, model, optimizer, folder)
    scheduler = make_scheduler(config, loaders, optimizer, found)
    fit_model(
        model,
        device,
        loaders.train,
        loaders.test,
        optimizer,
        scheduler,
        config.epochs,
        val_loader=loaders.validation,
        folder=folder,
        card=make_card(config, loaders),
        **config.fit_options,
    )
    report_run(config, device, loaders, model, folder)
    return folder


def range_test(
    config: Config, device, loaders: Loaders, model, optimizer, folder: Path
) -> LRFinderResult:
    """`find_lr` as the run trains; the result is printed and kept as lr_finder.json."""
    found = find_lr(
        model,
        device,
        loaders.train,
        optimizer,
        precision=config.precision,
        label_smoothing=config.label_smoothing,
    )
    write_text(folder / "lr_finder.json", json.dumps(asdict(found)))
    suggested = [f"{rule} {rate:.3g}" for rule, rate in found.suggestions.items()]
    print(f"range test, {len(found.lrs)} steps: {', '.join(suggested)}")
    return found


def make_scheduler(config: Config, loaders: Loaders, optimizer, found: LRFinderResult | None):
    """Set the optimizer's rate, given or found, and return its scheduler, or None for a constant rate.

    A found schedule starts at `start` or at a tenth of its peak, whichever is less.
    """
    high = config.lr or found.suggestions[config.lr_rule]
    if config.scheduler == "none":
        for group in optimizer.param_groups:
            group["lr"] = high
        return None
    low = None if config.lr else min(found.suggestions["start"], high / 10)
    steps = min(len(loaders.train), config.max_train_batches or len(loaders.train))
    scheduler = one_cycle(
        optimizer,
        high,
        min_lr=low,
        epochs=config.epochs,
        steps_per_epoch=steps,
        peak_epoch=config.peak_epoch,
    )
    print(f"one-cycle from {optimizer.param_groups[0]['lr']:.3g} to {high:.3g} and down")
    return scheduler


def make_card(config: Config, loaders: Loaders) -> dict:
    """What goes with the weights, so that they can be used without the run."""
    return {
        "model": config.model,
        "options": config.model_options,
        "image_size": config.image_size,
        "classes": list(loaders.classes),
        **{name: list(values) for name, values in loaders.normalization.items()},
        "config": asdict(config),
    }


def report_run(config: Config, device, loaders: Loaders, model, folder: Path) -> None:
    """Predict the test set and write the run's report, then say where it is."""
    from report import write_report  # matplotlib takes a second, which a short command need not wait

    predictions = predict(
        model, device, loaders.test, precision=config.precision, max_batches=config.max_test_batches
    )
    path = write_report(folder, model, loaders, predictions)
    print(f"test accuracy {predictions.accuracy:.2%} of {len(predictions.labels):,} images")
    print(f"report {path}")


@contextlib.contextmanager
def bad_input_refused():
    """What is wrong with the user's input ends the program: one line, exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"main.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def train_command(argv: list[str]) -> None:
    """main.py [train] [flags]."""
    config = parse_config(argv, epilog=__doc__)
    with bad_input_refused():
        ready = prepare(config)
    carry_out(config, *ready)


def find_lr_command(argv: list[str]) -> None:
    """main.py find-lr [flags]: the range test of a run, its figure and its suggestions."""
    from visualize import plot_lr_finder

    config = parse_config(argv, "main.py find-lr")
    with bad_input_refused():
        device, loaders, model, optimizer, folder = prepare(config)
    found = range_test(config, device, loaders, model, optimizer, folder)
    plot_lr_finder(found, config.lr_rule).savefig(folder / "lr_finder.png")
    print(f"figure {folder / 'lr_finder.png'}")


def test_command(argv: list[str]) -> None:
    """main.py test RUN: loss and accuracy of saved weights on their dataset's test images."""
    parser = model_parser("test", "Evaluate a run folder or a weights file.")
    add_data_flag(parser)
    given = parser.parse_args(argv)
    with bad_input_refused():
        model, card, device = read_model(given)
        config = run_config(card, given)
        split = load_split(config.dataset, "test", config.data, image_size=config.image_size)
        if list(split.classes) != card["classes"]:
            raise ValueError(f"the weights know {card['classes']}, not {list(split.classes)}")
    loader = make_loader(split, test_transform(card["mean"], card["std"]), device, config)
    stats = test(model, device, loader, precision=config.precision)
    print(f"test loss {stats.loss:.4f}, accuracy {stats.accuracy:.2%} of {len(split):,} images")


def predict_command(argv: list[str]) -> None:
    """main.py predict RUN IMAGE...: the most probable classes of image files."""
    parser = model_parser("predict", "Classify image files of any size.")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--top", type=int, default=3, help="classes to name (default: 3)")
    given = parser.parse_args(argv)
    with bad_input_refused():
        model, card, device = read_model(given)
        images = np.stack([read_image(path, card["image_size"]) for path in given.images])
    inputs = normalize(images, card["mean"], card["std"])
    batch = [(inputs, torch.zeros(len(inputs), dtype=torch.int64))]
    predictions = predict(model, device, batch, precision=given.precision or "auto")
    for path, row in zip(given.images, predictions.probabilities, strict=True):
        best = np.argsort(-row)[: max(1, given.top)]
        print(f"{path}:", ", ".join(f"{card['classes'][k]} {row[k]:.1%}" for k in best))


def report_command(argv: list[str]) -> None:
    """main.py report RUN: predict the run's test images and write its report again."""
    parser = model_parser("report", "Write the report of a run folder again.")
    add_data_flag(parser)
    given = parser.parse_args(argv)
    folder = Path(given.weights)
    with bad_input_refused():
        model, card, device = read_model(given)
        if not (folder / "history.json").is_file():
            raise ValueError(f"{folder} is no run folder: it has no history.json")
        config = run_config(card, given)
        loaders = make_loaders(config, device)
    report_run(config, device, loaders, model, folder)


def model_parser(command: str, description: str):
    """The flags that every command with saved weights has."""
    parser = make_parser(f"main.py {command}", description)
    parser.add_argument("weights", help="run folder or weights file")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (default: auto)")
    parser.add_argument("--precision", choices=CHOICES["precision"], help="(default: the run's)")
    return parser


def add_data_flag(parser) -> None:
    """For commands that read the dataset of saved weights."""
    parser.add_argument("--data", help="folder that holds the dataset (default: the run's)")


def read_model(given) -> tuple[nn.Module, dict, torch.device]:
    """Model and card of saved weights, and the device asked for."""
    return *load_weights(given.weights), get_device(given.device)


def run_config(card: dict, given) -> Config:
    """The configuration of the run that made some weights, with the data and precision asked for."""
    try:
        config = Config(**card["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{given.weights} has no configuration of this version ({error})") from None
    return replace(config, data=given.data or config.data, precision=given.precision or config.precision)


COMMANDS = {
    "train": train_command,
    "test": test_command,
    "predict": predict_command,
    "find-lr": find_lr_command,
    "report": report_command,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; 2 for bad input and 1 for a run that had to stop, after one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    named = bool(argv) and not argv[0].startswith("-")
    command, rest = (argv[0], argv[1:]) if named else ("train", argv)
    if command not in COMMANDS:
        print(
            f"main.py: unknown command {command!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    try:
        COMMANDS[command](rest)
    except FloatingPointError as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
