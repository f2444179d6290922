"""The section with examples: images, questions and what each variant answered."""

import random
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from xformer_mllm.report import markup
from xformer_mllm.report.contents import Report, Setting
from xformer_mllm.report.wording import display_name, plain


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
            if left["credit"] == left_is_right and right["credit"] != left_is_right
        ]
        sides.append(sorted(chooser.sample(places, min(number, len(places)))))
    return sides[0], sides[1]


def examples_section(report: Report, setting: Setting) -> str:
    """Questions at random, and those on which two variants part; empty without predictions."""
    variants = [variant for variant in report.variants if setting.predictions.get(variant)]
    if not variants:
        return ""
    chosen = choose_random(setting.predictions, 8, report.seed)
    parts = [
        markup.paragraph(f"Drawn at random from all questions (seed {report.seed}), right or wrong.", "small"),
        _cards(report, setting, variants, chosen),
    ]
    for other in variants[1:]:
        won, lost = choose_disagreements(setting.predictions, variants[0], other, 4, report.seed)
        for winner, loser, places in ((other, variants[0], won), (variants[0], other, lost)):
            if places:
                parts += [
                    f"<h3>Only {escape(display_name(winner))} is right</h3>",
                    markup.paragraph(
                        f"Chosen because {display_name(winner)} is right and {display_name(loser)} is not: "
                        "they show where the two differ, not how often.",
                        "small",
                    ),
                    _cards(report, setting, variants, places),
                ]
    return markup.section(f"Examples: {setting.name}", *parts)


def _cards(report: Report, setting: Setting, variants: Sequence[str], places: Iterable[int]) -> str:
    cards = []
    for place in places:
        row = setting.predictions[variants[0]][place]
        answers = "".join(_answer_line(report, variant, setting.predictions[variant][place]) for variant in variants)
        image = report.images(row["image_id"])
        shown = markup.image(image, f"Held-out image {row['image_id']}") if image is not None else ""
        cards.append(
            f'<figure class="card">{shown}<figcaption><p class="question">{escape(row["question"])}</p>'
            f"<dl><div><dt>truth</dt><dd>{escape(row['answer'])}</dd></div>{answers}</dl>"
            f'<p class="kind">{escape(plain(row["question_type"]))}</p></figcaption></figure>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _answer_line(report: Report, variant: str, row: Mapping[str, Any]) -> str:
    kind, sign, spoken = ("right", "✓", "right") if row["credit"] else ("wrong", "✗", "wrong")
    answer = escape(row["prediction"]) or "<em>nothing</em>"
    return (
        f"<div><dt>{markup.key(report, variant)}{escape(display_name(variant))}</dt>"
        f'<dd class="{kind}"><span aria-label="{spoken}">{sign}</span> {answer}</dd></div>'
    )
