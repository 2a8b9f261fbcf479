"""The model: Megatron-core's GPTModel as a Llama-shaped decoder with our norm, attention and experts."""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from conf.schema import EngineConfig, ModelConfig
from parallel.attention import CausalAttention
from parallel.documents import Documents
from parallel.experts import moe_layer
from parallel.mesh import Mesh
from parallel.norm import RMSNorm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Selective: the MLP (or the experts, so tokens are sent once more), whose activations are most of a layer's; fused
# attention keeps no scores to save.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class Decoder(GPTModel):  # type: ignore[misc]
    """Megatron's decoder, whose rotary angles begin anew with every document of a row where it is told of them."""

    def _preprocess(self, *args: Any, packed_seq_params: Documents | None = None, **kwargs: Any) -> tuple[Any, ...]:
        hidden, angles, *others = super()._preprocess(*args, **kwargs)
        if self.pre_process:
            # Embeddings of a single row have the strides of rows first, which would make a compiled graph of its own.
            hidden = hidden.flatten(0, 1).view(hidden.shape)
        if packed_seq_params is not None:
            of_places = self.rotary_pos_emb.get_emb(packed_seq_params.row_length).flatten(1)
            angles = of_places[packed_seq_params.position_ids_SB].unsqueeze(2)
        return hidden, angles, *others


def transformer_config(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> TransformerConfig:
    """Megatron's description of the model and its layout."""
    dtype = DTYPES[engine.weight_precision]
    virtual = engine.mesh.virtual_pipeline
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        # Weights come from a TensorSource.
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=engine.weight_precision == "bf16",
        # Losses and gradients are sums over tokens; the engine divides by the global count.
        calculate_per_token_loss=True,
        tensor_model_parallel_size=mesh.tensor,
        sequence_parallel=engine.sequence_parallel,
        context_parallel_size=mesh.context,
        pipeline_model_parallel_size=mesh.pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        # Waits for the device after every exchange, against a bug of torch before 2.0.
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=True,
        **RECOMPUTE[engine.recompute],
        **_experts_config(model, mesh),
    )


def _experts_config(model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    if model.experts is None:
        return {}
    return {
        "num_moe_experts": model.experts.num_experts,
        "moe_router_topk": model.experts.num_experts_per_token,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_expert_capacity_factor": model.experts.capacity_factor,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",  # the losses are our router's
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": mesh.expert,
        "expert_tensor_parallel_size": mesh.tensor,
    }


def build_chunks(model: ModelConfig, engine: EngineConfig, mesh: Mesh) -> list[Any]:
    """The GPTModel chunks of this pipeline rank, `engine.mesh.virtual_pipeline` of them, with undefined weights.

    Megatron's groups must be those of the mesh (`groups.enter_mesh`).
    """
    config = transformer_config(model, engine, mesh)
    virtual = engine.mesh.virtual_pipeline
    return [_build_chunk(model, config, stage if virtual > 1 else None) for stage in range(virtual)]


def first_layer_of(chunk: Any) -> int:
    """Number in the model, from 0, of the chunk's first layer."""
    return cast(int, chunk.decoder.layers[0].layer_number) - 1


def _build_chunk(model: ModelConfig, config: TransformerConfig, stage: int | None) -> Any:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.submodules.core_attention = CausalAttention
    if model.experts is not None:
        layer.submodules.mlp = moe_layer(model.experts)
    num_layers = get_num_layers_to_build(config, vp_stage=stage)
    return Decoder(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_theta,
        vp_stage=stage,
    )
