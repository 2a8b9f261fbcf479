"""Which documents a step sees: `python -m data.show recipe=NAME step=N [stage=NAME]`, or of a run: `run=DIR step=N`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from conf import load
from conf.errors import UserError
from data.prepare import prepared
from data.stream import stream_of_stage


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
        config = load.read(Path(own["run"]) / "config.json") if own["run"] else load.compose(overrides)
        stage = own["stage"] or next(name for name in config.order if hasattr(config.stages[name], "training"))
        datasets = {name: prepared(source, config.data) for name, source in config.data.sources.items()}
        stream = stream_of_stage(config, stage, datasets)
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


if __name__ == "__main__":
    sys.exit(main())
