"""GVTBench: how many objects of a class an image shows, and whether it shows one, on COCO and VCR.

Two named scores of the same answers. "all" is GVT's own (count.py and multiclass.py in gvt/modules/evaluations of
github.com/TencentARC/GVT), with its parser's quirks: number words are replaced wherever they occur, so that "someone"
holds a 1; "nine" is misspelt "nive"; capital letters are not understood; an answer without a number is a 0; "no"
within "know" is a no. "strict" is the corrected one: number words up to twenty in any case, the first
number that is a whole word; yes or no as the first word; an unreadable answer is wrong, and "unparsed" is their share.

The sets are skewed, so the constant answers "1" and "yes" are scored beside the model's. Three traps of the files:
- GVT's repository holds two different coco_oc.json, with very different shares of the answer 1.
- VCR's identification spells "exist" as "exis" in the questions whose answer is no. They are asked as they are.
- VCR's files hold some questions several times; the scores count each, as upstream's do.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from xformer_mllm.data.questions import Question
from xformer_mllm.evaluate.benchmark import ZERO_SHOT, Benchmark, Scores
from xformer_mllm.files import read_json
from xformer_mllm.inference import GenerationSettings

# Upstream's table, in its order, with its misspelling.
GVT_WORDS = {
    "none": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nive": 9
}  # fmt: skip
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBERS = {"none": 0} | {word: number for number, word in enumerate(_WORDS.split())}
# A number that is no part of a word, of 2.5 or of 1,000.
NUMBER = re.compile(rf"(?<!\w)(?<!\d[.,])(?:\d+|{'|'.join(NUMBERS)})(?!\w|[.,]\d)")
YES_OR_NO = re.compile(r"\W*(yes|no)(?!\w)")

FIRST_OF_BIN = {"objects:1-9": 0, "objects:10-19": 10, "objects:20+": 20}  # as multiclass.py's
NUMBERS_IN_BIN = 3  # of count.py's bins by the right number


class Row(NamedTuple):
    """A model's text, the file's answer to it, and how many objects of any class the image shows."""

    text: str
    truth: str
    objects: int


# ------------------------------------------------------------------------------------------------------------- reading


def gvt_number(text: str) -> float:
    """The number that upstream reads."""
    for word, number in GVT_WORDS.items():
        text = text.replace(word, str(number))
    found = re.search(r"\d+", text)
    return float(found[0]) if found else 0.0  # float: Python refuses to make an int of thousands of digits


def strict_number(text: str) -> float | None:
    """The first number that stands alone, in digits or as a word up to twenty; None if there is none."""
    found = NUMBER.search(text.lower())
    return float(NUMBERS.get(found[0], found[0])) if found else None


def gvt_agrees(text: str, truth: str) -> bool:
    """Whether upstream takes `text` for `truth` ("Yes." or "No."); one that says both is always right."""
    text = text.lower()
    return ("Yes" in truth and "yes" in text) or ("No" in truth and "no" in text)


def strict_yes(text: str) -> bool | None:
    """Whether the first word is yes; None if it is neither yes nor no."""
    found = YES_OR_NO.match(text.lower())
    return found[1] == "yes" if found else None


# ------------------------------------------------------------------------------------------------------------- scoring


def counting_scores(rows: Sequence[Row]) -> Scores:
    """Accuracy, MAE and RMSE of object counting; also in upstream's bins by the right number ("answer:3-5")."""
    scores = _named_scores(rows, _counting, "1")
    for first in sorted({int(row.truth) // NUMBERS_IN_BIN * NUMBERS_IN_BIN for row in rows}):
        of_bin = [row for row in rows if 0 <= int(row.truth) - first < NUMBERS_IN_BIN]
        scores[f"answer:{first}-{first + NUMBERS_IN_BIN - 1}"] = _counting(of_bin, strict=False)
    return scores


def identification_scores(rows: Sequence[Row]) -> Scores:
    """Accuracy of multi-class identification."""
    return _named_scores(rows, _identification, "yes")


def _named_scores(rows: Sequence[Row], measure: Any, constant: str) -> Scores:
    """Both named scores, the constant answer's, and both by how many objects the image shows."""
    if not rows:
        return {"all": {"n": 0}}
    scores = {"all": measure(rows, strict=False), "strict": measure(rows, strict=True)}
    scores[f"always {constant}"] = measure([row._replace(text=constant) for row in rows], strict=False)
    bins: dict[str, list[Row]] = {name: [] for name in FIRST_OF_BIN}
    for row in rows:
        bins[[name for name, first in FIRST_OF_BIN.items() if row.objects >= first][-1]].append(row)
    for prefix, strict in (("", False), ("strict ", True)):
        scores |= {prefix + name: measure(of_bin, strict) for name, of_bin in bins.items() if of_bin}
    return scores


def _counting(rows: Sequence[Row], strict: bool) -> dict[str, float]:
    """Errors take an answer without a number for a 0, as upstream does: an empty answer must not be rewarded."""
    numbers = [(strict_number if strict else gvt_number)(row.text) for row in rows]
    truths = [int(row.truth) for row in rows]
    errors = [(number or 0.0) - truth for number, truth in zip(numbers, truths, strict=True)]
    return {
        "accuracy": _share(number == truth for number, truth in zip(numbers, truths, strict=True)),
        "MAE": sum(map(abs, errors)) / len(rows),
        "RMSE": math.sqrt(sum(error * error for error in errors) / len(rows)),
        **({"unparsed": _share(number is None for number in numbers)} if strict else {}),
        "n": len(rows),
    }


def _identification(rows: Sequence[Row], strict: bool) -> dict[str, float]:
    if not strict:
        return {"accuracy": _share(gvt_agrees(row.text, row.truth) for row in rows), "n": len(rows)}
    said = [strict_yes(row.text) for row in rows]
    right = (answer is strict_yes(row.truth) for answer, row in zip(said, rows, strict=True))
    return {"accuracy": _share(right), "unparsed": _share(answer is None for answer in said), "n": len(rows)}


def _share(answers: Any) -> float:
    answers = list(answers)
    return sum(answers) / len(answers)


# ---------------------------------------------------------------------------------------------------------- benchmarks


class _Gvt(Benchmark):
    """One of the four lists of GVTBench. An entry has no id: its index in the list is its id.

    Settings: the X-Former paper does not report its prompt. "blip2" is the default, BLIP-2's zero-shot protocol for
    OPT as in the other question sets: OPT continues a text, and after a bare question that need not be an answer.
    "paper" is GVT's own code for its instruction-tuned model: the bare question, greedy.
    """

    splits = ("coco", "vcr")
    settings = {
        "blip2": ZERO_SHOT["paper"],
        "paper": GenerationSettings(prompt="{question}", num_beams=1, length_penalty=1.0, max_new_tokens=32),
    }
    task: ClassVar[str]
    """Part of the file's name."""
    right_answer: ClassVar[re.Pattern]
    """What "text_out" looks like."""

    def __init__(self, data: Path, split: str, images: Path | None = None):
        self.split = split
        self.images = images or data / {"coco": "val2017", "vcr": "vcr1images"}[split]
        file = data / f"{split}_{self.task}.json"
        self.entries = read_json(file)
        if not isinstance(self.entries, list) or not self.entries:
            raise ValueError(f"{file}: not a list of questions; take {self.files}")
        for place, entry in enumerate(self.entries):
            self._check(file, place, entry)
        self.records = [
            Question(str(place), str(entry["image_id"]), entry["text_in"], entry["text_out"], self.task)
            for place, entry in enumerate(self.entries)
        ]

    def _check(self, file: Path, place: int, entry: Any) -> None:
        """Raises ValueError, naming the entry and the key, if an entry is not as GVTBench's are."""
        kinds = {"image_id": int if self.split == "coco" else str, "text_in": str, "text_out": str, "n_obj_exist": int}
        for key, kind in kinds.items():
            if not isinstance(entry, dict) or type(entry.get(key)) is not kind:
                raise ValueError(f'{file}: entry {place}: "{key}" is missing or not of type {kind.__name__}')
        if not self.right_answer.fullmatch(entry["text_out"]):
            raise ValueError(f'{file}: entry {place}: "text_out" is {entry["text_out"]!r}, no answer to {self.name}')

    def image_file(self, record: Question) -> Path:  # type: ignore[override]
        """COCO's number with twelve digits; VCR's path within vcr1images."""
        return self.images / (f"{int(record.image_id):012}.jpg" if self.split == "coco" else record.image_id)

    def score(self, answers: Mapping[str, str]) -> Scores:
        rows = [
            Row(answers[record.id], entry["text_out"], entry["n_obj_exist"])
            for record, entry in zip(self.records, self.entries, strict=True)
            if record.id in answers
        ]
        return self._scores(rows)

    @abstractmethod
    def _scores(self, rows: Sequence[Row]) -> Scores: ...

    def official(self, answers: Mapping[str, str]) -> list[dict[str, Any]]:
        """The list that upstream's count.py writes and scores; "index" is ours, as an entry has no id."""
        return [
            {
                "index": place,
                "image_id": entry["image_id"],
                "pred": answers[str(place)],
                "gt": entry["text_out"],
                "n_obj_exist": entry["n_obj_exist"],
            }
            for place, entry in enumerate(self.entries)
            if str(place) in answers
        ]

    def read_official(self, content: Any) -> list[tuple[str, str]]:
        """Also without "index", as upstream writes it: then it must be the whole list, in the questions' order."""
        if not isinstance(content, list):
            raise ValueError('not a list of {"image_id", "pred", "gt", "n_obj_exist"}')
        pairs = []
        for place, row in enumerate(content):
            if not isinstance(row, dict) or not isinstance(row.get("pred"), str):
                raise ValueError(f'entry {place}: "pred" is missing or not a string')
            if "index" not in row:
                self._check_place(place, row, len(content))
            pairs.append((str(row.get("index", place)), row["pred"]))
        return pairs

    def _check_place(self, place: int, row: Mapping[str, Any], rows: int) -> None:
        """Upstream's processes append one after the other, so several of them change the order."""
        if rows != len(self.entries):
            raise ValueError(
                f'{rows:,} answers to {len(self.entries):,} questions need an "index", each its question\'s'
            )
        entry = self.entries[place]
        if (str(row.get("image_id")), row.get("gt")) != (str(entry["image_id"]), entry["text_out"]):
            raise ValueError(
                f'entry {place}: another "image_id" or "gt" than the questions\' entry {place}; '
                "put the answers in the questions' order, or give each its question's \"index\""
            )


class GvtCounting(_Gvt):
    """Object counting (OC): "How many dogs are there in the image?", from 1 to 9."""

    name = "gvt-counting"
    files = (
        "coco_oc.json and COCO's val2017/, or vcr_oc.json and VCR's vcr1images/ (the lists are in GVTBench/ of "
        "github.com/TencentARC/GVT)"
    )
    normalisation = (
        "all: GVT's parser, number words replaced within words, then the first digits, else 0; "
        "strict: the first number that stands alone, zero to twenty also as a word, else wrong"
    )
    task = "oc"
    right_answer = re.compile(r"[0-9]{1,9}")

    def __init__(self, data: Path, split: str, images: Path | None = None):
        super().__init__(data, split, images)
        if split == "coco":
            ones = _share(record.answer == "1" for record in self.records)
            self.notes = [
                "GVT's repository holds two different coco_oc.json (in GVTBench/ and in GVTBench/GVTBench/): compare "
                f"only scores on the same one; in this one {ones:.1%} of the answers are 1"
            ]

    def credit(self, record: Question, answer: str) -> float:  # type: ignore[override]
        return float(gvt_number(answer) == int(record.answer or 0))

    def _scores(self, rows: Sequence[Row]) -> Scores:
        return counting_scores(rows)


class GvtIdentification(_Gvt):
    """Multi-class identification (MCI): "Does cell phone exist in the image?", yes or no."""

    name = "gvt-identification"
    files = (
        "coco_mci.json and COCO's val2017/, or vcr_mci.json and VCR's vcr1images/ (the lists are in GVTBench/ of "
        "github.com/TencentARC/GVT)"
    )
    normalisation = (
        'all: GVT\'s parser, right if the answer holds "yes" or "no" anywhere; strict: the first word is yes or no, '
        "else wrong"
    )
    task = "mci"
    right_answer = re.compile(r"(Yes|No)\.?")

    def __init__(self, data: Path, split: str, images: Path | None = None):
        super().__init__(data, split, images)
        said = {answer: [r for r in self.records if strict_yes(r.answer or "") is answer] for answer in (True, False)}
        leaks = {answer: sum(" exis " in r.question for r in records) for answer, records in said.items()}
        if any(leaks.values()):
            self.notes = [
                f'the wording gives answers away: "exis" for "exist" stands in {leaks[False]:,} of {len(said[False]):,} '
                f"questions whose answer is no and in {leaks[True]:,} of {len(said[True]):,} whose answer is yes; "
                "they are asked as they are"
            ]

    def credit(self, record: Question, answer: str) -> float:  # type: ignore[override]
        return float(gvt_agrees(answer, record.answer or ""))

    def _scores(self, rows: Sequence[Row]) -> Scores:
        return identification_scores(rows)
