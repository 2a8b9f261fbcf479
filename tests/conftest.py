"""Options and fixtures of all tests."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

# Tests assert facts; how long an example takes says more about the machine.
settings.register_profile("facts", deadline=None)
settings.load_profile("facts")

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--renew-golden", action="store_true", help="write the golden files anew instead of comparing")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage in what is only being imported, and in none of it later: a third of the seconds it takes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def prepared_text(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One cache of prepared text for all runs of a session, those of the other worker included."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "prepared"


@pytest.fixture
def assert_golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`assert_golden(name, text)`: the text is what tests/golden/NAME holds."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--renew-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert file.exists(), f"there is no {file}; pytest --renew-golden writes it"
        assert text == file.read_text(), f"differs from {file}; if that is meant: pytest --renew-golden"

    return compare
