"""What is found of a machine, from the text its kernel and driver would show."""

import os
from pathlib import Path

import pytest

from recipes.machine import GIB, MIB, Machine, cpu_limit, existing_parent, find_machine, memory_limit, parse_gpus

LISTING = """\
0, GPU-aaaa-1, NVIDIA H200, 143771
1, GPU-bbbb-2, NVIDIA H200, 143771
2, GPU-cccc-3, NVIDIA H100, 81559
"""


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, None, None),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        ({"cpu.max": "350000 100000\n", "memory.max": "1073741824\n"}, 3, GIB),
        ({"cpu.max": "50000 100000\n"}, 1, None),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None, None),
        (
            {"cpu.cfs_quota_us": "400000\n", "cpu.cfs_period_us": "100000\n", "memory.limit_in_bytes": "2147483648\n"},
            4,
            2 * GIB,
        ),
    ],
)
def test_limits_of_a_control_group_count(files, cores, memory, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert (cpu_limit(tmp_path), memory_limit(tmp_path)) == (cores, memory)


@pytest.mark.parametrize(
    ("visible", "names", "mebibytes"),
    [
        (None, ("NVIDIA H200", "NVIDIA H200", "NVIDIA H100"), 81559),
        ("0,1", ("NVIDIA H200", "NVIDIA H200"), 143771),
        ("GPU-cccc", ("NVIDIA H100",), 81559),
        ("1,-1,2", ("NVIDIA H200",), 143771),
        ("-1", (), 0),
        ("", (), 0),
    ],
)
def test_hidden_gpus_do_not_count(visible, names, mebibytes):
    assert parse_gpus(LISTING, visible) == (names, mebibytes * MIB)


def test_machine_is_described_in_a_line():
    assert str(Machine(cores=1, memory_bytes=24 * GIB)) == "1 CPU core, 24 GiB memory, no GPU"
    machine = Machine(cores=96, memory_bytes=2048 * GIB, gpus=("NVIDIA H200",) * 8, gpu_memory_bytes=141 * GIB)
    assert str(machine) == "96 CPU cores, 2048 GiB memory, 8 x NVIDIA H200"


def test_this_machine_has_no_more_than_its_kernel_says():
    machine = find_machine()
    assert 1 <= machine.cores <= (os.cpu_count() or 1)
    assert GIB // 4 < machine.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert (machine.gpu_memory_bytes > 0) == bool(machine.gpus)


def test_free_space_is_asked_of_the_nearest_directory_that_exists(tmp_path):
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    machine = Machine(cores=1, memory_bytes=GIB)
    assert machine.free_disk_bytes(tmp_path / "a") > 0
    assert machine.file_system_of(Path("/proc/self")) == "proc"
    assert existing_parent(Path("relative")) == Path.cwd()
