"""What `python -m train --help` says, read from the configuration files themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_TEXT = """\
Train a recipe: on this machine as a rehearsal, on a cluster at full size.

  python -m train recipe=business_module                     rehearse on this machine
  python -m train recipe=business_module cluster=h200_slurm  the real run, queued with Slurm (python -m slurm --help)
  python -m train recipe=business_module cluster=h200_ray    the real run, on a running Ray cluster
  python -m train recipe=business_module action=check        check everything, start nothing
  python -m train recipe=business_module cluster=h200_ray action=plan    memory, days, power and price; starts nothing
  python -m train recipe=business_module cluster=h200_slurm action=dry_run    write the Slurm job, submit nothing

Recipes (recipe=NAME)
{recipes}

Groups (GROUP=OPTION)
{groups}

Often changed (KEY=VALUE)
  stages.specialise.training.tokens=2e6       a longer stage
  engine.mesh.tensor=2 engine.mesh.pipeline=2   another layout; `data` takes the remaining ranks
  order=[specialise,export]                   other stages, or another order
  init=DIR, init=recipe:foundation            where the weights come from
  resume=latest, resume=RUN_DIR               continue a stopped run
  scale=full                                  full size, wherever it runs
  launcher=ray_train                          the same ranks under Ray Train
  runs_dir=DIR                                where runs are kept

Options
  --cfg job [--resolve]        print the composed configuration and leave
  -m, --multirun               run every combination of the comma-separated values, one after another
  --config-dir DIR             further recipes and options, e.g. DIR/recipe/mine.yaml
  --info defaults, --hydra-help   how the configuration was put together; Hydra's own options

Exit codes: 0 finished, 1 failed, 2 refused (the message says what to change), 75 stopped and can be resumed."""


def text(config_dirs: Sequence[Path]) -> str:
    """The help text.

    Args:
        config_dirs: directories with groups; a file of an earlier one hides its namesake in a later one.
    """
    recipes = [f"  {name:<22}{_description(file)}" for name, file in _options(config_dirs, "recipe").items()]
    others = [group for group in groups(config_dirs) if group not in ("recipe", "stage", "optim", "hardware")]
    lines = [f"  {group:<22}{', '.join(_options(config_dirs, group))}" for group in others]
    lines += [
        f"  {group + '@' + place:<42}{', '.join(_options(config_dirs, group))}"
        for group, place in (
            ("optim", "stages.STAGE.training.optim"),
            ("+stage", "stages.STAGE"),
            ("hardware", "cluster.hardware"),
        )
    ]
    return _TEXT.format(recipes="\n".join(recipes), groups="\n".join(lines))


def groups(config_dirs: Sequence[Path]) -> list[str]:
    """Names of the configuration groups."""
    return sorted({file.parent.name for directory in config_dirs for file in directory.glob("*/*.yaml")})


def _options(config_dirs: Sequence[Path], group: str) -> dict[str, Path]:
    group = group.removeprefix("+")
    files = [file for directory in reversed(config_dirs) for file in directory.glob(f"{group}/*.yaml")]
    return dict(sorted((file.stem, file) for file in files))


def _description(file: Path) -> str:
    found = re.search(r"^description: *(.*)$", file.read_text(), re.MULTILINE)
    return found[1] if found else ""
