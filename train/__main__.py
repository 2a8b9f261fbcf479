"""`python -m train recipe=NAME`: compose, check, run, or hand to Slurm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from conf import load
from conf.schema import RunConfig

if TYPE_CHECKING:
    from recipes.queued import Queue


def main() -> None:
    """Act on the command line; what acts is imported only now, so that a fault of the configuration is told at once."""
    queues: list[Queue] = []

    def run(config: RunConfig) -> int:
        if config.cluster.kind == "slurm" and config.action not in ("check", "plan"):
            from recipes.queued import Queue

            queues[:] = queues or [Queue()]
            return queues[0].add(config)
        from recipes.driver import execute

        return execute(config)

    def finish() -> None:
        for queue in queues:
            queue.submit()

    load.main(run, finish)


if __name__ == "__main__":
    main()
