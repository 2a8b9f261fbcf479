"""Rows of one data rank, step after step; their blocks are asked for ahead of need, together with their neighbours."""

from __future__ import annotations

import numpy as np

from data.cache import Tokens
from data.index import GROUP_BLOCKS
from data.order import Indices, distinct
from data.samples import SampleOrder

PLANNED_SAMPLES = 4096
"""Places are worked out for about so many samples at once, which makes the arithmetic cheap."""

Place = tuple[int, int]
"""A source, and the number of a block or of a group of blocks in it."""


class RowReader:
    """Rows [first_row, first_row + num_rows) of steps that follow one another; for use by one thread."""

    def __init__(self, order: SampleOrder, first_step: int, first_row: int, num_rows: int) -> None:
        """Work out the first step; reads nothing yet.

        Args:
            order: of the samples.
            first_step: that rows are asked for.
            first_row: in the global batch.
            num_rows: of a step.
        """
        self._order = order
        self._first_row, self._num_rows = first_row, num_rows
        self._first_step = self._step = first_step
        # Of the steps from `_start` on that were worked out: block and first token in it, shape (steps, rows), and
        # the blocks that no step before needs.
        self._start = first_step
        self._blocks = self._starts = np.empty((0, num_rows), np.int64)
        self._needed: list[list[Place]] = []
        # Blocks of the steps that were worked out last.
        self._latest: set[Place] = set()
        # Blocks that lie together and were not asked for yet, by source and group: block -> first step that needs it.
        self._groups: dict[Place, dict[int, int]] = {}
        # The first step of which not all blocks were asked for.
        self._asked = first_step
        # For each block that was asked for before it is needed, the step that needs it.
        self._ahead: list[int] = []
        # Tokens of the blocks that were read from, by their number in `_blocks`.
        self._held: dict[int, memoryview] = {}
        self._most_held = 0
        for source in order.sources:
            # A window is read from while the next is read ahead; a quarter more for lanes that begin theirs apart.
            num_blocks = source.working_set_blocks(order.lanes_of(num_rows)) * 5 // 4
            self._most_held += num_blocks
            ahead = order.spec.shuffle.readahead_blocks + GROUP_BLOCKS
            source.dataset.keep((num_blocks + ahead) * source.dataset.block_bytes)
        self._work_out(num_steps=1)

    def goes_on(self, step: int, first_row: int, num_rows: int) -> bool:
        """Whether these rows come next, or are the same again."""
        return (first_row, num_rows) == (self._first_row, self._num_rows) and 0 <= step - self._step <= 1

    def rows(self, step: int) -> Tokens:
        """Tokens of the rows of a step, shape (num_rows, sequence_length + 1).

        The first step is read alone, because somebody waits for it; from the next on it is read ahead.

        Args:
            step: one that `goes_on`.

        Raises:
            DataError: a shard is missing or damaged.
        """
        if step == self._first_step:
            self._begin()
        else:
            self.read_ahead(step)
        place = step - self._start
        return _gathered(self._order, self._blocks[place], self._starts[place], self._held)

    def read_ahead(self, step: int) -> None:
        """Ask for the blocks of a step, and of later ones within the budget."""
        self._step = step
        if len(self._held) > self._most_held:
            used = set(distinct(self._blocks[step - self._start :].reshape(-1)).tolist())
            self._held = {block: tokens for block, tokens in self._held.items() if block in used}
        self._ahead = [first for first in self._ahead if first > step]
        steps_at_once = max(1, PLANNED_SAMPLES // self._num_rows)
        while True:
            end = self._start + len(self._needed)
            # Not the last ones that are worked out: what lies beside their blocks may be needed soon after.
            while self._asked < end and (self._asked <= step or self._asked < end - steps_at_once // 4):
                for source, block in self._needed[self._asked - self._start]:
                    if not self._ask(source, block):
                        return
                self._asked += 1
            if end - step > steps_at_once:
                return
            self._work_out(steps_at_once)

    def _begin(self) -> None:
        """Read the blocks of the first step."""
        datasets = [source.dataset for source in self._order.sources]
        blocks: list[list[int]] = [[] for _ in datasets]
        for source, block in sorted(self._needed[0]):
            blocks[source].append(block)
        for dataset, numbers in zip(datasets, blocks, strict=True):
            dataset.expect("train", numbers)
        for dataset, numbers in zip(datasets, blocks, strict=True):
            dataset.fetch("train", numbers)

    def _ask(self, source: int, block: int) -> bool:
        """Ask for a block and those of its group, unless that was done; False: there is no room for it yet."""
        group = self._groups.get((source, block // GROUP_BLOCKS), {})
        if block in group:
            if self._asked > self._step and len(self._ahead) >= self._order.spec.shuffle.readahead_blocks:
                return False
            self._ahead += [first for first in group.values() if first > self._step]
            self._order.sources[source].dataset.expect("train", sorted(group))
            group.clear()
        return True

    def _work_out(self, num_steps: int) -> None:
        """Add the places of further steps; forget those of steps that passed."""
        order, rows = self._order, self._num_rows
        first = self._start + len(self._needed)
        steps = np.arange(first, first + num_steps, dtype=np.int64)
        ids = steps[:, None] * order.spec.global_batch + np.arange(self._first_row, self._first_row + rows)
        sources, _, first_tokens = order.locate(ids.reshape(-1))
        blocks, starts = _places(order, sources, first_tokens)
        passed, self._start = self._step - self._start, self._step
        self._blocks = np.concatenate([self._blocks[passed:], blocks.reshape(ids.shape)])
        self._starts = np.concatenate([self._starts[passed:], starts.reshape(ids.shape)])
        self._needed = self._needed[passed:] + [[] for _ in steps]
        self._groups = {place: group for place, group in self._groups.items() if group}
        before, self._latest = self._latest, set()
        for sample, source, block in order.blocks_of(sources, first_tokens):
            self._latest.add((source, block))
            if (source, block) not in before:
                step = first + sample // rows
                self._needed[step - self._start].append((source, block))
                self._groups.setdefault((source, block // GROUP_BLOCKS), {}).setdefault(block, step)


def rows_of(order: SampleOrder, ids: Indices) -> Tokens:
    """Tokens of samples by their global ids, shape (N, sequence_length + 1).

    Raises:
        DataError: a shard is missing or damaged.
    """
    sources, _, first_tokens = order.locate(ids)
    return _gathered(order, *_places(order, sources, first_tokens), {})


def _places(order: SampleOrder, sources: Indices, first_tokens: Indices) -> tuple[Indices, Indices]:
    """Block of each sample, with its source in one number, and the sample's first token in the block."""
    sizes = np.array([source.dataset.manifest.block_tokens for source in order.sources])
    blocks, starts = np.divmod(first_tokens, sizes[sources])
    return blocks * len(sizes) + sources, starts


def _gathered(order: SampleOrder, blocks: Indices, starts: Indices, held: dict[int, memoryview]) -> Tokens:
    """Tokens of samples at such places, shape (N, sequence_length + 1); `held` gets the blocks they are in."""
    length = order.spec.sequence_length + 1
    places = list(zip(blocks.tolist(), starts.tolist(), strict=True))
    for key, _ in places:
        if key not in held:
            block, source = divmod(key, len(order.sources))
            held[key] = memoryview(order.sources[source].dataset.block("train", block))
    windows = [held[key][start : start + length] for key, start in places]
    # One copy of all rows, which costs half of what assigning them one by one does.
    content = b"".join(windows)
    if len(content) < len(places) * length * windows[0].itemsize:
        # Some windows go on in other blocks.
        for row, (key, start) in enumerate(places):
            block, source = divmod(key, len(order.sources))
            dataset = order.sources[source].dataset
            first_token = block * dataset.manifest.block_tokens + start
            windows[row] = memoryview(dataset.tokens("train", first_token, length))
        content = b"".join(windows)
    rows: Tokens = np.frombuffer(content, f"u{windows[0].itemsize}")
    return rows.reshape(-1, length)
