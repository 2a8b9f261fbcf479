"""`python -m train recipe=NAME`: compose, check, run."""

from __future__ import annotations

from conf import load
from conf.schema import RunConfig


def main(config: RunConfig) -> int:
    """Run the recipe; imported only now, so that a fault of the configuration is told at once."""
    from recipes.driver import execute

    return execute(config)


if __name__ == "__main__":
    load.main(main)
