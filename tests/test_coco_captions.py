"""COCO captions: Karpathy's file and LAVIS's, images, results format, bad files; scores are test_caption_metrics.py's."""

import json

import pytest
from PIL import Image

from xformer_mllm.evaluate.coco_captions import CocoCaptions

CAPTIONS = {
    391895: ["A man with a red helmet.", "Man riding a motor bike."],
    60623: ["A young girl inhales.", "A girl blows a candle."],
}
ANSWERS = {"391895": "A man with a red helmet", "60623": ""}


def file_name(image_id):
    return f"COCO_val2014_{image_id:012d}.jpg"


def karpathy_image(image_id, split="test", **changes):
    sentences = [{"tokens": [], "raw": caption, "imgid": 0, "sentid": 0} for caption in CAPTIONS[image_id]]
    record = {"filepath": "val2014", "sentids": [], "filename": file_name(image_id), "imgid": 0, "split": split}
    return record | {"sentences": sentences, "cocoid": image_id} | changes


def lavis_image(image_id, **changes):
    return {"image": f"val2014/{file_name(image_id)}", "caption": CAPTIONS[image_id]} | changes


def truth(captions=CAPTIONS):
    rows = [(image_id, caption) for image_id, texts in captions.items() for caption in texts]
    return {
        "annotations": [
            {"image_id": image_id, "caption": text, "id": number} for number, (image_id, text) in enumerate(rows)
        ],
        "images": [{"id": image_id} for image_id in captions],
    }


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content))

    return write


@pytest.fixture
def karpathy(write, tmp_path):
    """A folder with Karpathy's file: one image for testing, one for validation, one for training."""
    other = karpathy_image(391895, "restval", cocoid=7, filename=file_name(7))
    write("dataset_coco.json", {"images": [other, karpathy_image(391895), karpathy_image(60623, "val")]})
    return tmp_path


@pytest.fixture
def lavis(write, tmp_path):
    """A folder with LAVIS's file."""
    write("coco_karpathy_test.json", [lavis_image(391895), lavis_image(60623)])
    return tmp_path


def test_karpathys_file(karpathy):
    test, val = CocoCaptions(karpathy, "test"), CocoCaptions(karpathy, "val")
    assert [(record.id, record.image_id) for record in test.records] == [("391895", "391895")]
    assert [record.id for record in val.records] == ["60623"]
    assert test.references == {"391895": CAPTIONS[391895]}
    assert test.image_file(test.records[0]) == karpathy / "val2014" / "COCO_val2014_000000391895.jpg"
    assert test.splits[0] == "test"


def test_laviss_file(lavis):
    benchmark = CocoCaptions(lavis, "test")
    assert [record.id for record in benchmark.records] == ["391895", "60623"], "in the file's order"
    assert benchmark.references == {str(image_id): captions for image_id, captions in CAPTIONS.items()}
    assert benchmark.image_file(benchmark.records[1]) == lavis / "val2014" / "COCO_val2014_000000060623.jpg"


def test_laviss_ground_truth_gives_the_references(lavis, write):
    write("coco_karpathy_test_gt.json", truth({391895: ["another one"], 60623: ["and another", "third"], 5: ["more"]}))
    assert CocoCaptions(lavis, "test").references == {"391895": ["another one"], "60623": ["and another", "third"]}
    write("coco_karpathy_test_gt.json", truth({391895: ["another one"]}))
    with pytest.raises(ValueError, match=r"test_gt\.json: no captions of 1 images \(60623\)"):
        CocoCaptions(lavis, "test")


def test_images_in_another_folder(lavis, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (3, 2), "red").save(tmp_path / "elsewhere" / file_name(60623))
    benchmark = CocoCaptions(lavis, "test", tmp_path / "elsewhere")
    assert benchmark.load(benchmark.records[1]).size == (3, 2)
    with pytest.raises(FileNotFoundError, match="391895"):
        benchmark.load(benchmark.records[0])


def test_scores(lavis, monkeypatch):
    monkeypatch.setenv("PATH", "")
    benchmark = CocoCaptions(lavis, "test")
    scores = benchmark.score(ANSWERS)
    assert list(scores) == ["all"]
    assert scores["all"]["n"] == 2
    assert 0 < scores["all"]["CIDEr-D (plain tokenizer)"] < 10
    assert "METEOR" in benchmark.not_computed
    assert benchmark.notes == []
    assert benchmark.score({"60623": "a girl"})["all"]["n"] == 1
    assert "not comparable" in benchmark.notes[0]
    assert benchmark.credit(benchmark.records[0], "a girl") is None


def test_the_official_format_and_back(lavis):
    benchmark = CocoCaptions(lavis, "test")
    official = benchmark.official(dict(reversed(ANSWERS.items())))
    assert official == [
        {"image_id": 391895, "caption": "A man with a red helmet"},
        {"image_id": 60623, "caption": ""},
    ]
    assert benchmark.read_official(json.loads(json.dumps(official))) == list(ANSWERS.items())
    assert benchmark.read_official(official[:1] * 2) == [("391895", "A man with a red helmet")] * 2
    assert benchmark.official({"60623": "a girl"}) == [{"image_id": 60623, "caption": "a girl"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"391895": "a"}, "not a list"),
        (
            [{"image_id": 1, "caption": "a"}, {"image_id": "one", "caption": "a"}],
            r'entry 1: "image_id" is missing or not of type int',
        ),
        ([{"image_id": True, "caption": "a"}], 'entry 0: "image_id"'),
        ([{"image_id": 1}], 'entry 0: "caption" is missing or not of type str'),
        (["a"], 'entry 0: "image_id"'),
    ],
)
def test_malformed_results(lavis, content, message):
    with pytest.raises(ValueError, match=message):
        CocoCaptions(lavis, "test").read_official(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "json: not Karpathy's"),
        ({"images": [{}]}, "json: not Karpathy's"),
        ({"images": [karpathy_image(60623, split=1)]}, r"images\[0\]\.split is missing or not a string"),
        (
            {"images": [karpathy_image(60623, cocoid="x")]},
            "COCO_val2014_000000060623.jpg is not a number",
        ),
        ({"images": [karpathy_image(60623, filename=None)]}, r"images\[0\]\.filename is missing"),
        (
            {"images": [karpathy_image(60623, sentences=[])]},
            r"1 images have no caption \(.*60623.jpg",
        ),
        ({"images": [karpathy_image(60623, sentences=[{}])]}, r'images\[0\]\.sentences: one has no string "raw"'),
        ({"images": [karpathy_image(60623), karpathy_image(60623)]}, r"1 repeated image ids \(60623\)"),
        ({"images": [karpathy_image(60623, "val")]}, "no images in the split 'test'"),
    ],
)
def test_malformed_karpathy_file(write, tmp_path, content, message):
    write("dataset_coco.json", content)
    with pytest.raises(ValueError, match=message) as error:
        CocoCaptions(tmp_path, "test")
    assert str(tmp_path / "dataset_coco.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "not a list"),
        ([{"caption": ["a"]}], r'\[0\]: "image" is missing'),
        ([lavis_image(60623, image="val2014/dog.jpg")], "image id of val2014/dog.jpg is not a number"),
        ([lavis_image(60623, image="val2014/dog_²")], "image id of val2014/dog_² is not a number"),
        ([lavis_image(60623, image=f"COCO_{'1' * 5000}.jpg")], "image id of COCO_1{195} is not a number"),
        ([lavis_image(60623, caption="a girl")], r'\[0\]: "caption" is missing or not of type list'),
        ([lavis_image(60623, caption=[1])], r'\[0\]: "caption" is not a list of strings'),
        ([lavis_image(60623, caption=[])], "1 images have no caption"),
        ([lavis_image(60623)] * 2, "repeated image ids"),
    ],
)
def test_malformed_lavis_file(write, tmp_path, content, message):
    write("coco_karpathy_test.json", content)
    with pytest.raises(ValueError, match=message) as error:
        CocoCaptions(tmp_path, "test")
    assert str(tmp_path / "coco_karpathy_test.json") in str(error.value)


def test_missing_and_broken_files(lavis, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither dataset_coco\.json nor coco_karpathy_val\.json"):
        CocoCaptions(tmp_path, "val")
    (tmp_path / "coco_karpathy_test.json").write_text('[{"image":\n 3,]')
    with pytest.raises(ValueError, match=r"coco_karpathy_test\.json:2:\d+: not valid JSON"):
        CocoCaptions(tmp_path, "test")


def test_settings():
    paper, lavis = CocoCaptions.settings.values()
    assert list(CocoCaptions.settings) == ["paper", "lavis"]
    assert paper.prompt == lavis.prompt == "a photo of", "no space at the end: BPE has it in the next word"
    assert (paper.num_beams, paper.max_new_tokens, paper.min_new_tokens) == (5, 30, 8)
    assert (paper.length_penalty, paper.repetition_penalty) == (1.0, 1.0)
    assert (lavis.length_penalty, lavis.repetition_penalty) == (0.0, 1.15)
