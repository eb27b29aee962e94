"""Host: what `train` does beside each step's kernels, on a network whose kernels take next to no time.

python -m benchmarks.host

A GPU that computes a step in 3 ms waits for its host if the host takes longer to say what to do. The
network here has forty small parameters and batches of 8, so that nearly all of the time is the host's.
`train` is compared with a bare loop of the same optimizer and schedule, and its parts are timed.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import common
from training.guards import Signals, check_finite
from training.inputs import check_batch
from training.loops import train
from training.optim import one_cycle
from utils import EpochState, autocast, make_scaler, seeded

CPU = torch.device("cpu")
Batches = list[tuple[Tensor, Tensor]]


def prepare(steps: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Twenty linear layers, which have forty parameters, with SGD and a one-cycle schedule."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(19)]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=True)
    return model, optimizer, one_cycle(optimizer, 0.01, epochs=1, steps_per_epoch=steps)


def make_batches(steps: int) -> Batches:
    """As many references to one batch of 8 images of 2 x 2 pixels and 2 channels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 2, 2, 2, generator=generator)
    return [(images, torch.randint(2, (8,), generator=generator))] * steps


def train_milliseconds(batches: Batches) -> float:
    """Milliseconds a step of `train`."""
    model, optimizer, scheduler = prepare(len(batches))
    begin = time.perf_counter()
    train(model, CPU, batches, optimizer, scheduler, precision="fp32")
    return 1000 * (time.perf_counter() - begin) / len(batches)


def bare_milliseconds(batches: Batches) -> float:
    """Milliseconds a step of the least code that trains the same network."""
    model, optimizer, scheduler = prepare(len(batches))
    model.train()
    begin = time.perf_counter()
    for images, labels in batches:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        scheduler.step()
    return 1000 * (time.perf_counter() - begin) / len(batches)


def parts() -> dict[str, Callable[[], Any]]:
    """What `train` adds to a step of the bare loop, each as a function of its own."""
    model, *_ = prepare(1)
    (images, labels), signals = make_batches(1)[0], Signals()
    F.cross_entropy(model(images), labels).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    state, scaler, loss = EpochState.of(1, CPU), make_scaler(CPU, torch.float32), torch.tensor(1.0)

    def reseed() -> None:
        with seeded(int(np.random.default_rng([0, 2, 1, 5]).integers(2**63)), CPU):
            pass

    def hold() -> None:
        with signals.held():
            pass

    def cast() -> None:
        with autocast(CPU, torch.float32):
            pass

    return {
        "dropout's own random numbers": reseed,
        "the batch's types, shapes and labels": lambda: check_batch((images, labels), 2),
        "the gradient's norms": lambda: torch.stack(torch._foreach_norm(gradients)).sum(),
        "whether all is finite": lambda: torch.isfinite(loss + loss) & (state.totals[2] == 0),
        "sums of loss and hits": lambda: torch.stack([loss * 8, (labels == labels).sum(), loss]),
        "signals deferred": hold,
        "precision": cast,
        "the check of the sums": lambda: check_finite(state, scaler),
    }


def part_milliseconds(call: Callable[[], Any], calls: int) -> float:
    """Milliseconds of one call, the mean of many."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return 1000 * (time.perf_counter() - begin) / calls


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write host.json."""
    args = common.make_parser(__doc__, rounds=9).parse_args(argv)
    torch.set_num_threads(1)
    batches = make_batches(5 if args.smoke else 500)
    loops = {"bare loop": bare_milliseconds, "train": train_milliseconds}
    for loop in loops.values():
        loop(batches[:5])  # imports and pages
    variants = {name: functools.partial(loop, batches) for name, loop in loops.items()} | {
        f"part: {name}": functools.partial(part_milliseconds, call, len(batches))
        for name, call in parts().items()
    }
    times = common.measure(variants, args.rounds)
    more = [a - b for a, b in zip(times["train"], times["bare loop"], strict=True)]
    claims = [common.make_claim("train - bare loop, milliseconds a step", more, 0.2, most=True)]
    rows = [common.make_row(name, values) for name, values in times.items()]
    common.publish(common.make_result("host", "milliseconds a step", rows, claims, args), args)


if __name__ == "__main__":
    main()
