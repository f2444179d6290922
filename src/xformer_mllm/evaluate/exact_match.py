"""Exact match: accuracy by question type, blind baselines, and the comparison of two models.

The rule is GQA's: equal after lower-casing and stripping, as every answer is one word. Intervals: Wilson's for one model;
a bootstrap over images for the difference of two, since the questions of one image are not independent.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xformer_mllm.data.questions import Question

NORMALISATION = "exact match after lower-casing and stripping"
RESAMPLES = 2_000

# Minimum number of questions that just one of two models answers correctly, for a clear difference: with five, all in
# favour of one model, an exact McNemar test has p = 2 / 2**5 > 0.05; with six, p = 2 / 2**6 < 0.05.
MIN_DISAGREEMENTS = 6

# A question's record with "prediction" and "credit", 1.0 if it is right.
Prediction = dict[str, Any]


def is_right(answer: str, truth: str | None) -> bool:
    """Whether two answers match."""
    return truth is not None and answer.strip().lower() == truth.strip().lower()


@dataclass(frozen=True)
class Blind:
    """Answers without the image, learned from training questions.

    by_type: the most frequent answer to each type of question; by_words: to the exact words of each question.
    """

    by_type: Mapping[str, str]
    by_words: Mapping[str, str]

    @classmethod
    def learn(cls, training_questions: Iterable[Question]) -> "Blind":
        by_type: dict[str, Counter] = defaultdict(Counter)
        by_words: dict[str, Counter] = defaultdict(Counter)
        for question in training_questions:
            by_type[question.question_type][question.answer] += 1
            by_words[question.question][question.answer] += 1
        return cls(*({key: most.most_common(1)[0][0] for key, most in kind.items()} for kind in (by_type, by_words)))

    def guesses(self, row: Prediction) -> dict[str, str | None]:
        """The baselines' answers; "question_only" falls back on "majority" if the words are new."""
        majority = self.by_type.get(row["question_type"])
        return {"majority": majority, "question_only": self.by_words.get(row["question"], majority)}


def score(predictions: Sequence[Prediction], blind: Blind | None = None) -> dict[str, dict[str, Any]]:
    """Accuracy by group: "all", each question type, "structural:x" and "semantic:x".

    {group: {"accuracy", "n", "ci95": [low, high] (Wilson)}}; with `blind` also the accuracy of its answers, "majority" by
    type of question and "question_only" by the words.
    """
    scores = {}
    for group, rows in _grouped(predictions).items():
        right = sum(row["credit"] for row in rows)
        scores[group] = {"accuracy": right / len(rows), "n": len(rows), "ci95": wilson(right, len(rows))}
        if blind is not None:
            for name in ("majority", "question_only"):
                scores[group][name] = sum(blind.guesses(row)[name] == row["answer"] for row in rows) / len(rows)
    return scores


def _grouped(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Rows by group: "all", then the question types, then GQA's types, each in alphabetical order."""
    grouped: dict[str, list[Prediction]] = defaultdict(list)
    for row in predictions:
        types = [f"{kind}:{row[kind]}" for kind in ("structural", "semantic") if row[kind] is not None]
        for group in ("all", row["question_type"], *types):
            grouped[group].append(row)
    return dict(sorted(grouped.items(), key=lambda item: (item[0] != "all", ":" in item[0], item[0])))


def wilson(right: int, n: int, z: float = 1.959964) -> list[float]:
    """Wilson's score interval of a proportion (95 % by default), within [0, 1]."""
    share, spread = right / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def compare(first: Sequence[Prediction], second: Sequence[Prediction], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Compare `second` with `first` on the same questions.

    {group: {"difference", "ci95": [low, high], "n", "only_first", "only_second", "clear"}}: `only_first` counts the
    questions that only the first answered correctly. ci95 is a percentile bootstrap over images. `clear`: the interval
    excludes 0 and the two disagree on at least MIN_DISAGREEMENTS questions.

    Raises ValueError if the questions differ.
    """
    if [row["id"] for row in first] != [row["id"] for row in second]:
        raise ValueError("the two lists of predictions are not about the same questions in the same order")
    pairs = zip(first, second, strict=True)
    groups = _grouped([{**row, "gain": int(other["credit"]) - int(row["credit"])} for row, other in pairs])
    images = {image_id: index for index, image_id in enumerate(dict.fromkeys(row["image_id"] for row in first))}
    gains, asked = np.zeros((2, len(images), len(groups)))
    for column, rows in enumerate(groups.values()):
        for row in rows:
            gains[images[row["image_id"]], column] += row["gain"]
            asked[images[row["image_id"]], column] += 1
    found = {}
    for (group, rows), low, high in zip(groups.items(), *_bootstrap(gains, asked, seed), strict=True):
        of_group = [row["gain"] for row in rows]
        only_first, only_second = of_group.count(-1), of_group.count(1)
        found[group] = {
            "difference": sum(of_group) / len(rows),
            "ci95": [float(low), float(high)],
            "n": len(rows),
            "only_first": only_first,
            "only_second": only_second,
            "clear": bool(low > 0 or high < 0) and only_first + only_second >= MIN_DISAGREEMENTS,
        }
    return found


def _bootstrap(gains: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
    """2.5 % and 97.5 % quantiles of sum(gains) / sum(asked) over resampled images, float[2, groups].

    gains, asked: float[images, groups].
    """
    images = len(gains)
    weights = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    total = weights @ asked
    ratios = np.divide(weights @ gains, total, out=np.full_like(total, np.nan), where=total > 0)
    return np.nanquantile(ratios, (0.025, 0.975), axis=0)
