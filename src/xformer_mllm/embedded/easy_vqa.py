"""easy-VQA (PyPI `easy-vqa`, github.com/vzhou842/easy-VQA): images of one shape, with external questions.

5,000 images of 64 x 64 pixels, each with one of three shapes in one of eight colours; 38,575 questions on the 4,000
images for training and 9,673 on the 1,000 for testing, about 13 answers. The images come with the package.
Validation is every tenth training image; the test questions are the score.
"""

import re
from collections.abc import Iterable
from types import ModuleType
from typing import Literal

from PIL import Image
from torch.utils.data import Dataset

from xformer_mllm.data.questions import Question

Split = Literal["train", "validation", "test"]

SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
VALIDATION_EVERY = 10  # every tenth training image, by number


class EasyVqaQuestions(Dataset):
    """The questions of a split, in the package's order. Item: `Question.item` of data/questions.py.

    question_type: "colour", "shape" (what ...?), "exists_colour", "exists_shape" (yes/no, half of them negated).
    """

    def __init__(self, split: Split):
        """Raises ValueError for an unknown split or if the package is missing."""
        self.questions = _read_questions(split)
        self._paths = _image_paths(split)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict:
        question = self.questions[index]
        return question.item(self.image(question.image_id))

    def image(self, image_id: str) -> Image.Image:
        """64x64 RGB."""
        return _open(self._paths[image_id])


class EasyVqaCaptions(Dataset):
    """One caption per image of a training split, derived from its questions and answers only.

    "what color is the shape?" blue, "is there a circle?" yes -> "a blue circle"; with only one of the two known,
    "a blue shape" or "a circle"; images with neither (39 of 4,000) are skipped. Item: {"id", "image", "caption"}.
    """

    def __init__(self, split: Literal["train", "validation"]):
        """Raises ValueError for any other split (the test questions are the score) or if the package is missing."""
        if split not in ("train", "validation"):
            raise ValueError(f"captions come from training questions only: split train or validation, not {split!r}")
        by_image: dict[str, list[Question]] = {}
        for question in _read_questions(split):
            by_image.setdefault(question.image_id, []).append(question)
        captions = {image_id: caption_from(questions) for image_id, questions in by_image.items()}
        self._items = [(image_id, caption) for image_id, caption in captions.items() if caption is not None]
        self._paths = _image_paths(split)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict:
        image_id, caption = self._items[index]
        return {"id": image_id, "image": _open(self._paths[image_id]), "caption": caption}


def caption_from(questions: Iterable[Question]) -> str | None:
    """A caption from the shape and colour that the answers of one image reveal; None if neither."""
    known = {word for question in questions for word in _known_from(question)}
    colour, shape = next(iter(known & COLOURS), None), next(iter(known & SHAPES), None)
    if colour is None and shape is None:
        return None
    return " ".join(["a", *([colour] if colour else []), shape or "shape"])


def _known_from(question: Question) -> set[str]:
    """The words for shape and colour that are true of the image, from one question and its answer."""
    words = set(_words(question.question))
    named = words & (SHAPES | COLOURS)
    if question.structural == "query":  # "what color is the circle?" blue: both words are true
        return named | {str(question.answer)}
    negated = bool(words & {"not", "no"})  # "is no circle present?" no: there is one
    return named if (question.answer == "yes") != negated else set()


def _read_questions(split: Split) -> list[Question]:
    easy_vqa = _package()
    if split not in ("train", "validation", "test"):
        raise ValueError(f"easy-VQA has the splits train, validation and test, not {split!r}")
    source = "test" if split == "test" else "train"
    texts, answers, images = easy_vqa.get_test_questions() if source == "test" else easy_vqa.get_train_questions()
    return [
        _question(f"{source}-{number}", f"{source}-{image}", text, answer)
        for number, (text, answer, image) in enumerate(zip(texts, answers, images, strict=True))
        if split == "test" or (image % VALIDATION_EVERY == 0) == (split == "validation")
    ]


def _question(question_id: str, image_id: str, text: str, answer: str) -> Question:
    if answer in ("yes", "no"):
        kind = "exists_colour" if set(_words(text)) & COLOURS else "exists_shape"
        return Question(question_id, image_id, text, answer, kind, structural="verify", semantic="object")
    kind, semantic = ("colour", "attribute") if answer in COLOURS else ("shape", "category")
    return Question(question_id, image_id, text, answer, kind, structural="query", semantic=semantic)


def _image_paths(split: Split) -> dict[str, str]:
    easy_vqa = _package()
    source = "test" if split == "test" else "train"
    paths = easy_vqa.get_test_image_paths() if source == "test" else easy_vqa.get_train_image_paths()
    return {f"{source}-{number}": path for number, path in paths.items()}


def _open(path: str) -> Image.Image:
    """The image as RGB; the package has 8-bit RGB PNG."""
    with Image.open(path) as image:
        return image.convert("RGB")


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _package() -> ModuleType:
    try:
        import easy_vqa
    except ImportError as error:
        raise ValueError("easy-VQA is not installed: pip install easy-vqa") from error
    return easy_vqa
