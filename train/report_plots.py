"""The pictures of a report: each function makes one figure, as SVG text to be put into a page.

Colours are names of the page's style sheet (`var(--train)`), so pictures follow the page into the dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from train.quantities import count, estimate
from train.records import Candidate, Comparison, Evaluation, Step
from train.summary import RunSummary, StageSummary, best_of, exceeds_noise

Floats = npt.NDArray[np.float64]

MAX_POINTS = 1200
"""Points of a curve; a picture has no room for more."""
SMOOTHING = 0.04
"""Share of a stage's steps that a point of a smoothed curve is the mean of."""

# matplotlib wants colours, the page wants names: these stand in for the names until the figure is text.
COLOURS = {
    "ink": "#010101",
    "muted": "#010102",
    "line": "#010103",
    "train": "#010104",
    "best": "#010105",
    "source-0": "#010106",
    "source-1": "#010107",
    "source-2": "#010108",
    "source-3": "#010109",
    "source-4": "#01010a",
    "card": "#01010b",
}
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["line"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 8.5,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "svg.fonttype": "none",
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.color": COLOURS["line"],
    "ytick.labelcolor": COLOURS["muted"],
    "ytick.left": False,
}
COUNTS = FuncFormatter(lambda value, _: count(value))


@dataclass(frozen=True, slots=True)
class Series:
    """A curve over the tokens of all stages, laid end to end.

    Attributes:
        stage: whose.
        start: tokens of the stages before.
        tokens: where its points are, counted from the first stage on.
        values: what they are, not finite ones included.
    """

    stage: StageSummary
    start: float
    tokens: Floats
    values: Floats

    @property
    def end(self) -> float:
        """Tokens up to its last point."""
        return float(self.tokens[-1])


def series_of(summary: RunSummary, key: str) -> list[Series]:
    """A field of the step records of every stage that took steps."""
    found, start = [], 0.0
    for stage in summary.stages:
        if stage.steps:
            tokens = np.array([start + step["tokens"] for step in stage.steps], dtype=np.float64)
            found.append(Series(stage, start, tokens, _column(stage.steps, key)))
            start = float(tokens[-1])
    return found


def loss_figure(summary: RunSummary) -> str:
    """Training and held-out loss over all stages."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10.4, 3.9), layout="constrained")
        axes = figure.subplots()
        losses = series_of(summary, "loss")
        for number, series in enumerate(losses):
            _plot_raw(axes, series, "train")
            _plot_smooth(axes, series, "train", label="training" if number == 0 else None)
        sources = dict.fromkeys(each["source"] for stage in summary.stages for each in stage.validations)
        for number, source in enumerate(sources):
            for series in losses:
                _plot_held_out(axes, series, source, f"source-{number % 5}")
        _mark_stages(axes, losses)
        axes.set_ylabel("loss, nats a token")
        axes.set_xlabel("tokens trained on, all stages")
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        # Below, since no corner is free in every run.
        place = {"loc": "outside lower center", "ncols": min(len(unique), 4), "handlelength": 1.4}
        figure.legend(unique.values(), unique.keys(), **place)
        return _svg(figure, "loss")


def curve_figure(summary: RunSummary, key: str, *, colour: str, from_zero: bool, limit: float | None = None) -> str:
    """A small picture of one field of the step records.

    Args:
        summary: the run.
        key: the field.
        colour: name in the style sheet.
        from_zero: whether the axis begins at 0.
        limit: a line to draw across, e.g. where gradients are clipped.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(3.25, 2.0), layout="constrained")
        axes = figure.subplots()
        curves = series_of(summary, key)
        # A schedule has no noise to smooth away.
        smooth = key != "learning_rate"
        for series in curves:
            if smooth:
                _plot_raw(axes, series, colour)
                _plot_smooth(axes, series, colour, label=None)
            else:
                axes.plot(*_thinned(series.tokens, series.values), color=COLOURS[colour], linewidth=1.6)
        if limit:
            axes.axhline(limit, color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (3, 3)))
        for series in curves[1:]:
            axes.axvline(series.start, color=COLOURS["line"], linewidth=0.9)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(COUNTS)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(COUNTS if key == "tokens_per_second" else "{x:.3g}")
        axes.set_xmargin(0.02)
        return _svg(figure, key)


def evaluation_figure(summary: RunSummary) -> str:
    """Every model on every source, with error bars; a column of the picture is a source."""
    models, sources = summary.models, summary.sources
    scores = {(each["model"], each["source"]): each for each in summary.evaluations}
    with rc_context({**STYLE, "axes.grid.axis": "both"}):
        num_columns = min(len(sources), 3)
        num_rows = math.ceil(len(sources) / num_columns)
        size = (10.4, num_rows * (0.75 + 0.34 * len(models)))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
        for axes, source in zip(panels, sources, strict=False):
            _plot_scores(axes, summary, [scores.get((model, source)) for model in models])
            axes.set_title(source, loc="left", fontsize=9.5, fontweight="bold", pad=8)
            axes.set_xlabel("held-out loss, nats a token")
        for axes in panels[len(sources) :]:
            axes.set_visible(False)
        panels[0].set_yticks(range(len(models)), models)
        panels[0].set_ylim(len(models) - 0.5, -0.5)
        return _svg(figure, "evaluation")


def comparison_figure(comparisons: Sequence[Comparison]) -> str:
    """Gains with bars of three standard errors: what does not touch zero is more than noise."""
    with rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(10.4, 0.6 + 0.34 * len(comparisons)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=COLOURS["muted"], linewidth=1.1)
        for row, each in enumerate(comparisons):
            clear, side = exceeds_noise(each), 1 if each["gain"] > 0 else -1
            colour = COLOURS["best" if clear else "muted"]
            axes.errorbar(
                each["gain"],
                row,
                xerr=3 * each["standard_error"],
                fmt="o",
                color=colour,
                markerfacecolor=colour if clear else COLOURS["card"],
                markersize=6,
                elinewidth=1.6,
                capsize=3,
            )
            axes.annotate(
                estimate(each["gain"], each["standard_error"]),
                (each["gain"] + 3 * side * each["standard_error"], row),
                xytext=(9 * side, 0),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
            )
        names = [f"{each['model']} over {each['baseline']}, {each['source']}" for each in comparisons]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xmargin(0.26)  # room for the numbers on either side
        axes.set_xlabel("gain, nats a token (right of zero is better); bars are three standard errors")
        _darken_names(axes)
        return _svg(figure, "comparison")


def candidate_figure(candidates: Sequence[Candidate]) -> str:
    """Shapes that were tried, by loss before recovery; the first is the model they are cut out of."""
    chosen = best_of(candidates)
    with rc_context({**STYLE, "axes.grid.axis": "both"}):
        figure = Figure(figsize=(10.4, 0.75 + 0.34 * len(candidates)), layout="constrained")
        axes = figure.subplots()
        for row, each in enumerate(candidates):
            axes.errorbar(
                each["loss"],
                row,
                xerr=each["standard_error"],
                fmt="o",
                color=COLOURS["best" if each is chosen else "muted" if each is candidates[0] else "train"],
                markersize=6.5,
                elinewidth=1.6,
                capsize=3,
            )
        names = [
            f"{each['num_layers']} x {each['hidden_size']:,}, "
            + (f"{each['num_experts']} x " if each["num_experts"] > 1 else "")
            + f"FFN {each['ffn_hidden_size']:,}: {100 * each['size_ratio']:.1f} %"
            for each in candidates
        ]
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("loss before recovery, nats a token")
        axes.set_xmargin(0.08)
        _darken_names(axes)
        return _svg(figure, f"candidates-{candidates[0]['stage']}")


def _plot_scores(axes: Axes, summary: RunSummary, column: Sequence[Evaluation | None]) -> None:
    known = [each for each in column if each is not None]
    lowest = min(known, key=lambda each: each["loss"], default=None)
    middle = (min(each["loss"] for each in known) + max(each["loss"] for each in known)) / 2 if known else 0
    for row, each in enumerate(column):
        if each is None:
            continue
        baseline = summary.is_baseline(each["model"])
        colour = COLOURS["best" if each is lowest else "muted" if baseline else "train"]
        axes.errorbar(
            each["loss"],
            row,
            xerr=each["standard_error"],
            fmt="D" if baseline else "o",
            color=colour,
            markersize=5.5 if baseline else 6.5,
            markerfacecolor=COLOURS["card"] if baseline else colour,
            elinewidth=1.6,
            capsize=3,
        )
        on_left = each["loss"] > middle
        axes.annotate(
            f"{each['loss']:.3f}",
            (each["loss"] + (-1 if on_left else 1) * each["standard_error"], row),
            xytext=(-6 if on_left else 6, 0),
            textcoords="offset points",
            ha="right" if on_left else "left",
            va="center",
            fontweight="bold" if each is lowest else "normal",
        )
    axes.set_xmargin(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _darken_names(axes)


def _plot_raw(axes: Axes, series: Series, colour: str) -> None:
    axes.plot(*_thinned(series.tokens, series.values), color=COLOURS[colour], linewidth=0.7, alpha=0.28)


def _plot_smooth(axes: Axes, series: Series, colour: str, *, label: str | None) -> None:
    tokens, values = _thinned(series.tokens, _smoothed(series.values))
    axes.plot(tokens, values, color=COLOURS[colour], linewidth=1.9, label=label)


def _plot_held_out(axes: Axes, series: Series, source: str, colour: str) -> None:
    found = [each for each in series.stage.validations if each["source"] == source]
    if not found:
        return
    per_step = series.stage.started["tokens_per_step"]
    axes.errorbar(
        [series.start + each["step"] * per_step for each in found],
        [each["loss"] for each in found],
        yerr=[each["standard_error"] for each in found],
        color=COLOURS[colour],
        fmt="o-",
        linewidth=1.1,
        markersize=3.8,
        elinewidth=1.1,
        label=f"held out: {source}",
    )


def _mark_stages(axes: Axes, losses: Sequence[Series]) -> None:
    for series in losses:
        if series.start:
            axes.axvline(series.start, color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (2, 3)))
        axes.annotate(
            series.stage.name,
            (series.start, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(5, 3),
            textcoords="offset points",
            va="bottom",
            fontweight="bold",
            color=COLOURS["muted"],
        )
    axes.set_xmargin(0.015)
    if losses:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(COUNTS)
    axes.yaxis.set_major_locator(MaxNLocator(7))


def _darken_names(axes: Axes) -> None:
    for label in axes.get_yticklabels():
        label.set_color(COLOURS["ink"])
        label.set_fontsize(9)


def _column(steps: Sequence[Step], key: str) -> Floats:
    return np.array([step[key] for step in steps], dtype=np.float64)  # type: ignore[literal-required]


def _smoothed(values: Floats) -> Floats:
    """Mean over a window around each point, narrower at the ends; what is not finite is passed over."""
    reach = max(round(SMOOTHING * len(values) / 2), 1)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    here = np.arange(len(values))
    # As far back as ahead, or a falling curve would be drawn beside itself at its ends.
    around = np.minimum(reach, np.minimum(here, len(values) - 1 - here))
    first, last = here - around, here + around + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        smooth: Floats = (sums[last] - sums[first]) / (counts[last] - counts[first])
    return smooth


def _thinned(tokens: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Smallest and largest value of each of `MAX_POINTS / 2` stretches, so that no spike is lost."""
    finite = np.isfinite(values)
    tokens, values = tokens[finite], values[finite]
    if len(values) <= MAX_POINTS:
        return tokens, values
    edges = np.linspace(0, len(values), MAX_POINTS // 2 + 1).astype(int)
    kept: list[int] = []
    for first, last in pairwise(edges):
        stretch = values[first:last]
        kept += sorted({first + int(stretch.argmin()), first + int(stretch.argmax())})
    return tokens[kept], values[kept]


def _svg(figure: Figure, name: str) -> str:
    """SVG that can stand in a page beside others: own ids, the page's fonts and colours, nothing from elsewhere."""
    stream = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    view = re.search(r'viewBox="([^"]*)"', text)
    assert view is not None
    drawing = text[text.index("</defs>") + len("</defs>") :]
    text = f'<svg viewBox="{view[1]}" role="img">{drawing}'
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'font-family: [^;"]*', "font-family: var(--font)", text)
    for colour, stand_in in COLOURS.items():
        text = text.replace(stand_in, f"var(--{colour})")
    return text
