"""Ray's nodes of an allocation: who waits for whom, and what is done where nobody is left to wait for."""

import threading
import time

import pytest

from slurm import node
from slurm.node import ADDRESS, DONE, LEFT, serve, wait_until_left

SCONTROL = """#!/bin/sh
echo "$@" >> {log}
"""


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """The directory of a start whose worker on n2 has lost its Ray, and no time to start another."""
    attempt = tmp_path / "3-0-1"
    attempt.mkdir()
    (attempt / "chosen").write_text("n1 10.0.0.1\nn2 10.0.0.2\n")
    (attempt / ADDRESS).write_text("10.0.0.1:6379")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(SCONTROL.format(log=tmp_path / "asked"))
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    monkeypatch.setattr(node, "READY_SECONDS", 0.0)
    monkeypatch.setattr(node, "LOST_SECONDS", 0.0)
    return attempt


def test_where_the_first_node_is_lost_a_worker_queues_the_job_again(attempt):
    assert serve(attempt, []) == 0
    assert (attempt.parent / "asked").read_text() == "requeue 3\n"
    assert "first node of the job is lost" in (attempt / "ray-workers.log").read_text()


def test_where_the_driver_has_ended_a_worker_leaves_and_says_so(attempt):
    (attempt / DONE).touch()
    assert serve(attempt, []) == 0
    assert (attempt / f"{LEFT}n2").exists()
    assert not (attempt.parent / "asked").exists()


def test_a_check_waits_for_a_worker_of_its_own_node_and_for_nobody_else(attempt):
    began = time.monotonic()
    for other in ("n1", "n7"):
        wait_until_left(attempt, other, 20)
    threading.Timer(0.1, (attempt / f"{LEFT}n2").touch).start()
    wait_until_left(attempt, "n2", 20)
    assert (attempt / f"{LEFT}n2").exists()
    assert time.monotonic() - began < 10
