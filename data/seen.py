"""Which checkpoints were made from a document: by step, since the order of samples is arithmetic.

A checkpoint had it if its stage showed it before the step the checkpoint is of, or if one of its parents had it. Where
that cannot be worked out any more, having been made from a dataset that held it counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf import load
from conf.errors import DataError, UserError
from data.shards import Access, Dataset
from data.stream import Stream, stream_of_stage
from data.tombstones import Passage


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """A checkpoint that was made from a dataset which held the document, or from a checkpoint that was.

    Attributes:
        checkpoint: its path.
        saw: whether the document went into it.
        why: what tells.
    """

    checkpoint: str
    saw: bool
    why: str


def sightings(runs: Path, identities: frozenset[str], passages: Sequence[Passage]) -> list[Sighting]:
    """What is known of the checkpoints under a folder.

    Args:
        runs: the folder.
        identities: of the datasets that held the documents.
        passages: where in them; empty: not known.

    Raises:
        DataError: there is no such folder, or a manifest in it cannot be read.
    """
    if not runs.is_dir():
        raise DataError(f"{runs}: there is no such folder. Give the one that runs are in.")
    search = _Search(identities, passages)
    found = (search.sighting(manifest.parent) for manifest in sorted(runs.rglob("manifest.json")))
    return [sighting for sighting in found if sighting is not None]


class _Search:
    """Looks at checkpoints, each stage's order but once."""

    def __init__(self, identities: frozenset[str], passages: Sequence[Passage]) -> None:
        self._identities = identities
        self._known = bool(passages)
        self._places = [(passage.first, passage.after) for passage in passages if passage.split == "train"]
        self._found: dict[Path, Sighting | None] = {}
        self._steps: dict[tuple[Path, str], int | str] = {}

    def sighting(self, checkpoint: Path) -> Sighting | None:
        """What is known of a checkpoint; None: nothing it was made from held the document."""
        if checkpoint not in self._found:
            self._found[checkpoint] = self._looked_at(checkpoint)
        return self._found[checkpoint]

    def _looked_at(self, checkpoint: Path) -> Sighting | None:
        manifest = checkpoint / "manifest.json"
        try:
            record = json.loads(manifest.read_bytes())
            if "provenance" not in record:
                return None
            data: Mapping[str, str] = record["provenance"]["data"]
            sources = [source for source, identity in data.items() if identity in self._identities]
            parents = [Path(parent["path"]) for parent in record["provenance"].get("parents", ())]
        except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            raise DataError(f"{manifest}: cannot be read as the manifest of a checkpoint ({error!r}).") from error
        found = [self._own(checkpoint, record, sources)] if sources else []
        for parent in parents:
            inherited = self.sighting(parent) if (parent / "manifest.json").is_file() else None
            if inherited is not None:
                why = inherited.why if not inherited.saw else f"made from {parent}"
                found.append(Sighting(checkpoint=str(checkpoint), saw=inherited.saw, why=why))
        return next((sighting for sighting in found if sighting.saw), found[0] if found else None)

    def _own(self, checkpoint: Path, record: Mapping[str, Any], sources: Sequence[str]) -> Sighting:
        """What the checkpoint's own stage has to say."""
        names = ", ".join(sources)
        if self._known and not self._places:
            return Sighting(checkpoint=str(checkpoint), saw=False, why=f"{names}: held out, never trained on")
        stage = record["provenance"].get("stage", "")
        run = checkpoint.parents[3] if len(checkpoint.parents) > 3 else checkpoint
        if (run, stage) not in self._steps:
            self._steps[run, stage] = self._first_step(run, stage, sources)
        first = self._steps[run, stage]
        if isinstance(first, str):
            return Sighting(checkpoint=str(checkpoint), saw=True, why=f"{names}; by the dataset alone: {first}")
        why = f"{names}: first shown in step {first} of {stage}" if first >= 0 else f"{names}: never shown in {stage}"
        return Sighting(checkpoint=str(checkpoint), saw=0 <= first < record["step"], why=why)

    def _first_step(self, run: Path, stage: str, sources: Sequence[str]) -> int | str:
        """The step, counted from 0, that shows it first; -1: none does; a text: why that is not known."""
        if not self._known:
            return "where it was is not known any more"
        try:
            stream = stream_of_run(run, stage)
            first = stream.first_step_with(dict.fromkeys(sources, self._places), range(stream.spec.num_steps))
        except (UserError, OSError, ValueError) as error:
            return str(error).splitlines()[0]
        return -1 if first is None else first


def stream_of_run(run: Path, stage: str) -> Stream:
    """The samples of a stage of a run, from the datasets that it read.

    Raises:
        UserError: there is no such run or stage, or a dataset cannot be opened.
        OSError, ValueError: what the run wrote down of its datasets is not there.
    """
    config = load.read(run / "config.json")
    paths = json.loads((run / "datasets.json").read_text())
    datasets = {name: Dataset.open(path, Access(storage=config.data.storage)) for name, path in paths.items()}
    return stream_of_stage(config, stage, datasets)
