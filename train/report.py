"""The report of a run: one HTML file that needs nothing else, made from `metrics.jsonl` and `config.json`.

python -m train.report RUN_DIR      make it anew, also while the run runs
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from conf import load
from conf.errors import UserError
from conf.schema import DistillStage, RecoverStage, RunConfig, TrainingStage
from train.facts import facts
from train.metrics import FILE_NAME, read
from train.quantities import byte_size, count, duration, estimate, percent
from train.report_compression import compression_sections
from train.report_style import page, table
from train.rundir import replace_text
from train.summary import RunSummary, StageSummary, exceeds_noise, summarise


def write_report(run_dir: Path) -> Path:
    """Make `report.html` of a run, whatever state it is in.

    Returns:
        Path of the report.

    Raises:
        UserError: the run has no readable configuration or no record.
        OSError: the report cannot be written.
    """
    config = load.read(run_dir / "config.json")
    metrics_file = run_dir / FILE_NAME
    if not metrics_file.exists():
        raise UserError(f"{metrics_file} does not exist; a report is made of a run that has begun")
    summary = summarise(read(metrics_file))
    target = run_dir / "report.html"
    replace_text(target, page(escape(f"{config.name}: {run_dir.name}"), "\n".join(_sections(run_dir, config, summary))))
    return target


def _sections(run_dir: Path, config: RunConfig, summary: RunSummary) -> Iterator[str]:
    yield _header(run_dir, config, summary)
    yield _incomplete(config, summary)
    yield _tiles(summary)
    yield from compression_sections(summary)
    yield _learning(config, summary)
    yield _evaluation(summary)
    yield _comparisons(summary)
    yield _stages(summary)
    yield _sizes(config, summary)
    yield _files(run_dir, config, summary)
    yield _messages(summary)
    yield _configuration(config)
    yield f"<footer>{escape(run_dir.name)}, report of {_date(time.time())}</footer>"


def _header(run_dir: Path, config: RunConfig, summary: RunSummary) -> str:
    rehearsal = config.scale == "rehearsal"
    scale = "rehearsal" if rehearsal else "full size"
    said = [_date(summary.first_time), duration(summary.seconds)]
    if summary.started is not None:
        ranks = summary.started["world_size"]
        said += [summary.started["machine"], f"{ranks} rank{'s' if ranks > 1 else ''}", summary.started["mesh"]]
        restarts = summary.started["restarts"]
        said += [f"started {restarts + 1} times"] if restarts else []
    return (
        f'<span class="badge {escape(summary.status)}">{escape(summary.status)}</span>'
        f'<span class="badge scale">{scale}</span>'
        f"<h1>{escape(config.name)}</h1><p>{escape(config.description)}</p>"
        f'<p class="said">{" &middot; ".join(escape(each) for each in said)}</p>'
    )


def _incomplete(config: RunConfig, summary: RunSummary) -> str:
    """What is missing of a run that has not finished."""
    if summary.status == "finished":
        return ""
    done = {stage.name for stage in summary.stages if stage.done}
    open_stages = [stage for stage in summary.stages if not stage.done]
    missing = [name for name in config.order if name not in done and name not in {each.name for each in open_stages}]
    parts = [f"This run is not complete: it {_STATE.get(summary.status, 'ended early')}."]
    for stage in open_stages:
        at = f" after step {stage.steps[-1]['step']:,} of {stage.started['num_steps']:,}" if stage.steps else ""
        parts.append(f"<b>{escape(stage.name)}</b> is unfinished{at}.")
    if missing:
        parts.append(f"Not begun: {escape(', '.join(missing))}.")
    errors = [message["text"] for message in summary.messages if message["level"] == "error"]
    parts += [escape(errors[-1])] if errors else []
    return f'<div class="banner {escape(summary.status)}">{" ".join(parts)}</div>'


_STATE = {
    "failed": "failed",
    "stopped": "was stopped and can be resumed",
    "running": "is running, or its driver was killed",
}


def _tiles(summary: RunSummary) -> str:
    """The few numbers that matter most."""
    tiles: list[tuple[str, str]] = []
    trained = [stage for stage in summary.stages if stage.steps]
    if trained:
        last = trained[-1]
        for validation in last.last_validations[:1]:
            value = estimate(validation["loss"], validation["standard_error"])
            tiles.append((value, f"held-out loss after {last.name}, {validation['source']}"))
    if summary.comparisons:
        newest = trained[-1].name if trained else ""
        most_wanted = min(summary.comparisons, key=lambda each: each["model"] != newest)
        names = f"{most_wanted['model']} over {most_wanted['baseline']}, {most_wanted['source']}"
        tiles.append((f"{most_wanted['gain']:+.3f} nats", f"gain of {names}"))
    if trained:
        tokens = sum(stage.steps[-1]["tokens"] for stage in trained)
        tiles.append((count(tokens), f"tokens trained on, {count(trained[-1].started['num_parameters'])} parameters"))
        speeds = sorted(step["tokens_per_second"] for step in trained[-1].steps)
        mfu = trained[-1].steps[-1]["mfu"]
        share = f", {percent(mfu)} MFU" if mfu is not None else ""
        tflops = trained[-1].steps[-1]["model_tflops"]
        value = f"{count(speeds[len(speeds) // 2])} tokens/s"
        tiles.append((value, f"median of {trained[-1].name}; {tflops:.3g} TFLOP/s a rank{share}"))
    cards = "".join(f'<div class="card"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{cards}</div>' if tiles else ""


def _learning(config: RunConfig, summary: RunSummary) -> str:
    if not any(stage.steps for stage in summary.stages):
        return '<h2>Learning</h2><p class="said">No step was taken.</p>'
    # matplotlib takes a second to import; whoever only follows a run never needs it.
    from train.report_plots import curve_figure, loss_figure

    clip = {stage.training.optim.clip_grad_norm for stage in config.stages.values() if isinstance(stage, TrainingStage)}
    limit = clip.pop() if len(clip) == 1 else None
    curves = (
        ("Learning rate", curve_figure(summary, "learning_rate", colour="source-2", from_zero=True)),
        ("Tokens a second", curve_figure(summary, "tokens_per_second", colour="best", from_zero=True)),
        (
            "Gradient norm" + (", clipped at the dashed line" if limit else ""),
            curve_figure(summary, "grad_norm", colour="source-1", from_zero=True, limit=limit),
        ),
    )
    cards = "".join(f'<div class="card"><h3>{title}</h3>{figure}</div>' for title, figure in curves)
    has_teacher = any(isinstance(stage, RecoverStage | DistillStage) for stage in config.stages.values())
    taught = " Of a stage with a teacher, training loss includes the divergence from it." if has_teacher else ""
    return (
        '<h2>Learning</h2><p class="said">Thin: every step. Thick: running mean. '
        f"Dots: held-out text, with standard errors.{taught}</p>"
        f'<div class="card">{loss_figure(summary)}</div><div class="three">{cards}</div>'
    )


def _evaluation(summary: RunSummary) -> str:
    if not summary.evaluations:
        return '<h2>Evaluation</h2><p class="said">No model has been evaluated yet.</p>'
    from train.report_plots import evaluation_figure

    scores = {(each["model"], each["source"]): each for each in summary.evaluations}
    rows = []
    for model in summary.models:
        row = [escape(model)]
        for source in summary.sources:
            each = scores.get((model, source))
            row += (
                [
                    estimate(each["loss"], each["standard_error"]),
                    f"{percent(each['accuracy'])} &plusmn; {100 * each['accuracy_standard_error']:.1f}",
                ]
                if each
                else ["", ""]
            )
        rows.append(row)
    head = ["model"]
    for source in summary.sources:
        head += [f"{escape(source)}: loss", "accuracy"]
    numbers = frozenset(range(1, len(head)))
    return (
        '<h2>Evaluation</h2><p class="said">Loss on held-out documents, lower is better; bars are one standard error, '
        "often smaller than the mark. Green is the best model, hollow diamonds are baselines that are no networks.</p>"
        f'<div class="card">{evaluation_figure(summary)}</div>'
        f"<details><summary>Numbers</summary><div class='card'>{table(head, rows, numbers=numbers)}</div></details>"
    )


def _comparisons(summary: RunSummary) -> str:
    if not summary.comparisons:
        return ""
    from train.report_plots import comparison_figure

    rows = []
    for each in summary.comparisons:
        clear = exceeds_noise(each)
        error = each["standard_error"]
        ratio = f"{each['gain'] / error:.1f}" if error > 0 else ""
        verdict = '<span class="good">yes</span>' if clear else '<span class="noise">no</span>'
        names = [escape(each["model"]), escape(each["baseline"]), escape(each["source"])]
        rows.append([*names, estimate(each["gain"], error), ratio, verdict])
    head = ["model", "against", "on", "gain", "in standard errors", "more than three"]
    return (
        '<h2>Comparisons</h2><p class="said">Both models on the same documents, document by document.</p>'
        f'<div class="card">{comparison_figure(summary.comparisons)}</div>'
        f"<div class='card'>{table(head, rows, numbers=frozenset({3, 4}))}</div>"
    )


def _stages(summary: RunSummary) -> str:
    if not summary.stages:
        return ""
    head = ["stage", "parameters", "steps", "tokens", "loss", "held out", "held-out loss", "accuracy", "time"]
    rows = [_stage_row(stage) for stage in summary.stages]
    return f"<h2>Stages</h2><div class='card'>{table(head, rows, numbers=frozenset({1, 2, 3, 4, 6, 7, 8}))}</div>"


def _stage_row(stage: StageSummary) -> list[str]:
    last = stage.steps[-1] if stage.steps else None
    held_out = stage.last_validations
    return [
        f"<b>{escape(stage.name)}</b>" + ("" if stage.done else ' <span class="noise">unfinished</span>'),
        count(stage.started["num_parameters"]) if stage.started["num_parameters"] else "",
        f"{last['step'] if last else 0:,} of {stage.started['num_steps']:,}" if stage.trains else "",
        count(last["tokens"]) if last else "",
        f"{last['loss']:.3f}" if last else "",
        "\n".join(escape(each["source"]) for each in held_out),
        "\n".join(estimate(each["loss"], each["standard_error"]) for each in held_out),
        "\n".join(percent(each["accuracy"]) for each in held_out),
        duration(stage.seconds),
    ]


def _sizes(config: RunConfig, summary: RunSummary) -> str:
    ranks = summary.started["world_size"] if summary.started is not None else config.cluster.ranks_per_node or 1
    here = facts(config, ranks)
    full = config.full_size
    there = facts(full, full.budget.gpus) if full else {}
    rows = [[label, escape(value), *([escape(there.get(label, ""))] if full else [])] for label, value in here.items()]
    head = ["", "this rehearsal" if full else "this run", *(["full size"] if full else [])]
    said = "The same recipe, stages and code; model, data and ranks were scaled to the machine." if full else ""
    title = "Rehearsal and full size" if full else "Size"
    return f"<h2>{title}</h2><p class='said'>{said}</p><div class='card'>{table(head, rows)}</div>"


def _files(run_dir: Path, config: RunConfig, summary: RunSummary) -> str:
    rows = [["run", _code(str(run_dir)), ""]]
    rows.append(["started from", _code(config.init) if config.init else "fresh weights", ""])
    for stage in summary.stages:
        saved = [each for each in summary.checkpoints if each["stage"] == stage.name]
        if saved:
            blocked = duration(sum(each["seconds_blocked"] for each in saved))
            note = f"{byte_size(saved[-1]['num_bytes'])}; {len(saved)} saved, training waited {blocked} in all"
            rows.append([f"checkpoint of {escape(stage.name)}", _code(saved[-1]["path"]), note])
    for export in summary.exports:
        rows.append(["exported model", _code(export["path"]), byte_size(export["num_bytes"])])
    return f"<h2>Lineage and files</h2><div class='card'>{table(['', '', ''], rows)}</div>"


def _messages(summary: RunSummary) -> str:
    if not summary.messages:
        return ""
    lines = "".join(
        f'<div class="message {escape(each["level"])}"><b>{escape(each["level"])}</b>{escape(each["text"])}</div>'
        for each in summary.messages
    )
    return f"<h2>Messages</h2><div class='card'>{lines}</div>"


def _configuration(config: RunConfig) -> str:
    here = dict(_flat(asdict(config)))
    full = dict(_flat(asdict(config.full_size))) if config.full_size else {}
    rows = []
    for path in sorted(here.keys() | full.keys()):
        cells = [here.get(path, ""), *([full.get(path, "")] if full else [])]
        differs = ' class="differs"' if len(set(cells)) > 1 else ""
        values = "".join(f'<td class="value">{escape(cell)}</td>' for cell in cells)
        rows.append(f'<tr{differs}><td class="value">{escape(path)}</td>{values}</tr>')
    heads = "".join(f"<th>{head}</th>" for head in ["", "this run", *(["full size"] if full else [])])
    return (
        f"<h2>Configuration</h2><details><summary>{len(rows)} values</summary><div class='card'>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if prefix == "" and key == "full_size":
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", "null" if value is None else str(value)


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the report of a run anew; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description="Make the report of a run.")
    parser.add_argument("run_dir", type=Path)
    try:
        print(write_report(parser.parse_args(arguments).run_dir.resolve()))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
