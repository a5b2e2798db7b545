"""The report's figures as SVG, drawn by matplotlib.

A page has a light and a dark form, and a figure has to follow it. So figures are drawn in the
colours of the light form, and each colour is then replaced by the page's variable of that colour.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from tiltflow.evaluation.figures import (
    SMOOTHED_FROM,
    axis_title,
    elided,
    frame,
    metric_series,
    number,
    running_median,
    smoothing_window,
    thinned,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Stroke = str | tuple[int, tuple[float, ...]]
WIDTH, HEIGHT = 330, 220
LEGEND, ROW, FOOT = 18, 36, 52
"""Heights of a line of a legend, of a system in a forest and of what is below them, in units of the
SVG's view box."""
LONGEST_NAME, LONGEST_LABEL = 32, 16
"""Letters of a name in a legend and of a line beside a forest."""
SERIES = ("#1f5fa8", "#b25a00", "#1b7a4b", "#8b3a8f", "#6b5b1e", "#0f7c86")
"""Colours of lines; a seventh line has the first's, and the next of the strokes."""
STROKES: tuple[tuple[Stroke, Stroke], ...] = (
    ("solid", (0, (5, 3))),
    ((0, (1.2, 1.6)), (0, (5, 2, 1, 2))),
    ((0, (9, 2)), (0, (9, 2, 1, 2))),
)
"""How lines are drawn, plain and dashed, each time that colours come again."""
MEDIAN = "ends at"
"""What is said of a line's end that is no line of the log."""
SMOOTHED = f"Lines of {SMOOTHED_FROM} points or more are running medians over a twentieth of them."
FAINT, SOFT, RULE, ALARM, INK = "#a9c3e0", "#5b6067", "#dcdcd6", "#b3261e", "#1d1f22"
PALETTE = {
    **{colour: f"s{k}" for k, colour in enumerate(SERIES)},
    **{FAINT: "faint", SOFT: "soft", RULE: "rule", ALARM: "alarm", INK: "ink"},
}
"""The page's variable of each colour."""
STYLE = {
    "svg.fonttype": "none",  # text stays text: to be searched, read aloud, and small
    "svg.hashsalt": "tiltflow",  # ids are random otherwise, and equal runs gave unequal pages
    "text.parse_math": False,  # a name of a run may hold dollars
    "path.simplify": False,  # long series are averaged down before
    "font.size": 11.5,
    "text.color": SOFT,
    "axes.labelcolor": SOFT,
    "axes.formatter.useoffset": False,
    "xtick.major.pad": 7,  # the lowest label beside the values stays clear of the first step
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
}

_DROPPED = (
    r' clip-path="[^"<]*"| font-family: [^;"<]*;| transform="rotate\(-0 [^"<]*"|(?<=>)\s+(?=<)'
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Values (n,) over training steps (n,), with an interval where `low` and `high` are given."""

    name: str
    steps: Array
    values: Array
    low: Array | None = None
    high: Array | None = None
    dashed: bool = False
    ends: str = "last"
    """What the last of the values is."""


@dataclass(frozen=True)
class Chart:
    """A figure for the page: what it is called, its SVG, and a note on how it was drawn."""

    title: str
    svg: Markup
    note: str = ""


def chart(
    title: str,
    axis: str,
    series: Sequence[Series],
    limits: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Chart:
    """Lines over common axes. `limits` are (value, what it is), `marks` (step, what happened).

    Raises:
        ValueError: if there is no point to draw.
    """
    shown = [s for s in series if len(s.steps)]
    if not shown:
        raise ValueError(f"the chart {title!r} has no points")
    edges = [e for s in shown for e in (s.low, s.high) if e is not None]
    low, high = frame(np.concatenate([*(s.values for s in shown), *edges]))
    low, high = min([low, *(v for v, _ in limits)]), max([high, *(v for v, _ in limits)])
    pad = 0.05 * (high - low) if limits else 0.0
    low, high = low - pad, high + pad

    def draw(figure: Figure) -> None:
        axes = _axes(figure, axis, (low, high))
        for step, _ in marks:
            axes.axvline(step, color=ALARM, linewidth=1.4, gid="mark")
        for value, text in limits:
            axes.axhline(value, color=SOFT, linewidth=1, linestyle=(0, (2, 3)), gid="limit")
            _write(axes, text, (1, value), 3, horizontalalignment="right")
        lines = []
        for k, s in enumerate(shown):
            colour = SERIES[k % len(SERIES)]
            if s.low is not None and s.high is not None:
                around = np.clip(np.append(s.low, s.high[::-1]), low, high)
                outline = np.append(s.steps, s.steps[::-1]), around
                axes.fill(*outline, color=colour, alpha=0.15, linewidth=0, gid="band")
            dashes = STROKES[k // len(SERIES) % len(STROKES)][s.dashed]
            lines += _line(axes, s.steps, s.values, colour, linestyle=dashes)
        names = [
            f"{elided(s.name, LONGEST_NAME)}, {s.ends} {number(float(s.values[-1]))}" for s in shown
        ]
        figure.legend(lines, names, loc="outside lower left", labelspacing=0.3)

    label = _words(title, shown, limits, marks)
    return Chart(title, _svg(HEIGHT + LEGEND * len(shown), label, draw), note)


def curves(stage: str, rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One curve for every numeric metric with two or more points that differ.

    Raises:
        ValueError: if a row has no numeric `step`.
    """
    return [
        _curve(stage, name, points)
        for name, points in metric_series(rows).items()
        if len(points) > 1 and np.ptp(points[:, 0]) > 0 and np.ptp(points[:, 1]) > 0
    ]


def _curve(stage: str, name: str, points: Array) -> Chart:
    each, steps, values = thinned(points)
    window = smoothing_window(len(values))
    low, high = frame(values)

    def draw(figure: Figure) -> None:
        axes = _axes(figure, axis_title(name), (low, high))
        if window > 1:
            _line(axes, steps, values, FAINT, linewidth=1)
        _line(axes, steps, running_median(values), SERIES[0])

    notes = []
    if each > 1:
        notes.append(f"A point is the mean of {each} lines of the log.")
    if window > 1:
        notes.append(f"Bold: running median of {window} points.")
    if outside := int(((values > high) | (values < low)).sum()):
        lie = "point lies" if outside == 1 else "points lie"
        notes.append(f"{outside} {lie} outside the frame.")
    ends = [number(float(np.median(part))) for part in (values[:window], values[-window:])]
    label = f"{stage}: {name} over training, from {ends[0]} to {ends[1]}"
    return Chart(name, _svg(HEIGHT, label, draw), " ".join(notes))


def forests(evaluation: Mapping[str, Any]) -> list[Chart]:
    """By reward of an `evaluation.json`, in their first order, the systems' means and intervals."""
    systems = evaluation["systems"]
    rewards = dict.fromkeys(r for s in systems.values() for r in s["scores"])
    return [_forest(reward, systems) for reward in rewards]


def _in_lines(name: str) -> str:
    """A system's name beside a forest: "SYSTEM, RUN" on two lines, each short enough to leave most
    of the width to the intervals."""
    return "\n".join(elided(line, LONGEST_LABEL) for line in name.split(", ", 1))


def _forest(reward: str, systems: Mapping[str, Any]) -> Chart:
    from matplotlib.ticker import MaxNLocator

    found = {n: s["scores"][reward] for n, s in systems.items() if reward in s["scores"]}

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for k, score in enumerate(found.values()):
            axes.plot(score["ci95"], [k, k], color=SERIES[0], linewidth=2.4, gid="bar")
            # no marker, which SVG shares under an id, but the round ends of a line of no length
            dot = [score["mean"]] * 2, [k, k]
            axes.plot(*dot, color=SERIES[0], linewidth=9, solid_capstyle="round", gid="dot")
        axes.set(ylim=(len(found) - 0.5, -0.5), yticks=range(len(found)))
        axes.set_yticklabels([_in_lines(name) for name in found], color=INK)
        axes.margins(x=0.06)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("mean and its 95% interval (no unit)")
        _plain(axes, "x")

    said = ", ".join(f"{name} {number(score['mean'])}" for name, score in found.items())
    label = f"Mean {reward} with 95% intervals: {said}"
    return Chart(reward, _svg(ROW * len(found) + FOOT, label, draw))


def side_by_side(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """One chart for every metric that two or more runs have, a line a run; long series smoothed."""
    series = {run: metric_series(rows) for run, rows in runs.items()}
    charts = []
    for name in dict.fromkeys(name for found in series.values() for name in found):
        lines = [
            _smoothed(run, found[name])
            for run, found in series.items()
            if name in found and len(found[name]) > 1
        ]
        if len(lines) > 1 and any(np.ptp(line.values) > 0 for line in lines):
            note = SMOOTHED if any(line.ends == MEDIAN for line in lines) else ""
            charts.append(chart(name, axis_title(name), lines, note=note))
    return charts


def _smoothed(run: str, points: Array) -> Series:
    _, steps, values = thinned(points)  # first: a median over 10,000 points takes seconds
    ends = MEDIAN if smoothing_window(len(values)) > 1 else "last"
    return Series(run, steps, running_median(values), ends=ends)


def _svg(height: float, label: str, draw: Callable[[Figure], None]) -> Markup:
    """What `draw` draws, whatever a user's own matplotlibrc says, for the inside of a page.
    `label` is read to those who cannot see it."""
    import matplotlib.style  # loads in half a second, which no other command should take
    from matplotlib.figure import Figure

    drawn = io.StringIO()
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        # measured in another font than the reader's, which may lack letters of a name
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
        draw(figure)
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    opening = '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">'
    return Markup(opening).format(WIDTH, height, label) + _inline(drawn.getvalue())


def _inline(drawn: str) -> Markup:
    """What belongs into a page of a whole SVG file, in the page's font and colours.

    Names of namespaces, the licence and a style for all elements are left out, and so are clips
    (every value was cut to its frame before). An id would stand once in every figure: the names of
    parts become classes.
    """
    svg = drawn[drawn.index("<g ") : drawn.rindex("</g>") + len("</g>")] + "</svg>"
    svg = re.sub(_DROPPED, "", svg)
    svg = re.sub(r'<g id="([a-zA-Z]*)[^"]*"', r'<g class="\1"', svg)
    svg = re.sub(r' d="[^"<]*"', _shortened, svg)
    for colour, name in PALETTE.items():
        svg = re.sub(f"(fill|stroke): {colour}", rf"\1: var(--{name})", svg)
    return Markup(svg)


def _shortened(path: re.Match[str]) -> str:
    """An outline to a tenth of a unit, and without the L that SVG assumes between points."""
    return re.sub(r"(\.\d)\d+", r"\1", path[0]).replace(" \nL ", " ")


def _axes(figure: Figure, title: str, values: tuple[float, float]) -> Axes:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes = figure.add_subplot()
    axes.set(xlabel="training step", ylim=values)
    axes.set_ylabel(title, labelpad=8)  # readers' fonts may be wider than the one measured here
    axes.margins(x=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    _plain(axes, "y")
    return axes


def _plain(axes: Axes, rules: Literal["x", "y"]) -> None:
    """Rules across one axis in place of a box and marks."""
    axes.grid(axis=rules, linewidth=1)
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False, left=False)


def _line(axes: Axes, at: Array, values: Array, colour: str, **style: Any) -> list[Any]:
    """A line, cut to the frame where a spike leaves it."""
    given = {"color": colour, "linewidth": 1.8, "solid_joinstyle": "round", **style}
    return axes.plot(at, np.clip(values, *axes.get_ylim()), gid="series", **given)


def _write(axes: Axes, text: str, at: tuple[float, float], above: float, **style: Any) -> None:
    """Text at (share of the width, value), `above` it by so many units."""
    axes.annotate(
        text, at, (0, above), ("axes fraction", "data"), "offset points", gid="overdata", **style
    )


def _words(
    title: str,
    series: Sequence[Series],
    limits: Sequence[tuple[float, str]],
    marks: Sequence[tuple[float, str]],
) -> str:
    """The chart for those who cannot see it."""
    runs = "; ".join(
        f"{s.name} from {number(float(s.values[0]))} to {number(float(s.values[-1]))}"
        for s in series
    )
    text = f"{title} over training: {runs}"
    if limits:
        text += "; limits " + " and ".join(number(value) for value, _ in limits)
    for step, what in marks:
        text += f"; {what} at step {step:,.0f}"
    return text
