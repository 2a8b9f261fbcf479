"""Where documents begin in the rows of a micro-batch, as the layers of a context rank need to know it.

Shape suffixes: B rows, S tokens of this context rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.batch import positions_in_documents


@dataclass(frozen=True, slots=True)
class Span:
    """A chunk of a row: the documents in it, and the keys they attend to.

    Attributes:
        first_key: place in the row of the first key; the last key is that of the chunk's last token.
        query_lengths: tokens of each document that are in the chunk.
        key_lengths: keys of each document; more than queries where the document began before the chunk.
    """

    first_key: int
    query_lengths: list[int]
    key_lengths: list[int]

    @property
    def keys(self) -> slice:
        """The keys, in the row."""
        return slice(self.first_key, self.first_key + sum(self.key_lengths))


class Documents:
    """Documents of a micro-batch on one context rank; Megatron hands it to every layer as `packed_seq_params`.

    Attributes:
        position_ids_SB: positions of this rank's tokens, on the device.
        row_length: tokens of a whole row.
        spans: of each chunk of the row that this rank holds, for each row.
        query_bounds: where the queries of each document begin, and the end, counted over chunks and in them over rows;
            int32, shape (documents + 1,), on the device.
        key_bounds: the same of keys.
        key_places: which keys, of all rows one after another, the documents have; None: each of them, in order.
        most_queries: of a document.
        most_keys: of a document.
    """

    # A class without declared fields of its own on purpose: a compiled layer would take a dataclass apart and be
    # compiled anew for every number in it.
    qkv_format: ClassVar[str] = "sbhd"  # Megatron asks: tensors keep their rows

    def __init__(self, position_ids_BS: npt.NDArray[np.int64], chunks: Sequence[int], num_chunks: int) -> None:
        """Find the documents.

        Args:
            position_ids_BS: positions of whole rows, see `Batch`.
            chunks: those of the row that this rank holds, in the order it holds them.
            num_chunks: equal parts the row is cut into.

        Raises:
            ValueError: a position is neither 0 nor one more than the one before it.
        """
        starts_BS = position_ids_BS == 0
        if not (position_ids_BS == positions_in_documents(starts_BS)).all():
            raise ValueError("positions of a row go 0, 1, 2 ... and begin at 0 again where another document begins")
        num_rows, self.row_length = position_ids_BS.shape
        length = self.row_length // num_chunks
        bounds = [np.flatnonzero(starts) for starts in starts_BS]
        self.spans = [[_span(row, chunk * length, (chunk + 1) * length) for row in bounds] for chunk in chunks]
        held = [position_ids_BS[:, chunk * length : (chunk + 1) * length] for chunk in chunks]
        self.position_ids_SB = torch.from_numpy(np.ascontiguousarray(np.concatenate(held, axis=1).T))
        queries = [count for span in self._all_spans() for count in span.query_lengths]
        keys = [count for span in self._all_spans() for count in span.key_lengths]
        self.most_queries, self.most_keys = max(queries), max(keys)
        self.query_bounds, self.key_bounds = _cumulative(queries), _cumulative(keys)
        self.key_places: Tensor | None = None
        if num_chunks > 1:
            places = np.arange(num_rows * self.row_length).reshape(num_rows, self.row_length)
            needed = [row[span.keys] for spans in self.spans for row, span in zip(places, spans, strict=True)]
            self.key_places = torch.from_numpy(np.concatenate(needed))

    def _all_spans(self) -> Iterator[Span]:
        return chain.from_iterable(self.spans)

    def to(self, device: torch.device) -> Documents:
        """Itself, its tensors on the device."""
        for name in ("position_ids_SB", "query_bounds", "key_bounds", "key_places"):
            tensor = getattr(self, name)
            if tensor is not None and device.type == "cuda":
                setattr(self, name, tensor.pin_memory().to(device, non_blocking=True))
        return self


def _span(starts: npt.NDArray[np.int64], first: int, end: int) -> Span:
    """The part [first, end) of a row whose documents begin at `starts`."""
    here = int(np.searchsorted(starts, first, side="right")) - 1
    inner = starts[here + 1 : int(np.searchsorted(starts, end))]
    queries, keys = (np.diff([begin, *inner, end]).tolist() for begin in (first, starts[here]))
    return Span(int(starts[here]), queries, keys)


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
