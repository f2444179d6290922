"""Every list of images that is read, as its authors write it."""

import json
import tracemalloc

import pytest
from made import write_image, write_json

from xformer_mllm.data.folders import read_folder
from xformer_mllm.data.formats import read_csv_source, read_json_lines_source, read_json_source
from xformer_mllm.data.records import QuestionItems
from xformer_mllm.data.sources import find_source, open_captions, open_questions


def read(file, images=None):
    return read_json_source(file, json.loads(file.read_text()), images)


def records(found, split=""):
    rows = found.rows[split]
    return [rows[place] for place in range(len(rows))]


def blip(folder, number=3):
    for place in range(number):
        write_image(folder / f"{place}.jpg")
    return [{"image": f"{place}.jpg", "caption": f"caption {place}"} for place in range(number)]


def test_a_long_list_takes_little_memory(tmp_path):
    """Bytes of Python's a row, without Arrow's: benchmarks/lists.py measures the whole."""
    rows = [{"image": f"{place}.jpg", "caption": f"image number {place}"} for place in range(10_000)]
    write_image(tmp_path / "0.jpg")
    open_captions(str(write_json(tmp_path / "few.json", rows[:100])), "train")  # imports
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tracemalloc.start()
    try:
        dataset = open_captions(str(file), "train")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 9800 < len(dataset) < 10_000
    assert held / 10_000 < 25
    assert peak / 10_000 < 1120


def test_blip(tmp_path):
    found = read(write_json(tmp_path / "pretrain.json", blip(tmp_path)))
    assert found.format == 'a JSON list of {"image", "caption"}'
    assert records(found) == [
        {"id": f"{n}.jpg", "image": str(tmp_path / f"{n}.jpg"), "captions": [f"caption {n}"], "questions": []}
        for n in range(3)
    ]


def test_rows_about_the_same_image_are_one_record(tmp_path):
    rows = [*blip(tmp_path), {"image": "0.jpg", "caption": ["again", "and again"], "image_id": "coco_0"}]
    first, *others = records(read(write_json(tmp_path / "coco_karpathy_train.json", rows)))
    assert first["captions"] == ["caption 0", "again", "and again"]
    assert [record["id"] for record in others] == ["1.jpg", "2.jpg"]


def test_lists_of_addresses_are_refused(tmp_path):
    file = write_json(tmp_path / "ccs_filtered.json", [{"url": "http://a/b.jpg", "caption": "a"}])
    with pytest.raises(ValueError, match=r"ccs_filtered\.json: lists URLs.*img2dataset"):
        read(file)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"caption": "a"}, 'no "image"'),
        ({"image": "0.jpg"}, 'neither "caption" nor "question"'),
        ({"image": "0.jpg", "caption": " "}, "an empty caption"),
        ({"image": "0.jpg", "question": "?"}, "an empty question or no answer"),
        (["0.jpg", "a"], "not an object"),
    ],
)
def test_a_broken_row_is_named_and_too_many_stop(tmp_path, row, why):
    rows = blip(tmp_path, 3) * 40  # 120 rows about three images
    for place in range(3, 103):
        rows.append({"image": write_image(tmp_path / f"{place}.jpg").name, "caption": "a"})
    found = read(write_json(tmp_path / "a.json", [*rows, row]))
    assert found.broken == {"row 220": why}
    assert len(found.rows[""]) == 103
    with pytest.raises(ValueError, match=rf"3 of 106 records .*: row 220, row 221, row 222: {why}; repair"):
        find_source(str(write_json(tmp_path / "a.json", [*rows, row, row, row])))


def test_json_lines_with_captions_and_questions(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / name)
    lines = [
        {"image": "a.jpg", "caption": "a cat"},
        {"image": "a.jpg", "caption": ["one cat", "the cat"]},
        {"image": "b.jpg", "question": "How many cats?", "answers": ["one", "1"]},
        {"image": "b.jpg", "question": "Is it raining?", "answer": "no", "question_id": 17},
        {"image": "a.jpg", "question": "Where?", "answer": "here"},
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n")
    cats, questions = records(read_json_lines_source(file, None))
    assert cats["captions"] == ["a cat", "one cat", "the cat"]
    assert cats["questions"] == [{"id": "a.jpg/0", "question": "Where?", "answers": ["here"]}]
    assert questions["captions"] == []
    assert questions["questions"] == [
        {"id": "b.jpg/0", "question": "How many cats?", "answers": ["one", "1"]},
        {"id": "17", "question": "Is it raining?", "answers": ["no"]},
    ]


def test_a_line_that_is_not_json_is_one_broken_record(tmp_path):
    lines = [json.dumps({"image": write_image(tmp_path / f"{n}.jpg").name, "caption": "a"}) for n in range(150)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([lines[0], '{"image": "x.jpg", "capt', *lines[1:]]))
    found = read_json_lines_source(file, None)
    assert len(found.rows[""]) == 150
    assert list(found.broken) == ["line 2"]
    assert "not valid JSON" in found.broken["line 2"]


def test_coco_captions_in_the_official_layout(tmp_path):
    write_image(tmp_path / "train2014" / "COCO_train2014_000000000009.jpg")
    content = {
        "info": {},
        "images": [{"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 8, "height": 8}],
        "annotations": [
            {"image_id": 9, "id": 1, "caption": "A meal."},
            {"image_id": 9, "id": 2, "caption": "Food.\n"},
        ],
    }
    found = read(write_json(tmp_path / "annotations" / "captions_train2014.json", content))
    assert found.format == "COCO captions"
    assert records(found) == [
        {
            "id": "COCO_train2014_000000000009.jpg",
            "image": str(tmp_path / "train2014" / "COCO_train2014_000000000009.jpg"),
            "captions": ["A meal.", "Food."],
            "questions": [],
        }
    ]


def test_coco_annotations_that_cannot_be_used(tmp_path):
    images = [{"id": n, "file_name": write_image(tmp_path / f"{n}.jpg").name} for n in range(300)]
    captions = [{"image_id": n, "caption": "a"} for n in range(300)]
    wrong = [{"image_id": 999, "caption": "of nothing"}, {"image_id": 3, "caption": ""}]
    found = read(write_json(tmp_path / "captions_x.json", {"images": images, "annotations": [*captions, *wrong]}))
    assert found.broken == {
        "annotations[300]": "image 999 is not listed",
        "annotations[301]": "no caption",
    }


def test_karpathy_splits(tmp_path):
    images = [
        {"filepath": folder, "filename": f"{split}.jpg", "split": split, "sentences": [{"raw": split}], "cocoid": 1}
        for split, folder in (("train", "train2014"), ("restval", "val2014"), ("val", "val2014"), ("test", "val2014"))
    ]
    for image in images:
        write_image(tmp_path / image["filepath"] / image["filename"])
    found = read(write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"}))
    ids = {split: [record["id"] for record in records(found, split)] for split in found.rows}
    assert ids == {
        "train": ["train2014/train.jpg", "val2014/restval.jpg"],
        "validation": ["val2014/val.jpg"],
        "test": ["val2014/test.jpg"],
    }


def test_visual_genome_regions_in_two_folders(tmp_path):
    write_image(tmp_path / "images" / "VG_100K" / "1.jpg")
    write_image(tmp_path / "images" / "VG_100K_2" / "2.jpg")
    region = {"x": 0, "y": 0, "width": 3, "height": 3}
    content = [
        {"id": 1, "regions": [{"phrase": "a clock", "image_id": 1, **region}, {"phrase": "green trees", **region}]},
        {"id": 2, "regions": [{"phrase": "a wall", "image_id": 2, **region}]},
    ]
    found = read(write_json(tmp_path / "region_descriptions.json", content), tmp_path / "images")
    assert [(record["image"], record["captions"]) for record in records(found)] == [
        (str(tmp_path / "images" / "VG_100K" / "1.jpg"), ["a clock", "green trees"]),
        (str(tmp_path / "images" / "VG_100K_2" / "2.jpg"), ["a wall"]),
    ]


def test_folders_of_the_authors_machine_are_passed_over(tmp_path):
    write_image(tmp_path / "VG_100K" / "7.jpg")
    rows = [{"image": "/export/home/data/vg/VG_100K/7.jpg", "caption": "a"}]
    (record,) = records(read(write_json(tmp_path / "vg_caption.json", rows), tmp_path))
    assert record["image"] == str(tmp_path / "VG_100K" / "7.jpg")
    assert record["id"] == "/export/home/data/vg/VG_100K/7.jpg"


def test_images_that_are_nowhere(tmp_path):
    file = write_json(tmp_path / "a" / "list.json", [{"image": "b/1.jpg", "caption": "a"}])
    with pytest.raises(FileNotFoundError, match=r"list\.json: images not found .* b/1\.jpg .*--images"):
        read(file)


@pytest.mark.parametrize("content", [{"a": 1}, [], [3], "text", {"images": []}])
def test_unknown_content(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.json: unknown format"):
        read(write_json(tmp_path / "a.json", content))


def test_nothing_usable(tmp_path):
    with pytest.raises(ValueError, match=r"no image with a caption or a question .*row 0.*no \"image\""):
        read(write_json(tmp_path / "a.json", [{"caption": "a"}]))


def test_folder(tmp_path):
    write_image(tmp_path / "a.jpg").with_suffix(".txt").write_text("a cat\nein Katze")
    write_image(tmp_path / "b.jpg")
    found = read_folder(tmp_path)
    (record,) = records(found)
    assert (record["id"], record["captions"]) == ("a.jpg", ["a cat"])
    assert found.skipped["without a .txt"] == 1
    assert found.validation_share == 0.1


# ---- LLaVA


def said(*turns):
    """Conversations as LLaVA's, of texts in turn."""
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]


def llava(folder, *conversations):
    rows = [
        {"id": f"{n}", "image": write_image(folder / "coco" / f"{n}.jpg").relative_to(folder).as_posix(), **each}
        for n, each in enumerate(conversations)
    ]
    return write_json(folder / "llava.json", rows)


def test_llava_turns_become_questions_with_answers(tmp_path):
    turns = said("<image>\nWhat is the cat on?", "A chair.", "Why?", "To sleep.\n"), said("Where?\n<image>", "Here.")
    found = read(llava(tmp_path, *({"conversations": each} for each in turns)))
    assert found.format == "LLaVA's conversations"
    cat, other = records(found)
    assert cat["captions"] == other["captions"] == []
    assert cat["questions"] == [
        {"id": "coco/0.jpg/0", "question": "What is the cat on?", "answers": ["A chair."]},
        {"id": "coco/0.jpg/1", "question": "Why?", "answers": ["To sleep."]},
    ]
    assert other["questions"] == [{"id": "coco/1.jpg/0", "question": "Where?", "answers": ["Here."]}]


def test_llava_brief_descriptions_are_captions_too(tmp_path):
    brief = said("Render a clear and concise summary of the photo.\n<image>", "a cat")
    file = llava(tmp_path, *({"conversations": brief} for _ in range(3)))
    assert {item["caption"] for item in open_captions(str(file), "train")} == {"a cat"}
    (asked,) = open_questions(str(file), "train")[0]
    assert (asked["question"], asked["answer"]) == ("Render a clear and concise summary of the photo.", "a cat")
    twice = said("Describe the image concisely.", "a cat", "Why?", "because")
    assert records(read(llava(tmp_path, {"conversations": twice})))[0]["captions"] == []


@pytest.mark.parametrize("image", [{}, {"image": None}, {"image": ""}])
def test_llava_text_only_entries_are_skipped(tmp_path, image):
    rows = [{"id": "t", "conversations": said("Hello?", "Hello."), **image}] * 5
    file = llava(tmp_path, {"conversations": said("Where?", "Here.")})
    found = read(write_json(file, [*json.loads(file.read_text()), *rows]))
    assert (found.skipped, found.broken) == ({"without an image (text only)": 5}, {})
    with pytest.raises(ValueError, match=r"no image with .* \(5 without an image \(text only\)\)"):
        read(write_json(tmp_path / "texts.json", rows))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"conversations": said("Where?")}, 'not from "human" and "gpt" in turn'),
        ({"conversations": said("Where?", "Here.")[::-1]}, 'not from "human" and "gpt" in turn'),
        ({"conversations": []}, "not a list of"),
        ({"conversations": ["Where?"]}, "not a list of"),
        ({"conversations": said("<image>", "Here.")}, "an empty question or no answer"),
        ({"conversations": said("Where?", "")}, "an empty question or no answer"),
        ({"conversations": said(["Where?"], "Here.")}, 'a question is ["Where?"], neither text nor a number'),
        ({"image": ["a.jpg", "b.jpg"], "conversations": said("Where?", "Here.")}, '"image" is ["a.jpg", "b.jpg"]'),
        ({"image": None, "video": "a.mp4", "conversations": said("Where?", "Here.")}, 'no "image"'),
    ],
)
def test_broken_conversations(tmp_path, row, why):
    found = read(llava(tmp_path, {"conversations": said("Where?", "Here.")}, row))
    assert list(found.broken) == ["row 1"]
    assert why in found.broken["row 1"]


# ---- imagefolder and CSV


def metadata(folder, name, rows):
    """A folder as Hugging Face's imagefolder."""
    for row in rows:
        write_image(folder / row["file_name"])
    if name.endswith(".jsonl"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = "\ufeff" + "\r\n".join(
            [",".join(rows[0]), *(",".join(f'"{text}"' for text in row.values()) for row in rows)]
        )
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("key", ["text", "caption", "captions"])
def test_imagefolder(tmp_path, name, key):
    rows = [{"file_name": f"{n}.jpg", key: f"a cat, {n}"} for n in range(3)]
    metadata(tmp_path, name, rows)
    write_image(tmp_path / "unlisted.jpg")
    for found in (find_source(str(tmp_path)), find_source(str(tmp_path / name))):
        assert [(record["id"], record["captions"]) for record in records(found)] == [
            (f"{n}.jpg", [f"a cat, {n}"]) for n in range(3)
        ]
        assert records(found)[0]["image"] == str(tmp_path / "0.jpg")
    found = find_source(str(tmp_path))
    assert found.format == f"Hugging Face's imagefolder with {name}"
    assert found.skipped["not in the metadata"] == 1


def test_imagefolder_with_questions(tmp_path):
    metadata(tmp_path, "metadata.csv", [{"file_name": "a.jpg", "question": "How many?", "answer": "3"}])
    (record,) = records(find_source(str(tmp_path)))
    assert record["questions"] == [{"id": "a.jpg/0", "question": "How many?", "answers": ["3"]}]


def test_imagefolder_of_splits(tmp_path):
    for split in ("train", "val", "test"):
        metadata(tmp_path / split, "metadata.jsonl", [{"file_name": "a.jpg", "text": split}])
    found = find_source(str(tmp_path))
    assert {split: [record["id"] for record in records(found, split)] for split in found.rows} == {
        "train": ["train/a.jpg"],
        "validation": ["val/a.jpg"],
        "test": ["test/a.jpg"],
    }
    metadata(tmp_path, "metadata.csv", [{"file_name": "train/b.jpg", "text": "b"}])
    assert len(find_source(str(tmp_path)).rows["train"]) == 2  # one file at the root lists splits, too
    metadata(tmp_path / "other", "metadata.csv", [{"file_name": "a.jpg", "text": "a"}])
    assert list(find_source(str(tmp_path)).rows) == [""]


def test_imagefolder_with_two_kinds_of_metadata(tmp_path):
    for name in ("metadata.jsonl", "metadata.csv"):
        metadata(tmp_path, name, [{"file_name": "a.jpg", "text": "a"}])
    with pytest.raises(ValueError, match=r"has a metadata\.jsonl and a metadata\.csv; pass the file"):
        find_source(str(tmp_path))


def test_csv_rows_with_too_many_fields_are_broken(tmp_path):
    write_image(tmp_path / "a.jpg")
    rows = "a.jpg,a cat\n" * 200 + 'a.jpg,a cat, on a chair\na.jpg,"a cat, on a chair"\n'
    (tmp_path / "a.csv").write_text(f"image,caption\n{rows}")
    found = read_csv_source(tmp_path / "a.csv", None)
    assert list(found.broken) == ["line 202"]
    assert "put texts with commas in quotes" in found.broken["line 202"]
    assert records(found)[0]["captions"][-1] == "a cat, on a chair"


def test_csv_with_an_open_quote_is_an_error(tmp_path):
    (tmp_path / "a.csv").write_text('image,caption\na.jpg,"a cat\nb.jpg,a dog\n')
    with pytest.raises(ValueError, match=r"a\.csv:3: not valid CSV"):
        read_csv_source(tmp_path / "a.csv", None)


# ---- answers and captions that are no texts


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["yes", 3, 3, 3], ["yes", "3", "3", "3"]),
        (3, ["3"]),
        (0, ["0"]),
        (2.5, ["2.5"]),
        ([{"answer": 3}, {"answer": "three"}], ["3", "three"]),
        (["yes", None, ""], ["yes"]),
    ],
)
def test_answers_that_are_numbers_become_their_text(tmp_path, answers, expected):
    row = {"image": write_image(tmp_path / "a.jpg").name, "question": "How many?", "answer": answers}
    (record,) = records(read(write_json(tmp_path / "a.json", [row])))
    assert record["questions"][0]["answers"] == expected
    (item,) = QuestionItems(None, 0)(record, 0)
    assert item["answer"] in expected


@pytest.mark.parametrize(
    ("answer", "shown"),
    [(True, "true"), (["yes", False], "false"), ({"yes": 3}, '{"yes": 3}'), ([["a"]], '["a"]'), (float("nan"), "NaN")],
)
def test_answers_of_other_kinds_are_broken(tmp_path, answer, shown):
    write_image(tmp_path / "a.jpg")
    rows = [{"image": "a.jpg", "caption": "a"}, {"image": "a.jpg", "question": "Why?", "answer": answer}]
    assert read(write_json(tmp_path / "a.json", rows)).broken == {
        "row 1": f"an answer is {shown}, neither text nor a number"
    }
    rows[1] = {"image": "a.jpg", "caption": answer}
    assert read(write_json(tmp_path / "a.json", rows)).broken == {
        "row 1": f"a caption is {shown}, neither text nor a number"
    }


def test_texts_that_are_not_unicode_are_broken(tmp_path):
    write_image(tmp_path / "a.jpg")
    rows = [
        {"image": "a.jpg", "caption": "a"},
        {"image": "a.jpg", "caption": "\ud83d"},
        {"image": "\udce9.jpg", "caption": "a"},
    ]
    assert read(write_json(tmp_path / "a.json", rows)).broken == {
        "row 1": r"a caption is not valid Unicode: \ud83d",
        r"\udce9.jpg": "the image's path is not valid Unicode",
    }


@pytest.mark.parametrize("line", ["[" * 100_000, '{"image": "a.jpg", "caption": ' + "1" * 5000 + "}"])
def test_lines_that_python_cannot_hold_are_broken(tmp_path, line):
    good = json.dumps({"image": write_image(tmp_path / "a.jpg").name, "caption": "a"})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n")
    assert list(read_json_lines_source(tmp_path / "a.jsonl", None).broken) == ["line 2"]


# ---- unknown forms


@pytest.mark.parametrize(
    ("content", "nearest"),
    [
        ([{"img": "a.jpg", "captions": "a"}], 'nearest is [{"image", "caption"}], but "image", "caption" is missing'),
        ([{"picture": "a.jpg", "conversation": []}], 'nearest is LLaVA\'s [{"image", "conversations"}]'),
        (
            [{"filename": "a.jpg", "text": "a"}],
            'nearest is imagefolder\'s {"file_name", "text"}, but "file_name" is missing',
        ),
        (
            {"images": [], "annotation": []},
            'nearest is COCO\'s {"images", "annotations"}, but "annotations" is missing',
        ),
        ({"source": []}, 'nearest is a mixture {"sources"}, but "sources" is missing'),
        ([{"x": 1}], 'its keys are "x"; known are [{"image", "caption"}], '),
    ],
)
def test_an_unknown_form_names_the_nearest(tmp_path, content, nearest):
    with pytest.raises(ValueError, match=r"a\.json: ") as error:
        read(write_json(tmp_path / "a.json", content))
    assert nearest in str(error.value)
    assert "Visual Genome's" in str(error.value)  # and all others
