"""Whom our step is compared with, each as its makers run it: Megatron-core's loop, Hugging Face and torchtitan.

All take the same micro-batches through the same shape with torch's fused AdamW, and clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.settings import OPTIM, dense_model, engine_of, random_batches
from parallel.mesh import Mesh

Step = Callable[[], float]
"""Takes a step and returns its loss."""

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
NUM_MICRO_BATCHES = 8 if ON_GPU else 4
SHAPE = dense_model(
    name="llama-3-8b-layer",
    num_layers=8 if ON_GPU else 4,
    hidden_size=4096 if ON_GPU else 256,
    ffn_hidden_size=14336 if ON_GPU else 896,
    num_attention_heads=32 if ON_GPU else 4,
    num_kv_heads=8 if ON_GPU else 2,
    head_dim=128 if ON_GPU else 64,
    vocab_size=32_000 if ON_GPU else 2_048,
    max_sequence_length=8192 if ON_GPU else 256,
)
ENGINE = engine_of(precision="bf16" if ON_GPU else "fp32")
BATCHES = random_batches(SHAPE, count=NUM_MICRO_BATCHES, rows=1, tokens=SHAPE.max_sequence_length)
"""The micro-batches of every step, one row each."""


def on_device() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of the micro-batches, each (1, S)."""
    return [
        (torch.from_numpy(batch.tokens_BS).to(DEVICE), torch.from_numpy(batch.labels_BS).to(DEVICE))
        for batch in BATCHES
    ]


def megatron(*, attention: str, compiled: bool = False) -> Step:
    """Megatron-core's own loop: its model, wrapper, loss, schedule and optimizer. `attention`: its own, or ours."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from parallel.attention import CausalAttention
    from parallel.cpu import adapt_megatron, tensors_as_on_cuda
    from parallel.model import transformer_config

    adapt_megatron()
    config = replace(transformer_config(SHAPE, ENGINE, Mesh()), perform_initialization=True)
    config.finalize_model_grads_func = finalize_model_grads
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if attention == "ours":
        spec.submodules.self_attention.submodules.core_attention = CausalAttention
    with tensors_as_on_cuda():
        model = GPTModel(
            config,
            spec,
            vocab_size=SHAPE.vocab_size,
            max_sequence_length=SHAPE.max_sequence_length,
            position_embedding_type="rope",
            rotary_base=SHAPE.rope_theta,
            share_embeddings_and_output_weights=False,
        ).to(DEVICE)
        if compiled:
            for layer in model.decoder.layers:
                layer.forward = torch.compile(layer.forward)
        wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=OPTIM.learning_rate,
                weight_decay=OPTIM.weight_decay,
                bf16=ON_GPU,
                params_dtype=DTYPE,
                clip_grad=OPTIM.clip_grad_norm,
            ),
            [wrapped],
            use_gloo_process_groups=False,
        )
    schedule, given = get_forward_backward_func(), on_device()
    length = SHAPE.max_sequence_length
    positions = torch.arange(length, device=DEVICE)[None]
    # Its own attention wants the mask written out where it cannot use its fused kernel.
    mask = None if attention == "ours" else torch.ones(1, 1, length, length, dtype=torch.bool, device=DEVICE).triu(1)

    def forward(iterator: Iterator[Any], chunk: Any) -> Any:
        tokens, labels = next(iterator)
        return chunk(tokens, positions, mask, labels=labels), summed

    def summed(losses: torch.Tensor) -> Any:
        total = losses.sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int, device=DEVICE), total.detach().clone()

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = schedule(
            forward_step_func=forward,
            data_iterator=iter(given),
            model=[wrapped],
            num_microbatches=len(given),
            seq_length=length,
            micro_batch_size=1,
            forward_only=False,
        )
        with tensors_as_on_cuda():  # it asserts types by name; some 0.1 ms
            optimizer.step()
        return (sum(losses) / (len(given) * length)).item()

    return step


def hugging_face(*, compiled: bool) -> Step:
    """LlamaForCausalLM, torch's AdamW on its fused kernel, and a loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.ffn_hidden_size,
        num_hidden_layers=SHAPE.num_layers,
        num_attention_heads=SHAPE.num_attention_heads,
        num_key_value_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        max_position_embeddings=SHAPE.max_sequence_length,
        attn_implementation="sdpa",
    )
    with DEVICE:
        model = LlamaForCausalLM(config).to(DTYPE)
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIM.learning_rate, weight_decay=0.1, fused=True)
    given = on_device()

    def step() -> float:
        optimizer.zero_grad()
        total = torch.zeros((), device=DEVICE)
        for tokens, labels in given:
            logits = model(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(logits, labels.flatten()) / len(given)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_grad_norm)
        optimizer.step()
        return total.item()

    return step


def torchtitan(*, compiled: bool) -> Step:
    """Its Llama 3 with its initialisation, compilation by block, sharding, loss, optimizer and clipping, in its order.

    Its causal attention without documents is the one of torch that it keeps for other models; those it has for language
    models (flex, varlen) have no backward pass on a CPU. On a GPU the blocks are wrapped in FSDP as in its own runs.
    """
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as titan
    from torchtitan.distributed.compile import apply_compile
    from torchtitan.models.llama3 import parallelize_llama

    compile_config = CompileConfig(enable=compiled)
    titan.set_spmd_backend(ParallelismConfig().spmd_backend)
    with torch.device("meta"):
        model = _titan_model().build()
    axes = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")
    dims = ParallelDims(**dict.fromkeys(axes, 1), world_size=1)
    if ON_GPU:
        parallelize_llama(
            model,
            parallel_dims=dims,
            training=TrainingConfig(),
            parallelism=ParallelismConfig(),
            compile_config=compile_config,
            ac_config=None,
            dump_folder="",
        )
    elif compiled:
        apply_compile(model, compile_config=compile_config, parallel_dims=dims)
    model.to_empty(device=DEVICE)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    model.train()
    objective = CrossEntropyLoss.Config(global_vocab_size=SHAPE.vocab_size).build(compile_config=compile_config)
    optimizer = default_adamw(lr=OPTIM.learning_rate).build(model_parts=[model])
    given = on_device()
    num_tokens = torch.tensor(len(given) * SHAPE.max_sequence_length, device=DEVICE)

    def step() -> float:
        optimizer.zero_grad()
        total = torch.zeros((), device=DEVICE)
        for tokens, labels in given:
            loss, _ = objective(model(tokens), labels, num_tokens)
            loss.backward()
            total += loss.detach()
        titan.clip_grad_norm_(list(model.parameters()), OPTIM.clip_grad_norm, foreach=True)
        optimizer.step()
        return total.item()

    return step


def _titan_model() -> Any:
    """Our shape, as torchtitan describes models: its 8B with other sizes."""
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import (
        _EMBEDDING_INIT,
        _NORM_INIT,
        Llama3Model,
        _build_llama3_layers,
        _output_linear_init,
    )

    width = SHAPE.hidden_size
    rope = ComplexRoPE.Config(dim=SHAPE.head_dim, max_seq_len=SHAPE.max_sequence_length, theta=SHAPE.rope_theta)
    layers = _build_llama3_layers(
        n_layers=SHAPE.num_layers,
        dim=width,
        n_heads=SHAPE.num_attention_heads,
        n_kv_heads=SHAPE.num_kv_heads,
        hidden_dim=SHAPE.ffn_hidden_size,
        rope=rope,
        attn_backend="flex",
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return Llama3Model.Config(
        dim=width,
        vocab_size=SHAPE.vocab_size,
        tok_embeddings=Embedding.Config(
            num_embeddings=SHAPE.vocab_size, embedding_dim=width, param_init=_EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=width, param_init=_NORM_INIT),
        lm_head=Linear.Config(in_features=width, out_features=SHAPE.vocab_size, param_init=_output_linear_init(width)),
        layers=layers,
    )
