"""The batches of a training stage. Its only state is one integer that the caller keeps: samples consumed.

Which samples a step has is arithmetic (`samples.py`), so is every data rank's share of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from conf.errors import UserError
from conf.schema import RunConfig, TrainingConfig
from data.batch import Batch, positions_in_documents
from data.cache import Tokens
from data.order import Indices, key_of
from data.rows import RowReader, rows_of
from data.samples import SampleOrder, StreamSpec
from data.shards import Dataset


class Stream(SampleOrder):
    """Batches by step: pure functions of the specification and the datasets, whatever was read before."""

    def __init__(self, datasets: Mapping[str, Dataset], spec: StreamSpec) -> None:
        """See `SampleOrder`; reads nothing yet."""
        super().__init__(datasets, spec)
        manifests = [source.dataset.manifest for source in self.sources]
        facts = {(manifest.end_of_text_id, manifest.token_type.bit_width) for manifest in manifests}
        assert len(facts) == 1, "the sources of a run share a tokenizer, and so the type of tokens"
        ((self._end_of_text_id, _),) = facts
        self._reader: RowReader | None = None

    def batches(self, step: int, data_rank: int, data_size: int) -> list[Batch]:
        """The micro-batches of a data rank. Those of ranks 0, 1, 2, ... one after another are the global batch.

        Raises:
            DataError: a shard is missing or damaged.
            ValueError: the global batch cannot be shared by so many data ranks in whole micro-batches.
        """
        first, share = self.share_of(data_rank, data_size)
        return self.batches_of(self.rows(step, first, share), step, first)

    def share_of(self, data_rank: int, data_size: int) -> tuple[int, int]:
        """First row of a data rank in every global batch, and number of rows.

        Raises:
            ValueError: the global batch cannot be shared by so many data ranks in whole micro-batches.
        """
        rows, micro = self.spec.global_batch, self.spec.micro_batch
        if rows % (data_size * micro):
            raise ValueError(
                f"global_batch={rows} cannot be shared by {data_size} data ranks in micro-batches of {micro}: "
                f"it must be a multiple of {data_size * micro}"
            )
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data rank {data_rank} of {data_size}")
        share = rows // data_size
        return data_rank * share, share

    def batches_of(self, rows: Tokens, step: int, first_row: int) -> list[Batch]:
        """Micro-batches of rows of a step, as `rows` gives them."""
        first, micro = step * self.spec.global_batch + first_row, self.spec.micro_batch
        ids = np.arange(first, first + len(rows), dtype=np.int64)
        return [self._batch(rows[row : row + micro], ids[row : row + micro]) for row in range(0, len(rows), micro)]

    def rows(self, step: int, first_row: int, num_rows: int) -> Tokens:
        """Tokens of some rows of a step as they are stored, shape (num_rows, sequence_length + 1); reads ahead.

        Raises:
            DataError: a shard is missing or damaged.
        """
        reader = self._reader
        if reader is None or not reader.goes_on(step, first_row, num_rows):
            reader = self._reader = RowReader(self, step, first_row, num_rows)
        return reader.rows(step)

    def windows(self, ids: Indices) -> npt.NDArray[np.int64]:
        """Tokens of samples, shape (N, sequence_length + 1).

        Raises:
            DataError: a shard is missing or damaged.
        """
        return rows_of(self, ids).astype(np.int64)

    def documents(self, step: int) -> dict[int, list[str]]:
        """Names of the documents each sample of a step shows, by sample id."""
        length = self.spec.sequence_length + 1
        by_name = {source.name: source.dataset for source in self.sources}
        return {
            sample.id: by_name[sample.source].document_ids("train", sample.first_token, length)
            for sample in self.samples(self.sample_ids(step))
        }

    def counters(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """What was read so far: of storage, and of each tier by name."""
        readers = [source.dataset.reader for source in self.sources]
        counters = [source.dataset.store.counters for source in self.sources]
        storage: dict[str, float] = {
            "requests": sum(each.requests for each in counters),
            "bytes": sum(each.bytes_read for each in counters),
            "retries": sum(each.retries for each in counters),
            "damaged": sum(reader.num_damaged for reader in readers),
        }
        # All sources share the tiers.
        tiers = {tier.name: tier.counters.as_dict() for tier in readers[0].tiers}
        return storage, tiers

    def _batch(self, windows: Tokens, ids: Indices) -> Batch:
        tokens = windows[:, :-1].astype(np.int64)
        if self.spec.reset_at_documents:
            # The token between two documents begins the later one, as it does where held-out documents are scored: a
            # first token is predicted from it and from nothing of the document before.
            positions = positions_in_documents(tokens == self._end_of_text_id)
        else:
            positions = np.tile(np.arange(tokens.shape[1], dtype=np.int64), (len(tokens), 1))
        return Batch(
            tokens_BS=tokens,
            labels_BS=windows[:, 1:].astype(np.int64),
            loss_mask_BS=np.ones(tokens.shape, np.float32),
            position_ids_BS=positions,
            sample_ids_B=ids,
        )


def stream_of_stage(config: RunConfig, stage: str, datasets: Mapping[str, Dataset]) -> Stream:
    """The samples of a training stage. Stages of one run shuffle differently, so none replays another.

    Raises:
        DataError: a source of the mixture is missing, shorter than one sample, or would be repeated too often.
        UserError: the stage does not train.
    """
    training: TrainingConfig | None = getattr(config.stages.get(stage), "training", None)
    if training is None:
        names = [name for name in config.order if hasattr(config.stages[name], "training")]
        raise UserError(f"stage '{stage}' takes no training steps; those that do: {', '.join(names)}.")
    limits = {name: source.max_epochs for name, source in config.data.sources.items() if source.max_epochs is not None}
    spec = StreamSpec(
        mixtures=mixtures_of(training),
        seed=key_of(config.seed, stage),
        sequence_length=training.sequence_length,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        shuffle=config.data.shuffle,
        max_epochs=limits,
        num_steps=training.num_steps,
        reset_at_documents=config.data.reset_at_documents,
    )
    return Stream(datasets, spec)


def mixtures_of(training: TrainingConfig) -> list[tuple[int, Mapping[str, float]]]:
    """The mixtures of a stage, each with its first step."""
    mixtures: list[tuple[int, Mapping[str, float]]] = [(0, training.mixture)]
    for change in training.mixture_changes:
        mixtures.append((math.ceil(change.from_fraction * training.num_steps), change.mixture))
    return mixtures
