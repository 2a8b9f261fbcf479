"""Which nodes get ranks."""

from pathlib import Path

import pytest

from conf.errors import UserError
from slurm.choose import choose, read_reports, require_shared, require_some_sound
from slurm.preflight import Report

TWO_LEAVES = "SwitchName=a Nodes=n1,n3,n5\nSwitchName=b Nodes=n2,n4\nSwitchName=top Nodes=n[1-5] Switches=a,b\n"
NODES = ["n1", "n2", "n3", "n4", "n5"]


def sound(node, **values):
    return Report(**{"node": node, "sees_run": True, "clock_offset": 0.0} | values)


def chosen(*, num_nodes, without=(), **changed):
    reports = {node: sound(node, **changed.get(node, {})) for node in NODES if node not in without}
    return choose(NODES, reports, TWO_LEAVES, num_nodes=num_nodes, clock_seconds=1)


def test_rank_order_follows_the_switches():
    assert chosen(num_nodes=5).chosen == ("n1", "n3", "n5", "n2", "n4")


def test_spares_are_taken_from_the_switch_with_the_fewest_nodes():
    assert chosen(num_nodes=4).chosen == ("n1", "n3", "n5", "n2")
    assert chosen(num_nodes=3).chosen == ("n1", "n3", "n5")
    assert chosen(num_nodes=2).chosen == ("n1", "n3")


def test_a_node_with_a_fault_is_replaced_and_named():
    choice = chosen(num_nodes=4, n3={"faults": ["GPU 2 has 1 uncorrected memory errors"]})
    assert choice.chosen == ("n1", "n5", "n2", "n4")
    assert choice.failed == {"n3": ("GPU 2 has 1 uncorrected memory errors",)}


def test_a_node_that_does_not_report_has_failed():
    assert chosen(num_nodes=4, without=["n2"]).failed == {"n2": ("it did not report",)}


def test_too_few_sound_nodes_are_no_choice():
    choice = chosen(num_nodes=5, without=["n2"])
    assert choice.chosen == () and list(choice.failed) == ["n2"]


def test_a_clock_is_wrong_where_it_differs_from_the_others_even_if_it_is_the_first_nodes():
    # Offsets are to the first node, so a first node that is wrong shifts all the others.
    wrong = {node: {"clock_offset": -90.0} for node in NODES[1:]}
    assert list(chosen(num_nodes=4, **wrong).failed) == ["n1"]
    assert chosen(num_nodes=5, n4={"clock_offset": 0.9}).failed == {}
    assert "-1.5 s off" in chosen(num_nodes=4, n4={"clock_offset": -1.5}).failed["n4"][0]


class TestPairs:
    SLOW, FAST = "slow (3.00 GB/s, 300 are needed)", "fast (380.00 GB/s, 300 are needed)"

    def pairs(self, **told):
        return {node: {"pairs": pairs} for node, pairs in told.items()}

    def test_slow_with_both_partners_is_the_node(self):
        told = self.pairs(
            n1={"n2": self.SLOW, "n5": self.FAST},
            n2={"n1": self.SLOW, "n3": self.SLOW},
            n3={"n2": self.SLOW, "n4": self.FAST},
        )
        choice = chosen(num_nodes=4, **told)
        assert list(choice.failed) == ["n2"] and "with n1 is slow" in choice.failed["n2"][0]

    def test_a_partner_with_a_fault_of_its_own_does_not_count(self):
        told = self.pairs(n1={"n2": self.SLOW}) | {"n2": {"faults": ["x"], "pairs": {"n1": self.SLOW}}}
        assert list(chosen(num_nodes=4, **told).failed) == ["n2"]

    def test_a_node_that_nobody_could_reach_has_failed_and_those_who_tried_have_not(self):
        told = self.pairs(
            n1={"n2": None, "n5": self.FAST}, n2={"n1": None, "n3": None}, n3={"n2": None, "n4": self.FAST}
        )
        assert chosen(num_nodes=4, **told).failed == {
            "n2": ("all-reduce with n1 did not finish", "all-reduce with n3 did not finish")
        }

    def test_pairs_that_did_not_meet_say_nothing_of_the_one_that_waited(self):
        assert chosen(num_nodes=4, without=["n2"], n1={"pairs": {"n2": None}}).failed == {"n2": ("it did not report",)}


class TestShared:
    def check(self, seeing, written, nodes=("n1", "n2", "n3")):
        reports = {node: sound(node, sees_run=node in seeing) for node in nodes}
        require_shared(nodes, reports, set(written), Path("/data/run"))

    def test_a_directory_that_only_one_node_sees_is_the_users_to_mend(self):
        with pytest.raises(UserError, match=r"/data/run is not shared: n2, n3 see another"):
            self.check(["n1"], ["n1"])

    def test_a_directory_of_the_same_name_elsewhere_is_found_by_its_marks(self):
        with pytest.raises(UserError, match="is not shared"):
            self.check(["n1", "n2", "n3"], ["n1"])

    def test_one_node_of_many_that_lacks_the_mount_is_at_fault_itself(self):
        self.check(["n1", "n2"], ["n1", "n2"])

    def test_a_job_of_one_node_shares_with_nobody(self):
        self.check(["n1"], ["n1"], nodes=("n1",))


def test_where_every_node_fails_at_the_first_start_the_checks_are_suspected_and_later_the_nodes(tmp_path):
    with pytest.raises(UserError, match=r"all 5 nodes failed .* cluster\.slurm\.preflight"):
        require_some_sound(NODES, NODES, tmp_path)
    require_some_sound(NODES, NODES[1:], tmp_path)
    # One bad link fails both its ends.
    require_some_sound(NODES[:2], NODES[:2], tmp_path)
    (tmp_path / "status.json").touch()
    require_some_sound(NODES, NODES, tmp_path)


def test_reports_are_found_between_other_output():
    text = 'pulling image\n{"node": "n1", "faults": ["x"], "unchecked": []}\n'
    assert read_reports(text) == {"n1": Report(node="n1", faults=["x"])}
