"""One run, one page: scores, curves, pictures and configuration as a single self-contained HTML file.

Ground floor: plain data in, one file out. Nothing is fetched, neither when the page is written nor when it is read:
pictures are embedded, plots are inline SVG or HTML that take their colours from the reader's light or dark setting.

    write_report(Path("report.html"), Report(title=..., variants=("qformer", "xformer"), settings=[Setting(...)], ...))

Every part may be empty; a part that is empty is left out. All text is escaped.
"""

import base64
import io
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

PAPER = "https://arxiv.org/abs/2407.13851"
DISPLAY_NAMES = {"qformer": "Q-Former", "xformer": "X-Former"}

# ITM sees one matching pair for every two that do not match (own text, a wrong image, a wrong text: LAVIS' 3B).
# Without a look at the input the best guess is p(match) = 1/3, and "no match" is right two times in three.
ITM_POSITIVES = 1 / 3
ITM_CHANCE_LOSS = -(ITM_POSITIVES * math.log(ITM_POSITIVES) + (1 - ITM_POSITIVES) * math.log(1 - ITM_POSITIVES))
ITM_CHANCE_ACCURACY = 1 - ITM_POSITIVES

# What is right without a look at the picture: key of a score -> (column of the table, line of the legend).
BLIND = {
    "majority": ("majority", "most frequent training answer to the type of question"),
    "question_only": ("question alone", "most frequent training answer to the same words"),
}

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


@dataclass(frozen=True)
class Setting:
    """One way of asking: the scores of every variant on the same questions.

    metrics: {variant: {group: {"accuracy", "n", "ci95": [low, high]}}}; a group is "all", a question type,
        "structural:x" or "semantic:x". What is right without looking may be there too: "majority", the most frequent
        training answer to the type of question, and "question_only", that to the question's very words.
    differences: {variant: {group: {"difference", "ci95", "n", "clear"}}}, each variant minus the first one.
    predictions: {variant: [{"id", "image_id", "question", "question_type", "answer", "prediction", "correct"}]}, the
        same questions in the same order for every variant.
    """

    name: str
    note: str
    metrics: Mapping[str, Mapping[str, Mapping[str, Any]]]
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    predictions: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One variant's training in one stage.

    log: [{"step", "loss", "itc_loss", ...}]; samples: [{"step", "id", "text", "reference", "question" (optional)}],
    what the model said of the held-out picture "id"; freeze: [{"name", "parameters", "trainable"}]; batch_size: pairs
    per step, for the chance lines of ITC.
    """

    variant: str
    stage: str
    log: Sequence[Mapping[str, float]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    freeze: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None


@dataclass(frozen=True)
class Strip:
    """Pictures that belong side by side: (label, picture); a single one has the page's whole width."""

    title: str
    panels: Sequence[tuple[str, Image.Image]]


@dataclass(frozen=True)
class Report:
    """What the page is made from. `variants[0]` is the one that the others are compared with.

    pictures: a picture by a prediction's "image_id" or a sample's "id"; None where there is none.
    provenance: {"Command": "...", "Seed": "...", ...}, printed as it is.
    """

    title: str
    variants: Sequence[str]
    introduction: str = ""
    settings: Sequence[Setting] = ()
    runs: Sequence[Run] = ()
    reconstructions: Sequence[Strip] = ()
    configuration: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    pictures: Callable[[str], Image.Image | None] = lambda image_id: None
    seed: int = 0


def write_report(path: Path, report: Report) -> Path:
    """Write the page to `path`, whole or not at all, and return `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(render(report), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def render(report: Report) -> str:
    """The page as one HTML string."""
    parts = [
        *(_scores(report, setting) for setting in report.settings),
        *(_examples(report, setting) for setting in report.settings),
        _curves(report),
        _captions(report),
        _reconstructions(report),
        _freeze_tables(report),
        _configuration(report),
        _provenance(report),
    ]
    body = "\n".join(part for part in parts if part)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(report.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(report.title)}</h1>
{_paragraph(report.introduction, "lead")}
</header>
<main>
{body}
</main>
<footer><p>The idea: <a href="{PAPER}">Swetha et al., X-Former, ECCV 2024</a>.</p></footer>
</body>
</html>
"""


def display_name(variant: str) -> str:
    """`early_cross_attention` -> `early cross attention`; the two main variants as the paper writes them."""
    return DISPLAY_NAMES.get(variant, variant.replace("_", " "))


# --------------------------------------------------------------------------------------------------------- the verdict


def verdict(setting: Setting, variants: Sequence[str]) -> list[str]:
    """What the numbers say, in sentences. A difference counts when its entry in `differences` is marked `clear`."""
    present = [variant for variant in variants if variant in setting.metrics]
    if not present:
        return []
    first, others = present[0], present[1:]
    sentences = [overall(setting, variants)]
    for other in others:
        sentences += _by_type_sentences(setting, first, other)
    for variant in present:
        sentences += _below_blind_sentence(setting, variant)
    return sentences


def overall(setting: Setting, variants: Sequence[str]) -> str:
    """The result over all questions: each variant against the first, and what needs no picture."""
    first, *others = [variant for variant in variants if variant in setting.metrics]
    sentences = [_overall_sentence(setting, first, other) for other in others] or [_alone_sentence(setting, first)]
    score = setting.metrics[first]["all"]
    blind = max((score[key], BLIND[key][1]) for key in BLIND if key in score) if _blind_keys(setting) else None
    if blind is not None:
        sentences.append(f"Without the picture, the {blind[1]} is right in {percent(blind[0])}.")
    return " ".join(sentences)


def _overall_sentence(setting: Setting, first: str, other: str) -> str:
    ours, theirs = setting.metrics[other]["all"], setting.metrics[first]["all"]
    names = display_name(other), display_name(first)
    scores = (
        f"{names[0]} answers {percent(ours['accuracy'])} of {theirs['n']:,} held-out questions correctly, "
        f"{names[1]} {percent(theirs['accuracy'])}"
    )
    difference = setting.differences.get(other, {}).get("all")
    if difference is None:
        return scores + "."
    gap, interval = abs(difference["difference"]), points_interval(difference["ci95"])
    if not difference["clear"]:
        shown = points(difference["difference"])
        return f"{scores}: no clear difference ({shown} points, 95\u00a0% interval {interval})."
    ahead = names[0] if difference["difference"] > 0 else names[1]
    return f"{scores}: {ahead} is ahead by {100 * gap:.1f} points (95\u00a0% interval of the difference: {interval})."


def _alone_sentence(setting: Setting, variant: str) -> str:
    score = setting.metrics[variant]["all"]
    return (
        f"{display_name(variant)} answers {percent(score['accuracy'])} of {score['n']:,} held-out questions correctly."
    )


def _by_type_sentences(setting: Setting, first: str, other: str) -> list[str]:
    differences = {
        group: entry
        for group, entry in setting.differences.get(other, {}).items()
        if group != "all" and ":" not in group
    }
    if not differences:
        return []
    ranked = sorted(differences.items(), key=lambda item: -item[1]["difference"])
    ahead = [(group, entry) for group, entry in ranked if entry["clear"] and entry["difference"] > 0]
    behind = [(group, entry) for group, entry in reversed(ranked) if entry["clear"] and entry["difference"] < 0]
    even = [group for group, entry in ranked if not entry["clear"]]
    name, rival = display_name(other), display_name(first)
    sentences = []
    for title, entries in ((f"{name} is ahead of {rival} on", ahead), (f"{name} is behind {rival} on", behind)):
        if entries:
            listed = ", ".join(f"{plain(group)} ({points(entry['difference'])})" for group, entry in entries)
            sentences.append(f"{title} {listed}.")
    if not ahead:
        sentences.append(f"There is no type of question on which {name} is clearly ahead of {rival}.")
    if even:
        sentences.append(f"No clear difference on {', '.join(plain(group) for group in even)}.")
    return sentences


def _below_blind_sentence(setting: Setting, variant: str) -> list[str]:
    """Types where the interval does not lie above what needs no picture: nothing was shown to be learned there."""
    groups = [
        plain(group)
        for group, score in setting.metrics[variant].items()
        if group != "all" and ":" not in group and score["ci95"][0] <= max(score.get(key, -1) for key in BLIND)
    ]
    if not groups:
        return []
    return [
        f"{display_name(variant)} is not clearly better than an answer without the picture on {', '.join(groups)}."
    ]


# ------------------------------------------------------------------------------------------------------------ accuracy


def _scores(report: Report, setting: Setting) -> str:
    variants = [variant for variant in report.variants if variant in setting.metrics]
    if not variants:
        return ""
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(setting, report.variants))
    groups = list(setting.metrics[variants[0]])
    main = sorted((group for group in groups if ":" not in group), key=lambda group: group != "all")
    detail = [group for group in groups if ":" in group]
    return _section(
        f"Answers: {setting.name}",
        _paragraph(setting.note),
        f'<ul class="verdict">{sentences}</ul>',
        _paragraph(
            "Intervals are 95\u00a0% over the questions that were drawn. They hold for this one training run of each "
            "variant: another seed moves the scores too, and that is not in them.",
            "small",
        ),
        "<h3>By type of question</h3>",
        _legend(report, variants, _blind_keys(setting)),
        _dot_plot(report, setting, variants, main),
        _score_table(setting, variants, main),
        _details("By GQA's structural and semantic types", _score_table(setting, variants, detail)) if detail else "",
    )


def _blind_keys(setting: Setting) -> list[str]:
    scores = [score for metrics in setting.metrics.values() for score in metrics.values()]
    return [key for key in BLIND if any(key in score for score in scores)]


def _dot_plot(report: Report, setting: Setting, variants: Sequence[str], groups: Sequence[str]) -> str:
    """One row per type, one dot with its interval per variant, a bar for what needs no picture. Plain HTML, so that
    its text keeps its size on a phone."""
    rows = []
    for group in groups:
        marks, spoken = [], []
        for place, variant in enumerate(variants):
            score = setting.metrics[variant].get(group)
            if score is None:
                continue
            low, high = score["ci95"]
            top = f"top:{100 * (place + 1) / (len(variants) + 1):.0f}%"
            colour = f"v{report.variants.index(variant) % 8}"
            reach = f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"
            marks.append(
                f'<i class="interval {colour}" style="{top};{reach}"></i>'
                f'<i class="dot {colour}" style="{top};left:{100 * score["accuracy"]:.2f}%"></i>'
            )
            spoken.append(f"{display_name(variant)} {percent(score['accuracy'])}")
        for key, (name, _) in BLIND.items():
            if (share := setting.metrics[variants[0]].get(group, {}).get(key)) is not None:
                marks.append(f'<i class="blind {key}" style="left:{100 * share:.2f}%"></i>')
                spoken.append(f"{name} {percent(share)}")
        name = plain(group)
        label = escape(f"{name}: {', '.join(spoken)}", quote=True)
        rows.append(
            f'<div class="row{" total" if group == "all" else ""}"><span class="label">{escape(name)}</span>'
            f'<div class="track" role="img" aria-label="{label}" style="height:{0.55 * (len(variants) + 1):.2f}rem">'
            f"{''.join(marks)}</div></div>"
        )
    axis = "".join(f'<span style="left:{mark}%">{mark}</span>' for mark in (0, 25, 50, 75, 100))
    return (
        f'<div class="plot">{"".join(rows)}<div class="row axis" aria-hidden="true">'
        f'<span class="label">correct, %</span><div class="ticks">{axis}</div></div></div>'
    )


def _score_table(setting: Setting, variants: Sequence[str], groups: Sequence[str]) -> str:
    blind, compared = _blind_keys(setting), [variant for variant in variants if variant in setting.differences]
    head = ["type", "questions", *(BLIND[key][0] for key in blind), *map(display_name, variants)]
    head += [f"{display_name(variant)} − {display_name(variants[0])}" for variant in compared]
    rows = []
    for group in groups:
        scores = {variant: setting.metrics[variant].get(group) for variant in variants}
        some = next(score for score in scores.values() if score is not None)
        cells = [f"{some['n']:,}", *(_share(some.get(key)) for key in blind)]
        best = max(score["accuracy"] for score in scores.values() if score is not None)
        cells += [_score_cell(score, best) for score in scores.values()]
        cells += [_difference_cell(setting.differences[variant].get(group)) for variant in compared]
        rows.append([escape(plain(group)), *cells])
    return _table([escape(cell) for cell in head], rows, "Share of correct answers in %, with 95\u00a0% intervals")


def _score_cell(score: Mapping[str, Any] | None, best: float) -> str:
    if score is None:
        return "–"
    value = _share(score["accuracy"])
    low, high = score["ci95"]
    shown = f"<b>{value}</b>" if score["accuracy"] == best else value
    return f'{shown} <span class="ci">{100 * low:.1f}–{100 * high:.1f}</span>'


def _difference_cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    kind = "even" if not entry["clear"] else "up" if entry["difference"] > 0 else "down"
    interval = points_interval(entry["ci95"])
    return f'<span class="{kind}">{points(entry["difference"])}</span> <span class="ci">{interval}</span>'


# ------------------------------------------------------------------------------------------------------------ examples


def choose_random(predictions: Mapping[str, Sequence[Mapping[str, Any]]], number: int, seed: int) -> list[int]:
    """Places of `number` questions drawn at random: a fair look, good answers and bad."""
    total = min((len(rows) for rows in predictions.values()), default=0)
    return sorted(random.Random(seed).sample(range(total), min(number, total)))


def choose_disagreements(
    predictions: Mapping[str, Sequence[Mapping[str, Any]]], first: str, other: str, number: int, seed: int
) -> tuple[list[int], list[int]]:
    """Places where only `other` is right, and where only `first` is right; each drawn at random."""
    pairs = list(zip(predictions[first], predictions[other], strict=True))
    chooser = random.Random(seed)
    sides = []
    for left_is_right in (False, True):
        places = [
            place
            for place, (left, right) in enumerate(pairs)
            if left["correct"] == left_is_right and right["correct"] != left_is_right
        ]
        sides.append(sorted(chooser.sample(places, min(number, len(places)))))
    return sides[0], sides[1]


def _examples(report: Report, setting: Setting) -> str:
    variants = [variant for variant in report.variants if setting.predictions.get(variant)]
    if not variants:
        return ""
    chosen = choose_random(setting.predictions, 8, report.seed)
    parts = [
        _paragraph(f"Drawn at random from all questions (seed {report.seed}), right or wrong.", "small"),
        _cards(report, setting, variants, chosen),
    ]
    for other in variants[1:]:
        won, lost = choose_disagreements(setting.predictions, variants[0], other, 4, report.seed)
        for winner, loser, places in ((other, variants[0], won), (variants[0], other, lost)):
            if places:
                parts += [
                    f"<h3>Only {escape(display_name(winner))} is right</h3>",
                    _paragraph(
                        f"Chosen because {display_name(winner)} is right and {display_name(loser)} is not: "
                        "they show where the two differ, not how often.",
                        "small",
                    ),
                    _cards(report, setting, variants, places),
                ]
    return _section(f"Examples: {setting.name}", *parts)


def _cards(report: Report, setting: Setting, variants: Sequence[str], places: Iterable[int]) -> str:
    cards = []
    for place in places:
        row = setting.predictions[variants[0]][place]
        answers = "".join(_answer_line(report, variant, setting.predictions[variant][place]) for variant in variants)
        picture = report.pictures(row["image_id"])
        shown = _image(picture, f"Held-out picture {row['image_id']}") if picture is not None else ""
        cards.append(
            f'<figure class="card">{shown}<figcaption><p class="question">{escape(row["question"])}</p>'
            f"<dl><div><dt>truth</dt><dd>{escape(row['answer'])}</dd></div>{answers}</dl>"
            f'<p class="kind">{escape(plain(row["question_type"]))}</p></figcaption></figure>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _answer_line(report: Report, variant: str, row: Mapping[str, Any]) -> str:
    kind, sign, spoken = ("right", "✓", "right") if row["correct"] else ("wrong", "✗", "wrong")
    answer = escape(row["prediction"]) or "<em>nothing</em>"
    return (
        f"<div><dt>{_key(report, variant)}{escape(display_name(variant))}</dt>"
        f'<dd class="{kind}"><span aria-label="{spoken}">{sign}</span> {answer}</dd></div>'
    )


# -------------------------------------------------------------------------------------------------------------- curves


def _curves(report: Report) -> str:
    parts = []
    for stage in dict.fromkeys(run.stage for run in report.runs):
        runs = [run for run in report.runs if run.stage == stage and run.log]
        charts = [chart for name in _curves_of(runs) if (chart := _curve(report, runs, name))]
        if charts:
            variants = list(dict.fromkeys(run.variant for run in runs))
            parts += [
                f"<h3>{escape(stage)}</h3>",
                _legend(report, variants),
                f'<div class="charts">{"".join(charts)}</div>',
            ]
    if not parts:
        return ""
    note = (
        "Thin: as logged; thick: running mean. Dashed: what guessing gets. ITM sees one matching pair for every two "
        f"that do not match, so its chance level is {ITM_CHANCE_LOSS:.3f} for the loss and "
        f"{percent(ITM_CHANCE_ACCURACY)} for the accuracy."
    )
    return _section("Training", _paragraph(note, "small"), *parts)


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


# ----------------------------------------------------------------------------------- captions, pictures, configuration


def _captions(report: Report) -> str:
    """What each variant said of the same held-out pictures as training went on."""
    parts = []
    for stage in dict.fromkeys(run.stage for run in report.runs if run.samples):
        runs = [run for run in report.runs if run.stage == stage and run.samples]
        asked = dict.fromkeys((sample["id"], sample.get("question", "")) for run in runs for sample in run.samples)
        parts += [f"<h3>{escape(stage)}</h3>", *(_caption_block(report, runs, *key) for key in asked)]
    note = (
        "The same held-out pictures as training went on: fluent text that has nothing to do with them would show here."
    )
    return _section("What they say of fixed pictures", _paragraph(note, "small"), *parts) if parts else ""


def _caption_block(report: Report, runs: Sequence[Run], picture_id: str, question: str) -> str:
    said: dict[int, dict[str, str]] = {}
    reference = ""
    for run in runs:
        for sample in run.samples:
            if (sample["id"], sample.get("question", "")) == (picture_id, question):
                said.setdefault(sample["step"], {})[run.variant] = sample["text"]
                reference = sample["reference"]
    variants = [run.variant for run in runs]
    rows = [[f"{step:,}", *(escape(row.get(name) or "–") for name in variants)] for step, row in sorted(said.items())]
    picture = report.pictures(picture_id)
    shown = _image(picture, f"Held-out picture {picture_id}") if picture is not None else ""
    told = f"<p><b>{escape(question or 'Its own caption:')}</b> {escape(reference)}</p>"
    table = _table(["step", *(escape(display_name(variant)) for variant in variants)], rows, "", "text")
    return f'<div class="captioned"><div class="thumb">{shown}</div><div>{told}{table}</div></div>'


def _reconstructions(report: Report) -> str:
    strips = []
    for strip in report.reconstructions:
        panels = "".join(
            f"<figure>{_image(picture, f'{label}: {strip.title}')}<figcaption>{escape(label)}</figcaption></figure>"
            for label, picture in strip.panels
        )
        kind = "strip" if len(strip.panels) > 1 else "sheet"
        strips.append(f'<h3>{escape(strip.title)}</h3><div class="{kind}">{panels}</div>')
    note = "Grey patches were hidden from the MAE encoder; only they are painted, the others are the original's."
    return _section("Reconstructions", _paragraph(note, "small"), *strips) if strips else ""


def _freeze_tables(report: Report) -> str:
    tables = []
    for run in report.runs:
        if not run.freeze:
            continue
        rows = [
            [
                escape(str(row["name"])),
                f"{row['trainable']:,}" if row["trainable"] else "frozen",
                f"{row['parameters']:,}",
            ]
            for row in run.freeze
        ]
        totals = [sum(row[column] for row in run.freeze) for column in ("trainable", "parameters")]
        rows.append(["<b>total</b>", *(f"<b>{total:,}</b>" for total in totals)])
        title = f"{display_name(run.variant)}, {run.stage}"
        tables.append(f"<div>{_table(['part', 'trained', 'parameters'], rows, title)}</div>")
    return (
        _section("What was trained, what was frozen", f'<div class="columns">{"".join(tables)}</div>')
        if tables
        else ""
    )


def _configuration(report: Report) -> str:
    blocks = [_details("The demo", _json(report.configuration))] if report.configuration else []
    blocks += [
        _details(f"{display_name(run.variant)}, {run.stage}", _json(run.config)) for run in report.runs if run.config
    ]
    return _section("Configuration", *blocks) if blocks else ""


def _provenance(report: Report) -> str:
    if not report.provenance:
        return ""
    rows = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in report.provenance.items()
    )
    return _section("How this was produced", f'<dl class="facts">{rows}</dl>')


# -------------------------------------------------------------------------------------------------------- small pieces


def percent(share: float) -> str:
    """0.7564 -> '75.6 %', which no line break divides."""
    return f"{100 * share:.1f}\u00a0%"


def points(difference: float) -> str:
    """0.0991 -> '+9.9'; a real minus sign for negative ones."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def points_interval(interval: Sequence[float]) -> str:
    """[0.0913, 0.107] -> '+9.1 to +10.7'."""
    return f"{points(interval[0])} to {points(interval[1])}"


def plain(group: str) -> str:
    """'exists_with_texture' -> 'exists with texture'."""
    return group.replace("_", " ")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def _paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _json(values: Mapping[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(values, indent=2, default=str, ensure_ascii=False))}</pre>"


def _key(report: Report, variant: str) -> str:
    return f'<i class="key v{report.variants.index(variant) % 8}"></i>'


def _legend(report: Report, variants: Sequence[str], blind: Sequence[str] = ()) -> str:
    items = [f"<span>{_key(report, variant)}{escape(display_name(variant))}</span>" for variant in variants]
    items += [f'<span><i class="key blind {key}"></i>{escape(BLIND[key][1])}</span>' for key in blind]
    return f'<p class="legend">{"".join(items)}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "numbers") -> str:
    """Cells are HTML: the caller escapes them. The first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">{title}<thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _image(picture: Image.Image, alternative: str) -> str:
    """PNG as a data URI; small pictures are enlarged by the browser without smoothing."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/png;base64,{data}" width="{picture.width}" height="{picture.height}" '
        f'alt="{escape(alternative, quote=True)}">'
    )


_STYLE = """
:root{--ground:#fbfaf7;--card:#fff;--ink:#1d2129;--soft:#616876;--line:#e2dfd6;--good:#1b7a43;--bad:#b3261e;
--v0:#d9820f;--v1:#2563c9;--v2:#8a4fbf;--v3:#0f8b8d;--v4:#c2417c;--v5:#6b7a1f;--v6:#7a5230;--v7:#4b5563}
@media(prefers-color-scheme:dark){:root{--ground:#14161a;--card:#1c1f25;--ink:#e8e6e1;--soft:#9aa1ad;--line:#33373f;
--good:#6fd39a;--bad:#ff8a80;--v0:#f2ab4b;--v1:#76a7ff;--v2:#c294f2;--v3:#5ecbcd;--v4:#f08db8;--v5:#bccb62;--v6:#d1a37d;
--v7:#b4bcc9}}
.v0{--c:var(--v0)}.v1{--c:var(--v1)}.v2{--c:var(--v2)}.v3{--c:var(--v3)}.v4{--c:var(--v4)}.v5{--c:var(--v5)}
.v6{--c:var(--v6)}.v7{--c:var(--v7)}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem 1rem 4rem;max-width:64rem;background:var(--ground);color:var(--ink);
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;-webkit-text-size-adjust:100%}
h1{font-size:clamp(1.7rem,5vw,2.5rem);line-height:1.15;letter-spacing:-.02em;margin:.5rem 0 .75rem;text-wrap:balance}
h2{font-size:1.4rem;line-height:1.25;letter-spacing:-.01em;margin:3rem 0 .75rem;padding-top:1rem;
border-top:1px solid var(--line)}
h3{font-size:1.05rem;margin:1.75rem 0 .5rem}
p{margin:.5rem 0;max-width:46rem}.lead{font-size:1.1rem;color:var(--soft)}
.small,.ci,.kind,caption{color:var(--soft);font-size:.85rem}
a{color:var(--v1)}
.verdict{list-style:none;margin:1rem 0;padding:1rem 1.2rem;background:var(--card);border:1px solid var(--line);
border-left:4px solid var(--v1);border-radius:.5rem;max-width:none}
.verdict li{margin:.4rem 0}.verdict li:first-child{font-size:1.15rem;font-weight:600;line-height:1.4;margin-top:0}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;font-size:.9rem}
.key{display:inline-block;width:.7rem;height:.7rem;border-radius:50%;background:var(--c);margin-right:.4rem}
.blind{width:3px;border-radius:1px;background:var(--soft)}.question_only{width:2px;background:none;
border-left:2px dotted var(--soft)}.key.blind{height:1rem;border-radius:1px;vertical-align:-.2rem}
.key.majority{width:3px}.key.question_only{width:2px;background:none}
.plot{margin:.75rem 0 1.5rem}
.row{display:grid;grid-template-columns:minmax(6.5rem,11rem) 1fr;gap:.75rem;align-items:center;font-size:.9rem;
border-bottom:1px solid var(--line);padding:.15rem 0}
.row .label{text-align:right;line-height:1.2;overflow-wrap:anywhere}.total{font-weight:650}
.track{position:relative;background:repeating-linear-gradient(90deg,var(--line) 0 1px,transparent 1px 25%);
border-right:1px solid var(--line);margin-right:.6rem}
.track i{position:absolute;transform:translateY(-50%)}
.dot{width:.65rem;height:.65rem;margin-left:-.325rem;border-radius:50%;background:var(--c)}
.interval{height:3px;border-radius:2px;background:var(--c);opacity:.55}
.track .blind{top:50%;height:80%;margin-left:-1.5px}
.axis{border:0;color:var(--soft);font-size:.8rem}.ticks{position:relative;height:1.2rem;margin-right:.6rem}
.ticks span{position:absolute;transform:translateX(-50%)}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
.numbers{width:100%}
caption{text-align:left;padding-bottom:.4rem}
th,td{padding:.35rem .7rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:baseline}
th:first-child{padding-left:0}
.numbers td,.numbers th+th{text-align:right;white-space:nowrap}
thead th{color:var(--soft);font-weight:600;font-size:.82rem;vertical-align:bottom}tbody th{font-weight:500}
.up{color:var(--good);font-weight:600}.down{color:var(--bad);font-weight:600}.even{color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,13.5rem),1fr));gap:1rem;margin:1rem 0}
figure{margin:0}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;overflow:hidden;
display:flex;flex-direction:column}
.card figcaption{padding:.7rem .9rem .8rem;display:flex;flex-direction:column;flex:1}
img{display:block;width:100%;height:auto;image-rendering:pixelated}
.question{font-weight:600;line-height:1.35;margin:0 0 .5rem}
.card dl{margin:0;font-size:.9rem}.card dl div{display:flex;justify-content:space-between;gap:.75rem;padding:.15rem 0}
dt{color:var(--soft)}dd{margin:0}.card dd{text-align:right;font-weight:550;overflow-wrap:anywhere}
.right{color:var(--good)}.wrong{color:var(--bad)}
.kind{margin:auto 0 0;padding-top:.5rem;font-size:.78rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr));gap:1rem;margin:.75rem 0}
.chart{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem .9rem .6rem}
.chart figcaption{font-weight:600;font-size:.92rem}.chart svg{display:block;width:100%;height:auto;margin-top:.3rem}
.chart text{fill:var(--soft);font:11px system-ui,sans-serif}
.grid{stroke:var(--line);fill:none}.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.raw{stroke-width:1;opacity:.3}path.chance{stroke:var(--soft);stroke-width:1.2;stroke-dasharray:4 4;fill:none}
.captioned{display:grid;grid-template-columns:8rem 1fr;gap:1.2rem;margin:1.5rem 0;align-items:start}
.captioned>div{min-width:0}.captioned p{margin-top:0}.thumb img,.strip img{border-radius:.4rem}
.strip{display:grid;grid-template-columns:repeat(auto-fit,minmax(7rem,12rem));gap:.8rem}
.sheet{max-width:46rem}.sheet img{image-rendering:auto;border-radius:.4rem}
.strip figcaption,.sheet figcaption{font-size:.85rem;color:var(--soft);margin-top:.3rem}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1rem 2.5rem}
details{border:1px solid var(--line);border-radius:.5rem;background:var(--card);margin:.6rem 0;padding:.55rem .9rem}
summary{cursor:pointer;font-weight:550}
pre{overflow-x:auto;font:.8rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.facts div{display:grid;grid-template-columns:minmax(6rem,11rem) 1fr;gap:1rem;padding:.35rem 0;
border-bottom:1px solid var(--line)}
.facts dd{overflow-wrap:anywhere}
footer{margin-top:3rem;color:var(--soft);font-size:.9rem}
@media(max-width:34rem){.captioned{grid-template-columns:1fr}.thumb{max-width:9rem}
.cards{grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.7rem}.card figcaption{padding:.6rem .65rem}
.card dl div{flex-wrap:wrap;gap:0 .5rem}}
"""
