"""Changes told to somebody who ran out of memory: each of them valid, and fitting by the memory model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from check_samples import BIG_DISK, changed, full_size

from conf import load
from conf.schema import MeshConfig, RunConfig
from parallel.memory_errors import StepOutOfMemoryError
from parallel.plan.memory import GIB
from recipes import fit, run
from recipes.check import resolve
from recipes.fit import memory_of_stage
from recipes.fitting import advice, changes_for

STAGE = "specialise"


def large_batch(**values: object) -> RunConfig:
    """A 70B on 256 GPUs whose micro-batch is too large for them."""
    training = f"stages__{STAGE}__training"
    batch = {f"{training}__micro_batch": 8, f"{training}__global_batch": 512}
    config = changed(full_size(), **batch, engine__recompute="none")
    return resolve(changed(config, **values), BIG_DISK)


def test_three_changes_are_named_and_each_fits():
    config = large_batch()
    assert memory_of_stage(config, STAGE).needed > 80 * GIB
    found = changes_for(config, STAGE, 80 * GIB)
    assert len(found) == 3
    assert all(change.worst.needed <= 80 * GIB for change in found)
    assert [change.seconds for change in found] == sorted(change.seconds for change in found)
    assert f"stages.{STAGE}.training.micro_batch=1" in [change.overrides for change in found]


@pytest.mark.parametrize("capacity", [60 * GIB, 80 * GIB])
def test_no_change_contains_another(capacity):
    words = [set(change.overrides.split()) for change in changes_for(large_batch(), STAGE, capacity)]
    assert not any(one < other for one in words for other in words)


def test_changes_keep_the_number_of_ranks_and_divide_the_model():
    for change in changes_for(large_batch(), STAGE, 60 * GIB):
        values = dict(word.split("=") for word in change.overrides.split())
        typed = {key.replace(".", "__"): yaml.safe_load(value) for key, value in values.items()}
        at = resolve(changed(large_batch(), engine__mesh__data=None, **typed), BIG_DISK)
        assert fit.layout_of_stage(at, STAGE).num_gpus == 256
        assert fit.refusal(at, STAGE, fit.layout_of_stage(at, STAGE)) is None
        assert fit.fullest_of(at)[1].needed == change.worst.needed <= 60 * GIB


def test_every_stage_that_trains_is_advised():
    config = large_batch()
    for stage in ("recover", "continued", "distill"):
        found = changes_for(config, stage, 80 * GIB)
        assert advice(config, stage, 80 * GIB).count("GiB a rank)") == len(found)


def test_advice_says_what_is_needed_and_what_would_fit():
    text = advice(large_batch(), STAGE, 80 * GIB)
    assert "and a device has 80.0 GiB" in text
    assert "engine.recompute=full" in text


def test_host_memory_is_advised_where_there_is_enough_of_it():
    told = [change.overrides for change in changes_for(large_batch(engine__recompute="selective"), STAGE, 40 * GIB)]
    assert "engine.offload_activations=true" in told
    alone = fit.layout_of_stage(large_batch(), STAGE)
    away = fit.with_layout(large_batch(), STAGE, replace(alone, offload_activations=True))
    assert fit.memory_of_stage(away, STAGE).needed < 80 * GIB < fit.HOST_BYTES
    assert fit.memory_of_stage(away, STAGE).host_activations > fit.HOST_BYTES
    assert not any("offload" in change.overrides for change in changes_for(large_batch(), STAGE, 80 * GIB))


def test_host_memory_is_advised_for_optimizer_state_and_a_disk_where_that_is_too_small(monkeypatch):
    engine = replace(
        load.compose(["recipe=foundation", "engine=deepspeed", "cluster=h200_ray"]).engine,
        mesh=MeshConfig(tensor=8, context=1, pipeline=1, virtual_pipeline=1, data=None),
        recompute="full",
    )
    batch = {f"stages__{STAGE}__training__{key}": value for key, value in (("micro_batch", 1), ("global_batch", 64))}
    config = resolve(changed(full_size(), engine=engine, cluster__num_nodes=1, **batch), BIG_DISK)
    told = [change.overrides for change in changes_for(config, STAGE, 80 * GIB)]
    assert told == ["engine.offload_optimizer=cpu"]
    monkeypatch.setattr(fit, "HOST_BYTES", 100 * GIB)
    told = [change.overrides for change in changes_for(config, STAGE, 80 * GIB)]
    assert told == ["engine.offload_optimizer=nvme engine.offload_directory=DIR"]


def test_advice_where_the_model_sees_no_reason():
    assert "look for other processes" in advice(large_batch(), STAGE, 10**15)


def test_no_more_ranks_are_advised_where_these_suffice_by_the_model(monkeypatch):
    monkeypatch.setattr(fit, "changes_that_fit", lambda *_, **__: [])
    told = advice(large_batch(), STAGE, 10**15)
    assert "would save a tenth of it" in told and "more ranks" not in told


def test_advice_where_nothing_fits():
    assert "it takes more ranks" in advice(large_batch(), STAGE, GIB)


@pytest.mark.parametrize(("stage", "told"), [("recover", True), ("prune", False)])
def test_a_stage_that_trains_is_told_what_would_fit_wherever_memory_ran_out(monkeypatch, stage, told):
    def run_out(*_):
        raise StepOutOfMemoryError("building the teacher", "out of memory in building the teacher", 80 * GIB)

    monkeypatch.setattr(run, stage, run_out)
    given = SimpleNamespace(name=stage, context=SimpleNamespace(config=large_batch()))
    with pytest.raises(StepOutOfMemoryError, match="building the teacher") as raised:
        run.run_stage(given)
    assert ("Would fit:" in str(raised.value)) == told
