"""Smaller models against all their controls, over seeds: `python -m bench.compression --regime limited --seeds 1 2`.

Runs the module recipe with `controls=true` once a regime and seed, each from a foundation of its own. What was found
goes to `--output` after every run; a run that is there already is not made again, so a bench that was cut goes on.

Regimes, because what a teacher's logits are worth depends on them:
- limited: little text of each domain and many passes over it. Labels have taught the teacher what they can; what is
  learnt from them further is learnt by heart.
- plentiful: more text than is used. Every label is news to a teacher that is far from converged.
- patient: the teacher of `limited`, which must have been run, and 10:1 students that take four times as many tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.corpora import shipped
from data.documents import content_hash, is_held_out, normalised
from train.metrics import read

SOURCES = ("business", "development", "creative")
# More documents than a rehearsal holds out: the error of a comparison is that of the documents.
HELD_OUT_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """How much text there is, and how much of it a run goes through.

    Attributes:
        characters: of training text a domain; None: all that ships.
        foundation_tokens: that the foundation is trained on, all domains together.
        specialise_tokens: that the teacher is then trained on.
        recover_tokens: that pruned models and their controls are trained on.
        distill_tokens: that 10:1 students are trained on.
        teacher_of: regime whose teacher is taken; students alone are trained.
    """

    characters: int | None
    foundation_tokens: int
    specialise_tokens: int
    recover_tokens: int
    distill_tokens: int
    teacher_of: str | None = None


REGIMES = {
    "limited": Regime(
        characters=300_000,
        foundation_tokens=2_000_000,
        specialise_tokens=500_000,
        recover_tokens=400_000,
        distill_tokens=400_000,
    ),
    "plentiful": Regime(
        characters=None,
        foundation_tokens=800_000,
        specialise_tokens=500_000,
        recover_tokens=300_000,
        distill_tokens=300_000,
    ),
    "patient": Regime(
        characters=300_000,
        foundation_tokens=0,
        specialise_tokens=0,
        recover_tokens=0,
        distill_tokens=1_600_000,
        teacher_of="limited",
    ),
}


def write_text(directory: Path, characters: int | None) -> dict[str, Path]:
    """A corpus a source: all its held-out documents, and training documents, by hash, up to so many characters."""
    files = {}
    for source in SOURCES:
        texts = map(normalised, pq.read_table(shipped(f"shipped:{source}", ".parquet")).column("text").to_pylist())
        kept, seen = [], 0
        for digest, text in sorted((content_hash(text), text) for text in texts):
            if is_held_out(digest, HELD_OUT_FRACTION):
                kept.append(text)
            elif characters is None or seen < characters:
                kept.append(text[: None if characters is None else characters - seen])
                seen += len(text)
        files[source] = directory / f"{source}.parquet"
        directory.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": [str(number) for number in range(len(kept))], "text": kept}), files[source])
    return files


def run(output: Path, recipe: str, name: str, seed: int, overrides: Sequence[str]) -> Path:
    """One run of the recipe in a regime, after its foundation's; returns its record."""
    regime, directory = REGIMES[name], output / f"{name}-{seed}"
    text = write_text(directory / "text", regime.characters)
    shared = [
        f"seed={seed}",
        f"runs_dir={directory / 'runs'}",
        "tracking.mode=disabled",
        "cluster.ranks_per_node=1",
        f"data.held_out_fraction={HELD_OUT_FRACTION}",
        *(f"data.sources.{source}.path={file}" for source, file in text.items()),
        "stages.evaluate.tokens=40e3",
    ]
    train = [sys.executable, "-m", "train"]
    # What a teacher's logits are worth is asked of them alone.
    module = [
        "controls=true",
        "stages.recover.distillation.weight=1.0",
        f"stages.distill.training.tokens={regime.distill_tokens}",
    ]
    if regime.teacher_of is not None:
        runs = output / f"{regime.teacher_of}-{seed}" / "runs"
        teacher = max(runs.glob(f"{recipe}-*/stages/specialise/checkpoints/step-*"))
        module += [
            f"init={teacher}",
            "order=[distill,student_alone,student_alone_flops,evaluate]",
            "stages.distill.distillation.teacher=init",
            "stages.evaluate.comparisons.distill=[init,student_alone,student_alone_flops]",
        ]
    else:
        foundation = [f"stages.pretrain.training.tokens={regime.foundation_tokens}", "order=[pretrain,evaluate]"]
        subprocess.run([*train, "recipe=foundation", *shared, *foundation], check=True)
        module += [
            f"stages.specialise.training.tokens={regime.specialise_tokens}",
            f"stages.recover.training.tokens={regime.recover_tokens}",
        ]
    subprocess.run([*train, f"recipe={recipe}", *shared, *module, *overrides], check=True)
    (record,) = (directory / "runs").glob(f"{recipe}-*/metrics.jsonl")
    return record


def found(record: Path) -> Iterator[dict[str, Any]]:
    """What a run says of its models."""
    for each in read(record):
        if each["kind"] in ("evaluation", "comparison", "target", "validation"):
            yield {name: value for name, value in each.items() if name != "time"}


def spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    return f"{fmean(values):.4f}" + (f" +- {stdev(values):.4f}" if len(values) > 1 else "")


def table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Means and deviations over seeds, a regime at a time."""
    for regime in dict.fromkeys(each["regime"] for each in results):
        mine = [each for each in results if each["regime"] == regime]
        yield f"\n# {regime}, seeds {sorted({each['seed'] for each in mine})}"
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for each in mine:
            match each["kind"]:
                case "target":
                    key: tuple[str, ...] = (each["name"], f"{each['model']} / {each['baseline']}", "")
                case "evaluation":
                    key = (each["model"], "", each["source"])
                case "comparison":
                    key = (each["model"], each["baseline"], each["source"])
                case _:
                    continue
            groups.setdefault((each["kind"], *key), []).append(each)
        for (kind, model, baseline, source), records in groups.items():
            error = fmean(each["standard_error"] for each in records)
            if kind == "target":
                yield f"{model} ({baseline}): {spread([each['value'] for each in records])} (documents {error:.4f})"
            elif kind == "evaluation":
                accuracy = spread([each["accuracy"] for each in records])
                yield f"{model}, {source}: {spread([each['loss'] for each in records])} nats, accuracy {accuracy}"
            else:
                gain = spread([each["gain"] for each in records])
                yield f"{model} over {baseline}, {source}: {gain} nats (documents {error:.4f})"
        yield from gaps_closed(mine)


def gaps_closed(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """How much nearer its teacher a 10:1 student is than the same student alone; below 0 it is farther away."""
    losses = {
        (each["seed"], each["source"], each["model"]): each["loss"] for each in results if each["kind"] == "evaluation"
    }
    seeds = sorted({seed for seed, _, _ in losses})
    for source in SOURCES:
        for alone in ("student_alone", "student_alone_flops"):
            closed = []
            for seed in seeds:
                teacher = losses.get((seed, source, "specialise"), losses.get((seed, source, "init")))
                distilled, other = (losses.get((seed, source, model)) for model in ("distill", alone))
                if teacher is not None and distilled is not None and other is not None:
                    closed.append((other - distilled) / (other - teacher))
            if closed:
                yield f"gap of {alone} to the teacher that distill closes, {source}: {spread(closed)}"


def main() -> int:
    """Run what is missing, add up, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.compression", description=__doc__)
    parser.add_argument("--regime", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--recipe", default="business_module")
    parser.add_argument("--output", type=Path, default=Path("compression"), help="directory of results and runs")
    parser.add_argument("override", nargs="*")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(each["regime"], each["seed"]) for each in results}
    for regime in given.regime:
        for seed in given.seeds:
            if (regime, seed) in done:
                continue
            record = run(given.output, given.recipe, regime, seed, given.override)
            new = [{"regime": regime, "seed": seed, **each} for each in found(record)]
            with file.open("a") as stream:
                stream.writelines(json.dumps(each) + "\n" for each in new)
            results += new
    print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
