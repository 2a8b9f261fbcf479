from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError
from data.near import SKETCH_BYTES, first_of_equals, first_of_near, signatures
from data.overlap import RUN_WORDS, Evaluation
from data.quality import QualityRules, broken_rule
from data.steps import ALL_STEPS, Dropped, Judge, Kept, Steps, check_languages, in_form, language_of
from data.words import WordHashes, runs

FEW = settings(max_examples=40, deadline=None)
TEXT = st.text(max_size=300)
WORDS = [f"word{number}" for number in range(500)]
PROSE = (
    "The committee met on Tuesday to consider how the harbour should be deepened before winter. Its engineer "
    "described three ways of doing so, and gave for each the cost, the time it would take and the harm to fishing. "
    "After a long debate members chose the second, which leaves the old breakwater where it stands and asks the least "
    "of the town. Work begins in spring, when the ice has gone and boats can reach the outer wall again."
)


def some_text(seed: int, words: int = 400) -> list[str]:
    return [WORDS[number] for number in np.random.default_rng(seed).integers(0, len(WORDS), words)]


def groups_of(texts: list[str]) -> np.ndarray:
    words = WordHashes()
    return first_of_near(*signatures([words.of(text) for text in texts]))


@FEW
@given(TEXT, st.sampled_from(["NFC", "NFKC"]))
def test_a_text_in_form_stays_as_it_is_however_it_was_written(text: str, form: str) -> None:
    once = in_form(text, form)  # type: ignore[arg-type]
    assert in_form(once, form) == once or "\r" in once  # type: ignore[arg-type]
    assert in_form(unicodedata.normalize("NFD", text), form) == once  # type: ignore[arg-type]


@FEW
@given(TEXT, TEXT)
def test_words_do_not_depend_on_case_punctuation_or_what_was_hashed_before(text: str, other: str) -> None:
    words = WordHashes()
    alone = WordHashes().of(text)
    words.of(other)
    assert np.array_equal(words.of(text), alone)
    assert np.array_equal(words.of(f"!! {text} ..."), alone)


@FEW
@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 6))
def test_runs_are_equal_where_and_only_where_the_words_are(numbers: list[int], length: int) -> None:
    found = runs(np.array(numbers, np.uint64), length)
    length = min(length, len(numbers))
    spelled = [tuple(numbers[start : start + length]) for start in range(len(numbers) - length + 1)] if numbers else []
    assert len(found) == len(spelled)
    assert len(set(found.tolist())) == len(set(spelled))


@FEW
@given(st.lists(st.integers(0, 4), max_size=30), st.data())
def test_the_first_of_equal_documents_is_kept(values: list[int], data: st.DataObject) -> None:
    digests = np.array([[value, 7] for value in values], np.uint64).reshape(-1, 2)
    assert first_of_equals(digests).tolist() == [values.index(value) for value in values]


@FEW
@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), max_size=25))
def test_groups_are_what_shared_keys_connect(rows: list[list[int]]) -> None:
    keys = np.array(rows, np.uint64).reshape(-1, 3)
    expected = list(range(len(rows)))
    for _ in rows:  # as often as the longest chain
        for one, mine in enumerate(rows):
            for other, theirs in enumerate(rows):
                if any(a == b != 0 for a, b in zip(mine, theirs, strict=True)):
                    expected[one] = min(expected[one], expected[other])
    same = np.zeros((len(rows), SKETCH_BYTES), np.uint8)
    assert first_of_near(keys, same).tolist() == expected
    unlike = np.arange(len(rows) * SKETCH_BYTES, dtype=np.int64).reshape(-1, SKETCH_BYTES).astype(np.uint8)
    unlike ^= np.arange(len(rows), dtype=np.uint8)[:, None]
    assert first_of_near(keys, unlike).tolist() == list(range(len(rows)))


def test_near_duplicates_are_found_and_others_are_not() -> None:
    texts, planted = [], []
    for seed in range(60):
        words = some_text(seed)
        texts.append(" ".join(words))
        for place in np.random.default_rng(1000 + seed).integers(0, len(words), 3):
            words[place] = "changed"  # up to 15 of 396 runs of five words: Jaccard similarity of 0.93 or more
        planted.append(" ".join(words))
    group = groups_of(texts + planted)
    assert (group[:60] == np.arange(60)).all()
    assert (group[60:] == np.arange(60)).sum() >= 58  # 1 - (1 - 0.93^8)^14 = 0.9999
    # Pages of one template: a third of the text is their own, a similarity of 0.5.
    template = some_text(5000, 270)
    pages = [" ".join(template + some_text(6000 + page, 130)) for page in range(60)]
    assert (groups_of(pages) == np.arange(60)).sum() >= 59
    assert groups_of(["", "... !", "one", "two"]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (PROSE, None),
        ("too short", "min_words"),
        (" ".join("a" for _ in range(60)), "min_word_length"),
        (PROSE.replace(".", " #####"), "max_symbols"),
        ("\n".join(f"- {sentence}" for sentence in PROSE.split(". ")), "max_bullet_lines"),
        (PROSE.replace(". ", "...\n"), "max_ellipsis_lines"),
        (" ".join(f"{number * 1021}" for number in range(80)), "min_alphabetic_words"),
        ("\n".join([PROSE] * 3), "max_repeated_lines"),
        (PROSE + " " + "buy now " * 30, "max_top_bigram"),
        (PROSE + " " + PROSE[:330], "max_repeated_fivegrams"),
    ],
)
def test_quality_rules(text: str, rule: str | None) -> None:
    broken = broken_rule(text, QualityRules())
    assert (broken or "None").split(":")[0] == str(rule)


def test_quality_bounds_can_be_set_and_unknown_ones_are_refused() -> None:
    assert QualityRules.parse(["min_words=2", "max_symbols=0.5"]) == QualityRules(min_words=2, max_symbols=0.5)
    with pytest.raises(DataError, match=r"no such rule\. There are: min_words"):
        QualityRules.parse(["min_word=2"])
    with pytest.raises(DataError, match="'two' is not a number"):
        QualityRules.parse(["min_words=two"])


@FEW
@given(TEXT)
def test_steps_that_are_off_drop_nothing_but_empty_text(text: str) -> None:
    verdict = Judge(Steps(), 0.1, None).verdict(text)
    assert isinstance(verdict, Dropped) == (not text.strip())
    assert not isinstance(verdict, Dropped) or verdict.reason == "empty"


def test_text_that_models_are_judged_by_is_not_trained_on_and_may_be_held_out() -> None:
    judged = some_text(1)
    evaluation = Evaluation.of([" ".join(judged), "a short one"])
    leak = some_text(2)[:100] + judged[40 : 40 + RUN_WORDS] + some_text(3)[:100]
    near_leak = some_text(2)[:100] + judged[40 : 40 + RUN_WORDS - 1] + some_text(3)[:100]
    steps = Steps(near_duplicates=False)
    assert Judge(steps, 1e-9, evaluation).verdict(" ".join(leak).upper()) == Dropped("contaminated", "1 runs of words")
    assert isinstance(Judge(steps, 1e-9, evaluation).verdict(" ".join(near_leak)), Kept)
    assert isinstance(Judge(steps, 1e-9, evaluation).verdict("A short one!"), Dropped)
    assert isinstance(Judge(steps, 0.9999999, evaluation).verdict(" ".join(leak)), Kept)


def test_languages_are_told_apart_and_unknown_codes_refused() -> None:
    german = "Der Ausschuss tagte am Dienstag, um zu beraten, wie der Hafen vor dem Winter vertieft werden soll."
    assert (language_of(PROSE), language_of(german), language_of("123 %")) == ("en", "de", "??")
    english = Steps(languages=("en",))
    assert Judge(english, 0.1, None).verdict(german) == Dropped("language", "de")
    assert isinstance(Judge(english, 0.1, None).verdict(PROSE), Kept)
    with pytest.raises(DataError, match="--languages xx: not known"):
        check_languages(["en", "xx"])


def test_all_steps_keep_prose() -> None:
    assert isinstance(Judge(ALL_STEPS, 0.1, None).verdict(PROSE), Kept)
