"""The section with the training curves, as inline SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from xformer_mllm.report import markup
from xformer_mllm.report.contents import Report, Run
from xformer_mllm.report.wording import display_name, percent

# ITM sees one matching pair for every two that do not match (own text, a wrong image, a wrong text: LAVIS' 3B).
# Without a look at the input the best guess is p(match) = 1/3, and "no match" is right two times in three.
ITM_POSITIVES = 1 / 3
ITM_CHANCE_LOSS = -(ITM_POSITIVES * math.log(ITM_POSITIVES) + (1 - ITM_POSITIVES) * math.log(1 - ITM_POSITIVES))
ITM_CHANCE_ACCURACY = 1 - ITM_POSITIVES

CURVES = {
    "loss": "Sum of the losses",
    "itc_loss": "ITC: contrast",
    "itm_loss": "ITM: matching",
    "itg_loss": "ITG: caption",
    "lm_loss": "Language modelling",
    "reconstruction_loss": "Reconstruction of masked pixels",
    "itc_accuracy": "ITC accuracy in the batch",
    "itm_accuracy": "ITM accuracy",
}


def training_section(report: Report) -> str:
    """A chart for each loss and accuracy of each stage; empty without logs."""
    parts = []
    for stage in dict.fromkeys(run.stage for run in report.runs):
        runs = [run for run in report.runs if run.stage == stage and run.log]
        charts = [chart for name in _curves_of(runs) if (chart := _curve(report, runs, name))]
        if charts:
            variants = list(dict.fromkeys(run.variant for run in runs))
            parts += [
                f"<h3>{escape(stage)}</h3>",
                markup.legend(report, variants),
                f'<div class="charts">{"".join(charts)}</div>',
            ]
    if not parts:
        return ""
    note = (
        "Thin: as logged; thick: running mean. Dashed: what guessing gets. ITM sees one matching pair for every two "
        f"that do not match, so its chance level is {ITM_CHANCE_LOSS:.3f} for the loss and "
        f"{percent(ITM_CHANCE_ACCURACY)} for the accuracy."
    )
    return markup.section("Training", markup.paragraph(note, "small"), *parts)


def _curves_of(runs: Sequence[Run]) -> list[str]:
    """The curves of a stage that are worth a chart: where there is one loss alone, its sum is the same curve again."""
    logged = {name for run in runs for row in run.log for name in row}
    components = [name for name in CURVES if name.endswith("_loss") and name in logged]
    return [name for name in CURVES if name in logged and not (name == "loss" and len(components) == 1)]


def _curve(report: Report, runs: Sequence[Run], name: str) -> str:
    series = {}
    for run in runs:
        line = [(row["step"], row[name]) for row in run.log if isinstance(row.get(name), int | float)]
        line = [(step, value) for step, value in line if math.isfinite(value)]
        if line:
            series[run.variant] = line
    if not series:
        return ""
    colours = {variant: f"v{report.variants.index(variant) % 8}" for variant in series}
    return line_chart(CURVES[name], series, colours, chance=_chance(name, runs))


def _chance(name: str, runs: Sequence[Run]) -> float | None:
    sizes = {run.batch_size for run in runs}
    batch_size = sizes.pop() if len(sizes) == 1 else None
    chances: dict[str, float] = {"itm_loss": ITM_CHANCE_LOSS, "itm_accuracy": ITM_CHANCE_ACCURACY}
    if batch_size:
        chances |= {"itc_loss": math.log(batch_size), "itc_accuracy": 1 / batch_size}
    return chances.get(name)


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    colours: Mapping[str, str],
    chance: float | None = None,
) -> str:
    """Inline SVG: steps to the right, values upwards. series: {variant: [(step, value), ...]}, none of them empty."""
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

    marks = []
    for tick in ticks_y:
        marks.append(f'<path class="grid" d="M{left} {y(tick):.1f}H{width - right}"/>')
        marks.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks_x:
        if low_x <= tick <= high_x:
            anchor = "end" if x(tick) > width - 24 else "middle"
            marks.append(f'<text x="{x(tick):.1f}" y="{height - 7}" text-anchor="{anchor}">{tick:g}</text>')
    if chance is not None:
        marks.append(f'<path class="chance" d="M{left} {y(chance):.1f}H{width - right}"/>')
        place = f'x="{width - right}" y="{y(chance) - 4:.1f}" text-anchor="end"'
        marks.append(f'<text class="chance" {place}>chance {chance:.3f}</text>')
    for variant, line in series.items():
        mean = running_mean(line)
        marks.append(f'<path class="line raw {colours[variant]}" d="{path(line)}"/>' if mean != line else "")
        marks.append(f'<path class="line {colours[variant]}" d="{path(mean)}"/>')
    last = {variant: running_mean(line)[-1][1] for variant, line in series.items()}
    spoken = ", ".join(f"{display_name(variant)} ends at {value:.3f}" for variant, value in last.items())
    shown = "".join(
        f'<span><i class="key {colours[variant]}"></i>{value:.3f}</span>' for variant, value in last.items()
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(f"{title}: {spoken}", quote=True)}">'
        f'{"".join(marks)}</svg><p class="legend small">at the end: {shown}</p></figure>'
    )


def running_mean(line: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Mean over a twelfth of the points around each point (fewer at the ends); short lines stay as they are."""
    half = len(line) // 24
    if half < 1:
        return line
    values = [value for _, value in line]
    around = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    return [(step, sum(near) / len(near)) for (step, _), near in zip(line, around, strict=True)]


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover [low, high]."""
    span = high - low or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= wanted)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 10) for place in range(first, max(last, first + 1) + 1)]
