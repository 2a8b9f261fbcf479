"""Arithmetic of the schema, against numbers from elsewhere."""

from dataclasses import replace

import pytest

from conf.load import compose


@pytest.fixture(scope="module")
def config():
    return compose(["recipe=foundation"])


def test_full_size_model_has_the_parameters_of_llama_3_70b(config):
    assert config.full_size.model.num_parameters == 70_553_706_496


def test_parameters_are_counted_matrix_by_matrix(config):
    model = replace(
        config.model,
        num_layers=3,
        hidden_size=10,
        ffn_hidden_size=7,
        num_attention_heads=4,
        num_kv_heads=2,
        head_dim=6,
        vocab_size=11,
    )
    query_and_output, key_and_value, mlp = 2 * 10 * 24, 2 * 10 * 12, 3 * 10 * 7
    matrices = 3 * (query_and_output + key_and_value + mlp)
    norms = 3 * 2 * 10 + 10
    assert model.num_parameters == matrices + norms + 2 * 110
    assert replace(model, tied_embeddings=True).num_parameters == matrices + norms + 110
    assert model.num_matmul_parameters == replace(model, tied_embeddings=True).num_matmul_parameters == matrices + 110


def test_mixture_of_experts_has_the_parameters_of_mixtral_8x7b():
    model = compose(["recipe=foundation", "model=mixtral_8x7b"]).full_size.model
    assert model.num_parameters == 46_702_792_704
    assert model.num_active_parameters == 12_879_925_248
    assert model.num_parameters - model.num_active_parameters == 6 * 32 * 3 * 4096 * 14336
    assert model.num_expert_parameters == 8 * 32 * 3 * 4096 * 14336


def test_token_is_multiplied_by_its_experts_and_the_router():
    model = compose(["recipe=foundation", "model=mixtral_8x7b"]).model
    dense = replace(model, experts=None, ffn_hidden_size=2 * model.ffn_hidden_size)
    router = model.num_layers * model.hidden_size * 8
    assert model.num_matmul_parameters == dense.num_matmul_parameters + router
    assert model.train_flops_per_token(128) == dense.train_flops_per_token(128) + 6 * router
    assert dense.num_expert_parameters == 0 and dense.num_active_parameters == dense.num_parameters


def test_flops_are_six_a_matmul_weight_and_half_the_attention_square(config):
    model, length = config.full_size.model, 8192
    # Forward, one sequence and layer: two products of (S x d) and (d x S) a head, 2 S^2 d FLOPs each; half is causal;
    # backward costs twice the forward.
    attention = 3 * (2 * 2 * length**2 * 128) * 64 * 80 / 2
    expected = 6 * model.num_matmul_parameters + attention / length
    assert model.train_flops_per_token(length) == pytest.approx(expected, rel=1e-12)


def test_tokens_are_rounded_up_to_whole_steps(config):
    training = replace(config.stages["pretrain"].training, global_batch=4, sequence_length=25)
    assert [replace(training, tokens=tokens).num_steps for tokens in (1, 100, 101, 200)] == [1, 1, 2, 2]
