"""What the user sees before and after the training: what will run and on what, what came of it, and why it failed.

What is shown while it runs is in `train/progress.py`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from conf.schema import RunConfig
from train.facts import facts
from train.quantities import count, duration, estimate, percent
from train.report_compression import is_measured, value_of
from train.summary import RunSummary, StageSummary, exceeds_noise

LOG_COLUMNS = 120


def make_console(file: TextIO | None = None) -> Console:
    """The console of a run: what the terminal offers, or wide plain text where there is none."""
    stream = file or sys.stdout
    if isinstance(stream, io.TextIOWrapper):
        # An ASCII terminal shows a question mark for a sign it lacks; the run does not end for it.
        stream.reconfigure(errors="replace")
    console = Console(file=stream, highlight=False)
    return console if console.is_terminal else Console(file=stream, highlight=False, width=LOG_COLUMNS)


def print_header(console: Console, config: RunConfig, machine: str, world_size: int) -> None:
    """Say what is about to run, and for a rehearsal what the full size of everything is.

    Args:
        console: where to.
        config: the run.
        machine: what was found, e.g. `2 CPU cores, 24 GiB memory, no GPU`.
        world_size: ranks the run will have.
    """
    full = config.full_size
    console.print()
    if config.scale == "rehearsal":
        title = Text.assemble(("Rehearsal of ", "bold"), (config.name, "bold cyan"))
        said = "The same recipe and code as at full size, with model, data and ranks scaled to this machine."
    else:
        title = Text.assemble((config.name, "bold cyan"), (" at full size", "bold"))
        said = ""
    console.print(title)
    console.print(Text(config.description))
    if said:
        console.print(Text(said, style="dim"))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("this rehearsal" if full else "this run")
    if full:
        table.add_column("full size", style="cyan")
    here = facts(config, world_size)
    there = facts(full, full.budget.gpus) if full else {}
    for label, value in here.items():
        table.add_row(label, value, *([there.get(label, "")] if full else []))
    console.print(table)
    console.print(Text.assemble(("machine  ", "dim"), machine))
    console.print()


def print_results(console: Console, summary: RunSummary, closing: Mapping[str, str]) -> None:
    """Show what came of a run.

    Args:
        console: where to.
        summary: the run.
        closing: what the user may want next, label -> path or command, e.g. report, exported model, resume with.
    """
    console.print()
    colour = {"finished": "green", "stopped": "yellow", "failed": "red"}.get(summary.status, "yellow")
    console.print(Text.assemble((summary.status.capitalize(), f"bold {colour}"), f" after {duration(summary.seconds)}"))
    if summary.stages:
        console.print(_stage_table(summary))
    if summary.evaluations:
        console.print(_evaluation_table(summary))
    if summary.comparisons:
        console.print(_comparison_table(summary))
    if summary.targets:
        console.print(_target_table(summary))
    # Those that came late, e.g. of tracking, were never above the bar; the others have scrolled away.
    warnings = dict.fromkeys(each["text"] for each in summary.messages if each["level"] == "warning")
    for warning in warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    width = max(map(len, closing), default=0)
    for label, value in closing.items():
        # Paths and commands are copied by hand: a line of their own, never folded.
        console.print(Text.assemble((f"{label:<{width}}  ", "dim"), value), soft_wrap=True)
    console.print()


def print_failure(console: Console, *, who: str, reason: str, log: str | None) -> None:
    """Show why a run failed.

    Args:
        console: where to.
        who: failed first: a rank, or the run itself.
        reason: its traceback, or how it died.
        log: path of its output.
    """
    console.print()
    console.print(f"[bold red]{who[0].upper()}{who[1:]} failed[/]")
    console.print(Text(reason.rstrip("\n")), soft_wrap=True)
    if log is not None:
        console.print(Text.assemble(("log  ", "dim"), log), soft_wrap=True)


def _stage_table(summary: RunSummary) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for label in ("parameters", "steps", "tokens", "loss"):
        table.add_column(label, justify="right")
    table.add_column("held out", no_wrap=True)
    for label in ("held-out loss", "accuracy", "time"):
        table.add_column(label, justify="right")
    for stage in summary.stages:
        table.add_row(*_stage_cells(stage))
    return table


def _stage_cells(stage: StageSummary) -> list[str]:
    last = stage.steps[-1] if stage.steps else None
    steps = f"{last['step'] if last else 0:,}/{stage.started['num_steps']:,}" if stage.trains else ""
    held_out = stage.last_validations
    return [
        escape(stage.name) if stage.done else f"{escape(stage.name)} [yellow](unfinished)[/]",
        count(stage.started["num_parameters"]) if stage.started["num_parameters"] else "",
        steps,
        count(last["tokens"]) if last else "",
        f"{last['loss']:.3f}" if last else "",
        "\n".join(escape(each["source"]) for each in held_out),
        "\n".join(estimate(each["loss"], each["standard_error"]) for each in held_out),
        "\n".join(percent(each["accuracy"]) for each in held_out),
        duration(stage.seconds),
    ]


def _evaluation_table(summary: RunSummary) -> Table:
    scores = {(each["model"], each["source"]): each for each in summary.evaluations}
    best = {
        source: min(each["loss"] for each in summary.evaluations if each["source"] == source)
        for source in summary.sources
    }
    title = "held-out loss, nats a token (lower is better), and accuracy"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("model", no_wrap=True)
    for source in summary.sources:
        table.add_column(escape(source), justify="right")
    for model in summary.models:
        cells = []
        for source in summary.sources:
            score = scores.get((model, source))
            text = (
                f"{estimate(score['loss'], score['standard_error'])} {percent(score['accuracy']):>7}" if score else ""
            )
            cells.append(f"[bold green]{text}[/]" if score and score["loss"] == best[source] else text)
        table.add_row(escape(model), *cells, style="dim" if summary.is_baseline(model) else "")
    return table


def _target_table(summary: RunSummary) -> Table:
    title = "promised and reached"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("promise", no_wrap=True)
    table.add_column("ratio of")
    for label in ("reached", "limit"):
        table.add_column(label, justify="right")
    table.add_column("")
    for each in summary.targets:
        on = f", {each['source']}" if each["source"] else ""
        names = escape(f"{each['model']} / {each['baseline']}{on}")
        verdict = "[green]met[/]" if each["met"] else "[yellow]not met[/]" if is_measured(each) else ""
        table.add_row(escape(each["name"]), names, value_of(each), percent(each["limit"]), verdict)
    return table


def _comparison_table(summary: RunSummary) -> Table:
    title = "gains, nats a token (positive is better)"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for label in ("model", "against", "on"):
        table.add_column(label, no_wrap=True)
    table.add_column("gain", justify="right")
    table.add_column("more than 3 standard errors")
    for each in summary.comparisons:
        verdict = "[green]yes[/]" if exceeds_noise(each) else "[yellow]no[/]"
        names = (escape(each[key]) for key in ("model", "baseline", "source"))
        table.add_row(*names, estimate(each["gain"], each["standard_error"]), verdict)
    return table
