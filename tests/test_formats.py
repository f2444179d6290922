"""Every list of images that is read, as its authors write it."""

import json

import pytest
from made import write_image, write_json

from xformer_mllm.data.formats import read_folder, read_json_lines_source, read_json_source
from xformer_mllm.data.sources import find_source


def read(file, images=None):
    return read_json_source(file, json.loads(file.read_text()), images)


def records(found, split=""):
    rows = found.rows[split]
    return [rows[place] for place in range(len(rows))]


def blip(folder, number=3):
    for place in range(number):
        write_image(folder / f"{place}.jpg")
    return [{"image": f"{place}.jpg", "caption": f"caption {place}"} for place in range(number)]


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
    with pytest.raises(ValueError, match=rf"3 of 106 records .*row 220 \({why}\)"):
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
