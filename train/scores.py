"""Held-out scores by document, their means and their standard errors. D documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentScores:
    """How one model predicts one set of held-out documents; documents are the independent units, not tokens.

    Attributes:
        loss_D: sum of negative log-likelihood of each document, nats.
        correct_D: tokens of each document that had the largest probability.
        num_tokens_D: scored tokens of each document, each at least 1.
    """

    loss_D: Float64s
    correct_D: Float64s
    num_tokens_D: Float64s

    @classmethod
    def from_rows(
        cls, document_R: npt.NDArray[np.int64], loss_R: Float64s, correct_R: Float64s, num_tokens_R: Float64s
    ) -> DocumentScores:
        """Add up rows (windows of documents); rows of document -1 are padding."""
        kept = document_R >= 0
        _, which = np.unique(document_R[kept], return_inverse=True)
        loss_D, correct_D, num_tokens_D = (
            np.bincount(which, weights=row[kept]).astype(np.float64) for row in (loss_R, correct_R, num_tokens_R)
        )
        counted = num_tokens_D > 0
        return cls(loss_D=loss_D[counted], correct_D=correct_D[counted], num_tokens_D=num_tokens_D[counted])

    @property
    def num_documents(self) -> int:
        """Documents scored."""
        return len(self.num_tokens_D)

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return int(self.num_tokens_D.sum())

    def loss(self) -> Estimate:
        """Nats a token."""
        return ratio(self.loss_D, self.num_tokens_D)

    def accuracy(self) -> Estimate:
        """Share of tokens predicted right."""
        return ratio(self.correct_D, self.num_tokens_D)

    def gain_over(self, baseline: DocumentScores) -> Estimate:
        """Nats a token by which this model's loss is lower, paired by document.

        Raises:
            ValueError: the two were not scored on the same documents.
        """
        if not np.array_equal(self.num_tokens_D, baseline.num_tokens_D):
            raise ValueError("models can be compared only on the same documents, token for token")
        return ratio(baseline.loss_D - self.loss_D, self.num_tokens_D)

    def accuracy_over(self, baseline: DocumentScores) -> Estimate:
        """This model's accuracy over the baseline's, paired by document.

        Raises:
            ValueError: the two were not scored on the same documents.
        """
        if not np.array_equal(self.num_tokens_D, baseline.num_tokens_D):
            raise ValueError("models can be compared only on the same documents, token for token")
        return ratio(self.correct_D, baseline.correct_D)


def ratio(total_D: Float64s, num_tokens_D: Float64s) -> Estimate:
    """Ratio of sums with the standard error over documents (linearised ratio estimator, Cochran 1977, 6.4).

    One document has no spread to estimate an error from: the error is infinite, so no claim can rest on it.
    """
    documents, tokens = len(num_tokens_D), float(num_tokens_D.sum())
    mean = float(total_D.sum()) / tokens
    if documents < 2:
        return Estimate(mean, float("inf"))
    residual_D = total_D - mean * num_tokens_D
    variance = float(residual_D @ residual_D) * documents / (documents - 1)
    return Estimate(mean, variance**0.5 / tokens)
