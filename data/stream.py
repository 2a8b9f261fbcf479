"""The batches of a training stage. Its only state is one integer that the caller keeps: samples consumed.

A sample of a source is a window of `sequence_length + 1` tokens at `index * sequence_length` of the source's training
documents one after another. Its global id is its position in the stream; source, epoch and index follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conf.errors import DataError
from data.batch import Batch
from data.mix import Mixture
from data.order import Indices, key_of, permuted
from data.shards import Dataset


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a sample comes from: the `index`-th window of a source, in a pass over the source."""

    id: int
    source: str
    epoch: int
    index: int


class Stream:
    """Batches by step: pure functions of the configuration and the datasets, whatever was read before."""

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        *,
        mixture: Mapping[str, float],
        seed: int,
        sequence_length: int,
        global_batch: int,
        micro_batch: int,
    ) -> None:
        """Check that the datasets can serve the mixture.

        Args:
            datasets: by source.
            mixture: source -> weight.
            seed: of the shuffles and of the order of sources.
            sequence_length: tokens of a row.
            global_batch: rows a step, over all data ranks.
            micro_batch: rows of a batch.

        Raises:
            DataError: a source of the mixture is missing or shorter than one sample.
        """
        self.seed = seed
        self.sequence_length = sequence_length
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self._mixture = Mixture.of(mixture, seed)
        self._datasets: list[Dataset] = []
        self._num_samples: list[int] = []
        for name in self._mixture.names:
            if name not in datasets:
                raise DataError(f"the mixture names source '{name}'; there is: {', '.join(sorted(datasets))}.")
            num_tokens = datasets[name].num_tokens("train")
            num_samples = (num_tokens - 1) // sequence_length
            if num_samples < 1:
                raise DataError(
                    f"source '{name}' ({datasets[name].path}) has {num_tokens} training tokens; one sample of "
                    f"sequence_length={sequence_length} takes {sequence_length + 1}. "
                    "Give more text or a shorter sequence_length."
                )
            self._datasets.append(datasets[name])
            self._num_samples.append(num_samples)

    def samples_in_epoch(self, source: str) -> int:
        """Samples of a source before its next pass begins."""
        return self._num_samples[self._mixture.names.index(source)]

    def sample_ids(self, step: int) -> Indices:
        """Global ids of the samples of a step, in order, shape (global_batch,)."""
        first = step * self.global_batch
        return np.arange(first, first + self.global_batch, dtype=np.int64)

    def samples(self, ids: Indices) -> list[Sample]:
        """Source, epoch and index of global sample ids."""
        sources, epochs, indices = self._locate(ids)
        places = zip(ids.tolist(), sources.tolist(), epochs.tolist(), indices.tolist(), strict=True)
        return [Sample(number, self._mixture.names[source], epoch, index) for number, source, epoch, index in places]

    def batches(self, step: int, data_rank: int, data_size: int) -> list[Batch]:
        """The micro-batches of a data rank. Those of ranks 0, 1, 2, ... one after another are the global batch.

        Raises:
            DataError: a shard is missing or damaged.
            ValueError: the global batch cannot be shared by so many data ranks in whole micro-batches.
        """
        rows, micro = self.global_batch, self.micro_batch
        if rows % (data_size * micro):
            raise ValueError(
                f"global_batch={rows} cannot be shared by {data_size} data ranks in micro-batches of {micro}: "
                f"it must be a multiple of {data_size * micro}"
            )
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data rank {data_rank} of {data_size}")
        share = rows // data_size
        ids = self.sample_ids(step)[data_rank * share : (data_rank + 1) * share]
        windows = self.windows(ids)
        return [_batch(windows[row : row + micro], ids[row : row + micro]) for row in range(0, share, micro)]

    def windows(self, ids: Indices) -> npt.NDArray[np.int64]:
        """Tokens of samples, shape (N, sequence_length + 1).

        Raises:
            DataError: a shard is missing or damaged.
        """
        length = self.sequence_length
        windows = np.empty((len(ids), length + 1), np.int64)
        sources, _, indices = self._locate(ids)
        # In order of place, so that each shard is decoded once however small the cache.
        for row in np.lexsort((indices, sources)):
            start = int(indices[row]) * length
            windows[row] = self._datasets[sources[row]].tokens("train", start, length + 1)
        return windows

    def documents(self, step: int) -> dict[int, list[str]]:
        """Names of the documents each sample of a step shows, by sample id."""
        ids = self.sample_ids(step)
        sources, _, indices = self._locate(ids)
        length = self.sequence_length
        return {
            int(number): self._datasets[source].document_ids("train", int(index) * length, length + 1)
            for number, source, index in zip(ids, sources, indices, strict=True)
        }

    def _locate(self, ids: Indices) -> tuple[Indices, Indices, Indices]:
        """Source (its place in the mixture), epoch and index of each id."""
        sources, counts = self._mixture.locate(ids)
        sizes = np.array(self._num_samples, np.int64)[sources]
        epochs, inside = np.divmod(counts, sizes)
        indices = np.empty_like(inside)
        for source, epoch in {(int(source), int(epoch)) for source, epoch in zip(sources, epochs, strict=True)}:
            rows = (sources == source) & (epochs == epoch)
            key = self._epoch_key(self._mixture.names[source], epoch)
            indices[rows] = permuted(inside[rows], self._num_samples[source], key)
        return sources, epochs, indices

    def _epoch_key(self, name: str, epoch: int) -> int:
        return key_of(self.seed, name, epoch)


def _batch(windows: npt.NDArray[np.int64], ids: Indices) -> Batch:
    tokens = np.ascontiguousarray(windows[:, :-1])
    return Batch(
        tokens_BS=tokens,
        labels_BS=np.ascontiguousarray(windows[:, 1:]),
        loss_mask_BS=np.ones(tokens.shape, np.float32),
        position_ids_BS=np.tile(np.arange(tokens.shape[1], dtype=np.int64), (len(tokens), 1)),
        sample_ids_B=ids,
    )
