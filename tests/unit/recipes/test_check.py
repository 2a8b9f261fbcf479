"""Every rule: what it refuses, in which words, and that it lets sound configurations pass."""

from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf import load
from conf.errors import ConfigError
from conf.schema import MeshConfig
from recipes import check, rules_layout, rules_place
from recipes.machine import GIB, Machine

LAPTOP = Machine(cores=2, memory_bytes=16 * GIB, free_disk_bytes=lambda path: 100 * GIB)
BIG_DISK = replace(LAPTOP, free_disk_bytes=lambda path: 10**15)
FOUR_GPUS = replace(LAPTOP, cores=64, gpus=("H100",) * 4, gpu_memory_bytes=80 * GIB)


@cache
def composed(recipe, *overrides):
    return load.compose([f"recipe={recipe}", *overrides])


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def changed(config, **values):
    """`changed(config, engine__mesh__tensor=2)`: the same with a nested field replaced; `stages__NAME__...` too."""
    for path, value in values.items():
        config = _with(config, path.split("__"), value)
    return config


def _with(node, path, value):
    if not path:
        return value
    first, *rest = path
    if isinstance(node, dict):
        return {**node, first: _with(node.get(first), rest, value)}
    return replace(node, **{first: _with(getattr(node, first), rest, value)})


def rehearsal(recipe="business_module", **values):
    return changed(composed(recipe), **values)


def full_size(recipe="business_module", **values):
    """At full size, with everything a user has to fill in."""
    config = composed(recipe, "cluster=h200_ray")
    sources = {name: replace(source, path=f"s3://data/{name}") for name, source in config.data.sources.items()}
    data = replace(config.data, tokenizer="shipped:tokenizer", sources=sources)
    return changed(replace(config, data=data, init=None if recipe == "foundation" else "given"), **values)


def problems_of(config, machine=LAPTOP):
    """Path -> messages, joined."""
    try:
        check.check(config, machine)
    except ConfigError as error:
        found = {}
        for problem in error.problems:
            found[problem.path] = " ".join(filter(None, [found.get(problem.path), problem.message]))
        return found
    return {}


def assert_told(config, path, *words, machine=LAPTOP):
    found = problems_of(config, machine)
    assert path in found, f"nothing is said of {path}: {found}"
    for word in words:
        assert word in found[path]


def layout(config, **axes):
    """With these axes, the others 1."""
    ones = {"tensor": 1, "context": 1, "pipeline": 1, "virtual_pipeline": 1, "data": None}
    return changed(config, engine__mesh=MeshConfig(**ones | axes))


class TestSound:
    @pytest.mark.parametrize("recipe", load.recipe_names())
    def test_every_recipe_rehearses_on_two_cores(self, recipe):
        assert problems_of(rehearsal(recipe)) == {}
        assert check.warnings(rehearsal(recipe), LAPTOP) == []

    @pytest.mark.parametrize("recipe", load.recipe_names())
    def test_every_recipe_passes_at_full_size_and_uses_every_gpu(self, recipe):
        found = problems_of(full_size(recipe), BIG_DISK)
        assert set(found) <= {"init"}, found
        resolved = check.resolve(full_size(recipe), BIG_DISK)
        assert check.mesh_of(resolved).world_size == resolved.budget.gpus
        assert check.warnings(full_size(recipe), BIG_DISK) == []

    @pytest.mark.parametrize(
        "axes",
        [
            {"tensor": 2},
            {"pipeline": 2},
            {"context": 2},
            {"data": 2},
            {"pipeline": 2, "virtual_pipeline": 2},
            {"tensor": 2, "pipeline": 2, "data": 2},
        ],
        ids=str,
    )
    def test_any_layout_of_up_to_eight_ranks_rehearses_on_two_cores(self, axes):
        assert problems_of(layout(rehearsal(), **axes)) == {}


class TestResolve:
    def test_data_takes_the_cores_as_far_as_the_batch_can_be_shared(self):
        ranks = {
            cores: check.resolve(rehearsal(), replace(LAPTOP, cores=cores)).engine.mesh.data for cores in (1, 2, 3, 64)
        }
        assert ranks == {1: 1, 2: 2, 3: 2, 64: 2}

    def test_data_takes_the_gpus_that_are_left_by_the_other_axes(self):
        config = rehearsal(stages__specialise__training__global_batch=64)
        data = [
            check.resolve(layout(config, **axes), FOUR_GPUS).engine.mesh.data
            for axes in ({}, {"tensor": 2}, {"tensor": 2, "pipeline": 2})
        ]
        assert data == [4, 2, 1]

    def test_data_leaves_memory_for_each_rank(self):
        config = rehearsal(stages__specialise__training__global_batch=64)
        small = Machine(cores=16, memory_bytes=3 * GIB)
        assert check.resolve(config, small).engine.mesh.data == 4

    def test_ranks_of_this_machine_are_those_of_the_mesh(self):
        resolved = check.resolve(layout(rehearsal(), tensor=2, pipeline=2), LAPTOP)
        assert resolved.cluster.ranks_per_node == check.mesh_of(resolved).world_size == 4

    def test_typed_values_stay(self):
        config = layout(rehearsal(cluster__ranks_per_node=4), data=4)
        assert check.resolve(config, LAPTOP) == config

    @pytest.mark.parametrize("recipe", load.recipe_names())
    def test_twice_is_once(self, recipe):
        for config in (rehearsal(recipe), full_size(recipe)):
            once = check.resolve(config, LAPTOP)
            assert check.resolve(once, LAPTOP) == once


axis = st.sampled_from([1, 2, 3, 4, 5, 8, 10])


class TestArithmetic:
    @settings(max_examples=400, deadline=None)
    @given(
        tensor=axis,
        context=st.sampled_from([1, 1, 2, 4, 3]),
        pipeline=axis,
        virtual_pipeline=st.sampled_from([1, 1, 2, 5]),
        data=st.one_of(st.none(), axis),
        nodes=st.sampled_from([1, 2, 4, 6, 40]),
        batch=st.sampled_from([8, 30, 96, 240, 480]),
        micro=st.sampled_from([1, 2, 3]),
        length=st.sampled_from([250, 96, 8192]),
    )
    def test_a_layout_passes_where_everything_is_shared_evenly_and_only_there(
        self, tensor, context, pipeline, virtual_pipeline, data, nodes, batch, micro, length
    ):
        config = changed(
            full_size(),
            engine__mesh=MeshConfig(
                tensor=tensor, context=context, pipeline=pipeline, virtual_pipeline=virtual_pipeline, data=data
            ),
            engine__sequence_parallel=tensor > 1,
            cluster__num_nodes=nodes,
            stages__specialise__training__global_batch=batch,
            stages__specialise__training__micro_batch=micro,
            stages__specialise__training__sequence_length=length,
        )
        resolved = check.resolve(config, LAPTOP)
        accepted = not any(problem for rule in rules_layout.RULES for problem in rule(resolved, LAPTOP))

        mesh, model = check.mesh_of(resolved), resolved.model
        num_micro_batches = batch // mesh.data // micro
        length_of_a_chunk = length // (2 * context) if context > 1 else length
        evenly = (
            mesh.world_size == nodes * 8
            and (nodes == 1 or 8 % tensor == 0)
            and num_micro_batches > 0
            and num_micro_batches * micro * mesh.data == batch
            and (virtual_pipeline == 1 or (pipeline > 1 and num_micro_batches % pipeline == 0))
            and model.num_layers in range(0, 81, pipeline * virtual_pipeline)
            and all(
                size // tensor * tensor == size
                for size in (model.num_attention_heads, model.num_kv_heads, model.ffn_hidden_size, model.vocab_size)
            )
            and length_of_a_chunk * (2 * context if context > 1 else 1) == length
            and (tensor == 1 or length // context // tensor * tensor * context == length)
            # The evaluation of this recipe reads 8,192 tokens a row, too.
            and 8192 % ((2 * context if context > 1 else 1) * tensor) == 0
        )
        assert accepted == evenly

    @given(st.integers(1, 10_000), st.integers(1, 200))
    def test_nearest_multiples_are_multiples_and_next_to_the_value(self, value, size):
        named = [int(word) for word in rules_layout.nearest_multiples(value, size).split(" or ")]
        assert all(each > 0 and each % size == 0 and abs(each - value) <= size for each in named)


class TestLayoutRules:
    def test_axes_multiply_to_the_ranks(self):
        config = layout(full_size(), tensor=8, data=16)
        assert_told(config, "engine.mesh", "is 128 ranks", "32 x 8 = 256", "engine.mesh.data=32")

    def test_axes_that_cannot_multiply_to_the_ranks(self):
        assert_told(layout(full_size(), tensor=4, pipeline=5), "engine.mesh", "is 20 and must divide 256")

    def test_tensor_ranks_stay_within_a_node(self):
        config = layout(full_size(cluster__ranks_per_node=4, cluster__num_nodes=64), tensor=8)
        assert_told(config, "engine.mesh.tensor", "must not cross nodes", "Possible: 1, 2, 4")

    def test_heads_divide(self):
        config = layout(rehearsal(), tensor=4)
        assert_told(config, "engine.mesh.tensor", "num_kv_heads=2", "Possible for this model: 1, 2.")

    def test_vocabulary_divides(self):
        config = layout(rehearsal(model__vocab_size=4097), tensor=2)
        assert_told(config, "model.vocab_size", "multiple of 2", "Nearest: 4096 or 4098")

    def test_layers_divide(self):
        config = layout(rehearsal(), pipeline=2, virtual_pipeline=3)
        assert_told(config, "engine.mesh.pipeline", "num_layers=4", "2 x virtual_pipeline 3 = 6", "1, 2, 4")

    def test_interleaving_needs_a_pipeline(self):
        assert_told(layout(rehearsal(), virtual_pipeline=2), "engine.mesh.virtual_pipeline", "virtual_pipeline=1")

    def test_interleaving_takes_whole_rounds(self):
        config = layout(rehearsal(stages__specialise__training__global_batch=12), pipeline=2, virtual_pipeline=2)
        words = ("3 micro-batches", "rounds of 2", "Nearest: 8 or 16")
        assert_told(config, "stages.specialise.training.global_batch", *words)

    def test_batch_divides(self):
        config = layout(rehearsal(stages__specialise__training__global_batch=100), data=3)
        words = ("100 sequences", "3 data ranks", "micro-batches of 4", "multiple of 12", "Nearest: 96 or 108")
        assert_told(config, "stages.specialise.training.global_batch", *words)

    def test_query_heads_share_key_value_heads(self):
        assert_told(rehearsal(model__num_kv_heads=3), "model.num_kv_heads", "4 attention heads", "Possible: 1, 2, 4")

    def test_rotary_positions_need_pairs(self):
        assert_told(rehearsal(model__head_dim=33), "model.head_dim", "must be even", "32 or 34")

    def test_sequence_parallel_needs_tensor_ranks(self):
        assert_told(rehearsal(engine__sequence_parallel=True), "engine.sequence_parallel", "sequence_parallel=false")

    @pytest.mark.parametrize("path", ["stages.specialise.training.sequence_length", "stages.evaluate.sequence_length"])
    def test_sequence_is_within_the_positions(self, path):
        config = rehearsal(**{path.replace(".", "__"): 512})
        assert_told(config, path, "is 512", "max_sequence_length=256")

    def test_sequence_splits_over_context_ranks(self):
        config = layout(rehearsal(stages__specialise__training__sequence_length=250), context=2)
        words = ("2 context ranks", "multiple of 4", "248 or 252")
        assert_told(config, "stages.specialise.training.sequence_length", *words)

    def test_sequence_splits_over_sequence_parallel_ranks(self):
        config = layout(rehearsal(stages__specialise__training__sequence_length=251), tensor=2)
        config = changed(config, engine__sequence_parallel=True)
        words = ("2 sequence-parallel tensor ranks", "Nearest: 250 or 252")
        assert_told(config, "stages.specialise.training.sequence_length", *words)

    def test_a_pipeline_that_mostly_waits_is_warned_of(self):
        config = layout(rehearsal(), pipeline=4, data=2)
        (warning,) = (each for each in check.warnings(config, LAPTOP) if each.path.startswith("stages"))
        # One micro-batch passes four ranks in turn: each works a quarter of the time.
        assert "1 micro-batches" in warning.message and "75 %" in warning.message


class TestStageRules:
    def test_order_is_not_empty(self):
        assert_told(rehearsal(order=()), "order", "empty", "specialise, evaluate, export")

    def test_order_names_stages(self):
        assert_told(rehearsal(order=("specialize", "export")), "order", "no stage", "Did you mean 'specialise'")

    def test_a_stage_runs_once(self):
        assert_told(rehearsal(order=("specialise", "export", "export")), "order", "'export' comes 2 times")

    @pytest.mark.parametrize("order", [("specialise",), ("evaluate",), ("export",)])
    def test_a_first_stage_needs_a_model(self, order):
        assert_told(rehearsal(order=order, init=None), "init", order[0], "init=recipe:foundation")

    def test_pretraining_does_not_start_from_a_model(self):
        assert_told(rehearsal("foundation", init="recipe:business_module"), "init", "fresh weights", "init=null")

    def test_pretraining_comes_first(self):
        pretrain = composed("foundation").stages["pretrain"]
        config = rehearsal(order=("specialise", "pretrain"), stages__pretrain=pretrain)
        assert_told(config, "order", "'pretrain'", "only come first")

    @pytest.mark.parametrize(
        ("models", "words"),
        [
            ((), ["empty", "[init,specialise]"]),
            (("export",), ["not a training stage", "[init,specialise]"]),
            (("specialize",), ["no stage 'specialize'", "Did you mean 'specialise'"]),
            (("init", "init"), ["'init' comes 2 times"]),
        ],
    )
    def test_evaluated_models_exist(self, models, words):
        assert_told(rehearsal(stages__evaluate__models=models), "stages.evaluate.models", *words)

    def test_evaluated_models_come_before(self):
        config = rehearsal(order=("evaluate", "specialise"))
        assert_told(config, "stages.evaluate.models", "'specialise' is not a training stage that comes before")

    def test_init_is_evaluated_only_where_there_is_one(self):
        config = rehearsal("foundation", stages__evaluate__models=("init", "pretrain"))
        assert_told(config, "stages.evaluate.models", "init is null", "Possible here: [pretrain]")

    @pytest.mark.parametrize(
        ("values", "path"),
        [
            ({"stages__specialise__training__mixture": {"busines": 1.0}}, "stages.specialise.training.mixture"),
            ({"stages__evaluate__sources": ("busines",)}, "stages.evaluate.sources"),
        ],
    )
    def test_sources_exist(self, values, path):
        assert_told(rehearsal(**values), path, "no source 'busines'", "Did you mean 'business'")

    @pytest.mark.parametrize(
        ("values", "path"),
        [
            ({"stages__specialise__training__mixture": {}}, "stages.specialise.training.mixture"),
            ({"stages__evaluate__sources": ()}, "stages.evaluate.sources"),
        ],
    )
    def test_sources_are_named(self, values, path):
        assert_told(rehearsal(**values), path, "empty", "business, development, creative")

    def test_warm_up_and_decay_leave_room_for_each_other(self):
        optim = replace(
            rehearsal().stages["specialise"].training.optim, schedule="wsd", warmup_fraction=0.5, decay_fraction=0.75
        )
        path = "stages.specialise.training.optim.decay_fraction"
        assert_told(rehearsal(stages__specialise__training__optim=optim), path, "at most 1", "Largest", "0.5")

    def test_tokens_make_a_step(self):
        config = rehearsal(stages__specialise__training__tokens=2047)
        assert_told(config, "stages.specialise.training.tokens", "8 x 256 = 2048")

    @pytest.mark.parametrize("path", ["stages.specialise.training.validation_tokens", "stages.evaluate.tokens"])
    def test_held_out_tokens_make_a_sequence(self, path):
        assert_told(rehearsal(**{path.replace(".", "__"): 255}), path, "less than one sequence of 256")

    def test_stages_left_out_are_warned_of(self):
        (warning,) = check.warnings(rehearsal(order=("specialise",), stages__export=None), LAPTOP)[:1]
        assert "'evaluate'" in warning.message and "will not run" in warning.message


class TestPlaceRules:
    def test_cuda_without_a_gpu(self):
        assert_told(rehearsal(cluster__device="cuda"), "cluster.device", "no GPU here", "device=auto")

    def test_why_there_is_no_gpu_is_passed_on(self):
        machine = replace(LAPTOP, gpu_fault="driver mismatch")
        assert_told(rehearsal(cluster__device="cuda"), "cluster.device", "driver mismatch", machine=machine)
        assert "driver mismatch" in str(check.warnings(rehearsal(), machine)[0])

    def test_more_ranks_than_gpus(self):
        config = layout(rehearsal(), data=8)
        assert_told(config, "engine.mesh", "8 ranks", "4 GPUs", machine=FOUR_GPUS)

    def test_more_ranks_than_cores_can_take(self):
        assert_told(layout(rehearsal(), data=9), "engine.mesh", "9 ranks", "2 CPU cores take at most 8")

    def test_more_ranks_than_cores_are_warned_of(self):
        (warning,) = check.warnings(layout(rehearsal(), tensor=2, data=2), LAPTOP)
        assert "4 ranks share 2 CPU cores" in warning.message

    def test_idle_gpus_are_warned_of(self):
        (warning,) = check.warnings(rehearsal(), FOUR_GPUS)
        assert "2 of 4 GPUs" in warning.message

    def test_ranks_need_memory_to_start(self):
        machine = replace(LAPTOP, memory_bytes=4 * GIB)
        assert_told(layout(rehearsal(), data=8), "engine.mesh", "8 ranks need at least 4.9 GiB", machine=machine)

    def test_full_size_does_not_fit_a_laptop(self):
        words = ("this machine has 16.0 GiB", "drop scale=full to rehearse")
        assert_told(changed(full_size(), cluster=composed("business_module").cluster), "engine.mesh", *words)

    def test_state_fits_a_gpu_and_a_layout_that_would_is_named(self):
        config = changed(layout(full_size(), context=2), engine__sequence_parallel=False)
        message = problems_of(config, BIG_DISK)["engine.mesh"]
        assert "a GPU has 131.3 GiB" in message
        named = dict(word.split("=") for word in message.split() if word.startswith("engine.mesh."))
        sizes = {name.removeprefix("engine.mesh."): int(size) for name, size in named.items()}
        assert sizes and "engine.mesh" not in problems_of(layout(config, context=2, **sizes), BIG_DISK)

    def test_least_memory_is_that_of_megatron_with_a_split_optimizer(self):
        config = check.resolve(layout(full_size(), tensor=8, pipeline=4, data=8), BIG_DISK)
        model = config.model
        layers = model.num_parameters - 2 * model.vocab_size * model.hidden_size
        first_rank = (layers // 4 + model.vocab_size * model.hidden_size) // 8
        assert rules_place.state_bytes(config) == first_rank * 6 + first_rank * 12 // 8

    def test_checkpoints_fit_on_the_disk(self):
        machine = replace(LAPTOP, free_disk_bytes=lambda path: 80 * 2**20)
        size = composed("business_module").model.num_parameters * 16
        words = ("has 80.0 MiB free", "3 checkpoints", f"{size / 2**20:.1f} MiB", "keep_checkpoints")
        assert_told(rehearsal(), "runs_dir", *words, machine=machine)

    def test_directories_are_not_files(self, tmp_path):
        (tmp_path / "file").touch()
        config = rehearsal(runs_dir=str(tmp_path / "file" / "runs"), data__cache_dir=str(tmp_path / "file"))
        assert_told(config, "runs_dir", "is a file")
        assert_told(config, "data.cache_dir", "is a file")

    def test_directories_can_be_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
        assert_told(rehearsal(runs_dir=str(tmp_path / "runs")), "runs_dir", "cannot be written", str(tmp_path))

    def test_directories_are_on_a_disk(self):
        assert_told(rehearsal(runs_dir="s3://bucket/runs"), "runs_dir", "disk that every node sees")

    def test_tokenizer_exists(self):
        assert_told(rehearsal(data__tokenizer="no/tokenizer.json"), "data.tokenizer", "no/tokenizer.json")
        assert_told(rehearsal(data__tokenizer="shipped:no"), "data.tokenizer", "shipped:tokenizer")
        assert_told(rehearsal(data__tokenizer="s3://bucket/tokenizer.json"), "data.tokenizer", "disk")

    def test_every_id_of_the_tokenizer_has_a_row(self):
        assert_told(rehearsal(model__vocab_size=1024), "model.vocab_size", "is 1024", "ids up to 4095", "Nearest: 4096")

    def test_sources_exist(self, tmp_path):
        def path_of(source):
            return problems_of(rehearsal(data__sources__business__path=source)).get("data.sources.business.path")

        (tmp_path / "empty").mkdir()
        (tmp_path / "text.txt").write_text("text")
        assert "there is no" in path_of("no.txt")
        assert "nothing of this name" in path_of("shipped:no")
        assert "empty folder" in path_of("empty")
        assert path_of("text.txt") is None and path_of("s3://bucket/business") is None

    def test_placeholders_are_refused(self):
        found = problems_of(composed("foundation", "cluster=h200_ray"), BIG_DISK)
        assert set(found) == {"data.tokenizer", *(f"data.sources.{name}.path" for name in rehearsal().data.sources)}
        assert "Set data.tokenizer=" in found["data.tokenizer"]

    def test_local_is_one_machine(self):
        assert_told(rehearsal(cluster__num_nodes=2), "cluster.num_nodes", "this machine alone", "cluster=h200_ray")
        assert_told(rehearsal(cluster__address="auto"), "cluster.address", "kind=ray")

    def test_ray_cluster_is_known(self):
        assert_told(full_size(cluster__address=None), "cluster.address", "address=auto")
        assert_told(full_size(cluster__ranks_per_node=None), "cluster.ranks_per_node", "Set it")

    def test_ray_train_on_nodes_takes_the_data_axis_alone(self):
        assert_told(full_size(launcher="ray_train"), "launcher", "any order", "launcher=gang")
        assert "launcher" not in problems_of(rehearsal(launcher="ray_train"))

    def test_tracking_online_without_a_key_is_warned_of(self, tmp_path):
        config = rehearsal(tracking__mode="online")
        bare = replace(LAPTOP, environment={"HOME": str(tmp_path)})
        assert "WANDB_API_KEY" in str(check.warnings(config, bare)[0])
        assert check.warnings(config, replace(bare, environment={"WANDB_API_KEY": "k"})) == []


class TestInit:
    def test_full_size_names_how_to_give_a_checkpoint(self):
        config = full_size(init="recipe:foundation")
        assert_told(config, "init", "no finished run of foundation", "init=RUNS_DIR/RUN", "recipe=foundation first")

    def test_full_size_finds_a_finished_run_of_its_model_only(self, tmp_path):
        config = full_size(init="recipe:foundation")
        run = tmp_path / "runs" / "foundation-20260131-142501-3f9a"
        run.mkdir(parents=True)
        (run / "status.json").write_text('{"status": "finished"}')
        load.write(composed("foundation"), run / "config.json")
        assert "init" in problems_of(config, BIG_DISK)
        load.write(composed("foundation", "scale=full"), run / "config.json")
        assert problems_of(config, BIG_DISK) == {}

    def test_rehearsal_rehearses_its_origin_first(self):
        assert problems_of(rehearsal(init="recipe:foundation")) == {}

    def test_recipe_exists_and_is_another(self):
        assert_told(rehearsal(init="recipe:fondation"), "init", "Did you mean 'foundation'")
        assert_told(rehearsal(init="recipe:business_module"), "init", "own recipe")

    def test_directory_exists(self):
        assert_told(rehearsal(init="foundation"), "init", "no directory", "Did you mean init=recipe:foundation")

    def test_directory_is_a_checkpoint(self, tmp_path):
        assert_told(rehearsal(init=str(tmp_path)), "init", "not a checkpoint", "manifest.json")

    def test_checkpoint_within_is_named(self, tmp_path):
        for step in (100, 200):
            folder = tmp_path / f"step-{step:08d}"
            folder.mkdir()
            (folder / "manifest.json").touch()
        assert_told(rehearsal(init=str(tmp_path)), "init", f"Did you mean init={tmp_path}/step-00000200?")

    def test_model_of_a_run_is_named(self, tmp_path):
        load.write(composed("foundation"), tmp_path / "config.json")
        (tmp_path / "stages" / "pretrain").mkdir(parents=True)
        (tmp_path / "stages" / "pretrain" / "result.json").write_text('{"checkpoint": "/runs/x", "seconds": 1}')
        assert_told(rehearsal(init=str(tmp_path)), "init", "Did you mean init=/runs/x?")

    def test_damaged_manifest_is_named(self, tmp_path):
        (tmp_path / "manifest.json").write_text("{}")
        assert_told(rehearsal(init=str(tmp_path)), "init", str(tmp_path), "manifest")

    def test_checkpoint_of_another_model_says_what_differs(self, tmp_path, monkeypatch):
        saved = replace(rehearsal().model, num_layers=6, name="other")
        manifest = type("Manifest", (), {"provenance": type("Provenance", (), {"model": saved})})
        monkeypatch.setattr(rules_place, "decode_manifest", lambda text, path: (manifest, ""))
        (tmp_path / "manifest.json").touch()
        assert problems_of(rehearsal(init=str(tmp_path))) == {
            "model.num_layers": f"is 4, and the model in {tmp_path} has 6. Set model.num_layers=6."
        }


def test_all_problems_are_told_at_once():
    config = rehearsal(order=("specialise", "exprt"), model__head_dim=33, runs_dir="s3://x", cluster__num_nodes=2)
    assert {"order", "model.head_dim", "runs_dir", "cluster.num_nodes"} <= set(problems_of(config))


def test_check_leaves_nothing_behind(tmp_path):
    check.check(rehearsal(), LAPTOP)
    assert list(tmp_path.iterdir()) == []


def test_check_does_not_change_the_configuration():
    config = rehearsal()
    before = asdict(config)
    check.check(config, LAPTOP)
    assert asdict(config) == before
