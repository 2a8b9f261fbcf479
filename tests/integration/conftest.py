"""What all tests of whole runs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_runs import Slurm, running_slurm


@pytest.fixture(scope="session", autouse=True)
def share_prepared_text(prepared_text: Path) -> Iterator[None]:
    """Tell `command_line.started` where it lies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREPARED_TEXT", str(prepared_text))
        yield


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm on this host, of each process that tests."""
    with running_slurm(tmp_path_factory) as started:
        yield started
