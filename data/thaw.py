"""Archived shards, brought back ahead of training.

python -m data.thaw recipe=NAME action=plan|request|status [stage=NAME] [first_step=0] [step_seconds=10]
                    [retrieval=Bulk|Standard] [days=N]

The order of samples is known, so are the steps that need each shard. `plan` says which shards are needed when, what
restoring them costs and whether training would catch up with it; `request` asks for them, first needed first, again as
often as one likes; `status` counts. Copies are kept until they were read for the last time, or for as many days as one
says.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from conf import load
from conf.errors import UserError
from conf.schema import StorageConfig
from data.archive import Archive, Retrieval, State
from data.index import SPLITS, Split
from data.order import Indices
from data.prepare import prepared
from data.shards import Dataset
from data.stream import Stream, stream_of_stage

HOURS: dict[Retrieval, float] = {"Bulk": 48.0, "Standard": 12.0}
"""Longest that S3 says restoring from Deep Archive takes."""
DOLLARS_A_GIGABYTE: dict[Retrieval, float] = {"Bulk": 0.0025, "Standard": 0.02}
DOLLARS_A_REQUEST: dict[Retrieval, float] = {"Bulk": 0.025e-3, "Standard": 0.1e-3}
DOLLARS_A_GIGABYTE_DAY = 0.023 / 30
"""List prices of S3 in us-east-1 for Deep Archive; a restored copy costs as Standard."""
REQUESTS_A_SECOND = 200.0
NUM_ASKING = 16
ASKED_AT_ONCE = 40
"""Between pauses that keep to the rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """An archived shard that a stage reads, of its training text or of what it validates on.

    Attributes:
        source: whose.
        path: of the shard, relative to the dataset.
        num_bytes: as stored.
        first_step: that reads it.
        last_step: that reads it.
    """

    source: str
    path: str
    num_bytes: int
    first_step: int
    last_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What restoring takes and when training needs it.

    Attributes:
        needs: first needed first.
        days: that copies have to be kept, if all is requested now.
        dollars: list price of all.
        late_step: first step that would have to wait, if all is requested now; None: none.
        wait_hours: longest wait.
    """

    needs: list[Need]
    days: int
    dollars: float
    late_step: int | None
    wait_hours: float


def needs_of(
    stream: Stream, datasets: Mapping[str, Dataset], archived: Mapping[str, set[str]], steps: range
) -> list[Need]:
    """Archived shards that a stage reads in some of its steps, or validates on; first needed first.

    Args:
        stream: of the stage.
        datasets: by source.
        archived: paths of the shards of each source that are in an archive class, of both splits.
        steps: that will be taken.
    """
    if not any(archived.values()):
        return []
    needs = []
    for source, (firsts, lasts) in zip(stream.sources, _steps_of_shards(stream, steps), strict=True):
        name, dataset = source.name, datasets[source.name]
        for shard, path, num_bytes in _shards(dataset, "train", archived[name]):
            first, last = int(firsts[shard]), int(lasts[shard])
            if first >= 0:
                needs.append(Need(source=name, path=path, num_bytes=num_bytes, first_step=first, last_step=last))
        for _, path, num_bytes in _shards(dataset, "held_out", archived[name]):
            # Read before the first step, and not again.
            start = steps.start
            needs.append(Need(source=name, path=path, num_bytes=num_bytes, first_step=start, last_step=start))
    return sorted(needs, key=lambda need: (need.first_step, need.source, need.path))


def _shards(dataset: Dataset, split: Split, paths: set[str]) -> Iterator[tuple[int, str, int]]:
    """Number, path and size of those shards of a split that are among paths."""
    for shard in range(dataset.num_shards(split) if paths else 0):
        part, inside = dataset.part_of(split, shard)
        if part.path(inside) in paths:
            yield shard, part.path(inside), int(part.num_bytes[inside])


def _steps_of_shards(stream: Stream, steps: range) -> list[tuple[Indices, Indices]]:
    """For each source of a stream the first and the last step that reads each training shard; -1: none does."""
    length = stream.spec.sequence_length
    counts = [source.dataset.num_shards("train") for source in stream.sources]
    found = [(np.full(count, -1), np.full(count, -1)) for count in counts]
    for steps_of_samples, sources, first_tokens in stream.located(steps):
        for number, (firsts, lasts) in enumerate(found):
            manifest = stream.sources[number].dataset.manifest
            size = manifest.block_tokens * manifest.shard_blocks
            chosen = sources == number
            at, tokens = steps_of_samples[chosen], first_tokens[chosen]
            for offset in (*range(0, length - 1, size), length - 1):
                shards = (tokens + offset) // size
                # Of equal shards the value that is set last stays.
                lasts[shards] = np.maximum(lasts[shards], at)
                fresh = np.flatnonzero(firsts[shards] < 0)[::-1]
                firsts[shards[fresh]] = at[fresh]
    return found


def plan_of(
    needs: list[Need], *, steps: range, step_seconds: float, retrieval: Retrieval, days: int | None = None
) -> Plan:
    """When what is requested now would be there, against when it is needed; copies are kept `days`, or as needed."""
    gigabytes = sum(need.num_bytes for need in needs) / 1e9
    late_step, wait_hours, needed_days = None, 0.0, 1
    for number, need in enumerate(needs):
        there = number / REQUESTS_A_SECOND / 3600 + HOURS[retrieval]
        needed = (need.first_step - steps.start) * step_seconds / 3600
        if there > needed + wait_hours:
            late_step = need.first_step if late_step is None else late_step
            wait_hours = there - needed
    for number, need in enumerate(needs):
        # It may be there at once; what is waited for comes on top.
        read = (need.last_step + 1 - steps.start) * step_seconds / 3600 + wait_hours
        needed_days = max(needed_days, math.ceil((read - number / REQUESTS_A_SECOND / 3600) / 24))
    days = needed_days if days is None else days
    dollars = gigabytes * (DOLLARS_A_GIGABYTE[retrieval] + days * DOLLARS_A_GIGABYTE_DAY)
    return Plan(
        needs=needs,
        days=needed_days,
        dollars=dollars + len(needs) * DOLLARS_A_REQUEST[retrieval],
        late_step=late_step,
        wait_hours=wait_hours,
    )


def request_all(archives: Mapping[str, Archive], needs: Sequence[Need]) -> int:
    """Ask for all that is archived still, at most `REQUESTS_A_SECOND`; returns how many were asked for.

    Raises:
        DataError: restoring is not allowed.
    """

    def ask(need: Need) -> int:
        archive = archives[need.source]
        if archive.state(need.path) != "archived":
            return 0
        archive.request(need.path)
        return 1

    asked = 0
    with ThreadPoolExecutor(NUM_ASKING) as pool:
        for start in range(0, len(needs), ASKED_AT_ONCE):
            began = time.monotonic()
            here = sum(pool.map(ask, needs[start : start + ASKED_AT_ONCE]))
            asked += here
            time.sleep(max(0.0, here / REQUESTS_A_SECOND - (time.monotonic() - began)))
    return asked


def states_of(archives: Mapping[str, Archive], needs: Sequence[Need]) -> Counter[State]:
    """How many are archived, on their way and readable.

    Raises:
        DataError: the storage refuses.
    """
    with ThreadPoolExecutor(NUM_ASKING) as pool:
        return Counter(pool.map(lambda need: archives[need.source].state(need.path), needs))


def archives_of(
    datasets: Mapping[str, Dataset], storage: StorageConfig, retrieval: Retrieval, days: int
) -> dict[str, Archive]:
    """The archive of each source that is in S3."""
    return {
        name: Archive(dataset.path, storage, retrieval=retrieval, days=days)
        for name, dataset in datasets.items()
        if dataset.path.startswith("s3://")
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        Exit code: 0, or 2 for what the user can mend.
    """
    own = {"action": "plan", "stage": "", "first_step": "0", "step_seconds": "10", "retrieval": "Bulk", "days": ""}
    overrides = []
    for argument in sys.argv[1:] if arguments is None else arguments:
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        else:
            overrides.append(argument)
    try:
        _carry_out(own, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _carry_out(own: Mapping[str, str], overrides: Sequence[str]) -> None:
    if own["action"] not in ("plan", "request", "status") or own["retrieval"] not in HOURS:
        raise UserError("action is plan, request or status; retrieval is Bulk or Standard.")
    retrieval: Retrieval = "Bulk" if own["retrieval"] == "Bulk" else "Standard"
    seconds = _number("step_seconds", own["step_seconds"])
    first_step, days = int(_number("first_step", own["first_step"])), int(_number("days", own["days"] or "1"))
    if seconds <= 0 or days < 1:
        raise UserError("step_seconds must be above 0, days at least 1.")
    config = load.compose(overrides)
    stage = own["stage"] or next(name for name in config.order if hasattr(config.stages[name], "training"))
    datasets = {name: prepared(source, config.data) for name, source in config.data.sources.items()}
    stream = stream_of_stage(config, stage, datasets)
    steps = range(first_step, stream.spec.num_steps)
    if not steps:
        raise UserError(f"first_step={first_step}: {stage} takes {stream.spec.num_steps} steps.")
    archives = archives_of(datasets, config.data.storage, retrieval, days)
    archived = {
        name: {path for split in SPLITS for path in archives[name].archived(f"{split}/shards")}
        if name in archives
        else set()
        for name in datasets
    }
    needs = needs_of(stream, datasets, archived, steps)
    plan = plan_of(needs, steps=steps, step_seconds=seconds, retrieval=retrieval, days=days if own["days"] else None)
    if not own["days"]:
        archives = archives_of(datasets, config.data.storage, retrieval, plan.days)
    if own["action"] == "status":
        counts = states_of(archives, needs)
        print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "nothing is archived")
        return
    if own["action"] == "request":
        num_asked = request_all(archives, needs)
        print(f"{num_asked} of {len(needs)} archived shards requested ({retrieval})")
    else:
        _show(stage, plan, seconds, retrieval)
    if own["days"] and days < plan.days:
        print(
            f"copies are kept for {days} days, and the last is read in day {plan.days}: what is gone by then is asked "
            f"for again when it is met, and waited for. days={plan.days} keeps all"
        )


def _show(stage: str, plan: Plan, seconds: float, retrieval: Retrieval) -> None:
    needs, size = plan.needs, sum(need.num_bytes for need in plan.needs)
    print(
        f"{stage}: {len(needs)} archived shards, {size / 1e9:.3f} GB, about ${plan.dollars:.2f} ({retrieval}), "
        f"to be kept for {plan.days} days"
    )
    for need in needs[:20]:
        print(f"  step {need.first_step} (after {need.first_step * seconds / 3600:.1f} h)  {need.source}/{need.path}")
    if len(needs) > 20:
        print(f"  ... and {len(needs) - 20} more, the last at step {needs[-1].first_step}")
    if plan.late_step is not None:
        print(
            f"training would catch up at step {plan.late_step} and wait {plan.wait_hours:.1f} h in all: "
            "request now and begin later, or retrieval=Standard"
        )


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise UserError(f"{name}={text}: give a number.")
    return number


if __name__ == "__main__":
    sys.exit(main())
