"""Errors a user can cause, and the shape of a fault in a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class UserError(Exception):
    """Something the user can mend; the message says what is wrong, the rule, and what to do. Exit code 2."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a configuration.

    Attributes:
        path: dotted path of the value as it is typed on the command line, e.g. `stages.specialise.training.tokens`.
        message: what is wrong, the rule, and what would be right.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(UserError):
    """All faults of a configuration at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__(f"{count} in the configuration:\n" + "\n".join(f"  - {problem}" for problem in self.problems))


class DataError(UserError):
    """A corpus, shard or index is missing, corrupt or does not fit the configuration; names the object."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete, corrupt or of another model; names the file or tensor."""
