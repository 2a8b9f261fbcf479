"""The main job as a user meets it: `python -m bench.rehearsal` runs it in an empty directory and measures from outside.

Prints seconds to the first training step and to the end, the largest memory of all its processes together (proportional
set size, so shared pages count once), and the held-out gains the report claims.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SAMPLE_SECONDS = 2.0


@dataclass(slots=True)
class Peak:
    """Largest memory seen, in bytes."""

    num_bytes: int = 0


def watch(process: psutil.Process, peak: Peak) -> None:
    """Sample the memory of a process and all below it until it ends."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        total = 0
        for each in [process, *process.children(recursive=True)]:
            try:
                total += each.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        peak.num_bytes = max(peak.num_bytes, total)
        time.sleep(SAMPLE_SECONDS)


def records(runs_dir: Path) -> list[dict[str, Any]]:
    """All records of all runs, oldest first."""
    lines = [json.loads(line) for file in runs_dir.glob("*/metrics.jsonl") for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["time"])


def main() -> int:
    """Run, measure, print; the exit code is the job's."""
    parser = argparse.ArgumentParser(prog="python -m bench.rehearsal", description=__doc__)
    parser.add_argument("override", nargs="*", default=["recipe=business_module"])
    overrides = parser.parse_args().override
    with tempfile.TemporaryDirectory() as directory:
        began, peak = time.time(), Peak()
        job = subprocess.Popen([sys.executable, "-m", "train", *overrides], cwd=directory)
        watcher = threading.Thread(target=watch, args=(psutil.Process(job.pid), peak))
        watcher.start()
        code = job.wait()
        seconds = time.time() - began
        watcher.join()
        written = records(Path(directory) / "runs")
    first = next((each["time"] - began for each in written if each["kind"] == "step"), None)
    rates = sorted(each["tokens_per_second"] for each in written if each["kind"] == "step")
    print(f"exit code {code}")
    print(f"seconds to the end {seconds:.1f}")
    if first is not None:
        print(f"seconds to the first step {first:.1f}")
        print(f"median tokens/s {rates[len(rates) // 2]:.0f}")
    print(f"largest memory of all processes {peak.num_bytes / 2**30:.2f} GiB")
    for each in written:
        if each["kind"] == "comparison" and each["source"] == "business":
            errors = each["gain"] / each["standard_error"]
            print(f"{each['model']} over {each['baseline']}: {each['gain']:.3f} nats, {errors:.1f} standard errors")
    return code


if __name__ == "__main__":
    sys.exit(main())
