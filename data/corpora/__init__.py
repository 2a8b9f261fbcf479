"""Corpora and the tokenizer that come with the project; `SOURCES.md` says where each text is from."""

from __future__ import annotations

from pathlib import Path

from conf.errors import DataError

PREFIX = "shipped:"


def is_shipped(location: str) -> bool:
    """Whether a location names something that comes with the project."""
    return location.startswith(PREFIX)


def shipped(location: str, suffix: str) -> Path:
    """The file behind `shipped:NAME`.

    Args:
        location: `shipped:NAME`.
        suffix: `.parquet` for a corpus, `.json` for a tokenizer.

    Raises:
        DataError: nothing of that name is shipped; lists the names there are.
    """
    here = Path(__file__).parent
    names = {path.stem: path for path in sorted(here.glob(f"*{suffix}"))}
    name = location.removeprefix(PREFIX)
    if name not in names:
        there_is = ", ".join(PREFIX + known for known in names)
        raise DataError(f"{location}: nothing of this name is shipped. There is: {there_is}.")
    return names[name]
