"""From what a user calls a source to a data set: every form, both splits, mixtures."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from made import shards, write_image, write_json
from torch.utils.data import IterableDataset

from xformer_mllm.data.records import Images
from xformer_mllm.data.sources import Mixture, find_source, open_captions, open_questions
from xformer_mllm.data.streams import Stream, ValidationStream
from xformer_mllm.data.transforms import TrainTransform


def ids_of(items):
    return [item["id"] for item in items]


def blip(folder, number=30):
    rows = [
        {"image": write_image(folder / "images" / f"{place}.jpg", place).name, "caption": f"caption {place}"}
        for place in range(number)
    ]
    return write_json(folder / "images" / "blip.json", rows)


def questions(folder, number=30):
    rows = [
        {
            "image": write_image(folder / f"{place}.jpg").name,
            "question": f"{which}?",
            "answers": ["yes", "no"],
            "question_id": 10 * place + which,
        }
        for place in range(number)
        for which in range(3)
    ]
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def captioned(folder, number=30):
    for place in range(number):
        write_image(folder / f"{place}.jpg").with_suffix(".txt").write_text(f"caption {place}")
    return folder


SOURCES = {
    "folder": lambda path: captioned(path / "folder"),
    "json": blip,
    "shards": lambda path: shards(path / "shards", 3, 10),
    "pattern": lambda path: shards(path / "shards", 3, 10) / "{00000..00002}.tar",
}


@pytest.mark.parametrize("kind", SOURCES)
def test_train_and_validation_are_disjoint_and_complete(tmp_path, kind):
    source = str(SOURCES[kind](tmp_path))
    validation = ids_of(open_captions(source, "validation"))
    train = open_captions(source, "train", buffer=4)
    found = ids_of(islice(train, 30 - len(validation)))
    assert len({*found, *validation}) == 30
    assert not {*found} & {*validation}
    assert isinstance(train, Images if kind in ("folder", "json") else Stream)
    if kind == "json":
        assert len(validation) == 1  # one per cent, but one at least


@pytest.mark.parametrize("kind", SOURCES)
def test_items_and_transforms(tmp_path, kind):
    source = str(SOURCES[kind](tmp_path))
    item = next(iter(open_captions(source, "train", buffer=1)))
    assert set(item) == {"id", "image", "caption"}
    assert item["image"].mode == "RGB"
    item = next(iter(open_captions(source, "train", transform=TrainTransform(6), buffer=1)))
    assert (item["image"].dtype, item["image"].shape) == (torch.uint8, (3, 6, 6))


def test_what_is_left_out_is_said_once(tmp_path, caplog):
    folder = captioned(tmp_path)
    write_image(tmp_path / "x.jpg")
    open_captions(str(folder), "train")
    open_captions(str(folder), "validation")
    (line,) = caplog.messages
    assert "skipped 1 without a .txt" in line


def test_broken_rows_are_named_and_count(tmp_path, caplog):
    file = blip(tmp_path, 150)
    rows = json.loads(file.read_text())
    write_json(file, [*rows, {"image": "0.jpg"}])
    dataset = open_captions(str(file), "train")
    assert 'skipped 1 broken: row 150 (neither "caption" nor "question")' in caplog.text
    (tmp_path / "images" / "5.jpg").write_bytes(b"x")
    place = ids_of(dataset.rows[index] for index in dataset.indices).index("5.jpg")
    with pytest.raises(ValueError, match=r"2 of 1\d\d images cannot be read"):
        dataset[place]


def test_seed_decides_captions(tmp_path):
    rows = [{"image": write_image(tmp_path / f"{n}.jpg").name, "caption": ["a", "b", "c"]} for n in range(20)]
    source = str(write_json(tmp_path / "a.json", rows))

    def captions(seed, epoch):
        dataset = open_captions(source, "train", seed=seed)
        dataset.set_epoch(epoch)
        return [item["caption"] for item in dataset]

    assert captions(0, 0) == captions(0, 0)
    assert captions(0, 0) != captions(0, 1)
    assert captions(0, 0) != captions(1, 0)


def test_karpathy_uses_its_own_splits_and_never_test(tmp_path):
    images = [
        {"filename": write_image(tmp_path / f"{split}{n}.jpg").name, "split": split, "sentences": [{"raw": split}]}
        for split in ("train", "restval", "val", "test")
        for n in range(3)
    ]
    source = str(write_json(tmp_path / "dataset_coco.json", {"images": images}))
    captions = {
        split: Counter(item["caption"] for item in open_captions(source, split)) for split in ("train", "validation")
    }
    assert captions == {"train": {"train": 3, "restval": 3}, "validation": {"val": 3}}


def test_only_a_test_split(tmp_path):
    images = [{"filename": write_image(tmp_path / "a.jpg").name, "split": "test", "sentences": [{"raw": "a"}]}]
    source = str(write_json(tmp_path / "dataset_coco.json", {"images": images}))
    with pytest.raises(ValueError, match="has no split to train on, only test"):
        open_captions(source, "train")


def test_questions(tmp_path):
    source = str(questions(tmp_path))
    dataset = open_questions(source, "train")
    assert len(dataset) == 29
    items = dataset[0]
    assert [item["question"] for item in items] == ["0?", "1?", "2?"]
    assert {item["image_id"] for item in items} == {"0.jpg"}
    assert {item["answer"] for item in items} <= {"yes", "no"}
    assert len(open_questions(source, "train", questions_per_image=2)[0]) == 2
    (held_out,) = open_questions(source, "validation")
    assert len(held_out) == 3


def test_questions_in_place_of_captions_and_the_other_way_round(tmp_path):
    with pytest.raises(ValueError, match=r"no captions; it has questions \(xformer train stage2 --text questions\)"):
        open_captions(str(questions(tmp_path)), "train")
    with pytest.raises(ValueError, match=r"no questions; it has captions \(xformer train stage2 --text captions\)"):
        open_questions(str(blip(tmp_path)), "train")


def test_shards_in_place_of_questions_stop(tmp_path):
    source = str(shards(tmp_path, 2, 20))
    with pytest.raises(ValueError, match="11 of 1,000 samples"):
        next(iter(open_questions(source, "train")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "no such data source; expected a folder, FILE.json"),
        ("none.tar", "no shards found"),
        ("notes.txt", "unknown format"),
        ("empty", "no images found"),
    ],
)
def test_what_is_no_source(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        open_captions(str(tmp_path / name), "train")
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- mixtures


def mixture(folder, *sources):
    return str(write_json(folder / "mixture.json", {"comment": "for a test", "sources": list(sources)}))


@pytest.fixture
def both(tmp_path):
    """A list of 30 captions and three shards of ten, each beside the mixture's file."""
    blip(tmp_path)
    shards(tmp_path / "web", 3, 10)
    return tmp_path


def share_of_shards(source, number=600):
    stream = open_captions(source, "train", buffer=1)
    return sum("/" in name for name in ids_of(islice(stream, number))) / number


def test_weights(both):
    blip_source = {"source": "images/blip.json"}
    assert share_of_shards(
        mixture(both, blip_source | {"weight": 1}, {"source": "web", "weight": 3})
    ) == pytest.approx(0.75, abs=0.06)
    with pytest.raises(ValueError, match=r'the size of .*web is unknown .*give it a "weight"'):
        open_captions(mixture(both, blip_source, {"source": "web"}), "train")
    for place in range(3):
        write_json(both / "web" / f"{place:05}_stats.json", {"successes": 10})
    equal = share_of_shards(mixture(both, blip_source, {"source": "web"}))  # 29 captions, 30 samples
    assert equal == pytest.approx(0.5, abs=0.07)


def test_a_mixture_is_a_stream_and_its_validation_in_turn(both):
    source = mixture(both, {"source": "images/blip.json", "images": "images"}, {"source": "web", "weight": 1})
    train, validation = (open_captions(source, split) for split in ("train", "validation"))
    assert isinstance(train, Stream)
    assert isinstance(validation, ValidationStream)
    assert isinstance(train, IterableDataset)
    assert not {*ids_of(validation)} & {*ids_of(islice(train, 100))}
    assert isinstance(find_source(source), Mixture)


def test_sources_of_a_mixture_may_lie_elsewhere(both):
    source = write_json(both / "recipes" / "m.json", {"sources": [{"source": "images/blip.json", "images": "images"}]})
    assert len({*ids_of(islice(open_captions(str(source), "train", images=both), 29))}) == 29
    with pytest.raises(FileNotFoundError, match=r"recipes/images/blip\.json: no such data source"):
        open_captions(str(source), "train")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, r'sources\[0\]: needs a "source"'),
        ({"source": "web", "weigth": 1}, r"sources\[0\]: unknown 'weigth'; known: source, weight"),
        ({"source": "web", "weight": 0}, "must be a positive number, not 0"),
        ({"source": "web", "weight": "many"}, "must be a positive number, not 'many'"),
        ({"source": "nothing"}, "no such data source"),
        ({"source": "inner.json"}, "is a mixture itself"),
    ],
)
def test_malformed_mixtures(both, entry, message):
    write_json(both / "inner.json", {"sources": [{"source": "web", "weight": 1}]})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_source(mixture(both, entry))


def test_a_mixture_of_nothing(tmp_path):
    with pytest.raises(ValueError, match='"sources" must be a list'):
        find_source(mixture(tmp_path))


def test_the_papers_recipe_with_a_little_of_each_set(tmp_path):
    """Each source is drawn by its captions: 8 of COCO, 6 of Visual Genome, 10 of each set of shards."""
    coco = [
        {
            "filepath": "train2014",
            "filename": write_image(tmp_path / "coco" / "train2014" / f"{n}.jpg").name,
            "split": ("train", "restval", "val")[n],
            "sentences": [{"raw": "a"}] * 4,
        }
        for n in range(3)
    ]
    write_json(tmp_path / "coco" / "dataset_coco.json", {"images": coco})
    rows = [{"image": f"VG_100K/{n}.jpg", "caption": str(which)} for n in range(4) for which in range(2)]
    for n in range(4):
        write_image(tmp_path / "vg" / "VG_100K" / f"{n}.jpg")
    write_json(tmp_path / "vg" / "vg_caption.json", rows)
    for name in ("cc3m", "cc12m", "sbu"):
        shards(tmp_path / name, 1, 10)
        write_json(tmp_path / name / "00000_stats.json", {"successes": 10})
    recipe = str(Path(__file__).parent.parent / "recipes" / "data" / "paper-14m.json")
    stream = open_captions(recipe, "train", images=tmp_path, buffer=1)
    assert [part.weight for part in stream.parts] == [8, 6, 10, 10, 10]
    assert len(ids_of(islice(stream, 50))) == 50
