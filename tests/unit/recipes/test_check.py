"""What passes, how a configuration is resolved, and the arithmetic that every accepted layout keeps."""

from dataclasses import asdict, replace

import pytest
from check_samples import BIG_DISK, FOUR_GPUS, LAPTOP, changed, full_size, layout, problems_of, rehearsal
from hypothesis import given, settings
from hypothesis import strategies as st

from conf import load
from conf.schema import MeshConfig
from recipes import check, rules_layout
from recipes.machine import GIB, Machine


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
        config = rehearsal(order=("specialise",), stages__specialise__training__global_batch=64)
        data = [
            check.resolve(layout(config, **axes), FOUR_GPUS).engine.mesh.data
            for axes in ({}, {"tensor": 2}, {"tensor": 2, "pipeline": 2})
        ]
        assert data == [4, 2, 1]

    def test_data_leaves_memory_for_each_rank(self):
        config = rehearsal(order=("specialise",), stages__specialise__training__global_batch=64)
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
