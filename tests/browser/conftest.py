"""The page as people meet it: `python app.py` in a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import main

ROOT = Path(__file__).parent.parent.parent


class Served(NamedTuple):
    address: str
    said: str  # until it was ready


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The page of a short run on the sample, in an environment that asks for the opposite of private."""
    folder = tmp_path_factory.mktemp("page")
    flags = "--recipe demo --width 8 --epochs 1 --precision fp32 --output"
    assert main.main([*flags.split(), str(folder / "run")]) == 0
    hostile = {
        "GRADIO_SHARE": "True",
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_ANALYTICS_ENABLED": "True",
    }
    command = [sys.executable, "app.py", str(folder / "run"), "--device", "cpu"]
    environment = os.environ | hostile | {"TMPDIR": str(folder)}
    with (folder / "log").open("w") as log:
        page = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
        lines = []
        for line in page.stdout:
            lines.append(line)
            if line.startswith("the page is at "):
                break
        assert lines and "http" in lines[-1], (folder / "log").read_text()
        yield Served(lines[-1].split()[4].rstrip(";"), "".join(lines))
        page.send_signal(signal.SIGINT)
        assert page.wait(30) == 0
        page.stdout.close()
    assert not list(folder.glob("page-*")), "uploads were left behind"
