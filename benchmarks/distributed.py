"""Distributed: two processes of one thread against one process of two threads, on the same batch.

python -m benchmarks.distributed

Every figure is of processes that were started for it, by torchrun where there are two. Beside the speed
stands what sharing costs in a step: agreeing before it, and the sum of all gradients, which
DistributedDataParallel hides in part behind the backward pass. benchmarks/gpu.py measures GPUs with it.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import common
from benchmarks.peers.job import Clock
from config import Config
from data import limit_batches, make_loader
from models import make_model
from sources import load_split
from training.distributed import first, joined, meet, total
from training.loops import train
from training.optim import make_optimizer
from transforms import train_transform
from utils import get_device

PARTS = ("agreeing", "sum of gradients")  # of a step of several processes


def rate_of(  # noqa: PLR0913
    world: int, threads: int, *, width: int, batch: int, steps: int, device: str, sync_norm: bool = True
) -> dict[str, float]:
    """Images a second of so many processes, and the seconds of what sharing adds to a step.

    Raises:
        RuntimeError: the processes failed; their last line says why.
    """
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {world}".split()
    settings = json.dumps([width, batch, steps, device, sync_norm])
    start = torchrun if world > 1 else []
    command = [sys.executable, *start, "-m", "benchmarks.distributed", "--one", settings]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, cwd=common.ROOT, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    return json.loads(lines[-1])


def measure_one(width: int, batch: int, steps: int, name: str, sync_norm: bool) -> None:
    """One process's part of a measurement; the first prints the result."""
    device = get_device(name)
    with joined(device):
        torch.manual_seed(0)
        # The sample has enough images for the smallest settings alone.
        split = load_split("cifar10" if batch >= 512 else "cifar10-sample", "train")
        loader = make_loader(split, train_transform(), device, Config(batch_size=batch), shuffle=True)
        model = make_model("custom_resnet", width=width).to(device)
        model.to(memory_format=torch.channels_last)
        clock = Clock(steps=steps, warmup=2, device=device)
        limit_batches(loader, clock.updates)
        train(model, device, loader, make_optimizer("sgd", model, 1e-3), clock, sync_norm=sync_norm)
        gradients = torch.zeros(sum(p.numel() for p in model.parameters()), device=device)
        seconds = {
            "agreeing": seconds_of(meet, device, 100),
            "sum of gradients": seconds_of(lambda: total(gradients), device, 5),
        }
        if first():
            result = {"rate": steps * batch / clock.seconds, "step": clock.seconds / steps, **seconds}
            print(json.dumps(result), flush=True)


def seconds_of(call: Callable[[], Any], device: torch.device, times: int) -> float:
    """The median seconds of a call."""
    values = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        values.append(time.perf_counter() - begin)
    return statistics.median(values)


def compare(width: int, batch: int, steps: int, rounds: int) -> tuple[list[dict], list[dict]]:
    """Rows and claims at one width."""
    work: dict[str, Any] = {"width": width, "batch": batch, "steps": steps, "device": "cpu"}
    variants = {
        "one process, two threads": functools.partial(rate_of, 1, 2, **work),
        "two processes, one thread each": functools.partial(rate_of, 2, 1, **work),
        "the same, norms not synced": functools.partial(rate_of, 2, 1, **work, sync_norm=False),
    }
    found: dict[str, list[dict]] = {name: [] for name in variants}

    def call(name: str) -> float:
        found[name].append(variants[name]())
        return found[name][-1]["rate"]

    rates = common.measure({name: functools.partial(call, name) for name in variants}, rounds)
    one, two, unsynced = rates.values()
    rows = [common.make_row(f"width {width}, {name}", values) for name, values in rates.items()]
    claims = [
        common.make_claim(f"width {width}: two processes / one of two threads", common.ratios(two, one)),
        common.make_claim(f"width {width}: norms not synced / synced", common.ratios(unsynced, two)),
    ]
    for part in PARTS:
        shares = [result[part] / result["step"] for result in found["two processes, one thread each"]]
        claims.append(common.make_claim(f"width {width}: {part} / step", shares))
    return rows, claims


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write distributed.json."""
    parser = common.make_parser(__doc__, rounds=6)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        measure_one(*json.loads(args.one))
        return
    # About half a minute of steps for each figure on two cores with bf16.
    settings = {4: (32, 2), 2: (32, 2)} if args.smoke else {64: (512, 16), 16: (512, 64)}
    comparisons = [compare(width, *work, args.rounds) for width, work in settings.items()]
    rows, claims = (
        [item for part in parts for item in part] for parts in zip(*comparisons, strict=True)
    )
    common.publish(common.make_result("distributed", "images/s", rows, claims, args), args)


if __name__ == "__main__":
    main()
