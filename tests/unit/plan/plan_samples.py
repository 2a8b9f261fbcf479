from __future__ import annotations

from parallel.plan.layout import Layout
from parallel.plan.shapes import PUBLIC_MODELS

LLAMA_8B = PUBLIC_MODELS["llama38b"].shape()
LLAMA_70B = PUBLIC_MODELS["llama370b"].shape()
MIXTRAL = PUBLIC_MODELS["mixtral8x7b"].shape()

BUSY = Layout(
    tensor=4,
    context=2,
    pipeline=4,
    virtual_pipeline=5,
    data=8,
    global_batch=512,
    sequence=8192,
)
"""Every axis in use: Llama-3-70B on 256 GPUs."""
