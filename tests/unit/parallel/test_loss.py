from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from parallel.loss import CrossEntropy, score_tokens


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
