"""Records, what is made of them, and what happens to broken ones."""

import logging
import pickle
from collections import Counter

import pytest
import torch
from made import jpeg
from PIL import Image

from xformer_mllm.data.records import (
    CaptionItems,
    Images,
    QuestionItems,
    check_broken,
    open_image,
    question_of,
    record_of,
    split_indices,
    texts_of,
)
from xformer_mllm.data.table import Table
from xformer_mllm.data.transforms import TrainTransform
from xformer_mllm.model.images import load_image

CAPTIONED = record_of("a", jpeg(200), ["one", "two", "three"])
ASKED = record_of(
    "b",
    jpeg(),
    None,
    [{"id": f"q{number}", "question": f"{number}?", "answers": ["yes", "no"]} for number in range(6)],
)


def images(tmp_path, number, broken=(), **arguments):
    for place in range(number):
        (tmp_path / f"{place}.jpg").write_bytes(b"no image" if place in broken else jpeg(place))
    rows = Table(record_of(f"{place}", tmp_path / f"{place}.jpg", f"caption {place}") for place in range(number))
    return Images("the source", rows, CaptionItems(None, 0), **arguments)


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        (" a cat\n", ["a cat"]),
        ("", []),
        (None, []),
        (["a", " ", None, "b "], ["a", "b"]),
        ([{"raw": "a"}, {"raw": ""}], ["a"]),
        ([{"answer": "yes", "answer_id": 1}, {"answer": "no"}], ["yes", "no"]),
        (("a", "b"), ["a", "b"]),
    ],
)
def test_texts(value, texts):
    assert texts_of(value) == texts


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((None, "a"), "no image"),
        (("", "a"), "no image"),
        ((b"x", None), "no caption"),
        ((b"x", " "), "an empty caption"),
        (
            (b"x", None, [{"id": "1", "question": "", "answers": ["a"]}]),
            "an empty question or no answer",
        ),
    ],
)
def test_what_a_record_lacks(arguments, why):
    assert record_of("a", *arguments) == {"id": "a", "broken": why, "lost": 1}


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answers": ["a", "b"]}, ["a", "b"]),
        ({"answer": "a"}, ["a"]),
        ({"answers": [{"answer": "a"}, {"answer": "a"}]}, ["a", "a"]),
        ({"multiple_choice_answer": "a"}, ["a"]),
        ({}, []),
    ],
)
def test_answers(row, answers):
    assert question_of("x", {"question": " Why? ", **row}) == {"id": "x", "question": "Why?", "answers": answers}
    assert question_of("x", {"question": "?", "question_id": 7, **row})["id"] == "7"


def test_captions_are_resampled_each_epoch_and_reproducible():
    item = CaptionItems(None, seed=0)
    drawn = [item(CAPTIONED, visit)["caption"] for visit in range(300)]
    assert set(Counter(drawn)) == {"one", "two", "three"}
    assert min(Counter(drawn).values()) > 70
    assert drawn == [item(CAPTIONED, visit)["caption"] for visit in range(300)]
    assert drawn != [CaptionItems(None, seed=1)(CAPTIONED, visit)["caption"] for visit in range(300)]


def test_captions_are_cleaned_where_that_is_wished():
    """`clean` itself is held against LAVIS's by test_retrieval.py."""
    record = record_of("a", Image.new("RGB", (4, 4)), 'A "Red" circle; and so on! ' + "word " * 60)
    assert CaptionItems(None, 0)(record, 0)["caption"] == record["captions"][0]
    said = CaptionItems(None, 0, cleaned=True)(record, 0)["caption"]
    assert said == " ".join(["a red circle and so on", *["word"] * 44])
    with pytest.raises(ValueError, match=r"b: the caption '\*\*\*' is empty after cleaning"):
        CaptionItems(None, 0, cleaned=True)(record_of("b", Image.new("RGB", (4, 4)), "***"), 0)


def test_image_is_pil_or_transformed():
    image = CaptionItems(None, 0)(CAPTIONED, 0)["image"]
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert image.getpixel((4, 4))[0] > 150
    pixels = CaptionItems(TrainTransform(4), 0)(CAPTIONED, 0)["image"]
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, 4, 4))


def test_crop_depends_on_the_visit_and_on_nothing_else():
    record = record_of("a", Image.effect_noise((40, 30), 90).convert("RGB"), "noise")
    item = CaptionItems(TrainTransform(16), 0)
    one, again, next_visit = (item(record, visit)["image"] for visit in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, next_visit)


def test_questions_of_an_image():
    items = QuestionItems(None, 0)(ASKED, 0)
    assert [item["id"] for item in items] == [f"q{number}" for number in range(6)]
    assert {item["image_id"] for item in items} == {"b"}
    assert len({id(item["image"]) for item in items}) == 1
    assert {item["answer"] for item in items} <= {"yes", "no"}
    few = QuestionItems(None, 0, at_most=2)
    drawn = [tuple(item["id"] for item in few(ASKED, visit)) for visit in range(20)]
    assert {len(ids) for ids in drawn} == {2}
    assert len(set(drawn)) > 5


def test_more_frequent_answers_are_learned_more_often():
    record = record_of("b", jpeg(), None, [{"id": "q", "question": "?", "answers": ["yes"] * 9 + ["no"]}])
    answers = Counter(QuestionItems(None, 0)(record, visit)[0]["answer"] for visit in range(300))
    assert 15 <= answers["no"] <= 50


@pytest.mark.parametrize("content", [b"no image", b"\xff\xd8\xff", b"GIF89a"])
def test_broken_bytes_are_named(content):
    with pytest.raises(ValueError, match="00003/000030004: ") as error:
        load_image(open_image(content, "00003/000030004"))
    assert "\n" not in str(error.value)


def test_truncated_jpeg_is_named():
    with pytest.raises(ValueError, match="00003/000030004: the image is damaged or cut short"):
        load_image(open_image(jpeg(size=(200, 200))[:-300], "00003/000030004"))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.jpg: no such image"):
        open_image(tmp_path / "a.jpg", "a")


def test_images(tmp_path):
    dataset = images(tmp_path, 5)
    assert [item["id"] for item in dataset] == ["0", "1", "2", "3", "4"]
    assert dataset[-1]["caption"] == "caption 4"
    assert [item["id"] for item in images(tmp_path, 5, indices=[3, 1])] == ["3", "1"]
    with pytest.raises(IndexError):
        dataset[5]


def test_broken_images_are_replaced_up_to_one_percent(tmp_path, caplog):
    dataset = images(tmp_path, 200, broken=(3, 4, 50))
    assert dataset[3]["id"] == "5"
    assert set(dataset.broken) == {"3", "4"}
    assert sum("skipped a broken image" in line for line in caplog.messages) == 2
    with pytest.raises(ValueError, match=r"the source: 3 of 200 images .* 3, 4, 50: not a readable image"):
        dataset[50]


def test_what_was_already_broken_counts(tmp_path):
    dataset = images(tmp_path, 198, broken=(3,))
    assert dataset[3]["id"] == "4"
    known = Images("the source", dataset.rows, dataset.item, None, {"x": "no caption", "y": "no caption"})
    with pytest.raises(ValueError, match="3 of 200"):
        known[3]


def test_epoch_reaches_a_copy_in_shared_memory(tmp_path):
    rows = Table([record_of("a", str(tmp_path / "a.jpg"), [f"caption {number}" for number in range(50)])])
    (tmp_path / "a.jpg").write_bytes(jpeg())
    dataset = Images("the source", rows, CaptionItems(None, 0))
    loader = torch.utils.data.DataLoader(
        dataset, 1, num_workers=1, persistent_workers=True, collate_fn=lambda items: items[0]["caption"]
    )
    drawn = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        drawn += [*loader, dataset[0]["caption"]]
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) > 1


def test_table_gives_back_what_went_in_and_survives_a_pickle():
    records = [{**CAPTIONED, "image": "a.jpg"}, {**ASKED, "image": "b.jpg"}]
    original = Table(records)
    table = pickle.loads(pickle.dumps(original))
    del original  # and its file
    assert [table[0], table[1]] == records
    assert (len(table), list(table.ids())) == (2, ["a", "b"])
    assert (list(table.counts["captions"]), list(table.counts["questions"])) == ([3, 0], [0, 6])


def test_splits_are_disjoint_complete_and_stay():
    ids = [str(number) for number in range(1000)]
    split = {name: [ids[place] for place in split_indices(ids, name, 0.1)] for name in ("train", "validation")}
    assert sorted(split["train"] + split["validation"]) == sorted(ids)
    assert 60 <= len(split["validation"]) <= 140
    more = [*ids, *map(str, range(1000, 1100))]
    assert set(split["validation"]) <= {more[place] for place in split_indices(more, "validation", 0.1)}
    assert len(split_indices(ids[:3], "validation", 0.0)) == 1


def test_one_percent_is_allowed():
    check_broken("s", 1, 100, {"a": "no image"})
    with pytest.raises(
        ValueError, match=r"s: 2 of 100 images cannot be read, more than 1%: a: no image; b: x; repair"
    ):
        check_broken("s", 2, 100, {"a": "no image", "b": "x"})
    with pytest.raises(ValueError, match=r"a, b, c, d, e: no image; \.\.\.; repair"):
        check_broken("s", 6, 100, dict.fromkeys("abcdef", "no image"))


def test_broken_samples_with_the_same_cause_are_named_together():
    broken = {"a.png": "/in/a.png: cut short", "b": "no image", "c.png": "/in/c.png: cut short"}
    with pytest.raises(ValueError, match=r"a\.png, c\.png: cut short; b: no image; repair or remove them"):
        check_broken("s", 3, 100, broken)


def test_nothing_is_said_of_sound_images(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        list(images(tmp_path, 3))
    assert not caplog.messages
