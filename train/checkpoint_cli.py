"""`python -m train.checkpoint`: look at checkpoints, and check every byte of them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from conf.errors import CheckpointError, UserError
from train.checkpoint import Checkpoint, StoredTensors, checkpoints_in, step_of


def run(arguments: Sequence[str] | None) -> int:
    """Run one command.

    Returns:
        0; 1 where `verify` found damage; 2 where PATH is not what the command needs.
    """
    parser = argparse.ArgumentParser(prog="python -m train.checkpoint", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, effect, text in (
        ("list", list_checkpoints, "every checkpoint of a run or directory, and whether its files are all there"),
        ("show", show_checkpoint, "where a checkpoint comes from, its model and its tensors"),
        ("verify", verify_checkpoints, "compare every byte of a checkpoint, or of all in a run, with its hash"),
    ):
        subparser = commands.add_parser(command, help=text, description=text)
        subparser.add_argument("path", type=Path, metavar="PATH")
        subparser.set_defaults(effect=effect)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.effect(chosen.path, Console()))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def list_checkpoints(path: Path, console: Console) -> int:
    """Print a table of the checkpoints at or below a path."""
    table = Table("checkpoint", "stage", title=str(path))
    for title in ("step", "tokens", "size"):
        table.add_column(title, justify="right")
    table.add_column("saved")
    table.add_column("files", overflow="fold")
    for found in _checkpoints_at(path):
        name = found.name if found == path else str(found.relative_to(path))
        try:
            checkpoint = Checkpoint.open(found)
            manifest = checkpoint.manifest
        except CheckpointError as error:
            table.add_row(name, "", "", "", "", "", Text(str(error), style="red"))
            continue
        table.add_row(
            name,
            manifest.provenance.stage,
            f"{manifest.step:,}",
            f"{manifest.tokens:,}",
            _size(checkpoint.num_bytes),
            _time(manifest.saved_at),
            _state_of_files(checkpoint),
        )
    console.print(table)
    return 0


def show_checkpoint(path: Path, console: Console) -> int:
    """Print what a checkpoint says about itself."""
    checkpoint = Checkpoint.open(path)
    manifest, provenance = checkpoint.manifest, checkpoint.manifest.provenance
    summary = Table(title=str(path), show_header=False)
    for title, value in (
        ("run", f"{provenance.run} (recipe {provenance.recipe}, stage {provenance.stage})"),
        ("position", f"step {manifest.step:,}, {manifest.samples:,} samples, {manifest.tokens:,} tokens"),
        ("saved", _time(manifest.saved_at)),
        ("size", f"{_size(checkpoint.num_bytes)} from {checkpoint.weights.num_files} rank(s)"),
        ("sha256", checkpoint.manifest_sha256),
        ("model", _fields(asdict(provenance.model))),
        ("engine", _fields(asdict(provenance.engine))),
        ("tokenizer", provenance.tokenizer),
        ("data", _fields(provenance.data)),
        ("parents", "\n".join(f"{parent.path} ({parent.manifest_sha256[:12]})" for parent in provenance.parents)),
    ):
        summary.add_row(title, Text(value))
    console.print(summary)
    for half, tensors in (("weights", checkpoint.weights), ("resume", checkpoint.resume)):
        console.print(_tensor_table(half, tensors))
    return 0


def verify_checkpoints(path: Path, console: Console) -> int:
    """Read every byte at or below a path; name what is damaged."""
    num_damaged = 0
    found = _checkpoints_at(path)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        for directory in found:
            task = progress.add_task(directory.name, total=None)
            try:
                checkpoint = Checkpoint.open(directory)
                progress.update(task, total=checkpoint.num_bytes)
                checkpoint.verify(on_file=partial(progress.advance, task))
            except CheckpointError as error:
                num_damaged += 1
                progress.console.print(Text(str(error), style="red"), soft_wrap=True)
    console.print(f"{len(found) - num_damaged} of {len(found)} intact")
    return 1 if num_damaged else 0


def _checkpoints_at(path: Path) -> list[Path]:
    if step_of(path) is not None or (path / "manifest.json").exists():
        Checkpoint.open(path)
        return [path]
    parents = sorted({manifest.parent.parent for manifest in path.rglob("step-*/manifest.json")})
    found = [checkpoint for parent in parents for checkpoint in checkpoints_in(parent)]
    if not found:
        raise CheckpointError(f"there is no checkpoint at or below {path}; give a checkpoint, a run or their directory")
    return found


def _state_of_files(checkpoint: Checkpoint) -> Text:
    try:
        checkpoint.check_files()
    except CheckpointError as error:
        return Text(str(error), style="red")
    return Text("complete", style="green")


def _tensor_table(title: str, tensors: StoredTensors) -> Table:
    table = Table("tensor", "shape", title=title)
    for name, shape in tensors.shapes().items():
        table.add_row(Text(name), " x ".join(map(str, shape)) or "scalar")
    return table


def _fields(values: dict[str, object] | dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
