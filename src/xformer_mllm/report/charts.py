"""Values of the plots in `templates/macros.html`: dots with intervals, and line charts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from xformer_mllm.report.contents import Run
from xformer_mllm.report.wording import display_name

# ITM sees one matching pair for every two that do not match (own text, a wrong image, a wrong text; as in LAVIS).
# Without the input the best guess is p(match) = 1/3, and "no match" is right two times in three.
ITM_POSITIVES = 1 / 3
ITM_CHANCE_LOSS = -(ITM_POSITIVES * math.log(ITM_POSITIVES) + (1 - ITM_POSITIVES) * math.log(1 - ITM_POSITIVES))
ITM_CHANCE_ACCURACY = 1 - ITM_POSITIVES

CURVES = {
    "loss": "Total loss",
    "itc_loss": "ITC loss: contrastive",
    "itm_loss": "ITM loss: matching",
    "itg_loss": "ITG loss: captioning",
    "lm_loss": "Language modelling loss",
    "reconstruction_loss": "Reconstruction loss on masked patches",
    "itc_accuracy": "ITC accuracy in the batch",
    "itm_accuracy": "ITM accuracy",
}


class Dot(NamedTuple):
    """A score on the axis from 0 to 1, drawn as a dot with its interval, or as a bar if `kind` starts with "blind"."""

    name: str
    kind: str
    value: float
    text: str
    interval: Sequence[float] | None = None


class Cell(NamedTuple):
    """A table cell with an optional interval; kind: its CSS class."""

    text: str
    interval: str = ""
    kind: str = ""


def plot_row(label: str, dots: Sequence[Dot | None], bars: Sequence[Dot] = ()) -> dict[str, Any]:
    """A row of the plot: one line per dot (empty for None), bars over the whole height."""
    marks = []
    for line, dot in enumerate(dots, 1):
        if dot is not None:
            top = f"top:{100 * line / (len(dots) + 1):.0f}%"
            if dot.interval is not None:
                low, high = map(_on_axis, dot.interval)
                marks.append((f"interval {dot.kind}", f"{top};left:{low:.2f}%;width:{high - low:.2f}%"))
            marks.append((f"dot {dot.kind}", f"{top};left:{_on_axis(dot.value):.2f}%"))
    marks += [(f"blind {bar.kind}", f"left:{_on_axis(bar.value):.2f}%") for bar in bars]
    texts = [f"{dot.name} {dot.text}" for dot in (*dots, *bars) if dot is not None]
    height = f"{0.55 * (max(len(dots), 1) + 1):.2f}"
    return {"label": label, "spoken": f"{label}: {', '.join(texts)}", "marks": marks, "height": height}


def _on_axis(value: float) -> float:
    """Percent of the axis; a cosine below 0 is drawn at 0."""
    return 100 * min(max(value, 0.0), 1.0)


def training_charts(runs: Sequence[Run], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """The charts of one stage. A total that equals its only component is left out."""
    logged = {name for run in runs for row in run.log for name in row}
    components = [name for name in CURVES if name.endswith("_loss") and name in logged]
    charts = []
    for name in CURVES:
        series = {run.variant: line for run in runs if (line := _finite(run.log, name))}
        if series and not (name == "loss" and len(components) == 1):
            charts.append(line_chart(CURVES[name], series, colours, _chance(name, runs)))
    return charts


def _finite(log: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the logged finite numbers."""
    return [
        (row["step"], row[name]) for row in log if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    ]


def _chance(name: str, runs: Sequence[Run]) -> float | None:
    """Chance level of a curve, if there is one; ITC's depends on the batch size."""
    chances = {"itm_loss": ITM_CHANCE_LOSS, "itm_accuracy": ITM_CHANCE_ACCURACY}
    first, *others = {run.batch_size for run in runs}
    if first and not others:
        chances |= {"itc_loss": math.log(first), "itc_accuracy": 1 / first}
    return chances.get(name)


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    colours: Mapping[str, str],
    chance: float | None = None,
) -> dict[str, Any]:
    """Values of an SVG line chart. series: {variant: [(step, value), ...]}, none empty."""
    left, right, top, bottom, width, height = 44, 8, 10, 24, 340, 190
    steps = [step for line in series.values() for step, _ in line]
    values = [value for line in series.values() for _, value in line] + ([chance] if chance is not None else [])
    ticks_x, ticks_y = nice_ticks(min(steps), max(steps), wanted=6), nice_ticks(min(values), max(values))
    low_x, high_x = min(steps), max(max(steps), min(steps) + 1)
    low_y, high_y = min(ticks_y[0], min(values)), max(ticks_y[-1], max(values))

    def x(step: float) -> float:
        return left + (step - low_x) / (high_x - low_x) * (width - left - right)

    def y(value: float) -> float:
        return top + (high_y - value) / (high_y - low_y) * (height - top - bottom)

    def path(line: Sequence[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in line)

    lines, last = [], {}
    for variant, line in series.items():
        mean = running_mean(line)
        if mean != line:
            lines.append((f"raw {colours[variant]}", path(line)))
        lines.append((colours[variant], path(mean)))
        last[variant] = f"{mean[-1][1]:.3f}"
    spoken = ", ".join(f"{display_name(variant)} ends at {value}" for variant, value in last.items())
    return {
        "title": title,
        "spoken": f"{title}: {spoken}",
        "size": (width, height),
        "ends": (left, width - right),
        "ticks_x": [(round(x(tick), 1), f"{tick:g}") for tick in ticks_x if low_x <= tick <= high_x],
        "ticks_y": [(round(y(tick), 1), f"{tick:g}") for tick in ticks_y],
        "chance": None if chance is None else (round(y(chance), 1), f"chance {chance:.3f}"),
        "lines": lines,
        "last": [(colours[variant], value) for variant, value in last.items()],
    }


def running_mean(line: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Mean over a window of a twelfth of the points, cut at the ends; short lines are returned unchanged."""
    half = len(line) // 24
    if half < 1:
        return line
    values = [value for _, value in line]
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [(step, sum(window) / len(window)) for (step, _), window in zip(line, windows, strict=True)]


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]
