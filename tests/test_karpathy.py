"""Karpathy's file, and the errors of malformed ones."""

import pytest
from made import write_json

from xformer_mllm.data.formats import KarpathyImage, is_karpathy, read_karpathy


def image(**changes):
    return {
        "filepath": "val2014",
        "filename": "COCO_val2014_000000000042.jpg",
        "cocoid": 42,
        "imgid": 0,
        "split": "test",
        "sentences": [{"raw": "A cat.", "tokens": ["a", "cat"]}, {"raw": "One cat."}],
    } | changes


def test_coco(tmp_path):
    file = write_json(tmp_path / "dataset_coco.json", {"images": [image(), image(split="restval")], "dataset": "coco"})
    path = "val2014/COCO_val2014_000000000042.jpg"
    assert read_karpathy(file) == [
        KarpathyImage("test", path, "42", ("A cat.", "One cat.")),
        KarpathyImage("restval", path, "42", ("A cat.", "One cat.")),
    ]


def test_flickr_has_neither_folder_nor_coco_number(tmp_path):
    flickr = {
        name: value for name, value in image(filename="1.jpg", imgid=7).items() if name[:4] not in ("file", "coco")
    }
    file = write_json(tmp_path / "dataset_flickr30k.json", {"images": [{**flickr, "filename": "1.jpg"}]})
    assert read_karpathy(file) == [KarpathyImage("test", "1.jpg", "7", ("A cat.", "One cat."))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": None}, r"images\[1\]\.split is missing or not a string"),
        ({"filename": 3}, r"images\[1\]\.filename is missing or not a string"),
        ({"sentences": "A cat."}, r"images\[1\]\.sentences is missing or not a list"),
        ({"sentences": [{"tokens": []}]}, r'images\[1\]\.sentences: one has no string "raw"'),
    ],
)
def test_malformed_files_are_named_with_the_place(tmp_path, changes, message):
    file = write_json(tmp_path / "dataset_coco.json", {"images": [image(), image(**changes)]})
    with pytest.raises(ValueError, match=r"dataset_coco\.json: " + message):
        read_karpathy(file)


@pytest.mark.parametrize(
    "content", [[], {}, {"images": []}, {"images": [{"id": 1}], "annotations": []}, {"images": [3]}]
)
def test_other_files_are_none_of_his(tmp_path, content):
    assert not is_karpathy(content)
    with pytest.raises(ValueError, match="not Karpathy's"):
        read_karpathy(write_json(tmp_path / "a.json", content))
