"""VQAv2: ten annotators' answers per question, in visualqa.org's files, scored by the official accuracy."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from xformer_mllm.data.questions import Question
from xformer_mllm.evaluate.benchmark import ZERO_SHOT, Benchmark, Scores
from xformer_mllm.evaluate.vqa_accuracy import vqa_accuracy
from xformer_mllm.files import read_json

Value = TypeVar("Value")

DOWNLOAD_AGAIN = "download the official file again"
RESULTS_FORM = 'the official results are [{"question_id": 1, "answer": "yes"}, ...]'


@dataclass(frozen=True)
class OfficialFiles:
    """One split's names in the data folder; `annotations` is None where the answers are not public."""

    questions: str
    annotations: str | None
    images: str


@dataclass(frozen=True, slots=True)
class Annotation:
    """The answers to one question, one per annotator.

    raw_answers: as they were typed, where `answers` are stemmed (OK-VQA); otherwise empty.
    """

    question_type: str
    answer_type: str
    answers: tuple[str, ...]
    raw_answers: tuple[str, ...]


class Vqav2(Benchmark):
    """VQAv2 by the official accuracy: overall, by type of answer and by type of question ("question:how many").

    "paper" is BLIP-2's paper with OPT. "lavis" is LAVIS's vqav2_zeroshot_opt_eval.yaml with the length penalty of
    `Blip2OPT.predict_answers`; LAVIS also scores by a changed rule (`vqa_accuracy.py`), which is not reproduced here.
    """

    name = "vqav2"
    splits: ClassVar[tuple[str, ...]] = ("val", "test-dev", "test")
    settings = ZERO_SHOT
    normalisation = (
        "the official VQA evaluation's: punctuation, case, number words, articles and contractions, "
        "but none where all annotators gave the same answer"
    )
    files = (
        "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and the images "
        "val2014/COCO_val2014_*.jpg; for the test splits v2_OpenEnded_mscoco_test-dev2015_questions.json or "
        "v2_OpenEnded_mscoco_test2015_questions.json and the images test2015/COCO_test2015_*.jpg"
    )
    official_files: ClassVar[Mapping[str, OfficialFiles]] = {
        "val": OfficialFiles(
            "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json", "val2014"
        ),
        "test-dev": OfficialFiles("v2_OpenEnded_mscoco_test-dev2015_questions.json", None, "test2015"),
        "test": OfficialFiles("v2_OpenEnded_mscoco_test2015_questions.json", None, "test2015"),
    }
    has_raw_answers: ClassVar[bool] = False

    records: Sequence[Question]

    def __init__(self, data: Path, split: str, images: Path | None = None):
        names = self.official_files[split]
        self._images = images or data / names.images
        self._image_name = f"COCO_{names.images}_{{:0>12}}.jpg"
        _, questions = _by_question_id(data / names.questions, "questions")
        self._annotations = self._read_annotations(data / names.annotations) if names.annotations else {}
        if names.annotations:
            _check_same(data / names.questions, questions, data / names.annotations, self._annotations)
        else:
            self.not_computed = {
                "accuracy": f"the answers to {split} are not public; the VQA server scores official.json"
            }
        if split == "test-dev":
            self.notes = ("the VQA server scores test-dev from the answers to all of test: upload those",)
        self.records = [self._question(name, *found) for name, found in questions.items()]

    def _read_annotations(self, path: Path) -> dict[str, Annotation]:
        content, rows = _by_question_id(path, "annotations")
        # OK-VQA's types have a code ("one") and a name.
        type_names = _field(str(path), {"question_types": {}, **content}, "question_types", dict)
        return {name: self._annotation(*found, type_names) for name, found in rows.items()}

    def _annotation(self, place: str, row: Any, type_names: Mapping[str, str]) -> Annotation:
        question_type = _field(place, row, "question_type", str)
        return Annotation(
            type_names.get(question_type, question_type),
            _field(place, row, "answer_type", str),
            _answers(place, row, "answer"),
            _answers(place, row, "raw_answer") if self.has_raw_answers else (),
        )

    def _question(self, name: str, place: str, row: Any) -> Question:
        annotation = self._annotations.get(name)
        return Question(
            id=name,
            image_id=str(_field(place, row, "image_id", int)),
            question=_field(place, row, "question", str),
            answer=Counter(annotation.answers).most_common(1)[0][0] if annotation else None,
            question_type=annotation.question_type if annotation else "",
            answers=annotation.answers if annotation else (),
        )

    def image_file(self, record: Question) -> Path:
        return self._images / self._image_name.format(record.image_id)

    def credit(self, record: Question, answer: str) -> float | None:
        """The official accuracy of one answer; None if the answers are not public."""
        return vqa_accuracy(answer, record.answers) if record.answers else None

    def score(self, answers: Mapping[str, str]) -> Scores:
        """{"all", answer types, "question:" types: {"accuracy", "n"}}; only {"all": {"n"}} without known answers."""
        worth: dict[str, list[float]] = defaultdict(list)
        answered = [record for record in self.records if record.id in answers]
        for record in answered:
            if (credit := self.credit(record, answers[record.id])) is not None:
                for group in self._groups(record):
                    worth[group].append(credit)
        scores = {
            group: {"accuracy": sum(worth[group]) / len(worth[group]), "n": len(worth[group])}
            for group in sorted(worth, key=lambda group: (group != "all", ":" in group, group))
        }
        return scores or {"all": {"n": len(answered)}}

    def _groups(self, record: Question) -> list[str]:
        return ["all", self._annotations[record.id].answer_type, f"question:{record.question_type}"]

    def official(self, answers: Mapping[str, str]) -> list[dict[str, Any]]:
        """Input of the VQA server and vqaEval.py: [{"question_id": int, "answer"}]."""
        return [
            {"question_id": int(record.id), "answer": answers[record.id]}
            for record in self.records
            if record.id in answers
        ]

    def read_official(self, content: Any) -> list[tuple[str, str]]:
        if not isinstance(content, list):
            raise ValueError(f"not a list; {RESULTS_FORM}")
        return [
            (
                str(_field(place, row, "question_id", int, RESULTS_FORM)),
                _field(place, row, "answer", str, RESULTS_FORM),
            )
            for place, row in ((f"entry {number}", row) for number, row in enumerate(content))
        ]


def _by_question_id(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """The whole file; and {question id: (place for an error to name, row)} of its list `kind`, in order."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(kind), list):
        raise ValueError(f"{path}: has no list {kind!r}; {DOWNLOAD_AGAIN}")
    rows: dict[str, tuple[str, Any]] = {}
    for index, row in enumerate(content[kind]):
        place = f"{path}: {kind}[{index}]"
        name = str(_field(place, row, "question_id", int))
        if name in rows:
            raise ValueError(f"{place} repeats question_id {name}; {DOWNLOAD_AGAIN}")
        rows[name] = (place, row)
    return content, rows


def _answers(place: str, row: Any, key: str) -> tuple[str, ...]:
    """One answer per annotator."""
    given = _field(place, row, "answers", list)
    if not given:
        raise ValueError(f"{place}: 'answers' is empty; {DOWNLOAD_AGAIN}")
    return tuple(_field(f"{place}: answers[{index}]", answer, key, str) for index, answer in enumerate(given))


def _field(place: str, row: Any, key: str, kind: type[Value], hint: str = DOWNLOAD_AGAIN) -> Value:
    if not isinstance(row, dict) or key not in row:
        raise ValueError(f"{place} has no {key!r}; {hint}")
    if type(row[key]) is not kind:  # isinstance would take true for a number
        raise ValueError(f"{place}: {key!r} is {type(row[key]).__name__}, not {kind.__name__}; {hint}")
    return row[key]


def _check_same(
    questions_file: Path, questions: Mapping[str, Any], annotations_file: Path, annotations: Mapping[str, Any]
) -> None:
    """Raises ValueError for a question without its annotation, or the reverse."""
    for file, there, other_file, here in (
        (questions_file, questions, annotations_file, annotations),
        (annotations_file, annotations, questions_file, questions),
    ):
        if lacking := [name for name in there if name not in here]:
            raise ValueError(
                f"{other_file}: lacks {len(lacking):,} question ids of {file} (first: {lacking[0]}); "
                "take both files from one release"
            )
