"""Time to accuracy: a recipe's test accuracy at its last epoch and its time, over several seeds.

python -m benchmarks.time_to_accuracy --recipe custom_resnet --seeds 5
python -m benchmarks.time_to_accuracy --recipe custom_resnet --runs FOLDER

Every seed is a `python main.py`; flags that are not listed below go on to it. A seed that is done is not
run again, and one that was stopped is resumed, so the command can be given until nothing is left. With
`--runs`, what `main.py --seeds` left in FOLDER is read, and nothing runs. Each recipe and machine has a
file in benchmarks/results/accuracy, which is written after every seed.
"""

import json
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import common
from config import RECIPES, Config, parse_config
from files import write_whole
from models import make_model
from reporting.comparison import read_answers, read_groups
from reporting.evidence import estimate
from utils import History, environment, get_device, markdown_table

RUNS = common.ROOT / "runs" / "benchmarks"
PATIENCE = 120  # seconds for a run that was told to stop to write its checkpoint
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)


def slug(text: str) -> str:
    """Words and numbers of a text as a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def open_record(
    recipe: str, flags: list[str], folder: Path, facts: dict | None = None
) -> tuple[Path, dict]:
    """The file of a recipe on this machine, or on that of `facts`, and what it holds or will hold."""
    config = parse_config(["--recipe", recipe, *flags])
    facts = facts or environment(get_device(config.device))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(' '.join([recipe, *flags]))}-on-{slug(facts['machine'])}.json"
    if path.exists():
        return path, common.read_json(path)
    return path, {
        "recipe": recipe,
        "model": config.model,
        "width": config.width,
        "parameters": parameters_of(config),
        "epochs": config.epochs,
        "tta": config.tta,
        "command": shlex.join(["python", "main.py", "--recipe", recipe, *flags]),
        **facts,
        "settings": config.recipe,
        "runs": [],
    }


def parameters_of(config: Config) -> int:
    """How many numbers the network learns."""
    model = make_model(config.model, **config.model_options)
    return sum(parameter.numel() for parameter in model.parameters())


def run_of(record: dict, seed: int) -> dict:
    """The entry of a seed, a new one if there is none; `accuracy` is None until it is done."""
    for run in record["runs"]:
        if run["seed"] == seed:
            return run
    record["runs"].append({"seed": seed, "accuracy": None, "pieces": []})
    return record["runs"][-1]


def run_seed(
    recipe: str, seed: int, flags: list[str], folder: Path, deadline: float | None = None
) -> bool:
    """Run a seed to its end, or until `deadline` (of time.monotonic); whether it is done.

    Raises:
        RuntimeError: main.py failed; the end of what it printed.
    """
    path, record = open_record(recipe, flags, folder)
    run = run_of(record, seed)
    if run["accuracy"] is not None:
        return True
    place = RUNS / f"{path.stem}-seed-{seed}"
    run["pieces"].append(None)  # of unknown length, should this process be killed
    write_record(path, record)
    begin = time.monotonic()
    words = ["--recipe", recipe, *flags, "--seed", str(seed), "--output", str(place), "--resume"]
    try:
        code, log = call_main(words, place.with_name(f"{place.name}.log"), deadline)
    finally:
        run["pieces"][-1] = round(time.monotonic() - begin, 2)
        write_record(path, record)
    if code == 0:
        run |= outcome(place, run["pieces"])
    elif code not in STOPPED:
        raise RuntimeError(f"{recipe}, seed {seed}: exit code {code}: {log[-1000:]}")
    write_record(path, record)
    if code == 0:
        shutil.rmtree(place / "checkpoints", ignore_errors=True)  # up to half a gigabyte
    return code == 0


def write_record(path: Path, record: dict) -> None:
    """Write the file of a recipe, with what its seeds have in common."""
    write_whole(path, json.dumps(summarize(record), indent=1) + "\n")


def call_main(flags: list[str], log: Path, deadline: float | None) -> tuple[int, str]:
    """Exit code and output of main.py, which is told to stop at the deadline."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "main.py", *flags], cwd=common.ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            code = end(process)
            if isinstance(stop, KeyboardInterrupt):
                raise
            return code, log.read_text()
    return process.returncode, log.read_text()


def end(process: subprocess.Popen) -> int:
    """The exit code of a run that is told to stop, or made to: the next one needs the device."""
    process.terminate()
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return STOPPED[0]  # what it wrote before is whole


def read_seeds(recipe: str, flags: list[str], place: Path, folder: Path) -> None:
    """Take the finished runs of a folder of `main.py --seeds` into the recipe's file.

    Raises:
        ValueError: there is none, or they are not of this recipe.
    """
    ((name, runs),) = read_groups([place], least=1).items()
    settings = parse_config(["--recipe", recipe, *flags]).recipe
    other = [name for name, value in settings.items() if runs[0].config.recipe[name] != value]
    if other:
        raise ValueError(f"{name} is not of {recipe}: it differs in {', '.join(other)}")
    facts = common.read_json(runs[0].folder / "environment.json")
    facts = {key: facts[key] for key in ("machine", "versions")}
    path, record = open_record(recipe, flags, folder, facts)
    for run in runs:
        entry = run_of(record, run.config.seed)
        if entry["accuracy"] is None:
            entry |= outcome(run.folder, [None])
    write_record(path, record)


def outcome(place: Path, pieces: list[float | None]) -> dict:
    """What a run that is done has shown; the accuracy is that of its last epoch on the test images."""
    rows, known = History.load(place).epochs, [piece for piece in pieces if piece is not None]
    return {
        "accuracy": rows[-1].test_accuracy,
        "images": len(read_answers(place)),
        "command_seconds": round(sum(known), 2) if len(known) == len(pieces) else None,
        "training_seconds": round(sum(row.seconds for row in rows), 2),
        "epoch_seconds": [round(row.seconds, 3) for row in rows],
        "test_accuracies": [row.test_accuracy for row in rows],
        "date": common.today(),
    }


def done_runs(record: dict) -> list[dict]:
    """The seeds that have an accuracy."""
    return [run for run in record["runs"] if run["accuracy"] is not None]


def summarize(record: dict) -> dict:
    """The record with its mean, deviation and times over the seeds that are done."""
    record["runs"].sort(key=lambda run: run["seed"])
    runs = done_runs(record)
    accuracies = [run["accuracy"] for run in runs]
    found = estimate(accuracies) if runs else None
    return record | {
        "seeds": [run["seed"] for run in runs],
        "accuracies": accuracies,
        "mean": found.mean if found else None,
        "deviation": found.deviation if found else None,
        "training_seconds": middle([run["training_seconds"] for run in runs]),
        "epoch_seconds": middle([seconds for run in runs for seconds in run["epoch_seconds"]]),
        "command_seconds": middle([run["command_seconds"] for run in runs]),
    }


def middle(values: list[float | None]) -> float | None:
    """The median of those that are known, or None."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def time_to(run: dict, target: float) -> tuple[int, float] | None:
    """Epochs and seconds of training until a run's test accuracy reached a target; None: never."""
    seconds = 0.0
    for epoch, (accuracy, taken) in enumerate(
        zip(run["test_accuracies"], run["epoch_seconds"], strict=True), 1
    ):
        seconds += taken
        if accuracy is not None and accuracy >= target:
            return epoch, seconds
    return None


def render(records: list[dict]) -> str:
    """The table of recipes that have a seed done."""
    rows = []
    for record in records:
        deviation = "" if record["deviation"] is None else f" ± {100 * record['deviation']:.2f}"
        views = ", six views of each image" if record["tta"] else ""
        width = "" if record["width"] == 64 else f", width {record['width']}"
        rows.append(
            [
                f"{record['model']}{width}",
                f"{record['parameters']:,}",
                record["epochs"],
                f"{100 * record['mean']:.2f}{deviation} % ({len(record['seeds'])}){views}",
                common.quantity(record["training_seconds"]),
                common.quantity(record["command_seconds"]) if record["command_seconds"] else "",
                record["machine"],
                f"`{record['command']}`",
            ]
        )
    heads = ["model", "parameters", "epochs", "test accuracy (seeds)"]
    return markdown_table([*heads, "epochs, s", "command, s", "machine", "command"], rows)


def main(argv: list[str] | None = None) -> None:
    """Run the seeds that are missing, and print the table."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--recipe", required=True, choices=RECIPES)
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0 (default: 5)")
    parser.add_argument("--minutes", type=float, help="stop after so many, to go on another time")
    parser.add_argument("--target", type=float, help="say when each seed first reached this accuracy")
    parser.add_argument("--runs", type=Path, help="read this folder of main.py --seeds, and run nothing")
    args, flags = parser.parse_known_args(argv)
    folder = common.result_folder(args) / "accuracy"
    if args.runs:
        read_seeds(args.recipe, flags, args.runs, folder)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the run is told to stop, too
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    for seed in range(args.seeds):
        if not run_seed(args.recipe, seed, flags, folder, deadline):
            print(f"time is up in seed {seed}; the same command goes on")
            break
        report(run_of(open_record(args.recipe, flags, folder)[1], seed), args.target)
    path, record = open_record(args.recipe, flags, folder)
    if done_runs(record):
        print(f"\n{render([record])}\n\nwritten to {path}")


def report(run: dict, target: float | None) -> None:
    """Print one seed's result."""
    print(
        f"seed {run['seed']}: {run['accuracy']:.2%}, training {run['training_seconds']:.1f} s",
        flush=True,
    )
    if target is not None:
        reached = time_to(run, target)
        words = f"after epoch {reached[0]}, {reached[1]:.1f} s" if reached else "never"
        print(f"seed {run['seed']}: {target:.2%} {words}", flush=True)


if __name__ == "__main__":
    main()
