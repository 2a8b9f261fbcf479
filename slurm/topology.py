"""Nodes of an allocation, from what `scontrol` prints: their names, addresses and switches. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_ENTRY = re.compile(r"^(?:Switch|Block)Name=(?P<name>\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Switch:
    """One line of the topology: a leaf has nodes, others have switches."""

    name: str
    nodes: tuple[str, ...]
    switches: tuple[str, ...]


def leaves(topology: str, nodes: Sequence[str]) -> list[list[str]]:
    """The given nodes by leaf switch, near leaves next to each other; nodes on no known switch are the last leaf.

    Args:
        topology: output of `scontrol show topology`, which is empty where the cluster has none.
        nodes: names, in any order.
    """
    switches = {each.name: each for each in _switches(topology)}
    below = {child for each in switches.values() for child in each.switches}
    wanted, found = set(nodes), []
    for root in switches.values():
        if root.name in below:
            continue
        for leaf in _leaves_under(root, switches):
            here = sorted(wanted.intersection(leaf.nodes), key=natural)
            wanted.difference_update(here)
            found.append(here)
    return [each for each in [*found, sorted(wanted, key=natural)] if each]


def expand(hosts: str) -> list[str]:
    """Names of a Slurm host list.

    >>> expand("n[08-10],login")
    ['n08', 'n09', 'n10', 'login']
    """
    return [name for part in _split(hosts) for name in _expand_one(part)]


def addresses(nodes_text: str) -> dict[str, str]:
    """Name -> address, from `scontrol show node -o`."""
    found = {}
    for line in nodes_text.splitlines():
        name = re.search(r"\bNodeName=(\S+)", line)
        address = re.search(r"\bNodeAddr=(\S+)", line)
        if name:
            found[name[1]] = address[1] if address else name[1]
    return found


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Key that sorts n2 before n10."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def _switches(topology: str) -> Iterator[Switch]:
    for line in topology.splitlines():
        entry = _ENTRY.match(line)
        if entry:
            fields = dict(word.split("=", 1) for word in line.split() if "=" in word)
            yield Switch(
                entry["name"], tuple(expand(fields.get("Nodes", ""))), tuple(expand(fields.get("Switches", "")))
            )


def _leaves_under(switch: Switch, switches: dict[str, Switch]) -> Iterator[Switch]:
    if not switch.switches:
        yield switch
    for child in switch.switches:
        if child in switches:
            yield from _leaves_under(switches[child], switches)


def _split(hosts: str) -> list[str]:
    """At commas outside brackets."""
    return [part for part in re.split(r",(?![^\[]*\])", hosts) if part]


def _expand_one(part: str) -> list[str]:
    bracket = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if bracket is None:
        return [part]
    prefix, ranges, rest = bracket.groups()
    names = []
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        for number in range(int(first), int(last or first) + 1):
            names += [f"{prefix}{number:0{len(first)}d}{tail}" for tail in _expand_one(rest)]
    return names
