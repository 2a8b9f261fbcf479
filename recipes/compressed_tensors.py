"""INT8 and FP8 models in the layout of compressed-tensors, which transformers and vLLM load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from conf.schema import Scheme
from parallel.quantisation import is_quantised, quantised_rows
from parallel.weight_names import ROUTER
from recipes.quantise import Quantisation
from train.rundir import replace_text

FORMATS = {"w8a8": "int-quantized", "w8a16": "pack-quantized", "fp8": "float-quantized"}
VALUES_A_WORD = 4


def compressed_tensors(tensors: dict[str, Tensor], quantisation: Quantisation, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file under the names and in the layout of compressed-tensors.

    Args:
        tensors: whole, in float32: values and scales are had again from rounded weights.
        quantisation: what is rounded.
        dtype: of scales, and of what is not rounded.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not is_quantised(name, quantisation.kept_layers):
            found[name] = tensor.to(dtype)
            continue
        values_OI, scale_O1 = quantised_rows(tensor, quantisation.scheme)
        found[f"{name}_scale"] = scale_O1.to(dtype)
        if quantisation.scheme != "w8a16":
            found[name] = values_OI
        else:
            found[f"{name}_packed"] = packed(values_OI)
            found[f"{name}_shape"] = torch.tensor(values_OI.shape, dtype=torch.int64)
    return found


def packed(values_OI: Tensor) -> Tensor:
    """Four INT8 values, each raised by 128, to an int32, the first in the lowest byte; rows end in zeros."""
    raised = (values_OI.to(torch.int16) + 128).to(torch.uint8)
    missing = -raised.size(1) % VALUES_A_WORD
    return torch.nn.functional.pad(raised, (0, missing)).contiguous().view(torch.int32)


def mark_quantised(directory: Path, quantisation: Quantisation, num_layers: int) -> None:
    """Say in `config.json`, and in the model card where there is one, what is rounded and how."""
    kept = [f"re:.*layers\\.{layer}\\..*" for layer in quantisation.kept_layers if layer < num_layers]
    scheme = quantisation.scheme
    inputs = eight_bits(scheme, strategy="token", dynamic=True) if scheme != "w8a16" else None
    file = directory / "config.json"
    config = json.loads(file.read_text())
    routers = [f"re:.*{re.escape(ROUTER.removesuffix('.weight'))}"] if "num_local_experts" in config else []
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": FORMATS[scheme],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": eight_bits(scheme, strategy="channel", dynamic=False),
                "input_activations": inputs,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", *routers, *kept],
    }
    replace_text(file, json.dumps(config, indent=2) + "\n")
    card = directory / "README.md"
    if card.exists():
        replace_text(card, f"{card.read_text()}\n## Eight bits\n\n{in_words(quantisation)}\n")


def in_words(quantisation: Quantisation) -> str:
    """What is rounded, for a model card."""
    what = f"Matrices of the layers are in {'FP8 (E4M3)' if quantisation.scheme == 'fp8' else 'INT8'}, a scale a row"
    if quantisation.scheme != "w8a16":
        what += ", and so is what goes into them, a scale a token"
    what += f" (compressed-tensors, {FORMATS[quantisation.scheme]})."
    if quantisation.smoothing is not None:
        what += f" Outliers of inputs were moved into the matrices before (SmoothQuant, {quantisation.smoothing:g})."
    kept = ", ".join(map(str, quantisation.kept_layers))
    return what + (f" Layers {kept} are as they were." if kept else "")


def eight_bits(scheme: Scheme, *, strategy: str, dynamic: bool) -> dict[str, object]:
    """How compressed-tensors describes symmetric INT8, or E4M3."""
    kind = "float" if scheme == "fp8" else "int"
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic}
