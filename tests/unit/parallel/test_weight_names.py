from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from model_samples import MIXTURE, MODEL

from conf.schema import ModelConfig
from parallel.weight_names import boxes_of_parameter, experts_of_rank, logical_shapes, num_parameters

LAYER = (
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)
REPLICATED = ("layernorm.weight", "norm.weight")


def parameters(model: ModelConfig) -> list[str]:
    layers = [f"decoder.layers.{layer}.{name}" for layer in range(model.num_layers) for name in LAYER]
    output = [] if model.tied_embeddings else ["output_layer.weight"]
    return ["embedding.word_embeddings.weight", *layers, "decoder.final_layernorm.weight", *output]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_tensor_ranks_hold_every_element_once_and_norms_whole(tied, tensor_size):
    model = replace(MODEL, tied_embeddings=tied)
    counts = {name: np.zeros(shape, dtype=int) for name, shape in logical_shapes(model).items()}
    for tensor_rank in range(tensor_size):
        for parameter in parameters(model):
            for box in boxes_of_parameter(
                model, parameter, first_layer=0, tensor_rank=tensor_rank, tensor_size=tensor_size
            ):
                assert box.global_shape == counts[box.name].shape
                place = tuple(slice(start, start + size) for start, size in zip(box.offset, box.shape, strict=True))
                counts[box.name][place] += 1
    for name, count in counts.items():
        assert (count == (tensor_size if name.endswith(REPLICATED) else 1)).all(), name


def test_fused_attention_weight_is_interleaved_by_key_value_head():
    boxes = boxes_of_parameter(
        MODEL, "decoder.layers.1.self_attention.linear_qkv.weight", first_layer=1, tensor_rank=1, tensor_size=2
    )
    kinds = [box.name.removeprefix("model.layers.2.self_attn.").removesuffix("_proj.weight") for box in boxes]
    assert kinds == ["q", "k", "v", "q", "k", "v"]
    assert [box.offset[0] for box in boxes] == [24, 12, 12, 36, 18, 18]
    assert [box.shape for box in boxes] == [(12, 24), (6, 24), (6, 24)] * 2


def test_tied_model_has_no_output_weight_and_its_copy_is_the_embedding():
    tied = replace(MODEL, tied_embeddings=True)
    assert "lm_head.weight" not in logical_shapes(tied)
    assert num_parameters(MODEL) - num_parameters(tied) == MODEL.vocab_size * MODEL.hidden_size
    (box,) = boxes_of_parameter(tied, "output_layer.weight", first_layer=0, tensor_rank=0, tensor_size=1)
    assert box.name == "model.embed_tokens.weight"


@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("expert_size", [1, 2, 3])
def test_expert_and_tensor_ranks_hold_every_element_of_the_experts_once(tensor_size, expert_size):
    shapes = {name: shape for name, shape in logical_shapes(MIXTURE).items() if ".experts." in name}
    counts = {name: np.zeros(shape, dtype=int) for name, shape in shapes.items()}
    for layer, tensor_rank, expert_rank in product(range(MIXTURE.num_layers), range(tensor_size), range(expert_size)):
        experts = experts_of_rank(MIXTURE, expert_rank, expert_size)
        assert len(experts) == 6 // expert_size
        for name in ("gate_up.weight", "down.weight"):
            parameter = f"decoder.layers.{layer}.mlp.experts.{name}"
            part = {"tensor_rank": tensor_rank, "tensor_size": tensor_size, "experts": experts}
            for box in boxes_of_parameter(MIXTURE, parameter, first_layer=0, **part):
                assert box.global_shape == shapes[box.name]
                place = tuple(slice(start, start + size) for start, size in zip(box.offset, box.shape, strict=True))
                counts[box.name][place] += 1
    assert all((count == 1).all() for count in counts.values())


def test_experts_of_a_rank_are_stacked_gate_above_up():
    part = {"first_layer": 1, "tensor_rank": 1, "tensor_size": 2, "experts": range(2, 4)}
    gate_up = boxes_of_parameter(MIXTURE, "decoder.layers.0.mlp.experts.gate_up.weight", **part)
    layer = "model.layers.1.block_sparse_moe."
    names = [f"{layer}experts.{expert}.{name}.weight" for expert in (2, 3) for name in ("w1", "w3")]
    assert [box.name for box in gate_up] == names
    assert {(box.offset, box.shape) for box in gate_up} == {((20, 0), (20, 24))}
    down = boxes_of_parameter(MIXTURE, "decoder.layers.0.mlp.experts.down.weight", **part)
    assert [(box.name, box.offset, box.shape) for box in down] == [
        (f"{layer}experts.{expert}.w2.weight", (0, 20), (24, 20)) for expert in (2, 3)
    ]
    (router,) = boxes_of_parameter(MIXTURE, "decoder.layers.0.mlp.router.weight", **part)
    assert (router.name, router.shape) == (f"{layer}gate.weight", (6, 24))


def test_mixture_has_the_weights_its_configuration_counts():
    assert num_parameters(MIXTURE) == MIXTURE.num_parameters
    assert not any(".mlp." in name for name in logical_shapes(MIXTURE))


def test_unknown_parameter_is_a_bug_that_is_noticed():
    with pytest.raises(AssertionError, match=r"linear_fc1\.bias"):
        boxes_of_parameter(MODEL, "decoder.layers.0.mlp.linear_fc1.bias", first_layer=0, tensor_rank=0, tensor_size=1)
    with pytest.raises(AssertionError, match="experts should not have: bias"):
        boxes_of_parameter(MIXTURE, "decoder.layers.0.mlp.experts.bias", first_layer=0, tensor_rank=0, tensor_size=1)
