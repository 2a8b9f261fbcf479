"""The pictures of a plan's page: each function draws one, as SVG text in the colours of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from parallel.mesh import Coordinate, Mesh
from parallel.plan.layout import Layout
from parallel.plan.memory import StageMemory
from parallel.plan.traffic import AxisTraffic
from recipes.scaling import Point
from train.quantities import byte_size, count

WIDTH = 1040
MOST_CELLS = 4096
"""GPUs that are drawn one by one; beyond, a node is one tile."""
MOST_NODES_OF_REPLICA = 8
REPLICA_ROW = 214
"""Height of a row of nodes."""
PART_COLOURS = (
    "var(--train)",
    "var(--source-3)",
    "var(--source-2)",
    "var(--source-0)",
    "var(--source-1)",
    "var(--bad)",
    "var(--source-4)",
    "var(--line)",
    "var(--muted)",
    "var(--warn)",
)
AXIS_COLOURS = {
    "tensor": "var(--train)",
    "context": "var(--source-3)",
    "data": "var(--source-0)",
    "pipeline": "var(--source-1)",
}


def mesh_of(layout: Layout) -> Mesh:
    """The mesh of a layout."""
    return Mesh(tensor=layout.tensor, context=layout.context, data=layout.data, pipeline=layout.pipeline)


def svg(width: float, height: float, drawing: Sequence[str], name: str) -> str:
    """An SVG element."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(name)}" '
        f'font-family="var(--font)" font-size="12" fill="var(--ink)">{"".join(drawing)}</svg>'
    )


def bar_of_parts(parts: dict[str, float], limit: float, unit: str) -> str:
    """A stacked bar up to `limit`, with its legend below; sizes in `unit`: "bytes" or "s"."""
    drawing = [_rect((0, 0, WIDTH, 30), "var(--page)", radius=5)]
    left = 0.0
    for (part, size), colour in zip(parts.items(), _colours(len(parts)), strict=True):
        width = WIDTH * size / limit
        drawing.append(_rect((left, 0, width, 30), colour, title=f"{part}: {_size(size, unit)}"))
        left += width
    drawing.append(f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="29" rx="5" fill="none" stroke="var(--line)"/>')
    return svg(WIDTH, 30, drawing, "bar") + legend({part: _size(size, unit) for part, size in parts.items()})


def legend(values: dict[str, str]) -> str:
    """Names and values in the colours of a bar."""
    entries = (
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)} <b>{escape(value)}</b></span>'
        for (name, value), colour in zip(values.items(), _colours(len(values)), strict=True)
    )
    return f'<div class="legend">{"".join(entries)}</div>'


def memory_by_rank(stages: Sequence[StageMemory], memory_bytes: float) -> str:
    """A stacked bar a pipeline rank, under the line of what the GPU has."""
    height, left, gap = 24, 92, 8
    scale = (WIDTH - left - 90) / memory_bytes
    drawing = []
    for row, stage in enumerate(stages):
        y, x = row * (height + gap), float(left)
        drawing.append(_text((left - 12, y + 16), f"pipeline {stage.stage}", anchor="end", colour="var(--muted)"))
        drawing.append(_rect((left, y, memory_bytes * scale, height), "var(--page)", radius=4))
        for (part, size), colour in zip(stage.parts.items(), _colours(len(stage.parts)), strict=True):
            drawing.append(_rect((x, y, size * scale, height), colour, title=f"{part}: {byte_size(size)}"))
            x += size * scale
        drawing.append(_text((x + 8, y + 16), byte_size(stage.needed)))
    total = len(stages) * (height + gap)
    edge = left + memory_bytes * scale
    drawing.append(f'<line x1="{edge}" y1="0" x2="{edge}" y2="{total}" stroke="var(--bad)" stroke-width="2"/>')
    drawing.append(_text((edge + 8, total - gap - 8), byte_size(memory_bytes), colour="var(--bad)"))
    return svg(WIDTH, total, drawing, "memory of each pipeline rank")


def replica(layout: Layout, traffic: Sequence[AxisTraffic], gpus_per_node: int) -> str:
    """The GPUs that hold one copy of the model, node by node, and what they send each other."""
    mesh, links = mesh_of(layout), {each.axis: each for each in traffic}
    ranks = [
        mesh.rank(Coordinate(pipeline=pipeline, data=0, context=context, tensor=tensor))
        for pipeline in range(mesh.pipeline)
        for context in range(mesh.context)
        for tensor in range(mesh.tensor)
    ]
    own, nodes = set(ranks), list(dict.fromkeys(rank // gpus_per_node for rank in ranks))
    shown = nodes[:MOST_NODES_OF_REPLICA]
    columns = min(4, len(shown))
    box, gap = (WIDTH - 56 * (columns - 1)) / columns, 56
    rows = math.ceil(len(shown) / columns)
    drawing = []
    inside = ", ".join(f"{each.axis} {_volume(each.step_bytes)}" for each in traffic if each.link == "node")
    for place, node in enumerate(shown):
        x, y = place % columns * (box + gap), place // columns * REPLICA_ROW
        drawing += _node(mesh, node, own, (x, y, box), gpus_per_node)
        if inside:
            drawing.append(_text((x + box / 2, y + 158), inside, anchor="middle", colour="var(--muted)", size=11))
        if place + 1 < len(shown) and "pipeline" in links and place % columns < columns - 1:
            volume = _volume(links["pipeline"].step_bytes)
            drawing += _arrow(x + box, y + 70, gap, volume, AXIS_COLOURS["pipeline"])
        if "data" in links and links["data"].link == "network":
            drawing += _down(x + box / 2, y + 170, f"data {_volume(links['data'].step_bytes)}")
    if len(nodes) > len(shown):
        drawing.append(_text((0, rows * REPLICA_ROW - 4), f"and {len(nodes) - len(shown)} more nodes like these"))
    return svg(WIDTH, rows * REPLICA_ROW, drawing, "the GPUs of one copy of the model")


def _node(mesh: Mesh, node: int, own: set[int], place: tuple[float, float, float], gpus_per_node: int) -> list[str]:
    x, y, box = place
    columns = min(4, gpus_per_node)
    cell = (box - 24 - 6 * (columns - 1)) / columns
    drawing = [
        f'<rect x="{x + 0.5:.1f}" y="{y + 0.5}" width="{box - 1:.1f}" height="168" rx="9" fill="var(--page)" '
        'stroke="var(--line)"/>',
        _text((x + 12, y + 20), f"node {node}", weight=600),
    ]
    for slot in range(gpus_per_node):
        rank = node * gpus_per_node + slot
        if rank >= mesh.world_size:
            continue
        at = mesh.coordinate(rank)
        left, top = x + 12 + slot % columns * (cell + 6), y + 32 + slot // columns * 56
        title = f"rank {rank}: pipeline {at.pipeline}, data {at.data}, context {at.context}, tensor {at.tensor}"
        opacity = 1.0 if rank in own else 0.22
        drawing.append(
            _rect(
                (left, top, cell, 50), stage_colour(at.pipeline, mesh.pipeline), radius=5, title=title, opacity=opacity
            )
        )
        drawing.append(_text((left + cell / 2, top + 21), str(rank), anchor="middle", colour="#fff", weight=600))
        drawing.append(
            _text((left + cell / 2, top + 38), f"t{at.tensor} c{at.context}", anchor="middle", colour="#fff", size=10.5)
        )
    return drawing


def _arrow(x: float, y: float, length: float, label: str, colour: str) -> list[str]:
    """A two-way arrow with its volume above."""
    left, right = x + 7, x + length - 7
    heads = (
        f"M{left + 6} {y - 5}L{left} {y}L{left + 6} {y + 5}M{right - 6} {y - 5}L{right} {y}L{right - 6} {y + 5}"
        f"M{left} {y}L{right} {y}"
    )
    return [
        f'<path d="{heads}" stroke="{colour}" stroke-width="2" fill="none"/>',
        _text((x + length / 2, y - 11), label, anchor="middle", size=10),
    ]


def _down(x: float, y: float, label: str) -> list[str]:
    """An arrow down, to the other copies of the model."""
    head = f"M{x} {y}L{x} {y + 18}M{x - 5} {y + 12}L{x} {y + 18}L{x + 5} {y + 12}"
    return [
        f'<path d="{head}" stroke="{AXIS_COLOURS["data"]}" stroke-width="2" fill="none"/>',
        _text((x + 10, y + 13), label, size=10.5),
    ]


def cluster_map(layout: Layout, gpus_per_node: int) -> str:
    """Every node and GPU, in the colour of its pipeline rank; the first copy of the model is outlined."""
    mesh = mesh_of(layout)
    num_nodes = math.ceil(mesh.world_size / gpus_per_node)
    columns = min(num_nodes, 32 if num_nodes > 64 else 16)
    tile, one_by_one = WIDTH / columns, mesh.world_size <= MOST_CELLS
    across = min(4, gpus_per_node)
    down = math.ceil(gpus_per_node / across)
    cell = min((tile - 8) / across, 16)
    tile_height = cell * down + 8
    drawing = []
    for node in range(num_nodes):
        x, y = node % columns * tile, node // columns * tile_height
        first = mesh.coordinate(node * gpus_per_node)
        title = f"node {node}: ranks {node * gpus_per_node}-{(node + 1) * gpus_per_node - 1}"
        title += f", pipeline {first.pipeline}, data {first.data}"
        if one_by_one:
            for slot in range(min(gpus_per_node, mesh.world_size - node * gpus_per_node)):
                at = mesh.coordinate(node * gpus_per_node + slot)
                left, top = x + 4 + slot % across * cell, y + 4 + slot // across * cell
                drawing.append(
                    _rect((left, top, cell - 1, cell - 1), stage_colour(at.pipeline, mesh.pipeline), radius=1.5)
                )
        else:
            colour = stage_colour(first.pipeline, mesh.pipeline)
            drawing.append(_rect((x + 4, y + 4, cell * across - 1, cell * down - 1), colour, radius=2, title=title))
        stroke = "var(--ink)" if first.data == 0 else "none"
        frame = f'x="{x + 2:.1f}" y="{y + 2:.1f}" width="{cell * across + 3:.1f}" height="{cell * down + 3:.1f}"'
        drawing.append(
            f'<rect {frame} rx="3" fill="transparent" stroke="{stroke}" stroke-width="1.5">'
            f"<title>{escape(title)}</title></rect>"
        )
    return svg(WIDTH, math.ceil(num_nodes / columns) * tile_height, drawing, "all nodes")


def stage_colour(pipeline: int, size: int) -> str:
    """Of a pipeline rank: blue to orange."""
    return f"hsl({(215 + 190 * pipeline / max(1, size - 1)) % 360:.0f} 58% 47%)"


def scaling_curve(points: Sequence[Point], num_gpus: int) -> str:
    """Tokens/s a GPU over the number of GPUs, and the days they take, both on a logarithmic axis of GPUs."""
    half, height = WIDTH / 2 - 20, 300.0
    rates = {"same batch, best layout": [each.same_batch for each in points]}
    rates["batch grown with the GPUs"] = [each.grown_batch for each in points]
    left = _chart(points, rates, (0, half, height), "tokens/s a GPU", num_gpus)
    days = _chart(
        points, {"days": [each.days for each in points]}, (half + 40, half, height), "days", num_gpus, log=True
    )
    return svg(WIDTH, height, [*left, *days], "scaling from 256 to 16,384 GPUs")


def _chart(
    points: Sequence[Point],
    series: dict[str, list[float | None]],
    place: tuple[float, float, float],
    label: str,
    num_gpus: int,
    *,
    log: bool = False,
) -> list[str]:
    left, width, height = place
    x0, x1, y0, y1 = left + 58, left + width - 30, height - 44, 34.0
    sizes = [math.log2(point.num_gpus) for point in points]
    values = [value for each in series.values() for value in each if value is not None]
    if not values:
        return [_text((left, 20), f"{label}: no layout on any of these sizes")]
    low, high = (math.log10(min(values) / 1.3), math.log10(max(values) * 1.3)) if log else (0.0, max(values) * 1.12)

    def x_of(size: float) -> float:
        return x0 + (size - min(sizes)) / max(1e-9, max(sizes) - min(sizes)) * (x1 - x0)

    def y_of(value: float) -> float:
        return y0 - ((math.log10(value) if log else value) - low) / (high - low) * (y0 - y1)

    drawing = [_text((left, 16), label, weight=600)]
    for tick in _ticks(low, high, log=log):
        y = y_of(tick)
        drawing.append(f'<line x1="{x0}" x2="{x1}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        drawing.append(
            _text((x0 - 8, y + 4), count(tick) if tick >= 1 else f"{tick:g}", anchor="end", colour="var(--muted)")
        )
    for point, size in zip(points, sizes, strict=True):
        if point.num_gpus == num_gpus:
            x = x_of(size)
            drawing.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y1}" y2="{y0}" stroke="var(--muted)" stroke-dasharray="3 4"/>'
            )
            drawing.append(_text((x + 5, y1 + 6), "this plan", colour="var(--muted)", size=11))
        if math.log2(point.num_gpus).is_integer():
            drawing.append(
                _text((x_of(size), y0 + 18), f"{point.num_gpus:,}", anchor="middle", colour="var(--muted)", size=11)
            )
    drawing.append(_text(((x0 + x1) / 2, y0 + 38), "GPUs", anchor="middle", colour="var(--muted)"))
    for number, (name, column) in enumerate(series.items()):
        colour = ("var(--train)", "var(--source-0)")[number]
        known = [(x_of(size), y_of(value)) for size, value in zip(sizes, column, strict=True) if value is not None]
        if known:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in known)
            drawing.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2.4" fill="none"/>')
            drawing += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{colour}"/>' for x, y in known]
        if len(series) > 1:
            # Beside the title, where no curve comes.
            x = left + 122 + 188 * number
            drawing.append(f'<line x1="{x}" x2="{x + 18}" y1="12" y2="12" stroke="{colour}" stroke-width="2.4"/>')
            drawing.append(_text((x + 24, 16), name))
    return drawing


def _ticks(low: float, high: float, *, log: bool) -> list[float]:
    if log:
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [step * 10.0**power for power in decades for step in (1, 2, 5)]
        return [tick for tick in ticks if low <= math.log10(tick) <= high]
    step = 10 ** math.floor(math.log10(high / 2))
    step *= next(factor for factor in (1, 2, 5) if high / (step * factor) <= 6)
    return [step * number for number in range(int(high / step) + 1)]


def _colours(number: int) -> list[str]:
    return [PART_COLOURS[place % len(PART_COLOURS)] for place in range(number)]


def _size(value: float, unit: str) -> str:
    return byte_size(value) if unit == "bytes" else f"{value:.2f} s"


def _volume(num_bytes: float) -> str:
    return byte_size(num_bytes).replace(".0 ", " ")


def _rect(
    box: tuple[float, float, float, float], colour: str, *, radius: float = 0, title: str = "", opacity: float = 1.0
) -> str:
    """A rectangle of x, y, width and height."""
    x, y, width, height = box
    inner = f"<title>{escape(title)}</title>" if title else ""
    extra = (f' rx="{radius:g}"' if radius else "") + (f' opacity="{opacity:g}"' if opacity != 1 else "")
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(0.0, width):.1f}" height="{height:.1f}" fill="{colour}"{extra}>'
        f"{inner}</rect>"
    )


def _text(
    at: tuple[float, float],
    words: str,
    *,
    anchor: str = "start",
    colour: str = "",
    size: float = 12,
    weight: int = 400,
) -> str:
    """Words at x, y."""
    x, y = at
    extra = (f' fill="{colour}"' if colour else "") + (f' font-weight="{weight}"' if weight != 400 else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"{extra}>{escape(words)}</text>'
