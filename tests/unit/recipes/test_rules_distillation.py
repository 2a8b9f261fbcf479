"""Rules of hidden states and of logits that were written down: what each refuses, and in which words."""

from dataclasses import asdict, replace

import pytest
from check_samples import LAPTOP, assert_told, changed, full_size, layout, problems_of, rehearsal

from conf.schema import HiddenStatesConfig, LogitsStage
from data.logits import LogitsManifest, finish
from data.storage import Store
from recipes import check, fit
from recipes.recording import about_text
from recipes.rules_distillation import rank_of_layer
from recipes.stage_models import models_of
from train.quantities import byte_size

STATES = HiddenStatesConfig(layers={0: 1, 3: 3}, distance="cosine", weight=1.0)
RECORD = LogitsStage(kind="logits", stage="distill", stored_as="fp16", location=None)
ORDER = ("specialise", "logits", "distill", "evaluate")


def recording(**values):
    config = rehearsal(
        stages__logits=RECORD,
        stages__distill__distillation__logits="logits",
        stages__distill__distillation__top_k=16,
        stages__evaluate__models=("specialise", "distill"),
        stages__evaluate__ngram_models=(),
        stages__evaluate__comparisons={},
        stages__evaluate__targets={},
        order=ORDER,
    )
    return changed(config, **values)


def reading(folder, **values):
    values = {"stages__distill__distillation__logits": str(folder)} | values
    return recording(order=("specialise", "distill", "evaluate"), **values)


def test_hidden_states_and_recordings_as_meant_are_sound():
    assert problems_of(rehearsal(stages__recover__distillation__hidden_states=STATES)) == {}
    assert problems_of(recording()) == {}


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({}, ["is empty"]),
        ({4: 1}, ["student has layers 0 to 3"]),
        ({0: 4}, ["teacher has layers 0 to 3"]),
        ({0: 2}, ["student's layer is on number 0", "teacher's on 1", "do not travel", "0, 1"]),
    ],
)
def test_hidden_states_are_of_layers_that_one_rank_has(layers, words):
    states = replace(STATES, layers=layers)
    config = layout(rehearsal(stages__recover__distillation__hidden_states=states), pipeline=2)
    assert_told(config, "stages.recover.distillation.hidden_states.layers", *words)


def test_chunks_of_an_interleaved_pipeline_go_round():
    config = layout(rehearsal(), pipeline=2, virtual_pipeline=2)
    assert [rank_of_layer(layer, 8, config) for layer in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_hidden_states_take_memory_that_is_known():
    config = check.resolve(rehearsal(), LAPTOP)
    plain = fit.memory_of_stage(config, "recover")
    taught = fit.memory_of_stage(changed(config, stages__recover__distillation__hidden_states=STATES), "recover")
    assert taught.teacher > plain.teacher > 0 and taught.logits == plain.logits
    config = check.resolve(recording(), LAPTOP)
    assert fit.memory_of_stage(config, "distill").teacher == 0, "it is not there"


@pytest.mark.parametrize(
    ("values", "path", "words"),
    [
        (
            {"stages__logits__stage": "evaluate"},
            "stages.logits.stage",
            ["no stage that distils", "distill"],
        ),
        ({"order": ("specialise", "distill", "logits")}, "stages.logits.stage", ["comes before"]),
        ({"order": ("logits", "specialise", "distill")}, "stages.logits.stage", ["'specialise', is not made before"]),
        ({"stages__distill__distillation__logits": None}, "stages.logits.stage", ["distillation.logits=logits"]),
        ({"stages__distill__distillation__top_k": 0}, "stages.distill.distillation.top_k", ["never written down"]),
        (
            {"stages__distill__distillation__logits": "prune"},
            "stages.distill.distillation.logits",
            ["of kind logits"],
        ),
        (
            {"stages__distill__distillation__hidden_states": STATES},
            "stages.distill.distillation.hidden_states",
            ["logits=null"],
        ),
    ],
)
def test_what_is_written_down_is_what_a_later_stage_reads(values, path, words):
    assert_told(recording(**values), path, *words)


def test_a_run_on_the_teachers_own_mesh_may_write_for_another_runs_student():
    order = ("specialise", "logits", "evaluate")
    config = recording(order=order, stages__evaluate__models=("specialise",))
    assert problems_of(layout(config, data=2)) == {}
    config = changed(config, stages__distill__training__global_batch=6)
    assert_told(layout(config, data=2), "stages.distill.training.global_batch", "2 data ranks", "Nearest")


def test_a_recording_of_other_text_or_too_short_a_one_is_refused_before_launch(tmp_path):
    config = check.resolve(recording(), LAPTOP)
    assert_told(reading(tmp_path / "nowhere"), "stages.distill.distillation.logits", "no logits.json", "kind logits")
    training = config.stages["distill"].training
    manifest = LogitsManifest(
        format_version=1,
        about=about_text(config, "distill") | {"tokenizer": "a", "data": {}, "teacher": "b"},
        vocab_size=1024,
        tokens=training.sequence_length,
        top_k=16,
        stored_as="fp16",
        num_samples=training.num_steps * training.global_batch,
    )
    written(tmp_path / "good", manifest)
    assert problems_of(reading(tmp_path / "good")) == {}
    for values, word in (
        ({"seed": 7}, "seed is 1234 and should be 7"),
        ({"stages__distill__distillation__temperature": 2.0}, "temperature is 1.0"),
        ({"stages__distill__training__sequence_length": 64}, "sequence_length is 128 and should be 64"),
        ({"stages__distill__training__tokens": 10**6}, "samples and"),
    ):
        assert_told(reading(tmp_path / "good", **values), "stages.distill.distillation.logits", word)


def test_a_recording_larger_than_the_disk_is_refused_with_its_size():
    steps = recording().stages["distill"].training.num_steps
    need = steps * 8 * 128 * 16 * 4  # samples, tokens, logits, bytes of a value and an id
    full, roomy = (replace(LAPTOP, free_disk_bytes=lambda path, free=free: free) for free in (need - 1, need))
    assert_told(recording(), "stages.logits.location", f"take up to {byte_size(need)}", "s3://", machine=full)
    assert "stages.logits.location" not in problems_of(recording(), roomy)


def written(folder, manifest):
    """The manifest of a recording alone: nothing of it is read before launch."""
    finish(Store.open(folder), replace(manifest, num_samples=0))
    file = folder / "logits.json"
    file.write_text(file.read_text().replace('"num_samples": 0', f'"num_samples": {manifest.num_samples}'))
    assert asdict(manifest)["num_samples"] > 0


def test_a_mesh_that_changes_a_shape_is_warned_of_with_what_would_not():
    def told(config):
        return {each.path: each.message for each in check.warnings(config, LAPTOP) if "the shape is" in each.message}

    config = check.resolve(layout(rehearsal(), tensor=2), LAPTOP)
    assert "kv_heads_multiple=2 layers_multiple=1" in told(config)["stages.distill.student"]
    assert told(rehearsal()) == {}
    settled = changed(config, stages__distill__student__kv_heads_multiple=2)
    assert "stages.distill.student" not in told(settled)


@pytest.mark.parametrize("axes", [{"tensor": 1}, {"tensor": 2, "pipeline": 10}, {"tensor": 4, "pipeline": 20}])
def test_shapes_at_full_size_are_the_same_on_every_mesh_that_can_share_them(axes):
    config = full_size()
    assert models_of(layout(config, **axes)) == models_of(config)
