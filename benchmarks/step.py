"""Step: the course's loop against `train`, CustomResNet at width 64, batch 512.

python -m benchmarks.step

The course's: fp32, NCHW, the loss read at every step, Albumentations image by image in two workers.
Ours: what `train` chooses: channels-last memory, and bf16 where the CPU has instructions for it.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.peers import course, ours
from benchmarks.peers.job import Job
from data import load_split
from utils import pick_precision

CPU = torch.device("cpu")


def rate(fit, images, labels, **options) -> float:
    """Images a second of one peer over the steps after the first; its own output is not shown."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(images=images, labels=labels, folder=Path(folder), precision="auto", **options)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            model = fit(job)
    return job.result(model)["rate"]


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write step.json."""
    parser = common.make_parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=4, help="that count, in a round (default: 4)")
    given = parser.parse_args(argv)
    options = {"width": 64, "batch": 512, "steps": given.steps}
    if given.smoke:
        options = {"width": 4, "batch": 32, "steps": 2}
    split = load_split("cifar10-sample" if given.smoke else "cifar10", "train")
    variants = {
        "the course's loop": lambda: rate(course.fit, split.images, split.labels, **options),
        "ours": lambda: rate(ours.fit, split.images, split.labels, **options),
    }
    found = common.measure(variants, given.rounds)
    theirs, mine = found.values()
    rows = [common.make_row(name, values) for name, values in found.items()]
    claims = [common.make_claim("ours / the course's loop", common.ratios(mine, theirs), 2.5)]
    options["precision"] = str(pick_precision("auto", CPU)).removeprefix("torch.")
    common.publish(common.make_result("step", "images/s", rows, claims, given, **options), given)


if __name__ == "__main__":
    main()
