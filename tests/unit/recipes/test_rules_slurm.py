"""What is asked of Slurm."""

import itertools
from dataclasses import replace

import pytest
from check_samples import BIG_DISK, assert_told, changed, composed, layout, problems_of, rehearsal

from conf.schema import ContainerConfig
from recipes import chain, check
from recipes.rules_slurm import step_seconds


def queued(recipe="foundation", **values):
    """At full size on Slurm, with everything a user has to fill in; `slurm__...` are fields of `cluster.slurm`."""
    config = composed(recipe, "cluster=h200_slurm")
    sources = {name: replace(source, path=f"s3://data/{name}") for name, source in config.data.sources.items()}
    config = replace(config, data=replace(config.data, tokenizer="shipped:tokenizer", sources=sources))
    return changed(config, **{name.replace("slurm__", "cluster__slurm__"): value for name, value in values.items()})


def told(config, path, *words):
    assert_told(config, path, *words, machine=BIG_DISK)


def test_the_full_size_foundation_passes_on_slurm_as_it_is():
    assert problems_of(queued(), BIG_DISK) == {}
    assert check.warnings(queued(), BIG_DISK) == []


def test_nodes_that_are_no_multiple_of_the_mesh_are_told():
    # Pipeline 4 x context 2 x tensor 4 is 4 nodes of 8; 9 nodes leave half a group over.
    told(queued(cluster__num_nodes=9, engine__mesh__data=None), "engine.mesh", "must divide 72")


def test_an_axis_that_does_not_fit_the_nodes_is_told():
    config = queued(cluster__num_nodes=2)
    told(layout(config, tensor=4, pipeline=2, data=4), "engine.mesh", "32 ranks", "2 x 8 = 16")


class TestTime:
    def test_a_limit_without_time_to_train_is_told(self):
        told(
            queued(slurm__time_limit_minutes=10, slurm__signal_seconds=600),
            "cluster.slurm.time_limit_minutes",
            "is 10 (600 s)",
            "at least 12",
        )

    def test_a_limit_shorter_than_a_checkpoint_interval_is_told_with_both_remedies(self):
        config = queued(slurm__time_limit_minutes=120)
        seconds = step_seconds(check.resolve(config, BIG_DISK), "pretrain")
        assert seconds is not None and 5 < seconds < 60
        config = changed(config, stages__pretrain__training__checkpoint_every_steps=int(4 * 3600 / seconds))
        told(
            config,
            "cluster.slurm.time_limit_minutes",
            "first checkpoint after",
            "= 240 min" if int(4 * 3600 / seconds) * seconds / 60 > 239.5 else "= 239 min",
            f"at most {int((120 * 60 - 600) / seconds)}",
        )

    def test_checkpoints_only_at_the_end_or_a_stop_have_no_interval(self):
        config = changed(queued(slurm__time_limit_minutes=30), stages__pretrain__training__checkpoint_every_steps=0)
        assert problems_of(config, BIG_DISK) == {}

    def test_without_a_limit_there_is_nothing_to_say(self):
        assert problems_of(queued(slurm__time_limit_minutes=None), BIG_DISK) == {}

    def test_a_step_on_cpus_is_not_guessed(self):
        assert step_seconds(check.resolve(queued(cluster__device="cpu"), BIG_DISK), "pretrain") is None


@pytest.mark.parametrize(
    ("values", "path", "words"),
    [
        ({"cluster__slurm": None}, "cluster.slurm", ["is null"]),
        ({"cluster__device": "auto"}, "cluster.device", ["cannot be looked at from here"]),
        ({"cluster__address": "auto"}, "cluster.address", ["starts a Ray of its own"]),
        ({"cluster__node_labels": {"a": "b"}}, "cluster.node_labels", ["--constraint"]),
        ({"cluster__ranks_per_node": None}, "cluster.ranks_per_node", ["is null"]),
        ({"slurm__exclusive": False}, "cluster.slurm.cpus_per_node", ["one processor", "e.g. to 16"]),
        ({"slurm__account": "a b"}, "cluster.slurm.account", ["'a b'"]),
        ({"slurm__sbatch": ("constraint=ib",)}, "cluster.slurm.sbatch", ["is not one option"]),
        ({"slurm__sbatch": ("--comment=a\nrm -r x",)}, "cluster.slurm.sbatch", ["is not one option"]),
        ({"slurm__sbatch": ("--nodes=3",)}, "cluster.slurm.sbatch", ["cluster.num_nodes"]),
        ({"slurm__sbatch": ("-A x",)}, "cluster.slurm.sbatch", ["cluster.slurm.account"]),
        ({"slurm__sbatch": ("-N4",)}, "cluster.slurm.sbatch", ["cluster.num_nodes"]),
        ({"slurm__sbatch": ("--no-requeue",)}, "cluster.slurm.sbatch", ["cluster.slurm.max_requeues"]),
        ({"slurm__variables": {"A B": "1"}}, "cluster.slurm.variables", ["no name"]),
        ({"slurm__variables": {"WANDB_API_KEY": "1"}}, "cluster.slurm.variables", ["for all to read"]),
        (
            {"slurm__container": ContainerConfig(runtime="pyxis", image=None, mounts=())},
            "cluster.slurm.container",
            ["Give both"],
        ),
        (
            {"slurm__container": ContainerConfig(runtime="none", image="x", mounts=())},
            "cluster.slurm.container",
            ["Give both"],
        ),
        (
            {"slurm__container": ContainerConfig(runtime="pyxis", image="x", mounts=("data",))},
            "cluster.slurm.container.mounts",
            ["'data'"],
        ),
    ],
)
def test_each_fault_is_told_where_it_is(values, path, words):
    told(queued(**values), path, *words)


class TestStagesOnOtherNodes:
    def test_data_ranks_follow_the_nodes_and_stages_are_checked_where_they_run(self):
        # A quarter of the nodes, and a quarter of the data ranks; pretraining would not fit them in time.
        assert problems_of(queued(slurm__stage_nodes={"evaluate": 64, "export": 4}), BIG_DISK) == {}

    def test_a_mesh_that_does_not_divide_them_is_told(self):
        told(queued(slurm__stage_nodes={"export": 3}), "engine.mesh", "3 x 8 = 24", "must divide 24")

    def test_what_is_wrong_with_a_stage_is_told_of_the_nodes_it_has(self):
        # 12 nodes are 3 data ranks.
        path, batch = "stages.pretrain.training.global_batch", 2048
        found = problems_of(queued(slurm__stage_nodes={"evaluate": 12}), BIG_DISK)
        assert found == {}
        told(queued(slurm__stage_nodes={"pretrain": 12}), path, f"{batch} sequences cannot be shared by 3 data ranks")

    def test_a_stage_there_is_not_is_told(self):
        told(queued(slurm__stage_nodes={"evluate": 4}), "cluster.slurm.stage_nodes", "Did you mean", "evaluate")

    def test_neighbours_of_one_size_share_a_job_which_knows_its_stages(self):
        config = queued("business_module", slurm__stage_nodes={"evaluate": 4, "quantise": 4, "prune": 8})
        found = chain.links(config)
        assert [stage for link in found for stage in link.stages] == list(config.order)
        assert all(one.num_nodes != two.num_nodes for one, two in itertools.pairwise(found))
        small = chain.on_nodes(chain.on_nodes(config, 8), 4)
        here = [stage for stage in config.order if chain.is_here(small, stage)]
        assert here == [stage for stage in config.order if stage in ("evaluate", "quantise")]
        assert chain.links(small) == found
        others = small.engine.mesh.tensor * small.engine.mesh.context * small.engine.mesh.pipeline
        assert small.engine.mesh.data == 4 * 8 // others

    def test_the_rest_is_for_another_job_where_the_next_stage_is_not_here(self):
        config = queued(slurm__stage_nodes={"evaluate": 4})
        first, *_ = config.order
        done = {first}
        assert chain.stage_of_next_job(config, lambda stage: False) is None
        assert chain.stage_of_next_job(config, done.__contains__) == "evaluate"
        assert chain.stage_of_next_job(chain.on_nodes(config, 4), done.__contains__) is None
        assert chain.stage_of_next_job(chain.on_nodes(config, 4), lambda stage: True) is None


def test_writing_a_job_without_submitting_needs_a_cluster_of_slurm():
    assert_told(rehearsal(action="dry_run"), "action", "cluster.kind is local", "cluster=h200_slurm")


def test_checks_that_are_switched_off_on_gpus_are_warned_of():
    preflight = replace(queued().cluster.slurm.preflight, infiniband_ports=0)
    (warning,) = check.warnings(queued(slurm__preflight=preflight), BIG_DISK)
    assert "infiniband_ports" in warning.message
