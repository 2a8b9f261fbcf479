"""A plan on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from parallel.plan.layout import Layout
from parallel.plan.operations import DAY
from recipes.plan import Better, Plan, StagePlan
from recipes.plan_remedies import Remedy
from train.quantities import byte_size, count, duration, percent

BAR_WIDTH = 60
PART_COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "white", "bright_black", "bright_blue")
MFU_CONVENTION = "model FLOPs over the dense bf16 peak: causal attention counted half, no recomputation"


def print_plan(console: Console, plan: Plan, remedies: list[Remedy]) -> None:
    """Show a plan: stages, memory, totals against the budget, and what would make it better."""
    console.print()
    console.print(Text.assemble(("Plan of ", "bold"), (plan.recipe, "bold cyan"), f" on cluster {plan.cluster}"))
    console.print(Text(plan.description))
    nodes = f"{plan.num_nodes:,} nodes of {plan.hardware.gpus_per_node}"
    console.print(Text(f"{plan.num_gpus:,} x {plan.gpu.name}, {nodes}", style="dim"))
    console.print(_stages(plan))
    console.print(Text(f"MFU: {MFU_CONVENTION}.", style="dim"))
    for stage in plan.stages:
        _print_memory(console, plan, stage)
    console.print(_budget(plan))
    if remedies:
        console.print(Text("What would meet it" if not plan.is_met else "What would make it better", style="bold"))
        for remedy in remedies:
            meets = remedy.meets(plan.budget)
            verdict = Text.assemble(
                ("  meets the budget  " if meets else "  not enough alone  ", "green" if meets else "yellow")
            )
            effect = f"{remedy.what}: {remedy.days:.1f} days, {remedy.most_mw:.2f} MW  "
            console.print(Text.assemble(verdict, effect, (remedy.overrides, "cyan")), soft_wrap=True)
    console.print()


def _stages(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("", style="dim", no_wrap=True)
    for stage in plan.stages:
        table.add_column(stage.name)
    columns = [_rows(plan, stage) for stage in plan.stages]
    for label in columns[0]:
        table.add_row(label, *(column[label] for column in columns))
    return table


def _rows(plan: Plan, stage: StagePlan) -> dict[str, str]:
    training, saves = stage.step, stage.saves
    rows = {
        "model": model_of(stage),
        "layout": axes(stage.layout),
        "batch": (
            f"{stage.layout.global_batch:,} x {stage.layout.sequence:,} tokens, "
            f"{stage.layout.micro_batches} micro-batches of {stage.layout.micro_batch}, {stage.layout.precision}, "
            f"recompute {stage.layout.recompute}"
        ),
        "memory": (
            f"{byte_size(stage.worst.needed)} of {byte_size(plan.gpu.memory_bytes)} "
            f"(pipeline rank {stage.worst.stage} is the fullest)"
            + (f", {byte_size(host)} in host memory" if (host := stage.worst.host) else "")
            + (f", {byte_size(disk)} on a local disk" if (disk := stage.worst.disk_optimizer) else "")
        ),
        "speed": f"{training.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, {percent(training.mfu)} MFU",
        "steps": f"{stage.num_steps:,} of {training.seconds:.2f} s, {count(stage.tokens)} tokens" + waiting_of(stage),
        "goodput": (
            f"{percent(stage.goodput)}, {stage.failures:.1f} failures expected "
            f"({percent(stage.best_goodput)} with saves every {duration(saves.best_interval_seconds)})"
        ),
        "checkpoints": (
            f"{byte_size(saves.num_bytes)} every {duration(saves.interval_seconds)}, {stage.kept} kept; waits "
            f"{duration(saves.blocked_seconds)}, on disk after {duration(saves.durable_seconds)}"
        ),
        "data": f"{byte_size(stage.data_bytes)}, {byte_size(stage.data_bytes / stage.seconds)}/s",
        "time": f"{stage.seconds / DAY:.1f} days",
        "energy": f"{stage.energy_mwh:,.0f} MWh, {stage.power.mean_mw:.2f} MW on average",
    }
    better = stage.better
    rows["faster"] = layout_told(better) if better else "no other layout is, by more than 1 %"
    return rows


def layout_told(better: Better) -> str:
    """A faster layout in words: what to type is among the remedies, where it is one for all stages."""
    return (
        f"{percent(better.gain)} by {axes(better.layout)}, micro-batches of {better.layout.micro_batch}, recompute "
        f"{better.layout.recompute} ({byte_size(better.worst.needed)} a GPU)"
    )


def model_of(stage: StagePlan) -> str:
    """The model a stage trains, and its teacher."""
    told = f"{stage.model}, {count(stage.shape.num_parameters)} parameters"
    if stage.serving is not None:
        at = stage.serving
        return (
            f"{told}, taught by {count(at.teacher.shape.num_parameters)} on {at.layout.num_gpus:,} GPUs of its own "
            f"({axes(at.layout)}, {byte_size(at.worst.needed)} a GPU)"
        )
    return told if stage.teacher is None else f"{told}, taught by {count(stage.teacher.shape.num_parameters)}"


def waiting_of(stage: StagePlan) -> str:
    """How long students wait for a teacher on GPUs of its own; more data ranks make it faster."""
    if stage.serving is None:
        return ""
    share = stage.step.teacher / stage.step.seconds
    return f"; {percent(share)} of them waiting for the teacher" if share else "; the teacher is done before"


def axes(layout: Layout) -> str:
    """`tensor 4 x context 2 x data 64 x pipeline 4, 5 chunks`: sizes of the axes in the order of ranks."""
    sizes = f"tensor {layout.tensor} x context {layout.context} x data {layout.data} x pipeline {layout.pipeline}"
    return f"{sizes}, {layout.virtual_pipeline} chunks a rank" if layout.virtual_pipeline > 1 else sizes


def _print_memory(console: Console, plan: Plan, stage: StagePlan) -> None:
    """One bar: a GPU's memory, and what is in it."""
    scale = BAR_WIDTH / plan.gpu.memory_bytes
    bar, legend, upto, filled = Text(), Text(), 0.0, 0
    for (part, size), colour in zip(stage.worst.parts.items(), PART_COLOURS, strict=False):
        upto += size * scale
        bar.append("#" * (round(upto) - filled), style=colour)
        filled = round(upto)
        legend.append(f"{part} {byte_size(size)}  " if size else "", style=colour)
    bar.append("." * (BAR_WIDTH - filled), style="dim")
    console.print(Text.assemble((f"memory a GPU, {stage.name}  ", "dim"), bar))
    console.print(legend)


def _budget(plan: Plan) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 3, 0, 0))
    for head in ("", "plan", "budget", ""):
        table.add_column(head, justify="right" if head else "left")
    for verdict in plan.verdicts:
        digits = 0 if verdict.name == "GPUs" else 2 if verdict.name == "power" else 1
        met = "[green]met[/]" if verdict.is_met else "[bold red]over[/]"
        values = [f"{value:,.{digits}f} {verdict.unit}".strip() for value in (verdict.value, verdict.limit)]
        table.add_row(verdict.name, *values, met)
    table.add_row("energy", f"{plan.energy_mwh:,.0f} MWh", "", "")
    table.add_row("price", f"${plan.dollars:,.0f}", "", f"at ${plan.hardware.dollars_per_gpu_hour:.2f} a GPU hour")
    table.add_row("disk", byte_size(plan.storage_bytes), "", "checkpoints kept, and one being written")
    return table
