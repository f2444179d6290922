"""Exact match: accuracy by question type, blind baselines, and the comparison of two models.

The rule is GQA's, as every answer here is one word: equal after lower-casing and stripping. Intervals: Wilson's for one
model; for the difference of two a bootstrap over images, since the questions of one image are not independent.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xformer_mllm.data.questions import Question

NORMALISATION = "exact match after lower-casing and stripping"
RESAMPLES = 2_000

# Fewer questions than this on which just one of two models is right cannot tell them apart: with five, all in favour
# of one model, an exact McNemar test has p = 2 / 2**5 > 0.05; with six, p = 2 / 2**6 < 0.05.
FEWEST_DISAGREEMENTS = 6

# A question's record with "prediction" and "credit", 1.0 if it is right.
Prediction = dict[str, Any]


def is_right(answer: str, truth: str | None) -> bool:
    """Whether two answers match."""
    return truth is not None and answer.strip().lower() == truth.strip().lower()


def predictions_of(questions: Iterable[Question], answers: Mapping[str, str]) -> list[Prediction]:
    """The questions that are answered, as rows."""
    return [
        {
            **asdict(question),
            "prediction": answers[question.id],
            "credit": float(is_right(answers[question.id], question.answer)),
        }
        for question in questions
        if question.id in answers
    ]


@dataclass(frozen=True)
class Blind:
    """What can be answered without the image, learned from training questions.

    by_type: the most frequent answer to each type of question; by_words: to each question's very words.
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

    def majority(self, row: Prediction) -> str | None:
        """The most frequent training answer to this type of question."""
        return self.by_type.get(row["question_type"])

    def from_words(self, row: Prediction) -> str | None:
        """The most frequent training answer to these words; to the type of question where the words are new."""
        return self.by_words.get(row["question"], self.majority(row))


def score(predictions: Sequence[Prediction], blind: Blind | None = None) -> dict[str, dict[str, Any]]:
    """Accuracy by group: "all", each question type, "structural:x" and "semantic:x".

    {group: {"accuracy", "n", "ci95": [low, high] (Wilson)}}, and if `blind` is given, the accuracy of two baselines
    without the image: "majority" (most frequent training answer to the type of question) and "question_only" (to the words).
    """
    scores = {}
    for group, rows in _grouped(predictions).items():
        right = sum(row["credit"] for row in rows)
        scores[group] = {"accuracy": right / len(rows), "n": len(rows), "ci95": wilson(right, len(rows))}
        if blind is not None:
            scores[group]["majority"] = _share_right(rows, blind.majority)
            scores[group]["question_only"] = _share_right(rows, blind.from_words)
    return scores


def _share_right(rows: Sequence[Prediction], guess: Any) -> float:
    return sum(guess(row) == row["answer"] for row in rows) / len(rows)


def _groups(row: Prediction) -> list[str]:
    groups = ["all", row["question_type"]]
    return groups + [f"{kind}:{row[kind]}" for kind in ("structural", "semantic") if row[kind] is not None]


def _grouped(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Rows by group: "all" first, then the question types, then GQA's types, each in alphabetical order."""
    grouped: dict[str, list[Prediction]] = defaultdict(list)
    for row in predictions:
        for group in _groups(row):
            grouped[group].append(row)
    return {
        group: grouped[group] for group in sorted(grouped, key=lambda group: (group != "all", ":" in group, group))
    }


def wilson(right: int, n: int, z: float = 1.959964) -> list[float]:
    """Wilson's score interval of a proportion (95 % by default), within [0, 1]."""
    share, spread = right / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def compare(first: Sequence[Prediction], second: Sequence[Prediction], seed: int = 0) -> dict[str, dict[str, Any]]:
    """`second` minus `first` on the same questions.

    {group: {"difference", "ci95": [low, high], "n", "only_first", "only_second", "clear"}}: `only_first` counts the
    questions that only the first answered correctly. ci95 is a percentile bootstrap over images. `clear`: the
    interval leaves out 0 and the two disagree on enough questions to tell.

    Raises ValueError if the questions are not the same.
    """
    if [row["id"] for row in first] != [row["id"] for row in second]:
        raise ValueError("the two lists of predictions are not about the same questions in the same order")
    images = {image_id: place for place, image_id in enumerate(dict.fromkeys(row["image_id"] for row in first))}
    groups = {group: place for place, group in enumerate(_grouped(first))}
    gains, asked = np.zeros((2, len(images), len(groups)))
    only = np.zeros((2, len(groups)), dtype=int)
    for one, other in zip(first, second, strict=True):
        for group in _groups(one):
            gain = int(other["credit"]) - int(one["credit"])
            gains[images[one["image_id"]], groups[group]] += gain
            asked[images[one["image_id"]], groups[group]] += 1
            if gain:
                only[(gain + 1) // 2, groups[group]] += 1
    low, high = _bootstrap(gains, asked, seed)
    return {
        group: _difference(gains[:, place].sum(), int(asked[:, place].sum()), low[place], high[place], only[:, place])
        for group, place in groups.items()
    }


def _bootstrap(gains: np.ndarray, asked: np.ndarray, seed: int) -> np.ndarray:
    """2.5 % and 97.5 % points of sum(gains) / sum(asked) over resampled images.

    gains, asked: float[images, groups] -> float[2, groups].
    """
    images = len(gains)
    weights = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    total = weights @ asked
    ratios = np.divide(weights @ gains, total, out=np.full_like(total, np.nan), where=total > 0)
    return np.nanquantile(ratios, (0.025, 0.975), axis=0)


def _difference(gain: float, n: int, low: float, high: float, only: np.ndarray) -> dict[str, Any]:
    clear = (low > 0 or high < 0) and only.sum() >= FEWEST_DISAGREEMENTS
    return {
        "difference": float(gain) / n,
        "ci95": [float(low), float(high)],
        "n": n,
        "only_first": int(only[0]),
        "only_second": int(only[1]),
        "clear": bool(clear),
    }
