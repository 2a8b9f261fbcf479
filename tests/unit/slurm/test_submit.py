"""Handing jobs in, with a stand-in for Slurm's commands that keeps what it was given."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from job_samples import job

from conf import load
from conf.errors import UserError
from recipes.queued import jobs_of
from slurm.__main__ import main, status
from slurm.queue import Submitted, ask, job_facts
from slurm.submit import submit, write_scripts
from train.rundir import RunDir, StageResult

SBATCH = """#!/bin/sh
echo "$@" >> {directory}/sbatch.log
env | grep ^SLURM_ >> {directory}/environment.log
echo "41;cluster"
"""
SCONTROL = """#!/bin/sh
echo 'JobId=41 JobState={state} Reason=None ExitCode={exit_code} BatchHost=n7 Restarts=2 NodeList=n[1-2] ExcNodeList=n9'
"""


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """`commands(name, text)` installs a program; nothing else of Slurm is found."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/bin")

    def install(name, text):
        file = directory / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    install("sbatch", SBATCH.format(directory=tmp_path))
    install("scontrol", SCONTROL.format(state="PENDING", exit_code="0:0"))
    return install


def run_dir(tmp_path, name):
    run = tmp_path / "runs" / name
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    return run


def jobs(tmp_path, *names, **values):
    return [job(runs=(run_dir(tmp_path, name),), **values) for name in names]


def python(folder, *arguments):
    """Python on this tree, started in a folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_one_run_is_one_job_and_its_number_is_kept(commands, tmp_path):
    (given,) = jobs(tmp_path, "a")
    assert submit([[given]]) == [["41"]]
    run = given.runs[0]
    assert json.loads((run / "slurm" / "job.json").read_text()) == {"jobs": ["41"]}
    assert (tmp_path / "sbatch.log").read_text() == f"--parsable {run / 'slurm' / 'job.sbatch'}\n"
    assert os.access(run / "slurm" / "job.sbatch", os.X_OK)


def test_runs_that_ask_for_the_same_are_one_array(commands, tmp_path):
    given = jobs(tmp_path, "a", "b", "c")
    assert submit([[each] for each in given]) == [["41_0"], ["41_1"], ["41_2"]]
    assert len((tmp_path / "sbatch.log").read_text().splitlines()) == 1
    text = (given[0].runs[0] / "slurm" / "job.sbatch").read_text()
    assert "#SBATCH --array=0-2\n" in text and all(str(each.runs[0]) in text for each in given)
    assert json.loads((given[2].runs[0] / "slurm" / "job.json").read_text()) == {"jobs": ["41_2"]}


def test_runs_that_ask_for_other_nodes_are_jobs_of_their_own(commands, tmp_path):
    first, second = jobs(tmp_path, "a", "b")
    second = replace(second, cluster=replace(second.cluster, num_nodes=3))
    assert submit([[first], [second]]) == [["41"], ["41"]]
    assert len((tmp_path / "sbatch.log").read_text().splitlines()) == 2


def test_a_run_in_the_queue_is_not_submitted_again_and_one_that_has_ended_is(commands, tmp_path):
    (given,) = jobs(tmp_path, "a")
    submit([[given]])
    with pytest.raises(UserError, match="job 41 of a is still in the queue"):
        submit([[given]])
    commands("scontrol", SCONTROL.format(state="TIMEOUT", exit_code="0:0"))
    assert submit([[given]]) == [["41"]]


def test_a_job_submitted_within_a_job_does_not_inherit_its_slurm_variables(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submit([jobs(tmp_path, "a")])
    assert (tmp_path / "environment.log").read_text() == "SLURM_CONF=/etc/slurm.conf\n"


def test_refusals_are_told_in_slurms_own_words(commands, tmp_path):
    commands("sbatch", "#!/bin/sh\necho 'sbatch: error: Invalid qos specification' >&2\nexit 1\n")
    with pytest.raises(UserError, match=r"sbatch refused:\n  sbatch: error: Invalid qos specification"):
        submit([jobs(tmp_path, "a")])


def test_a_machine_without_slurm_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no sbatch on this machine.*login node.*action=dry_run"):
        submit([jobs(tmp_path, "a")])


def test_a_job_slurm_has_forgotten_has_no_facts_but_other_refusals_are_told(commands):
    commands("scontrol", "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    assert job_facts("41") is None
    commands("scontrol", "#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    with pytest.raises(UserError, match="Unable to contact"):
        job_facts("41")


def test_commands_that_hang_are_given_up(commands, monkeypatch):
    monkeypatch.setattr("slurm.queue.SECONDS", 0.2)
    commands("scontrol", "#!/bin/sh\nexec sleep 5\n")
    with pytest.raises(UserError, match="did not answer"):
        ask("scontrol", "ping")


class TestStatus:
    def test_says_how_the_job_stands_and_how_far_the_run_has_come(self, commands, tmp_path):
        run = run_dir(tmp_path, "a")
        (run / "slurm").mkdir()
        Submitted(jobs=("41",)).write(run)
        step = {"kind": "step", "stage": "pretrain", "step": 7, "num_steps": 20, "loss": 2.5}
        (run / "metrics.jsonl").write_text(f'{json.dumps(step)}\n{{"kind": "message"}}\n{{"kind": "st')
        told = status(run)
        for line in ("job           41", "state         PENDING", "queued again  2", "left out      n9"):
            assert line in told
        assert "pretrain, step 7 of 20, loss 2.5000" in told

    def test_explains_a_job_that_could_not_write(self, commands, tmp_path):
        commands("scontrol", SCONTROL.format(state="FAILED", exit_code="0:53"))
        run = run_dir(tmp_path, "a")
        (run / "slurm").mkdir()
        Submitted(jobs=("41",)).write(run)
        assert f"n7 could not write {run / 'slurm'}: is it shared?" in status(run)

    def test_of_what_is_no_run_is_refused(self, tmp_path, capsys):
        assert main(["status", str(tmp_path)]) == 2
        assert "is not a run directory" in capsys.readouterr().err


def test_stop_of_a_waiting_job_takes_it_out_of_the_queue(commands, tmp_path, capsys):
    (given,) = jobs(tmp_path, "a")
    submit([[given]])
    commands("scancel", f'#!/bin/sh\necho "$@" >> {tmp_path}/scancel.log\n')
    assert main(["stop", str(given.runs[0])]) == 0
    commands("scontrol", SCONTROL.format(state="RUNNING", exit_code="0:0"))
    assert main(["stop", str(given.runs[0])]) == 0
    assert (tmp_path / "scancel.log").read_text() == "41\n--batch --signal=TERM 41\n"
    assert "saves and ends" in capsys.readouterr().out


def test_a_script_can_be_written_now_and_submitted_later(commands, tmp_path, capsys):
    (given,) = jobs(tmp_path, "a")
    run = given.runs[0]
    assert main(["submit", str(run)]) == 2
    assert "action=dry_run" in capsys.readouterr().err
    write_scripts([given])
    assert main(["submit", str(run)]) == 0
    assert "job 41" in capsys.readouterr().out
    assert (run / "slurm" / "job.json").exists()


class TestChain:
    """Jobs of a run one after another."""

    NUMBERED = """#!/bin/sh
echo "$@" >> {directory}/sbatch.log
grep -c . {directory}/sbatch.log
"""
    OF_EACH = """#!/bin/sh
case "$4" in
    1*) echo 'JobState={first} Reason=None' ;;
    *) echo 'JobState={second} Reason=Dependency' ;;
esac
"""

    @pytest.fixture
    def chain(self, commands, tmp_path):
        commands("sbatch", self.NUMBERED.format(directory=tmp_path))
        commands("scancel", f'#!/bin/sh\necho "$@" >> {tmp_path}/scancel.log\n')
        (first,) = jobs(tmp_path, "a")
        return [first, replace(first, number=2, cluster=replace(first.cluster, num_nodes=3))]

    def test_each_job_waits_for_the_one_before(self, chain, tmp_path):
        run = chain[0].runs[0]
        assert submit([chain]) == [["1", "2"]]
        assert (tmp_path / "sbatch.log").read_text().splitlines() == [
            f"--parsable {run}/slurm/job.sbatch",
            f"--parsable --dependency=afterok:1 {run}/slurm/job-2.sbatch",
        ]
        assert json.loads((run / "slurm" / "job.json").read_text()) == {"jobs": ["1", "2"]}
        assert "--kill-on-invalid-dep" not in (run / "slurm" / "job.sbatch").read_text()

    def test_jobs_of_a_sweep_each_wait_for_their_own(self, chain, tmp_path):
        other = run_dir(tmp_path, "b")
        assert submit([chain, [replace(job, runs=(other,)) for job in chain]]) == [["1_0", "2_0"], ["1_1", "2_1"]]
        assert "--dependency=aftercorr:1 " in (tmp_path / "sbatch.log").read_text()

    def test_what_is_submitted_is_taken_back_where_a_later_job_is_refused(self, commands, chain, tmp_path):
        commands(
            "sbatch", '#!/bin/sh\n[ "$2" != --dependency=afterok:1 ] || { echo "too many" >&2; exit 1; }\necho 1\n'
        )
        with pytest.raises(UserError, match="too many"):
            submit([chain])
        assert (tmp_path / "scancel.log").read_text() == "1\n"
        assert not (chain[0].runs[0] / "slurm" / "job.json").exists()

    def test_scripts_of_fewer_jobs_replace_those_there_were(self, chain):
        write_scripts(chain)
        write_scripts(chain[:1])
        assert [file.name for file in (chain[0].runs[0] / "slurm").iterdir()] == ["job.sbatch"]

    def test_all_are_submitted_later_and_followed_and_stopped_together(self, commands, chain, tmp_path, capsys):
        commands("scontrol", self.OF_EACH.format(first="RUNNING", second="PENDING"))
        run = chain[0].runs[0]
        write_scripts(chain)
        assert main(["submit", str(run)]) == 0
        assert "job 1, then 2;" in capsys.readouterr().out
        assert "of the jobs   1 RUNNING, then 2 PENDING" in status(run)
        with pytest.raises(UserError, match="job 1 of a is still in the queue"):
            submit([chain])
        assert main(["stop", str(run)]) == 0
        assert (tmp_path / "scancel.log").read_text() == "2\n--batch --signal=TERM 1\n"

    @pytest.mark.parametrize(
        ("first", "second", "shown"),
        [("COMPLETED", "PENDING", "2"), ("FAILED", "CANCELLED", "1"), ("COMPLETED", "COMPLETED", "2")],
    )
    def test_status_is_of_the_job_that_counts(self, commands, chain, first, second, shown):
        submit([chain])
        commands("scontrol", self.OF_EACH.format(first=first, second=second))
        assert f"job           {shown}\n" in status(chain[0].runs[0])


PROGRAM = """
import runpy, sys
try:
    runpy.run_module("train", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print(end.code, [name for name in ("torch", "ray", "megatron", "deepspeed", "wandb") if name in sys.modules])
"""


@pytest.mark.parametrize(("sweep", "number"), [(["seed=1"], "41"), (["seed=1,2", "-m"], "41_1")])
def test_the_command_line_submits_without_importing_a_framework(commands, tmp_path, sweep, number):
    overrides = ["recipe=foundation", "cluster=h200_slurm", "scale=rehearsal", "cluster.device=cpu"]
    overrides += ["cluster.num_nodes=2", "cluster.ranks_per_node=1", "tracking.mode=disabled", *sweep]
    done = python(tmp_path, "-c", PROGRAM, *overrides)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr
    runs = sorted((tmp_path / "runs").glob("foundation-*"))
    assert len((tmp_path / "sbatch.log").read_text().splitlines()) == 1
    assert f"job            {number}" in done.stdout
    for run in runs:
        assert f"python -m slurm status {run}" in done.stdout and f"resume={run}" in done.stdout
    submitted = {json.loads((run / "slurm" / "job.json").read_text())["jobs"][0] for run in runs}
    assert submitted == ({"41"} if len(runs) == 1 else {"41_0", "41_1"})


def test_stages_on_other_nodes_are_jobs_of_their_own_one_after_another(commands, tmp_path):
    overrides = ["recipe=foundation", "cluster=h200_slurm", "scale=rehearsal", "cluster.device=cpu"]
    overrides += ["cluster.num_nodes=2", "cluster.ranks_per_node=1", "cluster.slurm.stage_nodes={evaluate: 1}"]
    done = python(tmp_path, "-m", "train", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "job            41, then 41, then 41" in done.stdout
    (run,) = (tmp_path / "runs").glob("foundation-*")
    texts = [(run / "slurm" / f"job{number}.sbatch").read_text() for number in ("", "-2", "-3")]
    assert [f"#SBATCH --nodes={count}\n" in text for count, text in zip((2, 1, 2), texts, strict=True)] == [True] * 3
    assert len((tmp_path / "sbatch.log").read_text().splitlines()) == 3

    # What is done needs no job again; a run with nothing left to do has one to end it.
    config, done = load.read(run / "config.json"), RunDir(run)
    for stage, counts in (("pretrain", [1, 2]), ("evaluate", [2]), ("export", [2])):
        done.write_result(stage, StageResult(checkpoint=None, seconds=1.0, passes_on=True))
        assert [job.cluster.num_nodes for job in jobs_of(config, done)] == counts


def test_a_sweep_with_a_fault_in_its_second_run_submits_nothing(commands, tmp_path):
    typed = ("recipe=foundation", "cluster=h200_slurm", "cluster.num_nodes=256,257", "-m")
    done = python(tmp_path, "-m", "train", *typed)
    assert done.returncode == 2, done.stdout + done.stderr
    assert not (tmp_path / "sbatch.log").exists()
