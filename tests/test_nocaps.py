"""NoCaps: its files, domains, results format, bad files; scores are test_caption_metrics.py's."""

import json

import pytest

from xformer_mllm.evaluate.coco_captions import CocoCaptions
from xformer_mllm.evaluate.nocaps import NoCaps

DOMAINS = ["in-domain", "near-domain", "near-domain", "in-domain", "near-domain"]


def image(number, **changes):
    return {
        "id": number,
        "open_images_id": f"{number:016x}",
        "file_name": f"{number:016x}.jpg",
        "domain": DOMAINS[number],
        "coco_url": "",
    } | changes


def content(**changes):
    """Five images, not in the order of their ids, none of them out-domain; ten captions each."""
    annotations = [
        {"image_id": number, "id": 10 * number + place, "caption": f"A {word} on a bench number {number}."}
        for number in range(5)
        for place, word in enumerate(["dog", "cat", "man", "girl", "bus", "car", "cow", "sheep", "box", "hat"])
    ]
    return {
        "licenses": [],
        "info": {},
        "images": [image(number) for number in (3, 1, 2, 0, 4)],
        "annotations": annotations,
    } | changes


@pytest.fixture
def nocaps(tmp_path):
    def write(new=None):
        (tmp_path / "nocaps_val_4500_captions.json").write_text(json.dumps(content() if new is None else new))
        return NoCaps(tmp_path, "val")

    return write


def test_records_and_images(nocaps, tmp_path):
    benchmark = nocaps()
    assert [record.id for record in benchmark.records] == ["3", "1", "2", "0", "4"]
    assert benchmark.image_file(benchmark.records[0]) == tmp_path / "images" / "0000000000000003.jpg"
    elsewhere = NoCaps(tmp_path, "val", tmp_path / "validation")
    assert elsewhere.image_file(elsewhere.records[0]) == tmp_path / "validation" / "0000000000000003.jpg"
    assert len(benchmark.references["0"]) == 10


def test_every_domain_is_scored_as_if_it_were_alone(nocaps, monkeypatch):
    monkeypatch.setenv("PATH", "")
    benchmark = nocaps()
    answers = {record.id: f"a dog on a bench number {record.id}" for record in benchmark.records} | {"2": "a truck"}
    scores = benchmark.score(answers)
    assert {group: found["n"] for group, found in scores.items()} == {"all": 5, "in-domain": 2, "near-domain": 3}
    alone = content(images=[image(number) for number in (1, 2, 4)])
    assert nocaps(alone).score({name: answers[name] for name in ("1", "2", "4")})["all"] == scores["near-domain"]
    assert scores["all"]["CIDEr-D (plain tokenizer)"] != scores["near-domain"]["CIDEr-D (plain tokenizer)"]


def test_the_official_format_and_back(nocaps):
    benchmark = nocaps()
    official = benchmark.official({"0": "a dog", "3": ""})
    assert official == [{"image_id": 3, "caption": ""}, {"image_id": 0, "caption": "a dog"}]
    assert benchmark.read_official(official) == [("3", ""), ("0", "a dog")]


def test_the_test_split_has_no_captions(tmp_path):
    images = [image(number) for number in (0, 1)]
    for entry in images:
        del entry["domain"]
    (tmp_path / "nocaps_test_image_info.json").write_text(json.dumps({"images": images}))
    benchmark = NoCaps(tmp_path, "test")
    answers = {record.id: "a dog" for record in benchmark.records}
    assert benchmark.score(answers) == {"all": {"n": 2}}
    assert "not public" in benchmark.not_computed["every score"]
    assert benchmark.official(answers)[1] == {"image_id": 1, "caption": "a dog"}


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ([], 'json: "images" is missing or not of type list'),
        (content(images=[]), "no images"),
        (content(images=["a"]), r'images\[0\]: "id" is missing or not of type int'),
        (content(images=[image(0, file_name=3)]), r'images\[0\]: "file_name" is missing or not of type str'),
        (content(images=[image(0), image(1, domain=None)]), r'images\[1\]: "domain" is missing'),
        (content(images=[image(0, domain="outer")]), r"images\[0\]\.domain is 'outer', not one of in-domain"),
        (content(images=[image(0), image(0)]), r"1 repeated image ids \(0\)"),
        (content(annotations=None), 'json: "annotations" is missing or not of type list'),
        (content(annotations=[{"image_id": 0}]), r'annotations\[0\]: "caption" is missing'),
        (content(annotations=[{"image_id": 0, "caption": "a"}]), r"no captions of 4 images \(3, 1, 2\)"),
    ],
)
def test_malformed_file(nocaps, tmp_path, new, message):
    with pytest.raises(ValueError, match=message) as error:
        nocaps(new)
    assert str(tmp_path / "nocaps_val_4500_captions.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nocaps_val_4500_captions\.json: no such file"):
        NoCaps(tmp_path, "val")


def test_settings():
    assert NoCaps.settings["paper"] == CocoCaptions.settings["paper"]
    lavis = NoCaps.settings["lavis"]
    assert (lavis.prompt, lavis.num_beams, lavis.max_new_tokens, lavis.min_new_tokens) == ("", 5, 80, 10)
    assert (lavis.length_penalty, lavis.repetition_penalty) == (1.0, 1.15)
