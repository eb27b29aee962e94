"""One measurement of one peer, in a process and an environment of its own.

`python -m benchmarks.peers` starts it, with images.npy and labels.npy in FOLDER; the result goes to
FOLDER/NAME.json.
"""

import argparse
import importlib
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from benchmarks.peers.job import Job


def main() -> None:
    """Read the work, do it, write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    for name in ("steps", "width", "batch", "workers", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--device", required=True)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    name, folder = options.pop("name"), options["folder"]
    images, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    job = Job(images=images, labels=labels, **options | {"device": torch.device(options["device"])})
    model = importlib.import_module(f"benchmarks.peers.{name}").fit(job)
    version = metadata.version(name.removeprefix("with_")) if name.startswith("with_") else ""
    (folder / f"{name}.json").write_text(json.dumps(job.result(model) | {"version": version}))


if __name__ == "__main__":
    main()
