"""Sentences on the scores of a setting."""

from collections.abc import Mapping, Sequence
from typing import Any

from xformer_mllm.report.contents import BLIND, Setting, blind_keys
from xformer_mllm.report.wording import display_name, percent, plain, points, points_interval


def verdict(setting: Setting, variants: Sequence[str]) -> list[str]:
    """Sentences on the scores. A difference counts if its entry in `differences` is marked `clear`."""
    present = [variant for variant in variants if variant in setting.metrics]
    if not present:
        return []
    sentences = [overall(setting, variants)]
    for other in present[1:]:
        sentences += _by_type(setting, present[0], other)
    for variant in present:
        sentences += _below_blind(setting, variant)
    return sentences


def overall(setting: Setting, variants: Sequence[str]) -> str:
    """The result over all questions: each variant against the first, and the best baseline without the image."""
    first, *others = [variant for variant in variants if variant in setting.metrics]
    score = setting.metrics[first]["all"]
    sentences = [_against_first(setting, first, other) for other in others]
    if not others:
        sentences.append(f"{_answers(first, score)} of {score['n']:,} held-out questions correctly.")
    if blind_keys(setting):
        share, meaning = max((score[key], BLIND[key][1]) for key in BLIND if key in score)
        sentences.append(f"Without the image, the {meaning} is right in {percent(share)}.")
    return " ".join(sentences)


def _answers(variant: str, score: Mapping[str, Any]) -> str:
    return f"{display_name(variant)} answers {percent(score['accuracy'])}"


def _against_first(setting: Setting, first: str, other: str) -> str:
    score, base = setting.metrics[other]["all"], setting.metrics[first]["all"]
    scores = (
        f"{_answers(other, score)} of {base['n']:,} held-out questions correctly, "
        f"{display_name(first)} {percent(base['accuracy'])}"
    )
    entry = setting.differences.get(other, {}).get("all")
    if entry is None:
        return f"{scores}."
    difference, interval = entry["difference"], points_interval(entry["ci95"])
    if not entry["clear"]:
        return f"{scores}: no clear difference ({points(difference)} points, 95\u00a0% interval {interval})."
    ahead = f"{display_name(other if difference > 0 else first)} is ahead by {100 * abs(difference):.1f} points"
    return f"{scores}: {ahead} (95\u00a0% interval of the difference: {interval})."


def _by_type(setting: Setting, first: str, other: str) -> list[str]:
    differences = [
        (plain(group), entry["difference"], entry["clear"])
        for group, entry in setting.differences.get(other, {}).items()
        if group != "all" and ":" not in group
    ]
    if not differences:
        return []
    differences.sort(key=lambda item: -item[1])
    name, rival = display_name(other), display_name(first)
    ahead = [f"{group} ({points(gain)})" for group, gain, clear in differences if clear and gain > 0]
    behind = [f"{group} ({points(gain)})" for group, gain, clear in reversed(differences) if clear and gain < 0]
    even = [group for group, _, clear in differences if not clear]
    sentences = []
    if ahead:
        sentences.append(f"{name} is ahead of {rival} on {', '.join(ahead)}.")
    if behind:
        sentences.append(f"{name} is behind {rival} on {', '.join(behind)}.")
    if not ahead:
        sentences.append(f"{name} is not clearly ahead of {rival} on any type of question.")
    if even:
        sentences.append(f"No clear difference on {', '.join(even)}.")
    return sentences


def _below_blind(setting: Setting, variant: str) -> list[str]:
    """The types whose interval is not above the baselines without the image."""
    groups = [
        plain(group)
        for group, score in setting.metrics[variant].items()
        if group != "all" and ":" not in group and score["ci95"][0] <= max(score.get(key, -1) for key in BLIND)
    ]
    if not groups:
        return []
    return [f"{display_name(variant)} is not clearly better than a baseline without the image on {', '.join(groups)}."]
