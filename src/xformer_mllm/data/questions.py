"""One record for every set of questions about pictures."""

from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one picture.

    `image_id` is shared by the questions of one picture. `question_type` names the kind of question within its data
    set; `structural` (query, verify, choose, compare, logical) and `semantic` (object, attribute, category, relation,
    global) are GQA's types, None where a data set has none.
    """

    id: str
    image_id: str
    question: str
    answer: str
    question_type: str
    structural: str | None = None
    semantic: str | None = None

    def item(self, image: Image.Image) -> dict[str, Any]:
        """The record with its picture: an item of a question data set."""
        return {**asdict(self), "image": image}
