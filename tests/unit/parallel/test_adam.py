from __future__ import annotations

import pytest
import torch

from conf.schema import OptimConfig
from parallel import adam

OPTIM = OptimConfig(
    learning_rate=1e-2,
    final_learning_rate_ratio=0.0,
    schedule="cosine",
    warmup_fraction=0.0,
    decay_fraction=0.0,
    beta1=0.8,
    beta2=0.9,
    epsilon=1e-6,
    weight_decay=0.3,
    clip_grad_norm=0.0,
)


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]


def take_steps(optimizer: torch.optim.AdamW, matrix: torch.Tensor, norm: torch.Tensor, steps: range) -> None:
    for step in steps:
        matrix.grad, norm.grad = torch.full_like(matrix, 0.1 * step - 0.2), torch.full_like(norm, 0.3 - 0.1 * step)
        one = torch.tensor(1.0)
        adam.prepare_step(optimizer, divisor=one, skip=1 - one, learning_rate=1e-2 * (step + 1))
        optimizer.step()


def test_only_matrices_are_decayed():
    matrix, norm = parameters()
    before = matrix.detach().clone(), norm.detach().clone()
    optimizer = adam.make_adam([matrix, norm], OPTIM)
    adam.make_state(optimizer)
    matrix.grad, norm.grad = torch.zeros_like(matrix), torch.zeros_like(norm)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), before[0] * (1 - 1e-2 * 0.3))
    assert torch.equal(norm.detach(), before[1])


def test_state_made_at_once_gives_the_steps_of_state_made_lazily():
    ours, theirs = parameters(), parameters()
    eager, lazy = adam.make_adam(ours, OPTIM), adam.make_adam(theirs, OPTIM)
    adam.make_state(eager)
    take_steps(eager, *ours, range(4))
    take_steps(lazy, *theirs, range(4))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_restored_moments_and_step_count_continue_to_the_last_bit():
    straight, stopped = parameters(), parameters()
    optimizer, first = adam.make_adam(straight, OPTIM), adam.make_adam(stopped, OPTIM)
    adam.make_state(optimizer)
    adam.make_state(first)
    take_steps(optimizer, *straight, range(6))
    take_steps(first, *stopped, range(3))
    second = adam.make_adam(stopped, OPTIM)
    adam.make_state(second)
    for parameter in stopped:
        for name, moment in adam.moments_of(first, parameter).items():
            adam.moments_of(second, parameter)[name].copy_(moment)
    adam.set_num_steps(second, 3)
    take_steps(second, *stopped, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(straight, stopped, strict=True))


def test_gradients_are_divided_within_the_step():
    ours, theirs = parameters(), parameters()
    divided, scaled = adam.make_adam(ours, OPTIM), adam.make_adam(theirs, OPTIM)
    adam.make_state(divided)
    for parameter, other in zip(ours, theirs, strict=True):
        parameter.grad, other.grad = torch.full_like(parameter, 3.0), torch.full_like(parameter, 0.75)
    adam.prepare_step(divided, divisor=torch.tensor(4.0), skip=torch.tensor(0.0), learning_rate=1e-2)
    divided.step()
    scaled.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_skipped_step_changes_nothing_not_even_the_count():
    matrix, norm = parameters()
    before = matrix.detach().clone(), norm.detach().clone()
    optimizer = adam.make_adam([matrix, norm], OPTIM)
    adam.make_state(optimizer)
    matrix.grad, norm.grad = torch.full_like(matrix, float("nan")), torch.ones_like(norm)
    adam.prepare_step(optimizer, divisor=torch.tensor(1.0), skip=torch.tensor(1.0), learning_rate=1e-2)
    optimizer.step()
    assert torch.equal(matrix, before[0]) and torch.equal(norm, before[1])
    for parameter in (matrix, norm):
        assert optimizer.state[parameter]["step"] == 0
        assert all((moment == 0).all() for moment in adam.moments_of(optimizer, parameter).values())


@pytest.mark.parametrize("name", adam.MOMENTS)
def test_fresh_state_is_that_of_no_steps(name):
    (matrix, norm) = parameters()
    optimizer = adam.make_adam([matrix, norm], OPTIM)
    adam.make_state(optimizer)
    assert all((adam.moments_of(optimizer, parameter)[name] == 0).all() for parameter in (matrix, norm))
