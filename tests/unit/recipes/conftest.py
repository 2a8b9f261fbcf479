"""Rules look at the disk: every test has an empty directory of its own."""

import pytest


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
