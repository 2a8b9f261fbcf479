"""The command line as a user types it, in a process group of its own that never outlives the test."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Small enough that starting the ranks is most of the time.
TINY_MODEL = (
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_attention_heads=4",
    "model.num_kv_heads=2",
    "model.head_dim=8",
    "model.max_sequence_length=64",
)
TINY_FOUNDATION = (
    "recipe=foundation",
    *TINY_MODEL,
    "stages.pretrain.training.tokens=10240",  # 20 steps
    "stages.pretrain.training.validate_every_steps=0",
    "stages.pretrain.training.validation_tokens=2000",
    "stages.evaluate.tokens=2000",
    "tracking.mode=disabled",
)
# Every stage of a module, each for a few steps.
TINY_VARIANTS = (
    *(f"stages.{stage}.training.tokens=4096" for stage in ("recover", "distill")),
    *(f"stages.{stage}.training.validation_tokens=1000" for stage in ("recover", "continued", "distill")),
    *(f"stages.{stage}.calibration.tokens=2048" for stage in ("prune", "prune_random", "quantise")),
    "stages.prune.search.tokens=2048",
    "stages.prune.search.candidates=2",
    "stages.prune.search.kv_heads_multiple=1",
    "stages.distill.student.ratio=4",
    "stages.export.speed_prompt_tokens=40",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    seconds: float

    @property
    def run(self) -> Path:
        """The run directory it named last."""
        return Path(re.findall(r"^run +(\S+)$", self.output, re.MULTILINE)[-1])


def environment() -> dict[str, str]:
    """The caller's, less what would change a run."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "WANDB_", "HYDRA_"))}


@contextmanager
def started(runs_dir: Path, *overrides: str, log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m train` in the background; its whole process group is ended with the block.

    Text is prepared once for all, where `$PREPARED_TEXT` (set for the tests of this folder) says.
    """
    is_new = not any(text.startswith("resume=") for text in overrides)
    cache = [f"data.cache_dir={os.environ['PREPARED_TEXT']}"] if is_new else []
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "train", f"runs_dir={runs_dir}", *cache, *overrides],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment() | variables,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def train(runs_dir: Path, *overrides: str, seconds: float = 150, **variables: str) -> Ended:
    """Type `python -m train` and wait for it."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    log = runs_dir / f"output-{time.monotonic_ns()}.txt"
    began = time.monotonic()
    with started(runs_dir, *overrides, log=log, **variables) as process:
        code = process.wait(seconds)
    return Ended(code, log.read_text(), time.monotonic() - began)


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Records of one kind."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path, stage: str = "pretrain") -> dict[int, float]:
    """Training loss by step; where a step was taken again after a restart, the last one."""
    return {each["step"]: each["loss"] for each in records(run, "step") if each["stage"] == stage}


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.02)


def run_in(runs_dir: Path, recipe: str) -> Path | None:
    """The run directory of a recipe, once it has a record."""
    found = sorted(runs_dir.glob(f"{recipe}-*/metrics.jsonl"))
    return found[-1].parent if found else None


def has_step(runs_dir: Path, recipe: str, step: int) -> bool:
    """Whether a run of the recipe has come to a step."""
    run = run_in(runs_dir, recipe)
    return run is not None and any(each["step"] >= step for each in records(run, "step"))


def pids_of_ranks(run: Path, world: str = "rank") -> list[int]:
    """Process ids of the newest attempt, by rank."""
    logs = sorted((run / "logs").glob(f"{world}-*.log"))
    return [int(re.findall(r"process (\d+)", log.read_text())[-1]) for log in logs]


@contextmanager
def held(run: Path, *, rank: int) -> Iterator[None]:
    """The run stands still for the block: one rank is stopped, and the others wait for it in their next collective."""
    pid = pids_of_ranks(run)[rank]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
