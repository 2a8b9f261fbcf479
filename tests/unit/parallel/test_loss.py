from __future__ import annotations

import pytest
import torch
from tensor_watch import LargestFloat
from torch.nn.functional import cross_entropy

from parallel import loss
from parallel.loss import CrossEntropy, score_tokens
from parallel.plan.memory import SLICE_LOGITS


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_BSV = 5 * torch.randn(2, 7, 11, generator=generator)
    labels_BS = torch.randint(11, (2, 7), generator=generator)
    mask_BS = (torch.rand(2, 7, generator=generator) < 0.6).float()
    return logits_BSV, labels_BS, mask_BS


def test_loss_and_gradient_are_those_of_torch():
    logits, labels, mask = inputs()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    sums = CrossEntropy()(ours, labels, mask, None)
    expected = (cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum()
    sums.loss.backward()
    expected.backward()
    torch.testing.assert_close(sums.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert sums.num_tokens == mask.sum()


def test_z_loss_adds_the_squared_log_partition_and_its_gradient():
    logits, labels, mask = inputs()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    objective = CrossEntropy(z_loss=0.3)
    sums = objective(ours, labels, mask, None)
    term = 0.3 * (theirs.logsumexp(-1).square() * mask).sum()
    expected = (cross_entropy(theirs.flatten(0, 1), labels.flatten(), reduction="none") * mask.flatten()).sum() + term
    sums.loss.backward()
    expected.backward()
    torch.testing.assert_close(sums.loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(sums.metrics["z_loss"], term.detach())
    assert objective.metric_names == tuple(sums.metrics)


def test_accuracy_counts_tokens_whose_label_has_the_largest_logit():
    logits, labels, mask = inputs()
    sums = CrossEntropy()(logits, labels, mask, None)
    assert sums.metrics["accuracy"] == ((logits.argmax(-1) == labels) * mask).sum()


def test_masked_tokens_have_no_gradient():
    logits, labels, mask = inputs()
    logits.requires_grad_()
    CrossEntropy(z_loss=0.1)(logits, labels, mask, None).loss.backward()
    assert (logits.grad[mask == 0] == 0).all()
    assert (logits.grad[mask == 1] != 0).any()


@pytest.mark.parametrize("size", [100.0, -100.0])
def test_huge_logits_do_not_overflow(size):
    logits = torch.full((1, 1, 4), size)
    logits[0, 0, 2] += 1000.0
    scores = score_tokens(logits, torch.tensor([[2]]), None)
    assert scores.loss_BS.item() == 0.0
    assert scores.log_partition_BS.item() == size + 1000.0


def test_bf16_logits_are_scored_in_float32_and_get_bf16_gradients():
    logits, labels, _ = inputs()
    half = logits.bfloat16().requires_grad_()
    scores = score_tokens(half, labels, None)
    torch.testing.assert_close(scores.loss_BS, score_tokens(half.detach().float(), labels, None).loss_BS)
    scores.loss_BS.sum().backward()
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("logit_bytes", [1, 4 * 2 * 11 * 3, 10**9])
def test_slices_change_nothing(monkeypatch, logit_bytes):
    logits, labels, mask = inputs()
    whole, sliced = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = CrossEntropy(z_loss=0.3)(whole, labels, mask, None)
    expected.loss.backward()
    monkeypatch.setattr(loss, "LOGIT_BYTES", logit_bytes)
    sums = CrossEntropy(z_loss=0.3)(sliced, labels, mask, None)
    sums.loss.backward()
    assert torch.equal(sums.loss, expected.loss)
    assert torch.equal(sliced.grad, whole.grad)


def test_no_float32_copy_of_all_logits_is_made(monkeypatch):
    """Seen from torch itself: every float32 tensor that an operation returns is below the limit."""
    monkeypatch.setattr(loss, "LOGIT_BYTES", 64 * 512 * 4)
    logits = torch.randn(1, 512, 512, dtype=torch.bfloat16, requires_grad=True)
    with LargestFloat() as largest:
        CrossEntropy(z_loss=0.1)(
            logits, torch.zeros(1, 512, dtype=torch.int64), torch.ones(1, 512), None
        ).loss.backward()
    assert 0 < largest.num_bytes <= 64 * 512 * 4


def test_the_planner_knows_the_slice():
    assert 4 * SLICE_LOGITS == loss.LOGIT_BYTES
