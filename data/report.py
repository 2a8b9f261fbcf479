"""What was dropped on the way into a dataset, and why: for people on the screen, whole in `report.json`.

Examples name documents and do not quote them: a report may outlive what it speaks of.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.table import Table

NUM_EXAMPLES = 5
REPORT_NAME = "report.json"


@dataclass(slots=True)
class DroppedFor:
    """The documents dropped for one reason.

    Attributes:
        documents: how many.
        characters: in them.
        details: how many for each rule or language.
        examples: the first few: id, source, row, and what decided.
    """

    documents: int = 0
    characters: int = 0
    details: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, object]] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """What became of all documents; the same for the same input, whoever did it and in which order.

    Attributes:
        made_with: options and versions.
        documents: read.
        characters: read.
        kept: documents of each split.
        dropped: by reason.
        tombstones_unmet: ids that were to be left out and were not in the input.
    """

    made_with: dict[str, object] = field(default_factory=dict)
    documents: int = 0
    characters: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, DroppedFor] = field(default_factory=dict)
    tombstones_unmet: list[str] = field(default_factory=list)
    _wanted: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    _named: dict[int, dict[str, object]] = field(default_factory=dict)

    def add_unit(self, table: pa.Table, ids: Sequence[str], sources: Sequence[str], rows: Sequence[int]) -> None:
        """Count the documents of a unit, and those that a step dropped."""
        characters = table.column("characters").to_pylist()
        self.documents += len(ids)
        self.characters += sum(characters)
        reasons, details = table.column("reason").to_pylist(), table.column("detail").to_pylist()
        for at, reason in enumerate(reasons):
            if reason:
                dropped = self.add_dropped(reason, characters[at])
                if reason in ("quality", "language"):
                    dropped.details[details[at].partition(":")[0]] += 1
                if len(dropped.examples) < NUM_EXAMPLES:
                    example = {"id": ids[at], "source": sources[at], "row": rows[at], "detail": details[at]}
                    dropped.examples.append(example)

    def add_dropped(self, reason: str, characters: int) -> DroppedFor:
        """Count a document that is dropped."""
        dropped = self.dropped.setdefault(reason, DroppedFor())
        dropped.documents += 1
        dropped.characters += characters
        return dropped

    def wanted_examples(
        self, reasons: Sequence[str], verdicts: npt.NDArray[np.int8], representatives: npt.NDArray[np.int64]
    ) -> frozenset[int]:
        """The candidates whose names the examples need: the first of each verdict above 0, and what stands for them."""
        found: set[int] = set()
        for verdict, reason in enumerate(reasons):
            for candidate in np.flatnonzero(verdicts == verdict)[:NUM_EXAMPLES].tolist() if reason else []:
                stands_for = int(representatives[candidate])
                self._wanted[candidate] = (reason, candidate, stands_for)
                found |= {candidate, stands_for}
        return frozenset(found)

    def name(self, candidate: int, document_id: str, source: str, row: int) -> None:
        """Say who a wanted candidate is."""
        self._named[candidate] = {"id": document_id, "source": source, "row": row}

    def finish(self) -> None:
        """Make the examples of the candidates."""
        for reason, candidate, stands_for in self._wanted.values():
            other = self._named[stands_for]["id"]
            detail = "" if reason == "forgotten" else f"{other} is kept"
            self.dropped[reason].examples.append(self._named[candidate] | {"detail": detail})

    def to_json(self, identity: str) -> bytes:
        """The text of `report.json`."""
        dropped = {
            reason: {
                "documents": found.documents,
                "characters": found.characters,
                "details": dict(sorted(found.details.items())),
                "examples": found.examples,
            }
            for reason, found in sorted(self.dropped.items())
        }
        record = {
            "identity": identity,
            "made_with": self.made_with,
            "read": {"documents": self.documents, "characters": self.characters},
            "kept": self.kept,
            "dropped": dropped,
            "tombstones_unmet": self.tombstones_unmet,
        }
        return (json.dumps(record, indent=2) + "\n").encode()

    def show(self, console: Console) -> None:
        """Print it as a table."""
        table = Table(box=None, pad_edge=False)
        for title, justify in (("", "left"), ("documents", "right"), ("share", "right"), ("for example", "left")):
            table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
        table.add_row("read", f"{self.documents:,}", "", "")
        for reason, found in sorted(self.dropped.items(), key=lambda item: -item[1].documents):
            shown = [_shown(example) for example in found.examples[:2]]
            table.add_row(
                f"dropped: {reason.replace('_', ' ')}",
                f"{found.documents:,}",
                f"{100 * found.documents / self.documents:.1f} %",
                "\n".join(shown),
            )
        for split, count in self.kept.items():
            table.add_row(f"kept: {split.replace('_', ' ')}", f"{count:,}", f"{100 * count / self.documents:.1f} %", "")
        console.print(table)
        if self.tombstones_unmet:
            names = ", ".join(self.tombstones_unmet[:NUM_EXAMPLES])
            console.print(f"{len(self.tombstones_unmet)} forgotten documents are not in the input, e.g. {names}")


def _shown(example: dict[str, object]) -> str:
    return f"{example['id']} ({example['detail']})" if example["detail"] else f"{example['id']}"
