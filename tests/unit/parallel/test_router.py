from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_samples import MIXTURE
from torch.nn.functional import linear, silu

from parallel import experts
from parallel.experts import GroupedExperts, Router, RouterTotals, grouped_linear
from parallel.importance import Observer, Share

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
CONFIG = SimpleNamespace(
    hidden_size=MIXTURE.hidden_size,
    moe_ffn_hidden_size=MIXTURE.ffn_hidden_size,
    params_dtype=torch.float32,
    sequence_parallel=False,
    expert_model_parallel_size=1,
)


def router(**changes: Any) -> Router:
    made = Router(replace(MIXTURE.experts, **changes), CONFIG, SimpleNamespace(tp_cp=ALONE))
    made.totals = RouterTotals(torch.device("cpu"))
    made.totals.begin_step(torch.tensor(10.0))
    torch.nn.init.normal_(made.weight)
    return made


def hidden() -> torch.Tensor:
    return torch.randn(8, 2, MIXTURE.hidden_size)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_weights_are_the_softmax_over_all_normalised_over_the_chosen():
    made, tokens = router(), hidden()
    weights, sent = made(tokens)
    probability, chosen = linear(tokens.flatten(0, 1), made.weight).softmax(-1).topk(2)
    expected = torch.zeros_like(weights).scatter(1, chosen, probability / probability.sum(-1, keepdim=True))
    torch.testing.assert_close(weights, expected)
    assert torch.equal(sent, expected > 0) and (sent.sum(1) == 2).all()


def test_scores_are_float32_and_gradients_of_the_dtype_of_what_they_are_of():
    made, tokens = router().bfloat16(), hidden().bfloat16().requires_grad_()
    twins = tokens.detach().clone().requires_grad_(), made.weight.detach().clone().requires_grad_()
    scores = experts._Float32Linear.apply(tokens.flatten(0, 1), made.weight)
    expected = linear(twins[0].flatten(0, 1).float(), twins[1].float())
    assert torch.equal(scores, expected)
    for result in (scores, expected):
        (result * torch.arange(96.0).view(16, 6)).sum().backward()
    for mine, its in zip((tokens, made.weight), twins, strict=True):
        assert mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad, its.grad)


def test_losses_are_in_the_gradient_times_their_weight_and_in_the_totals():
    made, tokens = router(balance_loss=0.5, router_z_loss=0.25), hidden()
    made(tokens)[0].sum().backward()  # weights of a token add up to 1: without losses there is no gradient
    twin = made.weight.detach().clone().requires_grad_()
    logits = linear(tokens.flatten(0, 1), twin)
    share = torch.zeros_like(logits).scatter(1, logits.topk(2).indices, 1.0).mean(0) / 2
    balance = 6 * (share * logits.softmax(-1).mean(0)).sum()
    z = logits.logsumexp(-1).square().mean()
    (10.0 * (0.5 * balance + 0.25 * z)).backward()
    torch.testing.assert_close(made.weight.grad, twin.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made.totals.sums, torch.stack((balance, z, torch.zeros(()))).detach())


def test_even_use_has_balance_one():
    made = router()
    torch.nn.init.zeros_(made.weight)
    made.weight.data[:, :6] = 20 * torch.eye(6)
    tokens = torch.zeros(6, 1, MIXTURE.hidden_size)
    for place in range(6):
        tokens[place, 0, place] = tokens[place, 0, (place + 1) % 6] = 1.0
    made(tokens)
    assert made.totals.sums[0].item() == pytest.approx(1.0, abs=1e-6)


def test_full_expert_keeps_the_tokens_with_the_largest_weights():
    made, boundless, tokens = router(capacity_factor=0.75), router(), hidden()
    boundless.weight.data.copy_(made.weight.data)
    (weights, taken), (free, sent) = made(tokens), boundless(tokens)
    # An even share of 16 tokens with 2 experts each is 5.3 tokens; three quarters of it are 4.
    assert taken.sum(0).max() == 4 and sent.sum(0).max() > 4
    for expert in range(6):
        kept, dropped = free[taken[:, expert], expert], free[(sent & ~taken)[:, expert], expert]
        assert len(kept) == min(4, sent[:, expert].sum())
        assert not len(dropped) or kept.min() >= dropped.max()
    assert torch.equal(weights, free * taken)
    assert made.totals.sums[2].item() == pytest.approx(1 - taken.sum().item() / 32)


def test_nothing_is_dropped_or_added_up_where_nothing_is_learned():
    made, tokens = router(capacity_factor=0.5).eval(), hidden()
    assert (made(tokens)[1].sum(1) == 2).all()
    made.train()
    with torch.no_grad():
        assert (made(tokens)[1].sum(1) < 2).any(), "the first pass of a recomputed layer is the second's"
    assert made.totals.sums.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("ends", [[4, 4, 10], [0, 0, 0], [0, 10, 10], [10, 10, 10]])
@pytest.mark.parametrize("width", [8, 6], ids=["grouped", "one after the other"])
def test_grouped_product_is_that_of_each_group(ends, width):
    ours = torch.randn(ends[-1], 8, requires_grad=True), torch.randn(3, width, 8, requires_grad=True)
    theirs = tuple(tensor.detach().clone().requires_grad_() for tensor in ours)
    assert experts.has_grouped_kernel(*ours) == (width == 8)
    product = grouped_linear(*ours, torch.tensor(ends))
    starts = [0, *ends[:-1]]
    parts = [theirs[0][start:end] @ theirs[1][i].T for i, (start, end) in enumerate(zip(starts, ends, strict=True))]
    expected = torch.cat(parts)
    torch.testing.assert_close(product, expected)
    gradient = torch.randn_like(expected)
    product.backward(gradient)
    expected.backward(gradient)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_experts_are_swiglu_networks_times_the_weight():
    made = GroupedExperts(3, CONFIG, SimpleNamespace(expt_tp=ALONE))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    tokens, weights, counts = torch.randn(5, MIXTURE.hidden_size), torch.rand(5), torch.tensor([2, 0, 3])
    output, bias = made(tokens, counts, weights)
    expected = []
    for token, weight, expert in zip(tokens, weights, (0, 0, 2, 2, 2), strict=True):
        gate, up = (made.gate_up.weight[expert] @ token).chunk(2)
        expected.append(weight * (made.down.weight[expert] @ (silu(gate) * up)))
    torch.testing.assert_close(output, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert bias is None


@torch.no_grad()
def test_experts_and_their_neurons_count_by_what_they_add_to_the_residual_stream():
    made = GroupedExperts(3, CONFIG, SimpleNamespace(expt_tp=ALONE))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    tokens, weights, counts = torch.randn(5, MIXTURE.hidden_size), torch.rand(5), torch.tensor([2, 0, 3])
    groups = {"sequence_group": ALONE, "context_group": ALONE, "expert_tensor_group": ALONE}
    share = Share(tensor_rank=0, context_rank=0, experts=range(3, 6), **groups)
    observer = Observer(MIXTURE, torch.device("cpu"), share, num_micro_batches=2)
    made.down.register_forward_hook(partial(observer._on_experts, 1))
    for _ in range(3):  # of which an interleaved schedule added the last
        output, _ = made(tokens, counts, weights)
    added_LE, neurons_LEF = observer.sums.experts_LE, observer.sums.ffn_LEF
    for expert, at in {3: slice(0, 2), 4: slice(2, 2), 5: slice(2, 5)}.items():
        gate, up = (tokens[at] @ made.gate_up.weight[expert - 3].T).chunk(2, dim=1)
        inner = weights[at, None] * silu(gate) * up
        assert added_LE[1, expert].item() == pytest.approx(2 * output[at].square().sum().item(), rel=1e-5)
        torch.testing.assert_close(neurons_LEF[1, expert], 2 * inner.square().sum(0).double(), rtol=1e-4, atol=1e-6)
    assert added_LE[1, 3] > 0 and added_LE[1, :3].sum() == added_LE[0].sum() == 0
