"""Step: the course's loop against `train`, CustomResNet at width 64, batch 512.

python -m benchmarks.step

The course's: fp32, NCHW, the loss read at every step, Albumentations image by image in two workers.
Ours: what `train` chooses: channels-last memory, bf16 where the CPU has instructions for it, and freed
memory kept. Each runs in a process of its own; the first step is not timed. Without bf16 little is to be
won but the layout of memory, and all that is claimed is not to be slower.
"""

import torch

from benchmarks import common
from benchmarks.peers.__main__ import compare
from utils import name_of, pick_precision

CPU = torch.device("cpu")
CLAIMED = {"bf16": 2.5, "fp32": 1.0}  # times the course's rate


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write step.json."""
    parser = common.make_parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=4, help="that count, in a round (default: 4)")
    args = parser.parse_args(argv)
    sizes = {"width": 64, "batch": 512, "steps": args.steps}
    if args.smoke:
        sizes = {"width": 4, "batch": 32, "steps": 2}
    results = compare(["the course's loop", "ours"], sizes, CPU, args)
    rates = {name: [one["rate"] for one in rounds] for name, rounds in results.items()}
    theirs, mine = rates.values()
    rows = [common.make_row(name, values) for name, values in rates.items()]
    precision = name_of(pick_precision("auto", CPU))
    ratios = common.ratios(mine, theirs)
    claims = [common.make_claim("ours / the course's loop", ratios, CLAIMED[precision])]
    result = common.make_result("step", "images/s", rows, claims, args, **sizes, precision=precision)
    common.publish(result, args)


if __name__ == "__main__":
    main()
