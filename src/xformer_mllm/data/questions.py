"""One record for every set of questions about images, and the words in which they are asked."""

from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

QUESTION_PROMPT = "Question: {question} Answer:"  # BLIP-2's for OPT
CAPTION_PROMPT = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one image: the one record of every question set.

    `image_id` is shared by the questions of one image. `answer` is None where a set keeps its answers to itself;
    `answers` are those of every annotator, where there were several. `question_type` names the kind of question within
    its data set; `structural` (query, verify, choose, compare, logical) and `semantic` (object, attribute, category,
    relation, global) are GQA's types, None where a data set has none.
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
        """The record with its image: an item of a question data set."""
        return {**asdict(self), "image": image}


class ByImage(Dataset):
    """A question data set, image by image: an item is the list of an image's questions, in their order.

    Args:
        questions: the data set.
        groups: for each image the places of its questions in it.
    """

    def __init__(self, questions: Dataset, groups: list[list[int]]):
        self.questions, self.groups = questions, groups

    @classmethod
    def of(cls, dataset: Any) -> "ByImage":
        """`dataset`, whose `questions` are records, grouped by their image."""
        groups: dict[str, list[int]] = {}
        for index, question in enumerate(dataset.questions):
            groups.setdefault(question.image_id, []).append(index)
        return cls(dataset, list(groups.values()))

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.questions[place] for place in self.groups[index]]
