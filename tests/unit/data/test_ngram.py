from __future__ import annotations

import numpy as np
import pytest

from data.batch import Batch
from data.ngram import NGram

VOCAB = 11


def text(seed: int = 0, length: int = 400) -> np.ndarray:
    """Tokens where each depends on the two before, with noise; token 10 never occurs."""
    random = np.random.default_rng(seed)
    tokens = [0, 1]
    for _ in range(length - 2):
        likely = (tokens[-1] + 2 * tokens[-2]) % 10
        tokens.append(int(likely if random.random() < 0.8 else random.integers(10)))
    return np.array(tokens)


def batch_of(tokens: np.ndarray, mask: np.ndarray | None = None) -> Batch:
    inputs, labels = tokens[None, :-1].astype(np.int64), tokens[None, 1:].astype(np.int64)
    counted = np.ones(inputs.shape, np.float32) if mask is None else mask[None].astype(np.float32)
    return Batch(inputs, labels, counted, np.arange(inputs.shape[1])[None], np.array([4]))


@pytest.mark.parametrize("order", [2, 3])
def test_probabilities_add_up_to_one_after_every_context(order: int) -> None:
    model = NGram.train([text()], VOCAB, order)
    for first in range(VOCAB):
        for second in range(VOCAB):
            probabilities = model.probabilities(np.array([first, second]))
            assert probabilities.sum() == pytest.approx(1, abs=1e-12)
            assert probabilities.min() > 0


def test_bigram_is_interpolated_kneser_ney() -> None:
    # Bigrams 01 x2, 10 x1, 12 x1; discount 2 / (2 + 2 * 1) = 0.5. Continuations: 0: 1, 1: 1, 2: 1, discount 3 / 3 = 1,
    # so unigrams are uniform: p(w) = 1 / 3 for a vocabulary of 3.
    model = NGram.train([np.array([0, 1, 0, 1, 2])], 3, 2)
    assert model.probabilities(np.array([0])) == pytest.approx([0.25 / 3, 0.75 + 0.25 / 3, 0.25 / 3])
    assert model.probabilities(np.array([1])) == pytest.approx([0.25 + 0.5 / 3, 0.5 / 3, 0.25 + 0.5 / 3])


@pytest.mark.parametrize("order", [2, 3])
def test_scores_are_those_of_the_probabilities(order: int) -> None:
    model = NGram.train([text()], VOCAB, order)
    unseen = np.concatenate([text(seed=1, length=60), [10, 10, 3]])
    scores = model.score([batch_of(unseen)])
    loss, correct = 0.0, 0
    for place in range(1, len(unseen)):
        # The first label of a row has one token before it; a token of no meaning stands in for the second.
        context = unseen[:place] if place > 1 else np.array([-1, unseen[0]])
        probabilities = model.probabilities(context)
        loss -= np.log(probabilities[unseen[place]])
        correct += int(probabilities[unseen[place]] == probabilities.max())
    assert scores.loss_B == pytest.approx([loss])
    assert scores.correct_B.tolist() == [correct]
    assert scores.num_tokens_B.tolist() == [len(unseen) - 1]
    assert scores.sample_ids_B.tolist() == [4]


def test_masked_places_do_not_count() -> None:
    model = NGram.train([text()], VOCAB, 2)
    tokens = text(seed=1, length=21)
    mask = np.arange(20) < 12
    whole, part = model.score([batch_of(tokens, mask)]), model.score([batch_of(tokens[:13])])
    assert whole.loss_B == pytest.approx(part.loss_B)
    assert whole.num_tokens_B.tolist() == [12]


def test_longer_contexts_help_where_text_depends_on_them() -> None:
    train, held_out = text(length=5000), text(seed=1, length=500)
    bigram, trigram = (NGram.train([train], VOCAB, order).score([batch_of(held_out)]) for order in (2, 3))
    assert trigram.loss_B[0] < 0.7 * bigram.loss_B[0]
    assert trigram.correct_B[0] > 1.5 * bigram.correct_B[0]


def test_how_text_is_cut_into_arrays_changes_nothing_and_a_second_epoch_is_not_counted() -> None:
    rows = text(length=400).reshape(10, 40)
    whole = NGram.train([rows], VOCAB, 2).probabilities(np.array([3]))
    for windows in (list(rows), [rows[:4], rows[4:]], [rows, rows[::-1]]):
        assert NGram.train(windows, VOCAB, 2).probabilities(np.array([3])).tolist() == whole.tolist()


@pytest.mark.parametrize(("windows", "order"), [([], 2), ([np.array([1])], 2), ([text()], 4)])
def test_nothing_to_count_is_refused(windows: list[np.ndarray], order: int) -> None:
    with pytest.raises(ValueError, match=f"order {order}"):
        NGram.train(windows, VOCAB, order)
