"""A whole run: what `config.json` of a run directory holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from conf.schema.cluster import ClusterConfig
from conf.schema.data import DataConfig
from conf.schema.engine import EngineConfig
from conf.schema.model import ModelConfig
from conf.schema.stages import StageConfig
from conf.schema.types import Action, Launcher, NonNegativeInt, PositiveFloat, PositiveInt, Scale, Strict


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig(Strict):
    """Weights & Biases; metrics.jsonl is the record and is always written."""

    mode: Literal["auto", "online", "offline", "disabled"]
    """auto: online when a key is set, else offline."""
    project: str
    entity: str | None
    tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget(Strict):
    """What the full-size run may take."""

    gpu: str
    gpus: PositiveInt
    days: PositiveFloat
    power_mw: PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Strict):
    """Everything a run is. `config.json` of a run directory holds exactly this."""

    name: str
    """The recipe."""
    description: str
    scale: Scale
    action: Action
    launcher: Launcher
    seed: NonNegativeInt
    controls: bool
    """Run the stages that exist to be compared with as well."""
    runs_dir: str
    init: str | None
    """Where weights come from: null (fresh), `recipe:NAME` (newest finished run of it), or a checkpoint directory."""
    resume: str | None
    """`latest` (newest unfinished run of this recipe), a run directory, or null for a new run."""
    order: tuple[str, ...]
    stages: dict[str, StageConfig]
    model: ModelConfig
    engine: EngineConfig
    data: DataConfig
    cluster: ClusterConfig
    tracking: TrackingConfig
    budget: Budget
    overrides: tuple[str, ...] = ()
    """What was typed, in Hydra's terms; composing them again gives this configuration."""
    full_size: RunConfig | None = field(default=None)
    """The same recipe at full size, where this is a rehearsal of it."""
