"""The engine on one GPU; skipped where there is none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.settings import OPTIM, dense_model, engine_of, random_batches
from conf.schema import EngineConfig
from data.batch import Batch, positions_in_documents
from parallel import offload
from parallel.mesh import Mesh

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("world"),
]

MODEL = dense_model(
    name="small",
    num_layers=2,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=512,
    max_sequence_length=256,
)
MESH = Mesh()


def engine_config(precision: str, **changes: object) -> EngineConfig:
    return engine_of(**({"precision": precision, "zero_stage": 1, "overlap": True} | changes))


def batch() -> Batch:
    (one,) = random_batches(MODEL, count=1, rows=2, tokens=256)
    return one


def packed_batch() -> Batch:
    """Three documents in one row and one in the other."""
    starts = np.zeros((2, 256), dtype=np.bool_)
    starts[0, [70, 171]] = True
    return replace(batch(), position_ids_BS=positions_in_documents(starts))


def losses(config: EngineConfig, num_steps: int = 8, given: Batch | None = None) -> list[float]:
    from parallel.engine import make_engine
    from parallel.initial import InitialWeights
    from parallel.loss import CrossEntropy

    engine = make_engine(MODEL, config, OPTIM, MESH, micro_batch=2)
    engine.load_weights(InitialWeights(MODEL, 0))
    found = [engine.step([given or batch()], CrossEntropy(), learning_rate=1e-3).loss for _ in range(num_steps)]
    assert engine.peak_memory_bytes() > 4 * engine.num_parameters
    engine.close()
    return found


def test_bf16_follows_fp32_and_learns_its_batch_by_heart():
    single, half = losses(engine_config("fp32")), losses(engine_config("bf16"))
    assert half == pytest.approx(single, abs=0.02)
    assert half[-1] < half[0] - 0.5


@pytest.mark.parametrize("changes", [{"recompute": "full"}, {"recompute": "selective"}, {"overlap": False}], ids=str)
def test_saving_memory_or_waiting_does_not_change_the_numbers(changes):
    assert losses(engine_config("bf16", **changes)) == pytest.approx(losses(engine_config("bf16")), abs=1e-3)


@pytest.mark.parametrize("changes", [{}, {"recompute": "full"}, {"compile": True}, {"backend": "deepspeed"}], ids=str)
def test_activations_go_to_host_memory_and_come_back(monkeypatch, changes):
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 0)
    found = losses(engine_config("bf16", **changes, offload_activations=True))
    assert found == pytest.approx(losses(engine_config("bf16", **changes)), abs=1e-3)


def test_offloaded_activations_leave_the_device():
    """Peak of a forward and backward pass of a deep model: two layers' activations in place of sixteen's."""
    from parallel.engine import make_engine
    from parallel.initial import InitialWeights
    from parallel.loss import CrossEntropy

    deep, tokens = replace(MODEL, num_layers=16, max_sequence_length=8192), 8192
    given = random_batches(deep, count=1, rows=2, tokens=tokens)
    taken = {}
    for offloaded in (False, True):
        engine = make_engine(deep, engine_config("bf16", offload_activations=offloaded), OPTIM, MESH, micro_batch=2)
        engine.load_weights(InitialWeights(deep, 0))
        engine.step(given, CrossEntropy(), learning_rate=1e-4)
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        engine.step(given, CrossEntropy(), learning_rate=1e-4)
        taken[offloaded] = torch.cuda.max_memory_allocated() - held
        engine.close()
    assert taken[True] < taken[False] / 3


def test_compiled_layers_take_the_same_steps():
    assert losses(engine_config("fp32", compile=True)) == pytest.approx(losses(engine_config("fp32")), abs=1e-4)
    assert losses(engine_config("bf16", compile=True)) == pytest.approx(losses(engine_config("bf16")), abs=0.02)


@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"recompute": "full"}], ids=str)
def test_documents_by_their_lengths_are_those_one_by_one(changes):
    """bf16 takes the kernel that knows lengths, fp32 the loop over documents."""
    single = losses(engine_config("fp32"), given=packed_batch())
    half = losses(engine_config("bf16", **changes), given=packed_batch())
    assert half == pytest.approx(single, abs=0.02)
    assert half[-1] < half[0] - 0.5


@pytest.mark.parametrize("precision", ["fp8", "fp8_rowwise"])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_fp8_follows_bf16(precision, is_compiled):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    found = losses(engine_config(precision, compile=is_compiled))
    assert found == pytest.approx(losses(engine_config("bf16")), abs=0.1)
    assert found[-1] < found[0] - 0.5


def test_weight_gradient_is_added_in_the_epilogue_of_the_product():
    from parallel.linear import accumulate_product

    torch.manual_seed(0)
    inputs = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    gradient = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    main_grad = torch.randn(256, 128, device="cuda")
    expected = main_grad.double() + gradient.double().t() @ inputs.double()
    accumulate_product(inputs, gradient, main_grad)
    # Float32 all the way: a bf16 product in between would be off by 0.1.
    torch.testing.assert_close(main_grad.double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_fp8_products_are_near_the_exact_ones(scaling):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    from parallel.linear import fp8_product

    torch.manual_seed(0)
    inputs = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    main_grad = torch.zeros(256, 128, device="cuda")
    output = fp8_product(inputs, weight, main_grad, scaling)
    output.backward(gradient)
    for found, exact in (
        (output, inputs.double() @ weight.double().t()),
        (inputs.grad, gradient.double() @ weight.double()),
        (main_grad, gradient.double().t() @ inputs.double()),
    ):
        assert (found.double() - exact).norm() < 0.1 * exact.norm()


def test_the_device_never_waits_for_the_host_in_a_step():
    """CUDA itself refuses every synchronising call but the wait for the outcome's own event."""
    from parallel.engine import make_engine
    from parallel.initial import InitialWeights
    from parallel.loss import CrossEntropy

    engine = make_engine(MODEL, engine_config("bf16"), OPTIM, MESH, micro_batch=2)
    engine.load_weights(InitialWeights(MODEL, 0))
    engine.step([batch(), packed_batch()], CrossEntropy(), learning_rate=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step([batch(), packed_batch()], CrossEntropy(), learning_rate=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.close()


def test_step_that_is_not_finite_changes_nothing():
    from parallel.engine import make_engine
    from parallel.initial import InitialWeights
    from parallel.loss import CrossEntropy

    engine = make_engine(MODEL, engine_config("bf16"), OPTIM, MESH, micro_batch=2)
    engine.load_weights(InitialWeights(MODEL, 0))
    engine.step([batch()], CrossEntropy(), learning_rate=1e-3)
    before = [piece.tensor.clone() for piece in [*engine.weights(), *engine.optimizer_state()]]
    with pytest.raises(FloatingPointError):
        engine.step([batch()], CrossEntropy(z_loss=float("inf")), learning_rate=1e-3)
    after = [piece.tensor for piece in [*engine.weights(), *engine.optimizer_state()]]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    engine.close()


def test_logits_of_a_whole_batch_are_never_there():
    """Peak memory of the head and loss, forward and back, stays below bf16 logits of all tokens."""
    from parallel.head import loss_of_hidden
    from parallel.inputs import Inputs
    from parallel.loss import LOGIT_BYTES, CrossEntropy

    num_tokens, hidden, vocabulary = 32_768, 64, 65_536
    states = torch.randn(1, num_tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, hidden, device="cuda", dtype=torch.bfloat16))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(vocabulary, hidden, device="cuda"), True
    labels = torch.randint(vocabulary, (1, num_tokens), device="cuda")
    inputs = Inputs(labels, labels, torch.ones(1, num_tokens, device="cuda"), labels)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss_of_hidden(CrossEntropy(), states, weight, inputs, torch.distributed.group.WORLD).loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 5 * LOGIT_BYTES < 2 * num_tokens * vocabulary
    assert weight.main_grad.abs().sum() > 0


def test_attention_kernel_is_the_one_of_the_rule():
    from parallel.attention_kernel import TORCH_DECIDES, attention_kernel

    assert (attention_kernel().name != TORCH_DECIDES.name) == (torch.cuda.get_device_capability()[0] in (9, 10))


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 1},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        {"zero_stage": 2, "offload_optimizer": "nvme"},
        {"zero_stage": 3, "offload_optimizer": "nvme"},
    ],
    ids=str,
)
def test_deepspeed_does_not_change_the_numbers(changes, tmp_path):
    if changes.get("offload_optimizer") == "nvme":
        changes = changes | {"offload_directory": str(tmp_path)}
    found = losses(engine_config("bf16", backend="deepspeed", **changes))
    assert found == pytest.approx(losses(engine_config("bf16")), abs=1e-3)


@pytest.mark.parametrize("num_queries", [512, 128])
def test_attention_kernel_is_causal_attention(num_queries):
    from parallel.attention import attend_causally

    torch.manual_seed(0)
    query = torch.randn(2, 8, num_queries, 128, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 2, 2, 512, 128, device="cuda", dtype=torch.bfloat16).unbind(0)
    output = attend_causally(query, key, value, 1 / math.sqrt(128))

    key, value = (tensor.double().repeat_interleave(4, dim=1) for tensor in (key, value))
    scores = query.double() @ key.transpose(-1, -2) / math.sqrt(128)
    places = torch.arange(512, device="cuda")
    seen = places[None, :] <= places[512 - num_queries :, None]
    expected = scores.masked_fill(~seen, -math.inf).softmax(-1) @ value
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)


def test_scores_of_a_whole_row_are_never_there_in_float32():
    """Whose fused kernel has no shared key-value heads: the scores of these rows would take 2 GiB."""
    from parallel.attention import attend_causally
    from parallel.attention_kernel import attention_kernel

    query = torch.randn(1, 8, 8192, 64, device="cuda", requires_grad=True)
    key, value = (torch.randn(1, 2, 8192, 64, device="cuda", requires_grad=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend_causally(query, key, value, 0.125, attention_kernel()).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**28
    assert key.grad.shape == key.shape


@pytest.mark.parametrize("context", [1, 2])
def test_kernel_of_lengths_attends_and_learns_as_document_by_document(context):
    """Forward and backward, shared key-value heads, whole rows and the chunks of context ranks."""
    from parallel.attention import attend_by_lengths, attend_one_by_one, chunks_of_rank
    from parallel.attention_kernel import TORCH_DECIDES
    from parallel.documents import Documents

    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("FlashAttention needs Ampere or later")
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    positions = positions_in_documents(random.random((2, 512)) < 0.02)
    chunks, num_chunks = ((0,), 1) if context == 1 else (chunks_of_rank(1, context), 2 * context)
    documents = Documents(positions, chunks, num_chunks).to(torch.device("cuda", torch.cuda.current_device()))
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    query = torch.randn(512 // context, 2, 8, 64, **options)
    key, value = torch.randn(512, 2, 2, 64, **options), torch.randn(512, 2, 2, 64, **options)
    found = attend_by_lengths(query, key, value, documents, 0.125)
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = attend_one_by_one(*exact, documents, 0.125, TORCH_DECIDES)
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)
    pull = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, (query, key, value), pull.to(found.dtype))
    for mine, its in zip(gradients, torch.autograd.grad(expected, exact, pull), strict=True):
        assert (mine.double() - its).norm() < 0.02 * its.norm()
