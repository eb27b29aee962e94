"""Start: what `import main` takes and brings in, and the time from command to first update.

python -m benchmarks.start

Every measurement is a new process. Where the rate is to be found the first update is the range test's,
where it is given, training's.
"""

import subprocess
import sys
import tempfile
import time

from benchmarks import common

# Heavy packages that a run needs late or never.
LATE = (
    "matplotlib",
    "pytorch_grad_cam",
    "safetensors",
    "sklearn",
    "tensorboard",
    "torch_lr_finder",
    "torchinfo",
    "torchvision",
)
# Runs main.py with its arguments, and ends with the optimizer's first step.
TO_FIRST_STEP = """
import os, sys
from torch.optim import optimizer
import main
optimizer.register_optimizer_step_post_hook(lambda *_: os._exit(0))
sys.exit(main.main(sys.argv[1:]) or 9)
"""


def seconds_of(code: str, *arguments: str) -> float:
    """Seconds that a new Python process takes for some code."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=common.ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")
    return time.perf_counter() - begin


def first_step(*flags: str) -> float:
    """Seconds from a command of main.py to its first update."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds_of(TO_FIRST_STEP, *flags, "--output", f"{folder}/run")


def packages() -> list[str]:
    """The top-level packages, outside the standard library, that `import main` brings in."""
    code = "import sys, main; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=common.ROOT, capture_output=True, text=True, check=True
    )
    return sorted(
        name
        for name in set(done.stdout.split()) - set(sys.stdlib_module_names)
        if not name.startswith("_") and name.isidentifier()
    )


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write start.json."""
    args = common.make_parser(__doc__, rounds=5).parse_args(argv)
    variants = {
        "python, nothing imported": lambda: seconds_of(""),
        "import torch": lambda: seconds_of("import torch"),
        "import main": lambda: seconds_of("import main"),
        "--recipe demo, first update": lambda: first_step("--recipe", "demo"),
        "--recipe demo --lr 0.01, first update": lambda: first_step("--recipe", "demo", "--lr", "0.01"),
    }
    if not args.smoke:
        variants["--recipe quick, first update"] = lambda: first_step("--recipe", "quick")
        for variant in variants.values():  # files into memory, bytecode written
            variant()
    seconds = common.measure(variants, args.rounds)
    rows = [common.make_row(name, values) for name, values in seconds.items()]
    share = common.ratios(seconds["import main"], seconds["import torch"])
    claims = [common.make_claim("import main / import torch", share)]
    imported = packages()
    result = common.make_result("start", "seconds", rows, claims, args, imported=imported)
    late = sorted(set(LATE) - set(imported))
    result["note"] = f"`import main` leaves for later: {', '.join(late)}"
    common.publish(result, args)
    print("imported:", ", ".join(imported))


if __name__ == "__main__":
    main()
