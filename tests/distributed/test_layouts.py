"""The layout never changes the numbers. One launch of eight ranks does it all, because starting ranks takes longest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, smaller_world
from tiny import MODEL, TIED, Layout, Tensors, batches, tiny_engine, train

from conf.schema import ModelConfig
from parallel.engine import Engine, LossSums, StepResult
from parallel.initial import InitialWeights
from parallel.loss import CrossEntropy

# About 70 s on two quiet cores; a rank that hangs is found sooner, by the collectives' own limit.
LIMIT_SECONDS = 400.0
pytestmark = pytest.mark.timeout(LIMIT_SECONDS + 30)

NUM_STEPS = 20
FEW_STEPS = 6
HELD_OUT = 1000  # a step that is never trained on

FP32 = {
    "tensor": Layout(tensor=2),
    "sequence": Layout(tensor=2, sequence_parallel=True),
    "pipeline": Layout(pipeline=2),
    "interleaved": Layout(pipeline=2, virtual_pipeline=2),
    "context": Layout(context=2),
    "data": Layout(data=2),
    "data-overlap": Layout(data=2, overlap=True),
    "data-sharded": Layout(data=2, zero_stage=1, overlap=True),
    "tensor x pipeline x data": Layout(
        tensor=2, pipeline=2, data=2, sequence_parallel=True, zero_stage=1, overlap=True
    ),
}
# Fewer steps: what is wrong with a combination shows at once.
COMBINED = {
    "context-sharded": Layout(context=2, zero_stage=1),
    "context x tensor": Layout(context=2, tensor=2, sequence_parallel=True),
    "context x pipeline": Layout(context=2, pipeline=2),
    "pipeline 4": Layout(pipeline=4, recompute="full"),
    "tensor x interleaved x context": Layout(
        tensor=2, pipeline=2, virtual_pipeline=2, context=2, recompute="selective"
    ),
}
BF16 = {
    "tensor": Layout(tensor=2, sequence_parallel=True, precision="bf16"),
    "pipeline": Layout(pipeline=2, precision="bf16"),
    "context": Layout(context=2, precision="bf16"),
    "data-sharded": Layout(data=2, zero_stage=1, overlap=True, precision="bf16"),
    "tensor x pipeline x data": replace(FP32["tensor x pipeline x data"], precision="bf16"),
}
TIED_FP32 = {
    "tensor": Layout(tensor=2),
    "pipeline": Layout(pipeline=2),
    "interleaved-sharded": Layout(pipeline=2, virtual_pipeline=2, data=2, zero_stage=1, overlap=True),
}
# A run that is stopped every five steps and goes on with half the ranks.
SHRINKING = (
    FP32["tensor x pipeline x data"],
    Layout(pipeline=2, data=2),
    Layout(tensor=2, data=1, zero_stage=1),
    Layout(),
)
RESUMED = {
    "sharded bf16": Layout(data=2, zero_stage=1, overlap=True, precision="bf16"),
    "tensor bf16": Layout(tensor=2, precision="bf16"),
    "pipeline fp32": Layout(pipeline=2, data=2, zero_stage=1),
}


@dataclass(frozen=True)
class Curve:
    """What training looked like on a rank, and how held-out rows scored after it."""

    steps: list[StepResult]
    held_out: dict[str, list[float]]

    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    def grad_norms(self) -> list[float]:
        return [step.grad_norm for step in self.steps]


class NotANumber(CrossEntropy):
    """Cross-entropy of a model that has blown up on one data rank."""

    def __call__(self, *args: Any) -> LossSums:
        sums = super().__call__(*args)
        return replace(sums, loss=sums.loss * float("nan"))


def everything() -> dict[str, Any]:
    """Run on each of eight ranks."""
    found: dict[str, Any] = {}
    for size in (8, 4, 2, 1):
        with smaller_world(size, f"world of {size}") as inside:
            if inside:
                _runs_of_size(size, found)
    found.pop("state", None)
    return found


def _runs_of_size(size: int, found: dict[str, Any]) -> None:
    for family, model, layouts in (
        ("fp32", MODEL, FP32 | {"one": Layout()}),
        ("few", MODEL, COMBINED | {"one": Layout()}),
        ("bf16", MODEL, BF16 | {"one": Layout(precision="bf16")}),
        ("tied", TIED, TIED_FP32 | {"one": Layout()}),
    ):
        num_steps = NUM_STEPS if family in ("fp32", "bf16") else FEW_STEPS
        for name, layout in layouts.items():
            if layout.mesh.world_size == size:
                found[f"{family}/{name}"] = _on_mesh(layout, _train_and_score, model, num_steps)
    for name, layout in RESUMED.items():
        if layout.mesh.world_size == size:
            found[f"resumed/{name}"] = _on_mesh(layout, _train_and_resume)
    for part, layout in enumerate(SHRINKING):
        if layout.mesh.world_size == size:
            found[f"shrinking/{part}"] = _on_mesh(layout, _continue, found.get("state"), part, found)
    if size == 4:
        layout = Layout(tensor=2, data=2, zero_stage=1)
        found["not finite"] = _on_mesh(layout, _blow_up)
        found["two engines"] = _on_mesh(Layout(tensor=2, pipeline=2), _teacher_and_student)


def _on_mesh(layout: Layout, run: Callable[..., Any], *args: Any) -> Any:
    from parallel import groups

    groups.enter_mesh(layout.mesh, virtual_pipeline=layout.virtual_pipeline)
    try:
        return run(layout, *args)
    finally:
        groups.leave_mesh()


def _fresh(layout: Layout, model: ModelConfig = MODEL) -> Engine:
    engine = tiny_engine(layout, model)
    engine.load_weights(InitialWeights(model, 1))
    return engine


def _train_and_score(layout: Layout, model: ModelConfig, num_steps: int) -> Curve:
    engine = _fresh(layout, model)
    steps = train(engine, range(num_steps))
    rows = engine.score(batches(HELD_OUT, engine.mesh, engine.coordinate.data))
    engine.close()
    return Curve(steps, {field.name: getattr(rows, field.name).tolist() for field in fields(rows)})


def _save(engine: Engine) -> tuple[Tensors, Tensors]:
    return Tensors.gather(list(engine.weights())), Tensors.gather(list(engine.optimizer_state()))


def _restore(engine: Engine, state: tuple[Tensors, Tensors], num_steps: int) -> None:
    engine.load_weights(state[0])
    engine.load_optimizer_state(state[1], num_steps=num_steps)


def _train_and_resume(layout: Layout) -> dict[str, Any]:
    engine = _fresh(layout)
    train(engine, range(5))
    state = _save(engine)
    straight, end = train(engine, range(5, 10)), _save(engine)
    engine.close()
    engine = tiny_engine(layout)
    _restore(engine, state, 5)
    resumed, end_resumed = train(engine, range(5, 10)), _save(engine)
    engine.close()
    different = [
        name
        for one, other in zip(end, end_resumed, strict=True)
        for name, tensor in one.tensors.items()
        if not torch.equal(tensor, other.tensors[name])
    ]
    return {"straight": straight, "resumed": resumed, "different": different, "names": sorted(end[1].tensors)}


def _continue(layout: Layout, state: tuple[Tensors, Tensors] | None, part: int, found: dict[str, Any]) -> Curve:
    engine = tiny_engine(layout)
    if state is None:
        engine.load_weights(InitialWeights(MODEL, 1))
    else:
        _restore(engine, state, 5 * part)
    steps = train(engine, range(5 * part, 5 * part + 5))
    found["state"] = _save(engine)
    engine.close()
    return Curve(steps, {})


def _blow_up(layout: Layout) -> dict[str, Any]:
    engine = _fresh(layout)
    before = train(engine, range(3))
    mine = batches(3, engine.mesh, engine.coordinate.data)
    objective = NotANumber() if engine.coordinate.data == 1 else CrossEntropy()
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.step(mine, objective, learning_rate=1.0)
    uncounted = [replace(batch, loss_mask_BS=0 * batch.loss_mask_BS) for batch in mine]
    with pytest.raises(ValueError, match="no counted token"):
        engine.step(uncounted, CrossEntropy(), learning_rate=1.0)
    with pytest.raises(ValueError, match="at least one"):
        engine.score([])
    after = train(engine, range(3, FEW_STEPS))
    stopped = engine.step(mine, CrossEntropy(), learning_rate=0.0, stop=dist.get_rank() == 2)
    engine.close()
    return {"curve": Curve(before + after, {}), "stop": [step.stop for step in before], "stopped": stopped.stop}


def _teacher_and_student(layout: Layout) -> dict[str, Any]:
    narrow = replace(TIED, name="student", num_layers=2, hidden_size=32, num_attention_heads=2)
    teacher = tiny_engine(layout, MODEL, optim=None)
    teacher.load_weights(InitialWeights(MODEL, 1))
    student = _fresh(layout, narrow)
    questions = batches(HELD_OUT, layout.mesh, 0)
    before = teacher.score(questions)
    losses = [step.loss for step in train(student, range(FEW_STEPS))]
    after = teacher.score(questions)
    same = torch.equal(before.loss_B, after.loss_B)
    teacher.close()
    student.close()
    return {"teacher unchanged": same, "student losses": losses}


def assert_same_curve(name: str, other: Curve, one: Curve, *, abs: float) -> None:
    """Equal losses; `pytest -rP` shows how equal."""
    difference = max(math.fabs(mine - its) for mine, its in zip(other.losses(), one.losses(), strict=True))
    print(f"{name}: {difference:.1e} over {len(one.losses())} steps")
    assert other.losses() == pytest.approx(one.losses(), abs=abs)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, 8, limit_seconds=LIMIT_SECONDS)


@pytest.fixture
def found(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 found."""
    return ranks[0]


@pytest.mark.parametrize("name", FP32)
def test_fp32_curves_are_those_of_one_rank(found, name):
    one, other = found["fp32/one"], found[f"fp32/{name}"]
    assert one.losses()[-1] < one.losses()[0] - 0.3, "the model learns, so equal curves say something"
    assert_same_curve(name, other, one, abs=1e-5)
    assert other.grad_norms() == pytest.approx(one.grad_norms(), abs=1e-4)
    assert [step.num_tokens for step in other.steps] == [step.num_tokens for step in one.steps]
    assert [step.metrics["z_loss"] for step in other.steps] == pytest.approx(
        [step.metrics["z_loss"] for step in one.steps], abs=1e-5
    )


@pytest.mark.parametrize("name", BF16)
def test_bf16_curves_are_those_of_one_rank(found, name):
    assert_same_curve(f"bf16 {name}", found[f"bf16/{name}"], found["bf16/one"], abs=1e-3)


@pytest.mark.parametrize("name", TIED_FP32)
def test_tied_embeddings_stay_tied(found, name):
    one, other = found["tied/one"], found[f"tied/{name}"]
    assert_same_curve(name, other, one, abs=1e-5)
    assert other.grad_norms() == pytest.approx(one.grad_norms(), abs=1e-4)


@pytest.mark.parametrize("name", COMBINED)
def test_combined_axes_are_on_the_same_curve(found, name):
    one, other = found["few/one"], found[f"few/{name}"]
    assert_same_curve(name, other, one, abs=1e-5)
    assert other.grad_norms() == pytest.approx(one.grad_norms(), abs=1e-4)


@pytest.mark.parametrize("name", [*(f"fp32/{name}" for name in FP32), *(f"few/{name}" for name in COMBINED)])
def test_held_out_rows_score_the_same_in_the_same_order(found, name):
    one, other = found[f"{name.split('/')[0]}/one"].held_out, found[name].held_out
    assert other["sample_ids_B"] == one["sample_ids_B"]
    assert other["num_tokens_B"] == one["num_tokens_B"]
    assert other["loss_B"] == pytest.approx(one["loss_B"], abs=1e-3)


def test_every_rank_is_told_the_same(ranks):
    for name, layout in FP32.items():
        for rank in range(layout.mesh.world_size):
            assert ranks[rank][f"fp32/{name}"] == ranks[0][f"fp32/{name}"]


def test_run_resumed_with_half_the_ranks_again_and_again_is_on_the_same_curve(found):
    losses = [loss for part in range(len(SHRINKING)) for loss in found[f"shrinking/{part}"].losses()]
    assert losses == pytest.approx(found["fp32/one"].losses(), abs=1e-5)


@pytest.mark.parametrize("name", RESUMED)
def test_run_resumed_on_the_same_layout_is_equal_to_the_last_bit(found, name):
    result = found[f"resumed/{name}"]
    assert result["resumed"] == result["straight"]
    assert result["different"] == []
    assert any(state.startswith("master/") for state in result["names"]) == ("bf16" in name)


def test_step_that_is_not_finite_is_refused_on_all_ranks_and_changes_nothing(ranks):
    for rank in range(4):
        curve = ranks[rank]["not finite"]["curve"]
        assert curve.losses() == pytest.approx(ranks[0]["few/one"].losses(), abs=1e-5)


def test_one_rank_asking_to_stop_stops_all(ranks):
    for rank in range(4):
        assert ranks[rank]["not finite"]["stop"] == [False] * 3
        assert ranks[rank]["not finite"]["stopped"] is True


def test_two_models_live_in_one_process(found):
    result = found["two engines"]
    assert result["teacher unchanged"]
    assert result["student losses"][-1] < result["student losses"][0] - 0.01
