"""Where the samples of a stream come from: source, pass over the source and place in it, by arithmetic alone.

A sample is a window of `sequence_length + 1` tokens. Its global id is its position in the stream; the rest follows
(`mix.py`, `order.py`). Nothing is read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from conf.errors import DataError
from conf.schema import ShuffleConfig
from data.index import GROUP_BLOCKS
from data.mix import MixtureSchedule, num_lanes_of
from data.order import BlockShuffle, Indices, distinct, group_runs_of, key_of, run_blocks_of
from data.shards import Dataset

SEARCHED_SAMPLES = 1 << 18
LEAST_RUNS = 20
"""Sources of fewer runs of several blocks are shuffled sample by sample."""
STRETCH_SHARDS = 1024
NEAR_STRETCHES = 16
"""Stretches of neighbouring shards that a shuffle draws from at a time, which bounds the index in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamSpec:
    """What a stream is a function of, besides its datasets.

    Attributes:
        mixtures: first step and source -> weight of each mixture; the first is from step 0.
        seed: of the shuffles and of the order of sources.
        sequence_length: tokens of a row.
        global_batch: rows a step, over all data ranks.
        micro_batch: rows of a batch.
        shuffle: how far samples are mixed.
        max_epochs: source -> passes over it that are allowed; sources not named may be repeated without end.
        num_steps: that will be taken, for `max_epochs`.
        reset_at_documents: positions begin anew with every document, which keeps attention within it.
    """

    mixtures: Sequence[tuple[int, Mapping[str, float]]]
    seed: int
    sequence_length: int
    global_batch: int
    micro_batch: int
    shuffle: ShuffleConfig = field(default_factory=ShuffleConfig)
    max_epochs: Mapping[str, float] = field(default_factory=dict)
    num_steps: int = 0
    reset_at_documents: bool = False


@dataclass(frozen=True, slots=True)
class Sample:
    """Where a sample comes from: the window of tokens at `first_token` of a source, in a pass over the source."""

    id: int
    source: str
    epoch: int
    first_token: int


class Source:
    """A source's samples: runs of whole blocks, or the single samples of a source that fits the window.

    Attributes:
        name: of the source.
        dataset: its tokens.
        is_whole: whether it fits the window and is shuffled sample by sample.
        run_blocks: blocks of a run.
        run_tokens: tokens of a run.
        shuffle: the order of its samples.
    """

    def __init__(self, name: str, dataset: Dataset, spec: StreamSpec, num_lanes: int) -> None:
        self.name = name
        self.dataset = dataset
        length, size = spec.sequence_length, dataset.manifest.block_tokens
        num_tokens = dataset.num_tokens("train")
        if num_tokens <= length:
            raise DataError(
                f"source '{name}' ({dataset.path}) has {num_tokens} training tokens; one sample of "
                f"sequence_length={length} takes {length + 1}. Give more text or a shorter sequence_length."
            )
        self.run_blocks = run_blocks_of(length, size)
        # Runs of sequences that fit blocks badly may be longer than the window, and what fills no last run is lost.
        window_blocks = num_lanes * max(spec.shuffle.window_blocks, self.run_blocks)
        self.is_whole = num_tokens <= max(window_blocks, LEAST_RUNS * (self.run_blocks - 1)) * size
        self.run_blocks = 1 if self.is_whole else self.run_blocks
        self.run_tokens = length if self.is_whole else self.run_blocks * size
        self.shuffle = BlockShuffle(
            num_runs=(num_tokens - 1) // self.run_tokens,
            run_samples=self.run_tokens // length,
            window_runs=1 if self.is_whole else max(1, spec.shuffle.window_blocks // self.run_blocks),
            num_lanes=num_lanes,
            group_runs=1 if self.is_whole else group_runs_of(num_lanes, GROUP_BLOCKS // self.run_blocks),
            near_runs=max(1, NEAR_STRETCHES * STRETCH_SHARDS * dataset.manifest.shard_blocks // self.run_blocks),
            stretch_runs=max(1, STRETCH_SHARDS * dataset.manifest.shard_blocks // self.run_blocks),
            seed=key_of(spec.seed, name),
        )
        if self.is_whole:
            dataset.keep((num_tokens // size + 1) * dataset.block_bytes)

    @property
    def samples_in_epoch(self) -> int:
        """Samples before its next pass begins."""
        return self.shuffle.num_runs * self.shuffle.run_samples

    def working_set_blocks(self, num_lanes: int) -> int:
        """Blocks that so many lanes mix at a time."""
        num_blocks = self.dataset.num_tokens("train") // self.dataset.manifest.block_tokens + 1
        return num_blocks if self.is_whole else min(num_blocks, num_lanes * self.shuffle.window_runs * self.run_blocks)


class SampleOrder:
    """The samples of a stream, in order.

    Attributes:
        spec: what the order is a function of, besides the datasets.
        num_lanes: contiguous shares of the global batch that read for themselves.
        sources: of the mixtures.
    """

    def __init__(self, datasets: Mapping[str, Dataset], spec: StreamSpec) -> None:
        """Check that the datasets can serve the mixtures.

        Args:
            datasets: by source.
            spec: what the order is a function of.

        Raises:
            DataError: a source of a mixture is missing, shorter than one sample, or would be repeated too often.
            ValueError: a mixture is impossible.
        """
        self.spec = spec
        self.num_lanes = num_lanes_of(spec.global_batch, spec.shuffle.lanes)
        self._schedule = MixtureSchedule(
            spec.mixtures, seed=spec.seed, num_lanes=self.num_lanes, global_batch=spec.global_batch
        )
        self.sources: list[Source] = []
        for name in self._schedule.names:
            if name not in datasets:
                raise DataError(f"the mixture names source '{name}'; there is: {', '.join(sorted(datasets))}.")
            self.sources.append(Source(name, datasets[name], spec, self.num_lanes))
        self._check_epochs()

    def samples_in_epoch(self, source: str) -> int:
        """Samples of a source before its next pass begins."""
        return self.sources[self._schedule.names.index(source)].samples_in_epoch

    def sample_ids(self, step: int) -> Indices:
        """Global ids of the samples of a step, in order, shape (global_batch,)."""
        first = step * self.spec.global_batch
        return np.arange(first, first + self.spec.global_batch, dtype=np.int64)

    def samples(self, ids: Indices) -> list[Sample]:
        """Source, epoch and place of global sample ids."""
        sources, epochs, first_tokens = self.locate(ids)
        places = zip(ids.tolist(), sources.tolist(), epochs.tolist(), first_tokens.tolist(), strict=True)
        return [Sample(number, self._schedule.names[source], epoch, first) for number, source, epoch, first in places]

    def blocks(self, step: int) -> list[tuple[str, int]]:
        """Blocks that a step reads something of, as (source, number)."""
        sources, _, first_tokens = self.locate(self.sample_ids(step))
        return [(self.sources[source].name, block) for _, source, block in self.blocks_of(sources, first_tokens)]

    def first_step_with(self, stretches: Mapping[str, Sequence[tuple[int, int]]], steps: range) -> int | None:
        """The first of some steps that shows a token of stretches [first, after) of sources; None: none does."""
        length = self.spec.sequence_length + 1
        for at, sources, first_tokens in self.located(steps):
            shown = np.zeros(len(at), bool)
            for number, source in enumerate(self.sources):
                for first, after in stretches.get(source.name, ()):
                    shown |= (sources == number) & (first_tokens < after) & (first_tokens + length > first)
            if shown.any():
                return int(at[shown.argmax()])
        return None

    def located(self, steps: range) -> Iterator[tuple[Indices, Indices, Indices]]:
        """Step, source (its place in `sources`) and first token of all samples of steps, some of them at a time."""
        rows = self.spec.global_batch
        at_once = max(1, SEARCHED_SAMPLES // rows)
        for start in range(steps.start, steps.stop, at_once):
            ids = np.arange(start * rows, min(start + at_once, steps.stop) * rows, dtype=np.int64)
            sources, _, first_tokens = self.locate(ids)
            yield ids // rows, sources, first_tokens

    def lanes_of(self, num_rows: int) -> int:
        """Lanes that a rank with so many rows of each step reads for, at most."""
        return min(self.num_lanes, -(-num_rows * self.num_lanes // self.spec.global_batch) + 1)

    def locate(self, ids: Indices) -> tuple[Indices, Indices, Indices]:
        """Source (its place in `sources`), epoch and first token of each global sample id."""
        sources, lanes, counts = self._schedule.locate(ids)
        epochs, first_tokens = np.empty_like(counts), np.empty_like(counts)
        for number in distinct(sources).tolist():
            source, chosen = self.sources[number], sources == number
            epochs[chosen], runs, inside = source.shuffle.locate(lanes[chosen], counts[chosen])
            first_tokens[chosen] = runs * source.run_tokens + inside * self.spec.sequence_length
        return sources, epochs, first_tokens

    def blocks_of(self, sources: Indices, first_tokens: Indices) -> list[tuple[int, int, int]]:
        """Blocks these samples need, each once, in order of first need: the sample that needs it, source and number."""
        sizes = np.array([source.dataset.manifest.block_tokens for source in self.sources])[sources]
        firsts = first_tokens // sizes
        counts = (first_tokens + self.spec.sequence_length - 1) // sizes - firsts + 1
        samples = np.repeat(np.arange(len(sources)), counts)
        blocks = firsts[samples] + np.arange(len(samples)) - (np.cumsum(counts) - counts)[samples]
        owners = sources[samples]
        order = np.lexsort((blocks, owners))
        fresh = np.ones(len(order), bool)
        fresh[1:] = (np.diff(blocks[order]) != 0) | (np.diff(owners[order]) != 0)
        # Sorting is stable, so these are the first of their kind.
        chosen = np.sort(order[fresh])
        return list(zip(samples[chosen].tolist(), owners[chosen].tolist(), blocks[chosen].tolist(), strict=True))

    def _check_epochs(self) -> None:
        taken = self._schedule.samples_before(self.spec.num_steps)
        for source in self.sources:
            most = self.spec.max_epochs.get(source.name)
            epochs = taken[source.name] / source.samples_in_epoch
            if most is not None and epochs > most:
                raise DataError(
                    f"source '{source.name}' would be seen {epochs:.2f} times, and max_epochs={most:g} allows fewer. "
                    "Train on fewer tokens, give it a smaller weight or raise its max_epochs."
                )
