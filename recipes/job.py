"""The driver of a run inside an allocation: `python -m recipes.job RUN_DIR --address=HOST:PORT --nodes=A,B`.

What Slurm queued is a run directory. Its `config.json` says all there is to say, so no recipe is composed again; the
first job of a run starts it, later ones continue it, on the Ray cluster that the batch script has started.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from conf import load
from conf.errors import UserError
from recipes import chain, check
from recipes.driver import EXIT_CODES, drive
from recipes.machine import find_machine
from train.rundir import RunDir


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or continue a run directory; returns the exit code of `recipes.driver`, 0 where the rest is another job's."""
    parser = argparse.ArgumentParser(prog="python -m recipes.job", description=main.__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--address", required=True, help="where Ray's head listens")
    parser.add_argument("--nodes", required=True, help="addresses of the nodes in the order they get ranks")
    given = parser.parse_args(arguments)
    try:
        run, addresses = RunDir(given.run), given.nodes.split(",")
        config = chain.on_nodes(load.read(run.config_file), len(addresses))
        if run.status() is not None:
            config = dataclasses.replace(config, resume=str(run.path))
        machine = find_machine()
        check.check(config, machine)
        place = dataclasses.replace(config.cluster, kind="ray", address=given.address)
        code = drive(run, config, machine, place, node_order=addresses)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if code == EXIT_CODES["stopped"]:
        left = chain.stage_of_next_job(config, lambda stage: run.result(stage) is not None)
        if left is not None:
            print(f"The rest, from stage {left} on, is for another job, of {chain.nodes_of(config, left)} nodes.")
            return EXIT_CODES["finished"]
    return code


if __name__ == "__main__":
    sys.exit(main())
