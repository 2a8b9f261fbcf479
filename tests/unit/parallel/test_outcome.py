"""What a step's sums come to."""

from __future__ import annotations

import pytest
import torch

from parallel.outcome import Outcome, begin_reading, result_of

NAN, INFINITY = float("nan"), float("inf")


def outcome(*sums: float, clip_grad_norm: float = 1.0) -> Outcome:
    return Outcome.of(torch.tensor(sums, dtype=torch.float64), clip_grad_norm=clip_grad_norm)


def test_sums_become_means_and_the_gradient_is_clipped():
    found = outcome((10 * 4.0) ** 2, 0.0, 25.0, 10.0, 5.0)
    result = result_of(begin_reading(found.report)(), ["accuracy"])
    assert (result.loss, result.grad_norm, result.num_tokens, result.stop) == (2.5, 4.0, 10, False)
    assert result.metrics == {"accuracy": 0.5}
    # Divided by tokens the norm is 4, so another 4 is missing to 1.
    assert found.divisor.item() == pytest.approx(40.0, rel=1e-5)
    assert found.skip.item() == 0.0


@pytest.mark.parametrize("clip_grad_norm", [0.0, 100.0])
def test_gradients_below_the_limit_are_only_divided_by_tokens(clip_grad_norm):
    assert outcome(1600.0, 0.0, 25.0, 10.0, clip_grad_norm=clip_grad_norm).divisor.item() == 10.0


@pytest.mark.parametrize("sums", [(NAN, 0, 1, 10), (INFINITY, 0, 1, 10), (4, 0, NAN, 10), (4, 0, -INFINITY, 10)])
def test_what_is_not_finite_is_skipped_and_told(sums):
    found = outcome(*sums)
    assert found.skip.item() == 1.0
    with pytest.raises(FloatingPointError, match="not finite"):
        result_of(found.report.tolist(), [])


def test_batch_without_a_counted_token_is_skipped_and_told():
    found = outcome(0.0, 0.0, 0.0, 0.0)
    assert found.skip.item() == 1.0
    with pytest.raises(ValueError, match="no counted token"):
        result_of(found.report.tolist(), [])


def test_one_request_to_stop_is_enough():
    assert result_of(outcome(1.0, 1.0, 2.0, 3.0).report.tolist(), []).stop
