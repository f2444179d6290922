"""VQAv2: ten annotators' answers per question, in visualqa.org's files, scored by the official accuracy."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from xformer_mllm.data.questions import Question
from xformer_mllm.evaluate.benchmark import ZERO_SHOT, Benchmark, Scores, field
from xformer_mllm.evaluate.vqa_accuracy import vqa_accuracy
from xformer_mllm.files import read_json

DOWNLOAD_AGAIN = "; download the official file again"


class OfficialFiles(NamedTuple):
    """The names of a split in the data folder; `annotations` is None if the answers are not public."""

    questions: str
    annotations: str | None
    images: str


class Annotation(NamedTuple):
    """The answers to one question, one per annotator. raw_answers: as typed if `answers` are stemmed, else empty."""

    question_type: str
    answer_type: str
    answers: tuple[str, ...]
    raw_answers: tuple[str, ...]


class Vqav2(Benchmark[Question]):
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
    result_keys = ("question_id", "answer")

    def __init__(self, data: Path, split: str, images: Path | None = None):
        names = self.official_files[split]
        self._images = images or data / names.images
        self._image_name = f"COCO_{names.images}_{{:0>12}}.jpg"
        _, questions = _by_question_id(data / names.questions, "questions")
        self._annotations = self._read_annotations(data / names.annotations) if names.annotations else {}
        if names.annotations:
            _check_same_ids(data / names.questions, questions, data / names.annotations, self._annotations)
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
        type_names = field({"question_types": {}, **content}, "question_types", dict, str(path), DOWNLOAD_AGAIN)
        annotations = {}
        for name, (where, row) in rows.items():
            question_type = field(row, "question_type", str, where, DOWNLOAD_AGAIN)
            annotations[name] = Annotation(
                type_names.get(question_type, question_type),
                field(row, "answer_type", str, where, DOWNLOAD_AGAIN),
                _answers(row, "answer", where),
                _answers(row, "raw_answer", where) if self.has_raw_answers else (),
            )
        return annotations

    def _question(self, name: str, where: str, row: Any) -> Question:
        annotation = self._annotations.get(name)
        return Question(
            id=name,
            image_id=str(field(row, "image_id", int, where, DOWNLOAD_AGAIN)),
            question=field(row, "question", str, where, DOWNLOAD_AGAIN),
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
        answered = self.answered(answers)
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


def _by_question_id(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, tuple[str, Any]]]:
    """Read a file; return its content and {question id: (where, row)} of its list `kind`, in order."""
    content = read_json(path)
    rows: dict[str, tuple[str, Any]] = {}
    for index, row in enumerate(field(content, kind, list, str(path), DOWNLOAD_AGAIN)):
        where = f"{path}: {kind}[{index}]"
        name = str(field(row, "question_id", int, where, DOWNLOAD_AGAIN))
        if name in rows:
            raise ValueError(f"{where} repeats question_id {name}{DOWNLOAD_AGAIN}")
        rows[name] = (where, row)
    return content, rows


def _answers(row: Any, key: str, where: str) -> tuple[str, ...]:
    """One answer per annotator."""
    given = field(row, "answers", list, where, DOWNLOAD_AGAIN)
    if not given:
        raise ValueError(f'{where}: "answers" is empty{DOWNLOAD_AGAIN}')
    return tuple(field(item, key, str, f"{where}: answers[{n}]", DOWNLOAD_AGAIN) for n, item in enumerate(given))


def _check_same_ids(
    questions_file: Path, questions: Mapping[str, Any], annotations_file: Path, annotations: Mapping[str, Any]
) -> None:
    """Raise ValueError for a question without its annotation, or vice versa."""
    for file, ids, other_file, others in (
        (questions_file, questions, annotations_file, annotations),
        (annotations_file, annotations, questions_file, questions),
    ):
        if missing := [name for name in ids if name not in others]:
            raise ValueError(
                f"{other_file}: lacks {len(missing):,} question ids of {file} (first: {missing[0]}); "
                "take both files from one release"
            )
