"""Peers: the same network, images, batch and number of steps through five trainers.

python -m benchmarks.peers

Each runs in a process of its own, with the settings that its documentation recommends; a peer that is a
package gets an environment of its own under benchmarks/.env, which takes PyTorch from where it lies. All
use Adam at 0.001 and start from the same weights. The first step is not timed.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import ROOT
from sources import load_split
from utils import get_device, name_of, pick_precision

# The file in this folder, and the package that it needs.
PEERS = {
    "the course's loop": ("course", None),
    "plain loop": ("plain", None),
    "Lightning": ("with_lightning", "lightning"),
    "fastai": ("with_fastai", "fastai"),
    "ours": ("ours", None),
}
ENVIRONMENTS = ROOT / "benchmarks" / ".env"


def python_of(package: str | None) -> str:
    """The interpreter that has a package; its environment is made first if need be.

    Raises:
        CalledProcessError: it could not be installed.
    """
    if package is None:
        return sys.executable
    folder = ENVIRONMENTS / package
    python, whole = folder / "bin" / "python", folder / "whole"
    if not whole.exists():
        print(f"installing {package} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        # What this interpreter has comes after what the environment has: PyTorch is 6 GB.
        library = next(folder.glob("lib/python*/site-packages"))
        (library / "installed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
        options = ["--quiet", "--disable-pip-version-check"]
        subprocess.run([python, "-m", "pip", "install", *options, package], check=True)
        whole.touch()
    return str(python)


def run_peer(name: str, folder: Path, flags: list[str]) -> dict:
    """One measurement of one peer.

    Raises:
        RuntimeError: it failed; the last lines that it printed.
    """
    file, package = PEERS[name]
    command = [python_of(package), "-m", "benchmarks.peers.one", file, str(folder), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return common.read_json(folder / f"{file}.json")


def available(names: list[str]) -> tuple[list[str], list[str]]:
    """The peers that can be had, and a line on each that cannot."""
    usable, lines = [], []
    for name in names:
        try:
            python_of(PEERS[name][1])
            usable.append(name)
        except (subprocess.CalledProcessError, OSError) as error:
            lines.append(f"{name} is left out: {error}")
    return usable, lines


def compare(
    names: list[str], sizes: dict[str, int], device: torch.device, args: argparse.Namespace
) -> dict[str, list[dict]]:
    """Every round's result of every peer."""
    split = load_split("cifar10-sample" if args.smoke else "cifar10", "train")
    options = sizes | {
        "workers": 2,
        "threads": torch.get_num_threads(),
        "precision": name_of(pick_precision("auto", device)),
        "device": device,
    }
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    results: dict[str, list[dict]] = {name: [] for name in names}

    def rate(name: str) -> float:
        results[name].append(run_peer(name, Path(folder), flags))
        return results[name][-1]["rate"]

    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", split.images)
        np.save(Path(folder) / "labels.npy", split.labels)
        common.measure({name: functools.partial(rate, name) for name in names}, args.rounds)
    return results


def summarize(results: dict[str, list[dict]], sizes: dict[str, int], args: argparse.Namespace) -> dict:
    """Rows and claims; every peer must have made the same number of updates."""
    made = {name: rounds[0]["updates"] for name, rounds in results.items()}
    if set(made.values()) != {sizes["steps"] + 1}:
        raise RuntimeError(f"the peers made different numbers of updates: {made}")
    rates = {name: [one["rate"] for one in rounds] for name, rounds in results.items()}
    rows = [
        common.make_row(
            name,
            rates[name],
            version=rounds[0]["version"],
            settings=rounds[0]["note"],
            loss=f"{rounds[-1]['loss']:.3f}",
        )
        for name, rounds in results.items()
    ]
    claims = [
        common.make_claim(f"ours / {name}", common.ratios(rates["ours"], rates[name]), 1)
        for name in rates
        if name != "ours"
    ]
    return common.make_result("peers", "images/s", rows, claims, args, **sizes)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write peers.json."""
    parser = common.make_parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=4, help="that count, in a round (default: 4)")
    parser.add_argument(
        "--only", nargs="+", choices=PEERS, default=list(PEERS), help="peers beside ours"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args(argv)
    sizes = {"width": 64, "batch": 512, "steps": args.steps}
    if args.smoke:
        sizes = {"width": 4, "batch": 32, "steps": 2}
    names, missing = available([name for name in PEERS if name in args.only or name == "ours"])
    result = summarize(compare(names, sizes, get_device(args.device), args), sizes, args)
    loss = "loss: of the first 512 training images after the last step, by batch statistics"
    result["note"] = "; ".join([loss, *missing])
    common.publish(result, args)


if __name__ == "__main__":
    main()
