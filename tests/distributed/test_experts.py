"""A mixture of experts is the same model under every layout, cut or whole, and Hugging Face's Mixtral.

One launch of eight ranks.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks, smaller_world
from tiny import (
    MODEL,
    OPTIM,
    Curve,
    Layout,
    Tensors,
    batches,
    fresh,
    on_mesh,
    packed,
    restore,
    save,
    tiny_engine,
    train,
    train_and_score,
)

from conf.schema import ExpertsConfig, ModelConfig
from parallel.distillation import Distillation, FromTeacher
from parallel.engine import TensorSource
from parallel.initial import InitialWeights
from parallel.pruning import PrunedWeights, most_important
from parallel.weight_importance import magnitude_importance
from parallel.weight_names import logical_shapes

LIMIT_SECONDS = 400.0
pytestmark = pytest.mark.timeout(LIMIT_SECONDS + 30)

NUM_STEPS = 20
FEW_STEPS = 5
PACKED_STEPS = 2
RECOVERY_STEPS = 3
CALIBRATION = 500

# Weights large enough that routers have opinions; losses large enough that leaving one out would show.
EXPERTS = ExpertsConfig(
    num_experts=4, num_experts_per_token=2, balance_loss=0.05, router_z_loss=0.01, capacity_factor=None
)
MOE = replace(
    MODEL, name="tiny-moe", num_layers=2, hidden_size=32, ffn_hidden_size=48, head_dim=8, init_std=0.1, experts=EXPERTS
)
DROPPING = replace(MOE, experts=replace(EXPERTS, capacity_factor=1.0))

CURVES = {
    "expert": Layout(data=2, expert=2),
    "expert x context": Layout(context=2, expert=2, zero_stage=1, overlap=True),
    "expert 4": Layout(data=4, expert=4, zero_stage=1),
    "expert x data": Layout(data=4, expert=2, zero_stage=1, overlap=True),
    "expert x tensor": Layout(tensor=2, data=2, expert=2, sequence_parallel=True),
    "expert x pipeline": Layout(pipeline=2, data=2, expert=2),
    "expert x tensor x pipeline": Layout(
        tensor=2, pipeline=2, data=2, expert=2, sequence_parallel=True, zero_stage=1, overlap=True
    ),
}
# Fewer steps: what is wrong with a combination shows at once.
COMBINED = {
    "replicated": Layout(data=2, zero_stage=1),
    "tensor": Layout(tensor=2, sequence_parallel=True),
    "expert x data, one optimizer a rank": Layout(data=4, expert=2),
    "expert 4 x context, recomputed": Layout(context=2, data=2, expert=4, recompute="selective"),
    "expert x pipeline, recomputed": Layout(pipeline=2, context=2, expert=2, recompute="full"),
    "expert 4 x tensor x context": Layout(tensor=2, context=2, data=2, expert=4, sequence_parallel=True, zero_stage=1),
}
DEEP = {
    "expert x interleaved": Layout(pipeline=2, virtual_pipeline=2, data=2, expert=2, zero_stage=1, overlap=True),
    "one": Layout(),
}
DROPPED = {
    "expert": Layout(data=2, expert=2),
    "context": Layout(context=2, expert=2, zero_stage=1),
    "tensor": Layout(tensor=2, data=2, expert=2, sequence_parallel=True, recompute="full"),
}
PACKED = {
    "expert x tensor": Layout(tensor=2, data=2, expert=2, sequence_parallel=True),
    "expert x pipeline x context, recomputed": Layout(pipeline=2, context=2, data=2, expert=2, recompute="full"),
}
# A run that is stopped every five steps and goes on with half the ranks.
SHRINKING = (
    CURVES["expert x tensor x pipeline"],
    Layout(data=4, expert=4, zero_stage=1),
    Layout(context=2, expert=2),
    Layout(),
)
PRUNED = {
    "expert x tensor x pipeline": CURVES["expert x tensor x pipeline"],
    "expert x context x data": Layout(context=2, data=2, expert=2, zero_stage=1),
    "one": Layout(),
}
OBSERVED = {"expert x interleaved": DEEP["expert x interleaved"]}
WHOLE = replace(MOE, name="whole", num_layers=4, init_std=0.2, experts=replace(EXPERTS, num_experts=6))
CUT = replace(WHOLE, name="cut", num_layers=2, hidden_size=24, ffn_hidden_size=32).with_experts(4)
RESUMED = Layout(data=4, expert=2, zero_stage=1, overlap=True, precision="bf16")


def everything() -> dict[str, Any]:
    """Run on each of eight ranks."""
    found: dict[str, Any] = {}
    for size in (8, 4, 2, 1):
        with smaller_world(size, f"world of {size}") as inside:
            if inside:
                _runs_of_size(size, found)
    found.pop("state")
    return found


def _runs_of_size(size: int, found: dict[str, Any]) -> None:
    for family, model, layouts, num_steps, batches_of in (
        ("curves", MOE, CURVES | {"one": Layout()}, NUM_STEPS, batches),
        ("combined", MOE, COMBINED, FEW_STEPS, batches),
        ("deep", replace(MOE, num_layers=4), DEEP, FEW_STEPS, batches),
        ("dropping", DROPPING, DROPPED | {"one": Layout()}, FEW_STEPS, batches),
        ("packed", MOE, PACKED | {"one": Layout()}, PACKED_STEPS, packed),
    ):
        for name, layout in layouts.items():
            if layout.mesh.world_size == size:
                found[f"{family}/{name}"] = on_mesh(layout, train_and_score, model, num_steps, batches_of)
    for part, layout in enumerate(SHRINKING):
        if layout.mesh.world_size == size:
            found[f"shrinking/{part}"] = on_mesh(layout, _continue, found.get("state"), part, found)
    for name, layout in (PRUNED | OBSERVED).items():
        if layout.mesh.world_size == size:
            found[f"pruned/{name}"] = on_mesh(layout, _prune_and_recover, name in PRUNED)
    if size == 4:
        found["resumed"] = on_mesh(RESUMED, _train_and_resume)
    if size == 1:
        found["mixtral"] = _mixtral()
        found["nothing lost"] = on_mesh(Layout(), _cut_what_does_nothing)


def _continue(layout: Layout, state: tuple[Tensors, Tensors] | None, part: int, found: dict[str, Any]) -> Curve:
    engine = tiny_engine(layout, MOE)
    if state is None:
        engine.load_weights(InitialWeights(MOE, 1))
    else:
        restore(engine, state, 5 * part)
    steps = train(engine, range(5 * part, 5 * part + 5))
    found["state"] = save(engine)
    engine.close()
    return Curve(steps, {})


def _train_and_resume(layout: Layout) -> dict[str, Any]:
    engine = fresh(layout, MOE)
    train(engine, range(3))
    state = save(engine)
    straight, end = train(engine, range(3, 6)), save(engine)
    engine.close()
    engine = tiny_engine(layout, MOE)
    restore(engine, state, 3)
    resumed, end_resumed = train(engine, range(3, 6)), save(engine)
    engine.close()
    different = [
        name
        for one, other in zip(end, end_resumed, strict=True)
        for name, tensor in one.tensors.items()
        if not torch.equal(tensor, other.tensors[name])
    ]
    return {"straight": straight, "resumed": resumed, "different": different, "names": sorted(end[0].tensors)}


def _prune_and_recover(layout: Layout, recover: bool) -> dict[str, Any]:
    """Scores of the parts of a model, and where it is recovered the pruned one, its losses and its rows' scores."""
    source = InitialWeights(WHOLE, 1)
    teacher = tiny_engine(layout, WHOLE, optim=None)
    teacher.load_weights(source)
    importance = teacher.observe(batches(CALIBRATION, layout.mesh, teacher.coordinate.data))
    found: dict[str, Any] = {
        "activation": {name: scores.numpy() for name, scores in importance.tensors().items()},
        "magnitude": {name: s.numpy() for name, s in magnitude_importance(source, WHOLE).tensors().items()},
    }
    if recover:
        pruned = PrunedWeights(source, WHOLE, CUT, most_important(importance, WHOLE, CUT))
        student = tiny_engine(layout, CUT)
        student.load_weights(pruned)
        found["weights"] = {n: w.numpy() for n, w in Tensors.gather(list(student.weights())).tensors.items()}
        rows = student.score(batches(CALIBRATION, layout.mesh, student.coordinate.data))
        found["rows"] = (rows.loss_B / rows.num_tokens_B.clamp_min(1)).tolist()
        lesson = FromTeacher(teacher, Distillation(temperature=2.0, weight=0.7), 0)
        found["steps"] = []
        for step in range(RECOVERY_STEPS):
            mine = batches(step, layout.mesh, student.coordinate.data)
            found["steps"].append(student.step(mine, lesson(mine), learning_rate=OPTIM.learning_rate))
        student.close()
        if layout.mesh.world_size == 1:
            found["mixtral"] = _rows_of_mixtral(mixtral_like(CUT, pruned))
    teacher.close()
    return found


def _rows_of_mixtral(mixtral: Any) -> list[float]:
    """Mean loss of the counted tokens of each row of the calibration text."""
    means = []
    for batch in batches(CALIBRATION, Layout().mesh, 0):
        labels, mask = torch.from_numpy(batch.labels_BS), torch.from_numpy(batch.loss_mask_BS)
        with torch.no_grad():
            logits = mixtral.eval()(torch.from_numpy(batch.tokens_BS)).logits
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        means += ((nll.view_as(mask) * mask).sum(1) / mask.sum(1).clamp_min(1)).tolist()
    return means


def _cut_what_does_nothing(layout: Layout) -> dict[str, list[float]]:
    """Make parts of a model do nothing, cut as many, and see what the model says then."""
    shape = replace(CUT, num_layers=WHOLE.num_layers, num_attention_heads=2, num_kv_heads=1)
    parent = Tensors(_with_idle_parts(shape))
    questions = batches(CALIBRATION, layout.mesh, 0)
    engine = tiny_engine(layout, WHOLE, optim=None)
    engine.load_weights(parent)
    importance = engine.observe(questions)
    before = engine.score(questions).loss_B.tolist()
    engine.close()
    engine = tiny_engine(layout, shape, optim=None)
    engine.load_weights(PrunedWeights(parent, WHOLE, shape, most_important(importance, WHOLE, shape)))
    after = engine.score(questions).loss_B.tolist()
    engine.close()
    return {"before": before, "after": after}


def _with_idle_parts(shape: ModelConfig) -> dict[str, torch.Tensor]:
    """Fresh weights with as many channels, neurons of each expert, heads and experts idle as the shape lacks.

    An expert is idle where no token is sent to it: channel 0 is the same for all tokens, and its router's row looks at
    that alone, and dislikes it.
    """
    random = np.random.default_rng(3)
    weights = InitialWeights(WHOLE, 1)
    tensors = {name: weights.read(name, (0,) * len(size), size) for name, size in logical_shapes(WHOLE).items()}
    idle = 1 + random.permutation(WHOLE.hidden_size - 1)[shape.hidden_size - 1 :]
    for name, tensor in tensors.items():
        if name == "model.embed_tokens.weight":
            tensor[:, idle] = 0.0
            tensor[:, 0] = 1.0
        elif name.endswith(("o_proj.weight", "w2.weight")):
            tensor[[0, *idle]] = 0.0
        elif name.endswith("w1.weight"):
            tensor[random.permutation(WHOLE.ffn_hidden_size)[shape.ffn_hidden_size :]] = 0.0
        elif name.endswith("v_proj.weight"):
            groups = random.permutation(WHOLE.num_kv_heads)[shape.num_kv_heads :]
            tensor.view(WHOLE.num_kv_heads, WHOLE.head_dim, -1)[groups] = 0.0
        elif name.endswith("gate.weight"):
            tensor[:, 0] = 0.0
            unused = random.permutation(WHOLE.num_experts)[shape.num_experts :]
            tensor[unused] = 0.0
            tensor[unused, 0] = -1000.0
    return tensors


def _mixtral() -> dict[str, Any]:
    """Train Hugging Face's Mixtral with plain torch on the same batches, the router losses written out."""
    mixtral = mixtral_like(MOE, InitialWeights(MOE, 1)).train()
    decayed = [parameter for parameter in mixtral.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in mixtral.parameters() if parameter.dim() == 1]
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        betas=(OPTIM.beta1, OPTIM.beta2),
        eps=OPTIM.epsilon,
    )
    found: dict[str, Any] = {"loss": [], "grad_norm": [], "router_balance": [], "router_z": []}
    for step in range(FEW_STEPS):
        sums = torch.zeros(4)
        for batch in (micro_batches := batches(step, Layout().mesh, 0)):
            sums = sums + _mixtral_sums(mixtral, batch)
        nats, num_tokens, balance, z = sums
        balance, z = balance / len(micro_batches), z / len(micro_batches)
        loss = nats / num_tokens + EXPERTS.balance_loss * balance + EXPERTS.router_z_loss * z
        adam.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(mixtral.parameters(), OPTIM.clip_grad_norm)
        adam.param_groups[0]["lr"] = adam.param_groups[1]["lr"] = OPTIM.learning_rate * (step + 1) / 10
        adam.step()
        values = (nats / num_tokens, grad_norm, balance / MOE.num_layers, z / MOE.num_layers)
        for name, value in zip(found, values, strict=True):
            found[name].append(value.item())
    return found


def mixtral_like(model: ModelConfig, weights: TensorSource) -> Any:
    """A MixtralForCausalLM of these weights, loaded from a directory in the stored layout."""
    from safetensors.torch import save_file
    from transformers import MixtralForCausalLM

    from recipes.export import hugging_face_config, write_json

    with tempfile.TemporaryDirectory() as directory:
        tensors = {name: weights.read(name, (0,) * len(shape), shape) for name, shape in logical_shapes(model).items()}
        save_file(tensors, f"{directory}/model.safetensors", metadata={"format": "pt"})
        write_json(Path(directory) / "config.json", hugging_face_config(model, torch.float32))
        mixtral, loading = MixtralForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    return mixtral


def _mixtral_sums(mixtral: Any, batch: Any) -> torch.Tensor:
    """Objective in nats, counted tokens, and of all layers the balance and the squared log-partition of the router."""
    tokens, labels, mask = (
        torch.from_numpy(getattr(batch, name)) for name in ("tokens_BS", "labels_BS", "loss_mask_BS")
    )
    output = mixtral(input_ids=tokens, output_router_logits=True)
    logits = output.logits.flatten(0, 1)
    nll = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
    nats = ((nll + 1e-4 * logits.logsumexp(-1).square()) * mask.flatten()).sum()
    balance = z = torch.zeros(())
    for router_logits in output.router_logits:
        probability = router_logits.softmax(-1)
        chosen = torch.zeros_like(probability).scatter(1, probability.topk(EXPERTS.num_experts_per_token).indices, 1.0)
        sent = chosen.sum(0) / chosen.sum()
        balance = balance + EXPERTS.num_experts * (sent * probability.mean(0)).sum()
        z = z + router_logits.logsumexp(-1).square().mean()
    return torch.stack((nats, mask.sum(), balance, z))


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(everything, 8, limit_seconds=LIMIT_SECONDS)


@pytest.fixture
def found(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What rank 0 found."""
    return ranks[0]


def assert_same_curve(name: str, other: Curve, one: Curve) -> None:
    """Equal losses, gradient norms and router losses; `pytest -rP` shows how equal."""
    for quantity in ("loss", "grad_norm", "z_loss", "router_balance", "router_z", "router_dropped"):
        mine, its = other.of(quantity), one.of(quantity)[: len(other.steps)]
        print(f"{name}: {quantity} {max(abs(a - b) for a, b in zip(mine, its, strict=True)):.1e} of {max(its):.2f}")
        assert mine == pytest.approx(its, abs=1e-5, rel=1e-5), quantity
    assert [step.num_tokens for step in other.steps] == [step.num_tokens for step in one.steps[: len(other.steps)]]


@pytest.mark.parametrize("name", [*(f"curves/{name}" for name in CURVES), *(f"combined/{name}" for name in COMBINED)])
def test_curves_are_those_of_one_rank(found, name):
    one = found["curves/one"]
    assert one.of("loss")[-1] < one.of("loss")[0] - 0.3, "the model learns, so equal curves say something"
    assert max(one.of("router_balance")) > 1.02, "and routers are uneven, so equal losses do"
    assert_same_curve(name, found[name], one)


def test_interleaved_pipeline_is_on_the_curve_of_one_rank(found):
    assert_same_curve("interleaved", found["deep/expert x interleaved"], found["deep/one"])


@pytest.mark.parametrize("name", CURVES)
def test_held_out_rows_score_the_same(found, name):
    one, other = found["curves/one"].held_out, found[f"curves/{name}"].held_out
    assert other["sample_ids_B"] == one["sample_ids_B"]
    assert other["loss_B"] == pytest.approx(one["loss_B"], abs=1e-3)


@pytest.mark.parametrize("name", DROPPED)
def test_experts_drop_the_same_tokens_of_a_micro_batch(found, name):
    one = found["dropping/one"]
    assert 0.01 < min(one.of("router_dropped")) < 0.5
    assert_same_curve(f"dropping/{name}", found[f"dropping/{name}"], one)


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_are_on_the_curve_of_one_rank(found, name):
    one = found["packed/one"]
    assert one.of("loss")[1] != pytest.approx(found["curves/one"].of("loss")[1], abs=1e-4), "documents are kept apart"
    assert_same_curve(f"packed/{name}", found[f"packed/{name}"], one)


def test_every_rank_is_told_the_same(ranks):
    for name, layout in CURVES.items():
        for rank in range(layout.mesh.world_size):
            assert ranks[rank][f"curves/{name}"] == ranks[0][f"curves/{name}"]


def test_run_resumed_with_half_the_ranks_again_and_again_is_on_the_same_curve(found):
    steps = [step for part in range(len(SHRINKING)) for step in found[f"shrinking/{part}"].steps]
    assert_same_curve("shrinking", Curve(steps, {}), found["curves/one"])


def test_run_resumed_on_the_same_layout_is_equal_to_the_last_bit(found):
    result = found["resumed"]
    assert result["resumed"] == result["straight"]
    assert result["different"] == []
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in result["names"]


@pytest.mark.parametrize("name", ["loss", "grad_norm", "router_balance", "router_z"])
def test_training_follows_mixtral_under_torch_adamw(found, name):
    ours, theirs = found["curves/one"].of(name)[:FEW_STEPS], found["mixtral"][name]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in PRUNED | OBSERVED if name != "one"])
@pytest.mark.parametrize("kind", ["activation", "magnitude"])
def test_scores_of_parts_do_not_depend_on_the_layout(found, kind, name):
    for scores, one in found["pruned/one"][kind].items():
        assert one.std() > 0 or scores == "energy_ND", f"{scores} tell parts apart, so equal ones say something"
        assert found[f"pruned/{name}"][kind][scores] == pytest.approx(one, rel=1e-5), scores


@pytest.mark.parametrize("name", [name for name in PRUNED if name != "one"])
def test_pruned_experts_are_the_same_and_recover_alike_under_every_layout(found, name):
    one, other = found["pruned/one"], found[f"pruned/{name}"]
    assert {weight: tensor.shape for weight, tensor in other["weights"].items()} == logical_shapes(CUT)
    for weight, tensor in one["weights"].items():
        assert other["weights"][weight] == pytest.approx(tensor, abs=1e-6), weight
    assert other["rows"] == pytest.approx(one["rows"], abs=1e-5)
    assert one["steps"][-1].loss < one["steps"][0].loss, "the student learns, so equal curves say something"
    for mine, its in zip(other["steps"], one["steps"], strict=True):
        assert mine.loss == pytest.approx(its.loss, abs=1e-5)
        assert mine.metrics == pytest.approx(its.metrics, abs=1e-5)
        assert mine.grad_norm == pytest.approx(its.grad_norm, abs=1e-4)


def test_pruned_experts_say_in_transformers_what_they_say_here(found):
    assert found["pruned/one"]["mixtral"] == pytest.approx(found["pruned/one"]["rows"], abs=1e-5)


def test_cutting_parts_that_do_nothing_of_a_mixture_changes_nothing(found):
    """Experts that are sent nothing are those cut, as are idle channels, heads, and neurons of each expert."""
    result = found["nothing lost"]
    assert max(result["before"]) > 1.0
    assert result["after"] == pytest.approx(result["before"], rel=1e-4)
