"""The README.md of an exported model: what it is, what it saw, how well it predicts, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from conf import load
from conf.errors import CheckpointError
from recipes.stage import StageInput
from train.checkpoint import Checkpoint, Parent
from train.metrics import read
from train.rundir import RunDir, run_of


def model_card(given: StageInput, checkpoint: Checkpoint) -> str:
    """Markdown with the front matter Hugging Face reads; every number is from the run's own record."""
    config, run = given.context.config, given.context.run
    provenance = checkpoint.manifest.provenance
    model = provenance.model
    rehearsal = config.scale == "rehearsal"
    experts = ""
    if model.experts:
        chosen = f"{model.experts.num_experts_per_token} of {model.experts.num_experts} experts"
        experts = f" ({model.num_active_parameters:,} a token, which goes through {chosen})"
    tags = ["mixtral" if model.experts else "llama", config.name, *(["rehearsal"] if rehearsal else [])]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {config.name}" + (" (rehearsal)" if rehearsal else ""),
        "",
        config.description,
        "",
    ]
    if rehearsal:
        lines += [
            "This model comes from a rehearsal: model, data and steps are scaled down to fit one machine.",
            "It shows that the recipe works, and is of no use beyond that.",
            "",
        ]
    lines += [
        f"{model.num_parameters:,} parameters{experts}: {model.num_layers} layers, hidden {model.hidden_size}, "
        f"FFN {model.ffn_hidden_size}, {model.num_attention_heads} heads ({model.num_kv_heads} for keys and values), "
        f"vocabulary {model.vocab_size}, context {model.max_sequence_length}.",
        "",
        "## Training",
        "",
        *training_table(run, provenance.data, stages_behind(checkpoint)),
        "## Held-out scores",
        "",
        *score_table(run),
        "## Lineage",
        "",
        *lineage(checkpoint),
        "",
        "## Stages",
        "",
        *stage_configurations(run, stages_behind(checkpoint)),
    ]
    return "\n".join(lines) + "\n"


def stages_behind(checkpoint: Checkpoint) -> set[tuple[str, str]]:
    """Run and stage of the checkpoint and of all it was made from, teachers included, as far as they are there."""
    provenance = checkpoint.manifest.provenance
    found = {(provenance.run, provenance.stage)}
    for parent in provenance.parents:
        try:
            found |= stages_behind(Checkpoint.open(Path(parent.path)))
        except CheckpointError:
            continue  # deleted since; its hash is in the lineage
    return found


def training_table(run: RunDir, identities: dict[str, str], behind: set[tuple[str, str]]) -> Iterator[str]:
    """What each training stage saw, from the runs that trained it, oldest first."""
    yield "| stage | run | tokens | mixture |"
    yield "| --- | --- | --- | --- |"
    yield from stage_rows(run, behind)
    yield ""
    for source, identity in identities.items():
        yield f"- data `{source}`: {identity}"
    yield ""


def stage_rows(run: RunDir, behind: set[tuple[str, str]]) -> Iterator[str]:
    """Rows of `training_table` for a run, after those of the run it started from."""
    config = load.read(run.config_file)
    if config.init is not None:
        origin = run_of(Path(config.init))
        if origin is not None:
            yield from stage_rows(origin, behind)
    for name in config.order:
        training = getattr(config.stages[name], "training", None)
        if training is not None and (run.name, name) in behind:
            tokens = training.num_steps * training.tokens_per_step
            mixture = ", ".join(f"{source} {weight:g}" for source, weight in training.mixture.items())
            yield f"| {name} | {run.name} | {tokens:,} | {mixture} |"


def score_table(run: RunDir) -> Iterator[str]:
    """The run's evaluation records."""
    yield "Nats a token (lower is better) and next-token accuracy, with standard errors over documents."
    yield ""
    yield "| model | source | loss | accuracy | tokens |"
    yield "| --- | --- | --- | --- | --- |"
    for record in read(run.metrics_file):
        if record["kind"] == "evaluation":
            yield (
                f"| {record['model']} | {record['source']} | {record['loss']:.4f} +- {record['standard_error']:.4f} | "
                f"{record['accuracy']:.2%} +- {record['accuracy_standard_error']:.2%} | {record['num_tokens']:,} |"
            )
    yield ""


def lineage(checkpoint: Checkpoint) -> Iterator[str]:
    """The checkpoint and all that it was made from, by hash, each below what was made of it."""
    provenance = checkpoint.manifest.provenance
    yield f"- checkpoint `{checkpoint.path.name}` of stage {provenance.stage} of run {provenance.run}: "
    yield f"  sha256 of its manifest {checkpoint.manifest_sha256}"
    yield from _parents(provenance.parents, depth=1)
    yield f"- tokenizer: sha256 {provenance.tokenizer}"


def _parents(parents: Sequence[Parent], depth: int) -> Iterator[str]:
    for parent in parents:
        name = Path(parent.path).parent.parent.name
        yield f"{'  ' * depth}- made from `{name}`: sha256 of its manifest {parent.manifest_sha256}"
        try:
            above = Checkpoint.open(Path(parent.path)).manifest.provenance.parents
        except CheckpointError:
            yield f"{'  ' * (depth + 1)}- deleted since; what it was made from is not known here"
        else:
            yield from _parents(above, depth + 1)


def stage_configurations(run: RunDir, behind: set[tuple[str, str]]) -> Iterator[str]:
    """How every stage that made the model was configured, oldest first."""
    config = load.read(run.config_file)
    if config.init is not None and (origin := run_of(Path(config.init))) is not None:
        yield from stage_configurations(origin, behind)
    for name in config.order:
        if (run.name, name) in behind:
            yield f"- `{name}` of {run.name}, seed {config.seed}: `{json.dumps(asdict(config.stages[name]))}`"
