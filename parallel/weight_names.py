"""Canonical names of weights, and which part of them each local parameter of Megatron's GPTModel is. Arithmetic only.

Canonical names and shapes are those of Hugging Face's LlamaForCausalLM, and with experts of MixtralForCausalLM as it is
stored: a matrix for each projection of each expert. Megatron fuses the query, key and value weights
(interleaved by key-value group) and the gate and up weights, numbers layers within a chunk, and slices over tensor
ranks: by rows, or by columns for the projections back into the residual stream. An expert rank's experts are stacked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.schema import ModelConfig
from parallel.boxes import Box

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
OUTPUT = "lm_head.weight"
# Within a layer.
ROUTER = "block_sparse_moe.gate.weight"
WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.router.weight": ROUTER,
}
"""What every tensor rank holds all of, by its name in Megatron."""


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every weight of the model, in the order of the forward pass."""
    vocabulary = (model.vocab_size, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: vocabulary}
    for layer in range(model.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(model).items()}
    shapes[FINAL_NORM] = (model.hidden_size,)
    if not model.tied_embeddings:
        shapes[OUTPUT] = vocabulary
    return shapes


def num_parameters(model: ModelConfig) -> int:
    """Weights of the whole model; tied embeddings count once."""
    return sum(math.prod(shape) for shape in logical_shapes(model).values())


def boxes_of_parameter(
    model: ModelConfig,
    parameter: str,
    *,
    first_layer: int,
    tensor_rank: int,
    tensor_size: int,
    experts: range = range(0),
) -> tuple[Box, ...]:
    """What the rows of a local parameter are, from top to bottom.

    Args:
        model: shape of the model.
        parameter: name in the GPTModel chunk, e.g. `decoder.layers.0.mlp.linear_fc1.weight`.
        first_layer: number in the model of the chunk's first layer, from 0.
        tensor_rank: of the rank that holds it.
        tensor_size: number of tensor ranks.
        experts: numbers of the experts that the rank holds in each layer.
    """
    part = _TensorPart(tensor_rank, tensor_size)
    vocabulary = (model.vocab_size, model.hidden_size)
    match parameter.split("."):
        case ["embedding", "word_embeddings", "weight"]:
            return (part.rows(EMBEDDING, vocabulary),)
        case ["output_layer", "weight"]:
            return (part.rows(EMBEDDING if model.tied_embeddings else OUTPUT, vocabulary),)
        case ["decoder", "final_layernorm", "weight"]:
            return (part.whole(FINAL_NORM, (model.hidden_size,)),)
        case ["decoder", "layers", number, *rest]:
            layer = f"model.layers.{first_layer + int(number)}."
            shapes = {layer + name: shape for name, shape in _layer_shapes(model).items()}
            if rest[:2] == ["mlp", "experts"]:
                return _boxes_of_experts(".".join(rest[2:]), layer, shapes, part, experts)
            return _boxes_in_layer(model, ".".join(rest), layer, shapes, part)
    raise AssertionError(f"Megatron has a parameter that the model should not have: {parameter}")


def experts_of_rank(model: ModelConfig, expert_rank: int, expert_size: int) -> range:
    """Numbers of the experts that an expert rank holds in each layer; none in a dense model."""
    num_experts = model.experts.num_experts if model.experts else 0
    share = num_experts // expert_size
    return range(expert_rank * share, (expert_rank + 1) * share)


def _layer_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden = model.hidden_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
    } | _feed_forward_shapes(model)


def _feed_forward_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    up, down = (model.ffn_hidden_size, model.hidden_size), (model.hidden_size, model.ffn_hidden_size)
    if model.experts is None:
        return {"mlp.gate_proj.weight": up, "mlp.up_proj.weight": up, "mlp.down_proj.weight": down}
    shapes: dict[str, tuple[int, ...]] = {ROUTER: (model.experts.num_experts, model.hidden_size)}
    for expert in range(model.experts.num_experts):
        shapes |= dict(zip(_expert_names(expert), (up, up, down), strict=True))
    return shapes


def of_any_expert(name: str) -> tuple[str, int]:
    """A name within a layer without the number of its expert, and that number: 0 where there is none.

    >>> of_any_expert("block_sparse_moe.experts.3.w1.weight")
    ('block_sparse_moe.experts.w1.weight', 3)
    """
    match name.split("."):
        case ["block_sparse_moe", "experts", number, *rest]:
            return ".".join(("block_sparse_moe", "experts", *rest)), int(number)
    return name, 0


def of_expert(name: str, expert: int) -> str:
    """The other way round: the name of an expert's weight; all others stay as they are."""
    return name.replace("block_sparse_moe.experts.", f"block_sparse_moe.experts.{expert}.")


def _expert_names(expert: int) -> tuple[str, str, str]:
    """The gate, up and down projections of an expert, within a layer."""
    gate, up, down = (f"block_sparse_moe.experts.{expert}.{name}.weight" for name in ("w1", "w3", "w2"))
    return gate, up, down


def _boxes_in_layer(
    model: ModelConfig, parameter: str, layer: str, shapes: dict[str, tuple[int, ...]], part: _TensorPart
) -> tuple[Box, ...]:
    def rows(name: str, index: int = 0, count: int = 1) -> Box:
        return part.rows(layer + name, shapes[layer + name], index, count)

    def columns(name: str) -> Box:
        return part.columns(layer + name, shapes[layer + name])

    def whole(name: str) -> Box:
        return part.whole(layer + name, shapes[layer + name])

    if parameter in WHOLE:
        return (whole(WHOLE[parameter]),)
    match parameter:
        case "self_attention.linear_qkv.weight":
            groups = model.num_kv_heads // part.size
            heads = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
            return tuple(rows(name, group, groups) for group in range(groups) for name in heads)
        case "self_attention.linear_proj.weight":
            return (columns("self_attn.o_proj.weight"),)
        case "mlp.linear_fc1.weight":
            return rows("mlp.gate_proj.weight"), rows("mlp.up_proj.weight")
        case "mlp.linear_fc2.weight":
            return (columns("mlp.down_proj.weight"),)
    raise AssertionError(f"Megatron has a parameter that a layer should not have: {parameter}")


def _boxes_of_experts(
    parameter: str, layer: str, shapes: dict[str, tuple[int, ...]], part: _TensorPart, experts: range
) -> tuple[Box, ...]:
    names = [[layer + name for name in _expert_names(expert)] for expert in experts]
    match parameter:
        case "gate_up.weight":
            return tuple(part.rows(name, shapes[name]) for gate, up, _ in names for name in (gate, up))
        case "down.weight":
            return tuple(part.columns(down, shapes[down]) for _, _, down in names)
    raise AssertionError(f"Megatron has a parameter that experts should not have: {parameter}")


@dataclass(frozen=True, slots=True)
class _TensorPart:
    """A tensor rank's part of a weight."""

    rank: int
    size: int

    def whole(self, name: str, shape: tuple[int, ...]) -> Box:
        return Box(name, shape, (0,) * len(shape), shape)

    def rows(self, name: str, shape: tuple[int, ...], index: int = 0, count: int = 1) -> Box:
        """The `index`-th of `count` equal parts of this rank's rows."""
        num_rows = shape[0] // (self.size * count)
        return Box(name, shape, ((self.rank * count + index) * num_rows, 0), (num_rows, shape[1]))

    def columns(self, name: str, shape: tuple[int, ...]) -> Box:
        num_columns = shape[1] // self.size
        return Box(name, shape, (0, self.rank * num_columns), (shape[0], num_columns))
