from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import BUSY, LLAMA_8B, LLAMA_70B, MIXTRAL

from parallel.plan.layout import OURS, OURS_ON_DEEPSPEED, TORCHTITAN, Layout
from parallel.plan.memory import (
    GIB,
    SLICE_LOGITS,
    chunks_in_flight,
    memory,
    saved_bytes,
    stage_memory,
    stage_parameters,
)
from parallel.plan.shapes import Teacher

layouts = st.builds(
    Layout,
    tensor=st.sampled_from([1, 2, 4, 8]),
    context=st.sampled_from([1, 2]),
    pipeline=st.sampled_from([1, 2, 4, 8]),
    virtual_pipeline=st.sampled_from([1, 2, 5]),
    data=st.sampled_from([1, 4, 16]),
    global_batch=st.just(512),
    micro_batch=st.sampled_from([1, 2]),
    sequence=st.just(8192),
)


@given(layouts)
def test_stages_and_ranks_together_hold_every_parameter_once(layout):
    held = sum(sum(stage_parameters(LLAMA_70B, layout, stage)) for stage in range(layout.pipeline)) * layout.tensor
    assert held == pytest.approx(LLAMA_70B.num_parameters, rel=1e-6)


@given(layouts)
def test_no_kind_of_recomputation_costs_memory(layout):
    kept = [saved_bytes(LLAMA_70B, replace(layout, recompute=kind)) for kind in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True)


@given(layouts, st.sampled_from(["tensor", "context"]))
def test_splitting_further_never_needs_more(layout, axis):
    finer = replace(layout, **{axis: 2 * getattr(layout, axis)})
    for stage in {0, layout.pipeline - 1}:
        assert stage_memory(LLAMA_70B, finer, stage).peak <= stage_memory(LLAMA_70B, layout, stage).peak


@given(layouts)
def test_more_sharding_never_needs_more(layout):
    shardings = ("none", "zero1", "zero2", "zero3")
    held = [stage_memory(LLAMA_8B, replace(layout, sharding=kind), 0).allocated for kind in shardings]
    assert held == sorted(held, reverse=True)


def test_distributed_optimizer_takes_6_plus_12_over_d_bytes_a_parameter():
    layout = Layout(data=8, global_batch=8)
    at = stage_memory(LLAMA_8B, layout, 0)
    assert at.weights + at.gradients + at.optimizer == pytest.approx(7.5 * LLAMA_8B.num_parameters, rel=1e-6)
    plain = stage_memory(LLAMA_8B, replace(layout, sharding="none"), 0)
    assert plain.weights + plain.gradients + plain.optimizer == pytest.approx(18 * LLAMA_8B.num_parameters, rel=1e-6)


def test_layer_keeps_34_bytes_a_token_and_hidden_as_published_for_gpt():
    gpt = replace(LLAMA_8B, kv_heads=32, ffn=4 * 4096, gated=False, dropout=True)
    # The published 34 counts one byte for each of two dropout masks.
    assert saved_bytes(gpt, Layout(sequence=2048)) == 34 * 2048 * 4096
    unfused = saved_bytes(gpt, Layout(sequence=2048, unfused_attention=True)) - saved_bytes(gpt, Layout(sequence=2048))
    assert unfused == 5 * 32 * 2048 * 2048


def test_first_stage_holds_a_micro_batch_for_each_stage_and_the_last_one():
    layout = Layout(pipeline=4, global_batch=64)
    assert [chunks_in_flight(layout, stage) for stage in range(4)] == [4, 3, 2, 1]
    interleaved = replace(layout, virtual_pipeline=2)
    assert [chunks_in_flight(interleaved, stage) for stage in range(4)] == [11, 9, 7, 5]


def test_few_micro_batches_are_never_more_in_flight_than_there_are():
    assert chunks_in_flight(Layout(pipeline=8, global_batch=2), 0) == 2


def test_only_the_last_stage_holds_logits_and_a_chunked_loss_none():
    stages = memory(LLAMA_70B, BUSY)
    assert [stage.logits > 0 for stage in stages] == [False, False, False, True]
    assert memory(LLAMA_70B, replace(BUSY, chunked_loss=True))[-1].logits == 0


@pytest.mark.parametrize(("precision", "each"), [("bf16", 12), ("fp32", 8)])
def test_sliced_heads_hold_a_slice_of_the_logits_and_sliced_losses_all_of_them(precision, each):
    small = replace(BUSY, precision=precision, stack=OURS, sequence=1024)
    count = 512 * LLAMA_70B.vocab / 4
    assert memory(LLAMA_70B, small)[-1].logits == count * each
    large = replace(small, sequence=32768)
    assert memory(LLAMA_70B, large)[-1].logits == SLICE_LOGITS * each < 32 * count * 4
    on_deepspeed = memory(LLAMA_70B, replace(large, stack=OURS_ON_DEEPSPEED, virtual_pipeline=1))[-1].logits
    whole = 32 * count * 2 * large.element_bytes
    assert on_deepspeed == pytest.approx(whole + SLICE_LOGITS * (each - 2 * large.element_bytes))


def test_a_teacher_holds_two_bytes_a_weight_and_its_likeliest_logits():
    layout = replace(BUSY, stack=OURS)
    teacher = Teacher(shape=LLAMA_70B, top_k=256)
    alone, taught = memory(LLAMA_8B, layout), memory(LLAMA_8B, layout, teacher)
    assert sum(stage.teacher for stage in taught) * layout.tensor == pytest.approx(2 * LLAMA_70B.num_parameters)
    for before, after in zip(alone[:-1], taught[:-1], strict=True):
        assert after.peak - before.peak == pytest.approx(after.teacher)
        assert sum(after.parts.values()) == pytest.approx(after.needed)
    many = memory(LLAMA_8B, layout, replace(teacher, top_k=0))[-1]
    tokens = layout.micro_batches * layout.tokens
    kept = tokens * LLAMA_70B.hidden * 2 - tokens * 256 * 10
    sliced = min(layout.tokens * LLAMA_8B.vocab / layout.tensor, SLICE_LOGITS)
    assert many.logits - taught[-1].logits == pytest.approx(kept + 2 * sliced)


def test_expert_ranks_share_experts():
    alone, shared = (sum(stage_parameters(MIXTRAL, Layout(data=8, expert=size), 0)) for size in (1, 8))
    experts = MIXTRAL.layers * 8 * MIXTRAL.expert_weights
    assert alone - shared == pytest.approx(7 / 8 * experts)


def test_layers_that_do_not_divide_leave_ends_the_embeddings():
    odd = replace(LLAMA_70B, layers=126)
    stages = memory(odd, Layout(pipeline=8, data=8, global_batch=512))
    assert stages[0].weights == pytest.approx(stages[-1].weights)
    held = sum(sum(stage_parameters(odd, Layout(pipeline=8), stage)) for stage in range(8))
    assert held == pytest.approx(odd.num_parameters, rel=1e-6)


def test_published_8b_on_eight_gpus_is_met():
    # torchtitan, 8 x H100, FSDP2, compiled, local batch 2: 77.0 GiB.
    layout = Layout(
        data=8, micro_batch=2, global_batch=16, sequence=8192, sharding="zero3", recompute="selective", stack=TORCHTITAN
    )
    assert stage_memory(LLAMA_8B, layout, 0).reserved / GIB == pytest.approx(77.0, rel=0.04)
