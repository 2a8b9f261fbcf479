"""Fresh random weights, as a source that any box can be read from.

A value depends on the seed, the tensor's name and its place in the tensor, and on nothing else: every layout starts
from the same weights.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from conf.errors import CheckpointError
from conf.schema import ModelConfig
from parallel.weight_names import logical_shapes

ROWS_PER_BLOCK = 64
BACK_INTO_RESIDUAL = (".o_proj.weight", ".down_proj.weight", ".w2.weight")


class InitialWeights:
    """Normal weights of `init_std`, divided by sqrt(2 x layers) where they project into the residual stream; norms 1.

    Implements `TensorSource`.
    """

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.model = model
        self.seed = seed
        self.shapes = logical_shapes(model)

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """See `TensorSource.read`."""
        whole = self.shapes.get(name)
        if whole is None:
            raise CheckpointError(f"{name}: the model {self.model.name} has no such weight")
        if len(offset) != len(whole) or any(
            start < 0 or start + size > all_ for start, size, all_ in zip(offset, shape, whole, strict=True)
        ):
            raise CheckpointError(
                f"{name}: the box at {offset} of shape {shape} is outside the tensor of shape {whole}"
            )
        if len(whole) == 1:
            return torch.ones(shape)
        rows = self._rows(name, offset[0], offset[0] + shape[0], whole[1])
        return torch.from_numpy(np.ascontiguousarray(rows[:, offset[1] : offset[1] + shape[1]]) * self._std(name))

    def _std(self, name: str) -> np.float32:
        narrowed = name.endswith(BACK_INTO_RESIDUAL)
        return np.float32(self.model.init_std / math.sqrt(2 * self.model.num_layers if narrowed else 1))

    def _rows(self, name: str, start: int, stop: int, num_columns: int) -> npt.NDArray[np.float32]:
        # Blocks of rows have a generator each, so that a slice does not cost the whole tensor.
        first, last = start // ROWS_PER_BLOCK, -(-stop // ROWS_PER_BLOCK)
        blocks = [self._block(name, block, num_columns) for block in range(first, last)]
        return np.concatenate(blocks)[start - first * ROWS_PER_BLOCK : stop - first * ROWS_PER_BLOCK]

    def _block(self, name: str, block: int, num_columns: int) -> npt.NDArray[np.float32]:
        key = hashlib.blake2b(f"{self.seed}/{name}/{block}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        return generator.standard_normal((ROWS_PER_BLOCK, num_columns), dtype=np.float32)
