"""Host lists, addresses and switches, from what scontrol prints."""

import pytest

from slurm.topology import addresses, expand, leaves

TREE = """\
SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=n[1-2,9]
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=n[3-4]
SwitchName=leaf3 Level=0 LinkSpeed=1 Nodes=n5
SwitchName=pod1 Level=1 LinkSpeed=1 Nodes=n[1-2,5,9] Switches=leaf[1,3]
SwitchName=pod2 Level=1 LinkSpeed=1 Nodes=n[3-4] Switches=leaf2
SwitchName=core Level=2 LinkSpeed=1 Nodes=n[1-5,9] Switches=pod[1-2]
"""


@pytest.mark.parametrize(
    ("hosts", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("n[08-10],login", ["n08", "n09", "n10", "login"]),
        ("r[1-2]n[3,5]-ib", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib"]),
    ],
)
def test_host_lists_are_expanded_as_slurm_writes_them(hosts, names):
    assert expand(hosts) == names


def test_leaves_under_one_switch_are_neighbours_and_nodes_in_natural_order():
    assert leaves(TREE, ["n9", "n3", "n5", "n1", "n4", "n2"]) == [["n1", "n2", "n9"], ["n5"], ["n3", "n4"]]


def test_nodes_that_are_not_in_the_job_are_not_there():
    assert leaves(TREE, ["n4", "n9"]) == [["n9"], ["n4"]]


def test_nodes_on_no_switch_come_last_and_without_topology_all_are_one_leaf():
    assert leaves(TREE, ["x1", "n3"]) == [["n3"], ["x1"]]
    assert leaves("", ["n10", "n2"]) == [["n2", "n10"]]


def test_blocks_are_leaves():
    text = "BlockName=b1 BlockIndex=0 Nodes=n[1,3] BlockSize=2\nBlockName=b2 BlockIndex=1 Nodes=n[2,4] BlockSize=2\n"
    assert leaves(text, ["n1", "n2", "n3", "n4"]) == [["n1", "n3"], ["n2", "n4"]]


def test_addresses_are_those_slurm_uses_and_the_name_where_it_has_none():
    text = "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=n1 State=IDLE\nNodeName=n2 State=IDLE\n"
    assert addresses(text) == {"n1": "10.0.0.1", "n2": "n2"}
