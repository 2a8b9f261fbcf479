"""Causal attention on torch's fused kernels, within documents where rows hold several, exact under context parallelism.

Shape suffixes: S tokens of this context rank, T tokens of the whole sequence, B rows, H query heads, G key-value heads,
D head dim.

Context ranks hold the sequence in zigzag order: it is cut into 2 x context chunks and rank r holds chunks r and
2 x context - 1 - r, so that every rank attends to the same number of keys.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from parallel.attention_kernel import HALF, TORCH_DECIDES, Kernel, attention_kernel
from parallel.documents import Documents


class CausalAttention(torch.nn.Module):
    """Megatron's core attention. Its own materialises the S x S scores and refuses context parallelism."""

    def __init__(self, config: Any, *, pg_collection: Any, softmax_scale: float | None = None, **_: object) -> None:
        """Build from Megatron's spec.

        Args:
            config: the TransformerConfig; dropout must be 0.
            pg_collection: Megatron's groups, of which the context group is used.
            softmax_scale: default 1/sqrt(head dim).
            _: what Megatron passes to every core attention (layer number, mask type), fixed here.
        """
        super().__init__()
        assert config.attention_dropout == 0.0, "nothing in a step draws random numbers"
        self.group: dist.ProcessGroup = pg_collection.cp
        self.kernel = attention_kernel()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query_SBHD: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: Documents | None = None,
        **_: object,
    ) -> Tensor:
        """Attention of this rank's queries to all earlier tokens of their documents, shape (S, B, H x D)."""
        assert attention_mask is None, "the mask is causal"
        is_split = self.group.size() > 1
        key_TBGD, value_TBGD = self._whole_rows(key_SBGD, value_SBGD) if is_split else (key_SBGD, value_SBGD)
        if packed_seq_params is not None:
            return attend_in_documents(query_SBHD, key_TBGD, value_TBGD, packed_seq_params, self.scale, self.kernel)
        query_BHSD, key_BGTD, value_BGTD = (tensor.permute(1, 2, 0, 3) for tensor in (query_SBHD, key_TBGD, value_TBGD))
        if is_split:
            output_BHSD = self._attend_by_chunks(query_BHSD, key_BGTD, value_BGTD)
        else:
            output_BHSD = attend_causally(query_BHSD, key_BGTD, value_BGTD, self.scale, self.kernel)
        return output_BHSD.permute(2, 0, 1, 3).flatten(2)

    def _whole_rows(self, key_SBGD: Tensor, value_SBGD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all context ranks, in the order of the sequence."""
        key_value = all_gather(torch.cat((key_SBGD, value_SBGD), dim=-1), self.group)
        chunks = key_value.chunk(2 * self.group.size())
        key_value = torch.cat([chunks[place] for place in places_of_chunks(self.group.size())])
        key_TBGD, value_TBGD = key_value.chunk(2, dim=-1)
        return key_TBGD, value_TBGD

    def _attend_by_chunks(self, query_BHSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor) -> Tensor:
        length = query_BHSD.size(2) // 2
        outputs = [
            attend_causally(query, key_BGTD[:, :, :end], value_BGTD[:, :, :end], self.scale, self.kernel)
            for query, end in zip(
                query_BHSD.chunk(2, dim=2),
                [(chunk + 1) * length for chunk in chunks_of_rank(self.group.rank(), self.group.size())],
                strict=True,
            )
        ]
        return torch.cat(outputs, dim=2)


def chunks_of_rank(rank: int, size: int) -> tuple[int, int]:
    """Which of the 2 x size chunks of the sequence a context rank holds.

    >>> [chunks_of_rank(rank, 2) for rank in range(2)]
    [(0, 3), (1, 2)]
    """
    return rank, 2 * size - 1 - rank


def places_of_chunks(size: int) -> list[int]:
    """Where each chunk, in the order of the sequence, lies among the chunks of all context ranks in rank order.

    >>> places_of_chunks(2)
    [0, 2, 3, 1]
    """
    held = [chunk for rank in range(size) for chunk in chunks_of_rank(rank, size)]
    return [held.index(chunk) for chunk in range(2 * size)]


def attend_causally(
    query_BHSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, scale: float, kernel: Kernel = TORCH_DECIDES
) -> Tensor:
    """Attention of S queries, the last of T tokens, to the keys that are not after them; query heads share keys."""
    groups = query_BHSD.size(1) // key_BGTD.size(1)
    if groups > 1 and query_BHSD.is_cuda and query_BHSD.dtype not in HALF:
        # The one fused kernel that takes other precisions has no shared heads; torch would write out all scores.
        key_BGTD, value_BGTD = (tensor.repeat_interleave(groups, dim=1) for tensor in (key_BGTD, value_BGTD))
    same_length = query_BHSD.size(2) == key_BGTD.size(2)
    mask = None if same_length else causal_lower_right(query_BHSD.size(2), key_BGTD.size(2))
    with _by(kernel):
        return scaled_dot_product_attention(
            query_BHSD,
            key_BGTD,
            value_BGTD,
            attn_mask=mask,
            is_causal=same_length,
            scale=scale,
            enable_gqa=query_BHSD.size(1) != key_BGTD.size(1),
        )


def attend_in_documents(
    query_SBHD: Tensor, key_TBGD: Tensor, value_TBGD: Tensor, documents: Documents, scale: float, kernel: Kernel
) -> Tensor:
    """Attention of each query to the keys of its document that are not after it, shape (S, B, H x D).

    Both ways are exact and compute no score between documents.
    """
    if kernel.takes_lengths(query_SBHD.dtype, query_SBHD.size(3)):
        return attend_by_lengths(query_SBHD, key_TBGD, value_TBGD, documents, scale)
    return cast(Tensor, attend_one_by_one(query_SBHD, key_TBGD, value_TBGD, documents, scale, kernel))


def attend_by_lengths(
    query_SBHD: Tensor, key_TBGD: Tensor, value_TBGD: Tensor, documents: Documents, scale: float
) -> Tensor:
    """All documents in one kernel, which is told where they begin; half precision on a GPU."""
    num_chunks = len(documents.spans)
    # A chunk's rows one after another: the kernel aligns the last query of a document with its last key.
    query = query_SBHD.reshape(num_chunks, -1, *query_SBHD.shape[1:]).transpose(1, 2).flatten(0, 2)
    key, value = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (key_TBGD, value_TBGD))
    if documents.key_places is not None:
        key, value = (tensor.index_select(0, documents.key_places) for tensor in (key, value))
    output = varlen_attn(
        query,
        key.contiguous(),
        value.contiguous(),
        documents.query_bounds,
        documents.key_bounds,
        documents.most_queries,
        documents.most_keys,
        scale=scale,
        window_size=(-1, 0),  # causal
        enable_gqa=query.size(1) != key.size(1),
    )
    assert isinstance(output, Tensor)
    by_row = output.reshape(num_chunks, query_SBHD.size(1), -1, output.size(1) * output.size(2))
    return by_row.transpose(1, 2).flatten(0, 1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_one_by_one(
    query_SBHD: Tensor, key_TBGD: Tensor, value_TBGD: Tensor, documents: Documents, scale: float, kernel: Kernel
) -> Tensor:
    """A document after the other; any device and precision. Compiled layers are interrupted here."""
    keys, values = key_TBGD.unbind(1), value_TBGD.unbind(1)
    chunks = []
    for query_CBHD, spans in zip(query_SBHD.chunk(len(documents.spans)), documents.spans, strict=True):
        rows = []
        for query, key, value, span in zip(query_CBHD.unbind(1), keys, values, spans, strict=True):
            # Split and not sliced one after the other: going back, a slice is a tensor as large as the whole row.
            parts = zip(
                torch.split(query, span.query_lengths),
                torch.split(key[span.keys], span.key_lengths),
                torch.split(value[span.keys], span.key_lengths),
                strict=True,
            )
            rows.append(torch.cat([_attend_one(*part, scale, kernel) for part in parts]))
        chunks.append(torch.stack(rows, dim=1))
    return torch.cat(chunks).flatten(2)


def _attend_one(query_SHD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float, kernel: Kernel) -> Tensor:
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query_SHD, key_TGD, value_TGD))
    return attend_causally(query, key, value, scale, kernel).squeeze(0).transpose(0, 1)


def _by(kernel: Kernel) -> AbstractContextManager[None]:
    return sdpa_kernel(list(kernel.order), set_priority=True) if kernel.order else nullcontext()


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenation of the ranks' tensors along dim 0; differentiable."""
    return cast(Tensor, _AllGather.apply(tensor, group))  # type: ignore[no-untyped-call]


class _AllGather(torch.autograd.Function):
    """Concatenate the ranks' tensors along dim 0; the gradient is the sum over ranks of this rank's part."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty((group.size() * tensor.size(0), *tensor.shape[1:]))
        dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        part = gradient.new_empty((gradient.size(0) // ctx.group.size(), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(part, gradient.contiguous(), group=ctx.group)
        return part, None
