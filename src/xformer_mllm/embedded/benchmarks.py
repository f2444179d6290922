"""Benchmarks that need no files: questions on held-out scenes and photographs, and easy-VQA's."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from xformer_mllm.data.questions import Question
from xformer_mllm.embedded.easy_vqa import EasyVqaQuestions
from xformer_mllm.embedded.photographs import PHOTOGRAPHS
from xformer_mllm.embedded.scenes import SCENES, image_of
from xformer_mllm.evaluate import exact_match
from xformer_mllm.evaluate.benchmark import Benchmark, Scores
from xformer_mllm.inference import GREEDY_ANSWER

TRAINING_SCENES = 4_000  # enough to find the most frequent answer to each type of question


class OwnQuestions(Benchmark[Question]):
    """Questions with one right answer, scored by exact match and compared with blind baselines.

    A subclass sets `records` and `training_questions`.
    """

    settings = {"greedy": GREEDY_ANSWER}
    normalisation = exact_match.NORMALISATION
    files = "no files: its images come with the package"
    result_keys = ("id", "answer")
    id_type = str

    def image_file(self, record: Question) -> Path:
        raise ValueError(f"{record.image_id}: this image is rendered, not read from a file")

    @abstractmethod
    def training_questions(self) -> Iterable[Question]:
        """Training questions of the blind baselines."""

    def credit(self, record: Question, answer: str) -> float:
        return float(exact_match.is_right(answer, record.answer))

    def score(self, answers: Mapping[str, str]) -> Scores:
        blind = exact_match.Blind.learn(self.training_questions())
        return exact_match.score(self.predictions(answers), blind)


class Scenes(OwnQuestions):
    """`size` scenes of a split, with `questions_per_image` questions on each."""

    name = "scenes"
    splits = ("test", "validation")
    world = SCENES

    def __init__(self, split: str, size: int, questions_per_image: int = 4, seed: int = 0):
        self.seed, self.questions_per_image = seed, questions_per_image
        scenes = [self.world.draw(split, index, seed) for index in range(size)]
        self._scenes = {scene.key: scene for scene in scenes}
        self.records = [question for scene in scenes for question in self.world.ask(scene, questions_per_image)]

    def load(self, record: Question) -> Image.Image:
        return image_of(self._scenes[record.image_id], self.world)

    def training_questions(self) -> Iterable[Question]:
        for index in range(TRAINING_SCENES):
            yield from self.world.ask(self.world.draw("train", index, self.seed), self.questions_per_image)


class Photographs(Scenes):
    """The same on photographs. Raises FileNotFoundError without their cut-outs."""

    name = "photographs"
    files = "no files: its images are drawn from Tux Paint's stamps"
    world = PHOTOGRAPHS


class EasyVqa(OwnQuestions):
    """The questions of a split of the package easy-vqa. Raises ValueError if it is not installed."""

    name = "easy-vqa"
    splits = ("test", "validation")

    def __init__(self, split: str):
        self._dataset = EasyVqaQuestions(split)  # type: ignore[arg-type]
        self.records = self._dataset.questions

    def load(self, record: Question) -> Image.Image:
        return self._dataset.image(record.image_id)

    def training_questions(self) -> Iterable[Question]:
        return EasyVqaQuestions("train").questions


BENCHMARKS: dict[str, Any] = {kind.name: kind for kind in (Scenes, Photographs, EasyVqa)}
