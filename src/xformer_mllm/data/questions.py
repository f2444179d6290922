"""The record shared by all question data sets, and BLIP-2's prompts."""

from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

QUESTION_PROMPT = "Question: {question} Answer:"  # BLIP-2's for OPT
CAPTION_PROMPT = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one image.

    answer: None if the data set does not publish it. answers: those of all annotators, if there were several.
    question_type: the data set's own. structural (query, verify, choose, compare, logical), semantic (object,
    attribute, category, relation, global): GQA's types, None for other data sets.
    """

    id: str
    image_id: str
    question: str
    answer: str | None
    question_type: str
    structural: str | None = None
    semantic: str | None = None
    answers: tuple[str, ...] = ()

    def item(self, image: Image.Image) -> dict[str, Any]:
        """Return the record with its image, as an item of a data set."""
        return {**asdict(self), "image": image}


class ByImage(Dataset):
    """A question data set grouped by image: an item is the list of an image's questions.

    groups: the indices of each image's questions.
    """

    def __init__(self, questions: Dataset, groups: list[list[int]]):
        self.questions, self.groups = questions, groups

    @classmethod
    def of(cls, dataset: Any) -> "ByImage":
        """Group a data set, whose `questions` are records, by image."""
        groups: dict[str, list[int]] = {}
        for index, question in enumerate(dataset.questions):
            groups.setdefault(question.image_id, []).append(index)
        return cls(dataset, list(groups.values()))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.questions[question] for question in self.groups[index]]
