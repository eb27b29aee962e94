"""GPU: the whole programme on a machine with CUDA, in pieces, the most valuable first.

until python -m benchmarks.gpu --minutes 9; do [ $? = 3 ] || break; done

Accuracy of every recipe with one seed, then with more; speed of a step, and how much of the GPU's peak
that is; synchronisations within an epoch; torch.compile; where there are several GPUs, how the speed
grows with their number. Every result is written as it comes. The exit code is 3 if the time was up
before the end: the same command goes on. A failure is written too, and passed over; the exit code at the
end is then 1.
"""

import argparse
import functools
import json
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks import common, distributed, time_to_accuracy
from benchmarks.peers.job import Clock
from config import RECIPES, Config
from data import limit_batches, make_loader, start_epoch
from files import write_whole
from models import make_model
from sources import Split, load_split
from training.loops import train
from training.optim import make_optimizer
from transforms import train_transform
from utils import get_device

RECIPE_ORDER = ("speedrun", "custom_resnet_best", "custom_resnet", "resnet18", "resnet34")
MULTIPLY_ADDS = {
    "custom_resnet": 379.27e6,
    "resnet18": 555.42e6,
    "resnet34": 1159.40e6,
}  # an image, 32 px
# Dense TFLOP/s in bf16, or fp16 where there is no bf16, as the makers state them.
PEAKS = {"T4": 65, "L4": 121, "V100": 125, "A100": 312, "H100": 989, "H200": 989}
LEAST = 120  # seconds that must be left to begin a measurement
TINY = (
    "--dataset cifar10-sample --width 8 --batch-size 32 --epochs 1 --max-train-batches 2 "
    "--max-test-batches 1 --lr 0.01"
).split()
UNFINISHED = 3  # exit code


def peak_of(device: torch.device) -> float | None:
    """The FLOP/s that a GPU's maker states, or None if it is not in the table."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ").split()
    if {"PCIe", "NVL", "MIG"} & set(words):  # slower ones of the same name, and parts of one
        return None
    return next((1e12 * PEAKS[word] for word in words if word in PEAKS), None)


class Bench:
    """The device, the images and the sizes that the measurements share."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device, self.smoke = args, get_device(args.device), args.smoke
        args.device = str(self.device)
        # An epoch has 48 batches of 1,024.
        self.steps, self.warmup, self.width = (2, 1, 8) if self.smoke else (36, 10, 64)
        machine = common.machine_facts(args.device)["machine"]
        self.folder = common.result_folder(args) / "gpu" / time_to_accuracy.slug(machine)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.split: Split | None = None

    def loader(self, batch: int) -> DataLoader:
        """The loader of a run with whole batches; the images are read once."""
        if self.split is None:
            self.split = load_split("cifar10-sample" if self.smoke else "cifar10", "train")
        config = Config(batch_size=batch)
        return make_loader(self.split, train_transform(), self.device, config, shuffle=True)

    def model(self, name: str = "custom_resnet") -> nn.Module:
        """A network with the same weights every time, on the device, in channels-last memory."""
        torch.manual_seed(0)
        model = make_model(name, width=self.width)
        return model.to(self.device).to(memory_format=torch.channels_last)

    def rate(self, model: nn.Module, loader: DataLoader, batch: int) -> float:
        """Images a second of `train`, by SGD at a rate that harms nothing."""
        clock = Clock(steps=self.steps, warmup=self.warmup, device=self.device)
        optimizer = make_optimizer("sgd", model, 1e-3)
        # In epoch 1 a single image goes first: a compiler would take the batch for one that varies.
        start_epoch(loader, 2)
        limit_batches(loader, clock.updates)
        train(model, self.device, loader, optimizer, clock)
        return self.steps * batch / clock.seconds

    def loading_seconds(self, loader: DataLoader) -> float:
        """Seconds that an augmented batch takes when nothing else is done."""
        clock = Clock(steps=self.steps, warmup=self.warmup, device=self.device)
        for _ in islice(loader, clock.updates):
            clock.mark()
        start_epoch(loader, 1)
        return clock.seconds / self.steps

    def write(self, name: str, unit: str, rows: list[dict], claims: list[dict], **settings: Any) -> None:
        """Write one measurement to its file, and print it."""
        result = common.make_result("gpu", unit, rows, claims, self.args, **settings)
        write_whole(self.folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
        print(common.render(result), flush=True)


def measure_speed(bench: Bench, name: str, batch: int) -> None:
    """Images a second of each network, how much of the peak that is, and what augmentation takes."""
    peak, rows, claims = peak_of(bench.device), [], []
    loader = bench.loader(batch)
    for network, adds in MULTIPLY_ADDS.items():
        model = bench.model(network)
        both = {
            "rate": functools.partial(bench.rate, model, loader, batch),
            "load": functools.partial(bench.loading_seconds, loader),
        }
        values = common.measure(both, bench.args.rounds)
        flops = [6 * adds * rate for rate in values["rate"]]  # 2 a multiply-add, forward and twice back
        shares = [f / peak for f in flops] if peak and bench.width == 64 else []
        share = f"{common.spread(shares)['median']:.1%}" if shares else "not known"
        rows.append(common.make_row(f"{network}, batch {batch}", values["rate"], **{"of peak": share}))
        loads = [
            seconds * rate / batch for seconds, rate in zip(values["load"], values["rate"], strict=True)
        ]
        claims.append(common.make_claim(f"{network}: augmentation / step", loads, 0.02, most=True))
        if shares:
            aim = 0.45 if network == "custom_resnet" else None
            claims.append(common.make_claim(f"{network}: FLOP/s / peak", shares, aim))
    bench.write(name, "images/s", rows, claims, batch=batch)


class Watch:
    """Stands in for a scheduler: between its first and its last step synchronisations are warned of."""

    def __init__(self, steps: int):
        self.left = self.steps = steps

    def step(self) -> None:
        """One update is done."""
        if self.left == self.steps:
            torch.cuda.set_sync_debug_mode("warn")
        self.left -= 1
        if not self.left:
            torch.cuda.set_sync_debug_mode("default")


def measure_synchronisations(bench: Bench, name: str) -> None:
    """How often an update waits for the GPU, and in which lines."""
    if bench.device.type != "cuda":
        raise ValueError(f"{bench.device} has no synchronisations to count")
    loader, model = bench.loader(512), bench.model()
    optimizer = make_optimizer("adam", model)
    limit_batches(loader, 3)
    train(model, bench.device, loader, optimizer)
    watch = Watch(bench.steps + 1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            limit_batches(loader, watch.steps)
            train(model, bench.device, loader, optimizer, watch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seen = [warning for warning in seen if "called a synchronizing" in str(warning.message)]
    places = Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in seen)
    rows = [common.make_row(place, [float(n)]) for place, n in places.items()]
    count = [len(seen) / bench.steps]
    rows = rows or [common.make_row("nowhere", [0.0])]
    claim = common.make_claim("synchronisations / update", count, 0, most=True)
    bench.write(name, f"synchronisations in {bench.steps} updates", rows, [claim])


def measure_compile(bench: Bench, name: str, batch: int) -> None:
    """Images a second with and without torch.compile; a mode that fails is named and left out."""
    loader = bench.loader(batch)
    modes: dict[str, dict[str, Any]] = {
        "compiled": {},
        "compiled with CUDA graphs": {"mode": "reduce-overhead"},
    }
    if bench.smoke:
        modes = {"compiled": {"backend": "eager"}}  # Dynamo alone: no C++ compiler needed
    variants, failures = {"eager": bench.model()}, []
    for mode, options in modes.items():
        model: Any = torch.compile(bench.model(), **options)  # called, it is a module as before
        try:
            bench.rate(model, loader, batch)
            variants[mode] = model
        except Exception as error:  # whatever a compiler raises
            failures.append(f"{mode}: {' '.join(str(error).split())[:200]}")
    calls = {
        mode: functools.partial(bench.rate, model, loader, batch) for mode, model in variants.items()
    }
    rates_by_mode = common.measure(calls, bench.args.rounds)
    rows = [common.make_row(f"{mode}, batch {batch}", rates) for mode, rates in rates_by_mode.items()]
    claims = [
        common.make_claim(f"{mode} / eager", common.ratios(rates, rates_by_mode["eager"]))
        for mode, rates in rates_by_mode.items()
        if mode != "eager"
    ]
    bench.write(name, "images/s", rows, claims, batch=batch, failures=failures)


def measure_scaling(bench: Bench, name: str, batch: int) -> None:
    """Images a second of 1, 2, 4, ... processes; the batch is the same, or grows with their number."""
    most = 2 if bench.smoke else torch.cuda.device_count()
    work: dict[str, Any] = {"width": bench.width, "steps": bench.steps, "device": bench.device.type}

    def rate(world: int, size: int) -> float:
        return distributed.rate_of(world, 1, **work, batch=size)["rate"]

    worlds = [world for world in (1, 2, 4, 8, 16) if world <= most]
    pairs = dict.fromkeys([(w, batch) for w in worlds] + [(w, batch * w) for w in worlds])
    calls = {f"{w} processes, batch {size}": functools.partial(rate, w, size) for w, size in pairs}
    rates = common.measure(calls, bench.args.rounds)
    rows = [common.make_row(variant, values) for variant, values in rates.items()]
    one, *others = rates.items()
    claims = [
        common.make_claim(
            f"{variant} / {one[0]} / processes", [x / world for x in common.ratios(values, one[1])]
        )
        for (variant, values), (world, _) in zip(others, list(pairs)[1:], strict=True)
    ]
    bench.write(name, "images/s", rows, claims, batch=batch)


def measurements(bench: Bench) -> Iterator[tuple[str, Callable[[str], None]]]:
    """Name and function of each measurement, in their order."""
    batches = (32, 64) if bench.smoke else (512, 1024)
    for batch in batches:
        yield f"speed-{batch}", functools.partial(measure_speed, bench, batch=batch)
    yield "synchronisations", functools.partial(measure_synchronisations, bench)
    for batch in batches:
        yield f"compile-{batch}", functools.partial(measure_compile, bench, batch=batch)
    if bench.smoke or torch.cuda.device_count() > 1:
        yield f"scaling-{batches[0]}", functools.partial(measure_scaling, bench, batch=batches[0])


def attempt(name: str, folder: Path, call: Callable[[], bool]) -> bool:
    """Whether a piece is over: done, or failed now or before, of which a file tells."""
    failed = folder / f"{name}.failed"
    if failed.exists():
        print(f"{name}: failed before; remove {failed} to try it again")
        return True
    begin = time.monotonic()
    print(f"{name}: begun {time.strftime('%H:%M:%S')}", flush=True)
    try:
        over = call()
    except Exception as error:  # the programme goes on, whatever it is
        write_whole(failed, "".join(traceback.format_exception(error)))
        print(f"{name}: failed: {error}", flush=True)
        return True
    words = "done" if over else "to be continued"
    print(f"{name}: {words} after {time.monotonic() - begin:.0f} s", flush=True)
    return over


def run_recipes(bench: Bench, seeds: range, deadline: float) -> bool:
    """Some seeds of every recipe, the first seed of each first; whether all are over."""
    flags = TINY if bench.smoke else []
    flags = flags + (["--device", bench.args.device] if bench.args.device != "cuda" else [])
    folder = common.result_folder(bench.args) / "accuracy"
    for seed in seeds:
        for recipe in RECIPE_ORDER:
            if recipe not in RECIPES:
                print(f"{recipe}: config.py has no such recipe; left out")
                continue
            record = time_to_accuracy.open_record(recipe, flags, folder)[1]
            if time_to_accuracy.run_of(record, seed)["accuracy"] is not None:
                continue
            if time.monotonic() > deadline:
                return False

            def call(recipe: str = recipe, seed: int = seed) -> bool:
                return time_to_accuracy.run_seed(recipe, seed, flags, folder, deadline)

            if not attempt(f"{recipe}-seed-{seed}", bench.folder, call):
                return False
    return True


def run_measurements(bench: Bench, deadline: float) -> bool:
    """What has no file yet; whether all are over."""
    for name, call in measurements(bench):
        if (bench.folder / f"{name}.json").exists():
            continue
        if time.monotonic() > deadline - (0 if bench.smoke else LEAST):
            return False

        def done(name: str = name, call: Callable[[str], None] = call) -> bool:
            call(name)
            return True

        attempt(name, bench.folder, done)
    return True


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = common.make_parser(__doc__, rounds=5)
    parser.add_argument("--device", default="auto", help="(default: auto)")
    parser.add_argument("--minutes", type=float, default=9, help="that a call may take (default: 9)")
    parser.add_argument("--seeds", type=int, default=5, help="of each recipe (default: 5)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Do what is left of the programme; `UNFINISHED` if the time was up first."""
    args = make_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the run under way is told to stop, too
    # A run that is told to stop writes a checkpoint first: half a minute for that and for the imports.
    deadline = time.monotonic() + 60 * args.minutes - (0 if args.smoke else 30)
    bench = Bench(args)
    print(f"{common.machine_facts(args.device)['machine']}, results in {bench.folder}", flush=True)
    over = (
        run_recipes(bench, range(1), deadline)
        and run_recipes(bench, range(1, args.seeds), deadline)
        and run_measurements(bench, deadline)
    )
    failed = [path.stem for path in sorted(bench.folder.glob("*.failed"))]
    if not over:
        print("time is up: the same command goes on")
        return UNFINISHED
    print(f"failed: {', '.join(failed)}" if failed else "all is done")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
