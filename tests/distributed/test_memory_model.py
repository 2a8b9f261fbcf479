"""The planner's memory against what an engine allocates, on three ranks of two meshes, all in one process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(400)  # two cores that others use: twenty seconds alone
def test_engine_allocates_what_the_planner_says():
    command = [sys.executable, "-W", "ignore", "-m", "bench.memory", "--quick", "--tokens", "256"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stderr
    worst = {name: float(value) for name, value in re.findall(r"(\w+): mean .* worst ([\d.]+) %", done.stdout)}
    assert worst.keys() == {"weights", "gradients", "optimizer", "saved", "peak"}
    assert max(worst[name] for name in ("weights", "gradients", "optimizer")) < 0.5, done.stdout
    assert worst["saved"] < 2, done.stdout
    assert worst["peak"] < 5, done.stdout
