"""Layout and engine never change the numbers. One launch of eight ranks does it all: starting ranks takes longest."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import (
    BF16,
    COMBINED,
    FEW_BF16,
    FP32,
    ON_DISK,
    PACKED,
    REFUSING,
    RESUMED,
    SHRINKING,
    TIED_FP32,
    TWO_ENGINES,
)
from ranks import run_ranks, smaller_world
from tiny import (
    HELD_OUT,
    MODEL,
    TIED,
    Curve,
    Layout,
    Tensors,
    apart,
    batches,
    differing,
    fresh,
    on_mesh,
    packed,
    restore,
    save,
    tiny_engine,
    train,
    train_and_score,
)

from parallel import offload
from parallel.engine import LossSums
from parallel.initial import InitialWeights
from parallel.loss import CrossEntropy

# About 140 s on two quiet cores; a rank that hangs is found sooner, by the collectives' own limit.
LIMIT_SECONDS = 600.0
pytestmark = pytest.mark.timeout(LIMIT_SECONDS + 30)

NUM_STEPS = 20
FEW_STEPS = 6
PACKED_STEPS = 2


class NotANumber(CrossEntropy):
    """Cross-entropy of a model that has blown up on one data rank."""

    def __call__(self, *args: Any) -> LossSums:
        sums = super().__call__(*args)
        return replace(sums, loss=sums.loss * float("nan"))


def everything() -> dict[str, Any]:
    """Run on each of eight ranks."""
    found: dict[str, Any] = {}
    offload.SMALLEST_BYTES = 0  # nothing of a tiny model is large
    for size in (8, 4, 2, 1):
        with smaller_world(size, f"world of {size}") as inside:
            if inside:
                _runs_of_size(size, found)
    found.pop("states", None)
    return found


def _runs_of_size(size: int, found: dict[str, Any]) -> None:
    for family, model, num_steps, layouts, batches_of in (
        ("fp32", MODEL, NUM_STEPS, FP32 | {"one": Layout()}, batches),
        ("few", MODEL, FEW_STEPS, COMBINED | {"one": Layout()}, batches),
        ("bf16", MODEL, NUM_STEPS, BF16 | {"one": Layout(precision="bf16")}, batches),
        ("few bf16", MODEL, FEW_STEPS, FEW_BF16 | {"one": Layout(precision="bf16")}, batches),
        ("tied", TIED, FEW_STEPS, TIED_FP32 | {"one": Layout()}, batches),
        ("packed", MODEL, PACKED_STEPS, PACKED | {"one": Layout()}, packed),
        ("apart", MODEL, PACKED_STEPS, {"one": Layout()}, apart),
    ):
        for name, layout in layouts.items():
            if layout.mesh.world_size == size:
                found[f"{family}/{name}"] = on_mesh(layout, train_and_score, model, num_steps, batches_of)
    for kind, run, layouts in (
        ("resumed", _train_and_resume, RESUMED),
        ("not finite", _blow_up, REFUSING),
        ("on disk", _in_memory_and_on_disk, ON_DISK),
        ("two engines", _teacher_and_student, TWO_ENGINES),
        ("gradients", _packed_and_apart, {"one": Layout()}),
    ):
        for name, layout in layouts.items():
            if layout.mesh.world_size == size:
                found[f"{kind}/{name}"] = on_mesh(layout, run)
    states = found.setdefault("states", {})
    for name, parts in SHRINKING.items():
        for part, layout in enumerate(parts):
            if layout.mesh.world_size == size:
                found[f"shrinking/{name}/{part}"], states[name] = on_mesh(layout, _continue, states.get(name), part)


def _train_and_resume(layout: Layout) -> dict[str, Any]:
    engine = fresh(layout)
    train(engine, range(5))
    state = save(engine)
    straight, end = train(engine, range(5, 10)), save(engine)
    engine.close()
    engine = tiny_engine(layout)
    restore(engine, state, 5)
    resumed, end_resumed = train(engine, range(5, 10)), save(engine)
    engine.close()
    names = sorted(end[1].tensors)
    return {"straight": straight, "resumed": resumed, "different": differing(end, end_resumed), "names": names}


def _in_memory_and_on_disk(layout: Layout) -> list[str]:
    """Names of tensors that are not the same to the last bit."""
    engine = fresh(layout)
    train(engine, range(2))
    state = save(engine)
    train(engine, range(2, 4))
    in_memory = save(engine)
    engine.close()
    engine = tiny_engine(replace(layout, offload_optimizer="nvme"))
    restore(engine, state, 2)
    train(engine, range(2, 4))
    on_disk = save(engine)
    engine.close()
    return differing(in_memory, on_disk)


def _continue(
    layout: Layout, state: tuple[Tensors, Tensors] | None, part: int
) -> tuple[Curve, tuple[Tensors, Tensors]]:
    engine = tiny_engine(layout)
    if state is None:
        engine.load_weights(InitialWeights(MODEL, 1))
    else:
        restore(engine, state, 5 * part)
    steps = train(engine, range(5 * part, 5 * part + 5))
    state = save(engine)
    engine.close()
    return Curve(steps, {}), state


def _blow_up(layout: Layout) -> dict[str, Any]:
    engine = fresh(layout)
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
    stopped = engine.step(mine, CrossEntropy(), learning_rate=0.0, stop=dist.get_rank() == 1)
    engine.close()
    return {"curve": Curve(before + after, {}), "stop": [step.stop for step in before], "stopped": stopped.stop}


def _packed_and_apart(layout: Layout) -> dict[str, float]:
    """By weight, how far its gradient from packed rows is from that of the documents alone, over its largest part."""
    first_moments = []
    for batches_of in (packed, apart):
        engine = fresh(layout)
        train(engine, range(1), batches_of)
        # After one step that is the gradient, clipped, by 1 - beta1.
        first_moments.append(
            {name: tensor for name, tensor in save(engine)[1].tensors.items() if name.startswith("exp_avg/")}
        )
        engine.close()
    one, other = first_moments
    assert len(one) > 4 * MODEL.num_layers
    return {name: ((one[name] - other[name]).abs().max() / other[name].abs().max()).item() for name in one}


def _teacher_and_student(layout: Layout) -> dict[str, Any]:
    narrow = replace(TIED, name="student", num_layers=2, hidden_size=32, num_attention_heads=2)
    teacher = tiny_engine(layout, MODEL, optim=None)
    teacher.load_weights(InitialWeights(MODEL, 1))
    student = fresh(layout, narrow)
    questions = batches(HELD_OUT, layout.mesh, teacher.coordinate.data)
    before = teacher.score(questions)
    losses = [step.loss for step in train(student, range(FEW_STEPS))]
    after = teacher.score(questions)
    same = torch.equal(before.loss_B, after.loss_B)
    models = [weakref.ref(chunk) for engine in (teacher, student) for chunk in engine._chunks]  # type: ignore[attr-defined]
    teacher.close()
    student.close()
    return {
        "teacher unchanged": same,
        "student losses": losses,
        "models left": [model() is not None for model in models],
    }


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


@pytest.mark.parametrize("name", [*(f"bf16/{name}" for name in BF16), *(f"few bf16/{name}" for name in FEW_BF16)])
def test_bf16_curves_are_those_of_one_rank(found, name):
    assert_same_curve(name, found[name], found[f"{name.split('/')[0]}/one"], abs=1e-3)


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


def test_packed_documents_are_trained_on_as_if_each_were_alone(found):
    together, alone = found["packed/one"], found["apart/one"]
    assert_same_curve("documents apart", together, alone, abs=1e-5)
    assert together.grad_norms() == pytest.approx(alone.grad_norms(), abs=1e-5)
    assert [step.num_tokens for step in together.steps] == [step.num_tokens for step in alone.steps]
    assert max(found["gradients/one"].values()) < 1e-5
    joined = found["few/one"].losses()[:PACKED_STEPS]
    assert max(math.fabs(a - b) for a, b in zip(together.losses(), joined, strict=True)) > 1e-3, "it matters"


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_are_on_the_curve_of_one_rank(found, name):
    one, other = found["packed/one"], found[f"packed/{name}"]
    assert_same_curve(f"packed {name}", other, one, abs=1e-5)
    assert other.grad_norms() == pytest.approx(one.grad_norms(), abs=1e-4)
    assert other.held_out["loss_B"] == pytest.approx(one.held_out["loss_B"], abs=1e-3)


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


@pytest.mark.parametrize("name", SHRINKING)
def test_run_resumed_with_half_the_ranks_and_another_engine_is_on_the_same_curve(found, name):
    losses = [loss for part in range(len(SHRINKING[name])) for loss in found[f"shrinking/{name}/{part}"].losses()]
    precision = name.split()[0]
    one = found[f"{precision}/one"].losses()[: len(losses)]
    assert losses == pytest.approx(one, abs={"fp32": 1e-5, "bf16": 1e-3}[precision])


@pytest.mark.parametrize("name", RESUMED)
def test_run_resumed_on_the_same_layout_is_equal_to_the_last_bit(found, name):
    result = found[f"resumed/{name}"]
    assert result["resumed"] == result["straight"]
    assert result["different"] == []
    assert any(state.startswith("master/") for state in result["names"]) == ("bf16" in name)


@pytest.mark.parametrize("name", ON_DISK)
def test_optimizer_state_on_disk_is_that_in_memory_to_the_last_bit(found, name):
    assert found[f"on disk/{name}"] == []


@pytest.mark.parametrize("name", REFUSING)
def test_step_that_is_not_finite_is_refused_on_all_ranks_and_changes_nothing(ranks, name):
    for rank in range(REFUSING[name].mesh.world_size):
        curve = ranks[rank][f"not finite/{name}"]["curve"]
        assert curve.losses() == pytest.approx(ranks[0]["few/one"].losses(), abs=1e-5)


@pytest.mark.parametrize("name", REFUSING)
def test_one_rank_asking_to_stop_stops_all(ranks, name):
    for rank in range(REFUSING[name].mesh.world_size):
        assert ranks[rank][f"not finite/{name}"]["stop"] == [False] * 3
        assert ranks[rank][f"not finite/{name}"]["stopped"] is True


@pytest.mark.parametrize("name", TWO_ENGINES)
def test_two_models_live_in_one_process(found, name):
    result = found[f"two engines/{name}"]
    assert result["teacher unchanged"]
    assert result["student losses"][-1] < result["student losses"][0] - 0.01
    assert not any(result["models left"]), "what is closed is let go"
