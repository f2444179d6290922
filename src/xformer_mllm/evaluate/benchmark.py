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
"""In a folder of files that `xformer data export` wrote: they hold scenes, not the benchmark."""

# How an OPT is asked in zero-shot question answering: by BLIP-2's paper, and by LAVIS's vqav2_zeroshot_opt_eval.yaml with
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
        images: the folder of the images, if they are not in the usual place in `data`.

    Raises:
        FileNotFoundError, ValueError: in one line that names the file, if one is missing or not as it should be.
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]
    """The first is the default."""
    settings: ClassVar[Mapping[str, GenerationSettings]]
    """By name; the first is the default."""
    normalisation: ClassVar[str]
    """What is done to an answer before it is compared, in one sentence."""
    files: ClassVar[str]
    """What the data folder must hold."""

    records: Sequence[Record]
    """In the official file's order."""
    not_computed: Mapping[str, str] = {}
    """Metric -> why it is not among the scores."""
    notes: Sequence[str] = ()
    """What a reader of the scores must know."""

    @abstractmethod
    def __init__(self, data: Path, split: str, images: Path | None = None): ...

    @abstractmethod
    def image_file(self, record: Record) -> Path:
        """Where a record's image is."""

    def load(self, record: Record) -> Image.Image:
        """A record's image. Raises OSError or ValueError if it is missing or broken."""
        return load_image(self.image_file(record))

    @abstractmethod
    def score(self, answers: Mapping[str, str]) -> Scores:
        """{record id: answer} -> scores over those records; "n" says how many they are."""

    def truth(self, record: Record) -> str:
        """The right answer, as it is shown beside a model's; "" where nobody knows it."""
        return getattr(record, "answer", None) or ""

    def credit(self, record: Record, answer: str) -> float | None:
        """What one answer is worth, from 0 to 1; None where answers only score together, or nobody knows."""
        return None

    @abstractmethod
    def official(self, answers: Mapping[str, str]) -> Any:
        """{record id: answer} -> the JSON value that the official server or scorer takes."""

    @abstractmethod
    def read_official(self, content: Any) -> list[tuple[str, str]]:
        """The inverse of `official`: (record id, answer), repeated ones too. Raises ValueError if it has another form."""
