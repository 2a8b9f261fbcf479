"""Rules between the engine and what is asked of it: which combinations of axes and options a backend has.

`docs/engines.md` is the table of what these rules allow.
"""

from __future__ import annotations

from collections.abc import Iterator

from conf.errors import Problem
from conf.schema import RunConfig
from recipes.machine import Machine


def zero_stage_is_offered(config: RunConfig, machine: Machine) -> Iterator[Problem]:
    """Megatron splits optimizer state and nothing else over data ranks."""
    engine = config.engine
    if engine.backend == "megatron" and engine.zero_stage > 1:
        yield Problem(
            "engine.zero_stage",
            f"{engine.zero_stage} is not offered by Megatron, which splits optimizer state (1) and neither gradients "
            "nor weights. Set engine.zero_stage=1.",
        )


RULES = (zero_stage_is_offered,)
