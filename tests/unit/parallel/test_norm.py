"""Normalisation on a CPU beside torch's own."""

from types import SimpleNamespace

import pytest
import torch

from parallel.norm import RMSNorm


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a kernel for GPUs")
def test_norm_and_its_gradients_are_those_of_torch_in_float64():
    torch.manual_seed(0)
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=False), 48, eps=1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    hidden = (torch.randn(7, 3, 48) * torch.logspace(-4, 2, 7)[:, None, None]).requires_grad_()
    outgoing = torch.randn(7, 3, 48)
    exact_hidden, exact_weight = (each.detach().double().requires_grad_() for each in (hidden, norm.weight))
    exact = torch.nn.functional.rms_norm(exact_hidden, (48,), exact_weight, 1e-5)
    found = norm(hidden)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    of_found = torch.autograd.grad(found, (hidden, norm.weight), outgoing)
    of_exact = torch.autograd.grad(exact, (exact_hidden, exact_weight), outgoing.double())
    for mine, true in zip(of_found, of_exact, strict=True):
        assert (mine.double() - true).abs().max() < 1e-6 * true.abs().max()
