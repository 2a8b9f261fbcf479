"""Holds all ranks until each has the data it needs next, however long that takes: a shard may have to be thawed.

A rank that waits for its data while the others sit in a collective runs them into its time-out. So where an archive may
be in the way, each rank counts itself in, at the store the ranks met at, as soon as it has a step's data, and rank 0
lets everybody go on when all are counted, or stop when asked to meanwhile. No collective is open, so nothing times out.
A training loop meets at its steps; what other stages read, to score or to calibrate, they read through `Reading`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from data.prefetch import Prefetch
from data.shards import Dataset
from train.worker import Place

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
FIRST_PAUSE_SECONDS = 0.0005
LONGEST_PAUSE_SECONDS = 1.0
QUIET_SECONDS = 5.0
"""Nothing is said about waiting shorter than this."""


class DataGate:
    """One rank's side of the gate; all ranks come to the same steps in the same order.

    Args:
        store: shared by all ranks.
        name: tells gates of one store apart.
        place: who this rank is.
        waits_for: the archived shard this rank waits for at the moment.
        say: tells the user something; used on rank 0.
        quiet_seconds: nothing is said about waiting shorter than this.
    """

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        place: Place,
        waits_for: Callable[[], str | None],
        say: Callable[[str], None],
        quiet_seconds: float = QUIET_SECONDS,
    ) -> None:
        self._store = store
        self._prefix = f"data_gate/{name}"
        self._place = place
        self._waits_for = waits_for
        self._say = say
        self._quiet_seconds = quiet_seconds
        self._num_passed = 0
        self._told = ""

    def arrive(self, step: int) -> None:
        """Count this rank in for a step; from any thread, in order of steps, ahead of `opens`."""
        self._store.add(f"{self._prefix}/arrived/{step}", 1)

    def opens(self, step: int, asked_to_stop: Callable[[], bool], *, what: str | None = None) -> bool:
        """Wait until all ranks have arrived for a step.

        Args:
            step: the same on all ranks.
            asked_to_stop: whether to stop rather than wait; asked on rank 0.
            what: waits, for the user; None: the step.

        Returns:
            Whether to take the step, the same on all ranks; False: stop.
        """
        started = time.monotonic()
        pause = FIRST_PAUSE_SECONDS
        told, what = "", what or f"step {step}"
        while (answer := self._answer(step, asked_to_stop)) is None:
            told = self._explain(what, time.monotonic() - started) or told
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        self._num_passed += 1
        if told and answer:
            self._say(f"{what}: the data is there after {time.monotonic() - started:.0f} s, the run goes on")
        return answer

    def _answer(self, step: int, asked_to_stop: Callable[[], bool]) -> bool | None:
        """Go or stop; rank 0 decides, so that all ranks do the same."""
        opened, stopped = f"{self._prefix}/opened", f"{self._prefix}/stopped"
        if self._place.rank:
            if self._store.add(opened, 0) > self._num_passed:
                return True
            return False if self._store.add(stopped, 0) else None
        arrived = f"{self._prefix}/arrived/{step}"
        if self._store.add(arrived, 0) == self._place.world_size:
            self._store.delete_key(arrived)
            self._store.add(opened, 1)
            return True
        if asked_to_stop():
            self._store.add(stopped, 1)
            return False
        return None

    def _explain(self, what: str, seconds: float) -> str:
        """Tell rank 0 what this rank waits for; let rank 0 tell the user, and return that."""
        reason = f"{self._prefix}/reason"
        waits_for = self._waits_for()
        if waits_for and waits_for != self._told:
            self._told = waits_for
            self._store.set(reason, waits_for)
        if self._place.rank or seconds < self._quiet_seconds or not self._store.check([reason]):
            return ""
        shard = self._store.get(reason).decode()
        self._store.delete_key(reason)
        text = f"{what} waits for {shard}, which is being restored from the archive"
        self._say(f"{text}; this has no time-out, and the run can be stopped and resumed meanwhile")
        return text


class StoppedWaitingError(Exception):
    """The run was asked to stop while ranks waited for data; raised on all of them."""


class Reading:
    """What a stage reads besides the steps of a training loop; nobody goes on before every rank has it.

    Args:
        gate: where ranks meet; None: they need not, and each reads for itself.
        name: of the stage.
        datasets: that are read; this very list, in which `watch` puts more.
        asked_to_stop: whether to stop rather than wait; asked on rank 0.
    """

    def __init__(
        self,
        gate: DataGate | None = None,
        *,
        name: str = "",
        datasets: list[Dataset] | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._gate = gate
        self._name = name
        self._datasets = datasets if datasets is not None else []
        self._asked_to_stop = asked_to_stop
        self._num_read = 0

    def of_all_ranks(self, read: Callable[[], T]) -> T:
        """What `read` returns here, when every rank has read; all ranks call this equally often, in the same order.

        Raises:
            StoppedWaitingError: the run was asked to stop meanwhile.
            Exception: whatever `read` raises.
        """
        gate, number = self._gate, self._num_read
        if gate is None:
            return read()
        self._num_read += 1

        def make(_: int) -> T:
            try:
                return read()
            finally:
                gate.arrive(number)

        with Prefetch(make, range(1), depth=1, interrupt=self._give_up) as results:
            if not gate.opens(number, self._asked_to_stop, what=f"stage {self._name}"):
                raise StoppedWaitingError
            return next(results)

    def watch(self, datasets: Iterable[Dataset]) -> None:
        """Say so, and let go, where one of these is waited for as well."""
        self._datasets.extend(datasets)

    def _give_up(self) -> None:
        for dataset in self._datasets:
            dataset.give_up()


def data_gate(
    store: Store, name: str, datasets: Sequence[Dataset], *, place: Place, say: Callable[[str], None]
) -> DataGate | None:
    """What ranks meet at, where a dataset is in a storage that archives; each use has a name of its own."""
    if not any(dataset.archive for dataset in datasets):
        return None
    return DataGate(
        store,
        name=name,
        place=place,
        waits_for=lambda: next((dataset.waits_for for dataset in datasets if dataset.waits_for), None),
        say=say,
    )
