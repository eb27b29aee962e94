"""The command line, and the front door: notebooks import from here what they call.

python main.py --recipe quick              train, and write a report
python main.py test RUN                    evaluate a run folder or a weights file
python main.py predict IMAGE...            classes and probabilities of image files
python main.py find-lr --recipe quick      the range test alone
python main.py report RUN                  write a run's report again
python main.py compare RUN RUN...          a table, a figure, and what the runs' difference is worth
python main.py import-weights FILE.pth     a weights file of what another program wrote, and its accuracy
python main.py export RUN                  an ONNX file (or --format torch) that answers the same
"""

import argparse
import contextlib
import io
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.starting import end_on_signals

if __name__ == "__main__":  # before PyTorch and the rest, which take seconds to load
    end_on_signals("main.py")

import numpy as np

from checkpoint import check_same_images
from config import CHOICES, STORAGE_FIELDS, Config, described, make_parser, parse_config
from data import make_loaders
from files import bad_input_refused, reason, write_csv
from models import MODELS
from run import (
    check_own_weights,
    execute,
    make_card,
    make_scheduler,
    open_run,
    predict_images,
    prepare,
    range_test,
    read_model,
    report_run,
    run,
    run_config,
    test_images,
)
from sources import load_split
from sources.folder import read_image
from sources.split import statistics
from training.distributed import joined, started_by_torchrun, tells
from training.guards import Stopped, signals_noted
from training.loops import fit_model, predict, test, train
from training.lr_finder import find_lr
from training.optim import make_optimizer, one_cycle
from training.progress import unfailing_output
from transforms import CIFAR10_MEAN, CIFAR10_STD
from utils import choose, get_device, name_of, pick_precision, plain
from weights_file import BARE, DEFAULT_WEIGHTS, import_weights, load_weights, save_weights

__all__ = [
    "find_lr",
    "fit_model",
    "main",
    "make_card",
    "make_optimizer",
    "make_scheduler",
    "one_cycle",
    "open_run",
    "predict",
    "range_test",
    "run",
    "test",
    "train",
]


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Of several processes let one speak of bad flags, which all were given."""
    with contextlib.redirect_stderr(sys.stderr if tells() else io.StringIO()):
        yield


def train_command(argv: list[str]) -> None:
    """main.py [train] [flags]."""
    others = ", ".join(name for name in COMMANDS if name != "train")
    usage = (
        "main.py [flags]         train a network and write its report\n"
        f"       main.py COMMAND --help  {others}"
    )
    with told_once():
        config = parse_config(argv, usage=usage)
    flags = {word.partition("=")[0] for word in argv if word.startswith("--")}
    storage = {f"--{name.replace('_', '-')}" for name in STORAGE_FIELDS}
    if config.resume and flags <= storage and not (config.mirror or described(config.output or "")):
        raise ValueError(f"there is no run in {config.output} to resume; to begin one, name a --recipe")
    if config.seeds:
        run(config)
        return
    with joined(get_device(config.device)):
        with bad_input_refused():
            ready = prepare(config)
        execute(config, *ready)


def find_lr_command(argv: list[str]) -> None:
    """main.py find-lr [flags]: the range test of a run, its figure and its suggestions."""
    from reporting.screen import off_screen
    from visualize import plot_lr_finder, save_figure

    config = parse_config(argv, "main.py find-lr")
    if config.seeds:
        raise ValueError("find-lr makes one range test, of --seed: leave --seeds out")
    with bad_input_refused():
        device, loaders, model, optimizer, folder = prepare(config)
    finder = range_test(config, device, loaders, model, optimizer, folder)
    with off_screen():
        save_figure(plot_lr_finder(finder, config.lr_rule), folder / "lr_finder.png")
    print(f"figure {folder / 'lr_finder.png'}")


def test_command(argv: list[str]) -> None:
    """main.py test [RUN]: loss and accuracy of saved weights on their dataset's test images."""
    parser = model_parser("test", "Evaluate a run folder or a weights file.")
    parser.add_argument("run", nargs="?", help="the same as --weights")
    add_data_flag(parser)
    args = parser.parse_args(argv)
    with bad_input_refused():
        if args.weights and args.run:
            raise ValueError(f"which weights, {args.run} or {args.weights}? give one")
        args.run = args.weights or args.run
        args.weights = args.run or DEFAULT_WEIGHTS
        model, card, device = read_model(args)
        config = run_config(card, args)
        split, loader = test_images(config, card, device, own=args.data is None)
    if not args.run:
        print(f"weights {args.weights}, {config.dataset} in {config.data}")
    stats = test(model, device, loader, precision=config.precision, tta=config.tta)
    images = f"{len(split):,} images" + ", six views of each" * config.tta
    number = name_of(pick_precision(config.precision, device))
    print(f"test loss {stats.loss:.4f}, accuracy {stats.accuracy:.2%} of {images}, in {number}")


def predict_command(argv: list[str]) -> None:
    """main.py predict [RUN] IMAGE...: the most probable classes of image files."""
    parser = model_parser("predict", "Classify image files of any size.")
    parser.add_argument(
        "images", nargs="+", help="image files, after a run folder or weights file or not"
    )
    parser.add_argument("--top", type=int, default=3, help="classes to name (default: 3)")
    parser.add_argument("--csv", metavar="FILE", help="write every probability into a CSV file")
    args = parser.parse_args(argv)
    first = args.images[0]
    known = first in MODELS or first.endswith((".safetensors", *BARE))
    if not args.weights and (Path(first).is_dir() or known):
        args.weights = args.images.pop(0)
    args.weights = args.weights or DEFAULT_WEIGHTS
    with bad_input_refused():
        if not args.images:
            raise ValueError(
                f"{args.weights} is taken for a run: which images? give one file or more after it"
            )
        model, card, device = read_model(args)
        fit = card.get("config", {}).get("fit", "crop")  # which older runs did
        images, faults = read_each(args.images, card["image_size"], fit)
    if images:
        stack = np.stack(list(images.values()))
        probabilities = predict_images(model, device, stack, card, args.precision)
        for path, row in zip(images, probabilities, strict=True):
            best = np.argsort(-row)[: max(1, args.top)]
            print(f"{path}:", ", ".join(f"{card['classes'][k]} {row[k]:.1%}" for k in best))
        if args.csv:
            with bad_input_refused():
                write_probabilities(args.csv, list(images), probabilities, card["classes"])
    if faults:
        raise ValueError("; ".join(faults))


def write_probabilities(
    path: str, files: list[str], probabilities: np.ndarray, classes: Sequence[str]
) -> None:
    """A CSV file with a line for each image: file, class, its probability, and that of every class."""
    rows = []
    for file, row in zip(files, probabilities, strict=True):
        best = int(row.argmax())
        rows.append([plain(file), plain(classes[best]), *(f"{x:.6f}" for x in (row[best], *row))])
    write_csv(path, ["file", "predicted", "probability", *map(plain, classes)], rows)


def read_each(paths: list[str], size: int, fit: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The images that can be read, by path, and what is wrong with the others."""
    images, faults = {}, []
    for path in paths:
        try:
            images[path] = read_image(path, size, fit)
        except (ValueError, OSError) as error:
            faults.append(reason(error))
    return images, faults


def report_command(argv: list[str]) -> None:
    """main.py report RUN: predict the run's test images and write its report again."""
    parser = model_parser("report", "Write the report of a run folder again.", shipped=False)
    add_data_flag(parser)
    args = parser.parse_args(argv)
    folder = Path(args.weights)
    with bad_input_refused():
        model, card, device = read_model(args)
        config = run_config(card, args)
        check_own_weights(folder, card)
        loaders = make_loaders(config, device)
        check_same_images(card, make_card(config, loaders), config.data)
    report_run(config, device, loaders, model, folder)


def compare_command(argv: list[str]) -> None:
    """main.py compare RUN RUN...: a table, a figure of the curves, and what the difference is worth."""
    from reporting.comparison import comparison, findings, print_columns, read_groups
    from reporting.screen import off_screen
    from visualize import plot_history, save_figure

    parser = make_parser("main.py compare", "Compare runs, those that differ in the seed alone as one.")
    parser.add_argument("runs", nargs="+", help="run folders, two or more, or folders of --seeds")
    parser.add_argument("--output", help="figure to write (default: compare.png beside the first run)")
    args = parser.parse_args(argv)
    groups = read_groups(args.runs)
    path = Path(args.output or Path(args.runs[0]).resolve().parent / "compare.png")
    histories = {name: [run.history for run in runs] for name, runs in groups.items()}
    with bad_input_refused(), off_screen():
        save_figure(plot_history(histories), path)
    width = shutil.get_terminal_size().columns
    print_columns(comparison(groups), width)
    for said in findings(groups):
        print(textwrap.fill(said, max(width, 40), break_long_words=False), end="\n\n")
    print(f"figure {path}")


def export_command(argv: list[str]) -> None:
    """main.py export RUN: the network as a file that runs without this package, and answers the same."""
    from export import FORMATS, export_model, metadata_of

    parser = make_parser(
        "main.py export", "Write a network for other programs, checked against the original."
    )
    parser.add_argument(
        "weights", nargs="?", default=DEFAULT_WEIGHTS, help="as in test (default: %(default)s)"
    )
    parser.add_argument("--format", default="onnx", help=f"{', '.join(FORMATS)} (default: onnx)")
    parser.add_argument(
        "--output", help="(default: model.onnx or .pt2 in the run, beside the file, or in runs/)"
    )
    args = parser.parse_args(argv)
    model, card = load_weights(args.weights)
    choose("format", args.format, FORMATS)
    source = Path(args.weights)
    if source.is_dir():
        source /= "model"
    elif not source.is_file():  # the name of one in weights/
        source = Path("runs", source)
    path = Path(args.output or source.with_suffix(FORMATS[args.format]))
    if not args.output:
        path.parent.mkdir(exist_ok=True)
    elif not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}")
    images = load_split("cifar10-sample", "test").images[::10]
    grid = np.arange(card["image_size"]) * images.shape[1] // card["image_size"]
    images = images[:, grid][:, :, grid]
    with bad_input_refused():
        difference = export_model(path, model, card, args.format, images)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB of {args.format}")
    print(*(f"  {name}: {text}" for name, text in metadata_of(card).items()), sep="\n")
    print(f"checked on {len(images)} images: logits differ by {difference:.1e} at most")


def import_weights_command(argv: list[str]) -> None:
    """main.py import-weights FILE: give somebody's weights a card, and print their accuracy."""
    parser = make_parser(
        "main.py import-weights", "Make a weights file of what another program wrote, and test it."
    )
    parser.add_argument("file", help="a .pth: a state dict, or a checkpoint with one; or safetensors")
    parser.add_argument("--model", help=f"{', '.join(MODELS)} (default: the one that fits)")
    parser.add_argument("--dataset", default="cifar10", help="of its classes (default: cifar10)")
    parser.add_argument("--data", default="datasets", help="folder that holds it (default: datasets)")
    for name, text in {"mean": "mean", "std": "standard deviation"}.items():
        text = f"{text} that it was trained with, of pixels from 0 to 1 (default: the dataset's)"
        parser.add_argument(f"--{name}", nargs=3, type=float, metavar="X", help=text)
    parser.add_argument("--output", help="(default: beside the file, as .safetensors)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (default: auto)")
    args = parser.parse_args(argv)
    path = Path(args.output or Path(args.file).with_suffix(".safetensors"))
    with bad_input_refused():
        if path.exists():
            raise ValueError(f"{path} is there already; choose another --output")
        model, found = import_weights(args.file, args.model)
        settings = {"model": found["model"], **found["options"]}
        config = Config(**settings, dataset=args.dataset, data=args.data, device=args.device)
        card = imported_card(config, found, args.mean, args.std)
        device = get_device(config.device)
        split, loader = test_images(config, card, device)
    stats = test(model, device, loader)
    save_weights(path, model, card | {"source": Path(args.file).name, "test_accuracy": stats.accuracy})
    told = ", ".join(f"{name} {value}" for name, value in settings.items())
    print(f"{path}: {told}; mean {card['mean']}, std {card['std']}")
    print(f"test loss {stats.loss:.4f}, accuracy {stats.accuracy:.2%} of {len(split):,} images")
    if stats.accuracy < 2 / len(split.classes):
        print(
            "warning: that is hardly more than chance: --mean, --std or the order of the classes are "
            "others than those of its training, or the network computes something else"
        )


def imported_card(
    config: Config, found: dict, mean: Sequence[float] | None, std: Sequence[float] | None
) -> dict:
    """The card of weights that another program trained, with the classes of a dataset.

    Args:
        config: its dataset, and the network.
        found: what `import_weights` says.
        mean, std: that the network was trained with; None: the dataset's.

    Raises:
        ValueError: the dataset has another number of classes.
    """
    test = load_split(config.dataset, "test", config.data)
    if len(test.classes) != found["num_classes"]:
        raise ValueError(
            f"the weights know {found['num_classes']} classes, and {config.dataset} has "
            f"{len(test.classes)}: --dataset names another"
        )
    usual: tuple[tuple[float, ...], ...] = CIFAR10_MEAN, CIFAR10_STD
    if config.dataset not in ("cifar10", "cifar10-sample") and not (mean and std):
        usual = statistics(load_split(config.dataset, "train", config.data).images)
    known = ("model", "dataset", "data", *found["options"])
    return {
        "model": config.model,
        "options": config.model_options,
        "image_size": config.image_size,
        "classes": list(test.classes),
        "mean": list(mean or usual[0]),
        "std": list(std or usual[1]),
        "test_sha256": test.digest(),
        "config": {name: getattr(config, name) for name in known},
    }


def model_parser(command: str, description: str, shipped: bool = True) -> argparse.ArgumentParser:
    """The flags that every command with saved weights has; those in weights/ need not be named."""
    parser = make_parser(f"main.py {command}", description)
    if shipped:
        text = f"run folder, weights file, or name of one in weights/ (default: {DEFAULT_WEIGHTS})"
        parser.add_argument("--weights", help=text)
    else:
        parser.add_argument("weights", metavar="run", help="run folder")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps (default: auto)")
    names = ", ".join(CHOICES["precision"])
    parser.add_argument("--precision", help=f"{names} (default: the run's)")
    return parser


def add_data_flag(parser: argparse.ArgumentParser) -> None:
    """For commands that read the dataset of saved weights."""
    parser.add_argument("--data", help="folder that holds the dataset (default: the run's)")


COMMANDS = {
    "train": train_command,
    "test": test_command,
    "predict": predict_command,
    "find-lr": find_lr_command,
    "report": report_command,
    "compare": compare_command,
    "import-weights": import_weights_command,
    "export": export_command,
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; 2 for bad input and 1 for a run that had to stop, after one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    named = bool(argv) and not argv[0].startswith("-")
    command, rest = (argv[0], argv[1:]) if named else ("train", argv)
    try:
        choose("command", command, COMMANDS)
        if command != "train" and started_by_torchrun():
            raise ValueError(f"torchrun is for training alone: python main.py {command}")
        with unfailing_output(), signals_noted():
            COMMANDS[command](rest)
    except Stopped as stop:
        say(str(stop))
        return 128 + stop.number
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except ValueError as error:
        say(reason(error))
        return 2
    except (FloatingPointError, OSError) as error:
        say(reason(error))
        return 1
    except (RuntimeError, MemoryError) as error:  # a worker that was killed, no memory, no compiler
        if sys.flags.dev_mode:
            raise
        say(f"{first_line(error)}; python -X dev main.py shows where")
        return 1
    return 0


def say(text: str) -> None:
    """Why the run ended, in one line; of several processes of a machine one says it."""
    if tells():
        print(f"main.py: {text}", file=sys.stderr)


def first_line(error: Exception) -> str:
    """What happened, in one line, and what helps."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0].strip().rstrip(".:")
    if "DataLoader worker" in text or "DataLoader timed out" in text:
        text += "; --resume continues the run, with fewer --workers if memory was short"
    elif isinstance(error, MemoryError) or "memory" in text:
        text += "; a smaller --batch-size or --width needs less memory"
    return text


if __name__ == "__main__":
    sys.exit(main())
