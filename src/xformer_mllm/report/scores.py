"""The section on answers: verdict, a plot with intervals, tables."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from xformer_mllm.report import markup
from xformer_mllm.report.contents import BLIND, Report, Setting, blind_keys
from xformer_mllm.report.findings import verdict
from xformer_mllm.report.wording import display_name, percent, plain, points, points_interval


def scores_section(report: Report, setting: Setting) -> str:
    """One setting's results; empty without scores."""
    variants = [variant for variant in report.variants if variant in setting.metrics]
    if not variants:
        return ""
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(setting, report.variants))
    groups = list(setting.metrics[variants[0]])
    main = sorted((group for group in groups if ":" not in group), key=lambda group: group != "all")
    detail = [group for group in groups if ":" in group]
    return markup.section(
        f"Answers: {setting.name}",
        markup.paragraph(setting.note),
        f'<ul class="verdict">{sentences}</ul>',
        markup.paragraph(
            "Intervals are 95\u00a0% over the questions that were drawn. They hold for this one training run of each "
            "variant: another seed moves the scores too, and that is not in them.",
            "small",
        ),
        "<h3>By type of question</h3>",
        markup.legend(report, variants, blind_keys(setting)),
        _dot_plot(report, setting, variants, main),
        _score_table(setting, variants, main),
        markup.details("By GQA's structural and semantic types", _score_table(setting, variants, detail))
        if detail
        else "",
    )


def _dot_plot(report: Report, setting: Setting, variants: Sequence[str], groups: Sequence[str]) -> str:
    """One row per type, one dot with its interval per variant, a bar for what needs no image. Plain HTML, so that
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
    blind, compared = blind_keys(setting), [variant for variant in variants if variant in setting.differences]
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
    return markup.table(
        [escape(cell) for cell in head], rows, "Share of correct answers in %, with 95\u00a0% intervals"
    )


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


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
