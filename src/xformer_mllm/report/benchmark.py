"""The page of one model on one benchmark, written next to its metrics.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from xformer_mllm.report.charts import Cell, Dot, plot_row
from xformer_mllm.report.contents import BLIND
from xformer_mllm.report.pages import render_page
from xformer_mllm.report.wording import definitions, percent_interval, plain, share

UNSCALED = ("n", "MAE", "RMSE", "distribution")  # all other metrics are shown times 100
NAMES = {"n": "scored", **{key: name for key, (name, _) in BLIND.items()}}
BASELINE = "always "  # prefix of the groups that score a constant answer, without a model

KINDS = {
    "question": "type of question",
    "structural": "structural type",
    "semantic": "semantic type",
    "steps": "steps of reasoning",
    "words": "number of words in the question",
    "answer": "correct answer",
    "objects": "number of objects in the image",
    "strict objects": "number of objects in the image, strict",
}
PHOTO_SIDE = 320  # pixels: larger images are scaled down to it
SMALL_SIDE = 96  # pixels: images up to this size (scenes) are enlarged without smoothing
LONG_TABLE = 12  # tables with more rows are collapsed
SHOWN_PROBLEMS = 100

Scores = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """A record with its image and the model's answer.

    truth: "" if unknown. credit: score of the answer from 0 to 1; None if single answers have no score.
    """

    image: Image.Image | None
    question: str
    truth: str
    prediction: str
    credit: float | None = None
    kind: str = ""


def benchmark_page(title: str, model: str, metrics: Mapping[str, Any], examples: Sequence[Example] = ()) -> str:
    """Render the page as one HTML string.

    Args:
        title: benchmark and split.
        model: name or folder of the model.
        metrics: the content of metrics.json; all but "scores" is optional: {group: {metric: value}}, "all" first, shares
            in [0, 1], optionally "ci95": [low, high] of "accuracy".
        examples: randomly drawn records, in the order of display.
    """
    scores: Scores = metrics["scores"]
    kinds: dict[str, dict[str, Mapping[str, Any]]] = {}  # "structural:query" is of the kind "structural"
    for group, found in scores.items():
        kind, colon, name = group.partition(":")
        kinds.setdefault(kind if colon else "", {})[name if colon else group] = found
    main = kinds.pop("", {})
    with_accuracy = {group: found for group, found in main.items() if "accuracy" in found}
    columns = set(_metrics(scores))
    settings, problems = metrics.get("settings", {}), metrics.get("unreadable_images", {})
    return render_page(
        "benchmark.html",
        title=title,
        introduction=_introduction(model, metrics),
        metrics=metrics,
        headline=_headline(scores.get("all", {})),
        plot=[_plot_row(group, found) for group, found in with_accuracy.items()] if len(with_accuracy) > 1 else [],
        main=_table(main),
        definitions=definitions(list(main)),
        kinds=[
            (f"By {KINDS.get(kind, plain(kind))}", _table(groups), len(groups) > LONG_TABLE)
            for kind, groups in kinds.items()
        ],
        scaled=bool(columns - set(UNSCALED)),
        lower_is_better=[metric for metric in ("MAE", "RMSE", "distribution", "unparsed") if metric in columns],
        intervals=any("ci95" in found for found in scores.values()),
        constants=any(group.startswith(BASELINE) for group in scores),
        blind=[BLIND[key] for key in BLIND if key in columns],
        decoding=decoding(settings) if settings and "k_test" not in settings else "",
        problems=list(problems.items())[:SHOWN_PROBLEMS],
        more_problems=max(0, len(problems) - SHOWN_PROBLEMS),
        examples=[(_thumbnail(example.image), example) for example in examples],
        small_side=SMALL_SIDE,
    )


def number(metric: str, value: Any) -> str:
    """A score as text: shares times 100, counts and errors unscaled; an en dash for None."""
    if value is None or metric not in UNSCALED:
        return share(value)
    return f"{value:,}" if metric == "n" else f"{value:.2f}"


def decoding(settings: Mapping[str, Any]) -> str:
    """The generation settings in a sentence."""
    beams = settings.get("num_beams", 1)
    parts = ["greedy" if beams == 1 else f"{beams} beams, length penalty {settings.get('length_penalty', 1.0):g}"]
    if least := settings.get("min_new_tokens"):
        parts.append(f"at least {least} new {'token' if least == 1 else 'tokens'}")
    parts.append(f"at most {settings['max_new_tokens']} new tokens")
    if (penalty := settings.get("repetition_penalty", 1.0)) != 1.0:
        parts.append(f"repetition penalty {penalty:g}")
    return ", ".join(parts)


def _introduction(model: str, metrics: Mapping[str, Any]) -> str:
    records, answered = metrics.get("records"), metrics.get("answered")
    if records is None or answered is None:
        return model
    count = f"all {records:,}" if records == answered else f"{answered:,} of {records:,}"
    return f"{model}: {count} records answered."


def _headline(overall: Mapping[str, Any]) -> str:
    """The overall scores with their interval and baselines."""
    found = []
    for metric in _metrics({"all": overall}):
        if metric != "n":
            cell = _cell(overall, metric)
            suffix = f" (95\u00a0% interval {cell.interval})" if cell.interval else ""
            found.append(f"{_name(metric)} {cell.text}{suffix}")
    if not found:
        return "No scores."
    return ", ".join(found) + (f" (over {overall['n']:,})" if "n" in overall else "")


def _metrics(scores: Scores) -> list[str]:
    """The columns of a table: the metrics of all groups, with the number of scored records last."""
    found = dict.fromkeys(metric for group in scores.values() for metric in group if metric != "ci95")
    return sorted(found, key=lambda metric: metric == "n")


def _table(scores: Scores) -> tuple[list[str], list[list[str | Cell]]]:
    metrics = _metrics(scores)
    rows: list[list[str | Cell]] = [
        [
            Cell(plain(group), kind="even" if group.startswith(BASELINE) else ""),
            *(_cell(found, metric) for metric in metrics),
        ]
        for group, found in scores.items()
    ]
    return ["", *map(_name, metrics)], rows


def _name(metric: str) -> str:
    return NAMES.get(metric, metric)


def _cell(found: Mapping[str, Any], metric: str) -> Cell:
    interval = percent_interval(found["ci95"]) if metric == "accuracy" and "ci95" in found else ""
    return Cell(number(metric, found.get(metric)), interval)


def _plot_row(group: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The model as a dot, baselines as bars."""
    accuracy, baseline = found["accuracy"], group.startswith(BASELINE)
    kind = "majority" if baseline else "v1"
    score = Dot("accuracy", kind, accuracy, number("accuracy", accuracy), found.get("ci95"))
    bars = [Dot(_name(key), key, found[key], number(key, found[key])) for key in BLIND if found.get(key) is not None]
    return plot_row(plain(group), [] if baseline else [score], [score, *bars] if baseline else bars)


def _thumbnail(image: Image.Image | None) -> Image.Image | None:
    if image is None:
        return None
    shown = image.copy()
    shown.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    return shown
