"""The interface of a benchmark: records, images, generation settings, scores and the official results file.

Each benchmark is one file in this package with a subclass of `Benchmark`; `evaluation.py` lists them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
ZERO_SHOT = {
    "paper": GenerationSettings(
        prompt=QUESTION_PROMPT, num_beams=5, length_penalty=-1.0, max_new_tokens=10, min_new_tokens=1
    ),
    "lavis": GenerationSettings(
        prompt="Question: {question} Short answer:",
        num_beams=5,
        length_penalty=0.0,
        max_new_tokens=10,
        min_new_tokens=1,
        plain_question=True,
    ),
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
        """A record's image. Raises OSError or ValueError if it is missing or broken."""
        return load_image(self.image_file(record))

    @abstractmethod
    def score(self, answers: Mapping[str, str]) -> Scores:
        """{record id: answer} -> scores over those records; "n" is their number."""

    def truth(self, record: Record) -> str:
        """The right answer to show with a prediction; "" if it is not public."""
        return getattr(record, "answer", None) or ""

    def credit(self, record: Record, answer: str) -> float | None:
        """Score of one answer in [0, 1]; None if answers only score together or the truth is not public."""
        return None

    @abstractmethod
    def official(self, answers: Mapping[str, str]) -> Any:
        """{record id: answer} -> JSON value for the official server or scorer."""

    @abstractmethod
    def read_official(self, content: Any) -> list[tuple[str, str]]:
        """The inverse of `official`: (record id, answer), repeated ids included. Raises ValueError for another format."""
