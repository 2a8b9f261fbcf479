"""Archived shards, brought back ahead of training.

python -m data.thaw recipe=NAME action=plan|request|status [stage=NAME] [first_step=0] [step_seconds=10]
                    [retrieval=Bulk|Standard] [days=7]

The order of samples is known, so is the step that first needs each shard. `plan` says which shards are needed when,
what restoring them costs and whether training would catch up with it; `request` asks for them, first needed first,
again as often as one likes; `status` counts.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conf import load
from conf.errors import UserError
from conf.schema import StorageConfig
from data.archive import Archive, Retrieval
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
MAX_PROBES = 20_000
"""A stage of more steps is looked at in strides; blocks are needed for many steps in a row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """An archived shard that a stage reads.

    Attributes:
        source: whose.
        path: of the shard, relative to the dataset.
        num_bytes: as stored.
        first_step: that reads it, or up to a stride before.
    """

    source: str
    path: str
    num_bytes: int
    first_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What restoring takes and when training needs it.

    Attributes:
        needs: first needed first.
        dollars: list price of all.
        late_step: first step that would have to wait, if all is requested now; None: none.
        wait_hours: longest wait.
    """

    needs: list[Need]
    dollars: float
    late_step: int | None
    wait_hours: float


def needs_of(
    stream: Stream, datasets: Mapping[str, Dataset], archived: Mapping[str, set[str]], steps: range
) -> list[Need]:
    """Archived shards that some steps read, first needed first."""
    stride = max(1, len(steps) // MAX_PROBES)
    first: dict[tuple[str, int], int] = {}
    for step in steps[::stride]:
        for source, block in stream.blocks(step):
            shard = block // datasets[source].manifest.shard_blocks
            first.setdefault((source, shard), max(steps.start, step - stride + 1))
    needs = []
    for (source, shard), step in first.items():
        part, inside = datasets[source].part_of("train", shard)
        path = part.path(inside)
        if path in archived[source]:
            size = int(part.num_bytes[inside])
            needs.append(Need(source=source, path=path, num_bytes=size, first_step=step))
    return sorted(needs, key=lambda need: (need.first_step, need.source, need.path))


def plan_of(needs: list[Need], *, steps: range, step_seconds: float, retrieval: Retrieval, days: int) -> Plan:
    """When what is requested now would be there, against when it is needed."""
    gigabytes = sum(need.num_bytes for need in needs) / 1e9
    dollars = gigabytes * (DOLLARS_A_GIGABYTE[retrieval] + days * DOLLARS_A_GIGABYTE_DAY)
    late_step, wait_hours = None, 0.0
    for number, need in enumerate(needs):
        there = number / REQUESTS_A_SECOND / 3600 + HOURS[retrieval]
        needed = (need.first_step - steps.start) * step_seconds / 3600
        if there > needed + wait_hours:
            late_step = need.first_step if late_step is None else late_step
            wait_hours = there - needed
    return Plan(
        needs=needs,
        dollars=dollars + len(needs) * DOLLARS_A_REQUEST[retrieval],
        late_step=late_step,
        wait_hours=wait_hours,
    )


def request_all(archives: Mapping[str, Archive], needs: Sequence[Need]) -> int:
    """Ask for all that is archived still, at most `REQUESTS_A_SECOND`; returns how many were asked for.

    Raises:
        DataError: restoring is not allowed.
    """
    asked = 0
    for need in needs:
        if archives[need.source].state(need.path) == "archived":
            archives[need.source].request(need.path)
            asked += 1
            time.sleep(1 / REQUESTS_A_SECOND)
    return asked


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
    own = {"action": "plan", "stage": "", "first_step": "0", "step_seconds": "10", "retrieval": "Bulk", "days": "7"}
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
    config = load.compose(overrides)
    stage = own["stage"] or next(name for name in config.order if hasattr(config.stages[name], "training"))
    datasets = {name: prepared(source, config.data) for name, source in config.data.sources.items()}
    stream = stream_of_stage(config, stage, datasets)
    archives = archives_of(datasets, config.data.storage, retrieval, int(own["days"]))
    archived = {name: archives[name].archived("train/shards") if name in archives else set() for name in datasets}
    steps = range(int(own["first_step"]), stream.spec.num_steps)
    needs = needs_of(stream, datasets, archived, steps)
    if own["action"] == "status":
        states = Counter(archives[need.source].state(need.path) for need in needs)
        print(", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "nothing is archived")
        return
    if own["action"] == "request":
        print(f"{request_all(archives, needs)} of {len(needs)} archived shards requested ({retrieval})")
        return
    seconds = float(own["step_seconds"])
    plan = plan_of(needs, steps=steps, step_seconds=seconds, retrieval=retrieval, days=int(own["days"]))
    size = sum(need.num_bytes for need in needs)
    print(f"{stage}: {len(needs)} archived shards, {size / 1e9:.3f} GB, about ${plan.dollars:.2f} ({retrieval})")
    for need in needs[:20]:
        print(f"  step {need.first_step} (after {need.first_step * seconds / 3600:.1f} h)  {need.source}/{need.path}")
    if len(needs) > 20:
        print(f"  ... and {len(needs) - 20} more, the last at step {needs[-1].first_step}")
    if plan.late_step is not None:
        print(
            f"training would catch up at step {plan.late_step} and wait {plan.wait_hours:.1f} h in all: "
            "request now and begin later, or retrieval=Standard"
        )


if __name__ == "__main__":
    sys.exit(main())
