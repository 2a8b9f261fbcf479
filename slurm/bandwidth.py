"""Bus bandwidth of an all-reduce within a node and between pairs of nodes: one process a rank, the nodes all at once.

Every node is measured with two others, in two rounds, so that a slow node (slow with both) can be told from one whose
partner is slow. Printed by the first rank of a node as JSON: name of the other node (its own: within it) -> GB/s.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from slurm.node import publish, wait_for_text
from slurm.topology import addresses

GPU_BYTES = 512 * 2**20
CPU_BYTES = 8 * 2**20
WARM_UP, COUNTED = 2, 5


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Pairs of neighbours in two rounds; every node is in a pair of each round, but for odd ones out.

    >>> rounds(["a", "b", "c", "d"])
    [[('a', 'b'), ('c', 'd')], [('b', 'c'), ('d', 'a')]]
    """
    first = list(zip(nodes[::2], nodes[1::2], strict=False))
    turned = [*nodes[1:], nodes[0]]
    second = list(zip(turned[::2], turned[1::2], strict=False))
    return [first, second] if len(nodes) > 2 else [first]


def bus_bandwidth(num_bytes: int, world_size: int, seconds: float) -> float:
    """GB/s each rank sends and receives in a ring all-reduce, as nccl-tests counts it: 2 (n - 1) / n of the data."""
    return 2 * (world_size - 1) / world_size * num_bytes / seconds / 1e9


def main(arguments: Sequence[str] | None = None) -> int:
    """One rank's part in all measurements of its node."""
    parser = argparse.ArgumentParser(prog="python -m slurm.bandwidth", description=main.__doc__)
    parser.add_argument("--attempt", type=Path, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--local-rank", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for each measurement")
    parser.add_argument("--intra-node", action="store_true")
    parser.add_argument("--node-pair", action="store_true")
    given = parser.parse_args(arguments)
    nodes = (given.attempt / "asked").read_text().split()
    own = os.environ["SLURMD_NODENAME"]
    meetings: list[tuple[str, ...]] = [(own,)] if given.intra_node else []
    if given.node_pair:
        meetings += [pair for each in rounds(nodes) for pair in each if own in pair]
    measured: dict[str, float | None] = {}
    for members in meetings:
        other = next((name for name in members if name != own), own)
        try:
            measured[other] = _measure(given, members, own)
        except (RuntimeError, TimeoutError, OSError) as error:
            print(f"all-reduce of {' and '.join(members)}: {error}", file=sys.stderr)
            measured[other] = None
    if given.local_rank == 0:
        print(json.dumps(measured), flush=True)
    return 0


def _measure(given: argparse.Namespace, members: Sequence[str], own: str) -> float:
    import torch
    import torch.distributed as dist

    rank = members.index(own) * given.ranks + given.local_rank
    world_size = len(members) * given.ranks
    meeting, limit = given.attempt / f"meeting-{'-'.join(members)}", timedelta(seconds=given.seconds)
    if rank == 0:
        address = addresses((given.attempt / "nodes").read_text())[own]
        store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=limit)
        publish(meeting, f"{address} {store.port}")
    else:
        address, port = wait_for_text(meeting, given.seconds).split()
        store = dist.TCPStore(address, int(port), is_master=False, timeout=limit)
    if given.device == "cuda":
        torch.cuda.set_device(given.local_rank)
    backend = "nccl" if given.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
    try:
        num_bytes = GPU_BYTES if given.device == "cuda" else CPU_BYTES
        tensor = torch.ones(num_bytes // 4, dtype=torch.float32, device=given.device)
        for _ in range(WARM_UP):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        _synchronise(given.device)
        dist.barrier()
        started = time.perf_counter()
        for _ in range(COUNTED):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        _synchronise(given.device)
        seconds = (time.perf_counter() - started) / COUNTED
        if not bool((tensor == 1).all()):
            raise RuntimeError("the all-reduce gave wrong values")
        return bus_bandwidth(num_bytes, world_size, seconds)
    finally:
        dist.destroy_process_group()


def _synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
