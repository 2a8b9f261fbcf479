"""The next few steps' data, made by a thread while the current step computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
INTERRUPT_SECONDS = 0.2


class Prefetch(Generic[T]):
    """Iterates over `make(start), make(start + 1), ..., make(stop - 1)`, made ahead of time.

    At most `depth` results exist that were not handed over yet, the one being made included. An exception of `make`
    is raised where its result would have come. Use it in a `with` block, or call `close`.
    """

    def __init__(
        self, make: Callable[[int], T], steps: range, *, depth: int, interrupt: Callable[[], None] = lambda: None
    ) -> None:
        """Start the thread.

        Args:
            make: what to do for a step; called from one thread, in order.
            steps: the steps, in order.
            depth: results to be ahead by, at least 1.
            interrupt: called when it is closed; lets a `make` that may wait long return or raise.
        """
        assert depth >= 1, depth
        self._make = make
        self._steps = steps
        self._depth = depth
        self._interrupt = interrupt
        self._ready: deque[T | BaseException] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished or self._closed)
            if self._closed or not self._ready:
                raise StopIteration
            result = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Stop after the result being made, and drop what was not handed over. Closing twice is fine."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        while self._thread.is_alive():
            # More than once: it may have been about to wait.
            self._interrupt()
            self._thread.join(INTERRUPT_SECONDS)

    def _run(self) -> None:
        for step in self._steps:
            with self._changed:
                self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                if self._closed:
                    break
            failed = False
            result: T | BaseException
            try:
                result = self._make(step)
            except BaseException as error:  # handed to the consumer, whatever it is
                result, failed = error, True
            with self._changed:
                if not self._closed:
                    self._ready.append(result)
                self._changed.notify_all()
            if failed:
                break
        with self._changed:
            self._finished = True
            self._changed.notify_all()
