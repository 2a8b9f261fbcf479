"""Rules of a mixture of experts: what each refuses, and in which words."""

from dataclasses import replace

import pytest
from check_samples import BIG_DISK, LAPTOP, assert_told, changed, composed, full_size, layout, problems_of, rehearsal

from conf.schema import ShapeConfig
from recipes import check, rules_place
from recipes.stage_models import grid_of, model_of_stage


@pytest.fixture
def mixture():
    return composed("foundation", "model=mixtral_8x7b")


def test_mixture_is_rehearsed_on_two_cores(mixture):
    assert problems_of(mixture) == {}
    assert problems_of(changed(mixture, engine__mesh__expert=2)) == {}


def test_experts_are_counted_by_the_ranks(mixture):
    words = ("8 experts", "3 ranks", "Possible with data 6 x context 1: 1, 2.")
    assert_told(layout(mixture, expert=3, data=6), "engine.mesh.expert", *words)


def test_expert_groups_divide_data_and_context(mixture):
    words = ("data 3 x context 2 = 6 ranks", "groups of 4", "Possible: 1, 2;", "data x context of 4 or 8")
    assert_told(layout(mixture, expert=4, data=3, context=2), "engine.mesh.expert", *words)


def test_dense_model_has_no_experts_to_share():
    assert_told(layout(rehearsal(), expert=2), "engine.mesh.expert", "frontier_70b has no experts", "expert=1")


def test_token_goes_to_some_experts_and_not_more_than_there_are(mixture):
    path = "model.experts.num_experts_per_token"
    assert_told(changed(mixture, model__experts__num_experts_per_token=9), path, "9 of 8 experts", "Largest: 8")
    assert_told(changed(mixture, model__experts__num_experts_per_token=1), path, "always 1", "2 or more")


def test_expert_width_is_shared_by_tensor_ranks(mixture):
    config = layout(changed(mixture, model__ffn_hidden_size=193), tensor=2)
    assert_told(config, "engine.mesh.tensor", "ffn_hidden_size=193")


def test_tensor_ranks_split_the_sequence(mixture):
    assert_told(layout(mixture, tensor=2), "engine.sequence_parallel", "2 tensor ranks", "sequence_parallel=true")
    assert problems_of(changed(layout(mixture, tensor=2), engine__sequence_parallel=True)) == {}


def test_expert_groups_across_nodes_are_warned_of():
    model = composed("foundation", "model=mixtral_8x7b", "cluster=h200_ray").model
    config = full_size("foundation", model=model)

    def warned(**axes):
        return [each.message for each in check.warnings(layout(config, **axes), BIG_DISK) if "expert" in each.path]

    (message,) = warned(tensor=2, expert=8)
    assert "tensor 2 x expert 8 = 16 ranks" in message and "nodes of 8" in message and "1, 2, 4, 8" in message
    assert warned(tensor=1, expert=8) == []


def test_experts_that_cannot_take_their_share_are_warned_of(mixture):
    def warned(factor):
        config = changed(mixture, model__experts__capacity_factor=factor)
        return [each.message for each in check.warnings(config, LAPTOP) if "capacity" in each.path]

    assert "at least 25%" in warned(0.75)[0]
    assert warned(1.25) == warned(None) == []


def test_data_ranks_are_as_many_as_expert_groups_need(mixture):
    def data(machine, **axes):
        return check.resolve(changed(mixture, **axes), machine).engine.mesh.data

    assert data(LAPTOP, engine__mesh__expert=4) == 4
    assert data(LAPTOP, engine__mesh__expert=4, engine__mesh__context=2) == 2
    assert data(replace(LAPTOP, cores=3, memory_bytes=2**36), engine__mesh__expert=2) == 2


def test_memory_is_that_of_the_experts_a_rank_holds(mixture):
    def state(**axes):
        return rules_place.state_bytes(check.resolve(layout(mixture, data=4, **axes), BIG_DISK))

    experts = mixture.model.num_expert_parameters
    dense = mixture.model.num_parameters - experts
    weights_and_gradients, adam = 8, 8
    assert state() == (dense + experts) * weights_and_gradients + (dense + experts) * adam // 4
    by_two = (dense + experts // 2) * weights_and_gradients + dense * adam // 4 + experts // 2 * adam // 2
    assert state(expert=2) == pytest.approx(by_two, abs=1)


def test_mixture_of_full_size_fits_a_layout_with_expert_groups():
    config = full_size("foundation", model=composed("foundation", "model=mixtral_8x7b", "cluster=h200_ray").model)
    config = layout(config, tensor=2, pipeline=4, virtual_pipeline=4, expert=8)
    assert problems_of(config, BIG_DISK) == {}


SMALLER = ShapeConfig(
    num_layers=4, hidden_size=96, ffn_hidden_size=96, num_attention_heads=4, num_kv_heads=2, num_experts=6
)


def pruning(**changes):
    """A module recipe of a mixture that cuts a given shape out of it."""
    config = composed("business_module", "model=mixtral_8x7b", "order=[specialise,prune,recover]")
    return changed(config, stages__prune__shape=replace(SMALLER, **changes))


def test_mixture_is_cut_and_recovered():
    searched = composed("business_module", "model=mixtral_8x7b", "order=[specialise,prune,recover,distill]")
    for config in (searched, pruning(), layout(pruning(), expert=2, data=2), pruning(num_experts=None)):
        assert problems_of(config) == {}
    model = model_of_stage(pruning(), "recover")
    assert model.num_experts == 6 and model.num_parameters < 0.7 * searched.model.num_parameters


def test_experts_that_stay_suffice_for_a_token_and_are_shared_by_the_ranks():
    path = "stages.prune.shape.num_experts"
    assert_told(pruning(num_experts=1), path, "is 1", "num_experts_per_token=2", "Smallest: 2")
    assert_told(pruning(num_experts=9), path, "is 9, more than model.num_experts=8", "only shrink")
    assert_told(layout(pruning(), expert=4, data=4), path, "6 experts", "4 ranks", "Nearest: 4 or 8")
    dense = rehearsal(stages__prune__shape=SMALLER)
    assert_told(dense, path, "is 6", "is dense", "null")


def test_search_leaves_as_many_experts_as_expert_ranks_share():
    config = composed("business_module", "model=mixtral_8x7b", "order=[specialise,prune,recover]")
    for expert in (1, 2, 4):
        at = check.resolve(layout(config, expert=expert, data=4), LAPTOP)
        assert grid_of(at, at.stages["prune"].search).experts_multiple == expert
        assert model_of_stage(at, "recover").num_experts % expert == 0


def test_of_a_mixture_weights_alone_are_rounded_and_in_all_layers():
    config = composed("business_module", "model=mixtral_8x7b", "stages.quantise.most_cost=0.1")
    for field in ("scheme", "smoothing", "most_cost"):
        assert_told(config, f"stages.quantise.{field}", "8 experts a layer", "scheme=w8a16", "out of order")
    weights_alone = ("stages.quantise.scheme=w8a16", "stages.quantise.smoothing=null")
    config = composed("business_module", "model=mixtral_8x7b", *weights_alone)
    assert not [path for path in problems_of(config) if path.startswith("stages.quantise")]
