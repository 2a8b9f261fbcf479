"""The batches of a training stage. Its only state is one integer that the caller keeps: samples consumed.

Which samples a step has is arithmetic (`samples.py`), so is every data rank's share of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from conf.errors import UserError
from conf.schema import RunConfig, TrainingConfig
from data.batch import Batch, positions_in_documents
from data.cache import Tokens
from data.index import GROUP_BLOCKS
from data.order import Indices, key_of
from data.samples import SampleOrder, StreamSpec
from data.shards import Dataset

PLANNED_SAMPLES = 4096
"""Places are worked out for about so many samples at once, which makes the arithmetic cheap."""

Place = tuple[int, int]
"""A source, and the number of a block or of a group of blocks in it."""


@dataclass(slots=True)
class _Plan:
    """Places of the samples of some steps, rows of one data rank: arrays of shape (steps, rows)."""

    first_step: int
    sources: Indices
    first_tokens: Indices
    needed: list[list[Place]]
    """For each step the blocks that no step of the plan before it needs."""
    is_first: bool
    """Whether nothing was read before it."""
    groups: dict[Place, dict[int, int]]
    """Blocks that lie together and were not asked for yet, by source and group: block -> first step that needs it."""
    asked: int = 0
    """Steps of the plan from the first, all blocks of which were asked for."""
    ahead: list[int] = field(default_factory=list)
    """For each block that was asked for before it was needed, the step that needs it."""
    held: dict[Place, memoryview] = field(default_factory=dict)
    """Tokens of the blocks that steps of the plan have read from."""


class Stream(SampleOrder):
    """Batches by step: pure functions of the specification and the datasets, whatever was read before."""

    def __init__(self, datasets: Mapping[str, Dataset], spec: StreamSpec) -> None:
        """See `SampleOrder`; reads nothing yet."""
        super().__init__(datasets, spec)
        manifests = [source.dataset.manifest for source in self._sources]
        facts = {(manifest.end_of_text_id, manifest.token_type.bit_width) for manifest in manifests}
        assert len(facts) == 1, "the sources of a run share a tokenizer, and so the type of tokens"
        ((self._end_of_text_id, token_bits),) = facts
        self._token_type = np.dtype(f"u{token_bits // 8}")
        self._plan: tuple[tuple[int, int], _Plan] | None = None

    def batches(self, step: int, data_rank: int, data_size: int) -> list[Batch]:
        """The micro-batches of a data rank. Those of ranks 0, 1, 2, ... one after another are the global batch.

        Raises:
            DataError: a shard is missing or damaged.
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
        first = data_rank * share
        ids = step * rows + np.arange(first, first + share, dtype=np.int64)
        windows = self.rows(step, first, share)
        return [self._batch(windows[row : row + micro], ids[row : row + micro]) for row in range(0, share, micro)]

    def rows(self, step: int, first_row: int, num_rows: int) -> Tokens:
        """Tokens of some rows of a step as they are stored, shape (num_rows, sequence_length + 1); reads ahead.

        Raises:
            DataError: a shard is missing or damaged.
        """
        plan = self._planned(step, first_row, num_rows)
        place = step - plan.first_step
        if plan.is_first and not place:
            self._begin(plan)
        self._read_ahead(plan, place)
        return self._gathered(plan.sources[place], plan.first_tokens[place], plan.held)

    def windows(self, ids: Indices) -> npt.NDArray[np.int64]:
        """Tokens of samples, shape (N, sequence_length + 1).

        Raises:
            DataError: a shard is missing or damaged.
        """
        sources, _, first_tokens = self._locate(ids)
        return self._gathered(sources, first_tokens, {}).astype(np.int64)

    def documents(self, step: int) -> dict[int, list[str]]:
        """Names of the documents each sample of a step shows, by sample id."""
        length = self.spec.sequence_length + 1
        by_name = {source.name: source.dataset for source in self._sources}
        return {
            sample.id: by_name[sample.source].document_ids("train", sample.first_token, length)
            for sample in self.samples(self.sample_ids(step))
        }

    def counters(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """What was read so far: of storage, and of each tier by name."""
        readers = [source.dataset.reader for source in self._sources]
        counters = [source.dataset.store.counters for source in self._sources]
        storage: dict[str, float] = {
            "requests": sum(each.requests for each in counters),
            "bytes": sum(each.bytes_read for each in counters),
            "retries": sum(each.retries for each in counters),
            "damaged": sum(reader.num_damaged for reader in readers),
        }
        # All sources share the tiers.
        tiers = {tier.name: tier.counters.as_dict() for tier in readers[0].tiers}
        return storage, tiers

    def _planned(self, step: int, first_row: int, num_rows: int) -> _Plan:
        """The plan that a step is in."""
        steps = max(1, PLANNED_SAMPLES // num_rows)
        key = (first_row, num_rows)
        if self._plan is not None and self._plan[0] == key:
            plan = self._plan[1]
            if plan.first_step <= step < plan.first_step + len(plan.sources):
                return plan
        first = np.arange(step, step + steps, dtype=np.int64)[:, None] * self.spec.global_batch
        ids = first + np.arange(first_row, first_row + num_rows, dtype=np.int64)
        sources, _, first_tokens = self._locate(ids.reshape(-1))
        sources, first_tokens = sources.reshape(steps, num_rows), first_tokens.reshape(steps, num_rows)
        needed: list[list[Place]] = [[] for _ in range(steps)]
        groups: dict[Place, dict[int, int]] = {}
        for sample, source, block in self._blocks_of(sources.reshape(-1), first_tokens.reshape(-1)):
            place = sample // num_rows
            needed[place].append((source, block))
            groups.setdefault((source, block // GROUP_BLOCKS), {})[block] = place
        plan = _Plan(step, sources, first_tokens, needed, self._plan is None, groups)
        for each in self._sources:
            ahead = (self.spec.shuffle.readahead_blocks + GROUP_BLOCKS) * each.dataset.block_bytes
            # A window is read from while the next is read ahead; a quarter more for lanes that begin theirs apart.
            each.dataset.keep(self.working_set_bytes(num_rows) * 5 // 4 + ahead)
        self._plan = (key, plan)
        return plan

    def _begin(self, plan: _Plan) -> None:
        """Read what the very first step waits for, before all else and without its neighbours."""
        blocks: list[list[int]] = [[] for _ in self._sources]
        for number, block in sorted(plan.needed[0]):
            plan.groups[number, block // GROUP_BLOCKS].pop(block, None)
            blocks[number].append(block)
        for source, numbers in zip(self._sources, blocks, strict=True):
            source.dataset.expect("train", numbers)
        for source, numbers in zip(self._sources, blocks, strict=True):
            source.dataset.fetch("train", numbers)

    def _read_ahead(self, plan: _Plan, place: int) -> None:
        """Ask for the blocks of this step, and of later ones within the budget, together with their neighbours."""
        plan.ahead[:] = [first for first in plan.ahead if first > place]
        for step in range(max(place, plan.asked), len(plan.needed)):
            for source, block in plan.needed[step]:
                group = plan.groups[source, block // GROUP_BLOCKS]
                if block not in group:
                    continue
                if step > place and len(plan.ahead) >= self.spec.shuffle.readahead_blocks:
                    plan.asked = step
                    return
                plan.ahead.extend(first for first in group.values() if first > place)
                self._sources[source].dataset.expect("train", sorted(group))
                group.clear()
        plan.asked = len(plan.needed)

    def _gathered(self, sources: Indices, first_tokens: Indices, held: dict[Place, memoryview]) -> Tokens:
        """Tokens of samples, shape (N, sequence_length + 1); `held` gets the blocks they are in."""
        length = self.spec.sequence_length + 1
        datasets = [source.dataset for source in self._sources]
        sizes = [dataset.manifest.block_tokens for dataset in datasets]
        windows = []
        for number, first in zip(sources.tolist(), first_tokens.tolist(), strict=True):
            block, start = divmod(first, sizes[number])
            if start + length - 1 > sizes[number]:
                windows.append(memoryview(datasets[number].tokens("train", first, length)))
                continue
            tokens = held.get((number, block))
            if tokens is None:
                tokens = held[number, block] = memoryview(datasets[number].block("train", block))
            windows.append(tokens[start : start + length])
        # One copy of all rows, which costs half of what assigning them one by one does.
        rows: Tokens = np.frombuffer(b"".join(windows), self._token_type)
        return rows.reshape(-1, length)

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
