"""Where the queries attend and how different they are: a section of the comparison page, and a page of its own.

`evaluate/query_analysis.py` computes and defines the scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from xformer_mllm.report.charts import Cell, Dot, plot_row
from xformer_mllm.report.contents import QueryAnalysis
from xformer_mllm.report.pages import render_page
from xformer_mllm.report.wording import display_name, signed


def query_page(analysis: QueryAnalysis, provenance: Mapping[str, str]) -> str:
    """The section as a page, one self-contained HTML string. provenance: printed as is."""
    title = f"The queries of {' and '.join(map(display_name, analysis.models))}"
    return render_page(
        "queries.html", title=title, introduction="", queries=query_values(analysis), provenance=provenance
    )


def query_values(analysis: QueryAnalysis) -> dict[str, Any]:
    """The values of `templates/query_section.html`."""
    models, compared = analysis.models, list(analysis.differences)
    names = [display_name(name) for name in models]
    colours = {name: f"v{index % 8}" for index, name in enumerate(models)}
    stages = [str(model["stage"]) for model in models.values()]
    rows: list[list[Any]] = [
        ["trained through", *stages, *("" for _ in compared)],
        ["queries", *(str(model["queries"]) for model in models.values()), *("" for _ in compared)],
    ]
    plot = []
    for metric in analysis.definitions:
        scores = {name: model["scores"].get(metric) for name, model in models.items()}
        dots = [
            score and Dot(display_name(name), colours[name], score["mean"], signed(score["mean"]), score["ci95"])
            for name, score in scores.items()
        ]
        plot.append(plot_row(metric, dots))
        cells = [score and _cell(score["mean"], score["ci95"], ".3f") for score in scores.values()]
        entries = [analysis.differences[name].get(metric) for name in compared]
        cells += [
            entry and _cell(entry["difference"], entry["ci95"], "+.3f", "total" if entry["clear"] else "")
            for entry in entries
        ]
        rows.append([metric, *(cell or "–" for cell in cells)])
    return {
        "stage": stages[0] if len(set(stages)) == 1 else "",
        "sentences": verdict(analysis),
        "image_count": f"{analysis.image_count:,}",
        "legend": list(zip(colours.values(), names, strict=True)),
        "plot": plot,
        "head": ["", *names, *(f"{display_name(name)} − {names[0]}" for name in compared)],
        "rows": rows,
        "definitions": analysis.definitions,
        "overlays": analysis.overlays,
    }


def verdict(analysis: QueryAnalysis) -> list[str]:
    """Sentences on each metric: each model against the first, with the stage of the models."""
    first, *others = analysis.models
    sentences = []
    for metric in analysis.definitions:
        having = [name for name, model in analysis.models.items() if metric in model["scores"]]
        shared = [name for name in others if metric in analysis.differences[name]]
        for names in [[other, first] for other in shared] or [having]:
            means = [analysis.models[name]["scores"][metric]["mean"] for name in names]
            scores = [f"{display_name(name)} {signed(mean, '.2f')}" for name, mean in zip(names, means, strict=True)]
            stages = dict.fromkeys(analysis.models[name]["stage"] for name in names)
            sentence = f"{metric[:1].upper()}{metric[1:]} after {' and '.join(stages)}: {', '.join(scores)}"
            entry = analysis.differences[names[0]][metric] if shared else None
            sentences.append(sentence + _difference(entry) + ".")
    return sentences


def _difference(entry: Mapping[str, Any] | None) -> str:
    if entry is None or entry["ci95"] is None:
        return ""
    text = f"{signed(entry['difference'], '+.3f')}, 95\u00a0% interval {_interval(entry['ci95'], '+.3f')}"
    return f" (difference {text})" if entry["clear"] else f": no clear difference ({text})"


def _interval(interval: Sequence[float], form: str) -> str:
    return f"{signed(interval[0], form)} to {signed(interval[1], form)}"


def _cell(value: float, interval: Sequence[float] | None, form: str, kind: str = "") -> Cell:
    return Cell(signed(value, form), "" if interval is None else _interval(interval, form), kind)
