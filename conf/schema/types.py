"""Kinds of numbers, and what every part of a configuration shares."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]

Scale = Literal["rehearsal", "full"]
Action = Literal["run", "check", "plan", "dry_run"]
Launcher = Literal["gang", "ray_train"]
Precision = Literal["fp32", "bf16"]
Scheme = Literal["w8a16", "w8a8", "fp8"]
"""What layers' matrices are rounded to. w8a16: INT8 weights. w8a8: INT8 weights and inputs. fp8: both in E4M3."""


class Strict:
    """Unknown keys are faults, not noise."""

    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
