from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import BUSY, LLAMA_8B, LLAMA_70B, MIXTRAL

from conf.load import compose
from conf.schema import ModelConfig
from parallel.plan.hardware import GPUS
from parallel.plan.layout import DEEPSPEED, OURS, TORCHTITAN, Layout
from parallel.plan.memory import layers_on_device, stage_memory
from parallel.plan.shapes import Shape, Teacher, public_model, shape_of
from parallel.plan.throughput import StepTime, step_time

H100 = GPUS["H100"]
RATES = ("bf16_gemm_flops", "fp8_gemm_flops", "memory_bandwidth", "nvlink_bandwidth", "network_bandwidth")
layouts = st.builds(
    Layout,
    tensor=st.sampled_from([1, 2, 4, 8]),
    context=st.sampled_from([1, 2, 16]),
    pipeline=st.sampled_from([1, 2, 8]),
    virtual_pipeline=st.sampled_from([1, 2, 5]),
    data=st.sampled_from([1, 4, 64]),
    global_batch=st.just(1024),
    micro_batch=st.sampled_from([1, 2]),
    sequence=st.sampled_from([2048, 32768]),
    precision=st.sampled_from(["bf16", "fp8"]),
    recompute=st.sampled_from(["none", "selective", "full"]),
    sharding=st.sampled_from(["zero1", "zero3"]),
)


@given(layouts, st.sampled_from(RATES), st.floats(1, 10))
def test_no_faster_hardware_makes_a_step_slower(layout, rate, factor):
    faster = replace(H100, **{rate: factor * getattr(H100, rate)})
    assert step_time(LLAMA_70B, layout, faster).seconds <= step_time(LLAMA_70B, layout, H100).seconds * (1 + 1e-9)


@given(layouts)
def test_parts_are_not_negative_and_utilisation_is_below_the_peak(layout):
    step = step_time(LLAMA_70B, layout, H100)
    assert all(getattr(step, part.name) >= 0 for part in fields(StepTime))
    assert 0 < step.mfu < (2 if layout.precision == "fp8" else 1)


@given(layouts)
def test_a_larger_model_is_slower(layout):
    assert step_time(replace(LLAMA_70B, layers=160), layout, H100).seconds > step_time(LLAMA_70B, layout, H100).seconds


@given(layouts)
def test_recomputing_everything_costs_between_a_tenth_and_two_fifths(layout):
    # A third more arithmetic, less where the step waits for links that it does not use more.
    none, full = (step_time(LLAMA_70B, replace(layout, recompute=kind), H100).seconds for kind in ("none", "full"))
    assert none < full < 1.4 * none


def test_fp8_is_faster_but_not_twice_as_fast():
    bf16, fp8 = (step_time(LLAMA_70B, replace(BUSY, precision=kind), H100).seconds for kind in ("bf16", "fp8"))
    assert 1.2 < bf16 / fp8 < 1.8


def test_scales_computed_from_the_tensor_itself_cost_a_pass():
    fp8 = replace(BUSY, precision="fp8")
    assert step_time(LLAMA_70B, replace(fp8, current_scaling=True), H100).elementwise > (
        step_time(LLAMA_70B, fp8, H100).elementwise
    )


def test_writing_scores_out_and_unfused_operations_cost_time():
    layout = Layout(data=8, global_batch=64, sequence=2048, sharding="zero3", stack=TORCHTITAN)
    fused = step_time(LLAMA_8B, layout, H100)
    assert step_time(LLAMA_8B, replace(layout, unfused_attention=True), H100).attention > 2 * fused.attention
    eager = replace(TORCHTITAN, fused=False, decomposed=True)
    assert step_time(LLAMA_8B, replace(layout, stack=eager), H100).elementwise > 1.5 * fused.elementwise


def test_optimizer_in_host_memory_is_slow_and_takes_none_of_the_gpu():
    layout = Layout(data=8, global_batch=64, sharding="zero3", stack=DEEPSPEED)
    away, farther = replace(layout, offload="cpu"), replace(layout, offload="nvme")
    seconds = [step_time(LLAMA_8B, each, H100).optimizer for each in (layout, away, farther)]
    assert 25 * seconds[0] < 5 * seconds[1] < seconds[2]
    here, in_memory, on_disk = (stage_memory(LLAMA_8B, each, 0) for each in (layout, away, farther))
    assert (here.host, here.disk_optimizer, in_memory.optimizer, on_disk.optimizer) == (0, 0, 0, 0)
    assert on_disk.disk_optimizer == pytest.approx(here.optimizer)
    assert on_disk.host < in_memory.host - 0.6 * here.optimizer


def test_activations_in_host_memory_cost_what_the_layers_do_not_hide():
    layout = Layout(data=8, global_batch=64, sequence=65536, stack=OURS)
    for recompute, is_hidden in (("none", False), ("full", True)):
        here = replace(layout, recompute=recompute)
        away = replace(here, offload_activations=True)
        before, after = step_time(LLAMA_8B, here, H100), step_time(LLAMA_8B, away, H100)
        # Inputs of layers are copied while they compute; all that layers save is too much for the link.
        assert (after.host_links == 0) == is_hidden
        assert after.seconds == pytest.approx(before.seconds + after.host_links)
        held = [stage_memory(LLAMA_8B, each, 0).activations for each in (here, away)]
        assert held[1] < held[0] / 5
        assert held[1] + stage_memory(LLAMA_8B, away, 0).host_activations == pytest.approx(held[0], rel=0.01)


def test_offloaded_activations_are_of_two_layers_or_of_four_under_a_pipeline():
    layout = Layout(pipeline=4, data=8, global_batch=64, offload_activations=True, stack=OURS)
    assert [layers_on_device(LLAMA_8B, layout, stage) for stage in range(4)] == [4, 4, 4, 2]
    assert layers_on_device(replace(LLAMA_8B, layers=1), replace(layout, pipeline=1), 0) == 1


def test_bubble_shrinks_with_interleaving_and_weighs_less_with_more_micro_batches():
    plain = step_time(LLAMA_70B, replace(BUSY, virtual_pipeline=1), H100)
    assert step_time(LLAMA_70B, BUSY, H100).bubble == pytest.approx(plain.bubble / 5)
    twice = step_time(LLAMA_70B, replace(BUSY, virtual_pipeline=1, global_batch=1024), H100)
    assert twice.bubble / twice.seconds < plain.bubble / plain.seconds


def test_links_between_nodes_cost_more_than_links_within():
    layout = Layout(tensor=8, global_batch=8)
    within, across = (step_time(LLAMA_8B, layout, replace(H100, gpus_per_node=size)) for size in (8, 4))
    assert across.node_links > 2 * within.node_links


def test_experts_are_exchanged_and_cost_their_active_part():
    dense = replace(MIXTRAL, experts=1, experts_per_token=1)
    layout = Layout(data=8, expert=8, global_batch=256)
    routed, plain = step_time(MIXTRAL, layout, H100), step_time(dense, replace(layout, expert=1), H100)
    assert routed.node_links > 0 == plain.node_links
    assert 1.3 < routed.seconds / plain.seconds < 2.5


def test_flops_are_counted_as_the_run_counts_them():
    model = ModelConfig(
        name="m",
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_sequence_length=8192,
        rope_theta=5e5,
        norm_epsilon=1e-5,
        init_std=0.02,
        tied_embeddings=False,
    )
    shape = shape_of(model)
    assert isinstance(shape, Shape)
    assert shape.num_parameters == model.num_parameters
    assert shape.train_flops_per_token(8192) == model.train_flops_per_token(8192)


def test_planner_and_configuration_agree_on_a_mixture_of_experts():
    model = compose(["recipe=foundation", "model=mixtral_8x7b"]).full_size.model
    shape = shape_of(model)
    assert shape.num_parameters == model.num_parameters
    assert shape.train_flops_per_token(8192) == model.train_flops_per_token(8192)
    assert shape == public_model("mixtral-8x7b").shape()


def test_a_teacher_of_the_same_size_takes_a_third_of_a_step():
    alone, taught = (
        step_time(LLAMA_70B, BUSY, H100, teacher=each) for each in (None, Teacher(shape=LLAMA_70B, top_k=0))
    )
    assert taught.seconds == pytest.approx(alone.seconds * 4 / 3, rel=0.02)
    assert taught.mfu == pytest.approx(alone.mfu, rel=0.02)
