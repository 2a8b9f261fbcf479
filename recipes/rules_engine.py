"""Rules between the engine and what is asked of it: which combinations of axes and options a backend has.

`docs/engines.md` is the table of what these rules allow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from conf.errors import Problem
from conf.schema import RunConfig
from recipes.machine import Machine

PACKAGES = {"megatron": "megatron-core", "deepspeed": "deepspeed"}
MODULES = {"megatron": "megatron", "deepspeed": "deepspeed"}


def backend_is_installed(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """The backend's package can be imported here, where ranks run here."""
    backend = config.engine.backend
    if config.cluster.kind == "local" and importlib.util.find_spec(MODULES[backend]) is None:
        yield Problem(
            "engine.backend",
            f"{backend} is not installed in this Python environment. It comes with this project (pip install -e .); "
            f"alone: pip install {PACKAGES[backend]}, in the version that pyproject.toml names.",
        )


def zero_stage_is_offered(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """What can be split over data ranks depends on the backend, the pipeline and the precision."""
    engine = config.engine
    stage, pipeline = engine.zero_stage, engine.mesh.pipeline
    if engine.backend == "megatron" and stage > 1:
        yield Problem(
            "engine.zero_stage",
            f"{stage} is not offered by Megatron, which splits optimizer state (1) and neither gradients nor weights. "
            "Set engine.zero_stage=1, or engine=deepspeed without a pipeline.",
        )
    if engine.backend == "deepspeed" and stage > 1 and pipeline > 1:
        yield Problem(
            "engine.zero_stage",
            f"{stage} splits gradients after every micro-batch, and a pipeline of {pipeline} ranks has several under "
            f"way at once: DeepSpeed refuses the two together. Set engine.zero_stage=1, or engine.mesh.pipeline=1.",
        )
    if engine.backend == "deepspeed" and stage == 0 and engine.precision == "bf16":
        yield Problem(
            "engine.zero_stage",
            "is 0, at which DeepSpeed adds up gradients of micro-batches in bf16 and loses small ones. "
            "Set engine.zero_stage=1, which keeps them in fp32 and works on one rank as well.",
        )


def pipeline_is_offered(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """DeepSpeed has no interleaved schedule."""
    engine = config.engine
    if engine.backend == "deepspeed" and engine.mesh.virtual_pipeline > 1:
        yield Problem(
            "engine.mesh.virtual_pipeline",
            f"{engine.mesh.virtual_pipeline} layer chunks a pipeline rank need an interleaved schedule, which "
            "DeepSpeed does not have. Set engine.mesh.virtual_pipeline=1, or engine=megatron.",
        )


def offloading_is_offered(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Optimizer state leaves the device only where there is a part of it to move, and a place to move it to."""
    engine = config.engine
    where, stage = engine.offload_optimizer, engine.zero_stage
    if where != "none" and engine.backend == "megatron":
        yield Problem(
            "engine.offload_optimizer",
            f"{where} is not offered with Megatron. Set engine.offload_optimizer=none, or engine=deepspeed.",
        )
    elif where != "none" and (stage == 0 or engine.mesh.pipeline > 1):
        yield Problem(
            "engine.offload_optimizer",
            f"{where} needs engine.zero_stage 1 to 3 and no pipeline; they are {stage} and {engine.mesh.pipeline} "
            "ranks. DeepSpeed moves this rank's part of the optimizer state at the end of the backward pass.",
        )
    elif where == "nvme" and engine.offload_directory is None:
        yield Problem(
            "engine.offload_directory",
            "is null, and engine.offload_optimizer=nvme needs a directory of a local disk, there on every node. "
            "Set engine.offload_directory=DIR, or engine.offload_optimizer=cpu.",
        )


def experts_are_offered(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Experts have gradients and optimizer state of their own groups, which only the Megatron engine keeps apart."""
    if config.engine.backend == "deepspeed" and config.model.experts is not None:
        yield Problem(
            "engine.backend",
            "deepspeed trains dense models only, and the model has experts: they have data ranks of their own, and "
            "DeepSpeed reduces and shards all gradients over the same ranks. Use engine=megatron.",
        )


def compilation_and_fp8_are_offered(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Compiled layers and fp8 products are put into the model where gradients are Megatron's."""
    engine = config.engine
    if engine.backend == "deepspeed" and engine.compile:
        yield Problem(
            "engine.compile",
            "is not offered with DeepSpeed, which gathers and reduces by hooks within the layers. "
            "Set engine.compile=false, or engine=megatron.",
        )
    if engine.backend == "deepspeed" and engine.precision.startswith("fp8"):
        yield Problem(
            "engine.precision",
            f"{engine.precision} is not offered with DeepSpeed. Set engine.precision=bf16, or engine=megatron.",
        )


RULES = (
    backend_is_installed,
    zero_stage_is_offered,
    pipeline_is_offered,
    offloading_is_offered,
    experts_are_offered,
    compilation_and_fp8_are_offered,
)
