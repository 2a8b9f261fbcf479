"""What is done to each document on its way into a dataset: pure functions of the document, switched on one by one.

A document is judged alone here, so the verdict is the same whoever judges it and in whichever order. What needs the
others (equal and nearly equal documents) is in `near.py` and decided over all of them at once.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from conf.errors import DataError
from data.documents import content_hash, is_held_out
from data.overlap import Evaluation
from data.quality import QualityRules, broken_rule
from data.words import Hashes, WordHashes

LANGUAGE_CHARACTERS = 2000
"""A language is told by the beginning of a text."""

UnicodeForm = Literal["NFC", "NFKC", "off"]
Reason = Literal[
    "not_utf8", "malformed", "empty", "language", "quality", "contaminated", "duplicate", "near_duplicate", "forgotten"
]
"""Why a document is dropped, in the order in which it is asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """Which steps are taken. As they stand: what the shipped corpora are prepared with, and any text named in a recipe.

    Attributes:
        unicode_form: texts are brought into this form; `off` leaves them as they are. Lines end in a line feed always.
        invalid_utf8: whether text that is not UTF-8 is an error, or dropped and counted.
        languages: ISO 639-1 codes of those that are kept; empty: all.
        quality: rules that documents keep; None: none.
        near_duplicates: whether one of several nearly equal documents is kept, or all.
        rows: whether the row of the source is kept for every document, and a report is written.
    """

    unicode_form: UnicodeForm = "NFC"
    invalid_utf8: Literal["refuse", "drop"] = "refuse"
    languages: tuple[str, ...] = ()
    quality: QualityRules | None = None
    near_duplicates: bool = False
    rows: bool = False


ALL_STEPS = Steps(invalid_utf8="drop", quality=QualityRules(), near_duplicates=True, rows=True)
"""What the command line does unless told otherwise. A language is a matter of choice, so none is chosen."""


class Kept(NamedTuple):
    """A document that may go into the dataset: its normalised text, the hash of that, and the hashes of its words."""

    text: str
    digest: bytes
    words: Hashes | None


class Dropped(NamedTuple):
    """Why one does not; the detail has the number that decided it, and nothing of the text."""

    reason: Reason
    detail: str


class Judge:
    """Judges documents by the steps that can look at one alone."""

    def __init__(self, steps: Steps, held_out_fraction: float, evaluation: Evaluation | None) -> None:
        self._steps = steps
        self._held_out_fraction = held_out_fraction
        self._evaluation = evaluation
        self._words = WordHashes()

    def verdict(self, text: str) -> Kept | Dropped:
        """Whether a document is kept, by its text as it was read."""
        steps = self._steps
        text = in_form(text, steps.unicode_form)
        if not text.strip():
            return Dropped("empty", "")
        if steps.languages and (language := language_of(text)) not in steps.languages:
            return Dropped("language", language)
        if steps.quality and (broken := broken_rule(text, steps.quality)):
            return Dropped("quality", broken)
        digest = content_hash(text)
        words = self._words.of(text) if steps.near_duplicates or self._evaluation else None
        if self._evaluation and words is not None and not is_held_out(digest, self._held_out_fraction):
            overlap = self._evaluation.overlap(words)
            if overlap:
                return Dropped("contaminated", f"{overlap} runs of words")
        return Kept(text, digest, words)


def in_form(text: str, form: UnicodeForm) -> str:
    """The text with its lines ended by a line feed, in a Unicode form."""
    text = text.replace("\r\n", "\n")
    return text if form == "off" else unicodedata.normalize(form, text)


def language_of(text: str) -> str:
    """The most likely language of a text, its ISO 639-1 code; `??` where there is nothing to tell it by."""
    beginning = text[:LANGUAGE_CHARACTERS]
    if not any(map(str.isalpha, beginning)):
        return "??"
    code: str = _identifier().classify(beginning)[0]
    return code


def check_languages(languages: Sequence[str]) -> None:
    """Refuse codes of languages that are not known.

    Raises:
        DataError: one is not.
    """
    if languages:
        known = set(_identifier().labels)
        unknown = [language for language in languages if language not in known]
        if unknown:
            raise DataError(f"--languages {' '.join(unknown)}: not known. There are: {' '.join(sorted(known))}.")


class _Identifier:
    """py3langid's, its model out of the package."""

    def __init__(self) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._inner = LanguageIdentifier.from_model_file(MODEL_FILE)
        self.labels: tuple[str, ...] = tuple(str(label) for label in self._inner.labels)

    def classify(self, text: str) -> tuple[str, float]:
        code, score = self._inner.classify(text)
        return str(code), float(score)


@functools.cache
def _identifier() -> _Identifier:
    return _Identifier()
