"""The pictures of a study's report, each as a PNG and as an SVG that takes the colors of its page."""

import io
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from utils.study_results import TERMS, Results, Row

INK = "#010203"  # of text and axes; a page's own color in an SVG
COLORS = ("#3b7dd8", "#e07b39", "#3a9d5d", "#c2456b", "#8a63d2", "#b08a00", "#1a9aa8", "#8a8a8a")
SIGNALS = {  # title -> tags of the log
    "pseudo-labels: share of pixels that are right": ("pseudo_label/accuracy/0", "pseudo_label/accuracy/1"),
    "pseudo-labels: mIoU of a batch": ("pseudo_label/mean_iou/0", "pseudo_label/mean_iou/1"),
    "pseudo-labels: share of sure pixels": ("pseudo_label/kept/0", "pseudo_label/kept/1"),
    "pseudo-labels: right among sure pixels": ("pseudo_label/accuracy_of_kept/0", "pseudo_label/accuracy_of_kept/1"),
    "agreement of the two students": ("agreement/students",),
    "agreement of the two teachers": ("agreement/teachers",),
    "agreement of a student with its target": (
        "agreement/student_and_its_target/0",
        "agreement/student_and_its_target/1",
    ),
    "fill of the memory banks": ("bank_fill/0", "bank_fill/1"),
}
LINES = ("-", "--", ":", "-.")
WIDTH = 6.4  # inches
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)


@dataclass(frozen=True)
class Picture:
    """title: what is to be seen. png: on white. svg: an element for a page, without any reference out of it."""

    title: str
    png: bytes
    svg: str


def draw_pictures(results: Results) -> dict[str, Picture]:
    """File stem -> picture, of those for which the runs have numbers."""
    import matplotlib  # slow to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = {}
    for name, (draw, title) in _PICTURES.items():
        with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
            figure = Figure()
            FigureCanvasAgg(figure)
            if draw(figure, results):
                pictures[name] = Picture(title, _png(figure), _svg(figure, name, title))
    return pictures


def _bars(figure: Any, results: Results) -> bool:
    """Mean and spread of each row, and a dot for each seed."""
    rows = [row for row in results.rows if row.done]
    if not rows:
        return False
    figure.set_size_inches(WIDTH, 0.9 + 0.42 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        values, color = row.ensemble, _color(results, row)
        mean = statistics.mean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        axes.barh(place, mean, height=0.62, color=color, alpha=0.45)
        if spread:
            axes.errorbar(mean, place, xerr=spread, color=INK, capsize=3, linewidth=1)
        axes.plot(
            values, [place] * len(values), "o", color=color, markersize=4, markeredgecolor=INK, markeredgewidth=0.5
        )
        text = f"{mean:.1f}" + (f" ± {spread:.1f}" if len(values) > 1 else "")
        end = max(mean + spread, *values)
        axes.annotate(text, (end, place), (7, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [_broken(row.label, 34) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * axes.get_xlim()[1])
    axes.set_xlabel("mIoU of the ensemble in %")
    axes.tick_params(axis="y", length=0)
    _grid(axes, "x")
    return True


def _curves(figure: Any, results: Results) -> bool:
    """The ensemble's validation mIoU over the steps: mean and spread over the seeds."""
    curves = {row: row.curve("val/ensemble") for row in results.rows}
    if not any(curves.values()):
        return False
    figure.set_size_inches(WIDTH, 3.4 + 0.2 * -(-len(curves) // 2))
    axes = figure.subplots()
    for row, curve in curves.items():
        if curve:
            _band(axes, {step: [100 * value for value in values] for step, values in curve.items()}, results, row)
    axes.set_xlabel("step")
    axes.set_ylabel("validation mIoU of the ensemble in %")
    _grid(axes, "both")
    _legend(figure, axes)
    return True


def _terms(figure: Any, results: Results) -> bool:
    """Each loss term over the steps, the mean of both students."""
    return _panels(figure, results, {term: (f"{term}/0", f"{term}/1") for term in TERMS})


def _signals(figure: Any, results: Results) -> bool:
    """What the unlabeled terms are fed with, and whether the coupling is low: shares of pixels, means over students."""
    return _panels(figure, results, SIGNALS, top=1.0)


def _panels(figure: Any, results: Results, panels: Mapping[str, Sequence[str]], *, top: float = math.inf) -> bool:
    """A curve of each row below each title, the mean of what was logged under its keys, smoothed; none passes top."""
    curves = {title: {row: row.curve(*keys) for row in results.rows} for title, keys in panels.items()}
    curves = {title: {row: one for row, one in found.items() if one} for title, found in curves.items()}
    curves = {title: found for title, found in curves.items() if found}
    if not curves:
        return False
    down = -(-len(curves) // 2)
    figure.set_size_inches(WIDTH, 2.1 * down + 0.4 + 0.2 * -(-len(results.rows) // 2))
    places = list(figure.subplots(down, min(2, len(curves)), squeeze=False).flat)
    for axes, (title, found) in zip(places, curves.items(), strict=False):
        for row, curve in found.items():
            _band(axes, _smooth(curve), results, row, top=top)
        axes.set_title(title)
        axes.set_xlabel("step")
        _grid(axes, "both")
    for axes in places[len(curves) :]:
        axes.set_axis_off()
    _legend(figure, *figure.axes)
    return True


_PICTURES: Mapping[str, tuple[Any, str]] = {
    "bars": (_bars, "mIoU of the ensemble at the last step: mean, standard deviation, and a dot for each seed"),
    "curves": (_curves, "Validation mIoU of the ensemble over the steps: mean and standard deviation over seeds"),
    "terms": (_terms, "Loss terms over the steps, before weighting: mean of both students, smoothed, with the spread"),
    "signals": (_signals, "What the unlabeled terms learn from, over the steps: means of both students, smoothed"),
}


def _band(
    axes: Any, curve: Mapping[int, Sequence[float]], results: Results, row: Row, *, top: float = math.inf
) -> None:
    """Mean of the values at each step, within a standard deviation, where values can be: from 0 to ``top``."""
    steps = list(curve)
    means = [statistics.mean(values) for values in curve.values()]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in curve.values()]
    color, line = _color(results, row), LINES[results.rows.index(row) // len(COLORS) % len(LINES)]
    marker = "o" if len(steps) < 3 else ""
    axes.plot(steps, means, color=color, linestyle=line, linewidth=1.5, marker=marker, markersize=3, label=row.label)
    low = [max(0.0, mean - spread) for mean, spread in zip(means, spreads, strict=True)]
    high = [min(top, mean + spread) for mean, spread in zip(means, spreads, strict=True)]
    if any(spreads):
        axes.fill_between(steps, low, high, color=color, alpha=0.2 if len(results.rows) <= 4 else 0.1, linewidth=0)


def _smooth(curve: Mapping[int, Sequence[float]]) -> dict[int, list[float]]:
    """Each value with its neighbours, a twentieth of the curve together; where the number of runs changes, as it is."""
    steps, values = list(curve), list(curve.values())
    reach = len(steps) // 40
    smooth = {}
    for place, step in enumerate(steps):
        near = values[max(0, place - reach) : place + reach + 1]
        same = all(len(one) == len(values[place]) for one in near)
        smooth[step] = [statistics.mean(one) for one in zip(*near, strict=True)] if same else list(values[place])
    return smooth


def _color(results: Results, row: Row) -> str:
    return COLORS[results.rows.index(row) % len(COLORS)]


def _grid(axes: Any, which: str) -> None:
    axes.grid(axis=which, color=INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(figure: Any, *axes: Any) -> None:
    """One for all, below, each label once."""
    shown = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    longest = max(map(len, shown), default=0)
    labels = [_broken(label, 80) for label in shown]
    figure.legend(shown.values(), labels, loc="outside lower center", ncols=1 if longest > 38 else 2)


def _broken(label: str, width: int) -> str:
    """Into lines, between words only."""
    return textwrap.fill(label, width, break_on_hyphens=False, break_long_words=False)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def _svg(figure: Any, name: str, title: str) -> str:
    """An element for a page: no declarations, ids of its own, text and axes in the page's color."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = (
        re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL).replace(INK, "currentColor").replace("xlink:href", "href")
    )
    for mark in ('id="', "url(#", 'href="#'):
        text = text.replace(mark, f"{mark}{name}-")
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    start = f'<svg class="picture" role="img" aria-label="{escape(title)}" {box[0]}>'
    return re.sub(r"<svg[^>]*>", lambda _: start, text, count=1)
