from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from parallel.cpu import _keep_sent_tensors, adapt_megatron, tensors_as_on_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is adapted where CUDA is present")


@pytest.fixture(scope="module", autouse=True)
def adapted() -> None:
    import megatron.core.fusions.fused_bias_swiglu
    import megatron.core.pipeline_parallel.schedules
    import megatron.core.tensor_parallel.random  # noqa: F401

    adapt_megatron()


def test_megatron_allocates_on_the_cpu_and_everyone_else_is_told_that_there_is_no_cuda():
    from megatron.core.pipeline_parallel import schedules

    assert schedules.torch.zeros(2, device="cuda").device.type == "cpu"
    assert schedules.torch.cuda.current_device() == torch.device("cpu")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(2, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()


def test_adapting_twice_changes_nothing():
    from megatron.core.pipeline_parallel import p2p_communication

    before = p2p_communication._p2p_ops
    adapt_megatron()
    assert p2p_communication._p2p_ops is before


def test_sent_tensors_are_aliases_that_survive_being_freed():
    kept: dict[str, torch.Tensor] = {}
    module = SimpleNamespace(_p2p_ops=lambda **given: kept.update(given))
    _keep_sent_tensors(module)
    sent = torch.ones(3)
    module._p2p_ops(tensor_send_prev=None, tensor_send_next=sent)
    sent.data = torch.empty(1)  # as Megatron does once it has handed the tensor over
    assert kept["tensor_send_next"].tolist() == [1.0, 1.0, 1.0]


def test_swiglu_has_the_gradient_that_autograd_finds():
    from megatron.core.fusions.fused_bias_swiglu import SwiGLUFunction

    gate_up = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    gate, up = gate_up.chunk(2, dim=-1)
    outgoing = torch.randn(5, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad(torch.nn.functional.silu(gate) * up, gate_up, outgoing)
    (found,) = torch.autograd.grad(SwiGLUFunction.apply(gate_up, False, False), gate_up, outgoing)
    torch.testing.assert_close(found, expected)


def test_rotation_is_megatrons_to_the_last_bit():
    from megatron.core.models.common.embeddings import rope_utils

    heads, angles = torch.randn(6, 2, 3, 8), torch.randn(6, 1, 1, 4).repeat(1, 1, 1, 2)
    turned = rope_utils._rotate_half(heads, False)
    assert torch.equal(
        rope_utils._apply_rotary_pos_emb_bshd(heads, angles, rotary_interleaved=False),
        heads * angles.cos() + turned * angles.sin(),
    )


def test_types_are_named_as_on_cuda_only_while_asked_for():
    tensor = torch.ones(1, dtype=torch.bfloat16)
    with tensors_as_on_cuda():
        assert tensor.type() == "torch.cuda.BFloat16Tensor"
        assert tensor.cuda() is tensor
    assert tensor.type() == "torch.BFloat16Tensor"
