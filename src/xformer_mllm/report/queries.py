"""Where queries look, and how different they are: a section of a report, and a page of its own.

Plain data in, HTML out; what the scores mean is in `evaluate/query_analysis.py`, and in the data's `definitions`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from PIL import Image

from xformer_mllm.report import markup
from xformer_mllm.report.document import document
from xformer_mllm.report.page import provenance_section
from xformer_mllm.report.wording import display_name


@dataclass(frozen=True)
class QueryAnalysis:
    """The queries of one or more models over the same images.

    models: {name: {"folder": where it is, "queries": how many it has, "scores": {metric: {"mean", "ci95": [low, high] or
        None}}}}; the others are compared with the first.
    differences: {name: {metric: {"difference", "ci95", "clear"}}}, each model minus the first.
    definitions: {metric: what it is}, in the order in which they are shown.
    image_count: how many the scores are over.
    overlays: (name of the image, image with heat maps).
    """

    models: Mapping[str, Mapping[str, Any]]
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]]
    definitions: Mapping[str, str]
    image_count: int
    overlays: Sequence[tuple[str, Image.Image]] = field(default_factory=tuple)


def query_page(analysis: QueryAnalysis, provenance: Mapping[str, str]) -> str:
    """A page of the section alone, as one HTML string that needs nothing from outside. provenance: printed as it is."""
    names = " and ".join(map(display_name, analysis.models))
    return document(f"The queries of {names}", "", [query_section(analysis), provenance_section(provenance)])


def query_section(analysis: QueryAnalysis) -> str:
    """Sentences, a plot with intervals, a table, and the images with their heat maps."""
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(analysis))
    definitions = "".join(
        f"<div><dt>{escape(metric)}</dt><dd>{escape(meaning)}</dd></div>"
        for metric, meaning in analysis.definitions.items()
    )
    overlays = "".join(_overlay(name, sheet) for name, sheet in analysis.overlays)
    note = (
        f"Means over {analysis.image_count:,} images with 95\u00a0% intervals over images (bootstrap). They hold for "
        "these trained models: other seeds move the scores too, and that is not in them."
    )
    return markup.section(
        "Where the queries look",
        f'<ul class="verdict">{sentences}</ul>',
        markup.paragraph(note, "small"),
        _legend(analysis),
        _plot(analysis),
        _table(analysis),
        f'<dl class="facts">{definitions}</dl>',
        overlays,
    )


def _overlay(name: str, sheet: Image.Image) -> str:
    shown = markup.image(sheet, f"Attention of the queries over {name}")
    return f'<h3>{escape(name)}</h3><div class="sheet" style="max-width:none">{shown}</div>'


def verdict(analysis: QueryAnalysis) -> list[str]:
    """What the numbers say: each model against the first, metric by metric, or the one model's scores."""
    first, *others = analysis.models
    sentences = []
    for metric in analysis.definitions:
        for other in others:
            if (entry := analysis.differences[other].get(metric)) is not None:
                sentences.append(_comparison(analysis, metric, first, other, entry))
        shared = any(metric in analysis.differences[other] for other in others)
        if not shared:
            having = [name for name, model in analysis.models.items() if metric in model["scores"]]
            shown = ", ".join(f"{display_name(name)} {_score(analysis, name, metric)}" for name in having)
            sentences.append(f"{_capital(metric)}: {shown}.")
    return sentences


def _comparison(analysis: QueryAnalysis, metric: str, first: str, other: str, entry: Mapping[str, Any]) -> str:
    scores = (
        f"{_capital(metric)}: {display_name(other)} {_score(analysis, other, metric)}, "
        f"{display_name(first)} {_score(analysis, first, metric)}"
    )
    if entry["ci95"] is None:
        return f"{scores}."
    interval = f"{_signed(entry['difference'])}, 95\u00a0% interval {_interval(entry['ci95'], '+.3f')}"
    return f"{scores} (difference {interval})." if entry["clear"] else f"{scores}: no clear difference ({interval})."


def _score(analysis: QueryAnalysis, name: str, metric: str) -> str:
    return _number(analysis.models[name]["scores"][metric]["mean"], ".2f")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(value: float, form: str = ".3f") -> str:
    """With a real minus sign."""
    return f"{value:{form}}".replace("-", "−")


def _signed(value: float) -> str:
    return _number(value, "+.3f")


def _interval(interval: Sequence[float], form: str = ".3f") -> str:
    return f"{_number(interval[0], form)} to {_number(interval[1], form)}"


def _colour(analysis: QueryAnalysis, name: str) -> str:
    return f"v{list(analysis.models).index(name) % 8}"


def _legend(analysis: QueryAnalysis) -> str:
    items = "".join(
        f'<span><i class="key {_colour(analysis, name)}"></i>{escape(display_name(name))}</span>'
        for name in analysis.models
    )
    return f'<p class="legend">{items}</p>'


def _plot(analysis: QueryAnalysis) -> str:
    """One row per metric, one dot with its interval per model, from 0 to 1."""
    axis = "".join(f'<span style="left:{100 * mark:g}%">{mark:g}</span>' for mark in (0, 0.25, 0.5, 0.75, 1))
    return (
        f'<div class="plot">{"".join(_plot_row(analysis, metric) for metric in analysis.definitions)}'
        f'<div class="row axis" aria-hidden="true"><span class="label"></span><div class="ticks">{axis}</div></div></div>'
    )


def _plot_row(analysis: QueryAnalysis, metric: str) -> str:
    marks, spoken = [], []
    for place, (name, model) in enumerate(analysis.models.items()):
        if (score := model["scores"].get(metric)) is None:
            continue
        top = f"top:{100 * (place + 1) / (len(analysis.models) + 1):.0f}%"
        colour = _colour(analysis, name)
        if score["ci95"] is not None:
            low, high = (_on_axis(end) for end in score["ci95"])
            marks.append(
                f'<i class="interval {colour}" style="{top};left:{low:.2f}%;width:{max(high - low, 0):.2f}%"></i>'
            )
        marks.append(f'<i class="dot {colour}" style="{top};left:{_on_axis(score["mean"]):.2f}%"></i>')
        spoken.append(f"{display_name(name)} {_score(analysis, name, metric)}")
    label = escape(f"{metric}: {', '.join(spoken)}", quote=True)
    return (
        f'<div class="row"><span class="label">{escape(metric)}</span><div class="track" role="img" aria-label="{label}" '
        f'style="height:{0.55 * (len(analysis.models) + 1):.2f}rem">{"".join(marks)}</div></div>'
    )


def _on_axis(value: float) -> float:
    """Per cent of the axis; a cosine below 0 stands at its end."""
    return 100 * min(max(value, 0.0), 1.0)


def _table(analysis: QueryAnalysis) -> str:
    compared = list(analysis.differences)
    first = next(iter(analysis.models))
    head = ["", *map(display_name, analysis.models)]
    head += [f"{display_name(name)} − {display_name(first)}" for name in compared]
    rows = [
        [
            escape(metric),
            *(_score_cell(model["scores"].get(metric)) for model in analysis.models.values()),
            *(_difference_cell(analysis.differences[name].get(metric)) for name in compared),
        ]
        for metric in analysis.definitions
    ]
    rows.insert(
        0, ["queries", *(str(model["queries"]) for model in analysis.models.values()), *("" for _ in compared)]
    )
    return markup.table([escape(cell) for cell in head], rows, "")


def _score_cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    interval = "" if score["ci95"] is None else f' <span class="ci">{_interval(score["ci95"])}</span>'
    return f"{_number(score['mean'])}{interval}"


def _difference_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    interval = "" if entry["ci95"] is None else f' <span class="ci">{_interval(entry["ci95"], "+.3f")}</span>'
    shown = f"<b>{_signed(entry['difference'])}</b>" if entry["clear"] else _signed(entry["difference"])
    return f"{shown}{interval}"
