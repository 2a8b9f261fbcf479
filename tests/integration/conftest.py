"""What all tests of whole runs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_runs import Slurm, running_slurm


@pytest.fixture(scope="session", autouse=True)
def prepared_text(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[None]:
    """One cache of prepared text for all runs of a session, those of the other worker included."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREPARED_TEXT", str((base if worker_id == "master" else base.parent) / "prepared"))
        yield


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm on this host, of each process that tests."""
    with running_slurm(tmp_path_factory) as started:
        yield started
