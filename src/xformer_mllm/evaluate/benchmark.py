"""The interface of a benchmark: records, images, generation settings, scores and the official results file.

Each benchmark is one file in this package with a subclass of `Benchmark`; `evaluation.py` lists them.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from PIL import Image

from xformer_mllm.data.questions import QUESTION_PROMPT, Question
from xformer_mllm.inference import GenerationSettings
from xformer_mllm.model.images import load_image

# {group: {metric: value}}: "all" first, "n" in every group; shares are in [0, 1], caption metrics as pycocoevalcap's.
# "ci95" is a pair: the 95 % interval of "accuracy".
Scores = dict[str, dict[str, Any]]

EXPORT_FILE = "export.json"
"""Marks a folder of scenes in a benchmark's format, written by `xformer data export`."""

# Zero-shot question answering with OPT: "paper" is BLIP-2's paper, "lavis" is LAVIS's vqav2_zeroshot_opt_eval.yaml with
# the length penalty of `Blip2OPT.predict_answers`.
_BLIP2 = GenerationSettings(
    prompt=QUESTION_PROMPT, num_beams=5, length_penalty=-1.0, max_new_tokens=10, min_new_tokens=1
)
_LAVIS_PROMPT = "Question: {question} Short answer:"
ZERO_SHOT = {
    "paper": _BLIP2,
    "lavis": replace(_BLIP2, prompt=_LAVIS_PROMPT, length_penalty=0.0, plain_question=True),
}


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """An image to caption."""

    id: str
    image_id: str


Record = TypeVar("Record", Question, CaptionRecord)


class Benchmark(ABC, Generic[Record]):
    """A set of questions or images in its official files.

    Args:
        data: the folder that holds `files`.
        split: one of `splits`.
        images: the folder of the images; None for the official place in `data`.

    Raises:
        FileNotFoundError, ValueError: if a file is missing or invalid.
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    """The first is the default."""
    settings: ClassVar[Mapping[str, GenerationSettings]]
    """By name; the first is the default."""
    normalisation: ClassVar[str]
    """How an answer is normalised before it is compared."""
    files: ClassVar[str]
    """Required content of the data folder."""
    result_keys: ClassVar[tuple[str, str]]
    """Keys of the record's id and of the answer in the official results, a list of objects."""
    id_type: ClassVar[type] = int
    """Type of the record's id in the official results."""

    records: Sequence[Record]
    """In the official file's order."""
    not_computed: Mapping[str, str] = {}
    """Metric -> why it was not computed."""
    notes: Sequence[str] = ()
    """Caveats, printed with the scores."""

    @abstractmethod
    def __init__(self, data: Path, split: str, images: Path | None = None): ...

    @abstractmethod
    def image_file(self, record: Record) -> Path:
        """Path of a record's image."""

    def load(self, record: Record) -> Image.Image:
        """Load a record's image. Raises OSError or ValueError if it is missing or broken."""
        return load_image(self.image_file(record))

    def answered(self, answers: Mapping[str, str]) -> list[Record]:
        """The records that have an answer, in order."""
        return [record for record in self.records if record.id in answers]

    @abstractmethod
    def score(self, answers: Mapping[str, str]) -> Scores:
        """{record id: answer} -> scores over those records; "n" is their number."""

    def truth(self, record: Record) -> str:
        """The right answer to show with a prediction; "" if it is not public."""
        return getattr(record, "answer", None) or ""

    def credit(self, record: Record, answer: str) -> float | None:
        """Score of one answer in [0, 1]; None if answers only score together or the truth is not public."""
        return None

    def predictions(self, answers: Mapping[str, str]) -> list[dict[str, Any]]:
        """The answered records with "prediction" and, if single answers are scored, "credit"."""
        rows = []
        for record in self.answered(answers):
            answer = answers[record.id]
            credit = self.credit(record, answer)
            rows.append({**asdict(record), "prediction": answer, **({} if credit is None else {"credit": credit})})
        return rows

    def official(self, answers: Mapping[str, str]) -> list[dict[str, Any]]:
        """{record id: answer} -> JSON value for the official server or scorer."""
        id_key, answer_key = self.result_keys
        return [{id_key: self.id_type(record.id), answer_key: answers[record.id]} for record in self.answered(answers)]

    def read_official(self, content: Any) -> list[tuple[str, str]]:
        """The inverse of `official`: (record id, answer), repeated ids included. Raises ValueError for another format."""
        id_key, answer_key = self.result_keys
        hint = f'; expected [{{"{id_key}": {self.id_type.__name__}, "{answer_key}": str}}, ...]'
        if not isinstance(content, list):
            raise ValueError(f"not a list{hint}")
        rows = [(f"entry {index}", row) for index, row in enumerate(content)]
        return [
            (str(field(row, id_key, self.id_type, where, hint)), field(row, answer_key, str, where, hint))
            for where, row in rows
        ]


def field(row: Any, key: str, kind: type, where: str, hint: str = "") -> Any:
    """Return row[key]. Raises ValueError naming `where` if it is missing or of another type."""
    value = row.get(key) if isinstance(row, dict) else None
    if type(value) is not kind:  # isinstance would take true for a number
        raise ValueError(f'{where}: "{key}" is missing or not of type {kind.__name__}{hint}')
    return value


def check_images(file: Path, split: str, ids: Sequence[str]) -> None:
    """Raise ValueError if image ids are repeated, or there are none."""
    if not ids:
        raise ValueError(f"{file}: no images in the split {split!r}")
    if repeated := [name for name, times in Counter(ids).items() if times > 1]:
        raise ValueError(f"{file}: {len(repeated)} repeated image ids ({', '.join(repeated[:3])})")
