"""What a tier must do for a reader of blocks, and what it counts."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

PAUSE_SECONDS = 5.0
"""A tier that failed is left alone for this long."""


@dataclass(slots=True)
class TierCounters:
    """What a tier did so far."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    failures: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def hit_ratio(self) -> float:
        """Hits over look-ups; 0 before the first."""
        return self.hits / max(1, self.hits + self.misses)

    def as_dict(self) -> dict[str, float]:
        """For the record of a run."""
        return {
            "hits": self.hits,
            "hit_ratio": self.hit_ratio,
            "bytes": self.bytes_read,
            "seconds": self.seconds,
            "damaged": self.damaged,
            "failures": self.failures,
        }


class Tier(Protocol):
    """A bounded cache; any method may be called from several threads."""

    name: str
    counters: TierCounters

    def get(self, key: str) -> memoryview | None:
        """The content kept under a key, or None; never raises."""
        ...

    def put(self, key: str, content: memoryview) -> None:
        """Keep content, dropping what was used longest ago where room is needed; never raises."""
        ...

    def drop(self, key: str) -> None:
        """Forget a key."""
        ...

    def lease(self, key: str) -> AbstractContextManager[object]:
        """Held by whoever fetches a block for all processes that share the tier."""
        ...
