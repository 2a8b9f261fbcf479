"""Ctrl-C and SIGTERM as a wish: the run saves and stops. A second one ends the process at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass(slots=True)
class StopRequest:
    """Whether somebody asked this process to stop."""

    asked: bool = False


@contextmanager
def stop_on_signals(request: StopRequest) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request, and the second into KeyboardInterrupt."""

    def ask(number: int, frame: FrameType | None) -> None:
        if request.asked:
            raise KeyboardInterrupt
        request.asked = True

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
