"""`python -m parallel.plan rows IN.csv OUT.csv`: predict published measurements row by row."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from parallel.plan.rows import predict_file


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m parallel.plan", description="Predict memory and throughput.")
    commands = parser.add_subparsers(required=True)
    rows = commands.add_parser("rows", help="predict each row of a CSV file of measurements")
    rows.add_argument("source", type=Path, metavar="IN.csv")
    rows.add_argument("target", type=Path, metavar="OUT.csv")
    chosen = parser.parse_args(arguments)
    try:
        predicted, total = predict_file(chosen.source, chosen.target)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{predicted} of {total} rows predicted, written to {chosen.target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
