"""What was promised, beside what was reached."""

from __future__ import annotations

from conf.schema import TargetConfig
from train.metrics import MetricsWriter
from train.scores import Estimate


def write_target(metrics: MetricsWriter, stage: str, name: str, target: TargetConfig, value: Estimate) -> None:
    """Write a `target` record; a value that is no number was not measured, and is not met."""
    least, most = target.at_least, target.at_most
    limit = least if least is not None else most
    assert limit is not None, "a target has a limit (recipes/rules_compression.py)"
    metrics.write(
        "target",
        stage=stage,
        name=name,
        model=target.model,
        baseline=target.baseline,
        source=target.source if target.quantity == "accuracy" else "",
        value=value.mean,
        standard_error=value.standard_error,
        limit=limit,
        met=value.mean >= limit if least is not None else value.mean <= limit,
    )
