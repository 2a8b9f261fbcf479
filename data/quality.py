"""Rules a page of prose keeps and boilerplate, lists and machine output break, after Gopher (Rae et al. 2021) and C4.

They are made for languages that put spaces between words, and for prose: source code and tables break some. Rules about
one language only (stop words, curly brackets) are left out; a language is asked for by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from conf.errors import DataError
from data.words import runs

BULLETS = ("-", "*", "\u2022", "\u2023", "\u25cf", "\u25e6")
ELLIPSES = ("...", "\u2026")


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRules:
    """Bounds, all of them inclusive; shares are of 1.

    Attributes:
        min_words: words separated by spaces, at least.
        max_words: at most.
        min_word_length: mean characters of a word, at least.
        max_word_length: at most.
        max_symbols: hash signs and ellipses for each word.
        max_bullet_lines: share of lines that begin with a bullet.
        max_ellipsis_lines: share of lines that end in an ellipsis.
        min_alphabetic_words: share of words with a letter in them.
        max_repeated_lines: share of lines that were there before.
        max_repeated_line_characters: share of characters in them.
        max_repeated_paragraphs: share of paragraphs that were there before.
        max_top_bigram: share of characters in the two words that follow each other most often.
        max_top_trigram: the same for three.
        max_top_fourgram: for four.
        max_repeated_fivegrams: share of characters in runs of five words that were there before.
        max_repeated_tengrams: of ten.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    max_repeated_lines: float = 0.3
    max_repeated_line_characters: float = 0.2
    max_repeated_paragraphs: float = 0.3
    max_top_bigram: float = 0.20
    max_top_trigram: float = 0.18
    max_top_fourgram: float = 0.16
    max_repeated_fivegrams: float = 0.15
    max_repeated_tengrams: float = 0.10

    @classmethod
    def parse(cls, settings: Sequence[str]) -> QualityRules:
        """The rules with some bounds set, each as `name=number`.

        Raises:
            DataError: there is no such bound, or it is not a number.
        """
        known = {field.name: field.default for field in fields(cls)}
        values: dict[str, int | float] = {}
        for setting in settings:
            name, _, value = setting.partition("=")
            if name not in known:
                raise DataError(f"--quality {setting}: no such rule. There are: {', '.join(known)}; or off.")
            try:
                values[name] = int(value) if isinstance(known[name], int) else float(value)
            except ValueError:
                raise DataError(f"--quality {setting}: '{value}' is not a number. Write e.g. {name}=1.") from None
        return cls(**values)  # type: ignore[arg-type]  # names and types were looked up above


def broken_rule(text: str, rules: QualityRules) -> str | None:
    """The first rule that a text breaks, with its number and the bound, e.g. `min_words: 12 < 50`; None: none."""
    for name, value in _measures(text):
        bound = getattr(rules, name)
        if value < bound if name.startswith("min_") else value > bound:
            shown = f"{value:.3g} {'<' if name.startswith('min_') else '>'} {bound:g}"
            return f"{name}: {shown}"
    return None


def _measures(text: str) -> Iterator[tuple[str, float]]:
    """Each rule's name and the text's number, cheap ones first."""
    words = text.split()
    yield "min_words", len(words)
    yield "max_words", len(words)
    if not words:
        return
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    characters = int(lengths.sum())
    yield "min_word_length", characters / len(words)
    yield "max_word_length", characters / len(words)
    yield "max_symbols", (text.count("#") + sum(map(text.count, ELLIPSES))) / len(words)
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    yield "max_bullet_lines", sum(line.startswith(BULLETS) for line in lines) / len(lines)
    yield "max_ellipsis_lines", sum(line.endswith(ELLIPSES) for line in lines) / len(lines)
    yield "min_alphabetic_words", sum(map(_has_letter, words)) / len(words)
    yield "max_repeated_lines", (len(lines) - len(set(lines))) / len(lines)
    yield "max_repeated_line_characters", _repeated_characters(lines)
    paragraphs = [paragraph for paragraph in map(str.strip, text.split("\n\n")) if paragraph]
    yield "max_repeated_paragraphs", (len(paragraphs) - len(set(paragraphs))) / len(paragraphs)
    yield from _repetition(words, lengths)


def _repetition(words: list[str], lengths: npt.NDArray[np.int64]) -> Iterator[tuple[str, float]]:
    numbers: dict[str, int] = {}
    for word in words:
        numbers.setdefault(word, len(numbers))
    ids = np.fromiter((numbers[word] for word in words), np.uint64, len(words)) + np.uint64(1)
    characters = int(lengths.sum())
    for name, length in (("max_top_bigram", 2), ("max_top_trigram", 3), ("max_top_fourgram", 4)):
        if len(words) >= length:
            _, first, counts = np.unique(runs(ids, length), return_index=True, return_counts=True)
            most = int(counts.max())
            sizes = [int(lengths[start : start + length].sum()) for start in first[counts == most]]
            yield name, most * max(sizes) / characters if most > 1 else 0.0
    for name, length in (("max_repeated_fivegrams", 5), ("max_repeated_tengrams", 10)):
        if len(words) >= length:
            hashes = runs(ids, length)
            _, first = np.unique(hashes, return_index=True)
            again = np.ones(len(hashes), bool)
            again[first] = False
            covered = np.zeros(len(words), bool)
            for place in range(length):
                covered[place : place + len(hashes)] |= again
            yield name, int(lengths[covered].sum()) / characters


def _repeated_characters(lines: list[str]) -> float:
    counts = Counter(lines)
    return sum(len(line) * (count - 1) for line, count in counts.items()) / sum(map(len, lines))


def _has_letter(word: str) -> bool:
    return word.isalpha() or any(map(str.isalpha, word))
