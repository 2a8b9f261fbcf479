"""AdamW whose masters and moments are in a file on a local disk, a slice of them in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.adam import MOMENTS
from parallel.scratch_file import ScratchFile
from parallel.zero import GuardedAdam


class DiskAdam(GuardedAdam):
    """Computes what `GuardedAdam` computes, to the last bit.

    A flat parameter of DeepSpeed's gives up its values: from `make_state_of` on it is a host buffer in the model's
    precision, which a step fills with the updated values, and from which DeepSpeed copies them to the model.

    Args:
        groups: as for AdamW, all of whose options can follow.
        directory: of a local disk.
        dtype: the model's precision.
    """

    mains_apart = True

    def __init__(self, groups: Any, *, directory: Path, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(groups, **options)
        self._directory = directory
        self._dtype = dtype
        self._files: dict[Tensor, ScratchFile] = {}

    def make_state_of(self, flat: Tensor) -> None:
        """Move a flat parameter to a file, with its state as after no steps."""
        file = ScratchFile(self._directory, count=1 + len(MOMENTS), num_elements=flat.numel())
        main = file.tensors[0]
        with torch.no_grad():
            for start, stop in file.walk():
                main[start:stop].copy_(flat[start:stop])
        self._files[flat] = file
        moments = dict(zip(MOMENTS, file.tensors[1:], strict=True))
        self.state[flat] = {"step": torch.zeros((), dtype=torch.float32), **moments}
        flat.data = torch.empty(flat.shape, dtype=self._dtype, pin_memory=torch.cuda.is_available())

    def main_of(self, flat: Tensor) -> Tensor:
        """The float32 values of a flat parameter."""
        return self._files[flat].tensors[0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """As `GuardedAdam.step`, slice by slice."""
        assert closure is None
        if self.called_off:
            return
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._update(flat, group)

    def _update(self, flat: Tensor, group: dict[str, Any]) -> None:
        state = self.state[flat]
        state["step"] += 1
        gradients = flat.grad
        assert gradients is not None
        tensors = (self.main_of(flat), *(state[moment] for moment in MOMENTS))
        beta1, beta2 = group["betas"]
        for start, stop in self._files[flat].walk():
            main, mean, square = (tensor[start:stop] for tensor in tensors)
            gradient = gradients[start:stop].mul_(self.gradient_scale)
            torch._fused_adamw_(
                [main],
                [gradient],
                [mean],
                [square],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            flat[start:stop].copy_(main)
