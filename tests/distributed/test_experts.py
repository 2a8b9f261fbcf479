"""A mixture of experts is the same model under every layout, and Hugging Face's Mixtral. One launch of eight ranks."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from parallel.initial import InitialWeights

LIMIT_SECONDS = 400.0
pytestmark = pytest.mark.timeout(LIMIT_SECONDS + 30)

NUM_STEPS = 20
FEW_STEPS = 5
PACKED_STEPS = 2

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
    if size == 4:
        found["resumed"] = on_mesh(RESUMED, _train_and_resume)
    if size == 1:
        found["mixtral"] = _mixtral()


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


def mixtral_like(model: ModelConfig, weights: InitialWeights) -> Any:
    """A MixtralForCausalLM of these weights, loaded from a directory in the stored layout."""
    from safetensors.torch import save_file
    from transformers import MixtralForCausalLM

    from recipes.export import hugging_face_config, write_json

    with tempfile.TemporaryDirectory() as directory:
        tensors = {name: weights.read(name, (0,) * len(shape), shape) for name, shape in weights.shapes.items()}
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
