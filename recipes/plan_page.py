"""A plan as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from parallel.plan.operations import DAY
from recipes.plan import Plan, StagePlan, Verdict
from recipes.plan_drawing import (
    bar_of_parts,
    cluster_map,
    legend,
    memory_by_rank,
    replica,
    scaling_curve,
)
from recipes.plan_remedies import Remedy
from recipes.plan_table import MFU_CONVENTION, axes, layout_told, model_of
from recipes.scaling import Point
from train.quantities import byte_size, count, duration, percent
from train.report_style import page, table

STYLE = """<style>
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 10px; font-size: 13px; color: var(--muted); }
.legend b { color: var(--ink); font-weight: 600; } .legend i { display: inline-block; width: 11px; height: 11px;
border-radius: 3px; margin-right: 6px; } .meter { height: 10px; border-radius: 5px; background: var(--page);
overflow: hidden; margin: 6px 0 2px; } .meter i { display: block; height: 100%; border-radius: 5px; }
.limits { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; margin-top: 12px; }
.limits .card { margin: 0; } .limits b { font-size: 20px; } h3 { margin-top: 4px; }
</style>"""

STEP_PARTS = {
    "matmul": "matrix products",
    "attention": "attention",
    "elementwise": "element-wise work",
    "launch": "launch gaps",
    "node_links": "tensor and context traffic",
    "host_links": "activations to the host and back",
    "pipeline_links": "pipeline traffic",
    "bubble": "pipeline bubble",
    "data_links": "gradients and weights",
    "optimizer": "optimizer, data, logging",
    "teacher": "the teacher's forward passes",
}


def plan_page(plan: Plan, remedies: Sequence[Remedy], curves: dict[str, tuple[Point, ...]]) -> str:
    """The page; `curves` has the scaling of each stage."""
    sections = [STYLE, _header(plan), _tiles(plan), _limits(plan), _remedies(plan, remedies)]
    for stage in plan.stages:
        sections += _stage(plan, stage, curves[stage.name])
    sections.append(_assumptions(plan))
    return page(escape(f"plan: {plan.recipe} on {plan.cluster}"), "\n".join(sections))


def _header(plan: Plan) -> str:
    state, words = ("finished", "within budget") if plan.is_met else ("failed", "over budget")
    where = f"{plan.num_gpus:,} x {plan.gpu.name} in {plan.num_nodes:,} nodes, cluster {plan.cluster}"
    return (
        f'<span class="badge {state}">{words}</span><span class="badge scale">plan</span>'
        f'<h1>{escape(plan.recipe)}</h1><p>{escape(plan.description)}</p><p class="said">{escape(where)}</p>'
    )


def _tiles(plan: Plan) -> str:
    longest = max(plan.stages, key=lambda stage: stage.seconds)
    rate = f"{longest.step.tokens_per_s_per_gpu:,.0f} tokens/s"
    tiles = [
        (f"{plan.days:.1f} days", f"for {count(sum(stage.tokens for stage in plan.stages))} tokens, failures included"),
        (rate, f"a GPU, {percent(longest.step.mfu)} MFU"),
        (f"{plan.energy_mwh:,.0f} MWh", f"{max(stage.power.mean_mw for stage in plan.stages):.2f} MW on average"),
        (f"${count(plan.dollars)}", f"at ${plan.hardware.dollars_per_gpu_hour:.2f} a GPU hour"),
        (
            f"{sum(stage.failures for stage in plan.stages):.1f} failures",
            f"expected; {percent(longest.goodput)} of the time is training",
        ),
    ]
    cards = "".join(f'<div class="card"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{cards}</div>'


def _limits(plan: Plan) -> str:
    return f'<h2>Budget</h2><div class="limits">{"".join(map(_meter, plan.verdicts))}</div>'


def _meter(verdict: Verdict) -> str:
    share = verdict.value / verdict.limit
    colour = "var(--good)" if verdict.is_met else "var(--bad)"
    digits = 0 if verdict.name == "GPUs" else 2 if verdict.name == "power" else 1
    words = f"{verdict.value:,.{digits}f} of {verdict.limit:,.{digits}f} {verdict.unit}"
    met = '<span class="good">met</span>' if verdict.is_met else '<span style="color:var(--bad)">over</span>'
    return (
        f'<div class="card"><span class="said">{verdict.name}</span><br><b>{words}</b> {met}'
        f'<div class="meter"><i style="width:{min(100.0, 100 * share):.1f}%;background:{colour}"></i></div></div>'
    )


def _remedies(plan: Plan, remedies: Sequence[Remedy]) -> str:
    if not remedies:
        return ""
    title = "What would make it better" if plan.is_met else "What would meet it"
    rows = [
        [
            escape(each.what),
            f"{each.days:.1f}",
            f"{each.most_mw:.2f}",
            '<span class="good">yes</span>' if each.meets(plan.budget) else '<span class="noise">no</span>',
            f"<code>{escape(each.overrides)}</code>",
        ]
        for each in remedies
    ]
    head = ["change", "days", "MW", "meets the budget", "to type"]
    return f'<h2>{title}</h2><div class="card">{table(head, rows, numbers=frozenset({1, 2}))}</div>'


def _stage(plan: Plan, stage: StagePlan, curve: tuple[Point, ...]) -> Iterator[str]:
    layout, step = stage.layout, stage.step
    yield (
        f"<h2>{escape(stage.name)}</h2><p class='said'>{escape(model_of(stage))}; {count(stage.tokens)} tokens in "
        f"{stage.num_steps:,} steps of {step.seconds:.2f} s: {stage.seconds / DAY:.1f} days</p>"
    )
    parts = {words: getattr(step, name) for name, words in STEP_PARTS.items()}
    parts = {words: seconds for words, seconds in parts.items() if seconds > 0}
    yield f'<div class="card"><h3>A step</h3>{bar_of_parts(parts, step.seconds, "s")}</div>'
    biggest = {part: byte_size(size) if size else "none" for part, size in stage.worst.parts.items()}
    yield (
        f'<div class="card"><h3>Memory of a GPU, by pipeline rank</h3>'
        f"{memory_by_rank(stage.pipeline, plan.gpu.memory_bytes)}{legend(biggest)}"
        f"<p class='said' style='margin:8px 0 0'>Sizes of pipeline rank {stage.worst.stage}, the "
        "fullest. Up to the red line there is room.</p></div>"
    )
    yield (
        f'<div class="card"><h3>Layout: {escape(axes(layout))}</h3>'
        "<p class='said'>One copy of the model: its ranks on their GPUs (t and c: tensor and context rank), and what a "
        "GPU sends in a step: in the node, to the next pipeline rank, and to the same ranks of the other copies.</p>"
        f"{replica(layout, stage.traffic, plan.hardware.gpus_per_node)}</div>"
    )
    num_nodes = -(-layout.num_gpus // plan.hardware.gpus_per_node)
    yield (
        f'<div class="card"><h3>All {num_nodes:,} nodes</h3><p class="said">A tile is a node, a colour a pipeline '
        f"rank; outlined is the first of {layout.data} copies of the model.</p>"
        f"{cluster_map(layout, plan.hardware.gpus_per_node)}</div>"
    )
    yield f'<div class="card"><h3>Traffic of a GPU</h3>{_traffic(plan, stage)}</div>'
    yield (f'<div class="card"><h3>More or fewer GPUs</h3>{scaling_curve(curve, stage.layout.num_gpus)}</div>')
    yield f'<div class="card"><h3>Numbers</h3>{_numbers(stage)}</div>'


def _traffic(plan: Plan, stage: StagePlan) -> str:
    rows = []
    for each in stage.traffic:
        link = "NVLink" if plan.hardware.node_link_gb_per_s > 100 else "PCIe"
        name, most = (
            (link, plan.gpu.nvlink_bandwidth) if each.link == "node" else ("network", plan.gpu.network_bandwidth)
        )
        rate = each.step_bytes / stage.step.seconds
        share = min(1.0, rate / most)
        colour = "var(--train)" if each.link == "node" else "var(--source-0)"
        meter = f'<div class="meter"><i style="width:{100 * share:.1f}%;background:{colour}"></i></div>'
        rows.append(
            [
                each.axis,
                f"{each.group} ranks, {each.stride} apart",
                name,
                byte_size(each.step_bytes),
                f"{rate / 1e9:.1f} of {most / 1e9:.0f} GB/s",
                meter,
                each.what,
            ]
        )
    head = ["axis", "group", "link", "sent in a step", "on average", "share of the link", "what"]
    return table(head, rows, numbers=frozenset({3, 4}))


def _numbers(stage: StagePlan) -> str:
    saves, better = stage.saves, stage.better
    rows = [
        [
            "checkpoint",
            f"{byte_size(saves.num_bytes)}, {stage.kept} kept; training waits {duration(saves.blocked_seconds)}",
        ],
        [
            "saved every",
            f"{duration(saves.interval_seconds)}; by Young and Daly {duration(saves.best_interval_seconds)}",
        ],
        ["goodput", f"{percent(stage.goodput)}; {percent(stage.best_goodput)} at that interval"],
        ["failures", f"{stage.failures:.1f} expected"],
        ["data read", f"{byte_size(stage.data_bytes)}, {byte_size(stage.data_bytes / stage.seconds)}/s"],
        ["power", f"{stage.power.mean_mw:.2f} MW on average, {stage.power.most_mw:.2f} MW at most"],
        ["energy", f"{stage.energy_mwh:,.0f} MWh"],
    ]
    if better:
        rows.append(["a faster layout", escape(layout_told(better))])
    return table(["", ""], rows)


def _assumptions(plan: Plan) -> str:
    site = plan.hardware
    facts = [
        f"MFU: {MFU_CONVENTION}.",
        f"Power counts the building (PUE {site.pue:g}) and {site.node_watts:,.0f} W a node besides its GPUs; the "
        "budget is held against every GPU at its limit.",
        f"One unplanned interruption in {site.gpu_days_per_failure:,.0f} GPU days, {site.restart_minutes:g} minutes to "
        "the next step.",
        "The price is GPU hours; storage and transfer are not in it. Evaluation and export take minutes and are left "
        "out. Speeds were fitted to public measurements, see docs/planner.md for how far off they are.",
    ]
    return (
        f"<h2>Assumptions</h2><div class='card'><ul>{''.join(f'<li>{escape(fact)}</li>' for fact in facts)}</ul></div>"
    )
