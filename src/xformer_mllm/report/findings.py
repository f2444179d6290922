"""Sentences on the scores of a setting."""

from collections.abc import Sequence

from xformer_mllm.report.contents import BLIND, Setting, blind_keys
from xformer_mllm.report.wording import display_name, percent, plain, points, points_interval


def verdict(setting: Setting, variants: Sequence[str]) -> list[str]:
    """Sentences on the scores. A difference counts if its entry in `differences` is marked `clear`."""
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
    """The result over all questions: each variant against the first, and the best baseline without the image."""
    first, *others = [variant for variant in variants if variant in setting.metrics]
    sentences = [_overall_sentence(setting, first, other) for other in others] or [_alone_sentence(setting, first)]
    score = setting.metrics[first]["all"]
    blind = max((score[key], BLIND[key][1]) for key in BLIND if key in score) if blind_keys(setting) else None
    if blind is not None:
        sentences.append(f"Without the image, the {blind[1]} is right in {percent(blind[0])}.")
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
        sentences.append(f"{name} is not clearly ahead of {rival} on any type of question.")
    if even:
        sentences.append(f"No clear difference on {', '.join(plain(group) for group in even)}.")
    return sentences


def _below_blind_sentence(setting: Setting, variant: str) -> list[str]:
    """The types whose interval is not above the baselines without the image."""
    groups = [
        plain(group)
        for group, score in setting.metrics[variant].items()
        if group != "all" and ":" not in group and score["ci95"][0] <= max(score.get(key, -1) for key in BLIND)
    ]
    if not groups:
        return []
    return [f"{display_name(variant)} is not clearly better than a baseline without the image on {', '.join(groups)}."]
