"""What every stage is given and gives back: a stage is a function from checkpoint to checkpoint."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from conf.errors import CheckpointError
from conf.schema import DataConfig
from data.archive import Archive
from data.shards import Access, Dataset
from data.tiers import open_tiers
from train.checkpoint import Checkpoint, Parent
from train.data_gate import Reading
from train.metrics import MetricsWriter
from train.rundir import RunDir
from train.worker import RankContext, RankOutcome

MOST_OPENED = 16
"""Sources that are opened at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageInput:
    """What a stage works on, the same on every rank.

    Attributes:
        context: this rank and its run.
        name: of the stage in the recipe.
        incoming: checkpoint of the model so far, or None where there is none yet.
        datasets: every prepared source by name.
        reading: through which they are read, but for the steps of a training loop: a shard may have to be thawed.
    """

    context: RankContext
    name: str
    incoming: Path | None
    datasets: dict[str, Dataset]
    reading: Reading = field(default_factory=Reading)

    def announce(self, kind: str) -> None:
        """Write down that a stage without optimizer steps began; a training loop writes its own."""
        if self.context.is_first:
            parameters = Checkpoint.open(self.incoming).manifest.provenance.model.num_parameters if self.incoming else 0
            MetricsWriter(self.context.run.metrics_file).write(
                "stage_started",
                stage=self.name,
                stage_kind=kind,
                num_parameters=parameters,
                num_steps=0,
                step=0,
                tokens_per_step=0,
            )

    def model_of(self, name: str) -> Path:
        """Checkpoint of an earlier stage's model, or of `init`, the one the recipe started from."""
        run, init = self.context.run, self.context.config.init
        result = run.result(name) if name != "init" else None
        path = init if name == "init" else result.checkpoint if result is not None else None
        assert path is not None, f"model {name} does not exist, though the order of stages was checked"
        return Path(path)

    def open_incoming(self) -> Checkpoint:
        """The incoming model.

        Raises:
            CheckpointError: it was trained with another tokenizer than this run's data.
        """
        assert self.incoming is not None, "a stage that needs a model comes after one that makes it (recipes/check.py)"
        return self._open(self.incoming)

    def open_model(self, name: str | None) -> Checkpoint:
        """An earlier stage's model by name (`init`: what the recipe started from; None: the incoming one).

        Raises:
            CheckpointError: it was trained with another tokenizer than this run's data.
        """
        return self.open_incoming() if name is None else self._open(self.model_of(name))

    def _open(self, path: Path) -> Checkpoint:
        checkpoint = Checkpoint.open(path)
        saved = checkpoint.manifest.provenance.tokenizer
        tokenizer = tokenizer_identity(self.datasets)
        if saved != tokenizer:
            raise CheckpointError(
                f"{path} was trained with tokenizer {saved[:12]}, and this run's data is tokenised with "
                f"{tokenizer[:12]}: token ids would mean other words. Set data.tokenizer to the model's own."
            )
        return checkpoint


@dataclass(frozen=True, slots=True)
class StageOutput:
    """How a stage ended, and the checkpoint it passes on (None: it only looked)."""

    outcome: RankOutcome
    checkpoint: Path | None


def parent_of(checkpoint: Checkpoint) -> Parent:
    """The checkpoint as lineage names it."""
    return Parent(path=str(checkpoint.path), manifest_sha256=checkpoint.manifest_sha256)


def open_datasets(run: RunDir, data: DataConfig) -> dict[str, Dataset]:
    """The prepared sources of a run, as its driver wrote them down, behind the tiers they share."""
    tiers = open_tiers(data.tiers)
    paths: dict[str, str] = json.loads(run.datasets_file.read_text())

    def opened(path: str) -> Dataset:
        archive = Archive(path, data.storage) if path.startswith("s3://") else None
        return Dataset.open(path, Access(storage=data.storage, tiers=tiers, archive=archive))

    # At once: each takes some round trips to its storage.
    with ThreadPoolExecutor(max(1, min(len(paths), MOST_OPENED))) as pool:
        return dict(zip(paths, pool.map(opened, paths.values()), strict=True))


def tokenizer_identity(datasets: dict[str, Dataset]) -> str:
    """Hash of the tokenizer all sources share."""
    return next(iter(datasets.values())).tokenizer_sha256
