"""The batch script: golden files for whole ones, and that it is bash which says what it was given."""

import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from job_samples import RUN, job

from conf.schema import ContainerConfig
from slurm.script import SHARED_PART, script

EVERYTHING = {
    "account": "frontier",
    "partition": "gpu",
    "qos": "high",
    "reservation": "maintenance_7",
    "spare_nodes": 2,
    "modules": ("cuda/12.8",),
    "variables": {"NCCL_SOCKET_IFNAME": "bond0", "GREETING": "it's two words"},
    "before": ("nvidia-smi -L",),
    "after": ("echo over",),
    "sbatch": ("--constraint=ib", "--mail-type=FAIL"),
}
ON_CPUS = ("scale=rehearsal", "cluster.device=cpu", "cluster.num_nodes=2", "cluster.ranks_per_node=1")
SHARING = {"exclusive": False, "cpus_per_node": 4, "time_limit_minutes": None}
THREE_RUNS = tuple(Path(f"/lustre/runs/r-{number}") for number in range(3))
PYXIS = ContainerConfig(runtime="pyxis", image="registry#train:1", mounts=("/data:/data",))
APPTAINER = ContainerConfig(runtime="apptainer", image="/images/train.sif", mounts=())


def without_shared_part(text):
    return text.removesuffix(SHARED_PART.read_text())


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("h200", job()),
        ("everything", job(**EVERYTHING)),
        ("cpu", job(*ON_CPUS, **SHARING)),
        ("array", job(*ON_CPUS, **SHARING, runs=THREE_RUNS, max_array_jobs=2)),
        ("pyxis", job(container=PYXIS)),
        ("apptainer", job(container=APPTAINER)),
        ("chain", replace(job("cluster.num_nodes=32"), number=2)),
    ],
)
def test_script_is_as_expected(name, given, assert_golden):
    text = script(given)
    assert text.endswith(SHARED_PART.read_text()), "every job ends with the same part"
    assert_golden(f"slurm/{name}.sh", without_shared_part(text))


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_script_is_bash():
    for given in (job(), job(**EVERYTHING), job(*ON_CPUS, **SHARING)):
        done = subprocess.run(["bash", "-n"], input=script(given), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_values_reach_the_shell_as_they_are_whatever_they_hold():
    wild = Path("/lustre/it's $HOME/`x`-100%")
    given = job(runs=(wild,), variables={"GREETING": "$(touch /x) 'y'"})
    told = without_shared_part(script(given)) + '\nprintf "%s|%s" "${runs[0]}" "$GREETING"\n'
    done = subprocess.run(["bash"], input=told, capture_output=True, text=True, check=True)
    assert done.stdout == f"{wild}|$(touch /x) 'y'"


def test_same_job_gives_the_same_script():
    assert script(job(**EVERYTHING)) == script(job(**EVERYTHING))


def test_a_percent_sign_in_a_path_is_not_slurms():
    (line,) = [line for line in script(job(runs=(Path("/r/100%"),))).splitlines() if "--output" in line]
    assert shlex.split(line)[1] == "--output=/r/100%%/slurm/output.log"


def test_losing_a_node_ends_a_job_only_where_it_has_no_spare():
    assert "#SBATCH --no-kill" not in script(job()).splitlines()
    assert "#SBATCH --no-kill" in script(job(spare_nodes=1)).splitlines()
    assert f"#SBATCH --nodes={2048 // 8 + 1}" in script(job(spare_nodes=1)).splitlines()


def test_no_secret_is_in_it(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush")
    assert "hush" not in script(job())
    assert str(RUN) in script(job())
