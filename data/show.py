"""Which documents a step sees: `python -m data.show recipe=NAME step=N [stage=NAME]`, or of a run: `run=DIR step=N`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from conf import load
from conf.errors import UserError
from conf.schema import RunConfig
from data.prepare import prepared
from data.seen import stream_of_run
from data.stream import Stream, stream_of_stage


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        Exit code: 0, or 2 for what the user can mend.
    """
    own, overrides = {"step": "", "stage": "", "run": ""}, []
    for argument in sys.argv[1:] if arguments is None else arguments:
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        else:
            overrides.append(argument)
    try:
        if not own["step"].isdigit():
            raise UserError("say which step: step=N, counted from 0.")
        stage, stream = _of_run(Path(own["run"]), own["stage"]) if own["run"] else _composed(overrides, own["stage"])
        step, num_steps = int(own["step"]), stream.spec.num_steps
        if step >= num_steps:
            raise UserError(f"step={step}: {stage} takes {num_steps} steps, 0 to {num_steps - 1}.")
        documents = stream.documents(step)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"step {step} of {stage}: {len(documents)} samples")
    for sample in stream.samples(stream.sample_ids(step)):
        ids = ", ".join(documents[sample.id])
        print(f"  {sample.id}  {sample.source}  pass {sample.epoch}  tokens from {sample.first_token}: {ids}")
    return 0


def _composed(overrides: Sequence[str], stage: str) -> tuple[str, Stream]:
    """A stage of a recipe, the first that trains where none is named, and its samples."""
    config = load.compose(overrides)
    stage = stage or _first_stage(config)
    datasets = {name: prepared(source, config.data) for name, source in config.data.sources.items()}
    return stage, stream_of_stage(config, stage, datasets)


def _of_run(run: Path, stage: str) -> tuple[str, Stream]:
    """The same of a run, from the datasets that it read: its sources may have changed since."""
    stage = stage or _first_stage(load.read(run / "config.json"))
    try:
        return stage, stream_of_run(run, stage)
    except (OSError, ValueError) as error:
        raise UserError(f"{run}: what it read is not known ({error}).") from error


def _first_stage(config: RunConfig) -> str:
    return next(name for name in config.order if hasattr(config.stages[name], "training"))


if __name__ == "__main__":
    sys.exit(main())
