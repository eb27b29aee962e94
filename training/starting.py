"""Ends a program that gets a signal while its imports load, which takes seconds; needs none itself."""

import os
import signal
from types import FrameType


def end_on_signals(program: str) -> None:
    """Have SIGINT and SIGTERM end this process at once, with one line and exit code 130 or 143."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{program}: stopped by {signal.Signals(number).name}\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
