"""W&B as a mirror of `metrics.jsonl`, in a process of its own: no outage of it can stop or slow a run.

    python -m train.tracking RUN_DIR      mirror a run, also one that ended long ago

Each stage is a W&B run of its own: group = the run, job type = the stage's kind. A stage that is resumed by another
driver is a new W&B run of the same group, because W&B keeps no rewound history and offline runs cannot be continued.
"""

from __future__ import annotations

import argparse
import json
import netrc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from train.metrics import FILE_NAME, Follower, MetricsWriter, records_in
from train.records import Checkpoint, Comparison, Evaluation, Export, Record, StageEnded, Step, Validation

Mode = Literal["online", "offline"]

POLL_SECONDS = 1.0
CONNECT_SECONDS = 15.0
FLUSH_SECONDS = 300
STOPPED_BY_ITSELF = 3
"""Exit code of a mirror that has already told the user why it stopped."""
EVALUATION_COLUMNS = (
    "model",
    "source",
    "loss",
    "standard_error",
    "accuracy",
    "accuracy_standard_error",
    "num_tokens",
    "num_documents",
)


class Tracker:
    """The driver's hold on the mirror. Nothing here raises: tracking is never a reason for a run to fail."""

    def __init__(self, run_dir: Path, *, mode: str) -> None:
        """Start the mirror of what is recorded from now on.

        Args:
            run_dir: the run; the mirror writes to its `wandb/` and `logs/wandb.log`.
            mode: of the tracking configuration; nothing is started when it is `disabled`.
        """
        self._run_dir = run_dir
        self._process: subprocess.Popen[bytes] | None = None
        if mode == "disabled":
            return
        try:
            self._process = self._start()
        except OSError as error:
            self._say(f"W&B tracking could not be started ({error}); the run is recorded in {FILE_NAME} all the same")

    def finish(self, timeout_seconds: float) -> None:
        """Let the mirror take in the last records, and end it when it has not done so in time."""
        if self._process is None:
            return
        process, self._process = self._process, None
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            _end_group(process)
            self._say(
                f"W&B did not take everything within {timeout_seconds:g} s and was ended; the run itself is complete. "
                f"To send it again: python -m train.tracking {self._run_dir}"
            )
            return
        if code not in (0, STOPPED_BY_ITSELF):
            self._say(f"W&B tracking ended with code {code}; see {self._run_dir / 'logs' / 'wandb.log'}")

    def _start(self) -> subprocess.Popen[bytes]:
        metrics_file = self._run_dir / FILE_NAME
        offset = metrics_file.stat().st_size if metrics_file.exists() else 0
        log = self._run_dir / "logs" / "wandb.log"
        log.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "train.tracking", str(self._run_dir)]
        command += ["--offset", str(offset), "--parent", str(os.getpid())]
        with log.open("ab") as output:
            # A session of its own, so that Ctrl-C reaches the run alone and the mirror sees its end.
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def _say(self, text: str) -> None:
        try:
            _warn(self._run_dir, text)
        except OSError:
            print(text, file=sys.stderr)


@dataclass(kw_only=True)
class Mirror:
    """Turns records into W&B calls.

    Attributes:
        run_dir: the run.
        config: what `config.json` holds.
        mode: offline writes the same files, to be sent later with `wandb sync`.
        attempt: times the run has been started so far.
    """

    run_dir: Path
    config: dict[str, Any]
    mode: Mode
    attempt: int
    ended: bool = False
    stage: str | None = None
    # What wandb.init returned; the library is imported late and its types are not checked.
    wandb_run: Any = None
    seen: set[tuple[str, int, str]] = field(default_factory=set)
    evaluations: list[list[object]] = field(default_factory=list)

    def take(self, record: Record) -> None:
        """Mirror one record."""
        if record["kind"] == "run_started":
            self.ended = False
            self.attempt += 1
        elif record["kind"] == "run_ended":
            self.ended = True
            self.close(exit_code=record["exit_code"])
        elif record["kind"] != "message" and record["kind"] != "task":
            if record["stage"] != self.stage:
                self.close(exit_code=0)
                self.open(record["stage"])
            if not self.is_repeated(record):
                self.take_of_stage(record)

    def take_of_stage(self, record: Record) -> None:
        """Mirror one record of the open stage."""
        match record["kind"]:
            case "stage_started":
                self.wandb_run.config.update({"num_parameters": record["num_parameters"]}, allow_val_change=True)
            case "step" | "validation" | "checkpoint":
                self.wandb_run.log(curve_values(record))
            case "evaluation":
                self.evaluations.append([cast(Mapping[str, object], record)[column] for column in EVALUATION_COLUMNS])
                self.wandb_run.summary.update(summary_values(record))
            case "comparison" | "export" | "stage_ended":
                self.wandb_run.summary.update(summary_values(record))

    def is_repeated(self, record: Record) -> bool:
        """Whether this step has been mirrored before: a stage that was restarted takes some steps again."""
        if record["kind"] not in ("step", "validation", "checkpoint"):
            return False
        fields = cast(Mapping[str, Any], record)
        key = (record["kind"], fields["step"], fields.get("source", ""))
        known = key in self.seen
        self.seen.add(key)
        return known

    def open(self, stage: str) -> None:
        """Begin the W&B run of a stage; where W&B cannot be reached, on disk."""
        import wandb

        self.stage, self.seen, self.evaluations = stage, set(), []
        try:
            self.wandb_run = self.init(stage)
        except (wandb.errors.CommError, wandb.errors.AuthenticationError) as error:
            if self.mode == "offline":
                raise
            self.mode = "offline"
            reason = str(error).splitlines()[0]
            _warn(
                self.run_dir,
                f"W&B could not be reached ({reason}); tracking goes on offline. "
                f"To send it later: wandb sync {self.run_dir}/wandb/offline-run-*",
            )
            self.wandb_run = self.init(stage)
        self.wandb_run.define_metric("train/step")
        for prefix in ("train", "performance", "validation", "checkpoint"):
            self.wandb_run.define_metric(f"{prefix}/*", step_metric="train/step")

    def init(self, stage: str) -> Any:
        """Call wandb.init for a stage."""
        import wandb

        tracking = self.config["tracking"]
        attempt = f" (attempt {self.attempt})" if self.attempt > 1 else ""
        return wandb.init(
            dir=self.run_dir,
            mode=self.mode,
            project=tracking["project"],
            entity=tracking["entity"],
            group=self.run_dir.name,
            name=f"{self.run_dir.name} {stage}{attempt}",
            job_type=self.config["stages"][stage]["kind"],
            tags=[self.config["name"], self.config["scale"], *tracking["tags"]],
            notes=self.config["description"],
            config={**self.config, "stage": stage, "attempt": self.attempt},
            settings=wandb.Settings(init_timeout=CONNECT_SECONDS, console="off", save_code=False),
        )

    def close(self, *, exit_code: int) -> None:
        """End the open W&B run, if there is one."""
        import wandb

        if self.wandb_run is None:
            return
        if self.evaluations:
            table = wandb.Table(columns=list(EVALUATION_COLUMNS), data=self.evaluations)
            self.wandb_run.log({"evaluation/table": table})
        self.wandb_run.finish(exit_code=exit_code)
        self.wandb_run, self.stage = None, None


def curve_values(record: Step | Validation | Checkpoint) -> dict[str, object]:
    """W&B's names for what is plotted over steps."""
    values: dict[str, object] = {"train/step": record["step"]}
    match record["kind"]:
        case "step":
            values |= {
                "train/loss": record["loss"],
                "train/learning_rate": record["learning_rate"],
                "train/gradient_norm": record["grad_norm"],
                "train/tokens": record["tokens"],
                "performance/tokens_per_second": record["tokens_per_second"],
                "performance/step_seconds": record["step_seconds"],
                "performance/model_tflops_per_rank": record["model_tflops"],
                "performance/peak_memory_bytes": record["memory_bytes"],
            }
            values |= {} if record["mfu"] is None else {"performance/mfu": record["mfu"]}
            values |= {f"train/{name}": value for name, value in record["metrics"].items()}
        case "validation":
            for key in ("loss", "standard_error", "accuracy"):
                values[f"validation/{record['source']}/{key}"] = cast(Mapping[str, object], record)[key]
        case "checkpoint":
            values["checkpoint/seconds_blocked"] = record["seconds_blocked"]
            values["checkpoint/seconds"] = record["seconds"]
            values["checkpoint/bytes"] = record["num_bytes"]
    return values


def summary_values(record: Evaluation | Comparison | Export | StageEnded) -> dict[str, object]:
    """W&B's names for what is said once."""
    match record["kind"]:
        case "evaluation":
            name = f"evaluation/{record['source']}/{record['model']}"
            return {
                f"{name}/loss": record["loss"],
                f"{name}/standard_error": record["standard_error"],
                f"{name}/accuracy": record["accuracy"],
            }
        case "comparison":
            name = f"comparison/{record['source']}/{record['model']}_over_{record['baseline']}"
            return {f"{name}/gain": record["gain"], f"{name}/standard_error": record["standard_error"]}
        case "export":
            return {"export/path": record["path"], "export/bytes": record["num_bytes"]}
        case "stage_ended":
            return {"seconds": record["seconds"]}


def resolved_mode(asked: str, *, base_url: str, environment: Mapping[str, str]) -> Mode:
    """What `auto` means here: W&B's own WANDB_MODE if set, else online where a key is at hand, else offline.

    Args:
        asked: online, offline or auto.
        base_url: the W&B server.
        environment: the process's.
    """
    if asked == "auto" and environment.get("WANDB_MODE") in ("online", "offline"):
        asked = environment["WANDB_MODE"]
    if asked == "auto":
        asked = "online" if environment.get("WANDB_API_KEY") or _is_in_netrc(base_url, environment) else "offline"
    return "online" if asked == "online" else "offline"


def follow(mirror: Mirror, follower: Follower, parent: int) -> None:
    """Mirror records until the run has ended or the process `parent`, which started this one, is gone."""
    while not mirror.ended:
        orphaned = os.getppid() != parent
        for record in follower.poll():
            mirror.take(record)
        if orphaned:
            return
        if not mirror.ended:
            time.sleep(POLL_SECONDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Mirror a run; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.tracking", description="Mirror a run into W&B.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--offset", type=int, default=0, help="bytes of metrics.jsonl that are mirrored already")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="process whose end ends this one")
    given = parser.parse_args(arguments)
    run_dir = given.run_dir.resolve()
    try:
        _mirror(run_dir, given.offset, given.parent)
    except Exception as error:
        traceback.print_exc()
        _warn(run_dir, f"W&B tracking stopped ({type(error).__name__}: {error}); details in {run_dir}/logs/wandb.log")
        return STOPPED_BY_ITSELF
    return 0


def _mirror(run_dir: Path, offset: int, parent: int) -> None:
    import wandb

    config = json.loads((run_dir / "config.json").read_text())
    mode = resolved_mode(config["tracking"]["mode"], base_url=str(wandb.Settings().base_url), environment=os.environ)
    metrics_file = run_dir / FILE_NAME
    mirror = Mirror(run_dir=run_dir, config=config, mode=mode, attempt=_num_starts(metrics_file, offset))
    try:
        follow(mirror, Follower(metrics_file, offset=offset), parent)
    finally:
        # W&B may wait for its server for ever; the default action of this signal ends the process.
        signal.alarm(FLUSH_SECONDS)
        mirror.close(exit_code=1)


def _warn(run_dir: Path, text: str) -> None:
    with MetricsWriter(run_dir / FILE_NAME) as writer:
        writer.write("message", level="warning", text=text)


def _is_in_netrc(base_url: str, environment: Mapping[str, str]) -> bool:
    path = Path(environment.get("NETRC", "~/.netrc")).expanduser()
    try:
        hosts = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return urlsplit(base_url).netloc in hosts or "api.wandb.ai" in hosts


def _num_starts(metrics_file: Path, offset: int) -> int:
    if not offset:
        return 0
    with metrics_file.open("rb") as file:
        earlier = file.read(offset)
    return sum(record["kind"] == "run_started" for record in records_in(earlier))


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=5)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(main())
