"""One model on one benchmark: the page beside its metrics.json.

    page = benchmark_page("X-Former on VQAv2, val", "runs/stage2/model", metrics, examples)

`metrics` is what metrics.json holds, so that a page can be made again from that file. Every part of it may be missing
but "scores"; a part that is missing is left out. All text is escaped, nothing is fetched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image

from xformer_mllm.report import markup
from xformer_mllm.report.contents import BLIND
from xformer_mllm.report.document import document
from xformer_mllm.report.wording import plain

UNSCALED = ("n", "MAE", "RMSE", "distribution")  # all other metrics are shown times 100
NAMES = {"n": "scored", **{key: name for key, (name, _) in BLIND.items()}}
BASELINE = "always "  # how the group of a constant answer is called, which needs no model

KINDS = {
    "question": "type of question",
    "structural": "structural type",
    "semantic": "semantic type",
    "steps": "steps of reasoning",
    "words": "words of the question",
    "answer": "the right answer",
    "objects": "objects in the image",
    "strict objects": "objects in the image, strict",
}
PHOTO_SIDE = 320  # pixels: larger images are scaled down to it
SMALL_SIDE = 96  # pixels: smaller ones (scenes) are shown pixel by pixel
PHOTO_STYLE = ".photo img{image-rendering:auto}"

LONG_TABLE = 12  # more rows than this are folded away
SHOWN_PROBLEMS = 100

Scores = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """A record with its image and the model's answer.

    truth: "" where nobody knows it. credit: what the answer is worth, from 0 to 1; None where answers only score
    together. image: None where there is none to show.
    """

    image: Image.Image | None
    question: str
    truth: str
    prediction: str
    credit: float | None = None
    kind: str = ""


def benchmark_page(title: str, model: str, metrics: Mapping[str, Any], examples: Sequence[Example] = ()) -> str:
    """The page as one HTML string.

    Args:
        title: which benchmark, which split.
        model: which model, as it was named.
        metrics: "scores" ({group: {metric: value}}, "all" first, shares in [0, 1], perhaps "ci95": [low, high] of
            "accuracy"), "records", "answered", "empty_answers", "unreadable_images" ({image: why}), "settings"
            ({"prompt", "num_beams", ...}), "normalisation", "notes" ([sentence]), "not_computed" ({metric: why}),
            "seconds", "config".
        examples: in the order in which they are to be shown; how they were chosen is said as "drawn at random".
    """
    scores = metrics["scores"]
    return document(
        title,
        _introduction(model, metrics),
        [
            _headline(scores, metrics),
            _scores(scores),
            _settings(metrics),
            _completeness(metrics),
            _not_computed(metrics.get("not_computed", {})),
            _examples(examples),
            _configuration(metrics.get("config", {})),
        ],
        PHOTO_STYLE,
    )


def number(metric: str, value: Any) -> str:
    """A score as it is printed: shares times 100, counts and errors as they are; an en dash for None."""
    if value is None:
        return "–"
    if metric == "n":
        return f"{value:,}"
    return f"{value:.2f}" if metric in UNSCALED else f"{100 * value:.1f}"


def decoding(settings: Mapping[str, Any]) -> str:
    """How the answer was searched for, in a sentence."""
    beams = settings.get("num_beams", 1)
    parts = ["greedy" if beams == 1 else f"{beams} beams, length penalty {settings.get('length_penalty', 1.0):g}"]
    if least := settings.get("min_new_tokens"):
        parts.append(f"at least {least} new {'token' if least == 1 else 'tokens'}")
    parts.append(f"at most {settings['max_new_tokens']} new tokens")
    if (penalty := settings.get("repetition_penalty", 1.0)) != 1.0:
        parts.append(f"repetition penalty {penalty:g}")
    return ", ".join(parts)


# ----------------------------------------------------------------------------------------------------------- the parts


def _introduction(model: str, metrics: Mapping[str, Any]) -> str:
    asked, answered = metrics.get("records"), metrics.get("answered")
    if asked is None or answered is None:
        return model
    how_many = f"all {asked:,}" if asked == answered else f"{answered:,} of {asked:,}"
    return f"{model}: {how_many} records answered."


def _headline(scores: Scores, metrics: Mapping[str, Any]) -> str:
    """The overall scores, and whatever must be known to read them."""
    overall = scores.get("all", {})
    found = [
        f"{_name(metric)} {number(metric, overall[metric])}" for metric in _metrics({"all": overall}) if metric != "n"
    ]
    scored = f" (over {overall['n']:,})" if "n" in overall else ""
    sentences = [", ".join(found) + scored if found else "There is no score to show", *metrics.get("notes", ())]
    return f'<ul class="verdict">{"".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)}</ul>'


def _scores(scores: Scores) -> str:
    """A table of the main groups, and one for each kind of group ("structural:query" is of the kind structural)."""
    kinds: dict[str, dict[str, Mapping[str, Any]]] = {}
    for group, found in scores.items():
        kind, colon, name = group.partition(":")
        kinds.setdefault(kind if colon else "", {})[name if colon else group] = found
    main = kinds.pop("", {})
    plot = _plot(main)
    parts = [plot, _table(main), _legend(scores, plotted=bool(plot))]
    for kind, groups in kinds.items():
        title = f"By {KINDS.get(kind, plain(kind))}"
        table = _table(groups)
        folded = len(groups) > LONG_TABLE
        parts.append(
            markup.details(f"{title} ({len(groups)})", table) if folded else f"<h3>{escape(title)}</h3>{table}"
        )
    return markup.section("Scores", *parts)


def _metrics(scores: Scores) -> list[str]:
    """The columns of a table: every metric that a group has, how many were scored last."""
    found = dict.fromkeys(metric for group in scores.values() for metric in group if metric != "ci95")
    return sorted(found, key=lambda metric: metric == "n")


def _table(scores: Scores) -> str:
    metrics = _metrics(scores)
    rows = [[_group(group), *(_cell(found, metric) for metric in metrics)] for group, found in scores.items()]
    return markup.table(["", *(escape(_name(metric)) for metric in metrics)], rows, "")


def _group(group: str) -> str:
    shown = escape(plain(group))
    return f'<span class="even">{shown}</span>' if group.startswith(BASELINE) else shown


def _name(metric: str) -> str:
    return NAMES.get(metric, metric)


def _cell(found: Mapping[str, Any], metric: str) -> str:
    shown = number(metric, found.get(metric))
    if metric == "accuracy" and "ci95" in found:
        low, high = found["ci95"]
        return f'{shown} <span class="ci">{100 * low:.1f}–{100 * high:.1f}</span>'
    return shown


def _legend(scores: Scores, plotted: bool) -> str:
    metrics = set(_metrics(scores))
    sentences = ["Shares, recalls and caption metrics are multiplied by 100."] if metrics - set(UNSCALED) else []
    lower = [metric for metric in ("MAE", "RMSE", "distribution", "unparsed") if metric in metrics]
    if lower:
        sentences.append(f"{' and '.join(lower) if len(lower) < 3 else ', '.join(lower)}: lower is better.")
    if any("ci95" in group for group in scores.values()):
        sentences.append("Behind an accuracy its 95\u00a0% interval over the records that were drawn.")
    if any(group.startswith(BASELINE) for group in scores):
        sentences.append("“always …”: the score of that constant answer, without a model.")
    sentences += [f"{name}: {meaning}." for key, (name, meaning) in BLIND.items() if key in metrics]
    if plotted and any("ci95" in group for group in scores.values()):
        sentences.append("In the plot the dot is the model, the line its interval, a bar what needs no image.")
    return markup.paragraph(" ".join(sentences), "small")


def _plot(scores: Scores) -> str:
    """A dot for each group on one axis from 0 to 100; empty without at least two groups with an accuracy."""
    shown = {group: found for group, found in scores.items() if "accuracy" in found}
    if len(shown) < 2:
        return ""
    axis = "".join(f'<span style="left:{mark}%">{mark}</span>' for mark in (0, 25, 50, 75, 100))
    rows = "".join(_plot_row(group, found) for group, found in shown.items())
    return (
        f'<div class="plot">{rows}<div class="row axis" aria-hidden="true"><span class="label">accuracy</span>'
        f'<div class="ticks">{axis}</div></div></div>'
    )


def _plot_row(group: str, found: Mapping[str, Any]) -> str:
    marks, spoken = [], [f"accuracy {number('accuracy', found['accuracy'])}"]
    if "ci95" in found:
        low, high = found["ci95"]
        marks.append(
            f'<i class="interval v1" style="top:50%;left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></i>'
        )
    if group.startswith(BASELINE):
        marks.append(f'<i class="blind majority" style="left:{100 * found["accuracy"]:.2f}%"></i>')
    else:
        marks.append(f'<i class="dot v1" style="top:50%;left:{100 * found["accuracy"]:.2f}%"></i>')
    for key in BLIND:
        if found.get(key) is not None:
            marks.append(f'<i class="blind {key}" style="left:{100 * found[key]:.2f}%"></i>')
            spoken.append(f"{_name(key)} {number(key, found[key])}")
    label = escape(f"{plain(group)}: {', '.join(spoken)}", quote=True)
    return (
        f'<div class="row{" total" if group == "all" else ""}"><span class="label">{escape(plain(group))}</span>'
        f'<div class="track" role="img" aria-label="{label}" style="height:1.1rem">{"".join(marks)}</div></div>'
    )


def _settings(metrics: Mapping[str, Any]) -> str:
    """What belongs to the score: another prompt, search or normalisation is another score."""
    rows = {}
    settings = metrics.get("settings", {})
    if "k_test" in settings:  # retrieval
        rows["Scored again by ITM"] = f"the {settings['k_test']} best by ITC"
    elif settings:
        plain_question = (
            ", the question in lower case and without punctuation" if settings.get("plain_question") else ""
        )
        prompt = f"<code>{escape(settings['prompt'])}</code>" if settings["prompt"] else "none"
        rows["Prompt"] = prompt + plain_question
        rows["Decoding"] = escape(decoding(settings))
    if normalisation := metrics.get("normalisation"):
        rows["Normalisation"] = escape(normalisation)
    return markup.section("What belongs to these scores", _facts(rows)) if rows else ""


def _completeness(metrics: Mapping[str, Any]) -> str:
    """How many records there are, were answered, and were not, with the reasons."""
    rows = {
        name: f"{metrics[key]:,}"
        for key, name in (("records", "Records"), ("answered", "Answered"), ("empty_answers", "Empty answers"))
        if key in metrics
    }
    if metrics.get("seconds"):
        rows["Seconds"] = f"{metrics['seconds']:,}"
    problems = metrics.get("unreadable_images", {})
    if problems:
        rows["Images that cannot be read"] = f"{len(problems):,}"
    if not rows:
        return ""
    return markup.section("How many", _facts(rows), _problems(problems) if problems else "")


def _problems(problems: Mapping[str, str]) -> str:
    shown = list(problems.items())[:SHOWN_PROBLEMS]
    rows = [[escape(image), escape(problem)] for image, problem in shown]
    more = f"{len(problems) - len(shown):,} more are in metrics.json." if len(shown) < len(problems) else ""
    return (
        markup.paragraph("Records whose image cannot be read have no answer and are in no score.", "small")
        + markup.table(["image", "what is wrong"], rows, "", "text")
        + markup.paragraph(more, "small")
    )


def _not_computed(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return ""
    return markup.section("Not computed", _facts({metric: escape(reason) for metric, reason in reasons.items()}))


def _facts(rows: Mapping[str, str]) -> str:
    """Values are HTML already."""
    shown = "".join(f"<div><dt>{escape(key)}</dt><dd>{value}</dd></div>" for key, value in rows.items())
    return f'<dl class="facts">{shown}</dl>'


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    cards = "".join(map(_card, examples))
    note = markup.paragraph("Drawn at random from what was answered, right or wrong.", "small")
    return markup.section("Examples", note, f'<div class="cards">{cards}</div>')


def _card(example: Example) -> str:
    question = f'<p class="question">{escape(example.question)}</p>' if example.question else ""
    truth = f"<div><dt>truth</dt><dd>{escape(example.truth)}</dd></div>" if example.truth else ""
    kind = f'<p class="kind">{escape(plain(example.kind))}</p>' if example.kind else ""
    return (
        f'<figure class="card">{_image(example)}<figcaption>{question}<dl>{truth}'
        f"<div><dt>model</dt>{_said(example)}</div></dl>{kind}</figcaption></figure>"
    )


def _image(example: Example) -> str:
    if example.image is None:
        return ""
    shown = example.image.copy()
    shown.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    image = markup.image(shown, example.question or "The image")
    return f'<div class="photo">{image}</div>' if max(shown.size) > SMALL_SIDE else image


def _said(example: Example) -> str:
    """The answer, with a sign for what it is worth, which is spoken too."""
    answer = escape(example.prediction) or "<em>nothing</em>"
    if example.credit is None:
        return f"<dd>{answer}</dd>"
    kind, sign, spoken = ("right", "✓", "right") if example.credit >= 1 else ("wrong", "✗", "wrong")
    if 0 < example.credit < 1:
        kind, sign, spoken = "even", f"{100 * example.credit:.0f}\u00a0%", "counts in part:"
    return f'<dd class="{kind}"><span aria-label="{spoken}">{sign}</span> {answer}</dd>'


def _configuration(config: Mapping[str, Any]) -> str:
    return markup.section("Configuration", markup.details("config", markup.as_json(config))) if config else ""
