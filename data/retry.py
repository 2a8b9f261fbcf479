"""Trying again: pauses that grow, with jitter, until a budget of time is spent."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """How long to wait between attempts.

    Attributes:
        budget_seconds: no attempt begins later than this after the first.
        first_seconds: upper bound of the first pause; it doubles each time.
        longest_seconds: upper bound of every pause.
    """

    budget_seconds: float
    first_seconds: float = 0.05
    longest_seconds: float = 10.0

    def attempts(self) -> Iterator[int]:
        """Numbers 0, 1, 2, ...; pauses before each but the first, ends when the budget would be overdrawn.

        A pause is uniform between zero and its bound ("full jitter"), so thousands of clients that failed together do
        not come back together.
        """
        deadline = time.monotonic() + self.budget_seconds
        bound = self.first_seconds
        number = 0
        while True:
            yield number
            number += 1
            pause = random.uniform(0, bound)
            if time.monotonic() + pause > deadline:
                return
            time.sleep(pause)
            bound = min(2 * bound, self.longest_seconds)
