"""Where students and the ranks of their teacher meet: keys in the store that all ranks of a run are met at.

teacher/server/R       where the teacher's data rank R is listened to
teacher/lesson/N       the N-th stage taught in this attempt
teacher/STAGE/first    the step its students go on from
teacher/STAGE/asked/S  they have begun step S, so every one of them is done with the step before it

What is said never passes here. All ranks of the teacher read the same keys before a step, so they do the same, and wait
outside of collectives, without a time-out, while students validate, save or wait for data.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

from data.logits_server import Address
from parallel import groups
from train.worker import Place

if TYPE_CHECKING:
    from torch.distributed import Store

AS_LONG_AS_IT_TAKES = timedelta(days=365)
"""A run that ends takes all that wait with it."""


class Board:
    """One rank's view, by a connection of its own: waiting holds it.

    Args:
        place: of this rank.
    """

    def __init__(self, place: Place) -> None:
        self._store: Store = groups.join_store(place.master_address, place.master_port)

    def open_server(self, data_rank: int, address: Address) -> None:
        """The teacher: say where a data rank is listened to."""
        self._store.set(f"teacher/server/{data_rank}", json.dumps(asdict(address)))

    def servers(self, data_size: int) -> list[Address]:
        """A student: where to ask, in order of the teacher's data ranks; waits until all are there."""
        return [Address(**json.loads(self._wait(f"teacher/server/{rank}"))) for rank in range(data_size)]

    def open_lesson(self, stage: str) -> None:
        """One of the students: a stage will be taught."""
        number = self._store.add("teacher/lessons", 1) - 1
        self._store.set(f"teacher/lesson/{number}", stage)

    def lesson(self, number: int) -> str:
        """The teacher: the stage to teach next."""
        return self._wait(f"teacher/lesson/{number}")

    def begin(self, stage: str, step: int) -> None:
        """One of the students: the first step they will ask about; one after the last: nothing is asked."""
        self._store.set(f"teacher/{stage}/first", str(step))

    def first_step(self, stage: str) -> int:
        """The teacher: the step to begin with."""
        return int(self._wait(f"teacher/{stage}/first"))

    def ask(self, stage: str, step: int) -> None:
        """One of the students: a step has begun."""
        self._store.set(f"teacher/{stage}/asked/{step}", "")

    def wait_until_asked(self, stage: str, step: int) -> None:
        """The teacher: until a step has begun."""
        self._wait(f"teacher/{stage}/asked/{step}")

    def _wait(self, key: str) -> str:
        self._store.wait([key], AS_LONG_AS_IT_TAKES)
        return self._store.get(key).decode()
