"""The divergence and its gradient are those of plain torch."""

import pytest
import torch

from parallel.distillation import divergence_of, read_teacher

B, S, V = 2, 5, 11


def logits(seed):
    return 2.0 * torch.randn(B, S, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(student, teacher, direction, temperature):
    log_student = (student / temperature).log_softmax(-1)
    log_teacher = (teacher / temperature).log_softmax(-1)
    if direction == "forward":
        return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return (log_student.exp() * (log_student - log_teacher)).sum(-1)


def ours(student, teacher, direction, temperature, top_k=0):
    read = read_teacher(temperature, top_k)
    return divergence_of(student, read(teacher, None), None, direction=direction, temperature=temperature)


def value_and_gradient(function, student):
    student = student.clone().requires_grad_()
    value = function(student)
    weights = torch.arange(1.0, B * S + 1).view(B, S)
    (value * weights).sum().backward()
    return value.detach(), student.grad


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_and_gradient_are_those_of_torch(direction, temperature):
    student, teacher = logits(1).float(), logits(2).float()
    mine = value_and_gradient(lambda x: ours(x, teacher, direction, temperature), student)
    its = value_and_gradient(lambda x: reference(x, teacher, direction, temperature), student)
    torch.testing.assert_close(mine[0], its[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine[1], its[1], rtol=1e-5, atol=1e-6)


def test_divergence_from_itself_is_zero_and_its_gradient_too():
    same = logits(1).float()
    value, gradient = value_and_gradient(lambda x: ours(x, same, "forward", 2.0), same)
    assert value.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


def test_all_logits_by_their_ids_are_all_logits():
    student, teacher = logits(1).float(), logits(2).float()
    few = value_and_gradient(lambda x: ours(x, teacher, "forward", 2.0, top_k=V), student)
    every = value_and_gradient(lambda x: ours(x, teacher, "forward", 2.0), student)
    torch.testing.assert_close(few[0], every[0])
    torch.testing.assert_close(few[1], every[1], rtol=1e-5, atol=1e-6)


def test_largest_logits_leave_the_rest_out():
    student, teacher = logits(1).float(), logits(2).float()
    k = 3

    def by_hand(x):
        log_student, log_teacher = x.log_softmax(-1), teacher.log_softmax(-1)
        ids = teacher.topk(k).indices
        return (log_teacher.exp() * (log_teacher - log_student)).gather(-1, ids).sum(-1)

    mine = value_and_gradient(lambda x: ours(x, teacher, "forward", 1.0, top_k=k), student)
    its = value_and_gradient(by_hand, student)
    torch.testing.assert_close(mine[0], its[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine[1], its[1], rtol=1e-5, atol=1e-6)


def test_other_vocabulary_and_reverse_of_a_few_are_refused():
    with pytest.raises(ValueError, match="one vocabulary"):
        ours(logits(1)[..., :-1], logits(2), "forward", 1.0)
    with pytest.raises(ValueError, match="top_k=0"):
        ours(logits(1), logits(2), "reverse", 1.0, top_k=2)
