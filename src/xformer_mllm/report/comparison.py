"""The page that compares variants: scores, examples, training curves, generated texts, reconstructions, queries."""

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xformer_mllm.files import write_whole
from xformer_mllm.report.charts import (
    ITM_CHANCE_ACCURACY,
    ITM_CHANCE_LOSS,
    Cell,
    Dot,
    plot_row,
    training_charts,
)
from xformer_mllm.report.contents import BLIND, Report, Run, Setting, blind_keys
from xformer_mllm.report.findings import verdict
from xformer_mllm.report.pages import render_page
from xformer_mllm.report.queries import query_values
from xformer_mllm.report.wording import (
    definitions,
    display_name,
    percent,
    percent_interval,
    plain,
    points,
    points_interval,
    share,
)


def write_report(path: Path, report: Report) -> Path:
    """Write the page to `path` atomically and return `path`."""
    write_whole(path, render(report))
    return path


def render(report: Report) -> str:
    """The page as one HTML string."""
    colours = {variant: f"v{index % 8}" for index, variant in enumerate(report.variants)}
    return render_page(
        "comparison.html",
        title=report.title,
        introduction=report.introduction,
        report=report,
        answers=[_answers(report, setting, colours) for setting in report.settings if _present(report, setting)],
        examples=[_examples(report, setting, colours) for setting in report.settings if setting.predictions],
        training=_training(report, colours),
        itm_chance=(f"{ITM_CHANCE_LOSS:.3f}", percent(ITM_CHANCE_ACCURACY)),
        samples=_samples(report),
        queries=query_values(report.queries) if report.queries else None,
        freeze=[(_run_title(run), _freeze_rows(run)) for run in report.runs if run.freeze],
        configurations=[
            *([("The demo", report.configuration)] if report.configuration else []),
            *((_run_title(run), run.config) for run in report.runs if run.config),
        ],
    )


def _present(report: Report, setting: Setting) -> list[str]:
    return [variant for variant in report.variants if variant in setting.metrics]


def _answers(report: Report, setting: Setting, colours: Mapping[str, str]) -> dict[str, Any]:
    """One setting's scores. Question types are sorted by the second variant's gain over `variants[0]`."""
    first, *others = variants = _present(report, setting)
    compared = [variant for variant in others if variant in setting.differences]
    gains = setting.differences[compared[0]] if compared else {}
    groups = sorted(
        setting.metrics[first],
        key=lambda group: (group != "all", -gains[group]["difference"] if group in gains else 0.0),
    )
    main, detail = [group for group in groups if ":" not in group], [group for group in groups if ":" in group]
    blind = blind_keys(setting)
    head = ["type", "questions", *(BLIND[key][0] for key in blind), *map(display_name, variants)]
    return {
        "name": setting.name,
        "note": setting.note,
        "sentences": verdict(setting, report.variants),
        "order": f"the gain of {display_name(compared[0])} over {display_name(first)}" if compared else "",
        "legend": [
            *((colours[variant], display_name(variant)) for variant in variants),
            *((f"blind {key}", BLIND[key][1]) for key in blind),
        ],
        "plot": [_plot_row(setting, variants, group, colours) for group in main],
        "definitions": definitions(main),
        "head": [*head, *(f"{display_name(variant)} − {display_name(first)}" for variant in compared)],
        "main": [_score_row(setting, variants, compared, group) for group in main],
        "detail": [_score_row(setting, variants, compared, group) for group in detail],
    }


def _plot_row(setting: Setting, variants: Sequence[str], group: str, colours: Mapping[str, str]) -> dict[str, Any]:
    scores = {variant: setting.metrics[variant].get(group) for variant in variants}
    dots = [
        Dot(display_name(variant), colours[variant], score["accuracy"], percent(score["accuracy"]), score["ci95"])
        if score
        else None
        for variant, score in scores.items()
    ]
    shares = {key: setting.metrics[variants[0]].get(group, {}).get(key) for key in BLIND}
    bars = [Dot(BLIND[key][0], key, value, percent(value)) for key, value in shares.items() if value is not None]
    return plot_row(plain(group), dots, bars)


def _score_row(setting: Setting, variants: Sequence[str], compared: Sequence[str], group: str) -> list[str | Cell]:
    scores = [setting.metrics[variant].get(group) for variant in variants]
    some = next(score for score in scores if score is not None)
    return [
        plain(group),
        f"{some['n']:,}",
        *(share(some.get(key)) for key in blind_keys(setting)),
        *(Cell(share(score["accuracy"]), percent_interval(score["ci95"])) if score else "–" for score in scores),
        *(_difference_cell(setting.differences[variant].get(group)) for variant in compared),
    ]


def _difference_cell(entry: Mapping[str, Any] | None) -> str | Cell:
    if entry is None:
        return "–"
    kind = "even" if not entry["clear"] else "up" if entry["difference"] > 0 else "down"
    return Cell(points(entry["difference"]), points_interval(entry["ci95"]), kind)


def choose_random(predictions: Mapping[str, Sequence[Mapping[str, Any]]], number: int, seed: int) -> list[int]:
    """Indices of `number` questions drawn at random, regardless of the answers."""
    total = min((len(rows) for rows in predictions.values()), default=0)
    return sorted(random.Random(seed).sample(range(total), min(number, total)))


def choose_disagreements(
    predictions: Mapping[str, Sequence[Mapping[str, Any]]], first: str, other: str, number: int, seed: int
) -> tuple[list[int], list[int]]:
    """Indices where only `other` is right, and where only `first` is right; each drawn at random."""
    pairs = list(zip(predictions[first], predictions[other], strict=True))
    won = [n for n, (one, two) in enumerate(pairs) if one["credit"] == 0 and two["credit"] != 0]
    lost = [n for n, (one, two) in enumerate(pairs) if one["credit"] == 1 and two["credit"] != 1]
    rng = random.Random(seed)
    won, lost = (sorted(rng.sample(indices, min(number, len(indices)))) for indices in (won, lost))
    return won, lost


def _examples(report: Report, setting: Setting, colours: Mapping[str, str]) -> dict[str, Any]:
    """Random questions, and those that only one of two variants answers correctly."""
    variants = [variant for variant in report.variants if setting.predictions.get(variant)]

    def cards(indices: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {
                "row": setting.predictions[variants[0]][index],
                "answers": [
                    (colours[variant], display_name(variant), setting.predictions[variant][index])
                    for variant in variants
                ],
            }
            for index in indices
        ]

    groups = []
    for other in variants[1:]:
        won, lost = choose_disagreements(setting.predictions, variants[0], other, 4, report.seed)
        for winner, loser, indices in ((other, variants[0], won), (variants[0], other, lost)):
            if indices:
                groups.append((display_name(winner), display_name(loser), cards(indices)))
    chosen = choose_random(setting.predictions, 8, report.seed)
    return {"name": setting.name, "random": cards(chosen), "disagreements": groups}


def _training(report: Report, colours: Mapping[str, str]) -> list[dict[str, Any]]:
    """Legend and charts of each stage with logs."""
    stages = []
    for stage in dict.fromkeys(run.stage for run in report.runs):
        runs = [run for run in report.runs if run.stage == stage and run.log]
        if charts := training_charts(runs, colours):
            legend = {colours[run.variant]: display_name(run.variant) for run in runs}
            stages.append({"name": stage, "legend": legend.items(), "charts": charts})
    return stages


def _samples(report: Report) -> list[dict[str, Any]]:
    """The texts that each variant generated for the same held-out images during training, by stage."""
    stages = []
    for stage in dict.fromkeys(run.stage for run in report.runs if run.samples):
        runs = [run for run in report.runs if run.stage == stage and run.samples]
        references: dict[tuple[str, str], str] = {}
        texts: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
        for run in runs:
            for sample in run.samples:
                key = (sample["id"], sample.get("question", ""))
                references.setdefault(key, sample["reference"])
                texts.setdefault(key, {}).setdefault(sample["step"], {})[run.variant] = sample["text"]
        blocks = [
            {
                "image_id": key[0],
                "question": key[1],
                "reference": references[key],
                "rows": [
                    [f"{step:,}", *(of_step.get(run.variant) or "–" for run in runs)]
                    for step, of_step in sorted(by_step.items())
                ],
            }
            for key, by_step in texts.items()
        ]
        stages.append(
            {"name": stage, "head": ["step", *(display_name(run.variant) for run in runs)], "blocks": blocks}
        )
    return stages


def _run_title(run: Run) -> str:
    return f"{display_name(run.variant)}, {run.stage}"


def _freeze_rows(run: Run) -> list[list[str | Cell]]:
    rows: list[list[str | Cell]] = [
        [str(row["name"]), f"{row['trainable']:,}" if row["trainable"] else "frozen", f"{row['parameters']:,}"]
        for row in run.freeze
    ]
    totals = [f"{sum(row[column] for row in run.freeze):,}" for column in ("trainable", "parameters")]
    return [*rows, [Cell(text, kind="total") for text in ("total", *totals)]]
