"""easy-VQA's own test questions."""

from collections.abc import Iterable

from PIL import Image

from xformer_mllm.data.easy_vqa import EasyVqaQuestions
from xformer_mllm.data.questions import Question
from xformer_mllm.evaluate.scenes import OwnQuestions


class EasyVqa(OwnQuestions):
    """The questions of a split of the package easy-vqa. Raises ValueError if it is not installed."""

    name = "easy-vqa"
    splits = ("test", "validation")

    def __init__(self, split: str):
        self._dataset = EasyVqaQuestions(split)  # type: ignore[arg-type]
        self.records = self._dataset.questions

    def load(self, record: Question) -> Image.Image:
        return self._dataset.picture(record.image_id)

    def training_questions(self) -> Iterable[Question]:
        return EasyVqaQuestions("train").questions
