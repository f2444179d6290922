"""easy-VQA: splits, question types, and captions that say no more than the training questions do."""

import sys

import numpy as np
import pytest

from xformer_mllm.data.questions import Question
from xformer_mllm.embedded.easy_vqa import (
    COLOURS,
    SHAPES,
    EasyVqaCaptions,
    EasyVqaQuestions,
    caption_from,
)

pytest.importorskip("easy_vqa", reason="needs the extra easy-vqa")


def questions(*pairs):
    return [
        Question("0", "0", text, answer, "", structural="verify" if answer in ("yes", "no") else "query")
        for text, answer in pairs
    ]


@pytest.mark.parametrize(
    ("pairs", "caption"),
    [
        ([("what color is the shape?", "blue"), ("what shape is present?", "circle")], "a blue circle"),
        ([("what is the color of the triangle?", "red")], "a red triangle"),
        ([("what is the teal shape?", "rectangle")], "a teal rectangle"),
        ([("what shape does the image contain?", "circle")], "a circle"),
        ([("what color is the shape?", "gray")], "a gray shape"),
        ([("is there a blue shape?", "yes")], "a blue shape"),
        ([("does the image contain a circle?", "yes"), ("is a red shape present?", "yes")], "a red circle"),
        ([("is there not a blue shape in the image?", "no")], "a blue shape"),
        ([("is no circle present?", "no")], "a circle"),
        ([("does the image not contain a gray shape?", "no")], "a gray shape"),
        ([("is there a blue shape?", "no")], None),
        ([("is there not a circle?", "yes")], None),
        ([("is there a blue shape?", "no"), ("is there a circle?", "yes")], "a circle"),
        ([], None),
    ],
)
def test_captions_are_derived_from_questions(pairs, caption):
    assert caption_from(questions(*pairs)) == caption


def test_splits_do_not_share_images_or_questions():
    splits = {split: EasyVqaQuestions(split).questions for split in ("train", "validation", "test")}
    images = {split: {question.image_id for question in records} for split, records in splits.items()}
    assert {split: len(ids) for split, ids in images.items()} == {"train": 3600, "validation": 400, "test": 1000}
    assert len(set().union(*images.values())) == 5000
    assert len(splits["train"]) + len(splits["validation"]) == 38575
    assert len(splits["test"]) == 9673
    assert len({question.id for records in splits.values() for question in records}) == 38575 + 9673


def test_items_and_types():
    dataset = EasyVqaQuestions("test")
    item = dataset[0]
    assert set(item) == {
        "id",
        "image_id",
        "image",
        "question",
        "answer",
        "question_type",
        "structural",
        "semantic",
        "answers",
    }
    assert (item["image"].mode, item["image"].size) == ("RGB", (64, 64))
    answers: dict[str, set] = {}
    for question in dataset.questions:
        answers.setdefault(question.question_type, set()).add(question.answer)
    assert answers == {
        "colour": COLOURS,
        "shape": SHAPES,
        "exists_colour": {"yes", "no"},
        "exists_shape": {"yes", "no"},
    }
    assert all(
        any(colour in question.question for colour in COLOURS)
        for question in dataset.questions
        if question.question_type == "exists_colour"
    )


def test_captions_agree_with_the_image():
    """The colour that the caption names is the one that the image shows (checked for primary colours)."""
    seen = 0
    for item in EasyVqaCaptions("validation"):
        words = item["caption"].split()
        channel = {"red": 0, "green": 1, "blue": 2}.get(words[1])
        if channel is None:
            continue
        pixels = np.asarray(item["image"]).reshape(-1, 3)
        darkest = pixels[pixels.sum(-1, dtype=int).argmin()]  # the ground is light
        assert darkest[channel] == darkest.max(), item["id"]
        seen += 1
    assert seen > 80


def test_captions_of_splits_are_disjoint_and_never_of_test():
    train, validation = (EasyVqaCaptions(split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (3563, 398)
    assert train[0]["id"].startswith("train-")
    with pytest.raises(ValueError, match="training questions only"):
        EasyVqaCaptions("test")


def test_unknown_split():
    with pytest.raises(ValueError, match="train, validation and test, not 'val'"):
        EasyVqaQuestions("val")


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ValueError, match="pip install easy-vqa") as error:
        EasyVqaQuestions("train")
    assert "\n" not in str(error.value)
