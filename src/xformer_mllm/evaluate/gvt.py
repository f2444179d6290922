"""GVTBench: counting the objects of a class in an image, and whether the image shows one, on COCO and VCR.

The same answers get two scores. "all" is GVT's own (count.py and multiclass.py in gvt/modules/evaluations of
github.com/TencentARC/GVT), with its parser's quirks: number words are replaced inside other words too, so "someone"
contains a 1; "nine" is misspelt "nive"; capital letters are not understood; an answer without a number is a 0; the "no" in
"know" is a no. "strict" is the corrected one: number words up to twenty in any case, the first number that is a whole
word; yes or no as the first word. An unreadable answer is wrong, and "unparsed" is their share.

The sets are skewed, so the constant answers "1" and "yes" are scored too. Three traps of the files:
- GVT's repository holds two different coco_oc.json, with very different shares of the answer 1.
- VCR's identification spells "exist" as "exis" in the questions whose answer is no. They are not corrected.
- VCR's files hold some questions several times. Each counts, as upstream.
"""

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

from xformer_mllm.data.questions import Question
from xformer_mllm.evaluate.benchmark import ZERO_SHOT, Benchmark, Scores, field
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
# A number that is not part of a word, of 2.5 or of 1,000.
NUMBER = re.compile(rf"(?<!\w)(?<!\d[.,])(?:\d+|{'|'.join(NUMBERS)})(?!\w|[.,]\d)")
YES_OR_NO = re.compile(r"\W*(yes|no)(?!\w)")

FIRST_OF_BIN = {"objects:1-9": 0, "objects:10-19": 10, "objects:20+": 20}  # as multiclass.py's
NUMBERS_IN_BIN = 3  # of count.py's bins by the right number


class Row(NamedTuple):
    """A model's text, the file's answer, and the number of objects of any class in the image."""

    text: str
    truth: str
    objects: int


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
    """Whether upstream accepts `text` as `truth` ("Yes." or "No."); a text with both is always right."""
    text = text.lower()
    return ("Yes" in truth and "yes" in text) or ("No" in truth and "no" in text)


def strict_yes(text: str) -> bool | None:
    """Whether the first word is yes; None if it is neither yes nor no."""
    found = YES_OR_NO.match(text.lower())
    return found[1] == "yes" if found else None


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
    """Both scores, the constant answer's score, and both scores by the number of objects in the image."""
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
    """In MAE and RMSE an answer without a number is a 0, as upstream: an empty answer must not be rewarded."""
    pairs = [((strict_number if strict else gvt_number)(row.text), int(row.truth)) for row in rows]
    errors = [(number or 0.0) - truth for number, truth in pairs]
    return {
        "accuracy": fmean(number == truth for number, truth in pairs),
        "MAE": sum(map(abs, errors)) / len(rows),
        "RMSE": math.sqrt(sum(error * error for error in errors) / len(rows)),
        **({"unparsed": fmean(number is None for number, _ in pairs)} if strict else {}),
        "n": len(rows),
    }


def _identification(rows: Sequence[Row], strict: bool) -> dict[str, float]:
    if not strict:
        return {"accuracy": fmean(gvt_agrees(row.text, row.truth) for row in rows), "n": len(rows)}
    pairs = [(strict_yes(row.text), strict_yes(row.truth)) for row in rows]
    unparsed = fmean(answer is None for answer, _ in pairs)
    return {"accuracy": fmean(answer is truth for answer, truth in pairs), "unparsed": unparsed, "n": len(rows)}


class _Gvt(Benchmark[Question]):
    """One of the four lists of GVTBench. An entry's id is its index in the list.

    Settings: the X-Former paper does not give its prompt. "blip2", the default, is BLIP-2's zero-shot protocol for OPT, as
    in the other question sets: OPT continues a text, so it may not answer a bare question. "paper" is GVT's own code for
    its instruction-tuned model: the bare question, greedy.
    """

    splits = ("coco", "vcr")
    settings = {
        "blip2": ZERO_SHOT["paper"],
        "paper": GenerationSettings(prompt="{question}", num_beams=1, length_penalty=1.0, max_new_tokens=32),
    }
    task: ClassVar[str]
    """Part of the file's name."""
    right_answer: ClassVar[re.Pattern]
    """Pattern of "text_out"."""

    def __init__(self, data: Path, split: str, images: Path | None = None):
        self.split = split
        self.images = images or data / {"coco": "val2017", "vcr": "vcr1images"}[split]
        file = data / f"{split}_{self.task}.json"
        self.entries = read_json(file)
        if not isinstance(self.entries, list) or not self.entries:
            raise ValueError(f"{file}: not a list of questions; take {self.files}")
        kinds = {"image_id": int if split == "coco" else str, "text_in": str, "text_out": str, "n_obj_exist": int}
        self.records = []
        for index, entry in enumerate(self.entries):
            where = f"{file}: entry {index}"
            image_id, question, answer, _ = (field(entry, key, kind, where) for key, kind in kinds.items())
            if not self.right_answer.fullmatch(answer):
                raise ValueError(f'{where}: "text_out" is {answer!r}, not an answer to {self.name}')
            self.records.append(Question(str(index), str(image_id), question, answer, self.task))

    def image_file(self, record: Question) -> Path:
        """COCO's number with twelve digits; VCR's path within vcr1images."""
        return self.images / (f"{int(record.image_id):012}.jpg" if self.split == "coco" else record.image_id)

    def score(self, answers: Mapping[str, str]) -> Scores:
        entries = [(record, self.entries[int(record.id)]) for record in self.answered(answers)]
        return self._scores([Row(answers[r.id], entry["text_out"], entry["n_obj_exist"]) for r, entry in entries])

    @abstractmethod
    def _scores(self, rows: Sequence[Row]) -> Scores: ...

    def official(self, answers: Mapping[str, str]) -> list[dict[str, Any]]:
        """The list that upstream's count.py writes and scores, with "index" added because an entry has no id."""
        return [
            {
                "index": index,
                "image_id": entry["image_id"],
                "pred": answers[str(index)],
                "gt": entry["text_out"],
                "n_obj_exist": entry["n_obj_exist"],
            }
            for index, entry in enumerate(self.entries)
            if str(index) in answers
        ]

    def read_official(self, content: Any) -> list[tuple[str, str]]:
        """Without "index", as upstream writes it, it must be the whole list in the questions' order.

        Raises ValueError also for a row whose "image_id" or "gt" is another question's.
        """
        if not isinstance(content, list):
            raise ValueError('not a list of {"image_id", "pred", "gt", "n_obj_exist"}')
        entries = dict(zip((record.id for record in self.records), self.entries, strict=True))
        pairs = []
        for index, row in enumerate(content):
            answer = field(row, "pred", str, f"entry {index}")
            if "index" not in row and len(content) != len(self.entries):
                raise ValueError(
                    f"{len(content):,} answers to {len(self.entries):,} questions: "
                    'each needs the "index" of its question'
                )
            name = str(row.get("index", index))
            if entry := entries.get(name):
                _check_same_question(row, entry, f"entry {index}", name)
            pairs.append((name, answer))
        return pairs


def _check_same_question(row: Mapping[str, Any], entry: Mapping[str, Any], where: str, name: str) -> None:
    """Raise ValueError if a row of results belongs to another question than `entry`.

    Upstream's processes append one after the other, so several of them change the order. With an "index" the other keys may
    be left out.
    """
    indexed = "index" in row
    for key, truth in (("image_id", entry["image_id"]), ("gt", entry["text_out"])):
        if (key in row or not indexed) and str(row.get(key)) != str(truth):
            advice = (
                "the answers are to another list of questions, or its index is wrong"
                if indexed
                else 'put the answers in the order of the questions, or give each the "index" of its question'
            )
            raise ValueError(
                f'{where}: "{key}" is {row.get(key)!r}, but {truth!r} in entry {name} of the questions; {advice}'
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
            ones = fmean(record.answer == "1" for record in self.records)
            self.notes = [
                "GVT's repository holds two different coco_oc.json (in GVTBench/ and in GVTBench/GVTBench/): compare "
                f"only scores on the same one; in this one {ones:.1%} of the answers are 1"
            ]

    def credit(self, record: Question, answer: str) -> float:
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
                f'the wording reveals answers: "exist" is spelled "exis" in {leaks[False]:,} of {len(said[False]):,} '
                f"questions whose answer is no and in {leaks[True]:,} of {len(said[True]):,} whose answer is yes; "
                "they are not corrected"
            ]

    def credit(self, record: Question, answer: str) -> float:
        return float(gvt_agrees(answer, record.answer or ""))

    def _scores(self, rows: Sequence[Row]) -> Scores:
        return identification_scores(rows)
