"""Finding the checkpoint to continue from: the newest one whose every byte is what was written.

Hashing a large checkpoint takes as long as reading it, so the ranks share the files among them and agree on the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from conf.errors import CheckpointError
from train.checkpoint import Checkpoint, checkpoints_in
from train.worker import Place


def newest_intact(directory: Path, place: Place, tell: Callable[[str, str], None]) -> Checkpoint | None:
    """The newest checkpoint without a fault, or None if there is no checkpoint at all; the same on every rank.

    Args:
        directory: of one stage's checkpoints.
        place: this rank's.
        tell: called with ("warning", text) for each checkpoint that is passed over.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    faults: list[str] = []
    for path in reversed(checkpoints_in(directory)):
        fault = _fault(path, place)
        if fault is None:
            for text in faults:
                tell("warning", f"{text}; going back to {path.name}")
            return Checkpoint.open(path)
        faults.append(fault)
    if faults:
        raise CheckpointError(
            "every checkpoint is damaged:\n  " + "\n  ".join(faults) + f"\nNothing was deleted; see {directory}."
        )
    return None


def _fault(path: Path, place: Place) -> str | None:
    try:
        Checkpoint.open(path).verify(share=place.rank, shares=place.world_size)
        fault = ""
    except CheckpointError as error:
        fault = str(error)
    found: list[str | None] = [None] * place.world_size
    dist.all_gather_object(found, fault)
    return next((text for text in found if text), None)
