"""What a run is: the frozen dataclasses that every composed configuration must fit.

Pure data, no imports of anything heavy: a login node, a worker and a test read the same types. Sizes are given in the
field's standard terms; a suffix names the unit where there is one (`_tokens`, `_steps`, `_bytes`). Cross-field rules
live in `recipes/check.py`, not here.
"""

from conf.schema.cluster import ClusterConfig, ContainerConfig, HardwareConfig, PreflightConfig, SlurmConfig
from conf.schema.data import (
    DataConfig,
    DiskTierConfig,
    MemoryTierConfig,
    RedisTierConfig,
    ShuffleConfig,
    SourceConfig,
    StorageConfig,
    TierConfig,
)
from conf.schema.engine import EngineConfig, MeshConfig
from conf.schema.model import ExpertsConfig, ModelConfig
from conf.schema.run import Budget, RunConfig, TrackingConfig
from conf.schema.stages import (
    CalibrationConfig,
    ControlStage,
    DistillationConfig,
    DistillStage,
    EvaluateStage,
    ExportStage,
    PretrainStage,
    PruneStage,
    QuantiseStage,
    RecoverStage,
    SearchConfig,
    ShapeConfig,
    SpecialiseStage,
    StageConfig,
    StudentConfig,
    TargetConfig,
    TrainingStage,
)
from conf.schema.training import MixtureChange, OptimConfig, TrainingConfig
from conf.schema.types import (
    Action,
    Decay,
    Fraction,
    Launcher,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
    Scale,
    Strict,
)

__all__ = [
    "Action",
    "Budget",
    "CalibrationConfig",
    "ClusterConfig",
    "ContainerConfig",
    "ControlStage",
    "DataConfig",
    "Decay",
    "DiskTierConfig",
    "DistillStage",
    "DistillationConfig",
    "EngineConfig",
    "EvaluateStage",
    "ExpertsConfig",
    "ExportStage",
    "Fraction",
    "HardwareConfig",
    "Launcher",
    "MemoryTierConfig",
    "MeshConfig",
    "MixtureChange",
    "ModelConfig",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OptimConfig",
    "PositiveFloat",
    "PositiveInt",
    "Precision",
    "PreflightConfig",
    "PretrainStage",
    "PruneStage",
    "QuantiseStage",
    "RecoverStage",
    "RedisTierConfig",
    "RunConfig",
    "Scale",
    "SearchConfig",
    "ShapeConfig",
    "ShuffleConfig",
    "SlurmConfig",
    "SourceConfig",
    "SpecialiseStage",
    "StageConfig",
    "StorageConfig",
    "Strict",
    "StudentConfig",
    "TargetConfig",
    "TierConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TrainingStage",
]
