"""The checks of one node, on what its tools and its kernel print."""

import resource

import pytest

from slurm import preflight
from slurm.bandwidth import bus_bandwidth, rounds
from slurm.preflight import (
    Unchecked,
    disk_faults,
    gpu_faults,
    infiniband_faults,
    locked_memory_faults,
    nvlink_faults,
    xid_faults,
)


def faults_of_gpus(*rows, wanted=2):
    return list(preflight.parse_gpus("\n".join(rows), wanted))


def test_empty_gpus_without_errors_pass():
    assert faults_of_gpus("0, 4, 0, No, No", "1, 613, 0, No, No") == []
    # Boards without ECC or row remapping say so.
    assert faults_of_gpus("0, 4, [N/A], [N/A], [N/A]", wanted=1) == []
    assert faults_of_gpus("0, 4, [Not Supported], [Not Supported], [Not Supported]", wanted=1) == []
    # Drivers print yes and no, or 1 and 0.
    assert faults_of_gpus("0, 4, 0, 0, 0", wanted=1) == []


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("1, 70311, 0, No, No", "GPU 1 is not empty: 70311 MiB"),
        ("1, 4, 2, No, No", "GPU 1 has 2 uncorrected memory errors"),
        ("1, 4, 0, Yes, No", "waits for a reset"),
        ("1, 4, 0, No, Yes", "could not be remapped"),
        ("1, 4, 0, 1, 0", "waits for a reset"),
        ("1, [GPU requires reset], [GPU requires reset], [N/A], [N/A]", "GPU 1 answers [GPU requires reset]"),
        ("1, [GPU is lost], [Unknown Error], [N/A], [N/A]", "GPU 1 answers [GPU is lost] [Unknown Error]"),
        ("1, 4", "GPU 1 answers 1, 4"),
    ],
)
def test_each_fault_of_a_gpu_is_named(row, said):
    (fault,) = faults_of_gpus("0, 4, 0, No, No", row)
    assert said in fault


def test_a_missing_gpu_is_counted():
    assert faults_of_gpus("0, 4, 0, No, No") == ["1 GPUs are visible, 2 are needed"]


def test_fatal_xids_are_told_once_a_gpu_and_a_program_that_crashed_is_no_fault():
    log = """\
[ 10.1] NVRM: Xid (PCI:0000:3b:00): 31, pid=77, name=python, Ch 00000008
[ 11.1] NVRM: Xid (PCI:0000:3b:00): 79, pid=77, GPU has fallen off the bus.
[ 12.1] NVRM: Xid (PCI:0000:3b:00): 79, pid=78, GPU has fallen off the bus.
[ 13.1] NVRM: Xid (PCI:0000:86:00): 74, pid=79, NVLink: fatal error detected
"""
    assert list(preflight.parse_xids(log)) == [
        "Xid 79 on PCI:0000:3b:00 since boot",
        "Xid 74 on PCI:0000:86:00 since boot",
    ]


def test_inactive_nvlinks_are_named_with_their_gpu():
    status = """\
GPU 0: NVIDIA H200 (UUID: GPU-1)
         Link 0: 26.562 GB/s
         Link 1: 26.562 GB/s
GPU 1: NVIDIA H200 (UUID: GPU-2)
         Link 0: 26.562 GB/s
         Link 1: <inactive>
"""
    assert list(preflight.parse_nvlinks(status)) == ["GPU 1: Link 1: <inactive>"]


def test_a_gpu_that_has_lost_all_its_nvlinks_is_named():
    status = """\
GPU 0: NVIDIA H200 (UUID: GPU-1)
\t Link 0: 26.562 GB/s
GPU 1: NVIDIA H200 (UUID: GPU-2)
NVML: Unable to retrieve NVLink information as all links are inActive
"""
    (fault,) = preflight.parse_nvlinks(status)
    assert fault.startswith("GPU 1: ") and "all links are inActive" in fault


def test_a_driver_that_does_not_answer_is_a_fault_in_its_own_words(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    said = "Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error"
    tool.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 15\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert list(gpu_faults(8)) == [f"nvidia-smi failed: {said}"]


class TestInfiniband:
    def port(self, root, device, state="4: ACTIVE", rate="400 Gb/sec (4X NDR)", layer="InfiniBand"):
        port = root / device / "ports" / "1"
        port.mkdir(parents=True)
        for name, text in (("state", state), ("rate", rate), ("link_layer", layer)):
            (port / name).write_text(text + "\n")

    def test_enough_ports_at_full_rate_pass(self, tmp_path):
        self.port(tmp_path, "mlx5_0")
        self.port(tmp_path, "mlx5_1")
        self.port(tmp_path, "mlx5_eth", rate="25 Gb/sec (1X EDR)", layer="Ethernet")
        assert list(infiniband_faults(tmp_path, 2, 400)) == []

    def test_a_port_that_nothing_is_plugged_into_and_a_slower_one_for_storage_are_no_fault(self, tmp_path):
        self.port(tmp_path, "mlx5_0")
        self.port(tmp_path, "mlx5_1")
        self.port(tmp_path, "mlx5_2", state="1: DOWN")
        self.port(tmp_path, "mlx5_3", rate="200 Gb/sec (4X HDR)")
        assert list(infiniband_faults(tmp_path, 2, 400)) == []

    def test_where_too_few_are_sound_those_that_are_down_or_slow_are_named(self, tmp_path):
        self.port(tmp_path, "mlx5_0", state="1: DOWN")
        self.port(tmp_path, "mlx5_1", rate="200 Gb/sec (4X HDR)")
        self.port(tmp_path, "mlx5_2")
        assert list(infiniband_faults(tmp_path, 2, 400)) == [
            "1 InfiniBand ports are active at 400 Gb/sec, 2 are needed; mlx5_0 port 1 is DOWN; "
            "mlx5_1 port 1 runs at 200 Gb/sec (4X HDR)"
        ]

    def test_a_machine_without_any_is_short_of_all(self, tmp_path):
        (fault,) = infiniband_faults(tmp_path / "none", 8, 400)
        assert fault == "0 InfiniBand ports are active at 400 Gb/sec, 8 are needed"

    @pytest.mark.parametrize(("most", "is_sound"), [(8 << 20, False), (64 << 30, True), (resource.RLIM_INFINITY, True)])
    def test_a_limit_on_locked_memory_is_a_fault(self, monkeypatch, most, is_sound):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 16, most))
        faults = list(locked_memory_faults(8))
        assert faults == [] if is_sound else "may lock 8192 KiB" in faults[0] and "ulimit -l" in faults[0]


def test_a_full_disk_is_a_fault():
    assert list(disk_faults(0)) == []
    (fault,) = disk_faults(1e9)
    assert "1e+09 are needed" in fault


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda: gpu_faults(0), "CPUs"),
        (lambda: xid_faults(0), "CPUs"),
        (lambda: nvlink_faults(1), "fewer than two"),
        (lambda: infiniband_faults(preflight.INFINIBAND, 0, 400), "none is asked for"),
        (lambda: locked_memory_faults(0), "no InfiniBand"),
    ],
)
def test_checks_with_nothing_to_look_at_say_so_and_do_not_pass(check, reason):
    with pytest.raises(Unchecked, match=reason):
        list(check())


def test_gpus_that_are_asked_for_where_there_is_no_driver_are_a_fault(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert list(gpu_faults(8)) == ["there is no nvidia-smi"]


@pytest.mark.parametrize("count", range(2, 9))
def test_every_node_is_measured_with_two_others_where_there_are_enough(count):
    nodes = [f"n{number}" for number in range(count)]
    partners = {node: set() for node in nodes}
    for each in rounds(nodes):
        members = [node for pair in each for node in pair]
        assert len(members) == len(set(members)) == count - count % 2
        for first, second in each:
            partners[first].add(second)
            partners[second].add(first)
    assert min(map(len, partners.values())) == (2 if count % 2 == 0 and count > 2 else 1)


def test_bus_bandwidth_counts_as_nccl_tests_does():
    # 8 ranks, 1 GB in 5 ms: 2 x 7/8 x 200 GB/s.
    assert bus_bandwidth(10**9, 8, 0.005) == pytest.approx(350)
