"""What the user sees while a run runs: a live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from train.metrics import Follower
from train.quantities import count, duration, rate
from train.records import Message, Record, StageStarted, Step, Validation

PLAIN_LINE_SECONDS = 10.0
PACE_STEPS = 50
MIN_BAR_COLUMNS = 8


@dataclass(kw_only=True)
class StageProgress:
    """How far the running stage is."""

    started: StageStarted
    last: Step | None = None
    held_out: Validation | None = None
    num_scores: int = 0
    pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=PACE_STEPS))
    """Time and number of recent steps; what lies between them includes validation and checkpoints."""

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.last["step"] if self.last else self.started["step"]

    @property
    def seconds_left(self) -> float | None:
        """At the pace of the recent steps; None before there is one."""
        if self.last is None:
            return None
        (first_time, first_step), (last_time, last_step) = self.pace[0], self.pace[-1]
        steps = last_step - first_step
        seconds_per_step = (last_time - first_time) / steps if steps else self.last["step_seconds"]
        return (self.started["num_steps"] - self.step) * seconds_per_step

    def numbers(self) -> list[str]:
        """What there is to say, most wanted first."""
        if self.last is None:
            return [f"{self.num_scores} scores"] if self.num_scores else []
        said = [f"loss {self.last['loss']:.3f}"]
        left = self.seconds_left
        said += [f"{duration(left)} left"] if left is not None else []
        said.append(f"{count(self.last['tokens_per_second'])} tokens/s")
        said += [f"held-out {self.held_out['loss']:.3f}"] if self.held_out else []
        said.append(f"lr {rate(self.last['learning_rate'])}")
        return said


class Display:
    """Follows a record file and shows where the run is. Use as a context and call `update` a few times a second."""

    def __init__(
        self,
        console: Console,
        path: Path,
        order: Sequence[str],
        *,
        offset: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show the run that is recorded at `path`.

        Args:
            console: where to.
            path: the record file; it need not exist yet.
            order: stages of the recipe.
            offset: bytes of the file that earlier attempts wrote.
            clock: seconds; paces the plain lines.
        """
        self.console = console
        self.order = tuple(order)
        self.stage: StageProgress | None = None
        self._follower = Follower(path, offset=offset)
        self._clock = clock
        self._next_line = clock() + PLAIN_LINE_SECONDS
        self._begun = False
        self._ended = False
        self._spinner = Spinner("dots", style="cyan")
        on_terminal = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(get_renderable=self._view, console=console, transient=True) if on_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.update()
        if self.stage is not None:
            self._say(_ending(self.stage, ("unfinished", "yellow")))
        self._ended = True
        if self._live:
            self._live.stop()

    def update(self) -> None:
        """Take in what was recorded since the last call."""
        for record in self._follower.poll():
            self._take(record)
        if self._live is None and self._clock() >= self._next_line and self.stage and self.stage.last:
            self._print_plain(self.stage)

    def _take(self, record: Record) -> None:
        match record["kind"]:
            case "stage_started":
                self._begun = True
                self.stage = StageProgress(started=record)
                if self._live is None:
                    self._say(Text(f"{record['stage']}  started{_scope(record)}"))
            case "step" if self.stage:
                self.stage.last = record
                self.stage.pace.append((record.get("time", 0.0), record["step"]))
            case "validation" if self.stage:
                # The first source of the mixture stands for all: it is the domain the recipe is about.
                if self.stage.held_out is None or record["source"] == self.stage.held_out["source"]:
                    self.stage.held_out = record
            case "evaluation" if self.stage:
                self.stage.num_scores += 1
            case "stage_ended" if self.stage:
                self._say(_ending(self.stage, ("done", "green"), duration(record["seconds"])))
                self.stage = None
            case "message":
                self._say(_message(record))

    def _say(self, text: Text) -> None:
        self.console.print(text, soft_wrap=self._live is None)
        self._next_line = self._clock() + PLAIN_LINE_SECONDS

    def _print_plain(self, stage: StageProgress) -> None:
        progress = f"{stage.started['stage']}  step {stage.step:,}/{stage.started['num_steps']:,}"
        self._say(Text("  ".join([progress, *stage.numbers()])))

    def _view(self) -> RenderableType:
        """The live lines."""
        if self._ended:
            return Text("")
        # Called on rich's own thread while `update` goes on.
        stage = self.stage
        if stage is None:
            return _row(self._spinner, Text("starting" if not self._begun else "", style="dim"))
        name = stage.started["stage"]
        later = self.order[self.order.index(name) + 1 :] if name in self.order else ()
        lines: list[RenderableType] = [_stage_line(stage, self.console.width, self._spinner)]
        if later:
            lines.append(Text(f"  then {', '.join(later)}", style="dim", overflow="ellipsis", no_wrap=True))
        return Group(*lines)


def _stage_line(stage: StageProgress, columns: int, spinner: Spinner) -> Table:
    """Numbers are left out from the least wanted until the line fits."""
    name, num_steps = stage.started["stage"], stage.started["num_steps"]
    steps = f"{stage.step:,}/{num_steps:,}" if num_steps else ""
    used = len(name) + len(steps) + MIN_BAR_COLUMNS + 8
    shown = []
    for number in stage.numbers():
        used += len(number) + 2
        if used > columns:
            break
        shown.append(number)
    table = Table.grid(padding=(0, 2, 0, 0), expand=bool(num_steps))
    table.add_column(width=1, no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    cells: list[RenderableType] = [spinner, name]
    if num_steps:
        table.add_column(ratio=1, min_width=MIN_BAR_COLUMNS)
        table.add_column(no_wrap=True, justify="right")
        cells += [
            ProgressBar(total=num_steps, completed=stage.step, complete_style="cyan", finished_style="green"),
            steps,
        ]
    for number in shown:
        table.add_column(no_wrap=True)
        cells.append(Text(number, style="cyan" if number.startswith("loss") else ""))
    table.add_row(*cells)
    return table


def _row(*cells: RenderableType) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_row(*cells)
    return table


def _scope(started: StageStarted) -> str:
    if not started["num_steps"]:
        return ""
    resumed = f", continues after step {started['step']:,}" if started["step"] else ""
    return f": {count(started['num_parameters'])} parameters, {started['num_steps']:,} steps{resumed}"


def _ending(stage: StageProgress, how: tuple[str, str], *more: str) -> Text:
    num_steps = stage.started["num_steps"]
    said = [f"{stage.step:,}/{num_steps:,} steps"] if num_steps else []
    said += [f"loss {stage.last['loss']:.3f}"] if stage.last else []
    said += [f"held-out {stage.held_out['loss']:.3f}"] if stage.held_out else []
    said += [f"{stage.num_scores} scores"] if stage.num_scores else []
    return Text.assemble((stage.started["stage"], "bold"), "  ", how, "  ", "  ".join([*said, *more]))


def _message(message: Message) -> Text:
    style = {"warning": "yellow", "error": "bold red"}.get(message["level"], "dim")
    prefix = "" if message["level"] == "info" else f"{message['level']}: "
    return Text(f"{prefix}{message['text']}", style=style)
