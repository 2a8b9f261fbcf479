"""What makes a step fast does not change it: compiled layers, sliced logits, fp8 products; and memory that runs out."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from ranks import run_ranks, smaller_world
from tiny import MICRO_BATCH, MODEL, OPTIM, TIED, Layout, batches, train

from conf.schema import ModelConfig
from data.batch import Batch
from parallel import loss, offload
from parallel.engine import Engine, LossSums, make_engine
from parallel.initial import InitialWeights
from parallel.loss import CrossEntropy
from parallel.memory_errors import StepOutOfMemoryError

LIMIT_SECONDS = 240.0
pytestmark = pytest.mark.timeout(LIMIT_SECONDS + 30)
NUM_STEPS = 8
SHARDED = Layout(zero_stage=1, overlap=True)
OFFLOADED: dict[str, dict[str, Any]] = {"plain": {}, "compiled": {"compile": True}}


class Greedy(CrossEntropy):
    """An objective that asks for more memory than there is."""

    def __call__(self, *args: Any) -> LossSums:
        _ask_for_too_much()
        return super().__call__(*args)


def everything() -> dict[str, Any]:
    """Run on each of two ranks."""
    from parallel import groups

    found: dict[str, Any] = {}
    layout = Layout(tensor=2)
    groups.enter_mesh(layout.mesh)
    for name, model in (("untied", MODEL), ("tied", TIED)):
        found[f"tensor {name}"] = _curve(layout, model)
        found[f"tensor {name} sliced"] = _sliced(layout, model)
    # The graphs and not their kernels are looked at here, and making kernels takes longest.
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        for name, split in (("tensor compiled", False), ("sequence compiled", True)):
            torch._dynamo.utils.counters.clear()
            found[name] = _curve(replace(layout, sequence_parallel=split, overlap=True), compile=True)
            found[f"{name} breaks"] = list(torch._dynamo.utils.counters["graph_break"])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    groups.leave_mesh()
    with smaller_world(1, "alone") as inside:
        if inside:
            groups.enter_mesh(Layout().mesh)
            for name, changes in OFFLOADED.items():
                found[name] = _curve(SHARDED, **changes)
            found["compiled graphs"] = dict(torch._dynamo.utils.counters["stats"])["unique_graphs"]
            found["compiled breaks"] = list(torch._dynamo.utils.counters["graph_break"])
            offload.SMALLEST_BYTES = 0  # nothing of a tiny model is large
            for name, changes in OFFLOADED.items():
                found[f"{name} offloaded"] = _curve(SHARDED, **changes, offload_activations=True)
            for precision in ("bf16", "fp8", "fp8_rowwise"):
                found[precision] = _curve(SHARDED, precision=precision)
            found["memory"] = _run_out_of_memory()
            found["graphs of single rows"] = _graphs_of_single_rows()
            groups.leave_mesh()
    return found


def _graphs_of_single_rows() -> int:
    """How many graphs the layers need where a micro-batch is one row."""
    layout = Layout()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        engine = make_engine(MODEL, replace(layout.engine, compile=True), OPTIM, layout.mesh, micro_batch=1)
        engine.load_weights(InitialWeights(MODEL, 1))
        first = batches(0, layout.mesh, 0)[0]
        row = Batch(**{field.name: getattr(first, field.name)[:1] for field in fields(Batch)})
        engine.step([row], CrossEntropy(), learning_rate=OPTIM.learning_rate)
        engine.close()
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _engine(layout: Layout, model: ModelConfig = MODEL, **changes: Any) -> Engine:
    engine = make_engine(model, replace(layout.engine, **changes), OPTIM, layout.mesh, micro_batch=MICRO_BATCH)
    engine.load_weights(InitialWeights(model, 1))
    return engine


def _curve(layout: Layout, model: ModelConfig = MODEL, **changes: Any) -> list[float]:
    engine = _engine(layout, model, **changes)
    steps = train(engine, range(NUM_STEPS))
    scored = engine.score(batches(1000, engine.mesh, 0)).loss_B.sum().item()
    engine.close()
    return [*(step.loss for step in steps), *(step.grad_norm for step in steps), scored / 100]


def _sliced(layout: Layout, model: ModelConfig) -> list[float]:
    limit = loss.LOGIT_BYTES
    loss.LOGIT_BYTES = 4 * MICRO_BATCH * model.vocab_size // 2 * 5  # five of the 32 tokens of a row
    try:
        return _curve(layout, model)
    finally:
        loss.LOGIT_BYTES = limit


def _ask_for_too_much(*_: Any) -> None:
    torch.empty(2**60, dtype=torch.uint8)


def _run_out_of_memory() -> tuple[list[str], list[float]]:
    engine = _engine(SHARDED)
    given = batches(0, engine.mesh, 0)
    with pytest.raises(StepOutOfMemoryError) as in_step:
        engine.step(given, Greedy(), learning_rate=1.0)
    too_much = mock.patch("parallel.forward_passes.score_rows", _ask_for_too_much)
    with pytest.raises(StepOutOfMemoryError) as in_scoring, too_much:
        engine.score(given)
    after = [step.loss for step in train(engine, range(3))]
    engine.close()
    return [in_step.value.part, in_scoring.value.part], after


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_ranks(everything, 2, limit_seconds=LIMIT_SECONDS)[0]


def test_compiled_layers_take_the_same_steps(found):
    assert found["compiled"] == pytest.approx(found["plain"], abs=1e-5)


@pytest.mark.parametrize("name", OFFLOADED)
def test_activations_that_went_to_host_memory_come_back_to_the_last_bit(found, name):
    assert found[f"{name} offloaded"] == found[name]


def test_layers_share_one_whole_graph(found):
    # One for training and one for scoring, each without a break, for all four layers.
    assert found["compiled graphs"] == 2
    assert found["compiled breaks"] == []


def test_first_layer_shares_the_graph_of_the_others_where_micro_batches_are_single_rows(found):
    assert found["graphs of single rows"] == 1


@pytest.mark.parametrize("name", ["tensor compiled", "sequence compiled"])
def test_exchanges_between_tensor_ranks_are_within_the_graph_of_a_layer(found, name):
    assert found[name] == pytest.approx(found["tensor untied"], abs=1e-5)
    assert found[f"{name} breaks"] == []


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_head_asked_slice_by_slice_takes_the_same_steps(found, name):
    assert found[f"tensor {name} sliced"] == pytest.approx(found[f"tensor {name}"], abs=1e-5)


@pytest.mark.parametrize("precision", ["fp8", "fp8_rowwise"])
def test_fp8_losses_stay_near_those_of_bf16(found, precision):
    assert found[precision][:NUM_STEPS] == pytest.approx(found["bf16"][:NUM_STEPS], rel=0.01)
    assert found[precision] != found["bf16"]


def test_step_that_ran_out_of_memory_is_named_and_changed_nothing(found):
    parts, losses = found["memory"]
    assert parts == ["the forward and backward pass", "a forward pass without gradients"]
    assert losses == found["plain"][:3]
