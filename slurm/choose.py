"""Which nodes of an allocation get ranks, and in which order, from what each has said of itself.

`python -m slurm.choose` reads the files of an attempt and writes `chosen` (name and address, one a line, in rank order)
and `failed` (names, comma-separated). Exit codes: 0 chosen, 3 not enough sound nodes, 2 a fault of the user's.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.errors import UserError
from slurm.preflight import Report, mark_file
from slurm.topology import addresses, leaves, natural

NOT_ENOUGH = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Outcome of the checks.

    Attributes:
        chosen: nodes in rank order; empty where there are not enough.
        failed: node -> why.
    """

    chosen: tuple[str, ...]
    failed: Mapping[str, tuple[str, ...]]


def choose(
    nodes: Sequence[str], reports: Mapping[str, Report], topology: str, *, num_nodes: int, clock_seconds: float
) -> Choice:
    """Leave out nodes that failed, keep as few switches as possible, and order the rest by switch.

    Args:
        nodes: all that were asked.
        reports: of those that answered.
        topology: output of `scontrol show topology`.
        num_nodes: how many are needed.
        clock_seconds: largest difference of a clock to the others' median.
    """
    failed = {node: reasons for node in nodes if (reasons := _faults(node, reports, clock_seconds))}
    groups = leaves(topology, [node for node in nodes if node not in failed])
    for _ in range(sum(map(len, groups)) - num_nodes):
        # A spare is best left idle where the fewest neighbours would miss it.
        min((group for group in groups if group), key=len).pop()
    chosen = [node for group in groups for node in group]
    return Choice(chosen=tuple(chosen) if len(chosen) == num_nodes else (), failed=failed)


def require_shared(nodes: Sequence[str], reports: Mapping[str, Report], written: set[str], run: Path) -> None:
    """The run directory is one directory, seen from every node.

    Args:
        nodes: all that were asked.
        reports: of those that answered.
        written: nodes whose mark in the run directory is seen here.
        run: the run directory.

    Raises:
        UserError: no node but this one shares it. A single node that does not is that node's fault.
    """
    others = [node for node in reports if not (reports[node].sees_run and node in written)]
    if others and len(others) >= len(reports) - 1 and len(nodes) > 1:
        raise UserError(
            f"the run directory {run} is not shared: {', '.join(sorted(others, key=natural))} "
            f"{'see' if len(others) > 1 else 'sees'} another directory of that name, or none. Every node of the job "
            "must see the same one. Set runs_dir to a directory of a shared file system."
        )


def require_some_sound(nodes: Sequence[str], failed: Collection[str], run: Path) -> None:
    """On the first start of a run some node passes, or the checks are at fault and would leave out node after node.

    Two nodes may fail for the one link between them; each of more is measured with two others.

    Raises:
        UserError: none does, and the run was never started.
    """
    if len(nodes) > 2 and len(failed) == len(nodes) and not (run / "status.json").exists():
        raise UserError(
            f"all {len(nodes)} nodes failed their checks, and no rank was ever started, so this is more likely a "
            "setting than the nodes; the job ends instead of going through the cluster. The thresholds are "
            "cluster.slurm.preflight.*; what was measured is in the file reports of this start."
        )


def read_reports(text: str) -> dict[str, Report]:
    """Reports by node. Other output between them, as from a container's start, is passed over."""
    found = {}
    for line in text.splitlines():
        if line.startswith('{"node"'):
            report = Report(**json.loads(line))
            found[report.node] = report
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the files of an attempt, choose, and write the choice."""
    parser = argparse.ArgumentParser(prog="python -m slurm.choose", description=main.__doc__)
    parser.add_argument("--attempt", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--num-nodes", type=int, required=True)
    parser.add_argument("--clock-seconds", type=float, required=True)
    given = parser.parse_args(arguments)
    known = addresses((given.attempt / "nodes").read_text())
    nodes = (given.attempt / "asked").read_text().split()
    reports = read_reports((given.attempt / "reports").read_text())
    written = {node for node in nodes if mark_file(given.attempt, node).exists()}
    try:
        require_shared(nodes, reports, written, given.run)
    except UserError as error:
        print(f"error: {error}")
        return 2
    choice = choose(
        nodes,
        reports,
        (given.attempt / "topology").read_text(),
        num_nodes=given.num_nodes,
        clock_seconds=given.clock_seconds,
    )
    for node, reasons in choice.failed.items():
        print(f"node {node} failed its checks: {'; '.join(reasons)}")
    try:
        require_some_sound(nodes, choice.failed, given.run)
    except UserError as error:
        print(f"error: {error}")
        return 2
    (given.attempt / "failed").write_text(",".join(choice.failed))
    if not choice.chosen:
        print(f"{len(nodes) - len(choice.failed)} of {len(nodes)} nodes are sound, {given.num_nodes} are needed")
        return NOT_ENOUGH
    lines = [f"{node} {socket.gethostbyname(known[node])}\n" for node in choice.chosen]
    (given.attempt / "chosen").write_text("".join(lines))
    print(f"ranks go to {' '.join(choice.chosen)}")
    return 0


def _faults(node: str, reports: Mapping[str, Report], clock_seconds: float) -> tuple[str, ...]:
    report = reports.get(node)
    if report is None:
        return ("it did not report",)
    faults = list(report.faults)
    if not report.sees_run:
        faults.append("it does not see the run directory")
    offsets = [each.clock_offset for each in reports.values() if each.clock_offset is not None]
    if report.clock_offset is not None and abs(report.clock_offset - statistics.median(offsets)) > clock_seconds:
        away = report.clock_offset - statistics.median(offsets)
        faults.append(f"its clock is {away:+.1f} s off the others' (at most {clock_seconds:g})")
    faults += _bad_pairs(report, reports)
    return tuple(faults)


def _bad_pairs(report: Report, reports: Mapping[str, Report]) -> list[str]:
    """A node is at fault where every pair it was in with a sound partner went badly; a good one has a good pair."""
    counted = {other: told for other, told in report.pairs.items() if other in reports and not reports[other].faults}
    if any(told is not None and told.startswith("fast") for told in counted.values()):
        return []
    return [f"all-reduce with {other} {f'is {told}' if told else 'did not finish'}" for other, told in counted.items()]


if __name__ == "__main__":
    sys.exit(main())
