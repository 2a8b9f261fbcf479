"""A run is a directory; everything about one execution is a file in it.

RUNS/business_module-20260131-142501-3f9a/
  config.json          exactly the RunConfig every process reads
  datasets.json        source -> prepared dataset
  metrics.jsonl        the record (train/metrics.py)
  status.json          running, stopped, failed or finished
  lock                 held by the one driver that works on the run
  STOP                 touch it: the run saves and stops
  stages/NAME/checkpoints/step-00000120/     (train/checkpoint.py)
  stages/NAME/result.json                    written last: the stage is done, and where its model is
  export/              the Hugging Face directory
  logs/, failures/, wandb/, report.html
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from conf.errors import UserError
from conf.load import read
from conf.schema import ModelConfig, RunConfig

Status = Literal["running", "stopped", "failed", "finished"]


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a finished stage leaves behind.

    Attributes:
        checkpoint: the model it passes on, an absolute path; None where a stage passes on nothing new.
        seconds: time it took over all attempts of this run's last one.
        passes_on: the run goes on with that model; not so for one made to be compared with.
    """

    checkpoint: str | None
    seconds: float
    passes_on: bool = True


@dataclass(frozen=True, slots=True)
class RunDir:
    """Names of the files of a run, and the small ones read and written whole."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the run: the directory's."""
        return self.path.name

    @property
    def config_file(self) -> Path:
        """The configuration every process of the run reads."""
        return self.path / "config.json"

    @property
    def datasets_file(self) -> Path:
        """Source name -> path of its prepared dataset."""
        return self.path / "datasets.json"

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer of its data."""
        return self.path / "tokenizer.json"

    @property
    def metrics_file(self) -> Path:
        """The record."""
        return self.path / "metrics.jsonl"

    @property
    def stop_file(self) -> Path:
        """Exists when somebody asked the run to stop."""
        return self.path / "STOP"

    @property
    def logs(self) -> Path:
        """Output of the ranks and of the tracking process."""
        return self.path / "logs"

    @property
    def failures(self) -> Path:
        """One file for each rank that raised."""
        return self.path / "failures"

    @property
    def export(self) -> Path:
        """The Hugging Face directory."""
        return self.path / "export"

    def rank_log(self, rank: int, world: str = "rank") -> Path:
        """Standard output and error of a rank of a world."""
        return self.logs / f"{world}-{rank:05d}.log"

    def checkpoints(self, stage: str) -> Path:
        """Checkpoints of a stage."""
        return self.path / "stages" / stage / "checkpoints"

    def result(self, stage: str) -> StageResult | None:
        """What a stage left behind, or None while it is not done."""
        file = self._result_file(stage)
        return StageResult(**json.loads(file.read_text())) if file.exists() else None

    def write_result(self, stage: str, result: StageResult) -> None:
        """Mark a stage as done."""
        file = self._result_file(stage)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(asdict(result), indent=2))

    def status(self) -> Status | None:
        """How the run stands; `running` also when its driver was killed."""
        file = self.path / "status.json"
        status: Status | None = json.loads(file.read_text())["status"] if file.exists() else None
        return status

    def write_status(self, status: Status) -> None:
        """Say how the run stands."""
        replace_text(self.path / "status.json", json.dumps({"status": status, "time": time.time(), "pid": os.getpid()}))

    def final_checkpoint(self, order: tuple[str, ...]) -> str | None:
        """Checkpoint the last finished stage of `order` passed on, or None."""
        for stage in reversed(order):
            result = self.result(stage)
            if result is not None and result.checkpoint is not None and result.passes_on:
                return result.checkpoint
        return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the lock goes with the process, however it ends.

        Raises:
            UserError: another process works on this run.
        """
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is working on {self.path}; a run has one driver at a time. "
                    f"Wait for it, or stop it with: touch {self.stop_file}"
                ) from None
            yield

    def _result_file(self, stage: str) -> Path:
        return self.path / "stages" / stage / "result.json"


def create(runs_dir: Path, recipe: str) -> RunDir:
    """A new run directory; unique also when two runs start in the same second.

    Raises:
        UserError: the directory cannot be written.
    """
    path = runs_dir / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    try:
        path.mkdir(parents=True)
        run = RunDir(path.resolve())
        run.logs.mkdir()
        run.failures.mkdir()
    except OSError as error:
        raise UserError(f"cannot make the run directory {path}: {error.strerror}. Set runs_dir=DIR.") from error
    return run


def runs_of(runs_dir: Path, recipe: str) -> list[RunDir]:
    """Runs of a recipe, newest first."""
    paths = sorted(runs_dir.glob(f"{recipe}-*/config.json"), key=lambda file: file.parent.name, reverse=True)
    return [RunDir(file.parent.resolve()) for file in paths if _recipe_of(file.parent) == recipe]


def newest_finished(runs_dir: Path, recipe: str, model: ModelConfig | None = None) -> Path | None:
    """Directory of the newest finished run of a recipe (of that model, where one is given), or None."""
    for run in runs_of(runs_dir, recipe):
        if run.status() == "finished" and (model is None or _config_of(run) == model):
            return run.path
    return None


def newest_unfinished(runs_dir: Path, recipe: str) -> Path | None:
    """Directory of the newest run of a recipe that was stopped, failed or was killed, or None."""
    for run in runs_of(runs_dir, recipe):
        if run.status() in ("stopped", "failed", "running"):
            return run.path
    return None


def run_of(checkpoint: Path) -> RunDir | None:
    """The run a checkpoint lies in (RUN/stages/NAME/checkpoints/step-N); None where it was copied out of its run."""
    if len(checkpoint.parents) < 4:
        return None
    run = RunDir(checkpoint.parents[3])
    return run if run.config_file.exists() and run.datasets_file.exists() else None


def replace_text(file: Path, text: str) -> None:
    """Write a file whole or not at all: readers see the old text or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)


def _recipe_of(path: Path) -> str:
    # The name ends in -DATE-TIME-SUFFIX, so a recipe whose name begins like another's is not taken for it.
    return path.name.rsplit("-", 3)[0]


def _config_of(run: RunDir) -> ModelConfig | None:
    try:
        config: RunConfig = read(run.config_file)
    except UserError:
        return None
    return config.model
