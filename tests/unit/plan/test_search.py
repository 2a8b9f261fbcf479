from __future__ import annotations

import time
from dataclasses import replace

import pytest
from plan_samples import LLAMA_8B, LLAMA_70B, MIXTRAL

from parallel.plan.__main__ import main
from parallel.plan.hardware import GPUS
from parallel.plan.layout import COMPOSER, MEGATRON
from parallel.plan.search import Task, fastest, layouts, search, smallest_cluster, why

TASK = Task(shape=LLAMA_70B, gpu=GPUS["H200"], num_gpus=2048, global_batch=2048, sequence=8192)
SMALL = Task(shape=LLAMA_8B, gpu=GPUS["H100"], num_gpus=16, global_batch=128, sequence=8192)


def test_two_thousand_gpus_are_searched_in_under_two_seconds():
    started = time.process_time()
    assert search(TASK).front
    assert time.process_time() - started < 2


@pytest.mark.parametrize("task", [SMALL, replace(SMALL, shape=MIXTRAL), replace(SMALL, num_gpus=24, global_batch=96)])
def test_every_layout_divides_the_gpus_the_model_and_the_batch(task):
    found = list(layouts(task))
    assert found
    assert len(set(found)) == len(found)
    for layout in found:
        assert layout.num_gpus == task.num_gpus
        assert task.shape.layers % (layout.pipeline * layout.virtual_pipeline) == 0
        assert task.shape.kv_heads % layout.tensor == 0
        assert task.shape.experts % layout.expert == layout.data % layout.expert == 0
        assert layout.global_batch == layout.data * layout.micro_batch * layout.micro_batches
        if layout.virtual_pipeline > 1:
            assert layout.micro_batches % layout.pipeline == 0 < layout.pipeline - 1


def test_front_trades_time_for_memory_and_fits():
    front = search(TASK).front
    times = [candidate.step.seconds for candidate in front]
    needs = [candidate.worst.needed for candidate in front]
    assert times == sorted(times)
    assert needs == sorted(needs, reverse=True)
    assert needs[0] <= TASK.gpu.memory_bytes


@pytest.mark.parametrize("gibibytes", [20, 30, 45, 80])
def test_the_fastest_is_the_first_of_the_front_where_memory_is_tight_and_where_it_is_not(gibibytes):
    task = replace(SMALL, gpu=replace(SMALL.gpu, memory_bytes=gibibytes * 2**30), recompute=("none", "mlp", "full"))

    def refuses(layout):
        return "odd" if layout.pipeline == 1 else None

    for refusal in (lambda layout: None, refuses):
        best, front = fastest(task, refusal), search(task, refusal).front
        assert (best and best.layout) == (front[0].layout if front else None)


def test_what_is_refused_is_out_and_counted():
    def refuses(layout):
        return "tensor 1 only" if layout.tensor > 1 else None

    found = search(SMALL, refuses)
    assert {candidate.layout.tensor for candidate in found.front} == {1}
    assert found.refused["tensor 1 only"] > 0
    assert search(SMALL, lambda layout: "no").front == ()


def test_less_memory_never_makes_the_best_faster():
    best = [search(replace(SMALL, gpu=replace(SMALL.gpu, memory_bytes=size * 2**30))).front for size in (30, 50, 80)]
    times = [front[0].step.seconds for front in best]
    assert times == sorted(times, reverse=True)


def test_smallest_cluster_fits_and_half_of_it_does_not():
    task = replace(TASK, gpu=GPUS["H100"])
    smallest = smallest_cluster(task)
    assert smallest is not None
    assert search(replace(task, num_gpus=smallest)).front
    assert not search(replace(task, num_gpus=smallest // 2)).front
    assert smallest_cluster(task, lambda layout: "never", most=64) is None


def test_nothing_that_divides_has_no_leanest_layout():
    found = search(replace(SMALL, num_gpus=14))
    assert (found.considered, found.leanest, found.front) == (0, None, ())


def test_runner_up_loses_for_a_stated_reason():
    found = search(TASK)
    assert found.runner_up is not None
    told = why(found.front[0], found.runner_up)
    assert "% slower (" in told
    assert "GiB" in told


def test_sharded_engines_are_searched_without_interleaving():
    task = replace(SMALL, engines=((COMPOSER, "zero3"),), recompute=("full",))
    assert {layout.virtual_pipeline for layout in layouts(task)} == {1}
    assert search(task).front


def test_precisions_and_engines_are_searched_together():
    engines = ((MEGATRON, "zero1"), (COMPOSER, "zero3"))
    task = replace(SMALL, precisions=("bf16", "fp8"), engines=engines)
    assert {(at.precision, at.stack.name, at.sharding) for at in layouts(task)} == {
        (precision, stack.name, sharding) for precision in ("bf16", "fp8") for stack, sharding in engines
    }
    assert search(task).front[0].layout.precision == "fp8"


def test_command_prints_the_front_and_why_others_lose(capsys):
    arguments = ["search", "--model", "Llama3-8B", "--gpu", "H100", "--gpus", "16", "--batch", "128"]
    assert main([*arguments, "--sequence", "8192"]) == 0
    printed = capsys.readouterr().out
    assert "tokens/s/GPU" in printed
    assert "runner-up" in printed
    assert "MFU of the fastest" in printed


@pytest.mark.parametrize(
    ("model", "gpu", "gpus", "batch", "code", "told"),
    [
        ("Llama3-70B", "H100", "8", "2048", 1, "the smallest that fits is"),
        ("Llama3-8B", "H100", "14", "128", 1, "no layout divides"),
        ("Nobody-3B", "H100", "16", "64", 2, "not a public model"),
        ("Llama3-8B", "Abacus", "16", "64", 2, "no facts for GPU"),
    ],
)
def test_command_says_what_is_wrong(model, gpu, gpus, batch, code, told, capsys):
    arguments = ["search", "--model", model, "--gpu", gpu, "--gpus", gpus, "--batch", batch, "--sequence", "8192"]
    assert main(arguments) == code
    assert told in capsys.readouterr().err
