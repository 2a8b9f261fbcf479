"""The divergence and its gradient are those of plain torch, whole and in slices."""

import pytest
import torch
from tensor_watch import LargestFloat

from parallel import loss
from parallel.distillation import Distillation, read_teacher
from parallel.divergence import divergence_of
from parallel.engine import Logits
from parallel.head import loss_of_hidden
from parallel.inputs import Inputs

B, S, V = 2, 5, 11
ALL = slice(None)


def logits(seed):
    return 2.0 * torch.randn(B, S, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(student, teacher, direction, temperature):
    log_student = (student / temperature).log_softmax(-1)
    log_teacher = (teacher / temperature).log_softmax(-1)
    if direction == "forward":
        return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return (log_student.exp() * (log_student - log_teacher)).sum(-1)


def ours(student, teacher, direction, temperature, top_k=0):
    return divergence_of(
        student, said(teacher, temperature, top_k).at(ALL), None, direction=direction, temperature=temperature
    )


def said(teacher, temperature=1.0, top_k=0):
    """What is kept of a teacher with these logits: as hidden states and a head that returns them."""
    return read_teacher(temperature, top_k)(Logits(teacher, torch.eye(teacher.size(-1), dtype=teacher.dtype), None))


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


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_from_itself_is_zero_and_its_gradient_too(direction):
    same = logits(1).float()
    value, gradient = value_and_gradient(lambda x: ours(x, same, direction, 2.0), same)
    assert value.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("top_k", "atol"), [(V, 1e-6), (V - 1, 1e-5)])  # the rest is 1 less a sum in float32
def test_where_the_rest_is_one_token_or_none_a_few_logits_say_what_all_say(direction, top_k, atol):
    student, teacher = logits(1).float(), logits(2).float()
    few = value_and_gradient(lambda x: ours(x, teacher, direction, 2.0, top_k), student)
    every = value_and_gradient(lambda x: ours(x, teacher, direction, 2.0), student)
    torch.testing.assert_close(few[0], every[0], rtol=1e-5, atol=atol)
    torch.testing.assert_close(few[1], every[1], rtol=1e-5, atol=atol)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("top_k", [1, 4])
def test_divergence_of_the_likeliest_is_that_of_them_and_the_rest_as_one_outcome(direction, top_k):
    student, teacher = logits(1).float(), logits(2).float()
    ids = teacher.topk(top_k).indices

    def outcomes(x):
        likeliest = x.softmax(-1).gather(-1, ids)
        return torch.cat([likeliest, 1 - likeliest.sum(-1, keepdim=True)], dim=-1).log()

    mine = value_and_gradient(lambda x: ours(x, teacher, direction, 1.0, top_k), student)
    its = value_and_gradient(lambda x: reference(outcomes(x), outcomes(teacher), direction, 1.0), student)
    torch.testing.assert_close(mine[0], its[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine[1], its[1], rtol=1e-5, atol=1e-6)
    every = ours(student, teacher, direction, 1.0)
    assert (mine[0] > 0).all() and (mine[0] <= every + 1e-6).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_of_the_likeliest_is_finite_where_one_side_leaves_nothing_to_others(direction):
    sure, flat = torch.zeros(B, S, V), torch.zeros(B, S, V)
    sure[..., 0] = 200.0
    for student, teacher in ((sure, flat), (flat, sure), (sure, sure)):
        value, gradient = value_and_gradient(lambda x, t=teacher: ours(x, t, direction, 1.0, 3), student)
        assert value.isfinite().all() and gradient.isfinite().all() and (value >= -1e-5).all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_loss_is_a_mix_of_divergence_and_cross_entropy_and_its_gradient_theirs(weight):
    student, teacher = logits(1).float(), logits(2).float()
    labels, mask = torch.arange(B * S).view(B, S) % V, torch.ones(B, S)
    mask[0, :3] = 0.0
    mine, its = student.clone().requires_grad_(), student.clone().requires_grad_()
    found = Distillation(teacher=said(teacher, 2.0), weight=weight, temperature=2.0)(mine, labels, mask, None)
    divergence = (reference(its, teacher, "forward", 2.0) * mask).sum()
    cross_entropy = (torch.nn.functional.cross_entropy(its.transpose(1, 2), labels, reduction="none") * mask).sum()
    expected = weight * 4.0 * divergence + (1 - weight) * cross_entropy
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-6)
    found.loss.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, its.grad, rtol=1e-5, atol=1e-6)
    assert found.num_tokens == mask.sum()


@pytest.mark.parametrize("top_k", [0, 4])
def test_slices_add_up_to_all(monkeypatch, top_k):
    student, teacher = logits(1).float(), logits(2).float()
    labels, mask = torch.zeros(B, S, dtype=torch.int64), torch.rand(B, S)
    whole = Distillation(teacher=said(teacher, top_k=top_k))(student, labels, mask, None)
    monkeypatch.setattr(loss, "LOGIT_BYTES", 4 * B * V * 2)
    lesson = Distillation(teacher=said(teacher, top_k=top_k))
    parts = loss.parts_of_tokens(B, S, V)
    assert len(parts) == 3
    found = [lesson.at(part)(student[:, part], labels[:, part], mask[:, part], None) for part in parts]
    torch.testing.assert_close(sum(each.loss for each in found), whole.loss, rtol=1e-6, atol=1e-6)
    for name, value in whole.metrics.items():
        torch.testing.assert_close(sum(each.metrics[name] for each in found), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 4])
def test_no_float32_logits_of_all_tokens_exist_of_teacher_or_student(monkeypatch, top_k):
    """Through both heads and back: what torch makes is never larger than a slice, and the sums are those of all."""
    tokens, hidden, vocabulary = 512, 64, 512
    generator = torch.Generator().manual_seed(3)
    teacher, states = (torch.randn(1, tokens, hidden, generator=generator) for _ in range(2))
    heads = [torch.randn(vocabulary, hidden, generator=generator) / 8 for _ in range(2)]
    labels = torch.arange(tokens).view(1, tokens)
    inputs = Inputs(labels, labels, torch.ones(1, tokens), labels)
    found = []
    for limit in (10**9, 64 * vocabulary * 4):
        monkeypatch.setattr(loss, "LOGIT_BYTES", limit)
        student, weight = states.clone().requires_grad_(), torch.nn.Parameter(heads[1].clone())
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(vocabulary, hidden), True
        with LargestFloat() as largest:
            lesson = Distillation(teacher=read_teacher(2.0, top_k)(Logits(teacher, heads[0], None)), weight=0.5)
            sums = loss_of_hidden(lesson, student, weight, inputs, None)
            sums.loss.backward()
        found.append((sums.loss.detach(), student.grad, weight.main_grad, largest.num_bytes))
    (*whole, most), (*sliced, least) = found
    assert least <= 64 * vocabulary * 4 < most
    for mine, its in zip(sliced, whole, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="one vocabulary"):
        ours(logits(1)[..., :-1], logits(2), "forward", 1.0)
